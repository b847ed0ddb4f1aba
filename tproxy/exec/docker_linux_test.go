package exec_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Docker's resolver, as it stands in the network namespace of a container, and the
// ports at which dockerd happens to listen.
var dockers = netip.MustParseAddrPort("127.0.0.11:53")

const dockersUDP, dockersTCP = 45345, 34287

func init() { places["docker"] = [2]netip.Addr{dockers.Addr(), netip.IPv6Loopback()} }

// docker starts what dockerd does for a container: a resolver of the user's, which
// asks upstream from here, and rules in front of it.
func (w *world) docker(user string, rules func()) {
	w.Helper()
	w.dnsmasq(w.Client, "root", upstream, "--address=/#/"+answered.String())
	w.dnsmasq(w.Host, user, netip.AddrPortFrom(dockers.Addr(), dockersUDP), fmt.Sprintf("--port=%d", dockersUDP), "--server="+upstream.Addr().String())
	if _, err := w.ListenTCP(w.Host, 0, "docker", netip.AddrPortFrom(dockers.Addr(), dockersTCP)); err != nil {
		w.Fatal(err)
	}
	rules()
}

// dockersRules are written by the program of a variant in the order in which moby
// writes them (setupIptablesNAT, libnetwork/resolver_unix.go).
func (w *world) dockersRules(b tproxy.Backend) {
	w.Helper()
	for _, line := range []string{
		"-N DOCKER_OUTPUT",
		"-I OUTPUT -d 127.0.0.11 -j DOCKER_OUTPUT",
		"-N DOCKER_POSTROUTING",
		"-I POSTROUTING -d 127.0.0.11 -j DOCKER_POSTROUTING",
		fmt.Sprintf("-I DOCKER_OUTPUT -d 127.0.0.11 -p udp --dport 53 -j DNAT --to-destination 127.0.0.11:%d", dockersUDP),
		fmt.Sprintf("-I DOCKER_POSTROUTING -s 127.0.0.11 -p udp --sport %d -j SNAT --to-source :53", dockersUDP),
		fmt.Sprintf("-I DOCKER_OUTPUT -d 127.0.0.11 -p tcp --dport 53 -j DNAT --to-destination 127.0.0.11:%d", dockersTCP),
		fmt.Sprintf("-I DOCKER_POSTROUTING -s 127.0.0.11 -p tcp --sport %d -j SNAT --to-source :53", dockersTCP),
	} {
		w.on("", b.String(), append([]string{"-t", "nat"}, strings.Fields(line)...)...)
	}
}

// dockersTable is what moby writes instead where it was told to use nftables
// (setupNftablesNAT, there).
func (w *world) dockersTable() {
	w.Helper()
	w.on(fmt.Sprintf(`table ip docker-dns {
	chain dns-dnat {
		type nat hook output priority -100; policy accept;
		ip daddr 127.0.0.11 udp dport 53 counter dnat to 127.0.0.11:%[1]d
		ip daddr 127.0.0.11 tcp dport 53 counter dnat to 127.0.0.11:%[2]d
	}
	chain dns-snat {
		type nat hook postrouting priority 100; policy accept;
		ip saddr 127.0.0.11 udp sport %[1]d counter snat to :53
		ip saddr 127.0.0.11 tcp sport %[2]d counter snat to :53
	}
}
`, dockersUDP, dockersTCP), "nft", "-f", "-")
}

// passing is a proxy that asks the nameserver.
func (w *world) passing(nameserver netip.AddrPort) *netlab.Proxy {
	w.Helper()
	p := &netlab.Proxy{UID: proxyUID, In: 15006, Out: 15001, DNS: 15053, Mode: netlab.Pass, Upstream: nameserver}
	if err := p.Start(w.Lab); err != nil {
		w.Fatal(err)
	}
	return p
}

// ask sends a query, which must be answered and come by the proxy so often.
func (w *world) ask(p *netlab.Proxy, uid uint32, server netip.AddrPort, want int) {
	w.Helper()
	before := p.Queries.Count()
	answer, err := w.query(w.Host, uid, "udp", server)
	if got := p.Queries.Count() - before; err != nil || !bytes.HasSuffix(answer, answered.AsSlice()) || got != want {
		w.Errorf("query of %d to %s: %q, %v, %d queries to the proxy; want %d", uid, server, answer, err, got, want)
	}
}

// installTried installs, and waits until the proxy has had the datagram by which an
// install sees that it comes first.
func (w *world) installTried(p *netlab.Proxy, c tproxy.Config) {
	w.Helper()
	before := p.Queries.Count()
	w.install(c)
	w.until(func() bool { return p.Queries.Count() > before })
}

// queryZones says, of each query to the server that conntrack knows, the port to which
// it went and its zone, "15053 zone=2"; nil where the kernel does not list them.
func (w *world) queryZones(server netip.AddrPort) map[string]int {
	w.Helper()
	entries, ok, err := w.Conntrack(w.Host)
	if err != nil {
		w.Fatal(err)
	}
	if !ok {
		return nil
	}
	out := map[string]int{}
	for _, e := range entries {
		switch {
		case e.To != server || e.Protocol != uint8(rules.UDP):
		case e.Zone != 0:
			out[fmt.Sprintf("%d zone=%d", e.Server.Port(), e.Zone)]++
		default:
			out[fmt.Sprint(e.Server.Port())]++
		}
	}
	return out
}

// In a container on a network that somebody made, queries to Docker's resolver reach
// the proxy, and the proxy's own reach Docker's resolver by Docker's rules, which stand
// behind ours; so do queries over TCP. What the resolver asks itself is not captured.
// Only what is redirected is in our zone, and an uninstall leaves Docker's rules.
func TestDockersResolverAnswersTheProxy(t *testing.T) {
	netlab.Require(t, "dnsmasq")
	eachVariant(t, func(w *world) {
		w.docker("root", func() { w.dockersRules(w.backend) })
		c := tproxy.Config{DNS: tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(dockers.Addr())}}
		before := w.save(rules.IPv4)
		w.install(c)
		w.uninstall()
		w.same("Docker's rules with their counters", nat(before), nat(w.save(rules.IPv4)))
		p := w.passing(dockers)
		w.installTried(p, c)
		for _, uid := range []uint32{appUID, 0} {
			w.ask(p, uid, dockers, 1)
		}
		w.ask(p, proxyUID, dockers, 0)
		w.ask(p, appUID, upstream, 0)
		w.checkFamilies([]int{0}, flow{"B3", "5678 docker:53 => docker"}, flow{"B4", "1000 docker:53 => docker"})
		// Two of those to 15053 are the installs' own.
		if got := w.queryZones(dockers); got != nil && (len(got) != 2 || got["15053 zone=2"] != 4 || got[fmt.Sprint(dockersUDP)] != 4) {
			w.Errorf("queries to %s by port and zone: %v", dockers, got)
		}
		if r := w.install(c); r.Changed || len(r.Steps) > 0 {
			w.Errorf("the same again: %+v", r)
		}
		w.uninstall()
		w.ask(p, appUID, dockers, 0)
		w.same("Docker's rules", uncounted(nat(before)), uncounted(nat(w.save(rules.IPv4))))
		// Whether it comes first is then tried as another user.
		c.Outbound.ExcludePortsForUIDs = []tproxy.UIDExclusion{{Protocol: rules.UDP, UIDs: rules.UIDsOf(0)}}
		w.installTried(p, c)
		w.ask(p, 0, dockers, 0)
		w.ask(p, appUID, dockers, 1)
	})
}

var counters = regexp.MustCompile(`\[\d+:\d+\]`)

// nat is what a save says of that table: one of ours that was made may stay, empty.
func nat(save string) string {
	_, rest, _ := strings.Cut(save, "*nat\n")
	table, _, _ := strings.Cut(rest, "COMMIT\n")
	return table
}

func uncounted(save string) string { return counters.ReplaceAllString(save, "[]") }

// What Docker's resolver asks itself leaves as root's: with all DNS captured, or its
// server too, it would come back to it. That is refused, and does loop.
func TestDockersResolverIsNoLoop(t *testing.T) {
	netlab.Require(t, "dnsmasq")
	for name, servers := range map[string][]netip.Addr{"all DNS": nil, "its server too": {upstream.Addr()}} {
		t.Run(name, func(t *testing.T) {
			eachVariant(t, func(w *world) {
				w.docker("root", func() { w.dockersRules(w.backend) })
				p := w.passing(dockers)
				conf := w.resolvConf(append([]netip.Addr{dockers.Addr()}, servers...)...)
				c := tproxy.Config{DNS: tproxy.DNS{Redirect: true, CaptureAll: servers == nil, ResolvConf: conf}}
				_, err := w.plan(c)
				if _, ok := errors.AsType[*tproxy.RefusedError](err); !ok || !strings.Contains(err.Error(), "Docker's resolver (dnsmasq) at 127.0.0.11") || strings.Contains(err.Error(), "user of its own") {
					w.Errorf("%v", err)
				}
				c.Backend = w.backend
				h := w.observe(c)
				h.LocalResolvers = nil
				looping, err := tproxy.Build(c, h)
				if err != nil {
					w.Fatal(err)
				}
				if _, err := w.apply(looping); err != nil {
					w.Fatal(err)
				}
				if answer, err := w.query(w.Host, appUID, "udp", dockers); err == nil || p.Queries.Count() < 2 {
					w.Errorf("not refused: answer %q after %d queries to the proxy: the test shows nothing", answer, p.Queries.Count())
				}
			})
		})
	}
}

// A resolver behind such rules that runs as a user of its own is left alone by it.
func TestDockersResolverOfAnotherUser(t *testing.T) {
	netlab.Require(t, "dnsmasq")
	eachVariant(t, func(w *world) {
		w.docker("nobody", func() { w.dockersRules(w.backend) })
		p := w.passing(dockers)
		for _, d := range []tproxy.DNS{
			{CaptureAll: true, ResolvConf: w.resolvConf(dockers.Addr())},
			{Redirect: true, ResolvConf: w.resolvConf(dockers.Addr(), upstream.Addr())},
		} {
			w.installTried(p, tproxy.Config{DNS: d})
			w.ask(p, appUID, dockers, 1)
			w.ask(p, appUID, upstream, 1)
		}
	})
}

// Inside a container dockerd cannot be seen. What tells is the socket and the rules.
func TestDockersResolverInAnotherPIDNamespace(t *testing.T) {
	netlab.Require(t, "dnsmasq", "unshare")
	eachVariant(t, func(w *world) {
		w.docker("root", func() { w.dockersRules(w.backend) })
		p := w.passing(dockers)
		c := tproxy.Config{Backend: w.backend, DNS: tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(dockers.Addr())}}
		h := w.observeBy(c, "unshare", "--pid", "--fork", "--mount-proc")
		if len(h.LocalResolvers) != 1 || h.LocalResolvers[0].PID != 0 || !strings.Contains(h.LocalResolvers[0].Untold, "another PID namespace") {
			w.Fatalf("local resolvers %+v", h.LocalResolvers)
		}
		plan, err := tproxy.Build(c, h)
		if err != nil {
			w.Fatal(err)
		}
		if _, err := w.apply(plan); err != nil {
			w.Fatal(err)
		}
		w.until(func() bool { return p.Queries.Count() > 0 })
		for _, uid := range []uint32{appUID, 0} {
			w.ask(p, uid, dockers, 1)
		}
		w.ask(p, proxyUID, dockers, 0)
		c.DNS = tproxy.DNS{CaptureAll: true, ResolvConf: c.DNS.ResolvConf}
		_, err = tproxy.Build(c, h)
		if _, ok := errors.AsType[*tproxy.RefusedError](err); !ok || !strings.Contains(err.Error(), "Docker's resolver at 127.0.0.11") {
			w.Errorf("%v", err)
		}
	})
}

// Who may not read the rules still learns of it by the socket, and what would loop.
func TestDockersResolverWithoutCapabilities(t *testing.T) {
	netlab.Require(t, "dnsmasq", "setpriv")
	eachVariant(t, func(w *world) {
		w.docker("root", func() { w.dockersRules(w.backend) })
		c := tproxy.Config{Backend: w.backend, DNS: tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(dockers.Addr())}}
		h := w.observeBy(c, "setpriv", "--bounding-set=-all", "--inh-caps=-all")
		if len(h.LocalResolvers) != 1 || h.LocalResolvers[0].Program != "Docker's resolver" || h.LocalResolvers[0].Untold == "" {
			w.Fatalf("local resolvers %+v", h.LocalResolvers)
		}
		if _, err := tproxy.Build(c, h); err != nil {
			w.Error(err)
		}
		c.DNS = tproxy.DNS{CaptureAll: true, ResolvConf: c.DNS.ResolvConf}
		if _, err := tproxy.Build(c, h); !errors.As(err, new(*tproxy.RefusedError)) {
			w.Errorf("%v", err)
		}
	})
}

// hostMarker makes the test binary print, as JSON, what it observes for the Needs that
// the variable holds.
const hostMarker = "TPROXY_EXEC_OBSERVE"

func printHost(needs string) int {
	var n tproxy.Needs
	err := json.Unmarshal([]byte(needs), &n)
	if err == nil {
		var h tproxy.Host
		if h, err = new(exec.Runner).Probe(context.Background(), n); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(h)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// observeBy observes the lab's host as a process that another program starts.
func (w *world) observeBy(c tproxy.Config, program string, args ...string) (h tproxy.Host) {
	w.Helper()
	needs, err := json.Marshal(c.Needs())
	if err != nil {
		w.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		w.Fatal(err)
	}
	out := w.on("", program, append(args, "env", hostMarker+"="+string(needs), self)...)
	if err := json.Unmarshal([]byte(out), &h); err != nil {
		w.Fatalf("%q: %v", out, err)
	}
	h.RemoteShells = nil
	return h
}

// Docker's rules may stand in another variant of iptables than ours, or in a table of
// nftables. Of two NAT tables the one that came last decides. Where that is Docker's,
// queries would pass the proxy by and not be answered: install sees it, and leaves
// everything as it was. Unasked, it takes the variant in which Docker's stand.
func TestDockersRulesElsewhere(t *testing.T) {
	netlab.Require(t, "dnsmasq", "nft", "iptables-legacy", "iptables-nft")
	for _, theirs := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy, tproxy.Auto} {
		for _, first := range []bool{true, false} {
			name := fmt.Sprintf("Docker's in %s, ours registered first %t", theirs, first)
			t.Run(name, func(t *testing.T) {
				eachVariant(t, func(w *world) {
					if theirs == w.backend {
						return
					}
					if first {
						w.on("", w.backend.String(), "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.99")
					}
					w.docker("root", func() {
						if theirs == tproxy.Auto {
							w.dockersTable()
						} else {
							w.dockersRules(theirs)
						}
					})
					p := w.passing(dockers)
					c := tproxy.Config{DNS: tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(dockers.Addr())}}
					plan, err := w.plan(c)
					if err != nil {
						w.Fatal(err)
					}
					if !strings.Contains(strings.Join(plan.Notes, "\n"), "ours in "+w.backend.String()) {
						w.Errorf("notes %q", plan.Notes)
					}
					before := w.save(rules.IPv4)
					_, err = w.apply(plan)
					if !first {
						if err != nil {
							w.Fatal(err)
						}
						w.until(func() bool { return p.Queries.Count() > 0 })
						w.ask(p, appUID, dockers, 1)
						w.ask(p, proxyUID, dockers, 0)
						w.checkFamilies([]int{0}, flow{"B3", "5678 docker:53 => docker"}, flow{"B4", "1000 docker:53 => docker"})
						w.uninstall()
						w.ask(p, appUID, dockers, 0)
						return
					}
					if e, ok := errors.AsType[*exec.ApplyError](err); !ok || !strings.Contains(e.Error(), "come before ours") || len(e.Left) > 0 {
						w.Errorf("%v", err)
					}
					w.ask(p, appUID, dockers, 0)
					w.same("the rules", nat(before), nat(w.save(rules.IPv4)))
					if theirs == tproxy.Auto {
						return
					}
					h := w.observe(c)
					if plan, err = tproxy.Build(c, h); err != nil || plan.Backend != tproxy.NFTables { // which comes before either variant
						w.Fatalf("unasked: %s, %v", plan.Backend, err)
					}
					seen := p.Queries.Count()
					if _, err := w.apply(plan); err != nil {
						w.Fatal(err)
					}
					w.until(func() bool { return p.Queries.Count() > seen })
					w.ask(p, appUID, dockers, 1)
				})
			})
		}
	}
}

// A container that is connected to a network after the install gets Docker's jump in
// front of ours. An install for the new resolv.conf says so, and what to do.
func TestDockersRulesCameLater(t *testing.T) {
	netlab.Require(t, "dnsmasq")
	eachVariant(t, func(w *world) {
		conf := w.resolvConf(netlab.Client4)
		c := tproxy.Config{DNS: tproxy.DNS{Redirect: true, ResolvConf: conf}}
		p := w.passing(dockers)
		w.docker("root", func() { w.install(c); w.dockersRules(w.backend) })
		if err := os.WriteFile(conf, []byte("nameserver 127.0.0.11\n"), 0o644); err != nil {
			w.Fatal(err)
		}
		plan, err := w.plan(c)
		if err != nil {
			w.Fatal(err)
		}
		_, err = w.apply(plan)
		if e, ok := errors.AsType[*exec.ApplyError](err); !ok || !strings.Contains(e.Remedy, "uninstall and install again") || len(e.Left) > 0 {
			w.Errorf("%v", err)
		}
		w.ask(p, appUID, dockers, 0)
		w.uninstall()
		w.installTried(p, c)
		w.ask(p, appUID, dockers, 1)
	})
}

// nodeLocal is where the DNS cache of a Kubernetes node answers.
var nodeLocal = netip.MustParseAddrPort("169.254.20.10:53")

// In a pod the node's cache is another host.
func TestNodeLocalResolverOfAPod(t *testing.T) {
	netlab.Require(t, "dnsmasq")
	eachVariant(t, func(w *world) {
		if _, err := w.Lab.Run(w.Context(), w.Client, "", "ip", "address", "add", nodeLocal.Addr().String()+"/32", "dev", "lo"); err != nil {
			w.Fatal(err)
		}
		w.dnsmasq(w.Client, "root", nodeLocal, "--address=/#/"+answered.String())
		w.dnsmasq(w.Client, "root", upstream, "--address=/#/"+answered.String())
		p := w.passing(nodeLocal)
		for _, d := range []tproxy.DNS{
			{Redirect: true, ResolvConf: w.resolvConf(nodeLocal.Addr())},
			{CaptureAll: true, ResolvConf: w.resolvConf(nodeLocal.Addr())},
		} {
			w.install(tproxy.Config{DNS: d})
			w.ask(p, appUID, nodeLocal, 1)
			w.ask(p, proxyUID, nodeLocal, 0)
			others := 0
			if d.CaptureAll {
				others = 1
			}
			w.ask(p, appUID, upstream, others)
		}
	})
}

// On the node the cache has an address of this host. Its own queries are left alone by
// its user, and where that is root's, as node-local-dns runs, capturing them is refused.
// Its rules take what is sent to it out of conntrack (setupNetworking,
// cmd/node-cache/app/cache_app.go in kubernetes/dns); ours come before them.
func TestNodeLocalResolverOnTheNode(t *testing.T) {
	netlab.Require(t, "dnsmasq")
	eachVariant(t, func(w *world) {
		w.on("", "ip", "link", "add", "nodelocaldns", "type", "veth", "peer", "name", "nodelocalpeer")
		w.on("", "ip", "address", "add", nodeLocal.Addr().String()+"/32", "dev", "nodelocaldns")
		w.on("", "ip", "link", "set", "nodelocaldns", "up")
		w.dnsmasq(w.Client, "root", upstream, "--address=/#/"+answered.String())
		w.dnsmasq(w.Host, "nobody", nodeLocal, "--server="+upstream.Addr().String())
		untrack := func() {
			for _, chain := range []string{"PREROUTING -d", "OUTPUT -s", "OUTPUT -d"} {
				for _, protocol := range []string{"tcp", "udp"} {
					port := "--dport"
					if strings.HasSuffix(chain, "-s") {
						port = "--sport"
					}
					line := fmt.Sprintf("-t raw -I %s 169.254.20.10 -p %s %s 53 -j NOTRACK", chain, protocol, port)
					w.on("", w.backend.String(), strings.Fields(line)...)
				}
			}
		}
		untrack()
		p := w.passing(nodeLocal)
		for _, d := range []tproxy.DNS{
			{Redirect: true, ResolvConf: w.resolvConf(nodeLocal.Addr())},
			{Redirect: true, ResolvConf: w.resolvConf(nodeLocal.Addr(), upstream.Addr())},
			{CaptureAll: true, ResolvConf: w.resolvConf(nodeLocal.Addr())},
		} {
			w.installTried(p, tproxy.Config{DNS: d})
			w.ask(p, appUID, nodeLocal, 1)
			w.ask(p, proxyUID, nodeLocal, 0)
		}
		w.ask(p, appUID, upstream, 1)

		// What install cannot have in front it says.
		passes := func(r *exec.Report) {
			w.Helper()
			if !strings.Contains(strings.Join(r.Notes, "\n"), "queries to 169.254.20.10:53 pass the proxy by") {
				w.Errorf("notes %q", r.Notes)
			}
			w.ask(p, appUID, nodeLocal, 0)
		}
		only := tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(nodeLocal.Addr())}
		unsplit := only
		unsplit.SkipConntrackZoneSplit = true
		passes(w.install(tproxy.Config{DNS: unsplit}))
		w.installTried(p, tproxy.Config{DNS: only})
		untrack() // the cache has started anew
		passes(w.install(tproxy.Config{DNS: only}))
		w.uninstall()
		w.installTried(p, tproxy.Config{DNS: only})
		w.ask(p, appUID, nodeLocal, 1)

		all := tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, ResolvConf: w.resolvConf(nodeLocal.Addr())}}
		h := w.observe(all)
		if len(h.LocalResolvers) != 1 || h.LocalResolvers[0].Untold != "" || h.LocalResolvers[0].UID == 0 {
			w.Fatalf("local resolvers %+v", h.LocalResolvers)
		}
		h.LocalResolvers[0].UID = 0
		if _, err := tproxy.Build(all, h); !errors.As(err, new(*tproxy.RefusedError)) {
			w.Errorf("%v", err)
		}
	})
}
