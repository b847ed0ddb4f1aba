package rules

import (
	"net/netip"
	"slices"
)

// Lower returns the Set as iptables holds it in family f: every rule is one
// line, so a rule with several prefixes, ranges of owners, or more ports than
// one multiport match takes becomes several rules. What ParseSave returns is
// lowered already, and lowering it again changes nothing.
func (s Set) Lower(f Family) Set {
	out := Set{Only: f, NoComments: s.NoComments, Detours: s.Detours}
	if s.Only != 0 && s.Only != f {
		return out
	}
	out.Bases = make([]BaseChain, len(s.Bases))
	for i, c := range s.Bases {
		c.Rules = lower(c.Rules, f)
		out.Bases[i] = c
	}
	out.Chains = make([]Chain, len(s.Chains))
	for i, c := range s.Chains {
		c.Rules = lower(c.Rules, f)
		out.Chains[i] = c
	}
	return out
}

func lower(rules []Rule, f Family) []Rule {
	out := make([]Rule, 0, len(rules))
	for i := range rules {
		out = rules[i].lower(out, f)
	}
	return out
}

// lower appends the lines of r in family f.
func (r *Rule) lower(out []Rule, f Family) []Rule {
	for i, m := range r.Matches {
		choices, plain := alternatives(m, f)
		if plain {
			continue
		}
		out = slices.Grow(out, len(choices))
		// The first match that is no single line is replaced by each of its
		// alternatives; what follows it is lowered by the recursion.
		for _, c := range choices {
			line := *r
			line.Matches = slices.Clone(r.Matches)
			if c == nil {
				line.Matches = slices.Delete(line.Matches, i, i+1)
			} else {
				line.Matches[i] = c
			}
			out = line.lower(out, f)
		}
		return out
	}
	line := *r
	if a, ok := r.Action.(Reject); ok && a.With == "" {
		// As it is listed.
		switch f {
		case IPv4:
			line.Action = Reject{"icmp-port-unreachable"}
		case IPv6:
			line.Action = Reject{"icmp6-port-unreachable"}
		}
	}
	return append(out, line)
}

// alternatives returns plain if the match is one line in family f as it is,
// and otherwise what stands for it: one match for each line, or nil for a line
// without the match.
func alternatives(m Match, f Family) (choices []Match, plain bool) {
	switch m := m.(type) {
	case Source:
		return addresses(m.Prefixes, m.Not, f, func(p []netip.Prefix) Match { return Source{p, m.Not} })
	case Destination:
		return addresses(m.Prefixes, m.Not, f, func(p []netip.Prefix) Match { return Destination{p, m.Not} })
	case InInterface:
		if m.Name == "+" && !m.Not {
			return []Match{nil}, false // every interface, and not listed
		}
	case OutInterface:
		if m.Name == "+" && !m.Not {
			return []Match{nil}, false
		}
	case SourcePorts:
		if m.Ports.slots() <= maxSlots {
			return nil, true
		}
		for p := range m.Ports.packs() {
			choices = append(choices, SourcePorts{Ports: p})
		}
		return choices, false
	case DestinationPorts:
		if m.Ports.slots() <= maxSlots {
			return nil, true
		}
		for p := range m.Ports.packs() {
			choices = append(choices, DestinationPorts{Ports: p})
		}
		return choices, false
	case OwnerUID:
		if len(m.UIDs.s) <= 1 {
			return nil, true
		}
		choices = make([]Match, 0, len(m.UIDs.s))
		for i := range m.UIDs.s {
			choices = append(choices, OwnerUID{UIDs: UIDs{m.UIDs.s[i : i+1]}})
		}
		return choices, false
	case OwnerGID:
		if len(m.GIDs.s) <= 1 {
			return nil, true
		}
		choices = make([]Match, 0, len(m.GIDs.s))
		for i := range m.GIDs.s {
			choices = append(choices, OwnerGID{GIDs: UIDs{m.GIDs.s[i : i+1]}})
		}
		return choices, false
	}
	return nil, true
}

func addresses(ps []netip.Prefix, not bool, f Family, one func([]netip.Prefix) Match) (choices []Match, plain bool) {
	if len(ps) == 1 && f.holds(ps[0].Addr()) && (not || f == 0 || ps[0].Bits() > 0) {
		return nil, true
	}
	choices = make([]Match, 0, len(ps))
	for i, p := range ps {
		switch {
		case !f.holds(p.Addr()):
		case p.Bits() == 0 && !not && f != 0:
			choices = append(choices, nil) // every packet of f, and not listed
		default:
			choices = append(choices, one(ps[i:i+1]))
		}
	}
	if not && len(choices) == 0 {
		choices = []Match{nil} // nothing of f is excepted: every packet
	}
	return choices, false
}
