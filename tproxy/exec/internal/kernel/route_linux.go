package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
)

// RouteTo says how a packet of this host to the address would go in the calling
// thread's network namespace (rtnetlink(7), RTM_GETROUTE): through which
// interface, and from which address. Both are empty where there is no route.
func RouteTo(addr netip.Addr) (Route, error) {
	body := make([]byte, syscall.SizeofRtMsg)
	body[0], body[1] = syscall.AF_INET, byte(addr.BitLen())
	if addr.Is6() {
		body[0] = syscall.AF_INET6
	}
	body = AppendAttr(body, syscall.RTA_DST, addr.AsSlice())
	n, err := OpenNetlink(syscall.NETLINK_ROUTE)
	if err != nil {
		return Route{}, fmt.Errorf("route to %s: %w", addr, err)
	}
	defer n.Close()
	if err := n.Send(syscall.RTM_GETROUTE, 0, body); err != nil {
		return Route{}, fmt.Errorf("route to %s: %w", addr, err)
	}
	var r Route
	var index uint32
	_, err = n.Receive(func(body []byte) bool {
		const rtmType = 7 // of struct rtmsg, linux/rtnetlink.h
		r.Local = len(body) > rtmType && body[rtmType] == syscall.RTN_LOCAL
		for typ, value := range attrs(body, syscall.SizeofRtMsg) {
			switch {
			case typ == syscall.RTA_OIF && len(value) == 4:
				index = binary.NativeEndian.Uint32(value)
			case typ == syscall.RTA_PREFSRC:
				r.Source, _ = netip.AddrFromSlice(value)
			}
		}
		return false
	})
	if _, no := errors.AsType[syscall.Errno](err); no {
		return Route{}, nil // unreachable, prohibited, no such family
	}
	if err != nil {
		return Route{}, fmt.Errorf("route to %s: %w", addr, err)
	}
	i, err := net.InterfaceByIndex(int(index))
	if err != nil {
		return Route{}, fmt.Errorf("interface %d: %w", index, err)
	}
	r.Interface = i.Name
	return r, nil
}
