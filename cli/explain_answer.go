package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// Chains in which a redirection is to the proxy: ours, and those that Kuma's own
// installer makes.
var proxyChains = map[string]string{
	"KUMA_MESH_INBOUND":           "in",
	"KUMA_MESH_INBOUND_REDIRECT":  "in",
	"KUMA_MESH_OUTBOUND":          "out",
	"KUMA_MESH_OUTBOUND_REDIRECT": "out",
	"KUMA_MESH_DNS":               "dns",
	"KUMA_MESH_DNS_TCP":           "dns",
}

// ownersChains tell the proxy's user by their first rule that names one.
var ownersChains = []string{"KUMA_MESH_OUTBOUND_LOOPBACK", "KUMA_MESH_OUTBOUND"}

// proxyOf returns the user whom the rules of the mesh leave alone, if they are
// there.
func proxyOf(s rules.Set) rules.UIDs {
	for _, name := range ownersChains {
		c, _ := s.Chain(rules.NAT, name)
		for _, r := range c.Rules {
			for _, m := range r.Matches {
				if o, ok := m.(rules.OwnerUID); ok && !o.Not {
					return o.UIDs
				}
			}
		}
	}
	return rules.UIDs{}
}

// owners are all users and groups that rules name.
func (g *ground) owners() (users, groups rules.UIDs) {
	each := func(list []rules.Rule) {
		for _, r := range list {
			for _, m := range r.Matches {
				switch m := m.(type) {
				case rules.OwnerUID:
					users = users.Union(m.UIDs)
				case rules.OwnerGID:
					groups = groups.Union(m.GIDs)
				}
			}
		}
	}
	for _, s := range g.sets {
		for _, c := range s.Bases {
			each(c.Rules)
		}
		for _, c := range s.Chains {
			each(c.Rules)
		}
	}
	return users, groups
}

// free is an ID that is none of those, from 1000 on, as users have them.
func free(ids rules.UIDs) uint32 {
	for _, start := range []uint64{1000, 1} {
		id := start
		for _, r := range ids.Ranges() { // in order
			if uint64(r.First) <= id && id <= uint64(r.Last) {
				id = uint64(r.Last) + 1
			}
		}
		if id <= rules.MaxUID {
			return uint32(id)
		}
	}
	return 1000
}

// answer is what explain --output json prints.
type answer struct {
	Verdict string     `json:"verdict"` // untouched, in, out, dns, refused, dropped or unknown
	Port    uint16     `json:"port,omitempty"`
	Reason  string     `json:"reason"`
	Packet  sim.Packet `json:"packet"`
	Rules   string     `json:"rules"`
	Notes   []string   `json:"notes"`
	Trace   []rung     `json:"trace"`
}

// rung is a rule that the packet met.
type rung struct {
	Table   string `json:"table"` // of nftables "inet kuma-tproxy", and chain and rule as nft list has them
	Chain   string `json:"chain"`
	Index   int    `json:"index"` // in its chain, from 1
	Rule    string `json:"rule"`
	Why     string `json:"why,omitempty"` // the rule's comment; of ours it names the setting
	Matched bool   `json:"matched"`
	Because string `json:"because,omitempty"` // why it does not match, or why that is not known
	Backend string `json:"backend,omitempty"` // where there are several
}

// answer walks the packet.
func (g *ground) answer(k sim.Packet) answer {
	t := sim.WalkAll(g.sets, g.env(), k)
	a := answer{Packet: k, Rules: g.what, Notes: distinct(g.notes), Trace: []rung{}}
	a.Verdict, a.Port, a.Reason = g.judge(t)
	for _, s := range t.Steps {
		rule := s.Rule
		rule.Why = ""
		l := rung{string(s.Table), s.Chain, s.Index, rule.String(), s.Rule.Why, s.Matched, s.Because, ""}
		switch n := g.tables[s.Set]; {
		case n != nil:
			l.Table, l.Chain, l.Rule = tableName(g.names[s.Set], n), nftChain(s.Table, s.Chain, n), nftRule(s, n)
		case len(g.sets) > 1:
			l.Backend = g.names[s.Set]
		}
		a.Trace = append(a.Trace, l)
	}
	if a.Verdict == "unknown" && k.InInterface+k.OutInterface == "" && strings.Contains(a.Reason, " names interface ") {
		a.Notes = append(a.Notes, "--interface says through which interface the connection comes or leaves")
	}
	g.hide(t, &a)
	return a
}

// nftChain is what nftables calls a chain.
func nftChain(t rules.Table, chain string, n *rules.Native) string {
	if slices.ContainsFunc(n.Chains, func(c rules.NativeChain) bool { return c.Name == chain }) {
		return chain
	}
	return string(t) + "." + chain
}

// nftRule is the rule of a step as nft list has it, without counter and comment.
func nftRule(s sim.Step, n *rules.Native) string {
	i := slices.IndexFunc(n.Chains, func(c rules.NativeChain) bool { return c.Name == nftChain(s.Table, s.Chain, n) })
	if i < 0 || s.Index > len(n.Chains[i].Rules) || s.Rule.At != s.Index {
		return s.Rule.String()
	}
	r := n.Chains[i].Rules[s.Index-1]
	odd := r.Unknown
	r.Counted, r.Comment, r.Unknown = false, "", ""
	if odd != "" { // behind what is understood
		r.Action = rules.Nothing{}
	}
	return strings.TrimSpace(r.String() + " " + odd)
}

// route is the way to a step.
func (g *ground) route(t sim.Trace, s sim.Step) string {
	text := t.Route(s)
	n := g.tables[s.Set]
	if n == nil {
		return text
	}
	chains := strings.Split(strings.TrimPrefix(text, string(s.Table)+" "), " -> ")
	for i, c := range chains {
		name, at, _ := strings.Cut(c, " #")
		chains[i] = nftChain(s.Table, name, n) + " #" + at
	}
	route := strings.Join(chains, " -> ")
	if n.Table != tproxy.NFTable {
		route = tableName(g.names[s.Set], n) + " " + route
	}
	return route
}

// judge puts a verdict in the words of the mesh.
func (g *ground) judge(t sim.Trace) (verdict string, port uint16, reason string) {
	step, decided := t.Deciding()
	reason = t.Reason
	if decided && t.Kind != sim.Unknown && !t.Elsewhere {
		reason += " (" + g.route(t, step) + ")"
	}
	if decided && t.Kind == sim.Unknown && g.tables[step.Set] != nil {
		reason += " (" + tableName(g.names[step.Set], g.tables[step.Set]) + ")"
	}
	if t.Kind != sim.Redirected {
		return t.Kind.String(), 0, reason
	}
	if name, ours := proxyChains[step.Chain]; ours {
		return name, t.Port, reason
	}
	return "untouched", 0, fmt.Sprintf("%s answers first: %s redirects the connection to port %d, and is no rule of ours", step.Chain, g.route(t, step), t.Port)
}

// hide makes the verdict unknown where the packet meets what was not seen.
func (g *ground) hide(t sim.Trace, a *answer) {
	var names []string
	for _, h := range g.hidden {
		if h.Meets(t.Packet.Family(), passes(t, g.env())...) {
			names = append(names, h.What)
		}
	}
	if names == nil {
		return
	}
	what := fmt.Sprintf("cannot tell: the packet meets what iptables-save does not show (%s)", strings.Join(names, "; "))
	if a.Verdict == "unknown" {
		a.Reason = what + "; and " + a.Reason
		return
	}
	shown := a.Verdict
	if a.Port != 0 {
		shown = fmt.Sprintf("%s, to port %d", shown, a.Port)
	}
	a.Reason = fmt.Sprintf("%s; by what it shows: %s: %s", what, shown, a.Reason)
	a.Verdict, a.Port = "unknown", 0
}

// passes are the hooks on a packet's way.
func passes(t sim.Trace, e sim.Env) []rules.Hook {
	in := []rules.Hook{rules.Prerouting, rules.Input}
	out := []rules.Hook{rules.Output, rules.Postrouting}
	switch t.Packet.Path {
	case sim.In:
		return in
	case sim.Forwarded:
		return append(in, rules.Forward, rules.Postrouting)
	}
	if t.Kind == sim.Redirected || e.IsLocal(t.Packet.Destination.Addr()) {
		return append(out, in...)
	}
	return out
}

// manyMisses is from how many rules in a row that do not match only the first
// and the last are printed: kube-proxy's are thousands.
const manyMisses = 8

// print writes the answer for people; the last line is the verdict.
func (a answer) print(w io.Writer) error {
	var p page
	p.linef("packet: %s", a.Packet)
	p.linef("rules: %s", a.Rules)
	p.notes(a.Notes)
	for i := 0; i < len(a.Trace); i++ {
		p.rung(a.Trace[i])
		if n := a.misses(i); n > manyMisses {
			p.linef("  ... %d more rules of %s that do not match", n-2, a.Trace[i].Chain)
			i += n - 2
		}
	}
	verdict := a.Verdict
	if a.Port != 0 {
		verdict = fmt.Sprintf("%s, to port %d", verdict, a.Port)
	}
	p.linef("verdict: %s: %s", verdict, oneLine(a.Reason))
	return write(w, p.Bytes())
}

// misses counts the rules from i on, of one chain, that do not match.
func (a answer) misses(i int) int {
	end := slices.IndexFunc(a.Trace[i:], func(l rung) bool {
		return l.Matched || l.Chain != a.Trace[i].Chain || l.Table != a.Trace[i].Table || l.Backend != a.Trace[i].Backend
	})
	if end < 0 {
		return len(a.Trace) - i
	}
	return end
}

func (p *page) rung(l rung) {
	sign, place := " ", fmt.Sprintf("%s %s #%d", l.Table, l.Chain, l.Index)
	if l.Matched {
		sign = "*"
	}
	if l.Backend != "" {
		place = l.Backend + " " + place
	}
	p.linef("%s %s: %s", sign, place, oneLine(l.Rule))
	switch {
	case l.Matched && l.Why != "":
		p.linef("      matched: %s", oneLine(l.Why))
	case l.Matched:
		p.linef("      matched")
	case l.Why != "":
		p.linef("      no match: %s [%s]", oneLine(l.Because), oneLine(l.Why))
	default:
		p.linef("      no match: %s", oneLine(l.Because))
	}
}

// oneLine keeps a foreign comment, which may hold anything, in its line.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}
