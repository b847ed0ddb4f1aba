package exec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// disk is where an install is kept: files of the host.
type disk interface {
	dns.FS
	// Symlink makes a symbolic link; fs.ErrExist where something stands there.
	Symlink(to, name string) error
	// Writable returns the reason for which nothing can be written to a folder.
	Writable(folder string) error
}

const (
	directFolder = "/etc/firewalld"
	directName   = directFolder + "/direct.xml"
)

// maxStored bounds what is read of a file that somebody else may have written, in bytes.
const maxStored = 16 << 20

// ways are those of coming back that are files, in the order in which they are made: the
// unit has all of the install, and so comes first, and goes last.
var ways = []tproxy.Persist{tproxy.PersistSystemd, tproxy.PersistFirewalld}

// persistence finds out for a plan by what an install can come back here.
func (s *session) persistence(ctx context.Context, asked tproxy.Persist, h *tproxy.Host) {
	p := &h.Persistence
	p.Observed = true
	if s.elsewhere {
		p.Elsewhere = "the files here are those of another network namespace"
		p.NoSystemd, p.NoFirewalld = p.Elsewhere, p.Elsewhere
		return
	}
	p.NoSystemd, p.Elsewhere = s.m.systemd()
	if p.NoSystemd == "" {
		p.NoTable = s.noTable()
	}
	told := asked == tproxy.PersistFirewalld
	if p.Elsewhere == "" || told { // else whose files they are does not matter
		s.firewalld(ctx, p, told)
	}
	for _, by := range ways {
		if c, err := s.unstore(by, told); err == nil && !c.nothing {
			p.Stored = append(p.Stored, by)
		}
	}
}

// firewalld finds out whether firewalld runs here, and takes what it is told.
func (s *session) firewalld(ctx context.Context, p *tproxy.Persistence, told bool) {
	if _, err := s.m.disk().Lstat(directFolder); err != nil {
		p.NoFirewalld = "firewalld is not installed: " + directFolder + " is not there"
		return
	}
	if !s.storeHere(tproxy.PersistFirewalld, told) {
		p.NoFirewalld = directFolder + " is another network namespace's"
		return
	}
	file, err := s.readDirect()
	if err == nil {
		_, err = persist.ReadDirect(file.text)
	}
	if err != nil {
		p.NoFirewalld = err.Error()
	}
	if p.Firewalld = s.runsFirewalld(); !p.Firewalld {
		return
	}
	// A firewalld that failed to load its rules has loaded none of direct.xml.
	state, err := s.firewalldState(ctx)
	switch {
	case err != nil:
		s.log.Debug("firewalld does not say how it is", "error", err)
	case state != "RUNNING":
		p.Failed = fmt.Sprintf("firewalld is in state %s: it has not loaded its rules; journalctl -u firewalld says why", strings.ToLower(state))
	}
}

// firewalldState is its property of that name (firewalld.dbus(5)): RUNNING, INIT or FAILED.
func (s *session) firewalldState(ctx context.Context) (string, error) {
	const name, object = "org.fedoraproject.FirewallD1", "/org/fedoraproject/FirewallD1"
	if path, _ := s.m.find("busctl"); path != "" {
		text, err := s.ask(ctx, "busctl", "--auto-start=no", "get-property", name, object, name, "state")
		_, quoted, _ := strings.Cut(strings.TrimSpace(text), " ")
		return strings.Trim(quoted, `"`), err
	}
	path, _ := s.m.find("firewall-cmd")
	if path == "" {
		return "", fmt.Errorf("neither busctl nor firewall-cmd is here: %w", ErrUnsupported)
	}
	r, err := s.run(ctx, command{Path: path, Args: []string{"--state"}})
	return strings.ToUpper(strings.TrimSpace(string(r.Stdout))), err
}

// storeHere reports whether the files of a way are those of this network namespace, or, of
// firewalld, whether somebody told us to write them all the same.
func (s *session) storeHere(by tproxy.Persist, told bool) bool {
	if s.elsewhere {
		return false
	}
	if by == tproxy.PersistSystemd {
		_, elsewhere := s.m.systemd()
		return elsewhere == ""
	}
	env := s.m.resolvConf(directName, told)
	return dns.MayWrite(directName, env.Env.Mounts, env.Namespaces) == nil
}

// runsFirewalld reports whether firewalld runs in this network namespace.
func (s *session) runsFirewalld() bool {
	return s.m.resolvConf(directName, true).Env.Running("firewalld")
}

// unstore is dropStored, and nothing where the files are another network namespace's. Whose
// they are is asked only where there is something: that reads the mounts of two processes.
func (s *session) unstore(by tproxy.Persist, told bool) (hostChange, error) {
	if s.elsewhere {
		return hostChange{nothing: true}, nil
	}
	c, err := s.dropStored(by)
	if err == nil && c.nothing || s.storeHere(by, told) {
		return c, err
	}
	return hostChange{nothing: true}, nil
}

// dropStored is the change that takes everything of a way out.
func (s *session) dropStored(by tproxy.Persist) (hostChange, error) {
	if by == tproxy.PersistFirewalld {
		return s.direct(rules.Set{})
	}
	return s.unit(nil, tproxy.Record{})
}

// storedFile is a file that an install is kept in: a text, or a symbolic link.
type storedFile struct {
	path string
	text []byte
	link string
	info dns.Info // of what is there
}

func (f storedFile) there() bool { return f.info.Kind != dns.Missing }

func (f storedFile) same(o storedFile) bool {
	return f.there() == o.there() && f.link == o.link && bytes.Equal(f.text, o.text)
}

// readStored reads what stands at a path, without following a link.
func (s *session) readStored(name string) (f storedFile, err error) {
	d := s.m.disk()
	f.path = name
	f.info, err = d.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return storedFile{path: name}, nil
	case err != nil:
		return f, &dns.FileError{Path: name, What: "cannot be looked at", Err: err}
	case f.info.Kind == dns.Symlink:
		f.link, err = d.Readlink(name)
	case f.info.Kind == dns.Regular:
		f.text, err = d.ReadFile(name, maxStored+1)
		if len(f.text) > maxStored {
			err = fmt.Errorf("more than %d bytes", maxStored)
		}
	default:
		return f, &dns.FileError{Path: name, What: "is no regular file", Remedy: "take it away first"}
	}
	if err != nil {
		return f, &dns.FileError{Path: name, What: "cannot be read", Err: err}
	}
	return f, nil
}

// sideOf is the file that a new one is written to before it takes its place. The name is
// always the same, so that what a killed run left is found.
func sideOf(name string) string { return path.Join(path.Dir(name), "."+path.Base(name)+".kuma-tmp") }

// halfDone reports whether a run that was killed left a file beside one of these, or a
// folder of ours with nothing in it.
func (s *session) halfDone(names ...string) bool {
	d := s.m.disk()
	there := func(name string) bool { _, err := d.Lstat(name); return err == nil }
	return slices.ContainsFunc(names, func(n string) bool {
		return there(sideOf(n)) || n == savedName && there(storeDir) && len(d.Glob(storeDir+"/*"))+len(d.Glob(storeDir+"/.*")) == 0
	})
}

// put makes what stands at a path what f is. was is what was read there: if it is
// another by now, the error is dns.ErrChanged.
func (s *session) put(was, f storedFile) error {
	d := s.m.disk()
	now, err := s.readStored(f.path)
	if err != nil {
		return err
	}
	if !now.same(was) {
		return &dns.FileError{Path: f.path, What: "was changed meanwhile", Err: dns.ErrChanged, Remedy: "run this again"}
	}
	side := sideOf(f.path)
	if err := d.Remove(side); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch {
	case now.same(f):
		return nil
	case !f.there():
		return d.Remove(f.path)
	case f.link != "":
		if now.there() {
			if err := d.Remove(f.path); err != nil {
				return err
			}
		}
		return d.Symlink(f.link, f.path)
	}
	if err := d.Create(side, f.text, f.info); err != nil {
		return err
	}
	err = d.Rename(side, f.path)
	if err != nil {
		err = errors.Join(err, d.Remove(side))
	}
	if errors.Is(err, dns.ErrBusy) && now.link == "" {
		// A bind mount of the file alone; what it is mounted from is written to. What is
		// shorter is filled up first, so that one write has it all (dns.FS).
		fill := bytes.Repeat([]byte("\n"), max(0, len(now.text)-len(f.text)))
		return d.Overwrite(f.path, now.text, slices.Concat(f.text, fill), len(f.text))
	}
	return err
}

// putAll makes files what they are to be, in order, and the folders that they take. It
// returns what was done, to take back.
func (s *session) putAll(was, want []storedFile) (done int, err error) {
	for i, f := range want {
		if f.there() {
			if err := s.makeFolder(path.Dir(f.path)); err != nil {
				return i, err
			}
		}
		if err := s.put(was[i], f); err != nil {
			return i, err
		}
		if !f.there() {
			s.removeFolder(path.Dir(f.path))
		}
	}
	return len(want), nil
}

func (s *session) makeFolder(name string) error {
	d := s.m.disk()
	if _, err := d.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := d.MakeFolder(name); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// removeFolder removes one that an install makes, once it is empty.
func (s *session) removeFolder(name string) {
	if name == storeDir || strings.HasSuffix(name, ".service.d") {
		_ = s.m.disk().RemoveFolder(name) // it is not empty
	}
}

// newFile is a file of ours, or, without a text, none.
func newFile(name string, text []byte) storedFile {
	f := storedFile{path: name, text: text}
	if text != nil {
		f.info = dns.Info{Kind: dns.Regular, Mode: 0o644} // of root, as whoever writes it
	}
	return f
}

func newLink(name, to string) storedFile {
	return storedFile{path: name, link: to, info: dns.Info{Kind: dns.Symlink}}
}

// readDirect reads direct.xml. The error is for what must not be replaced.
func (s *session) readDirect() (storedFile, error) {
	f, err := s.readStored(directName)
	switch {
	case err != nil:
		return f, err
	case f.info.Kind == dns.Symlink:
		return f, &dns.FileError{Path: directName, What: "is a symbolic link, to " + f.link, Remedy: "put a regular file in its place, which is what firewalld itself writes"}
	case f.there() && f.info.Immutable:
		return f, &dns.FileError{Path: directName, What: "is immutable", Remedy: "chattr -i takes that away"}
	case f.there() && f.info.Mode&0o200 == 0:
		return f, &dns.FileError{Path: directName, What: fmt.Sprintf("is read-only, with mode %04o", f.info.Mode), Remedy: "chmod u+w, if it may be changed"}
	}
	if err := s.m.disk().Writable(directFolder); err != nil {
		return f, &dns.FileError{Path: directFolder, What: "cannot be written to", Err: err}
	}
	return f, nil
}

// direct is the change that makes a Set what is ours in direct.xml; the empty Set takes
// it out.
func (s *session) direct(want rules.Set) (hostChange, error) {
	holds := len(want.Bases)+len(want.Chains) > 0
	was, err := s.readStored(directName)
	none := err == nil && s.noneOfOurs(was)
	if k := was.info.Kind; k == dns.Directory || k == dns.Other {
		none = true // whoever made it, nobody has put anything into it
	}
	if none && !holds && !s.halfDone(directName) {
		return hostChange{nothing: true}, nil
	}
	if err == nil {
		_, err = s.readDirect()
	}
	if err != nil {
		return hostChange{}, err
	}
	text := was.text
	if was.there() && text == nil {
		text = []byte{}
	}
	var after []byte
	var gone persist.Removal
	if holds {
		after, err = persist.MergeDirect(text, want)
	} else {
		after, gone, err = persist.RemoveDirect(text)
	}
	if err != nil {
		return hostChange{}, &dns.FileError{Path: directName, What: "cannot be edited", Err: err, Remedy: "mend it first: with a bad entry firewalld loads none"}
	}
	is := newFile(directName, after)
	if was.there() && is.there() {
		is.info = was.info
	}
	c := hostChange{
		do: "the rules in " + directName, undo: directName + " as it was",
		nothing: is.same(was) && !s.halfDone(directName),
		run:     func(context.Context) error { return s.put(was, is) },
		back: func(context.Context) error {
			now, err := s.readStored(directName)
			if err == nil && !now.same(was) {
				err = s.put(is, was)
			}
			return err
		},
	}
	if !holds {
		c.do = "no rules of ours in " + directName
		if gone.Rewritten {
			c.notes = append(c.notes, directName+" was written anew by somebody else since, as firewall-cmd --permanent --direct does: what is ours was taken out element by element")
		}
	}
	if len(gone.Removed) > 0 && s.runsFirewalld() {
		c.notes = append(c.notes, "firewalld has in memory what it loaded from there, and counts it, until firewall-cmd --reload")
	}
	if len(gone.Kuma) > 0 {
		c.notes = append(c.notes, fmt.Sprintf("rules of Kuma's own --store-firewalld go from %s: %s", directName, strings.Join(gone.Kuma, ", ")))
	}
	for _, d := range gone.Doubtful {
		c.notes = append(c.notes, fmt.Sprintf("left in %s, as it may be Kuma's or anybody else's: %s", directName, d))
	}
	return c, nil
}

// noneOfOurs reports whether a direct.xml surely holds nothing of ours or Kuma's, so that
// it does not matter whether it can be edited, or read: there is no rule of ours, or
// Kuma's, without a chain of theirs, and their names are such.
func (s *session) noneOfOurs(f storedFile) bool {
	text := f.text
	if f.info.Kind == dns.Symlink {
		// We put nothing through one, but somebody may have moved the file since, and
		// firewalld reads it all the same.
		text = s.behindLink(f)
	}
	d, err := persist.ReadDirect(text)
	if err != nil {
		return !bytes.Contains(text, []byte("MESH_"))
	}
	return !slices.ContainsFunc(d.Entries, func(e persist.Entry) bool { return e.Owner == persist.Ours })
}

// mostLinks is how many symbolic links the kernel follows (path_resolution(7)).
const mostLinks = 40

// behindLink is the text of the file that a symbolic link leads to; nil where there is
// none.
func (s *session) behindLink(f storedFile) []byte {
	for range mostLinks {
		to := f.link
		if !path.IsAbs(to) {
			to = path.Join(path.Dir(f.path), to)
		}
		var err error
		if f, err = s.readStored(to); err != nil || f.link == "" {
			return f.text
		}
	}
	return nil
}

// lookAtStored finds, before anything is written, what is to be done for the install to
// come back, and for a former one not to.
func (t *transaction) lookAtStored(ctx context.Context, rec tproxy.Record) error {
	told := t.plan != nil && t.plan.Config.Persist == tproxy.PersistFirewalld
	if before := t.report.Before; before != nil && before.Unknown == nil {
		told = told || before.Config.Persist == tproxy.PersistFirewalld
	}
	var stores []tproxy.Persist
	if t.plan != nil {
		stores = t.plan.Stores()
	}
	t.store = nil
	for _, by := range ways {
		var c hostChange
		var err error
		step := fmt.Stringer(tproxy.StoreRules{By: by})
		switch wanted := slices.Contains(stores, by); {
		case wanted && !t.storeHere(by, told):
			err = fmt.Errorf("the files of %s are another network namespace's", by)
		case wanted && by == tproxy.PersistFirewalld:
			c, err = t.direct(t.plan.WithRecord(rec))
			if err == nil && !c.nothing && !t.dryRun && !t.tried {
				t.tried = true
				err = t.tryDirect(ctx, t.plan.WithRecord(rec))
				if err != nil && t.bare && !rec.Bare && lacksComments(err) {
					t.tried, err = false, nil // by keep, with what is written without them
				}
			}
		case wanted:
			c, err = t.unit(t.plan, rec)
		default:
			step = tproxy.DropStored{By: by}
			c, err = t.unstore(by, told)
		}
		if err != nil {
			return &ApplyError{Step: step.String(), Err: err, Remedy: storeRemedy(step)}
		}
		t.store = append(t.store, c)
	}
	if t.removes { // the unit has all of the install
		slices.Reverse(t.store)
	}
	return nil
}

func storeRemedy(step fmt.Stringer) string {
	if _, ok := step.(tproxy.StoreRules); ok {
		return "or install without coming back after a restart, with --persist none"
	}
	return ""
}

// keep has the install come back, by the rules as they are now.
func (t *transaction) keep(ctx context.Context) error {
	if err := t.lookAtStored(ctx, t.rec); err != nil {
		return err
	}
	return t.writeStored(ctx)
}

// writeStored does what lookAtStored found.
func (t *transaction) writeStored(ctx context.Context) error {
	for _, c := range t.store {
		if c.nothing {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		t.report.Notes = append(t.report.Notes, c.notes...)
		if t.dryRun {
			t.report.Steps = append(t.report.Steps, c.do)
			continue
		}
		if err := t.first(ctx); err != nil {
			return err
		}
		t.undo = append(t.undo, undo{c.undo, func(ctx context.Context) (bool, error) { return true, c.back(ctx) }})
		if err := c.run(ctx); err != nil {
			return &ApplyError{Step: c.do, Err: err, Remedy: "or install without coming back after a restart, with --persist none"}
		}
		t.report.Changed = true
		t.report.Steps = append(t.report.Steps, c.do)
	}
	return nil
}

// tryDirect has iptables-restore try what firewalld is to load, without loading it: one
// bad rule, and firewalld loads none.
func (t *transaction) tryDirect(ctx context.Context, set rules.Set) error {
	text, err := persist.MergeDirect(nil, set)
	if err != nil {
		return err
	}
	d, err := persist.ReadDirect(text)
	if err != nil {
		return err
	}
	for _, f := range t.plan.Families {
		v, ok := t.plan.Host.Variant(t.plan.Backend)
		if !ok {
			continue
		}
		if err := t.test(ctx, v, f, "trying the direct rules of firewalld", d.Rules(f).IPTables(f)); err != nil {
			return err
		}
	}
	return nil
}
