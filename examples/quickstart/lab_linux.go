package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	osexec "os/exec"
	"slices"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// enter runs the program again in namespaces of its own; inside is true there.
func enter() (code int, inside bool, err error) {
	// Where they are, and where the PATH of a plain user of Debian does not lead.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		return 1, false, err
	}
	if _, err := osexec.LookPath("ip"); err != nil { // of the lab, not of the library
		return 1, false, err
	}
	return netlab.Reexec()
}

// stage is the lab and what is installed on its host.
type stage struct {
	*page
	lab    *netlab.Lab
	runner exec.Runner
	cfg    tproxy.Config
	host   tproxy.Host
	plan   *tproxy.Plan
	wrong  int
	// others are the programs of iptables by which others have rules there, per family;
	// none where iptables is not installed.
	others    map[rules.Family]string
	processes int // that installs have started
}

func demo(ctx context.Context, p *page) (int, error) {
	// What these say is about the machine, not about the lab's host.
	for _, key := range []string{"SSH_CONNECTION", "KUBERNETES_SERVICE_HOST"} {
		if err := os.Unsetenv(key); err != nil {
			return 1, err
		}
	}
	lab, err := netlab.New(ctx)
	if err != nil {
		return 1, err
	}
	defer lab.Close()
	s := &stage{page: p, lab: lab}
	if err := s.open(ctx); err != nil {
		return 1, err
	}
	before, err := s.hashes(ctx)
	if err != nil {
		return 1, err
	}
	s.heading("The script, and why each rule is there")
	script(p, s.plan)

	if err := s.apply(ctx, s.plan); err != nil {
		return 1, err
	}
	s.heading("Flows: real connections between network namespaces")
	wrong, err := s.flows(ctx)
	if err != nil {
		return 1, err
	}
	s.linef("\n%d flows, %d wrong", len(flows()), len(wrong))
	s.wrong += len(wrong)

	for _, step := range []func(context.Context) error{s.control, s.load} {
		if err := step(ctx); err != nil {
			return 1, err
		}
	}
	if err := s.uninstall(ctx, before); err != nil {
		return 1, err
	}
	if s.wrong > 0 {
		s.linef("\n%s", s.paint(fmt.Sprintf("%d things went wrong", s.wrong), red))
		return 1, nil
	}
	s.linef("\n%s", s.paint("everything went as it should", green))
	return 0, nil
}

// foreign are rules of others, in every table. No flow of the demo meets them, so
// that their counters stay as they are unless somebody touches them.
const foreign = `*raw
[5:300] -A PREROUTING -s %[1]s -j ACCEPT
COMMIT
*mangle
[6:360] -A FORWARD -s %[1]s -j ACCEPT
COMMIT
*nat
[7:420] -A POSTROUTING -s %[1]s -j MASQUERADE
COMMIT
*filter
[8:480] -A INPUT -s %[1]s -j DROP
COMMIT
`

// open puts servers on the lab's hosts, rules of others on the one where we are
// to install, and plans the install there.
func (s *stage) open(ctx context.Context) error {
	any4, any6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	at := netip.AddrPortFrom
	for _, server := range []struct {
		where *netlab.Namespace
		uid   uint32
		name  string
		port  uint16
	}{
		{s.lab.Host, 1000, "web", 80},
		{s.lab.Host, 0, "sshd", 22},
		{s.lab.Host, 1000, "metrics", 9100},
		{s.lab.Client, 0, "site", 443},
		{s.lab.Client, 0, "database", 5432},
	} {
		if _, err := s.lab.ListenTCP(server.where, server.uid, server.name, at(any4, server.port), at(any6, server.port)); err != nil {
			return err
		}
	}
	if _, err := s.lab.ListenUDP(s.lab.Client, 0, "resolver", at(netlab.Resolver4, 53), at(netlab.Resolver6, 53)); err != nil {
		return err
	}
	proxy := netlab.Proxy{UID: proxyUID, In: tproxy.DefaultInboundPort, Out: tproxy.DefaultOutboundPort, DNS: tproxy.DefaultDNSPort}
	if err := proxy.Start(s.lab); err != nil {
		return err
	}
	s.others = map[rules.Family]string{}
	for f, network := range map[rules.Family]string{rules.IPv4: "192.0.2.0/24", rules.IPv6: "2001:db8::/32"} {
		program := map[rules.Family]string{rules.IPv4: "iptables", rules.IPv6: "ip6tables"}[f]
		if _, err := osexec.LookPath(program + "-restore"); err != nil {
			continue
		}
		s.others[f] = program
		if _, err := s.lab.Run(ctx, s.lab.Host, fmt.Sprintf(foreign, network), program+"-restore", "--noflush", "--counters"); err != nil {
			return err
		}
	}
	// /run is this process's own.
	resolvConf := "/run/resolv.conf"
	var text strings.Builder
	for _, a := range nameservers {
		text.WriteString("nameserver " + a.String() + "\n")
	}
	if err := os.WriteFile(resolvConf, []byte(text.String()), 0o644); err != nil {
		return err
	}
	s.cfg = config(resolvConf)
	return s.lab.In(s.lab.Host, func() (err error) {
		if s.host, err = s.runner.Probe(ctx, s.cfg.Needs()); err != nil {
			return err
		}
		s.plan, err = tproxy.Build(s.cfg, s.host)
		return err
	})
}

func (s *stage) apply(ctx context.Context, plan *tproxy.Plan) error {
	return s.lab.In(s.lab.Host, func() error {
		report, err := s.runner.Apply(ctx, plan)
		if err == nil {
			s.processes += report.Processes
		}
		return err
	})
}

// flows sends every flow and prints the table, with the rule that decided in what
// the kernel lists now. It returns those that did not go where they should.
func (s *stage) flows(ctx context.Context) (wrong []flow, err error) {
	live, err := s.live(ctx)
	if err != nil {
		return nil, err
	}
	var rows [][]cell
	for _, f := range flows() {
		want := expected(s.cfg, s.host, f.packet)
		seen, err := s.send(f)
		if err != nil {
			return nil, err
		}
		trace := sim.Walk(live[f.packet.Family()], env, f.packet)
		by := decidedBy(trace)
		says := word(s.cfg, trace.Verdict)
		if says != seen {
			by = fmt.Sprintf("on paper: %s, by %s", says, by)
		}
		if seen != want || says != seen {
			wrong = append(wrong, f)
		}
		rows = append(rows, line(f, want, seen, by))
	}
	s.table([]string{"", "from", "to", "expected", "SEEN", "decided by"}, rows)
	return wrong, nil
}

// send sends a flow and tells in the contract's words where it came out.
func (s *stage) send(f flow) (string, error) {
	from, uid, network := s.lab.Host, f.packet.UID, "tcp"
	if f.packet.Path == sim.In {
		from = s.lab.Client
	}
	if f.packet.Protocol == rules.UDP {
		network = "udp"
	}
	src := netip.AddrPortFrom(f.packet.Source.Addr(), 0)
	seen, err := s.lab.Dial(from, uid, network, src, f.packet.Destination)
	if err != nil {
		return "", fmt.Errorf("%s: %w", f.packet, err)
	}
	if seen.Who == f.server && f.server != "out" {
		return "untouched", nil
	}
	return seen.Who, nil
}

// live is what the kernel lists.
func (s *stage) live(ctx context.Context) (map[rules.Family]rules.Set, error) {
	out := map[rules.Family]rules.Set{}
	err := s.lab.In(s.lab.Host, func() error {
		live, err := s.runner.Live(ctx)
		for _, r := range live.Rules {
			if r.Backend == s.plan.Backend {
				out[r.Family] = r.Set
			}
		}
		return err
	})
	return out, err
}

// control takes out the rule that protects SSH and runs the same table again: a
// table that cannot turn red shows nothing.
func (s *stage) control(ctx context.Context) error {
	s.heading("Control: the rule that protects SSH is taken out, and the same table runs again")
	without := *s.plan
	without.Rules.Chains = slices.Clone(s.plan.Rules.Chains)
	found := false
	for i, c := range without.Rules.Chains {
		j := slices.IndexFunc(c.Rules, func(r rules.Rule) bool { return strings.HasPrefix(r.Why, "SSH") })
		if j < 0 {
			continue
		}
		found = true
		s.linef("%s #%d: %s", c.Name, j+1, c.Rules[j])
		without.Rules.Chains[i].Rules = slices.Delete(slices.Clone(c.Rules), j, j+1)
	}
	if !found {
		return errors.New("there is no rule that protects SSH")
	}
	if err := s.apply(ctx, &without); err != nil {
		return err
	}
	s.linef("")
	wrong, err := s.flows(ctx)
	if err != nil {
		return err
	}
	isSSH := func(f flow) bool { return f.server == "sshd" }
	if len(wrong) == 0 || slices.ContainsFunc(wrong, func(f flow) bool { return !isSSH(f) }) {
		s.wrong++
		s.linef("\n%d lines red: those of SSH should be, and no other", len(wrong))
	} else {
		s.linef("\n%d lines red, as they should be: SSH would have gone to the proxy", len(wrong))
	}
	s.linef("\nInstalled again, which finds what is missing:")
	return s.lab.In(s.lab.Host, func() error {
		report, err := s.runner.Apply(ctx, s.plan)
		if err != nil {
			return err
		}
		for _, f := range report.Families {
			for _, c := range f.Changes {
				s.linef("  %s", c)
			}
		}
		return nil
	})
}

// longLived is how many redirected connections stay open during the re-installs.
const longLived = 40

// load lets one client come in and one go out as fast as they can, while two
// configurations take turns.
func (s *stage) load(ctx context.Context) error {
	s.heading("Re-install under load: two configurations take turns")
	other := s.cfg
	other.Inbound.ExcludePorts = rules.MustPorts("8443,9100-9200")
	other.Outbound.ExcludePorts = rules.MustPorts("3306,5432,6379")
	plan, err := tproxy.Build(other, s.host)
	if err != nil {
		return err
	}
	load, err := s.lab.Load(
		netlab.Stream{Name: "in", Held: longLived / 2, From: s.lab.Client, To: netip.AddrPortFrom(netlab.Host4, 80), Want: "in", Else: "web"},
		netlab.Stream{Name: "out", Held: longLived / 2, From: s.lab.Host, UID: 1000, To: netip.AddrPortFrom(netlab.Internet4, 443), Want: "out", Else: "site"})
	if err != nil {
		return fmt.Errorf("long-lived connections: %w", err)
	}
	const duration = 3 * time.Second
	installs, started := 0, s.processes
	for start := time.Now(); time.Since(start) < duration && err == nil; installs++ {
		next := plan
		if installs%2 == 1 {
			next = s.plan
		}
		err = s.apply(ctx, next)
	}
	tallies, alive, held := load.Stop()
	if err != nil {
		return err
	}
	s.linef("%d re-installs in %s, which started %d processes; a connection that the proxy did not see has escaped", installs, duration, s.processes-started)
	var rows [][]cell
	for _, t := range tallies {
		rows = append(rows, []cell{
			plain(t.Name), plain(fmt.Sprint(t.Right)),
			verdict(fmt.Sprint(t.Wrong), "0"), verdict(fmt.Sprint(t.Broken), "0"),
		})
		if t.Right == 0 || t.Wrong+t.Broken > 0 {
			s.wrong++
		}
	}
	s.table([]string{"direction", "through the proxy", "escaped", "broken"}, rows)
	s.linef("%d of %d connections from before the first of them live on", alive, held)
	if alive < held {
		s.wrong++
	}
	return nil
}

// uninstall takes everything out and compares the tables with what they were.
func (s *stage) uninstall(ctx context.Context, before []hash) error {
	err := s.lab.In(s.lab.Host, func() error {
		_, err := s.runner.Remove(ctx, exec.RemoveOptions{})
		return err
	})
	if err != nil {
		return err
	}
	after, err := s.hashes(ctx)
	if err != nil {
		return err
	}
	s.heading("Uninstalled: every table, with the rules and the counters of others")
	var rows [][]cell
	for i := range max(len(before), len(after)) {
		var b, a hash
		if i < len(before) {
			b = before[i]
		}
		if i < len(after) {
			a = after[i]
		}
		result := cell{"equal", green}
		if a != b {
			result = cell{"DIFFERENT", red}
			s.wrong++
		}
		rows = append(rows, []cell{plain(b.what), plain(b.sum), plain(a.sum), result})
	}
	s.table([]string{"table", "before the install", "after the uninstall", ""}, rows)
	return nil
}

// hash is of the text of one table.
type hash struct{ what, sum string }

// hashes returns one for each table of each family, where iptables shows them, one for
// the addresses of lo, and one for what is ours. Left out is what changes by itself: the time, and the packets that passed a
// built-in chain.
func (s *stage) hashes(ctx context.Context) ([]hash, error) {
	var out []hash
	sum := func(what, text string) {
		out = append(out, hash{what, fmt.Sprintf("%x", sha256.Sum256([]byte(text)))[:16]})
	}
	for _, f := range rules.Families() {
		program, ok := s.others[f]
		if !ok {
			continue
		}
		text, err := s.lab.Run(ctx, s.lab.Host, "", program+"-save", "-c")
		if err != nil {
			return nil, err
		}
		tables := map[string]string{}
		var names []string
		name := ""
		for line := range strings.Lines(text) {
			switch line[0] {
			case '#':
				continue
			case '*':
				name = strings.TrimSpace(line[1:])
				names = append(names, name)
			case ':':
				line, _, _ = strings.Cut(line, " [")
			}
			tables[name] += line
		}
		slices.Sort(names)
		for _, n := range names {
			sum(f.String()+" "+n, tables[n])
		}
	}
	text, err := s.lab.Run(ctx, s.lab.Host, "", "ip", "-oneline", "address", "show", "dev", "lo")
	if err != nil {
		return nil, err
	}
	sum("addresses of lo", text)
	return out, s.lab.In(s.lab.Host, func() error {
		i, err := s.runner.Installed(ctx)
		sum("what is installed", fmt.Sprint(i))
		return err
	})
}
