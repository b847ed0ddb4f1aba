package tproxytest

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// Rows are the names that Expect gives: the rows of docs/contract.md, section
// 2, which a run has to reach. B2 stands for "B2:A1" and so on. Z is what the
// section says beneath its tables of the proxy's answers, IPv6 what it says
// above them of --ip-family-mode=ipv4, B9-dns what row B9 says of
// --redirect-dns-tcp, SYN of packets that do not open a
// connection, and other is all else.
func Rows() []string {
	return []string{
		"IPv6", "SYN",
		"A0", "A1", "A2", "A3", "A5",
		"B0", "B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B9", "B9-dns", "B11",
		"C1", "C2", "C2a", "C3", "C4", "Z", "other",
	}
}

// Expect says what the contract wants of a packet, by its first row that fits.
// It calls nothing of tproxy, rules and sim, so that a fault there cannot hide
// itself: of rules.Ports and rules.UIDs it reads the ranges.
func Expect(cfg tproxy.Config, host tproxy.Host, env sim.Env, p sim.Packet) (row string, v sim.Verdict) {
	untouched := sim.Verdict{Kind: sim.Untouched}
	to, from := p.Destination.Addr(), p.Source.Addr()
	if to.Is6() && (cfg.IPFamilyMode == tproxy.IPv4Only || host.IPv6Off != "") {
		return "IPv6", untouched
	}
	proxy := p.Path == sim.Out && isProxy(cfg, host, p.UID)
	dns := cfg.DNS.Redirect || cfg.DNS.CaptureAll
	port := p.Destination.Port()

	switch {
	case p.Protocol == 6 && p.State != sim.New:
		return "SYN", untouched
	case p.Protocol == 6 && p.Path != sim.Out:
		return expectA(cfg, host, p)
	case p.Protocol == 6:
		loopback := to.Is4() && to.As4()[0] == 127 && !isPassthrough(to) || to == netip.IPv6Loopback()
		own := isPassthrough(to) || !loopback && holdsAddr(env.Local, to)
		lo := p.OutInterface == "lo" || p.OutInterface == "" && (loopback || own)
		switch {
		case proxy && (port == orPort(cfg.Inbound.Port, 15006) || port == orPort(cfg.Outbound.Port, 15001)) && (loopback || own):
			return "B0", sim.Verdict{Kind: sim.Refused}
		case isPassthrough(from) && lo:
			return "B1", untouched
		case proxy && own && lo:
			row, v := expectA(cfg, host, p)
			return "B2:" + row, v
		case proxy:
			return "B3", untouched
		case lo:
			return "B4", untouched
		case cfg.Outbound.Off:
			return "B5", untouched
		case holdsAddr(cfg.Outbound.ExcludeIPs, to):
			return "B6", untouched
		case excludedForUID(cfg, 6, port, p.UID):
			return "B7", untouched
		case holdsPort(cfg.Outbound.ExcludePorts, port):
			return "B8", untouched
		case dns && port == 53 && cfg.DNS.RedirectTCP && !isLocalResolver(host, p.UID) && (cfg.DNS.CaptureAll || isNameserver(host, to)):
			return "B9-dns", sim.Verdict{Kind: sim.Redirected, Port: orPort(cfg.DNS.Port, 15053)}
		case dns && port == 53:
			return "B9", untouched
		}
		return "B11", sim.Verdict{Kind: sim.Redirected, Port: orPort(cfg.Outbound.Port, 15001)}
	case p.Protocol == 17 && p.Path == sim.Out:
		zone := uint16(2)
		if cfg.DNS.SkipConntrackZoneSplit {
			zone = 0
		}
		switch {
		case dns && proxy && port != 53 && p.Source.Port() == orPort(cfg.DNS.Port, 15053):
			return "Z", sim.Verdict{Kind: sim.Untouched, Zone: zone}
		case port != 53:
			return "other", untouched
		case !dns || proxy:
			return "C1", untouched
		case excludedForUID(cfg, 17, port, p.UID), holdsAddr(cfg.Outbound.ExcludeIPs, to):
			return "C2", untouched
		case isLocalResolver(host, p.UID):
			return "C2a", untouched
		case cfg.DNS.CaptureAll || isNameserver(host, to):
			if p.Source.Port() == 53 {
				zone = 0 // raw cannot tell it from an answer (docs/contract.md)
			}
			return "C3", sim.Verdict{Kind: sim.Redirected, Port: orPort(cfg.DNS.Port, 15053), Zone: zone}
		}
		return "C4", untouched
	}
	return "other", untouched
}

// expectA is table A, also for what B2 sends there.
func expectA(cfg tproxy.Config, host tproxy.Host, p sim.Packet) (string, sim.Verdict) {
	untouched := sim.Verdict{Kind: sim.Untouched}
	port := p.Destination.Port()
	pod := cfg.Pod || host.Pod != ""
	switch {
	case p.Path == sim.Forwarded:
		return "A0", untouched
	case cfg.Inbound.Off:
		return "A1", untouched
	case holdsAddr(cfg.Inbound.ExcludeIPs, p.Source.Addr()):
		return "A2", untouched
	case holdsPort(cfg.Inbound.ExcludePorts, port), port == 22 && !pod && !cfg.Inbound.CaptureSSH:
		return "A3", untouched
	}
	return "A5", sim.Verdict{Kind: sim.Redirected, Port: orPort(cfg.Inbound.Port, 15006)}
}

func orPort(p, otherwise uint16) uint16 {
	if p == 0 {
		return otherwise
	}
	return p
}

func isPassthrough(a netip.Addr) bool {
	return a == netip.AddrFrom4([4]byte{127, 0, 0, 6}) || a == netip.AddrFrom16([16]byte{15: 6})
}

// isProxy is the contract's word: the UID of --kuma-dp-user, by default 5678,
// else that of the user kuma-dp.
func isProxy(cfg tproxy.Config, host tproxy.Host, uid uint32) bool {
	if slices.Contains(cfg.ProxyUIDs, uid) {
		return true
	}
	if len(cfg.ProxyUIDs) > 0 {
		return false
	}
	name := cfg.ProxyUser
	if n, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(n) == uid
	}
	if name == "" {
		for _, u := range host.Users {
			if u.UID == 5678 {
				return uid == 5678
			}
		}
		name = "kuma-dp"
	}
	for _, u := range host.Users {
		if u.Name == name {
			return u.UID == uid
		}
	}
	return uid == 5678
}

func isLocalResolver(host tproxy.Host, uid uint32) bool {
	for _, r := range host.LocalResolvers {
		if r.Untold == "" && r.UID == uid {
			return true
		}
	}
	return false
}

func isNameserver(host tproxy.Host, a netip.Addr) bool {
	for _, ns := range host.Nameservers {
		if ns.Unmap().WithZone("") == a {
			return true
		}
	}
	return false
}

func excludedForUID(cfg tproxy.Config, protocol uint8, port uint16, uid uint32) bool {
	for _, e := range cfg.Outbound.ExcludePortsForUIDs {
		if e.Protocol != 0 && uint8(e.Protocol) != protocol || len(e.Ports.Ranges()) > 0 && !holdsPort(e.Ports, port) {
			continue
		}
		for _, r := range e.UIDs.Ranges() {
			if r.First <= uid && uid <= r.Last {
				return true
			}
		}
	}
	return false
}

func holdsPort(ports rules.Ports, port uint16) bool {
	for _, r := range ports.Ranges() {
		if r.First <= port && port <= r.Last {
			return true
		}
	}
	return false
}

// holdsAddr compares the first bits of the addresses itself.
func holdsAddr(ps []netip.Prefix, a netip.Addr) bool {
	for _, p := range ps {
		if p.Addr().Is4() != a.Is4() {
			continue
		}
		x, y, same := p.Addr().AsSlice(), a.AsSlice(), true
		for bit := range p.Bits() {
			mask := byte(0x80) >> (bit % 8)
			same = same && x[bit/8]&mask == y[bit/8]&mask
		}
		if same {
			return true
		}
	}
	return false
}
