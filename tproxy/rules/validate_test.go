package rules

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestValidate(t *testing.T) {
	ps := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	in := func(r Rule) Set {
		return Set{Chains: []Chain{{Table: NAT, Name: "A"}, {Table: NAT, Name: "B", Rules: []Rule{r}}}}
	}
	match := func(m ...Match) Set { return in(Rule{Matches: m, Action: Return{}}) }
	act := func(a Action) Set { return in(Rule{Action: a}) }
	name := func(s string) Set { return Set{Chains: []Chain{{Table: NAT, Name: s}}} }
	for want, sets := range map[string][]Set{
		"": {
			{}, match(), match(TCP, SYN{}), act(Jump{"A"}), act(Goto{"A"}), name("A_b-c.9"), name(strings.Repeat("a", MaxChainName)),
			match(Source{ps("10.0.0.0/8", "::1/128"), true}), match(InInterface{"fifteen-bytes-x", false}), match(OutInterface{"+", false}),
			act(Translate{Target: "DNAT", To: "192.0.2.1"}), act(Translate{Target: "MASQUERADE"}), in(Rule{Matches: []Match{TCP}, Action: Translate{Target: "DNAT", To: "[fd00::1]:80"}}),
			in(Rule{Action: Return{}, Why: strings.Repeat("~", MaxWhy)}), match(TCP, DestinationPorts{MustPorts("1,3,5,7,9,11,13,15,17,19,21,23,25,100-200"), true}),
		},
		"no action":          {act(nil)},
		"no chain":           {act(Jump{}), act(Goto{})},
		"which is not there": {act(Jump{"C"}), act(Goto{"C"}), act(Jump{"RETURN"})},
		"opaque action":      {act(Opaque{"-j DNAT"})},
		"opaque match":       {match(Opaque{"-m mark"})},
		"no way to reject":   {act(Reject{"a b"}), act(Reject{"\n"})},
		"redirect without":   {act(Redirect{1}), in(Rule{Matches: []Match{Protocol(132)}, Action: Redirect{1}})},
		"no translation": {act(Translate{}), act(Translate{Target: "DNAT"}), act(Translate{Target: "DNAT", To: "192.0.2.1:80"}), act(Translate{Target: "SNAT", To: "x"}), act(Translate{Target: "DNAT", To: "192.0.2.1\n"}),
			act(Translate{Target: "NETMAP", To: "192.0.2.0/24"}), act(Translate{Target: "DNAT", To: "192.0.2.1", RandomFully: true}), act(Translate{Target: "MASQUERADE", To: "1-2"}), act(Translate{Target: "MASQUERADE", Persistent: true}),
			act(Translate{Target: "DNAT", To: "--random"}), act(Translate{Target: "DNAT", To: "[fd00::1]:80"}), act(Translate{Target: "DNAT", To: ":80"})},
		"zone 0":                    {act(CTZone{})},
		"not in canonical order":    {match(TCP, Source{Prefixes: ps("10.0.0.0/8")})},
		"two matches of one kind":   {match(TCP, UDP), match(SYN{}, SYN{})},
		"SYN without tcp":           {match(SYN{}), match(UDP, SYN{})},
		"source ports without":      {match(SourcePorts{Ports: Port(1)}), match(TCP, SourcePorts{})},
		"destination ports without": {match(DestinationPorts{Ports: Port(1)}), match(UDP, DestinationPorts{})},
		"ports cannot be negated":   {match(TCP, SourcePorts{MustPorts("1,3,5,7,9,11,13,15,17,19,21,23,25,27,100-200"), true}), match(TCP, DestinationPorts{MustPorts("1,3,5,7,9,11,13,15,17,19,21,23,25,27,100-200"), true})},
		"without addresses":         {match(Source{}), match(Destination{Not: true})},
		"is no prefix":              {match(Source{Prefixes: []netip.Prefix{{}}}), match(Source{Prefixes: []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr("::ffff:1.2.3.4"), 128)}})},
		"host bits":                 {match(Source{Prefixes: ps("10.0.0.1/8")})},
		"no address is outside":     {match(Source{ps("0.0.0.0/0"), true}), match(Destination{ps("::/0"), true})},
		"prefix of a family":        {match(Source{ps("10.0.0.0/8", "11.0.0.0/8"), true})},
		"no interface is outside":   {match(InInterface{"+", true}), match(OutInterface{"+", true})},
		"accepted is a name":        {match(InInterface{"", false}), match(InInterface{"sixteen-bytes-xx", false}), match(OutInterface{"a b", false}), match(OutInterface{"-j", false}), match(OutInterface{"a+b", false}), match(OutInterface{"a\nb", false}), match(OutInterface{"..", false})},
		"without an owner":          {match(OwnerUID{}), match(OwnerGID{})},
		"range of owners":           {match(OwnerUID{MustUIDs("1,3"), true}), match(OwnerGID{MustUIDs("1,3"), true})},
		"no connection state":       {match(CTState{}), match(CTState{States: "NEW,OLD"}), match(CTState{States: "NEW\n"})},
		"not sorted":                {match(CTState{States: "NEW,ESTABLISHED"}), match(CTState{States: "NEW,NEW"})},
		"at most 255":               {in(Rule{Action: Return{}, Why: strings.Repeat("a", MaxWhy+1)})},
		"printable ASCII":           {in(Rule{Action: Return{}, Why: "a\nb"}), in(Rule{Action: Return{}, Why: "\x00"}), in(Rule{Action: Return{}, Why: "ü"}), in(Rule{Action: Return{}, Why: "\x7f"}), in(Rule{Action: Return{}, Why: "\xff"})},
		"a chain's name has":        {name(""), name(strings.Repeat("a", MaxChainName+1)), name("a b"), name("-a"), name("9"), name("a\n"), name("!"), name("ü")},
		"a hook's or a target's":    {name("OUTPUT"), name("PREROUTING"), name("FORWARD"), name("RETURN"), name("LOG")},
		"stands twice": {
			{Chains: []Chain{{Table: NAT, Name: "A"}, {Table: NAT, Name: "A"}}},
			{Bases: []BaseChain{{Table: NAT, Hook: Output}, {Table: NAT, Hook: Output, Place: First}}},
		},
		"no such hook":      {{Bases: []BaseChain{{Table: NAT, Hook: Forward}}}, {Bases: []BaseChain{{Table: NAT, Hook: "OUTPUT -j DROP"}}}, {Bases: []BaseChain{{Table: "security", Hook: Output}}}},
		"there is no table": {{Chains: []Chain{{Table: "security", Name: "A"}}}, {Chains: []Chain{{Name: "A"}}}},
	} {
		for i, s := range sets {
			err := s.Validate()
			var e *InvalidError
			switch {
			case want == "" && err != nil:
				t.Errorf("valid Set %d: %v", i, err)
			case want != "" && (!errors.As(err, &e) || !strings.Contains(err.Error(), want)):
				t.Errorf("%s, Set %d: got %v", want, i, err)
			}
		}
	}
}

func TestValidateReportsEveryFault(t *testing.T) {
	s := Set{
		Bases:  []BaseChain{{Table: NAT, Hook: Output, Rules: []Rule{{Action: Return{}}, {Action: Jump{"B"}, Why: "\n"}}}},
		Chains: []Chain{{Table: NAT, Name: "a b"}, {Table: NAT, Name: "A", Rules: []Rule{{}}}},
	}
	var e *InvalidError
	if !errors.As(s.Validate(), &e) || len(e.Faults) != 4 {
		t.Fatalf("%v", e)
	}
	for i, want := range []Fault{{NAT, "OUTPUT", 2, ""}, {NAT, "OUTPUT", 2, ""}, {NAT, `"a b"`, 0, ""}, {NAT, "A", 1, ""}} {
		got := e.Faults[i]
		if got.What == "" {
			t.Errorf("fault %d says nothing", i)
		}
		if got.What = ""; got != want {
			t.Errorf("fault %d: got %+v, want %+v", i, got, want)
		}
	}
	if text := e.Error(); strings.Contains(text, "\n") {
		t.Errorf("%q is more than a line", text)
	}
}

// Theorem 8: no string of a Set can add a rule or a line to a script. Either
// Validate refuses it, or the script has the lines that it must have, and reads
// back as the Set.
func TestNoStringAddsALine(t *testing.T) {
	hostile := rapid.OneOf(
		rapid.SampledFrom([]string{"", "x", "lo", "A", "\n", "\r", "x\n-A OUTPUT -j DROP", "x\nCOMMIT\n*filter", "x -j DROP", "x\x00y", `"`, `\`, `x" -j DROP "`, `\"`, "#", "x #", "! x", "-j",
			"x\u2028y", "x\ty", "$(id)", "`id`", ";", "x;y", "{ }", "@set", "x,y", "tcp-reset", "OUTPUT", "DROP", "nat", "NEW", "NEW -j DROP", "NEW,RELATED", "+"}),
		rapid.StringN(0, 40, 300),
		rapid.StringMatching(`[-A-Za-z0-9"\\ \n+!#]{0,30}`),
	)
	accepted, refused := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		draw := func(label, or string) string {
			if rapid.IntRange(0, 5).Draw(t, label+"?") > 0 {
				return or
			}
			return hostile.Draw(t, label)
		}
		chain := draw("chain", "A")
		r := Rule{
			Matches: []Match{InInterface{Name: draw("in", "lo")}, OutInterface{Name: draw("out", "eth0")}, TCP, CTState{States: draw("state", "NEW")}},
			Why:     draw("why", "because"),
			Action: rapid.SampledFrom([]Action{Jump{chain}, Goto{chain}, Reject{draw("with", "tcp-reset")}, Jump{draw("jump", chain)},
				Translate{Target: draw("target", "DNAT"), To: draw("to", "192.0.2.1:80")}}).Draw(t, "action"),
		}
		r.Why = rapid.OneOf(hostile, rapid.Just(r.Why)).Draw(t, "comment")
		table := Table(draw("table", "nat"))
		s := Set{
			Bases:  []BaseChain{{Table: table, Hook: Hook(draw("hook", "OUTPUT")), Place: Place(rapid.IntRange(0, 1).Draw(t, "place")), Rules: []Rule{r, r}}},
			Chains: []Chain{{Table: table, Name: chain}, {Table: table, Name: "LAST", Rules: []Rule{r}}},
		}
		if s.Validate() != nil {
			refused++
			return
		}
		accepted++
		for _, f := range Families() {
			text := s.IPTables(f)
			// table, two declarations, two rules, one rule, COMMIT
			if got := strings.Count(string(text), "\n"); got != 7 || strings.ContainsAny(string(text), "\r\x00\t") {
				t.Fatalf("%d lines, not 7:\n%q", got, text)
			}
			got, err := ParseSave(f, text)
			if err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			if d := cmp.Diff(listed(f, s), canonical(got), cmpSets); d != "" {
				t.Fatalf("%s\n%s", d, text)
			}
		}
	})
	if accepted == 0 || refused == 0 {
		t.Errorf("%d accepted, %d refused: the test says nothing", accepted, refused)
	}
}

func TestCheckInterface(t *testing.T) {
	for _, name := range []string{"lo", "eth0", "veth+", "eth0.100", "br-0a1b2c", "wlp2s0@x", "+", "a_b"} {
		if err := CheckInterface(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", ".", "..", "-a", "!a", "a b", "a/b", "a:b", "a\tb", "a\x00", `a"`, "a'", "a;b", "a{", "a+b", "sixteen-bytes-xx", "ü"} {
		if CheckInterface(name) == nil {
			t.Errorf("%q is accepted", name)
		}
	}
}
