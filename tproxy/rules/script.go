package rules

import (
	"fmt"
	"slices"
	"strconv"
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
				r.At = i + 1
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
		if _, ok := want.Base(t, l.Hook); l.Table == t && !ok {
			b = appendJumps(b, ours, want, l, BaseChain{Table: t, Hook: l.Hook})
		}
	}
	for _, w := range want.Bases {
		if w.Table == t {
			l, _ := ours.Base(t, w.Hook)
			b = appendJumps(b, ours, want, l, w)
		}
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

// appendJumps appends the lines that turn our rules of a base chain into the
// wanted ones. A rule that is right stays; one that takes another's place is
// inserted where that one stands, and one that was there before (see Rule.At)
// where it stood, so that others' rules keep their place in front of ours and
// behind.
func appendJumps(b []byte, ours, want Set, live, w BaseChain) []byte {
	hook := string(w.Hook)
	inserts, gone, ok := moves(live.Rules, w)
	if !ok {
		// No such moves give the wanted order: all are deleted, and made anew.
		for i := range live.Rules {
			b = ours.appendLine(b, "-D ", hook, &live.Rules[i])
		}
		inserts, gone = nil, nil
		for i, r := range w.Rules {
			inserts = append(inserts, insert{r, i + 1})
		}
		if w.Place == Last {
			for i := range inserts {
				inserts[i].at = 0
			}
		}
	}
	for _, in := range inserts {
		if in.at == 0 {
			b = want.appendLine(b, "-A ", hook, &in.rule)
		} else {
			b = want.appendLine(b, "-I ", hook+" "+strconv.Itoa(in.at), &in.rule)
		}
	}
	for i := range gone {
		b = ours.appendLine(b, "-D ", hook, &gone[i])
	}
	return b
}

// insert is a rule that goes in at a place, counted from 1 when its turn has
// come; 0 is the end.
type insert struct {
	rule Rule
	at   int
}

// moves finds the rules to insert and those to delete afterwards. ok is false
// where the outcome would not be in the wanted order.
func moves(live []Rule, w BaseChain) (inserts []insert, gone []Rule, ok bool) {
	type place struct {
		rule Rule
		at   int
		gone bool
	}
	var now []place // in the order of the chain
	spare := count(w.Rules)
	for i, r := range live {
		at := r.At
		if at == 0 {
			at = i + 1
		}
		stays := spare.take(r)
		if !stays {
			// -D deletes the first rule that is equal: it must not be one that
			// stays.
			if slices.ContainsFunc(now, func(p place) bool { return !p.gone && p.rule.Equal(r) }) {
				return nil, nil, false
			}
			gone = append(gone, r)
		}
		now = append(now, place{r, at, !stays})
	}
	there := count(live)
	for i, r := range w.Rules {
		if there.take(r) {
			continue
		}
		at := r.At
		if j := slices.IndexFunc(now, func(p place) bool { return p.gone && p.rule.Target() == r.Target() }); j >= 0 && at == 0 {
			at = now[j].at
		}
		if j := slices.IndexFunc(now, func(p place) bool { return i+1 < len(w.Rules) && p.rule.Equal(w.Rules[i+1]) }); j >= 0 && at == 0 {
			at = now[j].at
		}
		if j := slices.IndexFunc(now, func(p place) bool { return i > 0 && p.rule.Equal(w.Rules[i-1]) }); j >= 0 && at == 0 {
			at = now[j].at + 1
		}
		if at == 0 && w.Place == First {
			at = 1
		}
		inserts = append(inserts, insert{r, at})
		for j := range now {
			if at > 0 && now[j].at >= at {
				now[j].at++
			}
		}
		if at == 0 {
			at = 1<<31 - 1
		}
		now = append(now, place{r, at, false})
		slices.SortStableFunc(now, func(a, b place) int { return a.at - b.at })
	}
	var after []Rule
	for _, p := range now {
		if !p.gone {
			after = append(after, p.rule)
		}
	}
	return inserts, gone, slices.EqualFunc(after, w.Rules, Rule.Equal)
}
