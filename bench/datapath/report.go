//go:build linux

package main

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

const about = `A new connection is a SYN to where nobody listens, and the reset; conntrack has forgotten it when the next one comes.
"Accepted" is the whole: socket, connect, accept, reset, close. An established packet bears one byte, and the next one
its acknowledgement; throughput is that of one stream, 64 KiB at a time; a query goes to a server that answers at once,
from one port or from a new one each time. One thread is both ends, so that what a connection or a query takes is all
that both ends and the kernel do for it. A measurement is the lower quartile of 20 batches: an interrupt only adds.

Out and in are redirected, to the proxy on the same host; without rules they go straight to where it is. Own is the
proxy's own connection to the other host, untouched. First and last are excluded, by the first and the last entry of
the list. N is how many ports, or how many CIDRs of each family (/32, /24 and /20, or /128, /64 and /44, in turn), are
excluded in each direction. "Least" is the least that redirects: one rule for each direction and family, that leaves
the proxy out; with DNS one more. "By hand, nft sets" is the least nft with N in interval sets.
One zone is --skip-dns-conntrack-zone-split.`

// columns are the flows of a measure, for each family.
func columns(m string, flows []string) (out []key) {
	for _, f := range rules.Families() {
		for _, flow := range flows {
			out = append(out, key{m, f, flow})
		}
	}
	return out
}

// row prints a name and a cell for each column.
func row[T any](p *crowd.Page, name string, columns []T, cell func(T) string) {
	var line strings.Builder
	fmt.Fprintf(&line, "%-38s", name)
	for _, c := range columns {
		fmt.Fprintf(&line, " %15s", cell(c))
	}
	p.Linef("%s", strings.TrimRight(line.String(), " "))
}

func head(p *crowd.Page, columns []key) {
	row(p, "", columns, func(k key) string { return k.family.String() + " " + strings.TrimPrefix(k.flow, "query, ") })
}

// median is that of what was measured of a way.
func (b *bench) median(k key, way string) (float64, bool) {
	v := b.samples[k][way]
	if v == nil {
		return 0, false
	}
	return crowd.Median(v), true
}

// ratios are pass by pass: what else the machine did met both.
func (b *bench) ratios(k key, way, to string) []float64 {
	v, base := b.samples[k][way], b.samples[k][to]
	if v == nil || base == nil {
		return nil
	}
	out := make([]float64, min(len(v), len(base)))
	for i := range out { // of one of them there may be several in a pass
		out[i] = v[i*len(v)/len(out)] / base[i*len(base)/len(out)]
	}
	return out
}

// than is how a way compares with another one: the median of the ratios, and the
// difference of a median connection, packet or query in ns.
func (b *bench) than(k key, way, to string) string {
	r := b.ratios(k, way, to)
	switch {
	case r == nil:
		return ""
	case k.measure == streaming:
		return fmt.Sprintf("%.3f", crowd.Median(r))
	}
	base, _ := b.median(k, to)
	return fmt.Sprintf("%.3f %+5.0f", crowd.Median(r), (crowd.Median(r)-1)*base)
}

// quartiles are between what the middle half of some values lies.
func quartiles(v []float64) string {
	v = slices.Sorted(slices.Values(v))
	if v == nil {
		return ""
	}
	return fmt.Sprintf("%.3f to %.3f", v[len(v)/4], v[len(v)-1-len(v)/4])
}

func (b *bench) report(p *crowd.Page) {
	p.Linef("%s", about)
	for _, m := range []struct {
		name, unit string
		flows      []string
		cell       func(ns float64) string
	}{
		{connecting, "ns", lasting, whole},
		{accepting, "connections a second", []string{flowOut, flowIn}, perSecond},
		{packets, "ns", lasting, whole},
		{streaming, "MB a second", lasting, func(ns float64) string { return fmt.Sprintf("%.0f", 1000/ns) }},
		{querying, "queries a second", []string{flowQuery, flowQueryNew}, perSecond},
	} {
		b.section(p, m.name, m.unit, columns(m.name, m.flows), m.cell)
	}
	b.slopes(p)
	b.aims(p)
}

func whole(ns float64) string     { return fmt.Sprintf("%.0f", ns) }
func perSecond(ns float64) string { return fmt.Sprintf("%.0f", 1e9/ns) }

// section prints what was measured of all ways without a list, and of the longest.
func (b *bench) section(p *crowd.Page, name, unit string, columns []key, cell func(float64) string) {
	each := func(want func(way) bool, cell func(key, way) string) {
		head(p, columns)
		for _, h := range b.hosts {
			of := func(k key) string { return cell(k, h.way) }
			if want(h.way) && slices.ContainsFunc(columns, func(k key) bool { return of(k) != "" }) {
				row(p, h.way.name, columns, of)
			}
		}
	}
	twice := func(w way) bool {
		return slices.ContainsFunc(b.hosts, func(h *host) bool { return h.way.name == again(w.name) })
	}
	p.Linef("\n%s, %s: medians, nothing excluded", capital(name), unit)
	each(func(w way) bool { return w.list.n == 0 && !strings.HasSuffix(w.name, again("")) }, func(k key, w way) string {
		if v, ok := b.median(k, w.name); ok {
			return cell(v)
		}
		return ""
	})
	p.Linef("\n%s: its time to that of the least by hand of the same kind, median of the ratios%s", capital(name), differs(name))
	each(func(w way) bool { return w.least != "" && w.few() }, func(k key, w way) string { return b.than(k, w.name, w.least) })
	p.Linef("\nNoise: the same of a second host with the same rules to the first one%s", differs(name))
	each(twice, func(k key, w way) string { return b.than(k, again(w.name), w.name) })
	p.Linef("\nNoise: the middle half of these ratios")
	each(twice, func(k key, w way) string { return quartiles(b.ratios(k, again(w.name), w.name)) })
}

func capital(name string) string { return strings.ToUpper(name[:1]) + name[1:] }

// differs says what else than prints.
func differs(measure string) string {
	if measure == streaming {
		return ""
	}
	return ", and the difference in ns"
}

// line is one whose slope is measured.
type line struct {
	family, list string
	slope        float64 // the aim
	names        []string
	sizes        []float64
}

// lines are those of ours and of sets, for ports and for CIDRs.
func (b *bench) lines() (out []line) {
	for _, zero := range b.hosts {
		w := zero.way
		if w.family == "" || w.list.n > 0 {
			continue
		}
		for _, ports := range []bool{true, false} {
			l := line{w.family, "CIDRs", w.slope, []string{w.name}, []float64{0}}
			if ports {
				l.list = "ports"
			}
			for _, h := range b.hosts {
				if h.way.family == w.family && h.way.list.n > 0 && h.way.list.ports == ports {
					l.names, l.sizes = append(l.names, h.way.name), append(l.sizes, float64(h.way.list.n))
				}
			}
			out = append(out, l)
		}
	}
	return out
}

// fit is the slope of the line with the least squares.
func fit(x, y []float64) float64 {
	var mx, my, up, down float64
	for i := range x {
		mx += x[i] / float64(len(x))
		my += y[i] / float64(len(y))
	}
	for i := range x {
		up += (x[i] - mx) * (y[i] - my)
		down += (x[i] - mx) * (x[i] - mx)
	}
	return up / down
}

// slope is what one more excluded port or prefix costs a flow, in ns, and the times that
// it comes from. Each is the median of the ratios to the shortest list, pass by pass, times
// the lower quartile of that list's: a machine that is busy for some passes is slower in
// all that they measure. A flow that is excluded has no time where nothing is.
func (b *bench) slope(l line, k key) (slope float64, times []string) {
	var x, y []float64
	base, quiet := "", 0.0
	for i, name := range l.names {
		v := b.samples[k][name]
		if times = append(times, ""); v == nil {
			continue
		}
		if base == "" {
			base, quiet = name, slices.Sorted(slices.Values(v))[len(v)/4]
		}
		t := quiet * crowd.Median(b.ratios(k, name, base))
		x, y, times[i] = append(x, l.sizes[i]), append(y, t), whole(t)
	}
	return fit(x, y), times
}

func (b *bench) slopes(p *crowd.Page) {
	lines := b.lines()
	head := func(n float64) string {
		if n < 0 {
			return "one more costs"
		}
		return whole(n)
	}
	for _, m := range measures[:2] {
		for _, flow := range m.flows {
			p.Linef("\n%s, %s, ns by N: median of the ratios to the shortest list, times the lower quartile of that; and the slope by least squares", capital(m.name), flow)
			row(p, "", append(slices.Clone(lines[0].sizes), -1), head)
			for _, f := range rules.Families() {
				for _, l := range lines {
					slope, cells := b.slope(l, key{m.name, f, flow})
					row(p, fmt.Sprintf("%s %s, %s", f, l.family, l.list), append(cells, fmt.Sprintf("%.2f", slope)), func(c string) string { return c })
				}
			}
		}
	}
}

// floor is the noise of a measure: how far a second host's median with the same rules is
// from the first one's at most, as a ratio.
func (b *bench) floor(columns []key) (floor float64) {
	for _, o := range ours {
		for _, k := range columns {
			floor = max(floor, math.Abs(crowd.Median(b.ratios(k, again(o.least), o.least))-1))
		}
	}
	return floor
}

// aims prints what was aimed at, beside what was measured.
func (b *bench) aims(p *crowd.Page) {
	p.Linef("\nAims")
	say := func(what string, columns []key, most float64, digits int, value func(key) float64) {
		met, cells := "met", make([]string, len(columns))
		for i, k := range columns {
			v := value(k)
			if cells[i] = fmt.Sprintf("%s %s %.*f", k.family, k.flow, digits, v); v > most {
				met = "missed"
			}
		}
		p.Linef("%-7s %s, at most %.*f: %s", met, what, digits, most, strings.Join(cells, ", "))
	}
	ends := []string{flowOut, flowIn}
	for _, m := range []string{accepting, connecting} {
		for _, o := range ours {
			say(fmt.Sprintf("%s, %s, to the least (noise %.3f)", o.backend, m, b.floor(columns(m, ends))), columns(m, ends), 1.02, 3,
				func(k key) float64 { return crowd.Median(b.ratios(k, o.backend.String(), o.least)) })
		}
	}
	for _, l := range b.lines() {
		say(fmt.Sprintf("%s, one more of %s, ns", l.family, l.list), columns(connecting, ends), l.slope, 2,
			func(k key) float64 { s, _ := b.slope(l, k); return s })
	}
	floor := b.floor(columns(packets, lasting))
	for _, o := range ours {
		for _, end := range []string{"", ", DNS", ", DNS, one zone"} {
			say(fmt.Sprintf("%s, an established packet, to the least (1 and the noise)", o.backend.String()+end), columns(packets, lasting), 1+floor, 3,
				func(k key) float64 { return crowd.Median(b.ratios(k, o.backend.String()+end, o.least)) })
		}
	}
}
