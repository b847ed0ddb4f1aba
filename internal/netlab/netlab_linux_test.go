package netlab_test

import (
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

const redirect = `*nat
-A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 15006
-A OUTPUT -m owner --uid-owner 5678 -j RETURN
-A OUTPUT -p tcp --dport 443 -j REDIRECT --to-ports 15001
-A OUTPUT -p udp --dport 53 -j REDIRECT --to-ports 15053
COMMIT
`

func TestLabShowsWhoAnswers(t *testing.T) {
	netlab.Require(t, "ip", "iptables-nft-restore", "ip6tables-nft-restore")
	l, err := netlab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	serve := func(_ *netlab.Counter, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	serve(l.ListenTCP(l.Host, 1000, "app", at(netip.IPv4Unspecified(), 80), at(netip.IPv6Unspecified(), 80)))
	serve(l.ListenTCP(l.Client, 0, "remote", at(netip.IPv4Unspecified(), 443), at(netip.IPv6Unspecified(), 443)))
	serve(l.ListenUDP(l.Client, 0, "resolver", at(netlab.Resolver4, 53), at(netlab.Resolver6, 53)))
	proxy := netlab.Proxy{UID: 5678, In: 15006, Out: 15001, DNS: 15053}
	if err := proxy.Start(l); err != nil {
		t.Fatal(err)
	}
	check := func(n *netlab.Namespace, uid uint32, network string, dst netip.AddrPort, want string) {
		t.Helper()
		got, err := l.Dial(n, uid, network, netip.AddrPort{}, dst)
		if err != nil || got.Who != want || network == "tcp" && want != netlab.Refused && got.Original != dst {
			t.Errorf("%s, UID %d, %s to %s: %v, %v; want %s", n, uid, network, dst, got, err, want)
		}
	}
	for _, redirected := range []bool{false, true} {
		in, out, dns := "app", "remote", "resolver"
		if redirected {
			in, out, dns = "in", "out", "dns"
			for _, p := range []string{"iptables-nft-restore", "ip6tables-nft-restore"} {
				if _, err := l.Run(t.Context(), l.Host, redirect, p); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, a := range [][]netip.Addr{{netlab.Host4, netlab.Internet4, netlab.Resolver4}, {netlab.Host6, netlab.Internet6, netlab.Resolver6}} {
			check(l.Client, 0, "tcp", at(a[0], 80), in)
			check(l.Client, 0, "tcp", at(a[0], 81), netlab.Refused)
			check(l.Host, 1000, "tcp", at(a[1], 443), out)
			check(l.Host, 5678, "tcp", at(a[1], 443), "remote")
			check(l.Host, 1000, "udp", at(a[2], 53), dns)
			check(l.Host, 5678, "udp", at(a[2], 53), "resolver")
		}
	}
	if got := proxy.Ins.Count(); got != 2 {
		t.Errorf("the proxy saw %d inbound connections; want 2", got)
	}
}

func TestProxyPassesOnAndStopsInALoop(t *testing.T) {
	netlab.Require(t, "ip", "iptables-nft-restore")
	l, err := netlab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := l.ListenTCP(l.Host, 1000, "app", at(netip.IPv4Unspecified(), 80)); err != nil {
		t.Fatal(err)
	}
	proxy := netlab.Proxy{UID: 5678, In: 15006, Out: 15001, Mode: netlab.Pass}
	if err := proxy.Start(l); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Run(t.Context(), l.Host, redirect, "iptables-nft-restore"); err != nil {
		t.Fatal(err)
	}
	seen, err := l.Dial(l.Client, 0, "tcp", netip.AddrPort{}, at(netlab.Host4, 80))
	if err != nil || seen.Who != "app" || seen.From.Addr() != netip.MustParseAddr("127.0.0.6") {
		t.Errorf("through the proxy: %v, %v", seen, err)
	}
	seen, err = l.Dial(l.Client, 0, "tcp", netip.AddrPort{}, at(netlab.Host4, 15001))
	if err != nil || seen.Who != netlab.Closed || proxy.Outs.Count() < 50 {
		t.Errorf("a proxy that connects to itself: %v, %v, %d times", seen, err, proxy.Outs.Count())
	}
}

func TestNothingOfTheMachineIsInReach(t *testing.T) {
	netlab.Require(t, "ip")
	entries, err := os.ReadDir("/run")
	if err != nil || len(entries) > 1 {
		t.Errorf("/run holds %v, %v", entries, err)
	}
	links, err := os.ReadFile("/proc/thread-self/net/dev")
	if err != nil || strings.Contains(string(links), "eth0") {
		t.Errorf("interfaces: %s, %v", links, err)
	}
}

func TestCloseEndsWhatWasStarted(t *testing.T) {
	netlab.Require(t, "ip", "sh", "sleep")
	l, err := netlab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", "sleep 60 & sleep 60")
	if err := l.In(l.Host, cmd.Start); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("Wait: %v", err)
	}
}
