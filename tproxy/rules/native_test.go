package rules

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// nativeSets draws Sets that nftables can hold: no REJECT and no translation, short
// comments without quotation marks, and no prefix within another.
func nativeSets() *rapid.Generator[Set] {
	return rapid.Custom(func(t *rapid.T) Set {
		s := genSet(false).Draw(t, "set")
		each(&s, func(r *Rule) {
			switch r.Action.(type) {
			case Reject, Translate:
				r.Action = Accept{}
			}
			r.Record = false
			r.Why = strings.ReplaceAll(r.Why[:min(len(r.Why), MaxNativeComment)], `"`, "-")
			for i, m := range r.Matches {
				switch m := m.(type) {
				case Source:
					r.Matches[i] = Source{apart(m.Prefixes), m.Not}
				case OwnerUID:
					r.Matches[i] = OwnerUID{UIDs: m.UIDs}
				case OwnerGID:
					r.Matches[i] = OwnerGID{GIDs: m.GIDs}
				case CTState:
					r.Matches[i] = CTState{"ESTABLISHED,NEW", m.Not}
				case Destination:
					r.Matches[i] = Destination{apart(m.Prefixes), m.Not}
				}
			}
		})
		return s
	})
}

func each(s *Set, do func(*Rule)) {
	for i := range s.Bases {
		for j := range s.Bases[i].Rules {
			do(&s.Bases[i].Rules[j])
		}
	}
	for i := range s.Chains {
		for j := range s.Chains[i].Rules {
			do(&s.Chains[i].Rules[j])
		}
	}
}

// apart sorts prefixes and leaves out those within another one.
func apart(ps []netip.Prefix) (out []netip.Prefix) {
	ps = slices.Clone(ps)
	slices.SortFunc(ps, netip.Prefix.Compare)
	for _, p := range ps {
		if k := len(out); k == 0 || !out[k-1].Overlaps(p) {
			out = append(out, p)
		}
	}
	return out
}

// What Native makes of a Set, and Set of that, is the same Set in each family.
func TestNativeIsTheSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := nativeSets().Draw(t, "set")
		n, err := s.Native("mine")
		if err != nil {
			t.Fatal(err)
		}
		got, err := n.Set()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range Families() {
			if s.Only != 0 && (s.Only != f || !entered(s.Lower(f))) {
				continue // a rule at a hook says of which family all are
			}
			if got.Only != 0 && got.Only != f && !entered(s.Lower(f)) {
				continue // no packet of the family meets any of it
			}
			if changes := Compare(f, got, s); len(changes) > 0 {
				t.Fatalf("%s: %v\n%s", f, changes, n.Text())
			}
			for i, c := range s.Bases {
				if got.Bases[i].Table != c.Table || got.Bases[i].Hook != c.Hook || c.Table == NAT && got.Bases[i].Place != c.Place {
					t.Fatalf("base chain %d is %v, want %v", i, got.Bases[i], c)
				}
			}
		}
	})
}

// entered reports whether a rule stands at a hook.
func entered(s Set) bool {
	return slices.ContainsFunc(s.Bases, func(c BaseChain) bool { return len(c.Rules) > 0 })
}

// By the commands of a transition one table becomes the other, and equal tables need
// none.
func TestNativeTransitionLeadsThere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(label string) *Native {
			if rapid.IntRange(0, 7).Draw(t, label+" is not there") == 0 {
				return nil
			}
			n, err := nativeSets().Draw(t, label).Native("mine")
			if err != nil {
				t.Fatal(err)
			}
			return &n
		}
		a, b := draw("live"), draw("want")
		if a != nil && rapid.IntRange(0, 3).Draw(t, "somebody was there") == 0 {
			a.meddle(t)
		}
		got := carryOut(t, a, NativeTransition(a, b))
		switch {
		case b == nil && got == nil:
		case b == nil || got == nil || !got.Equal(b):
			t.Fatalf("it becomes\n%v\nwant\n%v", got, b)
		}
		if again := NativeTransition(got, b); len(again) > 0 {
			t.Fatalf("once more: %s", NativeScript(again))
		}
	})
}

// meddle changes a table as somebody else may.
func (n *Native) meddle(t *rapid.T) {
	switch rapid.IntRange(0, 3).Draw(t, "by") {
	case 0:
		n.Strange = []string{"flowtable f"}
	case 1:
		for i := range n.Sets {
			n.Sets[i].Elements = n.Sets[i].Elements[1:]
		}
	case 2:
		for i := range n.Chains {
			if n.Chains[i].Hook != "" {
				n.Chains[i].Priority++
			}
		}
	case 3:
		for i := range n.Chains {
			n.Chains[i].Rules = append(n.Chains[i].Rules, NativeRule{Unknown: "expression socket"})
		}
	}
}

// carryOut does what the kernel does with commands, and fails where it refuses.
func carryOut(t *rapid.T, live *Native, commands []NativeCommand) *Native {
	if live != nil {
		m := *live
		m.Chains, m.Sets = slices.Clone(m.Chains), slices.Clone(m.Sets)
		live = &m
	}
	for _, c := range commands {
		if live == nil && c.Verb != AddTable {
			t.Fatalf("%s: there is no table", c)
		}
		used := func(name string) bool {
			return slices.ContainsFunc(live.Chains, func(k NativeChain) bool {
				return slices.ContainsFunc(k.Rules, func(r NativeRule) bool {
					return r.target() == name || slices.ContainsFunc(r.Matches, func(m NativeMatch) bool { return m.Set == name })
				})
			})
		}
		at := -1
		if live != nil {
			at = slices.IndexFunc(live.Chains, func(k NativeChain) bool { return k.Name == c.Chain.Name })
		}
		switch c.Verb {
		case AddTable:
			live = &Native{Table: c.Table}
		case DeleteTable:
			live = nil
		case AddSet:
			if _, there := live.set(c.Set.Name); there {
				t.Fatalf("%s: it is there", c)
			}
			live.Sets = append(live.Sets, c.Set)
		case DeleteSet:
			if used(c.Set.Name) {
				t.Fatalf("%s: it is in use", c)
			}
			live.Sets = slices.DeleteFunc(live.Sets, func(s NativeSet) bool { return s.Name == c.Set.Name })
		case AddChain:
			if at >= 0 {
				t.Fatalf("%s: it is there", c)
			}
			live.Chains = append(live.Chains, c.Chain)
		case FlushChain:
			live.Chains[at].Rules = nil
		case DeleteChain:
			if used(c.Chain.Name) || len(live.Chains[at].Rules) > 0 {
				t.Fatalf("%s: it is in use", c)
			}
			live.Chains = slices.Delete(live.Chains, at, at+1)
		case AddRule:
			if to := c.Rule.target(); to != "" {
				if _, there := live.chain(to); !there {
					t.Fatalf("%s: leads nowhere", c)
				}
			}
			live.Chains[at].Rules = append(slices.Clone(live.Chains[at].Rules), c.Rule)
		}
	}
	return live
}

func (r NativeRule) target() string { return Rule{Action: r.Action}.Target() }

// An install touches what it must: what stays the same keeps its counters.
func TestNativeTransitionLeavesChainsAlone(t *testing.T) {
	set := func(ports string) Set {
		return Set{
			Bases: []BaseChain{{Table: NAT, Hook: Output, Place: First, Rules: []Rule{{Matches: []Match{TCP}, Action: Jump{"A"}}}}},
			Chains: []Chain{{Table: NAT, Name: "A", Rules: []Rule{
				{Matches: []Match{TCP, DestinationPorts{Ports: MustPorts(ports)}}, Action: Return{}, Why: "left alone"}}}},
		}
	}
	a, _ := set("1,3,5-9").Native("mine")
	b, _ := set("1,3").Native("mine")
	got := string(NativeScript(NativeTransition(&a, &b)))
	want := `add set inet mine ` + b.Sets[0].Name + ` { type inet_service; flags interval; elements = { 1, 3 }; }
flush chain inet mine nat.A
add rule inet mine nat.A meta l4proto tcp tcp dport @` + b.Sets[0].Name + ` counter return comment "left alone"
delete set inet mine ` + a.Sets[0].Name + "\n"
	if got != want {
		t.Errorf("%s, want\n%s", got, want)
	}
}

func TestNativeRefuses(t *testing.T) {
	for _, r := range []Rule{
		{Action: Reject{}},
		{Action: Translate{Target: "DNAT", To: "10.0.0.1"}},
		{Matches: []Match{OwnerUID{UIDs: MustUIDs("5"), Not: true}}, Action: Return{}},
		{Matches: []Match{OwnerGID{GIDs: MustUIDs("5"), Not: true}}, Action: Return{}},
		{Matches: []Match{CTState{States: "DNAT,NEW"}}, Action: Return{}},
		{Action: Return{}, Why: strings.Repeat("x", MaxNativeComment+1)},
		{Action: Return{}, Why: `a "word"`},
		{Action: Return{}, Why: `a 'word'`, Record: true},
	} {
		_, err := Set{Chains: []Chain{{Table: NAT, Name: "A", Rules: []Rule{r}}}}.Native("mine")
		if e, ok := errors.AsType[*InvalidError](err); !ok || len(e.Faults) != 1 {
			t.Errorf("%v: %v", r, err)
		}
	}
}
