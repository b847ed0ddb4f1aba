package tproxy_test

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// A table drifts where it is another than the plan's, its record left aside, and each
// place that is told of what stands is one in it.
func TestTableDrift(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, err := tproxy.Build(tproxytest.Configs().Draw(t, "config"), tproxy.Host{})
		if err != nil {
			t.Skip(err)
		}
		want, err := p.WithRecord(tproxy.Record{}).Native(tproxy.NFTable)
		if err != nil {
			t.Fatal(err)
		}
		live := want
		live.Chains = slices.Clone(want.Chains)
		for range rapid.IntRange(0, 3).Draw(t, "edits") {
			c := &live.Chains[rapid.IntRange(0, len(live.Chains)-1).Draw(t, "chain")]
			if c.Name == "nat.KUMA_MESH_RECORD" || len(c.Rules) == 0 {
				continue
			}
			c.Rules = slices.Clone(c.Rules)
			i, j := rapid.IntRange(0, len(c.Rules)-1).Draw(t, "rule"), rapid.IntRange(0, len(c.Rules)-1).Draw(t, "other")
			switch rapid.IntRange(0, 5).Draw(t, "edit") {
			case 0:
				c.Rules = slices.Delete(c.Rules, i, i+1)
			case 1:
				c.Rules = slices.Insert(c.Rules, i, c.Rules[j])
			case 2:
				c.Rules[i], c.Rules[j] = c.Rules[j], c.Rules[i]
			case 3:
				c.Rules[i].Action = rules.Drop{}
			case 4:
				c.Rules[i].Unknown = "something"
			case 5:
				if c.Hook != "" {
					c.Priority++
				}
			}
		}
		drift, err := p.TableDrift(&live)
		if err != nil {
			t.Fatal(err)
		}
		if same := live.Equal(&want); same != (len(drift) == 0) {
			t.Fatalf("the same: %t, and yet %v\n%s", same, drift, live.Text())
		}
		for _, d := range drift {
			if d.Is == "" || d.Index == 0 {
				continue
			}
			i := slices.IndexFunc(live.Chains, func(c rules.NativeChain) bool { return c.Name == string(d.Table)+"."+d.Chain })
			r := live.Chains[i].Rules[d.Index-1]
			if r.Comment = ""; r.String() != d.Is && "a rule with "+r.Unknown != d.Is {
				t.Fatalf("%v is not there:\n%s", d, live.Text())
			}
		}
	})
}
