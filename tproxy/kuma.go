package tproxy

import (
	"cmp"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Found is what Find found in the rules of a family.
type Found struct {
	// Ours is what an install replaces and a removal takes out: what this module
	// made, and what Kuma's own installers left. Each rule of a base chain has its
	// place in At, and the chain in Via where that is firewalld's for direct rules.
	Ours rules.Set
	// References are the foreign rules that jump to one of those chains: as long as
	// they stand, the kernel does not let the chain go.
	References []rules.Reference
	// Kuma are the chains, and the base chains, with something in them that Kuma's
	// own installers made, as "nat OUTPUT".
	Kuma []string
	// Doubtful are rules without a comment, beside those of an installer of Kuma's
	// that left comments out, which it may have made and anybody else as well. They
	// are not among Ours.
	Doubtful []rules.Reference
}

// Find picks out of live, the rules of family f as rules.ParseSave returned them,
// what is ours and what Kuma's own installers left: kumactl, kuma-init and kuma-cni
// of Kuma 1.x (chains MESH_INBOUND and others), and those of 1.6 to 3.x (chains
// KUMA_MESH_INBOUND and others, and rules beside them in the base chains of nat, raw
// and mangle).
//
// Chains are known by table and name, where those of Kuma 1.x, whose names anybody
// could choose, must also hold nothing that it does not write. Rules of base chains
// are known by their exact shape, and by Kuma's comment or, for an install without
// comments, by what its chains say of the proxy's user and ports. A word in a line
// is no ground: a foreign KUMA_MESH_MINE stays, and so does a foreign rule whose
// comment mentions us.
func Find(f rules.Family, live rules.Set) Found {
	known := Known()
	for _, c := range kumaChains {
		known.Chains = append(known.Chains, rules.Chain{Table: c.table, Name: c.name})
	}
	if firstKumaHolds(live) {
		for _, c := range firstKumaChains {
			known.Chains = append(known.Chains, rules.Chain{Table: c.table, Name: c.name})
		}
	}
	var out Found
	out.Ours, out.References = live.Ours(f, known)
	k := kuma{live: live, ours: out.Ours}
	k.live.Bases = slices.Clone(live.Bases)
	for i, c := range live.Bases {
		k.live.Bases[i].Rules = live.Inline(c)
	}
	k.learn()
	for _, c := range k.live.Bases {
		mine, doubtful := k.of(c)
		if len(mine) > 0 {
			out.Kuma = append(out.Kuma, string(c.Table)+" "+string(c.Hook))
			out.add(c, mine)
		}
		for _, i := range doubtful {
			r := c.Rules[i]
			out.Doubtful = append(out.Doubtful, rules.Reference{Table: c.Table, Chain: cmp.Or(r.Via, string(c.Hook)), Index: r.At, Rule: r})
		}
	}
	for _, c := range out.Ours.Chains {
		if k.made(c) {
			out.Kuma = append(out.Kuma, string(c.Table)+" "+c.Name)
		}
	}
	return out
}

// add puts rules of a base chain, as rules.Set.Inline has them, by their index, among
// what is ours.
func (o *Found) add(c rules.BaseChain, mine []int) {
	i := slices.IndexFunc(o.Ours.Bases, func(b rules.BaseChain) bool { return b.Table == c.Table && b.Hook == c.Hook })
	if i < 0 {
		i = len(o.Ours.Bases)
		o.Ours.Bases = append(o.Ours.Bases, rules.BaseChain{Table: c.Table, Hook: c.Hook})
	}
	b := &o.Ours.Bases[i]
	place := func(r rules.Rule) int {
		return slices.IndexFunc(c.Rules, func(q rules.Rule) bool { return q.At == r.At && q.Via == r.Via })
	}
	for _, j := range mine {
		b.Rules = append(b.Rules, c.Rules[j])
	}
	slices.SortStableFunc(b.Rules, func(x, y rules.Rule) int { return place(x) - place(y) })
	o.References = slices.DeleteFunc(o.References, func(r rules.Reference) bool {
		return o.Ours.Covers(r.Table, r.Chain, r.Index)
	})
}

type chainName struct {
	table rules.Table
	name  string
}

// The chains of Kuma's installers beside those that bear a name of ours. The names
// are those of Kuma 1.x (pkg/transparentproxy/istio, constants.go) and of kuma-net
// and Kuma 2.x and 3.x (iptables/consts).
var (
	kumaChains = []chainName{
		{rules.NAT, "KUMA_MESH_INBOUND_REDIRECT"},
		{rules.NAT, "KUMA_MESH_OUTBOUND_REDIRECT"},
	}
	firstKumaChains = []chainName{
		{rules.NAT, "MESH_INBOUND"},
		{rules.NAT, "MESH_OUTPUT"},
		{rules.NAT, "MESH_REDIRECT"},
		{rules.NAT, "MESH_IN_REDIRECT"},
		{rules.Mangle, "MESH_INBOUND"},
		{rules.Mangle, "MESH_DIVERT"},
		{rules.Mangle, "MESH_TPROXY"},
	}
)

// KnownChain reports whether Find may take a chain of that table and name for ours
// or Kuma's.
func KnownChain(t rules.Table, name string) bool {
	if _, ok := Known().Chain(t, name); ok {
		return true
	}
	c := chainName{t, name}
	return slices.Contains(kumaChains, c) || slices.Contains(firstKumaChains, c)
}

// firstKumaHolds reports whether the chains that bear the names of Kuma 1.x hold
// nothing but what it writes into them.
func firstKumaHolds(live rules.Set) bool {
	for _, c := range live.Chains {
		if !slices.Contains(firstKumaChains, chainName{c.Table, c.Name}) {
			continue
		}
		for _, r := range c.Rules {
			switch a := r.Action.(type) {
			case rules.Return, rules.Redirect:
			case rules.Accept, rules.SetMark:
				if c.Table != rules.Mangle {
					return false
				}
			case rules.Jump:
				// The upstream DNS of its proxy may go to a chain of Docker's.
				if a.Chain != chainDocker && !slices.Contains(firstKumaChains, chainName{c.Table, a.Chain}) {
					return false
				}
			case rules.Opaque:
				if !strings.HasPrefix(a.Text(), "-j TPROXY ") {
					return false
				}
			default:
				return false
			}
			if r.Why != "" { // it wrote no comments
				return false
			}
		}
	}
	return true
}

// chainDocker holds Docker's rules for its embedded DNS server.
const chainDocker = "DOCKER_OUTPUT"

// kuma tells what Kuma's installers made.
type kuma struct {
	live, ours rules.Set

	bare      bool         // one of its jumps is there and has no comment
	ids       []rules.Rule // that return what the proxy's users and groups send
	redirects []uint16     // where it sends connections
	zones     bool         // the two zones of its own queries and answers are there
	dns       bool         // its rule for the proxy's own queries is there
	networks  []string     // interfaces whose connections it redirects
}

// learn reads what the rules of an install without comments are known by.
func (k *kuma) learn() {
	for _, c := range k.ours.Chains {
		for _, r := range c.Rules {
			switch a := r.Action.(type) {
			case rules.Return:
				if p, ok := partsOf(r); ok && p.owned() && len(r.Matches) == 1 {
					k.ids = append(k.ids, r)
				}
			case rules.Redirect:
				k.redirects = append(k.redirects, a.Port)
			}
		}
	}
	for _, c := range k.live.Bases {
		for _, r := range c.Rules {
			if c.Table == rules.NAT && r.Why == "" && k.jump(c, r) {
				k.bare = true
			}
		}
	}
	output, _ := k.live.Base(rules.Raw, rules.Output)
	for _, r := range output.Rules {
		if p, ok := partsOf(r); ok && p.queries() && p.owned() && k.zonedFor(p) && r.Action == rules.Action(rules.CTZone{Zone: 1}) {
			k.zones = k.zones || slices.ContainsFunc(output.Rules, func(q rules.Rule) bool {
				o, ok := partsOf(q)
				return ok && o.answers() && o.sameOwner(p) && q.Action == rules.Action(rules.CTZone{Zone: 2})
			})
		}
	}
	output, _ = k.live.Base(rules.NAT, rules.Output)
	for _, r := range output.Rules {
		if p, ok := partsOf(r); ok && p.queries() && p.owned() && k.proxy(p) && returns(r) {
			k.dns = true
		}
	}
	prerouting, _ := k.live.Base(rules.NAT, rules.Prerouting)
	for _, r := range prerouting.Rules {
		if p, ok := partsOf(r); ok && p.network() && k.redirected(r) {
			k.networks = append(k.networks, p.in)
		}
	}
}

// of returns the rules of a base chain that Kuma's installer made, and those that it
// may have made.
func (k *kuma) of(c rules.BaseChain) (mine, doubtful []int) {
	is := make([]bool, len(c.Rules))
	unsure := make([]bool, len(c.Rules))
	for i, r := range c.Rules {
		if strings.Contains(r.Listed(), "\n") {
			continue // no script can name it
		}
		commented := strings.HasPrefix(r.Why, commentPrefix)
		if r.Why != "" && !commented {
			continue
		}
		switch {
		case k.jump(c, r):
			is[i] = true
		case commented:
			is[i] = k.shaped(c, r)
		case c.Table == rules.Raw:
			is[i] = k.zones && k.zoned(c, r)
		case k.bare && k.shaped(c, r):
			is[i] = k.told(c, r)
			unsure[i] = !is[i]
		}
	}
	for i := range c.Rules {
		if unsure[i] && !between(is, unsure, i) {
			doubtful = append(doubtful, i)
			continue
		}
		if is[i] || unsure[i] {
			mine = append(mine, i)
		}
	}
	return mine, doubtful
}

// between reports whether the rules around an unsure one, others unsure of the same
// kind apart, are Kuma's on both sides: it inserts its rules one behind the other.
func between(is, unsure []bool, i int) bool {
	before, behind := i-1, i+1
	for before >= 0 && unsure[before] {
		before--
	}
	for behind < len(is) && unsure[behind] {
		behind++
	}
	return before >= 0 && is[before] && behind < len(is) && is[behind]
}

// jump reports whether the rule is the one that leads to Kuma's chain.
func (k *kuma) jump(c rules.BaseChain, r rules.Rule) bool {
	if r.Why != "" && !strings.HasPrefix(r.Why, commentPrefix) || len(r.Matches) != 1 || r.Matches[0] != rules.Match(rules.TCP) {
		return false
	}
	a, ok := r.Action.(rules.Jump)
	if _, there := k.ours.Chain(c.Table, a.Chain); !ok || !there {
		return false
	}
	switch c.Hook {
	case rules.Prerouting:
		return a.Chain == chainInbound || a.Chain == "MESH_INBOUND"
	case rules.Output:
		return a.Chain == chainOutbound || a.Chain == "MESH_OUTPUT"
	}
	return false
}

// shaped reports whether Kuma's installer writes such a rule into the base chain.
func (k *kuma) shaped(c rules.BaseChain, r rules.Rule) bool {
	if c.Table == rules.Raw {
		return k.zoned(c, r)
	}
	if c.Table == rules.NAT && len(r.Matches) == 0 {
		return logs(r, c.Hook)
	}
	p, ok := partsOf(r)
	if !ok {
		return false
	}
	_, redirect := r.Action.(rules.Redirect)
	_, drop := r.Action.(rules.Drop)
	switch {
	case c.Table == rules.Mangle && c.Hook == rules.Prerouting:
		return drop && p.states == "INVALID" && len(r.Matches) == 1
	case c.Table != rules.NAT:
		return false
	case c.Hook == rules.Prerouting:
		return redirect && p.in != "" && (p.network() || p.queries() && len(r.Matches) == 3)
	case c.Hook != rules.Output:
		return false
	}
	switch {
	case p.queries() && p.owned():
		return returns(r)
	case p.queries():
		return redirect && (len(r.Matches) == 2 || p.to && len(r.Matches) == 3)
	case p.proto == rules.TCP && p.port53() && p.ownerNot:
		return r.Action == rules.Action(rules.Return{}) && len(r.Matches) == 3
	case p.owned() && p.ports && multiport(r):
		return r.Action == rules.Action(rules.Return{}) && len(r.Matches) == 3
	}
	return p.to && len(r.Matches) == 1 && r.Action == rules.Action(rules.Return{})
}

// zoned reports whether Kuma's installer writes such a rule into raw.
func (k *kuma) zoned(c rules.BaseChain, r rules.Rule) bool {
	a, ok := r.Action.(rules.CTZone)
	p, known := partsOf(r)
	switch {
	case !ok || !known:
		return false
	case c.Hook == rules.Prerouting:
		return a.Zone == 1 && p.fromPort53() && (len(r.Matches) == 2 || (p.to || p.from) && len(r.Matches) == 3)
	case c.Hook != rules.Output:
		return false
	case p.queries() && p.owned():
		return a.Zone == 1 && len(r.Matches) == 3
	case p.queries():
		return a.Zone == 2 && (len(r.Matches) == 2 || p.to && len(r.Matches) == 3)
	}
	return a.Zone == 2 && p.answers() && p.owned() && len(r.Matches) == 3
}

// told reports of a rule without a comment that has Kuma's shape whether its chains
// say that it is.
func (k *kuma) told(c rules.BaseChain, r rules.Rule) bool {
	p, ok := partsOf(r)
	switch {
	case !ok || len(r.Matches) == 0: // what it logs begins with the chain's name
		return len(r.Matches) == 0
	case c.Table == rules.Mangle:
		return false // everybody drops what is invalid
	case c.Hook == rules.Prerouting:
		return slices.Contains(k.networks, p.in)
	case p.owned() && multiport(r):
		return true // nobody else excludes a user so
	case p.owned() || p.ownerNot:
		return k.proxy(p)
	}
	return p.queries() && k.dns
}

// multiport reports whether the ports of a rule, be it one, are a multiport match: so
// Kuma's installer writes those of a user.
func multiport(r rules.Rule) bool { return strings.Contains(r.Listed(), "-m multiport ") }

// proxy reports whether the owner is one whose connections Kuma's chain returns; with
// outbound redirection off it names none.
func (k *kuma) proxy(p parts) bool {
	if len(k.ids) == 0 {
		return k.bare
	}
	return slices.ContainsFunc(k.ids, func(r rules.Rule) bool {
		o, _ := partsOf(r)
		return o.sameOwner(p)
	})
}

// zonedFor reports whether zones of an owner's own queries, without comments, can be
// Kuma's: Istio writes the same for a user of its own. Where Kuma's chains stand they
// name the owner. Where ours have taken their place already, and the run that did was
// killed before raw, it is whoever no chain of others names; where neither stand, nobody.
func (k *kuma) zonedFor(p parts) bool {
	if k.bare || k.proxy(p) {
		return k.proxy(p)
	}
	return slices.ContainsFunc(k.ours.Chains, func(c rules.Chain) bool { return c.Table == rules.NAT }) &&
		!slices.ContainsFunc(k.live.Chains, func(c rules.Chain) bool {
			_, mine := k.ours.Chain(c.Table, c.Name)
			return !mine && slices.ContainsFunc(c.Rules, func(r rules.Rule) bool {
				o, _ := partsOf(r)
				return o.owned() && o.sameOwner(p)
			})
		})
}

func (k *kuma) redirected(r rules.Rule) bool {
	a, ok := r.Action.(rules.Redirect)
	return ok && slices.Contains(k.redirects, a.Port)
}

// made reports whether Kuma's installer made a chain that is ours by its name.
func (k *kuma) made(c rules.Chain) bool {
	own := chainName{c.Table, c.Name}
	if slices.Contains(kumaChains, own) || slices.Contains(firstKumaChains, own) {
		return true
	}
	if c.Name != chainInbound && c.Name != chainOutbound {
		return false
	}
	return slices.ContainsFunc(c.Rules, func(r rules.Rule) bool {
		return slices.Contains(kumaChains, chainName{c.Table, r.Target()})
	})
}

// returns reports whether the rule leaves a query of the proxy alone.
func returns(r rules.Rule) bool {
	return len(r.Matches) == 3 && (r.Action == rules.Action(rules.Return{}) || r.Action == rules.Action(rules.Jump{Chain: chainDocker}))
}

// logs reports whether the rule logs every packet of the hook, as Kuma's does.
func logs(r rules.Rule, h rules.Hook) bool {
	o, ok := r.Action.(rules.Opaque)
	words := strings.Fields(o.Text())
	return ok && len(words) >= 4 && words[0] == "-j" && words[1] == "LOG" && words[2] == "--log-prefix" &&
		strings.Trim(words[3], `"`) == string(h)+":" && (len(words) == 4 || len(words) == 6 && words[4] == "--log-level")
}

// parts are the matches of a rule of the few kinds that Kuma's have.
type parts struct {
	proto    rules.Protocol
	in       string
	to, from bool // an address or network of one kind, not negated
	toNot    bool
	states   string
	ports    bool // any destination ports
	dport    rules.Ports
	sport    rules.Ports
	uid, gid rules.UIDs
	ownerNot bool
}

// partsOf takes a rule's matches apart; ok is false where there is one that no rule
// of Kuma's has.
func partsOf(r rules.Rule) (p parts, ok bool) {
	for _, m := range r.Matches {
		not := false // where a negated one is not expected
		switch m := m.(type) {
		case rules.Protocol:
			p.proto = m
		case rules.Source:
			p.from, not = true, m.Not
		case rules.Destination:
			p.to, p.toNot = !m.Not, m.Not
		case rules.InInterface:
			p.in, not = m.Name, m.Not
		case rules.DestinationPorts:
			p.ports, p.dport, not = true, m.Ports, m.Not
		case rules.SourcePorts:
			p.sport, not = m.Ports, m.Not
		case rules.OwnerUID:
			p.uid, p.ownerNot = m.UIDs, m.Not
		case rules.OwnerGID:
			p.gid, p.ownerNot = m.GIDs, m.Not
		case rules.CTState:
			p.states, not = m.States, m.Not
		default:
			not = true
		}
		if not {
			return parts{}, false
		}
	}
	return p, true
}

func (p parts) port53() bool     { return p.dport.Equal(rules.Port(53)) }
func (p parts) fromPort53() bool { return p.proto == rules.UDP && p.sport.Equal(rules.Port(53)) }
func (p parts) queries() bool    { return p.proto == rules.UDP && p.port53() && !p.toNot }
func (p parts) answers() bool    { return p.proto == rules.UDP && !p.sport.IsEmpty() && !p.ports }
func (p parts) network() bool {
	return p.in != "" && p.toNot && p.proto == rules.TCP && !p.ports && !p.from
}

// owned reports whether the rule is for what one user or group sends.
func (p parts) owned() bool { return !p.ownerNot && (!p.uid.IsEmpty() || !p.gid.IsEmpty()) }

func (p parts) sameOwner(q parts) bool { return p.uid.Equal(q.uid) && p.gid.Equal(q.gid) }
