package main

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func TestFit(t *testing.T) {
	x := []float64{0, 10, 100, 1000, 10000}
	for _, slope := range []float64{0, 0.2, 4.1, -1} {
		y := make([]float64, len(x))
		for i := range x {
			y[i] = 6700 + slope*x[i]
		}
		if got := fit(x, y); math.Abs(got-slope) > 1e-9 {
			t.Errorf("%f, want %f", got, slope)
		}
	}
}

func TestComplete(t *testing.T) {
	for name, test := range map[string]struct {
		busy, wall []float64
		want       bool
	}{
		"the same":             {[]float64{100}, []float64{101}, true},
		"interrupted but once": {[]float64{100, 100, 100}, []float64{300, 102, 180}, true},
		"half is not counted":  {[]float64{50, 52, 51}, []float64{100, 101, 200}, false},
	} {
		if got := complete(test.busy, test.wall); got != test.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

// made is a bench whose samples are known: each way takes 10,000 ns, ours 1 % longer, 3 ns
// longer for each entry of its list, and the last passes twice as long as the first.
func made() *bench {
	b := &bench{samples: map[key]map[string][]float64{}}
	for _, w := range ways([]int{10, most}) {
		h := &host{Lab: &netlab.Lab{}, way: w}
		b.hosts = append(b.hosts, h)
		for _, m := range measures {
			for _, f := range rules.Families() {
				for _, name := range m.flows {
					if _, ok := h.flow(f, name); !ok || m.few && !w.few() {
						continue
					}
					v := 10000.0
					if w.slope > 0 && w.family != sets {
						v = 10100 + 3*float64(w.list.n)
					}
					n := thrice
					if w.list.n > 0 {
						n = 1
					}
					for i := range 10 * n {
						b.add(key{m.name, f, name}, w.name, v*float64(1+i/n/7))
					}
				}
			}
		}
	}
	return b
}

func TestReport(t *testing.T) {
	p, err := crowd.NewPage("go run ./bench/datapath", "2026-01-02")
	if err != nil {
		t.Fatal(err)
	}
	made().report(p)
	file := filepath.Join(t.TempDir(), "page")
	if err := p.Write(file); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	page := string(text)
	squeezed := strings.Join(strings.Fields(page), " ")
	for _, want := range []string{
		"A new connection, ns: medians, nothing excluded",
		"no rules 10000 10000 10000 10000 10000 10000 conntrack alone",
		"iptables-nft 1.010 +100 1.010 +100",
		"least nft 1.000 +0",
		"least nft 1.000 to 1.000",
		"IPv4 iptables-nft, ports 10100 10130 40100 3.00",
		"IPv6 iptables-legacy, CIDRs 10130 40100 3.00", // excluded: nothing where the list is empty
		"no rules 100000 100000 100000 100000",         // connections a second
		"met iptables-nft, a new connection, to the least (noise 0.000), at most 1.020: IPv4 out 1.010, IPv4 in 1.010",
		"met iptables-nft, one more of ports, ns, at most 4.20: IPv4 out 3.00",
		"missed iptables-legacy, one more of CIDRs, ns, at most 2.20: IPv4 out 3.00",
		"met by hand, nft sets, one more of CIDRs, ns, at most 0.20: IPv4 out 0.00",
		"missed iptables-nft, an established packet, to the least (1 and the noise), at most 1.000: IPv4 out 1.010",
	} {
		if !strings.Contains(squeezed, want) {
			t.Errorf("no %q", want)
		}
	}
	for _, no := range []string{"NaN", "Inf", ", again"} {
		if strings.Contains(page, no) {
			t.Errorf("there is %q", no)
		}
	}
	if t.Failed() {
		t.Log(page)
	}
}

// Each way has a name of its own, and what it is compared with exists, with a second host
// that tells the noise.
func TestWays(t *testing.T) {
	names := map[string]bool{}
	all := ways([]int{1, 7})
	for _, w := range all {
		if names[w.name] {
			t.Errorf("two are %q", w.name)
		}
		names[w.name] = true
	}
	for _, w := range all {
		if w.least != "" && !names[w.least] {
			t.Errorf("%q is compared with %q, which is none", w.name, w.least)
		}
	}
	for _, o := range ours {
		if !names[again(o.least)] || !names[o.backend.String()+", 7 CIDRs"] || o.slope <= 0 {
			t.Errorf("%+v", o)
		}
	}
}
