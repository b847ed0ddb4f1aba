package exec

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// dockersResolver is where Docker's resolver answers in the network namespace of a
// container on a network that somebody made: resolverIPSandbox in moby's libnetwork.
var dockersResolver = netip.MustParseAddr("127.0.0.11")

// The chain and the table of Docker's rules for its resolver (libnetwork/resolver_unix.go
// in moby).
const (
	dockersChain = "DOCKER_OUTPUT"
	dockersTable = "ip docker-dns"
)

// docker finds Docker's resolver. It listens at ports of its own: rules in front of it
// translate port 53, in either variant of iptables or in a table of nftables. A container may
// have another server at port 53 of all its addresses; what is sent to Docker's does
// not reach it. Where the rules cannot be read, a socket at that address tells.
func (s *session) docker() (l listener, err error) {
	l.addr = dockersResolver
	sockets, err := s.m.procs().UDP()
	if err != nil {
		return l, fmt.Errorf("sockets at nameserver %s: %w", l.addr, err)
	}
	at53 := false
	for _, so := range sockets {
		switch {
		case !so.Listening || so.Local.Addr().Unmap() != l.addr:
		case so.Local.Port() == 53:
			at53 = true
		default:
			l.sockets = append(l.sockets, so)
		}
	}
	l.behind, err = s.dockersRules()
	if l.behind != "" || err != nil && len(l.sockets) > 0 && !at53 {
		l.program = "Docker's resolver"
	}
	return l, nil
}

// dockersRules says what holds Docker's rules for its resolver; nothing does where it
// is empty. It reads the kernel, makes no table and starts no process.
func (s *session) dockersRules() (where string, err error) {
	var unread error
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		nft := b == tproxy.IPTablesNFT
		tables, err := s.m.tables(nft, rules.IPv4)
		var names []string
		if err == nil && slices.Contains(tables, rules.NAT) {
			names, err = s.m.chains(nft, rules.IPv4, rules.NAT)
		}
		if slices.Contains(names, dockersChain) {
			return b.String(), nil
		}
		unread = errors.Join(unread, err)
	}
	names, err := s.m.foreignTables()
	if slices.Contains(names, dockersTable) {
		return "table " + dockersTable + " of nftables", nil
	}
	return "", errors.Join(unread, err)
}

// senders are users as whom a query may be sent to see where it goes; the first one
// whose queries are redirected is taken.
var senders = []uint32{0, 65534, 1000, 1, 2}

// tryQueries sees that queries to resolvers of this host for which others may have rules
// reach the proxy. Which of two NAT tables decides is not to be read anywhere. Where it is
// theirs, a query that they translate gets no answer: it is in our conntrack zone, the
// answer in the default one. That is an error. Rules that take it out of conntrack, as
// those of node-local-dns in raw, let it pass the proxy by, which is said. To try it, an
// empty datagram is sent, which nobody answers, and conntrack tells where it went.
func (t *transaction) tryQueries(p *tproxy.Plan) error {
	for i, r := range p.Host.LocalResolvers {
		same := func(o tproxy.LocalResolver) bool { return o.Address == r.Address }
		if !p.Captures(r.Address) || r.Behind == "" && r.Address.IsLoopback() || slices.ContainsFunc(p.Host.LocalResolvers[:i], same) {
			continue
		}
		to := netip.AddrPortFrom(r.Address.Unmap(), 53)
		at, tried, err := t.trySend(p, to)
		switch {
		case !tried: // it is excluded by its address
		case err != nil:
			t.note("whether queries to %s reach the proxy cannot be told: %v", to, err)
		case at.Port() == p.Config.DNS.Port:
		case r.Behind == "":
			t.note("queries to %s pass the proxy by, to %s: a rule of others decides first, in raw OUTPUT perhaps, such as -j NOTRACK of node-local-dns; uninstall and install again puts ours in front, unless --skip-dns-conntrack-zone-split is given", to, at)
		default:
			return notFirst(p, r, to, at)
		}
	}
	return nil
}

// trySend sends to the nameserver as one of the senders; tried is false where no user's
// queries to it are redirected.
func (t *transaction) trySend(p *tproxy.Plan, to netip.AddrPort) (at netip.AddrPort, tried bool, err error) {
	addr, f := to.Addr().WithZone(""), rules.IPv4
	if addr.Is6() {
		f = rules.IPv6
	}
	lowered, env := p.Rules.Lower(f), sim.EnvOf(addr)
	redirected := func(uid uint32) bool {
		packet := sim.Packet{Path: sim.Out, Protocol: rules.UDP, UID: uid, Source: netip.AddrPortFrom(addr, 40000), Destination: netip.AddrPortFrom(addr, to.Port())}
		return sim.Decide(lowered, env, packet).Kind == sim.Redirected
	}
	if !redirected(stranger) {
		return at, false, nil
	}
	for _, uid := range senders {
		if !redirected(uid) {
			continue
		}
		if at, err = t.m.send(uid, to); !errors.Is(err, kernel.ErrNoUser) {
			return at, true, err
		}
	}
	return at, true, fmt.Errorf("none of the users %d is redirected", senders)
}

func notFirst(p *tproxy.Plan, r tproxy.LocalResolver, to, at netip.AddrPort) *ApplyError {
	e := &ApplyError{Step: fmt.Sprintf("trying whether queries to %s reach the proxy", to), Family: rules.IPv4, Table: rules.NAT,
		Err: fmt.Errorf("they go to %s: the rules for %s, in %s, come before ours in %s", at, r, r.Behind, p.Backend)}
	switch r.Behind {
	case p.Backend.String():
		e.Remedy = "uninstall and install again, which puts ours in front"
	case "table " + dockersTable + " of nftables":
		if e.Remedy = "have those come later: they translate at the priority of ours or before"; p.Backend != tproxy.NFTables {
			e.Remedy = "take --backend nftables, whose chain comes before those of iptables' priority"
		}
	case tproxy.IPTablesNFT.String(), tproxy.IPTablesLegacy.String():
		e.Remedy = "take the variant that they are in: --backend " + r.Behind
	default:
		e.Remedy = "take the other variant of iptables"
	}
	e.Remedy += ", or leave DNS alone"
	return e
}

func (t *transaction) note(format string, args ...any) {
	t.report.Notes = append(t.report.Notes, fmt.Sprintf(format, args...))
}
