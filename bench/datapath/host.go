//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// most is how long a list of exclusions may be.
const most = 10000

// ours are our backends: the way by hand that each is compared with, and the aim for what
// an excluded port or address costs, in ns. One more backend is one more line.
var ours = []struct {
	backend tproxy.Backend
	least   string
	slope   float64
}{
	{tproxy.NFTables, "least nft", 0.2},
	{tproxy.IPTablesNFT, "least iptables-nft", 4.2},
	{tproxy.IPTablesLegacy, "least iptables-legacy", 2.2},
}

// list is what is excluded: n ports or n prefixes, in each direction and family.
type list struct {
	ports bool
	n     int
}

func (l list) String() string {
	if l.ports {
		return fmt.Sprintf("%d ports", l.n)
	}
	return fmt.Sprintf("%d CIDRs", l.n)
}

// way is a set of rules.
type way struct {
	name   string
	family string // what it has in common with others that differ in their list alone
	least  string // the way that it is compared with
	slope  float64
	list   list
	// What it does to new connections and to queries.
	redirects, dns bool
	put            func(*host) error
}

// few is whether the way is measured also where the list ought not to matter.
func (w way) few() bool { return w.list.n == 0 || w.list.n == most }

// again is a way's second host: their ratio is the noise.
func again(name string) string { return name + ", again" }

// sets is a native table by hand with interval sets.
const sets = "by hand, nft sets"

// ways are all of them; sizes are those of the lists.
func ways(sizes []int) (out []way) {
	twice := func(w way) { out = append(out, w); w.name = again(w.name); out = append(out, w) }
	nothing := func(*host) error { return nil }
	twice(way{name: "no rules", put: nothing})
	out = append(out, way{name: "conntrack alone", put: func(h *host) error {
		return h.nft("table inet t { chain c { type filter hook input priority 0; ct state established accept; }; }")
	}})
	backends := []string{"nft", "iptables-nft", "iptables-legacy"}
	for _, b := range backends {
		twice(way{name: "least " + b, redirects: true, put: func(h *host) error { return h.byHand(b, false) }})
	}
	for _, b := range backends {
		out = append(out, way{name: "least " + b + ", DNS", redirects: true, dns: true, least: "least " + b, put: func(h *host) error { return h.byHand(b, true) }})
	}
	for _, o := range ours {
		name := o.backend.String()
		config := func(change func(*tproxy.Config, *host)) func(*host) error {
			return func(h *host) error {
				c := tproxy.Config{Backend: o.backend}
				change(&c, h)
				return h.install(c)
			}
		}
		dns := func(skip bool) func(*host) error {
			return config(func(c *tproxy.Config, h *host) {
				c.DNS = tproxy.DNS{Redirect: true, ResolvConf: h.resolvConf, SkipConntrackZoneSplit: skip}
			})
		}
		out = append(out,
			way{name: name, family: name, least: o.least, slope: o.slope, redirects: true, put: config(func(*tproxy.Config, *host) {})},
			way{name: name + ", DNS", least: o.least + ", DNS", redirects: true, dns: true, put: dns(false)},
			way{name: name + ", DNS, one zone", least: o.least + ", DNS", redirects: true, dns: true, put: dns(true)})
		for _, l := range lists(sizes) {
			out = append(out, way{name: name + ", " + l.String(), family: name, least: o.least, slope: o.slope, list: l, redirects: true,
				put: config(func(c *tproxy.Config, _ *host) { l.exclude(c) })})
		}
	}
	for _, l := range append([]list{{}}, lists(sizes)...) {
		w := way{name: sets, family: sets, least: "least nft", slope: 0.2, list: l, redirects: true, put: func(h *host) error { return h.nft(l.table()) }}
		if l.n > 0 {
			w.name += ", " + l.String()
		}
		out = append(out, w)
	}
	return out
}

func lists(sizes []int) (out []list) {
	for _, ports := range []bool{true, false} {
		for _, n := range sizes {
			out = append(out, list{ports, n})
		}
	}
	return out
}

// port is the i-th excluded port: no two of them make a range.
func port(i int) uint16 { return uint16(30000 + 2*i) }

// lengths are those of excluded prefixes, in turn: iptables-nft compares whole bytes of an
// address in one way and others in another.
var lengths = map[rules.Family][]int{rules.IPv4: {32, 24, 20}, rules.IPv6: {128, 64, 44}}

// prefix is the i-th excluded prefix: no two of them make one.
func prefix(f rules.Family, i int) netip.Prefix {
	length := lengths[f][i%len(lengths[f])]
	if f == rules.IPv4 {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], 20<<24+uint32(i)<<13)
		return netip.PrefixFrom(netip.AddrFrom4(a), length)
	}
	a := netip.MustParseAddr("2400::").As16()
	binary.BigEndian.PutUint32(a[2:], uint32(i)<<5)
	return netip.PrefixFrom(netip.AddrFrom16(a), length)
}

// exclude puts the list into a config, in both directions.
func (l list) exclude(c *tproxy.Config) {
	if l.ports {
		var ranges []rules.PortRange
		for i := range l.n {
			ranges = append(ranges, rules.PortRange{First: port(i), Last: port(i)})
		}
		p, err := rules.PortsOf(ranges...)
		if err != nil {
			panic(err)
		}
		c.Inbound.ExcludePorts, c.Outbound.ExcludePorts = p, p
		return
	}
	for _, f := range rules.Families() {
		for i := range l.n {
			c.Inbound.ExcludeIPs = append(c.Inbound.ExcludeIPs, prefix(f, i))
		}
	}
	c.Outbound.ExcludeIPs = c.Inbound.ExcludeIPs
}

// table is the least native table that redirects, with the list in interval sets.
func (l list) table() string {
	var b strings.Builder
	set := func(name, kind string, element func(i int) string) {
		fmt.Fprintf(&b, "set %s { type %s; flags interval; elements = { ", name, kind)
		for i := range l.n {
			fmt.Fprintf(&b, "%s, ", element(i))
		}
		b.WriteString("}; }\n")
	}
	b.WriteString("table inet t {\n")
	in, out := "", ""
	switch {
	case l.n == 0:
	case l.ports:
		set("ports", "inet_service", func(i int) string { return fmt.Sprint(port(i)) })
		in, out = "tcp dport @ports return;", "tcp dport @ports return;"
	default:
		set("four", "ipv4_addr", func(i int) string { return prefix(rules.IPv4, i).String() })
		set("six", "ipv6_addr", func(i int) string { return prefix(rules.IPv6, i).String() })
		in, out = "ip saddr @four return; ip6 saddr @six return;", "ip daddr @four return; ip6 daddr @six return;"
	}
	fmt.Fprintf(&b, `chain in { type nat hook prerouting priority -101; %s meta l4proto tcp redirect to :%d; }
chain out { type nat hook output priority -101; %s meta l4proto tcp meta skuid != %d redirect to :%d; }
}
`, in, tproxy.DefaultInboundPort, out, tproxy.DefaultProxyUID, tproxy.DefaultOutboundPort)
	return b.String()
}

// host has the rules of its way.
type host struct {
	*netlab.Lab
	way        way
	resolvConf string
	clock      func() int64 // ns
}

// The host's addresses for a client from the first and the last excluded prefix.
var (
	first = map[rules.Family]netip.Addr{rules.IPv4: netip.MustParseAddr("10.0.0.3"), rules.IPv6: netip.MustParseAddr("fd00::3")}
	last  = map[rules.Family]netip.Addr{rules.IPv4: netip.MustParseAddr("10.0.0.4"), rules.IPv6: netip.MustParseAddr("fd00::4")}
)

func newHost(w way, dir string) (h *host, err error) {
	h = &host{way: w, resolvConf: filepath.Join(dir, "resolv.conf"), clock: busy}
	if h.Lab, err = netlab.New(context.Background()); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	conf := fmt.Sprintf("nameserver %s\nnameserver %s\n", netlab.Client4, netlab.Client6)
	err = errors.Join(
		os.WriteFile(h.resolvConf, []byte(conf), 0o644),
		// A connection that is not answered ends soon, instead of after two minutes.
		h.Sysctl(h.Host, "net/ipv4/tcp_syn_retries", "1"), h.Sysctl(h.Client, "net/ipv4/tcp_syn_retries", "1"),
		// Ports are new to conntrack again in the next pass.
		h.Sysctl(h.Host, "net/netfilter/nf_conntrack_udp_timeout", "1"),
		h.Sysctl(h.Host, "net/netfilter/nf_conntrack_udp_timeout_stream", "1"),
		h.Sysctl(h.Host, "net/netfilter/nf_conntrack_tcp_timeout_close", "1"))
	if err == nil && w.list.n > 0 && !w.list.ports {
		err = h.excludedAddresses()
	}
	if err == nil {
		err = w.put(h)
	}
	return h, err
}

// excludedAddresses gives the client an address of the first and one of the last prefix,
// to be called at, and to call the host's further addresses from.
func (h *host) excludedAddresses() error {
	var client, host strings.Builder
	for _, f := range rules.Families() {
		for at, i := range map[netip.Addr]int{first[f]: 0, last[f]: h.way.list.n - 1} {
			from := prefix(f, i).Addr()
			noDAD := map[rules.Family]string{rules.IPv6: " nodad"}[f]
			fmt.Fprintf(&client, "address add %s/%d dev lo%s\n", from, from.BitLen(), noDAD)
			fmt.Fprintf(&client, "route add %s/%d dev eth0 src %s\n", at, at.BitLen(), from)
			fmt.Fprintf(&host, "address add %s/%d dev eth0%s\n", at, at.BitLen(), noDAD)
		}
	}
	_, err := h.Run(context.Background(), h.Host, host.String(), "ip", "-batch", "-")
	if err == nil {
		_, err = h.Run(context.Background(), h.Client, client.String(), "ip", "-batch", "-")
	}
	return errors.Join(err, h.Settle(h.Host), h.Settle(h.Client))
}

func (h *host) nft(text string) error {
	_, err := h.Run(context.Background(), h.Host, text, "nft", "-f", "-")
	return err
}

// byHand puts the least rules in place that redirect both directions and, if asked for,
// queries, and in which the proxy does not meet itself.
func (h *host) byHand(backend string, dns bool) error {
	if backend == "nft" {
		text := list{}.table()
		if dns {
			text += fmt.Sprintf("add rule inet t out udp dport 53 meta skuid != %d redirect to :%d\n", tproxy.DefaultProxyUID, tproxy.DefaultDNSPort)
		}
		return h.nft(text)
	}
	script := fmt.Sprintf("*nat\n-A PREROUTING -p tcp -j REDIRECT --to-ports %d\n-A OUTPUT -p tcp -m owner ! --uid-owner %d -j REDIRECT --to-ports %d\n",
		tproxy.DefaultInboundPort, tproxy.DefaultProxyUID, tproxy.DefaultOutboundPort)
	if dns {
		script += fmt.Sprintf("-A OUTPUT -p udp --dport 53 -m owner ! --uid-owner %d -j REDIRECT --to-ports %d\n", tproxy.DefaultProxyUID, tproxy.DefaultDNSPort)
	}
	for _, prefix := range []string{"iptables", "ip6tables"} {
		program := prefix + strings.TrimPrefix(backend, "iptables") + "-restore"
		if _, err := h.Run(context.Background(), h.Host, script+"COMMIT\n", program, "--noflush"); err != nil {
			return err
		}
	}
	return nil
}

// install does what an importer does.
func (h *host) install(c tproxy.Config) error {
	return h.In(h.Host, func() error {
		runner, ctx := exec.Runner{}, context.Background()
		host, err := runner.Probe(ctx, c.Needs())
		if err != nil {
			return err
		}
		plan, err := tproxy.Build(c, host)
		if err == nil {
			_, err = runner.Apply(ctx, plan)
		}
		return err
	})
}

func versions() (string, error) {
	var lines []string
	for _, program := range []string{"iptables-nft", "nft"} {
		out, err := osexec.Command(program, "--version").Output()
		if err != nil {
			return "", err
		}
		name, version, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
		lines = append(lines, name+": "+version)
	}
	return strings.Join(lines, "\n"), nil
}
