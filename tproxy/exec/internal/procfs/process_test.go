package procfs

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"slices"
	"testing"
)

func TestOwners(t *testing.T) {
	f := newFake(t, 1)
	f.process(fakeProcess{pid: 1, comm: "systemd", exe: "/usr/lib/systemd/systemd", inodes: []uint64{7, 8}})
	f.process(fakeProcess{pid: 2, comm: "kthreadd", kernel: true, inodes: []uint64{7}})
	f.process(fakeProcess{pid: 10, parent: 1, comm: "a) (b", exe: "/usr/bin/a (deleted)", uid: 65534, inodes: []uint64{9, 7, 9, 10}})
	f.process(fakeProcess{pid: 9, parent: 1, comm: "gone"})
	// It went away between the reading of the folder and of its files.
	for _, elem := range []string{"stat", "fd", "comm"} {
		if err := os.RemoveAll(f.pidPath(9, elem)); err != nil {
			t.Fatal(err)
		}
	}
	f.write("x", "cmdline")
	systemd := Process{1, "systemd", "/usr/lib/systemd/systemd", 0}
	a := Process{10, "a) (b", "/usr/bin/a", 65534}

	got, partial, err := f.Owners(map[uint64]bool{7: true, 9: true, 11: true})
	want := map[uint64][]Process{7: {systemd, a}, 9: {a}}
	if err != nil || partial || !maps.EqualFunc(got, want, slices.Equal) {
		t.Errorf("got %v, %v, %v, want %v", got, partial, err, want)
	}
	if got, partial, err := f.Owners(nil); len(got) != 0 || partial || err != nil {
		t.Errorf("of nothing: got %v, %v, %v", got, partial, err)
	}
	if _, _, err := (FS{Root: f.Root + "/absent"}).Owners(map[uint64]bool{7: true}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no proc: got %v", err)
	}
}

func TestAncestors(t *testing.T) {
	f := newFake(t, 40)
	f.process(fakeProcess{pid: 1, comm: "init"})
	f.process(fakeProcess{pid: 20, parent: 1, comm: "sh) S 30 (x"})
	f.process(fakeProcess{pid: 30, parent: 20, comm: "(sd pam)"})
	f.process(fakeProcess{pid: 40, parent: 30, comm: "kumactl\n"})
	f.process(fakeProcess{pid: 50, parent: 0, comm: "nsenter"})
	f.process(fakeProcess{pid: 60, parent: 61, comm: "loop"})
	f.process(fakeProcess{pid: 61, parent: 60, comm: "loop"})
	f.process(fakeProcess{pid: 70, parent: 71, comm: "orphan"})
	f.write("80 (cut) S", "80", "stat")
	f.write("", "81", "stat")
	f.write("82 (odd) S x 1 1 0 -1 0", "82", "stat")
	for pid, want := range map[int][]int{
		40: {40, 30, 20, 1},
		1:  {1},
		50: {50},
		60: {60, 61},
		70: {70},
		80: nil, 81: nil, 82: nil, 99: nil, 0: nil, -1: nil,
	} {
		if got := f.Ancestors(pid); !slices.Equal(got, want) {
			t.Errorf("%d: got %v, want %v", pid, got, want)
		}
	}
}

func TestEnviron(t *testing.T) {
	f := newFake(t, 1)
	f.process(fakeProcess{pid: 5, comm: "x", environ: []string{"PATH=/bin", "A=1=2", "EMPTY=", "AB=3", "A=later", "bare"}})
	for _, c := range []struct {
		pid        int
		key, value string
		ok         bool
	}{
		{5, "A", "1=2", true}, {5, "AB", "3", true}, {5, "EMPTY", "", true}, {5, "PATH", "/bin", true},
		{5, "B", "", false}, {5, "bare", "", false}, {5, "", "", false}, {6, "A", "", false},
	} {
		if value, ok := f.Environ(c.pid, c.key); value != c.value || ok != c.ok {
			t.Errorf("%d %q: got %q, %v, want %q, %v", c.pid, c.key, value, ok, c.value, c.ok)
		}
	}
}

func TestSameNetNS(t *testing.T) {
	f := newFake(t, 1)
	f.process(fakeProcess{pid: 5, comm: "ours"})
	f.process(fakeProcess{pid: 6, comm: "theirs", netns: otherNS})
	for pid, want := range map[int]bool{5: true, 6: false, 7: false} {
		if got := f.SameNetNS(pid); got != want {
			t.Errorf("%d: got %v, want %v", pid, got, want)
		}
	}
	if (FS{Root: t.TempDir()}).SameNetNS(5) {
		t.Error("two namespaces that cannot be read are the same")
	}
}
