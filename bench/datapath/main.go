//go:build linux

// Command datapath measures what rules cost in the kernel: a new connection, a packet of
// an established one, the throughput of one stream and a query for a name. Beside ours
// stand no rules, conntrack alone, and the least rules that redirect at all, by hand.
//
// Each set of rules has a host of its own, in network namespaces, and another host at the
// other end of a veth pair. One thread is the client and whoever answers, so that the
// kernel does all that a packet meets in that thread's own system calls: no other
// process has to be woken. In each pass each set is measured, in an order that is drawn anew;
// the ratios are pass by pass. It needs root.
//
//	go run ./bench/datapath -rounds 5 -out bench/results/datapath.txt
package main

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func main() {
	code, inside, err := netlab.Reexec()
	if err == nil && !inside {
		os.Exit(code)
	}
	if err == nil {
		err = run(os.Args[1:])
	}
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "datapath:", err)
		os.Exit(1)
	}
}

// passes is how often each set of rules is measured in a round, at least.
const passes = 6

func run(args []string) error {
	flags := flag.NewFlagSet("datapath", flag.ContinueOnError)
	rounds := flags.Int("rounds", 5, fmt.Sprintf("rounds, of %d measurements each, interleaved", passes))
	sizes := flags.String("n", "10,100,1000,10000", "how many excluded `ports` or addresses, a comma list")
	out := flags.String("out", "", "write the results to this `file` too")
	date := flags.String("date", time.Now().Format(time.DateOnly), "the `date` in the results")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var ns []int
	for s := range strings.SplitSeq(*sizes, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > most {
			return fmt.Errorf("-n %q: accepted is a list of numbers from 1 to %d", s, most)
		}
		ns = append(ns, n)
	}
	slices.Sort(ns)
	p, err := crowd.NewPage(strings.TrimSpace("go run ./bench/datapath "+strings.Join(args, " ")), *date)
	if err != nil {
		return err
	}
	versions, err := versions()
	if err != nil {
		return err
	}
	start := time.Now()
	b, err := newBench(ways(slices.Compact(ns)))
	if err != nil {
		return err
	}
	defer b.close()
	if err := b.measure(*rounds); err != nil {
		return err
	}
	p.Linef("%s\nRounds: %d of %d measurements each, interleaved, in %s\nClock: %s\n", versions, *rounds, passes, time.Since(start).Round(time.Second), b.clock)
	b.report(p)
	return p.Write(*out)
}

// bench is a host for each way.
type bench struct {
	dir   string // of resolv.conf
	hosts []*host
	clock string // its name
	// samples are by what was measured and by way; one for each pass, or thrice.
	samples map[key]map[string][]float64
}

// key is what is measured.
type key struct {
	measure string
	family  rules.Family
	flow    string
}

// newBench makes the hosts, and tries each flow of each of them once.
func newBench(ways []way) (b *bench, err error) {
	b = &bench{samples: map[key]map[string][]float64{}}
	defer func() {
		if err != nil {
			b.close()
		}
	}()
	if b.dir, err = os.MkdirTemp("", "bench-datapath-"); err != nil {
		return nil, err
	}
	for i, w := range ways {
		fmt.Fprintf(os.Stderr, "\rhost %d of %d: %-40s", i+1, len(ways), w.name)
		h, err := newHost(w, b.dir)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
		b.hosts = append(b.hosts, h)
		if err := h.check(); err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
	}
	fmt.Fprintln(os.Stderr)
	var clock func() int64
	err = b.hosts[0].In(b.hosts[0].Host, func() error { clock, b.clock, err = choose(b.hosts[0]); return err })
	for _, h := range b.hosts {
		h.clock = clock
	}
	return b, err
}

func (b *bench) close() {
	for _, h := range b.hosts {
		h.Close()
	}
	_ = os.RemoveAll(b.dir)
}

// measure fills in samples.
func (b *bench) measure(rounds int) error {
	// What is collected while it measures is collected in somebody's time.
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	for round := range rounds {
		for pass := range passes {
			if err := b.pass(round*passes + pass); err != nil {
				return err
			}
			fmt.Fprintf(os.Stderr, "\rround %d of %d, %d of %d", round+1, rounds, pass+1, passes)
		}
	}
	fmt.Fprintln(os.Stderr)
	return nil
}

// pass measures everything once. Whose turn it is is drawn each time: behind a list of
// 10,000, which fills the caches, a host is 4 % slower than behind another one.
func (b *bench) pass(turn int) error {
	order := rand.New(rand.NewPCG(0, uint64(turn)))
	for _, m := range measures {
		for _, f := range rules.Families() {
			for _, name := range m.flows {
				turns := b.turns()
				order.Shuffle(len(turns), func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })
				for _, h := range turns {
					flow, ok := h.flow(f, name)
					if !ok || m.few && !h.way.few() {
						continue
					}
					v, err := h.sample(m, flow)
					if err != nil {
						return fmt.Errorf("%s, %s, %s, %s: %w", h.way.name, m.name, f, name, err)
					}
					b.add(key{m.name, f, name}, h.way.name, v)
				}
			}
		}
	}
	return nil
}

// thrice is how often a pass measures what has no list: there the aims are a matter of 2 %.
const thrice = 3

// turns are the hosts, as often as a pass measures them.
func (b *bench) turns() (out []*host) {
	for _, h := range b.hosts {
		n := thrice
		if h.way.list.n > 0 {
			n = 1
		}
		out = append(out, slices.Repeat([]*host{h}, n)...)
	}
	return out
}

func (b *bench) add(k key, way string, v float64) {
	if b.samples[k] == nil {
		b.samples[k] = map[string][]float64{}
	}
	b.samples[k][way] = append(b.samples[k][way], v)
}
