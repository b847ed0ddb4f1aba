package tproxy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// DriftKind says in which way what stands departs from what was installed.
type DriftKind string

// The kinds of drift.
const (
	// DriftMissing is a rule or a chain that is not there any more; without a table,
	// all of a family.
	DriftMissing DriftKind = "missing"
	// DriftChanged is a rule that has other matches, another action or another comment.
	DriftChanged DriftKind = "changed"
	// DriftExtra is a rule in a chain of ours, or a chain of ours, that the install did
	// not make.
	DriftExtra DriftKind = "extra"
	// DriftDoubled is a rule that is there once more.
	DriftDoubled DriftKind = "doubled"
	// DriftReordered is a chain whose rules stand in another order.
	DriftReordered DriftKind = "reordered"
	// DriftElsewhere are rules of ours in the other variant of iptables, or in a family
	// that is left out.
	DriftElsewhere DriftKind = "elsewhere"
	// DriftShadowed is a rule of others that comes first and decides.
	DriftShadowed DriftKind = "shadowed"
	// DriftEntered is a rule of others that leads into a chain of ours.
	DriftEntered DriftKind = "entered"
	// DriftFiltered is the host's own packet filter, which does not let pass what was
	// redirected.
	DriftFiltered DriftKind = "filtered"
	// DriftAddress is ::6 on lo, DriftNames the control plane as a nameserver.
	DriftAddress DriftKind = "address"
	DriftNames   DriftKind = "names"
	// DriftStored is what brings the install back after a restart.
	DriftStored DriftKind = "stored"
)

// Drift is one departure of what stands from what was installed.
type Drift struct {
	Kind   DriftKind
	Family rules.Family // 0 where it is about none, or a table of nftables, which is both
	// Table and Chain name where, and Index the rule there, from 1: of what stands,
	// or, for what is missing, of what was installed. They are empty where it is about
	// no rule.
	Table rules.Table
	Chain string
	Index int
	// Was is the rule that was installed, Is the one that stands; either may be empty.
	Was, Is string
	// Why is the reason of the rule that was installed, or what is the matter.
	Why string
}

// String writes the drift as a line of a diff: - for what is missing, + for what is
// too much, ~ for the rest.
func (d Drift) String() string {
	sign := "~"
	switch d.Kind {
	case DriftMissing:
		sign = "-"
	case DriftExtra, DriftDoubled, DriftElsewhere:
		sign = "+"
	}
	s := fmt.Sprintf("%s %s:", sign, d.Kind)
	if d.Family != 0 {
		s += " " + d.Family.String()
	}
	if d.Table != "" {
		s += fmt.Sprintf(" %s %s", d.Table, d.Chain)
	}
	if d.Index > 0 {
		s += fmt.Sprintf(" #%d", d.Index)
	}
	switch {
	case d.Was != "" && d.Is != "" && d.Was != d.Is:
		s += fmt.Sprintf(" %s, was %s", d.Is, d.Was)
	case d.Is != "":
		s += " " + d.Is
	case d.Was != "":
		s += " " + d.Was
	}
	if d.Why != "" {
		s += " [" + d.Why + "]"
	}
	return s
}

// Drift lists how what is ours in a family (Find) departs from the plan's rules. What
// the record itself says does not count, only that it is there: it was read to make
// the plan, and another version may write it otherwise. It is pure.
func (p *Plan) Drift(f rules.Family, ours rules.Set) []Drift {
	if len(ours.Bases)+len(ours.Chains) == 0 {
		return []Drift{{Kind: DriftMissing, Family: f, Why: "nothing of the install is there"}}
	}
	want := p.Rules
	want.Chains = slices.DeleteFunc(slices.Clone(want.Chains), isRecord)
	stand := ours
	stand.Chains = slices.DeleteFunc(slices.Clone(ours.Chains), isRecord)
	// Compare has the changes of a chain in one piece.
	var out []Drift
	changes := rules.Compare(f, stand, want)
	for len(changes) > 0 {
		c, n := changes[0], 1
		for n < len(changes) && changes[n].Table == c.Table && changes[n].Chain == c.Chain {
			n++
		}
		out = append(out, drifted(changes[:n], want.Lower(f))...)
		changes = changes[n:]
	}
	if _, err := ReadRecord(ours); err != nil {
		out = append(out, Drift{Kind: DriftChanged, Family: f, Table: rules.NAT, Chain: chainRecord, Why: err.Error()})
	}
	return out
}

func isRecord(c rules.Chain) bool { return IsRecord(c.Table, c.Name) }

// drifted makes of the changes of one chain what somebody did to it.
func drifted(changes []rules.Change, want rules.Set) (out []Drift) {
	first := changes[0]
	d := Drift{Family: first.Family, Table: first.Table, Chain: first.Chain}
	switch first.Kind {
	case rules.MissingChain:
		d.Kind, d.Why = DriftMissing, "the chain is not there"
		return []Drift{d}
	case rules.ExtraChain:
		d.Kind, d.Why = DriftExtra, "the install has no such chain"
		return []Drift{d}
	}
	var wanted []rules.Rule
	if c, ok := want.Chain(first.Table, first.Chain); ok {
		wanted = c.Rules
	} else if b, ok := want.Base(first.Table, rules.Hook(first.Chain)); ok {
		wanted = b.Rules
	}
	var missing []rules.Change
	for _, c := range changes {
		if c.Kind == rules.MissingRule {
			missing = append(missing, c)
		}
	}
	for _, c := range changes {
		d.Index, d.Was, d.Is, d.Why = c.Index, "", bare(c.Rule), Reason(c.Rule)
		if c.Rule.At > 0 { // among the rules of others
			d.Index = c.Rule.At
		}
		d.Chain = cmp.Or(c.Rule.Via, first.Chain)
		switch c.Kind {
		case rules.Misordered:
			d.Kind, d.Is, d.Why = DriftReordered, "", fmt.Sprintf("from #%d on the rules stand in another order", c.Index)
			d.Index = 0
		case rules.ExtraRule:
			if c.Rule.Unmet {
				d.Kind, d.Why = DriftExtra, fmt.Sprintf("%s does not lead to %s", first.Chain, d.Chain)
				break
			}
			if slices.ContainsFunc(wanted, func(w rules.Rule) bool {
				return w.Equal(c.Rule) || want.NoComments && bare(w) == bare(c.Rule)
			}) {
				d.Kind = DriftDoubled
				break
			}
			d.Kind = DriftExtra
			// One that stands where another is missing, or bears its reason, is that one.
			i := slices.IndexFunc(missing, func(m rules.Change) bool {
				return m.Index == c.Index || m.Rule.Why != "" && m.Rule.Why == c.Rule.Why
			})
			if i >= 0 {
				d.Kind, d.Was, d.Why = DriftChanged, bare(missing[i].Rule), Reason(missing[i].Rule)
				missing = slices.Delete(missing, i, i+1)
			}
		default:
			continue
		}
		out = append(out, d)
	}
	for _, c := range missing {
		out = append(out, Drift{Kind: DriftMissing, Family: c.Family, Table: c.Table, Chain: c.Chain, Index: c.Index, Was: bare(c.Rule), Why: Reason(c.Rule)})
	}
	return out
}

// bare is a rule without its reason, which stands beside it.
func bare(r rules.Rule) string {
	r.Why = ""
	return r.String()
}

// Reason is a rule's reason as people read it: without the words by which Kuma's own
// uninstall knows the jumps.
func Reason(r rules.Rule) string { return strings.TrimPrefix(r.Why, commentPrefix) }

// RecordChain is where the record of an install stands.
func RecordChain() (t rules.Table, name string) { return rules.NAT, chainRecord }

// IsRecord reports whether the rules of a chain are the record of an install.
func IsRecord(t rules.Table, chain string) bool { return t == rules.NAT && chain == chainRecord }

// Effect says what a rule of ours does to a connection, or to a query: in, out or dns
// for one that sends it to the proxy, refused, or excluded; it is empty for a rule that
// leads to others.
func Effect(t rules.Table, chain string, r rules.Rule) string {
	switch a := r.Action.(type) {
	case rules.Redirect:
		switch {
		case a.Port == 0:
			return "refused"
		case chain == chainInbound:
			return "in"
		case chain == chainOutbound:
			return "out"
		}
		return "dns"
	case rules.Return:
		if t == rules.NAT {
			return "excluded"
		}
	}
	return ""
}
