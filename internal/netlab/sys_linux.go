package netlab

import (
	"encoding/binary"
	"runtime"
)

// sysSetns is setns(2), which package syscall names on newer architectures only.
var sysSetns = map[string]uintptr{"386": 346, "amd64": 308, "arm": 375, "arm64": 268, "ppc64le": 350, "riscv64": 268, "s390x": 339}[runtime.GOARCH]

// ntohs turns a number that lies in memory in network byte order into the host's.
func ntohs(v uint16) uint16 {
	b := binary.NativeEndian.AppendUint16(nil, v)
	return binary.BigEndian.Uint16(b)
}
