package tproxy_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// stood builds a plan and returns what stands of it, as the kernel lists it.
func stood(t tproxytest.Fataler, c tproxy.Config) (*tproxy.Plan, map[rules.Family]rules.Set) {
	t.Helper()
	plan, err := tproxy.Build(c, tproxy.Host{})
	if err != nil {
		t.Fatalf("Build: %v", err)
	}
	return plan, inKernel(t, plan.WithRecord(tproxy.Record{Version: "v1"}))
}

// copied is a Set of which nothing is shared.
func copied(s rules.Set) rules.Set {
	s.Bases, s.Chains = slices.Clone(s.Bases), slices.Clone(s.Chains)
	for i := range s.Bases {
		s.Bases[i].Rules = slices.Clone(s.Bases[i].Rules)
	}
	for i := range s.Chains {
		s.Chains[i].Rules = slices.Clone(s.Chains[i].Rules)
	}
	return s
}

// rulesOf are the rules of a chain, to be changed.
func rulesOf(t *testing.T, s *rules.Set, table rules.Table, name string) *[]rules.Rule {
	t.Helper()
	for i := range s.Chains {
		if s.Chains[i].Table == table && s.Chains[i].Name == name {
			return &s.Chains[i].Rules
		}
	}
	for i := range s.Bases {
		if s.Bases[i].Table == table && string(s.Bases[i].Hook) == name {
			return &s.Bases[i].Rules
		}
	}
	t.Fatalf("there is no chain %s in %s", name, table)
	return nil
}

// Each kind of drift is named, where it is and with the reason of the rule.
func TestDrift(t *testing.T) {
	const inbound, outbound = "KUMA_MESH_INBOUND", "KUMA_MESH_OUTBOUND"
	ssh := "SSH is protected unless --capture-ssh is given"
	for _, c := range []struct {
		name string
		edit func(t *testing.T, s *rules.Set)
		want []string
	}{
		{"nothing", func(*testing.T, *rules.Set) {}, nil},
		{"a missing rule", func(t *testing.T, s *rules.Set) {
			l := rulesOf(t, s, rules.NAT, inbound)
			*l = slices.Delete(*l, 0, 1)
		}, []string{"- missing: IPv4 nat KUMA_MESH_INBOUND #1 -p tcp -m tcp --dport 22 -j RETURN [" + ssh + "]"}},
		{"a missing jump", func(t *testing.T, s *rules.Set) {
			l := rulesOf(t, s, rules.NAT, "PREROUTING")
			*l = nil
		}, []string{"- missing: IPv4 nat PREROUTING #1 -p tcp -m tcp --syn -m addrtype --dst-type LOCAL -j KUMA_MESH_INBOUND [a new TCP connection to an address of this host]"}},
		{"a missing chain", func(t *testing.T, s *rules.Set) {
			s.Chains = slices.DeleteFunc(s.Chains, func(c rules.Chain) bool { return c.Name == outbound })
		}, []string{"- missing: IPv4 nat KUMA_MESH_OUTBOUND [the chain is not there]"}},
		{"all of a family", func(t *testing.T, s *rules.Set) { *s = rules.Set{} }, []string{"- missing: IPv4 [nothing of the install is there]"}},
		{"another action", func(t *testing.T, s *rules.Set) {
			l := *rulesOf(t, s, rules.NAT, inbound)
			l[0].Action = rules.Redirect{Port: 15001}
		}, []string{"~ changed: IPv4 nat KUMA_MESH_INBOUND #1 -p tcp -m tcp --dport 22 -j REDIRECT --to-ports 15001, was -p tcp -m tcp --dport 22 -j RETURN [" + ssh + "]"}},
		{"other matches", func(t *testing.T, s *rules.Set) {
			l := *rulesOf(t, s, rules.NAT, inbound)
			l[0].Matches = []rules.Match{rules.TCP, rules.DestinationPorts{Ports: rules.Port(23)}}
		}, []string{"~ changed: IPv4 nat KUMA_MESH_INBOUND #1 -p tcp -m tcp --dport 23 -j RETURN, was -p tcp -m tcp --dport 22 -j RETURN [" + ssh + "]"}},
		{"another comment", func(t *testing.T, s *rules.Set) {
			l := *rulesOf(t, s, rules.NAT, inbound)
			l[0].Why = "mine"
		}, []string{"~ changed: IPv4 nat KUMA_MESH_INBOUND #1 -p tcp -m tcp --dport 22 -j RETURN [" + ssh + "]"}},
		{"an extra rule", func(t *testing.T, s *rules.Set) {
			l := rulesOf(t, s, rules.NAT, inbound)
			*l = slices.Insert(*l, 1, rules.Rule{Matches: []rules.Match{rules.TCP, rules.DestinationPorts{Ports: rules.Port(80)}}, Action: rules.Accept{}})
		}, []string{"+ extra: IPv4 nat KUMA_MESH_INBOUND #2 -p tcp -m tcp --dport 80 -j ACCEPT"}},
		{"an extra chain", func(t *testing.T, s *rules.Set) {
			s.Chains = append(s.Chains, rules.Chain{Table: rules.NAT, Name: "KUMA_MESH_OTHER", Rules: []rules.Rule{{Action: rules.Accept{}}}})
		}, []string{"+ extra: IPv4 nat KUMA_MESH_OTHER [the install has no such chain]"}},
		{"a doubled rule", func(t *testing.T, s *rules.Set) {
			l := rulesOf(t, s, rules.NAT, inbound)
			*l = append(*l, (*l)[0])
		}, []string{"+ doubled: IPv4 nat KUMA_MESH_INBOUND #3 -p tcp -m tcp --dport 22 -j RETURN [" + ssh + "]"}},
		{"a doubled jump, where it stands", func(t *testing.T, s *rules.Set) {
			l := rulesOf(t, s, rules.NAT, "PREROUTING")
			again := (*l)[0]
			again.At = 7
			*l = append(*l, again)
		}, []string{"+ doubled: IPv4 nat PREROUTING #7 -p tcp -m tcp --syn -m addrtype --dst-type LOCAL -j KUMA_MESH_INBOUND [a new TCP connection to an address of this host]"}},
		{"a jump in a chain for direct rules", func(t *testing.T, s *rules.Set) {
			l := *rulesOf(t, s, rules.NAT, "PREROUTING")
			l[0].At, l[0].Via = 4, "PREROUTING_direct"
		}, nil},
		{"there, and doubled", func(t *testing.T, s *rules.Set) {
			l := rulesOf(t, s, rules.NAT, "PREROUTING")
			again := (*l)[0]
			again.At, again.Via = 4, "PREROUTING_direct"
			*l = append(*l, again)
		}, []string{"+ doubled: IPv4 nat PREROUTING #1 -p tcp -m tcp --syn -m addrtype --dst-type LOCAL -j KUMA_MESH_INBOUND [a new TCP connection to an address of this host]"}},
		{"there, twice", func(t *testing.T, s *rules.Set) {
			l := rulesOf(t, s, rules.NAT, "PREROUTING")
			(*l)[0].At, (*l)[0].Via = 4, "PREROUTING_direct"
			again := (*l)[0]
			again.At = 5
			*l = append(*l, again)
		}, []string{"+ doubled: IPv4 nat PREROUTING_direct #5 -p tcp -m tcp --syn -m addrtype --dst-type LOCAL -j KUMA_MESH_INBOUND [a new TCP connection to an address of this host]"}},
		{"there, and nothing leads there", func(t *testing.T, s *rules.Set) {
			l := *rulesOf(t, s, rules.NAT, "PREROUTING")
			l[0].At, l[0].Via, l[0].Unmet = 4, "PREROUTING_direct", true
		}, []string{
			"- missing: IPv4 nat PREROUTING #1 -p tcp -m tcp --syn -m addrtype --dst-type LOCAL -j KUMA_MESH_INBOUND [a new TCP connection to an address of this host]",
			"+ extra: IPv4 nat PREROUTING_direct #4 -p tcp -m tcp --syn -m addrtype --dst-type LOCAL -j KUMA_MESH_INBOUND [PREROUTING does not lead to PREROUTING_direct]"}},
		{"another order", func(t *testing.T, s *rules.Set) { slices.Reverse(*rulesOf(t, s, rules.NAT, inbound)) },
			[]string{"~ reordered: IPv4 nat KUMA_MESH_INBOUND [from #1 on the rules stand in another order]"}},
		{"several", func(t *testing.T, s *rules.Set) {
			l := rulesOf(t, s, rules.NAT, inbound)
			*l = (*l)[:1]
			slices.Reverse(*rulesOf(t, s, rules.NAT, outbound))
			s.Chains = slices.DeleteFunc(s.Chains, func(c rules.Chain) bool { return c.Name == "KUMA_MESH_DNS" })
		}, []string{
			"- missing: IPv4 nat KUMA_MESH_DNS [the chain is not there]",
			"- missing: IPv4 nat KUMA_MESH_INBOUND #2 -p tcp -j REDIRECT --to-ports 15006 [inbound goes to the proxy's port 15006]",
			"~ reordered: IPv4 nat KUMA_MESH_OUTBOUND [from #1 on the rules stand in another order]"}},
		{"the record is gone", func(t *testing.T, s *rules.Set) {
			s.Chains = slices.DeleteFunc(s.Chains, func(c rules.Chain) bool { return c.Name == "KUMA_MESH_RECORD" })
		}, []string{"~ changed: IPv4 nat KUMA_MESH_RECORD [" + tproxy.ErrNoRecord.Error() + "]"}},
		{"the record is damaged", func(t *testing.T, s *rules.Set) {
			l := *rulesOf(t, s, rules.NAT, "KUMA_MESH_RECORD")
			l[0].Why = strings.Replace(l[0].Why, " 1/", " 7/", 1)
		}, []string{"~ changed: IPv4 nat KUMA_MESH_RECORD ["}},
	} {
		t.Run(c.name, func(t *testing.T) {
			plan, all := stood(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
			s := copied(all[rules.IPv4])
			c.edit(t, &s)
			var got []string
			for _, d := range plan.Drift(rules.IPv4, s) {
				got = append(got, d.String())
			}
			if len(got) != len(c.want) {
				t.Fatalf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			slices.Sort(got)
			slices.Sort(c.want)
			for i := range got {
				if got[i] != c.want[i] && !(strings.HasSuffix(c.want[i], "[") && strings.HasPrefix(got[i], c.want[i])) {
					t.Errorf("got  %s\nwant %s", got[i], c.want[i])
				}
			}
			if d := plan.Drift(rules.IPv6, all[rules.IPv6]); d != nil {
				t.Errorf("the other family: %v", d)
			}
		})
	}
}

// Without comments in the kernel a rule is known by what it does.
func TestDriftWithoutComments(t *testing.T) {
	plan, all := stood(t, tproxy.Config{DisableComments: true})
	s := copied(all[rules.IPv4])
	if d := plan.Drift(rules.IPv4, s); d != nil {
		t.Fatalf("nothing was done: %v", d)
	}
	l := rulesOf(t, &s, rules.NAT, "KUMA_MESH_INBOUND")
	*l = append(*l, (*l)[0])
	d := plan.Drift(rules.IPv4, s)
	if len(d) != 1 || d[0].Kind != tproxy.DriftDoubled || d[0].Index != 3 {
		t.Errorf("%v", d)
	}
	*l = (*l)[1:2]
	d = plan.Drift(rules.IPv4, s)
	if len(d) != 1 || d[0].Kind != tproxy.DriftMissing || d[0].Was != "-p tcp -m tcp --dport 22 -j RETURN" {
		t.Errorf("%v", d)
	}
}

// Whatever is done to rules of ours, so that they are others than those of the plan, is
// a drift that names where; and nothing else is one.
func TestEveryChangeIsDrift(t *testing.T) {
	kinds := map[tproxy.DriftKind]int{}
	rapid.Check(t, func(t *rapid.T) {
		cfg := tproxytest.Configs().Draw(t, "config")
		plan, err := tproxy.Build(cfg, tproxytest.Hosts(cfg).Draw(t, "host"))
		if err != nil {
			t.Skip("refused")
		}
		all := inKernel(t, plan.WithRecord(tproxy.Record{Version: "v1"}))
		f := rapid.SampledFrom(plan.Families).Draw(t, "family")
		if d := plan.Drift(f, all[f]); d != nil {
			t.Fatalf("nothing was done: %v", d)
		}
		s := copied(all[f])
		for range rapid.IntRange(1, 3).Draw(t, "edits") {
			vandalise(t, &s)
		}
		live := copied(s)
		live.Chains = slices.DeleteFunc(live.Chains, func(c rules.Chain) bool { return tproxy.IsRecord(c.Table, c.Name) })
		want := copied(plan.Rules)
		want.Chains = slices.DeleteFunc(want.Chains, func(c rules.Chain) bool { return tproxy.IsRecord(c.Table, c.Name) })
		changes := rules.Compare(f, live, want)
		drift := plan.Drift(f, s)
		if (len(changes) > 0) != (len(drift) > 0) {
			t.Fatalf("%d changes, %d drifts: %v, %v", len(changes), len(drift), changes, drift)
		}
		for _, d := range drift {
			kinds[d.Kind]++
			if d.Family != f {
				t.Fatalf("of which family? %v", d)
			}
			if d.Table == "" {
				if len(s.Bases)+len(s.Chains) > 0 {
					t.Fatalf("where? %v", d)
				}
				continue
			}
			for _, part := range []string{f.String(), string(d.Table), d.Chain, string(d.Kind)} {
				if !strings.Contains(d.String(), part) {
					t.Fatalf("%q does not name %s", d, part)
				}
			}
			if d.Index > 0 && !strings.Contains(d.String(), fmt.Sprintf("#%d", d.Index)) {
				t.Fatalf("%q does not name rule %d", d, d.Index)
			}
			if !slices.ContainsFunc(changes, func(c rules.Change) bool { return c.Table == d.Table && c.Chain == d.Chain }) {
				t.Fatalf("%v: there has nothing changed: %v", d, changes)
			}
		}
		for _, c := range changes {
			if !slices.ContainsFunc(drift, func(d tproxy.Drift) bool { return d.Table == "" || c.Table == d.Table && c.Chain == d.Chain }) {
				t.Fatalf("%v is not told: %v", c, drift)
			}
		}
	})
	for _, k := range []tproxy.DriftKind{tproxy.DriftMissing, tproxy.DriftChanged, tproxy.DriftExtra, tproxy.DriftDoubled, tproxy.DriftReordered} {
		if kinds[k] == 0 {
			t.Errorf("no drift was %s: %v", k, kinds)
		}
	}
}

// vandalise does one thing to the rules, those of the record aside.
func vandalise(t *rapid.T, s *rules.Set) {
	var lists []*[]rules.Rule
	for i := range s.Bases {
		lists = append(lists, &s.Bases[i].Rules)
	}
	var chains []int
	for i, c := range s.Chains {
		if !tproxy.IsRecord(c.Table, c.Name) {
			lists, chains = append(lists, &s.Chains[i].Rules), append(chains, i)
		}
	}
	lists = slices.DeleteFunc(lists, func(l *[]rules.Rule) bool { return len(*l) == 0 })
	if len(lists) == 0 || len(chains) == 0 {
		return
	}
	l := rapid.SampledFrom(lists).Draw(t, "chain")
	i, j := rapid.IntRange(0, len(*l)-1).Draw(t, "rule"), rapid.IntRange(0, len(*l)-1).Draw(t, "other")
	r := (*l)[i]
	switch rapid.IntRange(0, 8).Draw(t, "edit") {
	case 0:
		*l = slices.Delete(*l, i, i+1)
	case 1:
		*l = slices.Insert(*l, j, r)
	case 2:
		(*l)[i], (*l)[j] = (*l)[j], (*l)[i]
	case 3:
		*l = nil
	case 4:
		(*l)[i].Action = rules.Accept{}
	case 5:
		(*l)[i].Why += "?"
	case 6:
		(*l)[i].Matches = append(slices.Clone(r.Matches), rules.Mark{Value: 1, Mask: 1})
	case 7:
		*l = slices.Insert(*l, j, rules.Rule{Matches: []rules.Match{rules.TCP}, Action: rules.Return{}})
	case 8:
		n := rapid.SampledFrom(chains).Draw(t, "gone")
		s.Chains = slices.Delete(s.Chains, n, n+1)
	}
}
