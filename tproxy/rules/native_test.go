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
		got := n.Set()
		for _, f := range Families() {
			if s.Only != 0 && s.Only != f || got.Only != 0 && got.Only != f && !anyRule(s.Lower(f)) {
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

// What Text writes ParseNative reads, and a Set of it makes the same table.
func TestNativeTextIsTheTable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := nativeSets().Draw(t, "set")
		n, err := s.Native("mine")
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseNative(n.Text())
		if err != nil || !got.Equal(&n) {
			t.Fatalf("%v\n%s\n%s", err, n.Text(), got.Text())
		}
		if again, err := n.Set().Native("mine"); err != nil || !again.Equal(&n) {
			t.Fatalf("%v\n%s\n%s", err, n.Text(), again.Text())
		}
	})
}

func TestParseNativeRefuses(t *testing.T) {
	for _, text := range []string{
		"", "table inet a {", "table ip a {\n}", "table inet a {\n}\nx", "table inet a {\nflowtable f {\n}\n}",
		"table inet a {\nchain b {\nfoo\n}\n}", "table inet a {\nchain b {\njump\n}\n}", "table inet a {\nchain b {\nreturn drop\n}\n}",
		"table inet a {\nchain b {\nreturn comment \"x\n}\n}", "table inet a {\nchain b {\ntcp dport\n}\n}", "table inet a {\nchain b {\ntcp dport x\n}\n}",
		"table inet a {\nchain b {\ntcp dport 9-3\n}\n}", "table inet a {\nchain b {\nip saddr ::1\n}\n}", "table inet a {\nchain b {\nip saddr 5\n}\n}",
		"table inet a {\nchain b {\nredirect to\n}\n}", "table inet a {\nchain b {\nct zone set 65536\n}\n}", "table inet a {\nchain b {\nmeta mark set 5\n}\n}",
		"table inet a {\nchain b {\ntype nat hook x priority 1; policy accept;\n}\n}", "table inet a {\nchain b {\ntype nat hook output priority 1; policy drop;\n}\n}",
		"table inet a {\nset b {\ntype x\nelements = { 1, 2 }\n}\n}", "table inet a {\nset b {\nflags timeout\n}\n}", "table inet a {\nchain b {\nct state odd\n}\n}",
	} {
		if n, err := ParseNative([]byte(text)); err == nil {
			t.Errorf("%q: %+v", text, n)
		}
	}
}

func FuzzParseNative(f *testing.F) {
	f.Add([]byte("table inet a {\n\tset s {\n\t\ttype uid\n\t\tflags interval\n\t\telements = { 1-2, 5 }\n\t}\n\n\tchain nat.A {\n\t\tmeta skuid @s return\n\t}\n}\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		n, err := ParseNative(text)
		if err != nil {
			return
		}
		_ = n.Set()
		if again, err := ParseNative(n.Text()); err != nil || string(again.Text()) != string(n.Text()) {
			t.Errorf("%v\n%s\n%s", err, n.Text(), again.Text())
		}
	})
}

func anyRule(s Set) (found bool) {
	each(&s, func(*Rule) { found = true })
	return found
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
		got, failed, err := NativeAfter(a, NativeTransition(a, b))
		if err != nil {
			t.Fatalf("command %d: %v\n%s", failed, err, NativeScript(NativeTransition(a, b)))
		}
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

// What is known of a table in which others have something can be made again: each set is
// whole, no rule looks into one that is not, and the text is read back.
func TestKnownOfATableWithSetsOfOthers(t *testing.T) {
	into := func(set string) NativeRule {
		return NativeRule{Matches: []NativeMatch{{Key: KeyProtocol, First: []byte{6}}, {Key: KeyDestinationPort, Set: set}}, Action: Accept{}}
	}
	n := Native{
		Table:   "kuma-tproxy",
		Strange: []string{"set map: keys of type 0 and 4 bytes", "set timed: flags 0x14"},
		Sets:    []NativeSet{{Name: "empty", Type: "inet_service"}, {Name: "map"}, {Name: "timed", Type: "inet_service"}},
		Chains:  []NativeChain{{Name: "nat.MINE", Rules: []NativeRule{into("timed"), into("empty")}}},
	}
	k := n.Known()
	if len(k.Sets) != 1 || k.Sets[0].Name != "empty" || len(k.Chains[0].Rules) != 1 || !k.Chains[0].Rules[0].Equal(into("empty")) {
		t.Errorf("known: %+v", k)
	}
	if others := strings.Join(n.Others(), "; "); !strings.Contains(others, "a rule of chain nat.MINE: meta l4proto tcp tcp dport @timed accept") || strings.Contains(others, "@empty") {
		t.Errorf("others: %s", others)
	}
	if again, err := ParseNative(k.Text()); err != nil || !again.Equal(&k) {
		t.Errorf("read back: %v\n%s", err, k.Text())
	}
	for _, c := range NativeTransition(nil, &k) {
		if c.Verb == AddSet && c.String() != "add set inet kuma-tproxy empty { type inet_service; flags interval; }" {
			t.Errorf("%s", c)
		}
	}
}
