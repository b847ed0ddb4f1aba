package exec

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/procfs"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// Preflight is what an install would find in this network namespace.
type Preflight struct {
	// Status is how what is installed now stands.
	Status *Status
	// Hindered is what would keep connections from the proxy: rules of others that
	// decide first, and the host's own packet filter.
	Hindered []tproxy.Drift
	// Silent says on which of the proxy's ports nobody listens.
	Silent []string
	// Captured are connections of root's to other hosts that would go to the proxy when
	// they are made anew.
	Captured []Connection
	// Ways are those into this host, which the plan leaves alone.
	Ways []tproxy.RemoteShell
	// Reasons are those for which something cannot be told, Notes what the operator
	// should know beside it.
	Reasons, Notes []string
}

// Connection is a TCP connection of a process of this host.
type Connection struct {
	Local, Remote netip.AddrPort
	UID           uint32
	// PID and Program are its process's; 0 and "" where that cannot be seen.
	PID     int
	Program string
}

func (c Connection) String() string {
	who := "a process that cannot be seen"
	if c.PID != 0 {
		who = fmt.Sprintf("%s (process %d)", c.Program, c.PID)
	}
	return fmt.Sprintf("%s, UID %d, to %s", who, c.UID, c.Remote)
}

// Preflight says what an install of the plan would find. It changes nothing. Without
// root it says that it cannot tell.
func (r *Runner) Preflight(ctx context.Context, p *tproxy.Plan) (*Preflight, error) {
	s, err := r.session()
	if err != nil {
		return nil, err
	}
	s.counters = true
	out := &Preflight{Status: &Status{State: StateUnknown}, Ways: p.Host.RemoteShells, Silent: s.listening(p)}
	if err := s.m.privileged(); err != nil {
		out.Status.Reasons = []string{err.Error()}
		out.Reasons = []string{fmt.Sprintf("what of others' rules is in the way: %v", err)}
		return out, nil
	}
	now := looker{session: s, Status: out.Status}
	if err := now.look(ctx); err != nil {
		return nil, err
	}
	now.conclude()
	then := looker{session: s, Status: &Status{}, live: now.live}
	for _, f := range p.Families {
		then.hindrances(p, f)
	}
	then.unseen(p)
	out.Hindered, out.Reasons, out.Notes = then.Drift, then.Reasons, then.Notes
	out.Captured, err = s.captured(p)
	if err != nil {
		out.Reasons = append(out.Reasons, fmt.Sprintf("connections of this host: %v", err))
	}
	return out, ctx.Err()
}

// Silent says on which of the ports that a plan redirects to nobody listens: until
// the proxy does, what is redirected there is refused.
func (r *Runner) Silent(_ context.Context, p *tproxy.Plan) ([]string, error) {
	s, err := r.session()
	if err != nil {
		return nil, err
	}
	return s.listening(p), nil
}

// hindrances looks at the rules of a family as they would be.
func (l *looker) hindrances(p *tproxy.Plan, f rules.Family) {
	var sets []rules.Set
	var ours rules.Set
	there := false
	for _, r := range l.live.Rules {
		if r.Family != f || r.Backend == tproxy.NFTables { // our table is replaced, or goes
			continue
		}
		was := tproxy.Find(f, r.Set).Ours
		if r.Backend != p.Backend {
			sets = append(sets, rules.After(f, r.Set, was, rules.Set{}))
			continue
		}
		there = true
		after := rules.After(f, r.Set, was, p.Rules)
		sets, ours = append(sets, after), tproxy.Find(f, after).Ours
	}
	switch n, err := p.Rules.Native(tproxy.NFTable); {
	case p.Backend == tproxy.NFTables && err != nil:
		l.cannot("%v", err)
		return
	case p.Backend == tproxy.NFTables:
		ours = n.For(f)
		sets = append(sets, ours)
	case !there:
		after := rules.After(f, rules.Set{}, rules.Set{}, p.Rules)
		sets, ours = append(sets, after), tproxy.Find(f, after).Ours
	}
	l.hindered(p, f, sets, ours)
}

// captured lists the connections of root's to other hosts that the plan redirects when
// they are made anew: an agent's, a backup's, whose user nobody thought of.
func (s *session) captured(p *tproxy.Plan) (out []Connection, err error) {
	sockets, err := s.m.procs().TCP()
	if err != nil {
		return nil, err
	}
	local, err := s.m.localAddresses()
	if err != nil {
		return nil, err
	}
	env := sim.Env{Local: hostPrefixes(local)}
	listens := map[uint16]bool{}
	for _, so := range sockets {
		if so.Listening {
			listens[so.Local.Port()] = true
		}
	}
	lowered := make(map[rules.Family]rules.Set)
	for _, f := range p.Families {
		lowered[f] = p.Rules.Lower(f)
	}
	var found []procfs.Socket
	inodes := make(map[uint64]bool)
	for _, so := range sockets {
		remote := netip.AddrPortFrom(so.Remote.Addr().Unmap(), so.Remote.Port())
		if so.Listening || so.UID != 0 || so.Inode == 0 || remote.Port() == 0 || listens[so.Local.Port()] || env.IsLocal(remote.Addr()) {
			continue
		}
		packet := sim.Packet{Path: sim.Out, Protocol: rules.TCP, UID: so.UID,
			Source: netip.AddrPortFrom(so.Local.Addr().Unmap(), so.Local.Port()), Destination: remote}
		set, ok := lowered[packet.Family()]
		if !ok || sim.Decide(set, env, packet).Kind != sim.Redirected {
			continue
		}
		found = append(found, so)
		inodes[so.Inode] = true
	}
	if len(found) == 0 {
		return nil, nil
	}
	owners, _, err := s.m.procs().Owners(inodes)
	if err != nil {
		return nil, err
	}
	for _, so := range found {
		c := Connection{Local: so.Local, Remote: netip.AddrPortFrom(so.Remote.Addr().Unmap(), so.Remote.Port()), UID: so.UID}
		if o := owners[so.Inode]; len(o) > 0 {
			c.PID, c.Program = o[0].PID, o[0].Comm
		}
		// Several of one program to one place are one thing to know.
		if !slices.ContainsFunc(out, func(d Connection) bool { return d.Remote == c.Remote && d.PID == c.PID }) {
			out = append(out, c)
		}
	}
	return out, nil
}
