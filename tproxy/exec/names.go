package exec

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
)

// leaveFile is what else to do where names cannot be had from the control plane.
const leaveFile = "or leave names as they are resolved now with --modify-resolv-conf=false"

// nameserver finds out for a plan what an install would do to resolv.conf, or to
// systemd-resolved in its place.
func (s *session) nameserver(ctx context.Context, n tproxy.PutNameserver, h *tproxy.Host) {
	plan, err := s.m.resolvConf(n.Path, n.Shared).Inspect(n.Address)
	if owned, ok := errors.AsType[*dns.OwnedError](err); ok && s.split(ctx, owned, h) {
		return
	}
	if err != nil {
		h.Nameserver.Refused = err.Error()
		return
	}
	h.Nameserver.Do, h.Nameserver.Undo = plan.String(), plan.Undo()
	h.Notes = append(h.Notes, plan.Notes()...)
}

// notOurFiles says what a plan cannot have of another network namespace's files.
func (s *session) notOurFiles(n tproxy.Needs, h *tproxy.Host) {
	if n.Nameserver != nil {
		h.Nameserver.Refused = n.Nameserver.Path + " is not that of this network namespace (exec.Runner.FilesElsewhere)"
	}
}

// nsswitch says which sources of names the C library asks, in which order.
const nsswitch = "/etc/nsswitch.conf"

// byResolved notes for a plan that is about DNS that the C library asks somebody else.
func (s *session) byResolved(h *tproxy.Host) {
	text, err := s.m.readFile(nsswitch)
	if err == nil && dns.UsesResolve(text) {
		h.Notes = append(h.Notes, nsswitch+" has resolve in its hosts line: programs of the C library ask systemd-resolved by its socket, and send no query to port 53; what it asks itself is left alone where it is a nameserver of resolv.conf")
	}
}

// removal is a file out of which a nameserver of ours goes.
type removal struct {
	dns.Manager
	dns.Removal
}

// lookAtNames finds, before anything is written, the files that hold a nameserver of
// ours that goes, and whether one can go in.
func (t *transaction) lookAtNames(ctx context.Context) error {
	put := t.put
	paths, shared := t.namesPaths()
	shared = shared || put != nil && put.Shared
	if err := t.lookAtSplit(ctx); err != nil {
		return err
	}
	if put != nil && t.split == tproxy.NoSplit {
		t.into = t.m.resolvConf(put.Path, put.Shared)
		if _, err := t.into.Inspect(put.Address); err != nil {
			return &ApplyError{Step: put.String(), Err: err, Remedy: leaveFile}
		}
	}
	for _, p := range paths {
		if put != nil && t.split == tproxy.NoSplit && p == put.Path {
			continue
		}
		m := t.m.resolvConf(p, shared)
		r, err := m.InspectRemoval()
		switch {
		case err != nil:
			return &ApplyError{Step: "no nameserver of ours in " + p, Err: err}
		case r.Nothing() && len(r.Left) > 0:
			t.report.Notes = append(t.report.Notes, r.Left...)
		case !r.Nothing():
			t.drop = append(t.drop, removal{m, r})
		}
	}
	return nil
}

// splitChange is what is to be done in one way for systemd-resolved to ask a control
// plane, or, with the zero Addr, not to; nothing where the file of that way is the host's.
func (s *session) splitChange(ctx context.Context, by tproxy.Split, a netip.Addr) (hostChange, error) {
	if by == tproxy.SplitLink {
		return s.meshLink(ctx, a)
	}
	c, err := s.delegate(a)
	if err == nil && c.nothing {
		return c, nil // and whose it is need not be asked, which reads the mounts of two processes
	}
	if !s.delegateHere() {
		return hostChange{nothing: true}, nil
	}
	return c, err
}

// namesPaths are the files that may hold a nameserver of ours, and whether the record
// says that they may be the host's, in another network namespace.
func (t *transaction) namesPaths() (paths []string, shared bool) {
	paths = []string{t.resolvConf}
	if before := t.report.Before; before != nil && before.Unknown == nil {
		if n := before.Config.Needs().Nameserver; n != nil {
			paths = append(paths, n.Path)
			shared = n.Shared
		}
	}
	slices.Sort(paths)
	return slices.Compact(paths), shared
}

// lookAtSplit finds what is to be done to systemd-resolved: what it is told goes in,
// and then what it was told in the other way goes.
func (t *transaction) lookAtSplit(ctx context.Context) error {
	for _, by := range []tproxy.Split{tproxy.SplitDelegate, tproxy.SplitLink} {
		var a netip.Addr
		if t.put != nil && t.split == by {
			a = t.put.Address
		}
		c, err := t.splitChange(ctx, by, a)
		switch {
		case err != nil && a.IsValid():
			return &ApplyError{Step: tproxy.SplitNames{Address: a, By: by}.String(), Err: err, Remedy: leaveFile}
		case err != nil:
			return &ApplyError{Step: "names of the mesh as before", Err: err}
		case c.nothing:
		case a.IsValid():
			t.names = append([]hostChange{c}, t.names...)
		default:
			t.names = append(t.names, c)
		}
	}
	return nil
}

// delegateHere reports whether the file of ours that systemd-resolved reads is not that
// of another network namespace.
func (s *session) delegateHere() bool {
	m := s.m.resolvConf(dns.DelegatePath, false)
	return dns.MayWrite(dns.DelegatePath, m.Env.Mounts, m.Namespaces) == nil
}

// writeSplit does to systemd-resolved what lookAtSplit found.
func (t *transaction) writeSplit(ctx context.Context) error {
	for _, c := range t.names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if t.dryRun {
			t.report.Steps = append(t.report.Steps, c.do)
			continue
		}
		if err := t.first(ctx); err != nil {
			return err
		}
		// Also for one that fails: it may have come half-way.
		t.undo = append(t.undo, undo{c.undo, func(ctx context.Context) (bool, error) { return true, c.back(ctx) }})
		if err := c.run(ctx); err != nil {
			return &ApplyError{Step: c.do, Err: err, Remedy: leaveFile}
		}
		t.report.Changed = true
		t.report.Steps = append(t.report.Steps, c.do)
	}
	return nil
}

// writeNames takes nameservers of ours out, and puts one in.
func (t *transaction) writeNames(ctx context.Context) error {
	for _, d := range t.drop {
		if err := ctx.Err(); err != nil {
			return err
		}
		if t.dryRun {
			t.report.Steps = append(t.report.Steps, d.String())
			continue
		}
		if err := t.first(ctx); err != nil {
			return err
		}
		r, err := d.Remove()
		if err != nil {
			return &ApplyError{Step: d.String(), Err: err}
		}
		t.report.Notes = append(t.report.Notes, r.Left...)
		t.did(r.String(), fmt.Sprintf("nameserver %s first in %s", r.Address, r.Path), func(context.Context) (bool, error) {
			if !r.Address.IsValid() {
				return false, errors.New("its address is not known")
			}
			_, err := d.Install(r.Address)
			return err == nil, err
		})
	}
	put := t.put
	if put == nil || t.split != tproxy.NoSplit {
		return t.writeSplit(ctx)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if plan, err := t.into.Inspect(put.Address); err != nil || plan.How != dns.Unchanged {
		if err := t.first(ctx); err != nil {
			return err
		}
	}
	done, err := t.into.Install(put.Address)
	if err != nil {
		return &ApplyError{Step: put.String(), Err: err, Remedy: leaveFile}
	}
	if done.How != dns.Unchanged {
		t.did(done.String(), done.Undo(), func(context.Context) (bool, error) { return true, t.into.Undo(done) })
	}
	return t.writeSplit(ctx)
}

// answers notes that the control plane does not answer, where nothing redirects the
// question.
func (t *transaction) answers(p *tproxy.Plan) []string {
	a := p.Config.DNS.ControlPlane
	if !a.IsValid() || p.Config.DNS.On() {
		return nil
	}
	err := t.m.ask(a)
	if err == nil {
		return nil
	}
	return []string{fmt.Sprintf("no DNS server answers at %s (%v): kuma-cp listens on port 5653 unless KUMA_DNS_SERVER_PORT=53, and since 1.7 it has no DNS server: names in .mesh then take --redirect-dns",
		netip.AddrPortFrom(a, 53), err)}
}
