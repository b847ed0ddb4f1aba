package sim

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Walk sends the packet through the Set and returns its way. It takes a
// microsecond or two for the rules of a default plan; where the way does not
// matter, Decide is cheaper.
func Walk(set rules.Set, env Env, p Packet) Trace {
	return walk([]*rules.Set{&set}, env, p)
}

// WalkAll is Walk through several Sets at once, as on a host whose kernel holds
// rules of iptables-nft, of iptables-legacy and of nftables: at each hook the packet
// meets all of them, in the order of their priorities (rules.BaseChain.Offset). Of
// equal ones the order is not known, so where two of those want to translate the
// packet the verdict is Unknown.
func WalkAll(sets []rules.Set, env Env, p Packet) Trace {
	all := make([]*rules.Set, len(sets))
	for i := range sets {
		all[i] = &sets[i]
	}
	return walk(all, env, p)
}

func walk(sets []*rules.Set, env Env, p Packet) Trace {
	t := Trace{Packet: p, Steps: make([]Step, 0, 12)} // as many as our rules want
	w := walker{sets: sets, env: env, p: p, trace: &t}
	if t.Verdict = w.walk(); len(t.Steps) == 0 {
		t.Steps = nil
	}
	if t.Reason == "" {
		switch step, ok := t.Deciding(); {
		case ok && t.Elsewhere:
			to := step.Rule.Action.(rules.Translate).To
			t.Reason = fmt.Sprintf("%s answers first: %s sends the connection to %s", step.Chain, t.Route(step), to)
		case ok:
			t.Reason = step.why()
		case !slices.ContainsFunc(sets, func(s *rules.Set) bool { return s.Has(p.Family()) }):
			t.Reason = fmt.Sprintf("there are no %s rules", p.Family())
		case w.untracked:
			t.Reason = "it is kept out of connection tracking, and so out of nat"
		case p.State == Established:
			t.Reason = "nat sees the first packet of a connection only"
		default:
			t.Reason = "no rule is about it"
		}
	}
	return t
}

// Decide is the verdict of Walk, without the way.
func Decide(set rules.Set, env Env, p Packet) Verdict {
	w := walker{sets: []*rules.Set{&set}, env: env, p: p}
	return w.walk()
}

// DecideAll is the verdict of WalkAll, without the way.
func DecideAll(sets []rules.Set, env Env, p Packet) Verdict {
	all := make([]*rules.Set, len(sets))
	for i := range sets {
		all[i] = &sets[i]
	}
	w := walker{sets: all, env: env, p: p}
	return w.walk()
}

type walker struct {
	sets   []*rules.Set
	mixed  bool       // whether the order of the tables is not enough
	set    *rules.Set // the one of sets whose rules are walked,
	which  int        // and its place there
	env    Env
	p      Packet
	family rules.Family
	hook   rules.Hook
	local  bool // whether the packet is for this host
	owned  bool // whether the packet has its socket
	// zoned is whether the packet has its conntrack entry or template, after
	// which CT does nothing (xt_ct_target in net/netfilter/xt_CT.c).
	zoned      bool
	seen       bool // whether connection tracking has seen it
	zone       uint16
	untracked  bool
	mark       uint32
	doubt      uint32 // the bits of the mark that are not known
	redirected bool
	port       uint16
	dnat, snat truth // whether conntrack has its destination, or its source, changed
	anywhere   bool  // whether REDIRECT chose a destination that the walk does not know
	anyone     bool  // whether nat POSTROUTING may have given it another source
	met        int   // how many rules it has met
	trace      *Trace
}

// mostRules is how many rules a packet may meet: chains of which each jumps twice to
// the next make 2^n ways of n chains, and a saved file may hold any. A host with that
// many rules on one way does not answer any more.
const mostRules = 1 << 18

// end is how a chain was left.
type end uint8

const (
	passed end = iota // at its end, or by RETURN
	accepted
	elsewhere // by DNAT
	dropped
	refused
	unknown
)

func (w *walker) walk() Verdict {
	w.family = w.p.Family()
	w.p.Source = netip.AddrPortFrom(plain(w.p.Source.Addr()), w.p.Source.Port())
	w.p.Destination = netip.AddrPortFrom(plain(w.p.Destination.Addr()), w.p.Destination.Port())
	w.mark = w.p.Mark
	w.mixed = len(w.sets) > 1 || slices.ContainsFunc(w.sets, func(s *rules.Set) bool {
		return slices.ContainsFunc(s.Bases, func(c rules.BaseChain) bool { return c.Offset != 0 })
	})
	end := accepted
	for _, s := range w.sets {
		if s.Has(w.family) {
			end = w.path()
			break
		}
	}
	v := Verdict{Kind: Untouched, Zone: w.zone}
	switch {
	case end == elsewhere:
		v.Elsewhere = true
	case end == unknown:
		v.Kind = Unknown
	case end == dropped:
		v.Kind = Dropped
	case end == refused, w.redirected && w.port == 0:
		v.Kind = Refused
	case w.redirected:
		v.Kind, v.Port = Redirected, w.port
	}
	return v
}

// path calls the base chains in the order of the hooks.
func (w *walker) path() end {
	w.local = w.p.Path == In || w.p.Path == Out && w.env.IsLocal(w.p.Destination.Addr())
	if w.p.Path != Out {
		if e := w.at(rules.Prerouting, rules.Raw, rules.Mangle, rules.NAT, rules.Filter); e > accepted {
			return e
		}
		if w.local {
			return w.at(rules.Input, rules.Mangle, rules.Filter, rules.Security)
		}
		if e := w.at(rules.Forward, rules.Mangle, rules.Filter, rules.Security); e > accepted {
			return e
		}
		return w.at(rules.Postrouting, rules.Mangle, rules.Filter)
	}

	if w.p.OutInterface == "" && w.local {
		w.p.OutInterface = "lo"
	}
	w.owned = true
	// The filter sees the interface from before a redirection: nf_hook_state
	// keeps it when nf_nat_ipv4_local_fn routes the packet again.
	if e := w.at(rules.Output, rules.Raw, rules.Mangle, rules.NAT, rules.Filter, rules.Security); e > accepted {
		return e
	}
	if w.redirected {
		w.p.OutInterface = "lo"
	}
	if e := w.at(rules.Postrouting, rules.Mangle, rules.Filter); e > accepted {
		return e
	}
	if w.p.OutInterface != "lo" {
		return accepted
	}
	// Of a packet that comes in again, the source matters.
	if e := w.at(rules.Postrouting, rules.NAT); e > accepted {
		return e
	}
	// Through lo the packet comes in again, without its socket (skb_orphan in
	// drivers/net/loopback.c) and with its conntrack entry, whose destination was
	// settled in OUTPUT: nat does not see it again (nf_nat_initialized in
	// nf_nat_inet_fn, net/netfilter/nf_nat_core.c).
	w.owned, w.zoned, w.local = false, true, true
	w.p.InInterface, w.p.OutInterface = "lo", ""
	if e := w.at(rules.Prerouting, rules.Raw, rules.Mangle, rules.Filter); e > accepted {
		return e
	}
	return w.at(rules.Input, rules.Mangle, rules.Filter, rules.Security)
}

// at calls the base chains of the tables at a hook; the tables stand in the order in
// which iptables' are called.
func (w *walker) at(h rules.Hook, tables ...rules.Table) end {
	w.hook = h
	if w.mixed {
		return w.inOrder(h, tables)
	}
	for _, t := range tables {
		if t == rules.NAT && (w.p.State == Established || w.untracked) {
			continue
		}
		if t == rules.Mangle || t == rules.NAT {
			w.zoned, w.seen = true, true // conntrack stands between raw and mangle
		}
		for i := range w.sets[0].Bases {
			if c := &w.sets[0].Bases[i]; c.Table == t && c.Hook == h {
				if e := w.base(place{0, c}); e > accepted {
					return e
				}
			}
		}
	}
	return accepted
}

// conntrack is the priority of connection tracking (NF_IP_PRI_CONNTRACK in
// linux/netfilter_ipv4.h).
const conntrack = -200

// place is a base chain of one of the Sets.
type place struct {
	set int
	*rules.BaseChain
}

func (p place) priority() int32 { return rules.Priority(p.Table, p.Hook) + p.Offset }

// inOrder calls the base chains of the tables at a hook in the order of their
// priorities, whichever Set has them.
func (w *walker) inOrder(h rules.Hook, tables []rules.Table) end {
	var nat, rest []place
	for i, s := range w.sets {
		if !s.Has(w.family) {
			continue
		}
		for j := range s.Bases {
			switch c := &s.Bases[j]; {
			case c.Hook != h || !slices.Contains(tables, c.Table):
			case c.Table == rules.NAT:
				nat = append(nat, place{i, c})
			default:
				rest = append(rest, place{i, c})
			}
		}
	}
	by := func(a, b place) int { return int(a.priority()) - int(b.priority()) }
	slices.SortStableFunc(nat, by)
	slices.SortStableFunc(rest, by)
	point, done := rules.Priority(rules.NAT, h), len(nat) == 0
	translate := func() end {
		done, w.zoned, w.seen = true, true, true
		return w.nats(nat)
	}
	for len(rest) > 0 {
		p := rest[0].priority()
		n := 1
		for n < len(rest) && rest[n].priority() == p {
			n++
		}
		if p > conntrack {
			w.zoned, w.seen = true, true
		}
		if !done && p == point {
			w.because("cannot tell: %s of nftables has the priority of nat at %s, and which comes first is not known", rest[0].name(), h)
			return unknown
		}
		if !done && p > point {
			if e := translate(); e > accepted {
				return e
			}
		}
		if e := w.group(rest[:n]); e > accepted {
			return e
		}
		rest = rest[n:]
	}
	if !done {
		return translate()
	}
	if slices.Contains(tables, rules.Mangle) { // the way led past connection tracking
		w.zoned, w.seen = true, true
	}
	return accepted
}

func (p place) name() string { return cmp.Or(p.Name, string(p.Hook)) }

// group calls base chains of one priority. Which of several comes first is not known:
// what depends on it is not either.
func (w *walker) group(all []place) end {
	before := *w
	e := accepted
	for i := 0; i < len(all) && e <= accepted; i++ {
		e = w.base(all[i])
	}
	if len(all) == 1 || e == unknown {
		return e
	}
	other, end := before, accepted
	other.trace = nil
	for i := len(all) - 1; i >= 0 && end <= accepted; i-- {
		end = other.base(all[i])
	}
	if max(e, accepted) != max(end, accepted) || e <= accepted && (w.zone != other.zone || w.untracked != other.untracked) {
		w.because("cannot tell: two sets of rules decide it at %s %s, and which comes first is not known", all[0].Table, all[0].Hook)
		return unknown
	}
	w.doubt |= other.doubt | (w.mark ^ other.mark)
	return e
}

// base calls one base chain.
func (w *walker) base(p place) end {
	w.which, w.set = p.set, w.sets[p.set]
	if !w.set.Has(w.family) {
		return accepted
	}
	e := w.chain(p.Table, p.name(), p.Rules, 0)
	if e == passed && p.Policy == "DROP" {
		w.because("the policy of %s %s is DROP", p.Table, p.name())
		e = dropped
	}
	return e
}

// nats calls chains of nat, in the order of their priorities. The first that translates
// ends it (nf_nat_inet_fn in net/netfilter/nf_nat_core.c), and of equal priorities the
// one that was registered last comes first: that cannot be seen.
func (w *walker) nats(all []place) end {
	if w.p.State == Established || w.untracked {
		return accepted
	}
	for len(all) > 0 {
		n := 1
		for n < len(all) && all[n].priority() == all[0].priority() {
			n++
		}
		redirected := w.redirected
		if e := w.equalNATs(all[:n]); e > accepted || w.redirected != redirected {
			return e
		}
		all = all[n:]
	}
	return accepted
}

// equalNATs calls chains of nat of one priority.
func (w *walker) equalNATs(all []place) end {
	if len(all) == 1 {
		return w.base(all[0])
	}
	before, after, won := *w, *w, accepted
	translated := false
	marked := make([]uint32, len(all)) // the bits that each may change
	for i, p := range all {
		alone := before
		alone.trace = nil
		alone.base(p)
		marked[i] = alone.doubt | (alone.mark ^ before.mark)
	}
	for i, p := range all {
		*w = before
		for j, bits := range marked {
			if j != i {
				w.doubt |= bits
			}
		}
		e := w.base(p)
		if e > elsewhere {
			return e
		}
		after.doubt |= w.doubt | (w.mark ^ before.mark)
		after.anyone, after.snat = after.anyone || w.anyone, max(after.snat, w.snat)
		if e != elsewhere && w.redirected == before.redirected {
			continue
		}
		if translated {
			w.because("cannot tell: two sets of rules translate it at nat %s, and which comes first is not known", w.hook)
			return unknown
		}
		doubt := after.doubt
		after, won, translated = *w, e, true
		after.doubt |= doubt
	}
	*w = after
	return won
}

// because sets the reason of a verdict that no rule has a reason for.
func (w *walker) because(format string, args ...any) {
	if w.trace != nil {
		w.trace.Reason = fmt.Sprintf(format, args...)
	}
}

func (w *walker) step(t rules.Table, chain string, i int, r *rules.Rule, matched bool, because string) {
	at := i + 1
	if r.At > 0 && r.Via == "" {
		at = r.At
	}
	w.trace.Steps = append(w.trace.Steps, Step{t, chain, at, *r, matched, because, w.which, w.hook})
}

// chain calls a chain. depth is how many jumps and gotos led to it: more of
// them than there are chains is a loop.
func (w *walker) chain(t rules.Table, name string, list []rules.Rule, depth int) end {
	for i := range list {
		r := &list[i]
		if r.Unmet { // no jump leads to where it stands
			continue
		}
		if w.met++; w.met > mostRules {
			w.because("cannot tell: the packet has met %d rules, the last one in %s %s, and that is enough", mostRules, t, name)
			return unknown
		}
		holds, culprit := w.meets(r)
		switch holds {
		case no:
			if w.trace != nil {
				w.step(t, name, i, r, false, w.not(culprit))
			}
			continue
		case maybe:
			if t == rules.NAT && w.hook == rules.Postrouting {
				if w.trace != nil {
					w.step(t, name, i, r, false, "cannot tell, and then its source is not known: it "+w.cannot(culprit))
				}
				return w.lost()
			}
			same := w.same(t, r.Action, depth)
			if w.trace != nil {
				what := w.cannot(culprit)
				if same {
					w.step(t, name, i, r, false, "cannot tell, and it makes no difference: it "+what)
					continue
				}
				w.step(t, name, i, r, false, what)
				w.because("cannot tell: rule %d of %s %s %s", i+1, t, name, what)
			}
			if same {
				continue
			}
			return unknown
		}
		if w.trace != nil {
			w.step(t, name, i, r, true, "")
		}
		switch a := r.Action.(type) {
		case rules.Return:
			return passed
		case rules.Accept:
			return accepted
		case rules.Drop:
			return dropped
		case rules.Reject:
			return refused
		case rules.Jump:
			if e := w.call(t, a.Chain, depth); e != passed {
				return e
			}
		case rules.Goto:
			return w.call(t, a.Chain, depth)
		case rules.Redirect:
			w.redirect(a.Port)
			return accepted
		case rules.CTZone:
			if !w.zoned {
				w.zone, w.zoned = a.Zone, true
			}
		case rules.NoTrack:
			if !w.zoned {
				w.untracked, w.zoned = true, true
			}
		case rules.SetMark:
			w.mark, w.doubt = w.mark&^a.Mask^a.Value, w.doubt&^a.Mask
		case rules.Nothing:
		case rules.Translate:
			switch {
			case t == rules.NAT && w.hook == rules.Postrouting:
				w.anyone, w.snat = true, maybe // it may be given the source that it has
				return accepted
			case t == rules.NAT && a.Target == "DNAT":
				return elsewhere
			}
			w.because("cannot tell: rule %d of %s %s uses %s", i+1, t, name, a.Target)
			return unknown
		case rules.Opaque:
			if !w.opaque(a) {
				if t == rules.NAT && w.hook == rules.Postrouting {
					return w.lost()
				}
				w.because("cannot tell: rule %d of %s %s uses %s", i+1, t, name, a.Text())
				return unknown
			}
		}
	}
	return passed
}

func (w *walker) call(t rules.Table, name string, depth int) end {
	for i := range w.set.Chains {
		c := &w.set.Chains[i]
		if c.Name != name || c.Table != t {
			continue
		}
		if depth >= len(w.set.Chains) {
			w.because("cannot tell: the chains of %s jump in a circle, through %s", t, name)
			return unknown
		}
		return w.chain(t, name, c.Rules, depth+1)
	}
	w.because("cannot tell: there is no chain %s in %s", name, t)
	return unknown
}

// lost is for what cannot be told in nat POSTROUTING, which changes no more of a
// packet than its source and its mark.
func (w *walker) lost() end {
	w.anyone, w.snat, w.doubt = true, maybe, allBits
	return accepted
}

// redirect changes the destination: in OUTPUT to the loopback address, in
// PREROUTING to the first address of the interface (nf_nat_redirect.c). One that
// is where it goes already is no DNAT to conntrack (nf_nat_setup_info in
// net/netfilter/nf_nat_core.c).
func (w *walker) redirect(port uint16) {
	before := w.p.Destination
	w.redirected, w.local, w.port = true, true, port
	to := before.Addr()
	switch {
	case w.hook == rules.Prerouting:
		w.anywhere = true
	case w.family == rules.IPv4:
		to = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	default:
		to = netip.IPv6Loopback()
	}
	w.p.Destination = netip.AddrPortFrom(to, port)
	switch {
	case before != w.p.Destination:
		w.dnat = yes
	case w.anywhere:
		w.dnat = maybe
	}
}

// opaque carries out an action that has no type, and reports whether what it
// does is known.
func (w *walker) opaque(o rules.Opaque) bool {
	rest, jump := strings.CutPrefix(o.Text(), "-j ")
	target, options, _ := strings.Cut(rest, " ")
	switch target {
	case "LOG", "NFLOG", "ULOG", "TRACE", "AUDIT", "CHECKSUM", "CLASSIFY", "CONNSECMARK", "DSCP", "ECN", "IDLETIMER", "LED",
		"RATEEST", "SECMARK", "TCPMSS", "TCPOPTSTRIP", "TEE", "TOS":
		return jump // these change nothing of a packet's way
	case "SET":
		if strings.Contains(options, "--map-mark") {
			w.doubt = allBits
		}
		return jump
	case "CONNMARK":
		if strings.Contains(options, "--restore-mark") {
			w.doubt = allBits
		}
		return jump
	case "CT":
		// A helper or a timeout comes with a template of zone 0.
		if strings.Contains(options, "--zone") || strings.Contains(options, "--notrack") {
			return false
		}
		w.zoned = true
		return jump
	}
	return false
}

const allBits = 1<<32 - 1

// same reports whether it makes no difference if the action is carried out, but
// for bits of the mark, which are not known then.
func (w *walker) same(t rules.Table, a rules.Action, depth int) bool {
	switch a := a.(type) {
	case rules.Nothing:
		return true
	case rules.SetMark:
		w.doubt |= a.Mask | a.Value
		return true
	case rules.CTZone, rules.NoTrack:
		return w.zoned
	case rules.Opaque:
		zoned := w.zoned
		known := w.opaque(a)
		same := known && w.zoned == zoned
		w.zoned = zoned
		return same
	case rules.Jump:
		c, ok := w.set.Chain(t, a.Chain)
		if !ok || depth >= len(w.set.Chains) {
			return false
		}
		for _, r := range c.Rules {
			if w.met++; w.met > mostRules {
				return false
			}
			// Behind a RETURN, as in front of it, nothing is done.
			if _, back := r.Action.(rules.Return); !back && !w.same(t, r.Action, depth+1) {
				return false
			}
		}
		return true
	}
	return false
}

// truth has three values: a match may be opaque.
type truth uint8

const (
	no truth = iota
	maybe
	yes
)

func is(b bool) truth {
	if b {
		return yes
	}
	return no
}

// meets says whether all matches of the rule hold, and otherwise which does
// not. A match that does not hold settles it, whatever the others are.
func (w *walker) meets(r *rules.Rule) (truth, rules.Match) {
	var doubt rules.Match
	for _, m := range r.Matches {
		switch w.holds(m) {
		case no:
			return no, m
		case maybe:
			if doubt == nil {
				doubt = m
			}
		}
	}
	if doubt != nil {
		return maybe, doubt
	}
	return yes, nil
}

func (w *walker) holds(m rules.Match) truth {
	switch m := m.(type) {
	case rules.Protocol:
		return is(m == w.p.Protocol)
	case rules.SYN:
		return is((w.p.State == New) != m.Not)
	case rules.Source:
		if w.anyone {
			return maybe
		}
		return w.in(m.Prefixes, m.Not, w.p.Source.Addr())
	case rules.Destination:
		if w.anywhere {
			return maybe
		}
		return w.in(m.Prefixes, m.Not, w.p.Destination.Addr())
	case rules.InInterface:
		none := through(m.Name, m.Not, "", true)
		switch {
		case w.hook == rules.Output || w.hook == rules.Postrouting && w.p.Path == Out:
			return none
		case w.hook == rules.Postrouting:
			// Linux knows it there from 5.7 on (ip_output in net/ipv4/ip_output.c).
			if some := through(m.Name, m.Not, w.p.InInterface, false); some != none {
				return maybe
			}
			return none
		}
		return through(m.Name, m.Not, w.p.InInterface, false)
	case rules.OutInterface:
		if w.hook == rules.Prerouting || w.hook == rules.Input {
			return through(m.Name, m.Not, "", true)
		}
		return through(m.Name, m.Not, w.p.OutInterface, false)
	case rules.SourcePorts:
		if w.anyone {
			return maybe
		}
		return is(m.Ports.Contains(w.p.Source.Port()) != m.Not)
	case rules.DestinationPorts:
		return is(m.Ports.Contains(w.p.Destination.Port()) != m.Not)
	case rules.SourceLocal:
		if w.anyone {
			return maybe
		}
		return is(w.env.IsLocal(w.p.Source.Addr()) != m.Not)
	case rules.DestinationLocal:
		return is(w.local != m.Not)
	case rules.OwnerUID:
		// A packet without a socket has no owner, so only Not holds
		// (owner_mt in net/netfilter/xt_owner.c).
		return is((w.owned && m.UIDs.Contains(w.p.UID)) != m.Not)
	case rules.OwnerGID:
		return is((w.owned && m.GIDs.Contains(w.p.GID)) != m.Not)
	case rules.CTState:
		return w.state(m)
	case rules.Mark:
		return w.marked(m)
	}
	return maybe
}

// marked compares the bits of the mark that are known.
func (w *walker) marked(m rules.Mark) truth {
	switch {
	case (w.mark^m.Value)&m.Mask&^w.doubt != 0 || m.Value&^m.Mask != 0:
		return is(m.Not)
	case m.Mask&w.doubt != 0:
		return maybe
	}
	return is(!m.Not)
}

// in says whether the address is in a prefix. Without a prefix of the family
// the rule does not exist there, or, with not, the match says nothing.
func (w *walker) in(ps []netip.Prefix, not bool, a netip.Addr) truth {
	for _, p := range ps {
		if p.Contains(a) {
			return is(!not)
		}
	}
	return is(not)
}

// through compares interfaces; none is whether the hook knows no such
// interface, where the kernel compares with the empty name.
func through(name string, not bool, have string, none bool) truth {
	if have == "" && !none {
		if name == "+" {
			return is(!not)
		}
		if name != "lo" { // from and to other hosts nothing goes through lo
			return maybe
		}
	}
	prefix, wild := strings.CutSuffix(name, "+")
	return is((have == name || wild && strings.HasPrefix(have, prefix)) != not)
}

// state compares the states of the packet's connection (conntrack_mt in
// net/netfilter/xt_conntrack.c). In raw, in front of connection tracking, that is
// INVALID, and NEW behind CT (xt_ct_target in net/netfilter/xt_CT.c).
func (w *walker) state(m rules.CTState) truth {
	is := "NEW"
	switch {
	case w.untracked:
		is = "UNTRACKED"
	case !w.zoned:
		is = "INVALID"
	case w.seen && w.p.State == Established:
		is = "ESTABLISHED"
	}
	out := no
	for s := range strings.SplitSeq(m.States, ",") {
		switch {
		case s == is:
			out = yes
		case s == "DNAT" && is == "ESTABLISHED", s == "SNAT" && is == "ESTABLISHED":
			out = max(out, maybe) // whether its first packet was is not known
		case s == "DNAT":
			out = max(out, w.dnat)
		case s == "SNAT":
			out = max(out, w.snat)
		}
	}
	if m.Not {
		return yes - out
	}
	return out
}

// not says why a match does not hold.
func (w *walker) not(m rules.Match) string {
	is := func(not bool) string {
		if not {
			return "is"
		}
		return "is not"
	}
	switch m := m.(type) {
	case rules.Protocol:
		return "it is " + protocolName(w.p.Protocol) + ", not " + protocolName(m)
	case rules.SYN:
		if m.Not {
			return "it opens a connection"
		}
		return "it does not open a connection"
	case rules.Source:
		return w.notIn("source", m.Prefixes, m.Not, w.p.Source.Addr())
	case rules.Destination:
		return w.notIn("destination", m.Prefixes, m.Not, w.p.Destination.Addr())
	case rules.InInterface:
		return "the interface it comes in through " + is(m.Not) + " " + m.Name
	case rules.OutInterface:
		return "the interface it leaves through " + is(m.Not) + " " + m.Name
	case rules.SourcePorts:
		return fmt.Sprintf("source port %d %s one of the rule's", w.p.Source.Port(), is(m.Not))
	case rules.DestinationPorts:
		return "port " + strconv.Itoa(int(w.p.Destination.Port())) + " " + is(m.Not) + " one of the rule's"
	case rules.SourceLocal:
		return fmt.Sprintf("%s %s an address of this host", w.p.Source.Addr(), is(m.Not))
	case rules.Mark:
		return fmt.Sprintf("its mark is %#x", w.mark)
	case rules.DestinationLocal:
		return w.p.Destination.Addr().String() + " " + is(m.Not) + " an address of this host"
	case rules.OwnerUID:
		return w.notOwner("UID", m.UIDs, m.Not, w.p.UID)
	case rules.OwnerGID:
		return w.notOwner("GID", m.GIDs, m.Not, w.p.GID)
	case rules.CTState:
		return fmt.Sprintf("its connection %s %s", is(m.Not), m.States)
	}
	return "it does not hold"
}

func (w *walker) notIn(what string, ps []netip.Prefix, not bool, a netip.Addr) string {
	if not {
		return what + " " + a.String() + " is excepted"
	}
	if !slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Addr().Is4() == (w.family == rules.IPv4) }) {
		return "the rule has no " + w.family.String() + " address"
	}
	if len(ps) == 1 {
		return what + " " + a.String() + " is not in " + ps[0].String()
	}
	return what + " " + a.String() + " is in none of " + strconv.Itoa(len(ps)) + " prefixes"
}

func (w *walker) notOwner(what string, ids rules.UIDs, not bool, id uint32) string {
	switch {
	case !w.owned:
		return "no process of this host sent it"
	case not:
		return fmt.Sprintf("%s %d is excepted", what, id)
	}
	return what + " " + strconv.FormatUint(uint64(id), 10) + " is not " + ids.String()
}

// cannot says why it cannot be told whether a match holds.
func (w *walker) cannot(m rules.Match) string {
	switch m := m.(type) {
	case rules.InInterface:
		return fmt.Sprintf("names interface %s, and through which one the packet came is not known", m.Name)
	case rules.OutInterface:
		return fmt.Sprintf("names interface %s, and through which one the packet leaves is not known", m.Name)
	case rules.Destination:
		return "names a destination, and REDIRECT made it the first address of an interface that is not known"
	case rules.Source, rules.SourcePorts, rules.SourceLocal:
		return "names a source, and nat POSTROUTING may have given the packet another"
	case rules.CTState:
		return fmt.Sprintf("looks for a connection that is %s, and whether it is translated is not known", m.States)
	case rules.Mark:
		return fmt.Sprintf("looks for the mark %#x, and the packet's is not known", m.Value)
	case rules.Opaque:
		return "uses " + m.Text()
	}
	return fmt.Sprintf("uses %T", m)
}
