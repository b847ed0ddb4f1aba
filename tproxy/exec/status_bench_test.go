package exec

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// Looking at a host with 20,000 rules of others, less what the save programs take:
// issue 7 wants 200 ms at most, with them.
func BenchmarkStatus(b *testing.B) {
	services := string(tproxytest.Services(2500))
	front := strings.NewReplacer("-A PREROUTING -j KUBE", "-I PREROUTING 1 -j KUBE", "-A OUTPUT -j KUBE", "-I OUTPUT 1 -j KUBE").Replace(services)
	for _, c := range []struct {
		name          string
		before, after string
		want          State
	}{
		{"alone", "", "", StateInstalled},
		{"in front in PREROUTING", services, "", StateInstalled},
		{"behind", "", services, StateInstalled},
		{"in front", "", front, StateDrifted}, // a connection to a service passes the proxy by
	} {
		b.Run(c.name, func(b *testing.B) {
			m := newFakeMachineAt(fakeProc(b))
			m.local = []netip.Prefix{netip.MustParsePrefix("10.0.0.7/24"), netip.MustParsePrefix("fd00::7/64")}
			m.routes = map[netip.Addr]kernel.Route{
				somewhere[rules.IPv4]: {Interface: "eth0", Source: m.local[0].Addr()}, somewhere[rules.IPv6]: {Interface: "eth0", Source: m.local[1].Addr()}}
			r := Runner{machine: m}
			n := m.netfilter["iptables-nft"]
			if err := n.Restore([]byte(c.before), nil); err != nil {
				b.Fatal(err)
			}
			if _, err := r.Apply(context.Background(), m.plan(b, tproxy.Config{Backend: tproxy.IPTablesNFT})); err != nil {
				b.Fatal(err)
			}
			if err := n.Restore([]byte(c.after), nil); err != nil {
				b.Fatal(err)
			}
			saves := map[string][]byte{}
			for _, v := range prefixes[:2] {
				saves["/usr/sbin/"+v+"-save"] = m.netfilter[v].Save()
			}
			m.onRun = func(c command) (result, bool) { return result{Stdout: saves[c.Path]}, true }
			b.ReportAllocs()
			for b.Loop() {
				s, err := r.Status(context.Background())
				if err != nil || s.State != c.want {
					b.Fatalf("%v, %v", err, s.lines())
				}
			}
		})
	}
}
