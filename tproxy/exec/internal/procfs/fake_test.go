package procfs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fake is a proc made of files.
type fake struct {
	t *testing.T
	FS
	lines map[string][]string // of thread-self/net/*
}

const (
	ourNS   = "net:[4026531840]"
	otherNS = "net:[4026532177]"
)

// newFake has IPv4 and no sockets, and makes pid this process.
func newFake(t *testing.T, self int) *fake {
	t.Helper()
	// What the machine that runs the tests is must not matter.
	for _, key := range []string{"SSH_CONNECTION", "KUBERNETES_SERVICE_HOST", "container"} {
		t.Setenv(key, "")
	}
	dir := t.TempDir()
	f := &fake{t: t, lines: map[string][]string{}, FS: FS{
		Root:     filepath.Join(dir, "proc"),
		UnitDirs: []string{filepath.Join(dir, "etc"), filepath.Join(dir, "run"), filepath.Join(dir, "lib")},
		FileRoot: filepath.Join(dir, "root"),
	}}
	f.link(fmt.Sprint(self), "self")
	f.link(ourNS, "thread-self/ns/net")
	f.sockets("tcp")
	f.sockets("udp")
	return f
}

func (f *fake) write(text string, elem ...string) {
	f.t.Helper()
	writeFile(f.t, f.path(elem...), text)
}

func (f *fake) link(to string, elem ...string) {
	f.t.Helper()
	path := f.path(elem...)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Symlink(to, path); err != nil {
		f.t.Fatal(err)
	}
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

type fakeProcess struct {
	pid, parent int
	comm, exe   string
	uid         uint32
	netns       string // ourNS if empty
	environ     []string
	inodes      []uint64
	kernel      bool
}

func (f *fake) process(p fakeProcess) {
	f.t.Helper()
	pid := fmt.Sprint(p.pid)
	flags := 0x400100
	if p.kernel {
		flags |= flagKernelThread
	}
	f.write(fmt.Sprintf("%d (%s) S %d %d %d 0 -1 %d 1 2 3\n", p.pid, p.comm, p.parent, p.pid, p.pid, flags), pid, "stat")
	f.write(p.comm+"\n", pid, "comm")
	f.write(fmt.Sprintf("Name:\t%s\nPid:\t%d\nUid:\t99\t%d\t98\t97\nGid:\t1\t2\t3\t4\n", p.comm, p.pid, p.uid), pid, "status")
	var environ strings.Builder
	for _, e := range p.environ {
		environ.WriteString(e + "\x00")
	}
	f.write(environ.String(), pid, "environ")
	if p.exe != "" {
		f.link(p.exe, pid, "exe")
	}
	if p.netns == "" {
		p.netns = ourNS
	}
	f.link(p.netns, pid, "ns", "net")
	f.link("/dev/null", pid, "fd", "0")
	f.link("pipe:[5]", pid, "fd", "1")
	for i, inode := range p.inodes {
		f.link(fmt.Sprintf("socket:[%d]", inode), pid, "fd", fmt.Sprint(i+3))
	}
}

// sockets adds lines "local remote st inode" with addresses as the kernel of a
// little-endian machine prints them, to a file that it makes.
func (f *fake) sockets(name string, lines ...string) {
	f.t.Helper()
	for _, line := range lines {
		w := strings.Fields(line)
		f.lines[name] = append(f.lines[name], fmt.Sprintf("%4d: %s %s %s 00000000:00000000 00:00000000 00000000  1000        0 %s 1 0000000000000000 100 0 0 10 0",
			len(f.lines[name]), w[0], w[1], w[2], w[3]))
	}
	f.write(heading+strings.Join(f.lines[name], "\n")+"\n", "thread-self", "net", name)
}

const heading = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
