//go:build linux

// Command moveover measures what moving over from Kuma's own installers costs the
// connections of a host, and what going back does.
//
// In network namespaces of its own, clients connect at full speed, in and out, IPv4
// and IPv6, some of them to ports that both sides exclude, while this module's rules
// take the place of Kuma's and Kuma's are put back, again and again. A connection that
// the proxy does not see has escaped, an excluded one that it does see was caught, and
// 40 redirected connections from before stay open all the time. Kuma's rules and what
// its uninstall does are those of internal/oldkuma.
//
// The control is the way back by Kuma's own install, which takes everything out before
// it puts its rules in: there the bench has to see escapes and resets. It needs root.
//
//	go run ./bench/moveover -rounds 20 -out bench/results/moveover.txt
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func main() {
	flags := flag.NewFlagSet("moveover", flag.ContinueOnError)
	rounds := flags.Int("rounds", 20, "how often the rules change hands, each way")
	out := flags.String("out", "", "write the results to this `file` too")
	date := flags.String("date", time.Now().Format(time.DateOnly), "the `date` in the results")
	if flags.Parse(os.Args[1:]) != nil {
		os.Exit(2)
	}
	code, inside, err := netlab.Reexec()
	if err == nil && !inside {
		os.Exit(code)
	}
	if err == nil {
		err = run(*rounds, *date, *out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "moveover:", err)
		os.Exit(1)
	}
}

const (
	appUID = 1000
	// Ports that Kuma's rules and ours exclude, in and out.
	excludedIn, excludedOut = 8080, 8443
)

// bench is a host with a proxy and servers around it.
type bench struct {
	*netlab.Lab
	ctx     context.Context
	backend tproxy.Backend
	kuma    oldkuma.Installer
	runner  exec.Runner
	plan    *tproxy.Plan
}

func run(rounds int, date, out string) error {
	var page bytes.Buffer
	w := io.MultiWriter(os.Stdout, &page)
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "Command: go run ./bench/moveover -rounds %d -out bench/results/moveover.txt\nDate: %s\nKernel: %s\n", rounds, date, strings.TrimSpace(string(release)))
	fmt.Fprintf(w, "Rounds: %d each\n\n", rounds)
	fmt.Fprintf(w, "ours over Kuma's: this module's install where Kuma's rules stand, and Kuma's rules again in one transaction.\n")
	fmt.Fprintf(w, "Kuma's over ours: the control, Kuma's own install over ours, which flushes first, and ours again.\n\n")
	fmt.Fprintf(w, "%-18s %-16s %-11s %10s %8s %8s %8s %12s\n", "", "variant", "Kuma's", "right", "escaped", "caught", "broken", "long-lived")
	failed := 0
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		for _, i := range oldkuma.Installers() {
			r, err := round(b, i, rounds, (*bench).over)
			if err != nil {
				return err
			}
			r.print(w, "ours over Kuma's", b, i)
			if r.escaped+r.caught+r.broken > 0 || r.alive < r.held {
				failed++
			}
		}
		r, err := round(b, oldkuma.Third, rounds, (*bench).back)
		if err != nil {
			return err
		}
		r.print(w, "Kuma's over ours", b, oldkuma.Third)
		if r.escaped == 0 || r.alive == r.held {
			failed++
			fmt.Fprintln(w, "the control shows nothing: this bench cannot see an escape")
		}
	}
	if out != "" {
		if err := os.WriteFile(out, page.Bytes(), 0o644); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d lines are not as they have to be", failed)
	}
	return nil
}

// result is what became of all connections.
type result struct{ right, escaped, caught, broken, alive, held int }

func (r result) print(w io.Writer, what string, b tproxy.Backend, i oldkuma.Installer) {
	fmt.Fprintf(w, "%-18s %-16s %-11s %10d %8d %8d %8d %12s\n", what, b, i, r.right, r.escaped, r.caught, r.broken, fmt.Sprintf("%d of %d", r.alive, r.held))
}

// round sends the load while step is done again and again.
func round(backend tproxy.Backend, kuma oldkuma.Installer, rounds int, step func(*bench) error) (r result, err error) {
	b := &bench{ctx: context.Background(), backend: backend, kuma: kuma}
	if b.Lab, err = netlab.New(b.ctx); err != nil {
		return r, err
	}
	defer b.Close()
	if err := b.serve(); err != nil {
		return r, err
	}
	if err := b.putKuma(); err != nil {
		return r, err
	}
	if err := b.makePlan(); err != nil {
		return r, err
	}
	load, err := b.Load(b.streams()...)
	if err != nil {
		return r, err
	}
	for range rounds {
		if err = step(b); err != nil {
			break
		}
	}
	tallies, alive, held := load.Stop()
	r.alive, r.held = alive, held
	for _, t := range tallies {
		r.right += t.Right
		r.broken += t.Broken
		if t.Wrong > 0 && strings.HasPrefix(t.Name, "excluded") {
			r.caught += t.Wrong
		} else {
			r.escaped += t.Wrong
		}
		if t.Right == 0 && err == nil {
			err = fmt.Errorf("%s: no connection at all", t.Name)
		}
	}
	return r, err
}

func (b *bench) serve() error {
	everywhere := func(ports ...uint16) (out []netip.AddrPort) {
		for _, p := range ports {
			out = append(out, netip.AddrPortFrom(netip.IPv4Unspecified(), p), netip.AddrPortFrom(netip.IPv6Unspecified(), p))
		}
		return out
	}
	_, err := b.ListenTCP(b.Host, appUID, "app", everywhere(80, excludedIn)...)
	_, err2 := b.ListenTCP(b.Client, 0, "remote", everywhere(443, excludedOut)...)
	proxy := &netlab.Proxy{UID: tproxy.DefaultProxyUID, In: tproxy.DefaultInboundPort, Out: tproxy.DefaultOutboundPort, DNS: tproxy.DefaultDNSPort}
	return errors.Join(err, err2, proxy.Start(b.Lab))
}

func (b *bench) streams() []netlab.Stream {
	in := func(to netip.Addr, port uint16) netlab.Stream {
		return netlab.Stream{From: b.Client, To: netip.AddrPortFrom(to, port), Want: "in", Else: "app"}
	}
	out := func(to netip.Addr, port uint16) netlab.Stream {
		return netlab.Stream{From: b.Host, UID: appUID, To: netip.AddrPortFrom(to, port), Want: "out", Else: "remote"}
	}
	streams := []netlab.Stream{
		in(netlab.Host4, 80), in(netlab.Host6, 80), out(netlab.Internet4, 443), out(netlab.Internet6, 443),
		in(netlab.Host4, excludedIn), out(netlab.Internet6, excludedOut),
	}
	for i := range streams {
		s := &streams[i]
		s.Name, s.Held = fmt.Sprintf("%s %s", s.Want, s.To), 10
		if i >= 4 {
			s.Name, s.Held, s.Want, s.Else = "excluded "+s.Name, 0, s.Else, s.Want
		}
	}
	return streams
}

func (b *bench) options() oldkuma.Options {
	return oldkuma.Options{DNS: true, ExcludeIn: []uint16{excludedIn}, ExcludeOut: []uint16{excludedOut}}
}

func (b *bench) makePlan() error {
	return b.In(b.Host, func() error {
		cfg := tproxy.Config{
			Inbound:  tproxy.Inbound{ExcludePorts: rules.Port(excludedIn)},
			Outbound: tproxy.Outbound{ExcludePorts: rules.Port(excludedOut)},
			DNS:      tproxy.DNS{CaptureAll: true}, Backend: b.backend,
		}
		host, err := b.runner.Probe(b.ctx, cfg.Needs())
		if err == nil {
			b.plan, err = tproxy.Build(cfg, host)
		}
		return err
	})
}

func (b *bench) program(f rules.Family, verb string) string {
	name := b.backend.String() + "-" + verb
	if f == rules.IPv6 {
		name = "ip6" + strings.TrimPrefix(name, "ip")
	}
	return name
}

// apply puts this module's rules in place, with a new record each time.
func (b *bench) apply() error {
	return b.In(b.Host, func() error {
		report, err := b.runner.Apply(b.ctx, b.plan)
		if err == nil && !report.Changed {
			err = errors.New("an install that changed nothing")
		}
		return err
	})
}

// putKuma installs as Kuma's installer does, over nothing.
func (b *bench) putKuma() error {
	for _, f := range rules.Families() {
		if _, err := b.Run(b.ctx, b.Host, oldkuma.Script(b.kuma, f, b.options()), b.program(f, "restore"), "--noflush"); err != nil {
			return err
		}
	}
	return nil
}

// found is what stands there of ours or Kuma's.
func (b *bench) found(f rules.Family) (tproxy.Found, error) {
	text, err := b.Run(b.ctx, b.Host, "", b.program(f, "save"))
	if err != nil {
		return tproxy.Found{}, err
	}
	live, err := rules.ParseSave(f, []byte(text))
	return tproxy.Find(f, live), err
}

// over puts ours in the place of Kuma's, and Kuma's back in one transaction a table.
func (b *bench) over() error {
	kuma := make(map[rules.Family]rules.Set)
	for _, f := range rules.Families() {
		found, err := b.found(f)
		if err == nil && len(found.Kuma) == 0 {
			err = errors.New("no rules of Kuma's")
		}
		if err != nil {
			return err
		}
		kuma[f] = found.Ours
	}
	if err := b.apply(); err != nil {
		return err
	}
	for _, f := range rules.Families() {
		ours, err := b.found(f)
		if err == nil && len(ours.Kuma) > 0 {
			err = fmt.Errorf("rules of Kuma's are left: %v", ours.Kuma)
		}
		if err != nil {
			return err
		}
		if _, err := b.Run(b.ctx, b.Host, string(rules.Transition(f, ours.Ours, kuma[f])), b.program(f, "restore"), "--noflush"); err != nil {
			return err
		}
	}
	return nil
}

// back puts ours in the place of Kuma's, and lets Kuma's own install run over it.
func (b *bench) back() error {
	if err := b.apply(); err != nil {
		return err
	}
	for _, f := range rules.Families() {
		text, err := b.Run(b.ctx, b.Host, "", b.program(f, "save"))
		if err != nil {
			return err
		}
		script, err := oldkuma.Uninstalled(text)
		if err != nil {
			return err
		}
		if _, err := b.Run(b.ctx, b.Host, script, b.program(f, "restore")); err != nil {
			return err
		}
	}
	return b.putKuma()
}
