package sim

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Proxy is what Follow has to know of the proxy, which passes every connection
// on to its original destination, as Envoy does in Kuma: an inbound one from the
// passthrough address, an outbound one from where it came, and every query to
// the nameservers, over UDP and over TCP: an answer that does not fit in a packet is
// asked for again (RFC 7766, section 5).
type Proxy struct {
	// UID is the user that the proxy runs as.
	UID uint32
	// The ports that the proxy listens on: DNSPort over UDP and TCP.
	InboundPort, OutboundPort, DNSPort uint16
	// IPv4Only is whether the proxy listens on IPv4 alone.
	IPv4Only bool
	// Nameservers are those of resolv.conf.
	Nameservers []netip.Addr
	// Resolvers answer DNS on this host.
	Resolvers []Resolver
}

// Resolver is a process of this host that answers DNS, and asks upstream.
type Resolver struct {
	Address netip.Addr // where it listens, on port 53 of UDP and TCP
	UID     uint32
	// Upstream are the servers that it asks, over both; empty means one somewhere
	// else.
	Upstream []netip.Addr
}

// End is how a connection ends.
type End uint8

const (
	// Lost is the End of a walk that could not tell.
	Lost End = iota
	// Delivered reaches a program that is not the proxy, or another host.
	Delivered
	// Rejected is refused on the way, or finds nobody who listens.
	Rejected
	// Discarded is dropped on the way.
	Discarded
	// Loop comes back to where it was.
	Loop
)

var endNames = [...]string{Lost: "unknown", Delivered: "delivered", Rejected: "refused", Discarded: "dropped", Loop: "loop"}

func (e End) String() string {
	if int(e) < len(endNames) {
		return endNames[e]
	}
	return fmt.Sprintf("End(%d)", uint8(e))
}

// Hop is one leg of a connection: from its sender to whom the rules take it.
type Hop struct {
	Packet  Packet
	Verdict Verdict
}

// Journey is a connection from its first sender to its last receiver. Of
// several ways, such as the nameservers that a query can be forwarded to, it is
// the worst.
type Journey struct {
	Hops []Hop
	End  End
}

// String writes a line for each hop and the end.
func (j Journey) String() string {
	var b strings.Builder
	for _, h := range j.Hops {
		fmt.Fprintf(&b, "%s => %s\n", h.Packet, h.Verdict)
	}
	fmt.Fprintf(&b, "%s\n", j.End)
	return b.String()
}

// Follow follows the packet through the rules, and through the proxy and the
// local resolvers whenever it reaches one, until it is delivered, refused or
// dropped, or is found to run in a loop. IPv4 and IPv6 alike.
func Follow(set rules.Set, env Env, proxy Proxy, p Packet) Journey {
	f := follower{set, env, proxy}
	hops, end := f.follow(p, nil)
	return Journey{hops, end}
}

type follower struct {
	set   rules.Set
	env   Env
	proxy Proxy
}

// upstream is a server somewhere else, for a resolver of which no more is
// known (RFC 5737, RFC 3849).
var upstream = []netip.Addr{netip.MustParseAddr("203.0.113.53"), netip.MustParseAddr("2001:db8:53::53")}

func (f follower) follow(p Packet, so []Hop) ([]Hop, End) {
	looped := slices.ContainsFunc(so, func(h Hop) bool { return h.Packet == p })
	v := Decide(f.set, f.env, p)
	so = append(slices.Clip(so), Hop{p, v})
	if looped {
		return so, Loop
	}
	switch v.Kind {
	case Unknown:
		return so, Lost
	case Refused:
		return so, Rejected
	case Dropped:
		return so, Discarded
	}
	if v.Elsewhere {
		return so, Delivered
	}
	here := p.Path == In || p.Path == Out && f.env.IsLocal(p.Destination.Addr())
	port := p.Destination.Port()
	if v.Kind == Redirected {
		here, port = true, v.Port
	}
	if !here {
		return so, Delivered
	}
	next, listens := f.receive(p, port, v.Kind == Redirected)
	if !listens {
		return so, Rejected
	}
	if len(next) == 0 {
		return so, Delivered
	}
	// The worst of all ways, the first of several.
	worst, end := []Hop(nil), Lost
	for i, n := range next {
		if h, e := f.follow(n, so); i == 0 || badness(e) > badness(end) {
			worst, end = h, e
		}
	}
	return worst, end
}

func badness(e End) int { return slices.Index([]End{Delivered, Rejected, Discarded, Lost, Loop}, e) }

// receive returns what the program at the port of this host sends on: nothing
// where the connection ends there. p holds the original destination, which the
// proxy asks the kernel for (SO_ORIGINAL_DST): that of a connection that was not
// redirected is the proxy's own port.
func (f follower) receive(p Packet, port uint16, redirected bool) (next []Packet, listens bool) {
	x := f.proxy
	query := p.Protocol == rules.TCP || p.Protocol == rules.UDP
	proxys := p.Protocol == rules.TCP && (port == x.InboundPort || port == x.OutboundPort) || query && port == x.DNSPort
	switch {
	case proxys && x.IPv4Only && p.Family() == rules.IPv6:
		return nil, false
	case p.Protocol == rules.TCP && port == x.InboundPort:
		from := netip.AddrFrom4([4]byte{127, 0, 0, 6})
		if p.Family() == rules.IPv6 {
			from = passthrough6
		}
		return []Packet{f.sends(rules.TCP, x.UID, from, p.Destination)}, true
	case p.Protocol == rules.TCP && port == x.OutboundPort:
		return []Packet{f.sends(rules.TCP, x.UID, p.Source.Addr(), p.Destination)}, true
	case query && port == x.DNSPort:
		return f.asks(x.UID, x.Nameservers), true
	case query && port == 53 && !redirected:
		for _, r := range x.Resolvers {
			if plain(r.Address) != plain(p.Destination.Addr()) {
				continue
			}
			to := r.Upstream
			if len(to) == 0 {
				to = upstream
			}
			next = append(next, f.asks(r.UID, to)...)
		}
	}
	return next, true
}

// sends is the first packet of a connection of this host. Every one has the
// same source port, so that a loop is seen to come back to where it was.
func (f follower) sends(proto rules.Protocol, uid uint32, from netip.Addr, to netip.AddrPort) Packet {
	return Packet{Path: Out, Protocol: proto, UID: uid, Source: netip.AddrPortFrom(from, 40000), Destination: to}
}

func (f follower) asks(uid uint32, servers []netip.Addr) (next []Packet) {
	for _, proto := range []rules.Protocol{rules.UDP, rules.TCP} {
		for _, server := range servers {
			server = plain(server)
			from := netip.AddrFrom4([4]byte{127, 0, 0, 1})
			if server.Is6() {
				from = netip.IPv6Loopback()
			}
			for _, p := range f.env.Local {
				if !server.IsLoopback() && p.Addr().Is4() == server.Is4() {
					from = p.Addr()
					break
				}
			}
			next = append(next, f.sends(proto, uid, from, netip.AddrPortFrom(server, 53)))
		}
	}
	return next
}
