package rules

import (
	"fmt"
	"slices"
)

// Reference is a foreign rule that jumps to a chain of ours.
type Reference struct {
	Table Table
	Chain string // where the rule stands
	Index int    // from 1
	Rule  Rule
}

func (r Reference) String() string {
	return fmt.Sprintf("%s %s #%d: -A %s %s", r.Table, r.Chain, r.Index, r.Chain, r.Rule)
}

// Ours picks out of live, as ParseSave returned it, what belongs to the owner of
// the known Set: chains with exactly the table and name of a chain of known,
// and rules of base chains that are exactly a rule of known there, whatever
// their comment. Nothing is told by a word in a line. References are the
// foreign rules that jump to one of those chains: as long as they stand, the
// kernel does not let the chain go.
func (live Set) Ours(f Family, known Set) (ours Set, references []Reference) {
	known = known.Lower(f)
	ours.Only = f
	for _, c := range live.Bases {
		k, _ := known.Base(c.Table, c.Hook)
		mine := BaseChain{Table: c.Table, Hook: c.Hook, Place: k.Place}
		for i, r := range c.Rules {
			switch {
			case slices.ContainsFunc(k.Rules, func(q Rule) bool { q.Why = r.Why; return q.Equal(r) }):
				mine.Rules = append(mine.Rules, r)
			case r.Target() != "":
				if _, ok := known.Chain(c.Table, r.Target()); ok {
					references = append(references, Reference{c.Table, string(c.Hook), i + 1, r})
				}
			}
		}
		if len(mine.Rules) > 0 {
			ours.Bases = append(ours.Bases, mine)
		}
	}
	for _, c := range live.Chains {
		if _, ok := known.Chain(c.Table, c.Name); ok {
			ours.Chains = append(ours.Chains, c)
			continue
		}
		for i, r := range c.Rules {
			if t := r.Target(); t != "" {
				if _, ok := known.Chain(c.Table, t); ok {
					references = append(references, Reference{c.Table, c.Name, i + 1, r})
				}
			}
		}
	}
	return ours, references
}

// Transition returns the script for iptables-restore --noflush that turns ours,
// what Ours found in family f, into want, in one transaction a table; nil when
// there is nothing to do. Chains and jumps that are right already are left
// alone and keep their counters. A want without rules takes everything out.
//
// Tables go in with nat before raw and come out with raw before nat, so that no
// query stands in a conntrack zone that is not redirected.
func Transition(f Family, ours, want Set) []byte {
	ours, want = ours.forCompare(f), want.forCompare(f)
	if !want.Has(f) {
		want = Set{Only: f}
	}
	order := tableOrder
	if !want.uses(Raw) {
		order[0], order[1] = Raw, NAT
	}
	var b []byte
	for _, t := range order {
		b = appendTransition(b, t, ours, want)
	}
	if len(b) == 0 {
		return nil
	}
	return b
}

func (s Set) uses(t Table) bool {
	return slices.ContainsFunc(s.Chains, func(c Chain) bool { return c.Table == t })
}

func appendTransition(b []byte, t Table, ours, want Set) []byte {
	start := len(b)
	b = fmt.Appendf(b, "*%s\n", t)
	head := len(b)
	var refill []Chain
	for _, w := range want.Chains {
		if w.Table != t {
			continue
		}
		l, ok := ours.Chain(t, w.Name)
		if !ok || !slices.EqualFunc(l.Rules, w.Rules, Rule.Equal) {
			b = appendDeclaration(b, w.Name)
			refill = append(refill, w)
		}
	}
	var gone []string
	for _, l := range ours.Chains {
		if _, ok := want.Chain(t, l.Name); l.Table == t && !ok {
			b = appendDeclaration(b, l.Name) // emptied first: chains may jump to each other
			gone = append(gone, l.Name)
		}
	}
	for _, l := range ours.Bases {
		if l.Table != t {
			continue
		}
		w, _ := want.Base(t, l.Hook)
		spare := count(w.Rules)
		for _, r := range l.Rules {
			if !spare.take(r) {
				b = ours.appendLine(b, "-D ", string(l.Hook), &r)
			}
		}
	}
	for _, w := range want.Bases {
		if w.Table != t {
			continue
		}
		l, _ := ours.Base(t, w.Hook)
		there := count(l.Rules)
		w.Rules = slices.DeleteFunc(slices.Clone(w.Rules), there.take)
		b = want.appendBase(b, w, w.Rules)
	}
	for _, c := range refill {
		for i := range c.Rules {
			b = want.appendLine(b, "-A ", c.Name, &c.Rules[i])
		}
	}
	for _, name := range gone {
		b = append(append(append(b, "-X "...), name...), '\n')
	}
	if len(b) == head {
		return b[:start]
	}
	return append(b, "COMMIT\n"...)
}
