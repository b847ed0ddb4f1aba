package procfs

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// Threads that a test spoils must not be the main one, which /proc/self and
// /proc/PID show: kept for the main goroutine, it never runs another.
func init() { runtime.LockOSThread() }

// The real proc: a listener of ours is found, and it is ours.
func TestThisMachine(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	addr := l.Addr().(*net.TCPAddr).AddrPort()
	var f FS
	sockets, err := f.TCP()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(sockets, func(s Socket) bool { return s.Listening && s.Local == addr })
	if i < 0 || sockets[i].UID != uint32(os.Geteuid()) || sockets[i].Remote != netip.MustParseAddrPort("0.0.0.0:0") {
		t.Fatalf("%s: not in %v", addr, sockets)
	}
	owners, _, err := f.Owners(map[uint64]bool{sockets[i].Inode: true})
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	got := owners[sockets[i].Inode]
	if len(got) != 1 || got[0].PID != os.Getpid() || got[0].UID != uint32(os.Geteuid()) || got[0].Exe != exe || !strings.HasPrefix(filepath.Base(exe), got[0].Comm) {
		t.Errorf("owners: got %+v", got)
	}
	if on, err := f.ListensOn(addr.Port()); !on || err != nil {
		t.Errorf("ListensOn: got %v, %v", on, err)
	}

	u, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	bound := u.LocalAddr().(*net.UDPAddr).AddrPort()
	if got, err := f.ListensUDP(bound.Addr(), bound.Port()); len(got) != 1 || got[0].Local != bound || err != nil {
		t.Errorf("ListensUDP: got %v, %v", got, err)
	}
	if line := f.Ancestors(os.Getpid()); len(line) < 2 || line[0] != os.Getpid() || line[1] != os.Getppid() {
		t.Errorf("ancestors: got %v", line)
	}
	if !f.SameNetNS(os.Getpid()) {
		t.Error("we are not in our own namespace")
	}
	if _, _, err := f.RemoteShells(); err != nil {
		t.Errorf("remote shells: %v", err)
	}
}

// A thread that went to another namespace is answered for that one.
func TestTheThreadsNamespace(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error)
	var sockets []Socket
	var same bool
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := syscall.Unshare(syscall.CLONE_NEWNET)
		if err == nil {
			same = FS{}.SameNetNS(os.Getpid())
			sockets, err = FS{}.TCP()
		}
		done <- err
	}()
	err = <-done
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		if strings.Contains(os.Getenv("TPROXY_REQUIRE"), "kernel") {
			t.Fatalf("TPROXY_REQUIRE=kernel: unshare: %v", errno)
		}
		t.Skipf("unshare: %v", errno)
	}
	if err != nil || len(sockets) > 0 || same {
		t.Errorf("got %v, same namespace %v, %v, want none", sockets, same, err)
	}
}

// What another user's process holds is not seen, and that is said.
func TestPartial(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can become somebody else")
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f := newFake(t, 1) // only for its clean environment
	f.FS = FS{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		// The system call itself: package syscall's changes every thread.
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			t.Errorf("setresuid: %v", errno)
			return
		}
		owners, partial, err := f.Owners(map[uint64]bool{1: true})
		if len(owners) > 0 || !partial || err != nil {
			t.Errorf("owners: got %v, %v, %v", owners, partial, err)
		}
		if _, partial, err := f.RemoteShells(); !partial || err != nil {
			t.Errorf("remote shells: partial %v, %v", partial, err)
		}
		if value, ok := f.Environ(1, "PATH"); ok {
			t.Errorf("environ of process 1: got %q", value)
		}
	}()
	<-done
}
