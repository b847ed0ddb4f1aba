package kernel

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestNFTBases(t *testing.T) {
	inFreshNamespace(t, func(t *testing.T) {
		if bases, err := NFTBases(); err != nil || len(bases) > 0 {
			t.Errorf("of nothing: %v, %v", bases, err)
		}
		run(t, `
			table inet firewalld {
				chain pre { type filter hook prerouting priority -10; }
				chain in { type filter hook input priority 0; policy drop; }
				chain other { }
			}
			table ip mine {
				chain out { type nat hook output priority -100; }
			}
			table netdev shield {
				chain early { type filter hook ingress device lo priority 0; }
			}
			table bridge links {
				chain in { type filter hook input priority 0; }
			}
			`, "nft", "-f", "-")
		want := []NFTBase{
			{NFTTable{"inet", "firewalld"}, "pre", "PREROUTING", "filter", -10, false},
			{NFTTable{"inet", "firewalld"}, "in", "INPUT", "filter", 0, true},
			{NFTTable{"ip", "mine"}, "out", "OUTPUT", "nat", -100, false},
			{NFTTable{"netdev", "shield"}, "early", "INGRESS", "filter", 0, false},
		}
		got, err := NFTBases()
		byName := func(a, b NFTBase) int { return strings.Compare(a.Table.Name+a.Chain, b.Table.Name+b.Chain) }
		slices.SortFunc(got, byName)
		slices.SortFunc(want, byName)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%v, %v; want %v", got, err, want)
		}
	})
}

// What iptables-nft makes is nothing native.
func TestNFTNativeOfIPTables(t *testing.T) {
	files, err := filepath.Glob("../../../rules/testdata/saves/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no saves: %v", err)
	}
	texts := map[string]string{"ours": "*nat\n-A OUTPUT -s 10.0.0.0/9 ! -d 127.0.0.0/8 -o lo+ -p tcp -m multiport --dports 1,2:3 -m owner --uid-owner 1-2 -m addrtype --dst-type LOCAL " +
		"-m mark ! --mark 0x1/0x3 -m comment --comment x -j REDIRECT --to-ports 0\n-A OUTPUT -p tcp --syn --sport 1:2 --dport 3 -j ACCEPT\nCOMMIT\n" +
		"*filter\n-A INPUT -i eth0 -f -j DROP\n-A INPUT -p icmp -m limit --limit 5/min -j LOG --log-prefix x\n-A INPUT -p tcp --tcp-flags SYN,RST SYN -j NFLOG\nCOMMIT\n"}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		texts[filepath.Base(file)] = string(text)
	}
	for name, text := range texts {
		if strings.Contains(text, "nfacct") {
			text = strings.ReplaceAll(text, " -m nfacct --nfacct-name  ct_state_invalid_dropped_pkts", "")
		}
		inFreshNamespace(t, func(t *testing.T) {
			run(t, text, "iptables-nft-restore")
			for _, table := range []string{"nat", "raw", "mangle", "filter"} {
				if got, err := NFTNative("ip", table); err != nil || len(got) > 0 {
					t.Errorf("%s: table %s: %v, %v", name, table, got, err)
				}
			}
		})
	}
	inFreshNamespace(t, func(t *testing.T) {
		run(t, "*nat\n-A OUTPUT -s fd00::/9 ! -d ::1 -p tcp --dport 3 -j ACCEPT\nCOMMIT\n*filter\n-A INPUT -p ipv6-icmp -j REJECT\nCOMMIT\n", "ip6tables-nft-restore")
		for _, table := range []string{"nat", "filter"} {
			if got, err := NFTNative("ip6", table); err != nil || len(got) > 0 {
				t.Errorf("table %s: %v, %v", table, got, err)
			}
		}
	})
}

func TestNFTNative(t *testing.T) {
	inFreshNamespace(t, func(t *testing.T) {
		run(t, `table ip nat {
			set s { type ipv4_addr; }
			chain OUTPUT {
				type nat hook output priority -100;
				ip daddr 10.0.0.1 tcp dport 80 counter accept
				ip daddr @s accept
				ip saddr @s accept
				meta skuid 5 accept
				ip ttl 5 accept
				ct state new accept
			}
			chain other { fib daddr type local return; }
		}`, "nft", "-f", "-")
		want := []string{"chain OUTPUT: ct", "chain OUTPUT: lookup", "chain OUTPUT: meta key 10", "chain OUTPUT: payload 1 at 8", "chain other: fib"}
		if got, err := NFTNative("ip", "nat"); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
		if got, err := NFTNative("ip", "raw"); err != nil || len(got) > 0 {
			t.Errorf("of no table: %v, %v", got, err)
		}
	})
	if _, err := NFTNative("x", "nat"); err == nil {
		t.Error("no such family")
	}
}

func TestRouteTo(t *testing.T) {
	inFreshNamespace(t, func(t *testing.T) {
		away := netip.MustParseAddr("10.0.0.9")
		if r, err := RouteTo(away); err != nil || r != (Route{}) {
			t.Errorf("nowhere: %v, %v", r, err)
		}
		run(t, "link set lo up\nlink add eth7 type veth peer name peer7\naddress add 10.0.0.7/24 dev eth7\nlink set eth7 up\nlink set peer7 up\nroute add local 192.0.2.0/24 dev eth7\n", "ip", "-batch", "-")
		for addr, want := range map[string]Route{
			"10.0.0.9":  {"eth7", netip.MustParseAddr("10.0.0.7"), false},
			"127.0.0.1": {"lo", netip.MustParseAddr("127.0.0.1"), true},
			"192.0.2.9": {"lo", netip.MustParseAddr("192.0.2.9"), true},
			"10.0.1.9":  {},
		} {
			if r, err := RouteTo(netip.MustParseAddr(addr)); err != nil || r != want {
				t.Errorf("%s: %v, %v; want %v", addr, r, err, want)
			}
		}
	})
}

func TestNFTTracks(t *testing.T) {
	all := func(NFTTable) bool { return true }
	for text, want := range map[string]bool{
		"": false,
		"chain c { type nat hook output priority 0; tcp dport 80 accept; }":                false,
		"chain c { type filter hook input priority 0; ct state established accept; }":      true,
		"chain c { type nat hook output priority 0; tcp dport 80 redirect to :8080; }":     true,
		"chain c { type nat hook postrouting priority 100; oifname eth9 masquerade; }":     true,
		"chain c { type nat hook prerouting priority 0; dnat ip to 10.0.0.1; }":            true,
		"chain c { type filter hook prerouting priority -300; meta l4proto udp notrack; }": false,
	} {
		inFreshNamespace(t, func(t *testing.T) {
			run(t, "table inet mine {\n"+text+"\n}\n", "nft", "-f", "-")
			if got, err := NFTTracks(all); err != nil || got != want {
				t.Errorf("%q: %v, %v", text, got, err)
			}
			if got, err := NFTTracks(func(t NFTTable) bool { return t != NFTTable{"inet", "mine"} }); err != nil || got {
				t.Errorf("%q, which does not count: %v, %v", text, got, err)
			}
		})
	}
}
