package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"syscall"
)

// Of include/uapi/linux/netfilter_ipv4/ip_tables.h and
// netfilter_ipv6/ip6_tables.h.
const (
	iptSoGetEntries = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES

	iptSizeOff = xtTableNameLen // size, in struct ipt_get_entries

	iptTargetOff  = 88  // target_offset, in struct ipt_entry; next_offset follows
	ip6tTargetOff = 140 // the same in struct ip6t_entry

	xtTargetNameOff = 2  // name, in struct xt_entry_target
	xtTargetLen     = 32 // struct xt_entry_target, behind which errorname stands
	xtErrorNameLen  = 30 // XT_FUNCTION_MAXNAMELEN
)

// LegacyChains returns the names of the users' chains of a legacy table of the
// calling thread's network namespace. In the table's entries a chain begins
// with one whose ERROR target bears the chain's name (libiptc.c,
// iptcc_compile_chain). A table that LegacyTables does not list has none, and
// the kernel is not asked for it: that would make it. Without CAP_NET_ADMIN
// the error is fs.ErrPermission.
func LegacyChains(f Family, table string) ([]string, error) {
	listed, err := LegacyTables(f)
	if err != nil || !slices.Contains(listed, table) || len(table) >= xtTableNameLen {
		return nil, err
	}
	// The table may grow between the two calls; the kernel says EAGAIN then
	// (get_entries, net/ipv4/netfilter/ip_tables.c).
	for range 10 {
		var entries []byte
		if entries, err = legacyEntries(f, table); err == nil {
			return legacyChainNames(f, entries), nil
		}
		if !errors.Is(err, syscall.EAGAIN) {
			break
		}
	}
	return nil, fmt.Errorf("%s legacy table %q: %w", f, table, err)
}

func legacyEntries(f Family, table string) ([]byte, error) {
	info, err := legacyInfo(f, table)
	if err != nil {
		return nil, err
	}
	size := binary.NativeEndian.Uint32(info[iptGetInfoSize-4:])
	// entrytable holds 64-bit counters, and stands where they may.
	start := 40
	if runtime.GOARCH == "386" {
		start = 36
	}
	buf := make([]byte, start+int(size))
	copy(buf[:xtTableNameLen-1], table)
	binary.NativeEndian.PutUint32(buf[iptSizeOff:], size)
	if err := legacyGet(f, iptSoGetEntries, buf); err != nil {
		return nil, err
	}
	return buf[start:], nil
}

func legacyChainNames(f Family, entries []byte) (names []string) {
	targetOff := iptTargetOff
	if f == IPv6 {
		targetOff = ip6tTargetOff
	}
	for len(entries) >= targetOff+4 {
		target := int(binary.NativeEndian.Uint16(entries[targetOff:]))
		next := int(binary.NativeEndian.Uint16(entries[targetOff+2:]))
		if next <= 0 || next > len(entries) || target+xtTargetLen > next {
			break // not as ip_tables.h says: nothing more can be told
		}
		t := entries[target:next]
		if CString(t[xtTargetNameOff:xtTargetLen-1]) == "ERROR" && len(t) >= xtTargetLen+xtErrorNameLen {
			// The table ends with an ERROR entry of that name.
			if name := CString(t[xtTargetLen : xtTargetLen+xtErrorNameLen]); name != "ERROR" {
				names = append(names, name)
			}
		}
		entries = entries[next:]
	}
	return names
}
