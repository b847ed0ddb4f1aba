package files

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
)

const text = "# by hand\nnameserver 10.0.0.1\n"

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// names lists a folder.
func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	all, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range all {
		out = append(out, e.Name())
	}
	return out
}

// tmpfs is a folder that is a mount of its own.
func tmpfs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must(t, syscall.Mount("tmpfs", dir, "tmpfs", 0, ""))
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

func bind(t *testing.T, from, to string) {
	t.Helper()
	must(t, syscall.Mount(from, to, "", syscall.MS_BIND, ""))
	t.Cleanup(func() { _ = syscall.Unmount(to, syscall.MNT_DETACH) })
}

func installed(t *testing.T, text string) string {
	t.Helper()
	e, err := dns.AddNameserver([]byte(text), cp)
	must(t, err)
	return string(e.Text)
}

func TestManagerOnARealDisk(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "resolv.conf")
	write(t, path, text)
	must(t, os.Chmod(path, 0o640))
	if os.Geteuid() == 0 {
		must(t, os.Chown(path, 3, 4))
	}
	before, err := FS{}.Lstat(path)
	must(t, err)
	m := managed(path)
	i, err := m.Install(cp)
	must(t, err)
	after, err := FS{}.Lstat(path)
	must(t, err)
	backup, err := FS{}.Lstat(i.Backup)
	must(t, err)
	if i.How != dns.Replace || after.ID == before.ID || read(t, path) != installed(t, text) || read(t, i.Backup) != text {
		t.Errorf("%s: %q", i, read(t, path))
	}
	for _, info := range []dns.Info{after, backup} {
		if info.Mode != 0o640 || info.UID != before.UID || info.GID != before.GID {
			t.Errorf("%+v, was %+v", info, before)
		}
	}
	r, err := m.Remove()
	must(t, err)
	if !r.Restored || read(t, path) != text || !slices.Equal(names(t, dir), []string{"resolv.conf"}) {
		t.Errorf("%s: %q", r, names(t, dir))
	}
	again, err := FS{}.Lstat(path)
	if must(t, err); again.Mode != 0o640 || again.UID != before.UID {
		t.Errorf("%+v", again)
	}
	must(t, os.Remove(path))
	i, err = m.Install(cp)
	must(t, err)
	info, err := os.Stat(path)
	if must(t, err); i.How != dns.Create || info.Mode() != 0o644 {
		t.Errorf("%s %s", i, info.Mode())
	}
	must(t, m.Undo(i))
	if left := names(t, dir); len(left) != 0 {
		t.Errorf("%q", left)
	}
}

func TestXattrsAreKept(t *testing.T) {
	netlab.Require(t)
	dir := tmpfs(t)
	path := filepath.Join(dir, "resolv.conf")
	write(t, path, text)
	want := []dns.Xattr{{Name: "security.kuma", Value: "a\x00b"}, {Name: "trusted.kuma", Value: strings.Repeat("x", 300)}}
	// An access list: user 7 may read. Its form: linux/posix_acl_xattr.h.
	acl := []byte{2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 7, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 0x10, 0, 4, 0, 255, 255, 255, 255, 0x20, 0, 0, 0, 255, 255, 255, 255}
	if err := syscall.Setxattr(path, "system.posix_acl_access", acl, 0); err == nil {
		want = append(want, dns.Xattr{Name: "system.posix_acl_access", Value: string(acl)})
		slices.SortFunc(want, func(a, b dns.Xattr) int { return strings.Compare(a.Name, b.Name) })
	} else {
		t.Logf("no access lists on tmpfs here: %v", err)
	}
	for _, x := range want {
		if err := syscall.Setxattr(path, x.Name, []byte(x.Value), 0); err != nil {
			t.Skipf("%s on tmpfs: %v", x.Name, err)
		}
	}
	m := managed(path)
	i, err := m.Install(cp)
	must(t, err)
	for _, name := range []string{path, i.Backup} {
		info, err := FS{}.Lstat(name)
		if must(t, err); !slices.Equal(info.Xattrs, want) {
			t.Errorf("%s: %+v", name, info.Xattrs)
		}
	}
	_, err = m.Remove()
	must(t, err)
	if info, err := (FS{}).Lstat(path); err != nil || !slices.Equal(info.Xattrs, want) || read(t, path) != text {
		t.Errorf("%+v %v", info, err)
	}
}

// A mount point cannot be replaced: rename(2) says EBUSY.
func TestBindMount(t *testing.T) {
	netlab.Require(t)
	dir := t.TempDir()
	path, source := filepath.Join(dir, "etc-resolv.conf"), filepath.Join(dir, "source")
	write(t, path, "")
	write(t, source, text)
	bind(t, source, path)
	for _, known := range []bool{true, false} {
		m := managed(path)
		if !known {
			m.Env.Mounts = nil // as without /proc
		}
		i, err := m.Install(cp)
		must(t, err)
		if i.How != dns.InPlace || read(t, source) != installed(t, text) {
			t.Errorf("%s: %q", i, read(t, source))
		}
		if known && i.Mode != dns.BindMount {
			t.Errorf("%s", i.Mode)
		}
		if again, err := m.Install(cp); err != nil || again.How != dns.Unchanged {
			t.Errorf("%s %v", again, err)
		}
		r, err := m.Remove()
		must(t, err)
		if !r.Restored || r.How != dns.InPlace || read(t, source) != text || !slices.Equal(names(t, dir), []string{"etc-resolv.conf", "source"}) {
			t.Errorf("%s: %q, %q", r, read(t, source), names(t, dir))
		}
	}
	// A read-only mount is seen before anything is written.
	must(t, syscall.Mount("", path, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	if _, err := managed(path).Inspect(cp); err == nil || !strings.Contains(err.Error(), "read-only mount") {
		t.Error(err)
	}
	m := managed(path)
	m.Env.Mounts = nil
	if _, err := m.Install(cp); !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), "nothing was changed") || len(names(t, dir)) != 2 {
		t.Errorf("%v, %q", err, names(t, dir))
	}
}

func TestBadFilesOnARealDisk(t *testing.T) {
	netlab.Require(t)
	for _, test := range []struct {
		name string
		make func(t *testing.T, path string)
		want string
	}{
		{"a directory", func(t *testing.T, path string) { must(t, os.Mkdir(path, 0o755)) }, "is a directory"},
		{"a pipe", func(t *testing.T, path string) { must(t, syscall.Mkfifo(path, 0o644)) }, "is no regular file"},
		{"dangling", func(t *testing.T, path string) { must(t, os.Symlink("/srv/gone", path)) }, "does not exist"},
		{"a circle", func(t *testing.T, path string) { must(t, os.Symlink("resolv.conf", path)) }, "more than 40 symbolic links"},
		{"too long", func(t *testing.T, path string) { write(t, path, strings.Repeat("#\n", dns.MaxSize)) }, "longer than 65536 bytes"},
		{"binary", func(t *testing.T, path string) { write(t, path, "\x7fELF\x00") }, "is binary"},
		{"no folder", func(t *testing.T, path string) { must(t, os.Remove(filepath.Dir(path))) }, "no such file or directory"},
		{"a full disk", func(t *testing.T, path string) {
			write(t, path, text)
			write(t, filepath.Join(filepath.Dir(path), "ballast"), "")
			fill(t, filepath.Join(filepath.Dir(path), "ballast"))
		}, "no space left on device"},
		{"a read-only disk", func(t *testing.T, path string) {
			write(t, path, text)
			must(t, syscall.Mount("", filepath.Dir(path), "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
		}, "read-only"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			must(t, syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=200k"))
			defer func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) }()
			folder := filepath.Join(dir, "etc")
			must(t, os.Mkdir(folder, 0o755))
			path := filepath.Join(folder, "resolv.conf")
			if strings.Contains(test.name, "disk") {
				path = filepath.Join(dir, "resolv.conf")
			}
			test.make(t, path)
			before := state(t, dir)
			_, err := managed(path).Install(cp)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v", err)
			}
			if after := state(t, dir); !slices.Equal(after, before) {
				t.Errorf("%q became %q", before, after)
			}
		})
	}
}

// fill writes until the disk is full.
func fill(t *testing.T, name string) {
	f, err := os.Create(name)
	must(t, err)
	defer f.Close()
	for size := 64 << 10; size > 0; size /= 2 {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
}

// state lists what is below a folder, with its bytes.
func state(t *testing.T, dir string) (out []string) {
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		entry := path + " " + d.Type().String()
		if d.Type().IsRegular() {
			entry += fmt.Sprintf(" %.100q", read(t, path))
		}
		out = append(out, entry)
		return nil
	}))
	return out
}

func TestImmutable(t *testing.T) {
	netlab.Require(t, "chattr")
	path := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, path, text)
	for _, flag := range []string{"i", "a"} {
		if out, err := osexec.Command("chattr", "+"+flag, path).CombinedOutput(); err != nil {
			t.Skipf("chattr here: %v: %s", err, out)
		}
		_, err := managed(path).Install(cp)
		if out, e := osexec.Command("chattr", "-"+flag, path).CombinedOutput(); e != nil {
			t.Fatalf("%v: %s", e, out)
		}
		if err == nil || !strings.Contains(err.Error(), "is immutable or append-only") || len(names(t, filepath.Dir(path))) != 1 {
			t.Errorf("%v", err)
		}
	}
}

// Without root: what cannot be written stays.
func TestPermissions(t *testing.T) {
	netlab.Require(t)
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	must(t, os.Chmod(filepath.Dir(dir), 0o755))
	for p := dir; p != "/"; p = filepath.Dir(p) {
		if info, err := os.Stat(p); err == nil && info.Mode()&0o001 == 0 {
			t.Skipf("%s is not for everybody", p)
		}
	}
	path := filepath.Join(dir, "resolv.conf")
	write(t, path, text)
	// The test binary is in a folder that is not for everybody either.
	program, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	self := filepath.Join(filepath.Dir(dir), "victim")
	must(t, os.WriteFile(self, program, 0o755))
	must(t, os.Chmod(self, 0o755))
	cmd := osexec.Command(self, path)
	cmd.Env = append(os.Environ(), victim+"=install")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "cannot be written: open "+path) || !strings.Contains(string(out), "permission denied; nothing was changed") {
		t.Errorf("%v: %s", err, out)
	}
	if read(t, path) != text || len(names(t, dir)) != 1 {
		t.Errorf("%q", names(t, dir))
	}
}

// Contract 4.5 for real: a process that is killed in front of each of its system
// calls that change the file system leaves the old file or the new one, and an
// uninstall mends it.
func TestKilledAtEverySystemCall(t *testing.T) {
	netlab.Require(t, "strace")
	if testing.Short() {
		t.Skip("starts some hundred processes")
	}
	self, err := os.Executable()
	must(t, err)
	const calls = "openat,write,pwrite64,ftruncate,fsync,fchmod,fchown,rename,renameat,renameat2,link,linkat,unlink,unlinkat"
	kill := func(what, path, call string, n int) (killed bool) {
		cmd := osexec.Command("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace="+call,
			"-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n), self, path)
		cmd.Env = append(os.Environ(), victim+"="+what)
		out, err := cmd.CombinedOutput()
		exit, ok := errors.AsType[*osexec.ExitError](err)
		switch {
		case err == nil:
			return false
		case ok && (exit.ExitCode() == 137 || exit.Sys().(syscall.WaitStatus).Signaled()):
			return true
		}
		t.Fatalf("%s: %v: %s", what, err, out)
		return false
	}
	count := 0
	for _, mounted := range []bool{false, true} {
		dir := t.TempDir()
		path, source := filepath.Join(dir, "resolv.conf"), filepath.Join(dir, "resolv.conf")
		if mounted {
			source = filepath.Join(dir, "source")
			write(t, path, "")
			write(t, source, text)
			bind(t, source, path)
		}
		before := names(t, dir)
		if !mounted {
			before = []string{"resolv.conf"}
		}
		for _, what := range []string{"install", "remove"} {
			for call := range strings.SplitSeq(calls, ",") {
				for n := 1; ; n++ {
					write(t, source, text)
					if what == "remove" {
						_, err := managed(path).Install(cp)
						must(t, err)
					}
					if !kill(what, path, call, n) {
						break
					}
					count++
					where := fmt.Sprintf("mounted %v, %s killed at %s %d", mounted, what, call, n)
					now := read(t, source)
					if now != text && now != installed(t, text) && !(mounted && string(bytes.TrimRight([]byte(now), "\n"))+"\n" == text) {
						t.Errorf("%s: %q", where, now)
					}
					r, err := managed(path).Remove()
					if err != nil || read(t, source) != text || !slices.Equal(names(t, dir), before) {
						t.Errorf("%s: %v, %s; %q with %q", where, err, r, names(t, dir), read(t, source))
					}
				}
				_, err := managed(path).Remove()
				must(t, err)
			}
		}
	}
	t.Logf("killed %d times", count)
	if count < 50 {
		t.Errorf("killed only %d times", count)
	}
}

func TestRenameNew(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	write(t, a, "a")
	write(t, b, "b")
	if err := (FS{}).RenameNew(a, b); !errors.Is(err, fs.ErrExist) || read(t, b) != "b" {
		t.Error(err)
	}
	must(t, os.Remove(b))
	must(t, FS{}.RenameNew(a, b))
	if read(t, b) != "a" || len(names(t, dir)) != 1 {
		t.Errorf("%q", names(t, dir))
	}
}

func TestOverwriteChecks(t *testing.T) {
	name := filepath.Join(t.TempDir(), "a")
	write(t, name, "ab")
	if err := (FS{}).Overwrite(name, []byte("a"), []byte("x"), 1); !errors.Is(err, dns.ErrChanged) || read(t, name) != "ab" {
		t.Error(err)
	}
	must(t, FS{}.Overwrite(name, []byte("ab"), []byte("x\n"), 1))
	if read(t, name) != "x" {
		t.Errorf("%q", read(t, name))
	}
	must(t, os.Symlink(name, name+"2"))
	if err := (FS{}).Overwrite(name+"2", []byte("x"), []byte("y"), 1); err == nil {
		t.Error("followed a link")
	}
	if b, err := (FS{}).ReadFile(name, 0); err != nil || len(b) != 0 {
		t.Errorf("%q %v", b, err)
	}
}

// What is observed of the lab that the tests run in: a network namespace of its
// own, that is not that of process 1.
func TestSurroundings(t *testing.T) {
	netlab.Require(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "resolv.conf")
	m := Manager(path, nil)
	ns := m.Namespaces
	if ns.Self == "" || ns.Init == "" || ns.Self == ns.Init || len(ns.InitMounts) == 0 {
		t.Skipf("process 1 is not to be seen: %q, %q", ns.Self, ns.Init)
	}
	write(t, path, text)
	_, err := m.Install(cp)
	if _, ok := errors.AsType[*dns.NamespaceError](err); !ok || len(names(t, dir)) != 1 {
		t.Fatalf("%v", err)
	}
	// A folder of its own, as in a container.
	own := filepath.Join(tmpfs(t), "resolv.conf")
	write(t, own, text)
	m.Env.Path, m.Env.Mounts = own, Mounts("thread-self")
	if _, err := m.Install(cp); err != nil {
		t.Error(err)
	}
	comm, err := os.ReadFile("/proc/self/comm")
	must(t, err)
	if !Running()(strings.TrimSpace(string(comm))) || Running()("no-such-process") {
		t.Error("this process is not seen, or one that is not there is")
	}
}
