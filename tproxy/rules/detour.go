package rules

import (
	"cmp"
	"slices"
	"strings"
)

// Detour is a chain of others behind a base chain in which a rule of ours may stand for
// one in the base chain: with FirewallBackend=iptables, firewalld puts the direct rules
// of OUTPUT into OUTPUT_direct, to which OUTPUT jumps (build_default_rules in
// firewall/core/ipXtables.py). The chain itself is never ours.
type Detour struct {
	Table Table
	Hook  Hook
	Chain string
	// At is where the base chain jumps there without a condition, the first time, from
	// 1; 0 is that it does not.
	At int
	// Rules is how many stand there.
	Rules int
}

// detourSuffix is what firewalld puts behind the name of a built-in chain.
const detourSuffix = "_direct"

// detour finds the one of a base chain.
func (s Set) detour(c BaseChain) (d Detour, list []Rule, ok bool) {
	d = Detour{Table: c.Table, Hook: c.Hook, Chain: string(c.Hook) + detourSuffix}
	chain, ok := s.Chain(c.Table, d.Chain)
	d.Rules = len(chain.Rules)
	d.At = 1 + slices.IndexFunc(c.Rules, func(r Rule) bool {
		return len(r.Matches) == 0 && r.Action == Action(Jump{d.Chain})
	})
	return d, chain.Rules, ok
}

// isDetour reports whether a chain of the Set is the detour of a base chain of it.
func (s Set) isDetour(c Chain) bool {
	hook, ok := strings.CutSuffix(c.Name, detourSuffix)
	if ok {
		_, ok = s.Base(c.Table, Hook(hook))
	}
	return ok
}

// Inline returns the rules of a base chain, each with its At, and those of its Detour in
// the place of the jump that leads there, with their Via. Behind them stand those of a
// detour to which no such jump leads, Unmet.
func (s Set) Inline(c BaseChain) (out []Rule) {
	d, list, ok := s.detour(c)
	out = make([]Rule, 0, len(c.Rules)+len(list))
	via := func() {
		for i, r := range list {
			r.At, r.Via, r.Unmet = i+1, d.Chain, d.At == 0
			out = append(out, r)
		}
	}
	for i, r := range c.Rules {
		if ok && i+1 == d.At {
			via()
			continue
		}
		r.At = i + 1
		out = append(out, r)
	}
	if ok && d.At == 0 {
		via()
	}
	return out
}

// Covers reports whether a rule, the i-th from 1 of a base chain or a chain of what Ours
// was asked about, is in the Set that Ours returned.
func (s Set) Covers(t Table, chain string, i int) bool {
	if _, ok := s.Chain(t, chain); ok {
		return true
	}
	return slices.ContainsFunc(s.Bases, func(c BaseChain) bool {
		return c.Table == t && slices.ContainsFunc(c.Rules, func(r Rule) bool {
			return r.At == i && cmp.Or(r.Via, string(c.Hook)) == chain
		})
	})
}

// settle takes for the rules of a wanted Set, as forCompare returned it, that stood in a
// detour the base chain, where there is no such detour now, and takes those out that
// were Unmet in one: they did nothing, and where they stood is gone, or is met now.
func (s Set) settle(now []Detour) Set {
	for i := range s.Bases {
		c := &s.Bases[i]
		d := detourOf(now, c.Table, c.Hook)
		c.Rules = slices.DeleteFunc(c.Rules, func(r Rule) bool {
			return r.Unmet && (r.Via != d.Chain || d.At > 0)
		})
		for j := range c.Rules {
			if r := &c.Rules[j]; r.Via != "" && !r.Unmet && (r.Via != d.Chain || d.At == 0 || r.At == 0) {
				r.At, r.Via = 0, ""
			}
		}
	}
	return s
}

func detourOf(list []Detour, t Table, h Hook) Detour {
	i := slices.IndexFunc(list, func(d Detour) bool { return d.Table == t && d.Hook == h })
	if i < 0 {
		return Detour{Table: t, Hook: h}
	}
	return list[i]
}

// parted are the rules that packets meet, and those that are Unmet.
func parted(list []Rule) (met, unmet []Rule) {
	if !slices.ContainsFunc(list, func(r Rule) bool { return r.Unmet }) {
		return list, nil
	}
	for _, r := range list {
		if r.Unmet {
			unmet = append(unmet, r)
		} else {
			met = append(met, r)
		}
	}
	return met, unmet
}

// kept says which of the rules stay where want is wanted. Of several that are equal
// those in a detour do: whoever put them there counts on them.
func kept(live, want []Rule) []bool {
	stays := make([]bool, len(live))
	spare := count(want)
	for _, detour := range []bool{true, false} {
		for i, r := range live {
			if (r.Via != "") == detour {
				stays[i] = spare.take(r)
			}
		}
	}
	return stays
}
