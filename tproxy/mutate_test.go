package tproxy_test

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	. "github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// survivorsFile lists the groups of mutants that no packet tells from the plan,
// each with the reason.
const survivorsFile = "testdata/mutants-survive.txt"

// drawnPlans is how many of the mutated plans are of drawn Configs, and drawn is
// how many packets each plan is given before any is aimed at a rule.
const drawnPlans, drawn = 30, 800

// TestMutants changes each rule and each match of many plans, one at a time, and
// asks the contract whether a packet shows it. `make mutate` runs it.
//
// A change to a rule can only be seen by packets that meet the rule. So each
// mutant is judged by all packets of the plan that do, among them some aimed at
// the ends of the rule's ranges: by Expect (theorem 4), and what survives that by
// the other theorems too. What iptables would refuse is killed by Set.Validate.
func TestMutants(t *testing.T) {
	if !strings.Contains(os.Getenv("TPROXY_SUITE"), "mutate") {
		t.Skip("TPROXY_SUITE does not name mutate")
	}
	var total tally
	groups := map[string]*tally{}
	cases := mutationCases(t)
	for _, c := range cases {
		mutateCase(t, c, func(at spot, kind string, by string, show func() string) {
			key := strings.Join([]string{at.String(), reasonOf(c, at), kind}, " | ")
			g := groups[key]
			if g == nil {
				g = &tally{by: map[string]int{}}
				groups[key] = g
			}
			g.count(by)
			total.count(by)
			if by == "" && g.example == "" {
				g.example = show()
			}
		})
	}
	report(t, groups, total, len(cases))
}

// tally counts mutants, the killed ones by what killed them.
type tally struct {
	killed, survived int
	by               map[string]int
	example          string
}

func (g *tally) count(by string) {
	if by == "" {
		g.survived++
		return
	}
	if g.by == nil {
		g.by = map[string]int{}
	}
	g.killed++
	g.by[by]++
}

// report prints the groups and compares the survivors with those that are known.
func report(t *testing.T, groups map[string]*tally, total tally, plans int) {
	out := t.Output()
	known := survivors(t)
	explained := func(scope, key string) (scopes []string) {
		for i := range known {
			if known[i].matches(key) {
				if known[i].scope == scope {
					known[i].used = true
					return nil
				}
				scopes = append(scopes, known[i].scope)
			}
		}
		return append(scopes, "not listed")
	}
	for _, key := range slices.Sorted(maps.Keys(groups)) {
		g := groups[key]
		scope := ""
		switch {
		case g.survived > 0 && g.killed > 0:
			scope = "sometimes"
		case g.survived > 0:
			scope = "always"
		}
		fmt.Fprintf(out, "%5d killed %5d survived  %s\n", g.killed, g.survived, key)
		if scope == "" {
			continue
		}
		if other := explained(scope, key); other != nil {
			t.Errorf("a new survivor (%s: %s):\n%s | %s | REASON\n%s", survivorsFile, other, scope, key, g.example)
		}
	}
	for _, s := range known {
		if !s.used {
			t.Errorf("stale in %s: nothing of that kind survives: %s", survivorsFile, s.line)
		}
	}
	fmt.Fprintf(out, "%d plans, %d mutants: %d killed, %d survived\n", plans, total.killed+total.survived, total.killed, total.survived)
	for _, by := range slices.Sorted(maps.Keys(total.by)) {
		fmt.Fprintf(out, "%6d killed by %s\n", total.by[by], by)
	}
}

// survivor is a line "scope | chain | rule | kind | reason", where a "*" at the end
// of a field stands for any text. Its scope is always, for what no plan shows, or
// sometimes, for what only shows in some plans.
type survivor struct {
	line, scope string
	fields      []string
	used        bool
}

func (s survivor) matches(key string) bool {
	for i, have := range strings.Split(key, " | ") {
		begin, any := strings.CutSuffix(s.fields[i], "*")
		if have != s.fields[i] && !(any && strings.HasPrefix(have, begin)) {
			return false
		}
	}
	return true
}

func survivors(t *testing.T) (out []survivor) {
	text, err := os.ReadFile(survivorsFile)
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		w := strings.Split(line, " | ")
		if len(w) != 5 || w[0] != "always" && w[0] != "sometimes" || w[4] == "" {
			t.Errorf("%s: %q: want scope | chain | rule | kind | reason", survivorsFile, line)
			continue
		}
		out = append(out, survivor{line, w[0], w[1:4], false})
	}
	return out
}

// mutationCases are plans that between them have every kind of rule: by hand,
// with edges that do not cover each other, and drawn.
func mutationCases(t *testing.T) (out []Case) {
	add := func(cfg tproxy.Config, host tproxy.Host) bool {
		c, err := NewCase(cfg, host, Env())
		if errors.As(err, new(*tproxy.RefusedError)) {
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
		return true
	}
	ips := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	servers := tproxy.Host{
		Nameservers:    []netip.Addr{netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("10.0.0.53"), netip.MustParseAddr("fd00::53")},
		LocalResolvers: []tproxy.LocalResolver{{Address: netip.MustParseAddr("127.0.0.53"), UID: 101}, {Address: netip.MustParseAddr("::1"), UID: 110}},
	}
	var many, other []string
	for i := range 40 {
		many = append(many, fmt.Sprintf("%d-%d", 2000+20*i, 2000+20*i+i%2))
		other = append(other, fmt.Sprint(30000+20*i))
	}
	for _, one := range []struct {
		cfg  tproxy.Config
		host tproxy.Host
	}{
		{},
		{full, fullHost},
		{with(full, func(c *tproxy.Config) { c.IPFamilyMode = tproxy.IPv4Only }), fullHost},
		{with(full, func(c *tproxy.Config) { c.DNS = tproxy.DNS{Redirect: true} }), servers},
		{with(full, func(c *tproxy.Config) { c.DNS.SkipConntrackZoneSplit = true }), servers},
		{fullTCP, servers},
		{with(full, func(c *tproxy.Config) { c.DNS.RedirectTCP = true }), servers},
		{with(full, func(c *tproxy.Config) { c.Inbound.Off = true }), fullHost},
		{with(full, func(c *tproxy.Config) { c.Outbound.Off = true }), fullHost},
		{with(full, func(c *tproxy.Config) { c.Inbound.CaptureSSH = true }), fullHost},
		{with(full, func(c *tproxy.Config) { c.Pod = true }), fullHost},
		{with(full, func(c *tproxy.Config) { c.Inbound.Port, c.Outbound.Port, c.DNS.Port = 16006, 16001, 16053 }), servers},
		{with(full, func(c *tproxy.Config) { c.ProxyUIDs = []tproxy.UID{7000, 7001, 7002, 8000, rules.MaxUID} }), servers},
		{with(full, func(c *tproxy.Config) { c.ProxyUIDs = []tproxy.UID{0} }), fullHost},
		{tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts(strings.Join(many, ","))}, Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts(strings.Join(other, ","))}}, tproxy.Host{}},
		{tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("1,65535")}, Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("1-1024,65000-65535")}}, tproxy.Host{}},
		{tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}, Outbound: tproxy.Outbound{ExcludePortsForUIDs: []tproxy.UIDExclusion{
			{Protocol: rules.TCP, Ports: rules.MustPorts("80-90,8080"), UIDs: rules.MustUIDs("2000-2010,3000")},
			{Protocol: rules.UDP, Ports: rules.MustPorts("50-60"), UIDs: rules.MustUIDs("2500-2510")},
			{UIDs: rules.MustUIDs("4294967290-4294967294")},
		}}}, servers},
		{tproxy.Config{DNS: tproxy.DNS{CaptureAll: true},
			Inbound:  tproxy.Inbound{ExcludeIPs: ips("172.16.0.0/12", "198.51.100.9/32", "2001:db8:9::/48", "2001:db8:7::7/128")},
			Outbound: tproxy.Outbound{ExcludeIPs: ips("172.16.0.0/12", "198.51.100.9/32", "2001:db8:9::/48", "2001:db8:7::7/128")}}, servers},
		{tproxy.Config{Inbound: tproxy.Inbound{ExcludeIPs: ips("0.0.0.0/1")}, Outbound: tproxy.Outbound{ExcludeIPs: ips("8000::/1")}}, servers},
	} {
		if !add(one.cfg, one.host) {
			t.Fatalf("refused: %#v", one.cfg)
		}
	}
	for seed, n := 0, 0; n < drawnPlans; seed++ {
		cfg := Configs().Example(seed)
		if add(cfg, Hosts(cfg).Example(seed)) {
			n++
		}
	}
	return out
}

func with(c tproxy.Config, change func(*tproxy.Config)) tproxy.Config {
	change(&c)
	return c
}

// spot is a place of a rule.
type spot struct {
	table rules.Table
	chain string
	rule  int // from 0
}

func (s spot) String() string { return string(s.table) + " " + s.chain }

func listAt(s rules.Set, at spot) []rules.Rule {
	for _, b := range s.Bases {
		if b.Table == at.table && string(b.Hook) == at.chain {
			return b.Rules
		}
	}
	c, _ := s.Chain(at.table, at.chain)
	return c.Rules
}

// replaced returns the Set with another list of rules in a chain.
func replaced(s rules.Set, at spot, m mutation) rules.Set {
	s.Bases, s.Chains = slices.Clone(s.Bases), append(slices.Clone(s.Chains), m.more...)
	for i, b := range s.Bases {
		if b.Table == at.table && string(b.Hook) == at.chain {
			s.Bases[i].Rules = m.list
		}
	}
	for i, c := range s.Chains {
		if c.Table == at.table && c.Name == at.chain {
			s.Chains[i].Rules = m.list
		}
	}
	return s
}

var number = regexp.MustCompile(`port \d+`)

// reasonOf is the rule's reason, the same in all plans.
func reasonOf(c Case, at spot) string {
	r := listAt(c.Rules, at)[at.rule]
	if r.Record {
		return "the record"
	}
	why := number.ReplaceAllString(r.Why, "port N")
	return strings.TrimPrefix(why, "kuma/mesh/transparent/proxy/")
}

// mutateCase judges all mutants of a case's plan. by is what killed the mutant,
// or empty.
func mutateCase(t *testing.T, c Case, done func(at spot, kind, by string, show func() string)) {
	met := map[spot][]judged{}
	seen := map[sim.Packet]bool{}
	var all []sim.Packet
	give := func(p sim.Packet) {
		if seen[p] {
			return
		}
		seen[p] = true
		all = append(all, p)
		_, want := Expect(c.Config, c.Host, c.Env, p)
		trace := sim.Walk(c.Rules, c.Env, p)
		if trace.Verdict != want {
			t.Fatalf("the plan itself fails: want %s\n%s", want, trace)
		}
		for _, s := range trace.Steps {
			at := spot{s.Table, s.Chain, s.Index - 1}
			if list := met[at]; len(list) == 0 || list[len(list)-1].p != p {
				met[at] = append(list, judged{p, want, s.Matched})
			}
		}
	}
	packets := Packets(c.Config, c.Host, c.Env)
	for seed := range drawn {
		give(packets.Example(seed))
	}
	spots := spotsOf(c.Rules)
	for _, at := range spots {
		for _, p := range aimed(c, listAt(c.Rules, at)[at.rule], met[at]) {
			give(p)
		}
	}
	for _, at := range spots {
		for _, m := range mutations(at.table, listAt(c.Rules, at), at.rule) {
			mutated := c
			mutated.Rules = replaced(c.Rules, at, m)
			by := killer(c, mutated, met[at], all)
			done(at, m.kind, by, func() string {
				return fmt.Sprintf("%d packets met the rule, for example:\n%v\nof %#v", len(met[at]), m.list, c)
			})
		}
	}
}

type judged struct {
	p       sim.Packet
	want    sim.Verdict
	matched bool
}

func spotsOf(s rules.Set) (out []spot) {
	for _, b := range s.Bases {
		for i := range b.Rules {
			out = append(out, spot{b.Table, string(b.Hook), i})
		}
	}
	for _, ch := range s.Chains {
		for i := range ch.Rules {
			out = append(out, spot{ch.Table, ch.Name, i})
		}
	}
	return out
}

// killer says what tells the mutant from the plan.
func killer(c, mutant Case, met []judged, all []sim.Packet) string {
	for _, j := range met {
		if sim.Decide(mutant.Rules, mutant.Env, j.p) == j.want {
			continue
		}
		by := []string{"theorem 4"}
		for _, th := range Theorems()[:3] {
			if th.Holds(mutant, j.p) != nil {
				by = append(by, fmt.Sprint(th.Number))
			}
		}
		return strings.Join(by, " and ")
	}
	if err := mutant.Rules.Validate(); err != nil {
		return "Validate"
	}
	before, after := beforeOthers(c.Rules), beforeOthers(mutant.Rules)
	for _, j := range met {
		if sim.Decide(before, c.Env, j.p) != sim.Decide(after, c.Env, j.p) {
			return "others' rules behind ours"
		}
	}
	// Not every mutant of theorem 3 is seen by the first packet.
	for _, p := range all[:min(len(all), 200)] {
		for _, th := range Theorems()[:3] {
			if th.Holds(mutant, p) != nil {
				return fmt.Sprintf("theorem %d alone", th.Number)
			}
		}
	}
	return ""
}

// beforeOthers puts a rule of somebody else behind ours in each base chain: it has
// to see what ours let go (docs/contract.md, the end of section 2).
func beforeOthers(s rules.Set) rules.Set {
	s.Bases = slices.Clone(s.Bases)
	for i, b := range s.Bases {
		var other rules.Action = rules.Redirect{Port: 7777}
		if b.Table == rules.Raw {
			other = rules.CTZone{Zone: 77}
		}
		s.Bases[i].Rules = append(slices.Clip(b.Rules), rules.Rule{Action: other})
	}
	return s
}

// mutation is a changed list of the rules of a chain, and chains it goes to.
type mutation struct {
	kind string
	list []rules.Rule
	more []rules.Chain
}

// mutations returns every mutation of a rule.
func mutations(table rules.Table, list []rules.Rule, i int) (out []mutation) {
	r := list[i]
	add := func(kind string, instead ...rules.Rule) {
		out = append(out, mutation{kind: kind, list: slices.Concat(list[:i], instead, list[i+1:])})
	}
	action := func(kind string, a rules.Action) {
		changed := r
		changed.Action = a
		add(kind, changed)
	}
	add("rule removed")
	if len(r.Matches) > 0 {
		out = append(out, negated(table, list, i))
	}
	switch a := r.Action.(type) {
	case rules.Return:
		action("action reversed", opposite(table, list))
	case rules.Redirect:
		action("action reversed", rules.Return{})
		action("action shifted", rules.Redirect{Port: a.Port + 1})
		action("action shifted", rules.Redirect{Port: a.Port - 1})
	case rules.CTZone:
		action("action reversed", rules.Return{})
		action("action shifted", rules.CTZone{Zone: a.Zone + 1})
		action("action shifted", rules.CTZone{Zone: a.Zone - 1})
	case rules.Jump:
		action("jump made a goto", rules.Goto(a))
	case rules.Goto:
		action("goto made a jump", rules.Jump(a))
	}
	for k, m := range r.Matches {
		name, others := matchMutations(m)
		without := r
		without.Matches = slices.Concat(r.Matches[:k], r.Matches[k+1:])
		add(name+" removed", without)
		for _, o := range others {
			changed := r
			changed.Matches = slices.Clone(r.Matches)
			changed.Matches[k] = o.match
			add(name+" "+o.kind, changed)
		}
	}
	return out
}

// negated acts on all packets that the rule does not match, and on no other.
func negated(table rules.Table, list []rules.Rule, i int) mutation {
	const rest = "REST"
	r := list[i]
	changed := append(slices.Clone(list[:i]),
		rules.Rule{Matches: r.Matches, Action: rules.Goto{Chain: rest}}, rules.Rule{Action: r.Action})
	switch r.Action.(type) {
	case rules.Jump, rules.CTZone: // the packet goes on
		changed = append(changed, rules.Rule{Action: rules.Goto{Chain: rest}})
	}
	return mutation{"rule negated", changed, []rules.Chain{{Table: table, Name: rest, Rules: list[i+1:]}}}
}

// opposite is what the chain does with those that it does not let go.
func opposite(table rules.Table, list []rules.Rule) rules.Action {
	for _, r := range list {
		switch r.Action.(type) {
		case rules.Redirect, rules.CTZone:
			return r.Action
		}
	}
	if table == rules.Raw {
		return rules.CTZone{Zone: 9}
	}
	return rules.Redirect{Port: 9}
}

type changedMatch struct {
	kind  string
	match rules.Match
}

func matchMutations(m rules.Match) (name string, out []changedMatch) {
	add := func(kind string, m rules.Match) { out = append(out, changedMatch{kind, m}) }
	switch m := m.(type) {
	case rules.Protocol:
		name = "protocol"
		add("swapped", rules.TCP+rules.UDP-m)
	case rules.SYN:
		name = "syn"
	case rules.DestinationLocal:
		name = "local"
		m.Not = !m.Not
		add("negated", m)
	case rules.OutInterface:
		name = "interface"
		m.Not = !m.Not
		add("negated", m)
	case rules.InInterface:
		name = "interface"
		m.Not = !m.Not
		add("negated", m)
	case rules.Source:
		name = "source"
		add("negated", rules.Source{Prefixes: m.Prefixes, Not: !m.Not})
		for kind, ps := range shiftedPrefixes(m.Prefixes) {
			add(kind, rules.Source{Prefixes: ps, Not: m.Not})
		}
	case rules.Destination:
		name = "destination"
		add("negated", rules.Destination{Prefixes: m.Prefixes, Not: !m.Not})
		for kind, ps := range shiftedPrefixes(m.Prefixes) {
			add(kind, rules.Destination{Prefixes: ps, Not: m.Not})
		}
	case rules.SourcePorts:
		name = "source port"
		for kind, p := range shiftedPorts(m.Ports) {
			add(kind, rules.SourcePorts{Ports: p})
		}
	case rules.DestinationPorts:
		name = "port"
		add("negated", rules.DestinationPorts{Ports: m.Ports, Not: !m.Not})
		for kind, p := range shiftedPorts(m.Ports) {
			add(kind, rules.DestinationPorts{Ports: p, Not: m.Not})
		}
	case rules.OwnerUID:
		name = "owner"
		add("negated", rules.OwnerUID{UIDs: m.UIDs, Not: !m.Not})
		for kind, u := range shiftedUIDs(m.UIDs) {
			add(kind, rules.OwnerUID{UIDs: u, Not: m.Not})
		}
	default:
		name = fmt.Sprintf("%T", m)
	}
	return name, out
}

// shifted yields the ranges with one end moved by one, which drops a range of
// one number, and says whether the range became shorter or longer.
func shifted(ranges [][2]int64, lowest, highest int64) iter.Seq2[string, [][2]int64] {
	return func(yield func(string, [][2]int64) bool) {
		for i, r := range ranges {
			for _, x := range []struct {
				kind  string
				first int64
				last  int64
			}{{"longer", -1, 0}, {"longer", 0, 1}, {"shorter", 1, 0}, {"shorter", 0, -1}} {
				if r[0] == r[1] && x.last == -1 {
					continue // the same as from the other end
				}
				s := [2]int64{r[0] + x.first, r[1] + x.last}
				to := slices.Delete(slices.Clone(ranges), i, i+1)
				if s[0] <= s[1] {
					to = append(to, s)
				}
				if s[0] < lowest || s[1] > highest || len(to) == 0 {
					continue
				}
				if !yield(x.kind, to) {
					return
				}
			}
		}
	}
}

func shiftedPorts(p rules.Ports) iter.Seq2[string, rules.Ports] {
	var ranges [][2]int64
	for _, r := range p.Ranges() {
		ranges = append(ranges, [2]int64{int64(r.First), int64(r.Last)})
	}
	return func(yield func(string, rules.Ports) bool) {
		for kind, to := range shifted(ranges, 1, rules.MaxPort) {
			var list []rules.PortRange
			for _, r := range to {
				list = append(list, rules.PortRange{First: uint16(r[0]), Last: uint16(r[1])})
			}
			if q, err := rules.PortsOf(list...); err != nil || !yield(kind, q) {
				return
			}
		}
	}
}

func shiftedUIDs(u rules.UIDs) iter.Seq2[string, rules.UIDs] {
	var ranges [][2]int64
	for _, r := range u.Ranges() {
		ranges = append(ranges, [2]int64{int64(r.First), int64(r.Last)})
	}
	return func(yield func(string, rules.UIDs) bool) {
		for kind, to := range shifted(ranges, 0, rules.MaxUID) {
			var list []string
			for _, r := range to {
				list = append(list, rules.UIDRange{First: uint32(r[0]), Last: uint32(r[1])}.String())
			}
			if !yield(kind, rules.MustUIDs(strings.Join(list, ","))) {
				return
			}
		}
	}
}

// shiftedPrefixes yields the prefixes with one of them taken out, one bit shorter,
// or one of its halves.
func shiftedPrefixes(ps []netip.Prefix) iter.Seq2[string, []netip.Prefix] {
	return func(yield func(string, []netip.Prefix) bool) {
		for i, p := range ps {
			instead := func(kind string, q ...netip.Prefix) bool {
				to := slices.Concat(ps[:i], q, ps[i+1:])
				return len(to) == 0 || yield(kind, to)
			}
			bits := p.Bits()
			if !instead("shorter") || bits > 0 && !instead("longer", netip.PrefixFrom(p.Addr(), bits-1).Masked()) {
				return
			}
			if bits < p.Addr().BitLen() {
				low := netip.PrefixFrom(p.Addr(), bits+1)
				high := netip.PrefixFrom(lastAddr(p), bits+1).Masked()
				if !instead("shorter", low) || !instead("shorter", high) {
					return
				}
			}
		}
	}
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// aimed returns packets around some that met the rule, with each field in turn at
// the ends of the rule's ranges, and one beyond.
func aimed(c Case, r rules.Rule, met []judged) (out []sim.Packet) {
	x := edgesOfRule(c, r)
	for _, base := range spread(met) {
		set := func(p sim.Packet) {
			if p, ok := possible(c.Env, p); ok {
				out = append(out, p)
			}
		}
		from, to := base.Source, base.Destination
		var fields [][]func(*sim.Packet)
		list := func(f ...func(*sim.Packet)) { fields = append(fields, f) }
		var ports, sports, uids, srcs, dsts []func(*sim.Packet)
		for _, v := range x.ports {
			ports = append(ports, func(p *sim.Packet) { p.Destination = netip.AddrPortFrom(p.Destination.Addr(), v) })
		}
		for _, v := range x.sports {
			sports = append(sports, func(p *sim.Packet) { p.Source = netip.AddrPortFrom(p.Source.Addr(), v) })
		}
		for _, v := range x.uids {
			uids = append(uids, func(p *sim.Packet) { p.UID = v })
		}
		for _, a := range x.addrs {
			if a.Is4() == to.Addr().Is4() {
				dsts = append(dsts, func(p *sim.Packet) { p.Destination = netip.AddrPortFrom(a, p.Destination.Port()) })
				srcs = append(srcs, func(p *sim.Packet) { p.Source = netip.AddrPortFrom(a, from.Port()) })
			}
		}
		list(ports...)
		list(sports...)
		list(uids...)
		list(srcs...)
		list(dsts...)
		list(
			func(p *sim.Packet) { p.Protocol, p.State = rules.TCP, sim.New },
			func(p *sim.Packet) { p.Protocol, p.State = rules.UDP, sim.New },
			func(p *sim.Packet) { p.Protocol, p.State = rules.TCP, sim.Midstream },
			func(p *sim.Packet) { p.State = sim.Established },
			func(p *sim.Packet) { p.Path = sim.In },
			func(p *sim.Packet) { p.Path = sim.Forwarded },
			func(p *sim.Packet) { p.OutInterface = "" },
			func(p *sim.Packet) { p.OutInterface = "eth0" })
		for i, f := range fields {
			for _, one := range f {
				p := base
				one(&p)
				set(p)
				for _, g := range fields[i+1:] {
					if len(f)*len(g) > 300 {
						continue
					}
					for _, two := range g {
						q := p
						two(&q)
						set(q)
					}
				}
			}
		}
	}
	return out
}

// possible makes the packet one that a kernel can see, as Packets draws them.
func possible(env sim.Env, p sim.Packet) (sim.Packet, bool) {
	if p.Protocol != rules.TCP && p.State != sim.New {
		return p, false // the contract speaks of what opens a connection
	}
	local := env.IsLocal(p.Destination.Addr())
	if p.Path != sim.Out {
		p.UID, p.GID, p.OutInterface = 0, 0, ""
		own := slices.ContainsFunc(env.Local, func(q netip.Prefix) bool { return q.Contains(p.Destination.Addr()) })
		return p, p.Path == sim.In && own || p.Path == sim.Forwarded && !local
	}
	p.InInterface = ""
	switch {
	case p.OutInterface != "" && local:
		p.OutInterface = "lo"
	case p.OutInterface == "lo" && !local:
		p.OutInterface = "eth0"
	}
	return p, true
}

// spread picks packets that differ: of each path, protocol, family and end, one
// that the rule matched, and one that it did not.
func spread(met []judged) (out []sim.Packet) {
	type sort struct {
		path    sim.Path
		proto   rules.Protocol
		family  rules.Family
		matched bool
		end     sim.Kind
	}
	n := map[sort]int{}
	for _, j := range met {
		if ports := j.p.Destination.Port() != 0; !ports {
			continue
		}
		k := sort{j.p.Path, j.p.Protocol, j.p.Family(), j.matched, j.want.Kind}
		if n[k]++; n[k] == 1 {
			out = append(out, j.p)
		}
	}
	return out
}

type edgesOfARule struct {
	ports, sports []uint16
	uids          []uint32
	addrs         []netip.Addr
}

func edgesOfRule(c Case, r rules.Rule) (x edgesOfARule) {
	around := func(to *[]uint16, p rules.Ports) {
		for _, r := range p.Ranges() {
			for _, v := range []int{int(r.First) - 1, int(r.First), int(r.Last), int(r.Last) + 1} {
				if v > 0 && v <= rules.MaxPort && !slices.Contains(*to, uint16(v)) {
					*to = append(*to, uint16(v))
				}
			}
		}
	}
	prefixes := func(ps []netip.Prefix) {
		for _, p := range ps {
			half, wider := p, p
			if p.Bits() < p.Addr().BitLen() {
				half = netip.PrefixFrom(p.Addr(), p.Bits()+1)
			}
			if p.Bits() > 0 {
				wider = netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked()
			}
			last := lastAddr(p)
			for _, a := range []netip.Addr{p.Addr().Prev(), p.Addr(), lastAddr(half), lastAddr(half).Next(), last, last.Next(), wider.Addr(), lastAddr(wider)} {
				if a.IsValid() && !slices.Contains(x.addrs, a) && !a.Is4In6() {
					x.addrs = append(x.addrs, a)
				}
			}
		}
	}
	for _, m := range r.Matches {
		switch m := m.(type) {
		case rules.DestinationPorts:
			around(&x.ports, m.Ports)
		case rules.SourcePorts:
			around(&x.sports, m.Ports)
		case rules.Source:
			prefixes(m.Prefixes)
		case rules.Destination:
			prefixes(m.Prefixes)
		case rules.OwnerUID:
			for _, r := range m.UIDs.Ranges() {
				for _, v := range []int64{int64(r.First) - 1, int64(r.First), int64(r.Last), int64(r.Last) + 1} {
					if v >= 0 && v <= rules.MaxUID && !slices.Contains(x.uids, uint32(v)) {
						x.uids = append(x.uids, uint32(v))
					}
				}
			}
		}
	}
	x.ports = append(x.ports, 22, 53, 80, 443)
	x.sports = append(x.sports, 4000, 15053)
	x.uids = append(x.uids, 0, 5678, 1000, 4001)
	for _, s := range []string{"127.0.0.1", "127.0.0.6", "10.0.0.7", "203.0.113.9", "::1", "::6", "fd00::7", "2001:db8:1::9"} {
		x.addrs = append(x.addrs, netip.MustParseAddr(s))
	}
	return x
}
