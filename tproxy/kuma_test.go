package tproxy_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

func find(t tproxytest.Fataler, f rules.Family, save string) tproxy.Found {
	t.Helper()
	live, err := rules.ParseSave(f, []byte(save))
	if err != nil {
		t.Fatalf("ParseSave: %v", err)
	}
	return tproxy.Find(f, live)
}

// lines are the rules of base chains that were found, each with its place.
func lines(found tproxy.Found) string {
	var b strings.Builder
	for _, c := range found.Ours.Bases {
		for _, r := range c.Rules {
			fmt.Fprintf(&b, "%s %s #%d %s\n", c.Table, c.Hook, r.At, r)
		}
	}
	for _, d := range found.Doubtful {
		fmt.Fprintf(&b, "doubtful: %s\n", d)
	}
	for _, r := range found.References {
		fmt.Fprintf(&b, "refers: %s\n", r)
	}
	return b.String()
}

const (
	kumaChains = `:KUMA_MESH_INBOUND - [0:0]
:KUMA_MESH_OUTBOUND - [0:0]
:KUMA_MESH_INBOUND_REDIRECT - [0:0]
:KUMA_MESH_OUTBOUND_REDIRECT - [0:0]
-A PREROUTING -p tcp -j KUMA_MESH_INBOUND
-A KUMA_MESH_INBOUND -p tcp -j KUMA_MESH_INBOUND_REDIRECT
-A KUMA_MESH_OUTBOUND -m owner --uid-owner 5678 -j RETURN
-A KUMA_MESH_OUTBOUND -j KUMA_MESH_OUTBOUND_REDIRECT
-A KUMA_MESH_INBOUND_REDIRECT -p tcp -j REDIRECT --to-ports 15006
-A KUMA_MESH_OUTBOUND_REDIRECT -p tcp -j REDIRECT --to-ports 15001
`
	kumaJump = "-A OUTPUT -p tcp -j KUMA_MESH_OUTBOUND\n"
	kumaSays = ` -m comment --comment "kuma/mesh/transparent/proxy/why"`
)

// Each kind of rule of a base chain, with and without a comment, and what resembles
// it. Beside Kuma's jumps every case has one rule.
func TestFindTellsKumasRules(t *testing.T) {
	const yes, no, doubtful = "yes", "no", "doubtful"
	for _, c := range []struct{ table, bare, commented, rule string }{
		{"nat", yes, yes, "-A OUTPUT -p udp@ -m udp --dport 53 -m owner --uid-owner 5678 -j RETURN"},
		{"nat", yes, yes, "-A OUTPUT -p udp@ -m udp --dport 53 -m owner --uid-owner 5678 -j DOCKER_OUTPUT"},
		{"nat", doubtful, yes, "-A OUTPUT -p udp@ -m udp --dport 53 -m owner --uid-owner 77 -j RETURN"},
		{"nat", no, no, "-A OUTPUT -p udp@ -m udp --dport 53 -m owner --uid-owner 5678 -j ACCEPT"},
		{"nat", no, no, "-A OUTPUT -p udp@ -m udp --dport 54 -m owner --uid-owner 5678 -j RETURN"},
		{"nat", doubtful, yes, "-A OUTPUT -p udp@ -m udp --dport 53 -j REDIRECT --to-ports 15053"}, // no rule for the proxy's own
		{"nat", no, no, "-A OUTPUT -p udp@ -m udp --dport 5353 -j REDIRECT --to-ports 15053"},
		{"nat", no, no, "-A OUTPUT ! -d 10.0.0.2/32 -p udp@ -m udp --dport 53 -j REDIRECT --to-ports 15053"},
		{"nat", no, no, "-A OUTPUT -p udp@ -m udp --dport 53 -j DNAT --to-destination 10.0.0.2:53"},
		{"nat", yes, yes, "-A OUTPUT -p tcp@ -m tcp --dport 53 -m owner ! --uid-owner 5678 -j RETURN"},
		{"nat", doubtful, yes, "-A OUTPUT -p tcp@ -m tcp --dport 53 -m owner ! --uid-owner 77 -j RETURN"},
		{"nat", yes, yes, "-A OUTPUT -p tcp@ -m multiport --dports 1:1000,3306 -m owner --uid-owner 1001 -j RETURN"},
		{"nat", yes, yes, "-A OUTPUT -p udp@ -m multiport --dports 53 -m owner --uid-owner 1000-1005 -j RETURN"},
		{"nat", no, no, "-A OUTPUT -p tcp@ -m tcp --dport 25 -m owner --uid-owner 1001 -j RETURN"},
		{"nat", no, no, "-A OUTPUT -p tcp@ -m multiport --dports 25,26 -j RETURN"},
		{"nat", doubtful, yes, "-A OUTPUT -d 10.8.0.1/32@ -j RETURN"},
		{"nat", no, no, "-A OUTPUT -d 10.8.0.1/32 -p tcp@ -j RETURN"},
		{"nat", no, no, "-A OUTPUT -s 10.8.0.1/32@ -j RETURN"},
		{"nat", yes, yes, `-A OUTPUT@ -j LOG --log-prefix "OUTPUT:" --log-level 7`},
		{"nat", no, no, `-A OUTPUT@ -j LOG --log-prefix "mine:" --log-level 7`},
		{"nat", no, no, `-A OUTPUT -p tcp@ -j LOG --log-prefix "OUTPUT:" --log-level 7`},
		{"nat", yes, yes, `-A PREROUTING@ -j LOG --log-prefix "PREROUTING:" --log-level 7`},
		{"nat", yes, yes, "-A PREROUTING ! -d 172.17.0.0/16 -i docker0 -p tcp@ -j REDIRECT --to-ports 15001"},
		{"nat", doubtful, yes, "-A PREROUTING ! -d 172.17.0.0/16 -i docker0 -p tcp@ -j REDIRECT --to-ports 3128"},
		{"nat", no, no, "-A PREROUTING -d 172.17.0.0/16 -i docker0 -p tcp@ -j REDIRECT --to-ports 15001"},
		{"nat", doubtful, yes, "-A PREROUTING -i docker0 -p udp@ -m udp --dport 53 -j REDIRECT --to-ports 15053"}, // no network
		{"nat", no, no, "-A POSTROUTING -d 10.8.0.1/32@ -j RETURN"},
		{"raw", no, yes, "-A OUTPUT -p udp@ -m udp --dport 53 -m owner --uid-owner 5678 -j CT --zone 1"}, // alone
		{"raw", no, yes, "-A PREROUTING -p udp@ -m udp --sport 53 -j CT --zone 1"},
		{"raw", no, yes, "-A OUTPUT -d 10.0.0.2/32 -p udp@ -m udp --dport 53 -j CT --zone 2"},
		{"raw", no, no, "-A OUTPUT -p udp@ -m udp --dport 53 -j CT --zone 9"},
		{"raw", no, no, "-A OUTPUT -p udp@ -m udp --dport 53 -j CT --notrack"},
		{"mangle", doubtful, yes, "-A PREROUTING@ -m conntrack --ctstate INVALID -j DROP"},
		{"mangle", no, no, "-A PREROUTING -p tcp@ -m conntrack --ctstate INVALID -j DROP"},
		{"mangle", no, no, "-A FORWARD@ -m conntrack --ctstate INVALID -j DROP"},
		{"filter", no, no, "-A OUTPUT -d 10.8.0.1/32@ -j RETURN"},
	} {
		for _, commented := range []bool{false, true} {
			want, comment := c.bare, ""
			if commented {
				want, comment = c.commented, kumaSays
			}
			rule := strings.Replace(c.rule, "@", comment, 1)
			nat, other := kumaChains+kumaJump, ""
			if commented {
				nat = strings.ReplaceAll(nat, "-p tcp -j KUMA_MESH_INBOUND\n", "-p tcp"+kumaSays+" -j KUMA_MESH_INBOUND\n")
				nat = strings.ReplaceAll(nat, "-p tcp -j KUMA_MESH_OUTBOUND\n", "-p tcp"+kumaSays+" -j KUMA_MESH_OUTBOUND\n")
			}
			if c.table == "nat" {
				nat = ":DOCKER_OUTPUT - [0:0]\n" + nat + rule + "\n"
			} else {
				other = "*" + c.table + "\n" + rule + "\nCOMMIT\n"
			}
			found := find(t, rules.IPv4, "*nat\n"+nat+"COMMIT\n"+other)
			_, spec, _ := strings.Cut(rule, " ")
			_, spec, _ = strings.Cut(spec, " ")
			got := no
			for _, b := range found.Ours.Bases {
				for _, r := range b.Rules {
					if r.Listed() == spec {
						got = yes
					}
				}
			}
			for _, d := range found.Doubtful {
				if d.Rule.Listed() == spec {
					got = doubtful
				}
			}
			if got != want {
				t.Errorf("%s %s\n  is Kuma's: %s, want %s", c.table, rule, got, want)
			}
			if !strings.Contains(lines(found), "nat PREROUTING #") || !strings.Contains(lines(found), "nat OUTPUT #") || len(found.References) > 0 {
				t.Errorf("%s: Kuma's jumps:\n%s", rule, lines(found))
			}
		}
	}
}

// A comment in Kuma's words does not make a rule Kuma's, and a rule of Kuma's shape
// with somebody's comment is somebody's.
func TestFindReadsNoWords(t *testing.T) {
	found := find(t, rules.IPv4, "*nat\n"+kumaChains+`:KUMA_MESH_MINE - [0:0]
-A PREROUTING -p tcp -m comment --comment "kuma/mesh/transparent/proxy/mine" -j KUMA_MESH_MINE
-A OUTPUT -d 10.0.0.1/32 -m comment --comment "not for KUMA_MESH_OUTBOUND" -j RETURN
-A OUTPUT -d 10.0.0.2/32 -m comment --comment "see kuma/mesh/transparent/proxy/" -j RETURN
-A OUTPUT -p tcp -m tcp --dport 80 -j KUMA_MESH_OUTBOUND
-A KUMA_MESH_MINE -j KUMA_MESH_INBOUND_REDIRECT
COMMIT
`)
	want := `nat PREROUTING #1 -p tcp -j KUMA_MESH_INBOUND
refers: nat OUTPUT #3: -A OUTPUT -p tcp -m tcp --dport 80 -j KUMA_MESH_OUTBOUND
refers: nat KUMA_MESH_MINE #1: -A KUMA_MESH_MINE -j KUMA_MESH_INBOUND_REDIRECT
`
	if got := lines(found); got != want {
		t.Errorf("found\n%s\nwant\n%s", got, want)
	}
}

// Rules that could be anybody's are Kuma's where they stand between Kuma's.
func TestFindBetweenKumasRules(t *testing.T) {
	found := find(t, rules.IPv4, "*nat\n"+kumaChains+`-A OUTPUT -d 10.0.0.1/32 -j RETURN
-A OUTPUT -p tcp -m multiport --dports 25 -m owner --uid-owner 1001 -j RETURN
-A OUTPUT -d 10.0.0.2/32 -j RETURN
-A OUTPUT -d 10.0.0.3/32 -j RETURN
-A OUTPUT -p udp -m udp --dport 53 -m owner --uid-owner 5678 -j RETURN
-A OUTPUT -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053
-A OUTPUT -p tcp -m tcp --dport 9 -j ACCEPT
-A OUTPUT -d 10.0.0.4/32 -j RETURN
`+kumaJump+"COMMIT\n")
	want := `nat PREROUTING #1 -p tcp -j KUMA_MESH_INBOUND
nat OUTPUT #2 -p tcp -m tcp --dport 25 -m owner --uid-owner 1001 -j RETURN
nat OUTPUT #3 -d 10.0.0.2/32 -j RETURN
nat OUTPUT #4 -d 10.0.0.3/32 -j RETURN
nat OUTPUT #5 -p udp -m udp --dport 53 -m owner --uid-owner 5678 -j RETURN
nat OUTPUT #6 -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053
nat OUTPUT #9 -p tcp -j KUMA_MESH_OUTBOUND
doubtful: nat OUTPUT #1: -A OUTPUT -d 10.0.0.1/32 -j RETURN
doubtful: nat OUTPUT #8: -A OUTPUT -d 10.0.0.4/32 -j RETURN
`
	if got := lines(found); got != want {
		t.Errorf("found\n%s\nwant\n%s", got, want)
	}
}

// Istio's conntrack zones are those that Kuma writes, for another user: they stay,
// whether Kuma's rules or ours are there or not.
func TestFindLeavesIstiosZones(t *testing.T) {
	const zones = `-A PREROUTING -p udp -m udp --sport 53 -j CT --zone 1
-A OUTPUT -p udp -m udp --dport 53 -m owner --uid-owner 1337 -j CT --zone 1
-A OUTPUT -p udp -m udp --sport 15053 -m owner --uid-owner 1337 -j CT --zone 2
-A OUTPUT -p udp -m udp --dport 53 -j CT --zone 2
`
	const istio = ":ISTIO_OUTPUT - [0:0]\n-A OUTPUT -p tcp -j ISTIO_OUTPUT\n-A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN\n"
	const ours = ":KUMA_MESH_OUTBOUND - [0:0]\n-A KUMA_MESH_OUTBOUND -m owner --uid-owner 5678 -j RETURN\n"
	for nat, want := range map[string]int{
		"": 0, istio: 0, ours + istio: 0, kumaChains + kumaJump: 0, kumaChains + kumaJump + istio: 0,
		ours: 4, // a run that took Kuma's place and was killed before raw
		strings.ReplaceAll(kumaChains+kumaJump, "5678", "1337"): 4,
	} {
		if got := lines(find(t, rules.IPv4, "*nat\n"+nat+"COMMIT\n*raw\n"+zones+"COMMIT\n")); strings.Count(got, "raw ") != want {
			t.Errorf("beside\n%s\nfound\n%s", nat, got)
		}
	}
}

// A rule with a line break in its comment cannot be named in a script.
func TestFindLeavesWhatNoScriptCanSay(t *testing.T) {
	found := find(t, rules.IPv4, "*nat\n"+kumaChains+"-A OUTPUT -d 10.0.0.1/32 -m comment --comment \"kuma/mesh/transparent/proxy/a\nb\" -j RETURN\nCOMMIT\n")
	if got := lines(found); strings.Contains(got, "OUTPUT #1") {
		t.Errorf("found\n%s", got)
	}
}

// Whatever Kuma's installers wrote, among rules of others in any place, the script of
// an install leads to it and that of an undo back again, to the letter.
func TestTransitionFromKumaAndBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		for _, f := range rules.Families() {
			n := &tproxytest.Netfilter{Family: f, Generator: "iptables-save v1.8.9"}
			others := func(when string) {
				var b strings.Builder
				b.WriteString("*nat\n")
				for i := range rapid.IntRange(0, 4).Draw(t, when) {
					chain := rapid.SampledFrom([]string{"PREROUTING", "OUTPUT"}).Draw(t, "chain")
					have, _ := n.Set().Base(rules.NAT, rules.Hook(chain))
					fmt.Fprintf(&b, "-I %s %d -p tcp -m tcp --dport %d -m comment --comment \"foreign %s\" -j ACCEPT\n",
						chain, rapid.IntRange(1, len(have.Rules)+1).Draw(t, "at"), i+1, when)
				}
				if err := n.Restore([]byte(b.String()+"COMMIT\n"), nil); err != nil {
					t.Fatalf("others %s: %v", when, err)
				}
			}
			others("before")
			o := oldkuma.Options{DNS: rapid.Bool().Draw(t, "dns"), Log: rapid.Bool().Draw(t, "log")}
			if rapid.Bool().Draw(t, "everything") {
				o = oldkuma.Everything()
			}
			i := rapid.SampledFrom(oldkuma.Installers()).Draw(t, "installer")
			if err := n.Restore([]byte(oldkuma.Script(i, f, o)), nil); err != nil {
				t.Fatalf("Kuma's: %v", err)
			}
			others("after")
			before := string(n.Save())
			cfg := tproxytest.Configs().Draw(t, "config")
			plan, err := tproxy.Build(cfg, tproxy.Host{Users: []tproxy.User{{Name: "kuma-dp", UID: 5678}}})
			if err != nil {
				t.Skip("refused")
			}
			found := find(t, f, before)
			live, _ := rules.ParseSave(f, []byte(before))
			script := rules.Transition(f, found.Ours, plan.Rules)
			if err := n.Restore(script, nil); err != nil {
				t.Fatalf("install: %v\n%s", err, script)
			}
			now := find(t, f, string(n.Save()))
			if d := rules.Compare(f, now.Ours, plan.Rules); len(d) > 0 || len(now.Kuma) > 0 {
				t.Fatalf("not as planned: %v; Kuma's: %v", d, now.Kuma)
			}
			if d := rules.Compare(f, rules.After(f, live, found.Ours, plan.Rules), n.Set()); len(d) > 0 {
				t.Fatalf("After says otherwise: %v", d)
			}
			back := rules.Transition(f, now.Ours, found.Ours)
			if err := n.Restore(back, nil); err != nil {
				t.Fatalf("back: %v\n%s", err, back)
			}
			if sorted(string(n.Save())) != sorted(before) {
				t.Fatalf("not as before:\n%s\nbefore\n%s\nby\n%s", n.Save(), before, back)
			}
		}
	})
}

// sorted is a save with the chains in the order of their names.
func sorted(save string) string {
	live, err := rules.ParseSave(0, []byte(save))
	if err != nil {
		return err.Error()
	}
	var out []string
	for _, c := range live.Chains {
		var b strings.Builder
		fmt.Fprintf(&b, "%s %s\n", c.Table, c.Name)
		for _, r := range c.Rules {
			fmt.Fprintln(&b, r)
		}
		out = append(out, b.String())
	}
	var b strings.Builder
	for _, c := range live.Bases { // an empty table may stay
		for _, r := range c.Rules {
			fmt.Fprintln(&b, c.Table, c.Hook, r)
		}
	}
	return b.String() + strings.Join(slices.Sorted(slices.Values(out)), "")
}

// Rules of Kuma's that stand in firewalld's chains for direct rules are found there, and
// one transaction takes them out: the chain stays, with what is others' in it.
func TestFindKumaInDirectChains(t *testing.T) {
	const save = "*nat\n:DOCKER_OUTPUT - [0:0]\n:OUTPUT_direct - [0:0]\n" + kumaChains + `-A OUTPUT -p udp -m udp --dport 9 -j ACCEPT
-A OUTPUT -j OUTPUT_direct
-A OUTPUT_direct -p tcp -m tcp --dport 7777 -j ACCEPT
-A OUTPUT_direct -p udp -m udp --dport 53 -m owner --uid-owner 5678 -j RETURN
-A OUTPUT_direct -p udp -m udp --dport 53 -m owner --uid-owner 77 -j RETURN
-A OUTPUT_direct -p udp -m udp --dport 5353 -j REDIRECT --to-ports 15053
-A OUTPUT_direct -p tcp -j KUMA_MESH_OUTBOUND
-A OUTPUT_direct -d 10.8.0.1/32 -j RETURN
COMMIT
`
	n := &tproxytest.Netfilter{Family: rules.IPv4}
	if err := n.Restore([]byte(save), nil); err != nil {
		t.Fatal(err)
	}
	found := find(t, rules.IPv4, string(n.Save()))
	want := `nat PREROUTING #1 -p tcp -j KUMA_MESH_INBOUND
nat OUTPUT #2 -p udp -m udp --dport 53 -m owner --uid-owner 5678 -j RETURN
nat OUTPUT #5 -p tcp -j KUMA_MESH_OUTBOUND
doubtful: nat OUTPUT_direct #3: -A OUTPUT_direct -p udp -m udp --dport 53 -m owner --uid-owner 77 -j RETURN
doubtful: nat OUTPUT_direct #6: -A OUTPUT_direct -d 10.8.0.1/32 -j RETURN
`
	if got := lines(found); got != want {
		t.Errorf("found\n%s\nwant\n%s", got, want)
	}
	for _, c := range found.Ours.Bases {
		for _, r := range c.Rules {
			if via := map[rules.Hook]string{rules.Output: "OUTPUT_direct"}[c.Hook]; r.Via != via {
				t.Errorf("%s %s stands in %q, want %q", c.Hook, r, r.Via, via)
			}
		}
	}
	if !slices.Contains(found.Kuma, "nat OUTPUT") {
		t.Errorf("Kuma's: %q", found.Kuma)
	}
	script := rules.Transition(rules.IPv4, found.Ours, rules.Set{})
	if err := n.Restore(script, nil); err != nil {
		t.Fatalf("%v\n%s", err, script)
	}
	direct, _ := n.Set().Chain(rules.NAT, "OUTPUT_direct")
	if left := len(direct.Rules); left != 4 || strings.Contains(string(n.Save()), "KUMA") {
		t.Errorf("%d rules are left\n%s", left, n.Save())
	}
	back := rules.Transition(rules.IPv4, find(t, rules.IPv4, string(n.Save())).Ours, found.Ours)
	if err := n.Restore(back, nil); err != nil {
		t.Fatalf("%v\n%s", err, back)
	}
	if got := lines(find(t, rules.IPv4, string(n.Save()))); got != want {
		t.Errorf("put back\n%s", got)
	}
}
