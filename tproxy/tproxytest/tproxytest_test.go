package tproxytest_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// TestExpect holds the judge to the contract's table by hand: one packet and
// more for each row.
func TestExpect(t *testing.T) {
	cfg := tproxy.Config{
		Inbound:  tproxy.Inbound{ExcludePorts: rules.MustPorts("2222,9000-9010"), ExcludeIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.8/31")}},
		Outbound: tproxy.Outbound{ExcludePorts: rules.Port(3306), ExcludeIPs: []netip.Prefix{netip.MustParsePrefix("8.8.8.0/24")}, ExcludePortsForUIDs: []tproxy.UIDExclusion{{UIDs: rules.MustUIDs("7-9")}, {Protocol: rules.TCP, Ports: rules.Port(80), UIDs: rules.MustUIDs("20")}}},
		DNS:      tproxy.DNS{Redirect: true},
	}
	host := tproxy.Host{
		Nameservers:    []netip.Addr{netip.MustParseAddr("10.0.0.53"), netip.MustParseAddr("::ffff:127.0.0.53")},
		LocalResolvers: []tproxy.LocalResolver{{Address: netip.MustParseAddr("127.0.0.53"), UID: 101}},
	}
	pod, off, ipv4, noDNS, all := cfg, cfg, cfg, cfg, cfg
	pod.Pod = true
	off.Inbound.Off, off.Outbound.Off = true, true
	ipv4.IPFamilyMode = tproxy.IPv4Only
	noDNS.DNS = tproxy.DNS{}
	all.DNS = tproxy.DNS{CaptureAll: true, SkipConntrackZoneSplit: true}
	for _, test := range []struct {
		cfg    tproxy.Config
		packet string
		row    string
		want   string
	}{
		{cfg, "forwarded tcp 10.0.0.9:4000 > 93.184.216.34:443", "A0", "untouched"},
		{off, "in tcp 10.0.0.9:4000 > 10.0.0.7:80", "A1", "untouched"},
		{cfg, "in tcp 10.0.0.9:4000 > 10.0.0.7:80", "A2", "untouched"},
		{cfg, "in tcp 10.0.0.10:4000 > 10.0.0.7:22", "A3", "untouched"},
		{cfg, "in tcp 10.0.0.10:4000 > 10.0.0.7:9010", "A3", "untouched"},
		{cfg, "in tcp 10.0.0.10:4000 > 10.0.0.7:9011", "A5", "in"},
		{pod, "in tcp 10.0.0.10:4000 > 10.0.0.7:22", "A5", "in"},
		{pod, "in tcp 10.0.0.10:4000 > 10.0.0.7:2222", "A3", "untouched"},
		{cfg, "in tcp state=midstream 10.0.0.10:4000 > 10.0.0.7:80", "SYN", "untouched"},
		{cfg, "out tcp uid=5678 127.0.0.1:4000 > 127.0.0.1:15006", "B0", "refused"},
		{off, "out tcp uid=5678 10.0.0.7:4000 > 10.0.0.7:15001", "B0", "refused"},
		{cfg, "out tcp uid=5678 [::1]:4000 > [::6]:15001", "B0", "refused"},
		{cfg, "out tcp uid=1000 127.0.0.1:4000 > 127.0.0.1:15006", "B4", "untouched"},
		{cfg, "out tcp uid=5678 10.0.0.7:4000 > 10.0.0.8:15006", "B3", "untouched"},
		{cfg, "out tcp uid=5678 127.0.0.6:4000 > 10.0.0.7:80", "B1", "untouched"},
		{cfg, "out tcp uid=5678 10.0.0.7:4000 > 10.0.0.7:80", "B2:A5", "in"},
		{cfg, "out tcp uid=5678 127.0.0.1:4000 > 127.0.0.6:80", "B2:A5", "in"},
		{cfg, "out tcp uid=5678 10.0.0.7:4000 > 10.0.0.7:22", "B2:A3", "untouched"},
		{off, "out tcp uid=5678 10.0.0.7:4000 > 10.0.0.7:80", "B2:A1", "untouched"},
		{cfg, "out tcp uid=5678 127.0.0.1:4000 > 127.0.0.1:80", "B3", "untouched"},
		{cfg, "out tcp uid=1000 10.0.0.7:4000 > 10.0.0.7:80", "B4", "untouched"},
		{off, "out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:80", "B5", "untouched"},
		{cfg, "out tcp uid=1000 10.0.0.7:4000 > 8.8.8.255:80", "B6", "untouched"},
		{cfg, "out tcp uid=9 10.0.0.7:4000 > 93.184.216.34:80", "B7", "untouched"},
		{cfg, "out tcp uid=20 10.0.0.7:4000 > 93.184.216.34:80", "B7", "untouched"},
		{cfg, "out tcp uid=20 10.0.0.7:4000 > 93.184.216.34:81", "B11", "out"},
		{cfg, "out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:3306", "B8", "untouched"},
		{cfg, "out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:53", "B9", "untouched"},
		{noDNS, "out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:53", "B11", "out"},
		{cfg, "out tcp uid=10 10.0.0.7:4000 > 93.184.216.34:80", "B11", "out"},
		{noDNS, "out udp uid=1000 10.0.0.7:4000 > 10.0.0.53:53", "C1", "untouched"},
		{cfg, "out udp uid=5678 10.0.0.7:4000 > 10.0.0.53:53", "C1", "untouched"},
		{cfg, "out udp uid=7 10.0.0.7:4000 > 10.0.0.53:53", "C2", "untouched"},
		{all, "out udp uid=1000 10.0.0.7:4000 > 8.8.8.8:53", "C2", "untouched"},
		{all, "out udp uid=101 10.0.0.7:4000 > 9.9.9.9:53", "C2a", "untouched"},
		{cfg, "out udp uid=1000 10.0.0.7:4000 > 10.0.0.53:53", "C3", "dns, zone 2"},
		{cfg, "out udp uid=1000 127.0.0.1:4000 > 127.0.0.53:53", "C3", "dns, zone 2"},
		{all, "out udp uid=1000 10.0.0.7:4000 > 9.9.9.9:53", "C3", "dns"},
		{cfg, "out udp uid=1000 10.0.0.7:4000 > 9.9.9.9:53", "C4", "untouched"},
		{cfg, "out udp uid=5678 10.0.0.7:15053 > 10.0.0.7:4000", "Z", "untouched, zone 2"},
		{all, "out udp uid=5678 10.0.0.7:15053 > 10.0.0.7:4000", "Z", "untouched"},
		{noDNS, "out udp uid=5678 10.0.0.7:15053 > 10.0.0.7:4000", "other", "untouched"},
		{cfg, "in udp 10.0.0.9:4000 > 10.0.0.7:53", "other", "untouched"},
		{cfg, "in icmp 10.0.0.10 > 10.0.0.7", "other", "untouched"},
		{ipv4, "in tcp [fd00::9]:4000 > [fd00::7]:80", "IPv6", "untouched"},
		{ipv4, "out tcp uid=5678 [::1]:4000 > [::1]:15006", "IPv6", "untouched"},
	} {
		row, v := tproxytest.Expect(test.cfg, host, tproxytest.Env(), sim.MustPacket(test.packet))
		if got := tproxytest.Word(test.cfg, v); row != test.row || got != test.want {
			t.Errorf("%s: row %s, %s; want row %s, %s", test.packet, row, got, test.row, test.want)
		}
		if top, _, _ := strings.Cut(row, ":"); !slices.Contains(tproxytest.Rows(), top) {
			t.Errorf("row %s is not one of Rows", row)
		}
	}
}

// TestGenerators: what is drawn is valid, and the Config's own edges are met.
func TestGenerators(t *testing.T) {
	var packets, edges, refused, many int
	rapid.Check(t, func(t *rapid.T) {
		cfg := tproxytest.Configs().Draw(t, "config")
		if err := cfg.Validate(); err != nil {
			t.Fatal(err)
		}
		if cfg.Inbound.ExcludePorts.Len() > 15 {
			many++
		}
		host := tproxytest.Hosts(cfg).Draw(t, "host")
		if _, err := tproxy.Build(cfg, host); err != nil {
			refused++
		}
		own := cfg.Inbound.ExcludePorts.Union(cfg.Outbound.ExcludePorts).Union(rules.MustPorts("22,53,80,443,1,65535"))
		for _, e := range cfg.Outbound.ExcludePortsForUIDs {
			own = own.Union(e.Ports)
		}
		for range 20 {
			p := tproxytest.Packets(cfg, host, tproxytest.Env()).Draw(t, "packet")
			packets++
			port := p.Destination.Port()
			if port == 0 || own.Contains(port) || own.Contains(port-1) || own.Contains(port+1) || port == cfg.InboundPort() || port == cfg.OutboundPort() || port == cfg.DNSPort() || port >= 15001 && port <= 15053 {
				edges++
			}
		}
	})
	t.Logf("%d packets, %d to a port of the config's; refused %d; long lists %d", packets, edges, refused, many)
	if edges*2 < packets || many == 0 {
		t.Errorf("of %d packets only %d go to a port of the config's; long lists: %d", packets, edges, many)
	}
}

func TestCheck(t *testing.T) {
	tproxytest.Check(t, tproxy.Config{})
	tproxytest.Check(t, tproxy.Config{ProxyUser: "envoy", DNS: tproxy.DNS{Redirect: true}, Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("1-65535")}})
}

// bogus is a TB that keeps the failure.
type bogus struct {
	testing.TB
	failed string
}

func (b *bogus) Fatal(args ...any) { b.failed = fmt.Sprint(args...); panic(b) }

// A Config that is not valid fails the check with its faults.
func TestCheckOfAnInvalidConfig(t *testing.T) {
	b := &bogus{TB: t}
	defer func() {
		if recover() != b || !strings.Contains(b.failed, "redirect.outbound.port") {
			t.Errorf("%q", b.failed)
		}
	}()
	tproxytest.Check(b, tproxy.Config{Inbound: tproxy.Inbound{Port: 15001}})
}

func TestArchive(t *testing.T) {
	const text = "what it is\n-- a --\none\n--b--\n-- two words --\n-- c --\nthree\n"
	a := tproxytest.ParseArchive(text)
	if a.String() != text {
		t.Errorf("%q is read as %q", text, a.String())
	}
	if one, ok := a.Section("a"); one != "one\n--b--\n" || !ok {
		t.Errorf("%q, %t", one, ok)
	}
	if two, ok := a.Section("two words"); two != "" || !ok {
		t.Errorf("%q, %t", two, ok)
	}
	if _, ok := a.Section("d"); ok {
		t.Error("there is a section d")
	}
	if got := tproxytest.ParseArchive("-- a --\r\nx").String(); got != "-- a --\nx\n" {
		t.Errorf("%q", got)
	}
}

type recorder struct {
	testing.TB
	errors []string
}

func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

func TestGolden(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.txtar")
	if err := os.WriteFile(file, []byte("x\n-- in --\n1\n-- out --\n2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	section := func(name, text string) tproxytest.Section { return tproxytest.Section{Name: name, Text: text} }
	tproxytest.Golden(t, file, section("out", "2"), section("none", ""))
	r := &recorder{TB: t}
	tproxytest.Golden(r, file, section("out", "3"), section("in", ""), section("new", "4"))
	if len(r.errors) != 3 || !strings.Contains(r.errors[0], "section out") {
		t.Errorf("%q", r.errors)
	}
}

// Check tries the theorems of docs/contract.md on a Config of yours.
func ExampleCheck() {
	_ = func(t *testing.T) { // func TestMeshConfig(t *testing.T)
		tproxytest.Check(t, tproxy.Config{Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("3306,5432")}})
	}
}

// Golden keeps what a Config renders, and where its packets go, in a file.
func ExampleGolden() {
	_ = func(t *testing.T) { // func TestMeshRules(t *testing.T)
		plan, err := tproxy.Build(tproxy.Config{}, tproxy.Host{})
		if err != nil {
			t.Fatal(err)
		}
		const file = "testdata/mesh.txtar"
		walks, _ := tproxytest.ReadArchive(t, file).Section("walks")
		tproxytest.Golden(t, file,
			tproxytest.Section{Name: "v4", Text: string(plan.Rules.IPTables(rules.IPv4))},
			tproxytest.Section{Name: "walks", Text: tproxytest.Walks(t, plan, tproxytest.Env(), walks)})
	}
}

func ExampleExpect() {
	p := sim.MustPacket("in tcp 10.0.0.9:4000 > 10.0.0.7:22")
	row, v := tproxytest.Expect(tproxy.Config{}, tproxy.Host{}, tproxytest.Env(), p)
	fmt.Println(p, "is row", row, "of the contract:", v)
	// Output: in tcp 10.0.0.9:4000 > 10.0.0.7:22 is row A3 of the contract: untouched
}
