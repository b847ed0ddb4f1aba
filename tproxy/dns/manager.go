package dns

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path"
	"strings"
)

// Manager installs our nameserver in a file that nobody else manages, and takes it
// out again. It must not run twice at the same time for one file.
//
// An install writes, in this order, a record, a backup and the file; each comes to
// be in one step, by a rename. An uninstall puts the file right and then removes
// backup and record. So a run that is killed leaves a file that is the old or the
// new one, and the next run finishes. A mount point cannot be replaced: there it is
// one write in place, after a journal that says what it is to become.
type Manager struct {
	Env        Env // Env.View may be nil: then it is FS
	FS         FS
	Namespaces Namespaces
}

// How is the way in which a file is changed.
type How int

// The ways.
const (
	// Unchanged is a file that is right already.
	Unchanged How = iota
	// Replace is by rename, with owner, mode and extended attributes kept.
	Replace
	// InPlace is for a mount point, which rename cannot replace: one write. Who
	// reads at that very moment may see a part of it.
	InPlace
	// Create is for a file that is not there.
	Create
	// Delete is for one that was not there before.
	Delete
)

func (h How) String() string {
	return [...]string{"unchanged", "replaced by rename", "written in place", "made", "removed"}[h]
}

// Plan is what an install would do, or did.
type Plan struct {
	Path    string
	Target  string // the file that Path leads to
	Address netip.Addr
	How     How
	// Text is what the file has afterwards.
	Text []byte
	// Backup is the backup of the file as it was; empty where there is none.
	Backup string
	// Foreign are backups that are not ours, in places of ours. They are left.
	Foreign []string
	// Listed, OutOfReach: see [Edit].
	Listed     int
	OutOfReach []netip.Addr
	// Limits are those that the file goes beyond afterwards.
	Limits []Limit
	Mode   Mode
	Clues  []Clue

	before state
}

// String says what the install does.
func (p Plan) String() string {
	what := fmt.Sprintf("nameserver %s first in %s", p.Address, p.Path)
	if p.Target != p.Path {
		what += ", which is " + p.Target
	}
	switch {
	case p.Listed > 0:
		return fmt.Sprintf("%s: line %d has it already, and is not ours", what, p.Listed)
	case p.How == Unchanged:
		return what + ": it is"
	}
	what += " (" + p.How.String() + ")"
	if p.Backup != "" {
		what += ", backup in " + p.Backup
	}
	return what
}

// Undo says how that is taken back.
func (p Plan) Undo() string {
	switch p.How {
	case Unchanged:
		return "nothing"
	case Create:
		return "no " + p.Path
	}
	return p.Path + " as it was; what somebody else changed meanwhile stays"
}

// Notes is what the operator should know.
func (p Plan) Notes() []string {
	var out []string
	for _, f := range p.Foreign {
		out = append(out, fmt.Sprintf("%s is not a backup of ours: it is left, and never restored", f))
	}
	if p.Listed > 0 {
		out = append(out, fmt.Sprintf("%s line %d names %s, and is not ours: uninstall leaves it", p.Path, p.Listed, p.Address))
	}
	for _, a := range p.OutOfReach {
		if a == Default() {
			out = append(out, fmt.Sprintf("%s named no nameserver, so the C library asked %s; from now on it asks %s alone", p.Path, a, p.Address))
		} else {
			out = append(out, fmt.Sprintf("the C library asks %d nameservers: %s in %s is out of its reach from now on", MaxNameservers, a, p.Path))
		}
	}
	for _, l := range p.Limits {
		if l.What != "nameservers" {
			out = append(out, p.Path+" "+l.String())
		}
	}
	return out
}

// state is a file and what stands beside it.
type state struct {
	place
	kept
	text  []byte
	mount string
	// source is what an edit begins with: the text, or what a write in place that
	// was stopped half-way was to make of it.
	source []byte
	torn   bool // it was stopped half-way
	ours   bool // our mark is in the source
}

func (m Manager) view() View {
	if m.Env.View != nil {
		return m.Env.View
	}
	return m.FS
}

// look reads all there is to know, and writes nothing. What stands beside the file
// is known even where the error is for the file itself.
func (m Manager) look() (state, error) {
	var s state
	var err error
	if s.place, err = find(m.view(), m.Env.Path); err != nil {
		return s, err
	}
	if on, ok := mountOf(m.Env.Mounts, s.target); ok && on.Point == s.target && on.Point != "/" {
		s.mount = on.Root
	}
	if s.kept, err = look(m.view(), s.path, s.mount); err != nil {
		return s, err
	}
	if s.text, err = s.place.read(m.view()); err != nil {
		return s, err
	}
	s.source = s.text
	if text, err := m.view().ReadFile(journalName(s.path, s.mount), journalSize); err == nil {
		if j, ok := readJournal(text); ok && torn(s.text, j.From, j.To) {
			s.source, s.torn = j.To, true
		}
	}
	s.ours = HasOurs(s.source)
	return s, nil
}

// mend finishes what a killed run left: a write in place is done to its end, and
// what was beside the file for a moment goes. It reports whether the file was
// changed. What cannot be removed is no reason to fail: the next write says why.
func (m Manager) mend(s state) (bool, error) {
	if s.torn {
		if err := m.FS.Overwrite(s.target, s.text, pad(s.source, len(s.text)), len(s.source)); err != nil {
			return false, &FileError{Path: s.target, What: "was left half-written, and cannot be written", Remedy: m.byHand(s), Err: err}
		}
	}
	for _, name := range []string{journalName(s.path, s.mount), tempName(s.path, s.mount), tempName(s.target, s.mount)} {
		if info, err := m.view().Lstat(name); err == nil && info.Kind == Regular {
			_ = m.FS.Remove(name)
		}
	}
	return s.torn, nil
}

// writable returns a *FileError for a file that cannot be changed, as far as can
// be seen without trying.
func (m Manager) writable(s state) error {
	if s.info.Immutable {
		return &FileError{Path: s.target, What: "is immutable or append-only", Remedy: "somebody wants it to stay as it is; to change that: chattr -i -a " + s.target}
	}
	for _, name := range []string{s.target, path.Dir(s.path)} {
		if on, ok := mountOf(m.Env.Mounts, name); ok && on.ReadOnly {
			return &FileError{Path: name, What: "is on a read-only mount", Remedy: "it takes " + s.target + " and a place for a backup beside " + s.path}
		}
	}
	return nil
}

// Inspect says what Install would do. It writes nothing.
//
// The error is an *AddressError, an *OwnedError, a *NamespaceError, an
// *AlreadyListedError or a *FileError.
func (m Manager) Inspect(a netip.Addr) (Plan, error) {
	a = a.Unmap()
	p := Plan{Path: m.Env.Path, Target: m.Env.Path, Address: a}
	if err := checkAddress(a.String(), a); err != nil {
		return p, err
	}
	env := m.Env
	env.View = m.view()
	var err error
	if p.Mode, p.Clues, err = Owner(env); err != nil {
		return p, err
	}
	if !p.Mode.Ours() {
		return p, &OwnedError{p.Path, p.Mode, a, SystemdVersion(env.View), p.Clues}
	}
	if p.before, err = m.look(); err != nil {
		return p, err
	}
	s := p.before
	p.Target, p.Foreign = s.target, s.foreign
	if err := MayWrite(s.target, m.Env.Mounts, m.Namespaces); err != nil {
		return p, err
	}
	e, err := AddNameserver(s.source, a)
	if t, ok := errors.AsType[*TextError](err); ok {
		return p, &FileError{Path: s.target, What: "is not edited", Err: t}
	} else if err != nil {
		return p, fmt.Errorf("%s: %w", s.target, err)
	}
	p.Text, p.Listed, p.OutOfReach, p.Limits = e.Text, e.Listed, e.OutOfReach, Parse(e.Text).Limits()
	switch {
	case s.info.Kind == Missing:
		p.How = Create
	case bytes.Equal(p.Text, s.text):
		return p, nil
	case s.mount != "":
		p.How = InPlace
	default:
		p.How = Replace
	}
	if p.How != Create && (s.record == nil || !s.ours || s.trusted) {
		p.Backup = s.backup
	}
	return p, m.writable(s)
}

// Installed is an install that was done.
type Installed struct {
	Plan
	fresh  bool    // record and backup were made by it
	record *record // that was there before
}

// attempts is how often a change is tried again when somebody else changed the
// file between our reading and our writing.
const attempts = 5

// Install makes a nameserver the first of the file. What fails is undone. Done
// again, it changes nothing.
//
// The errors are those of Inspect; a *FileError says what was left behind, if
// anything was.
func (m Manager) Install(a netip.Addr) (Installed, error) {
	var err error
	for range attempts {
		var p Plan
		if p, err = m.Inspect(a); err != nil {
			return Installed{Plan: p}, err
		}
		mended, e := m.mend(p.before)
		switch {
		case mended, errors.Is(e, ErrChanged):
			err = ErrChanged
			continue
		case e != nil || p.How == Unchanged:
			return Installed{Plan: p}, e
		}
		var done Installed
		if done, err = m.install(p); err == nil || !errors.Is(err, ErrChanged) {
			return done, err
		}
	}
	return Installed{}, err
}

// install does what a plan says, or undoes what it did of it.
func (m Manager) install(p Plan) (Installed, error) {
	s := p.before
	done := Installed{Plan: p, record: s.record}
	var undo []func() error
	fail := func(name string, err error) (Installed, error) {
		var left []string
		for i := len(undo) - 1; i >= 0; i-- {
			if err := undo[i](); err != nil {
				left = append(left, err.Error())
			}
		}
		if len(left) > 0 {
			return Installed{Plan: p}, &FileError{name, "cannot be written", "what was done before could not be undone: " + strings.Join(left, ", "), err}
		}
		return Installed{Plan: p}, &FileError{name, "cannot be written", "nothing was changed", err}
	}
	if s.record != nil && !s.ours {
		// Somebody has written the file anew since: what was kept is of a file that
		// is gone.
		if err := m.forget(s.kept); err != nil {
			return fail(s.recordName(), err)
		}
		s.record, done.record = nil, nil
	}
	side := tempName(s.path, s.mount)
	r := record{By: recordBy, Version: recordVersion, Path: s.path, Mount: s.mount, Address: p.Address}
	switch old := s.record; {
	case old == nil:
		done.fresh = true
		base := RemoveNameserver(s.source)
		if r.Missing = p.How == Create; !r.Missing {
			r.SHA256 = digest(base)
		}
		if err := m.make(side, s.recordName(), r.text(), Info{Mode: 0o644}); err != nil {
			return fail(s.recordName(), err)
		}
		undo = append(undo, func() error { return m.FS.Remove(s.recordName()) })
		if !r.Missing {
			if err := m.make(side, s.backup, base, s.info); err != nil {
				return fail(s.backup, err)
			}
			undo = append(undo, func() error { return m.FS.Remove(s.backup) })
		}
	case old.Address != p.Address:
		r.Missing, r.SHA256 = old.Missing, old.SHA256
		if err := m.replace(side, s.recordName(), r.text(), Info{Mode: 0o644}); err != nil {
			return fail(s.recordName(), err)
		}
		undo = append(undo, func() error { return m.replace(side, s.recordName(), old.text(), Info{Mode: 0o644}) })
	}
	how, err := m.write(s, p.How, p.Text)
	if err != nil {
		return fail(s.target, err)
	}
	done.How = how
	return done, nil
}

// Undo takes an install back: the file, the backup and the record are as they were
// before. Where somebody has changed the file since, only our part is.
func (m Manager) Undo(i Installed) error {
	if i.How == Unchanged {
		return nil
	}
	return m.retry(func() error {
		s, err := m.look()
		if err != nil {
			return err
		}
		if mended, err := m.mend(s); err != nil {
			return err
		} else if mended {
			return ErrChanged
		}
		was := i.before
		want, how := s.text, Unchanged
		switch {
		case s.info.Kind == Missing:
		case bytes.Equal(s.text, i.Text) && was.info.Kind == Missing:
			how = Delete
		case bytes.Equal(s.text, i.Text):
			want = was.source
		default:
			want = RemoveNameserver(s.source)
			if i.record != nil && was.ours {
				if e, err := AddNameserver(want, i.record.Address); err == nil {
					want = e.Text
				}
			}
		}
		if was.info.Kind == Missing && s.info.Kind != Missing && len(want) == 0 {
			how = Delete
		}
		if how, err = m.change(s, how, want); err != nil {
			return &FileError{Path: s.target, What: "cannot be written", Remedy: m.byHand(s), Err: err}
		}
		switch {
		case i.fresh:
			err = m.forget(s.kept)
		case i.record != nil && s.record != nil && i.record.Address != s.record.Address:
			err = m.replace(tempName(s.path, s.mount), s.recordName(), i.record.text(), Info{Mode: 0o644})
		}
		return err
	})
}

// Removal is what an uninstall would do, or did.
type Removal struct {
	Path   string
	Target string
	How    How
	// Restored is whether the file is the one of before the install, byte for
	// byte; else somebody changed it since, and only our lines go.
	Restored bool
	// Text is what the file has afterwards.
	Text []byte
	// Backup is the backup of ours that is removed; empty where there is none.
	Backup string
	// Left is what is not ours, or not to be taken out from here.
	Left []string

	state state
}

// Nothing reports whether there is nothing of ours.
func (r Removal) Nothing() bool { return r.How == Unchanged && r.state.record == nil }

// String says what the uninstall does.
func (r Removal) String() string {
	what := r.Path
	if r.Target != r.Path {
		what += ", which is " + r.Target + ","
	}
	switch {
	case r.How == Delete:
		what += " removed: there was none before"
	case r.How != Unchanged && r.Restored:
		what += " as it was before the install (" + r.How.String() + ")"
	case r.How != Unchanged:
		what += fmt.Sprintf(" without our line (%s): somebody changed it since the install, and that stays", r.How)
	case r.Nothing():
		return what + ": nothing of ours"
	default:
		what += " left as it is: our line is gone already"
	}
	if r.Backup != "" {
		what += "; " + r.Backup + " removed"
	}
	return what
}

// InspectRemoval says what Remove would do. It writes nothing.
func (m Manager) InspectRemoval() (Removal, error) {
	r := Removal{Path: m.Env.Path, Target: m.Env.Path}
	s, err := m.look()
	switch {
	case err != nil && s.backup != "" && s.record == nil:
		// Nothing says that there was an install; what is in the way is not to keep
		// the rules from being removed.
		r.Left = append(r.Left, err.Error())
		return r, nil
	case err != nil:
		return r, err
	}
	r.Target = s.target
	for _, f := range s.foreign {
		r.Left = append(r.Left, f+" is not a backup of ours, and never restored")
	}
	if err := MayWrite(s.target, m.Env.Mounts, m.Namespaces); err != nil {
		// The rules of this network namespace go; the host's file is the host's.
		if s.ours {
			r.Left = append(r.Left, err.Error())
		}
		return r, nil
	}
	r.state, r.Text = s, s.text
	if s.trusted {
		r.Backup = s.backup
	}
	if s.record != nil {
		for _, l := range Unmarked(s.source, s.record.Address) {
			r.Left = append(r.Left, fmt.Sprintf("%s line %d names %s without our mark", s.target, l.Number, s.record.Address))
		}
	}
	if !s.ours {
		return r, nil
	}
	if len(s.text) > MaxSize {
		return r, &FileError{Path: s.target, What: fmt.Sprintf("has more than %d bytes by now", MaxSize), Remedy: "take out the line that begins with " + fmt.Sprintf("%q", markHead) + " and the nameserver below it"}
	}
	r.Text, r.How = RemoveNameserver(s.source), Replace
	r.Restored = s.trusted && bytes.Equal(r.Text, s.kept.text)
	switch {
	case s.mount != "":
		r.How = InPlace
	case s.record != nil && s.record.Missing && len(r.Text) == 0:
		r.How, r.Restored = Delete, true
	}
	return r, m.writable(s)
}

// Remove takes out what Install put in: the file as it was, byte for byte, if
// nobody has changed it since, and otherwise without our lines and with all that is
// theirs. The backup goes. Killed in between, it is to be run again.
func (m Manager) Remove() (Removal, error) {
	var done Removal
	err := m.retry(func() error {
		r, err := m.InspectRemoval()
		done = r
		if err != nil || r.state.path == "" {
			return err
		}
		if mended, err := m.mend(r.state); err != nil {
			return err
		} else if mended {
			return ErrChanged
		}
		if done.How, err = m.change(r.state, r.How, r.Text); err != nil {
			return &FileError{Path: r.Target, What: "cannot be written", Remedy: m.byHand(r.state), Err: err}
		}
		return m.forget(r.state.kept)
	})
	return done, err
}

// byHand says what is left to do when the file cannot be put right.
func (m Manager) byHand(s state) string {
	if s.trusted {
		return "it is as it was before the install in " + s.backup
	}
	return fmt.Sprintf("take out the line that begins with %q and the nameserver below it", markHead)
}

// retry does something again when somebody else changed the file meanwhile.
func (m Manager) retry(do func() error) (err error) {
	for range attempts {
		if err = do(); !errors.Is(err, ErrChanged) {
			return err
		}
	}
	return err
}

// forget removes a backup that is ours, and then its record.
func (m Manager) forget(k kept) error {
	if k.record == nil {
		return nil
	}
	if k.trusted {
		if err := m.FS.Remove(k.backup); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return &FileError{Path: k.backup, What: "cannot be removed", Err: err}
		}
	}
	if err := m.FS.Remove(k.recordName()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &FileError{Path: k.recordName(), What: "cannot be removed", Err: err}
	}
	return nil
}

// journalName is the file that holds both texts during a write in place.
func journalName(name, mount string) string {
	return strings.Replace(tempName(name, mount), ".kuma-tmp", ".kuma-journal", 1)
}

// tempName is the file that a new one is written to before it takes its place. The
// name is always the same, so that what a killed run left is found; with the
// mount in it, because runs in several network namespaces may share a folder.
func tempName(name, mount string) string {
	if mount == "" {
		return name + ".kuma-tmp"
	}
	return fmt.Sprintf("%s.kuma-tmp-%s", name, digest([]byte(mount))[:8])
}

// make makes a new file in one step; ErrChanged where there is one by now.
func (m Manager) make(temp, name string, text []byte, like Info) error {
	if err := m.FS.Create(temp, text, like); err != nil {
		return err
	}
	err := m.FS.RenameNew(temp, name)
	if err != nil {
		_ = m.FS.Remove(temp)
	}
	if errors.Is(err, fs.ErrExist) {
		return ErrChanged
	}
	return err
}

// replace puts a file in the place of another in one step.
func (m Manager) replace(temp, name string, text []byte, like Info) error {
	if err := m.FS.Create(temp, text, like); err != nil {
		return err
	}
	err := m.FS.Rename(temp, name)
	if err != nil {
		_ = m.FS.Remove(temp)
	}
	return err
}

// change gives the file another text, or removes it, if that is to be.
func (m Manager) change(s state, how How, text []byte) (How, error) {
	switch {
	case how == Delete:
		if err := m.unchanged(s); err != nil {
			return how, err
		}
		return how, m.FS.Remove(s.target)
	case s.info.Kind == Missing || bytes.Equal(text, s.text):
		return Unchanged, nil
	case s.mount != "":
		return m.write(s, InPlace, text)
	}
	return m.write(s, Replace, text)
}

// write gives the file another text, and says in which way.
func (m Manager) write(s state, how How, text []byte) (How, error) {
	temp := tempName(s.target, s.mount)
	switch how {
	case Create:
		return how, m.make(temp, s.target, text, Info{Mode: 0o644})
	case InPlace:
		return how, m.overwrite(s, text)
	}
	if err := m.FS.Create(temp, text, s.info); err != nil {
		return how, err
	}
	err := m.unchanged(s)
	if err == nil {
		err = m.FS.Rename(temp, s.target)
	}
	if err == nil {
		return how, nil
	}
	_ = m.FS.Remove(temp)
	if errors.Is(err, ErrBusy) {
		return InPlace, m.overwrite(s, text)
	}
	return how, err
}

// unchanged returns ErrChanged unless the file is still the one that was read.
func (m Manager) unchanged(s state) error {
	info, err := m.view().Lstat(s.target)
	if err != nil || !info.equal(s.info) {
		return ErrChanged
	}
	text, err := m.view().ReadFile(s.target, MaxSize+1)
	if err != nil || !bytes.Equal(text, s.text) {
		return ErrChanged
	}
	return nil
}

// overwrite writes in place. What was and what is to be stand in a journal for as
// long as that takes, so that the next run can finish. What a failure left half-way
// is put back, for that takes no more room than there was.
func (m Manager) overwrite(s state, text []byte) error {
	name := journalName(s.path, s.mount)
	if err := m.replace(tempName(s.path, s.mount), name, journal{From: s.text, To: text}.text(), Info{Mode: 0o600}); err != nil {
		return err
	}
	err := m.FS.Overwrite(s.target, s.text, pad(text, len(s.text)), len(text))
	if err != nil && !errors.Is(err, ErrChanged) {
		if now, e := m.view().ReadFile(s.target, 2*MaxSize); e == nil && torn(now, s.text, text) {
			if e := m.FS.Overwrite(s.target, now, pad(s.text, len(now)), len(s.text)); e != nil {
				return fmt.Errorf("%w, and it could not be put back: %w; %s", err, e, m.byHand(s))
			}
		}
	}
	_ = m.FS.Remove(name) // else the next run does
	return err
}
