package sim_test

import (
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// BenchmarkLiveSet reads and walks 20,000 rules: issue 3 wants 50 ms at most.
func BenchmarkLiveSet(b *testing.B) {
	text := tproxytest.Services(2500)
	p := sim.MustPacket("out tcp uid=1 10.0.0.7:4000 > 93.184.216.34:443")
	b.ReportAllocs()
	for b.Loop() {
		set, err := rules.ParseSave(rules.IPv4, text)
		if err != nil {
			b.Fatal(err)
		}
		sim.Walk(set, env, p)
	}
}

func TestKubeProxy(t *testing.T) {
	set, err := rules.ParseSave(rules.IPv4, tproxytest.Services(500))
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		packet string
		want   sim.Kind
	}{
		{"out tcp uid=1 10.0.0.7:4000 > 93.184.216.34:443", sim.Untouched},
		{"in tcp 10.0.0.9:4000 > 10.0.0.7:80", sim.Untouched},
		{"out tcp uid=1 10.0.0.7:4000 > 10.96.1.7:80", sim.Unknown},
		{"out tcp uid=1 10.0.0.7:4000 > 10.96.1.7:81", sim.Untouched},
	} {
		if trace := sim.Walk(set, env, sim.MustPacket(test.packet)); trace.Kind != test.want {
			t.Errorf("%s; want %s", trace.Summary(), test.want)
		}
	}
}
