package differential

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// flow is a flow that the lab can really have.
type flow struct {
	packet sim.Packet
	// server is who is there where it is sent to.
	server string
}

// trial is a config on a host, with one backend.
type trial struct {
	seed    int
	backend tproxy.Backend
	cfg     tproxy.Config
	host    tproxy.Host // what the lab's host is made to be
	packets []sim.Packet

	// The controls tamper with the plan before it is installed, and with the
	// kernel's rules afterwards.
	plan   func(*tproxy.Plan)
	kernel func(*lab, *tproxy.Plan) error
}

// draw draws a config, a host for it and n packets; false says that the config
// is refused there.
func draw(seed, n int) (t trial, ok bool) {
	t = trial{seed: seed, cfg: tproxytest.Configs().Example(seed)}
	h := tproxytest.Hosts(t.cfg).Example(seed)
	// What a lab cannot have: two resolvers at one address, no IPv6 at all, a pod
	// by its environment, a server of SSH.
	t.host = tproxy.Host{PassthroughAddress: h.PassthroughAddress}
	// Users named by a number too: iptables takes "5678" for a name first.
	t.host.Users = h.Users
	for i, a := range h.Nameservers {
		if !slices.Contains(h.Nameservers[:i], a) {
			t.host.Nameservers = append(t.host.Nameservers, a)
		}
	}
	for i, r := range h.LocalResolvers {
		if !slices.ContainsFunc(h.LocalResolvers[:i], func(o tproxy.LocalResolver) bool { return o.Address == r.Address }) {
			r.Untold, r.Behind = "", "" // its processes can all be seen
			t.host.LocalResolvers = append(t.host.LocalResolvers, r)
		}
	}
	if _, err := tproxy.Build(t.cfg, t.host); err != nil {
		return t, false
	}
	t.drawPackets(n)
	return t, true
}

// drawPackets draws packets and makes of them such as the lab can send.
func (t *trial) drawPackets(n int) {
	packets := tproxytest.Packets(t.cfg, t.host, env)
	used := map[connection]bool{}
	for i := 0; len(t.packets) < n && i < 4*n; i++ {
		p, ok := t.real(packets.Example(t.seed*10000+i), i)
		// Two flows of one UDP socket would be one to conntrack.
		if c := (connection{p.Protocol, p.Source, p.Destination}); ok && (p.Source.Port() == 0 || !used[c]) {
			used[c] = true
			t.packets = append(t.packets, p)
		}
	}
}

func (t *trial) passthrough(v6 bool) bool {
	return !v6 || t.host.PassthroughAddress || t.cfg.IPFamilyMode != tproxy.IPv4Only
}

// real makes a packet one that can be sent: addresses that exist, and the
// source's port 0 where any will do, for the port matters of DNS alone.
func (t *trial) real(p sim.Packet, i int) (sim.Packet, bool) {
	if p.Protocol != rules.TCP && p.Protocol != rules.UDP || p.State == sim.Established {
		return p, false
	}
	from, to := p.Source.Addr(), p.Destination.Addr()
	f := index(to)
	through := "eth0"
	switch {
	case p.Path == sim.Out:
		local := env.IsLocal(to)
		switch {
		case to == passing[1] && !t.passthrough(true), to.String() == "127.0.0.0", to.String() == "127.255.255.255":
			to = loopbacks[f]
		case local:
		case i%8 == 0:
			to, through = containers[f], "br0"
		case !remote(to):
			to = []netip.Addr{netlab.Internet4, netlab.Internet6}[f]
		}
		if from.String() == "127.0.0.0" || from.String() == "127.255.255.255" || !env.IsLocal(from) || from == passing[1] && !t.passthrough(true) ||
			!local && (from.IsLoopback() || from == passing[f]) {
			from = t.own(f, i, local)
		}
		if local {
			through = "lo"
		}
	case p.Path == sim.Forwarded && i%3 == 0:
		if from, to, through = to, containers[f], "br0"; !remote(from) {
			from = clients[f]
		}
	case p.Path == sim.Forwarded:
		if from = containers[f]; !remote(to) {
			to = clients[f]
		}
	case i%5 == 0:
		from, through = containers[f], "br0"
	case !remote(from):
		from = clients[f]
	}
	if p.OutInterface != "" {
		p.OutInterface = through
	}
	if p.InInterface != "" {
		p.InInterface = "eth0"
		if from == containers[f] {
			p.InInterface = "br0"
		}
	}
	sport := uint16(0)
	if special := p.Source.Port(); p.Protocol == rules.UDP && (special == 53 || special == t.cfg.DNSPort()) {
		sport = special
	}
	// The answer of a server on another port to one who asks it from port 53 is UDP
	// to port 53, for which raw has no state to tell it from a query: with a zone
	// for queries it is redirected (README.md, Limits).
	if split := t.cfg.DNS.On() && !t.cfg.DNS.SkipConntrackZoneSplit; split && sport == 53 && env.IsLocal(to) && p.Destination.Port() != 53 {
		sport = 0
	}
	if p.State == sim.Midstream && !t.host.PassthroughAddress && (from == passing[1] || to == passing[1]) {
		p.State = sim.New // the install brings the address
	}
	p.Source, p.Destination = netip.AddrPortFrom(from, sport), netip.AddrPortFrom(to, p.Destination.Port())
	return p, true
}

// own picks an address of the host to send from; the kernel lets loopback and
// passthrough addresses send to the host alone.
func (t *trial) own(f, i int, local bool) netip.Addr {
	var list []netip.Addr
	for _, p := range env.Local {
		if index(p.Addr()) == f {
			list = append(list, p.Addr())
		}
	}
	if local {
		list = append(list, loopbacks[f])
		if t.passthrough(f == 1) {
			list = append(list, passing[f], passing[f])
		}
	}
	return list[i%len(list)]
}

// problem is a flow about which not all are of one mind.
type problem struct {
	flow flow
	row  string
	what string
}

// outcome is what a trial found.
type outcome struct {
	rows, kinds map[string]int
	flows       int
	retries     int
	problems    []problem
	plan        *tproxy.Plan
}

// run installs the config in a fresh lab, sends the flows, and uninstalls. The
// error is that of the lab or of the library.
func (t *trial) run(ctx context.Context, dir string) (o outcome, err error) {
	o = outcome{rows: map[string]int{}, kinds: map[string]int{}}
	l, err := newLab(ctx)
	if err != nil {
		return o, fmt.Errorf("lab: %w", err)
	}
	defer l.close()
	cfg := t.cfg
	cfg.Backend, cfg.DNS.ResolvConf = t.backend, filepath.Join(dir, "resolv.conf")
	if err := l.become(ctx, t.host, cfg.DNS.ResolvConf); err != nil {
		return o, fmt.Errorf("lab: %w", err)
	}
	var runner exec.Runner
	err = l.In(l.Host, func() error {
		h, err := runner.Probe(ctx, cfg.Needs())
		if err == nil {
			o.plan, err = tproxy.Build(cfg, h)
		}
		return err
	})
	if err != nil {
		return o, err
	}
	if t.plan != nil {
		t.plan(o.plan)
	}
	flows, err := t.prepare(l, o.plan)
	if err != nil {
		return o, fmt.Errorf("lab: %w", err)
	}
	saw := make([]seen, len(flows))
	// A flow from before the install: only a packet in the midst of it is seen.
	before := map[int]net.Conn{}
	for i, f := range flows {
		if f.packet.State == sim.Midstream {
			c, err := l.dial(l.namespaceOf(f.packet), f.packet)
			for try := 0; try < 2 && err != nil; try++ {
				o.retries++
				c, err = l.dial(l.namespaceOf(f.packet), f.packet)
			}
			if err != nil {
				return o, fmt.Errorf("before the install: %s: %w", f.packet, err)
			}
			before[i] = c
		}
	}
	err = l.In(l.Host, func() error { _, err := runner.Apply(ctx, o.plan); return err })
	if err == nil && t.kernel != nil {
		err = t.kernel(l, o.plan)
	}
	if err != nil {
		return o, err
	}
	listed, err := l.listed(ctx, o.plan)
	if err != nil {
		return o, err
	}
	var mu sync.Mutex
	var senders sync.WaitGroup
	next := make(chan int)
	for range 16 {
		senders.Go(func() {
			for i := range next {
				if c := before[i]; c != nil {
					saw[i] = ask(c)
					continue
				}
				f := &flows[i]
				for range 2 {
					c, err := l.dial(l.namespaceOf(f.packet), f.packet)
					if err != nil {
						saw[i] = failed(err)
					} else {
						saw[i] = ask(c)
					}
					if saw[i].who != netlab.Timeout {
						break
					}
					// A machine under load: rules that are wrong are wrong again.
					mu.Lock()
					o.retries++
					mu.Unlock()
				}
			}
		})
	}
	for i := range flows {
		next <- i
	}
	close(next)
	senders.Wait()
	entries, tracked, err := l.conntrack()
	if err != nil {
		return o, err
	}
	for i, f := range flows {
		if !tracked {
			entries = nil
		}
		saw[i].tracked = entries[connection{f.packet.Protocol, f.packet.Source, f.packet.Destination}]
		t.judge(&o, f, saw[i], tracked, listed)
	}
	return o, l.In(l.Host, func() error { _, err := runner.Remove(ctx, exec.RemoveOptions{}); return err })
}

// namespaceOf is where the packet is sent.
func (l *lab) namespaceOf(p sim.Packet) *netlab.Namespace {
	switch from := p.Source.Addr(); {
	case p.Path == sim.Out:
		return l.Host
	case from == containers[index(from)]:
		return l.Container
	}
	return l.Client
}

// prepare starts the proxy and a server wherever a packet is sent to, and gives
// each packet a source port of its own, which nobody listens at.
func (t *trial) prepare(l *lab, plan *tproxy.Plan) (flows []flow, err error) {
	uid := plan.ProxyUIDs.Ranges()[0].First // its answers to DNS are known by it
	wild := [2]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	for f := range wild {
		err = errors.Join(err,
			l.serve(endpoint{l.Host, "tcp", netip.AddrPortFrom(wild[f], t.cfg.InboundPort())}, uid, "in"),
			l.serve(endpoint{l.Host, "tcp", netip.AddrPortFrom(wild[f], t.cfg.OutboundPort())}, uid, "out"),
			l.serve(endpoint{l.Host, "tcp", netip.AddrPortFrom(wild[f], t.cfg.DNSPort())}, uid, "dns"),
			// Where REDIRECT in OUTPUT sends to (net/netfilter/nf_nat_redirect.c).
			l.serve(endpoint{l.Host, "udp", netip.AddrPortFrom(loopbacks[f], t.cfg.DNSPort())}, uid, "dns"))
	}
	taken := map[uint16]bool{}
	for _, p := range t.packets {
		to := p.Destination
		e := endpoint{l.Client, "tcp", netip.AddrPortFrom(wild[index(to.Addr())], to.Port())}
		name := "remote"
		switch {
		case env.IsLocal(to.Addr()):
			e.n, name = l.Host, "app"
		case to.Addr() == containers[index(to.Addr())]:
			e.n, name = l.Container, "container"
		}
		if p.Protocol == rules.UDP {
			e.network, e.at = "udp", to
		}
		err = errors.Join(err, l.serve(e, 1000, name))
		taken[to.Port()] = true
		flows = append(flows, flow{packet: p, server: l.servers[e]})
	}
	for e := range l.servers {
		taken[e.at.Port()] = true
	}
	port := uint16(30000)
	sockets := map[netip.AddrPort]bool{}
	for i := range flows {
		p := &flows[i].packet
		_, server := l.servers[endpoint{l.namespaceOf(*p), "udp", p.Source}]
		if p.Source.Port() == 0 || server || sockets[p.Source] {
			for port++; taken[port]; port++ {
			}
			p.Source = netip.AddrPortFrom(p.Source.Addr(), port)
		}
		sockets[p.Source] = true
	}
	return flows, err
}

// listed is what the kernel lists.
func (l *lab) listed(ctx context.Context, plan *tproxy.Plan) (map[rules.Family]rules.Set, error) {
	out := map[rules.Family]rules.Set{}
	if plan.Backend == tproxy.NFTables {
		return out, l.In(l.Host, func() error {
			live, err := new(exec.Runner).Live(ctx)
			for _, r := range live.Rules {
				if r.Backend == tproxy.NFTables {
					out[r.Family] = r.Set
				}
			}
			return err
		})
	}
	for _, f := range plan.Families {
		name := plan.Backend.String() + "-save"
		if f == rules.IPv6 {
			name = "ip6" + strings.TrimPrefix(name, "ip")
		}
		text, err := l.Run(ctx, l.Host, "", name)
		if err != nil {
			return nil, err
		}
		if out[f], err = rules.ParseSave(f, []byte(text)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// judge compares what the contract, the walks and the kernel say of a flow.
func (t *trial) judge(o *outcome, f flow, s seen, tracked bool, listed map[rules.Family]rules.Set) {
	p := f.packet
	row, want := tproxytest.Expect(t.cfg, t.host, env, p)
	o.flows++
	o.rows[row]++
	for _, k := range kinds(o.plan, row, p) {
		o.kinds[k]++
	}
	var wrong []string
	if got := sim.Walk(o.plan.Rules, env, p).Verdict; got != want {
		wrong = append(wrong, fmt.Sprintf("the walk through the plan says %s", got))
	}
	if got := sim.Walk(listed[p.Family()], env, p).Verdict; got != want {
		wrong = append(wrong, fmt.Sprintf("the walk through what the kernel lists says %s", got))
	}
	if what := t.differs(f, s, want, tracked); what != "" {
		wrong = append(wrong, what)
	}
	if wrong != nil {
		o.problems = append(o.problems, problem{f, row, fmt.Sprintf("row %s wants %s; %s. Seen: %s", row, want, strings.Join(wrong, "; "), s)})
	}
}

// differs says in what the kernel did something else than is wanted.
func (t *trial) differs(f flow, s seen, want sim.Verdict, tracked bool) string {
	p := f.packet
	listener := map[uint16]string{t.cfg.InboundPort(): "in", t.cfg.OutboundPort(): "out", t.cfg.DNSPort(): "dns"}
	dst := p.Destination
	switch want.Kind {
	case sim.Refused:
		if s.who != netlab.Refused {
			return "the kernel did not refuse it"
		}
		return ""
	case sim.Untouched:
		if s.who != f.server || s.local != dst || s.original != dst {
			return fmt.Sprintf("the kernel did not bring it to %s", f.server)
		}
	case sim.Redirected:
		if s.who != listener[want.Port] || s.local.Port() != want.Port || p.Protocol == rules.TCP && s.original != dst {
			return fmt.Sprintf("the kernel did not bring it to %s", listener[want.Port])
		}
	default:
		return "there is no such verdict here"
	}
	// Where no rule takes conntrack there is no entry, and the zone is 0.
	entry := s.tracked.to.IsValid()
	switch {
	case s.from != p.Source:
		return "the kernel changed its source"
	case tracked && !entry && (want.Kind == sim.Redirected || want.Zone != 0):
		return "conntrack does not know it"
	case entry && s.tracked.zone != want.Zone:
		return "conntrack has it in another zone"
	case entry && s.tracked.to != s.local:
		return "conntrack sends it elsewhere"
	}
	return ""
}

// kinds are the words that the table of kinds counts a flow by.
func kinds(plan *tproxy.Plan, row string, p sim.Packet) []string {
	out := []string{map[rules.Protocol]string{rules.TCP: "TCP", rules.UDP: "UDP"}[p.Protocol], p.Family().String()}
	from, to := p.Source.Addr(), p.Destination.Addr()
	container := from == containers[index(from)] || to == containers[index(to)]
	switch {
	case p.Path == sim.Forwarded:
		return append(out, "forwarded")
	case p.Path == sim.In && container:
		return append(out, "from a container to this host")
	case p.Path == sim.In:
		return append(out, "from outside")
	case plan.ProxyUIDs.Contains(p.UID):
		out = append(out, "by the proxy")
	case row == "B7" || row == "C2":
		out = append(out, "by an excluded user, or to an excluded address of DNS")
	case row == "C2a":
		out = append(out, "by a local resolver")
	default:
		out = append(out, "by an application")
	}
	if env.IsLocal(to) {
		out = append(out, "over lo")
	}
	if from == to {
		out = append(out, "from an address to itself")
	}
	if from == passing[index(from)] {
		out = append(out, "from the passthrough address")
	}
	if to == passing[index(to)] {
		out = append(out, "to the passthrough address")
	}
	return out
}

// report writes the first problems, with all that it takes to see one again.
func (t *trial) report(o outcome) string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d, %s: %d of %d flows\nconfig: %#v\nhost: %#v\n", t.seed, t.backend, len(o.problems), o.flows, t.cfg, t.host)
	families := map[rules.Family]bool{}
	for i, p := range o.problems {
		if i == 5 {
			fmt.Fprintf(&b, "and %d more\n", len(o.problems)-i)
			break
		}
		families[p.flow.packet.Family()] = true
		fmt.Fprintf(&b, "\n%s\n%s", p.what, sim.Walk(o.plan.Rules, env, p.flow.packet))
	}
	for _, f := range slices.Sorted(maps.Keys(families)) {
		fmt.Fprintf(&b, "\n%s script:\n%s", f, o.plan.Rules.IPTables(f))
	}
	fmt.Fprintf(&b, "\nagain: go test ./tproxy/exec/differential -run Agrees -args -seed %d\n", t.seed)
	return b.String()
}
