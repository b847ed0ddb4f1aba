package exec

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// wants is the link that has systemd start a unit at boot (systemd.unit(5)).
func wants(unit string) string { return unitFolder + "/multi-user.target.wants/" + unit }

// unitPath is where a unit of ours stands.
func unitPath(unit string) string { return unitFolder + "/" + unit }

// The folders in which systemd looks for units (systemd.unit(5)).
var unitFolders = []string{unitFolder, "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// loaders are those of persist.Loaders that are on this host, and firewalld, which is
// installed on one some day.
func (s *session) loaders() []string {
	return slices.DeleteFunc(persist.Loaders(), func(l string) bool {
		return l != "firewalld.service" && !slices.ContainsFunc(unitFolders, func(f string) bool {
			_, err := s.m.disk().Lstat(path.Join(f, l))
			return err == nil
		})
	})
}

// unitFiles are all files that may belong to the unit, in the order in which they are
// made: when the last link is there, systemd has everything.
func unitFiles() []string {
	names := []string{savedName, scriptName(rules.IPv4), scriptName(rules.IPv6), tableScript, namesScript, unitPath(persist.UnitName), unitPath(persist.NamesUnitName)}
	for _, l := range persist.Loaders() {
		names = append(names, unitFolder+"/"+l+".d/"+persist.DropInName)
	}
	return append(names, wants(persist.NamesUnitName), wants(persist.UnitName))
}

// unit is the change by which systemd brings a plan's install back; nil takes out what
// brings any back.
func (s *session) unit(p *tproxy.Plan, rec tproxy.Record) (hostChange, error) {
	u := unitChange{session: s, plan: p}
	c := hostChange{do: "no unit " + persist.UnitName}
	var want []storedFile
	if p != nil {
		files, by, notes, err := s.wanted(p, rec)
		if err != nil {
			return hostChange{}, err
		}
		want, c.do, c.notes = files, fmt.Sprintf("the unit %s, which runs %s at boot", persist.UnitName, by), notes
	}
	if err := u.compare(want); err != nil {
		return hostChange{}, err
	}
	c.nothing = len(u.is) == 0 && !s.halfDone(unitFiles()...)
	c.undo = "no unit " + persist.UnitName
	if u.former = p == nil || slices.ContainsFunc(u.was, storedFile.there); u.former {
		c.undo = "the unit " + persist.UnitName + " as it was"
	}
	c.run, c.back = u.run, u.back
	return c, nil
}

// unitChange is what is to become of the files of the unit.
type unitChange struct {
	*session
	plan    *tproxy.Plan // nil for none
	was, is []storedFile // those that differ
	former  bool         // whether there was one
	done    int          // of the files
}

// compare finds the files that are not as they are wanted, in the order in which they are
// to be made, or taken away.
func (u *unitChange) compare(files []storedFile) error {
	want := map[string]storedFile{}
	for _, f := range files {
		want[f.path] = f
	}
	for _, name := range unitFiles() {
		f, wanted := want[name]
		if !wanted {
			f = storedFile{path: name}
		}
		now, err := u.readStored(name)
		switch {
		case err != nil && wanted:
			return err
		case err != nil:
			continue // it is nothing that we have made
		case !u.unitOurs(now) && wanted:
			return &dns.FileError{Path: name, What: "is there and is not ours", Remedy: "give it another name, or choose another way with --persist"}
		case !u.unitOurs(now), now.same(f):
			continue
		}
		u.was, u.is = append(u.was, now), append(u.is, f)
	}
	if u.plan == nil {
		slices.Reverse(u.was)
		slices.Reverse(u.is)
	}
	return nil
}

// run makes the files what they are to be, and tells systemd.
func (u *unitChange) run(ctx context.Context) (err error) {
	for _, f := range u.is {
		if name := path.Base(f.path); !f.there() && f.path == unitPath(name) {
			u.quietly(ctx, "stop", name) // it would stay active without its file
		}
	}
	if u.done, err = u.putAll(u.was, u.is); err != nil {
		return err
	}
	u.sweep()
	if u.plan == nil {
		u.forget(ctx)
		return nil
	}
	if err := u.tell(ctx, "systemctl", "daemon-reload"); err != nil {
		return err
	}
	return u.startUnit(ctx, u.plan)
}

// forget has systemd know no more of the units than their files say.
func (u *unitChange) forget(ctx context.Context) {
	u.quietly(ctx, "daemon-reload")
	u.quietly(ctx, "reset-failed", persist.UnitName, persist.NamesUnitName)
}

// back takes back what run has done, however far it came.
func (u *unitChange) back(ctx context.Context) error {
	n := min(u.done+1, len(u.is)) // the one that failed too
	now, then := slices.Clone(u.is[:n]), slices.Clone(u.was[:n])
	slices.Reverse(now)
	slices.Reverse(then)
	for i := range now {
		if f, err := u.readStored(now[i].path); err == nil {
			now[i] = f
		}
	}
	if !u.former {
		u.quietly(ctx, "stop", persist.UnitName)
	}
	_, err := u.putAll(now, then)
	u.forget(ctx)
	if u.former { // it has been stopped, or has failed; it waits for us
		u.quietly(ctx, "--no-block", "restart", persist.UnitName)
	}
	return err
}

// sweep takes away what a run that was killed left.
func (s *session) sweep() {
	for _, name := range slices.Backward(unitFiles()) {
		_ = s.m.disk().Remove(sideOf(name)) // as a rule there is none
		s.removeFolder(path.Dir(name))
	}
}

// sameProgram is for who looks, or puts back: what the unit runs is to be compared with
// what its own program would have made of it.
func (s *session) sameProgram() {
	if unit, err := s.readStored(unitPath(persist.UnitName)); err == nil && unit.there() {
		s.comeBack = comeBackOf(unit.text)
	}
}

// comeBackOf is the program that a unit of ours runs; nil for scripts, and for a unit that
// was edited.
func comeBackOf(unit []byte) []string {
	for line := range strings.Lines(string(unit)) {
		if rest, ok := strings.CutPrefix(line, "ExecStart="); ok {
			words := strings.Fields(rest)
			if n := len(words) - 1; n > 0 && words[n] == "rules" && !strings.ContainsAny(rest, `"%$`) {
				return words[:n]
			}
		}
	}
	return nil
}

// quietly tells systemd what it may not want to hear: a unit that is not loaded cannot be
// stopped.
func (s *session) quietly(ctx context.Context, args ...string) {
	if err := s.tell(ctx, "systemctl", args...); err != nil {
		s.log.Debug("systemctl", "error", err)
	}
}

// unitOurs reports whether what stands at one of unitFiles may be replaced or taken away.
func (s *session) unitOurs(f storedFile) bool {
	switch {
	case !f.there() || strings.HasPrefix(f.path, storeDir+"/"):
		return true
	case strings.HasSuffix(path.Dir(f.path), ".wants"):
		// One that leads to a unit of others of the same name is theirs.
		unit, err := s.readStored(unitPath(path.Base(f.path)))
		return f.link != "" && path.Base(f.link) == path.Base(f.path) && err == nil && (!unit.there() || persist.OurUnit(unit.text))
	}
	return f.link == "" && persist.OurUnit(f.text)
}

// wanted are the files by which systemd brings a plan's install back, and in words what
// it runs.
func (s *session) wanted(p *tproxy.Plan, rec tproxy.Record) (out []storedFile, by string, notes []string, err error) {
	if err := s.rootsFolder(); err != nil {
		return nil, "", nil, err
	}
	text, err := savedOf(p, rec).text()
	if err != nil {
		return nil, "", nil, err
	}
	out = append(out, newFile(savedName, text))
	service := persist.Service{
		Description: "Kuma transparent proxying: connections go to the data plane proxy",
		Files:       []string{savedName}, Writable: []string{"/run"},
	}
	names := persist.Service{Description: "Names of the mesh: systemd-resolved asks the control plane", Files: []string{savedName}, Writable: []string{"/run"}}
	if p.Backend == tproxy.IPTablesLegacy { // iptables loads it itself, where it may (xtables_load_ko, libxtables)
		service.Modules = []string{"ip_tables", "ip6_tables"}
	}
	program, why := s.comeBack, s.unstable()
	if why == "" {
		by = program[0]
		service.Commands = [][]string{append(slices.Clone(program), "rules")}
		names.Commands = [][]string{append(slices.Clone(program), "names")}
	} else {
		if by = "iptables-restore with saved scripts"; p.Backend == tproxy.NFTables {
			by = "nft with a saved script"
		}
		if len(program) > 0 {
			notes = append(notes, "at boot saved scripts are loaded, and not by the program that installs: "+why)
		}
		scripts, err := s.scripts(p, rec, &service, &names)
		if err != nil {
			return nil, "", nil, err
		}
		out = append(out, scripts...)
	}
	split := p.Config.DNS.ControlPlane.IsValid() && p.Host.Nameserver.Split == tproxy.SplitLink
	units, err := s.units(service, names, split)
	return append(out, units...), by, notes, err
}

// rootsFolder is an error for a storeDir in which somebody else than root could put what
// root runs at boot.
func (s *session) rootsFolder() error {
	info, err := s.m.disk().Lstat(storeDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return &dns.FileError{Path: storeDir, What: "cannot be looked at", Err: err}
	case info.Kind != dns.Directory:
		return &dns.FileError{Path: storeDir, What: "is no folder", Remedy: "take it away first"}
	case info.UID != 0, info.Mode&0o022 != 0:
		return &dns.FileError{Path: storeDir, What: fmt.Sprintf("is of the user %d, with mode %04o: others could have root run at boot what they put there", info.UID, info.Mode),
			Remedy: "accepted is a folder of root's that nobody else may write to: chown root and chmod go-w"}
	}
	return nil
}

// units are the units, what goes with them, and the links that enable them.
func (s *session) units(service, names persist.Service, split bool) (out []storedFile, err error) {
	// The texts are made as if nothing stood there: whose that is, unit finds out.
	text, err := persist.Unit(nil, service)
	if err != nil {
		return nil, err
	}
	out = append(out, newFile(unitPath(persist.UnitName), text))
	if split {
		if text, err = persist.NamesUnit(nil, names); err != nil {
			return nil, err
		}
		out = append(out, newFile(unitPath(persist.NamesUnitName), text))
	}
	for _, l := range s.loaders() {
		if text, err = persist.DropIn(nil); err != nil {
			return nil, err
		}
		out = append(out, newFile(unitFolder+"/"+l+".d/"+persist.DropInName, text))
	}
	if split {
		out = append(out, newLink(wants(persist.NamesUnitName), unitPath(persist.NamesUnitName)))
	}
	return append(out, newLink(wants(persist.UnitName), unitPath(persist.UnitName))), nil
}

// unstable is the reason for which a unit that runs as root must not run the program that
// installs; empty where it may.
func (s *session) unstable() string {
	if len(s.comeBack) == 0 {
		return "there is none"
	}
	name := s.comeBack[0]
	for _, gone := range []string{"/tmp/", "/var/tmp/", "/run/", "/dev/", "/proc/"} {
		if strings.HasPrefix(name, gone) {
			return name + " will not be there"
		}
	}
	if _, err := s.m.disk().Lstat(name); err != nil {
		return err.Error()
	}
	return s.changeable(name)
}

// changeable is the reason for which somebody else than root could have another program
// run in place of one; empty where nobody could. What a symbolic link leads to is another
// path.
func (s *session) changeable(name string) string {
	for p := path.Clean(name); ; p = path.Dir(p) {
		info, err := s.m.disk().Lstat(p)
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return err.Error()
		case err != nil:
		case info.UID != 0:
			return fmt.Sprintf("%s is of the user %d, who could have root run another one", p, info.UID)
		case info.Kind == dns.Symlink: // its mode says nothing (symlink(7))
		case info.Mode&0o002 != 0, info.Mode&0o020 != 0 && (info.GID >= firstUser || info.GID == usersGroup):
			return fmt.Sprintf("%s, with mode %04o, can be changed by others, who could have root run another one", p, info.Mode)
		}
		if p == "/" {
			return ""
		}
	}
}

// firstUser is the first group of people: those below are the system's, such as staff,
// which may write to /usr/local on an older Debian. usersGroup is users, which people are
// in by default on Debian and SUSE.
const (
	firstUser  = 1000
	usersGroup = 100
)

// startUnit has systemd run what it runs at boot, now: if that cannot be, it is better
// known today. While the system is starting, or something else is in the way, nothing
// waits for it.
func (s *session) startUnit(ctx context.Context, p *tproxy.Plan) error {
	state := s.systemState(ctx)
	switch state {
	case "running", "degraded":
	case "initializing", "starting":
		return s.tell(ctx, "systemctl", "--no-block", "restart", persist.UnitName)
	default:
		return fmt.Errorf("systemd is in state %q: accepted are running, degraded and starting; systemctl is-system-running says it", state)
	}
	if err := s.writeState(storingKind, storingFile{PID: s.m.pid(), Started: s.m.started(s.m.pid())}); err != nil {
		return err
	}
	defer func() {
		if err := s.removeState(storingKind); err != nil {
			s.log.Warn("a file is left", "error", err)
		}
	}()
	units := []string{persist.UnitName}
	if p.Config.DNS.ControlPlane.IsValid() && p.Host.Nameserver.Split == tproxy.SplitLink {
		units = append(units, persist.NamesUnitName)
	}
	for _, u := range units {
		if err := s.tell(ctx, "systemctl", "restart", u); err != nil {
			return fmt.Errorf("%w%s", err, s.journal(ctx, u))
		}
	}
	return nil
}

// systemState is what systemctl is-system-running prints, whatever its exit code.
func (s *session) systemState(ctx context.Context) string {
	path, _ := s.m.find("systemctl")
	r, err := s.run(ctx, command{Path: path, Args: []string{"is-system-running"}})
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(r.Stdout))
}

// journal is what a unit said last.
func (s *session) journal(ctx context.Context, unit string) string {
	text, err := s.ask(ctx, "journalctl", "--unit="+unit, "--lines=5", "--output=cat", "--no-pager", "--quiet")
	if err != nil || strings.TrimSpace(text) == "" {
		return ""
	}
	return ":\n" + strings.TrimSpace(text)
}

// storingKind says that the process that holds the lock has its unit tried.
const storingKind = "storing"

type storingFile struct {
	PID     int    `json:"pid"`
	Started string `json:"started"`
}

// storing reports whether who holds the lock waits for us. Whose it is the kernel tells
// nobody who may not trace others.
func (s *session) storing() bool {
	var f storingFile
	there, err := s.readState(storingKind, &f)
	if err != nil || !there {
		return false
	}
	return s.m.locked() && f.Started != "" && s.m.started(f.PID) == f.Started
}

// BringBack installs again what was saved when an install was made that systemd brings
// back: the rules, and ::6. It is what the unit runs, at boot and when a firewall has
// flushed the rules; what stands is left alone. Where nothing is saved, nothing is done,
// and the report says so.
func (r *Runner) BringBack(ctx context.Context) (*Report, error) {
	return r.bringBack(ctx, func(s *session, p *tproxy.Plan, t *transaction) error {
		t.leaveNames = true
		return t.underLock(ctx, slices.Contains(p.Families, rules.IPv6), func() ([]job, error) { return t.applyJobs(p) })
	})
}

// BringBackNames has systemd-resolved ask the control plane again, where an install had
// it do so by the interface of ours, which a boot takes away.
func (r *Runner) BringBackNames(ctx context.Context) (*Report, error) {
	return r.bringBack(ctx, func(s *session, p *tproxy.Plan, t *transaction) error {
		if !p.Config.DNS.ControlPlane.IsValid() || p.Host.Nameserver.Split != tproxy.SplitLink {
			return nil
		}
		c, err := s.meshLink(ctx, p.Config.DNS.ControlPlane)
		if err != nil || c.nothing {
			return err
		}
		if t.lookOnly {
			return fmt.Errorf("%s is not so", c.do)
		}
		t.names = []hostChange{c}
		if err := t.writeSplit(ctx); err != nil {
			return t.rollback(ctx, err)
		}
		return nil
	})
}

func (r *Runner) bringBack(ctx context.Context, do func(*session, *tproxy.Plan, *transaction) error) (*Report, error) {
	s, err := r.session()
	if err != nil {
		return nil, err
	}
	if err := s.m.privileged(); err != nil {
		return nil, err
	}
	s.wait = bootWait
	t := &transaction{session: s, report: &Report{}, leaveStored: true}
	if t.lookOnly = s.storing(); !t.lookOnly {
		unlock, err := s.locked(ctx)
		if err != nil {
			return nil, err
		}
		defer unlock()
		if f, err := s.trial(); err != nil {
			return nil, err
		} else if f != nil && f.Armed {
			t.report.Notes = append(t.report.Notes, "an install waits for its confirmation: what is saved is the one before it, and is not brought back now")
			return t.report, nil
		}
	}
	i, err := s.saved() // of the unit's own files, whose they are it could not tell in its sandbox
	if err != nil {
		return nil, err
	}
	switch {
	case i == nil && t.lookOnly:
		return nil, fmt.Errorf("nothing is saved in %s", savedName)
	case i == nil:
		t.report.Notes = append(t.report.Notes, "nothing is saved in "+savedName+": there is nothing to bring back")
		return t.report, nil
	}
	s.patient(i.Config)
	p, err := s.planOf(ctx, *i)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", savedName, err)
	}
	t.rec.PassthroughAddressOurs = i.PassthroughAddressOurs
	t.report.Backend, t.report.Why, t.bare = p.Backend, p.BackendWhy, p.Config.DisableComments
	if err := do(s, p, t); err != nil {
		return nil, err
	}
	t.report.Retries, t.report.Processes = s.retries, s.processes
	return t.report, nil
}

// bootWait is how long to wait for another run, and for the lock of iptables, before what
// is saved has been read.
const bootWait = 30 * time.Second
