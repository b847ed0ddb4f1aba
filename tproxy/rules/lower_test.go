package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

var cmpSets = cmp.Options{
	cmpopts.EquateEmpty(),
	cmpopts.EquateComparable(netip.Prefix{}),
}

// genSet draws valid Sets of every type. For the kernel it keeps to what
// netfilter takes: each target in its table, owners in chains that are reached
// from OUTPUT alone, no loops.
func genSet(kernel bool) *rapid.Generator[Set] {
	return rapid.Custom(func(t *rapid.T) Set {
		g := setGen{t, kernel}
		s := Set{NoComments: rapid.Bool().Draw(t, "no comments")}
		if !kernel {
			s.Only = rapid.SampledFrom([]Family{0, 0, IPv4, IPv6}).Draw(t, "only")
		}
		for _, table := range rapid.Permutation(tableOrder[:]).Draw(t, "tables") {
			g.table(&s, table)
		}
		return s
	})
}

type setGen struct {
	*rapid.T
	kernel bool
}

func (g setGen) flag(label string, oneIn int) bool {
	return rapid.IntRange(1, oneIn).Draw(g.T, label) == 1
}

func (g setGen) table(s *Set, table Table) {
	hooks := map[Table][]Hook{
		Raw: {Prerouting, Output}, NAT: {Prerouting, Output}, Filter: {Input, Forward, Output},
		Mangle: {Prerouting, Input, Forward, Output, Postrouting},
	}[table]
	// Chains at even places are reached from OUTPUT alone.
	chains := make([]Chain, rapid.IntRange(0, 4).Draw(g.T, "chains"))
	for i := range chains {
		name := fmt.Sprintf("C%d", i) + rapid.StringMatching(`[A-Za-z0-9_.-]{0,26}`).Draw(g.T, "name")
		chains[i] = Chain{Table: table, Name: name}
	}
	targets := func(from int, output bool) (names []string) {
		for i := from + 1; i < len(chains); i++ {
			if output || i%2 == 1 {
				names = append(names, chains[i].Name)
			}
		}
		return names
	}
	for i := range chains {
		out := i%2 == 0
		for range rapid.IntRange(0, 4).Draw(g.T, "rules") {
			chains[i].Rules = append(chains[i].Rules, g.rule(table, "", out, targets(i, out)))
		}
	}
	for _, h := range hooks {
		if g.flag("base", 2) {
			continue
		}
		b := BaseChain{Table: table, Hook: h, Place: Place(rapid.IntRange(0, 1).Draw(g.T, "place"))}
		for range rapid.IntRange(0, 3).Draw(g.T, "rules") {
			b.Rules = append(b.Rules, g.rule(table, h, h == Output, targets(-1, h == Output)))
		}
		s.Bases = append(s.Bases, b)
	}
	s.Chains = append(s.Chains, chains...)
}

func (g setGen) rule(table Table, h Hook, output bool, targets []string) Rule {
	t, r := g.T, Rule{}
	add := func(m Match) { r.Matches = append(r.Matches, m) }
	if g.flag("source", 4) {
		add(func(p []netip.Prefix, not bool) Match { return Source{p, not} }(g.prefixes()))
	}
	if g.flag("destination", 3) {
		add(func(p []netip.Prefix, not bool) Match { return Destination{p, not} }(g.prefixes()))
	}
	iface := func() (string, bool) {
		not := rapid.Bool().Draw(t, "not")
		name := rapid.SampledFrom([]string{"lo", "eth0", "veth+", "a.b-c_1@x", "+", "fifteen-bytes-x"}).Draw(t, "interface")
		return name, not && name != "+"
	}
	if g.flag("in", 4) && !(g.kernel && (h == Output || h == Postrouting)) {
		name, not := iface()
		add(InInterface{name, not})
	}
	if g.flag("out", 3) && !(g.kernel && (h == Prerouting || h == Input)) {
		name, not := iface()
		add(OutInterface{name, not})
	}
	proto := rapid.SampledFrom([]Protocol{0, TCP, TCP, TCP, UDP, UDP, 1, 58, 47, 132, 253}).Draw(t, "protocol")
	if proto != 0 {
		add(proto)
	}
	if proto == TCP && rapid.Bool().Draw(t, "syn") {
		add(SYN{rapid.Bool().Draw(t, "not")})
	}
	if proto == TCP || proto == UDP {
		if g.flag("source ports", 4) {
			p := genPorts.Filter(nonEmpty).Draw(t, "source ports")
			add(SourcePorts{p, p.slots() <= maxSlots && rapid.Bool().Draw(t, "not")})
		}
		if rapid.Bool().Draw(t, "ports") {
			p := genPorts.Filter(nonEmpty).Draw(t, "ports")
			add(DestinationPorts{p, p.slots() <= maxSlots && rapid.Bool().Draw(t, "not")})
		}
	}
	if g.flag("from local", 5) {
		add(SourceLocal{rapid.Bool().Draw(t, "not")})
	}
	if g.flag("local", 4) {
		add(DestinationLocal{rapid.Bool().Draw(t, "not")})
	}
	if output || !g.kernel {
		if g.flag("uid", 4) {
			u := genUIDs.Draw(t, "uids")
			add(OwnerUID{u, len(u.s) == 1 && rapid.Bool().Draw(t, "not")})
		}
		if g.flag("gid", 4) {
			u := genUIDs.Draw(t, "gids")
			add(OwnerGID{u, len(u.s) == 1 && rapid.Bool().Draw(t, "not")})
		}
	}
	if g.flag("state", 5) {
		states := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED", "SNAT", "DNAT"}), 1, 7, rapid.ID).Draw(t, "states")
		slices.Sort(states)
		add(CTState{strings.Join(states, ","), rapid.Bool().Draw(t, "not")})
	}
	bits := rapid.SampledFrom([]uint32{0, 1, 0x4000, 1<<32 - 1})
	if g.flag("mark", 5) {
		add(Mark{bits.Draw(t, "mark"), bits.Draw(t, "mask"), rapid.Bool().Draw(t, "not")})
	}
	actions := []Action{Return{}, Accept{}, Nothing{}, SetMark{bits.Draw(t, "mark"), bits.Draw(t, "mask")}}
	if !g.kernel { // one address does not do for both families
		actions = append(actions, Translate{Target: "DNAT", To: "192.0.2.1", Random: rapid.Bool().Draw(t, "random"), Persistent: rapid.Bool().Draw(t, "persistent")},
			Translate{Target: "SNAT", To: "192.0.2.1-192.0.2.9"}, Translate{Target: "MASQUERADE", RandomFully: true})
	}
	if table != NAT || !g.kernel {
		actions = append(actions, Drop{})
	}
	if table == Filter || !g.kernel {
		actions = append(actions, Reject{})
		if proto == TCP {
			actions = append(actions, Reject{"tcp-reset"})
		}
	}
	if proto == TCP || proto == UDP {
		if table == NAT || !g.kernel {
			port := Redirect{rapid.Uint16().Draw(t, "port")}
			actions = append(actions, Redirect{0}, port, port)
		}
	}
	if table == Raw || !g.kernel {
		actions = append(actions, NoTrack{}, CTZone{rapid.Uint16Min(1).Draw(t, "zone")})
	}
	for _, name := range targets {
		actions = append(actions, Jump{name}, Goto{name})
	}
	r.Action = rapid.SampledFrom(actions).Draw(t, "action")
	r.Why = rapid.OneOf(
		rapid.Just(""),
		rapid.SampledFrom([]string{"-j", "!", "#", "-t", "COMMIT", `\`, `"`, `\"`, `'`, "it's", `a"b`, `\n`, " ", "word", "-m comment", `" -j ACCEPT #`}),
		rapid.StringOfN(rapid.RuneFrom([]rune(printable)), 1, MaxWhy, MaxWhy),
	).Draw(t, "why")
	r.Record = g.flag("record", 4)
	return r
}

const printable = " !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"

func nonEmpty(p Ports) bool { return !p.IsEmpty() }

func (g setGen) prefixes() ([]netip.Prefix, bool) {
	all := []string{"0.0.0.0/0", "::/0", "10.0.0.0/8", "127.0.0.6/32", "192.0.2.64/26", "128.0.0.0/1", "::6/128", "fd00::/8", "2001:db8::/61", "::1/128"}
	var ps []netip.Prefix
	for _, s := range rapid.SliceOfN(rapid.SampledFrom(all), 1, 4).Draw(g.T, "prefixes") {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	not := rapid.Bool().Draw(g.T, "not")
	if !not {
		return ps, false
	}
	var one []netip.Prefix // of each family at most one can be negated
	for _, p := range ps {
		sameFamily := func(q netip.Prefix) bool { return q.Addr().Is4() == p.Addr().Is4() }
		if p.Bits() > 0 && !slices.ContainsFunc(one, sameFamily) {
			one = append(one, p)
		}
	}
	if len(one) == 0 {
		return ps, false
	}
	return one, true
}

// listed is the Set as it must come back: lowered, in the order of the script,
// without what is not part of a rule's identity.
func listed(f Family, s Set) Set {
	s = canonical(s.forCompare(f))
	slices.SortStableFunc(s.Bases, func(a, b BaseChain) int { return place(a.Table) - place(b.Table) })
	slices.SortStableFunc(s.Chains, func(a, b Chain) int { return place(a.Table) - place(b.Table) })
	return s
}

func place(t Table) int { return slices.Index(tableOrder[:], t) }

func canonical(s Set) Set {
	clean := func(rules []Rule) {
		for i := range rules {
			rules[i].Record, rules[i].Counter = false, Counter{}
		}
	}
	s.Bases = slices.DeleteFunc(s.Bases, func(c BaseChain) bool { return len(c.Rules) == 0 })
	for i := range s.Bases {
		s.Bases[i].Place, s.Bases[i].Policy = Last, ""
		clean(s.Bases[i].Rules)
	}
	for i := range s.Chains {
		clean(s.Chains[i].Rules)
	}
	return s
}

func TestGeneratedSetsAreValid(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		if err := genSet(rapid.Bool().Draw(t, "kernel")).Draw(t, "set").Validate(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestLowerIsIdempotent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := genSet(false).Draw(t, "set")
		for _, f := range Families() {
			once := s.Lower(f)
			if d := cmp.Diff(once, once.Lower(f), cmpSets); d != "" {
				t.Fatalf("%s: %s", f, d)
			}
			if err := once.Validate(); err != nil {
				t.Fatalf("lowered to %s: %v", f, err)
			}
		}
	})
}

func TestLower(t *testing.T) {
	ps := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	for _, test := range []struct {
		name   string
		rule   Rule
		v4, v6 string
	}{
		{"both families", Rule{Action: Return{}}, "-j RETURN", "-j RETURN"},
		{"addresses", Rule{Matches: []Match{Destination{Prefixes: ps("10.0.0.0/8", "fd00::/8", "192.0.2.1/32")}}, Action: Return{}},
			"-d 10.0.0.0/8 -j RETURN|-d 192.0.2.1/32 -j RETURN", "-d fd00::/8 -j RETURN"},
		{"one family only", Rule{Matches: []Match{Source{Prefixes: ps("::1/128")}}, Action: Return{}}, "", "-s ::1/128 -j RETURN"},
		{"negated, of the other family", Rule{Matches: []Match{Source{ps("::1/128"), true}}, Action: Return{}}, "-j RETURN", "! -s ::1/128 -j RETURN"},
		{"every address", Rule{Matches: []Match{Source{Prefixes: ps("0.0.0.0/0")}}, Action: Return{}}, "-j RETURN", ""},
		{"every interface", Rule{Matches: []Match{InInterface{"+", false}, OutInterface{"+", false}}, Action: Drop{}}, "-j DROP", "-j DROP"},
		{"owners", Rule{Matches: []Match{OwnerUID{UIDs: MustUIDs("1,5-6")}}, Action: Return{}},
			"-m owner --uid-owner 1 -j RETURN|-m owner --uid-owner 5-6 -j RETURN", "-m owner --uid-owner 1 -j RETURN|-m owner --uid-owner 5-6 -j RETURN"},
		{"reject", Rule{Action: Reject{}}, "-j REJECT --reject-with icmp-port-unreachable", "-j REJECT --reject-with icmp6-port-unreachable"},
		{"products", Rule{Matches: []Match{Source{Prefixes: ps("10.0.0.0/8", "11.0.0.0/8")}, OwnerGID{GIDs: MustUIDs("1,3")}}, Action: Return{}, Why: "w"},
			`-s 10.0.0.0/8 -m owner --gid-owner 1 -m comment --comment "w" -j RETURN|-s 10.0.0.0/8 -m owner --gid-owner 3 -m comment --comment "w" -j RETURN|` +
				`-s 11.0.0.0/8 -m owner --gid-owner 1 -m comment --comment "w" -j RETURN|-s 11.0.0.0/8 -m owner --gid-owner 3 -m comment --comment "w" -j RETURN`, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := Set{Bases: []BaseChain{{Table: NAT, Hook: Output, Rules: []Rule{test.rule}}}}
			for f, want := range map[Family]string{IPv4: test.v4, IPv6: test.v6} {
				var got []string
				for _, r := range s.Lower(f).Bases[0].Rules {
					got = append(got, r.String())
				}
				if g := strings.Join(got, "|"); g != want {
					t.Errorf("%s: got %s, want %s", f, g, want)
				}
			}
		})
	}
	if s := (Set{Only: IPv4, Chains: []Chain{{Table: NAT, Name: "A"}}}).Lower(IPv6); s.Has(IPv6) {
		t.Errorf("a Set for IPv4 alone has rules for IPv6: %v", s)
	}
}

func TestLowerLeavesTheSetAlone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := genSet(false).Draw(t, "set")
		before := fmt.Sprintf("%#v", s)
		s.Lower(IPv4)
		s.Lower(IPv6)
		s.AppendIPTables(nil, IPv4)
		if after := fmt.Sprintf("%#v", s); after != before {
			t.Fatalf("before %s\nafter %s", before, after)
		}
	})
}
