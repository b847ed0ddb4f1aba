package procfs

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Process is a process as proc shows it.
type Process struct {
	PID  int
	Comm string
	// Exe is the program's path, without the " (deleted)" of one that was
	// replaced while it ran (an upgraded sshd); "" when it may not be read.
	Exe string
	// UID is the effective user (the second number of Uid: in
	// /proc/PID/status).
	UID uint32
}

// Owners returns, for each of the socket inodes, the processes that have it
// open, by rising PID. partial says that some process could not be looked at,
// for want of CAP_SYS_PTRACE (proc_pid_fd(5)); one in a PID namespace that
// Root does not show, or hidden by the mount option hidepid, cannot be told of.
func (f FS) Owners(inodes map[uint64]bool) (owners map[uint64][]Process, partial bool, err error) {
	return f.ownersAmong(inodes, nil)
}

// ownersAmong is Owners among the processes for which among says yes, or all if
// it is nil. It is asked with the PID, Comm and Exe alone.
func (f FS) ownersAmong(inodes map[uint64]bool, among func(Process) bool) (owners map[uint64][]Process, partial bool, err error) {
	if err := f.supported(); err != nil {
		return nil, false, err
	}
	owners = map[uint64][]Process{}
	if len(inodes) == 0 {
		return owners, false, nil
	}
	pids, err := f.pids()
	if err != nil {
		return nil, false, err
	}
	for _, pid := range pids {
		var exeErr error
		if among != nil {
			var exe string
			exe, exeErr = f.exe(pid)
			switch {
			case errors.Is(exeErr, fs.ErrNotExist):
				continue // a kernel thread or a zombie, which hold none
			case exeErr == nil && !among(Process{PID: pid, Comm: f.comm(pid), Exe: exe}):
				continue
			}
		}
		st, err := f.stat(pid)
		if err == nil && st.kernel {
			// It holds none, and only root may read that: it would make every
			// other user's answer partial.
			continue
		}
		if errors.Is(exeErr, fs.ErrPermission) {
			// Who may not read this link may not read those of its sockets
			// (ptrace(2), PTRACE_MODE_READ_FSCREDS).
			partial = true
			continue
		}
		held, err := f.heldSockets(pid, inodes)
		if errors.Is(err, fs.ErrPermission) {
			partial = true
		}
		if len(held) == 0 {
			continue
		}
		p := f.process(pid)
		if among != nil && !among(p) {
			continue
		}
		for _, inode := range held {
			owners[inode] = append(owners[inode], p)
		}
	}
	return owners, partial, nil
}

// pids returns all processes by number.
func (f FS) pids() ([]int, error) {
	dir, err := os.Open(f.path())
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}

// heldSockets returns those of the inodes that the process has open, each once.
func (f FS) heldSockets(pid int, inodes map[uint64]bool) ([]uint64, error) {
	path := f.pidPath(pid, "fd")
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	var held []uint64
	for _, name := range names {
		link, lerr := os.Readlink(path + "/" + name)
		if lerr != nil {
			if errors.Is(lerr, fs.ErrPermission) {
				// It is the process that may not be looked at, and so each of them
				// (ptrace(2), PTRACE_MODE_READ_FSCREDS).
				return held, lerr
			}
			continue
		}
		number, ok := strings.CutPrefix(link, "socket:[")
		if !ok {
			continue
		}
		inode, perr := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 64)
		if perr == nil && inodes[inode] && !slices.Contains(held, inode) {
			held = append(held, inode)
		}
	}
	return held, err
}

func (f FS) process(pid int) Process {
	p := Process{PID: pid, Comm: f.comm(pid)}
	p.Exe, _ = f.exe(pid)
	status, _ := os.ReadFile(f.pidPath(pid, "status"))
	for line := range bytes.Lines(status) {
		if ids, ok := bytes.CutPrefix(line, []byte("Uid:")); ok {
			if fields := bytes.Fields(ids); len(fields) > 1 {
				uid, _ := parseNumber(fields[1], 10, 32)
				p.UID = uint32(uid)
			}
			break
		}
	}
	return p
}

func (f FS) exe(pid int) (string, error) {
	exe, err := os.Readlink(f.pidPath(pid, "exe"))
	return strings.TrimSuffix(exe, " (deleted)"), err
}

// comm is a process's name, "" when it is gone.
func (f FS) comm(pid int) string {
	comm, _ := os.ReadFile(f.pidPath(pid, "comm"))
	return strings.TrimSuffix(string(comm), "\n")
}

// Ancestors returns the process, its parent and so on, up to process 1 or to
// one whose parent is in another PID namespace. It is empty if there is no
// such process.
func (f FS) Ancestors(pid int) []int {
	var line []int
	// A number reused while we climb could lead back to where we were.
	for pid > 0 && !slices.Contains(line, pid) {
		st, err := f.stat(pid)
		if err != nil {
			break
		}
		line = append(line, pid)
		pid = st.parent
	}
	return line
}

type stat struct {
	parent int
	kernel bool // a kernel thread
}

// PF_KTHREAD of include/linux/sched.h.
const flagKernelThread = 0x00200000

// stat reads /proc/PID/stat (proc_pid_stat(5)).
func (f FS) stat(pid int) (stat, error) {
	text, err := os.ReadFile(f.pidPath(pid, "stat"))
	if err != nil {
		return stat{}, err
	}
	// Field 2, the name, may hold spaces and parentheses; none follows it.
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	// From field 3 on: state ppid pgrp session tty_nr tpgid flags.
	if len(fields) < 7 {
		return stat{}, errors.New("not a stat line: " + strconv.Quote(string(text)))
	}
	parent, ok1 := parseNumber(fields[1], 10, 31)
	flags, ok2 := parseNumber(fields[6], 10, 32)
	if !ok1 || !ok2 {
		return stat{}, errors.New("not a stat line: " + strconv.Quote(string(text)))
	}
	return stat{parent: int(parent), kernel: flags&flagKernelThread != 0}, nil
}

// Environ returns a variable of the environment that the process was started
// with; ok is false if it is not in there or may not be read.
func (f FS) Environ(pid int, key string) (value string, ok bool) {
	value, ok, _ = f.environ(pid, key)
	return value, ok
}

func (f FS) environ(pid int, key string) (value string, ok bool, err error) {
	text, err := os.ReadFile(f.pidPath(pid, "environ"))
	for entry := range bytes.SplitSeq(text, []byte{0}) {
		// The first one is the one getenv(3) finds.
		if name, v, found := bytes.Cut(entry, []byte("=")); found && string(name) == key {
			return string(v), true, err
		}
	}
	return "", false, err
}

// SameNetNS says whether the process is in the calling thread's network
// namespace; false if that cannot be read.
func (f FS) SameNetNS(pid int) bool {
	same, _ := f.sameNetNS(pid)
	return same
}

func (f FS) sameNetNS(pid int) (bool, error) {
	ours, err := os.Readlink(f.path("thread-self", "ns", "net"))
	if err != nil {
		return false, err
	}
	theirs, err := os.Readlink(f.pidPath(pid, "ns", "net"))
	return err == nil && ours == theirs, err
}
