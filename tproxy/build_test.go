package tproxy_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestConfigFaults(t *testing.T) {
	uid := rules.MustUIDs("1000")
	for _, test := range []struct {
		name string
		cfg  tproxy.Config
		want []string // one for each fault: the path, and words of the line
	}{
		{"no user", tproxy.Config{ProxyUIDs: []tproxy.UID{1<<32 - 1}}, []string{`kumaDPUser: "4294967295" is no user`}},
		{"a number too high", tproxy.Config{ProxyUser: "4294967295"}, []string{`kumaDPUser: "4294967295" is no user: accepted is a user's name or a UID from 0 to 4294967294`}},
		{"a name with a line in it", tproxy.Config{ProxyUser: "a\nb"}, []string{`kumaDPUser: "a\nb" is no user name`}},
		{"a name like an option", tproxy.Config{ProxyUser: "-u"}, []string{`kumaDPUser: "-u" is no user name`}},
		{"equal ports", tproxy.Config{Inbound: tproxy.Inbound{Port: 9}, Outbound: tproxy.Outbound{Port: 9}}, []string{`redirect.outbound.port: "9" is redirect.inbound.port too`}},
		{"a port equal to a default", tproxy.Config{Inbound: tproxy.Inbound{Port: 15001}}, []string{`redirect.outbound.port: "15001" is redirect.inbound.port too`}},
		{"three equal ports", tproxy.Config{Inbound: tproxy.Inbound{Port: 9}, Outbound: tproxy.Outbound{Port: 9}, DNS: tproxy.DNS{Port: 9}},
			[]string{"redirect.outbound.port", "redirect.dns.port", "redirect.dns.port"}},
		{"host bits", tproxy.Config{Inbound: tproxy.Inbound{ExcludeIPs: prefixes("10.0.0.1/8")}},
			[]string{`redirect.inbound.excludePortsForIPs: "10.0.0.1/8" has host bits set: accepted is 10.0.0.0/8 for the network or 10.0.0.1 for the one address`}},
		{"no prefix", tproxy.Config{Outbound: tproxy.Outbound{ExcludeIPs: []netip.Prefix{{}}}}, []string{"redirect.outbound.excludePortsForIPs:"}},
		{"IPv4 in IPv6", tproxy.Config{Outbound: tproxy.Outbound{ExcludeIPs: prefixes("::ffff:10.0.0.0/104")}}, []string{"redirect.outbound.excludePortsForIPs:"}},
		{"an exclusion for nobody", tproxy.Config{Outbound: tproxy.Outbound{ExcludePortsForUIDs: []tproxy.UIDExclusion{{}}}},
			[]string{`redirect.outbound.excludePortsForUIDs: "*:*:" names no user`}},
		{"an exclusion for (uid_t)-1", tproxy.Config{Outbound: tproxy.Outbound{ExcludePortsForUIDs: []tproxy.UIDExclusion{{UIDs: rules.UIDsOf(1<<32 - 1)}}}},
			[]string{"redirect.outbound.excludePortsForUIDs:"}},
		{"an exclusion of another protocol", tproxy.Config{Outbound: tproxy.Outbound{ExcludePortsForUIDs: []tproxy.UIDExclusion{{Protocol: 1, UIDs: uid}}}},
			[]string{"names another protocol: accepted is tcp, udp or *"}},
		{"no mode", tproxy.Config{IPFamilyMode: 7}, []string{"ipFamilyMode:"}},
		{"no backend", tproxy.Config{Backend: 7}, []string{"backend:"}},
		{"half a second", tproxy.Config{Wait: 1500 * time.Millisecond}, []string{`wait: "1.5s" is not whole seconds`}},
		{"nanoseconds", tproxy.Config{WaitInterval: 1}, []string{"waitInterval:"}},
		{"a second", tproxy.Config{WaitInterval: time.Second}, []string{"waitInterval:"}},
		{"several at once", tproxy.Config{ProxyUIDs: []tproxy.UID{1<<32 - 1}, Inbound: tproxy.Inbound{Port: 9, ExcludeIPs: prefixes("10.0.0.1/8", "fd00::1/8")}, Outbound: tproxy.Outbound{Port: 9}},
			[]string{"kumaDPUser:", "redirect.outbound.port:", "10.0.0.1/8", "fd00::1/8"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := test.cfg.Validate()
			e, ok := errors.AsType[*tproxy.ConfigError](err)
			if !ok || len(e.Faults) != len(test.want) {
				t.Fatalf("%v; want %d faults", err, len(test.want))
			}
			for i, f := range e.Faults {
				if !strings.Contains(f.String(), test.want[i]) || f.Accepted == "" {
					t.Errorf("%s; want %s", f, test.want[i])
				}
			}
			if _, built := tproxy.Build(test.cfg, tproxy.Host{}); built == nil || built.Error() != err.Error() {
				t.Errorf("Build says %v", built)
			}
		})
	}
	if err := (tproxy.Config{}).Validate(); err != nil {
		t.Error(err)
	}
}

func TestProxyUser(t *testing.T) {
	kuma, envoy := tproxy.User{Name: "kuma-dp", UID: 999}, tproxy.User{Name: "envoy", UID: 5678}
	for _, test := range []struct {
		name  string
		cfg   tproxy.Config
		users []tproxy.User
		want  string // the UIDs, or the error
	}{
		{"nothing is known", tproxy.Config{}, nil, "5678"},
		{"nobody has 5678", tproxy.Config{}, []tproxy.User{kuma}, "999"},
		{"somebody has 5678", tproxy.Config{}, []tproxy.User{kuma, envoy}, "5678"},
		{"by name", tproxy.Config{ProxyUser: "kuma-dp"}, []tproxy.User{kuma, envoy}, "999"},
		{"by number, without a passwd entry", tproxy.Config{ProxyUser: "4294967294"}, nil, "4294967294"},
		{"root is named", tproxy.Config{ProxyUser: "0"}, nil, "0"},
		{"several", tproxy.Config{ProxyUIDs: []tproxy.UID{7, 5, 7, 6, 9}}, nil, "5-7,9"},
		{"numbers go before a name", tproxy.Config{ProxyUIDs: []tproxy.UID{7}, ProxyUser: "nobody here"}, nil, "7"},
		{"unknown", tproxy.Config{ProxyUser: "mesh"}, []tproxy.User{kuma},
			`kumaDPUser: "mesh" is no user of this host: accepted is a user that exists or a UID; to create it: useradd -u 5678 -U mesh`},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := tproxy.Build(test.cfg, tproxy.Host{Users: test.users})
			got := fmt.Sprint(err)
			if err == nil {
				got = p.ProxyUIDs.String()
			}
			if got != test.want {
				t.Errorf("%s, want %s", got, test.want)
			}
		})
	}
}

func TestLockout(t *testing.T) {
	shells := func(ports ...uint16) (out []tproxy.RemoteShell) {
		for _, p := range ports {
			out = append(out, tproxy.RemoteShell{Port: p, Why: "sshd listens"})
		}
		return out
	}
	for _, test := range []struct {
		name  string
		in    tproxy.Inbound
		pod   bool
		ports []tproxy.RemoteShell
		want  []string // the ports named
	}{
		{"22", tproxy.Inbound{}, false, shells(22), nil},
		{"22 is captured", tproxy.Inbound{CaptureSSH: true}, false, shells(22), []string{"22"}},
		{"22 is captured and excluded", tproxy.Inbound{CaptureSSH: true, ExcludePorts: rules.Port(22)}, false, shells(22), nil},
		{"another port", tproxy.Inbound{}, false, shells(22, 2222), []string{"2222"}},
		{"another port is excluded", tproxy.Inbound{ExcludePorts: rules.MustPorts("2000-3000")}, false, shells(22, 2222), nil},
		{"two", tproxy.Inbound{}, false, shells(2222, 2223), []string{"2222", "2223"}},
		{"inbound is off", tproxy.Inbound{Off: true}, false, shells(2222), nil},
		{"a pod", tproxy.Inbound{}, true, shells(22, 2222), nil},
		{"an excluded source does not help the others", tproxy.Inbound{ExcludeIPs: prefixes("10.0.0.0/8")}, false, shells(2222), []string{"2222"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, pod := range []tproxy.Host{{}, {Pod: "a pod"}} {
				cfg := tproxy.Config{Inbound: test.in, Pod: test.pod}
				pod.RemoteShells = test.ports
				_, err := tproxy.Build(cfg, pod)
				want := test.want
				if pod.Pod != "" {
					want = nil
				}
				checkRefused(t, err, want, "--exclude-inbound-ports ")
			}
		})
	}
}

// checkRefused wants a refusal for each word, which its reason names, and a
// remedy with the flag.
func checkRefused(t *testing.T, err error, words []string, flag string) {
	t.Helper()
	if words == nil {
		if err != nil {
			t.Error(err)
		}
		return
	}
	e, ok := errors.AsType[*tproxy.RefusedError](err)
	if !ok || len(e.Reasons) != len(words) {
		t.Fatalf("%v; want %d reasons", err, len(words))
	}
	for i, r := range e.Reasons {
		if !strings.Contains(r.What, words[i]) || !strings.Contains(r.Remedy, flag) {
			t.Errorf("%s: %s; want %s and %s", r.What, r.Remedy, words[i], flag)
		}
	}
}

func TestResolverLoops(t *testing.T) {
	stub, other := netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("10.0.0.53")
	six := netip.MustParseAddr("fd00::53")
	dnsmasq := func(uid tproxy.UID) []tproxy.LocalResolver {
		return []tproxy.LocalResolver{{Address: stub, UID: uid, PID: 7, Program: "dnsmasq"}}
	}
	docker := []tproxy.LocalResolver{{Address: stub, Program: "Docker's resolver", Untold: "runs outside", Behind: "iptables-nft"}}
	all, some := tproxy.DNS{CaptureAll: true}, tproxy.DNS{Redirect: true}
	dockers := []string{"Docker's resolver at 127.0.0.53 answers DNS on this host and runs outside"}
	refused := []string{"dnsmasq at 127.0.0.53 (process 7"}
	for _, test := range []struct {
		name    string
		cfg     tproxy.Config
		host    tproxy.Host
		want    []string
		notes   int
		servers int
	}{
		{"DNS is off", tproxy.Config{}, tproxy.Host{Nameservers: []netip.Addr{stub, other}, LocalResolvers: dnsmasq(0)}, nil, 0, 0},
		{"a user of its own, all", tproxy.Config{DNS: all}, tproxy.Host{Nameservers: []netip.Addr{stub}, LocalResolvers: dnsmasq(101)}, nil, 0, 0},
		{"root, all", tproxy.Config{DNS: all}, tproxy.Host{Nameservers: []netip.Addr{stub}, LocalResolvers: dnsmasq(0)}, refused, 0, 0},
		{"the proxy, all", tproxy.Config{DNS: all}, tproxy.Host{Nameservers: []netip.Addr{stub}, LocalResolvers: dnsmasq(5678)}, refused, 0, 0},
		{"root, both flags", tproxy.Config{DNS: tproxy.DNS{Redirect: true, CaptureAll: true}}, tproxy.Host{Nameservers: []netip.Addr{stub}, LocalResolvers: dnsmasq(0)}, refused, 0, 0},
		{"root, the only nameserver", tproxy.Config{DNS: some}, tproxy.Host{Nameservers: []netip.Addr{stub}, LocalResolvers: dnsmasq(0)}, nil, 2, 1},
		{"root, beside another", tproxy.Config{DNS: some}, tproxy.Host{Nameservers: []netip.Addr{stub, other}, LocalResolvers: dnsmasq(0)}, refused, 0, 0},
		{"the proxy, beside another", tproxy.Config{DNS: some}, tproxy.Host{Nameservers: []netip.Addr{stub, other}, LocalResolvers: dnsmasq(5678)}, refused, 0, 0},
		{"root, beside one that is left untouched", tproxy.Config{DNS: some, IPFamilyMode: tproxy.IPv4Only}, tproxy.Host{Nameservers: []netip.Addr{stub, six}, LocalResolvers: dnsmasq(0)}, nil, 2, 1},
		{"a user of its own, beside others", tproxy.Config{DNS: some}, tproxy.Host{Nameservers: []netip.Addr{stub, other, six, other}, LocalResolvers: dnsmasq(101)}, nil, 0, 3},
		{"no user tells it, all", tproxy.Config{DNS: all}, tproxy.Host{Nameservers: []netip.Addr{stub}, LocalResolvers: docker}, dockers, 0, 0},
		{"no user tells it, beside another", tproxy.Config{DNS: some}, tproxy.Host{Nameservers: []netip.Addr{stub, other}, LocalResolvers: docker}, dockers, 0, 0},
		{"no user tells it, the only nameserver", tproxy.Config{DNS: some}, tproxy.Host{Nameservers: []netip.Addr{stub}, LocalResolvers: docker}, nil, 1, 1},
		{"no nameserver", tproxy.Config{DNS: some}, tproxy.Host{}, nil, 2, 0},
		{"no nameserver of IPv6", tproxy.Config{DNS: some}, tproxy.Host{Nameservers: []netip.Addr{other}}, nil, 1, 1},
		{"a zone, and IPv4 in IPv6", tproxy.Config{DNS: some}, tproxy.Host{Nameservers: []netip.Addr{netip.MustParseAddr("fe80::1%eth0"), netip.MustParseAddr("::ffff:10.0.0.53")}}, nil, 0, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := tproxy.Build(test.cfg, test.host)
			remedy := "as a user of its own"
			if slices.Equal(test.want, dockers) {
				remedy = "127.0.0.53" // what else it could run as is not ours to say
			}
			checkRefused(t, err, test.want, remedy)
			if err != nil && remedy == "127.0.0.53" && strings.Contains(err.Error(), "of its own") {
				t.Errorf("%v", err)
			}
			if err == nil && len(test.host.LocalResolvers) > 0 && test.host.LocalResolvers[0].Untold != "" && strings.Contains(string(p.Rules.IPTables(rules.IPv4)), "a local resolver asks upstream") {
				t.Error("root's queries are left alone")
			}
			if err == nil && (len(p.Notes) != test.notes || len(p.Nameservers) != test.servers) {
				t.Errorf("notes %q and nameservers %v; want %d and %d", p.Notes, p.Nameservers, test.notes, test.servers)
			}
		})
	}
}

// RedirectTCP says where it has no effect, and then makes no rule.
func TestDNSOverTCPWithoutEffect(t *testing.T) {
	stub, other := netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("10.0.0.53")
	some, all := tproxy.DNS{Redirect: true, RedirectTCP: true}, tproxy.DNS{CaptureAll: true, RedirectTCP: true}
	for _, test := range []struct {
		name    string
		cfg     tproxy.Config
		servers []netip.Addr
		why     string
	}{
		{"DNS is off", tproxy.Config{DNS: tproxy.DNS{RedirectTCP: true}}, []netip.Addr{other}, "DNS is not redirected"},
		{"outbound is off", tproxy.Config{DNS: all, Outbound: tproxy.Outbound{Off: true}}, nil, "outbound connections are not redirected"},
		{"the port is excluded", tproxy.Config{DNS: all, Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("50-60")}}, nil, "--exclude-outbound-ports names port 53"},
		{"a local resolver alone", tproxy.Config{DNS: some}, []netip.Addr{stub, netip.IPv6Loopback()}, "no nameserver in /etc/resolv.conf is another host"},
		{"a local resolver, all", tproxy.Config{DNS: all}, []netip.Addr{stub}, ""},
		{"a local resolver and another", tproxy.Config{DNS: some}, []netip.Addr{stub, other}, ""},
		{"not asked for", tproxy.Config{DNS: tproxy.DNS{Redirect: true}}, []netip.Addr{stub}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := tproxy.Build(test.cfg, tproxy.Host{Nameservers: test.servers})
			if err != nil {
				t.Fatal(err)
			}
			_, chain := p.Rules.Chain(rules.NAT, "KUMA_MESH_DNS_TCP")
			if want := test.why == "" && test.cfg.DNS.RedirectTCP; p.DNSOverTCP() != want || chain != want {
				t.Errorf("over TCP %t, chain %t; want %t", p.DNSOverTCP(), chain, want)
			}
			const mark = "--redirect-dns-tcp has no effect: "
			i := slices.IndexFunc(p.Notes, func(n string) bool { return strings.HasPrefix(n, mark) })
			if (i >= 0) != (test.why != "") || i >= 0 && !strings.Contains(p.Notes[i], test.why) {
				t.Errorf("notes %q; want one with %q", p.Notes, test.why)
			}
		})
	}
}

func TestBackendChoice(t *testing.T) {
	both := tproxy.Programs{Save: "/sbin/save", Restore: "/sbin/restore"}
	nft := tproxy.Variant{Backend: tproxy.IPTablesNFT, IPv4: both, IPv6: both}
	legacy := tproxy.Variant{Backend: tproxy.IPTablesLegacy, IPv4: both, IPv6: both}
	table := tproxy.Variant{Backend: tproxy.NFTables}
	own := "nftables: it takes a table of our own and one transaction, and no program"
	firewalld := tproxy.Config{Persist: tproxy.PersistFirewalld}
	with := func(v tproxy.Variant, change func(*tproxy.Variant)) tproxy.Variant { change(&v); return v }
	ours := func(f ...rules.Family) func(*tproxy.Variant) {
		return func(v *tproxy.Variant) { v.Ours = f; v.Rules = true }
	}
	used := func(v *tproxy.Variant) { v.Rules = true }
	usual := func(v *tproxy.Variant) { v.Default = true }
	no6 := func(v *tproxy.Variant) { v.IPv6 = tproxy.Programs{} }
	none := func(v *tproxy.Variant) { v.IPv4, v.IPv6 = tproxy.Programs{}, tproxy.Programs{} }
	noSave := func(v *tproxy.Variant) { v.IPv4.Save = "" }
	// Docker's rules for its resolver, of which those of the other variant decide.
	docker := tproxy.LocalResolver{Address: netip.MustParseAddr("127.0.0.11"), Program: "Docker's resolver", Untold: "runs outside", Behind: "iptables-legacy"}
	some := tproxy.DNS{Redirect: true}
	first := "iptables-legacy: the rules for Docker's resolver at 127.0.0.11 are there, and ours have to come before them"
	for _, test := range []struct {
		name     string
		cfg      tproxy.Config
		variants []tproxy.Variant
		want     string // the backend and why, or words of the refusal
		removes  int
	}{
		{"Docker's", tproxy.Config{DNS: some}, []tproxy.Variant{with(nft, usual), with(legacy, used)}, first, 0},
		{"Docker's, both in use", tproxy.Config{DNS: some}, []tproxy.Variant{with(with(nft, usual), used), with(legacy, used)}, first, 0},
		{"Docker's, ours elsewhere", tproxy.Config{DNS: some}, []tproxy.Variant{with(nft, ours(rules.IPv4, rules.IPv6)), with(legacy, used)}, first, 2},
		{"Docker's, asked", tproxy.Config{DNS: some, Backend: tproxy.IPTablesNFT}, []tproxy.Variant{nft, with(legacy, used)}, "iptables-nft: asked for", 0},
		{"Docker's, not whole", tproxy.Config{DNS: some}, []tproxy.Variant{nft, with(with(legacy, no6), used)}, "iptables-nft: the only one with all its programs here", 0},
		{"Docker's, no DNS", tproxy.Config{}, []tproxy.Variant{with(with(nft, usual), used), with(legacy, used)}, "iptables-nft: it is what iptables means on this host", 0},
		{"nothing known", tproxy.Config{}, nil, "iptables-nft: nothing is known of the host", 0},
		{"nothing known, asked", tproxy.Config{Backend: tproxy.IPTablesLegacy}, nil, "iptables-legacy: asked for", 0},
		{"asked", tproxy.Config{Backend: tproxy.IPTablesLegacy}, []tproxy.Variant{nft, legacy}, "iptables-legacy: asked for", 0},
		{"asked, not here", tproxy.Config{Backend: tproxy.IPTablesLegacy}, []tproxy.Variant{nft}, "iptables-legacy (asked for) cannot be used: iptables-legacy-save, iptables-legacy-restore, ip6tables-legacy-save, ip6tables-legacy-restore not found", 0},
		{"asked, no IPv6", tproxy.Config{Backend: tproxy.IPTablesNFT}, []tproxy.Variant{with(nft, no6), legacy}, "or leave IPv6 untouched with --ip-family-mode=ipv4", 0},
		{"one", tproxy.Config{}, []tproxy.Variant{legacy}, "iptables-legacy: the only one with all its programs here", 0},
		{"one whole", tproxy.Config{}, []tproxy.Variant{with(nft, no6), legacy}, "iptables-legacy: the only one with all its programs here", 0},
		{"IPv6 is not needed", tproxy.Config{IPFamilyMode: tproxy.IPv4Only}, []tproxy.Variant{with(nft, no6)}, "iptables-nft: the only one with all its programs here", 0},
		{"none", tproxy.Config{}, []tproxy.Variant{with(nft, none)}, "iptables-nft (the only one here) cannot be used", 0},
		{"no save", tproxy.Config{}, []tproxy.Variant{with(nft, noSave)}, "cannot be used: iptables-nft-save", 0},
		{"ours", tproxy.Config{}, []tproxy.Variant{with(nft, usual), with(legacy, ours(4, 6))}, "iptables-legacy: our rules are there already", 0},
		{"ours in both, rules in both", tproxy.Config{}, []tproxy.Variant{with(with(nft, ours(4)), usual), with(legacy, ours(4, 6))}, "iptables-nft: it is what iptables means on this host", 2},
		{"rules in one", tproxy.Config{}, []tproxy.Variant{with(nft, usual), with(legacy, used)}, "iptables-legacy: the other one holds no rules", 0},
		{"rules in both", tproxy.Config{}, []tproxy.Variant{with(nft, used), with(with(legacy, used), usual)}, "iptables-legacy: it is what iptables means on this host", 0},
		{"neither in use", tproxy.Config{}, []tproxy.Variant{nft, legacy}, "iptables-nft: both are here, and neither is in use", 0},
		{"ours in the other", tproxy.Config{Backend: tproxy.IPTablesNFT}, []tproxy.Variant{nft, with(legacy, ours(4, 6))}, "iptables-nft: asked for", 2},
		{"ours in the other, which is gone", tproxy.Config{Backend: tproxy.IPTablesNFT}, []tproxy.Variant{nft, with(with(legacy, ours(4)), none)}, "iptables-legacy-restore is not installed", 0},
		{"ours in the other, IPv6 of which is gone", tproxy.Config{Backend: tproxy.IPTablesNFT}, []tproxy.Variant{nft, with(with(legacy, ours(4, 6)), no6)}, "ip6tables-legacy-restore is not installed", 0},
		{"a table", tproxy.Config{}, []tproxy.Variant{table, with(nft, usual), with(legacy, used)}, own, 0},
		{"a table alone", tproxy.Config{}, []tproxy.Variant{table}, own, 0},
		{"a table, Docker's", tproxy.Config{DNS: some}, []tproxy.Variant{table, nft, with(legacy, used)}, own, 0},
		{"ours in a table", tproxy.Config{}, []tproxy.Variant{with(table, ours(0)), with(nft, usual)}, "nftables: our rules are there already", 0},
		{"ours in a table and elsewhere", tproxy.Config{}, []tproxy.Variant{with(table, ours(0)), with(nft, ours(4, 6))}, "nftables: our rules are there already", 2},
		{"ours in iptables, where a table can be", tproxy.Config{}, []tproxy.Variant{table, with(nft, ours(4, 6)), legacy}, "iptables-nft: our rules are there already", 0},
		{"ours in iptables, whose programs are gone", tproxy.Config{}, []tproxy.Variant{table, with(with(nft, none), ours(4, 6))}, "iptables-nft-restore is not installed", 0},
		{"a table, asked", tproxy.Config{Backend: tproxy.NFTables}, []tproxy.Variant{table, with(nft, ours(4, 6))}, "nftables: asked for", 2},
		{"a table, asked, not here", tproxy.Config{Backend: tproxy.NFTables}, []tproxy.Variant{nft, legacy}, "nftables (asked for) cannot be used: the kernel is too old", 0},
		{"iptables, ours in a table", tproxy.Config{Backend: tproxy.IPTablesNFT}, []tproxy.Variant{with(table, ours(0)), nft}, "iptables-nft: asked for", 1},
		{"firewalld", firewalld, []tproxy.Variant{table, with(nft, usual), legacy}, "iptables-nft: firewalld loads its direct rules with what iptables means on this host", 0},
		{"firewalld, ours in a table", firewalld, []tproxy.Variant{with(table, ours(0)), nft, with(legacy, usual)}, "iptables-legacy: firewalld loads its direct rules with what iptables means on this host", 1},
		{"firewalld, and no iptables", firewalld, []tproxy.Variant{table}, "iptables-nft (firewalld loads its direct rules with what iptables means on this host) cannot be used", 0},
		{"firewalld, a table asked", tproxy.Config{Persist: tproxy.PersistFirewalld, Backend: tproxy.NFTables}, []tproxy.Variant{table, nft}, "it has no place for a table of nftables", 0},
		{"ours in IPv6, which is left out now", tproxy.Config{IPFamilyMode: tproxy.IPv4Only}, []tproxy.Variant{with(nft, ours(4, 6))}, "iptables-nft: the only one with all its programs here", 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := tproxy.Build(test.cfg, tproxy.Host{Variants: test.variants, NoNFTables: "the kernel is too old", Nameservers: []netip.Addr{docker.Address}, LocalResolvers: []tproxy.LocalResolver{docker}})
			if err != nil {
				if !errors.As(err, new(*tproxy.RefusedError)) || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%v; want %s", err, test.want)
				}
				return
			}
			said := slices.ContainsFunc(p.Notes, func(n string) bool { return strings.Contains(n, "whether queries reach the proxy is tried") })
			if said != (test.cfg.DNS.On() && p.Backend == tproxy.IPTablesNFT) {
				t.Errorf("notes %q", p.Notes)
			}
			removes := 0
			for _, s := range p.Steps {
				if _, ok := s.(tproxy.RemoveRules); ok {
					removes++
				}
			}
			if got := p.Backend.String() + ": " + p.BackendWhy; got != test.want || removes != test.removes {
				t.Errorf("%s and %d removals; want %s and %d", got, removes, test.want, test.removes)
			}
		})
	}
}

// A family that is left out although rules of ours stand in it, of a variant
// whose program for it is gone, could not be taken out.
func TestOursInAFamilyWithoutPrograms(t *testing.T) {
	v := tproxy.Variant{Backend: tproxy.IPTablesNFT, IPv4: tproxy.Programs{Save: "s", Restore: "r"}, Ours: []rules.Family{rules.IPv6}}
	if _, err := tproxy.Build(tproxy.Config{IPFamilyMode: tproxy.IPv4Only}, tproxy.Host{Variants: []tproxy.Variant{v}}); err == nil {
		t.Error("the plan removes IPv6 rules with a program that is not there")
	}
}

func TestFamilies(t *testing.T) {
	for _, test := range []struct {
		cfg    tproxy.Config
		host   tproxy.Host
		want   []rules.Family
		notes  int
		adds   bool
		record bool
	}{
		{tproxy.Config{}, tproxy.Host{}, rules.Families(), 0, true, true},
		{tproxy.Config{}, tproxy.Host{PassthroughAddress: true}, rules.Families(), 0, false, false},
		{tproxy.Config{}, tproxy.Host{IPv6Off: "off"}, []rules.Family{rules.IPv4}, 1, false, false},
		{tproxy.Config{IPFamilyMode: tproxy.IPv4Only}, tproxy.Host{}, []rules.Family{rules.IPv4}, 1, false, false},
	} {
		p, err := tproxy.Build(test.cfg, test.host)
		if err != nil {
			t.Fatal(err)
		}
		adds := slices.ContainsFunc(p.Steps, func(s tproxy.Step) bool { _, ok := s.(tproxy.AddAddress); return ok })
		rec, err := tproxy.ReadRecord(p.Rules)
		if !slices.Equal(p.Families, test.want) || len(p.Notes) != test.notes || adds != test.adds || err != nil || rec.PassthroughAddressOurs != test.record {
			t.Errorf("%#v on %#v: %v, notes %q, adds %t, record %v %v", test.cfg, test.host, p.Families, p.Notes, adds, rec, err)
		}
		if len(test.want) == 1 && len(p.Rules.IPTables(rules.IPv6)) > 0 {
			t.Errorf("%#v on %#v has IPv6 rules", test.cfg, test.host)
		}
	}
}

// The plan's Config has every default and every list in one order, and is valid
// again.
func TestCanonicalConfig(t *testing.T) {
	cfg := tproxy.Config{
		ProxyUIDs: []tproxy.UID{9, 5, 9},
		Inbound:   tproxy.Inbound{ExcludeIPs: prefixes("fd00::/8", "10.0.0.9/32", "10.0.0.0/8", "fd00::/8", "0.0.0.0/32")},
		Outbound: tproxy.Outbound{ExcludePortsForUIDs: []tproxy.UIDExclusion{
			{Protocol: rules.UDP, Ports: rules.Port(53), UIDs: rules.MustUIDs("7")},
			{Protocol: rules.TCP, Ports: rules.Port(80), UIDs: rules.MustUIDs("3")},
			{Protocol: rules.UDP, Ports: rules.Port(53), UIDs: rules.MustUIDs("6")},
		}},
	}
	p, err := tproxy.Build(cfg, tproxy.Host{Pod: "a pod"})
	if err != nil {
		t.Fatal(err)
	}
	want := tproxy.Config{
		ProxyUIDs: []tproxy.UID{5, 9},
		Inbound:   tproxy.Inbound{Port: 15006, ExcludeIPs: prefixes("0.0.0.0/32", "10.0.0.0/8", "fd00::/8")},
		Outbound: tproxy.Outbound{Port: 15001, ExcludePortsForUIDs: []tproxy.UIDExclusion{
			{Protocol: rules.TCP, Ports: rules.Port(80), UIDs: rules.MustUIDs("3")},
			{Protocol: rules.UDP, Ports: rules.Port(53), UIDs: rules.MustUIDs("6-7")},
		}},
		DNS:  tproxy.DNS{Port: 15053, ResolvConf: "/etc/resolv.conf"},
		Pod:  true,
		Wait: 5 * time.Second,

		MaxRetries: 4, SleepBetweenRetries: 2 * time.Second,
	}
	if d := cmp.Diff(want, p.Config, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})); d != "" {
		t.Error(d)
	}
	again, err := tproxy.Build(p.Config, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(p.Config, again.Config, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})); d != "" {
		t.Errorf("built again: %s", d)
	}
}

func TestGoString(t *testing.T) {
	for _, test := range []struct {
		value any
		want  string
	}{
		{tproxy.Config{}, "tproxy.Config{}"},
		{full, `tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("2222,9000-9010"), ExcludeIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.8/31"), netip.MustParsePrefix("fd00::9/128")}}, ` +
			`Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("3306,5432"), ExcludePortsForUIDs: []tproxy.UIDExclusion{tproxy.UIDExclusion{Ports: rules.MustPorts("53,443"), UIDs: rules.MustUIDs("1001")}}, ` +
			`ExcludeIPs: []netip.Prefix{netip.MustParsePrefix("93.184.216.0/24"), netip.MustParsePrefix("2606:2800::/32")}}, DNS: tproxy.DNS{CaptureAll: true}}`},
		{tproxy.Host{Users: []tproxy.User{{"kuma-dp", 5}}}, `tproxy.Host{Users: []tproxy.User{tproxy.User{Name: "kuma-dp", UID: 5}}}`},
	} {
		if got := fmt.Sprintf("%#v", test.value); got != test.want {
			t.Errorf("%s\nwant %s", got, test.want)
		}
	}
}
