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
