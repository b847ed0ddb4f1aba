package exec

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// State is how an install stands.
type State string

// The states.
const (
	// StateInstalled is an install that stands as it was made.
	StateInstalled State = "installed"
	// StateDrifted is one from which something departs: Status.Drift says what.
	StateDrifted State = "drifted"
	// StateAbsent is that there is none.
	StateAbsent State = "absent"
	// StateUnknown is that it cannot be told: Status.Reasons say why.
	StateUnknown State = "unknown"
)

// Status is what stands in a network namespace of an install, and how that departs
// from what was installed.
type Status struct {
	State State
	// Version is that of the program that installed, as the record says; it may be
	// empty.
	Version string
	// Backend holds the rules; tproxy.Auto where there are none. Families are those
	// that have some.
	Backend  tproxy.Backend
	Families []rules.Family
	// Config is what was installed, as tproxy.Plan.Config has it; nil where that is not
	// known.
	Config *tproxy.Config
	// Persist is by what it comes back after a restart, for the reason PersistWhy;
	// tproxy.PersistAuto where that is not known, and while it waits to be confirmed.
	Persist    tproxy.Persist
	PersistWhy string
	Drift      []tproxy.Drift
	// Reasons are those for which something cannot be told.
	Reasons []string
	// Counters are of every rule of ours, in order.
	Counters []Counter
	// Notes is what the operator should know, and is no drift.
	Notes []string
}

// Counter is what the kernel has counted at a rule of ours since it was made.
type Counter struct {
	Family rules.Family // 0 is both
	Table  rules.Table
	Chain  string
	Index  int // of the rule in its chain, from 1
	// Verdict is what the rule does to a connection, or to a query: in, out, dns,
	// refused or excluded; empty for one that leads to others.
	Verdict string
	Why     string
	// Packets are those that met the rule: of nat, the first one of a connection.
	Packets, Bytes uint64
}

// Status reads what stands of an install in this network namespace, and compares it
// with what an install of the same configuration makes here now. It changes nothing.
// What cannot be told is a state of its own, with its reasons: without root, that is
// all. The error is for a failure to read, and for a context that is done.
func (r *Runner) Status(ctx context.Context) (*Status, error) {
	s, err := r.session()
	if err != nil {
		return nil, err
	}
	s.counters = true
	l := looker{session: s, Status: &Status{State: StateUnknown}}
	if err := s.m.privileged(); err != nil {
		l.cannot("%v", err)
		return l.Status, nil
	}
	if err := l.look(ctx); err != nil {
		return nil, err
	}
	l.conclude()
	return l.Status, ctx.Err()
}

// conclude says what it comes to. What is known to have drifted has, whatever else
// cannot be told.
func (l *looker) conclude() {
	switch {
	case len(l.Drift) > 0:
		l.State = StateDrifted
	case len(l.Reasons) > 0:
		l.State = StateUnknown
	case l.found == nil:
		l.State = StateAbsent
	default:
		l.State = StateInstalled
	}
}

// looker fills a Status.
type looker struct {
	*session
	*Status
	jobs  []job // what is ours, in each variant and family
	live  Live
	found *Installation
	// unread are the families of a variant whose rules could not be read, and two is
	// whether there are two installs.
	unread []LiveRules
	two    bool
	table  *rules.Native // that of ours, if there is one
}

// missed reports whether what the install has in a family could not be read.
func (l *looker) missed(f rules.Family) bool {
	return slices.ContainsFunc(l.unread, func(u LiveRules) bool { return u.Family == f && u.Backend == l.found.Backend })
}

func (l *looker) cannot(format string, args ...any) {
	if why := fmt.Sprintf(format, args...); !slices.Contains(l.Reasons, why) {
		l.Reasons = append(l.Reasons, why)
	}
}

func (l *looker) drift(d tproxy.Drift) {
	if !slices.Contains(l.Drift, d) {
		l.Drift = append(l.Drift, d)
	}
}

func (l *looker) look(ctx context.Context) error {
	if err := l.read(ctx); err != nil {
		return err
	}
	if l.found == nil {
		return l.leftovers(ctx)
	}
	l.Backend, l.Families, l.Version = l.found.Backend, l.found.Families, l.found.Record.Version
	l.count()
	l.onTrial()
	switch err := l.found.Unknown; {
	case err == nil:
	case l.found.Kuma && errors.Is(err, tproxy.ErrNoRecord):
		l.cannot("rules that Kuma's own installer made are there: what it was configured with is not known")
		return nil
	default:
		l.cannot("%v", err)
		return nil
	}
	if l.two {
		return nil
	}
	config := l.found.Config
	l.Config = &config
	plan, err := l.plan(ctx)
	if err != nil || plan == nil {
		return err
	}
	l.compare(plan)
	l.address(plan)
	if err := l.names(ctx, plan); err != nil {
		return err
	}
	l.stored(ctx, plan)
	l.others(plan)
	l.Notes = append(l.Notes, l.listening(plan)...)
	return nil
}

// onTrial says that what stands is not final yet.
func (l *looker) onTrial() {
	f, err := l.trial()
	switch {
	case err != nil:
		l.Notes = append(l.Notes, err.Error())
	case f != nil:
		if t, err := l.describe(f); err == nil {
			l.Notes = append(l.Notes, (&PendingError{t}).Error())
		}
	}
}

// read reads everybody's rules, once.
func (l *looker) read(ctx context.Context) error {
	variants := l.variants(ctx)
	l.known = variants
	read := reader{session: l.session, ctx: ctx, variants: variants, Live: &l.live}
	if err := read.table(); err != nil {
		l.cannot("%v", err)
		for _, f := range rules.Families() {
			l.unread = append(l.unread, LiveRules{Family: f, Backend: tproxy.NFTables})
		}
	}
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		for _, f := range rules.Families() {
			if err := read.family(b, f); err != nil {
				if ctx.Err() != nil {
					return err
				}
				l.cannot("%v", err)
				l.unread = append(l.unread, LiveRules{Family: f, Backend: b})
			}
		}
	}
	if err := read.others(); err != nil {
		l.cannot("%v", err)
	}
	for _, v := range variants {
		if v.Unknown != "" {
			l.cannot("whether rules of ours stand in %s cannot be told: %s", v.Backend, v.Unknown)
		}
		for _, f := range v.Ours {
			if v.Backend != tproxy.NFTables && !slices.ContainsFunc(l.live.Rules, func(r LiveRules) bool { return r.Family == f && r.Backend == v.Backend }) {
				l.cannot("%s rules of ours stand in %s, and its save program is not here", f, v.Backend)
				l.unread = append(l.unread, LiveRules{Family: f, Backend: v.Backend})
			}
		}
	}
	for _, r := range l.live.Rules {
		v := tproxy.Variant{Backend: r.Backend}
		found := tproxy.Found{Ours: r.Set}
		if r.Backend != tproxy.NFTables {
			found = tproxy.Find(r.Family, r.Set)
		}
		l.jobs = append(l.jobs, job{variant: v, family: r.Family, before: live{all: r.Set, Found: found}})
		l.table = cmp.Or(l.table, r.Table)
	}
	l.found = installation(l.jobs)
	for _, j := range l.jobs {
		if l.found == nil || j.variant.Backend == l.found.Backend || !holds(j.before.Ours) {
			continue
		}
		if _, err := tproxy.ReadRecord(j.before.Ours); err == nil {
			l.two = true
			which := "which of them decides depends on which came first"
			if l.found.Backend == tproxy.NFTables {
				which = "the one in nftables decides what this host sends, and the other one what comes in"
			}
			l.cannot("installs stand in %s and in %s, each with a record, and %s", l.found.Backend, j.variant.Backend, which)
		}
	}
	return nil
}

func holds(s rules.Set) bool { return len(s.Bases)+len(s.Chains) > 0 }

// ours is what was found of ours in a family of the variant that holds the install.
func (l *looker) ours(f rules.Family) live {
	for _, j := range l.jobs {
		if j.variant.Backend == l.found.Backend && j.family == f {
			return j.before
		}
	}
	return live{}
}

// leftovers are what an install has put beside its rules, where those are gone: a
// reboot takes them, or a firewall that begins anew.
func (l *looker) leftovers(ctx context.Context) error {
	const gone = "an install was here, and its rules are gone"
	if err := l.leftFiles(ctx, gone); err != nil {
		return err
	}
	_, v6 := tproxy.PassthroughAddresses()
	if there, err := l.m.hasAddress(v6); err == nil && there {
		l.Notes = append(l.Notes, hostPrefix(v6).String()+" is on lo: an install may have been here, ours or Kuma's, whose rules are gone")
	}
	return ctx.Err()
}

// leftFiles are what an install has left that resolves names, or brings it back.
func (l *looker) leftFiles(ctx context.Context, gone string) error {
	if l.elsewhere {
		return nil
	}
	if r, err := l.m.resolvConf(tproxy.DefaultResolvConf, false).InspectRemoval(); err == nil && !r.Nothing() {
		l.drift(tproxy.Drift{Kind: tproxy.DriftNames, Is: fmt.Sprintf("nameserver %s in %s", r.Address, r.Path), Why: gone})
	}
	for _, by := range []tproxy.Split{tproxy.SplitDelegate, tproxy.SplitLink} {
		c, err := l.splitChange(ctx, by, netip.Addr{})
		if err == nil && !c.nothing {
			l.drift(tproxy.Drift{Kind: tproxy.DriftNames, Is: c.undo, Why: gone})
		}
	}
	for _, by := range ways {
		if c, err := l.unstore(by, false); err == nil && !c.nothing {
			l.drift(tproxy.Drift{Kind: tproxy.DriftStored, Is: c.undo, Why: gone + "; a restart would bring it back"})
		}
	}
	return ctx.Err()
}

// plan is what an install of the same configuration would make here now, or nil,
// with the reason said.
func (l *looker) plan(ctx context.Context) (*tproxy.Plan, error) {
	config := *l.Config
	config.Backend = l.found.Backend
	host, err := l.probe(ctx, config.Needs())
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		l.cannot("what an install would make here now: %v", err)
		return nil, nil
	}
	// What would keep an install from being made is no reason not to look at one.
	shells, refused, persistence := host.RemoteShells, host.Nameserver.Refused, host.Persistence
	host.RemoteShells, host.Nameserver.Refused, host.Persistence = nil, "", tproxy.Persistence{}
	plan, err := tproxy.Build(config, host)
	if err != nil {
		l.cannot("what an install would make here now: %v", err)
		return nil, nil
	}
	if refused != "" && config.DNS.ControlPlane.IsValid() {
		l.drift(tproxy.Drift{Kind: tproxy.DriftNames, Why: refused})
	}
	host.RemoteShells = shells
	if _, err := tproxy.Build(config, host); err != nil {
		if e, ok := errors.AsType[*tproxy.RefusedError](err); ok {
			l.Notes = append(l.Notes, e.Error())
		}
	}
	plan.Host.Persistence = persistence
	return plan, nil
}

// stored looks whether the install will come back after a restart, as one that is made now
// would.
func (l *looker) stored(ctx context.Context, plan *tproxy.Plan) {
	if f, err := l.trial(); err != nil || f != nil {
		return // it does once it is confirmed
	}
	config := plan.Config
	config.Backend = l.found.Backend
	p, err := tproxy.Build(config, plan.Host)
	if err != nil {
		l.drift(tproxy.Drift{Kind: tproxy.DriftStored, Why: err.Error()})
		return
	}
	l.Persist, l.PersistWhy = p.Persist, p.PersistWhy
	p.Config = *l.Config // as the record has it, which is not about a run
	if i, err := l.savedHere(); err == nil && i != nil && len(tproxy.ConfigChanges(i.Config, p.Config)) == 0 {
		p.Config = i.Config
	}
	l.sameProgram()
	t := transaction{session: l.session, plan: p, report: &Report{Before: l.found}, dryRun: true}
	if err := t.lookAtStored(ctx, l.found.Record); err != nil {
		l.drift(tproxy.Drift{Kind: tproxy.DriftStored, Why: err.Error()})
		return
	}
	for _, c := range t.store {
		if !c.nothing {
			l.drift(tproxy.Drift{Kind: tproxy.DriftStored, Was: c.do, Why: "that is not so, or of another install"})
		}
	}
	if p.Persist == tproxy.PersistNone && config.Persist == tproxy.PersistAuto {
		l.Notes = append(l.Notes, "the rules do not outlive a restart of this host: "+p.PersistWhy)
	}
}

// compare compares the rules.
func (l *looker) compare(plan *tproxy.Plan) {
	for _, f := range plan.Families {
		if l.missed(f) {
			continue
		}
		found := l.ours(f)
		if l.found.Backend != tproxy.NFTables || !holds(found.Ours) {
			l.Drift = append(l.Drift, plan.Drift(f, found.Ours)...)
		}
		for _, r := range found.References {
			l.drift(tproxy.Drift{Kind: tproxy.DriftEntered, Family: f, Table: r.Table, Chain: r.Chain, Index: r.Index, Is: r.Rule.String(), Why: "others lead into a chain of ours"})
		}
	}
	if l.found.Backend == tproxy.NFTables && l.table != nil {
		drift, err := plan.TableDrift(l.table)
		if err != nil {
			l.cannot("%v", err)
		}
		l.Drift = append(l.Drift, drift...)
	}
	v4, v6 := l.recordOf(rules.IPv4), l.recordOf(rules.IPv6)
	if len(v4) > 0 && len(v6) > 0 && !slices.Equal(v4, v6) {
		_, chain := tproxy.RecordChain()
		l.drift(tproxy.Drift{Kind: tproxy.DriftChanged, Family: rules.IPv6, Table: rules.NAT, Chain: chain, Why: "the record is another than that of IPv4"})
	}
	for _, j := range l.jobs {
		where := j.variant.Backend != l.found.Backend
		if holds(j.before.Ours) && (where || !slices.Contains(plan.Families, j.family)) {
			what, f := "rules of ours in "+j.variant.Backend.String(), j.family
			if where && j.variant.Backend == tproxy.NFTables { // one table
				f = 0
			}
			l.drift(tproxy.Drift{Kind: tproxy.DriftElsewhere, Family: f, Is: what, Why: "the install is in " + l.found.Backend.String() + " and has none there"})
		}
	}
}

// recordOf are the lines of a family's record.
func (l *looker) recordOf(f rules.Family) (out []string) {
	t, name := tproxy.RecordChain()
	c, _ := l.ours(f).Ours.Chain(t, name)
	for _, r := range c.Rules {
		out = append(out, r.String())
	}
	return out
}

func (l *looker) address(plan *tproxy.Plan) {
	if !slices.Contains(plan.Families, rules.IPv6) {
		return
	}
	_, v6 := tproxy.PassthroughAddresses()
	there, err := l.m.hasAddress(v6)
	if err != nil {
		l.cannot("addresses of lo: %v", err)
		return
	}
	if !there {
		l.drift(tproxy.Drift{Kind: tproxy.DriftAddress, Family: rules.IPv6, Was: hostPrefix(v6).String() + " on lo",
			Why: "the proxy hands inbound connections on from there"})
	}
}

// names compares what resolves names of the mesh.
func (l *looker) names(ctx context.Context, plan *tproxy.Plan) error {
	if l.elsewhere {
		return ctx.Err()
	}
	put, split := plan.Config.Needs().Nameserver, plan.Host.Nameserver.Split
	if put != nil && split == tproxy.NoSplit {
		p, err := l.m.resolvConf(put.Path, put.Shared).Inspect(put.Address)
		if err == nil && p.How != dns.Unchanged {
			l.drift(tproxy.Drift{Kind: tproxy.DriftNames, Was: fmt.Sprintf("nameserver %s first in %s", put.Address, put.Path), Why: "somebody changed the file"})
		}
	}
	for _, by := range []tproxy.Split{tproxy.SplitDelegate, tproxy.SplitLink} {
		var a netip.Addr
		if put != nil && split == by {
			a = put.Address
		}
		c, err := l.splitChange(ctx, by, a)
		switch {
		case err != nil && a.IsValid():
			l.cannot("names of the mesh: %v", err)
		case err != nil || c.nothing:
		case a.IsValid():
			l.drift(tproxy.Drift{Kind: tproxy.DriftNames, Was: c.do, Why: "systemd-resolved is told otherwise"})
		default:
			l.drift(tproxy.Drift{Kind: tproxy.DriftNames, Is: c.undo, Why: "the install has none"})
		}
	}
	return ctx.Err()
}

// count collects the counters of the rules of ours.
func (l *looker) count() {
	if l.Backend == tproxy.NFTables {
		l.countTable()
		return
	}
	for _, f := range l.Families {
		l.countFamily(f)
	}
}

func (l *looker) countFamily(f rules.Family) {
	ours := l.ours(f).Ours
	each := func(t rules.Table, chain string, list []rules.Rule) {
		for i, r := range list {
			if r.Record || tproxy.IsRecord(t, chain) {
				continue
			}
			at := i + 1
			if r.At > 0 {
				at = r.At
			}
			l.Counters = append(l.Counters, Counter{f, t, cmp.Or(r.Via, chain), at, tproxy.Effect(t, chain, r), tproxy.Reason(r), r.Counter.Packets, r.Counter.Bytes})
		}
	}
	for _, c := range ours.Bases {
		each(c.Table, string(c.Hook), c.Rules)
	}
	for _, c := range ours.Chains {
		each(c.Table, c.Name, c.Rules)
	}
}

// countTable counts a rule of nftables once: it is of both families, unless it is about
// one alone.
func (l *looker) countTable() {
	for _, f := range l.Families {
		l.countFamily(f)
	}
	same := func(a, b Counter) int {
		return cmp.Or(cmp.Compare(a.Table, b.Table), cmp.Compare(a.Chain, b.Chain), a.Index-b.Index, int(a.Family)-int(b.Family))
	}
	order := make(map[[2]string]int)
	for _, c := range l.Counters {
		if k := [2]string{string(c.Table), c.Chain}; order[k] == 0 {
			order[k] = len(order) + 1
		}
	}
	slices.SortStableFunc(l.Counters, func(a, b Counter) int {
		return cmp.Or(order[[2]string{string(a.Table), a.Chain}]-order[[2]string{string(b.Table), b.Chain}], same(a, b))
	})
	var out []Counter
	for _, c := range l.Counters {
		if k := len(out) - 1; k >= 0 && out[k].Table == c.Table && out[k].Chain == c.Chain && out[k].Index == c.Index {
			out[k].Family = 0
			continue
		}
		out = append(out, c)
	}
	l.Counters = out
}

// others looks for rules of others that keep connections from where ours send them,
// and for filters that keep them from arriving.
func (l *looker) others(plan *tproxy.Plan) {
	for _, f := range plan.Families {
		found := l.ours(f)
		if !holds(found.Ours) {
			continue
		}
		var sets []rules.Set
		for _, r := range l.live.Rules {
			if r.Family == f {
				sets = append(sets, r.Set)
			}
		}
		l.hindered(plan, f, sets, found.Ours)
	}
	l.unseen(plan)
}

// unseen speaks of what iptables does not show.
func (l *looker) unseen(plan *tproxy.Plan) {
	for _, h := range l.live.Hidden {
		if h.What == "table inet firewalld" {
			l.firewalld(plan)
		}
		if h.lateFor(plan.Backend) {
			l.Notes = append(l.Notes, fmt.Sprintf("%s may filter what is redirected, or translate what ours leave alone: iptables does not show it", h.What))
			continue
		}
		for _, f := range plan.Families {
			if h.Meets(f, rules.Prerouting, rules.Output) {
				l.cannot("%s, which iptables does not show, comes before ours or may", h.What)
			}
		}
	}
}

// hindered looks in the rules of everybody in a family, ours among them, for what keeps
// connections from where ours send them.
func (l *looker) hindered(plan *tproxy.Plan, f rules.Family, sets []rules.Set, ours rules.Set) {
	x := shadows{family: f, plan: plan, all: sets, ours: ours, looker: l}
	x.find()
}

// firewalldConf has firewalld.conf(5)'s settings, a key=value on a line.
const firewalldConf = "/etc/firewalld/firewalld.conf"

// firewalld is drift where firewalld rejects what is redirected.
func (l *looker) firewalld(p *tproxy.Plan) {
	why, err := l.firewalldRejects(p)
	switch {
	case err != nil:
		l.Notes = append(l.Notes, err.Error())
	case why != "":
		l.drift(tproxy.Drift{Kind: tproxy.DriftFiltered, Family: rules.IPv6, Is: "table inet firewalld", Why: why})
	}
}

// firewalldRejects says, where it is so, that a firewalld with RFC3964_IPv4, which is its
// default, rejects what this host sends to ::/96: what is redirected over IPv6 goes to
// ::1, by an interface that its filter takes for another than lo.
func (s *session) firewalldRejects(p *tproxy.Plan) (why string, err error) {
	if !slices.Contains(p.Families, rules.IPv6) || p.Config.Outbound.Off && !p.Config.DNS.On() {
		return "", nil
	}
	text, err := s.m.readFile(firewalldConf)
	if err != nil {
		return "", fmt.Errorf("whether firewalld rejects what is redirected over IPv6 cannot be told: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if strings.TrimSpace(key) != "RFC3964_IPv4" {
			continue
		}
		if v := strings.ToLower(strings.TrimSpace(value)); v == "no" || v == "false" {
			return "", nil
		}
		break // a second one is an error to firewalld, and the first one stands
	}
	return "firewalld rejects what is redirected from this host over IPv6, to ::1: set RFC3964_IPv4=no in " + firewalldConf + " and restart it, or leave IPv6 alone with --ip-family-mode=ipv4", nil
}
