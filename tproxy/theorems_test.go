package tproxy_test

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
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

// TestProxyNeverLoops also counts the flows that are the hard ones: each kind has
// to be among those that were followed.
func TestProxyNeverLoops(t *testing.T) {
	var mu sync.Mutex
	hits := map[string]int{}
	holds(t, 3, func(c Case, p sim.Packet) error {
		mu.Lock()
		defer mu.Unlock()
		plan, err := tproxy.Build(c.Config, c.Host)
		if err != nil {
			return err
		}
		x, port, to := plan.Config, p.Destination.Port(), p.Destination.Addr()
		who := "an app"
		if plan.ProxyUIDs.Contains(p.UID) {
			who = "the proxy"
		}
		if p.Path == sim.In {
			who = "outside"
		}
		local := p.Path == sim.In || p.Path == sim.Out && c.Env.IsLocal(to)
		if p.Protocol == rules.TCP && local && p.State == sim.New {
			v6 := p.Family() == rules.IPv6 && (x.IPFamilyMode == tproxy.IPv4Only || c.Host.IPv6Off != "")
			for name, q := range map[string]uint16{"in": x.Inbound.Port, "out": x.Outbound.Port} {
				if port == q {
					hits["to "+name+" from "+who]++
				}
				if port == q && v6 {
					hits["to "+name+" over IPv6 that is off"]++
				}
			}
		}
		if p.Protocol == rules.TCP && plan.DNSOverTCP() && p.Path == sim.Out && p.State == sim.New && port == 53 {
			if !local {
				hits["query over TCP from "+who]++
			}
			for _, r := range c.Host.LocalResolvers {
				if !local && p.UID == r.UID {
					hits["query over TCP of a local resolver"]++
				}
			}
		}
		if p.Protocol == rules.UDP && x.DNS.On() {
			if port == x.DNS.Port && local {
				hits["to dns from "+who]++
			}
			for _, r := range c.Host.LocalResolvers {
				switch {
				case port == 53 && to == r.Address:
					hits["query to a local resolver from "+who]++
				case port == 53 && p.Path == sim.Out && p.UID == r.UID:
					hits["query of a local resolver"]++
				}
			}
		}
		return nil
	})
	for _, kind := range []string{"to in from an app", "to in from the proxy", "to in from outside", "to in over IPv6 that is off",
		"to out from an app", "to out from the proxy", "to out from outside", "to out over IPv6 that is off",
		"to dns from an app", "to dns from outside",
		"query over TCP from an app", "query over TCP from the proxy", "query over TCP of a local resolver",
		"query to a local resolver from an app", "query to a local resolver from the proxy", "query of a local resolver"} {
		if hits[kind] == 0 {
			t.Errorf("no flow %s", kind)
		}
	}
	t.Log(hits)
}

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
// How names of the mesh are resolved changes the way of no packet: the rule for the
// interface of ours gives a mark, and no verdict.
func TestSplitChangesNoVerdict(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := Configs().Draw(t, "config")
		host := Hosts(cfg).Draw(t, "host")
		plain, err := tproxy.Build(cfg, host)
		if err != nil {
			t.Skip(err)
		}
		cfg.DNS.ControlPlane, host.Nameserver.Split = netip.MustParseAddr("10.0.0.9"), tproxy.SplitLink
		split, err := tproxy.Build(cfg, host)
		if err != nil {
			t.Fatal(err)
		}
		for range 8 {
			p := Packets(cfg, host, Env()).Draw(t, "packet")
			p.OutInterface = rapid.SampledFrom([]string{"", tproxy.MeshLink}).Draw(t, "interface")
			was, now := sim.Walk(plain.Rules, Env(), p), sim.Walk(split.Rules, Env(), p)
			if was.Verdict != now.Verdict || was.Reason != now.Reason {
				t.Errorf("%s: %s # %s, and without the split %s # %s", p, Word(cfg, now.Verdict), now.Reason, Word(cfg, was.Verdict), was.Reason)
			}
		}
	})
}

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

// forms are the rules of each family as iptables holds them, and as it prints
// them.
func forms(t Fataler, s rules.Set) map[string]map[rules.Family]rules.Set {
	t.Helper()
	out := map[string]map[rules.Family]rules.Set{"lowered": {}, "rendered and parsed": {}, "in nftables": {}}
	table, err := s.Native(tproxy.NFTable)
	if err != nil {
		t.Fatalf("%v", err)
	}
	native, err := table.Set()
	if err != nil {
		t.Fatalf("%v", err)
	}
	for _, f := range rules.Families() {
		parsed, err := rules.ParseSave(f, saved(s, f))
		if err != nil {
			t.Fatalf("%v", err)
		}
		out["lowered"][f], out["rendered and parsed"][f], out["in nftables"][f] = s.Lower(f), parsed, native
	}
	return out
}

// disagree says in which form a packet fares otherwise than in the plan.
func disagree(c Case, forms map[string]map[rules.Family]rules.Set, p sim.Packet) error {
	trace := sim.Walk(c.Rules, c.Env, p)
	if got := sim.Decide(c.Rules, c.Env, p); got != trace.Verdict {
		return fmt.Errorf("Decide says %s\n%s", got, trace)
	}
	for form, sets := range forms {
		if got := sim.Decide(sets[p.Family()], c.Env, p); got != trace.Verdict {
			return fmt.Errorf("%s: %s\n%s", form, got, trace)
		}
	}
	return nil
}

// TestEveryFormGivesTheSameVerdict compares walks through the rules as data, as
// iptables holds them, and as it prints them. That the kernel agrees is tested in
// tproxy/exec.
func TestEveryFormGivesTheSameVerdict(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Draw(t, Configs().Draw(t, "config"))
		forms := forms(t, c.Rules)
		packets := Packets(c.Config, c.Host, c.Env)
		for range 100 {
			if err := disagree(c, forms, packets.Draw(t, "packet")); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// twin is the IPv6 address that is to IPv6 what the IPv4 address is to IPv4.
func twin(a netip.Addr) netip.Addr {
	switch {
	case a.Is6():
		return a
	case a == netip.MustParseAddr("127.0.0.6"):
		return netip.MustParseAddr("::6")
	case a.IsLoopback():
		return netip.IPv6Loopback()
	}
	b, low := netip.MustParseAddr("fd64::").As16(), a.As4()
	copy(b[12:], low[:])
	return netip.AddrFrom16(b)
}

// twins are IPv4 prefixes that hold nothing of 127.0.0.0/8, of which IPv6 has one
// address, and their twins.
func twins(list []netip.Prefix) (out []netip.Prefix) {
	for _, p := range list {
		if p.Addr().Is4() && !p.Overlaps(netip.MustParsePrefix("127.0.0.0/8")) {
			out = append(out, p, netip.PrefixFrom(twin(p.Addr()), 96+p.Bits()))
		}
	}
	return out
}

// TestFamiliesGiveTheSameVerdict: a Config that says the same of both families
// treats a packet of IPv4 and its twin of IPv6 alike, and IPv4 alone leaves the
// twin untouched.
func TestFamiliesGiveTheSameVerdict(t *testing.T) {
	var mu sync.Mutex
	hits := map[sim.Kind]int{}
	rapid.Check(t, func(t *rapid.T) {
		cfg := Configs().Draw(t, "config")
		host := Hosts(cfg).Draw(t, "host")
		cfg.Inbound.ExcludeIPs, cfg.Outbound.ExcludeIPs = twins(cfg.Inbound.ExcludeIPs), twins(cfg.Outbound.ExcludeIPs)
		var servers []netip.Addr
		for _, a := range host.Nameservers {
			if a.Is4() && !a.IsLoopback() {
				servers = append(servers, a, twin(a))
			}
		}
		host.Nameservers = servers
		env := sim.EnvOf()
		for _, p := range Env().Local {
			if p.Addr().Is4() {
				env.Local = append(env.Local, sim.EnvOf(p.Addr(), twin(p.Addr())).Local...)
			}
		}
		c, err := NewCase(cfg, host, env)
		if errors.As(err, new(*tproxy.RefusedError)) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		packets := Packets(cfg, host, env)
		for range 100 {
			p := packets.Draw(t, "packet")
			if p.Family() == rules.IPv6 {
				continue
			}
			q := p
			q.Source = netip.AddrPortFrom(twin(p.Source.Addr()), p.Source.Port())
			q.Destination = netip.AddrPortFrom(twin(p.Destination.Addr()), p.Destination.Port())
			want := sim.Decide(c.Rules, env, p)
			if cfg.IPFamilyMode == tproxy.IPv4Only || host.IPv6Off != "" {
				want = sim.Verdict{Kind: sim.Untouched}
			}
			if got := sim.Decide(c.Rules, env, q); got != want {
				t.Fatalf("wanted %s\n%s\n%s", want, sim.Walk(c.Rules, env, p), sim.Walk(c.Rules, env, q))
			}
			mu.Lock()
			hits[want.Kind]++
			mu.Unlock()
		}
	})
	t.Log(hits)
	for _, k := range []sim.Kind{sim.Untouched, sim.Redirected, sim.Refused} {
		if hits[k] == 0 {
			t.Errorf("no packet was %s", k)
		}
	}
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
// refuses it, or the script has the lines it has with harmless strings; the record has
// them in quotes.
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
			if r := &host.LocalResolvers[i]; r.Untold != "" {
				r.Untold, r.Behind = "x"+s("untold"), s("behind")
			}
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
			got, record := withoutRecord(string(p.Rules.IPTables(f)))
			if want, _ := withoutRecord(string(harmless.Rules.IPTables(f))); got != want {
				t.Fatalf("%s:\n%s\nwith harmless strings:\n%s", f, got, want)
			}
			for _, line := range record {
				if !recordLine.MatchString(line) {
					t.Fatalf("%s: a line of the record is %q", f, line)
				}
			}
		}
	})
}

// recordLine is what a line of the record is: a quoted word, and nothing behind it
// that a string could have brought.
var recordLine = regexp.MustCompile(`^-A KUMA_MESH_RECORD -m comment --comment "(?:[ !#-\[\]-~]|\\["\\])*" -j RETURN\n$`)

// withoutRecord takes the lines out of a script that hold the record.
func withoutRecord(script string) (rest string, record []string) {
	var b strings.Builder
	for line := range strings.Lines(script) {
		if strings.HasPrefix(line, "-A KUMA_MESH_RECORD ") {
			record = append(record, line)
		} else {
			b.WriteString(line)
		}
	}
	return b.String(), record
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
			Source: sim.MustPacket("in tcp 10.0.0.7:4000 > 10.0.0.7:80").Source, Destination: sim.MustPacket("in tcp 10.0.0.7:4000 > 93.184.216.34:80").Destination}); row != "B3" && r.UID != 0 && r.Untold == "" {
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
