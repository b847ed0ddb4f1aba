package tproxy

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// TableDrift lists how a table of nftables departs from the one that the plan's rules
// make, as Drift does: rules in the words of nft(8), once for both families, each at
// its place in what nft lists. It is pure. The error is for a plan whose rules nftables
// cannot hold (rules.Set.Native).
func (p *Plan) TableDrift(live *rules.Native) ([]Drift, error) {
	want, err := p.Rules.Native(NFTable)
	if err != nil {
		return nil, err
	}
	var out []Drift
	for _, s := range live.Strange {
		d := Drift{Kind: DriftExtra, Is: s, Why: "the install has no such thing"}
		if s == rules.NativeDormant {
			d.Kind, d.Why = DriftChanged, "nothing of it sees a packet"
		}
		if chain, what, ok := strings.Cut(strings.TrimPrefix(s, "chain "), ": "); ok && strings.HasPrefix(s, "chain ") {
			d.Kind, d.Is, d.Why = DriftChanged, what, "the install has it otherwise"
			d.Table, d.Chain = tableChain(chain)
		}
		out = append(out, d)
	}
	for _, w := range want.Chains {
		i := slices.IndexFunc(live.Chains, func(l rules.NativeChain) bool { return l.Name == w.Name })
		t, name := tableChain(w.Name)
		if IsRecord(t, name) { // see Drift
			continue
		}
		if i < 0 {
			out = append(out, Drift{Kind: DriftMissing, Table: t, Chain: name, Why: "the chain is not there"})
			continue
		}
		if l := live.Chains[i]; called(l) != called(w) {
			out = append(out, Drift{Kind: DriftChanged, Table: t, Chain: name, Was: called(w), Is: called(l), Why: "the kernel calls it elsewhere"})
		}
		out = append(out, chainDrift(live.Chains[i], w)...)
	}
	for _, l := range live.Chains {
		t, name := tableChain(l.Name)
		if IsRecord(t, name) || slices.ContainsFunc(want.Chains, func(w rules.NativeChain) bool { return w.Name == l.Name }) {
			continue
		}
		d := Drift{Kind: DriftExtra, Table: t, Chain: name, Is: called(l), Why: "the install has no such chain"}
		if t == "" {
			d.Is = strings.TrimSpace("chain " + l.Name + " " + called(l))
		}
		out = append(out, d)
	}
	out = append(out, setDrift(live.Sets, want.Sets)...)
	if _, err := ReadRecord(live.Set()); err != nil {
		out = append(out, Drift{Kind: DriftChanged, Table: rules.NAT, Chain: chainRecord, Why: err.Error()})
	}
	return out, nil
}

// tableChain is what a chain of nftables is of a Set: without a table, none of ours.
func tableChain(name string) (t rules.Table, chain string) {
	first, rest, ok := strings.Cut(name, ".")
	if !ok {
		return "", ""
	}
	return rules.Table(first), rest
}

// called says where the kernel calls a chain; nothing of one that rules lead to.
func called(c rules.NativeChain) string {
	if c.Hook == "" {
		return ""
	}
	return fmt.Sprintf("type %s hook %s priority %d", c.Type, strings.ToLower(string(c.Hook)), c.Priority)
}

// chainDrift makes of the rules of a chain what somebody did to it.
func chainDrift(live, want rules.NativeChain) (out []Drift) {
	t, name := tableChain(want.Name)
	stays, wanted := keeps(live.Rules, want.Rules)
	said := func(kind DriftKind, i int, was, is *rules.NativeRule) {
		d := Drift{Kind: kind, Table: t, Chain: name, Index: i + 1, Was: nativeText(was), Is: nativeText(is)}
		if why := cmp.Or(was, is); why != nil {
			d.Why = Reason(rules.Rule{Why: why.Comment})
		}
		out = append(out, d)
	}
	var missing []int
	for i := range want.Rules {
		if wanted[i] < 0 {
			missing = append(missing, i)
		}
	}
	take := func(is func(i int) bool) int {
		k := slices.IndexFunc(missing, is)
		if k < 0 {
			return -1
		}
		i := missing[k]
		missing = slices.Delete(missing, k, k+1)
		return i
	}
	moved := false
	for i := range live.Rules {
		r := &live.Rules[i]
		if stays[i] {
			continue
		}
		if take(func(w int) bool { return want.Rules[w].Equal(*r) }) >= 0 {
			moved = true
			continue
		}
		if slices.ContainsFunc(want.Rules, r.Equal) {
			said(DriftDoubled, i, nil, r)
			continue
		}
		// One that bears the reason of a missing one, or stands at its place, is that one.
		at := take(func(w int) bool { return r.Comment != "" && want.Rules[w].Comment == r.Comment })
		if at < 0 && len(live.Rules) == len(want.Rules) {
			at = take(func(w int) bool { return w == i })
		}
		if at >= 0 {
			said(DriftChanged, i, &want.Rules[at], r)
		} else {
			said(DriftExtra, i, nil, r)
		}
	}
	if moved {
		out = append(out, Drift{Kind: DriftReordered, Table: t, Chain: name, Why: "the rules stand in another order"})
	}
	for _, i := range missing {
		said(DriftMissing, i, &want.Rules[i], nil)
	}
	return out
}

// nativeText is a rule without its reason, which stands beside it.
func nativeText(r *rules.NativeRule) string {
	switch {
	case r == nil:
		return ""
	case r.Unknown != "":
		return "a rule with " + r.Unknown
	}
	bare := *r
	bare.Comment = ""
	return bare.String()
}

// keeps says of each rule of live whether it stays, and of each of want which one of
// live it is, or -1: as many as possible, in order.
func keeps(live, want []rules.NativeRule) (stays []bool, found []int) {
	stays, found = make([]bool, len(live)), make([]int, len(want))
	for i := range found {
		found[i] = -1
	}
	a, b := 0, 0
	for a < len(live) && b < len(want) && live[a].Equal(want[b]) {
		stays[a], found[b] = true, a
		a, b = a+1, b+1
	}
	m, n := len(live), len(want)
	for m > a && n > b && live[m-1].Equal(want[n-1]) {
		m, n = m-1, n-1
		stays[m], found[n] = true, m
	}
	// The longest common subsequence of what is left.
	longest := make([][]int, m-a+1)
	for i := range longest {
		longest[i] = make([]int, n-b+1)
	}
	for i := m - a - 1; i >= 0; i-- {
		for j := n - b - 1; j >= 0; j-- {
			longest[i][j] = max(longest[i+1][j], longest[i][j+1])
			if live[a+i].Equal(want[b+j]) {
				longest[i][j] = longest[i+1][j+1] + 1
			}
		}
	}
	for i, j := 0, 0; i < m-a && j < n-b; {
		switch {
		case live[a+i].Equal(want[b+j]):
			stays[a+i], found[b+j] = true, a+i
			i, j = i+1, j+1
		case longest[i+1][j] >= longest[i][j+1]:
			i++
		default:
			j++
		}
	}
	return stays, found
}

// setDrift compares sets, whose names say what is to be in them.
func setDrift(live, want []rules.NativeSet) (out []Drift) {
	for _, w := range want {
		i := slices.IndexFunc(live, func(l rules.NativeSet) bool { return l.Name == w.Name })
		if i < 0 { // no rule can look into it: those that did are told
			continue
		}
		lost, added := elements(w, live[i]), elements(live[i], w)
		if lost != "" {
			out = append(out, Drift{Kind: DriftMissing, Was: "in set " + w.Name + ": " + lost, Why: "an element of what rules look for"})
		}
		if added != "" {
			out = append(out, Drift{Kind: DriftExtra, Is: "in set " + w.Name + ": " + added, Why: "an element that the install has not"})
		}
	}
	for _, l := range live {
		if !slices.ContainsFunc(want, func(w rules.NativeSet) bool { return w.Name == l.Name }) {
			out = append(out, Drift{Kind: DriftExtra, Is: "set " + l.Name, Why: "the install has no such set"})
		}
	}
	return out
}

// elements are those of a that b has not, as nft(8) writes them.
func elements(a, b rules.NativeSet) string {
	only := rules.NativeSet{Type: a.Type}
	for _, r := range a.Elements {
		if !slices.ContainsFunc(b.Elements, func(o rules.NativeRange) bool {
			return bytes.Equal(o.First, r.First) && bytes.Equal(o.Last, r.Last)
		}) {
			only.Elements = append(only.Elements, r)
		}
	}
	return only.String()
}
