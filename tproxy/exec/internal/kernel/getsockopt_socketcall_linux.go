//go:build 386 || s390x

package kernel

// Package syscall knows socketcall(2) alone there; Linux 4.3 gave both a call
// of its own (arch/x86/entry/syscalls/syscall_32.tbl,
// arch/s390/kernel/syscalls/syscall.tbl).
const sysGetsockopt = 365
