package exec

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// drainPause is how long a drain waits between two looks at the connections.
const drainPause = 100 * time.Millisecond

// drain leaves no rule that redirects, and waits until the connections that were
// redirected have ended, or until the time is over. Conntrack stays, and with it they.
func (t *transaction) drain(ctx context.Context, jobs []job, rec tproxy.Record) error {
	if t.drainFor <= 0 || t.dryRun {
		return nil
	}
	for i := range jobs {
		j := jobs[i] // the undo is about what stood there before the drain
		j.step = fmt.Sprintf("no new %s connection is redirected by %s", j.family, j.variant.Backend)
		if len(redirectPorts(j.before)) == 0 {
			continue
		}
		if j.before.table != nil {
			var err error
			if j.table, err = drained(j.before.table, rec); err != nil {
				return &ApplyError{Step: j.step, Err: err}
			}
		}
		if err := t.replace(ctx, &j, tproxy.Draining(j.before.Ours, rec)); err != nil {
			return err
		}
	}
	t.drained, t.report.Families = t.report.Families, nil
	for i := range t.drained {
		d := &t.drained[i]
		k := slices.IndexFunc(jobs, func(j job) bool { return j.family == d.Family && j.variant.Backend == d.Backend })
		d.Changes = jobs[k].compare(jobs[k].before, rules.Set{})
	}
	for end := time.Now().Add(t.drainFor); ; {
		n, err := t.redirected(jobs)
		if err != nil {
			return &ApplyError{Step: "counting connections that are redirected", Err: err, Remedy: "leave out --drain"}
		}
		left := time.Until(end)
		t.log.Debug("draining", "connections", n, "left", left)
		if n == 0 || left <= 0 {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(left, drainPause)):
		}
	}
	for i := range jobs {
		l, err := t.save(ctx, jobs[i].variant, jobs[i].family)
		if err != nil {
			return err
		}
		jobs[i].before = l
	}
	return nil
}

// redirected counts the live connections that the rules of the jobs redirected.
func (t *transaction) redirected(jobs []job) (sum int, err error) {
	for _, f := range rules.Families() {
		var ports []uint16
		for _, j := range jobs {
			if j.of(f) {
				ports = append(ports, redirectPorts(j.before)...)
			}
		}
		if len(ports) == 0 {
			continue
		}
		n, err := t.m.redirected(f, ports)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// redirectPorts are the ports to which what is ours redirects TCP, or did before a
// drain, which leaves the chains.
func redirectPorts(l live) (ports []uint16) {
	for _, c := range l.Ours.Chains {
		for _, r := range c.Rules {
			a, ok := r.Action.(rules.Redirect)
			if ok && a.Port > 0 && slices.Contains(r.Matches, rules.Match(rules.TCP)) && !slices.Contains(ports, a.Port) {
				ports = append(ports, a.Port)
			}
		}
	}
	return ports
}

// cut counts the connections that go with the rules.
func (t *transaction) cut(ctx context.Context, jobs []job) {
	n, err := t.redirected(jobs)
	if n > 0 && t.natStays(jobs) && t.othersTrack(ctx, jobs) {
		return
	}
	switch {
	case err != nil:
		t.report.Notes = append(t.report.Notes, fmt.Sprintf("how many redirected connections are cut cannot be told: %v", err))
	case n == 0:
	case t.dryRun:
		t.report.Notes = append(t.report.Notes, fmt.Sprintf("%d redirected connections that live now would be cut; --drain lets them end first", n))
	case t.drainFor > 0:
		t.report.Notes = append(t.report.Notes, fmt.Sprintf("%d redirected connections had not ended after %s and were cut", n, t.drainFor))
	default:
		t.report.Notes = append(t.report.Notes, fmt.Sprintf("%d redirected connections were cut; --drain lets them end first", n))
	}
	t.report.Cut = n
}

// natStays reports whether a chain of nat is there when ours are gone: without one nothing
// translates the packets of the connections that conntrack knows (nf_nat_unregister_fn,
// net/netfilter/nf_nat_core.c). The chains of iptables stay, those of our own table do not.
func (t *transaction) natStays(jobs []job) bool {
	if !slices.ContainsFunc(jobs, func(j job) bool { return j.variant.Backend == tproxy.NFTables }) {
		return true
	}
	bases, err := t.m.bases()
	if err == nil && slices.ContainsFunc(bases, func(b kernel.NFTBase) bool { return b.Type == "nat" && foreign(b.Table) }) {
		return true
	}
	for _, f := range rules.Families() {
		for _, nft := range []bool{true, false} {
			if tables, err := t.m.tables(nft, f); err == nil && slices.Contains(tables, rules.NAT) {
				return true
			}
		}
	}
	return false
}

// othersTrack reports whether rules of others need conntrack, wherever they stand. What
// cannot be read does not: then too many connections are counted, and not too few.
func (t *transaction) othersTrack(ctx context.Context, jobs []job) bool {
	if slices.ContainsFunc(jobs, func(j job) bool { return holdsConntrack(j.before) }) {
		return true
	}
	if yes, err := t.m.tracked(); err == nil && yes {
		return true
	}
	for _, v := range t.variants(ctx) {
		for _, f := range rules.Families() {
			is := func(j job) bool { return j.variant.Backend == v.Backend && j.family == f }
			if v.Backend == tproxy.NFTables || !v.Rules || !v.Installed(f) || slices.ContainsFunc(jobs, is) {
				continue
			}
			if l, err := t.save(ctx, v, f); err == nil && holdsConntrack(l) {
				return true
			}
		}
	}
	return false
}

// holdsConntrack reports whether a rule of others needs conntrack, so that the kernel
// keeps it when ours are gone (nf_ct_netns_get in net/netfilter/nf_conntrack_proto.c).
func holdsConntrack(l live) bool {
	holds := func(list []rules.Rule) bool {
		return slices.ContainsFunc(list, func(r rules.Rule) bool {
			switch a := r.Action.(type) {
			case rules.Redirect, rules.Translate, rules.CTZone, rules.NoTrack:
				return true
			case rules.Opaque:
				if strings.Contains(a.Text(), "CONNMARK") {
					return true
				}
			}
			return slices.ContainsFunc(r.Matches, func(m rules.Match) bool {
				_, state := m.(rules.CTState)
				o, _ := m.(rules.Opaque)
				return state || strings.HasPrefix(o.Text(), "-m conntrack ") || strings.HasPrefix(o.Text(), "-m connmark ") || strings.HasPrefix(o.Text(), "-m state ")
			})
		})
	}
	foreign := func(t rules.Table, chain string, list []rules.Rule) (out []rules.Rule) {
		for i, r := range list {
			if !l.Ours.Covers(t, chain, i+1) {
				out = append(out, r)
			}
		}
		return out
	}
	for _, c := range l.all.Bases {
		if holds(foreign(c.Table, string(c.Hook), c.Rules)) {
			return true
		}
	}
	for _, c := range l.all.Chains {
		if holds(foreign(c.Table, c.Name, c.Rules)) {
			return true
		}
	}
	return false
}
