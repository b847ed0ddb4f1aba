package rules

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
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
// their comment, or that stand in a Detour of the base chain, in the order in which
// packets meet them. Nothing is told by a word in a line. References are the
// foreign rules that jump to one of those chains: as long as they stand, the
// kernel does not let the chain go.
func (live Set) Ours(f Family, known Set) (ours Set, references []Reference) {
	known = known.Lower(f)
	ours.Only = f
	for _, c := range live.Bases {
		k, _ := known.Base(c.Table, c.Hook)
		mine := BaseChain{Table: c.Table, Hook: c.Hook, Place: k.Place}
		if d, _, ok := live.detour(c); ok {
			ours.Detours = append(ours.Detours, d)
		}
		for _, r := range live.Inline(c) {
			switch {
			case slices.ContainsFunc(k.Rules, func(q Rule) bool { q.Why = r.Why; return q.Equal(r) }):
				mine.Rules = append(mine.Rules, r)
			case r.Target() != "":
				if _, ok := known.Chain(c.Table, r.Target()); ok {
					references = append(references, Reference{c.Table, cmp.Or(r.Via, string(c.Hook)), r.At, r})
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
		if live.isDetour(c) {
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
// alone and keep their counters, also a jump that stands in a Detour; new ones go into
// the base chain, as others count the rules of theirs. A want without rules takes
// everything out.
//
// Tables go in with nat before raw and come out with raw before nat, so that no
// query stands in a conntrack zone that is not redirected.
func Transition(f Family, ours, want Set) []byte {
	ours = ours.forCompare(f)
	want = want.forCompare(f).settle(ours.Detours)
	if !want.Has(f) {
		want = Set{Only: f}
	}
	order := tableOrder
	if !want.uses(Raw) {
		order[0], order[1] = Raw, NAT
	}
	var b []byte
	for _, t := range order {
		b = appendTransition(b, f, t, ours, want)
	}
	if len(b) == 0 {
		return nil
	}
	return b
}

func (s Set) uses(t Table) bool {
	return slices.ContainsFunc(s.Chains, func(c Chain) bool { return c.Table == t })
}

func appendTransition(b []byte, f Family, t Table, ours, want Set) []byte {
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
			b = appendEdits(b, f, edits(l.Rules, BaseChain{Table: t, Hook: l.Hook}, ours.Detours), l.Hook)
		}
	}
	for _, w := range want.Bases {
		if w.Table == t {
			l, _ := ours.Base(t, w.Hook)
			b = appendEdits(b, f, edits(l.Rules, w, ours.Detours), w.Hook)
		}
	}
	for _, c := range refill {
		for i := range c.Rules {
			b = c.Rules[i].appendListed(b, f, "-A ", c.Name)
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

// After returns what live becomes by the script of Transition; of ours the At and the
// Detours count.
func After(f Family, live, ours, want Set) Set {
	ours = ours.forCompare(f)
	want = want.forCompare(f).settle(ours.Detours)
	out := Set{Only: f}
	for _, c := range live.Bases {
		l, _ := ours.Base(c.Table, c.Hook)
		w, ok := want.Base(c.Table, c.Hook)
		if !ok {
			w = BaseChain{Table: c.Table, Hook: c.Hook}
		}
		c.Rules = edited(c.Rules, edits(l.Rules, w, ours.Detours), "")
		out.Bases = append(out.Bases, c)
	}
	for _, w := range want.Bases {
		if _, ok := live.Base(w.Table, w.Hook); !ok {
			out.Bases = append(out.Bases, w)
		}
	}
	for _, c := range live.Chains {
		if _, gone := ours.Chain(c.Table, c.Name); gone {
			continue
		}
		if live.isDetour(c) {
			hook := Hook(strings.TrimSuffix(c.Name, detourSuffix))
			l, _ := ours.Base(c.Table, hook)
			w, _ := want.Base(c.Table, hook)
			w.Table, w.Hook = c.Table, hook
			c.Rules = edited(c.Rules, edits(l.Rules, w, ours.Detours), c.Name)
		}
		out.Chains = append(out.Chains, c)
	}
	out.Chains = append(out.Chains, want.Chains...)
	return out
}

// edit is a line of a script that changes a base chain, or the rule's Via.
type edit struct {
	rule Rule
	// at is where the rule goes in, counted from 1 when its turn has come; 0 is the
	// end, and gone says that it is deleted instead.
	at   int
	gone bool
}

func appendEdits(b []byte, f Family, es []edit, h Hook) []byte {
	for _, e := range es {
		chain := cmp.Or(e.rule.Via, string(h))
		switch {
		case e.gone:
			b = e.rule.appendListed(b, f, "-D ", chain)
		case e.at == 0:
			b = e.rule.appendListed(b, f, "-A ", chain)
		default:
			b = e.rule.appendListed(b, f, "-I ", chain+" "+strconv.Itoa(e.at))
		}
	}
	return b
}

// appendListed appends a line with the rule as it was listed, where it still says
// the same: what others made has its matches in another order than ours, and may
// hold what this package has no type for.
func (r *Rule) appendListed(b []byte, f Family, verb, chain string) []byte {
	if r.listed != "" && strings.IndexByte(r.listed, '\n') < 0 {
		if _, q, err := ParseRule(f, "-A x "+r.listed); err == nil && q.Equal(*r) {
			b = append(append(b, verb...), chain...)
			return append(append(append(b, ' '), r.listed...), '\n')
		}
	}
	return Set{}.appendLine(b, verb, chain, r)
}

// edited carries out the edits of a base chain, or those of a detour.
func edited(list []Rule, es []edit, via string) []Rule {
	list = slices.Clone(list)
	for _, e := range es {
		if e.rule.Via != via {
			continue
		}
		switch i := slices.IndexFunc(list, e.rule.Equal); {
		case e.gone && i >= 0:
			list = slices.Delete(list, i, i+1)
		case e.gone:
		case e.at == 0 || e.at > len(list):
			list = append(list, e.rule)
		default:
			list = slices.Insert(list, e.at-1, e.rule)
		}
	}
	return list
}

// edits turns our rules of a base chain into the wanted ones. A rule that is right
// stays; one that takes another's place is inserted where that one stands, and one
// that was there before (see Rule.At) where it stood, so that others' rules keep
// their place in front of ours and behind.
func edits(live []Rule, w BaseChain, now []Detour) []edit {
	d := detourOf(now, w.Table, w.Hook)
	live, unmet := parted(live)
	wanted, wantedUnmet := parted(w.Rules)
	w.Rules = wanted
	es, ok := moves(live, w, d)
	if !ok {
		// No such moves give the wanted order: all are deleted, and made anew.
		es = es[:0]
		for _, r := range live {
			es = append(es, edit{rule: r, gone: true})
		}
		for i, r := range w.Rules {
			at := i + 1
			if w.Place == Last {
				at = 0
			}
			r.Via = ""
			es = append(es, edit{rule: r, at: at})
		}
	}
	var via, own []edit
	for _, e := range es {
		if e.rule.Via != "" {
			via = append(via, e)
		} else {
			own = append(own, e)
		}
	}
	return slices.Concat(unmetEdits(unmet, wantedUnmet, d), via, headFirst(own))
}

// unmetEdits takes out rules that do nothing where they stand, or puts them back.
func unmetEdits(live, want []Rule, d Detour) (es []edit) {
	there := count(live)
	for _, r := range want {
		if !there.take(r) {
			es = append(es, edit{rule: r, at: min(r.At, d.Rules+1+len(es))})
		}
	}
	for i, stays := range kept(live, want) {
		if !stays {
			es = append(es, edit{rule: live[i], gone: true})
		}
	}
	return es
}

// headFirst writes rules that go in at the places 1, 2 and so on as one behind the
// other at the first, the last of them first. iptables-nft turns any other place into
// the rule that it saw there, and fails when somebody has deleted that one meanwhile.
func headFirst(es []edit) []edit {
	from := slices.IndexFunc(es, func(e edit) bool { return !e.gone })
	if from < 0 {
		return es
	}
	n := 0
	for from+n < len(es) && !es[from+n].gone && es[from+n].at == n+1 {
		n++
	}
	for i := range n {
		es[from+i].at = 1
	}
	slices.Reverse(es[from : from+n])
	return es
}

// spot is a rule of ours in a chain, and where.
type spot struct {
	rule Rule
	at   int
	gone bool
}

// moves finds the rules to insert and those to delete afterwards. ok is false
// where the outcome would not be in the wanted order.
func moves(live []Rule, w BaseChain, d Detour) (es []edit, ok bool) {
	var now []spot // in the order in which packets meet them
	var gone []edit
	stays := kept(live, w.Rules)
	for i, r := range live {
		at := r.At
		if at == 0 {
			at = i + 1
		}
		if !stays[i] {
			// -D deletes the first rule that is equal: it must not be one that
			// stays.
			if slices.ContainsFunc(now, func(p spot) bool { return !p.gone && p.rule.Via == r.Via && p.rule.Equal(r) }) {
				return nil, false
			}
			gone = append(gone, edit{rule: r, gone: true})
		}
		now = append(now, spot{r, at, !stays[i]})
	}
	there := count(live)
	for i, r := range w.Rules {
		if there.take(r) {
			continue
		}
		at := placeOf(now, w, i, d)
		es = append(es, edit{rule: r, at: at})
		for j := range now {
			if at > 0 && now[j].rule.Via == r.Via && now[j].at >= at {
				now[j].at++
			}
		}
		switch {
		case r.Via != "":
			d.Rules++
		case at > 0 && d.At >= at:
			d.At++
		}
		if at == 0 {
			at = 1<<31 - 1
		}
		now = append(now, spot{r, at, false})
		slices.SortStableFunc(now, func(a, b spot) int {
			return cmp.Or(a.in(d)-b.in(d), a.at-b.at)
		})
	}
	var after []Rule
	for _, p := range now {
		if !p.gone {
			after = append(after, p.rule)
		}
	}
	return append(es, gone...), slices.EqualFunc(after, w.Rules, Rule.Equal)
}

// in is where in the base chain packets meet the rule.
func (p spot) in(d Detour) int {
	if p.rule.Via != "" {
		return d.At
	}
	return p.at
}

// placeOf returns where the i-th rule of w goes in: where it stood before; else in
// the place of the one that it differs from by the comment alone; else next to its
// neighbours; else where w's Place says. For one that goes last that is in front of
// the first jump that goes: what stands behind that one met its packets later. The
// place of one in a detour is that of the jump there.
func placeOf(now []spot, w BaseChain, i int, d Detour) int {
	r := w.Rules[i]
	if at := r.At; at > 0 {
		// At counts the chain as it will be: those that go still stand in it.
		for _, p := range now {
			if p.gone && p.rule.Via == r.Via && p.at <= at {
				at++
			}
		}
		if r.Via != "" { // others may have taken theirs out since
			at = min(at, d.Rules+1)
		}
		return at
	}
	find := func(is func(spot) bool) (at int) {
		if j := slices.IndexFunc(now, is); j >= 0 {
			return now[j].in(d)
		}
		return 0
	}
	at := find(func(p spot) bool { q := p.rule; q.Why = r.Why; return p.gone && q.Equal(r) })
	if at == 0 {
		at = find(func(p spot) bool { return i+1 < len(w.Rules) && p.rule.Equal(w.Rules[i+1]) })
	}
	if at == 0 {
		if at = find(func(p spot) bool { return i > 0 && p.rule.Equal(w.Rules[i-1]) }); at > 0 {
			at++
		}
	}
	switch {
	case at > 0:
	case w.Place == First:
		at = 1
	default:
		at = find(func(p spot) bool { return p.gone && p.rule.Target() != "" })
	}
	return at
}
