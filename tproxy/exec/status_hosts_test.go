package exec

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// hosts are what other programs have in the tables of hosts that work, as they add
// it: for iptables-restore --noflush.
var hosts = []struct {
	name string
	v4   string
	// before is whether it stands there before the install, after whether it comes
	// afterwards too.
	before, after State
	parts         []string // of what is said, in either order
}{
	{"Docker with published ports", `*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
-A DOCKER -d 10.0.0.7/32 ! -i docker0 -p tcp -m tcp --dport 8443 -j DNAT --to-destination 172.17.0.3:443
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
`, StateInstalled, StateInstalled, nil},
	{"kube-proxy with a node port", `*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-EXT-XPGD46QRK7WJZT7O - [0:0]
:KUBE-SVC-XPGD46QRK7WJZT7O - [0:0]
:KUBE-SEP-2QX3V4JTR3XQJWSX - [0:0]
:KUBE-SEP-AUHJR4YUEW5AAYVB - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -d 10.96.7.7/32 -p tcp -m comment --comment "a/b:http cluster IP" -m tcp --dport 80 -j KUBE-SVC-XPGD46QRK7WJZT7O
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m comment --comment "a/b:http" -m tcp --dport 30080 -j KUBE-EXT-XPGD46QRK7WJZT7O
-A KUBE-EXT-XPGD46QRK7WJZT7O -m comment --comment "masquerade traffic for a/b:http external destinations" -j KUBE-MARK-MASQ
-A KUBE-EXT-XPGD46QRK7WJZT7O -j KUBE-SVC-XPGD46QRK7WJZT7O
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-SVC-XPGD46QRK7WJZT7O ! -s 10.244.0.0/16 -d 10.96.7.7/32 -p tcp -m comment --comment "a/b:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-XPGD46QRK7WJZT7O -m comment --comment "a/b:http -> 10.244.1.5:8080" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-2QX3V4JTR3XQJWSX
-A KUBE-SVC-XPGD46QRK7WJZT7O -m comment --comment "a/b:http -> 10.244.2.5:8080" -j KUBE-SEP-AUHJR4YUEW5AAYVB
-A KUBE-SEP-2QX3V4JTR3XQJWSX -s 10.244.1.5/32 -m comment --comment "a/b:http" -j KUBE-MARK-MASQ
-A KUBE-SEP-2QX3V4JTR3XQJWSX -p tcp -m comment --comment "a/b:http" -m tcp -j DNAT --to-destination 10.244.1.5:8080
-A KUBE-SEP-AUHJR4YUEW5AAYVB -s 10.244.2.5/32 -m comment --comment "a/b:http" -j KUBE-MARK-MASQ
-A KUBE-SEP-AUHJR4YUEW5AAYVB -p tcp -m comment --comment "a/b:http" -m tcp -j DNAT --to-destination 10.244.2.5:8080
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-NODEPORTS - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
COMMIT
`, StateInstalled, StateInstalled, nil},
	{"ufw that admits the proxy", `*filter
:INPUT DROP [0:0]
:ufw-before-input - [0:0]
:ufw-user-input - [0:0]
:ufw-logging-deny - [0:0]
:ufw-not-local - [0:0]
:ufw-after-logging-input - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-logging-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j ufw-logging-deny
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -j ufw-user-input
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j ufw-logging-deny
-A ufw-not-local -j DROP
-A ufw-logging-deny -m conntrack --ctstate INVALID -m limit --limit 3/min --limit-burst 10 -j RETURN
-A ufw-logging-deny -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW BLOCK] "
-A ufw-user-input -p tcp -m tcp --dport 22 -m conntrack --ctstate NEW -m recent --set --name DEFAULT --mask 255.255.255.255 --rsource
-A ufw-user-input -p tcp -m tcp --dport 22 -m conntrack --ctstate NEW -m recent --update --seconds 30 --hitcount 6 --name DEFAULT --mask 255.255.255.255 --rsource -j DROP
-A ufw-user-input -p tcp -m tcp --dport 15006 -j ACCEPT
-A ufw-after-logging-input -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW BLOCK] "
COMMIT
`, StateInstalled, StateInstalled, nil},
	{"ufw that does not", `*filter
:INPUT DROP [0:0]
:ufw-before-input - [0:0]
-A INPUT -j ufw-before-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -p tcp -m tcp --dport 22 -j ACCEPT
COMMIT
`, StateDrifted, StateDrifted, []string{"~ filtered: IPv4 filter INPUT policy DROP", "--ctstate DNAT -j ACCEPT"}},
	{"Tailscale", `*nat
:ts-postrouting - [0:0]
-I POSTROUTING 1 -j ts-postrouting
-A ts-postrouting -m mark --mark 0x40000/0xff0000 -j MASQUERADE
COMMIT
*filter
:ts-input - [0:0]
:ts-forward - [0:0]
-I INPUT 1 -j ts-input
-I FORWARD 1 -j ts-forward
-A ts-input -s 100.100.7.7/32 -i lo -j ACCEPT
-A ts-input -s 100.115.92.0/23 ! -i tailscale0 -j RETURN
-A ts-input -s 100.64.0.0/10 ! -i tailscale0 -j DROP
-A ts-input -i tailscale0 -j ACCEPT
-A ts-input -p udp -m udp --dport 41641 -j ACCEPT
-A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
-A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT
-A ts-forward -s 100.64.0.0/10 -o tailscale0 -j DROP
-A ts-forward -o tailscale0 -j ACCEPT
COMMIT
`, StateInstalled, StateInstalled, nil},
	{"CNI's portmap", `*nat
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-HOSTPORT-MASQ - [0:0]
:CNI-HOSTPORT-SETMARK - [0:0]
:CNI-DN-d2a2f4c3b9a1e6f7a8b9c - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"podman\" id: \"c\"" -m multiport --dports 8081,8082 -j CNI-DN-d2a2f4c3b9a1e6f7a8b9c
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A CNI-HOSTPORT-SETMARK -m comment --comment "CNI portfwd masquerade mark" -j MARK --set-xmark 0x2000/0x2000
-A CNI-DN-d2a2f4c3b9a1e6f7a8b9c -s 10.88.0.0/16 -p tcp -m tcp --dport 8081 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-d2a2f4c3b9a1e6f7a8b9c -s 127.0.0.1/32 -p tcp -m tcp --dport 8081 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-d2a2f4c3b9a1e6f7a8b9c -p tcp -m tcp --dport 8081 -j DNAT --to-destination 10.88.0.9:80
-A CNI-DN-d2a2f4c3b9a1e6f7a8b9c -p tcp -m tcp --dport 8082 -j DNAT --to-destination 10.88.0.9:81
COMMIT
`, StateInstalled, StateInstalled, nil},
	{"podman's netavark", `*nat
:NETAVARK-HOSTPORT-DNAT - [0:0]
:NETAVARK-HOSTPORT-SETMARK - [0:0]
:NETAVARK-HOSTPORT-MASQ - [0:0]
:NETAVARK-DN-1D8721804F16F - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-A NETAVARK-HOSTPORT-SETMARK -j MARK --set-xmark 0x2000/0x2000
-A NETAVARK-HOSTPORT-DNAT -p tcp -m tcp --dport 8083 -m comment --comment "dnat name: podman id: c" -j NETAVARK-DN-1D8721804F16F
-A NETAVARK-DN-1D8721804F16F -s 10.88.0.0/16 -p tcp -m tcp --dport 8083 -j NETAVARK-HOSTPORT-SETMARK
-A NETAVARK-DN-1D8721804F16F -s 127.0.0.1/32 -p tcp -m tcp --dport 8083 -j NETAVARK-HOSTPORT-SETMARK
-A NETAVARK-DN-1D8721804F16F -p tcp -m tcp --dport 8083 -j DNAT --to-destination 10.88.0.9:80
COMMIT
`, StateInstalled, StateInstalled, nil},
	// kube-proxy puts itself in front: then a connection to a service passes the proxy
	// by, whoever came first.
	{"kube-proxy in front of OUTPUT", `*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-XPGD46QRK7WJZT7O - [0:0]
:KUBE-SEP-2QX3V4JTR3XQJWSX - [0:0]
:KUBE-SEP-AUHJR4YUEW5AAYVB - [0:0]
-I OUTPUT 1 -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.7.7/32 -p tcp -m comment --comment "a/b:http cluster IP" -m tcp --dport 80 -j KUBE-SVC-XPGD46QRK7WJZT7O
-A KUBE-SVC-XPGD46QRK7WJZT7O -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-2QX3V4JTR3XQJWSX
-A KUBE-SVC-XPGD46QRK7WJZT7O -j KUBE-SEP-AUHJR4YUEW5AAYVB
-A KUBE-SEP-2QX3V4JTR3XQJWSX -p tcp -m tcp -j DNAT --to-destination 10.244.1.5:8080
-A KUBE-SEP-AUHJR4YUEW5AAYVB -p tcp -m tcp -j DNAT --to-destination 10.244.2.5:8080
COMMIT
`, StateInstalled, StateDrifted, nil},
	{"firewalld with FirewallBackend=iptables", `*mangle
:PREROUTING_direct - [0:0]
-A PREROUTING -j PREROUTING_direct
-A PREROUTING -m rpfilter --validmark --invert -j DROP
COMMIT
*nat
:PREROUTING_direct - [0:0]
:PREROUTING_ZONES - [0:0]
:PRE_public - [0:0]
:OUTPUT_direct - [0:0]
-I PREROUTING 1 -j PREROUTING_direct
-A PREROUTING -j PREROUTING_ZONES
-I OUTPUT 1 -j OUTPUT_direct
-A PREROUTING_ZONES -g PRE_public
COMMIT
*filter
:INPUT_direct - [0:0]
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -j INPUT_direct
-A INPUT -m conntrack --ctstate INVALID -j DROP
-A INPUT -j REJECT --reject-with icmp-host-prohibited
COMMIT
`, StateInstalled, StateInstalled, nil},
}

// Direct rules of others in front of ours, in firewalld's chain for them, are seen as those
// in the built-in chain are; behind ours they are not met.
func TestStatusOfDirectRules(t *testing.T) {
	for place, want := range map[string]State{"-I OUTPUT_direct 1": StateDrifted, "-A OUTPUT_direct": StateInstalled} {
		for _, action := range []string{"ACCEPT", "RETURN"} { // which goes back to OUTPUT, past ours
			m := newFakeMachine(t)
			m.install(t, tproxy.Config{Backend: tproxy.IPTablesNFT})
			n := m.of(true, rules.IPv4)
			all, err := rules.ParseSave(n.Family, n.Save())
			if err != nil {
				t.Fatal(err)
			}
			output, _ := tproxy.Find(n.Family, all).Ours.Base(rules.NAT, rules.Output)
			jump := output.Rules[0].String()
			m.edit(t, "iptables-nft", "*nat\n:OUTPUT_direct - [0:0]\n-D OUTPUT "+jump+"\n-A OUTPUT -j OUTPUT_direct\n-A OUTPUT_direct "+jump+"\n"+place+" -p tcp -m tcp --dport 443 -j "+action+"\nCOMMIT\n")
			says := ""
			if want == StateDrifted {
				says = "~ shadowed: IPv4 nat OUTPUT_direct #1 "
			}
			m.status(t).says(t, want, says)
		}
	}
}

// A chain with the name of one that publishes ports publishes none where it sends on
// all connections.
func TestStatusOfACatchAllIsDrift(t *testing.T) {
	for _, chain := range []string{"DOCKER", "KUBE-SERVICES", "CNI-DN-x", "NETAVARK-DN-x"} {
		m := newFakeMachine(t)
		m.edit(t, "iptables-nft", "*nat\n:"+chain+" - [0:0]\n-A PREROUTING -j "+chain+"\n-A "+chain+" -p tcp -j DNAT --to-destination 10.1.1.1:80\nCOMMIT\n")
		m.install(t, tproxy.Config{Backend: tproxy.IPTablesNFT})
		if s := m.status(t); s.State != StateDrifted {
			t.Errorf("%s: %s, notes %q", chain, s.State, s.Notes)
		}
	}
}

// Others' rules of ordinary hosts are no drift, whoever came first, unless connections
// really go wrong.
func TestStatusOfOrdinaryHosts(t *testing.T) {
	for _, h := range hosts {
		for _, after := range []bool{false, true} {
			t.Run(map[bool]string{false: "before ", true: "after "}[after]+h.name, func(t *testing.T) {
				for _, c := range []tproxy.Config{{}, {DNS: tproxy.DNS{CaptureAll: true}}} {
					m := newFakeMachine(t)
					m.local = []netip.Prefix{netip.MustParsePrefix("10.0.0.7/24"), netip.MustParsePrefix("172.17.0.1/16"), netip.MustParsePrefix("fd00::7/64")}
					m.routes = map[netip.Addr]kernel.Route{
						somewhere[rules.IPv4]: {Interface: "eth0", Source: m.local[0].Addr()}, somewhere[rules.IPv6]: {Interface: "eth0", Source: m.local[2].Addr()}}
					c.Backend = tproxy.IPTablesNFT
					want := h.before
					if after {
						m.install(t, c)
						want = h.after
					}
					m.edit(t, "iptables-nft", h.v4)
					if !after {
						m.install(t, c)
					}
					s := m.status(t)
					s.says(t, want, h.parts...)
					published := strings.Contains(h.v4, "-A PREROUTING") && strings.Contains(h.v4, "-j DNAT")
					if said := strings.Contains(strings.Join(s.Notes, "\n"), "a published port answers as before"); said != (published && !after) {
						t.Errorf("published: %v, notes %q", said, s.Notes)
					}
				}
			})
		}
	}
}

// A filter that may drop what is redirected, by what cannot be told on paper, cannot be
// told; whom it drops by where they come from is the operator's, and a note.
func TestStatusOfAFilterThatCannotBeTold(t *testing.T) {
	for rule, want := range map[string]State{
		"-A INPUT -p tcp -m tcp --syn -m connlimit --connlimit-above 0 --connlimit-mask 32 --connlimit-saddr -j REJECT\n": StateUnknown,
		"-A INPUT -m limit --limit 1/hour -j ACCEPT\n-A INPUT -j DROP\n":                                                  StateUnknown,
		"-A INPUT -m set --match-set banned src -j DROP\n":                                                                StateInstalled,
		"-A INPUT -p tcp -m tcp --dport 22 -m limit --limit 1/hour -j DROP\n":                                             StateInstalled,
		"-A INPUT -m limit --limit 3/min -j LOG --log-prefix \"x \"\n":                                                    StateInstalled,
	} {
		m := newFakeMachine(t)
		m.install(t, tproxy.Config{Backend: tproxy.IPTablesNFT})
		m.edit(t, "iptables-nft", "*filter\n"+rule+"COMMIT\n")
		if s := m.status(t); s.State != want {
			t.Errorf("%s%s, want %s: %q, notes %q", rule, s.State, want, s.lines(), s.Notes)
		}
	}
}
