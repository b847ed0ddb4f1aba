//go:build linux

// Command dns measures what the redirection of DNS queries costs: dnsperf, as an
// application, against one server, on the direct way and through the rules, over IPv4
// and IPv6, with both variants of iptables, with and without the conntrack zone of
// redirected queries; and whether a query is lost at the rate that the direct way holds.
//
// In each round each way is measured once, in an order that turns; the ratios are round
// by round. Each way has a host of its own, in network namespaces, and a server of its
// own on it. It needs root, and the packages dnsperf and dnsmasq-base.
//
//	go run ./bench/dns -rounds 20 -out bench/results/dns.txt
package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func main() { crowd.Main("dns", "measurements of each way, interleaved", run) }

// names is how many names dnsperf asks for, again and again.
const names = 1000

// length is that of one measurement, in seconds.
const length = 0.5

// way is how queries reach the server.
type way struct {
	name    string
	backend tproxy.Backend // zero: direct
	skip    bool           // no zone split
	tracked bool           // direct, on a host that has conntrack
}

var ways = []way{
	{name: "direct"},
	{name: "direct, conntrack", tracked: true},
	{name: "iptables-nft", backend: tproxy.IPTablesNFT},
	{name: "iptables-nft, one zone", backend: tproxy.IPTablesNFT, skip: true},
	{name: "iptables-legacy", backend: tproxy.IPTablesLegacy},
	{name: "iptables-legacy, one zone", backend: tproxy.IPTablesLegacy, skip: true},
	{name: "direct again"},
}

// The indices of the two that others are compared with.
const direct, tracked = 0, 1

// manners are how a client chooses its source ports.
var manners = []struct {
	name  string
	ports int // 0: one for each query
}{{"1 port", 1}, {"20 ports", 20}, {"a port each", 0}}

// column is a family and a manner.
type column struct {
	family rules.Family
	manner int
}

func columns() (out []column) {
	for _, f := range rules.Families() {
		for m := range manners {
			out = append(out, column{f, m})
		}
	}
	return out
}

func (c column) String() string { return c.family.String() + " " + manners[c.manner].name }

func run(rounds int, date, out string) error {
	versions, err := versions()
	if err != nil {
		return err
	}
	p, err := crowd.NewPage(fmt.Sprintf("go run ./bench/dns -rounds %d -out bench/results/dns.txt", rounds), date)
	if err != nil {
		return err
	}
	b, err := newBench()
	if err != nil {
		return err
	}
	defer b.close()
	rates, err := b.rates(rounds)
	if err != nil {
		return err
	}
	p.Linef(`%s
Rounds: %d of %.1f s for each way, interleaved

The server is dnsmasq, as the proxy's user, at port 15053 of 127.0.0.1 and ::1, and answers by itself. dnsperf is an
application's, with 100 queries in flight at most, less than a socket's buffer holds: what is lost, the way has lost,
and a way that cannot reach a rate is slower and loses nothing.
Direct asks the server where it is, from the host's address, without a rule and without conntrack; "direct, conntrack"
does so where one rule, that lets in what is established, has the kernel track connections. The others ask a
nameserver of resolv.conf, where nothing listens; their packets are the same ones behind the redirection. With 1 or 20
ports nearly every query meets a connection that conntrack knows; "a port each" is a client of our own that opens a
socket for each query, as the C library does, and waits for the answer.
One zone is --skip-dns-conntrack-zone-split. UDP connections leave conntrack after 1 s here, so that ports are new.
`, versions, rounds, length)
	report(p, rates)
	if err := b.lost(p, rounds, rates); err != nil {
		return err
	}
	return p.Write(out)
}

func versions() (string, error) {
	var missing []string
	for _, program := range [][2]string{{"dnsperf", "dnsperf"}, {"dnsmasq", "dnsmasq-base"}} {
		if _, err := osexec.LookPath(program[0]); err != nil {
			missing = append(missing, program[1])
		}
	}
	if missing != nil {
		return "", fmt.Errorf("missing: apt-get install --no-install-recommends %s", strings.Join(missing, " "))
	}
	mask, err := osexec.Command("dnsmasq", "--version").Output()
	if err != nil {
		return "", err
	}
	perf, err := osexec.Command("dnsperf", "-h").CombinedOutput()
	words, perfWords := strings.Fields(string(mask)), strings.Fields(string(perf))
	i := slices.Index(perfWords, "Version")
	if len(words) < 3 || i < 0 || i+1 == len(perfWords) {
		return "", fmt.Errorf("no version in %q, %q: %w", mask, perf, err)
	}
	return fmt.Sprintf("dnsperf: %s, dnsmasq: %s", perfWords[i+1], words[2]), nil
}

// bench is a host for each way.
type bench struct {
	dir   string // names and resolv.conf
	hosts []*host
}

func newBench() (b *bench, err error) {
	b = &bench{}
	if b.dir, err = os.MkdirTemp("", "bench-dns-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			b.close()
		}
	}()
	var text strings.Builder
	for i := range names {
		fmt.Fprintf(&text, "host%d.example A\n", i)
	}
	conf := fmt.Sprintf("nameserver %s\nnameserver %s\n", netlab.Client4, netlab.Client6)
	err = errors.Join(os.Chmod(b.dir, 0o755), os.WriteFile(b.names(), []byte(text.String()), 0o644), os.WriteFile(b.resolvConf(), []byte(conf), 0o644))
	for _, w := range ways {
		if err != nil {
			return nil, err
		}
		if w.name == "direct again" {
			b.hosts = append(b.hosts, b.hosts[0])
			continue
		}
		var h *host
		if h, err = newHost(w, b.resolvConf()); h != nil {
			b.hosts = append(b.hosts, h)
		}
	}
	return b, err
}

func (b *bench) names() string      { return filepath.Join(b.dir, "names") }
func (b *bench) resolvConf() string { return filepath.Join(b.dir, "resolv.conf") }

func (b *bench) close() {
	for i, h := range b.hosts {
		if !slices.Contains(b.hosts[:i], h) {
			h.close()
		}
	}
	_ = os.RemoveAll(b.dir)
}

// rates measures how many queries a second each way answers at most: by column, way and
// round.
func (b *bench) rates(rounds int) (map[column][][]float64, error) {
	out := map[column][][]float64{}
	for _, c := range columns() {
		out[c] = make([][]float64, len(ways))
	}
	for round := range rounds {
		for _, c := range columns() {
			for k := range ways {
				i := (k + round) % len(ways)
				s, err := b.hosts[i].measure(c, 0, b.names())
				if err == nil && s.lost > 0 {
					err = fmt.Errorf("%d of %d queries lost", s.lost, s.sent)
				}
				if err != nil {
					return nil, fmt.Errorf("%s, %s: %w", ways[i].name, c, err)
				}
				out[c][i] = append(out[c][i], s.rate)
			}
		}
		fmt.Fprintf(os.Stderr, "round %d of %d\r", round+1, rounds)
	}
	fmt.Fprintln(os.Stderr)
	return out, nil
}

func report(p *crowd.Page, rates map[column][][]float64) {
	row := func(name string, cell func(c column) string) {
		var line strings.Builder
		fmt.Fprintf(&line, "%-26s", name)
		for _, c := range columns() {
			fmt.Fprintf(&line, " %16s", cell(c))
		}
		p.Linef("%s", &line)
	}
	last := len(ways) - 1
	ratio := func(name string, of, to int) {
		row(name, func(c column) string { return fmt.Sprintf("%.2f", median(ratios(rates[c][of], rates[c][to]))) })
	}
	p.Linef("Queries a second at most, medians")
	row("", column.String)
	for i, w := range ways[:last] {
		row(w.name, func(c column) string { return fmt.Sprintf("%.0f", median(rates[c][i])) })
	}
	for _, to := range []int{direct, tracked} {
		p.Linef("\nRatio to %s, median of the rounds", ways[to].name)
		row("", column.String)
		for i := to + 1; i < last; i++ {
			ratio(ways[i].name, i, to)
		}
	}
	p.Linef("\nNoise: direct again to direct, the middle half of the rounds")
	row("", func(c column) string {
		q := slices.Sorted(slices.Values(ratios(rates[c][last], rates[c][direct])))
		return fmt.Sprintf("%.2f to %.2f", q[len(q)/4], q[len(q)-1-len(q)/4])
	})
	p.Linef("\nThe zone split: rate with it to the rate without, median of the rounds")
	row("", column.String)
	for i, w := range ways {
		if w.backend != 0 && !w.skip {
			ratio(w.name, i, i+1)
		}
	}
}

// lost searches downwards for a rate that the direct way holds without losing a query,
// and has every way answer at that rate and at half of it, with 20 ports.
func (b *bench) lost(p *crowd.Page, rounds int, rates map[column][][]float64) error {
	p.Linef("\nQueries lost at the highest rate that the direct way holds with 0 lost, and at half of it; 20 ports")
	p.Linef("%-26s %-6s %12s %12s %8s %24s", "", "", "asked, 1/s", "queries", "lost", "reached of asked, median")
	for _, f := range rules.Families() {
		c := column{f, 1}
		highest := median(rates[c][direct])
		for held := 0; held < 3; { // three times in a row: the machine has other work
			s, err := b.hosts[direct].measure(c, highest, b.names())
			if err != nil {
				return err
			}
			if held++; s.lost > 0 || s.rate < 0.99*highest {
				held, highest = 0, highest*0.95
			}
		}
		for _, asked := range []float64{highest, highest / 2} {
			if err := b.lostAt(p, rounds, c, asked); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) lostAt(p *crowd.Page, rounds int, c column, asked float64) error {
	ways := ways[:len(ways)-1]
	sent, lost, reached := make([]int, len(ways)), make([]int, len(ways)), make([][]float64, len(ways))
	for round := range rounds {
		for k := range ways {
			i := (k + round) % len(ways)
			s, err := b.hosts[i].measure(c, asked, b.names())
			if err != nil {
				return fmt.Errorf("%s, %s: %w", ways[i].name, c, err)
			}
			sent[i] += s.sent
			lost[i] += s.lost
			reached[i] = append(reached[i], s.rate/asked)
		}
	}
	for i, w := range ways {
		p.Linef("%-26s %-6s %12.0f %12d %8d %24.2f", w.name, c.family, asked, sent[i], lost[i], median(reached[i]))
		if lost[i] > 0 {
			p.Bad++
		}
	}
	return nil
}

// ratios are round by round: what else the machine did met both.
func ratios(d, to []float64) []float64 {
	out := make([]float64, len(d))
	for i := range d {
		out[i] = d[i] / to[i]
	}
	return out
}

func median[T cmp.Ordered](v []T) T { return slices.Sorted(slices.Values(v))[len(v)/2] }

// patience is how long an answer may take. dnsperf counts what takes longer as lost.
const patience = time.Second
