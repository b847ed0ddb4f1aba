package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"slices"
	"strings"
	"syscall"
	"unsafe"
)

// Of include/uapi/linux/netfilter_ipv4/ip_tables.h, and the same numbers in
// netfilter_ipv6/ip6_tables.h.
const (
	iptSoGetInfo   = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	xtTableNameLen = 32 // XT_TABLE_MAXNAMELEN, with the NUL
	// struct ipt_getinfo: name, valid_hooks, hook_entry[5], underflow[5],
	// num_entries, size.
	iptGetInfoSize   = xtTableNameLen + 4 + 5*4 + 5*4 + 4 + 4
	iptValidHooksOff = xtTableNameLen
	iptNumEntriesOff = iptGetInfoSize - 8
)

// LegacyTables returns the tables of iptables-legacy, or ip6tables-legacy, that
// are registered in the calling thread's network namespace, empty ones among
// them; none if the module was never loaded. Asking registers none. The file
// is root's: for others the error is fs.ErrPermission.
func LegacyTables(f Family) ([]string, error) {
	name := "ip_tables_names"
	switch f {
	case IPv4:
	case IPv6:
		name = "ip6_tables_names"
	default:
		return nil, fmt.Errorf("family %d: want 4 or 6", uint8(f))
	}
	text, err := os.ReadFile("/proc/thread-self/net/" + name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return strings.Fields(string(text)), err
}

// LegacyRules says whether a legacy table of the calling thread's network
// namespace holds a rule or a user's chain; a policy is neither. A table that
// LegacyTables does not list holds none, and the kernel is not asked for it:
// it would make the table (xt_request_find_table_lock,
// net/netfilter/x_tables.c). Without CAP_NET_ADMIN the error is
// fs.ErrPermission.
func LegacyRules(f Family, table string) (bool, error) {
	listed, err := LegacyTables(f)
	if err != nil || !slices.Contains(listed, table) || len(table) >= xtTableNameLen {
		return false, err
	}
	info, err := legacyInfo(f, table)
	if err != nil {
		return false, fmt.Errorf("%s legacy table %q: %w", f, table, err)
	}
	hooks := bits.OnesCount32(binary.NativeEndian.Uint32(info[iptValidHooksOff:]))
	entries := binary.NativeEndian.Uint32(info[iptNumEntriesOff:])
	// An empty table is a policy for each hook, and the ERROR entry that ends
	// the blob (ipt_alloc_initial_table).
	return entries > uint32(hooks)+1, nil
}

func legacyInfo(f Family, table string) (info [iptGetInfoSize]byte, err error) {
	copy(info[:xtTableNameLen-1], table)
	return info, legacyGet(f, iptSoGetInfo, info[:])
}

// legacyGet asks the kernel about the table that buf begins with the name of;
// the answer fills buf.
func legacyGet(f Family, option uintptr, buf []byte) error {
	domain, level := syscall.AF_INET, syscall.SOL_IP
	if f == IPv6 {
		domain, level = syscall.AF_INET6, syscall.SOL_IPV6
	}
	// The socket that libiptc opens (TC_INIT, libiptc/libiptc.c).
	fd, err := syscall.Socket(domain, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	size := uint32(len(buf)) // socklen_t
	_, _, errno := syscall.Syscall6(sysGetsockopt, uintptr(fd), uintptr(level), option,
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	if int(size) != len(buf) {
		return syscall.EBADMSG
	}
	return nil
}
