package cni

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

// check compares the live rules with those of the pod's annotations, and where nobody
// says what these are, with what the record in the rules says was installed.
func (p *Plugin) check(ctx context.Context, a *skel.CmdArgs) error {
	c, err := p.begin("CHECK", a)
	if err == nil {
		err = c.decide(ctx)
	}
	if err == nil && c.settled == "" {
		var own bool
		own, err = c.in(func() error { return c.compare(ctx) })
		if own {
			err = nil
		} else if err != nil {
			err = entered(err)
		}
	}
	if err == nil {
		return nil
	}
	err = c.pod.of(err)
	c.log.Error("differs", "error", err.Error())
	return err
}

// compare is on the thread that is in the pod's namespace.
func (c *call) compare(ctx context.Context) error {
	r := c.runner(c.log, c.pod.NetNS)
	s, err := r.Status(ctx)
	if err != nil {
		return failed(ErrUntold, "what is installed cannot be read", err)
	}
	var lines []string
	for _, d := range s.Drift {
		lines = append(lines, d.String())
	}
	lines = append(lines, s.Reasons...)
	said := errors.New(strings.Join(lines, "\n"))
	switch s.State {
	case exec.StateInstalled:
		return c.meant(ctx, r, s)
	case exec.StateAbsent:
		return c.absent(ctx, r)
	case exec.StateDrifted:
		return failed(ErrDiffers, "the live rules are not those that were installed", said)
	}
	return failed(ErrUntold, "whether the live rules are those of the pod cannot be told", said)
}

// meant compares what was installed with what the annotations say.
func (c *call) meant(ctx context.Context, r Runner, s *exec.Status) error {
	if c.from == "" || s.Config == nil {
		return nil
	}
	plan, err := c.plan(ctx, r)
	if err != nil {
		return err
	}
	was, now := plan.Config, *s.Config
	was.Backend, now.Backend = tproxy.Auto, tproxy.Auto
	changes := tproxy.ConfigChanges(was, now)
	if len(changes) == 0 {
		return nil
	}
	lines := make([]string, len(changes))
	for i, ch := range changes {
		lines[i] = fmt.Sprintf("%s: installed is %s, and the pod is to have %s", ch.Path, ch.Is, ch.Was)
		if src, ok := c.result.Sources[ch.Path]; ok {
			lines[i] += " (" + src.String() + ")"
		}
	}
	return failed(ErrDiffers, "what is installed is not what the pod's annotations say", errors.New(strings.Join(lines, "\n")))
}

// absent is about a pod without rules. Where nobody says whether it is to have some, an
// address of ours tells: it outlives the rules.
func (c *call) absent(ctx context.Context, r Runner) error {
	if c.from != "" {
		return failed(ErrDiffers, "nothing is installed", fmt.Errorf("the pod has the annotations of one with a sidecar, by %s", c.from))
	}
	host, err := r.Probe(ctx, tproxy.Needs{IPv6: true})
	if err != nil {
		return failed(ErrUntold, "what is installed cannot be read", err)
	}
	if _, v6 := tproxy.PassthroughAddresses(); host.PassthroughAddress {
		return failed(ErrDiffers, "nothing is installed any more", fmt.Errorf("%s is on lo, from an install whose rules are gone", v6))
	}
	return nil
}

// status says whether ADD can work on this node.
func (p *Plugin) status(ctx context.Context, a *skel.CmdArgs) error {
	c, err := p.begin("STATUS", a)
	if err != nil {
		return err
	}
	settings, err := c.settings()
	if err != nil {
		return err
	}
	unavailable := func(err error) error { return failed(ErrUnavailable, "no rules can be installed on this node", err) }
	host, err := c.runner(c.log, "").Probe(ctx, settings.Config.Needs())
	if err != nil {
		return unavailable(err)
	}
	plan, err := tproxy.Build(settings.Config, host)
	if err != nil {
		return unavailable(err)
	}
	for _, f := range plan.Families {
		if v, ok := host.Variant(plan.Backend); !ok || !v.Installed(f) {
			return unavailable(fmt.Errorf("no iptables-save and iptables-restore for %s on PATH, /usr/sbin, /sbin, /usr/bin, /bin: install the package iptables", f))
		}
	}
	return nil
}
