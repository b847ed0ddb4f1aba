//go:build linux

// Command firewalld measures how long a host is without the rules while the real
// firewalld reloads, reloads completely, is restarted or is stopped, with both of its
// backends, where the rules stand in its direct.xml, and where they are only live.
//
// In network namespaces of its own a client on the host connects every few
// milliseconds, over IPv4 and IPv6, to a port that the rules redirect. A connection that
// the proxy does not see has escaped. At the same time as many go to a port that the
// rules exclude and a table of nftables redirects, which no firewalld knows of: the
// control, of which none may escape. The rounds are interleaved, and what is compared
// was measured at once: gaps with the duration of what firewalld was told, connections
// that escaped with those that were made meanwhile.
//
// It needs root, and the packages firewalld and dbus.
//
//	go run ./bench/firewalld -rounds 5 -out bench/results/firewalld.txt
package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
)

func main() { crowd.Main("firewalld", "measurements of each change, interleaved", run) }

// The places where the rules are, beside the live ones.
const (
	inFile   = "direct.xml"
	liveOnly = "live only"
)

// change is what firewalld is told. back is whether it loads its rules again then.
type change struct {
	name string
	do   func(*host) error
	back bool
}

var changes = []change{
	{"reload", func(h *host) error { return h.tell("--reload") }, true},
	{"complete reload", func(h *host) error { return h.tell("--complete-reload") }, true},
	{"restart", func(h *host) error { return errors.Join(h.daemon.stop(), h.startFirewalld()) }, true},
	{"stop", func(h *host) error { return h.daemon.stop() }, false},
}

var backends = []string{"nftables", "iptables"}

// row is what is measured again and again.
type row struct {
	backend, place string
	change         change
	samples        []sample
}

// sample is one measurement.
type sample struct {
	took          time.Duration // what firewalld was told
	ours, control stream
}

func run(rounds int, date, out string) error {
	p, err := crowd.NewPage(fmt.Sprintf("go run ./bench/firewalld -rounds %d -out bench/results/firewalld.txt", rounds), date)
	if err != nil {
		return err
	}
	hosts, stop, err := newHosts()
	defer stop()
	if err != nil {
		return err
	}
	var rows []*row
	for _, b := range backends {
		for _, place := range []string{inFile, liveOnly} {
			for _, c := range changes {
				rows = append(rows, &row{backend: b, place: place, change: c})
			}
		}
	}
	for range rounds {
		for _, r := range rows {
			s, err := hosts[r.backend].measure(r.place, r.change)
			if err != nil {
				return fmt.Errorf("%s, rules %s, %s: %w", r.backend, r.place, r.change.name, err)
			}
			r.samples = append(r.samples, s)
		}
	}
	p.Linef("firewalld: %s", hosts[backends[0]].version())
	p.Linef("Rounds: %d of each line, interleaved; medians\n", rounds)
	p.Linef("took: how long firewalld was at it. gap: how long new connections escaped, IPv4 and IPv6 apart, the longer.")
	p.Linef("escaped: of the connections that were made from the beginning to a second after the end, in all rounds. held up:")
	p.Linef("how many of them took more than 100 ms, or got no answer in a second: firewalld drops new ones while it reloads.")
	p.Linef("back: in how many rounds the rules redirected again a second after the end.\n")
	p.Linef("%-9s %-11s %-16s %9s %9s %9s %14s %8s %7s | %17s", "backend", "rules", "change", "took", "gap", "gap/took", "escaped", "held up", "back", "control: escaped")
	for _, r := range rows {
		show(p, r)
	}
	return p.Write(out)
}

// show prints the medians of a row, and counts it as bad where the control escaped,
// rules of the file were not back, or live ones were.
func show(p *crowd.Page, r *row) {
	var took, gaps []time.Duration
	var share, heldUp []float64
	back, escaped, made, lost, controls := 0, 0, 0, 0, 0
	for _, s := range r.samples {
		took, gaps = append(took, s.took), append(gaps, s.ours.gap)
		share = append(share, float64(s.ours.gap)/float64(s.took))
		heldUp = append(heldUp, float64(s.ours.heldUp)/float64(s.ours.made))
		escaped, made = escaped+s.ours.escaped, made+s.ours.made
		lost, controls = lost+s.control.escaped, controls+s.control.made
		if s.ours.back {
			back++
		}
	}
	comes := r.place == inFile && r.change.back
	gap, ratio := "for good", ""
	if comes {
		gap, ratio = fmt.Sprintf("%.0f ms", crowd.Median(gaps).Seconds()*1000), fmt.Sprintf("%.2f", crowd.Median(share))
	}
	p.Linef("%-9s %-11s %-16s %6.0f ms %9s %9s %14s %6.0f %% %7s | %17s", r.backend, r.place, r.change.name, crowd.Median(took).Seconds()*1000,
		gap, ratio, fmt.Sprintf("%d of %d", escaped, made), 100*crowd.Median(heldUp), fmt.Sprintf("%d of %d", back, len(r.samples)), fmt.Sprintf("%d of %d", lost, controls))
	if lost > 0 || comes && back < len(r.samples) || !comes && back > 0 {
		p.Bad++
	}
}
