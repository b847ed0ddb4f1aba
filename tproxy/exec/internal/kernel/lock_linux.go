package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/procfs"
)

// LockHandle is a lock that is held.
type LockHandle struct{ fd int }

// maxLockName is sun_path without the NUL that makes it abstract (unix(7)).
const maxLockName = 107

func tryLock(name string) (*LockHandle, error) {
	if len(name) == 0 || len(name) > maxLockName || strings.ContainsAny(name, "\x00\n") {
		return nil, fmt.Errorf("lock %q: want 1 to %d bytes, no NUL and no newline", name, maxLockName)
	}
	// The type is part of the name (unix_find_socket_byname, net/unix/af_unix.c):
	// it must stay what it is from release to release.
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("lock %q: %w", name, err)
	}
	// Package syscall writes the @ as the NUL.
	err = syscall.Bind(fd, &syscall.SockaddrUnix{Name: "@" + name})
	if err == nil {
		return &LockHandle{fd}, nil
	}
	syscall.Close(fd)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, errHeld
	}
	return nil, fmt.Errorf("lock %q: %w", name, err)
}

// Unlock lets go; a second time it does nothing. A child of this process that
// was forked and has not reached its exec yet may hold on for that moment.
func (h *LockHandle) Unlock() error {
	if h.fd < 0 {
		return nil
	}
	fd := h.fd
	h.fd = -1
	return syscall.Close(fd)
}

// File returns the lock's socket as a file of its own, for a child to inherit:
// as long as anybody has it open, the lock is held.
func (h *LockHandle) File() (*os.File, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fd, err := syscall.Dup(h.fd)
	if err != nil {
		return nil, err
	}
	syscall.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "lock"), nil
}

func lockHolder(name string) *HeldError {
	held, _ := holder(name)
	return held
}

func holder(name string) (held *HeldError, ok bool) {
	held = &HeldError{Name: name}
	text, err := os.ReadFile("/proc/thread-self/net/unix")
	if err != nil {
		return held, false
	}
	inode, ok := abstractInode(text, name)
	if !ok {
		return held, false
	}
	owners, _, _ := procfs.FS{}.Owners(map[uint64]bool{inode: true})
	if p := owners[inode]; len(p) > 0 {
		held.PID, held.Comm = p[0].PID, p[0].Comm
	}
	return held, true
}

// abstractInode finds the lock's socket in /proc/net/unix (proc_net(5)): Num
// RefCount Protocol Flags Type St Inode Path, where @ is the NUL of an abstract
// name and the rest of the line is the path, spaces and all.
func abstractInode(text []byte, name string) (uint64, bool) {
	const stream = "0001"
	for line := range bytes.Lines(text) {
		rest := strings.TrimSuffix(string(line), "\n")
		var fields [7]string
		for i := range fields {
			rest = strings.TrimLeft(rest, " ")
			fields[i], rest, _ = strings.Cut(rest, " ")
		}
		if rest == "@"+name && fields[4] == stream {
			inode, err := strconv.ParseUint(fields[6], 10, 64)
			return inode, err == nil
		}
	}
	return 0, false
}

// XtablesLockHolder says who holds the lock of iptables-legacy: the file, or where
// that is "" the one of XTABLES_LOCKFILE, or /run/xtables.lock (iptables(8)). ok is
// false if nobody does, or a process that this PID namespace does not show.
func XtablesLockHolder(file string) (pid int, comm string, ok bool) {
	path := file
	if path == "" {
		path = os.Getenv(LockFileVariable)
	}
	if path == "" {
		path = "/run/xtables.lock"
	}
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return 0, "", false
	}
	text, err := os.ReadFile("/proc/locks")
	if err != nil {
		return 0, "", false
	}
	dev := uint64(st.Dev)
	pid, ok = flockHolder(text, deviceMajor(dev), deviceMinor(dev), st.Ino)
	if !ok {
		return 0, "", false
	}
	name, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	return pid, strings.TrimSuffix(string(name), "\n"), true
}

// As makedev(3) packs them.
func deviceMajor(dev uint64) uint64 { return dev>>8&0xfff | dev>>32&0xfffff000 }
func deviceMinor(dev uint64) uint64 { return dev&0xff | dev>>12&0xffffff00 }

// flockHolder finds a file in /proc/locks (proc_locks(5)), whose lines are
// "1: FLOCK ADVISORY WRITE 1234 08:01:123 0 EOF"; "1: -> FLOCK ..." is somebody
// who waits.
func flockHolder(text []byte, major, minor, inode uint64) (pid int, ok bool) {
	file := fmt.Sprintf("%02x:%02x:%d", major, minor, inode) // lock_get_status, fs/locks.c
	for line := range bytes.Lines(text) {
		f := strings.Fields(string(line))
		if len(f) > 5 && f[1] == "FLOCK" && f[5] == file {
			pid, err := strconv.Atoi(f[4])
			return pid, err == nil && pid > 0
		}
	}
	return 0, false
}
