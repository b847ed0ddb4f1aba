package exec_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// own are the lab's host's addresses, resolvers4 and 6 the servers that its resolv.conf
// names in these tests.
var (
	own     = places["host"]
	servers = []netip.Addr{netlab.Resolver4, netlab.Client4, netlab.Resolver6, netlab.Client6}
)

// eachFamily runs f with the index that places have for the family.
func eachFamily(f func(i int)) {
	for i := range rules.Families() {
		f(i)
	}
}

// socket is a UDP socket of the user's on the lab's host, with any port where at has
// none. Several may have the same address; one that is bound to the device that has it
// gets what is sent there (compute_score, net/ipv4/udp.c), by lo too (rt_iif of struct
// rtable).
func (w *world) socket(uid uint32, at netip.AddrPort, device string) *net.UDPConn {
	w.Helper()
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if err2 := c.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
			if err == nil && device != "" {
				err = syscall.BindToDevice(int(fd), device)
			}
		}); err2 != nil {
			return err2
		}
		return err
	}}
	var c net.PacketConn
	err := w.In(w.Host, func() error {
		return netlab.As(uid, uid, func() (err error) {
			c, err = config.ListenPacket(context.Background(), "udp", at.String())
			return err
		})
	})
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = c.Close() })
	return c.(*net.UDPConn)
}

func port(c net.PacketConn) uint16 { return c.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

// want is a server that is asked, and who has to answer.
type want struct {
	server netip.AddrPort
	who    string
}

// asker is a socket, and what it asks.
type asker struct {
	*net.UDPConn
	wants []want
}

// inFlight is how many queries of a socket wait for their answers at most: their buffers
// are not what is tested.
const inFlight = 32

// ask sends n queries to each server, in turn, without waiting for the answers to those
// in front, and says what was not as it has to be: "" is all well. An answer counts
// where it has the address that was asked.
func ask(c *net.UDPConn, n int, wants ...want) string {
	return askAll(c, n, asker{c, wants})
}

// askAll is ask with several sockets, of which c gets all answers.
func askAll(c *net.UDPConn, n int, askers ...asker) string {
	got := map[want]int{}
	var wants []want
	for _, a := range askers {
		wants = append(wants, a.wants...)
	}
	rounds := max(1, inFlight/len(wants))
	buf := make([]byte, 1500)
	sent, silent := 0, 0
	for sent < n && silent < 3 { // of a broken path three silences tell enough
		k := min(rounds, n-sent)
		for range k {
			for _, a := range askers {
				for _, w := range a.wants {
					if _, err := a.WriteToUDPAddrPort([]byte("?"), w.server); err != nil {
						return err.Error()
					}
				}
			}
		}
		sent += k
		for range k * len(wants) {
			_ = c.SetReadDeadline(time.Now().Add(netlab.Patience))
			length, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				silent++
				break
			}
			who, _, _ := strings.Cut(string(buf[:length]), " ")
			got[want{netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), who}]++
		}
	}
	var wrong []string
	for _, w := range wants {
		if got[w] != n {
			wrong = append(wrong, fmt.Sprintf("%s answered %d of %d queries to %s", w.who, got[w], n, w.server))
		}
		delete(got, w)
	}
	for w, k := range got {
		wrong = append(wrong, fmt.Sprintf("%s answered %d queries to %s", w.who, k, w.server))
	}
	slices.Sort(wrong)
	return strings.Join(wrong, "; ")
}

// split is DNS redirection to two nameservers of each family, and two exclusions.
func (w *world) split() tproxy.Config {
	w.Helper()
	return tproxy.Config{
		Outbound: tproxy.Outbound{ExcludePortsForUIDs: []tproxy.UIDExclusion{{Protocol: rules.UDP, Ports: rules.Port(53), UIDs: rules.MustUIDs("1002")}}},
		DNS:      tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(servers...)},
	}
}

// An application that keeps its source port asks nameservers that are redirected, both
// of them to the proxy's one port, and servers that are not, without a pause: every
// query is answered, by who has to, from the address that was asked. The same with a
// handful of ports at once, and with two threads on each socket, as glibc's A and AAAA
// from one port would be if they raced.
func TestKeptSourcePortLosesNothing(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		w.install(w.split())
		eachFamily(func(i int) {
			wants := []want{
				{netip.AddrPortFrom(places["resolver"][i], 53), "dns"},
				{netip.AddrPortFrom(places["client"][i], 53), "dns"},
				{netip.AddrPortFrom(places["internet"][i], 53), "resolver"}, // not in resolv.conf
				{netip.AddrPortFrom(places["resolver"][i], 5353), "resolver"},
			}
			c := w.socket(appUID, netip.AddrPortFrom(own[i], 0), "")
			if wrong := ask(c, 3000, wants[0]); wrong != "" {
				w.Errorf("one nameserver from port %d: %s", port(c), wrong)
			}
			if wrong := ask(c, 1000, wants...); wrong != "" {
				w.Errorf("then all servers from port %d: %s", port(c), wrong)
			}
			var all sync.WaitGroup
			for range 6 {
				c := w.socket(appUID, netip.AddrPortFrom(own[i], 0), "")
				all.Go(func() {
					if wrong := ask(c, 500, wants...); wrong != "" {
						w.Errorf("six ports at once: %s", wrong)
					}
				})
			}
			all.Wait()
			w.race(own[i], wants[0])
		})
		w.zones()
	})
}

// race sends two queries at the same time from a fresh socket, again and again: both
// are new to conntrack, and the second to be confirmed must not be dropped
// (nf_ct_resolve_clash, net/netfilter/nf_conntrack_core.c).
func (w *world) race(from netip.Addr, to want) {
	w.Helper()
	buf := make([]byte, 1500)
	for range 200 {
		c := w.socket(appUID, netip.AddrPortFrom(from, 0), "")
		var both sync.WaitGroup
		start := make(chan struct{})
		for range 2 {
			both.Go(func() {
				<-start
				_, _ = c.WriteToUDPAddrPort([]byte("?"), to.server)
			})
		}
		close(start)
		both.Wait()
		for k := range 2 {
			_ = c.SetReadDeadline(time.Now().Add(netlab.Patience))
			length, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil || !strings.HasPrefix(string(buf[:length]), to.who+" ") || from.Port() != to.server.Port() {
				w.Errorf("answer %d of 2 to a fresh port %d: %q from %s, %v", k+1, port(c), buf[:length], from, err)
				return
			}
		}
		_ = c.Close()
	}
}

// zones fails where a connection of the host is in the zone of redirected queries and is
// none of them, or the other way round; and where nothing of either kind is there.
func (w *world) zones() {
	w.Helper()
	entries, ok, err := w.Conntrack(w.Host)
	if err != nil {
		w.Fatal(err)
	}
	if !ok {
		w.Log("this kernel does not list conntrack's entries: their zones were not looked at")
		return
	}
	count := map[bool]int{}
	for _, e := range entries {
		redirected := e.Protocol == uint8(rules.UDP) && e.To.Port() == 53 && e.Server.Port() == tproxy.DefaultDNSPort
		count[redirected]++
		if want := map[bool]uint16{true: 2}[redirected]; e.Zone != want || e.From.Port() == tproxy.DefaultDNSPort {
			w.Errorf("%s; want zone %d, and no entry of an answer alone", e, want)
		}
	}
	if count[true] == 0 || count[false] == 0 {
		w.Errorf("conntrack knows %d redirected queries and %d other connections: this shows nothing", count[true], count[false])
	}
}

// takeTurns has the users ask the server one after the other from one port, each with a
// socket of its own, and returns who answered each how often. It stops at the third that
// nobody answers.
func (w *world) takeTurns(turns int, src, server netip.AddrPort, uids ...uint32) map[string]int {
	w.Helper()
	got := map[string]int{}
	silent := 0
	for range turns {
		for _, uid := range uids {
			if silent == 3 {
				return got
			}
			seen, err := w.Dial(w.Host, uid, "udp", src, server)
			if err != nil {
				w.Fatal(err)
			}
			if seen.Who == netlab.Timeout {
				silent++
			}
			got[fmt.Sprintf("%d by %s", uid, seen.Who)]++
		}
	}
	return got
}

// free is an address with a port that nobody has.
func (w *world) free(a netip.Addr) netip.AddrPort {
	c := w.socket(appUID, netip.AddrPortFrom(a, 0), "")
	defer c.Close()
	return netip.AddrPortFrom(a, port(c))
}

// A UDP flow that conntrack knows skips nat (istio#33469): a source port that goes from
// one user to another, or that both have at once, would take the way of who had it
// first. With the zones every user's query goes its own way; the control, without them,
// has to go wrong.
func TestReusedSourcePortGoesItsOwnWay(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		who := map[uint32]string{appUID: "dns", proxyUID: "resolver", 1002: "resolver"}
		right := func(turns int, uids ...uint32) map[string]int {
			out := map[string]int{}
			for _, u := range uids {
				out[fmt.Sprintf("%d by %s", u, who[u])] = turns
			}
			return out
		}
		orders := [][]uint32{{appUID, proxyUID, 1002}, {proxyUID, appUID}, {1002, appUID}}
		c := w.split()
		w.install(c)
		eachFamily(func(i int) {
			server := netip.AddrPortFrom(places["resolver"][i], 53)
			for _, uids := range orders {
				if got, want := w.takeTurns(300, w.free(own[i]), server, uids...), right(300, uids...); fmt.Sprint(got) != fmt.Sprint(want) {
					w.Errorf("in turn: %v; want %v", got, want)
				}
			}
			// At once. Nothing tells the answers apart but who they are from, so one of
			// the two sockets, that of the device, gets them all.
			app := w.socket(appUID, netip.AddrPortFrom(own[i], 0), "")
			proxy := w.socket(proxyUID, netip.AddrPortFrom(own[i], port(app)), "eth0")
			if wrong := askAll(proxy, 3000, asker{app, []want{{server, "dns"}}}, asker{proxy, []want{{server, "resolver"}}}); wrong != "" {
				w.Errorf("at once, from port %d: %s", port(app), wrong)
			}
		})
		w.zones()
		c.DNS.SkipConntrackZoneSplit = true
		w.install(c)
		eachFamily(func(i int) {
			server := netip.AddrPortFrom(places["resolver"][i], 53)
			for _, uids := range orders {
				got := w.takeTurns(3, w.free(own[i]), server, uids...)
				if first := who[uids[0]]; got[fmt.Sprintf("%d by %s", uids[1], first)] != 3 {
					w.Errorf("the control, without zones: %v; every query has to be answered by %s, or the test shows nothing", got, first)
				}
			}
		})
	})
}

// A socket that asks since before the install is redirected from then on, although
// conntrack, which a rule of others holds, knows its flow; after the uninstall it goes
// direct at once. Without the zones it goes on as it was.
func TestSocketFromBeforeTheInstallIsRedirected(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		w.iptables("-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT")
		c := w.split()
		for _, c.DNS.SkipConntrackZoneSplit = range []bool{false, true} {
			var sockets []*net.UDPConn
			stage := func(what, who string) {
				w.Helper()
				eachFamily(func(i int) {
					if wrong := ask(sockets[i], 100, want{netip.AddrPortFrom(places["resolver"][i], 53), who}); wrong != "" {
						w.Errorf("%s, zones left out %t: %s", what, c.DNS.SkipConntrackZoneSplit, wrong)
					}
				})
			}
			eachFamily(func(i int) { sockets = append(sockets, w.socket(appUID, netip.AddrPortFrom(own[i], 0), "")) })
			stage("before", "resolver")
			w.install(c)
			stage("installed", map[bool]string{false: "dns", true: "resolver"}[c.DNS.SkipConntrackZoneSplit])
			w.uninstall()
			stage("uninstalled", "resolver")
		}
	})
}

// K20, I10: a stateful filter lets the answers in to every query: redirected, excluded
// by address and by user, to a server that resolv.conf does not have, and the proxy's
// own; from a port of its own and from one that every user has in turn. Kuma's zones,
// the control, lose those to the excluded.
func TestStatefulFilterLetsAnswersIn(t *testing.T) {
	// What a filter has to admit beside the answers: redirected queries arrive on lo.
	filters := map[string]func(*world){
		"iptables": func(w *world) {
			w.iptables("-A INPUT -i lo -p udp --dport 15053 -j ACCEPT", "-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT", "-A INPUT -p ipv6-icmp -j ACCEPT", "-A INPUT -j DROP")
		},
		"nftables": func(w *world) {
			w.on(`table inet filter {
	chain input {
		type filter hook input priority filter; policy drop;
		iif lo udp dport 15053 accept
		ct state established accept
		meta l4proto ipv6-icmp accept
	}
}`, "nft", "-f", "-")
		},
	}
	netlab.Require(t, "nft")
	for name, filter := range filters {
		t.Run(name, func(t *testing.T) {
			eachBackend(t, func(w *world) {
				w.serve()
				w.proxy(netlab.Answer)
				filter(w)
				excluded := []flow{{"C2", "1000 udp client:53 => resolver"}, {"C2", "1002 udp resolver:53 => resolver"}}
				all := append([]flow{{"C3", "1000 udp resolver:53 => dns"}, {"C1", "5678 udp resolver:53 => resolver"}, {"C", "1000 udp internet:5353 => resolver"}}, excluded...)
				// What has no zones comes last: its entries stay a while.
				for _, d := range []tproxy.DNS{{CaptureAll: true}, {Redirect: true}, {CaptureAll: true, SkipConntrackZoneSplit: true}} {
					c := w.split()
					d.ResolvConf = c.DNS.ResolvConf
					c.DNS = d
					c.Outbound.ExcludeIPs = prefixes("client")
					w.install(c)
					w.check(all...)
					if d.Redirect {
						w.check(flow{"C4", "1000 udp internet:53 => resolver"})
					}
					if d.SkipConntrackZoneSplit {
						continue // what becomes of one port is TestReusedSourcePortGoesItsOwnWay's
					}
					w.zones()
					eachFamily(func(i int) {
						got := w.takeTurns(50, w.free(own[i]), netip.AddrPortFrom(places["resolver"][i], 53), appUID, proxyUID, 1002)
						if want := fmt.Sprint(map[string]int{"1000 by dns": 50, "5678 by resolver": 50, "1002 by resolver": 50}); fmt.Sprint(got) != want {
							w.Errorf("one port in turn: %v; want %s", got, want)
						}
					})
				}
				w.uninstall()
				w.kuma(oldkuma.Third, oldkuma.Options{DNS: true, ExcludeOutIPs: prefixes("client"), ExcludeForUIDs: []string{"udp 53 1002"}})
				w.check(all[:2]...)
				for _, f := range excluded {
					w.check(flow{"Kuma's zones", strings.Replace(f.text, "=> resolver", "=> timeout", 1)})
				}
			})
		})
	}
}
