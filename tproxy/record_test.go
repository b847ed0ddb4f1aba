package tproxy_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// inKernel are a plan's rules as the kernel lists them and Find picks them out.
func inKernel(t tproxytest.Fataler, s rules.Set) map[rules.Family]rules.Set {
	t.Helper()
	out := map[rules.Family]rules.Set{}
	for _, f := range rules.Families() {
		n := &tproxytest.Netfilter{Family: f, Generator: "iptables-save v1.8.9"}
		if err := n.Restore(rules.Transition(f, rules.Set{}, s), nil); err != nil {
			t.Fatalf("Restore: %v", err)
		}
		live, err := rules.ParseSave(f, n.Save())
		if err != nil {
			t.Fatalf("ParseSave: %v", err)
		}
		out[f] = tproxy.Find(f, live).Ours
	}
	return out
}

// about leaves out of a Config what is about a run.
func about(c tproxy.Config) string {
	c.Wait, c.WaitInterval, c.MaxRetries, c.SleepBetweenRetries = 0, 0, 0, 0
	text, err := c.MarshalJSON()
	return fmt.Sprintf("%s %v", text, err)
}

// Whatever was installed, the rules and their record say which Config it was.
func TestInstalledIsWhatWasInstalled(t *testing.T) {
	comments := 0
	rapid.Check(t, func(t *rapid.T) {
		cfg := tproxytest.Configs().Draw(t, "config")
		plan, err := tproxy.Build(cfg, tproxytest.Hosts(cfg).Draw(t, "host"))
		if err != nil {
			t.Skip("refused")
		}
		want := tproxy.Record{Version: rapid.SampledFrom([]string{"", "v1.2.3", "v1 \"2\"\n"}).Draw(t, "version"), PassthroughAddressOurs: rapid.Bool().Draw(t, "address")}
		ours := inKernel(t, plan.WithRecord(want))
		got, rec, err := tproxy.Installed(ours[rules.IPv4], ours[rules.IPv6])
		if err != nil {
			t.Fatalf("%v\n%v", err, ours[rules.IPv4])
		}
		if about(got) != about(plan.Config) {
			t.Fatalf("installed\n%s\nread\n%s", about(plan.Config), about(got))
		}
		if rec.PassthroughAddressOurs != want.PassthroughAddressOurs || rec.Version != strings.NewReplacer(" ", "", `"`, "", "\n", "").Replace(want.Version) {
			t.Fatalf("record %+v of %+v", rec, want)
		}
		// The same Config again is the same plan, with the same bytes.
		again, err := tproxy.Build(got, plan.Host)
		if err != nil {
			t.Fatalf("again: %v", err)
		}
		for _, f := range rules.Families() {
			if d := rules.Compare(f, again.Rules, plan.Rules); len(d) > 0 {
				t.Fatalf("another plan: %v", d)
			}
		}
		for _, c := range plan.Rules.Chains {
			for _, r := range c.Rules {
				if r.Record {
					comments++
				}
				if r.Record && len(r.Why) > 127 { // NFTNL_UDATA_COMMENT_MAXLEN less its NUL
					t.Fatalf("a comment of %d bytes", len(r.Why))
				}
			}
		}
	})
	t.Logf("%d comments", comments)
}

// A long list stands in the rules alone.
func TestRecordHoldsNoListThatTheRulesShow(t *testing.T) {
	c := excluding(10000)
	plan, err := tproxy.Build(c, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	chain, _ := plan.Rules.Chain(rules.NAT, "KUMA_MESH_RECORD")
	if len(chain.Rules) > 2 {
		t.Errorf("%d comments", len(chain.Rules))
	}
	ours := inKernel(t, plan.Rules)
	got, _, err := tproxy.Installed(ours[rules.IPv4], ours[rules.IPv6])
	if err != nil || !got.Inbound.ExcludePorts.Equal(c.Inbound.ExcludePorts) || !got.Outbound.ExcludePorts.Equal(c.Outbound.ExcludePorts) {
		t.Errorf("%v, %v", got, err)
	}
}

// What is not as it was written is said, and the address is still ours.
func TestRecordThatCannotBeRead(t *testing.T) {
	cfg := tproxy.Config{
		Inbound:  tproxy.Inbound{ExcludePorts: rules.MustPorts("80,90-100")},
		Outbound: tproxy.Outbound{ExcludePortsForUIDs: []tproxy.UIDExclusion{{UIDs: rules.MustUIDs("1-3,7,9,11,13")}, {Ports: rules.MustPorts("1-2,5"), UIDs: rules.MustUIDs("4294967294")}}},
	}
	plan, err := tproxy.Build(cfg, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(list []rules.Rule) []rules.Rule
		want   string
		keeps  bool
	}{
		"one comment less": {func(l []rules.Rule) []rules.Rule { return l[:len(l)-1] }, "is not whole", true},
		"the first one":    {func(l []rules.Rule) []rules.Rule { return l[1:] }, "is not whole", false},
		"doubled":          {func(l []rules.Rule) []rules.Rule { return slices.Insert(l, 1, l[0]) }, "is not whole", true},
		"turned round":     {func(l []rules.Rule) []rules.Rule { slices.Reverse(l); return l }, "is not whole", true},
		"changed": {func(l []rules.Rule) []rules.Rule {
			l[len(l)-1].Why = strings.Replace(l[len(l)-1].Why, "}", " ", 1)
			return l
		}, "cannot be read", true},
		"a newer format": {func(l []rules.Rule) []rules.Rule {
			for i := range l {
				l[i].Why = strings.Replace(l[i].Why, "kuma-tproxy 1 ", "kuma-tproxy 2 ", 1)
			}
			return l
		}, `has the format "2" of another version: this one reads 1`, true},
		"cut off": {func(l []rules.Rule) []rules.Rule {
			l[0].Why = "kuma/mesh/transparent/proxy/kuma-tproxy 1 1/1 ::6=ours"
			return l[:1]
		}, "is cut off", true},
		"no record": {func([]rules.Rule) []rules.Rule { return nil }, "no record", false},
	} {
		ours := inKernel(t, plan.Rules)
		for f, s := range ours {
			for i, chain := range s.Chains {
				if chain.Name == "KUMA_MESH_RECORD" {
					s.Chains[i].Rules = c.change(slices.Clone(chain.Rules))
				}
			}
			ours[f] = s
		}
		_, rec, err := tproxy.Installed(ours[rules.IPv4], ours[rules.IPv6])
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if rec.PassthroughAddressOurs != c.keeps {
			t.Errorf("%s: the address is ours: %v", name, rec.PassthroughAddressOurs)
		}
	}
	// A rule that somebody changed beside the record: a short list the record holds, a
	// long one only the rule.
	for ports, known := range map[string]bool{"8080": true, long(): false} {
		cfg := plan.Config
		cfg.Inbound.ExcludePorts = rules.MustPorts(ports)
		plan, err := tproxy.Build(cfg, tproxy.Host{})
		if err != nil {
			t.Fatal(err)
		}
		ours := inKernel(t, plan.Rules)
		s := ours[rules.IPv4]
		for i, chain := range s.Chains {
			if chain.Name == "KUMA_MESH_INBOUND" {
				s.Chains[i].Rules = slices.Delete(slices.Clone(chain.Rules), 1, 2)
			}
		}
		got, _, err := tproxy.Installed(s, rules.Set{})
		if known {
			if err != nil || !got.Inbound.ExcludePorts.Equal(cfg.Inbound.ExcludePorts) {
				t.Errorf("a changed rule of a short list: %v, %v", got.Inbound.ExcludePorts, err)
			}
		} else if e, ok := errors.AsType[*tproxy.RecordError](err); !ok || !strings.Contains(e.What, "does not fit the rules") {
			t.Errorf("a changed rule: %v", err)
		}
	}
	if _, _, err := tproxy.Installed(rules.Set{}, rules.Set{}); !errors.Is(err, tproxy.ErrNoRecord) {
		t.Errorf("nothing installed: %v", err)
	}
}

// Where the kernel has no comments, the record says whose the address is, and no more.
func TestBareRecord(t *testing.T) {
	plan, err := tproxy.Build(tproxy.Config{DisableComments: true}, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []bool{false, true} {
		s := plan.WithRecord(tproxy.Record{Version: "v1", Bare: true, PassthroughAddressOurs: address})
		if text := string(s.IPTables(rules.IPv6)); strings.Contains(text, "comment") {
			t.Errorf("comments in\n%s", text)
		}
		ours := inKernel(t, s)
		_, rec, err := tproxy.Installed(ours[rules.IPv4], ours[rules.IPv6])
		if err == nil || !rec.Bare || !strings.Contains(err.Error(), "xt_comment") {
			t.Errorf("%+v, %v", rec, err)
		}
		if rec, err := tproxy.ReadRecord(ours[rules.IPv6]); err != nil || rec.PassthroughAddressOurs != address {
			t.Errorf("%+v, %v", rec, err)
		}
	}
}

// long is a list that a record does not hold.
func long() string {
	var b strings.Builder
	for i := range 100 {
		fmt.Fprintf(&b, "%d,", 2000+2*i)
	}
	return strings.TrimSuffix(b.String(), ",")
}
