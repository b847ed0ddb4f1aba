package exec

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func (m *fakeMachine) live(t *testing.T, to ...netip.Addr) Live {
	t.Helper()
	r := Runner{machine: m}
	l, err := r.Live(context.Background(), to...)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// kinds lists what was read.
func (l Live) kinds() (out []string) {
	for _, r := range l.Rules {
		out = append(out, r.Family.String()+" "+r.Backend.String())
	}
	return out
}

func (l Live) names() (out []string) {
	for _, h := range l.Hidden {
		out = append(out, h.What)
	}
	return out
}

func TestLiveReadsWhatIsThere(t *testing.T) {
	m := newFakeMachine(t)
	same(t, "of nothing", m.live(t).kinds(), nil)
	same(t, "programs", m.programs(), nil) // no save makes a table
	m.install(t, tproxy.Config{})
	m.programs()
	before, writes := m.all(), m.writes
	l := m.live(t)
	same(t, "nft", l.kinds(), []string{"IPv4 iptables-nft", "IPv6 iptables-nft"})
	same(t, "programs", m.programs(), []string{"iptables-nft-save", "ip6tables-nft-save"})
	if _, ok := l.Rules[0].Set.Chain(rules.NAT, "KUMA_MESH_INBOUND"); !ok {
		t.Errorf("%+v", l.Rules[0].Set)
	}
	if m.all() != before || m.writes != writes {
		t.Error("looking changed something")
	}
	if err := m.netfilter["iptables-legacy"].Restore([]byte("*filter\n-A INPUT -j DROP\nCOMMIT\n"), nil); err != nil {
		t.Fatal(err)
	}
	same(t, "both", m.live(t).kinds(), []string{"IPv4 iptables-nft", "IPv6 iptables-nft", "IPv4 iptables-legacy"})
	m.missing["iptables-legacy-save"] = true
	l = m.live(t)
	same(t, "hidden", l.names(), []string{"the IPv4 rules of iptables-legacy, whose save program is not here"})
	if h := l.Hidden[0]; !h.Meets(rules.IPv4, rules.Output) || h.Meets(rules.IPv6, rules.Output) {
		t.Errorf("%+v", h)
	}
}

func TestLiveNamesWhatIsHidden(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, tproxy.Config{})
	base := func(family, table, hook string) kernel.NFTBase {
		return kernel.NFTBase{Table: kernel.NFTTable{Family: family, Name: table}, Chain: "c", Hook: hook, Type: "filter"}
	}
	shown := func(family, hook string, priority int32) kernel.NFTBase {
		return kernel.NFTBase{Table: kernel.NFTTable{Family: family, Name: "nat"}, Chain: hook, Hook: hook, Type: "nat", Priority: priority}
	}
	m.nftBases = []kernel.NFTBase{
		// iptables shows these, and no chain of another name, priority or type.
		shown("ip", "PREROUTING", -100), shown("ip6", "OUTPUT", -100), shown("ip", "INPUT", 100),
		base("ip", "nat", "POSTROUTING"), shown("ip6", "INPUT", -5),
		base("inet", "firewalld", "PREROUTING"), base("inet", "firewalld", "INPUT"),
		base("ip6", "docker", "FORWARD"), base("netdev", "shield", "INGRESS"), base("inet", "new", "?"),
	}
	m.natives = map[string][]string{"ip nat": {"chain PREROUTING: lookup"}}
	l := m.live(t)
	same(t, "hidden", l.names(), []string{"a rule made with nft in table ip nat, chain PREROUTING: lookup",
		"chain c of table ip nat, priority 0", "chain INPUT of table ip6 nat, priority -5",
		"table inet firewalld", "table ip6 docker", "table netdev shield", "table inet new"})
	for i, want := range []struct{ v4in, v6forward, v4out bool }{
		{true, false, true}, {false, false, false}, {false, false, false}, {true, false, false}, {false, true, false}, {true, false, false}, {true, true, true},
	} {
		h := l.Hidden[i]
		if h.Meets(rules.IPv4, rules.Prerouting, rules.Input) != want.v4in || h.Meets(rules.IPv6, rules.Forward) != want.v6forward || h.Meets(rules.IPv4, rules.Output) != want.v4out {
			t.Errorf("%+v: want %+v", h, want)
		}
		// At its priority 0 it is still in front of conntrack: notrack there lets a
		// connection pass ours by.
		if h.What == "table netdev shield" && h.Late {
			t.Errorf("%+v: late", h)
		}
	}
	// What a save passes over is hidden.
	m.onRun = func(c command) (result, bool) {
		return result{Stdout: []byte("# Table `nat' is incompatible, use 'nft' tool.\n")}, c.Path == "/usr/sbin/iptables-nft-save"
	}
	same(t, "incompatible", m.live(t).names()[:2], []string{"table ip nat", "chain INPUT of table ip6 nat, priority -5"})
}

func TestLiveErrors(t *testing.T) {
	m := newFakeMachine(t)
	m.notRoot = true
	r := Runner{machine: m}
	if _, err := r.Live(context.Background()); !errors.Is(err, ErrNotRoot) {
		t.Errorf("%v", err)
	}
	m.notRoot = false
	m.install(t, tproxy.Config{})
	m.onRun = func(command) (result, bool) { return result{Stdout: []byte("*nat\n")}, true }
	if _, err := r.Live(context.Background()); err == nil {
		t.Error("a save that is cut off is read")
	}
	m.onRun = func(command) (result, bool) { return result{Exit: 1, Stderr: []byte("no")}, true }
	if _, ok := errors.AsType[*ApplyError](func() error { _, err := r.Live(context.Background()); return err }()); !ok {
		t.Error("a save that fails is read")
	}
}

func TestLiveAddresses(t *testing.T) {
	m := newFakeMachine(t)
	a := netip.MustParseAddr("10.0.0.9")
	m.local = []netip.Prefix{netip.MustParsePrefix("10.0.0.7/24")}
	m.routes = map[netip.Addr]kernel.Route{a: {Interface: "eth0", Source: m.local[0].Addr()}}
	l := m.live(t, a)
	if len(l.Local) != 1 || l.Routes[a] != (Route{"eth0", m.local[0].Addr(), false}) {
		t.Errorf("%+v", l)
	}
}
