//go:build linux

// Command upgrade measures what install does to the connections of a host when there
// is an install already: the same again, another config and back, over half of an
// install, with another backend and back, and an uninstall that drains.
//
// In network namespaces of its own, clients connect at full speed, in and out, IPv4
// and IPv6, some of them to ports that every config excludes. A connection that the
// proxy does not see has escaped, an excluded one that it does see was caught, and 40
// redirected connections from before stay open and talk.
//
// The controls are uninstall and install again: there the bench has to see escapes and
// resets. It needs root.
//
//	go run ./bench/upgrade -rounds 20 -out bench/results/upgrade.txt
package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func main() { crowd.Main("upgrade", "how often each change is made", run) }

// host is one with two configs to choose from, and the first with each backend.
type host struct {
	*crowd.Host
	one, other *tproxy.Plan
	by         map[tproxy.Backend]*tproxy.Plan
}

var changes = []struct {
	name    string
	control bool
	step    func(*host) error
}{
	{"the same again", false, func(h *host) error { return h.apply(h.one) }},
	{"another config and back", false, func(h *host) error { return errors.Join(h.apply(h.other), h.apply(h.one)) }},
	{"over half of an install", false, (*host).half},
	{"control: uninstall, install", true, func(h *host) error {
		_, err := h.Remove(exec.RemoveOptions{})
		time.Sleep(crowd.Breath)
		return errors.Join(err, h.apply(h.one))
	}},
}

func run(rounds int, date, out string) error {
	p, err := crowd.NewPage(fmt.Sprintf("go run ./bench/upgrade -rounds %d -out bench/results/upgrade.txt", rounds), date)
	if err != nil {
		return err
	}
	p.Linef("Rounds: %d of each change\n", rounds)
	p.Head("change, backend")
	if err := moves(p, rounds); err != nil {
		return err
	}
	for _, b := range tproxy.Backends() {
		for _, c := range changes {
			r, err := measure(b, rounds, c.step)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", c.name, b, err)
			}
			p.Row(fmt.Sprintf("%-28s%s", c.name, b), r)
			switch {
			case !c.control && !r.Clean():
				p.Bad++
			case c.control && (r.Escaped == 0 || r.Alive == r.Held):
				p.Linef("the control shows nothing: this bench cannot see an escape or a reset")
				p.Bad++
			}
		}
		alive, held, err := drain(b)
		if err != nil {
			return fmt.Errorf("drain, %s: %w", b, err)
		}
		p.Linef("%-28s%-16s %9s %8s %8s %8s %11s", "uninstall --drain", b, "", "", "", "", fmt.Sprintf("%d of %d", alive, held))
		if alive < held {
			p.Bad++
		}
	}
	return p.Write(out)
}

// moves are from each backend to each other one, and back.
func moves(p *crowd.Page, rounds int) error {
	all := tproxy.Backends()
	for i, b := range all {
		for _, to := range all[i+1:] {
			r, err := measure(b, rounds, func(h *host) error { return errors.Join(h.apply(h.by[to]), h.apply(h.one)) })
			if err != nil {
				return fmt.Errorf("%s to %s and back: %w", b, to, err)
			}
			p.Row(fmt.Sprintf("%-28s%s", "to "+to.String()+" and back", b), r)
			if !r.Clean() {
				p.Bad++
			}
		}
	}
	return nil
}

func measure(b tproxy.Backend, rounds int, step func(*host) error) (r crowd.Result, err error) {
	h, err := newHost(b)
	if err != nil {
		return r, err
	}
	defer h.Close()
	return h.Under(rounds, func() error { return step(h) })
}

func newHost(b tproxy.Backend) (*host, error) {
	c, err := crowd.New(b)
	if err != nil {
		return nil, err
	}
	h := &host{Host: c, by: map[tproxy.Backend]*tproxy.Plan{}}
	for _, to := range tproxy.Backends() {
		if err == nil {
			h.by[to], err = h.Plan(tproxy.Config{Backend: to, DNS: tproxy.DNS{CaptureAll: true}})
		}
	}
	h.one = h.by[b]
	if err == nil {
		h.other, err = h.Plan(tproxy.Config{
			Inbound:  tproxy.Inbound{ExcludePorts: rules.MustPorts("8443,9100-9200")},
			Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("3306,5432,6379")},
		})
	}
	if err == nil {
		err = h.apply(h.one)
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

func (h *host) apply(p *tproxy.Plan) error {
	_, err := h.Apply(p)
	return err
}

// half loses what does not let a connection escape, as a kill or a foreign hand would,
// and installs again.
func (h *host) half() error {
	if h.Backend == tproxy.NFTables {
		const t = "flush chain inet " + tproxy.NFTable + " "
		return errors.Join(h.NFT(t+"nat.KUMA_MESH_RECORD\n"+t+"nat.KUMA_MESH_DNS\n"), h.apply(h.one))
	}
	for _, f := range rules.Families() {
		if err := h.Restore(f, "*nat\n:KUMA_MESH_RECORD - [0:0]\n:KUMA_MESH_DNS - [0:0]\nCOMMIT\n", "--noflush"); err != nil {
			return err
		}
	}
	return h.apply(h.one)
}

// drain lets connections that talk end while an uninstall waits for them.
func drain(b tproxy.Backend) (alive, held int, err error) {
	h, err := newHost(b)
	if err != nil {
		return 0, 0, err
	}
	defer h.Close()
	done := make(chan error, 1)
	r, err := h.Talking(func() error {
		go func() {
			report, err := h.Remove(exec.RemoveOptions{Drain: time.Minute})
			if err == nil && report.Cut > 0 {
				err = fmt.Errorf("%d connections were cut", report.Cut)
			}
			done <- err
		}()
		time.Sleep(2 * time.Second)
		return nil
	})
	return r.Alive, r.Held, errors.Join(err, <-done)
}
