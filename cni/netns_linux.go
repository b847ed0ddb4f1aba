package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// nsGetType is NS_GET_NSTYPE of linux/nsfs.h (ioctl_ns(2), since 4.11): _IO(0xb7, 0x3).
// MIPS, PowerPC and SPARC number what carries no data otherwise (asm/ioctl.h).
var nsGetType = map[string]uint{"mips": 0x2000b703, "mipsle": 0x2000b703, "mips64": 0x2000b703, "mips64le": 0x2000b703, "ppc64": 0x2000b703, "ppc64le": 0x2000b703}

// openNamespace opens a network namespace; the error is errNotNamespace where the path
// leads to something else, and fs.ErrNotExist where it leads nowhere.
func openNamespace(path string) (*os.File, error) {
	// A FIFO would keep us waiting, and to open a device may do something.
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w: %s", path, errNotNamespace, info.Mode())
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var at unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &at); err != nil || int64(at.Type) != unix.NSFS_MAGIC {
		f.Close()
		return nil, fmt.Errorf("%s: %w: it is no file of a namespace", path, errNotNamespace)
	}
	request, ok := nsGetType[runtime.GOARCH]
	if !ok {
		request = 0xb703
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), request)
	switch {
	case errors.Is(err, unix.ENOTTY): // a kernel before 4.11: setns(2) tells
	case err != nil || kind != unix.CLONE_NEWNET:
		f.Close()
		return nil, fmt.Errorf("%s: %w: it is a namespace of another kind", path, errNotNamespace)
	}
	return f, nil
}

// inNamespace runs f on a thread in the network namespace of the path, in which alone
// that thread ever is: it ends with f. With ours or process 1's nothing is run, and own
// is true: that is the host's network.
func inNamespace(path string, f func() error) (own bool, err error) {
	ns, err := openNamespace(path)
	if err != nil {
		return false, err
	}
	defer ns.Close()
	for _, host := range []string{"/proc/thread-self/ns/net", "/proc/1/ns/net"} {
		if same(ns, host) {
			return true, nil
		}
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		if err != nil {
			err = fmt.Errorf("setns(2) to %s: %w", path, err)
		} else {
			err = f()
		}
		done <- err
	}()
	return false, <-done
}

// nameFiles are the C library's ways to users (nsswitch.conf(5), passwd(5), nscd(8)).
var nameFiles = []string{"/etc/nsswitch.conf", "/etc/passwd", "/var/run/nscd/socket"}

// hideNames, on a thread of inNamespace's, keeps the programs that it starts from looking
// for users, in a mount namespace that it alone has: iptables asks for a user of the name
// of each number that a rule has (owner_mt_parse, extensions/libxt_owner.c), and behind
// that may be a daemon, a network that is not there yet, or a module that loops
// (kumahq/kuma#11038). Where it cannot be done the rules are the same: no user's name is a
// range, as which numbers are written.
func hideNames(log *slog.Logger) {
	err := unix.Unshare(unix.CLONE_NEWNS) // and CLONE_FS with it (unshare(2))
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	for _, file := range nameFiles {
		if _, missing := os.Stat(file); err == nil && missing == nil {
			err = unix.Mount("/dev/null", file, "", unix.MS_BIND, "")
		}
	}
	if err != nil {
		log.Warn("iptables may ask the name service, which can take its time", "error", err.Error())
	}
}

// same reports whether a file is that of the path.
func same(f *os.File, path string) bool {
	a, err := f.Stat()
	b, err2 := os.Stat(path)
	return err == nil && err2 == nil && os.SameFile(a, b)
}

// gone reports whether there is no such namespace, so that nothing is left to be done.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNotNamespace) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENXIO)
}
