package exec

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// shadows finds rules of others that decide where ours would. Packets that could be
// decided otherwise are drawn from those rules themselves: for each of theirs that
// comes before ours, one that it matches.
type shadows struct {
	*looker
	family rules.Family
	plan   *tproxy.Plan
	sets   []rules.Set // of everybody, those of the family
	ours   rules.Set
	env    sim.Env
	alone  rules.Set
	work   int // how many rules may yet be walked through
	seen   map[string]bool
	cut    bool
}

// The most that it costs: of 20,000 rules of others, some 200 packets.
const (
	shadowWork  = 4 << 20
	mostShadows = 8 // that are named, of a family
)

func (x *shadows) find() {
	x.work, x.seen = shadowWork, make(map[string]bool)
	for i, s := range x.sets {
		// Filters are looked at by themselves.
		x.sets[i] = without(s, rules.Filter, rules.Security)
	}
	x.alone = x.ours
	for _, b := range x.bases() {
		x.try(b)
		for _, s := range x.sets {
			x.drawn(b, s)
		}
	}
	if x.cut {
		x.cannot("there are too many %s rules of others in front of ours to look at all of them", x.family)
	}
}

func without(s rules.Set, tables ...rules.Table) rules.Set {
	s.Bases = slices.DeleteFunc(slices.Clone(s.Bases), func(c rules.BaseChain) bool { return slices.Contains(tables, c.Table) })
	s.Chains = slices.DeleteFunc(slices.Clone(s.Chains), func(c rules.Chain) bool { return slices.Contains(tables, c.Table) })
	return s
}

// bases are the packets that the rest is drawn from: a connection from another host,
// one of a process here, and a query.
func (x *shadows) bases() []sim.Packet {
	far, near := somewhere[x.family], here[x.family]
	way, err := x.m.routeTo(far)
	if err == nil && way.Source.IsValid() {
		near = way.Source
	}
	x.env = sim.EnvOf(near)
	local, err := x.m.localAddresses()
	if err == nil {
		x.env.Local = append(x.env.Local, local2hosts(local)...)
	}
	from, to := netip.AddrPortFrom(far, 40000), netip.AddrPortFrom(near, strangePort)
	out := []sim.Packet{
		{Path: sim.In, Protocol: rules.TCP, Source: from, Destination: to, InInterface: way.Interface},
		{Path: sim.Out, Protocol: rules.TCP, Source: netip.AddrPortFrom(near, 40000), Destination: netip.AddrPortFrom(far, strangePort), OutInterface: way.Interface, UID: stranger, GID: stranger},
	}
	if c := x.plan.Config; c.DNS.On() {
		server := far
		for _, a := range x.plan.Nameservers {
			if a.Is4() == far.Is4() {
				server = a
				break
			}
		}
		q := out[1]
		q.Protocol, q.Destination = rules.UDP, netip.AddrPortFrom(server, 53)
		if x.env.IsLocal(server) {
			q.OutInterface = "lo"
		}
		out = append(out, q)
	}
	// Ports and users that the configuration leaves alone: others must not send
	// them to the proxy either.
	ssh := out[0]
	ssh.Destination = netip.AddrPortFrom(near, tproxy.SSHPort)
	proxy := out[1]
	proxy.UID = x.plan.Config.ProxyUIDs[0]
	return append(out, ssh, proxy)
}

// local2hosts are addresses of interfaces without their networks.
func local2hosts(in []netip.Prefix) (out []netip.Prefix) {
	for _, p := range in {
		out = append(out, hostPrefix(p.Addr()))
	}
	return out
}

// drawn tries packets that rules of others match, of the hooks that a packet meets
// before ours decide.
func (x *shadows) drawn(base sim.Packet, s rules.Set) {
	hook := rules.Output
	if base.Path == sim.In {
		hook = rules.Prerouting
	}
	for _, c := range s.Bases {
		if c.Hook != hook {
			continue
		}
		ours, _ := x.ours.Base(c.Table, c.Hook)
		for _, r := range c.Rules {
			if c.Table == rules.NAT && slices.ContainsFunc(ours.Rules, r.Equal) && r.Target() != "" && meets(base, r) {
				break // what stands behind does not see what ours decide
			}
			x.rule(base, s, c.Table, r, 0)
		}
	}
}

// meets reports whether the jump of ours is about the packet's protocol.
func meets(p sim.Packet, r rules.Rule) bool {
	return slices.Contains(r.Matches, rules.Match(p.Protocol))
}

// deepest is how far jumps are followed.
const deepest = 16

func (x *shadows) rule(base sim.Packet, s rules.Set, t rules.Table, r rules.Rule, depth int) {
	if x.cut || depth > deepest {
		return
	}
	p, ok := matching(base, r, x.env)
	if !ok {
		return
	}
	if target := r.Target(); target != "" {
		if _, ours := x.ours.Chain(t, target); ours {
			return
		}
		c, _ := s.Chain(t, target)
		for _, r := range c.Rules {
			x.rule(p, s, t, r, depth+1)
		}
		return
	}
	x.try(p)
}

// try walks a packet through everybody's rules, and through ours alone.
func (x *shadows) try(p sim.Packet) {
	text := p.String()
	if x.seen[text] {
		return
	}
	x.seen[text] = true
	if x.work <= 0 {
		x.cut = true
		return
	}
	trace := sim.WalkAll(x.sets, x.env, p)
	x.work -= len(trace.Steps) + 1
	alone := sim.Decide(x.alone, x.env, p)
	switch {
	case trace.Kind == sim.Unknown && alone.Kind != sim.Unknown:
		x.cannot("%s: %s", text, trace.Reason)
		return
	case trace.Verdict == alone:
		return
	case alone.Kind == sim.Untouched && !(trace.Kind == sim.Redirected && x.proxys(trace.Port)):
		return // what ours leave alone is others' to decide
	}
	step, _ := trace.Deciding()
	if p.Path == sim.In && trace.Elsewhere && strings.HasPrefix(step.Chain, "DOCKER") {
		note := fmt.Sprintf("a port that Docker published answers as before: %s sends it on", trace.Route(step))
		if !slices.Contains(x.Notes, note) {
			x.Notes = append(x.Notes, note)
		}
		return
	}
	n := 0
	for _, d := range x.Drift {
		if d.Kind == tproxy.DriftShadowed && d.Family == x.family {
			n++
		}
	}
	if n >= mostShadows {
		return
	}
	rule := step.Rule
	rule.Why = ""
	x.drift(tproxy.Drift{Kind: tproxy.DriftShadowed, Family: x.family, Table: step.Table, Chain: step.Chain, Index: step.Index, Is: rule.String(),
		Why: fmt.Sprintf("%s: %s, and by ours alone %s", text, trace.Verdict, alone)})
}

// proxys reports whether it is a port of the proxy's.
func (x *shadows) proxys(port uint16) bool {
	c := x.plan.Config
	return port == c.Inbound.Port || port == c.Outbound.Port || port == c.DNS.Port
}

// matching is the packet, changed so that the rule's matches hold, as far as that is
// up to the packet; ok is false where it cannot be without being another kind of packet.
func matching(p sim.Packet, r rules.Rule, env sim.Env) (_ sim.Packet, ok bool) {
	for _, m := range r.Matches {
		switch m := m.(type) {
		case rules.Protocol:
			if m != p.Protocol {
				return p, false
			}
		case rules.Source:
			a, ok := addressIn(p.Source.Addr(), m.Prefixes, m.Not, func(netip.Addr) bool { return true })
			if !ok {
				return p, false
			}
			p.Source = netip.AddrPortFrom(a, p.Source.Port())
		case rules.Destination:
			fits := func(netip.Addr) bool { return true }
			if p.Path == sim.In {
				fits = env.IsLocal
			}
			a, ok := addressIn(p.Destination.Addr(), m.Prefixes, m.Not, fits)
			if !ok {
				return p, false
			}
			p.Destination = netip.AddrPortFrom(a, p.Destination.Port())
		case rules.SourcePorts:
			p.Source = netip.AddrPortFrom(p.Source.Addr(), portIn(p.Source.Port(), m.Ports, m.Not))
		case rules.DestinationPorts:
			p.Destination = netip.AddrPortFrom(p.Destination.Addr(), portIn(p.Destination.Port(), m.Ports, m.Not))
		case rules.OwnerUID:
			p.UID = idIn(p.UID, m.UIDs, m.Not)
		case rules.OwnerGID:
			p.GID = idIn(p.GID, m.GIDs, m.Not)
		case rules.InInterface:
			if p.Path != sim.In {
				return p, false
			}
			if !m.Not {
				p.InInterface = interfaceLike(m.Name)
			}
			if p.InInterface == "lo" {
				return p, false
			}
		case rules.OutInterface:
			if p.Path != sim.Out {
				return p, false
			}
			if !m.Not && !env.IsLocal(p.Destination.Addr()) {
				p.OutInterface = interfaceLike(m.Name)
			}
			if p.OutInterface == "lo" && !env.IsLocal(p.Destination.Addr()) {
				return p, false
			}
		}
	}
	return p, true
}

// addressIn is an address that the prefixes hold, or do not hold; the packet's own
// where that will do.
func addressIn(own netip.Addr, prefixes []netip.Prefix, not bool, fits func(netip.Addr) bool) (netip.Addr, bool) {
	held := slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(own) })
	if held != not {
		return own, true
	}
	if not {
		return own, false
	}
	for _, p := range prefixes {
		if a := p.Addr(); a.Is4() == own.Is4() {
			if p.Bits() < a.BitLen() && !fits(a) {
				a = a.Next() // the first one of a network is its own
			}
			if fits(a) {
				return a, true
			}
		}
	}
	return own, false
}

func portIn(own uint16, ports rules.Ports, not bool) uint16 {
	if not {
		return own
	}
	if r := ports.Ranges(); len(r) > 0 && !ports.Contains(own) {
		return r[0].First
	}
	return own
}

func idIn(own uint32, ids rules.UIDs, not bool) uint32 {
	if r := ids.Ranges(); !not && len(r) > 0 && !ids.Contains(own) {
		return r[0].First
	}
	return own
}

// interfaceLike is a name that matches, where a + stands for the rest.
func interfaceLike(name string) string {
	if prefix, ok := strings.CutSuffix(name, "+"); ok {
		return prefix + "0"
	}
	return name
}
