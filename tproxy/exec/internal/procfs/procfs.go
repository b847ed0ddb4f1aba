// Package procfs reads what /proc tells about sockets and processes: who
// listens where, who holds a socket, and through which ports somebody may be
// logged in. It only reads, and it starts no goroutine, so that a caller who
// locked its thread and called setns(2) is answered for that namespace.
//
// Sockets are read from /proc/thread-self/net: /proc/net is a link to
// /proc/self/net, which is the main thread's namespace (proc_net(5)).
package procfs

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
)

// FS is where to read. The zero value reads this machine.
type FS struct {
	// Root is the mount point of proc; "" means "/proc".
	Root string
	// UnitDirs are the folders of systemd units, the first one that has a file
	// wins; nil means DefaultUnitDirs.
	UnitDirs []string
	// Listening answers for the listening TCP sockets of the calling thread's
	// network namespace without a walk through all connections, which reading
	// net/tcp is; with nil, or an error of it, they are read all the same.
	Listening func() ([]Socket, error)
	// FileRoot is what stands before /run/.containerenv; "" means "/".
	FileRoot string
}

// DefaultUnitDirs returns the folders of systemd.unit(5) in which a system's
// socket units stand, in the order of their precedence.
func DefaultUnitDirs() []string {
	return []string{
		"/etc/systemd/system",
		"/run/systemd/system",
		"/run/systemd/generator",
		"/usr/lib/systemd/system",
		"/lib/systemd/system",
	}
}

func (f FS) path(elem ...string) string {
	root := f.Root
	if root == "" {
		root = "/proc"
	}
	return filepath.Join(append([]string{root}, elem...)...)
}

func (f FS) pidPath(pid int, elem ...string) string {
	return f.path(append([]string{strconv.Itoa(pid)}, elem...)...)
}

// supported tells a system without proc from a proc that lacks a file.
func (f FS) supported() error {
	if f.Root == "" && runtime.GOOS != "linux" {
		return errors.ErrUnsupported
	}
	return nil
}

// self is the number of this process in the PID namespace that Root shows,
// which is not os.Getpid's when that proc was mounted in another one.
func (f FS) self() int {
	if link, err := os.Readlink(f.path("self")); err == nil {
		if pid, err := strconv.Atoi(link); err == nil {
			return pid
		}
	}
	return os.Getpid()
}
