package exec

import (
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// A rule of others that comes first is named, one that does not matter is not.
func TestRulesOfOthersInFront(t *testing.T) {
	for name, c := range map[string]struct{ rules, want string }{
		"none":             {"", ""},
		"accept outbound":  {"-I OUTPUT 1 -p tcp -j ACCEPT\n", "keeps outbound IPv4 connections from the proxy: nat OUTPUT #1"},
		"accept inbound":   {"-I PREROUTING 1 -p tcp -j ACCEPT\n", "keeps inbound IPv4 connections from the proxy: nat PREROUTING #1"},
		"behind ours":      {"-A OUTPUT -p tcp -j ACCEPT\n", ""},
		"of one port":      {"-I OUTPUT 1 -p tcp -m tcp --dport 9 -j ACCEPT\n-I PREROUTING 1 -p tcp -m tcp --dport 9 -j ACCEPT\n", ""},
		"cannot be told":   {"-I OUTPUT 1 -m bpf --bytecode \"1,6 0 0 0\" -j ACCEPT\n", ""},
		"through a chain":  {":OTHER - [0:0]\n-I OUTPUT 1 -j OTHER\n-A OTHER -p tcp -j ACCEPT\n", "nat OUTPUT #1, nat OTHER #1"},
		"excluded by them": {"-I OUTPUT 1 -p udp -j ACCEPT\n", ""},
	} {
		for _, when := range []string{"before", "after"} {
			m := newFakeMachine(t)
			edit := func() {
				if c.rules != "" {
					m.edit(t, "iptables-nft", "*nat\n"+c.rules+"COMMIT\n")
				}
			}
			if when == "before" {
				edit()
			}
			r := m.install(t, tproxy.Config{Backend: tproxy.IPTablesNFT})
			if when == "after" {
				edit()
				r = m.install(t, tproxy.Config{Backend: tproxy.IPTablesNFT})
			}
			got := strings.Join(slices.DeleteFunc(r.Notes, func(n string) bool { return !strings.Contains(n, "a rule of others") }), "\n")
			want := c.want
			// A rule that is there before goes behind ours in OUTPUT.
			if when == "before" && strings.Contains(c.rules, "-I OUTPUT") {
				want = ""
			}
			if !strings.Contains(got, want) || want == "" && got != "" {
				t.Errorf("%s, %s: %q, want %q", name, when, got, want)
			}
		}
	}
}

// Who does not listen is named: the proxy's DNS port over UDP and, where that is
// redirected, over TCP.
func TestPortsThatNobodyListensOn(t *testing.T) {
	// A line of /proc/net/udp or tcp (proc_net(5)) for 0.0.0.0:15053.
	line := func(state string) string {
		return "header\n   1: 00000000:3ACD 00000000:0000 " + state + " 00000000:00000000 00:00000000 00000000  5678        0 4711 2\n"
	}
	const udp, tcp = "DNS port 15053 yet: until the proxy runs, DNS queries are refused", "DNS port 15053 over TCP yet: until the proxy runs, DNS over TCP is refused"
	for _, c := range []struct {
		name     string
		config   tproxy.Config
		udp, tcp bool // listens
		want     []string
	}{
		{"no DNS", tproxy.Config{DNS: tproxy.DNS{RedirectTCP: true}}, false, false, nil},
		{"UDP alone", tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}, false, false, []string{udp}},
		{"UDP alone, it listens", tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}, true, false, nil},
		{"both", tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}}, false, false, []string{udp, tcp}},
		{"both, UDP listens", tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}}, true, false, []string{tcp}},
		{"both, TCP listens", tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}}, false, true, []string{udp}},
		{"both listen", tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}}, true, true, nil},
		{"outbound off", tproxy.Config{Outbound: tproxy.Outbound{Off: true}, DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}}, true, false, nil},
	} {
		m := newFakeMachine(t)
		if c.udp {
			writeProc(t, m.proc, "thread-self/net/udp", line("07"))
		}
		if c.tcp {
			writeProc(t, m.proc, "thread-self/net/tcp", line("0A"))
		}
		var got []string
		for _, n := range m.install(t, c.config).Notes {
			if rest, found := strings.CutPrefix(n, "nothing listens on the proxy's "); found && strings.HasPrefix(rest, "DNS") {
				got = append(got, rest)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// A firewalld with RFC3964_IPv4, its default, rejects what is redirected over IPv6: an
// install says so, also one without inbound, and not where it is switched off or IPv6 is
// left alone.
func TestRejectedOverIPv6IsSaid(t *testing.T) {
	const says = "RFC3964_IPv4=no"
	for name, test := range map[string]struct {
		conf   string
		config tproxy.Config
		want   bool
	}{
		"default":       {"", tproxy.Config{}, true},
		"on":            {"RFC3964_IPv4=yes\n", tproxy.Config{Inbound: tproxy.Inbound{Off: true}}, true},
		"off":           {"# a comment\n RFC3964_IPv4 = no\n", tproxy.Config{}, false},
		"IPv4 alone":    {"", tproxy.Config{IPFamilyMode: tproxy.IPv4Only}, false},
		"nothing there": {"", tproxy.Config{Outbound: tproxy.Outbound{Off: true}}, false},
	} {
		m := newFakeMachine(t)
		m.foreign = []string{"inet firewalld"}
		m.files[firewalldConf] = test.conf
		r := m.install(t, test.config)
		if got := strings.Contains(strings.Join(r.Notes, "\n"), says); got != test.want {
			t.Errorf("%s: %q", name, r.Notes)
		}
	}
}
