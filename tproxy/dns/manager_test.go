package dns

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"pgregory.net/rapid"
)

const backupPath = DefaultPath + ".kuma-backup"

var same1 = Namespaces{Self: "net:[1]", Init: "net:[1]"}

func manager(d *disk) Manager {
	return Manager{Env: Env{Path: DefaultPath, Mounts: ParseMounts([]byte(hostMounts))}, FS: d, Namespaces: same1}
}

// bound is a Manager for a file that is mounted.
func bound(d *disk) Manager {
	m := manager(d)
	m.Env.Mounts = ParseMounts([]byte(netnsMounts))
	d.busy[DefaultPath] = true
	return m
}

func install(t testing.TB, m Manager, a netip.Addr) Installed {
	t.Helper()
	i, err := m.Install(a)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func remove(t testing.TB, m Manager) Removal {
	t.Helper()
	r, err := m.Remove()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

var places = []struct {
	name string
	make func(d *disk) Manager
	how  How
}{
	{"a file", func(d *disk) Manager { d.put(DefaultPath, byHandText); return manager(d) }, Replace},
	{"a mounted file", func(d *disk) Manager { d.put(DefaultPath, byHandText); return bound(d) }, InPlace},
	{"a mount that mountinfo does not show", func(d *disk) Manager {
		d.put(DefaultPath, byHandText)
		d.busy[DefaultPath] = true
		return manager(d)
	}, InPlace},
	{"empty", func(d *disk) Manager { d.put(DefaultPath, ""); return manager(d) }, Replace},
	{"missing", manager, Create},
	{"a link", func(d *disk) Manager {
		d.put("/srv/resolv.conf", byHandText).symlink(DefaultPath, "../srv/resolv.conf")
		return manager(d)
	}, Replace},
	{"a mount behind a link", func(d *disk) Manager {
		d.put("/srv/resolv.conf", byHandText).symlink(DefaultPath, "../srv/resolv.conf")
		m := manager(d)
		m.Env.Mounts = ParseMounts([]byte(hostMounts + "41 22 254:0 /x /srv/resolv.conf rw - ext4 /dev/vda rw\n"))
		return m
	}, InPlace},
}

const byHandText = "# by hand\nnameserver 10.0.0.1\n"

func TestInstallAndRemove(t *testing.T) {
	for _, test := range places {
		d := newDisk(t)
		m := test.make(d)
		target := DefaultPath
		if _, ok := d.nodes["/srv/resolv.conf"]; ok {
			target = "/srv/resolv.conf"
		}
		d.change(target, func(n *node) {
			n.info.Mode, n.info.UID, n.info.GID, n.info.Xattrs = 0o640, 7, 8, []Xattr{{"security.selinux", "net_conf_t"}}
		})
		if test.how == Create {
			delete(d.nodes, target)
		}
		before := d.clone()
		p, err := m.Inspect(cp)
		if err != nil || d.writes != 0 {
			t.Fatalf("%s: %v, %d writes by looking", test.name, err, d.writes)
		}
		done := install(t, m, cp)
		if done.How != test.how || string(done.Text) != string(p.Text) || done.Target != target {
			t.Errorf("%s: %s, want %s", test.name, done.How, test.how)
		}
		now := d.nodes[target]
		if now.text != string(mustAdd(t, []byte(before.nodes[target].text), cp).Text) {
			t.Errorf("%s: %q", test.name, now.text)
		}
		old := before.nodes[target]
		if test.how != Create {
			old.info.ID = now.info.ID
			if !now.info.equal(old.info) {
				t.Errorf("%s: %+v became %+v", test.name, old.info, now.info)
			}
			kept := d.nodes[backupPath]
			if old.info.ID = kept.info.ID; kept.text != old.text || !kept.info.equal(old.info) {
				t.Errorf("%s: the backup is %+v", test.name, kept)
			}
		} else if d.nodes[target].info.Mode != 0o644 || d.nodes[backupPath].info.Kind != Missing {
			t.Errorf("%s: %+v", test.name, d.nodes)
		}

		writes := d.writes
		if again := install(t, m, cp); again.How != Unchanged || d.writes != writes {
			t.Errorf("%s: a second install: %s", test.name, again.How)
		}
		r, err := m.InspectRemoval()
		if err != nil || d.writes != writes {
			t.Errorf("%s: looking before an uninstall wrote: %v", test.name, err)
		}
		removed := remove(t, m)
		if !removed.Restored || removed.How == Unchanged || removed.String() != r.String() && test.how != InPlace {
			t.Errorf("%s: %s; looked like %s", test.name, removed, r)
		}
		if !slices.Equal(d.files(), before.files()) || d.nodes[target].text != before.nodes[target].text {
			t.Errorf("%s: left %q", test.name, d.files())
		}
		if test.how == InPlace && d.nodes[target].info.ID != before.nodes[target].info.ID {
			t.Errorf("%s: a mounted file became another", test.name)
		}
		writes = d.writes
		if r := remove(t, m); !r.Nothing() || d.writes != writes {
			t.Errorf("%s: a second uninstall: %s", test.name, r)
		}
	}
}

// Contract 4.3: what a later step of the install undoes.
func TestUndo(t *testing.T) {
	for _, text := range []string{"-", "", "nameserver 10.0.0.1\n", string(mustAdd(t, []byte("nameserver ::1\n"), cp6).Text)} {
		d := newDisk(t)
		m := manager(d)
		if text != "-" {
			d.put(DefaultPath, text)
		}
		before := d.clone()
		i := install(t, m, cp)
		if err := m.Undo(i); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(d.files(), before.files()) || d.nodes[DefaultPath].text != before.nodes[DefaultPath].text {
			t.Errorf("%q: %q with %q", text, d.files(), d.nodes[DefaultPath].text)
		}
	}
}

func TestUndoOfAChangeOfAddress(t *testing.T) {
	d := newDisk(t).put(DefaultPath, "nameserver 10.0.0.1\n")
	m := manager(d)
	install(t, m, cp)
	before := d.clone()
	i := install(t, m, cp6)
	if i.How != Replace || d.text(backupPath) != "nameserver 10.0.0.1\n" || strings.Contains(d.text(DefaultPath), cp.String()) {
		t.Errorf("%s: %q", i, d.text(DefaultPath))
	}
	after := d.clone()
	if err := m.Undo(i); err != nil {
		t.Fatal(err)
	}
	for _, name := range before.files() {
		if d.text(name) != before.text(name) {
			t.Errorf("%s: %q, was %q", name, d.text(name), before.text(name))
		}
	}
	// The same after somebody's edit.
	after.change(DefaultPath, func(n *node) { n.text += "options theirs\n" })
	if err := manager(after).Undo(i); err != nil || after.text(DefaultPath) != before.text(DefaultPath)+"options theirs\n" {
		t.Errorf("%v %q", err, after.text(DefaultPath))
	}
	remove(t, m)
	if got := d.files(); !slices.Equal(got, []string{DefaultPath}) || d.text(DefaultPath) != "nameserver 10.0.0.1\n" {
		t.Errorf("%q", got)
	}
}

func TestUndoKeepsWhatIsTheirs(t *testing.T) {
	for _, missing := range []bool{false, true} {
		d := newDisk(t)
		if !missing {
			d.put(DefaultPath, "nameserver 10.0.0.1\n")
		}
		m := manager(d)
		i := install(t, m, cp)
		d.change(DefaultPath, func(n *node) { n.text += "options theirs\n" })
		if err := m.Undo(i); err != nil || strings.Contains(d.text(DefaultPath), "10.9.9.9") || !strings.Contains(d.text(DefaultPath), "theirs") || len(d.files()) != 1 {
			t.Errorf("%v %q %q", err, d.files(), d.text(DefaultPath))
		}
	}
	// The file is gone by then.
	d := newDisk(t).put(DefaultPath, "x\n")
	i := install(t, manager(d), cp)
	delete(d.nodes, DefaultPath)
	if err := manager(d).Undo(i); err != nil || len(d.files()) != 0 {
		t.Errorf("%v %q", err, d.files())
	}
}

// What somebody changed since the install stays.
func TestRemoveAfterEdits(t *testing.T) {
	const text = "# by hand\nnameserver 10.0.0.1\n"
	own := string(mustAdd(t, []byte(text), cp).Text)
	for _, test := range []struct {
		name, now, want string
		how             How
		restored        bool
		left            string
	}{
		{"a line more", own + "search lan\n", text + "search lan\n", Replace, false, ""},
		{"a line less", strings.Replace(own, "# by hand\n", "", 1), "nameserver 10.0.0.1\n", Replace, false, ""},
		{"written anew by DHCP", "nameserver 10.7.7.7\n", "nameserver 10.7.7.7\n", Unchanged, false, ""},
		{"as it was already", text, text, Unchanged, false, ""},
		{"emptied", "", "", Unchanged, false, ""},
		{"without the comments", "nameserver 10.9.9.9\nnameserver 10.0.0.1\n", "nameserver 10.9.9.9\nnameserver 10.0.0.1\n", Unchanged, false, "line 1 names 10.9.9.9 without our mark"},
		{"removed", "-", "-", Unchanged, false, ""},
	} {
		d := newDisk(t).put(DefaultPath, text)
		m := manager(d)
		install(t, m, cp)
		d.put(DefaultPath, test.now)
		files := []string{DefaultPath}
		if test.now == "-" {
			delete(d.nodes, DefaultPath)
			files, test.want = nil, ""
		}
		r := remove(t, m)
		if r.How != test.how || r.Restored != test.restored || d.nodes[DefaultPath].text != test.want || !slices.Equal(d.files(), files) {
			t.Errorf("%s: %s; %q, %q", test.name, r, d.nodes[DefaultPath].text, d.files())
		}
		if !strings.Contains(strings.Join(r.Left, "\n"), test.left) || test.left == "" && len(r.Left) > 0 {
			t.Errorf("%s: left %q", test.name, r.Left)
		}
	}
}

// K12: Kuma's uninstall writes an old backup over a newer file, every time.
func TestStaleBackupIsNeverRestored(t *testing.T) {
	d := newDisk(t).put(DefaultPath, "nameserver 10.0.0.1\n").put(backupPath, "nameserver 6.6.6.6\n")
	m := manager(d)
	before := d.clone()
	for range 2 {
		r := remove(t, m)
		if !r.Nothing() || len(r.Left) != 1 || !strings.Contains(r.Left[0], backupPath+" is not a backup of ours") {
			t.Errorf("%s: %q", r, r.Left)
		}
	}
	i := install(t, m, cp)
	if i.Backup != DefaultPath+".kuma-tproxy-backup" || !slices.Equal(i.Foreign, []string{backupPath}) || !strings.Contains(strings.Join(i.Notes(), "\n"), backupPath+" is not a backup of ours") {
		t.Errorf("backup in %s: %q", i.Backup, i.Notes())
	}
	if d.text(i.Backup) != "nameserver 10.0.0.1\n" {
		t.Errorf("%q", d.text(i.Backup))
	}
	remove(t, m)
	for _, name := range before.files() {
		if d.text(name) != before.text(name) {
			t.Errorf("%s: %q", name, d.text(name))
		}
	}
	if len(d.files()) != 2 {
		t.Errorf("%q", d.files())
	}
}

func TestForeignBackups(t *testing.T) {
	const text = "nameserver 10.0.0.1\n"
	t.Run("a folder, a link and a broken record", func(t *testing.T) {
		d := newDisk(t).put(DefaultPath, text).folder(backupPath).symlink(DefaultPath+".kuma-tproxy-backup", "/nowhere")
		d.put(DefaultPath+".kuma-tproxy-backup.2"+recordSuffix, "{}")
		m := manager(d)
		i := install(t, m, cp)
		if i.Backup != DefaultPath+".kuma-tproxy-backup.3" {
			t.Error(i.Backup)
		}
		if remove(t, m); len(d.files()) != 4 {
			t.Errorf("%q", d.files())
		}
	})
	t.Run("ours, edited by somebody", func(t *testing.T) {
		d := newDisk(t).put(DefaultPath, text)
		m := manager(d)
		install(t, m, cp)
		d.change(backupPath, func(n *node) { n.text += "# mine\n" })
		r := remove(t, m)
		if d.text(DefaultPath) != text || !slices.Equal(d.files(), []string{DefaultPath, backupPath}) || len(r.Left) != 1 {
			t.Errorf("%s: %q", r, d.files())
		}
	})
	t.Run("ours, gone", func(t *testing.T) {
		d := newDisk(t).put(DefaultPath, text)
		m := manager(d)
		install(t, m, cp)
		delete(d.nodes, backupPath)
		if remove(t, m); d.text(DefaultPath) != text || len(d.files()) != 1 {
			t.Errorf("%q", d.files())
		}
	})
	t.Run("the record is gone", func(t *testing.T) {
		d := newDisk(t).put(DefaultPath, text)
		m := manager(d)
		install(t, m, cp)
		delete(d.nodes, backupPath+recordSuffix)
		r := remove(t, m)
		if d.text(DefaultPath) != text || len(r.Left) != 1 || len(d.files()) != 2 {
			t.Errorf("%s: %q", r, d.files())
		}
	})
	t.Run("the file was written anew, and installed again", func(t *testing.T) {
		d := newDisk(t).put(DefaultPath, text)
		m := manager(d)
		install(t, m, cp)
		d.put(DefaultPath, "nameserver 10.7.7.7\n")
		install(t, m, cp6)
		if d.text(backupPath) != "nameserver 10.7.7.7\n" {
			t.Errorf("%q", d.text(backupPath))
		}
		if remove(t, m); d.text(DefaultPath) != "nameserver 10.7.7.7\n" || len(d.files()) != 1 {
			t.Errorf("%q", d.files())
		}
	})
	t.Run("all names are taken", func(t *testing.T) {
		d := newDisk(t).put(DefaultPath, text)
		for _, name := range backupNames(DefaultPath) {
			d.put(name, "x")
		}
		if _, err := manager(d).Install(cp); err == nil || !strings.Contains(err.Error(), "are taken") || d.writes != 0 {
			t.Error(err)
		}
	})
}

// ip-netns(8) shows each namespace a file of its own in one folder for all.
func TestTwoNamespacesShareAFolder(t *testing.T) {
	d := newDisk(t)
	x, y := bound(d), bound(d)
	y.Env.Mounts = ParseMounts([]byte(strings.ReplaceAll(netnsMounts, "/netns/X/", "/netns/Y/")))
	seen := map[string]string{"x": "nameserver 10.0.0.1\n", "y": "nameserver 10.0.0.2\n", "host": "nameserver 10.0.0.3\n"}
	in := func(name string, do func()) {
		d.put(DefaultPath, seen[name])
		do()
		seen[name] = d.text(DefaultPath)
	}
	before := map[string]string{"x": seen["x"], "y": seen["y"], "host": seen["host"]}
	h := manager(d)
	d.busy = map[string]bool{}
	in("x", func() { install(t, x, cp) })
	in("host", func() { install(t, h, cp) })
	in("y", func() { install(t, y, cp) })
	for _, name := range []string{"host", "x", "y"} {
		m := map[string]Manager{"x": x, "y": y, "host": h}[name]
		in(name, func() {
			if r := remove(t, m); !r.Restored || len(r.Left) > 0 {
				t.Errorf("%s: %s %q", name, r, r.Left)
			}
		})
		if seen[name] != before[name] {
			t.Errorf("%s: %q", name, seen[name])
		}
	}
	if len(d.files()) != 1 {
		t.Errorf("%q", d.files())
	}
	if tempName(DefaultPath, "/a") == tempName(DefaultPath, "/b") || tempName(DefaultPath, "/a") == tempName(DefaultPath, "") {
		t.Error("two runs would write to one file")
	}
}

func TestInspectErrors(t *testing.T) {
	const text = "nameserver 10.0.0.1\n"
	for _, test := range []struct {
		name string
		make func(d *disk, m *Manager)
		want string
	}{
		{"a directory", func(d *disk, _ *Manager) { d.folder(DefaultPath) }, `"/etc/resolv.conf" is a directory; a resolv.conf is a regular file`},
		{"dangling", func(d *disk, _ *Manager) { d.symlink(DefaultPath, "/srv/gone") }, "which does not exist"},
		{"unreadable", func(d *disk, _ *Manager) { d.change(DefaultPath, func(n *node) { n.info.Mode = 0 }) }, "permission denied"},
		{"immutable", func(d *disk, _ *Manager) { d.change(DefaultPath, func(n *node) { n.info.Immutable = true }) }, "chattr -i -a /etc/resolv.conf"},
		{"too long", func(d *disk, _ *Manager) { d.put(DefaultPath, strings.Repeat("#\n", MaxSize/2+1)) }, "longer than 65536 bytes"},
		{"just too long with ours", func(d *disk, _ *Manager) { d.put(DefaultPath, strings.Repeat("#\n", MaxSize/2)) }, "longer than 65536 bytes"},
		{"binary", func(d *disk, _ *Manager) { d.put(DefaultPath, "\x7fELF\x00") }, "is not edited: no resolv.conf to edit: byte 0 is 0x7f"},
		{"listed", func(d *disk, _ *Manager) { d.put(DefaultPath, text+"nameserver 10.9.9.9\n") }, "/etc/resolv.conf: line 2 lists the nameserver 10.9.9.9 behind others"},
		{"a read-only mount", func(_ *disk, m *Manager) {
			m.Env.Mounts = ParseMounts([]byte(strings.Replace(hostMounts, "/ / rw", "/ / ro", 1)))
		}, "is on a read-only mount"},
		{"owned", func(d *disk, _ *Manager) { d.symlink(DefaultPath, "/run/systemd/resolve/stub-resolv.conf") }, "is managed by systemd-resolved (stub)"},
		{"another network namespace", func(_ *disk, m *Manager) { m.Namespaces.Self = "net:[7]" }, "serves every network namespace"},
		{"relative", func(_ *disk, m *Manager) { m.Env.Path = "resolv.conf" }, "is no absolute path"},
	} {
		d := newDisk(t).put(DefaultPath, text)
		m := manager(d)
		test.make(d, &m)
		before := d.clone()
		for _, err := range []error{second(m.Inspect(cp)), second(m.Install(cp))} {
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s: %v", test.name, err)
			}
		}
		if d.writes != 0 || !slices.Equal(d.files(), before.files()) {
			t.Errorf("%s: %d writes", test.name, d.writes)
		}
	}
	if _, err := manager(newDisk(t)).Inspect(netip.MustParseAddr("224.0.0.1")); err == nil || !strings.Contains(err.Error(), "is multicast") {
		t.Error(err)
	}
}

func second[T any](_ T, err error) error { return err }

// An uninstall leaves what it cannot look at, unless there was an install.
func TestRemoveErrors(t *testing.T) {
	d := newDisk(t).folder(DefaultPath)
	if r, err := manager(d).Remove(); err != nil || len(r.Left) != 1 || !strings.Contains(r.Left[0], "is a directory") || d.writes != 0 {
		t.Errorf("%v %q", err, r.Left)
	}
	d = newDisk(t).put(DefaultPath, "x\n")
	m := manager(d)
	install(t, m, cp)
	own := d.clone()
	for name, test := range map[string]struct {
		make func(d *disk, m *Manager)
		want string
	}{
		"a directory": {func(d *disk, _ *Manager) { d.folder(DefaultPath) }, "is a directory"},
		"grown": {func(d *disk, _ *Manager) {
			d.change(DefaultPath, func(n *node) { n.text += strings.Repeat("#\n", MaxSize/2) })
		}, "more than 65536 bytes by now; take out the line that begins with"},
		"immutable": {func(d *disk, _ *Manager) { d.change(DefaultPath, func(n *node) { n.info.Immutable = true }) }, "chattr -i"},
	} {
		d := own.clone()
		m := manager(d)
		test.make(d, &m)
		if _, err := m.Remove(); err == nil || !strings.Contains(err.Error(), test.want) || d.writes != 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	// In a namespace that is not the host's, its file is left and named.
	d = own.clone()
	m = manager(d)
	m.Namespaces.Self = "net:[7]"
	if r, err := m.Remove(); err != nil || len(r.Left) != 1 || d.writes != 0 {
		t.Errorf("%v %q", err, r.Left)
	}
}

// A disk that cannot do something: all is as it was, and the error says so.
func TestFailuresAreUndone(t *testing.T) {
	const text = "# x\nnameserver 10.0.0.1\n"
	for name, make := range map[string]func(d *disk) Manager{"a file": manager, "a mounted file": bound} {
		for n := 0; ; n++ {
			d := newDisk(t).put(DefaultPath, text)
			m := make(d)
			left := n
			last := ""
			d.step = func(op, name string) error {
				if left--; left == -1 {
					last = op + " " + name
					return &fs.PathError{Op: op, Path: name, Err: syscall.ENOSPC}
				}
				return nil
			}
			_, err := m.Install(cp)
			if last == "" {
				break
			}
			d.step = nil
			if last == "remove "+journalName(DefaultPath, "/etc/netns/X/resolv.conf") {
				// The file is right; the next run removes the journal.
				if install(t, m, cp); err != nil || len(d.files()) != 3 {
					t.Errorf("%s: %v, %q", last, err, d.files())
				}
				continue
			}
			if _, ok := errors.AsType[*FileError](err); !ok || !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "nothing was changed") {
				t.Errorf("%s, %s: %v", name, last, err)
			}
			if d.text(DefaultPath) != text || !slices.Equal(d.files(), []string{DefaultPath}) {
				t.Errorf("%s, %s: %q with %q", name, last, d.files(), d.text(DefaultPath))
			}
		}
	}
}

// Every kind of step fails from some moment on.
func TestDisksThatCannot(t *testing.T) {
	const text = "nameserver 10.0.0.1\n"
	for _, op := range []string{"create", "write", "rename", "link", "unlink", "open", "overwrite"} {
		for name, make := range map[string]func(d *disk) Manager{"a file": manager, "a mounted file": bound} {
			d := newDisk(t).put(DefaultPath, text)
			m := make(d)
			used := false
			d.step = func(o, _ string) error {
				if o == op {
					used = true
					return &fs.PathError{Op: o, Path: DefaultPath, Err: syscall.EROFS}
				}
				return nil
			}
			if _, err := m.Install(cp); (err == nil) == used {
				t.Errorf("%s cannot %s: %v", name, op, err)
			}
			if used && (d.text(DefaultPath) != text || len(d.files()) != 1) {
				t.Errorf("%s cannot %s: %q with %q", name, op, d.files(), d.text(DefaultPath))
			}
		}
	}
	// Nothing can be removed: neither the temporary file nor, when the file cannot
	// be written, what was made for it. The error names them.
	d := newDisk(t).put(DefaultPath, text)
	d.step = func(op, name string) error {
		if op == "remove" || op == "rename" {
			return fmt.Errorf("%s %s: %w", op, name, syscall.EIO)
		}
		return nil
	}
	_, err := manager(d).Install(cp)
	if err == nil || !strings.Contains(err.Error(), "could not be undone") || !strings.Contains(err.Error(), backupPath) || d.text(DefaultPath) != text {
		t.Error(err)
	}
	d.step = nil
	if remove(t, manager(d)); d.text(DefaultPath) != text || len(d.files()) != 1 {
		t.Errorf("%q", d.files())
	}
}

func TestSwappedBetweenReadAndWrite(t *testing.T) {
	const text, theirs = "nameserver 10.0.0.1\n", "# theirs\nnameserver 10.7.7.7\n"
	for name, make := range map[string]func(d *disk) Manager{"a file": manager, "a mounted file": bound} {
		// Once, at each step before the file is written: the edit is of theirs.
		for _, at := range []string{"create " + DefaultPath + ".kuma-tmp", "link " + backupPath + recordSuffix, "link " + backupPath, "open " + DefaultPath} {
			d := newDisk(t).put(DefaultPath, text)
			m := make(d)
			swapped := false
			d.step = func(op, name string) error {
				if !swapped && op+" "+name == at {
					swapped = true
					d.put(DefaultPath, theirs)
				}
				return nil
			}
			install(t, m, cp)
			if swapped && d.text(DefaultPath) != string(mustAdd(t, []byte(theirs), cp).Text) || swapped && d.text(backupPath) != theirs {
				t.Errorf("%s, %s: %q, backup %q", name, at, d.text(DefaultPath), d.text(backupPath))
			}
			if remove(t, m); swapped && (d.text(DefaultPath) != theirs || len(d.files()) != 1) {
				t.Errorf("%s, %s: %q", name, at, d.files())
			}
		}
		// Each time: given up, and theirs stands.
		d := newDisk(t).put(DefaultPath, text)
		m := make(d)
		n := 0
		d.step = func(op, name string) error {
			if op == "link" && name == backupPath {
				n++
				d.put(DefaultPath, fmt.Sprintf("%s# %d\n", theirs, n))
			}
			return nil
		}
		if _, err := m.Install(cp); !errors.Is(err, ErrChanged) || n != attempts || !strings.HasPrefix(d.text(DefaultPath), theirs) || len(d.files()) != 1 {
			t.Errorf("%s: %v after %d attempts; %q", name, err, n, d.files())
		}
	}
}

func TestChangedInOtherWays(t *testing.T) {
	const text, theirs = "nameserver 10.0.0.1\n", "# theirs\nnameserver 10.7.7.7\n"
	// Only the owner was changed.
	d := newDisk(t).put(DefaultPath, text)
	d.step = func(op, name string) error {
		if op == "link" && name == backupPath {
			d.change(DefaultPath, func(n *node) { n.info.UID = 9 })
		}
		return nil
	}
	if install(t, manager(d), cp); d.nodes[DefaultPath].info.UID != 9 {
		t.Error("the owner was changed back")
	}
	// Somebody makes the file, and somebody the backup, before we do.
	d = newDisk(t)
	d.step = func(op, name string) error {
		if op == "link" && name == DefaultPath && d.nodes[DefaultPath].text == "" {
			d.put(DefaultPath, theirs)
		}
		return nil
	}
	if install(t, manager(d), cp); d.text(DefaultPath) != string(mustAdd(t, []byte(theirs), cp).Text) {
		t.Errorf("%q", d.text(DefaultPath))
	}
	d = newDisk(t).put(DefaultPath, text)
	d.step = func(op, name string) error {
		if op == "link" && name == backupPath {
			d.put(backupPath, "kuma's")
		}
		return nil
	}
	if i := install(t, manager(d), cp); i.Backup != DefaultPath+".kuma-tproxy-backup" || d.text(backupPath) != "kuma's" {
		t.Errorf("%s, %q", i.Backup, d.text(backupPath))
	}
	// In an uninstall.
	d = newDisk(t).put(DefaultPath, text)
	install(t, manager(d), cp)
	once := false
	d.step = func(op, name string) error {
		if op == "create" && !once {
			once = true
			d.change(DefaultPath, func(n *node) { n.text += "options theirs\n" })
		}
		return nil
	}
	if r := remove(t, manager(d)); r.Restored || d.text(DefaultPath) != text+"options theirs\n" {
		t.Errorf("%s: %q", r, d.text(DefaultPath))
	}
}

// kinds are files that an install can meet, for the tests that kill it.
var kinds = []struct {
	name string
	make func(d *disk) Manager
}{
	{"a file", func(d *disk) Manager { d.put(DefaultPath, "# x\nnameserver 10.0.0.1\n"); return manager(d) }},
	{"no file", manager},
	{"empty", func(d *disk) Manager { d.put(DefaultPath, ""); return manager(d) }},
	{"mounted", func(d *disk) Manager { d.put(DefaultPath, "# x\nnameserver 10.0.0.1\n"); return bound(d) }},
	{"mounted, empty", func(d *disk) Manager { d.put(DefaultPath, ""); return bound(d) }},
	{"mounted, longer than our lines", func(d *disk) Manager {
		d.put(DefaultPath, "nameserver 10.0.0.1\n"+strings.Repeat("# a line\n", 30))
		return bound(d)
	}},
	{"a link", func(d *disk) Manager {
		d.put("/srv/r", "nameserver 10.0.0.1").symlink(DefaultPath, "/srv/r")
		return manager(d)
	}},
	{"beside Kuma's backup", func(d *disk) Manager {
		d.put(DefaultPath, "nameserver 10.0.0.1\n").put(backupPath, "stale\n")
		return manager(d)
	}},
}

func check(t *testing.T, what string, d, want *disk) {
	t.Helper()
	if !slices.Equal(d.files(), want.files()) {
		t.Errorf("%s: there are %q, want %q", what, d.files(), want.files())
		return
	}
	for _, name := range want.files() {
		if d.nodes[name].text != want.nodes[name].text || d.nodes[name].link != want.nodes[name].link {
			t.Errorf("%s: %s has %q, want %q", what, name, d.nodes[name].text, want.nodes[name].text)
		}
	}
}

// Contract 4.5: killed at any moment, the file is the old or the new one, and the
// next uninstall, or install, finishes.
func TestKilledAtEveryStep(t *testing.T) {
	count := 0
	for _, kind := range kinds {
		d := newDisk(t)
		m := kind.make(d)
		before := d.clone()
		install(t, m, cp)
		after := d.clone()
		on := func(d *disk) Manager { m := m; m.FS = d; return m }
		for i := 0; ; i++ {
			d := before.clone()
			if !d.killAt(i, func() { install(t, on(d), cp) }) {
				break
			}
			count++
			what := fmt.Sprintf("%s, install killed at step %d", kind.name, i)
			oldOrNew(t, what, d, before, after)
			again := d.clone()
			install(t, on(again), cp)
			check(t, what+" and done again", again, after)
			for j := 0; ; j++ {
				d := d.clone()
				killed := d.killAt(j, func() { remove(t, on(d)) })
				if killed {
					count++
					oldOrNew(t, fmt.Sprintf("%s, uninstall at %d", what, j), d, before, after)
					remove(t, on(d))
				}
				check(t, fmt.Sprintf("%s, uninstall at %d", what, j), d, before)
				if !killed {
					break
				}
			}
		}
		for j := 0; ; j++ {
			d := after.clone()
			if !d.killAt(j, func() { remove(t, on(d)) }) {
				break
			}
			count++
			what := fmt.Sprintf("%s, uninstall killed at step %d", kind.name, j)
			oldOrNew(t, what, d, before, after)
			again := d.clone()
			remove(t, on(again))
			check(t, what+" and done again", again, before)
			install(t, on(d), cp)
			check(t, what+", installed", d, after)
		}
	}
	t.Logf("killed %d times", count)
}

// oldOrNew checks that the C library reads the old or the new nameservers, and
// where rename works, that the bytes are the old or the new ones.
func oldOrNew(t *testing.T, what string, d, before, after *disk) {
	t.Helper()
	target := DefaultPath
	if _, ok := before.nodes["/srv/r"]; ok {
		target = "/srv/r"
	}
	now := d.nodes[target].text
	if now == before.nodes[target].text || now == after.nodes[target].text {
		return
	}
	if !d.busy[DefaultPath] {
		t.Errorf("%s: %q", what, now)
		return
	}
	// In place a write may stop between any two bytes; what is there then is mended
	// by the next run. Stopped before the cut, nothing of the former is read.
	if !torn([]byte(now), []byte(before.nodes[target].text), []byte(after.nodes[target].text)) &&
		!torn([]byte(now), []byte(after.nodes[target].text), []byte(before.nodes[target].text)) {
		t.Errorf("%s: %q", what, now)
	}
}

func TestTorn(t *testing.T) {
	old, own := []byte("# x\nnameserver 10.0.0.1\n"), mustAdd(t, []byte("# x\nnameserver 10.0.0.1\n"), cp).Text
	for _, test := range []struct {
		now, from, to string
		want          bool
	}{
		{string(old), string(old), string(own), false},
		{string(own), string(old), string(own), false},
		{string(own[:10]) + string(old[10:]), string(old), string(own), true},
		{string(own[:50]), string(old), string(own), true},
		{string(old) + "\n\n", string(old), string(own), false},
		{string(pad(old, len(own))), string(own), string(old), true},
		{string(old) + string(own[len(old):]), string(own), string(old), true},
		{string(old) + "options theirs\n", string(old), string(own), false},
		{string(own) + "options theirs\n", string(old), string(own), false},
		{"", string(old), string(own), false},
		{"something else", string(old), string(own), false},
	} {
		if got := torn([]byte(test.now), []byte(test.from), []byte(test.to)); got != test.want {
			t.Errorf("%q between %q and %q: %v", test.now, test.from, test.to, got)
		}
	}
}

// Any sequence of installs, uninstalls, kills and edits by others: what others
// wrote is there at the end, and nothing of ours.
func TestLifecycle(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		d := newDisk(t)
		mounted := rapid.Bool().Draw(rt, "mounted")
		theirs := "nameserver 10.0.0.1\n" // what the file would be without us
		m := manager(d)
		d.put(DefaultPath, theirs)
		if mounted {
			m = bound(d)
		}
		addr := rapid.SampledFrom([]netip.Addr{cp, cp6})
		half := false // a write in place was stopped: nobody but us touches the file
		rt.Repeat(map[string]func(*rapid.T){
			"install": func(rt *rapid.T) { install(t, m, addr.Draw(rt, "address")); half = false },
			"remove":  func(*rapid.T) { remove(t, m); half = false },
			"undo": func(rt *rapid.T) {
				i := install(t, m, addr.Draw(rt, "address"))
				if err := m.Undo(i); err != nil {
					rt.Fatal(err)
				}
				half = false
			},
			"killed install": func(rt *rapid.T) {
				a := addr.Draw(rt, "address")
				half = d.killAt(rapid.IntRange(0, 15).Draw(rt, "step"), func() { install(t, m, a) }) && mounted || half
			},
			"killed uninstall": func(rt *rapid.T) {
				half = d.killAt(rapid.IntRange(0, 10).Draw(rt, "step"), func() { remove(t, m) }) && mounted || half
			},
			"another program writes it anew": func(rt *rapid.T) {
				if half {
					return
				}
				theirs = fmt.Sprintf("# %d\nnameserver 10.7.7.7\n", rapid.IntRange(0, 9).Draw(rt, "n"))
				d.put(DefaultPath, theirs)
			},
			"a person adds a line": func(*rapid.T) {
				if half {
					return
				}
				theirs += "options x\n"
				d.change(DefaultPath, func(n *node) { n.text += "options x\n" })
			},
			"": func(rt *rapid.T) {
				c := d.clone()
				m := m
				m.FS = c
				remove(t, m)
				if c.text(DefaultPath) != theirs || !slices.Equal(c.files(), []string{DefaultPath}) {
					rt.Fatalf("%q in %q, want %q", c.text(DefaultPath), c.files(), theirs)
				}
			},
		})
	})
}

func TestPlanText(t *testing.T) {
	d := newDisk(t).put("/srv/r", "nameserver ::1\nnameserver ::2\nnameserver ::3\n"+"search a b c d e f g\n").symlink(DefaultPath, "/srv/r")
	p, err := manager(d).Inspect(cp)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := p.String(), "nameserver 10.9.9.9 first in /etc/resolv.conf, which is /srv/r (replaced by rename), backup in /etc/resolv.conf.kuma-backup"; got != want {
		t.Error(got)
	}
	if got, want := p.Undo(), "/etc/resolv.conf as it was; what somebody else changed meanwhile stays"; got != want {
		t.Error(got)
	}
	want := []string{
		"the C library asks 3 nameservers: ::3 in /etc/resolv.conf is out of its reach from now on",
		"/etc/resolv.conf line 6: 7 names in the search list, and glibc before 2.26 reads 6",
	}
	if !slices.Equal(p.Notes(), want) {
		t.Errorf("%q", p.Notes())
	}
	p, _ = manager(newDisk(t)).Inspect(cp)
	if got := p.String() + "; " + p.Undo() + "; " + strings.Join(p.Notes(), "; "); got != "nameserver 10.9.9.9 first in /etc/resolv.conf (made); no /etc/resolv.conf; /etc/resolv.conf named no nameserver, so the C library asked 127.0.0.1; from now on it asks 10.9.9.9 alone" {
		t.Error(got)
	}
	d = newDisk(t).put(DefaultPath, "nameserver 10.9.9.9\n")
	p, _ = manager(d).Inspect(cp)
	if got := p.String() + "; " + p.Undo() + "; " + strings.Join(p.Notes(), "; "); got != "nameserver 10.9.9.9 first in /etc/resolv.conf: line 1 has it already, and is not ours; nothing; /etc/resolv.conf line 1 names 10.9.9.9, and is not ours: uninstall leaves it" {
		t.Error(got)
	}
	d = newDisk(t).put(DefaultPath, "x\n")
	install(t, manager(d), cp)
	p, _ = manager(d).Inspect(cp)
	r, _ := manager(d).InspectRemoval()
	if got := p.String() + "; " + r.String(); got != "nameserver 10.9.9.9 first in /etc/resolv.conf: it is; /etc/resolv.conf as it was before the install (replaced by rename); /etc/resolv.conf.kuma-backup removed" {
		t.Error(got)
	}
	r, _ = manager(newDisk(t)).InspectRemoval()
	if got := r.String(); got != "/etc/resolv.conf: nothing of ours" {
		t.Error(got)
	}
}
