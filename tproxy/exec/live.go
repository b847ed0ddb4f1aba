package exec

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Live is what a network namespace holds of netfilter, ours and others'.
type Live struct {
	// Rules are those that iptables-save prints, and those of our table in nftables: for
	// each family one entry for each variant of iptables that has tables here, and for
	// the table.
	Rules []LiveRules
	// Hidden is what sees packets and what iptables-save does not show.
	Hidden []Hidden
	// Foreign are tables of others in nftables, as far as they are understood: what is
	// not is rules.Opaque. Each is Hidden as well, by the same What.
	Foreign []ForeignRules
	// Local are the addresses of the interfaces, with their networks.
	Local []netip.Prefix
	// Routes say how a packet of this host gets to the addresses that Live was
	// asked about.
	Routes map[netip.Addr]Route
}

// LiveRules are the rules of a family that one variant of iptables, or our table in
// nftables, holds. Of the latter the Set is what packets of the family meet of it
// (rules.Native.For).
type LiveRules struct {
	Family  rules.Family
	Backend tproxy.Backend
	Set     rules.Set
	// Table is all of the table of nftables, for both families.
	Table *rules.Native
}

// ForeignRules are those of a table of nftables that is not ours, as packets of a family
// meet them.
type ForeignRules struct {
	What   string // as Hidden has it, such as "table inet firewalld"
	Family rules.Family
	Set    rules.Set
	Table  *rules.Native
}

// Route is the way to an address; both are zero where there is none.
type Route struct {
	Interface string
	Source    netip.Addr
	// Local is whether the address is this host's: a local route can say so, of an
	// address that no interface has.
	Local bool
}

// Hidden is a part of the rules that no iptables-save shows, or that it shows as
// something else.
type Hidden struct {
	// What names it, such as "table inet firewalld".
	What string
	// Family is whose packets it sees; 0 is both.
	Family rules.Family
	// Hooks are where it sees them; empty where that is not known.
	Hooks []rules.Hook
	// Late is whether it can let packets pass or not, and nothing else that matters to
	// a redirection by iptables: it neither translates at its priority or before, nor
	// stands in front of conntrack.
	Late bool

	// nats are its chains that translate, and early is whether it has any other that is
	// not late.
	nats  []kernel.NFTBase
	early bool
}

// lateFor is Late for rules of ours in a backend: those in nftables have priorities of
// their own.
func (h Hidden) lateFor(b tproxy.Backend) bool {
	if b != tproxy.NFTables {
		return h.Late
	}
	return !h.early && !slices.ContainsFunc(h.nats, inFront)
}

// inFront reports whether a chain that translates comes before ours in nftables, or may:
// of equal priorities the one that was made last does.
func inFront(b kernel.NFTBase) bool { return b.Type == "nat" && b.Priority <= ownPriority(b.Hook) }

// ownPriority is that of our chain of nat in nftables at a hook.
func ownPriority(hook string) int32 {
	if hook == string(rules.Output) {
		return natPriority - 1
	}
	return natPriority + 1
}

// Meets reports whether a packet of the family that passes one of the hooks
// meets it.
func (h Hidden) Meets(f rules.Family, hooks ...rules.Hook) bool {
	if h.Family != 0 && h.Family != f {
		return false
	}
	return len(h.Hooks) == 0 || slices.ContainsFunc(h.Hooks, func(k rules.Hook) bool { return slices.Contains(hooks, k) })
}

// Live reads the rules of this network namespace, whoever made them, and how
// packets get to the addresses. It changes nothing: a save program of
// iptables-legacy is started only where its tables exist already. It needs root:
// without, the error is ErrNotRoot.
func (r *Runner) Live(ctx context.Context, to ...netip.Addr) (Live, error) {
	s, err := r.session()
	if err != nil {
		return Live{}, err
	}
	if err := s.m.privileged(); err != nil {
		return Live{}, err
	}
	l := Live{Routes: make(map[netip.Addr]Route)}
	read := reader{session: s, ctx: ctx, variants: s.variants(ctx), Live: &l}
	if err := read.table(); err != nil {
		return Live{}, err
	}
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		for _, f := range rules.Families() {
			if err := read.family(b, f); err != nil {
				return Live{}, err
			}
		}
	}
	if err := read.others(); err != nil {
		return Live{}, err
	}
	if err := read.foreign(); err != nil {
		return Live{}, err
	}
	if l.Local, err = s.m.localAddresses(); err != nil {
		return Live{}, fmt.Errorf("addresses of this host: %w", err)
	}
	for _, a := range to {
		way, err := s.m.routeTo(a)
		if err != nil {
			return Live{}, err
		}
		l.Routes[a] = Route(way)
	}
	return l, ctx.Err()
}

// reader fills a Live.
type reader struct {
	*session
	*Live
	ctx      context.Context
	variants []tproxy.Variant
	shown    []string // the tables of nftables that iptables-save shows
}

// table reads our table in nftables.
func (r *reader) table() error {
	if !slices.ContainsFunc(r.variants, func(v tproxy.Variant) bool { return v.Backend == tproxy.NFTables }) {
		return nil
	}
	n, err := r.m.ownTable()
	if err != nil || n == nil {
		return err
	}
	set := n.Set()
	for _, f := range rules.Families() {
		if set.Has(f) {
			r.Rules = append(r.Rules, LiveRules{Family: f, Backend: tproxy.NFTables, Set: n.For(f), Table: n})
		}
	}
	return nil
}

// family reads what a variant holds of a family, if it has tables at all.
func (r *reader) family(b tproxy.Backend, f rules.Family) error {
	nft := b == tproxy.IPTablesNFT
	tables, err := r.m.tables(nft, f)
	if err != nil {
		return fmt.Errorf("%s tables of %s: %w", f, b, err)
	}
	if len(tables) == 0 {
		return nil
	}
	i := slices.IndexFunc(r.variants, func(v tproxy.Variant) bool { return v.Backend == b && v.For(f).Save != "" })
	if i < 0 {
		if !nft { // of nft, others names the chains
			r.hide(Hidden{What: fmt.Sprintf("the %s rules of %s, whose save program is not here", f, b), Family: f})
		}
		return nil
	}
	text, step, err := r.savedText(r.ctx, r.variants[i], f)
	if err != nil {
		return err
	}
	set, err := rules.ParseSave(f, text)
	if err != nil {
		return &ApplyError{Step: step, Family: f, Program: r.variants[i].For(f).Save, Err: err}
	}
	r.Rules = append(r.Rules, LiveRules{Family: f, Backend: b, Set: set})
	if !nft {
		return nil
	}
	for _, t := range tables {
		if incompatible(text, t) {
			continue
		}
		r.shown = append(r.shown, nftFamily(f)+" "+string(t))
		native, err := r.m.native(f, t)
		if err != nil {
			return err
		}
		late := t == rules.Filter || t == rules.Security
		for _, what := range native {
			r.hide(Hidden{What: fmt.Sprintf("a rule made with nft in table %s %s, %s", nftFamily(f), t, what), Family: f, Late: late, early: !late && t != rules.NAT})
		}
	}
	return nil
}

// others finds the base chains of nftables that iptables-save does not show.
func (r *reader) others() error {
	bases, err := r.basesOfOthers()
	if err != nil {
		return err
	}
	for _, b := range bases {
		table := b.Table.Family + " " + b.Table.Name
		what := "table " + table
		if slices.Contains(r.shown, table) {
			if listed(b) {
				continue
			}
			what = fmt.Sprintf("chain %s of %s, priority %d", b.Chain, what, b.Priority)
		}
		family := map[string]rules.Family{"ip": rules.IPv4, "ip6": rules.IPv6}[b.Table.Family]
		late := b.Priority > conntrackPriority
		var nats []kernel.NFTBase
		if b.Type == "nat" {
			late, nats = b.Priority > natPriority, []kernel.NFTBase{b}
		}
		var hooks []rules.Hook
		switch b.Hook {
		case "?":
		case "INGRESS": // in front of PREROUTING, and so of conntrack, at any priority
			hooks, late = []rules.Hook{rules.Prerouting}, false
		case "EGRESS": // behind POSTROUTING
			hooks = []rules.Hook{rules.Postrouting}
		default:
			hooks = []rules.Hook{rules.Hook(b.Hook)}
		}
		r.hide(Hidden{What: what, Family: family, Hooks: hooks, Late: late, nats: nats, early: !late && nats == nil})
	}
	return nil
}

// foreign reads those tables of others of which all base chains are called where a walk
// knows it.
func (r *reader) foreign() error {
	bases, err := r.basesOfOthers()
	if err != nil {
		return err
	}
	doubtful := make(map[kernel.NFTTable]bool)
	var tables []kernel.NFTTable
	for _, b := range bases {
		table := b.Table.Family + " " + b.Table.Name
		if slices.Contains(r.shown, table) {
			continue
		}
		if !slices.Contains(tables, b.Table) {
			tables = append(tables, b.Table)
		}
		doubtful[b.Table] = doubtful[b.Table] || !walkable(b)
	}
	for _, t := range tables {
		if doubtful[t] {
			continue
		}
		n, err := r.m.foreignTable(t.Family, t.Name)
		if err != nil || n == nil { // it stays Hidden
			r.log.Debug("a table of others cannot be read", "table", t, "error", err)
			continue
		}
		for _, f := range rules.Families() {
			if t.Family == "inet" || t.Family == nftFamily(f) {
				r.Foreign = append(r.Foreign, ForeignRules{fmt.Sprintf("table %s %s", t.Family, t.Name), f, n.For(f), n})
			}
		}
	}
	return nil
}

// walkable reports whether sim knows where the kernel calls a chain: not in front of
// PREROUTING or behind POSTROUTING, not at the priority of connection tracking, and not
// where a packet may have been given another source.
func walkable(b kernel.NFTBase) bool {
	switch {
	case b.Table.Family == "netdev", b.Hook == "INGRESS", b.Hook == "EGRESS", b.Hook == "?":
		return false
	case b.Type == "nat":
		return true
	}
	return b.Priority != conntrackPriority && (b.Hook != "POSTROUTING" || b.Priority < 100)
}

// The priorities of connection tracking, and of translation by iptables
// (NF_IP_PRI_CONNTRACK and NF_IP_PRI_NAT_DST, linux/netfilter_ipv4.h).
const (
	conntrackPriority = -200
	natPriority       = -100
)

// listed reports whether iptables-nft-save shows the chain, of a table that it
// shows: it passes over other base chains, and says so in a comment alone
// (nft_is_chain_compatible and xtables_ipv4 in iptables/nft.c).
func listed(b kernel.NFTBase) bool {
	kind, priority := "filter", map[string]int32{"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 150}[b.Table.Name]
	switch {
	case b.Table.Name == "nat":
		if kind = "nat"; b.Hook == "INPUT" || b.Hook == "POSTROUTING" {
			priority = 100
		}
	case b.Table.Name == "mangle" && b.Hook == "OUTPUT":
		kind = "route"
	}
	return b.Chain == b.Hook && b.Type == kind && b.Priority == priority
}

// hide notes what is hidden, a table once.
func (r *reader) hide(h Hidden) {
	for i, old := range r.Hidden {
		if old.What != h.What || old.Family != h.Family {
			continue
		}
		if len(h.Hooks) == 0 || len(old.Hooks) == 0 {
			r.Hidden[i].Hooks = nil
		} else if !slices.Contains(old.Hooks, h.Hooks[0]) {
			r.Hidden[i].Hooks = append(old.Hooks, h.Hooks...)
		}
		r.Hidden[i].Late = old.Late && h.Late
		r.Hidden[i].nats, r.Hidden[i].early = append(old.nats, h.nats...), old.early || h.early
		return
	}
	r.Hidden = append(r.Hidden, h)
}
