package tproxytest

import (
	"net/netip"
	"slices"
	"strconv"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// Env is the host of the tests: 10.0.0.7 and 192.168.7.7, fd00::7 and
// 2001:db8::7.
func Env() sim.Env {
	return sim.EnvOf(
		netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("192.168.7.7"),
		netip.MustParseAddr("fd00::7"), netip.MustParseAddr("2001:db8::7"))
}

// prefixPool holds what a list of excluded addresses draws from: networks
// within each other, own and loopback addresses, resolvers, everything.
var prefixPool = prefixes("0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/24", "10.0.0.7/32", "10.0.0.9/32", "10.0.0.53/32", "127.0.0.0/8", "127.0.0.6/32",
	"127.0.0.53/32", "93.184.216.0/24", "8.8.8.8/32", "192.168.7.7/32", "255.255.255.255/32", "10.0.0.8/31",
	"::/0", "fd00::/8", "fd00::/64", "fd00::7/128", "fd00::9/128", "fd00::53/128", "::1/128", "::6/128", "2001:db8::/32", "2606:2800::/32")

// addrPool holds addresses that packets go from and to whatever the Config is.
var addrPool = addrs("127.0.0.1", "127.0.0.5", "127.0.0.6", "127.0.0.7", "127.0.0.53", "127.255.255.254", "10.0.0.9", "10.0.0.53", "93.184.216.34", "8.8.8.8",
	"::1", "::2", "::5", "::6", "::7", "fd00::9", "fd00::53", "2606:2800:220::1", "2001:4860:4860::8888")

// elsewhere is on no host of the tests (RFC 5737, RFC 3849).
var elsewhere = addrs("203.0.113.1", "2001:db8:1::1")

// resolverPool holds nameservers: elsewhere, on loopback, at own addresses.
var resolverPool = addrs("10.0.0.53", "127.0.0.53", "8.8.8.8", "::1", "fd00::53", "127.0.0.1", "10.0.0.7", "fd00::7", "2001:4860:4860::8888")

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func pick[E any](t *rapid.T, label string, from ...E) E {
	return rapid.SampledFrom(from).Draw(t, label)
}

// seldom is true about one time in n.
func seldom(t *rapid.T, label string, n int) bool {
	list := make([]bool, n)
	list[n/2] = true
	return pick(t, label, list...)
}

// Configs draws valid configurations. A Config can still be refused on a host.
func Configs() *rapid.Generator[tproxy.Config] { return rapid.Custom(drawConfig) }

func drawConfig(t *rapid.T) tproxy.Config {
	var c tproxy.Config
	switch pick(t, "proxy", 0, 0, 1, 2, 3, 4, 5) {
	case 1:
		c.ProxyUIDs = rapid.SliceOfN(uids(), 1, 4).Draw(t, "proxy UIDs")
	case 2:
		c.ProxyUser = "kuma-dp"
	case 3:
		c.ProxyUser = "4294967294"
	case 4:
		c.ProxyUIDs = []tproxy.UID{5678, 5679}
	case 5:
		c.ProxyUIDs = []tproxy.UID{0}
	}
	if seldom(t, "IPv4 only", 8) {
		c.IPFamilyMode = tproxy.IPv4Only
	}
	c.Inbound.Off = seldom(t, "inbound off", 8)
	c.Inbound.Port = pick[uint16](t, "inbound port", 0, 15006, 16006, 80, 65535)
	c.Inbound.ExcludePorts = drawPorts(t, "inbound excluded ports")
	c.Inbound.ExcludeIPs = drawPrefixes(t, "inbound excluded IPs")
	c.Inbound.CaptureSSH = seldom(t, "capture SSH", 5)
	c.Outbound.Off = seldom(t, "outbound off", 8)
	c.Outbound.Port = pick[uint16](t, "outbound port", 0, 15001, 16001, 8080, 1)
	c.Outbound.ExcludePorts = drawPorts(t, "outbound excluded ports")
	c.Outbound.ExcludeIPs = drawPrefixes(t, "outbound excluded IPs")
	if seldom(t, "for UIDs", 2) {
		c.Outbound.ExcludePortsForUIDs = rapid.SliceOfN(rapid.Custom(drawExclusion), 1, 3).Draw(t, "excluded for UIDs")
	}
	switch pick(t, "DNS", 0, 1, 1, 2, 2, 3) {
	case 1:
		c.DNS.Redirect = true
	case 2:
		c.DNS.CaptureAll = true
	case 3:
		c.DNS.Redirect, c.DNS.CaptureAll = true, true
	}
	c.DNS.Port = pick[uint16](t, "DNS port", 0, 15053, 16053, 5353)
	c.DNS.SkipConntrackZoneSplit = seldom(t, "skip zone split", 4)
	c.Pod = seldom(t, "pod", 8)
	c.DisableComments = seldom(t, "disable comments", 6)
	c.DNS.RedirectTCP = rapid.Bool().Draw(t, "DNS over TCP")
	return c
}

func uids() *rapid.Generator[uint32] {
	return rapid.OneOf(
		rapid.SampledFrom([]uint32{5678, 0, 1, 101, 999, 1000, 1001, 65534, 65535, 65536, rules.MaxUID - 1, rules.MaxUID}),
		rapid.Uint32Max(rules.MaxUID))
}

func drawRange(t *rapid.T) rules.PortRange {
	first := rapid.OneOf(
		rapid.SampledFrom([]uint16{80, 1, 22, 53, 443, 8080, 15001, 15006, 15053, 16006, 65534, 65535}),
		rapid.Uint16Min(1)).Draw(t, "first")
	r := rules.PortRange{First: first, Last: first}
	if seldom(t, "is range", 3) {
		r.Last = uint16(min(int(first)+pick(t, "longer by", 1, 2, 10, 1000, 65535), rules.MaxPort))
	}
	return r
}

// drawPorts draws a list of ports, at times one that does not fit in a single
// multiport match.
func drawPorts(t *rapid.T, label string) rules.Ports {
	var list []rules.PortRange
	switch pick(t, label+" length", 0, 1, 1, 2) {
	case 1:
		list = rapid.SliceOfN(rapid.Custom(drawRange), 1, 5).Draw(t, label)
	case 2:
		first := rapid.Uint16Range(1, 60000).Draw(t, label+" from")
		for i := range uint16(pick(t, label+" many", 15, 16, 17, 40)) {
			list = append(list, rules.PortRange{First: first + 3*i, Last: first + 3*i + i%2})
		}
	}
	p, err := rules.PortsOf(list...)
	if err != nil {
		t.Fatalf("%v: %v", list, err)
	}
	return p
}

func drawPrefixes(t *rapid.T, label string) []netip.Prefix {
	if !seldom(t, label+" given", 3) {
		return nil
	}
	return rapid.SliceOfN(rapid.OneOf(rapid.SampledFrom(prefixPool[1:]), rapid.SampledFrom(prefixPool), rapid.Custom(drawPrefix)), 1, 5).Draw(t, label)
}

func drawPrefix(t *rapid.T) netip.Prefix {
	a := drawAddr(t, rapid.Bool().Draw(t, "IPv4"))
	p, err := a.Prefix(rapid.IntRange(0, a.BitLen()).Draw(t, "bits"))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func drawAddr(t *rapid.T, v4 bool) netip.Addr {
	n := 16
	if v4 {
		n = 4
	}
	a, _ := netip.AddrFromSlice(rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, "address"))
	if a.Is4In6() {
		return netip.IPv6Unspecified()
	}
	return a
}

func drawExclusion(t *rapid.T) tproxy.UIDExclusion {
	e := tproxy.UIDExclusion{Protocol: pick(t, "protocol", 0, rules.TCP, rules.UDP)}
	switch pick(t, "ports", 0, 1, 2) {
	case 1:
		e.Ports = drawPorts(t, "ports")
	case 2:
		e.Ports = rules.Port(53)
	}
	for _, first := range rapid.SliceOfN(uids(), 1, 3).Draw(t, "UIDs") {
		last := first
		if seldom(t, "is range", 3) {
			last = uint32(min(uint64(first)+pick[uint64](t, "longer by", 1, 5, 1e6), rules.MaxUID))
		}
		e.UIDs = e.UIDs.Union(rules.MustUIDs(rules.UIDRange{First: first, Last: last}.String()))
	}
	return e
}

// Hosts draws hosts that the Config can be built for, and now and then one on
// which it has to be refused.
func Hosts(cfg tproxy.Config) *rapid.Generator[tproxy.Host] {
	return rapid.Custom(func(t *rapid.T) tproxy.Host { return drawHost(t, cfg) })
}

func drawHost(t *rapid.T, cfg tproxy.Config) tproxy.Host {
	var h tproxy.Host
	switch pick(t, "users", 0, 1, 2, 3) {
	case 1:
		h.Users = []tproxy.User{{Name: "kuma-dp", UID: 999}}
	case 2:
		h.Users = []tproxy.User{{Name: "kuma-dp", UID: 999}, {Name: "envoy", UID: 5678}}
	case 3:
		h.Users = []tproxy.User{{Name: "kuma-dp", UID: 5678}}
	}
	named := func(u tproxy.User) bool { return u.Name == cfg.ProxyUser }
	if cfg.ProxyUser != "" && !slices.ContainsFunc(h.Users, named) {
		h.Users = append(h.Users, tproxy.User{Name: cfg.ProxyUser, UID: 1001})
	}
	h.PassthroughAddress = seldom(t, "::6 is there", 4)
	if seldom(t, "IPv6 off", 10) {
		h.IPv6Off = "net.ipv6.conf.all.disable_ipv6 is 1"
	}
	if seldom(t, "pod", 10) {
		h.Pod = "KUBERNETES_SERVICE_HOST is set"
	}
	if cfg.DNS.Redirect || cfg.DNS.CaptureAll {
		h.Nameservers = rapid.SliceOfN(rapid.SampledFrom(resolverPool), 0, 3).Draw(t, "nameservers")
		for _, ns := range h.Nameservers {
			if (ns.IsLoopback() || Env().IsLocal(ns)) && rapid.Bool().Draw(t, "resolver is known") {
				uid := pick[uint32](t, "resolver's UID", 101, 101, 110, 1000, rules.MaxUID, 5678, 0)
				if len(h.Nameservers) > 1 && seldom(t, "resolver's UID is told apart", 2) {
					uid = 102
				}
				r := tproxy.LocalResolver{Address: ns, UID: uid, PID: 321, Program: "resolver"}
				if seldom(t, "no user tells it", 6) {
					r = tproxy.LocalResolver{Address: ns, Program: "resolver", Untold: "is not to be seen", Behind: pick(t, "behind", "", tproxy.IPTablesLegacy.String())}
				}
				h.LocalResolvers = append(h.LocalResolvers, r)
			}
		}
	}
	h.RemoteShells = pick(t, "shells", nil, nil, []tproxy.RemoteShell{{Port: 22, Why: "sshd listens"}})
	if r := cfg.Inbound.ExcludePorts.Ranges(); len(r) > 0 && seldom(t, "excluded shell", 3) {
		h.RemoteShells = append(h.RemoteShells, tproxy.RemoteShell{Port: r[0].First, Why: "sshd listens"})
	}
	if seldom(t, "shell to lose", 12) {
		h.RemoteShells = append(h.RemoteShells, tproxy.RemoteShell{Port: 2222, Why: "SSH_CONNECTION says so"})
	}
	return h
}

// Packets draws packets that look for the edges of the Config: ports, addresses
// and users at and one beyond the ends of its ranges, the proxy's own, SSH, DNS,
// passthrough, loopback and own addresses.
func Packets(cfg tproxy.Config, host tproxy.Host, env sim.Env) *rapid.Generator[sim.Packet] {
	e := edgesOf(cfg, host, env)
	return rapid.Custom(e.draw)
}

type edges struct {
	cfg          tproxy.Config
	env          sim.Env
	ports        []uint16
	excluded     []uint16 // the ends of the excluded ports
	uids, proxy  []uint32
	resolvers    []uint32
	addrs, local [2][]netip.Addr // IPv4, IPv6
	servers      [2][]netip.Addr
}

func edgesOf(cfg tproxy.Config, host tproxy.Host, env sim.Env) *edges {
	e := &edges{cfg: cfg, env: env}
	addPort := func(p int) {
		if p >= 1 && p <= rules.MaxPort {
			e.ports = append(e.ports, uint16(p))
		}
	}
	addPorts := func(ports rules.Ports) {
		for _, r := range ports.Ranges() {
			e.excluded = append(e.excluded, r.First, r.Last)
			addPort(int(r.First) - 1)
			addPort(int(r.First))
			addPort(int(r.Last))
			addPort(int(r.Last) + 1)
		}
	}
	addUID := func(id uint32) {
		for _, v := range []int64{int64(id) - 1, int64(id), int64(id) + 1} {
			if v >= 0 && v <= rules.MaxUID {
				e.uids = append(e.uids, uint32(v))
			}
		}
	}
	addAddr := func(a netip.Addr) {
		if a = a.Unmap().WithZone(""); a.IsValid() {
			e.addrs[index(a)] = append(e.addrs[index(a)], a)
		}
	}
	for _, p := range []uint16{cfg.Inbound.Port, cfg.Outbound.Port, cfg.DNS.Port, 22, 53, 80, 443, 15001, 15006, 15053, 1, 65535} {
		addPort(int(p))
	}
	addPorts(cfg.Inbound.ExcludePorts)
	addPorts(cfg.Outbound.ExcludePorts)
	for _, x := range cfg.Outbound.ExcludePortsForUIDs {
		addPorts(x.Ports)
		for _, r := range x.UIDs.Ranges() {
			addUID(r.First)
			addUID(r.Last)
		}
	}
	for _, u := range append([]uint32{0, 5678, 1000, rules.MaxUID}, cfg.ProxyUIDs...) {
		addUID(u)
	}
	for _, u := range host.Users {
		addUID(u.UID)
	}
	for _, r := range host.LocalResolvers {
		addUID(r.UID)
		e.resolvers = append(e.resolvers, r.UID)
	}
	for _, u := range e.uids {
		if isProxy(cfg, host, u) && !slices.Contains(e.proxy, u) {
			e.proxy = append(e.proxy, u)
		}
	}
	if n, err := strconv.ParseUint(cfg.ProxyUser, 10, 32); err == nil && len(cfg.ProxyUIDs) == 0 {
		addUID(uint32(n))
		e.proxy = append(e.proxy, uint32(n))
	}
	for _, p := range slices.Concat(cfg.Inbound.ExcludeIPs, cfg.Outbound.ExcludeIPs) {
		first, last := p.Masked().Addr(), lastOf(p)
		for _, a := range []netip.Addr{first.Prev(), first, last, last.Next()} {
			addAddr(a)
		}
	}
	for _, a := range addrPool {
		addAddr(a)
	}
	for _, a := range host.Nameservers {
		addAddr(a)
		a = a.Unmap().WithZone("")
		e.servers[index(a)] = append(e.servers[index(a)], a)
	}
	for _, p := range env.Local {
		addAddr(p.Addr())
		e.local[index(p.Addr())] = append(e.local[index(p.Addr())], p.Addr())
	}
	return e
}

func index(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// lastOf returns the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func (e *edges) draw(t *rapid.T) sim.Packet {
	p := sim.Packet{
		Path:     pick(t, "path", sim.Out, sim.Out, sim.Out, sim.Out, sim.In, sim.In, sim.In, sim.Forwarded),
		Protocol: pick(t, "protocol", rules.TCP, rules.TCP, rules.TCP, rules.UDP, rules.TCP, rules.UDP, rules.TCP, rules.UDP, rules.TCP, rules.Protocol(132)),
	}
	f := pick(t, "family", 0, 1)
	port := e.port(t, "port")
	if p.Protocol == rules.UDP {
		switch pick(t, "query", 0, 0, 0, 0, 0, 0, 1, 2) {
		case 0:
			port = 53
		case 1:
			port = orPort(e.cfg.DNS.Port, 15053) // straight to the proxy
		}
	} else if p.Protocol == rules.TCP && e.cfg.DNS.On() && seldom(t, "query over TCP", 3) {
		port = 53
	}
	if p.Path == sim.Out {
		p.UID = e.uid(t)
		if x := e.cfg.Outbound.ExcludePortsForUIDs; len(x) > 0 && seldom(t, "excluded for a UID", 4) {
			one := pick(t, "exclusion", x...)
			p.UID = pick(t, "range of UIDs", one.UIDs.Ranges()...).First
			if r := one.Ports.Ranges(); len(r) > 0 && port != 53 {
				port = pick(t, "range of ports", r...).Last
			}
		} else if len(e.resolvers) > 0 && port == 53 && seldom(t, "a resolver", 2) {
			p.UID = pick(t, "resolver's UID", e.resolvers...)
		}
		p.GID = pick[uint32](t, "GID", 0, 5678, 1000)
	}
	sport := pick[uint16](t, "source port", 4000, 4000, orPort(e.cfg.DNS.Port, 15053), 53, 65535)
	from, to := e.addr(t, "source", f), e.addr(t, "destination", f)
	switch {
	case p.Path == sim.In:
		if list := e.local[f]; len(list) > 0 {
			to = pick(t, "own destination", list...)
		}
	case p.Path == sim.Forwarded:
		if e.env.IsLocal(to) {
			to = elsewhere[f]
		}
	case len(e.servers[f]) > 0 && (p.Protocol == rules.UDP || port == 53) && rapid.Bool().Draw(t, "to a nameserver"):
		to = pick(t, "nameserver", e.servers[f]...)
	case len(e.local[f]) > 0 && seldom(t, "to itself", 4):
		to = pick(t, "own destination", e.local[f]...)
	}
	p.Source, p.Destination = netip.AddrPortFrom(from, sport), netip.AddrPortFrom(to, port)
	if p.Protocol != rules.TCP && p.Protocol != rules.UDP {
		p.Source, p.Destination = netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, 0)
	}
	if p.Protocol == rules.TCP {
		p.State = pick(t, "state", sim.New, sim.New, sim.New, sim.New, sim.New, sim.New, sim.New, sim.New, sim.Midstream, sim.New, sim.New, sim.Established)
	}
	through := "eth0"
	if p.Path == sim.Out && e.env.IsLocal(to) {
		through = "lo"
	}
	if rapid.Bool().Draw(t, "interface is known") {
		if p.Path != sim.In {
			p.OutInterface = through
		}
		if p.Path != sim.Out {
			p.InInterface = "eth0"
		}
	}
	return p
}

func (e *edges) port(t *rapid.T, label string) uint16 {
	switch pick(t, label+" kind", 0, 0, 1, 2) {
	case 1:
		if len(e.excluded) > 0 {
			return pick(t, label, e.excluded...)
		}
	case 2:
		return rapid.Uint16Min(1).Draw(t, label)
	}
	return pick(t, label, e.ports...)
}

func (e *edges) uid(t *rapid.T) uint32 {
	switch pick(t, "UID kind", 0, 0, 1, 1, 2) {
	case 1:
		return pick(t, "proxy's UID", e.proxy...)
	case 2:
		return rapid.Uint32Max(rules.MaxUID).Draw(t, "UID")
	}
	return pick(t, "UID", e.uids...)
}

func (e *edges) addr(t *rapid.T, label string, f int) netip.Addr {
	if seldom(t, label+" is any", 6) {
		return drawAddr(t, f == 0)
	}
	return pick(t, label, e.addrs[f]...)
}
