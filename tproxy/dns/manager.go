package dns

import (
	"bytes"
	"errors"
	"fmt"
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
		return p, &OwnedError{Path: p.Path, Mode: p.Mode, Address: a, Systemd: SystemdVersion(env.View), Clues: p.Clues}
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
