package sim_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// TestSaves walks through rule sets in the wild: lines "packet => verdict #
// reason", what cannot be told among them.
func TestSaves(t *testing.T) {
	tests := map[string]string{
		"docker": `
			in tcp in=eth0 10.0.0.9:4000 > 10.0.0.7:8080 => untouched, sent elsewhere # DOCKER answers first: nat PREROUTING #1 -> DOCKER #2 sends the connection to 172.17.0.2:80
			in tcp 10.0.0.9:4000 > 10.0.0.7:8080 => unknown # cannot tell: rule 1 of nat DOCKER names interface docker0, and through which one the packet came is not known
			in tcp in=eth0 10.0.0.9:4000 > 10.0.0.7:80 => untouched # no rule is about it
			in udp in=eth0 10.0.0.9:4000 > 10.0.0.7:8080 => untouched # no rule is about it
			forwarded tcp in=docker0 out=eth0 172.17.0.2:4000 > 93.184.216.34:443 => untouched # no rule is about it
			forwarded tcp in=eth0 out=docker0 10.0.0.9:4000 > 172.17.0.2:81 => dropped # the policy of filter FORWARD is DROP
			out tcp uid=1000 10.0.0.7:4000 > 10.0.0.7:8080 => untouched, sent elsewhere # DOCKER answers first: nat OUTPUT #1 -> DOCKER #2 sends the connection to 172.17.0.2:80
			out tcp uid=1000 127.0.0.1:4000 > 127.0.0.1:8080 => untouched # no rule is about it`,
		"kube-proxy": `
			out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:443 => untouched # no rule is about it
			out tcp uid=1000 10.0.0.7:4000 > 10.96.44.7:80 => refused # default/empty:http has no endpoints
			out udp uid=1000 10.0.0.7:4000 > 10.96.0.10:53 => unknown # cannot tell: rule 2 of nat KUBE-SVC-TCOU7JCQXEZGVUNU uses -m statistic --mode random --probability 0.50000000000
			in tcp 10.0.0.9:4000 > 10.0.0.7:22 => untouched # no rule is about it
			in tcp in=eth0 10.0.0.9:4000 > 127.0.0.1:80 => dropped # block incoming localnet connections
			forwarded tcp mark=0x4000 10.0.0.9:4000 > 10.244.0.3:53 => untouched # no rule is about it`,
		"firewalld": `
			in tcp in=eth0 10.0.0.9:4000 > 10.0.0.7:22 => untouched # no rule is about it
			in tcp in=eth0 10.0.0.9:4000 > 10.0.0.7:8080 => refused # -j REJECT --reject-with icmp-host-prohibited
			in icmp in=eth0 10.0.0.9 > 10.0.0.7 => untouched # no rule is about it
			in udp in=eth0 10.0.0.9:4000 > 224.0.0.251:5353 => unknown # cannot tell: rule 3 of filter IN_public_allow uses -m limit --limit 5/min
			in udp in=eth0 10.0.0.9:137 > 10.0.0.7:137 => refused # -j REJECT --reject-with icmp-host-prohibited
			out tcp uid=1000 127.0.0.1:4000 > 127.0.0.1:8080 => untouched # no rule is about it`,
		"k3s": `
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => untouched # no rule is about it
			in tcp 10.0.0.9:4000 > 10.0.0.7:30080 => untouched # no rule is about it
			forwarded tcp 10.42.0.9:4000 > 93.184.216.34:443 => untouched # no rule is about it
			out tcp uid=1000 10.0.0.7:4000 > 10.43.0.1:443 => untouched # no rule is about it`,
		"istio": `
			in tcp 10.0.0.9:4000 > 10.0.0.7:22 => redirected to port 15006 # -p tcp -j REDIRECT --to-ports 15006
			in tcp 10.0.0.9:4000 > 10.0.0.7:15008 => untouched # -p tcp -m tcp --dport 15008 -j RETURN
			out tcp uid=1000 gid=1000 10.0.0.7:4000 > 93.184.216.34:443 => redirected to port 15001 # -p tcp -j REDIRECT --to-ports 15001
			out tcp uid=1337 gid=1337 10.0.0.7:4000 > 93.184.216.34:443 => untouched # -m owner --uid-owner 1337 -j RETURN
			out tcp uid=1337 gid=1337 127.0.0.1:4000 > 127.0.0.53:53 => redirected to port 15006 # -p tcp -j REDIRECT --to-ports 15006`,
		"kuma": `
			in tcp 10.0.0.9:4000 > 10.0.0.7:22 => redirected to port 15006 # -p tcp -j REDIRECT --to-ports 15006
			out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:443 => redirected to port 15001 # -p tcp -j REDIRECT --to-ports 15001
			out tcp uid=5678 127.0.0.1:4000 > 127.0.0.53:53 => redirected to port 15006 # -p tcp -j REDIRECT --to-ports 15006
			out udp uid=1000 10.0.0.7:4000 > 8.8.8.8:53 => redirected to port 15053 in zone 2 # -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053
			out udp uid=5678 10.0.0.7:4000 > 8.8.8.8:53 => untouched in zone 1 # kuma/mesh/transparent/proxy`,
		"consul": `
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => redirected to port 20000 # -p tcp -j REDIRECT --to-ports 20000
			in tcp 10.0.0.9:4000 > 10.0.0.7:20200 => untouched # -p tcp -m tcp --dport 20200 -j RETURN
			out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:443 => redirected to port 15001 # -p tcp -j REDIRECT --to-ports 15001
			out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:8300 => untouched # -p tcp -m tcp --dport 8300 -j RETURN
			out tcp uid=5995 10.0.0.7:4000 > 93.184.216.34:443 => untouched # -m owner --uid-owner 5995 -j RETURN
			out tcp uid=1000 10.0.0.7:4000 > 10.0.0.7:80 => redirected to port 15001 # -p tcp -j REDIRECT --to-ports 15001
			out udp uid=5995 10.0.0.7:4000 > 10.0.0.53:53 => untouched, sent elsewhere # CONSUL_DNS_REDIRECT answers first: nat OUTPUT #1 -> CONSUL_DNS_REDIRECT #1 sends the connection to 10.0.0.7:8600
			out udp uid=1000 10.0.0.7:4000 > 8.8.8.8:53 => untouched # no rule is about it`,
		"appmesh": `
			in tcp 10.0.0.9:4000 > 10.0.0.7:8080 => redirected to port 15000 # -p tcp -m multiport --dports 8080,9080 -j REDIRECT --to-ports 15000
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => untouched # no rule is about it
			out tcp uid=1000 gid=1000 10.0.0.7:4000 > 93.184.216.34:443 => redirected to port 15001 # -p tcp -j REDIRECT --to-ports 15001
			out tcp uid=1000 gid=1337 10.0.0.7:4000 > 93.184.216.34:443 => untouched # -m owner --gid-owner 1337 -j RETURN
			out tcp uid=1000 10.0.0.7:4000 > 169.254.169.254:80 => untouched # -d 169.254.169.254/32 -j RETURN
			out tcp uid=1000 10.0.0.7:4000 > 10.0.0.7:80 => untouched # no rule is about it`,
		"kuma-all": `
			in tcp in=eth0 10.0.0.9:4000 > 10.0.0.7:80 => redirected to port 15006 # -p tcp -j REDIRECT --to-ports 15006
			in tcp in=eth0 10.9.0.9:4000 > 10.0.0.7:80 => untouched # -s 10.9.0.0/16 -j RETURN
			in tcp in=eth0 10.0.0.9:4000 > 10.0.0.7:22 => untouched # -p tcp -m tcp --dport 22 -j RETURN
			forwarded tcp in=docker0 out=eth0 172.17.0.2:4000 > 93.184.216.34:443 => redirected to port 15001 # ! -d 172.17.0.0/16 -i docker0 -p tcp -j REDIRECT --to-ports 15001
			forwarded udp in=docker0 out=eth0 172.17.0.2:4000 > 8.8.8.8:53 => redirected to port 15053 # -i docker0 -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053
			out tcp uid=1001 10.0.0.7:4000 > 93.184.216.34:3306 => untouched # -p tcp -m multiport --dports 1:1000,3306 -m owner --uid-owner 1001 -j RETURN
			out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:53 => untouched # -p tcp -m tcp --dport 53 -m owner --uid-owner 1000-1005 -j RETURN
			out tcp uid=2000 10.0.0.7:4000 > 93.184.216.34:53 => untouched # -p tcp -m tcp --dport 53 -m owner ! --uid-owner 5678 -j RETURN
			out udp uid=1000 10.0.0.7:4000 > 8.8.8.8:53 => untouched in zone 2 # -p udp -m udp --dport 53 -m owner --uid-owner 1000-1005 -j RETURN
			out udp uid=2000 10.0.0.7:4000 > 8.8.8.8:53 => redirected to port 15053 in zone 2 # -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053
			out tcp uid=2000 10.0.0.7:4000 > 93.184.216.34:80 => redirected to port 15001 # -p tcp -j REDIRECT --to-ports 15001`,
		"ipv6/kuma-all": `
			in tcp in=eth0 [fd00::9]:4000 > [fd00::7]:80 => redirected to port 15006 # -p tcp -j REDIRECT --to-ports 15006
			in tcp in=eth0 [fd09::9]:4000 > [fd00::7]:80 => untouched # -s fd09::/64 -j RETURN
			out tcp uid=5678 [::6]:4000 > [fd00::7]:80 => untouched # -s ::6/128 -o lo -j RETURN
			out tcp uid=5678 [fd00::7]:4000 > [fd00::7]:80 => redirected to port 15006 # -p tcp -j REDIRECT --to-ports 15006
			out udp uid=2000 [fd00::7]:4000 > [fd00::53]:53 => redirected to port 15053 in zone 2 # -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053
			out tcp uid=2000 [fd00::7]:4000 > [fd08::1]:80 => untouched # -d fd08::1/128 -j RETURN`,
		"ipv6/host": `
			in tcp in=eth0 [fd00::9]:4000 > [fd00::7]:22 => untouched # no rule is about it
			in tcp in=eth0 [fd00::9]:4000 > [fd00::7]:80 => unknown # cannot tell: rule 6 of filter INPUT uses -m rt --rt-type 0
			in udp in=eth0 [fe80::9]:5353 > [ff02::fb]:5353 => untouched # no rule is about it
			in icmpv6 in=eth0 fd00::9 > fd00::7 => untouched # no rule is about it
			out tcp uid=1000 [::1]:4000 > [::1]:80 => untouched # no rule is about it`,
		"linkerd": `
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => redirected to port 4143 # proxy-init/redirect-all-incoming-to-proxy-port
			in tcp 10.0.0.9:4000 > 10.0.0.7:4191 => untouched # proxy-init/ignore-port-4190,4191,4567,4568
			out tcp uid=2102 10.0.0.7:4000 > 93.184.216.34:443 => untouched # proxy-init/ignore-proxy-user-id
			out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:443 => redirected to port 4140 # proxy-init/redirect-all-outgoing-to-proxy-port`,
	}
	files, err := filepath.Glob("../rules/testdata/saves/*.txt")
	six, err6 := filepath.Glob("../rules/testdata/saves/ipv6/*.txt")
	if err != nil || err6 != nil || len(files) == 0 || len(six) == 0 {
		t.Fatalf("no saves: %v, %v", err, err6)
	}
	for _, file := range append(files, six...) {
		name, family := strings.TrimSuffix(filepath.Base(file), ".txt"), rules.IPv4
		if slices.Contains(six, file) {
			name, family = "ipv6/"+name, rules.IPv6
		}
		t.Run(name, func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			set, err := rules.ParseFile(family, text)
			if err != nil {
				t.Fatal(err)
			}
			if tests[name] == "" {
				t.Fatal("no packet walks through it")
			}
			for line := range strings.Lines(strings.TrimSpace(tests[name])) {
				line = strings.TrimSpace(line)
				packet, _, _ := strings.Cut(line, " =>")
				p, err := sim.ParsePacket(packet)
				if err != nil {
					t.Fatal(err)
				}
				trace := sim.Walk(set, env, p)
				if got := p.String() + " => " + trace.Verdict.String() + " # " + trace.Reason; got != line {
					t.Errorf("%s\nwant %s\n%s", got, line, trace)
				}
				if v := sim.Decide(set, env, p); v != trace.Verdict {
					t.Errorf("Decide says %s, Walk %s", v, trace)
				}
			}
		})
	}
}

// A mark that the packet brings is no more known than others where something in a
// nat table may have changed it.
func TestWalkAllMarks(t *testing.T) {
	opaque := save(t, rules.IPv4, "*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j CONNMARK --restore-mark")
	marked := save(t, rules.IPv4, "*nat\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n*filter\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -m mark --mark 0x4000/0x4000 -j DROP")
	p := sim.MustPacket("out udp uid=1 mark=0x4000 10.0.0.7:4000 > 10.0.0.9:53")
	for _, sets := range [][]rules.Set{{opaque, marked}, {marked, opaque}} {
		if trace := sim.WalkAll(sets, env, p); trace.Kind != sim.Unknown {
			t.Error(trace)
		}
	}
}

// TestWalkAll: nft and legacy rules at once.
func TestWalkAll(t *testing.T) {
	nat := func(port, to string) rules.Set {
		return save(t, rules.IPv4, "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m tcp --dport "+port+" -j "+to)
	}
	one, two := nat("80", "REDIRECT --to-ports 1"), nat("81", "DNAT --to-destination 172.17.0.2")
	both := nat("80:81", "REDIRECT --to-ports 3")
	drop := save(t, rules.IPv4, "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -m tcp --dport 1 -m comment --comment no-proxy -j DROP")
	reject := save(t, rules.IPv4, "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -m tcp --dport 1:2 -j REJECT --reject-with tcp-reset")
	mark := save(t, rules.IPv4, "*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m tcp --dport 1:2 -j MARK --set-xmark 0x1/0x1")
	marked := save(t, rules.IPv4, "*mangle\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -m mark --mark 0x1/0x1 -j DROP")
	later := save(t, rules.IPv4, "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m mark --mark 0x1/0x1 -j DROP")
	natMark := save(t, rules.IPv4, "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m tcp --dport 1 -j MARK --set-xmark 0x1/0x1")
	natMarked := save(t, rules.IPv4, "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m mark --mark 0x1/0x1 -j REDIRECT --to-ports 9")
	for _, test := range []struct {
		sets []rules.Set
		port string
		want string
		set  int
	}{
		{[]rules.Set{one, two}, "80", "redirected to port 1", 0},
		{[]rules.Set{two, one}, "80", "redirected to port 1", 1},
		{[]rules.Set{one, two}, "81", "untouched, sent elsewhere", 1},
		{[]rules.Set{one, two}, "82", "untouched", -1},
		{[]rules.Set{one, drop}, "80", "dropped", 1},
		{[]rules.Set{drop, one}, "80", "dropped", 0},
		{[]rules.Set{one, both}, "80", "unknown", 1},
		{[]rules.Set{both, two}, "81", "unknown", 1},
		{[]rules.Set{drop, reject}, "1", "unknown", 0},
		{[]rules.Set{reject, drop}, "1", "unknown", 0},
		{[]rules.Set{reject, drop}, "2", "refused", 0},
		{[]rules.Set{reject, reject}, "1", "refused", 0},
		{[]rules.Set{mark, marked}, "1", "unknown", 1},
		{[]rules.Set{marked, mark}, "1", "unknown", 1},
		{[]rules.Set{mark, marked}, "3", "untouched", -1},
		{[]rules.Set{mark, later}, "1", "dropped", 1},
		{[]rules.Set{natMark, natMarked}, "1", "unknown", 1},
		{[]rules.Set{natMarked, natMark}, "1", "unknown", 0},
		{[]rules.Set{natMarked, natMark}, "2", "untouched", -1},
		{[]rules.Set{{}, one, {}}, "80", "redirected to port 1", 1},
	} {
		trace := sim.WalkAll(test.sets, env, sim.MustPacket("in tcp 10.0.0.9:4000 > 10.0.0.7:"+test.port))
		step, ok := trace.Deciding()
		if !ok {
			step.Set = -1
		}
		if trace.Verdict.String() != test.want || step.Set != test.set {
			t.Errorf("%s by set %d; want %s by %d\n%s", trace.Verdict, step.Set, test.want, test.set, trace)
		}
	}
}

// TestWalkAllPriorities: with rules of nftables the order is known, whichever Set is
// named first.
func TestWalkAllPriorities(t *testing.T) {
	at := func(table rules.Table, h rules.Hook, offset int32, r rules.Rule) rules.Set {
		return rules.Set{Bases: []rules.BaseChain{{Table: table, Hook: h, Offset: offset, Rules: []rules.Rule{r}}}}
	}
	to := func(port uint16) rules.Rule {
		return rules.Rule{Matches: []rules.Match{rules.Protocol(rules.TCP)}, Action: rules.Redirect{Port: port}}
	}
	mark := rules.Rule{Action: rules.SetMark{Value: 1, Mask: 1}}
	marked := func(a rules.Action) rules.Rule {
		return rules.Rule{Matches: []rules.Match{rules.Protocol(rules.TCP), rules.Mark{Value: 1, Mask: 1}}, Action: a}
	}
	opaque := rules.Rule{Matches: []rules.Match{rules.Opaque{}}, Action: rules.Redirect{Port: 7}}
	notrack := rules.Rule{Action: rules.NoTrack{}}
	out, in := rules.Output, rules.Prerouting
	for name, test := range map[string]struct {
		first, second rules.Set
		packet, want  string
	}{
		"ours before iptables'":        {at(rules.NAT, out, -1, to(1)), at(rules.NAT, out, 0, to(2)), "out", "redirected to port 1"},
		"iptables' before ours":        {at(rules.NAT, in, 0, to(2)), at(rules.NAT, in, 1, to(1)), "in", "redirected to port 2"},
		"equal ones":                   {at(rules.NAT, out, -1, to(1)), at(rules.NAT, out, -1, to(2)), "out", "unknown"},
		"what cannot be told behind":   {at(rules.NAT, out, -1, to(1)), at(rules.NAT, out, 0, opaque), "out", "redirected to port 1"},
		"what cannot be told in front": {at(rules.NAT, out, -1, opaque), at(rules.NAT, out, 0, to(1)), "out", "unknown"},
		"a mark from in front":         {at(rules.NAT, out, -1, mark), at(rules.NAT, out, 0, marked(rules.Redirect{Port: 3})), "out", "redirected to port 3"},
		"a mark from behind":           {at(rules.NAT, out, 0, marked(rules.Redirect{Port: 3})), at(rules.NAT, out, 1, mark), "out", "untouched"},
		// Chains of nat are all called at the priority of iptables'.
		"a filter in front of nat":   {at(rules.Filter, out, -101, marked(rules.Drop{})), at(rules.NAT, out, -200, mark), "out", "untouched"},
		"a filter behind nat":        {at(rules.NAT, out, 500, mark), at(rules.Filter, out, -99, marked(rules.Drop{})), "out", "dropped"},
		"a filter with nat":          {at(rules.NAT, out, -1, to(1)), at(rules.Filter, out, -100, marked(rules.Drop{})), "out", "unknown"},
		"a drop before anything":     {at(rules.Filter, in, -310, rules.Rule{Action: rules.Drop{}}), at(rules.NAT, in, -300, to(1)), "in", "dropped"},
		"in front of conntrack":      {at(rules.Filter, out, -201, notrack), at(rules.NAT, out, -1, to(1)), "out", "untouched"},
		"behind conntrack":           {at(rules.Filter, out, -199, notrack), at(rules.NAT, out, -1, to(1)), "out", "redirected to port 1"},
		"a filter at no usual place": {at(rules.Filter, in, 5, rules.Rule{Action: rules.Drop{}}), at(rules.NAT, in, 0, to(1)), "in", "dropped"},
	} {
		packet := map[string]string{"in": "in tcp 10.0.0.9:4000 > 10.0.0.7:80", "out": "out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:80"}[test.packet]
		for _, sets := range [][]rules.Set{{test.first, test.second}, {test.second, test.first}} {
			p := sim.MustPacket(packet)
			trace := sim.WalkAll(sets, env, p)
			if trace.Verdict.String() != test.want || sim.DecideAll(sets, env, p) != trace.Verdict {
				t.Errorf("%s: %s, want %s\n%s", name, trace.Verdict, test.want, trace)
			}
		}
		one := test.first
		one.Bases = append(one.Bases[:1:1], test.second.Bases...)
		if trace := sim.Walk(one, env, sim.MustPacket(packet)); trace.Verdict.String() != test.want {
			t.Errorf("%s, as one Set: %s, want %s\n%s", name, trace.Verdict, test.want, trace)
		}
	}
}
