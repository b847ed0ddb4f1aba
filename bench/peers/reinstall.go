//go:build linux

package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// underLoad is what a re-install under load did.
type underLoad struct {
	crowd.Result
	each time.Duration // of one re-install, with the load that there is
}

// reinstall installs one of two configs over the other again and again, while clients
// connect at full speed. fresh uninstalls in between: there is a moment without rules.
func reinstall(i installer, rounds int, fresh bool) (u underLoad, err error) {
	h, err := crowd.New(backendOf(i))
	if err != nil {
		return u, err
	}
	defer h.Close()
	ctx := context.Background()
	p := ports{in: rules.Port(crowd.ExcludedIn), out: rules.Port(crowd.ExcludedOut)}
	other := ports{in: p.in.Union(rules.Port(9100)), out: p.out}
	inside := func(do func(context.Context, ports) (int, error), p ports) error {
		return h.In(h.Lab.Host, func() error {
			_, err := do(ctx, p)
			return err
		})
	}
	if err := inside(i.install, p); err != nil {
		return u, fmt.Errorf("%s: %w", i.name, err)
	}
	start := time.Now()
	u.Result, err = h.Under(rounds, func() error {
		was := p
		p, other = other, p
		if fresh {
			if err := inside(i.uninstall, was); err != nil {
				return err
			}
		}
		return inside(i.install, p)
	})
	u.each = time.Since(start) / time.Duration(rounds)
	if err == nil {
		err = h.In(h.Lab.Host, func() error { return i.check(true) })
	}
	if err != nil {
		return u, fmt.Errorf("%s: %w", i.name, err)
	}
	return u, nil
}

// backendOf is one that crowd can have: only its own plans ask for it.
func backendOf(i installer) tproxy.Backend {
	for _, b := range backends {
		if strings.HasSuffix(i.name, b.String()) {
			return b
		}
	}
	return tproxy.IPTablesNFT
}

// reinstallPage measures and prints it.
func reinstallPage(p *crowd.Page, rounds int) error {
	p.Linef("Re-installing another config %d times, clients at full speed, in and out, IPv4 and IPv6, 40 long-lived connections.", rounds)
	p.Linef("The control is an uninstall and an install: there this bench has to see escapes. Broken are connections that were")
	p.Linef("refused or waited in vain for a second; ms is of one re-install, with that load on the machine.")
	p.Linef("%-32s %9s %8s %8s %8s %11s %7s", "", "right", "escaped", "caught", "broken", "long-lived", "ms")
	row := func(what string, u underLoad) {
		p.Linef("%-32s %9d %8d %8d %8d %11s %7.0f", what, u.Right, u.Escaped, u.Caught, u.Broken, fmt.Sprintf("%d of %d", u.Alive, u.Held), ms(u.each))
	}
	for _, i := range installers() {
		u, err := reinstall(i, rounds, false)
		if err != nil {
			return err
		}
		row(i.name, u)
		if i.ours() && !u.Clean() {
			p.Bad++
		}
	}
	for _, b := range backends {
		u, err := reinstall(our(b), rounds, true)
		if err != nil {
			return err
		}
		row("control, "+b.String(), u)
		if u.Escaped == 0 {
			p.Linef("the control shows nothing: this bench cannot see an escape")
			p.Bad++
		}
	}
	p.Linef("")
	return nil
}
