package differential

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// foreign draws rules such as others have, in the words of iptables-restore.
type foreign struct {
	*rand.Rand
	f rules.Family
	b strings.Builder
}

func (g *foreign) of(list ...string) string { return list[g.IntN(len(list))] }
func (g *foreign) one(n int) bool           { return g.IntN(n) == 0 }
func (g *foreign) not() string {
	if g.one(4) {
		return "! "
	}
	return ""
}

func (g *foreign) addr() string {
	if g.f == rules.IPv4 {
		return g.of("10.0.0.0/24", "10.0.0.2/32", "10.0.0.1/32", "127.0.0.0/8", "127.0.0.1/32", "93.184.216.34/32", "172.17.0.0/16", "10.0.0.7/32", "8.8.8.8/32")
	}
	return g.of("fd00::/64", "fd00::2/128", "fd00::1/128", "::1/128", "2606:2800:220:1::1/128", "fd01::/64", "fd00::7/128")
}

func (g *foreign) ports() string {
	return g.of("80", "81", "443", "80:81", "15006", "15001", "53", ":443", "444:")
}

// matches writes some matches that the chain may have.
func (g *foreign) matches(t rules.Table, chain string, out bool) string {
	var m []string
	proto := g.of("", "tcp", "udp")
	if g.one(2) {
		m = append(m, g.not()+g.of("-s", "-d")+" "+g.addr())
	}
	user := strings.HasPrefix(chain, "C")
	if g.one(4) {
		in := user || chain == "PREROUTING" || chain == "INPUT" || chain == "FORWARD"
		leaves := user || chain == "OUTPUT" || chain == "POSTROUTING" || chain == "FORWARD"
		switch {
		case in && (!leaves || g.one(2)):
			m = append(m, g.not()+"-i "+g.of("lo", "eth0", "br0", "e+"))
		case leaves:
			m = append(m, g.not()+"-o "+g.of("lo", "eth0", "br0", "e+"))
		}
	}
	if proto != "" {
		m = append(m, "-p "+proto)
		switch g.IntN(5) {
		case 0, 1:
			m = append(m, "-m "+proto+" "+g.not()+"--dport "+g.ports())
		case 2:
			m = append(m, "-m multiport "+g.not()+"--dports "+g.of("80,443", "80:81,15006", "53,15001:15006"))
		case 3:
			if proto == "tcp" {
				m = append(m, "-m tcp "+g.not()+"--syn")
			}
		}
	}
	switch g.IntN(14) {
	case 0:
		m = append(m, "-m addrtype "+g.not()+g.of("--dst-type", "--src-type")+" LOCAL")
	case 1, 2:
		m = append(m, "-m conntrack "+g.not()+"--ctstate "+g.of("NEW", "NEW,UNTRACKED", "ESTABLISHED,RELATED", "INVALID", "DNAT", "SNAT", "UNTRACKED", "NEW,INVALID", "RELATED,ESTABLISHED,DNAT"))
	case 3:
		m = append(m, "-m state --state "+g.of("NEW", "INVALID", "NEW,RELATED"))
	case 4, 5:
		m = append(m, "-m mark "+g.not()+"--mark "+g.of("0x1", "0x4/0x4", "0x4000/0x4000", "0x0/0xffff", "0x5"))
	case 6, 7:
		if out {
			m = append(m, "-m owner "+g.not()+g.of("--uid-owner 1000", "--uid-owner 5678", "--uid-owner 1000-6000", "--gid-owner 1000"))
		}
	case 8:
		if g.f == rules.IPv4 {
			m = append(m, "-m iprange --dst-range 10.0.0.1-10.0.0.9")
		}
	case 9:
		if g.one(2) && (t == rules.NAT || t == rules.Filter) {
			m = append(m, "-m comment --comment \"a -j DROP\"")
		}
	}
	return strings.Join(append(m, ""), " ")
}

func (g *foreign) line(t rules.Table, h rules.Hook, c string, chains []string) string {
	m, j := g.matches(t, c, h == rules.Output || h == rules.Postrouting), g.target(t, h, chains)
	if strings.Contains(j, "tcp-reset") {
		m = "-p tcp " + strings.NewReplacer("-p tcp ", "", "-p udp ", "", "-m udp", "-m tcp").Replace(m)
	}
	if (strings.Contains(j, "REDIRECT") || strings.Contains(j, ":")) && !strings.Contains(m, "-p ") {
		m = "-p " + g.of("tcp", "udp") + " " + m
	}
	return fmt.Sprintf("-A %s %s%s", c, m, j)
}

func (g *foreign) target(t rules.Table, h rules.Hook, chains []string) string {
	if len(chains) > 0 && g.one(3) {
		return g.of("-j", "-j", "-g") + " " + g.of(chains...)
	}
	if g.one(6) {
		return g.of("-j RETURN", "-j ACCEPT", "")
	}
	here := "127.0.0.1:15006"
	away := g.of("93.184.216.34:81", "10.0.0.1:443", "172.17.0.2:80")
	snat := "10.0.0.7"
	if g.f == rules.IPv6 {
		here, away, snat = "[::1]:15006", g.of("[fd00::1]:81", "[fd01::2]:80"), "fd00::7"
	}
	switch t {
	case rules.Raw:
		return g.of("-j CT --zone 3", "-j NOTRACK", "-j CT --notrack", "-j DROP", "-j MARK --set-xmark 0x4/0x4", "-j RETURN")
	case rules.Mangle:
		return g.of("-j MARK --set-xmark 0x1/0xffffffff", "-j MARK --or-mark 0x4000", "-j MARK --xor-mark 0x4", "-j MARK --and-mark 0xfffffffb", "-j CONNMARK --save-mark", "-j CONNMARK --restore-mark", "-j DROP")
	case rules.NAT:
		switch h {
		case rules.Prerouting, rules.Output:
			if g.one(5) {
				return "-j DNAT --to-destination " + g.of(here, away)
			}
			return g.of("-j REDIRECT --to-ports 15006", "-j REDIRECT --to-ports 15001", "-j REDIRECT --to-ports 81", "-j REDIRECT --to-ports 443", "-j MARK --or-mark 0x4000", "-j REDIRECT")
		case rules.Postrouting:
			return g.of("-j MASQUERADE", "-j SNAT --to-source "+snat, "-j MARK --xor-mark 0x4000", "-j ACCEPT")
		}
		return "-j ACCEPT"
	}
	if t == rules.Security {
		return g.of("-j DROP", "-j ACCEPT")
	}
	return g.of("-j DROP", "-j DROP", "-j REJECT", "-j REJECT --reject-with tcp-reset", "-j ACCEPT")
}

var foreignHooks = map[rules.Table][]rules.Hook{
	rules.Raw:      {rules.Prerouting, rules.Output},
	rules.Mangle:   {rules.Prerouting, rules.Input, rules.Forward, rules.Output, rules.Postrouting},
	rules.NAT:      {rules.Prerouting, rules.Input, rules.Output, rules.Postrouting},
	rules.Filter:   {rules.Input, rules.Forward, rules.Output},
	rules.Security: {rules.Input, rules.Forward, rules.Output},
}

// script draws a script. What comes back of a connection, and what follows its
// first packet, is let through everywhere.
func (g *foreign) script() string {
	for _, t := range []rules.Table{rules.Raw, rules.Mangle, rules.NAT, rules.Filter, rules.Security} {
		if t == rules.Security && !g.one(4) || t != rules.Security && t != rules.NAT && g.one(3) {
			continue
		}
		fmt.Fprintf(&g.b, "*%s\n", t)
		var lines []string
		for _, h := range foreignHooks[t] {
			policy := "ACCEPT"
			if t == rules.Filter && g.one(6) {
				policy = "DROP"
			}
			fmt.Fprintf(&g.b, ":%s %s [0:0]\n", h, policy)
			// Chains of this hook alone, so that what they hold may stand there.
			var chains []string
			for i := range 3 {
				chains = append(chains, fmt.Sprintf("C-%s-%d", h, i))
				fmt.Fprintf(&g.b, ":%s - [0:0]\n", chains[i])
			}
			switch t {
			case rules.Raw:
				lines = append(lines, fmt.Sprintf("-A %s -p tcp -m tcp ! --syn -j ACCEPT", h), fmt.Sprintf("-A %s -p ipv6-icmp -j ACCEPT", h), fmt.Sprintf("-A %s -p icmp -j ACCEPT", h))
			case rules.NAT:
			default:
				lines = append(lines, fmt.Sprintf("-A %s -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", h), fmt.Sprintf("-A %s -p ipv6-icmp -j ACCEPT", h), fmt.Sprintf("-A %s -p icmp -j ACCEPT", h))
			}
			for i, c := range append([]string{string(h)}, chains...) {
				for range 1 + g.IntN(3) {
					lines = append(lines, g.line(t, h, c, chains[min(i, 3):]))
				}
			}
		}
		for _, l := range lines {
			// Tracked in one zone or not at all, a TCP connection would not come about.
			if t == rules.Raw && (strings.Contains(l, "NOTRACK") || strings.Contains(l, "--notrack") || strings.Contains(l, "--zone")) && !strings.Contains(l, "-p udp") {
				continue
			}
			g.b.WriteString(strings.TrimRight(l, " ") + "\n")
		}
		g.b.WriteString("COMMIT\n")
	}
	return g.b.String()
}

// arrival is where a flow came out.
type arrival struct {
	where string
	port  uint16
}

type arrivals struct {
	sync.Mutex
	m map[string][]arrival
}

func (a *arrivals) add(id, where string, port uint16) {
	a.Lock()
	defer a.Unlock()
	a.m[id] = append(a.m[id], arrival{where, port})
}

func (l *lab) receivers(a *arrivals) error {
	for _, n := range []*netlab.Namespace{l.Host, l.Client, l.Container} {
		for _, port := range foreignPorts {
			err := l.In(n, func() error {
				c, err := net.ListenUDP("udp", &net.UDPAddr{Port: int(port)})
				if err != nil {
					return err
				}
				ln, err := net.ListenTCP("tcp", &net.TCPAddr{Port: int(port)})
				if err != nil {
					return err
				}
				l.closers = append(l.closers, func() { c.Close(); ln.Close() })
				go func() {
					buf := make([]byte, 1500)
					for {
						k, _, err := c.ReadFromUDPAddrPort(buf)
						if err == nil {
							a.add(strings.TrimSpace(string(buf[:k])), n.String(), port)
						} else if errors.Is(err, net.ErrClosed) {
							return
						}
					}
				}()
				go func() {
					for {
						c, err := ln.AcceptTCP()
						if err != nil {
							return
						}
						go func() {
							defer c.Close()
							_ = c.SetDeadline(time.Now().Add(10 * time.Second))
							line, err := bufio.NewReader(c).ReadString('\n')
							if err == nil {
								a.add(strings.TrimSpace(line), n.String(), port)
								fmt.Fprintln(c, "ok")
							}
						}()
					}
				}()
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// send sends the packet, with a connection around it if it takes one.
func (q *probe) send(l *lab, patience time.Duration) {
	p := q.packet
	d := net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(p.Source)}
	network := "tcp"
	if p.Protocol == rules.UDP {
		network, d.LocalAddr = "udp", net.UDPAddrFromAddrPort(p.Source)
	}
	d.Control = func(_, _ string, c syscall.RawConn) (err error) {
		if p.Mark != 0 {
			_ = c.Control(func(fd uintptr) {
				err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_MARK, int(p.Mark))
			})
		}
		return err
	}
	var c net.Conn
	err := l.In(l.namespaceOf(p), func() error {
		return netlab.As(p.UID, p.GID, func() (err error) {
			if c, err = d.Dial(network, p.Destination.String()); err == nil {
				_, err = io.WriteString(c, q.id+"\n")
			}
			return err
		})
	})
	if c != nil {
		defer c.Close()
	}
	if err == nil && p.Protocol == rules.TCP {
		_ = c.SetDeadline(time.Now().Add(patience))
		_, err = bufio.NewReader(c).ReadString('\n')
	}
	if q.failed = ""; err != nil {
		q.failed = failed(err).who
	}
}

func foreignPacket(r *rand.Rand, f rules.Family, port uint16) sim.Packet {
	remote, own, container, client := "93.184.216.34", []string{"10.0.0.2", "10.0.0.7", "127.0.0.1", "127.0.0.6", "172.17.0.1"}, "172.17.0.2", "10.0.0.1"
	if f == rules.IPv6 {
		remote, own, container, client = "2606:2800:220:1::1", []string{"fd00::2", "fd00::7", "::1", "fd01::1"}, "fd01::2", "fd00::1"
	}
	one := func(list ...string) netip.Addr { return netip.MustParseAddr(list[r.IntN(len(list))]) }
	p := sim.Packet{Protocol: []rules.Protocol{rules.TCP, rules.UDP}[r.IntN(2)]}
	var from, to netip.Addr
	switch r.IntN(6) {
	case 0:
		p.Path, p.InInterface = sim.In, "eth0"
		from, to = one(client, remote), one(own[:2]...)
	case 1:
		p.Path, p.InInterface = sim.In, "br0"
		from, to = one(container), one(own[:2]...)
	case 2:
		p.Path, p.InInterface, p.OutInterface = sim.Forwarded, "br0", "eth0"
		from, to = one(container), one(client, remote)
	case 3, 4:
		p.Path = sim.Out
		from, to = one(own...), one(own...)
	default:
		p.Path, p.OutInterface = sim.Out, "eth0"
		from, to = one(own[:2]...), one(client, remote)
		if r.IntN(4) == 0 {
			to, p.OutInterface = one(container), "br0"
		}
	}
	if p.Path == sim.Out {
		p.UID, p.GID = []uint32{0, 1000, 5678}[r.IntN(3)], []uint32{0, 1000}[r.IntN(2)]
		p.Mark = []uint32{0, 0, 1, 4, 0x4000}[r.IntN(5)]
	}
	p.Source, p.Destination = netip.AddrPortFrom(from, port), netip.AddrPortFrom(to, foreignPorts[r.IntN(len(foreignPorts))])
	return p
}

var foreignPorts = []uint16{80, 81, 443, 444, 53, 15006, 15001}

// differs says in what the kernel did something else than the walk says.
func (q *probe) differs(a *arrivals) string {
	a.Lock()
	got := a.m[q.id]
	a.Unlock()
	p, to := q.packet, q.packet.Destination
	want := arrival{"client", to.Port()}
	switch {
	case q.trace.Elsewhere:
		// The walk ends there: filters may yet keep it from where it is sent.
		step, _ := q.trace.Deciding()
		to, err := netip.ParseAddrPort(step.Rule.Action.(rules.Translate).To)
		if err != nil || len(got) > 0 && got[0].port != to.Port() {
			return fmt.Sprintf("the kernel brought it to %v: %q", got, q.failed)
		}
		return ""
	case q.trace.Kind == sim.Redirected:
		want = arrival{"host", q.trace.Port}
	case q.trace.Kind != sim.Untouched:
		// Of ICMPv6 a socket that is still connecting hears with its second packet,
		// and what nat POSTROUTING makes of an answer is not walked.
		failed := p.Protocol == rules.UDP || q.failed == netlab.Timeout && (q.trace.Kind == sim.Dropped || p.Family() == rules.IPv6 || q.snat) ||
			q.failed == netlab.Refused && q.trace.Kind == sim.Refused
		if len(got) > 0 || !failed {
			return fmt.Sprintf("the kernel brought it to %v: %q", got, q.failed)
		}
		return ""
	case env.IsLocal(to.Addr()):
		want.where = "host"
	case to.Addr() == containers[index(to.Addr())]:
		want.where = "container"
	}
	if len(got) != 1 || got[0] != want {
		return fmt.Sprintf("the kernel brought it to %v: %q", got, q.failed)
	}
	return ""
}

// Random rules of others, of either variant and of both at once: where the walk
// says that the first packet of a flow comes out, the kernel brings it.
func TestForeignRulesAgree(t *testing.T) {
	require(t)
	first, last := 1, 3
	switch {
	case *seedFlag != 0:
		first, last = *seedFlag, *seedFlag
	case strings.Contains(os.Getenv("TPROXY_SUITE"), "differential"):
		last = 40
	}
	l, err := newLab(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	a := &arrivals{m: map[string][]arrival{}}
	// An ICMP error for each rejected flow.
	if err := errors.Join(l.Sysctl(l.Host, "net/ipv4/icmp_ratelimit", "0"), l.Sysctl(l.Host, "net/ipv6/icmp/ratelimit", "0"), l.receivers(a)); err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	port := uint16(20000)
	for seed := first; seed <= last && !t.Failed(); seed++ {
		for _, b := range [][]tproxy.Backend{variants[:1], variants[1:], variants} {
			for _, f := range rules.Families() {
				foreignTrial(t, l, a, seed, b, f, counts, &port)
			}
		}
	}
	t.Logf("seeds %d to %d, %s", first, last, where())
	for _, k := range slices.Sorted(maps.Keys(counts)) {
		t.Logf("%6d %s", counts[k], k)
	}
}

func foreignTrial(t *testing.T, l *lab, a *arrivals, seed int, backends []tproxy.Backend, f rules.Family, counts map[string]int, port *uint16) {
	ctx := context.Background()
	r := rand.New(rand.NewPCG(uint64(seed), uint64(f)))
	var sets []rules.Set
	var listed strings.Builder
	for _, b := range backends {
		program := b.String()
		if f == rules.IPv6 {
			program = "ip6" + strings.TrimPrefix(program, "ip")
		}
		defer clearRules(t, l, program)
		g := &foreign{Rand: r, f: f}
		if err := l.load(ctx, program, g.script()); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		text, err := l.Run(ctx, l.Host, "", program+"-save")
		if err != nil {
			t.Fatal(err)
		}
		set, err := rules.ParseFile(f, []byte(text))
		if err != nil {
			t.Errorf("seed %d: %v\n%s", seed, err, text)
			return
		}
		sets = append(sets, set)
		listed.WriteString(text)
	}
	counts["sets of rules"]++
	if *port > 55000 {
		*port = 20000
	}
	flows := make([]probe, 40)
	for i := range flows {
		*port++
		flows[i] = probe{id: fmt.Sprint(seed, backends, f, i), packet: foreignPacket(r, f, *port)}
		flows[i].trace = sim.WalkAll(sets, env, flows[i].packet)
		flows[i].snat = strings.Contains(listed.String(), "-j SNAT") || strings.Contains(listed.String(), "-j MASQUERADE")
	}
	var wg sync.WaitGroup
	for i := range flows {
		if q := &flows[i]; q.tells() {
			wg.Go(func() { q.send(l, 250*time.Millisecond) })
		}
	}
	wg.Wait()
	time.Sleep(5 * time.Millisecond)
	for i := range flows {
		q := &flows[i]
		kind := q.trace.Kind.String()
		if q.trace.Elsewhere {
			kind = "sent elsewhere"
		}
		counts[kind]++
		if !q.tells() || q.differs(a) == "" {
			continue
		}
		// A machine under load: what is wrong is wrong again.
		*port++
		q.id += " again"
		q.packet.Source = netip.AddrPortFrom(q.packet.Source.Addr(), *port)
		q.trace = sim.WalkAll(sets, env, q.packet)
		q.send(l, time.Second)
		time.Sleep(20 * time.Millisecond)
		if what := q.differs(a); what != "" {
			t.Errorf("seed %d, %v, %s: %s\n%s\n%s", seed, backends, f, what, q.trace, &listed)
		}
	}
}

// load restores the script, without the lines that the program or the kernel
// refuses.
func (l *lab) load(ctx context.Context, program, script string) error {
	for {
		_, err := l.Run(ctx, l.Host, script, program+"-restore")
		m := refusedLine.FindStringSubmatch(fmt.Sprint(err))
		if err == nil || m == nil {
			return err
		}
		n, _ := strconv.Atoi(m[1])
		lines := strings.Split(script, "\n")
		if n < 1 || n > len(lines) || lines[n-1] == "COMMIT" {
			return err
		}
		script = strings.Join(slices.Delete(lines, n-1, n), "\n")
	}
}

var refusedLine = regexp.MustCompile(`line:? (\d+)`)

// probe is a flow of which the first packet is all that matters.
type probe struct {
	id     string
	packet sim.Packet
	trace  sim.Trace
	snat   bool   // whether there are rules that change sources
	failed string // how it failed, at the sender
}

// tells reports whether the walk says where the packet comes out.
func (q *probe) tells() bool { return q.trace.Kind != sim.Unknown }

func clearRules(t *testing.T, l *lab, program string) {
	var s strings.Builder
	for _, tb := range []rules.Table{rules.Raw, rules.Mangle, rules.NAT, rules.Filter, rules.Security} {
		fmt.Fprintf(&s, "*%s\n", tb)
		for _, h := range foreignHooks[tb] {
			fmt.Fprintf(&s, ":%s ACCEPT [0:0]\n", h)
		}
		s.WriteString("COMMIT\n")
	}
	if _, err := l.Run(context.Background(), l.Host, s.String(), program+"-restore"); err != nil {
		t.Fatal(err)
	}
}
