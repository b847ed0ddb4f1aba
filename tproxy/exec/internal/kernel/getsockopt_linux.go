//go:build !386 && !s390x

package kernel

import "syscall"

const sysGetsockopt = syscall.SYS_GETSOCKOPT
