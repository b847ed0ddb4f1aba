//go:build linux

// Package crowd is a host with a proxy, servers around it and clients at full speed,
// in network namespaces of its own, for the benchmarks that change rules under load.
package crowd

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Ports of servers that every config of a benchmark excludes, in and out, and ports
// that it redirects.
const (
	ExcludedIn, ExcludedOut     = 8080, 8443
	RedirectedIn, RedirectedOut = 80, 443
)

// AppUID is the applications' user.
const AppUID = 1000

// Main is the main function of a benchmark: it reads the flags, enters namespaces
// where that takes another process, and runs it. rounds says what they are.
func Main(name, rounds string, run func(rounds int, date, out string) error) {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	n := flags.Int("rounds", 20, rounds)
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
		err = run(*n, *date, *out)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

// Host is the host in the middle.
type Host struct {
	*netlab.Lab
	Backend tproxy.Backend
	ctx     context.Context
	runner  exec.Runner
}

// Bare makes a host without rules, where nothing listens. Close it.
func Bare(b tproxy.Backend) (*Host, error) {
	h := &Host{Backend: b, ctx: context.Background()}
	var err error
	h.Lab, err = netlab.New(h.ctx)
	return h, err
}

// New makes a host without rules, with everything that listens. Close it.
func New(b tproxy.Backend) (*Host, error) {
	h, err := Bare(b)
	if err != nil {
		return nil, err
	}
	everywhere := func(ports ...uint16) (out []netip.AddrPort) {
		for _, p := range ports {
			out = append(out, netip.AddrPortFrom(netip.IPv4Unspecified(), p), netip.AddrPortFrom(netip.IPv6Unspecified(), p))
		}
		return out
	}
	_, err = h.ListenTCP(h.Lab.Host, AppUID, "app", everywhere(RedirectedIn, ExcludedIn)...)
	_, err2 := h.ListenTCP(h.Client, 0, "remote", everywhere(RedirectedOut, ExcludedOut)...)
	proxy := &netlab.Proxy{UID: tproxy.DefaultProxyUID, In: tproxy.DefaultInboundPort, Out: tproxy.DefaultOutboundPort, DNS: tproxy.DefaultDNSPort}
	if err = errors.Join(err, err2, proxy.Start(h.Lab)); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// Plan builds a config for the host as it is, with its backend unless the config names
// another one.
func (h *Host) Plan(c tproxy.Config) (plan *tproxy.Plan, err error) {
	c.Backend = cmp.Or(c.Backend, h.Backend)
	c.Inbound.ExcludePorts = c.Inbound.ExcludePorts.Union(rules.Port(ExcludedIn))
	c.Outbound.ExcludePorts = c.Outbound.ExcludePorts.Union(rules.Port(ExcludedOut))
	err = h.In(h.Lab.Host, func() error {
		host, err := h.runner.Probe(h.ctx, c.Needs())
		if err == nil {
			plan, err = tproxy.Build(c, host)
		}
		return err
	})
	return plan, err
}

// Apply puts a plan in place.
func (h *Host) Apply(p *tproxy.Plan) (report *exec.Report, err error) {
	err = h.In(h.Lab.Host, func() error {
		report, err = h.runner.Apply(h.ctx, p)
		return err
	})
	return report, err
}

// Remove takes everything of ours out.
func (h *Host) Remove(o exec.RemoveOptions) (report *exec.Report, err error) {
	err = h.In(h.Lab.Host, func() error {
		report, err = h.runner.Remove(h.ctx, o)
		return err
	})
	return report, err
}

// program is one of the backend's, or, for nftables, of iptables-nft: it is what others
// have beside it.
func (h *Host) program(f rules.Family, verb string) string {
	b := h.Backend
	if b == tproxy.NFTables {
		b = tproxy.IPTablesNFT
	}
	name := b.String() + "-" + verb
	if f == rules.IPv6 {
		name = "ip6" + strings.TrimPrefix(name, "ip")
	}
	return name
}

// Save is what the variant's iptables-save prints of a family.
func (h *Host) Save(f rules.Family) (string, error) {
	return h.Run(h.ctx, h.Lab.Host, "", h.program(f, "save"))
}

// Restore feeds a script to the variant's iptables-restore.
func (h *Host) Restore(f rules.Family, script string, args ...string) error {
	_, err := h.Run(h.ctx, h.Lab.Host, script, h.program(f, "restore"), args...)
	return err
}

// NFT feeds commands to nft(8).
func (h *Host) NFT(commands string) error {
	_, err := h.Run(h.ctx, h.Lab.Host, commands, "nft", "-f", "-")
	return err
}

// Found is what stands there of ours or Kuma's.
func (h *Host) Found(f rules.Family) (tproxy.Found, error) {
	text, err := h.Save(f)
	if err != nil {
		return tproxy.Found{}, err
	}
	live, err := rules.ParseSave(f, []byte(text))
	return tproxy.Find(f, live), err
}

// Result is what became of all connections.
type Result struct{ Right, Escaped, Caught, Broken, Alive, Held int }

// Clean reports whether no connection went wrong.
func (r Result) Clean() bool { return r.Escaped+r.Caught+r.Broken == 0 && r.Alive == r.Held }

// held is how many connections from before stay open, in all.
const held = 40

// redirected is how many of the streams go through the proxy; those behind are excluded.
const redirected = 4

func (h *Host) streams() []netlab.Stream {
	in := func(to netip.Addr, port uint16) netlab.Stream {
		return netlab.Stream{Held: held / redirected, From: h.Client, To: netip.AddrPortFrom(to, port), Want: "in", Else: "app"}
	}
	out := func(to netip.Addr, port uint16) netlab.Stream {
		return netlab.Stream{Held: held / redirected, From: h.Lab.Host, UID: AppUID, To: netip.AddrPortFrom(to, port), Want: "out", Else: "remote"}
	}
	streams := []netlab.Stream{
		in(netlab.Host4, RedirectedIn), in(netlab.Host6, RedirectedIn), out(netlab.Internet4, RedirectedOut), out(netlab.Internet6, RedirectedOut),
		in(netlab.Host4, ExcludedIn), out(netlab.Internet6, ExcludedOut),
	}
	for i := range streams {
		if s := &streams[i]; i >= redirected {
			s.Held, s.Want, s.Else = 0, s.Else, s.Want
		}
	}
	return streams
}

// Breath is how long clients connect between two steps: some take less time than a
// connection does.
const Breath = 10 * time.Millisecond

// Under does step rounds times while the clients connect, in and out, IPv4 and IPv6,
// and to ports that are excluded.
func (h *Host) Under(rounds int, step func() error) (r Result, err error) {
	load, err := h.Load(h.streams()...)
	if err != nil {
		return r, err
	}
	for range rounds {
		if err = step(); err != nil {
			break
		}
		time.Sleep(Breath)
	}
	tallies, alive, held := load.Stop()
	r.Alive, r.Held = alive, held
	for i, t := range tallies {
		r.Right += t.Right
		r.Broken += t.Broken
		if i < redirected {
			r.Escaped += t.Wrong
		} else {
			r.Caught += t.Wrong
		}
		if t.Right == 0 && err == nil {
			err = fmt.Errorf("to %s: no connection was right", t.To)
		}
	}
	return r, err
}

// Talking does step while long-lived connections talk: what new ones meet does not
// count.
func (h *Host) Talking(step func() error) (r Result, err error) {
	load, err := h.Load(h.streams()...)
	if err != nil {
		return r, err
	}
	err = step()
	_, r.Alive, r.Held = load.Stop()
	return r, err
}

// Page is a results file: printed as it comes, and written at the end.
type Page struct {
	text bytes.Buffer
	Bad  int // lines that are not as they have to be
}

// NewPage begins a page with the command, the date and the kernel.
func NewPage(command, date string) (*Page, error) {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	p := &Page{}
	p.Linef("Command: %s\nDate: %s\nKernel: %s", command, date, strings.TrimSpace(string(release)))
	return p, err
}

// Linef prints a line.
func (p *Page) Linef(format string, args ...any) {
	fmt.Fprintf(io.MultiWriter(os.Stdout, &p.text), format+"\n", args...)
}

// Head prints the names of the columns that Row fills.
func (p *Page) Head(what string) {
	p.Linef("%-44s %9s %8s %8s %8s %11s", what, "right", "escaped", "caught", "broken", "long-lived")
}

// Row prints a result.
func (p *Page) Row(what string, r Result) {
	p.Linef("%-44s %9d %8d %8d %8d %11s", what, r.Right, r.Escaped, r.Caught, r.Broken, fmt.Sprintf("%d of %d", r.Alive, r.Held))
}

// Write writes the page to a file, if there is a name, and says how many lines are
// bad.
func (p *Page) Write(name string) error {
	if name != "" {
		if err := os.WriteFile(name, p.text.Bytes(), 0o644); err != nil {
			return err
		}
	}
	if p.Bad > 0 {
		return fmt.Errorf("%d lines are not as they have to be", p.Bad)
	}
	return nil
}

// Ratios are round by round: what else the machine did met both.
func Ratios(d, to []time.Duration) []float64 {
	out := make([]float64, len(d))
	for i := range d {
		out[i] = float64(d[i]) / float64(to[i])
	}
	return out
}

// Median is the median of some values.
func Median[T time.Duration | float64](v []T) T {
	v = slices.Sorted(slices.Values(v))
	if len(v)%2 == 1 {
		return v[len(v)/2]
	}
	return (v[len(v)/2-1] + v[len(v)/2]) / 2
}
