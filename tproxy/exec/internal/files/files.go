// Package files is the file system and the surroundings that dns.Manager works
// on: what is written is on the disk when a call returns.
package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/kumahq/kuma-tproxy/tproxy/dns"
)

// FS is the machine's.
type FS struct{}

var _ dns.FS = FS{}

// Glob lists what matches.
func (FS) Glob(pattern string) []string {
	out, err := filepath.Glob(pattern)
	if err != nil {
		return nil // a malformed pattern matches nothing
	}
	slices.Sort(out)
	return out
}

// Readlink reads a symbolic link.
func (FS) Readlink(name string) (string, error) { return os.Readlink(name) }

// ReadFile reads at most limit bytes of a regular file; it follows no symbolic link
// in the last part of the path, and waits for nothing.
func (FS) ReadFile(name string, limit int) ([]byte, error) {
	f, err := openRegular(name, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAtMost(f, limit)
}

func readAtMost(f *os.File, limit int) ([]byte, error) {
	return io.ReadAll(io.LimitReader(f, int64(limit)))
}

// Create makes a new file like another.
func (FS) Create(name string, text []byte, like dns.Info) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			err = errors.Join(err, os.Remove(name))
		}
	}()
	if _, err := f.Write(text); err != nil {
		return err
	}
	// The owner first: a change of it takes the set-ID bits and capabilities away.
	if like.Kind != dns.Missing {
		if err := chown(f, like); err != nil {
			return err
		}
	}
	if err := f.Chmod(fs.FileMode(like.Mode & 0o777)); err != nil {
		return err
	}
	// Access lists come after the mode, which they are a part of.
	for _, x := range like.Xattrs {
		if err := setxattr(name, x); err != nil {
			return fmt.Errorf("extended attribute %q: %w", x.Name, err)
		}
	}
	return f.Sync()
}

// Overwrite writes in place.
func (FS) Overwrite(name string, old, text []byte, size int) error {
	f, err := openRegular(name, os.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	now, err := readAtMost(f, len(old)+1)
	if err != nil {
		return err
	}
	if !slices.Equal(now, old) {
		return dns.ErrChanged
	}
	if _, err := f.WriteAt(text, 0); err != nil {
		return err
	}
	if size < len(text) {
		if err := f.Truncate(int64(size)); err != nil {
			return err
		}
	}
	return f.Sync()
}

// Rename replaces to.
func (FS) Rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		if isBusy(err) {
			return fmt.Errorf("%w: %w", dns.ErrBusy, err)
		}
		return err
	}
	return syncFolder(to)
}

// RenameNew does not replace to. A link fails where the name is taken; file
// systems without links get a look and a rename.
func (FS) RenameNew(from, to string) error {
	err := os.Link(from, to)
	switch {
	case err == nil:
		if err := os.Remove(from); err != nil {
			return errors.Join(err, os.Remove(to))
		}
		return syncFolder(to)
	case errors.Is(err, fs.ErrExist):
		return err
	}
	if _, err := os.Lstat(to); err == nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: fs.ErrExist}
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncFolder(to)
}

// Symlink makes a symbolic link.
func (FS) Symlink(to, name string) error {
	if err := os.Symlink(to, name); err != nil {
		return err
	}
	return syncFolder(name)
}

// Writable returns the reason for which nothing can be written to a folder.
func (FS) Writable(folder string) error { return writable(folder) }

// SameFolder reports whether two paths lead to one folder.
func SameFolder(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// Remove removes a file.
func (FS) Remove(name string) error {
	if err := os.Remove(name); err != nil {
		return err
	}
	return syncFolder(name)
}

// MakeFolder makes a folder.
func (FS) MakeFolder(name string) error {
	if err := os.Mkdir(name, 0o755); err != nil {
		return err
	}
	// What umask(2) took away.
	if err := os.Chmod(name, 0o755); err != nil {
		return err
	}
	return syncFolder(name)
}

// RemoveFolder removes an empty folder.
func (FS) RemoveFolder(name string) error {
	if err := rmdir(name); err != nil {
		return err
	}
	return syncFolder(name)
}

// syncFolder has a change of names on the disk. Not every file system can; then
// it does so on its own.
func syncFolder(name string) error {
	d, err := os.Open(filepath.Dir(name))
	if err != nil {
		return nil // a folder that may be written to and not read
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !isInvalid(err) {
		return err
	}
	return nil
}

// Mounts reads the mounts of a process; nil where they cannot be read.
func Mounts(pid string) []dns.Mount {
	text, err := os.ReadFile(filepath.Join("/proc", pid, "mountinfo"))
	if err != nil {
		return nil
	}
	return dns.ParseMounts(text)
}

// Namespaces tells our network namespace from that of process 1. The thread's
// counts, not the process's: after setns on a locked thread they differ.
func Namespaces() dns.Namespaces {
	return dns.Namespaces{Self: network("thread-self"), Init: network("1"), InitMounts: Mounts("1")}
}

// Networks are the Self and Init of Namespaces, without the mounts.
func Networks() (self, first string) { return network("thread-self"), network("1") }

// network identifies the network namespace of a process; empty where that cannot
// be told. The link in /proc/PID/ns takes the rights to trace the process
// (namespaces(7)), which root in a container need not have over process 1. So it is
// the file net/dev: every network namespace has one of its own (fs/proc/proc_net.c),
// and its inode is no other's at that time.
func network(pid string) string {
	info, err := os.Stat(filepath.Join("/proc", pid, "net", "dev"))
	if err != nil {
		return ""
	}
	return inode(info)
}

// Running returns a function that reports whether a process of this network
// namespace has a name in /proc/PID/comm; kernel threads have none of these. The
// processes are read once, when it is first asked.
func Running() func(comm string) bool {
	names := sync.OnceValue(running)
	return func(comm string) bool { return names()[comm] }
}

func running() map[string]bool {
	self := network("thread-self")
	names := map[string]bool{}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well-formed
	for _, d := range dirs {
		comm, err := os.ReadFile(filepath.Join(d, "comm"))
		if err != nil {
			continue // gone
		}
		// A container's own dhclient does not write to our file. Where the
		// namespace cannot be read, the process counts.
		if ns := network(filepath.Base(d)); ns != "" && self != "" && ns != self {
			continue
		}
		names[strings.TrimSuffix(string(comm), "\n")] = true
	}
	return names
}

// Manager returns a Manager for a file of this machine. program returns the path of
// a program, "" where there is none. Set Namespaces.Meant where the operator named
// the file.
func Manager(path string, program func(name string) string) dns.Manager {
	return dns.Manager{
		Env:        dns.Env{Path: path, Mounts: Mounts("thread-self"), Program: program, Running: Running()},
		FS:         FS{},
		Namespaces: Namespaces(),
	}
}
