package rules_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// read returns what is ours in a fake kernel, and everything else as text.
func read(t tproxytest.Fataler, n *tproxytest.Netfilter) (ours rules.Set, foreign string) {
	t.Helper()
	live, err := rules.ParseSave(n.Family, n.Save())
	if err != nil {
		t.Fatalf("ParseSave: %v", err)
	}
	ours, _ = live.Ours(n.Family, tproxy.Known())
	var b strings.Builder
	for _, c := range live.Bases {
		for _, r := range c.Rules {
			if strings.HasPrefix(r.Why, "foreign") {
				fmt.Fprintln(&b, c.Table, c.Hook, r)
			}
		}
	}
	for _, c := range live.Chains {
		if _, ok := tproxy.Known().Chain(c.Table, c.Name); !ok {
			fmt.Fprintln(&b, c.Table, c.Name, c.Rules)
		}
	}
	return ours, b.String()
}

const foreignRules = `*nat
:DOCKER - [0:0]
:KUMA_MESH_MINE - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -m comment --comment "foreign" -j DOCKER
-A OUTPUT -p tcp -m tcp --dport 9 -m comment --comment "foreign kuma/mesh/transparent/proxy/ KUMA_MESH_OUTBOUND" -j KUMA_MESH_MINE
-A OUTPUT -p tcp -m tcp --dport 10 -m comment --comment "foreign" -j ACCEPT
-A DOCKER -i docker0 -j RETURN
COMMIT
*raw
-A OUTPUT -p udp -m udp --dport 53 -m comment --comment "foreign" -j ACCEPT
COMMIT
`

// TestTransitionLeadsFromAnyPlanToAnyOther: whatever was installed, one script
// makes it what is wanted, a second one has nothing to do, and what is foreign
// stays where it was.
func TestTransitionLeadsFromAnyPlanToAnyOther(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		for _, f := range rules.Families() {
			n := &tproxytest.Netfilter{Family: f, Generator: "iptables-nft-save v1.8.9 (nf_tables)"}
			if err := n.Restore([]byte(foreignRules), nil); err != nil {
				t.Fatalf("foreign rules: %v", err)
			}
			_, foreign := read(t, n)
			empty := string(n.Save())
			var want rules.Set
			for i := range rapid.IntRange(1, 4).Draw(t, "installs") {
				cfg := tproxytest.Configs().Draw(t, "config")
				plan, err := tproxy.Build(cfg, tproxytest.Hosts(cfg).Draw(t, "host"))
				if _, refused := errors.AsType[*tproxy.RefusedError](err); refused {
					continue
				}
				if err != nil {
					t.Fatalf("Build: %v", err)
				}
				want = plan.Rules
				ours, _ := read(t, n)
				script := rules.Transition(f, ours, want)
				if changes := rules.Compare(f, ours, want); (len(changes) == 0) != (script == nil) {
					t.Fatalf("install %d: %d changes, and the script\n%s", i, len(changes), script)
				}
				if err := n.Restore(script, nil); err != nil {
					t.Fatalf("install %d: %v\n%s", i, err, script)
				}
				ours, now := read(t, n)
				if changes := rules.Compare(f, ours, want); len(changes) > 0 {
					t.Fatalf("install %d: not as wanted: %v\nby\n%s", i, changes, script)
				}
				if again := rules.Transition(f, ours, want); again != nil {
					t.Fatalf("install %d: a second script:\n%s", i, again)
				}
				if now != foreign {
					t.Fatalf("install %d changed foreign rules from\n%s\nto\n%s", i, foreign, now)
				}
			}
			ours, _ := read(t, n)
			if err := n.Restore(rules.Transition(f, ours, rules.Set{}), nil); err != nil {
				t.Fatalf("removal: %v", err)
			}
			if now := string(n.Save()); now != empty {
				t.Fatalf("removal left\n%s\ninstead of\n%s", now, empty)
			}
		}
	})
}

// TestTransitionPutsTheJumpsInTheirPlace: ours come first in OUTPUT, so that
// the proxy's own connections still meet the rules of others behind them, and
// last in PREROUTING, so that a port that Docker published answers as before.
func TestTransitionPutsTheJumpsInTheirPlace(t *testing.T) {
	n := &tproxytest.Netfilter{Family: rules.IPv4}
	if err := n.Restore([]byte(foreignRules), nil); err != nil {
		t.Fatal(err)
	}
	plan, err := tproxy.Build(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Restore(rules.Transition(rules.IPv4, rules.Set{}, plan.Rules), nil); err != nil {
		t.Fatal(err)
	}
	targets := func(table rules.Table, h rules.Hook) (out []string) {
		b, _ := n.Set().Base(table, h)
		for _, r := range b.Rules {
			out = append(out, r.Target())
		}
		return out
	}
	for _, c := range []struct {
		table rules.Table
		hook  rules.Hook
		want  string
	}{
		{rules.NAT, rules.Prerouting, "[DOCKER KUMA_MESH_INBOUND]"},
		{rules.NAT, rules.Output, "[KUMA_MESH_DNS KUMA_MESH_OUTBOUND KUMA_MESH_MINE ]"},
		{rules.Raw, rules.Output, "[KUMA_MESH_DNS_ZONE ]"},
	} {
		if got := fmt.Sprint(targets(c.table, c.hook)); got != c.want {
			t.Errorf("%s %s jumps to %s, want %s", c.table, c.hook, got, c.want)
		}
	}
}

// TestTransitionOrdersTables: nat goes in before raw and comes out after it.
func TestTransitionOrdersTables(t *testing.T) {
	with, err := tproxy.Build(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	without, err := tproxy.Build(tproxy.Config{}, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	order := func(script []byte) (out []string) {
		for line := range strings.Lines(string(script)) {
			if strings.HasPrefix(line, "*") {
				out = append(out, strings.TrimSpace(line))
			}
		}
		return out
	}
	lowered := with.Rules.Lower(rules.IPv4)
	for name, c := range map[string]struct {
		ours, want rules.Set
		order      string
	}{
		"in":             {rules.Set{}, with.Rules, "[*nat *raw]"},
		"out":            {lowered, rules.Set{}, "[*raw *nat]"},
		"DNS turned off": {lowered, without.Rules, "[*raw *nat]"},
		"DNS turned on":  {without.Rules.Lower(rules.IPv4), with.Rules, "[*nat *raw]"},
	} {
		if got := fmt.Sprint(order(rules.Transition(rules.IPv4, c.ours, c.want))); got != c.order {
			t.Errorf("%s: %s, want %s", name, got, c.order)
		}
	}
}

// TestTransitionLeavesWhatIsRight: a chain that does not change keeps its
// counters, because no line of the script names it.
func TestTransitionLeavesWhatIsRight(t *testing.T) {
	build := func(ports string) rules.Set {
		p, err := tproxy.Build(tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts(ports)}}, tproxy.Host{})
		if err != nil {
			t.Fatal(err)
		}
		return p.Rules
	}
	got := string(rules.Transition(rules.IPv4, build("80").Lower(rules.IPv4), build("81")))
	if strings.Contains(got, "OUTBOUND") || strings.Contains(got, "PREROUTING") || !strings.Contains(got, "--dport 81 ") {
		t.Errorf("a changed inbound port makes the script\n%s", got)
	}
}

// TestOursIsByNameAndRule: neither a comment nor a likeness makes a rule ours
// (Kuma's uninstall goes by words in a line, and deletes foreign rules).
func TestOursIsByNameAndRule(t *testing.T) {
	const text = `*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUMA_MESH_INBOUND - [0:0]
:KUMA_MESH_OUTBOUND - [0:0]
:KUMA_MESH_MINE - [0:0]
:KUMA_MESH_DNS_ZONE - [0:0]
-A PREROUTING -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m addrtype --dst-type LOCAL -j KUMA_MESH_INBOUND
-A PREROUTING -p tcp -m comment --comment "kuma/mesh/transparent/proxy/mine" -j KUMA_MESH_MINE
-A OUTPUT -s 10.0.0.1/32 -p tcp -j KUMA_MESH_OUTBOUND
-A KUMA_MESH_MINE -g KUMA_MESH_INBOUND
COMMIT
`
	live, err := rules.ParseSave(rules.IPv4, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	ours, refs := live.Ours(rules.IPv4, tproxy.Known())
	if len(ours.Bases) != 1 || len(ours.Bases[0].Rules) != 1 || ours.Bases[0].Rules[0].Target() != "KUMA_MESH_INBOUND" {
		t.Errorf("jumps of ours: %v", ours.Bases)
	}
	var names []string
	for _, c := range ours.Chains {
		names = append(names, c.Name)
	}
	// KUMA_MESH_DNS_ZONE is a chain of ours in raw, not in nat.
	if got := fmt.Sprint(names); got != "[KUMA_MESH_INBOUND KUMA_MESH_OUTBOUND]" {
		t.Errorf("chains of ours: %s", got)
	}
	var where []string
	for _, r := range refs {
		where = append(where, r.String())
	}
	want := "nat OUTPUT #1: -A OUTPUT -s 10.0.0.1/32 -p tcp -j KUMA_MESH_OUTBOUND\nnat KUMA_MESH_MINE #1: -A KUMA_MESH_MINE -g KUMA_MESH_INBOUND"
	if got := strings.Join(where, "\n"); got != want {
		t.Errorf("references:\n%s\nwant\n%s", got, want)
	}
}

func TestCompareNamesEveryKindOfChange(t *testing.T) {
	plan, err := tproxy.Build(tproxy.Config{}, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		edit func(s *rules.Set)
		want string
	}{
		"as wanted":     {func(*rules.Set) {}, ""},
		"missing jump":  {func(s *rules.Set) { s.Bases = s.Bases[1:] }, "missing rule"},
		"missing chain": {func(s *rules.Set) { s.Chains = s.Chains[:len(s.Chains)-1] }, "missing chain, missing rule"},
		"doubled rule": {func(s *rules.Set) {
			s.Chains[0].Rules = append(s.Chains[0].Rules, s.Chains[0].Rules[0])
		}, "extra rule"},
		"swapped rules": {func(s *rules.Set) {
			r := s.Chains[0].Rules
			r[0], r[1] = r[1], r[0]
		}, "other order"},
		"changed rule": {func(s *rules.Set) {
			s.Chains[0].Rules[0].Action = rules.Accept{}
		}, "missing rule, extra rule"},
		"changed comment": {func(s *rules.Set) {
			s.Chains[0].Rules[0].Why = "another"
		}, "missing rule, extra rule"},
		"extra chain": {func(s *rules.Set) {
			s.Chains = append(s.Chains, rules.Chain{Table: rules.Raw, Name: "KUMA_MESH_DNS_ZONE"})
		}, "extra chain"},
	} {
		live := plan.Rules.Lower(rules.IPv4)
		c.edit(&live)
		var kinds []string
		for _, ch := range rules.Compare(rules.IPv4, live, plan.Rules) {
			kinds = append(kinds, ch.Kind.String())
		}
		if got := strings.Join(kinds, ", "); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// TestTransitionMendsAnyOrder: jumps that were deleted, doubled, swapped or
// moved among foreign rules come out as wanted, in one script.
func TestTransitionMendsAnyOrder(t *testing.T) {
	plan, err := tproxy.Build(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	bare, err := tproxy.Build(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}, DisableComments: true}, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	output, _ := plan.Rules.Base(rules.NAT, rules.Output)
	rapid.Check(t, func(t *rapid.T) {
		n := &tproxytest.Netfilter{Family: rules.IPv4}
		if err := n.Restore([]byte(foreignRules), nil); err != nil {
			t.Fatalf("foreign rules: %v", err)
		}
		if err := n.Restore(rules.Transition(rules.IPv4, rules.Set{}, plan.Rules), nil); err != nil {
			t.Fatalf("install: %v", err)
		}
		_, foreign := read(t, n)
		for range rapid.IntRange(1, 5).Draw(t, "edits") {
			r := rapid.SampledFrom(output.Rules).Draw(t, "rule")
			edit := "*nat\n-D OUTPUT " + r.String() + "\nCOMMIT\n"
			if rapid.Bool().Draw(t, "insert") {
				edit = fmt.Sprintf("*nat\n-I OUTPUT %d %s\nCOMMIT\n", rapid.IntRange(1, 3).Draw(t, "at"), r)
			}
			n.Restore([]byte(edit), nil) // a rule that is not there is not deleted
		}
		want := rapid.SampledFrom([]rules.Set{plan.Rules, bare.Rules}).Draw(t, "want")
		ours, _ := read(t, n)
		script := rules.Transition(rules.IPv4, ours, want)
		if err := n.Restore(script, nil); err != nil {
			t.Fatalf("%v\n%s", err, script)
		}
		ours, now := read(t, n)
		if changes := rules.Compare(rules.IPv4, ours, want); len(changes) > 0 || now != foreign {
			t.Fatalf("%v\nforeign %s\nby\n%s", changes, now, script)
		}
	})
}

// TestTransitionKeepsThePlace: a jump that is made anew, or put back, stands
// among foreign rules where it stood.
func TestTransitionKeepsThePlace(t *testing.T) {
	with := tproxy.Config{}
	plan, err := tproxy.Build(with, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	with.DisableComments = true
	bare, err := tproxy.Build(with, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	n := &tproxytest.Netfilter{Family: rules.IPv4}
	must := func(script []byte) {
		t.Helper()
		if err := n.Restore(script, nil); err != nil {
			t.Fatalf("%v\n%s", err, script)
		}
	}
	must(plan.Rules.IPTables(rules.IPv4))
	must([]byte("*nat\n-I OUTPUT 1 -p tcp -j ACCEPT\n-A OUTPUT -p udp -j ACCEPT\n-I PREROUTING 1 -p tcp -j ACCEPT\n-A PREROUTING -p udp -j ACCEPT\nCOMMIT\n"))
	check := func(when string) {
		t.Helper()
		for _, h := range []rules.Hook{rules.Output, rules.Prerouting} {
			b, _ := n.Set().Base(rules.NAT, h)
			if len(b.Rules) != 3 || b.Rules[1].Target() == "" {
				t.Errorf("%s: %s is %v", when, h, b.Rules)
			}
		}
	}
	check("at first")
	before, _ := read(t, n)
	must(rules.Transition(rules.IPv4, before, bare.Rules))
	check("without comments")
	now, _ := read(t, n)
	must(rules.Transition(rules.IPv4, now, before))
	check("put back")
	must(rules.Transition(rules.IPv4, before, rules.Set{}))
	must(rules.Transition(rules.IPv4, rules.Set{}, before))
	check("put back from nothing")
}
