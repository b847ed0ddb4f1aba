package rules

import (
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestRenderRules(t *testing.T) {
	odd := func(n int) (p Ports) { // 1, 3, 5, ...: no two merge
		for i := range n {
			p = p.Union(Port(uint16(2*i + 1)))
		}
		return p
	}
	tcp := func(m ...Match) []Match { return append([]Match{TCP}, m...) }
	for _, test := range []struct {
		name string
		rule Rule
		want string
	}{
		{"no target", Rule{Action: Nothing{}}, ""},
		{"one port", Rule{Matches: tcp(DestinationPorts{Ports: Port(22)}), Action: Return{}}, "-p tcp -m tcp --dport 22 -j RETURN"},
		{"one range", Rule{Matches: tcp(DestinationPorts{Ports: MustPorts("80-90")}), Action: Return{}}, "-p tcp -m tcp --dport 80:90 -j RETURN"},
		{"multiport", Rule{Matches: tcp(DestinationPorts{Ports: MustPorts("22,80-90")}), Action: Return{}}, "-p tcp -m multiport --dports 22,80:90 -j RETURN"},
		{"negated", Rule{Matches: tcp(DestinationPorts{Ports: Port(22), Not: true}), Action: Return{}}, "-p tcp -m tcp ! --dport 22 -j RETURN"},
		{"negated multiport", Rule{Matches: tcp(DestinationPorts{Ports: MustPorts("1,3"), Not: true}), Action: Return{}}, "-p tcp -m multiport ! --dports 1,3 -j RETURN"},
		{"syn and ports name tcp once", Rule{Matches: tcp(SYN{}, SourcePorts{Ports: Port(1)}, DestinationPorts{Ports: Port(2)}), Action: Return{}}, "-p tcp -m tcp --syn --sport 1 --dport 2 -j RETURN"},
		{"comments last", Rule{Matches: tcp(DestinationLocal{}, OwnerUID{UIDs: MustUIDs("5678")}, CTState{States: "NEW"}), Action: Jump{"A"}, Why: "why"},
			`-p tcp -m addrtype --dst-type LOCAL -m owner --uid-owner 5678-5678 -m conntrack --ctstate NEW -m comment --comment "why" -j A`},
		{"quoting", Rule{Action: Goto{"A"}, Why: `a "b" \ it's`}, `-m comment --comment "a \"b\" \\ it's" -g A`},
		{"all negations", Rule{Matches: []Match{Source{[]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, true}, InInterface{"a", true}, OutInterface{"b+", true}, DestinationLocal{true},
			OwnerUID{MustUIDs("1-2"), true}, OwnerGID{MustUIDs("3"), true}, CTState{"NEW", true}}, Action: Accept{}},
			"! -s 10.0.0.0/8 ! -i a ! -o b+ -m addrtype ! --dst-type LOCAL -m owner ! --uid-owner 1-2 -m owner ! --gid-owner 3-3 -m conntrack ! --ctstate NEW -j ACCEPT"},
		{"protocol by number", Rule{Matches: []Match{Protocol(1)}, Action: Drop{}}, "-p 1 -j DROP"},
		{"reject", Rule{Matches: tcp(), Action: Reject{"tcp-reset"}}, "-p tcp -j REJECT --reject-with tcp-reset"},
		{"redirect", Rule{Matches: tcp(), Action: Redirect{15006}}, "-p tcp -j REDIRECT --to-ports 15006"},
		{"zone", Rule{Action: CTZone{2}}, "-j CT --zone 2"},
		{"15 ports", Rule{Matches: tcp(DestinationPorts{Ports: odd(15)}), Action: Return{}}, "-p tcp -m multiport --dports 1,3,5,7,9,11,13,15,17,19,21,23,25,27,29 -j RETURN"},
		{"16 ports", Rule{Matches: tcp(DestinationPorts{Ports: odd(16)}), Action: Return{}},
			"-p tcp -m multiport --dports 1,3,5,7,9,11,13,15,17,19,21,23,25,27,29 -j RETURN|-p tcp -m tcp --dport 31 -j RETURN"},
		{"a range takes two", Rule{Matches: tcp(DestinationPorts{Ports: odd(14).Union(MustPorts("100-200"))}), Action: Return{}},
			"-p tcp -m multiport --dports 1,3,5,7,9,11,13,15,17,19,21,23,25,27 -j RETURN|-p tcp -m tcp --dport 100:200 -j RETURN"},
		{"13 ports and a range", Rule{Matches: tcp(DestinationPorts{Ports: odd(13).Union(MustPorts("100-200"))}), Action: Return{}},
			"-p tcp -m multiport --dports 1,3,5,7,9,11,13,15,17,19,21,23,25,100:200 -j RETURN"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := Set{Chains: []Chain{{Table: NAT, Name: "A"}, {Table: NAT, Name: "B", Rules: []Rule{test.rule}}}}
			var want strings.Builder
			want.WriteString("*nat\n:A - [0:0]\n:B - [0:0]\n")
			for line := range strings.SplitSeq(test.want, "|") {
				want.WriteString(strings.TrimSpace("-A B "+line) + "\n")
			}
			if got := string(s.IPTables(IPv4)); got != want.String()+"COMMIT\n" {
				t.Errorf("got %s, want %s", got, want.String())
			}
		})
	}
}

func TestRenderSet(t *testing.T) {
	r := func(chain, why string) Rule { return Rule{Action: Jump{chain}, Why: why} }
	s := Set{
		Bases: []BaseChain{
			{Table: Raw, Hook: Output, Rules: []Rule{{Action: CTZone{2}, Why: "z"}}},
			{Table: NAT, Hook: Prerouting, Policy: "DROP", Rules: []Rule{r("IN", "a"), r("IN", "b")}},
			{Table: NAT, Hook: Output, Place: First, Rules: []Rule{r("OUT", "a"), r("OUT", "b")}},
		},
		Chains: []Chain{{Table: NAT, Name: "IN"}, {Table: NAT, Name: "OUT", Rules: []Rule{{Action: Return{}, Why: "data", Record: true}}}},
	}
	const want = `*nat
:IN - [0:0]
:OUT - [0:0]
-A PREROUTING -m comment --comment "a" -j IN
-A PREROUTING -m comment --comment "b" -j IN
-I OUTPUT 1 -m comment --comment "b" -j OUT
-I OUTPUT 1 -m comment --comment "a" -j OUT
-A OUT -m comment --comment "data" -j RETURN
COMMIT
*raw
-A OUTPUT -m comment --comment "z" -j CT --zone 2
COMMIT
`
	for _, f := range Families() {
		if got := string(s.IPTables(f)); got != want {
			t.Errorf("%s: got\n%s", f, got)
		}
	}
	s.NoComments = true
	plain := strings.NewReplacer(` -m comment --comment "a"`, "", ` -m comment --comment "b"`, "", ` -m comment --comment "z"`, "").Replace(want)
	if got := string(s.IPTables(IPv4)); got != plain {
		t.Errorf("without comments: got\n%s", got)
	}
	s.Only = IPv6
	if got := s.IPTables(IPv4); got != nil {
		t.Errorf("for IPv6 alone: got\n%s", got)
	}
	if got := (Set{}).IPTables(IPv4); got != nil {
		t.Errorf("nothing: got\n%s", got)
	}
}

func TestRenderPanicsOnAnInvalidSet(t *testing.T) {
	defer func() {
		if _, ok := recover().(*InvalidError); !ok {
			t.Error("no *InvalidError")
		}
	}()
	Set{Chains: []Chain{{Table: NAT, Name: "A", Rules: []Rule{{Action: Opaque{"-j DNAT"}}}}}}.IPTables(IPv4)
}

// No built-in chain is declared, and the same Set gives the same bytes.
func TestRenderDeclaresOwnChainsOnly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := genSet(false).Draw(t, "set")
		for _, f := range Families() {
			text := string(s.IPTables(f))
			if text != string(s.IPTables(f)) {
				t.Fatal("two renderings differ")
			}
			declared := 0
			for line := range strings.Lines(text) {
				if strings.HasPrefix(line, ":") {
					declared++
					name, rest, _ := strings.Cut(line[1:], " ")
					if isHook(Mangle, name) || rest != "- [0:0]\n" {
						t.Fatalf("%s declares %q", text, line)
					}
				}
				if i := strings.Index(line, "-m comment"); i > 0 && s.NoComments && !strings.Contains(line, "--comment") {
					t.Fatalf("%q", line)
				}
			}
			if s.Has(f) && declared != len(s.Chains) {
				t.Fatalf("%d declarations for %d chains", declared, len(s.Chains))
			}
		}
	})
}
