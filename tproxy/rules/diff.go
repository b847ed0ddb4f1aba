package rules

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// Equal reports whether two rules are the same rule: matches, action and Why.
// At, Via and Counter do not count, nor does Record, which the kernel does not keep.
func (r Rule) Equal(q Rule) bool {
	return r.Why == q.Why && r.Action == q.Action && slices.EqualFunc(r.Matches, q.Matches, sameMatch)
}

func sameMatch(a, b Match) bool {
	switch a := a.(type) {
	case Source:
		b, ok := b.(Source)
		return ok && a.Not == b.Not && samePrefixes(a.Prefixes, b.Prefixes)
	case Destination:
		b, ok := b.(Destination)
		return ok && a.Not == b.Not && samePrefixes(a.Prefixes, b.Prefixes)
	case SourcePorts:
		b, ok := b.(SourcePorts)
		return ok && a.Not == b.Not && a.Ports.Equal(b.Ports)
	case DestinationPorts:
		b, ok := b.(DestinationPorts)
		return ok && a.Not == b.Not && a.Ports.Equal(b.Ports)
	case OwnerUID:
		b, ok := b.(OwnerUID)
		return ok && a.Not == b.Not && a.UIDs.Equal(b.UIDs)
	case OwnerGID:
		b, ok := b.(OwnerGID)
		return ok && a.Not == b.Not && a.GIDs.Equal(b.GIDs)
	}
	return a == b // the rest are comparable
}

func samePrefixes(a, b []netip.Prefix) bool { return slices.Equal(a, b) }

// ChangeKind says in which way a live rule set departs from the wanted one.
type ChangeKind uint8

// The kinds of change.
const (
	MissingChain ChangeKind = iota + 1 // wanted, not there
	ExtraChain                         // there, not wanted
	MissingRule                        // wanted, not there
	ExtraRule                          // there, not wanted, or there once too often
	Misordered                         // the same rules in another order
)

func (k ChangeKind) String() string {
	switch k {
	case MissingChain:
		return "missing chain"
	case ExtraChain:
		return "extra chain"
	case MissingRule:
		return "missing rule"
	case ExtraRule:
		return "extra rule"
	case Misordered:
		return "other order"
	}
	return fmt.Sprintf("ChangeKind(%d)", uint8(k))
}

// Change is one departure of the live rules from the wanted ones.
type Change struct {
	Kind   ChangeKind
	Family Family
	Table  Table
	Chain  string // a chain's or a hook's name
	Index  int    // of the rule in its chain, from 1, in the live rules for ExtraRule and Misordered, else in the wanted ones; 0 for a chain
	Rule   Rule
}

// String writes the change as a line of a diff.
func (c Change) String() string {
	sign := "-"
	if c.Kind == ExtraChain || c.Kind == ExtraRule {
		sign = "+"
	}
	if c.Index == 0 {
		return fmt.Sprintf("%s %s %s %s (%s)", sign, c.Family, c.Table, c.Chain, c.Kind)
	}
	if c.Kind == Misordered {
		sign = "~"
	}
	return fmt.Sprintf("%s %s %s %s #%d %s (%s)", sign, c.Family, c.Table, cmp.Or(c.Rule.Via, c.Chain), c.Index, c.Rule, c.Kind)
}

// Compare lists how live departs from want in family f, both lowered first; nil
// when they are the same. Of base chains only the rules count, not the place
// among others', and one in a Detour that is met is as good as in the base chain.
// live must hold nothing foreign (see Ours).
func Compare(f Family, live, want Set) []Change {
	live = live.forCompare(f)
	want = want.forCompare(f).settle(live.Detours)
	var out []Change
	for _, w := range want.Bases {
		l, _ := live.Base(w.Table, w.Hook)
		out = compareBases(out, f, BaseChain{Table: w.Table, Hook: w.Hook, Rules: l.Rules}, w)
	}
	for _, l := range live.Bases {
		if _, ok := want.Base(l.Table, l.Hook); !ok {
			out = compareBases(out, f, l, BaseChain{})
		}
	}
	for _, w := range want.Chains {
		l, ok := live.Chain(w.Table, w.Name)
		if !ok {
			out = append(out, Change{Kind: MissingChain, Family: f, Table: w.Table, Chain: w.Name})
		}
		out = compareRules(out, f, w.Table, w.Name, l.Rules, w.Rules)
	}
	for _, l := range live.Chains {
		if _, ok := want.Chain(l.Table, l.Name); !ok {
			out = append(out, Change{Kind: ExtraChain, Family: f, Table: l.Table, Chain: l.Name})
			out = compareRules(out, f, l.Table, l.Name, l.Rules, nil)
		}
	}
	return out
}

func compareBases(out []Change, f Family, live, want BaseChain) []Change {
	met, unmet := parted(live.Rules)
	wanted, wantedUnmet := parted(want.Rules)
	out = compareRules(out, f, live.Table, string(live.Hook), met, wanted)
	// The order of rules that nothing meets is nothing.
	more := compareRules(nil, f, live.Table, string(live.Hook), unmet, wantedUnmet)
	return append(out, slices.DeleteFunc(more, func(c Change) bool { return c.Kind == Misordered })...)
}

func compareRules(out []Change, f Family, t Table, chain string, live, want []Rule) []Change {
	if slices.EqualFunc(live, want, Rule.Equal) {
		return out
	}
	change := func(k ChangeKind, i int, r Rule) {
		out = append(out, Change{Kind: k, Family: f, Table: t, Chain: chain, Index: i + 1, Rule: r})
	}
	start := len(out)
	spare := count(live)
	for i, r := range want {
		if !spare.take(r) {
			change(MissingRule, i, r)
		}
	}
	stays := kept(live, want)
	for i, r := range live {
		if !stays[i] {
			change(ExtraRule, i, r)
		}
	}
	if len(out) == start { // the same rules, so the order differs
		for i := range live {
			if !live[i].Equal(want[i]) {
				change(Misordered, i, live[i])
				break
			}
		}
	}
	return out
}

// bag counts rules by their canonical text.
type bag map[string]int

func count(rules []Rule) bag {
	b := make(bag, len(rules))
	for _, r := range rules {
		b[r.String()]++
	}
	return b
}

func (b bag) take(r Rule) bool {
	k := r.String()
	if b[k] == 0 {
		return false
	}
	b[k]--
	return true
}

// forCompare is the Set as the kernel would list it.
func (s Set) forCompare(f Family) Set {
	out := s.Lower(f)
	if s.NoComments {
		out.NoComments = false
		strip := func(rules []Rule) {
			for i := range rules {
				if !rules[i].Record {
					rules[i].Why = ""
				}
			}
		}
		for i := range out.Bases {
			strip(out.Bases[i].Rules)
		}
		for i := range out.Chains {
			strip(out.Chains[i].Rules)
		}
	}
	return out
}
