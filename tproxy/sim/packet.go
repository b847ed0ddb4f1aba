package sim

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Env is what a walk has to know of the host. Loopback (127.0.0.0/8, ::1) and
// the passthrough address ::6, which an install puts on lo, are local always;
// the zero Env has no other address.
type Env struct {
	// Local are the other addresses of the host, each a prefix of one address;
	// a wider prefix is a local route (ip route add local 192.0.2.0/24 dev lo).
	Local []netip.Prefix
}

// EnvOf returns the Env of a host with those addresses.
func EnvOf(local ...netip.Addr) Env {
	var e Env
	for _, a := range local {
		a = plain(a)
		e.Local = append(e.Local, netip.PrefixFrom(a, a.BitLen()))
	}
	return e
}

var passthrough6 = netip.MustParseAddr("::6")

// IsLocal reports whether packets to the address are delivered on this host.
func (e Env) IsLocal(a netip.Addr) bool {
	a = plain(a)
	if a.IsLoopback() || a == passthrough6 {
		return true
	}
	for _, p := range e.Local {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// plain is the address as rules have it: no zone, no IPv4 in IPv6 clothes.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// Path is the way of a packet through the hooks.
type Path uint8

const (
	// In is from another host to an address of this one: PREROUTING, INPUT.
	In Path = iota
	// Forwarded is from another host, or a container, to an address that is not
	// this host's: PREROUTING, FORWARD, POSTROUTING.
	Forwarded
	// Out is from a process of this host: OUTPUT, POSTROUTING, and, through lo,
	// PREROUTING and INPUT.
	Out
)

var pathNames = [...]string{In: "in", Forwarded: "forwarded", Out: "out"}

func (p Path) String() string {
	if int(p) < len(pathNames) {
		return pathNames[p]
	}
	return fmt.Sprintf("Path(%d)", uint8(p))
}

// State is what connection tracking takes a packet for.
type State uint8

const (
	// New opens a connection; of TCP it is the SYN.
	New State = iota
	// Established is a later packet of a connection that conntrack knows: nat
	// does not see it.
	Established
	// Midstream is a later packet of a TCP connection that conntrack does not
	// know, from before the first NAT rule: it is taken for new
	// (nf_conntrack_tcp_loose in nf_conntrack-sysctl.rst), and nat sees it, but
	// it is no SYN.
	Midstream
)

var stateNames = [...]string{New: "new", Established: "established", Midstream: "midstream"}

func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// Packet is a packet as it meets the first hook of its path. Its family is
// that of its addresses.
type Packet struct {
	Path     Path
	Protocol rules.Protocol
	// Source and Destination; protocols without ports have port 0.
	Source, Destination netip.AddrPort
	// InInterface is the interface that the packet came in through, of In and
	// Forwarded; OutInterface that which it leaves through, of Out and
	// Forwarded. Empty means unknown, but a packet to a local address always
	// leaves through lo.
	InInterface, OutInterface string
	// UID and GID own the socket of an Out packet.
	UID, GID uint32
	// Mark is the packet's own, of a socket with SO_MARK (socket(7)).
	Mark  uint32
	State State
}

// Family returns the packet's IP version.
func (p Packet) Family() rules.Family {
	if p.Destination.Addr().Unmap().Is4() {
		return rules.IPv4
	}
	return rules.IPv6
}

// The protocols that have a name in the text of a packet.
var protocolNames = map[string]rules.Protocol{"tcp": rules.TCP, "udp": rules.UDP, "icmp": 1, "icmpv6": 58, "sctp": 132}

func protocolName(p rules.Protocol) string {
	if p == rules.TCP || p == rules.UDP {
		return p.String()
	}
	for name, q := range protocolNames {
		if p == q {
			return name
		}
	}
	return strconv.Itoa(int(p))
}

// String writes the packet as ParsePacket reads it, such as
// "out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:443".
func (p Packet) String() string {
	b := append(append([]byte(p.Path.String()), ' '), protocolName(p.Protocol)...)
	if p.Path == Out {
		b = fmt.Appendf(b, " uid=%d", p.UID)
		if p.GID != 0 {
			b = fmt.Appendf(b, " gid=%d", p.GID)
		}
	}
	if p.InInterface != "" {
		b = fmt.Appendf(b, " in=%s", p.InInterface)
	}
	if p.OutInterface != "" {
		b = fmt.Appendf(b, " out=%s", p.OutInterface)
	}
	if p.Mark != 0 {
		b = fmt.Appendf(b, " mark=%#x", p.Mark)
	}
	if p.State != New {
		b = fmt.Appendf(b, " state=%s", p.State)
	}
	end := func(a netip.AddrPort) string {
		if a.Port() == 0 {
			return a.Addr().String()
		}
		return a.String()
	}
	return string(fmt.Appendf(b, " %s > %s", end(p.Source), end(p.Destination)))
}

// GoString writes the packet as Go source.
func (p Packet) GoString() string { return fmt.Sprintf("sim.MustPacket(%q)", p.String()) }

// MarshalText writes what String writes.
func (p Packet) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what ParsePacket reads.
func (p *Packet) UnmarshalText(text []byte) (err error) {
	*p, err = ParsePacket(string(text))
	return err
}

// MustPacket is ParsePacket for packets that stand in the source; it panics on
// an error.
func MustPacket(s string) Packet {
	p, err := ParsePacket(s)
	if err != nil {
		panic(err)
	}
	return p
}

// ParsePacket reads a packet: its path (in, forwarded, out), its protocol (tcp,
// udp, icmp, icmpv6, sctp or a number), then in any order uid=N and gid=N of an
// out packet, in=INTERFACE, out=INTERFACE, mark=N and state=established or midstream,
// then "source > destination", each as address:port ([address]:port for IPv6)
// or, for a protocol without ports, as an address.
func ParsePacket(s string) (Packet, error) {
	var p Packet
	fail := func(format string, args ...any) (Packet, error) {
		return Packet{}, fmt.Errorf("packet %q: %s", s, fmt.Sprintf(format, args...))
	}
	words := strings.Fields(s)
	n := len(words)
	if n < 5 || words[n-2] != ">" {
		return fail("accepted is a path, a protocol, options and source > destination, such as in tcp 10.0.0.9:4000 > 10.0.0.7:22")
	}
	switch words[0] {
	case "in":
		p.Path = In
	case "forwarded":
		p.Path = Forwarded
	case "out":
		p.Path = Out
	default:
		return fail("path %q: accepted is in, forwarded or out", words[0])
	}
	proto, known := protocolNames[words[1]]
	if !known {
		n, err := strconv.ParseUint(words[1], 10, 8)
		if err != nil {
			return fail("protocol %q: accepted is tcp, udp, icmp, icmpv6, sctp or a number from 0 to 255", words[1])
		}
		proto = rules.Protocol(n)
	}
	p.Protocol = proto
	for _, w := range words[2 : n-3] {
		key, value, _ := strings.Cut(w, "=")
		switch {
		case (key == "uid" || key == "gid") && p.Path == Out:
			id, err := strconv.ParseUint(value, 10, 32)
			if err != nil || id > rules.MaxUID {
				return fail("%s %q: accepted is a number from 0 to %d", key, value, uint32(rules.MaxUID))
			}
			if key == "uid" {
				p.UID = uint32(id)
			} else {
				p.GID = uint32(id)
			}
		case key == "in" && p.Path != Out, key == "out" && p.Path != In:
			if err := rules.CheckInterface(value); err != nil {
				return fail("%v", err)
			}
			if key == "in" {
				p.InInterface = value
			} else {
				p.OutInterface = value
			}
		case key == "mark":
			mark, err := strconv.ParseUint(value, 0, 32)
			if err != nil {
				return fail("mark %q: accepted is a number of 32 bits, such as 0x4000", value)
			}
			p.Mark = uint32(mark)
		case w == "state=new", w == "state=established":
			if value == "established" {
				p.State = Established
			}
		case w == "state=midstream" && p.Protocol == rules.TCP:
			p.State = Midstream
		default:
			return fail("%q: accepted is uid=, gid= and out= of a packet that leaves, in= of one that comes, state=new, established or, of tcp, midstream", w)
		}
	}
	ports := p.Protocol == rules.TCP || p.Protocol == rules.UDP
	for _, end := range []struct {
		to   *netip.AddrPort
		text string
	}{{&p.Source, words[n-3]}, {&p.Destination, words[n-1]}} {
		a, err := netip.ParseAddrPort(end.text)
		if !ports {
			var addr netip.Addr
			addr, err = netip.ParseAddr(end.text)
			a = netip.AddrPortFrom(addr, 0)
		}
		switch {
		case err != nil && ports:
			return fail("%q: accepted is address:port, or [address]:port for IPv6", end.text)
		case err != nil:
			return fail("%q: accepted is an address", end.text)
		case ports && a.Port() == 0:
			return fail("%q: port 0 does not exist", end.text)
		case a.Addr().Zone() != "" || a.Addr().Is4In6():
			return fail("%q: accepted is an address without a zone, IPv4 as such", end.text)
		}
		*end.to = a
	}
	if p.Source.Addr().Is4() != p.Destination.Addr().Is4() {
		return fail("the addresses are of two families")
	}
	return p, nil
}
