package sim_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// save writes what iptables-save would, of tables that start with a line *name.
func save(t *testing.T, f rules.Family, text string) rules.Set {
	t.Helper()
	set, err := rules.ParseSave(f, []byte(strings.ReplaceAll(strings.TrimSpace(text), "\t", "")+"\nCOMMIT\n"))
	if err != nil {
		t.Fatal(err)
	}
	return set
}

var env = sim.EnvOf(netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7"))

// TestWalk walks through foreign rules: lines "packet => verdict # reason" for
// each set.
func TestWalk(t *testing.T) {
	for _, test := range []struct{ name, rules, walks string }{
		{"nothing", "*nat", `
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => untouched # there are no IPv4 rules
			in tcp [fd00::9]:4000 > [fd00::7]:80 => untouched # there are no IPv6 rules`},
		{"the other family", "*nat\n:OUTPUT ACCEPT [0:0]", `
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:80 => untouched # no rule is about it
			out tcp uid=1 [fd00::9]:4000 > [fd00::7]:80 => untouched # there are no IPv6 rules`},
		{"jump, goto, return", `*nat
			:PREROUTING ACCEPT [0:0]
			:A - [0:0]
			:B - [0:0]
			:C - [0:0]
			-A PREROUTING -p tcp -j A
			-A PREROUTING -p tcp -m tcp --dport 1 -m comment --comment after-A -j REDIRECT --to-ports 101
			-A PREROUTING -p tcp -m tcp --dport 2:4 -m comment --comment after-A-too -j REDIRECT --to-ports 102
			-A A -p tcp -m tcp --dport 1 -g B
			-A A -p tcp -m tcp --dport 2 -j C
			-A A -p tcp -m tcp --dport 3 -j RETURN
			-A A -p tcp -m tcp --dport 4 -j C
			-A A -p tcp -m tcp --dport 1:4 -m comment --comment end-of-A -j REDIRECT --to-ports 103
			-A B -p tcp -m tcp --dport 9 -j RETURN
			-A C -p tcp -m tcp --dport 2 -j RETURN
			-A C -m comment --comment end-of-C -j ACCEPT`, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:1 => redirected to port 101 # after-A
			in tcp 10.0.0.9:4000 > 10.0.0.7:2 => redirected to port 103 # end-of-A
			in tcp 10.0.0.9:4000 > 10.0.0.7:3 => redirected to port 102 # after-A-too
			in tcp 10.0.0.9:4000 > 10.0.0.7:4 => untouched # end-of-C`},
		{"goto from a base chain ends at the policy", `*filter
			:INPUT DROP [0:0]
			:A - [0:0]
			-A INPUT -p tcp -m tcp --dport 1 -g A
			-A INPUT -j ACCEPT
			-A A -j RETURN`, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:1 => dropped # the policy of filter INPUT is DROP
			in tcp 10.0.0.9:4000 > 10.0.0.7:2 => untouched # no rule is about it
			forwarded tcp 10.0.0.9:4000 > 10.0.1.7:1 => untouched # no rule is about it
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.7:1 => dropped # the policy of filter INPUT is DROP
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:1 => untouched # no rule is about it`},
		{"the filter sees what nat made", `*nat
			:PREROUTING ACCEPT [0:0]
			-A PREROUTING -p tcp -m comment --comment to-the-proxy -j REDIRECT --to-ports 15006
			COMMIT
			*filter
			:INPUT ACCEPT [0:0]
			-A INPUT -s 10.0.0.66/32 -d 10.0.0.7/32 -p tcp -j ACCEPT
			-A INPUT -s 10.0.0.8/32 -m conntrack --ctstate DNAT -m comment --comment translated -j DROP
			-A INPUT -p tcp -m tcp --dport 15006 -m comment --comment no-proxy -j REJECT --reject-with tcp-reset`, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => refused # no-proxy
			in tcp 10.0.0.8:4000 > 10.0.0.7:80 => dropped # translated
			in tcp 10.0.0.66:4000 > 10.0.0.7:80 => unknown # cannot tell: rule 1 of filter INPUT names a destination, and REDIRECT made it the first address of an interface that is not known
			in tcp state=established 10.0.0.9:4000 > 10.0.0.7:80 => untouched # nat sees the first packet of a connection only`},
		{"lo does not meet PREROUTING's nat again, and its filters", `*nat
			:PREROUTING ACCEPT [0:0]
			:OUTPUT ACCEPT [0:0]
			-A PREROUTING -p tcp -j REDIRECT --to-ports 1
			COMMIT
			*filter
			:INPUT ACCEPT [0:0]
			:OUTPUT ACCEPT [0:0]
			-A INPUT -i lo -p tcp -m tcp --dport 81 -m comment --comment from-lo -j DROP
			-A OUTPUT -o lo -p tcp -m tcp --dport 82 -m comment --comment to-lo -j DROP`, `
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:80 => untouched # no rule is about it
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:81 => dropped # from-lo
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.7:82 => dropped # to-lo
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:82 => untouched # no rule is about it`},
		{"a redirected packet leaves by the interface it had", `*nat
			:OUTPUT ACCEPT [0:0]
			-A OUTPUT -p tcp -m comment --comment redirect -j REDIRECT --to-ports 15001
			COMMIT
			*filter
			:INPUT ACCEPT [0:0]
			:OUTPUT ACCEPT [0:0]
			-A OUTPUT -o lo -j DROP
			-A INPUT -s 10.0.0.7/32 -d 127.0.0.1/32 -i lo -p tcp -m tcp --dport 15001 -m owner --uid-owner 2 -j ACCEPT
			-A INPUT -s 10.0.0.7/32 -d 127.0.0.1/32 -i lo -p tcp -m tcp --sport 4001 --dport 15001 -m comment --comment arrives -j DROP`, `
			out tcp uid=2 out=eth0 10.0.0.7:4000 > 10.0.0.9:80 => redirected to port 15001 # redirect
			out tcp uid=2 out=eth0 10.0.0.7:4001 > 10.0.0.9:80 => dropped # arrives`},
		{"port 0", `*nat
			:OUTPUT ACCEPT [0:0]
			-A OUTPUT -p tcp -m comment --comment never -j REDIRECT --to-ports 0`, `
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:80 => refused # never`},
		{"owners", `*nat
			:PREROUTING ACCEPT [0:0]
			:OUTPUT ACCEPT [0:0]
			-A PREROUTING -p tcp -m owner --uid-owner 0 -j REDIRECT --to-ports 1
			-A PREROUTING -p tcp -m owner ! --uid-owner 0 -m comment --comment no-socket -j REDIRECT --to-ports 2
			-A OUTPUT -p tcp -m owner --uid-owner 5-7 -m comment --comment some -j REDIRECT --to-ports 3
			-A OUTPUT -p tcp -m owner --gid-owner 9 -m comment --comment group -j REDIRECT --to-ports 4
			-A OUTPUT -p tcp -m owner ! --uid-owner 0 -m comment --comment not-root -j REDIRECT --to-ports 5`, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => redirected to port 2 # no-socket
			out tcp uid=5 10.0.0.7:4000 > 10.0.0.9:80 => redirected to port 3 # some
			out tcp uid=8 gid=9 10.0.0.7:4000 > 10.0.0.9:80 => redirected to port 4 # group
			out tcp uid=8 10.0.0.7:4000 > 10.0.0.9:80 => redirected to port 5 # not-root
			out tcp uid=0 10.0.0.7:4000 > 10.0.0.9:80 => untouched # no rule is about it`},
		{"the first zone holds", `*raw
			:PREROUTING ACCEPT [0:0]
			:OUTPUT ACCEPT [0:0]
			-A PREROUTING -m comment --comment in -j CT --zone 7
			-A OUTPUT -p udp -m comment --comment first -j CT --zone 2
			-A OUTPUT -p udp -j CT --zone 3`, `
			out udp uid=1 10.0.0.7:4000 > 10.0.0.9:53 => untouched in zone 2 # first
			out udp uid=1 127.0.0.1:4000 > 127.0.0.53:53 => untouched in zone 2 # first
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.53:53 => untouched # no rule is about it
			in udp 10.0.0.9:4000 > 10.0.0.7:53 => untouched in zone 7 # in`},
		{"interfaces", `*nat
			:PREROUTING ACCEPT [0:0]
			:OUTPUT ACCEPT [0:0]
			-A PREROUTING -i lo -p tcp -j REDIRECT --to-ports 1
			-A PREROUTING -i br-+ -p tcp -m comment --comment bridge -j REDIRECT --to-ports 2
			-A PREROUTING ! -i eth0 -p tcp -m comment --comment else -j REDIRECT --to-ports 3
			-A OUTPUT -o lo -p tcp -m comment --comment lo -j REDIRECT --to-ports 4
			-A OUTPUT -o docker0 -p tcp -m comment --comment docker -j REDIRECT --to-ports 5`, `
			in tcp in=br-1 10.0.0.9:4000 > 10.0.0.7:80 => redirected to port 2 # bridge
			in tcp in=eth0 10.0.0.9:4000 > 10.0.0.7:80 => untouched # no rule is about it
			in tcp in=eth1 10.0.0.9:4000 > 10.0.0.7:80 => redirected to port 3 # else
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => unknown # cannot tell: rule 2 of nat PREROUTING names interface br-+, and through which one the packet came is not known
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.7:80 => redirected to port 4 # lo
			out tcp uid=1 out=docker0 10.0.0.7:4000 > 172.17.0.2:80 => redirected to port 5 # docker
			out tcp uid=1 10.0.0.7:4000 > 172.17.0.2:80 => unknown # cannot tell: rule 2 of nat OUTPUT names interface docker0, and through which one the packet leaves is not known`},
		{"what is not known", `*nat
			:PREROUTING ACCEPT [0:0]
			:DOCKER - [0:0]
			-A PREROUTING -p tcp -m tcp --dport 1 -m statistic --mode random --probability 0.5 -j LOG
			-A PREROUTING -p tcp -m tcp --dport 2 -j LOG --log-prefix x
			-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
			-A PREROUTING -p tcp -m tcp --dport 3 -m bpf --bytecode "1,6 0 0 0" -j ACCEPT
			-A PREROUTING -p tcp -m tcp --dport 1:3 -m comment --comment known -j REDIRECT --to-ports 9
			-A DOCKER -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80`, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:1 => redirected to port 9 # known
			in tcp 10.0.0.9:4000 > 10.0.0.7:2 => redirected to port 9 # known
			in tcp 10.0.0.9:4000 > 10.0.0.7:3 => unknown # cannot tell: rule 4 of nat PREROUTING uses -m bpf --bytecode "1,6 0 0 0"
			in tcp 10.0.0.9:4000 > 10.0.0.7:8080 => untouched, sent elsewhere # DOCKER answers first: nat PREROUTING #3 -> DOCKER #1 sends the connection to 172.17.0.2:80
			forwarded tcp 10.0.0.9:4000 > 10.0.1.7:8080 => untouched # no rule is about it
			in udp 10.0.0.9:4000 > 10.0.0.7:3 => untouched # no rule is about it`},
		{"doubts that make no difference", `*mangle
			:OUTPUT ACCEPT [0:0]
			:MARKS - [0:0]
			-A OUTPUT -m limit --limit 3/min -j MARKS
			-A OUTPUT -p tcp -m tcp --dport 7 -j CONNMARK --restore-mark
			-A MARKS -p udp -j RETURN
			-A MARKS -j MARK --set-xmark 0x4/0x4
			-A MARKS -j LOG
			COMMIT
			*filter
			:OUTPUT ACCEPT [0:0]
			:LOGDROP - [0:0]
			-A OUTPUT -m mark --mark 0x1/0x1 -m comment --comment one -j DROP
			-A OUTPUT -m mark --mark 0x3/0x1 -j DROP
			-A OUTPUT -p tcp -m tcp --dport 4 -m mark --mark 0x4/0x4 -j DROP
			-A OUTPUT -p tcp -m tcp --dport 5 -m mark ! --mark 0x8/0xc -m comment --comment no-eight -j DROP
			-A OUTPUT -p tcp -m tcp --dport 6 -m limit --limit 3/min -j LOGDROP
			-A LOGDROP -j DROP`, `
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:80 => untouched # no rule is about it
			out tcp uid=1 mark=0x1 10.0.0.7:4000 > 10.0.0.9:80 => dropped # one
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:4 => unknown # cannot tell: rule 3 of filter OUTPUT looks for the mark 0x4, and the packet's is not known
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:5 => dropped # no-eight
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:6 => unknown # cannot tell: rule 5 of filter OUTPUT uses -m limit --limit 3/min
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:7 => unknown # cannot tell: rule 1 of filter OUTPUT looks for the mark 0x1, and the packet's is not known`},
		{"not tracked", `*raw
			:OUTPUT ACCEPT [0:0]
			-A OUTPUT -d 169.254.20.10/32 -p udp -j CT --notrack
			-A OUTPUT -d 169.254.20.11/32 -p udp -j CT --helper tftp
			-A OUTPUT -d 169.254.20.11/32 -p udp -j CT --zone 7
			COMMIT
			*nat
			:OUTPUT ACCEPT [0:0]
			-A OUTPUT -p udp -m comment --comment dns -j REDIRECT --to-ports 15053
			COMMIT
			*filter
			:OUTPUT ACCEPT [0:0]
			-A OUTPUT -p udp -m conntrack --ctstate NEW -m udp --sport 4001 -m comment --comment new -j DROP
			-A OUTPUT -p udp -m conntrack --ctstate UNTRACKED -m udp --sport 4002 -m comment --comment untracked -j DROP`, `
			out udp uid=1 10.0.0.7:4000 > 169.254.20.10:53 => untouched # it is kept out of connection tracking, and so out of nat
			out udp uid=1 10.0.0.7:4001 > 169.254.20.10:53 => untouched # it is kept out of connection tracking, and so out of nat
			out udp uid=1 10.0.0.7:4002 > 169.254.20.10:53 => dropped # untracked
			out udp uid=1 10.0.0.7:4000 > 169.254.20.11:53 => redirected to port 15053 # dns
			out udp uid=1 10.0.0.7:4001 > 169.254.20.12:53 => dropped # new`},
		{"negations and sources", `*nat
			:PREROUTING ACCEPT [0:0]
			:OUTPUT ACCEPT [0:0]
			-A OUTPUT -p tcp -m tcp ! --sport 4000 -m comment --comment port -j REDIRECT --to-ports 1
			-A OUTPUT -p tcp -m addrtype ! --src-type LOCAL -m comment --comment strange -j REDIRECT --to-ports 2
			-A OUTPUT -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m comment --comment late -j REDIRECT --to-ports 3
			-A PREROUTING -p tcp -m addrtype --src-type LOCAL -j REDIRECT --to-ports 4`, `
			out tcp uid=1 10.0.0.7:4001 > 10.0.0.9:80 => redirected to port 1 # port
			out tcp uid=1 10.0.0.8:4000 > 10.0.0.9:80 => redirected to port 2 # strange
			out tcp uid=1 state=midstream 10.0.0.7:4000 > 10.0.0.9:80 => redirected to port 3 # late
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:80 => untouched # no rule is about it
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => untouched # no rule is about it`},
		{"states", `*filter
			:INPUT ACCEPT [0:0]
			:FORWARD ACCEPT [0:0]
			-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -m comment --comment known -j ACCEPT
			-A INPUT -p tcp -m tcp --dport 81 -m conntrack ! --ctstate NEW,INVALID -j DROP
			-A INPUT -p tcp -m tcp --dport 81 --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN
			-A INPUT -p tcp -m tcp --dport 81 -m comment --comment midstream -j DROP
			-A FORWARD -j DROP`, `
			in tcp state=established 10.0.0.9:4000 > 10.0.0.7:80 => untouched # nat sees the first packet of a connection only
			in tcp 10.0.0.9:4000 > 10.0.0.7:81 => untouched # no rule is about it
			in tcp state=midstream 10.0.0.9:4000 > 10.0.0.7:81 => dropped # midstream
			forwarded tcp 10.0.0.9:4000 > 10.0.1.7:80 => dropped # -j DROP`},
		{"security comes behind filter", `*filter
			:INPUT ACCEPT [0:0]
			-A INPUT -p tcp -m tcp --dport 1:2 -j ACCEPT
			COMMIT
			*security
			:INPUT ACCEPT [0:0]
			:FORWARD ACCEPT [0:0]
			:OUTPUT ACCEPT [0:0]
			-A INPUT -p tcp -m tcp --dport 1 -m comment --comment secure-in -j DROP
			-A FORWARD -p tcp -m tcp --dport 1 -m comment --comment secure-forward -j DROP
			-A OUTPUT -p tcp -m tcp --dport 3 -m comment --comment secure-out -j DROP`, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:1 => dropped # secure-in
			in tcp 10.0.0.9:4000 > 10.0.0.7:2 => untouched # no rule is about it
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:1 => dropped # secure-in
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:3 => dropped # secure-out
			forwarded tcp 10.0.0.9:4000 > 10.0.1.7:1 => dropped # secure-forward`},
		{"in raw a connection has no state yet", `*raw
			:PREROUTING ACCEPT [0:0]
			:OUTPUT ACCEPT [0:0]
			-A PREROUTING -p tcp -m conntrack --ctstate NEW -j ACCEPT
			-A PREROUTING -p tcp -m tcp --dport 1 -m conntrack --ctstate INVALID -m comment --comment not-yet -j DROP
			-A OUTPUT -p udp -m udp --dport 1 -j CT --zone 5
			-A OUTPUT -p udp -m udp --dport 2 -j CT --notrack
			-A OUTPUT -p udp -m udp --dport 3 -j CT --helper tftp
			-A OUTPUT -p udp -m conntrack --ctstate NEW -m comment --comment template -j DROP
			-A OUTPUT -p udp -m conntrack --ctstate UNTRACKED -m comment --comment untracked -j DROP
			-A OUTPUT -p udp -m udp --dport 4 -m conntrack ! --ctstate NEW,ESTABLISHED,UNTRACKED -m comment --comment nothing -j DROP`, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:1 => dropped # not-yet
			in tcp state=established 10.0.0.9:4000 > 10.0.0.7:1 => dropped # not-yet
			in tcp 10.0.0.9:4000 > 10.0.0.7:2 => untouched # no rule is about it
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:1 => untouched # no rule is about it
			out udp uid=1 10.0.0.7:4000 > 10.0.0.9:1 => dropped in zone 5 # template
			out udp uid=1 10.0.0.7:4000 > 10.0.0.9:2 => dropped # untracked
			out udp uid=1 10.0.0.7:4000 > 10.0.0.9:3 => dropped # template
			out udp uid=1 10.0.0.7:4000 > 10.0.0.9:4 => dropped # nothing`},
		{"a redirection that changes nothing is no DNAT", `*nat
			:PREROUTING ACCEPT [0:0]
			:OUTPUT ACCEPT [0:0]
			-A PREROUTING -p tcp -j REDIRECT --to-ports 15001
			-A OUTPUT -p tcp -m comment --comment redirect -j REDIRECT --to-ports 15001
			COMMIT
			*filter
			:INPUT ACCEPT [0:0]
			-A INPUT -m conntrack --ctstate DNAT -m comment --comment translated -j DROP`, `
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:15001 => redirected to port 15001 # redirect
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.2:15001 => dropped # translated
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:80 => dropped # translated
			in tcp 10.0.0.9:4000 > 10.0.0.7:80 => dropped # translated
			in tcp 10.0.0.9:4000 > 10.0.0.7:15001 => unknown # cannot tell: rule 1 of filter INPUT looks for a connection that is DNAT, and whether it is translated is not known
			in tcp state=established 10.0.0.9:4000 > 10.0.0.7:80 => unknown # cannot tell: rule 1 of filter INPUT looks for a connection that is DNAT, and whether it is translated is not known`},
		{"through lo a packet may come in with another source", `*nat
			:OUTPUT ACCEPT [0:0]
			:POSTROUTING ACCEPT [0:0]
			:SNAT-SOME - [0:0]
			-A OUTPUT -p tcp -m tcp --dport 5 -m comment --comment five -j REDIRECT --to-ports 15001
			-A POSTROUTING -p tcp -m tcp --dport 4 -m statistic --mode random --probability 0.5 -j MASQUERADE
			-A OUTPUT -p tcp -m tcp --dport 11 -m comment --comment eleven -j ACCEPT
			-A POSTROUTING -p tcp -j SNAT-SOME
			-A SNAT-SOME -p tcp -m tcp --dport 1 -j RETURN
			-A SNAT-SOME -p tcp -m tcp --dport 2 -j MARK --set-xmark 0x4000/0x0
			-A SNAT-SOME -p tcp -m tcp --dport 3 -j NETMAP --to 10.1.0.0/16
			-A SNAT-SOME -p tcp -j SNAT --to-source 10.0.0.7
			COMMIT
			*filter
			:INPUT ACCEPT [0:0]
			-A INPUT -p tcp -m tcp --dport 7 -m conntrack --ctstate SNAT -j DROP
			-A INPUT -p tcp -m tcp --dport 2 -m mark --mark 0x4000/0x4000 -m comment --comment marked -j DROP
			-A INPUT -p tcp -m tcp --dport 3 -m mark --mark 0x1 -j DROP
			-A INPUT -s 127.0.0.1/32 -p tcp -m tcp --dport 1:9 -m comment --comment from-here -j DROP
			-A INPUT -s 127.0.0.1/32 -p tcp -m tcp --dport 15001 -j DROP`, `
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:1 => dropped # from-here
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:2 => dropped # marked
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:3 => unknown # cannot tell: rule 3 of filter INPUT looks for the mark 0x1, and the packet's is not known
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:4 => unknown # cannot tell: rule 4 of filter INPUT names a source, and nat POSTROUTING may have given the packet another
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:5 => unknown # cannot tell: rule 5 of filter INPUT names a source, and nat POSTROUTING may have given the packet another
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:6 => unknown # cannot tell: rule 4 of filter INPUT names a source, and nat POSTROUTING may have given the packet another
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:7 => unknown # cannot tell: rule 1 of filter INPUT looks for a connection that is SNAT, and whether it is translated is not known
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:10 => untouched # no rule is about it
			out tcp uid=1 127.0.0.1:4000 > 127.0.0.1:11 => untouched # eleven
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:6 => untouched # no rule is about it
			out udp uid=1 127.0.0.1:4000 > 127.0.0.1:6 => untouched # no rule is about it`},
		{"interfaces where a hook has none", `*mangle
			:PREROUTING ACCEPT [0:0]
			:POSTROUTING ACCEPT [0:0]
			:SHARED - [0:0]
			:LATE - [0:0]
			-A PREROUTING -p tcp -j SHARED
			-A POSTROUTING -p udp -j LATE
			-A SHARED -o eth1 -m comment --comment leaves -j DROP
			-A SHARED ! -o eth1 -p tcp -m tcp --dport 1 -m comment --comment nowhere-yet -j DROP
			-A LATE -i eth0 -m comment --comment comes -j DROP
			-A LATE ! -i lo -p udp -m udp --dport 1 -m comment --comment not-lo -j DROP`, `
			forwarded tcp in=eth0 out=eth1 10.0.0.9:4000 > 10.0.1.7:80 => untouched # no rule is about it
			forwarded tcp in=eth0 out=eth1 10.0.0.9:4000 > 10.0.1.7:1 => dropped # nowhere-yet
			forwarded udp in=eth0 out=eth1 10.0.0.9:4000 > 10.0.1.7:80 => unknown # cannot tell: rule 1 of mangle LATE names interface eth0, and through which one the packet came is not known
			forwarded udp in=eth2 out=eth1 10.0.0.9:4000 > 10.0.1.7:1 => dropped # not-lo
			out udp uid=1 out=eth1 10.0.0.7:4000 > 10.0.1.7:80 => untouched # no rule is about it
			out udp uid=1 out=eth1 10.0.0.7:4000 > 10.0.1.7:1 => dropped # not-lo`},
		{"a mark out of a set", `*mangle
			:PREROUTING ACCEPT [0:0]
			-A PREROUTING -p tcp -j SET --add-set seen src
			-A PREROUTING -p udp -j SET --map-set marks src --map-mark
			COMMIT
			*filter
			:INPUT ACCEPT [0:0]
			-A INPUT -m mark --mark 0x1 -j DROP`, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:1 => untouched # no rule is about it
			in udp 10.0.0.9:4000 > 10.0.0.7:1 => unknown # cannot tell: rule 1 of filter INPUT looks for the mark 0x1, and the packet's is not known`},
		{"mangle", `*mangle
			:PREROUTING ACCEPT [0:0]
			:POSTROUTING ACCEPT [0:0]
			-A PREROUTING -p tcp -m tcp --dport 1 -m comment --comment early -j DROP
			-A POSTROUTING -o eth0 -p tcp -m tcp --dport 2 -m comment --comment late -j DROP`, `
			in tcp 10.0.0.9:4000 > 10.0.0.7:1 => dropped # early
			out tcp uid=1 out=eth0 10.0.0.7:4000 > 10.0.0.9:2 => dropped # late
			out tcp uid=1 10.0.0.7:4000 > 10.0.0.7:1 => dropped # early
			forwarded tcp out=eth0 10.0.0.9:4000 > 10.0.1.9:2 => dropped # late`},
	} {
		t.Run(test.name, func(t *testing.T) {
			set := save(t, rules.IPv4, test.rules)
			for line := range strings.Lines(strings.TrimSpace(test.walks)) {
				line = strings.TrimSpace(line)
				text, _, _ := strings.Cut(line, " =>")
				p, err := sim.ParsePacket(text)
				if err != nil {
					t.Fatal(err)
				}
				trace := sim.Walk(set, env, p)
				if got := fmt.Sprintf("%s => %s # %s", p, trace.Verdict, trace.Reason); got != line {
					t.Errorf("%s\nwant %s\n%s", got, line, trace)
				}
				if v := sim.Decide(set, env, p); v != trace.Verdict {
					t.Errorf("Decide says %s, Walk %s", v, trace)
				}
			}
		})
	}
}

// Chains that ParseFile would not let through.
func TestWalkEndsInAnySet(t *testing.T) {
	jump := func(to string) []rules.Rule { return []rules.Rule{{Action: rules.Jump{Chain: to}}} }
	next := func(to string) []rules.Rule { return []rules.Rule{{Action: rules.Goto{Chain: to}}} }
	base := []rules.BaseChain{{Table: rules.NAT, Hook: rules.Output, Rules: jump("A")}}
	for name, test := range map[string]struct {
		chains []rules.Chain
		want   string
	}{
		"missing":     {nil, "cannot tell: there is no chain A in nat"},
		"other table": {[]rules.Chain{{Table: rules.Raw, Name: "A"}}, "cannot tell: there is no chain A in nat"},
		"itself":      {[]rules.Chain{{Table: rules.NAT, Name: "A", Rules: jump("A")}}, "cannot tell: the chains of nat jump in a circle, through A"},
		"goto itself": {[]rules.Chain{{Table: rules.NAT, Name: "A", Rules: next("A")}}, "cannot tell: the chains of nat jump in a circle, through A"},
		"a circle":    {[]rules.Chain{{Table: rules.NAT, Name: "A", Rules: jump("B")}, {Table: rules.NAT, Name: "B", Rules: next("A")}}, "cannot tell: the chains of nat jump in a circle, through A"},
	} {
		set := rules.Set{Bases: base, Chains: test.chains}
		trace := sim.Walk(set, sim.Env{}, sim.MustPacket("out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:80"))
		if trace.Kind != sim.Unknown || trace.Reason != test.want {
			t.Errorf("%s: %s", name, trace)
		}
	}
	nested := rules.Set{Bases: base}
	for i := range 200 {
		nested.Chains = append(nested.Chains, rules.Chain{Table: rules.NAT, Name: fmt.Sprintf("A%d", i), Rules: jump(fmt.Sprintf("A%d", i+1))})
	}
	nested.Chains[0].Name = "A"
	nested.Chains[199].Rules = []rules.Rule{{Matches: []rules.Match{rules.TCP}, Action: rules.Redirect{Port: 5}}}
	if v := sim.Decide(nested, sim.Env{}, sim.MustPacket("out tcp uid=1 10.0.0.7:4000 > 10.0.0.9:80")); v.Port != 5 {
		t.Errorf("200 chains deep: %s", v)
	}
}

func TestTraceText(t *testing.T) {
	set := save(t, rules.IPv4, `*nat
		:PREROUTING ACCEPT [0:0]
		:OURS - [0:0]
		-A PREROUTING -p udp -j ACCEPT
		-A PREROUTING -s 10.0.0.0/24 -p tcp -m comment --comment "new connections" -j OURS
		-A OURS -p tcp -m tcp --dport 22 -m comment --comment SSH -j RETURN`)
	const want = `in tcp 10.0.0.9:4000 > 10.0.0.7:22
  nat PREROUTING #1 -p udp -j ACCEPT: it is tcp, not udp
* nat PREROUTING #2 new connections
* nat OURS #1 SSH
nat PREROUTING #2, nat OURS #1: SSH => untouched
`
	trace := sim.Walk(set, env, sim.MustPacket("in tcp 10.0.0.9:4000 > 10.0.0.7:22"))
	if trace.String() != want {
		t.Errorf("%s\nwant\n%s", trace, want)
	}
	if step, ok := trace.Deciding(); !ok || step.Place() != "nat OURS #1" {
		t.Errorf("%v, %t", step, ok)
	}
}

// Thirty chains of which each jumps twice to the next are a billion ways: the walk
// gives up, and says so.
func TestWalkEnds(t *testing.T) {
	for _, match := range []string{"", "-m bpf --bytecode \"1,6 0 0 1\" "} {
		var b strings.Builder
		b.WriteString("*filter\n:INPUT ACCEPT [0:0]\n")
		for i := range 31 {
			fmt.Fprintf(&b, ":C%d - [0:0]\n", i)
		}
		fmt.Fprintf(&b, "-A INPUT %s-j C0\n", match)
		for i := range 30 {
			fmt.Fprintf(&b, "-A C%d -j C%[2]d\n-A C%[1]d -j C%[2]d\n", i, i+1)
		}
		set, err := rules.ParseFile(rules.IPv4, []byte(b.String()+"COMMIT\n"))
		if err != nil {
			t.Fatal(err)
		}
		trace := sim.Walk(set, sim.EnvOf(netip.MustParseAddr("10.0.0.7")), sim.MustPacket("in tcp 10.0.0.9:4000 > 10.0.0.7:80"))
		if trace.Kind != sim.Unknown || !strings.Contains(trace.Reason, "cannot tell") {
			t.Errorf("%s: %s", trace.Verdict, trace.Reason)
		}
	}
}
