package sim_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

var proxy = sim.Proxy{UID: 5678, InboundPort: 15006, OutboundPort: 15001, DNSPort: 15053,
	Nameservers: []netip.Addr{netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("10.0.0.53")},
	Resolvers:   []sim.Resolver{{Address: netip.MustParseAddr("127.0.0.53"), UID: 101}},
}

func TestFollow(t *testing.T) {
	plan, err := tproxy.Build(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}}, tproxy.Host{
		Nameservers:    proxy.Nameservers,
		LocalResolvers: []tproxy.LocalResolver{{Address: proxy.Nameservers[0], UID: 101}},
	})
	if err != nil {
		t.Fatal(err)
	}
	v4, err := tproxy.Build(tproxy.Config{IPFamilyMode: tproxy.IPv4Only}, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	loop := save(t, rules.IPv4, `*nat
		:OUTPUT ACCEPT [0:0]
		-A OUTPUT -p tcp -j REDIRECT --to-ports 15001
		-A OUTPUT -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053`)
	loopTCP := save(t, rules.IPv4, `*nat
		:OUTPUT ACCEPT [0:0]
		-A OUTPUT -p tcp -m tcp --dport 53 -m owner --uid-owner 101 -j REDIRECT --to-ports 15053`)
	drop := save(t, rules.IPv4, "*filter\n:INPUT DROP [0:0]")
	unknown := save(t, rules.IPv4, "*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -m bpf --bytecode x -j ACCEPT")
	dnat := save(t, rules.IPv4, "*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -d 10.96.0.1/32 -j DNAT --to-destination 10.0.0.7")
	only4 := proxy
	only4.IPv4Only = true
	for _, test := range []struct {
		name    string
		set     rules.Set
		proxy   sim.Proxy
		journey string // packet => verdict, for each hop, then the end
	}{
		{"inbound", plan.Rules, proxy, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => redirected to port 15006
			out tcp uid=5678 127.0.0.6:40000 > 10.0.0.7:80 => untouched
			delivered`},
		{"inbound, IPv6", plan.Rules, proxy, `
			in tcp [fd00::9]:4000 > [fd00::7]:80 => redirected to port 15006
			out tcp uid=5678 [::6]:40000 > [fd00::7]:80 => untouched
			delivered`},
		{"outbound", plan.Rules, proxy, `
			out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:443 => redirected to port 15001
			out tcp uid=5678 10.0.0.7:40000 > 93.184.216.34:443 => untouched
			delivered`},
		{"the proxy calls its own host", plan.Rules, proxy, `
			out tcp uid=5678 10.0.0.7:4000 > 10.0.0.7:80 => redirected to port 15006
			out tcp uid=5678 127.0.0.6:40000 > 10.0.0.7:80 => untouched
			delivered`},
		{"straight to in", plan.Rules, proxy, `
			out tcp uid=1000 127.0.0.1:4000 > 127.0.0.1:15006 => untouched
			out tcp uid=5678 127.0.0.6:40000 > 127.0.0.1:15006 => refused
			refused`},
		{"straight to out, from outside", plan.Rules, proxy, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:15001 => redirected to port 15006
			out tcp uid=5678 127.0.0.6:40000 > 10.0.0.7:15001 => refused
			refused`},
		{"nobody listens on IPv6", v4.Rules, only4, `
			in tcp [fd00::9]:4000 > [fd00::7]:15006 => untouched
			refused`},
		{"DNS by way of the local resolver", plan.Rules, proxy, `
			out udp uid=1000 127.0.0.1:4000 > 127.0.0.53:53 => redirected to port 15053 in zone 2
			out udp uid=5678 127.0.0.1:40000 > 127.0.0.53:53 => untouched
			out udp uid=101 10.0.0.7:40000 > 203.0.113.53:53 => untouched
			delivered`},
		{"straight to dns, from outside", plan.Rules, proxy, `
			in udp 10.0.0.9:4000 > 10.0.0.7:15053 => untouched
			out udp uid=5678 127.0.0.1:40000 > 127.0.0.53:53 => untouched
			out udp uid=101 10.0.0.7:40000 > 203.0.113.53:53 => untouched
			delivered`},
		{"DNS over TCP", plan.Rules, proxy, `
			out tcp uid=1000 10.0.0.7:4000 > 8.8.8.8:53 => redirected to port 15053
			out udp uid=5678 127.0.0.1:40000 > 127.0.0.53:53 => untouched
			out udp uid=101 10.0.0.7:40000 > 203.0.113.53:53 => untouched
			delivered`},
		{"straight to dns, over TCP", plan.Rules, proxy, `
			out tcp uid=5678 127.0.0.1:4000 > 127.0.0.1:15053 => untouched
			out udp uid=5678 127.0.0.1:40000 > 127.0.0.53:53 => untouched
			out udp uid=101 10.0.0.7:40000 > 203.0.113.53:53 => untouched
			delivered`},
		{"a loop by way of TCP", loopTCP, proxy, `
			out udp uid=1000 10.0.0.7:4000 > 10.0.0.7:15053 => untouched
			out udp uid=5678 127.0.0.1:40000 > 127.0.0.53:53 => untouched
			out tcp uid=101 10.0.0.7:40000 > 203.0.113.53:53 => redirected to port 15053
			out udp uid=5678 127.0.0.1:40000 > 127.0.0.53:53 => untouched
			loop`},
		{"a loop", loop, proxy, `
			out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:443 => redirected to port 15001
			out tcp uid=5678 10.0.0.7:40000 > 93.184.216.34:443 => redirected to port 15001
			out tcp uid=5678 10.0.0.7:40000 > 93.184.216.34:443 => redirected to port 15001
			loop`},
		{"a loop of queries", loop, proxy, `
			out udp uid=1000 10.0.0.7:4000 > 8.8.8.8:53 => redirected to port 15053
			out udp uid=5678 127.0.0.1:40000 > 127.0.0.53:53 => redirected to port 15053
			out udp uid=5678 127.0.0.1:40000 > 127.0.0.53:53 => redirected to port 15053
			loop`},
		{"dropped", drop, proxy, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => dropped
			dropped`},
		{"sent elsewhere by a rule of others", dnat, proxy, `
			out tcp uid=1000 10.0.0.7:4000 > 10.96.0.1:443 => untouched, sent elsewhere
			delivered`},
		{"unknown", unknown, proxy, `
			out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:443 => unknown
			unknown`},
	} {
		t.Run(test.name, func(t *testing.T) {
			want := strings.ReplaceAll(strings.TrimSpace(test.journey), "\t", "") + "\n"
			first, _, _ := strings.Cut(want, " =>")
			if got := sim.Follow(test.set, env, test.proxy, sim.MustPacket(first)).String(); got != want {
				t.Errorf("%s\nwant\n%s", got, want)
			}
		})
	}
}
