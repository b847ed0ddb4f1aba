package tproxy_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	. "github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// holds tries a theorem of the contract on random Configs, hosts and packets.
func holds(t *testing.T, number int, also ...func(Case, sim.Packet) error) {
	t.Helper()
	theorems := Theorems()
	i := slices.IndexFunc(theorems, func(o Theorem) bool { return o.Number == number })
	rapid.Check(t, func(t *rapid.T) {
		c := Draw(t, Configs().Draw(t, "config"))
		packets := Packets(c.Config, c.Host, c.Env)
		for range 100 {
			p := packets.Draw(t, "packet")
			for _, check := range append(also, theorems[i].Holds) {
				if err := check(c, p); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

func TestExcludedPortsNeverRedirect(t *testing.T) { holds(t, 1) }

func TestSSHNeverRedirectedUnasked(t *testing.T) { holds(t, 2) }

func TestProxyNeverLoops(t *testing.T) { holds(t, 3) }

// TestTotality also counts how many packets were judged by each row: one that
// no packet reached was not tested.
func TestTotality(t *testing.T) {
	var mu sync.Mutex
	hits := map[string]int{}
	total := 0
	holds(t, 4, func(c Case, p sim.Packet) error {
		row, _ := Expect(c.Config, c.Host, c.Env, p)
		mu.Lock()
		defer mu.Unlock()
		total++
		hits[row]++
		if top, _, below := strings.Cut(row, ":"); below {
			hits[top]++
		}
		return nil
	})
	var table strings.Builder
	for _, row := range slices.Sorted(maps.Keys(hits)) {
		fmt.Fprintf(&table, " %s %d", row, hits[row])
	}
	t.Logf("%d flows, by row:%s", total, table.String())
	for _, row := range append(Rows(), "B2:A1", "B2:A2", "B2:A3", "B2:A5") {
		if hits[row] == 0 {
			t.Errorf("no flow reached row %s", row)
		}
	}
}

func TestOrderNeverMatters(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Draw(t, Configs().Draw(t, "config"))
		if err := Order(c.Config, Shuffled(c.Config).Draw(t, "shuffled"), c.Host); err != nil {
			t.Fatal(err)
		}
	})
}

// A host's lists have no order either.
func TestHostOrderNeverMatters(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Draw(t, Configs().Draw(t, "config"))
		h := c.Host
		h.Nameservers = slices.Clone(h.Nameservers)
		slices.Reverse(h.Nameservers)
		h.LocalResolvers = append(slices.Clone(h.LocalResolvers), h.LocalResolvers...)
		slices.Reverse(h.LocalResolvers)
		p, err := tproxy.Build(c.Config, h)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range rules.Families() {
			if got, want := string(p.Rules.IPTables(f)), string(c.Rules.IPTables(f)); got != want {
				t.Fatalf("other %s rules:\n%s\n%s", f, got, want)
			}
		}
	})
}

// TestWalkAgreesWithWhatIsRendered compares walks through the rules as data, as
// iptables holds them, and as it prints them.
func TestWalkAgreesWithWhatIsRendered(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Draw(t, Configs().Draw(t, "config"))
		packets := Packets(c.Config, c.Host, c.Env)
		lowered, parsed := map[rules.Family]rules.Set{}, map[rules.Family]rules.Set{}
		for _, f := range rules.Families() {
			lowered[f] = c.Rules.Lower(f)
			set, err := rules.ParseSave(f, saved(c.Rules, f))
			if err != nil {
				t.Fatal(err)
			}
			parsed[f] = set
		}
		for range 100 {
			p := packets.Draw(t, "packet")
			want := sim.Decide(c.Rules, c.Env, p)
			if got := sim.Decide(lowered[p.Family()], c.Env, p); got != want {
				t.Fatalf("lowered: %s\n%s", got, sim.Walk(c.Rules, c.Env, p))
			}
			if got := sim.Decide(parsed[p.Family()], c.Env, p); got != want {
				t.Fatalf("rendered and parsed: %s\n%s", got, sim.Walk(c.Rules, c.Env, p))
			}
			if got := sim.Walk(c.Rules, c.Env, p).Verdict; got != want {
				t.Fatalf("Walk says %s, Decide %s", got, want)
			}
		}
	})
}

// saved is the script of a Set as iptables-save would list it: with the built-in
// chains, and appended.
func saved(s rules.Set, f rules.Family) []byte {
	var out []string
	for line := range strings.Lines(string(s.IPTables(f))) {
		switch {
		case line == "*nat\n":
			line += ":PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"
		case line == "*raw\n":
			line += ":OUTPUT ACCEPT [0:0]\n"
		case strings.HasPrefix(line, "-I "):
			words := strings.SplitN(line, " ", 4)
			line = "-A " + words[1] + " " + words[3]
		}
		out = append(out, line)
	}
	return []byte(strings.Join(out, ""))
}

// TestNoStringAddsALine: whatever the strings of a Config and a Host hold, Build
// refuses it, or the script has the lines it has with harmless strings.
func TestNoStringAddsALine(t *testing.T) {
	hostile := rapid.OneOf(
		rapid.SampledFrom([]string{"", "x\n-A OUTPUT -j DROP", "x\nCOMMIT\n*filter\n-P INPUT DROP", `"; rm -rf / #`, "kuma\" -j ACCEPT", "a\r\nb", "\x00", "--", "-j", "$(reboot)",
			"`id`", "é", strings.Repeat("a", 300), "lo\n", "eth0 -j DROP", "*nat", "COMMIT", "# x", "\\", "\\\"", "a b", "\u2028-A OUTPUT -j DROP"}),
		rapid.String())
	rapid.Check(t, func(t *rapid.T) {
		c := Draw(t, Configs().Draw(t, "config"))
		cfg, host := c.Config, c.Host
		s := func(label string) string { return hostile.Draw(t, label) }
		uid := slices.Concat(cfg.ProxyUIDs, []uint32{5678})[0]
		cfg.ProxyUIDs, cfg.ProxyUser = []uint32{uid}, ""
		harmless, err := tproxy.Build(cfg, host)
		if err != nil {
			t.Skip(err)
		}
		if rapid.Bool().Draw(t, "user by name") {
			cfg.ProxyUIDs, cfg.ProxyUser = nil, s("user")
			host.Users = []tproxy.User{{Name: cfg.ProxyUser, UID: uid}, {Name: s("other"), UID: 1}}
		}
		cfg.DNS.ResolvConf = s("resolv.conf")
		if host.Pod != "" {
			host.Pod = "x" + s("pod")
		}
		if host.IPv6Off != "" {
			host.IPv6Off = "x" + s("IPv6 off")
		}
		host.Notes = []string{s("note")}
		host.LocalResolvers = slices.Clone(host.LocalResolvers)
		for i := range host.LocalResolvers {
			host.LocalResolvers[i].Program = s("program")
		}
		host.RemoteShells = slices.Clone(host.RemoteShells)
		for i := range host.RemoteShells {
			host.RemoteShells[i].Why = s("why")
		}
		p, err := tproxy.Build(cfg, host)
		if err != nil {
			if !errors.As(err, new(*tproxy.ConfigError)) && !errors.As(err, new(*tproxy.RefusedError)) {
				t.Fatal(err)
			}
			return // no plan, no script: another string can mean another user
		}
		if !p.ProxyUIDs.Equal(harmless.ProxyUIDs) {
			return // a number was drawn, or the default
		}
		for _, f := range rules.Families() {
			if got, want := string(p.Rules.IPTables(f)), string(harmless.Rules.IPTables(f)); got != want {
				t.Fatalf("%s:\n%s\nwith harmless strings:\n%s", f, got, want)
			}
		}
	})
}

// TestRefusals: Build refuses a valid Config exactly where the contract says.
func TestRefusals(t *testing.T) {
	hits := map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		cfg := Configs().Draw(t, "config")
		host := Hosts(cfg).Draw(t, "host")
		_, err := tproxy.Build(cfg, host)
		refused := errors.As(err, new(*tproxy.RefusedError))
		if err != nil && !refused {
			t.Fatal(err)
		}
		want := refusal(cfg, host)
		if refused != (want != "") {
			t.Fatalf("refused: %v, the contract says %q", err, want)
		}
		hits[want]++
	})
	t.Log(hits)
}

// refusal is the contract's reason to refuse the Config: a shell that would be
// lost (issue 2, point 4), or a resolver that cannot be told apart (section 2,
// below table C), as far as queries of the resolver's family are captured.
func refusal(cfg tproxy.Config, host tproxy.Host) string {
	anybody := cfg
	anybody.Inbound.ExcludeIPs = nil
	for _, s := range host.RemoteShells {
		row, _ := Expect(anybody, host, Env(), sim.MustPacket(fmt.Sprintf("in tcp 10.0.0.9:4000 > 10.0.0.7:%d", s.Port)))
		if row == "A5" && !cfg.Pod && host.Pod == "" {
			return "shell"
		}
	}
	for _, r := range host.LocalResolvers {
		if row, _ := Expect(cfg, host, Env(), sim.Packet{Path: sim.Out, Protocol: rules.TCP, UID: r.UID,
			Source: sim.MustPacket("in tcp 10.0.0.7:4000 > 10.0.0.7:80").Source, Destination: sim.MustPacket("in tcp 10.0.0.7:4000 > 93.184.216.34:80").Destination}); row != "B3" && r.UID != 0 {
			continue
		}
		if cfg.DNS.CaptureAll {
			return "resolver, all DNS"
		}
		for _, ns := range host.Nameservers {
			v6only := ns.Is6() && (cfg.IPFamilyMode == tproxy.IPv4Only || host.IPv6Off != "")
			if cfg.DNS.Redirect && ns != r.Address && !v6only {
				return "resolver, other nameservers"
			}
		}
	}
	return ""
}
