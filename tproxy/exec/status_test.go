package exec

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// status looks, and sees to it that looking wrote nothing.
func (m *fakeMachine) status(t *testing.T) *Status {
	t.Helper()
	before, writes := m.all(), m.writes
	s, err := (&Runner{machine: m}).Status(context.Background())
	if err != nil {
		t.Fatalf("Status: %v", err)
	}
	if m.all() != before || m.writes != writes {
		t.Error("looking changed something")
	}
	return s
}

// lines is a status as lines: its state, its drift, its reasons.
func (s *Status) lines() (out []string) {
	out = append(out, string(s.State))
	for _, d := range s.Drift {
		out = append(out, d.String())
	}
	return append(out, s.Reasons...)
}

// says fails unless the state is that, and each of the parts is in a line or in a note.
func (s *Status) says(t *testing.T, state State, parts ...string) {
	t.Helper()
	text := strings.Join(append(s.lines(), s.Notes...), "\n")
	if s.State != state {
		t.Errorf("%s, want %s:\n%s", s.State, state, text)
	}
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%q is not said:\n%s", p, text)
		}
	}
}

// both edits a table of the variant in both families.
func (m *fakeMachine) both(t *testing.T, script string) {
	t.Helper()
	for _, v := range prefixes[:2] {
		m.edit(t, v, script)
	}
}

func TestStatusAsInstalled(t *testing.T) {
	for _, c := range configs {
		m := newFakeMachine(t)
		m.populate(t)
		m.status(t).says(t, StateAbsent)
		p := m.plan(t, c)
		if _, err := (&Runner{machine: m, Version: "v1.2.3"}).Apply(context.Background(), p); err != nil {
			t.Fatal(err)
		}
		s := m.status(t)
		s.says(t, StateInstalled)
		if len(s.lines()) > 1 || s.Backend != p.Backend || !slices.Equal(s.Families, p.Families) || s.Version != "v1.2.3" {
			t.Errorf("%+v", s)
		}
		if s.Config == nil || len(tproxy.ConfigChanges(p.Config, *s.Config)) > 0 {
			t.Errorf("config %+v", s.Config)
		}
		verdicts := map[string]bool{}
		for _, n := range s.Counters {
			verdicts[n.Verdict] = true
			if tproxy.IsRecord(n.Table, n.Chain) || strings.HasPrefix(n.Why, "kuma/mesh") || n.Index == 0 {
				t.Errorf("%+v", n)
			}
		}
		if !verdicts["excluded"] || verdicts["in"] == c.Inbound.Off || verdicts["dns"] != c.DNS.CaptureAll {
			t.Errorf("%v", verdicts)
		}
		m.uninstall(t)
		m.status(t).says(t, StateAbsent)
	}
}

func TestStatusOfDrift(t *testing.T) {
	for _, c := range []struct {
		name   string
		config tproxy.Config
		edit   func(t *testing.T, m *fakeMachine)
		state  State
		parts  []string
	}{
		{"a rule is gone", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n-D KUMA_MESH_INBOUND -p tcp -m tcp --dport 22 -m comment --comment \"SSH is protected unless --capture-ssh is given\" -j RETURN\nCOMMIT\n")
		}, StateDrifted, []string{"- missing: IPv4 nat KUMA_MESH_INBOUND #1 -p tcp -m tcp --dport 22 -j RETURN [SSH is protected"}},
		{"a family is gone", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.rewrite(t, "ip6tables-nft", emptied)
		}, StateDrifted, []string{"- missing: IPv6 [nothing of the install is there]"}},
		{"all rules are gone", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.rewrite(t, "iptables-nft", emptied)
			m.rewrite(t, "ip6tables-nft", emptied)
		}, StateAbsent, nil},
		{"::6 is gone", tproxy.Config{}, func(t *testing.T, m *fakeMachine) { delete(m.addresses, passthrough6) },
			StateDrifted, []string{"~ address: IPv6 ::6/128 on lo"}},
		{"::6 with IPv4 alone", tproxy.Config{IPFamilyMode: tproxy.IPv4Only}, func(t *testing.T, m *fakeMachine) { delete(m.addresses, passthrough6) },
			StateInstalled, nil},
		{"IPv6 rules with IPv4 alone", tproxy.Config{IPFamilyMode: tproxy.IPv4Only}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "ip6tables-nft", "*nat\n:KUMA_MESH_INBOUND - [0:0]\nCOMMIT\n")
		}, StateDrifted, []string{"+ elsewhere: IPv6 rules of ours in iptables-nft"}},
		{"some in the other variant", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-legacy", "*nat\n:KUMA_MESH_INBOUND - [0:0]\nCOMMIT\n")
		}, StateDrifted, []string{"+ elsewhere: IPv4 rules of ours in iptables-legacy"}},
		{"two whole installs", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			for i, v := range prefixes[:2] {
				m.edit(t, prefixes[i+2], string(m.netfilter[v].Save()))
			}
		}, StateUnknown, []string{"which of them decides depends on which came first"}},
		{"one jumps into a chain of ours", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n:MINE - [0:0]\n-A MINE -j KUMA_MESH_OUTBOUND\nCOMMIT\n")
		}, StateDrifted, []string{"~ entered: IPv4 nat MINE #1"}},
		{"an ACCEPT in front", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n-I PREROUTING 1 -p tcp -m tcp --dport 80 -j ACCEPT\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 nat PREROUTING #1 -p tcp -m tcp --dport 80 -j ACCEPT", "untouched, and by ours alone redirected to port 15006"}},
		{"an ACCEPT in front of all but one that returns", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n:MINE - [0:0]\n-I PREROUTING 1 -j MINE\n-A MINE -p tcp -m tcp --dport 1024:65535 -j RETURN\n-A MINE -p tcp -j ACCEPT\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 nat MINE #2"}},
		{"a goto that does not come back", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n:MINE - [0:0]\n-I OUTPUT 1 -p tcp -m multiport --dports 22,443 -m owner --uid-owner 1001 -g MINE\n-A MINE -p udp -j RETURN\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 nat OUTPUT #1"}},
		{"a jump that comes back", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n:MINE - [0:0]\n:OTHER - [0:0]\n-I OUTPUT 1 -p tcp -m multiport --dports 22,443 -m owner --uid-owner 1001 -j MINE\n-A MINE -p tcp -g OTHER\n-A OTHER -p tcp -j RETURN\nCOMMIT\n")
		}, StateInstalled, nil},
		{"a user's excluded port sent to the proxy from behind", tproxy.Config{Outbound: tproxy.Outbound{ExcludePortsForUIDs: []tproxy.UIDExclusion{
			{Protocol: rules.TCP, Ports: rules.MustPorts("2525"), UIDs: rules.MustUIDs("1001")}}}}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n-A OUTPUT ! -o lo -p tcp -m owner ! --uid-owner 5678 -j REDIRECT --to-ports 15001\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 nat OUTPUT #2", "uid=1001"}},
		{"ports that overlap in part", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n:MINE - [0:0]\n-I OUTPUT 1 -p tcp -m tcp --dport 100:1024 -j MINE\n-A MINE -p tcp -m tcp --dport 50:200 -j ACCEPT\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 nat MINE #1"}},
		{"a network that is excluded in part", tproxy.Config{Outbound: tproxy.Outbound{ExcludeIPs: []netip.Prefix{netip.MustParsePrefix("11.0.0.0/9"), netip.MustParsePrefix("11.192.0.0/10")}}}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n-I OUTPUT 1 -d 11.0.0.0/8 -j ACCEPT\nCOMMIT\n")
		}, StateDrifted, []string{"> 11.128.0."}},
		{"a network that is excluded", tproxy.Config{Outbound: tproxy.Outbound{ExcludeIPs: []netip.Prefix{netip.MustParsePrefix("11.0.0.0/8")}}}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n-I OUTPUT 1 -d 11.0.0.0/9 -j ACCEPT\nCOMMIT\n")
		}, StateInstalled, nil},
		{"documentation's addresses excluded", tproxy.Config{Outbound: tproxy.Outbound{ExcludeIPs: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n-I OUTPUT 1 -p tcp -j ACCEPT\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 nat OUTPUT #1"}},
		{"an excluded port sent to the proxy from behind", tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("9005")}}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n-A PREROUTING -s 10.9.0.0/16 -p tcp -m tcp --dport 9000:9010 -j REDIRECT --to-ports 15006\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 nat PREROUTING #2"}},
		{"behind ours nobody sees it", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.both(t, "*nat\n-A PREROUTING -p tcp -j ACCEPT\n-A OUTPUT -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080\nCOMMIT\n")
		}, StateInstalled, nil},
		{"out of connection tracking", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*raw\n-A PREROUTING -p tcp -m tcp --dport 80 -j CT --notrack\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 raw PREROUTING #1"}},
		{"answers out of connection tracking", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*raw\n-A OUTPUT -p tcp -m tcp --sport 15006 -j CT --notrack\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 raw OUTPUT #1", "kept out of connection tracking"}},
		{"answers dropped", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*mangle\n-A OUTPUT -p tcp -m tcp --sport 15001 -j DROP\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 mangle OUTPUT #1"}},
		{"what comes back dropped", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*mangle\n-A PREROUTING -s 198.18.0.0/15 ! -i eth0 -p tcp -j DROP\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 mangle PREROUTING #1"}},
		{"what is for this host itself sent to the proxy", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n-I OUTPUT 1 -o lo -p tcp -m owner --uid-owner 1001 -j REDIRECT --to-ports 15001\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 nat OUTPUT #1"}},
		{"the proxy's queries sent to the proxy", tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n-A OUTPUT -d 198.18.0.0/15 -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 nat OUTPUT #3"}},
		{"a policy of raw", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*raw\n:PREROUTING DROP [0:0]\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 raw PREROUTING policy DROP"}},
		{"a policy of INPUT", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*filter\n:INPUT DROP [0:0]\nCOMMIT\n")
		}, StateDrifted, []string{"~ filtered: IPv4 filter INPUT policy DROP", "admit them: iptables -I INPUT -p tcp --dport 15006"}},
		{"a policy of INPUT that admits", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*filter\n:INPUT DROP [0:0]\n-A INPUT -i lo -j ACCEPT\n-A INPUT -p tcp -m tcp --dport 15006 -m conntrack --ctstate DNAT -j ACCEPT\nCOMMIT\n")
		}, StateInstalled, nil},
		{"a filter of OUTPUT", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*filter\n-A OUTPUT -p tcp -m tcp --dport 15001 -j REJECT --reject-with tcp-reset\nCOMMIT\n")
		}, StateDrifted, []string{"~ filtered: IPv4 filter OUTPUT #1"}},
		{"a filter of answers", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*filter\n:OUTPUT DROP [0:0]\n-A OUTPUT -o lo -j ACCEPT\nCOMMIT\n")
		}, StateDrifted, []string{"~ filtered: IPv4 filter OUTPUT policy DROP"}},
		{"one address that is banned", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*filter\n:f2b-sshd - [0:0]\n-A INPUT -p tcp -m multiport --dports 22 -j f2b-sshd\n-A f2b-sshd -s 203.0.113.9/32 -j REJECT --reject-with icmp-port-unreachable\n-A f2b-sshd -j RETURN\nCOMMIT\n")
		}, StateInstalled, nil},
		{"a match that is not known, in front", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n-I PREROUTING 1 -m bpf --bytecode \"1,6 0 0 1\" -j ACCEPT\nCOMMIT\n")
		}, StateUnknown, []string{"uses -m bpf"}},
		{"by chance elsewhere", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.edit(t, "iptables-nft", "*nat\n-I OUTPUT 1 -d 10.96.0.1/32 -p tcp -m statistic --mode random --probability 0.5 -j DNAT --to-destination 10.1.1.1:80\n-I OUTPUT 2 -d 10.96.0.1/32 -p tcp -j DNAT --to-destination 10.1.1.2:80\nCOMMIT\n")
		}, StateDrifted, []string{"~ shadowed: IPv4 nat OUTPUT"}},
		{"a hidden translation in front", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.nftBases = []kernel.NFTBase{{Table: kernel.NFTTable{Family: "ip", Name: "mine"}, Chain: "c", Hook: "PREROUTING", Type: "nat", Priority: -150}}
		}, StateUnknown, []string{"table ip mine, which iptables does not show"}},
		{"a hidden filter", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.nftBases = []kernel.NFTBase{{Table: kernel.NFTTable{Family: "inet", Name: "firewalld"}, Chain: "c", Hook: "INPUT", Type: "filter", Priority: 10}}
			m.files[firewalldConf] = "# RFC3964_IPv4\nRFC3964_IPv4=no\n"
		}, StateInstalled, []string{"table inet firewalld may filter"}},
		{"firewalld as it comes", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.nftBases = []kernel.NFTBase{{Table: kernel.NFTTable{Family: "inet", Name: "firewalld"}, Chain: "c", Hook: "OUTPUT", Type: "filter", Priority: 10}}
			m.files[firewalldConf] = "RFC3964_IPv4=yes\n"
		}, StateDrifted, []string{"~ filtered: IPv6 table inet firewalld [firewalld rejects what is redirected"}},
		{"firewalld as it comes, IPv4 alone", tproxy.Config{IPFamilyMode: tproxy.IPv4Only}, func(t *testing.T, m *fakeMachine) {
			m.nftBases = []kernel.NFTBase{{Table: kernel.NFTTable{Family: "inet", Name: "firewalld"}, Chain: "c", Hook: "OUTPUT", Type: "filter", Priority: 10}}
			m.files[firewalldConf] = "RFC3964_IPv4=yes\n"
		}, StateInstalled, nil},
		{"a hidden filter of what is forwarded", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.nftBases = []kernel.NFTBase{{Table: kernel.NFTTable{Family: "inet", Name: "mine"}, Chain: "c", Hook: "FORWARD", Type: "filter", Priority: -300}}
		}, StateInstalled, nil},
		{"a record of a newer version", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			for _, v := range prefixes[:2] {
				m.rewrite(t, v, words("kuma-tproxy 1 ", "kuma-tproxy 2 "))
			}
		}, StateUnknown, []string{`has the format "2" of another version`}},
		{"a damaged record", tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}, func(t *testing.T, m *fakeMachine) {
			for _, v := range prefixes[:2] {
				m.rewrite(t, v, words("captureAll", "captureNil"))
			}
		}, StateUnknown, []string{"the record of the install"}},
		{"a record that is gone", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			for _, v := range prefixes[:2] {
				m.rewrite(t, v, lines("KUMA_MESH_RECORD"))
			}
		}, StateUnknown, []string{tproxy.ErrNoRecord.Error()}},
		{"a record that is gone in one family", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.rewrite(t, "ip6tables-nft", lines("KUMA_MESH_RECORD"))
		}, StateDrifted, []string{"~ changed: IPv6 nat KUMA_MESH_RECORD"}},
		{"another record in one family", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.rewrite(t, "ip6tables-nft", words("::6=ours ", ""))
		}, StateDrifted, []string{"~ changed: IPv6 nat KUMA_MESH_RECORD [the record is another than that of IPv4]"}},
		{"half of an install", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.rewrite(t, "iptables-nft", lines("-A PREROUTING"))
			m.rewrite(t, "iptables-nft", lines("-A KUMA_MESH_OUTBOUND "))
		}, StateDrifted, []string{"- missing: IPv4 nat PREROUTING #1", "- missing: IPv4 nat KUMA_MESH_OUTBOUND #1"}},
		{"a save that cannot be had", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.onRun = func(c command) (result, bool) {
				return result{Exit: 1, Stderr: []byte("Table `nat' is incompatible")}, strings.HasSuffix(c.Path, "/ip6tables-nft-save")
			}
		}, StateUnknown, []string{"is incompatible"}},
		{"rules that do not parse", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.onRun = func(c command) (result, bool) {
				return result{Stdout: []byte("*nat\n-A\n")}, strings.HasSuffix(c.Path, "tables-nft-save")
			}
		}, StateUnknown, []string{"line 2"}},
		{"no save program", tproxy.Config{}, func(t *testing.T, m *fakeMachine) {
			m.missing["iptables-nft-save"], m.missing["ip6tables-nft-save"] = true, true
		}, StateUnknown, []string{"save program is not here"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newFakeMachine(t)
			m.local = []netip.Prefix{netip.MustParsePrefix("10.0.0.7/24"), netip.MustParsePrefix("fd00::7/64")}
			m.routes = map[netip.Addr]kernel.Route{
				somewhere[rules.IPv4]: {Interface: "eth0", Source: m.local[0].Addr()}, somewhere[rules.IPv6]: {Interface: "eth0", Source: m.local[1].Addr()}}
			if c.config.Backend == tproxy.Auto {
				c.config.Backend = tproxy.IPTablesNFT
			}
			m.install(t, c.config)
			m.status(t).says(t, StateInstalled)
			c.edit(t, m)
			m.status(t).says(t, c.state, c.parts...)
		})
	}
}

// rewrite puts other rules in the place of a variant's.
func (m *fakeMachine) rewrite(t *testing.T, variant string, change func(text string) string) {
	t.Helper()
	before := m.netfilter[variant]
	text := change(string(before.Save()))
	if text == string(before.Save()) {
		t.Fatalf("nothing was changed in %s", variant)
	}
	m.netfilter[variant] = &tproxytest.Netfilter{Family: before.Family, Generator: before.Generator}
	m.edit(t, variant, text)
}

func emptied(string) string { return "" }

// lines leaves out the lines with a word.
func lines(without string) func(string) string {
	return func(text string) string {
		var out []string
		for line := range strings.Lines(text) {
			if !strings.Contains(line, without) {
				out = append(out, line)
			}
		}
		return strings.Join(out, "")
	}
}

func words(word, other string) func(string) string {
	return func(text string) string { return strings.ReplaceAll(text, word, other) }
}

// Without root nothing can be told, which is said, and is no error.
func TestStatusWithoutRoot(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, tproxy.Config{})
	m.notRoot = true
	m.commands = nil
	m.status(t).says(t, StateUnknown, ErrNotRoot.Error())
	if len(m.commands) > 0 {
		t.Errorf("started %q", m.programs())
	}
}

func TestStatusOfKumasRules(t *testing.T) {
	eachKuma(t, func(t *testing.T, variant string, i oldkuma.Installer, o oldkuma.Options) {
		m := newFakeMachine(t)
		m.kuma(t, variant, i, o)
		s := m.status(t)
		s.says(t, StateUnknown, "Kuma's own installer")
		if s.Config != nil || s.Backend.String() != "iptables-"+variant {
			t.Errorf("%+v", s)
		}
	})
}

func TestStatusIsCancelled(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, tproxy.Config{})
	ctx, cancel := context.WithCancel(context.Background())
	n := 0
	m.onRun = func(command) (result, bool) {
		if n++; n == 2 {
			cancel()
		}
		return result{}, false
	}
	writes := m.writes
	if _, err := (&Runner{machine: m}).Status(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if m.writes != writes {
		t.Error("looking wrote something")
	}
}

// What an install has put beside its rules is seen, with them and without.
func TestStatusOfNames(t *testing.T) {
	m := newFakeMachine(t)
	m.etc = t.TempDir()
	path := filepath.Join(m.etc, "resolv.conf")
	if err := os.WriteFile(path, []byte("nameserver 192.0.2.53\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	c := tproxy.Config{Backend: tproxy.IPTablesNFT, DNS: tproxy.DNS{ControlPlane: netip.MustParseAddr("10.0.0.53")}}
	m.install(t, c)
	m.status(t).says(t, StateInstalled)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("nameserver 192.0.2.53\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	m.status(t).says(t, StateDrifted, "~ names: nameserver 10.0.0.53 first in")
	if err := os.WriteFile(path, whole, 0o644); err != nil {
		t.Fatal(err)
	}
	m.status(t).says(t, StateInstalled)
	m.rewrite(t, "iptables-nft", emptied)
	m.rewrite(t, "ip6tables-nft", emptied)
	s := m.status(t)
	s.says(t, StateDrifted, "~ names: nameserver 10.0.0.53 in", "an install was here, and its rules are gone")
	m.uninstall(t)
	m.status(t).says(t, StateAbsent)
}

// Two saves are all that it takes, on a host that has one variant.
func TestStatusStartsFewProcesses(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, tproxy.Config{Backend: tproxy.IPTablesNFT})
	m.commands = nil
	m.status(t)
	same(t, "programs", m.programs(), []string{"iptables-nft-save -c", "ip6tables-nft-save -c"})
}
