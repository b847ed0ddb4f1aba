package kernel

import (
	"fmt"
	"syscall"
	"time"
	"unsafe"
)

// clockBootTime is CLOCK_BOOTTIME (linux/time.h).
const clockBootTime = 7

// BootTime is how long the kernel runs, the time in suspend included (clock_gettime(2)).
// Nobody can set it.
func BootTime() (time.Duration, error) {
	var ts syscall.Timespec
	if _, _, errno := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clockBootTime, uintptr(unsafe.Pointer(&ts)), 0); errno != 0 {
		return 0, fmt.Errorf("clock_gettime: %w", errno)
	}
	return time.Duration(ts.Nano()), nil
}

// soNetnsCookie is SO_NETNS_COOKIE (asm-generic/socket.h), of Linux 5.14.
const soNetnsCookie = 71

// NetworkCookie identifies the calling thread's network namespace. No other one has the
// same until the next boot: it is counted (net_gen_cookie, net/core/net_namespace.c),
// where an inode is used again.
func NetworkCookie() (uint64, error) {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	defer syscall.Close(fd)
	var cookie uint64
	size := uint32(unsafe.Sizeof(cookie))
	_, _, errno := syscall.Syscall6(sysGetsockopt, uintptr(fd), syscall.SOL_SOCKET, soNetnsCookie,
		uintptr(unsafe.Pointer(&cookie)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, fmt.Errorf("SO_NETNS_COOKIE: %w", errno)
	}
	return cookie, nil
}
