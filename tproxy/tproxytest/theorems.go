package tproxytest

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// Case is a Config on a host, with the rules to judge: those of its plan, or
// some that were tampered with.
type Case struct {
	Config tproxy.Config
	Host   tproxy.Host
	Env    sim.Env
	Rules  rules.Set
}

// NewCase builds the Config for the host. The error is that of tproxy.Build.
func NewCase(cfg tproxy.Config, host tproxy.Host, env sim.Env) (Case, error) {
	plan, err := tproxy.Build(cfg, host)
	if err != nil {
		return Case{}, err
	}
	return Case{cfg, host, env, plan.Rules}, nil
}

// GoString writes the case as Go source, without its rules.
func (c Case) GoString() string {
	return fmt.Sprintf("tproxytest.NewCase(%#v, %#v, %#v)", c.Config, c.Host, c.Env)
}

// Theorem is a statement of docs/contract.md, section 3, about any packet.
type Theorem struct {
	Number int
	Name   string
	// Holds returns an error that shows the packet's way if the theorem does not
	// hold for it.
	Holds func(Case, sim.Packet) error
}

// Theorems are those of the contract that speak of a packet: 1 to 4. They judge
// by the Config and the contract, not by the plan.
func Theorems() []Theorem {
	return []Theorem{
		{1, "excluded ports are never redirected", excludedPorts},
		{2, "SSH is never redirected unasked", neverSSH},
		{3, "the proxy never loops", neverLoops},
		{4, "every packet goes where the contract says", totality},
	}
}

func wrong(c Case, p sim.Packet, format string, args ...any) error {
	return fmt.Errorf("%s\n%s", fmt.Sprintf(format, args...), sim.Walk(c.Rules, c.Env, p))
}

func excludedPorts(c Case, p sim.Packet) error {
	v := sim.Decide(c.Rules, c.Env, p)
	port := p.Destination.Port()
	switch {
	case p.Protocol != rules.TCP || v.Kind != sim.Redirected:
	case v.Port == orPort(c.Config.Inbound.Port, 15006) && holdsPort(c.Config.Inbound.ExcludePorts, port):
		return wrong(c, p, "inbound port %d is excluded", port)
	case v.Port == orPort(c.Config.Outbound.Port, 15001) && holdsPort(c.Config.Outbound.ExcludePorts, port):
		return wrong(c, p, "outbound port %d is excluded", port)
	}
	return nil
}

func neverSSH(c Case, p sim.Packet) error {
	asked := c.Config.Inbound.CaptureSSH || c.Config.Pod || c.Host.Pod != ""
	if asked || p.Protocol != rules.TCP || p.Destination.Port() != 22 {
		return nil
	}
	if v := sim.Decide(c.Rules, c.Env, p); v.Kind == sim.Redirected && v.Port == orPort(c.Config.Inbound.Port, 15006) {
		return wrong(c, p, "port 22 is redirected inbound")
	}
	return nil
}

func neverLoops(c Case, p sim.Packet) error {
	v := sim.Decide(c.Rules, c.Env, p)
	proxys := p.Path == sim.Out && isProxy(c.Config, c.Host, p.UID)
	if proxys && v.Kind == sim.Redirected {
		switch {
		case p.Protocol == rules.TCP && v.Port == orPort(c.Config.Outbound.Port, 15001):
			return wrong(c, p, "the proxy's connection is redirected to its outbound port")
		case p.Protocol == rules.UDP, v.Port == orPort(c.Config.DNS.Port, 15053):
			return wrong(c, p, "the proxy's query is redirected to its DNS port")
		}
	}
	for _, x := range proxies(c) {
		j := sim.Follow(c.Rules, c.Env, x, p)
		if j.End == sim.Loop || j.End == sim.Lost {
			return fmt.Errorf("the connection does not end:\n%s", j)
		}
	}
	return nil
}

// proxies are the case's proxy, once for the first and once for the last of its
// users.
func proxies(c Case) (out []sim.Proxy) {
	e := edgesOf(c.Config, c.Host, c.Env)
	x := sim.Proxy{
		InboundPort:  orPort(c.Config.Inbound.Port, 15006),
		OutboundPort: orPort(c.Config.Outbound.Port, 15001),
		DNSPort:      orPort(c.Config.DNS.Port, 15053),
		IPv4Only:     c.Config.IPFamilyMode == tproxy.IPv4Only || c.Host.IPv6Off != "",
		Nameservers:  c.Host.Nameservers,
	}
	var upstream []netip.Addr
	for _, a := range append(addrs("203.0.113.53", "2001:db8:53::53"), c.Host.Nameservers...) {
		if !c.Env.IsLocal(a) {
			upstream = append(upstream, a)
		}
	}
	for _, r := range c.Host.LocalResolvers {
		x.Resolvers = append(x.Resolvers, sim.Resolver{Address: r.Address, UID: r.UID, Upstream: upstream})
	}
	for _, uid := range []uint32{e.proxy[0], e.proxy[len(e.proxy)-1]} {
		if x.UID = uid; len(out) == 0 || uid != out[0].UID {
			out = append(out, x)
		}
	}
	return out
}

func totality(c Case, p sim.Packet) error {
	row, want := Expect(c.Config, c.Host, c.Env, p)
	if got := sim.Decide(c.Rules, c.Env, p); got != want {
		return wrong(c, p, "row %s wants %s, the rules say %s", row, want, got)
	}
	return nil
}

// Order is theorem 5: other, the same Config with its lists in another order and
// with repetitions, gives the same bytes on the host.
func Order(cfg, other tproxy.Config, host tproxy.Host) error {
	p, err := tproxy.Build(cfg, host)
	if err != nil {
		return err
	}
	q, err := tproxy.Build(other, host)
	if err != nil {
		return fmt.Errorf("in another order it is refused: %w", err)
	}
	for _, f := range rules.Families() {
		if a, b := p.Rules.IPTables(f), q.Rules.IPTables(f); !bytes.Equal(a, b) {
			return fmt.Errorf("in another order it gives other %s rules:\n%s\n%s", f, a, b)
		}
	}
	return nil
}

// Shuffled draws the Config with its lists in another order and with
// repetitions.
func Shuffled(cfg tproxy.Config) *rapid.Generator[tproxy.Config] {
	return rapid.Custom(func(t *rapid.T) tproxy.Config {
		cfg := cfg
		cfg.ProxyUIDs = shuffle(t, "proxy UIDs", cfg.ProxyUIDs)
		cfg.Inbound.ExcludeIPs = shuffle(t, "inbound IPs", cfg.Inbound.ExcludeIPs)
		cfg.Outbound.ExcludeIPs = shuffle(t, "outbound IPs", cfg.Outbound.ExcludeIPs)
		cfg.Outbound.ExcludePortsForUIDs = shuffle(t, "exclusions", cfg.Outbound.ExcludePortsForUIDs)
		for _, p := range []*rules.Ports{&cfg.Inbound.ExcludePorts, &cfg.Outbound.ExcludePorts} {
			r := shuffle(t, "ports", slices.Clone(p.Ranges()))
			*p, _ = rules.PortsOf(r...)
		}
		return cfg
	})
}

func shuffle[E any](t *rapid.T, label string, list []E) []E {
	out := rapid.Permutation(list).Draw(t, label)
	return append(out, out[:rapid.IntRange(0, len(out)).Draw(t, label+" twice")]...)
}

// Draw draws a host for the Config and builds it there; it skips a host on
// which the Config is refused.
func Draw(t *rapid.T, cfg tproxy.Config) Case {
	host := Hosts(cfg).Draw(t, "host")
	c, err := NewCase(cfg, host, Env())
	if refused := (*tproxy.RefusedError)(nil); errors.As(err, &refused) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Check tries the contract's theorems 1 to 5 on the Config, on hosts and with
// packets drawn at random: as many hosts as the flag -rapid.checks says (100),
// 20 packets on each. A name in ProxyUser is taken to be a user of each host.
func Check(t rapid.TB, cfg tproxy.Config) {
	t.Helper()
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		c := Draw(t, cfg)
		packets := Packets(c.Config, c.Host, c.Env)
		for range 20 {
			p := packets.Draw(t, "packet")
			for _, theorem := range Theorems() {
				if err := theorem.Holds(c, p); err != nil {
					t.Fatalf("theorem %d, %s: %v", theorem.Number, theorem.Name, err)
				}
			}
		}
		if err := Order(cfg, Shuffled(cfg).Draw(t, "shuffled"), c.Host); err != nil {
			t.Fatalf("theorem 5, the order never matters: %v", err)
		}
	})
}
