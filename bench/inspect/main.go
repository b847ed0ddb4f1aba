//go:build linux

// Command inspect measures what a look at an install costs (Runner.Status, in a process
// that runs), against the bare iptables-save and ip6tables-save one after the other, with
// and without rules of others. Everything is interleaved in one run. The machine's own
// rules are never touched.
//
//	go run ./bench/inspect -rounds 20 -out bench/results/inspect.txt
package main

import (
	"context"
	"fmt"
	"log/slog"
	osexec "os/exec"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// services, with two endpoints each, make 20,000 rules.
const services = 2500

func main() { crowd.Main("inspect", "rounds; the medians are over them", run) }

// scene is a host on which it is measured.
type scene struct {
	*crowd.Host
	name  string
	want  exec.State
	saves [2][]time.Duration // bare, and bare again
	looks []time.Duration
	count int // processes of a look
}

func run(rounds int, date, out string) error {
	command := fmt.Sprintf("go run ./bench/inspect -rounds %d", rounds)
	if out != "" {
		command += " -out " + out
	}
	page, err := crowd.NewPage(command, date)
	if err != nil {
		return err
	}
	var scenes []*scene
	defer func() {
		for _, s := range scenes {
			s.Close()
		}
	}()
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		for _, s := range []*scene{
			{name: "no rules of others", want: exec.StateInstalled},
			{name: "20,000 behind ours", want: exec.StateInstalled},
			{name: "20,000, PREROUTING in front", want: exec.StateInstalled},
			{name: "20,000 in front of ours", want: exec.StateDrifted},
		} {
			if s.Host, err = crowd.Bare(b); err != nil {
				return err
			}
			scenes = append(scenes, s)
			if err := s.make(); err != nil {
				return fmt.Errorf("%s, %s: %w", b, s.name, err)
			}
		}
	}
	for round := range rounds {
		for i := range scenes {
			s := scenes[(i+round)%len(scenes)]
			for k := range 3 {
				if err := s.measure((k + round) % 3); err != nil {
					return fmt.Errorf("%s, %s: %w", s.Backend, s.name, err)
				}
			}
		}
	}
	version, err := osexec.Command("iptables-nft-save", "--version").Output()
	if err != nil {
		return err
	}
	page.Linef("iptables: %s\nRounds: %d, interleaved\n", strings.TrimSpace(strings.TrimPrefix(string(version), "iptables-nft-save ")), rounds)
	page.Linef("A look is Runner.Status. Bare are iptables-save and ip6tables-save, one after the other: below that no look\n"+
		"can go that uses them. Medians; the ratio is the median of those of the rounds, noise that of bare to bare.\nThe 20,000 rules are kube-proxy's, of IPv4, for %d services with two endpoints each.\n", services)
	page.Linef("%-15s %-28s %9s %9s %7s %7s %10s", "", "", "look, ms", "bare, ms", "ratio", "noise", "processes")
	for _, s := range scenes {
		page.Linef("%-15s %-28s %9.1f %9.1f %7.2f %7.2f %10d", s.Backend, s.name, ms(crowd.Median(s.looks)), ms(crowd.Median(s.saves[0])),
			crowd.Median(crowd.Ratios(s.looks, s.saves[0])), crowd.Median(crowd.Ratios(s.saves[1], s.saves[0])), s.count)
		if crowd.Median(s.looks)-crowd.Median(s.saves[0]) > 200*time.Millisecond {
			page.Bad++
		}
	}
	return page.Write(out)
}

// make puts the rules in place.
func (s *scene) make() error {
	text := string(tproxytest.Services(services))
	place := func(chains ...string) error {
		for _, c := range chains {
			text = strings.Replace(text, "-A "+c+" -j KUBE", "-I "+c+" 1 -j KUBE", 1)
		}
		return s.Restore(rules.IPv4, text, "--noflush")
	}
	install := func() error {
		plan, err := s.Plan(tproxy.Config{})
		if err == nil {
			_, err = s.Apply(plan)
		}
		return err
	}
	steps := []func() error{install}
	switch s.name {
	case "20,000 behind ours":
		steps = append(steps, func() error { return place() })
	case "20,000, PREROUTING in front":
		steps = append(steps, func() error { return place("PREROUTING") })
	case "20,000 in front of ours":
		steps = append(steps, func() error { return place("PREROUTING", "OUTPUT") })
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// measure looks, or saves.
func (s *scene) measure(what int) error {
	start := time.Now()
	if what < 2 {
		for _, f := range rules.Families() {
			if _, err := s.Save(f); err != nil {
				return err
			}
		}
		s.saves[what] = append(s.saves[what], time.Since(start))
		return nil
	}
	counter := &processes{}
	runner := exec.Runner{Log: slog.New(counter)}
	var status *exec.Status
	err := s.In(s.Lab.Host, func() (err error) { status, err = runner.Status(context.Background()); return err })
	s.looks = append(s.looks, time.Since(start))
	s.count = counter.n
	if err == nil && status.State != s.want {
		err = fmt.Errorf("it is %s: %v %v", status.State, status.Drift, status.Reasons)
	}
	return err
}

// processes counts what the library logs of processes that it started.
type processes struct {
	slog.Handler
	n int
}

func (p *processes) Enabled(context.Context, slog.Level) bool { return true }

func (p *processes) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "ran" {
		p.n++
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
