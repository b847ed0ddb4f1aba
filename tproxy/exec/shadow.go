package exec

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// shadows finds rules of others that decide where ours would. Packets that could be
// decided otherwise are drawn from those rules themselves: for each that comes before
// ours and ends something, some that it matches; and their answers.
type shadows struct {
	*looker
	family rules.Family
	plan   *tproxy.Plan
	all    []rules.Set // of everybody, those of the family
	sets   []rules.Set // without filters, which are looked at by themselves
	ours   rules.Set
	chains []map[spot][]rules.Rule // of sets
	env    sim.Env
	outer  string // the interface to other hosts

	apart     apart // what ours name, and treat otherwise than the rest
	marking   *bool // see marks
	marked    bool  // whether a rule of others looks at marks
	tries     int   // how many packets may yet be walked
	tried     map[sim.Packet]bool
	found     int // how many drifts
	unsure    int // how many that cannot be told
	published int // how many ports that others answer for
	cut       bool
	assumed   [][]rules.Set // with matches that cannot be told taken to hold, and not to
}

// spot is a chain.
type spot struct {
	table rules.Table
	chain string
}

// What it costs at most: rules that are met by all packets of a family, and packets.
const (
	shadowWork    = 12 << 20
	mostTries     = 4000
	mostShadows   = 8 // that are named, of a family
	mostUnsure    = 3
	mostPublished = 4
	fewRules      = 64 // of others in front of ours: then each is tried with what others name
	mostHot       = 12 // values of a kind
)

func (x *shadows) find() {
	x.tried = make(map[sim.Packet]bool)
	met := 1
	x.all = slices.Clone(x.all)
	for i, s := range x.all {
		s = comingBack(s)
		x.all[i] = s
		s = without(s, rules.Filter, rules.Security)
		x.sets = append(x.sets, s)
		chains := make(map[spot][]rules.Rule, len(s.Chains))
		for _, c := range s.Chains {
			chains[spot{c.Table, c.Name}] = c.Rules
			met += len(c.Rules)
			x.look(c.Rules)
		}
		for _, c := range s.Bases {
			met += len(c.Rules)
			x.look(c.Rules)
		}
		x.chains = append(x.chains, chains)
	}
	x.tries = min(mostTries, max(200, shadowWork/met))
	x.apart = namedBy(x.ours)
	drafts := x.drafts()
	for _, d := range drafts {
		for _, p := range d.packets(&x.apart, nil) {
			x.try(p)
			if d.general {
				x.filter(p)
			}
		}
	}
	for _, d := range drafts {
		x.own(d)
	}
	for _, d := range drafts {
		leaves, back := x.leaves(d)
		// What others let come back may have been what a rule behind matches: where
		// they are few, each is tried with what all of them name.
		var named *apart
		if len(leaves)+len(back) <= fewRules {
			named = &apart{}
			for _, l := range append(leaves, back...) {
				named.addDraft(l.draft)
			}
			named.clip(mostHot)
		}
		for _, l := range leaves {
			hot := named
			if l.toProxy {
				hot = &x.apart
			}
			for _, p := range l.packets(&x.apart, hot) {
				x.try(p)
			}
			if x.found >= mostShadows || x.unsure >= mostUnsure {
				return
			}
		}
	}
	if x.cut {
		x.cannot("there are too many %s rules of others in front of ours to look at all of them", x.family)
	}
}

// look notes whether a mark that others set can decide anything.
func (x *shadows) look(list []rules.Rule) {
	for _, r := range list {
		x.marked = x.marked || slices.ContainsFunc(r.Matches, func(m rules.Match) bool { _, ok := m.(rules.Mark); return ok })
	}
}

func without(s rules.Set, tables ...rules.Table) rules.Set {
	s.Bases = slices.DeleteFunc(slices.Clone(s.Bases), func(c rules.BaseChain) bool { return slices.Contains(tables, c.Table) })
	s.Chains = slices.DeleteFunc(slices.Clone(s.Chains), func(c rules.Chain) bool { return slices.Contains(tables, c.Table) })
	return s
}

// comingBack makes nothing of what drops packets that come by another way than their
// answers would go (-m rpfilter --invert in iptables-extensions(8); firewalld has such a
// rule with IPv6_rpfilter=yes, its default): whether one does is up to routes, not to
// rules, and those that are tried do not.
func comingBack(s rules.Set) rules.Set {
	forged := func(r rules.Rule) bool {
		return r.Action == rules.Action(rules.Drop{}) && slices.ContainsFunc(r.Matches, func(m rules.Match) bool {
			o, _ := m.(rules.Opaque)
			return strings.HasPrefix(o.Text(), "-m rpfilter ") && slices.Contains(strings.Fields(o.Text()), "--invert")
		})
	}
	edit := func(list []rules.Rule) []rules.Rule {
		if !slices.ContainsFunc(list, forged) {
			return list
		}
		list = slices.Clone(list)
		for i, r := range list {
			if forged(r) {
				list[i].Action = rules.Nothing{}
			}
		}
		return list
	}
	s.Bases, s.Chains = slices.Clone(s.Bases), slices.Clone(s.Chains)
	for i, c := range s.Bases {
		s.Bases[i].Rules = edit(c.Rules)
	}
	for i, c := range s.Chains {
		s.Chains[i].Rules = edit(c.Rules)
	}
	return s
}

// dim is one property of a packet: what it should be, in order, what it must be, and
// the values at which that changes.
type dim[T comparable] struct {
	own   []T
	tests []func(T) bool
	edges []T
	only  bool // whether it must be one of own
}

func (d dim[T]) with(test func(T) bool, edges ...T) dim[T] {
	d.tests = append(slices.Clip(d.tests), test)
	if !d.only {
		d.edges = append(slices.Clip(d.edges), edges...)
	}
	return d
}

// none reports whether it is one of own and none of those passes the test: most rules of
// others are done with so, and that has to be cheap.
func (d dim[T]) none(test func(T) bool) bool { return d.only && !slices.ContainsFunc(d.own, test) }

func (d dim[T]) fits(v T) bool {
	return (!d.only || slices.Contains(d.own, v)) && !slices.ContainsFunc(d.tests, func(test func(T) bool) bool { return !test(v) })
}

// choose returns a value that fits, outside of what is apart where that can be: more
// are the ends of that.
func (d dim[T]) choose(apart func(T) bool, more []T) (v T, ok bool) {
	if d.only {
		more = nil
	}
	for _, list := range [][]T{d.own, d.edges, more} {
		for _, e := range list {
			switch {
			case !d.fits(e):
			case apart == nil || !apart(e):
				return e, true
			case !ok:
				v, ok = e, true
			}
		}
	}
	return v, ok
}

// draft is a packet that is yet to be chosen.
type draft struct {
	packet       sim.Packet
	src, dst     dim[netip.Addr]
	sport, dport dim[uint16]
	uid, gid     dim[uint32]
	through      dim[string] // the interface; unused where the packet stays on the host
	mark         dim[uint32]
	inside       bool // whether it goes through lo
	answer       bool // of the proxy's, or a later packet: not the one that opens
	left         bool // whether ours leave it alone
	general      bool // whether it stands for all of its kind
}

// leaf is a draft that a rule of others matches.
type leaf struct {
	draft
	toProxy bool // whether the rule sends it to a port of the proxy's
}

// packets chooses some: one outside of what is apart, one that fits, and one for each
// of the values of hot.
func (d draft) packets(apart, hot *apart) (out []sim.Packet) {
	first, ok := d.choose(apart)
	if !ok {
		return nil
	}
	out = append(out, first)
	if second, ok := d.choose(nil); ok && second != first {
		out = append(out, second)
	}
	if hot == nil {
		return out
	}
	for _, a := range hot.addrs {
		if d.src.fits(a) {
			p := first
			p.Source = netip.AddrPortFrom(a, p.Source.Port())
			out = append(out, p)
		}
		if d.dst.fits(a) {
			p := first
			p.Destination = netip.AddrPortFrom(a, p.Destination.Port())
			out = append(out, p)
		}
	}
	for _, n := range hot.ports {
		if d.sport.fits(n) {
			p := first
			p.Source = netip.AddrPortFrom(p.Source.Addr(), n)
			out = append(out, p)
		}
		if d.dport.fits(n) {
			p := first
			p.Destination = netip.AddrPortFrom(p.Destination.Addr(), n)
			out = append(out, p)
		}
	}
	if d.packet.Path == sim.Out {
		for _, id := range hot.ids {
			if p := first; d.uid.fits(id) {
				p.UID = id
				out = append(out, p)
			}
		}
	}
	return out
}

func (d draft) choose(a *apart) (p sim.Packet, ok bool) {
	var addr func(netip.Addr) bool
	var port func(uint16) bool
	var id func(uint32) bool
	var ends apart
	if a != nil {
		addr, port, id, ends = a.addr, a.port, a.id, *a
	}
	p = d.packet
	src, ok1 := d.src.choose(addr, ends.addrs)
	dst, ok2 := d.dst.choose(addr, ends.addrs)
	sport, ok3 := d.sport.choose(nil, nil)
	dport, ok4 := d.dport.choose(port, ends.ports)
	through, ok5 := d.through.choose(nil, nil)
	mark, ok6 := d.mark.choose(nil, nil)
	p.Source, p.Destination, p.Mark = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport), mark
	if p.Path == sim.In {
		p.InInterface = through
		return p, ok1 && ok2 && ok3 && ok4 && ok5 && ok6
	}
	if p.OutInterface = through; d.inside {
		p.OutInterface = "lo"
	}
	var ok7, ok8 bool
	p.UID, ok7 = d.uid.choose(id, ends.ids)
	p.GID, ok8 = d.gid.choose(id, ends.ids)
	return p, ok1 && ok2 && ok3 && ok4 && ok5 && ok6 && ok7 && ok8
}

// apart is what rules name: prefixes, ports, users, and the values at their ends.
type apart struct {
	prefixes []netip.Prefix
	portSet  rules.Ports
	idSet    rules.UIDs
	addrs    []netip.Addr
	ports    []uint16
	ids      []uint32
}

func (a *apart) addr(v netip.Addr) bool {
	return slices.ContainsFunc(a.prefixes, func(p netip.Prefix) bool { return p.Contains(v) })
}
func (a *apart) port(v uint16) bool { return a.portSet.Contains(v) }
func (a *apart) id(v uint32) bool   { return a.idSet.Contains(v) }

// namedBy is what the rules of a set name.
func namedBy(s rules.Set) (a apart) {
	add := func(list []rules.Rule) {
		for _, r := range list {
			for _, m := range r.Matches {
				switch m := m.(type) {
				case rules.Source:
					a.prefixes = append(a.prefixes, m.Prefixes...)
				case rules.Destination:
					a.prefixes = append(a.prefixes, m.Prefixes...)
				case rules.DestinationPorts:
					a.portSet = a.portSet.Union(m.Ports)
				case rules.OwnerUID:
					a.idSet = a.idSet.Union(m.UIDs)
				}
			}
		}
	}
	for _, c := range s.Chains {
		add(c.Rules)
	}
	// An own address that is named with a not, or all there are, set nothing apart.
	a.prefixes = slices.DeleteFunc(a.prefixes, func(p netip.Prefix) bool { return p.Bits() == 0 })
	for _, p := range a.prefixes {
		a.addrs = append(a.addrs, p.Addr(), beyond(p))
	}
	for _, r := range a.portSet.Ranges() {
		a.ports = append(a.ports, r.First, r.Last+1)
	}
	for _, r := range a.idSet.Ranges() {
		a.ids = append(a.ids, r.First, r.Last+1)
	}
	a.clip(4 * mostHot)
	return a
}

// addDraft adds the ends of what rules of others match.
func (a *apart) addDraft(d draft) {
	a.addrs = append(append(a.addrs, d.src.edges...), d.dst.edges...)
	a.ports = append(append(a.ports, d.sport.edges...), d.dport.edges...)
	a.ids = append(a.ids, d.uid.edges...)
}

// clip leaves at most n values of a kind, from all over.
func (a *apart) clip(n int) {
	a.addrs, a.ports, a.ids = some(a.addrs, netip.Addr.Compare, n), some(a.ports, compare, n), some(a.ids, compare, n)
}

func compare[T uint16 | uint32](a, b T) int { return int(int64(a) - int64(b)) }

func some[T comparable](list []T, by func(a, b T) int, n int) (out []T) {
	slices.SortFunc(list, by)
	list = slices.Compact(list)
	step := max(1, (len(list)+n-1)/n)
	for i := 0; i < len(list); i += step {
		out = append(out, list[i])
	}
	return out
}

// beyond is the first address behind a prefix.
func beyond(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a.Next()
}

// elsewhereThan are addresses of other hosts: of documentation (RFC 5737, RFC 3849),
// and public ones, in case a configuration excludes those.
var elsewhereThan = map[rules.Family][]netip.Addr{
	rules.IPv4: {netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("1.0.0.1"), netip.MustParseAddr("192.168.255.254"), netip.MustParseAddr("10.255.255.254")},
	rules.IPv6: {netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("3fff::1"), netip.MustParseAddr("2606:4700::1"), netip.MustParseAddr("fdff::1")},
}

// drafts are the kinds of packet that an install is about: a connection from another
// host and what follows it, one of a process here, a query, what the proxy sends, and
// the proxy's answers.
func (x *shadows) drafts() (out []draft) {
	f, c := x.family, x.plan.Config
	far, near := elsewhereThan[f], here[f]
	way, err := x.m.routeTo(far[0])
	if err == nil && way.Source.IsValid() {
		near = way.Source
	}
	x.env = sim.EnvOf(near)
	if local, err := x.m.localAddresses(); err == nil {
		x.env.Local = append(x.env.Local, hostPrefixes(local)...)
	}
	// A name that nobody has, where there is no way to other hosts yet.
	if x.outer = way.Interface; x.outer == "" || x.outer == "lo" {
		x.outer = noInterface
	}
	loopback := netip.IPv6Loopback()
	passing4, passing := tproxy.PassthroughAddresses()
	if f == rules.IPv4 {
		loopback, passing = netip.AddrFrom4([4]byte{127, 0, 0, 1}), passing4
	}
	var locals []netip.Addr
	for _, p := range x.env.Local {
		if a := p.Addr(); a.Is4() == near.Is4() && !a.IsLoopback() && a != passing && !a.IsLinkLocalUnicast() {
			locals = append(locals, a)
		}
	}
	remote := func(a netip.Addr) bool {
		return a.Is4() == near.Is4() && !x.env.IsLocal(a) && !a.IsMulticast() && !a.IsUnspecified()
	}
	// Exactly this one.
	is := func(b netip.Addr) dim[netip.Addr] {
		return dim[netip.Addr]{own: []netip.Addr{b}, only: true}
	}
	port := func(n uint16) dim[uint16] {
		return dim[uint16]{own: []uint16{n}, only: true}
	}
	user := func(id uint32) dim[uint32] {
		return dim[uint32]{own: []uint32{id}, only: true}
	}
	real := func(n uint16) bool { return n != 0 }
	proxy := user(c.ProxyUIDs[0])
	anyone := dim[uint32]{own: []uint32{stranger, 1000, 0, 65533}}
	fromFar := dim[netip.Addr]{own: far, tests: []func(netip.Addr) bool{remote}}
	fromHere := dim[netip.Addr]{own: append([]netip.Addr{near}, locals...), only: true}
	anyPort := dim[uint16]{own: []uint16{strangePort, 80, 8080, 49_000}, tests: []func(uint16) bool{real}}
	client := dim[uint16]{own: []uint16{40000}, tests: []func(uint16) bool{real}}
	outer := dim[string]{own: []string{x.outer}, tests: []func(string) bool{func(s string) bool { return s != "lo" }}}
	unmarked := dim[uint32]{own: []uint32{0}}

	in := draft{packet: sim.Packet{Path: sim.In, Protocol: rules.TCP}, src: fromFar, dst: fromHere, sport: client, dport: anyPort, uid: anyone, gid: anyone, through: outer, mark: user(0), general: true}
	process := draft{packet: sim.Packet{Path: sim.Out, Protocol: rules.TCP}, src: fromHere, dst: fromFar, sport: client, dport: anyPort, uid: anyone, gid: anyone, through: outer, mark: unmarked, general: true}
	out = append(out, in, process)
	later := func(d draft) draft {
		d.packet.State, d.answer, d.general = sim.Established, true, false
		return d
	}
	// What the proxy answers from a port, to other hosts or to here.
	answer := func(d draft, from netip.Addr, port dim[uint16]) draft {
		d.general = true
		d.packet.Path, d.packet.State, d.answer = sim.Out, sim.Established, true
		d.sport, d.dport = port, client
		d.uid, d.gid, d.mark = proxy, anyone, user(0)
		if from == loopback {
			d.src, d.dst, d.inside = is(from), fromHere, true
		} else {
			d.src, d.dst = is(from), fromFar
		}
		return d
	}
	// What comes back to a process through lo: by then it is again from where the
	// process has sent to.
	back := draft{packet: sim.Packet{Path: sim.In, Protocol: rules.TCP, State: sim.Established}, src: fromFar, dst: fromHere, sport: anyPort, dport: dim[uint16]{own: client.own, only: true},
		uid: anyone, gid: anyone, through: dim[string]{own: []string{"lo"}, only: true}, mark: user(0), answer: true, general: true}
	if !c.Inbound.Off {
		self := process
		self.uid, self.dst, self.inside = proxy, fromHere, true
		loop := self
		loop.dport, loop.general = port(c.Inbound.Port), false
		out = append(out, self, loop, later(in), answer(in, near, port(c.Inbound.Port)))
	}
	if !c.Outbound.Off {
		out = append(out, later(process), answer(process, loopback, port(c.Outbound.Port)), back)
	}
	if c.DNS.On() {
		query := process
		query.packet.Protocol, query.dport = rules.UDP, port(53)
		var servers []netip.Addr
		for _, a := range x.plan.Nameservers {
			if a.Is4() == near.Is4() {
				servers = append(servers, a)
			}
		}
		query.dst = dim[netip.Addr]{own: append(servers, far...), tests: []func(netip.Addr) bool{func(a netip.Addr) bool { return a.Is4() == near.Is4() }}}
		query.inside = len(servers) > 0 && x.env.IsLocal(servers[0])
		back.packet.Protocol, back.src, back.sport = rules.UDP, query.dst, port(53)
		out = append(out, query, answer(query, loopback, port(c.DNS.Port)), back)
		if x.plan.DNSOverTCP() {
			query.packet.Protocol = rules.TCP
			out = append(out, query)
		}
	}
	// What ours leave alone: others must not send it to the proxy.
	left := process
	left.uid, left.general, left.left = proxy, false, true
	pass := left
	pass.src, pass.dst, pass.inside = is(passing), fromHere, true
	here := process
	here.dst, here.inside, here.general, here.left = dim[netip.Addr]{own: append(slices.Clone(fromHere.own), loopback), only: true}, true, false, true
	if c.DNS.On() {
		asked := left
		asked.packet.Protocol, asked.dport = rules.UDP, port(53)
		out = append(out, asked)
	}
	return append(out, left, pass, here)
}

// own tries packets that rules of ours match.
func (x *shadows) own(d draft) {
	if d.answer {
		return
	}
	for _, c := range x.ours.Chains {
		if c.Table != rules.NAT || tproxy.IsRecord(c.Table, c.Name) || len(c.Rules) > fewRules {
			continue
		}
		for _, r := range c.Rules {
			if e, ok := x.narrowed(d, r, false); ok {
				for _, p := range e.packets(nil, nil) {
					x.try(p)
				}
			}
		}
	}
}

// leaves are the rules of others that a packet of the draft may meet before ours
// decide, and that can decide, and those anywhere that send it to the proxy; back are
// those that return.
func (x *shadows) leaves(d draft) (out, back []leaf) {
	hooks := []rules.Hook{rules.Output, rules.Postrouting, rules.Prerouting, rules.Input}
	if d.packet.Path == sim.In {
		hooks = []rules.Hook{rules.Prerouting, rules.Input}
	}
	if d.left && !x.sendsToProxy() {
		return nil, nil
	}
	for i, s := range x.sets {
		for _, c := range s.Bases {
			if !slices.Contains(hooks, c.Hook) || c.Table == rules.NAT && (c.Hook != hooks[0] || d.answer) {
				continue
			}
			g := gather{shadows: x, set: i, table: c.Table, late: c.Hook != hooks[0]}
			ours, _ := x.ours.Base(c.Table, c.Hook)
			if c.Table == rules.NAT && priority(c) > priority(ours) {
				// What is behind ours of nftables, as iptables' in OUTPUT.
				g.behind = slices.ContainsFunc(ours.Rules, func(r rules.Rule) bool {
					return r.Target() != "" && slices.Contains(r.Matches, rules.Match(d.packet.Protocol))
				})
			}
			for _, r := range s.Inline(c) {
				if r.Unmet {
					continue
				}
				if c.Table == rules.NAT && slices.ContainsFunc(ours.Rules, r.Equal) && r.Target() != "" {
					// What stands behind does not see what ours decide.
					g.behind = g.behind || slices.Contains(r.Matches, rules.Match(d.packet.Protocol))
					continue
				}
				// A return from a detour passes by those of ours that stand there.
				last := r.Via == "" || slices.ContainsFunc(ours.Rules, func(o rules.Rule) bool { return o.Via == r.Via })
				g.rule(d, r, 0, last)
			}
			out, back = append(out, g.out...), append(back, g.back...)
		}
	}
	return out, back
}

func priority(c rules.BaseChain) int32 { return rules.Priority(c.Table, c.Hook) + c.Offset }

// sendsToProxy reports whether a rule of others sends anything to a port of the proxy's.
func (x *shadows) sendsToProxy() bool {
	sends := func(t rules.Table, chain string, list []rules.Rule) bool {
		if _, ours := x.ours.Chain(t, chain); ours {
			return false
		}
		return slices.ContainsFunc(list, func(r rules.Rule) bool {
			a, ok := r.Action.(rules.Redirect)
			return ok && x.proxys(a.Port)
		})
	}
	for _, s := range x.sets {
		for _, c := range s.Bases {
			if sends(c.Table, string(c.Hook), c.Rules) {
				return true
			}
		}
		for _, c := range s.Chains {
			if sends(c.Table, c.Name, c.Rules) {
				return true
			}
		}
	}
	return false
}

// gather collects leaves of one base chain.
type gather struct {
	*shadows
	set    int
	table  rules.Table
	late   bool // whether the packet may be another by then: it was redirected
	behind bool // whether it stands behind ours
	out    []leaf
	back   []leaf // that return, as many as matter
}

// deepest is how far jumps are followed, and mostLeaves how many rules are collected.
const (
	deepest    = 16
	mostLeaves = 1 << 16
)

// rule adds a rule, or those that it leads to. last is whether a return from there
// ends the base chain.
func (g *gather) rule(d draft, r rules.Rule, depth int, last bool) {
	if g.cut = g.cut || depth > deepest || len(g.out) > mostLeaves; g.cut {
		return
	}
	target := r.Target()
	_, back := r.Action.(rules.Return)
	if target == "" && !g.ends(r, last) && !(back && len(g.back) <= fewRules) {
		return
	}
	d, ok := g.narrowed(d, r, g.late)
	if !ok {
		return
	}
	if target != "" {
		if _, ours := g.ours.Chain(g.table, target); !ours {
			_, away := r.Action.(rules.Goto)
			if away && last && !g.behind { // at the end of that chain the base chain ends too
				g.out = append(g.out, leaf{draft: d})
			}
			for _, r := range g.chains[g.set][spot{g.table, target}] {
				g.rule(d, r, depth+1, last && away)
			}
			return
		}
		if g.behind {
			return
		}
	}
	if back && !last {
		g.back = append(g.back, leaf{draft: d})
		return
	}
	a, redirect := r.Action.(rules.Redirect)
	toProxy := redirect && g.proxys(a.Port) || target != ""
	if !g.behind || toProxy {
		g.out = append(g.out, leaf{d, toProxy})
	}
}

// ends reports whether a rule without a target can decide anything.
func (g *gather) ends(r rules.Rule, last bool) bool {
	switch r.Action.(type) {
	case rules.Nothing:
		return false
	case rules.Return:
		return last
	case rules.SetMark:
		return g.marked
	}
	return true
}

// narrowed is the draft of those packets that the rule matches, as far as that is up to
// the packet; ok is false where there are none of the kind. Late in its way a packet may
// have another destination, and be on another interface.
func (x *shadows) narrowed(d draft, r rules.Rule, late bool) (_ draft, ok bool) {
	for _, m := range r.Matches {
		no := false
		switch m := m.(type) {
		case rules.Protocol:
			no = m != d.packet.Protocol
		case rules.SYN:
			no = d.packet.State == sim.Established != m.Not
		case rules.Source:
			no = d.src.none(func(a netip.Addr) bool { return contain(m.Prefixes, a) != m.Not })
		case rules.Destination:
			no = !late && d.dst.none(func(a netip.Addr) bool { return contain(m.Prefixes, a) != m.Not })
		case rules.SourcePorts:
			no = d.sport.none(func(n uint16) bool { return m.Ports.Contains(n) != m.Not })
		case rules.DestinationPorts:
			no = !late && d.dport.none(func(n uint16) bool { return m.Ports.Contains(n) != m.Not })
		}
		if no {
			return d, false
		}
	}
	for _, m := range r.Matches {
		switch m := m.(type) {
		case rules.Source:
			d.src = inPrefixes(d.src, m.Prefixes, m.Not)
		case rules.Destination:
			if !late {
				d.dst = inPrefixes(d.dst, m.Prefixes, m.Not)
			}
		case rules.SourcePorts:
			d.sport = inRanges(d.sport, portEnds(m.Ports.Ranges()), m.Ports.Contains, m.Not)
		case rules.DestinationPorts:
			if !late {
				d.dport = inRanges(d.dport, portEnds(m.Ports.Ranges()), m.Ports.Contains, m.Not)
			}
		case rules.OwnerUID:
			d.uid = inRanges(d.uid, idEnds(m.UIDs.Ranges()), m.UIDs.Contains, m.Not)
		case rules.OwnerGID:
			d.gid = inRanges(d.gid, idEnds(m.GIDs.Ranges()), m.GIDs.Contains, m.Not)
		case rules.Mark:
			if d.packet.Path == sim.Out && m.Value&^m.Mask == 0 && !x.marks() {
				d.mark = d.mark.with(func(v uint32) bool { return (v&m.Mask == m.Value) != m.Not }, m.Value, m.Value^m.Mask)
			}
		case rules.InInterface:
			if d.packet.Path == sim.In {
				d.through = on(d.through, m.Name, m.Not)
			}
		case rules.OutInterface:
			switch {
			case late || d.packet.Path == sim.In:
			case d.inside:
				if (m.Name == "lo" || m.Name == "+" || m.Name == "l+") == m.Not {
					return d, false
				}
			default:
				d.through = on(d.through, m.Name, m.Not)
			}
		}
	}
	_, ok = d.choose(nil)
	return d, ok
}

// marks reports whether rules set marks: then it is theirs which packet has which.
func (x *shadows) marks() bool {
	if x.marking != nil {
		return *x.marking
	}
	found := x.setsMarks()
	x.marking = &found
	return found
}

func (x *shadows) setsMarks() bool {
	sets := func(r rules.Rule) bool {
		_, ok := r.Action.(rules.SetMark)
		return ok
	}
	for _, s := range x.sets {
		if slices.ContainsFunc(s.Chains, func(c rules.Chain) bool { return slices.ContainsFunc(c.Rules, sets) }) ||
			slices.ContainsFunc(s.Bases, func(c rules.BaseChain) bool { return slices.ContainsFunc(c.Rules, sets) }) {
			return true
		}
	}
	return false
}

// inPrefixes takes addresses at the ends of the prefixes, and behind the first, which is
// a network's own.
func inPrefixes(d dim[netip.Addr], prefixes []netip.Prefix, not bool) dim[netip.Addr] {
	var edges []netip.Addr
	for _, p := range prefixes {
		if d.only {
			break
		}
		edges = append(edges, p.Addr(), p.Addr().Next(), beyond(p).Prev(), beyond(p).Prev().Prev(), beyond(p), beyond(p).Next(), p.Addr().Prev())
	}
	edges = slices.DeleteFunc(edges, func(a netip.Addr) bool { return !a.IsValid() })
	return d.with(func(a netip.Addr) bool {
		return contain(prefixes, a) != not
	}, edges...)
}

func contain(prefixes []netip.Prefix, a netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func inRanges[T uint16 | uint32](d dim[T], edges []T, contains func(T) bool, not bool) dim[T] {
	return d.with(func(v T) bool { return contains(v) != not }, edges...)
}

// portEnds and idEnds are the values at both sides of the ends of ranges.
func portEnds(ranges []rules.PortRange) (out []uint16) {
	for _, r := range ranges {
		out = append(out, r.First, r.Last, r.Last+1, r.First-1)
	}
	return out
}

func idEnds(ranges []rules.UIDRange) (out []uint32) {
	for _, r := range ranges {
		out = append(out, r.First, r.Last, r.Last+1, r.First-1)
	}
	return out
}

// on takes an interface of the name, where a + at its end stands for the rest.
func on(d dim[string], name string, not bool) dim[string] {
	prefix, wild := strings.CutSuffix(name, "+")
	like := name
	if wild {
		like = prefix + "0"
	}
	return d.with(func(s string) bool { return (s == name || wild && strings.HasPrefix(s, prefix)) != not }, like)
}

// try walks a packet through everybody's rules, and through ours alone.
func (x *shadows) try(p sim.Packet) {
	if x.tried[p] || x.found >= mostShadows || x.unsure >= mostUnsure {
		return
	}
	x.tried[p] = true
	if x.tries--; x.tries < 0 {
		x.cut = true
		return
	}
	alone := sim.Decide(x.ours, x.env, p)
	if p.State == sim.Established {
		x.answered(p, alone)
		return
	}
	verdict := sim.DecideAll(x.sets, x.env, p)
	if verdict == alone || x.theirs(verdict, alone) {
		return
	}
	trace := sim.WalkAll(x.sets, x.env, p)
	if verdict.Kind == sim.Unknown {
		if x.either(p, alone) {
			return
		}
		if !x.escapes(p, alone) {
			x.unsure++
			x.cannot("%s: %s", x.text(p), trace.Reason)
			return
		}
	}
	step, _ := trace.Deciding()
	if p.Path == sim.In && publishes(trace, step) {
		x.publish(trace, step)
		return
	}
	x.shadow(tproxy.DriftShadowed, trace, fmt.Sprintf("%s: %s, and by ours alone %s", x.text(p), trace.Verdict, alone))
}

// publish notes a port that others answer for, the first ones by name.
func (x *shadows) publish(trace sim.Trace, step sim.Step) {
	note := fmt.Sprintf("a published port answers as before: %s sends it on", trace.Route(step))
	if x.published == mostPublished {
		note = fmt.Sprintf("more published ports answer as before, over %s", x.family)
	}
	if x.published <= mostPublished && !slices.Contains(x.Notes, note) {
		x.Notes = append(x.Notes, note)
		x.published++
	}
}

// theirs reports whether it is up to others: what ours leave alone, unless it goes to
// the proxy.
func (x *shadows) theirs(v, alone sim.Verdict) bool {
	return alone.Kind == sim.Untouched && !(v.Kind == sim.Redirected && x.proxys(v.Port))
}

// answered walks an answer of the proxy's, or another packet that does not open
// anything: it must arrive, and be known to connection tracking as what opened.
func (x *shadows) answered(p sim.Packet, alone sim.Verdict) {
	trace := sim.WalkAll(x.sets, x.env, p)
	tracked := p.Path == sim.In && p.InInterface == "lo" // already: raw has no say any more
	untracked := !tracked && slices.ContainsFunc(trace.Steps, func(s sim.Step) bool {
		_, is := s.Rule.Action.(rules.NoTrack)
		return is && s.Matched && s.Hook != rules.Input && !(p.Path == sim.Out && s.Hook == rules.Prerouting)
	})
	switch {
	case untracked:
		x.shadow(tproxy.DriftShadowed, trace, fmt.Sprintf("%s: it is kept out of connection tracking", x.text(p)))
	case trace.Kind == sim.Unknown:
		if alone.Kind != sim.Unknown {
			x.unsure++
			x.cannot("%s: %s", x.text(p), trace.Reason)
		}
	case trace.Kind == sim.Dropped, trace.Kind == sim.Refused, trace.Zone != alone.Zone && !tracked:
		x.shadow(tproxy.DriftShadowed, trace, fmt.Sprintf("%s: %s", x.text(p), trace.Verdict))
	}
}

// shadow reports what a walk has found.
func (x *shadows) shadow(kind tproxy.DriftKind, trace sim.Trace, why string) {
	d := tproxy.Drift{Kind: kind, Family: x.family, Why: why}
	step, ok := trace.Deciding()
	if !ok || trace.Kind == sim.Untouched || trace.Zone != sim.Decide(x.ours, x.env, trace.Packet).Zone {
		for _, s := range trace.Steps {
			switch s.Rule.Action.(type) {
			case rules.NoTrack, rules.CTZone:
				if s.Matched {
					step, ok = s, true
				}
			}
		}
	}
	for i := len(trace.Steps) - 1; i >= 0 && !ok; i-- { // a goto, at whose end all ended
		if s := trace.Steps[i]; s.Matched && s.Table == rules.NAT {
			step, ok = s, true
		}
	}
	if ok {
		rule := step.Rule
		rule.Why = ""
		d.Table, d.Chain, d.Index, d.Is = step.Table, step.Chain, step.Index, rule.String()
	}
	for _, s := range x.all {
		for _, c := range s.Bases {
			if policy := fmt.Sprintf("the policy of %s %s is DROP", c.Table, cmp.Or(c.Name, string(c.Hook))); trace.Reason == policy {
				d.Table, d.Chain, d.Index, d.Is = c.Table, string(c.Hook), 0, "policy DROP"
			}
		}
	}
	same := func(e tproxy.Drift) bool {
		return e.Kind == d.Kind && e.Family == d.Family && e.Table == d.Table && e.Chain == d.Chain && e.Index == d.Index
	}
	if !slices.ContainsFunc(x.Drift, same) { // one packet tells it of each rule
		x.drift(d)
		x.found++
	}
}

// noInterface is the name of an interface that nobody has.
const noInterface = "none"

// named is the packet without an interface that nobody has.
func named(p sim.Packet) sim.Packet {
	for _, in := range []*string{&p.InInterface, &p.OutInterface} {
		if *in == noInterface {
			*in = ""
		}
	}
	return p
}

func (x *shadows) text(p sim.Packet) string { return named(p).String() }

// filter walks a packet that ours redirect, or an answer to one, through filters too.
// One that drops what comes from some other host, or from some user, is the operator's.
func (x *shadows) filter(p sim.Packet) {
	alone := sim.Decide(x.ours, x.env, p)
	if alone.Kind != sim.Redirected && p.State != sim.Established {
		return
	}
	if before := sim.DecideAll(x.sets, x.env, p); before.Kind != alone.Kind || before.Elsewhere {
		return // it was told already
	}
	p = named(p)
	trace := sim.WalkAll(x.all, x.env, p)
	what := fmt.Sprintf("redirected connections, which come to port %d", alone.Port)
	if p.State == sim.Established {
		what = fmt.Sprintf("the proxy's answers from port %d", p.Source.Port())
	}
	switch trace.Kind {
	case sim.Dropped, sim.Refused:
		why := fmt.Sprintf("it drops %s: %s", what, trace.Reason)
		if p.Path == sim.In {
			for _, s := range x.all {
				if kind, text := inputFilter(x.family, s, alone.Port); text != "" && kind != sim.Unknown {
					why = text
				}
			}
		}
		x.shadow(tproxy.DriftFiltered, trace, why)
	case sim.Unknown:
		note := fmt.Sprintf("whether the %s filter lets pass %s cannot be told: %s", x.family, what, trace.Reason)
		step, _ := trace.Deciding()
		switch {
		case !bySender(step.Rule) && x.dropsEither(p):
			x.cannot("%s", note)
		case !slices.Contains(x.Notes, note):
			x.Notes = append(x.Notes, note)
		}
	}
}

// dropsEither reports whether the packet is dropped where what cannot be told of rules
// holds, or where it does not.
func (x *shadows) dropsEither(p sim.Packet) bool {
	for _, holds := range []bool{true, false} {
		switch sim.DecideAll(assuming(x.all, holds), x.env, p).Kind {
		case sim.Dropped, sim.Refused, sim.Unknown:
			return true
		}
	}
	return false
}

// bySender reports whether what cannot be told of a rule is from whom a packet is: whom
// a filter keeps out, as fail2ban's, is the operator's.
func bySender(r rules.Rule) bool {
	for _, m := range r.Matches {
		o, is := m.(rules.Opaque)
		if !is {
			continue
		}
		text := o.Text()
		if !slices.ContainsFunc([]string{"--match-set ", "-m recent", "-m hashlimit", "-m geoip", "-m mac", "-m iprange"}, func(s string) bool { return strings.Contains(text, s) }) {
			return false
		}
	}
	return true
}

// assume makes the Sets in which every match that cannot be told holds, and those in
// which none does.
func (x *shadows) assume() [][]rules.Set {
	if x.assumed == nil {
		x.assumed = [][]rules.Set{assuming(x.sets, true), assuming(x.sets, false)}
	}
	return x.assumed
}

// assuming makes the Sets in which every match that cannot be told holds, or none does.
func assuming(in []rules.Set, holds bool) (out []rules.Set) {
	opaque := func(m rules.Match) bool { _, is := m.(rules.Opaque); return is }
	edit := func(list []rules.Rule) (out []rules.Rule) {
		for _, r := range list {
			if slices.ContainsFunc(r.Matches, opaque) {
				if !holds {
					continue
				}
				r.Matches = slices.DeleteFunc(slices.Clone(r.Matches), opaque)
			}
			out = append(out, r)
		}
		return out
	}
	for _, s := range in {
		s.Bases, s.Chains = slices.Clone(s.Bases), slices.Clone(s.Chains)
		for i := range s.Bases {
			s.Bases[i].Rules = edit(s.Bases[i].Rules)
		}
		for i := range s.Chains {
			s.Chains[i].Rules = edit(s.Chains[i].Rules)
		}
		out = append(out, s)
	}
	return out
}

// either reports whether a packet is decided as by ours, or by those who publish
// ports, whether what cannot be told of the rules that it meets holds or not.
func (x *shadows) either(p sim.Packet, alone sim.Verdict) bool {
	for _, sets := range x.assume() {
		trace := sim.WalkAll(sets, x.env, p)
		step, _ := trace.Deciding()
		switch {
		case p.Path == sim.In && publishes(trace, step):
			x.publish(trace, step)
		case trace.Verdict != alone && (trace.Kind == sim.Unknown || !x.theirs(trace.Verdict, alone)):
			return false
		}
	}
	return true
}

// escapes reports whether it is decided otherwise in both cases.
func (x *shadows) escapes(p sim.Packet, alone sim.Verdict) bool {
	for _, sets := range x.assume() {
		if v := sim.DecideAll(sets, x.env, p); v == alone || v.Kind == sim.Unknown {
			return false
		}
	}
	return true
}

// publishes reports whether a rule answers for a published port: Docker's, that of
// CNI's portmap, of podman's netavark, of kube-proxy. A rule on the way names the port:
// what sends on all connections publishes nothing, whatever its chain is called.
func publishes(t sim.Trace, s sim.Step) bool {
	a, ok := s.Rule.Action.(rules.Translate)
	named := slices.ContainsFunc(t.Steps, func(on sim.Step) bool {
		return on.Matched && on.Table == s.Table && on.Set == s.Set && slices.ContainsFunc(on.Rule.Matches, func(m rules.Match) bool {
			ports, is := m.(rules.DestinationPorts)
			return is && !ports.Not
		})
	})
	return ok && named && a.Target == "DNAT" && slices.ContainsFunc([]string{"DOCKER", "CNI-", "NETAVARK-", "KUBE-"}, func(p string) bool { return strings.HasPrefix(s.Chain, p) })
}

// proxys reports whether it is a port of the proxy's.
func (x *shadows) proxys(port uint16) bool {
	c := x.plan.Config
	return port == c.Inbound.Port || port == c.Outbound.Port || port == c.DNS.Port
}
