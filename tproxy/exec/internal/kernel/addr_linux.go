package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"
)

const (
	// lo has this number in every network namespace (LOOPBACK_IFINDEX,
	// include/net/flow.h; loopback_net_init, drivers/net/loopback.c).
	loopbackIndex = 1

	ifaddrHeader = syscall.SizeofIfAddrmsg
	ifaFNoDAD    = 0x02 // IFA_F_NODAD, include/uapi/linux/if_addr.h
)

// AddLoopbackAddress adds an address to lo of the calling thread's network
// namespace; added is false if it is there already. IPv6 skips duplicate
// address detection, so that the address can be bound at once. Where IPv6 is
// off the error is errors.ErrUnsupported, without CAP_NET_ADMIN
// fs.ErrPermission.
func AddLoopbackAddress(p netip.Prefix) (added bool, err error) {
	body, err := interfaceAddress(p, loopbackIndex)
	if err != nil {
		return false, err
	}
	err = change(syscall.NETLINK_ROUTE, syscall.RTM_NEWADDR, syscall.NLM_F_CREATE|syscall.NLM_F_EXCL, body)
	switch {
	case err == nil:
		if p.Addr().Is6() {
			awaitLocalRoute(p.Addr())
		}
		return true, nil
	case errors.Is(err, syscall.EEXIST):
		return false, nil
	case p.Addr().Is6() && errors.Is(err, syscall.EACCES):
		// disable_ipv6 (ipv6_add_addr, net/ipv6/addrconf.c); a caller without
		// the right gets EPERM.
		err = fmt.Errorf("IPv6 is off on lo: %w", errors.ErrUnsupported)
	}
	return false, fmt.Errorf("add %s to lo: %w", p, err)
}

// routeWait is longer than the kernel's work queue ever takes.
const routeWait = time.Second

// awaitLocalRoute waits until the kernel delivers packets to an IPv6 address that
// was added: it says yes first and makes the route later, from a work queue
// (addrconf_dad_start, net/ipv6/addrconf.c). In between, one time in eight on
// kernel 6.18, an answer to the address leaves by the default route. That the
// route does not come is no error: the address is there.
func awaitLocalRoute(addr netip.Addr) {
	body := make([]byte, syscall.SizeofRtMsg)
	body[0], body[1] = syscall.AF_INET6, 128
	body = AppendAttr(body, syscall.RTA_DST, addr.AsSlice())
	for deadline := time.Now().Add(routeWait); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if local, err := isLocalRoute(body); local || errors.Is(err, syscall.EPERM) {
			return
		}
	}
}

// isLocalRoute asks for the one route that a packet would take (rtnetlink(7)).
func isLocalRoute(body []byte) (local bool, err error) {
	n, err := OpenNetlink(syscall.NETLINK_ROUTE)
	if err != nil {
		return false, err
	}
	defer n.Close()
	if err := n.Send(syscall.RTM_GETROUTE, 0, body); err != nil {
		return false, err
	}
	_, err = n.Receive(func(body []byte) bool {
		local = len(body) >= syscall.SizeofRtMsg && body[7] == syscall.RTN_LOCAL // rtm_type
		return false
	})
	return local, err
}

// DelLoopbackAddress takes an address off lo of the calling thread's network
// namespace; removed is false, and there is no error, if it was not there, or
// IPv6 is off and nothing can be.
func DelLoopbackAddress(p netip.Prefix) (removed bool, err error) {
	body, err := interfaceAddress(p, loopbackIndex)
	if err != nil {
		return false, err
	}
	err = change(syscall.NETLINK_ROUTE, syscall.RTM_DELADDR, 0, body)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return false, nil
	case p.Addr().Is6() && (errors.Is(err, syscall.ENXIO) || errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.EAFNOSUPPORT)):
		return false, nil // no IPv6 on lo (inet6_addr_del), or in the kernel
	}
	return false, fmt.Errorf("remove %s from lo: %w", p, err)
}

// interfaceAddress is the struct ifaddrmsg and its attributes (rtnetlink(7)).
func interfaceAddress(p netip.Prefix, index uint32) ([]byte, error) {
	addr := p.Addr()
	if !p.IsValid() || addr.Is4In6() {
		return nil, fmt.Errorf("address %q: want an IPv4 or IPv6 address and its prefix length", p)
	}
	family, flags, scope := byte(syscall.AF_INET), byte(0), byte(syscall.RT_SCOPE_UNIVERSE)
	switch {
	case addr.Is6():
		family, flags = syscall.AF_INET6, ifaFNoDAD
	case addr.IsLoopback():
		scope = syscall.RT_SCOPE_HOST // as ip-address(8) has it
	}
	body := []byte{family, byte(p.Bits()), flags, scope}
	body = binary.NativeEndian.AppendUint32(body, index)
	body = AppendAttr(body, syscall.IFA_LOCAL, addr.AsSlice())
	return AppendAttr(body, syscall.IFA_ADDRESS, addr.AsSlice()), nil
}

// HasLoopbackAddress says whether lo of the calling thread's network namespace
// has exactly this address; that 127.0.0.0/8 is local as a whole does not count.
func HasLoopbackAddress(addr netip.Addr) (bool, error) {
	found, err := addresses(func(index uint32, p netip.Prefix) bool {
		return index == loopbackIndex && p.Addr() == addr
	})
	return len(found) > 0, err
}

// LocalAddresses returns the addresses of all interfaces of the calling
// thread's network namespace, in the kernel's order, without zones.
func LocalAddresses() ([]netip.Prefix, error) {
	return addresses(func(uint32, netip.Prefix) bool { return true })
}

func addresses(keep func(index uint32, p netip.Prefix) bool) ([]netip.Prefix, error) {
	all := make([]byte, ifaddrHeader) // AF_UNSPEC: both families
	found, err := dump(syscall.NETLINK_ROUTE, syscall.RTM_GETADDR, all, 0, func(body []byte) (netip.Prefix, bool) {
		index, p, ok := parseAddress(body)
		return p, ok && keep(index, p)
	})
	if err != nil {
		return nil, fmt.Errorf("addresses of the interfaces: %w", err)
	}
	return found, nil
}

func parseAddress(body []byte) (index uint32, p netip.Prefix, ok bool) {
	if len(body) < ifaddrHeader || body[0] != syscall.AF_INET && body[0] != syscall.AF_INET6 {
		return 0, netip.Prefix{}, false
	}
	var addr netip.Addr
	local := false
	for typ, value := range attrs(body, ifaddrHeader) {
		// On a point-to-point link IFA_ADDRESS is the peer's and IFA_LOCAL
		// ours; plain IPv6 addresses have IFA_ADDRESS alone (if_addr.h).
		if typ == syscall.IFA_LOCAL || typ == syscall.IFA_ADDRESS && !local {
			addr, ok = netip.AddrFromSlice(value)
			local = typ == syscall.IFA_LOCAL
		}
	}
	p = netip.PrefixFrom(addr, int(body[1]))
	return binary.NativeEndian.Uint32(body[4:]), p, ok && p.IsValid()
}

// Where IPv6Off looks. /proc/sys/net is the calling thread's namespace too
// (net_ctl_root, net/sysctl_net.c).
const (
	ifInet6     = "/proc/thread-self/net/if_inet6"
	disableIPv6 = "/proc/sys/net/ipv6/conf/lo/disable_ipv6"
)

// IPv6Off says whether the calling thread's network namespace has no IPv6 to
// use, and how that shows: the kernel has none, or it is disabled on lo, where
// no address can be added then. An interface that has but a link-local address
// does not make IPv6 off.
func IPv6Off() (off bool, why string, err error) {
	if _, err := os.Stat(ifInet6); errors.Is(err, fs.ErrNotExist) {
		return true, ifInet6 + " does not exist", nil
	} else if err != nil {
		return false, "", err
	}
	value, err := os.ReadFile(disableIPv6)
	if errors.Is(err, fs.ErrNotExist) {
		return false, "", nil // a kernel without sysctl
	}
	if strings.TrimSpace(string(value)) == "1" {
		return true, disableIPv6 + " is 1", nil
	}
	return false, "", err
}
