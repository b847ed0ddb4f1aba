//go:build linux

// Command moveover measures what moving over from Kuma's own installers costs the
// connections of a host, and what going back does.
//
// In network namespaces of its own, clients connect at full speed, in and out, IPv4
// and IPv6, some of them to ports that both sides exclude, while this module's rules
// take the place of Kuma's and Kuma's are put back, again and again. A connection that
// the proxy does not see has escaped, an excluded one that it does see was caught, and
// 40 redirected connections from before stay open and talk. Kuma's rules and what its
// uninstall does are those of internal/oldkuma.
//
// The control is the way back by Kuma's own install, which takes everything out before
// it puts its rules in: there the bench has to see escapes and resets. It needs root.
//
//	go run ./bench/moveover -rounds 20 -out bench/results/moveover.txt
package main

import (
	"errors"
	"fmt"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func main() { crowd.Main("moveover", "how often the rules change hands, each way", run) }

func run(rounds int, date, out string) error {
	p, err := crowd.NewPage(fmt.Sprintf("go run ./bench/moveover -rounds %d -out bench/results/moveover.txt", rounds), date)
	if err != nil {
		return err
	}
	p.Linef("Rounds: %d each\n", rounds)
	p.Linef("ours over Kuma's: this module's install where Kuma's rules stand, and Kuma's rules again in one transaction.")
	p.Linef("Kuma's over ours: the control, Kuma's own install over ours, which flushes first, and ours again.\n")
	p.Head("variant, installer of Kuma's")
	for _, b := range tproxy.Backends() {
		for _, i := range oldkuma.Installers() {
			r, err := change(b, i, rounds, (*host).over)
			if err != nil {
				return err
			}
			p.Row(fmt.Sprintf("ours over Kuma's  %-16s%s", b, i), r)
			if !r.Clean() {
				p.Bad++
			}
		}
		r, err := change(b, oldkuma.Third, rounds, (*host).back)
		if err != nil {
			return err
		}
		p.Row(fmt.Sprintf("Kuma's over ours  %-16s%s", b, oldkuma.Third), r)
		if r.Escaped == 0 || r.Alive == r.Held {
			p.Linef("the control shows nothing: this bench cannot see an escape or a reset")
			p.Bad++
		}
	}
	return p.Write(out)
}

// host is one that Kuma's installer has been at.
type host struct {
	*crowd.Host
	kuma oldkuma.Installer
	plan *tproxy.Plan
}

// change does step again and again under load.
func change(b tproxy.Backend, kuma oldkuma.Installer, rounds int, step func(*host) error) (r crowd.Result, err error) {
	h := &host{kuma: kuma}
	if h.Host, err = crowd.New(b); err != nil {
		return r, err
	}
	defer h.Close()
	if err = h.putKuma(); err == nil {
		h.plan, err = h.Plan(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
	}
	if err != nil {
		return r, err
	}
	return h.Under(rounds, func() error { return step(h) })
}

func (h *host) apply() error {
	report, err := h.Apply(h.plan)
	if err == nil && !report.Changed {
		err = errors.New("an install that changed nothing")
	}
	return err
}

// putKuma installs as Kuma's installer does, over nothing.
func (h *host) putKuma() error {
	o := oldkuma.Options{DNS: true, ExcludeIn: []uint16{crowd.ExcludedIn}, ExcludeOut: []uint16{crowd.ExcludedOut}}
	for _, f := range rules.Families() {
		if err := h.Restore(f, oldkuma.Script(h.kuma, f, o), "--noflush"); err != nil {
			return err
		}
	}
	return nil
}

// over puts ours in the place of Kuma's, and Kuma's back in one transaction a table.
func (h *host) over() error {
	kuma := make(map[rules.Family]rules.Set)
	for _, f := range rules.Families() {
		found, err := h.Found(f)
		if err == nil && len(found.Kuma) == 0 {
			err = errors.New("no rules of Kuma's")
		}
		if err != nil {
			return err
		}
		kuma[f] = found.Ours
	}
	if err := h.apply(); err != nil {
		return err
	}
	for _, f := range rules.Families() {
		ours, err := h.Found(f)
		if err == nil && len(ours.Kuma) > 0 {
			err = fmt.Errorf("rules of Kuma's are left: %v", ours.Kuma)
		}
		if err != nil {
			return err
		}
		if err := h.Restore(f, string(rules.Transition(f, ours.Ours, kuma[f])), "--noflush"); err != nil {
			return err
		}
	}
	if h.Backend == tproxy.NFTables {
		return h.NFT("delete table inet " + tproxy.NFTable + "\n")
	}
	return nil
}

// back puts ours in the place of Kuma's, and lets Kuma's own install run over it.
func (h *host) back() error {
	if err := h.apply(); err != nil {
		return err
	}
	if h.Backend == tproxy.NFTables { // which Kuma's uninstall does not see
		if _, err := h.Remove(exec.RemoveOptions{}); err != nil {
			return err
		}
	}
	for _, f := range rules.Families() {
		text, err := h.Save(f)
		if err != nil {
			return err
		}
		script, err := oldkuma.Uninstalled(text)
		if err != nil {
			return err
		}
		if err := h.Restore(f, script); err != nil {
			return err
		}
	}
	return h.putKuma()
}
