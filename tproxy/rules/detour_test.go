package rules_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// firewalldChains are those that firewalld makes with FirewallBackend=iptables, with a
// direct rule of somebody's.
const firewalldChains = `*nat
:OUTPUT_direct - [0:0]
:PREROUTING_direct - [0:0]
-A OUTPUT -j OUTPUT_direct
-A PREROUTING -j PREROUTING_direct
-A PREROUTING -m comment --comment "foreign: zones" -j ACCEPT
-A OUTPUT_direct -p tcp -m tcp --dport 7777 -m comment --comment "foreign" -j ACCEPT
-A OUTPUT_direct -p tcp -m tcp --dport 7778 -m comment --comment "foreign" -j ACCEPT
-A PREROUTING_direct -p tcp -m tcp --dport 7779 -m comment --comment "foreign" -j ACCEPT
COMMIT
`

func planOf(t tproxytest.Fataler, c tproxy.Config) rules.Set {
	t.Helper()
	p, err := tproxy.Build(c, tproxy.Host{})
	if err != nil {
		t.Fatalf("Build: %v", err)
	}
	return p.Rules
}

// detoured is a kernel of a firewalld with FirewallBackend=iptables.
type detoured struct {
	*tproxytest.Netfilter
	t tproxytest.Fataler
}

func newDetoured(t tproxytest.Fataler, parts ...string) detoured {
	n := detoured{&tproxytest.Netfilter{Family: rules.IPv4}, t}
	for _, p := range parts {
		n.must(p)
	}
	return n
}

func (n detoured) must(script string) {
	n.t.Helper()
	if err := n.Restore([]byte(script), nil); err != nil {
		n.t.Fatalf("%v\n%s", err, script)
	}
}

func (n detoured) found() tproxy.Found {
	n.t.Helper()
	live, err := rules.ParseSave(n.Family, n.Save())
	if err != nil {
		n.t.Fatalf("ParseSave: %v", err)
	}
	return tproxy.Find(n.Family, live)
}

// toDirect moves our jumps in nat to where firewalld's reload puts direct rules of built-in
// chains: those of OUTPUT in front of others', those of PREROUTING behind.
func (n detoured) toDirect(hooks ...rules.Hook) {
	n.t.Helper()
	for _, h := range hooks {
		base, _ := n.found().Ours.Base(rules.NAT, h)
		for i, r := range base.Rules {
			if r.Via != "" {
				continue
			}
			into := fmt.Sprintf("-I %s_direct %d ", h, i+1)
			if h == rules.Prerouting {
				into = fmt.Sprintf("-A %s_direct ", h)
			}
			n.must(fmt.Sprintf("*nat\n-D %s %s\n%s%s\nCOMMIT\n", h, r, into, r))
		}
	}
}

// lines are those of a script that are about jumps in nat.
func lines(script []byte) (out []string) {
	table := ""
	for line := range strings.Lines(string(script)) {
		if line[0] == '*' {
			table = line
		}
		if table != "*nat\n" {
			continue
		}
		if strings.Contains(line, " OUTPUT") || strings.Contains(line, " PREROUTING") {
			line, _, _ = strings.Cut(line, " -j ")
			line, _, _ = strings.Cut(line, ` --comment "`)
			out = append(out, strings.TrimSuffix(strings.TrimSpace(line), " -m comment"))
		}
	}
	return out
}

// A jump of ours in a chain for direct rules stands for the one in the built-in chain:
// what each change of the rules makes of it, line by line.
func TestTransitionsOfJumpsInDirectChains(t *testing.T) {
	all := planOf(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
	plain := planOf(t, tproxy.Config{})
	bare := planOf(t, tproxy.Config{DisableComments: true})
	inbound := planOf(t, tproxy.Config{Outbound: tproxy.Outbound{Off: true}})
	const (
		udp = "-p udp -m udp --dport 53"
		tcp = "-p tcp -m tcp --syn"
		to  = tcp + " -m addrtype --dst-type LOCAL"
	)
	for name, c := range map[string]struct {
		from   rules.Set
		edit   string
		want   rules.Set
		script []string
	}{
		"the same":             {all, "", all, nil},
		"nothing":              {all, "", rules.Set{}, []string{"-D PREROUTING_direct " + to, "-D OUTPUT_direct " + udp, "-D OUTPUT_direct " + tcp}},
		"DNS off":              {all, "", plain, []string{"-D OUTPUT_direct " + udp}},
		"DNS on":               {plain, "", all, []string{"-I OUTPUT 3 " + udp}},
		"outbound off":         {all, "", inbound, []string{"-D OUTPUT_direct " + udp}},
		"comments off":         {plain, "", bare, []string{"-D PREROUTING_direct " + to, "-I PREROUTING 2 " + to, "-D OUTPUT_direct " + tcp, "-I OUTPUT 3 " + tcp}},
		"doubled in front":     {all, "-I OUTPUT 1 JUMP", all, []string{"-D OUTPUT " + tcp}},
		"doubled behind":       {all, "-A OUTPUT JUMP", all, []string{"-D OUTPUT " + tcp}},
		"twice there":          {plain, "-A OUTPUT_direct JUMP", plain, []string{"-D OUTPUT_direct " + tcp, "-D OUTPUT_direct " + tcp, "-I OUTPUT 1 " + tcp}},
		"gone":                 {all, "-D OUTPUT_direct JUMP", all, []string{"-I OUTPUT 4 " + tcp}},
		"not led to":           {plain, "-D OUTPUT -j OUTPUT_direct", plain, []string{"-D OUTPUT_direct " + tcp, "-I OUTPUT 1 " + tcp}},
		"not led to, goes":     {plain, "-D OUTPUT -j OUTPUT_direct", rules.Set{}, []string{"-D PREROUTING_direct " + to, "-D OUTPUT_direct " + tcp}},
		"led to, for some":     {plain, "-D OUTPUT -j OUTPUT_direct\n-A OUTPUT -p tcp -j OUTPUT_direct", plain, []string{"-D OUTPUT_direct " + tcp, "-I OUTPUT 1 " + tcp}},
		"the other way round":  {all, "-D OUTPUT_direct JUMP\n-I OUTPUT_direct 1 JUMP", all, []string{"-D OUTPUT_direct " + tcp, "-D OUTPUT_direct " + udp, "-I OUTPUT 1 " + tcp, "-I OUTPUT 1 " + udp}},
		"of another comment":   {plain, "-D OUTPUT_direct JUMP\n-I OUTPUT_direct 1 OTHER", plain, []string{"-D OUTPUT_direct " + tcp, "-I OUTPUT 3 " + tcp}},
		"behind others' there": {plain, "-D OUTPUT_direct JUMP\n-A OUTPUT_direct JUMP", plain, nil},
	} {
		t.Run(name, func(t *testing.T) {
			n := newDetoured(t, foreignRules, firewalldChains, string(c.from.IPTables(rules.IPv4)))
			n.toDirect(rules.Output, rules.Prerouting)
			output, _ := planOf(t, tproxy.Config{}).Base(rules.NAT, rules.Output)
			jump := output.Rules[0]
			other := jump
			other.Why = "kuma/mesh/transparent/proxy/ of an older version"
			if c.edit != "" {
				n.must("*nat\n" + strings.NewReplacer("JUMP", jump.String(), "OTHER", other.String()).Replace(c.edit) + "\nCOMMIT\n")
			}
			foreign, before := foreignOf(n), direct(n)
			found := n.found()
			script := rules.Transition(rules.IPv4, found.Ours, c.want)
			got := lines(script)
			if !slices.Equal(got, c.script) {
				t.Errorf("the script is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.script, "\n"))
			}
			if changes := rules.Compare(rules.IPv4, found.Ours, c.want); (len(changes) == 0) != (script == nil) {
				t.Errorf("changes %v, and the script\n%s", changes, script)
			}
			after := rules.After(rules.IPv4, n.Set(), found.Ours, c.want)
			n.must(string(script))
			now := n.found()
			if changes := rules.Compare(rules.IPv4, now.Ours, c.want); len(changes)+len(now.References) > 0 {
				t.Errorf("%v, references %v", changes, now.References)
			}
			if d := rules.Compare(rules.IPv4, after, n.Set()); len(d) > 0 {
				t.Errorf("After is another: %v", d)
			}
			if d := cmp.Diff(foreign, foreignOf(n)); d != "" {
				t.Errorf("others' rules: %s", d)
			}
			// And back.
			back := rules.Transition(rules.IPv4, now.Ours, found.Ours)
			n.must(string(back))
			if d := rules.Compare(rules.IPv4, n.found().Ours, found.Ours); len(d) > 0 {
				t.Errorf("put back by\n%s\n%v", back, d)
			}
			if d := cmp.Diff(foreign, foreignOf(n)); d != "" {
				t.Errorf("others' rules after the way back: %s", d)
			}
			if slices.Contains([]string{"nothing", "DNS off", "comments off", "of another comment"}, name) {
				if d := cmp.Diff(before, direct(n)); d != "" {
					t.Errorf("ours are in another place after the way back: %s", d)
				}
			}
		})
	}
}

// direct is what the chains for direct rules hold.
func direct(n detoured) (out []string) {
	for _, c := range n.Set().Chains {
		for _, r := range c.Rules {
			if strings.HasSuffix(c.Name, "_direct") {
				out = append(out, c.Name+" "+r.String())
			}
		}
	}
	return out
}

// foreignOf is all that is not of known chains, in order.
func foreignOf(n detoured) (out []string) {
	found := n.found()
	set := n.Set()
	for _, b := range set.Bases {
		for i, r := range b.Rules {
			if !found.Ours.Covers(b.Table, string(b.Hook), i+1) {
				out = append(out, fmt.Sprintf("%s %s %s", b.Table, b.Hook, r))
			}
		}
	}
	for _, c := range set.Chains {
		if _, ours := found.Ours.Chain(c.Table, c.Name); ours {
			continue
		}
		out = append(out, fmt.Sprintf("%s %s", c.Table, c.Name))
		for i, r := range c.Rules {
			if !found.Ours.Covers(c.Table, c.Name, i+1) {
				out = append(out, fmt.Sprintf("%s %s %s", c.Table, c.Name, r))
			}
		}
	}
	return out
}

// Whatever firewalld and others do with the jumps, in the built-in chains and in those for
// direct rules, one script makes of it what is wanted, without a rule twice, leaves
// others' alone, and leads back to what was there.
func TestTransitionMendsDirectChains(t *testing.T) {
	all := planOf(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
	sets := []rules.Set{all, planOf(t, tproxy.Config{}), planOf(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}, DisableComments: true}), {}}
	output, _ := all.Base(rules.NAT, rules.Output)
	rapid.Check(t, func(t *rapid.T) {
		n := newDetoured(t, foreignRules, firewalldChains, string(sets[rapid.IntRange(0, 3).Draw(t, "at first")].IPTables(rules.IPv4)))
		edit := func(t *rapid.T) {
			chain := rapid.SampledFrom([]string{"OUTPUT", "OUTPUT_direct"}).Draw(t, "chain")
			jump := output.Rules[rapid.IntRange(0, 1).Draw(t, "jump")].String()
			at := rapid.IntRange(1, 4).Draw(t, "at")
			script := rapid.SampledFrom([]string{
				fmt.Sprintf("-I %s %d %s", chain, at, jump),
				fmt.Sprintf("-D %s %s", chain, jump),
				"-D OUTPUT -j OUTPUT_direct",
				fmt.Sprintf("-I OUTPUT %d -j OUTPUT_direct", at),
				fmt.Sprintf("-I %s %d -p tcp -m comment --comment foreign -j ACCEPT", chain, at),
				"-D OUTPUT_direct -p tcp -m tcp --dport 7777 -m comment --comment foreign -j ACCEPT",
			}).Draw(t, "edit")
			_ = n.Restore([]byte("*nat\n"+script+"\nCOMMIT\n"), nil) // what is not there is not deleted
		}
		for range rapid.IntRange(0, 6).Draw(t, "edits") {
			if rapid.IntRange(0, 3).Draw(t, "reload") == 0 {
				n.toDirect(rules.Output)
			} else {
				edit(t)
			}
		}
		change := func(want rules.Set) {
			foreign, found := foreignOf(n), n.found()
			script := rules.Transition(rules.IPv4, found.Ours, want)
			after := rules.After(rules.IPv4, n.Set(), found.Ours, want)
			n.must(string(script))
			now := n.found()
			if changes := rules.Compare(rules.IPv4, now.Ours, want); len(changes)+len(now.References) > 0 {
				t.Fatalf("%v, references %v\nby\n%s", changes, now.References, script)
			}
			if again := rules.Transition(rules.IPv4, now.Ours, want); again != nil {
				t.Fatalf("a second script:\n%s", again)
			}
			if d := cmp.Diff(foreign, foreignOf(n)); d != "" {
				t.Fatalf("others' rules: %s\nby\n%s", d, script)
			}
			if d := rules.Compare(rules.IPv4, after, n.Set()); len(d) > 0 {
				t.Fatalf("After is another: %v\nby\n%s", d, script)
			}
		}
		before := n.found().Ours
		change(sets[rapid.IntRange(0, 3).Draw(t, "want")])
		for range rapid.IntRange(0, 2).Draw(t, "edits before the way back") {
			edit(t)
		}
		change(before)
		change(rules.Set{})
	})
}

// A packet is decided the same by all rules and by ours alone, where a chain for direct
// rules stands for the built-in one; a jump there that nothing leads to does nothing.
func TestWalkThroughDirectChains(t *testing.T) {
	n := newDetoured(t, firewalldChains, string(planOf(t, tproxy.Config{}).IPTables(rules.IPv4)))
	n.toDirect(rules.Output, rules.Prerouting)
	env := sim.EnvOf(netip.MustParseAddr("10.0.0.7"))
	for _, c := range []struct {
		edit string
		want sim.Kind
	}{
		{"", sim.Redirected},
		{"*nat\n-D OUTPUT -j OUTPUT_direct\n-D PREROUTING -j PREROUTING_direct\nCOMMIT\n", sim.Untouched},
	} {
		n.must(c.edit)
		ours := n.found().Ours
		for _, p := range []string{"out tcp uid=1000 10.0.0.7:4000 > 10.9.9.9:443", "in tcp 10.0.0.9:4000 > 10.0.0.7:8080"} {
			packet, err := sim.ParsePacket(p)
			if err != nil {
				t.Fatal(err)
			}
			for name, s := range map[string]rules.Set{"all": n.Set(), "ours": ours} {
				if v := sim.Decide(s, env, packet); v.Kind != c.want {
					t.Errorf("%s, %s: %s", name, p, v)
				}
			}
		}
	}
}
