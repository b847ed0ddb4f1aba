package dns

import (
	"fmt"
	"net/netip"
	"strings"
)

// AddressError says why an address cannot be our nameserver.
type AddressError struct {
	Value    string
	What     string // what is wrong with it
	Accepted string // what would do
}

func (e *AddressError) Error() string {
	return fmt.Sprintf("nameserver address %q %s: accepted is %s", e.Value, e.What, e.Accepted)
}

const unicast = "an IPv4 or IPv6 address of one machine, such as 10.0.0.53 or fd00::53"

// ParseAddress reads the address of a nameserver. A name is none: resolv.conf has
// to do without a resolver (resolv.conf(5)). Loopback is accepted, for the control
// plane may be on this host. An IPv4 address in IPv6 (::ffff:10.0.0.53) is taken
// for the IPv4 one. A link-local address needs its zone, the interface.
func ParseAddress(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		what := "is no IP address"
		if _, err := netip.ParseAddrPort(s); err == nil {
			what = "has a port, and resolv.conf knows no other than 53"
		}
		return netip.Addr{}, &AddressError{s, what, unicast}
	}
	a = a.Unmap()
	return a, checkAddress(s, a)
}

// checkAddress returns an *AddressError for an address that is no nameserver's.
func checkAddress(s string, a netip.Addr) error {
	switch {
	case !a.IsValid():
		return &AddressError{s, "is no IP address", unicast}
	case a.IsUnspecified():
		return &AddressError{s, "is unspecified: the C library would ask this host", unicast}
	case a.IsMulticast():
		return &AddressError{s, "is multicast", unicast}
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return &AddressError{s, "is the broadcast address", unicast}
	case a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "":
		return &AddressError{s, "is link-local and names no interface", "one with its interface, such as fe80::1%eth0"}
	case a.Zone() == "":
		return nil
	case !a.IsLinkLocalUnicast():
		// __inet6_scopeid_pton of glibc knows interfaces for link-local alone.
		return &AddressError{s, "names an interface and is not link-local", unicast}
	case len(a.Zone()) > 15 || strings.ContainsFunc(a.Zone(), func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '/' || r == '#' || r == ';' || r == '%' }):
		// IFNAMSIZ is 16 with its final zero. A line feed would begin a line of
		// its own in the file.
		return &AddressError{s, "names no interface that could exist", "one with its interface, such as fe80::1%eth0"}
	}
	return nil
}
