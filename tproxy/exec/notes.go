package exec

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// hostPrefixes are addresses of interfaces without their networks.
func hostPrefixes(in []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, len(in))
	for i, p := range in {
		out[i] = hostPrefix(p.Addr())
	}
	return out
}

// listening says which of the proxy's ports nobody answers yet: until the proxy
// starts, what is redirected there is refused.
func (s *session) listening(p *tproxy.Plan) (notes []string) {
	c := p.Config
	for _, d := range []struct {
		what   string // is refused
		off    bool
		listen func(uint16) (bool, error)
		port   uint16
		name   string // of the port
	}{
		{"inbound connections are", c.Inbound.Off, s.m.procs().ListensOn, c.Inbound.Port, "inbound port %d"},
		{"outbound connections are", c.Outbound.Off, s.m.procs().ListensOn, c.Outbound.Port, "outbound port %d"},
		{"DNS queries are", !c.DNS.On(), s.takesQueries, c.DNS.Port, "DNS port %d"},
		{"DNS over TCP is", !p.DNSOverTCP(), s.m.procs().ListensOn, c.DNS.Port, "DNS port %d over TCP"},
	} {
		if d.off {
			continue
		}
		if there, err := d.listen(d.port); err == nil && !there {
			notes = append(notes, fmt.Sprintf("nothing listens on the proxy's "+d.name+" yet: until the proxy runs, %s refused", d.port, d.what))
		}
	}
	return notes
}

// takesQueries says whether anybody listens where a query of this host is redirected
// to: on loopback, over UDP (net/netfilter/nf_nat_redirect.c).
func (s *session) takesQueries(port uint16) (bool, error) {
	sockets, err := s.m.procs().ListensUDP(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	return len(sockets) > 0, err
}

// filters says what the host's own packet filter makes of a redirected
// connection, which it sees with the proxy's port.
func (t *transaction) filters(p *tproxy.Plan) (notes []string) {
	foreign, err := t.m.foreignTables()
	if err != nil {
		t.log.Warn("tables of nftables cannot be listed", "error", err)
	}
	firewalld := func(name string) bool { return strings.HasSuffix(name, " firewalld") }
	others := slices.DeleteFunc(slices.Clone(foreign), firewalld)
	if len(others) < len(foreign) {
		if why, err := t.firewalldRejects(p); err != nil {
			notes = append(notes, err.Error())
		} else if why != "" {
			notes = append(notes, why)
		}
	}
	if p.Config.Inbound.Off {
		return notes
	}
	for _, j := range t.jobs {
		if j.variant.Backend == p.Backend && slices.Contains(p.Families, j.family) {
			if _, what := inputFilter(j.family, j.before.all, p.Config.Inbound.Port); what != "" {
				notes = append(notes, what)
			}
		}
	}
	notes = append(notes, t.otherFilter(p)...)
	if len(others) < len(foreign) {
		notes = append(notes, "firewalld runs here and accepts whatever was translated: ports that its zones close now reach the proxy; exclude what must stay closed")
	}
	if p.Backend == tproxy.NFTables {
		return append(notes, t.nftFilters(p)...)
	}
	if len(others) > 0 {
		notes = append(notes, fmt.Sprintf("tables of nftables that iptables does not show (%s) may filter too: let them admit TCP to port %d", strings.Join(others, ", "), p.Config.Inbound.Port))
	}
	return notes
}

// nftFilters says which chains of nftables, iptables-nft's among them, see what was
// redirected, and what each does with what none of its rules accepts: that much can be
// read without a program.
func (s *session) nftFilters(p *tproxy.Plan) (notes []string) {
	bases, err := s.basesOfOthers()
	if err != nil {
		return []string{fmt.Sprintf("what filters connections that are redirected cannot be told: %v", err)}
	}
	admit := fmt.Sprintf("let it admit TCP to port %d", p.Config.Inbound.Port)
	var mayFilter []string
	for _, b := range bases {
		table := b.Table.Family + " " + b.Table.Name
		if b.Hook != string(rules.Input) || b.Type != "filter" || !sees(b, p.Families) || strings.HasSuffix(table, " firewalld") {
			continue
		}
		if b.Drops {
			notes = append(notes, fmt.Sprintf("chain %s of table %s drops what no rule of it accepts, redirected connections too: %s", b.Chain, table, admit))
		} else if !slices.Contains(mayFilter, table) {
			mayFilter = append(mayFilter, table)
		}
	}
	if len(mayFilter) > 0 {
		notes = append(notes, fmt.Sprintf("tables of nftables with rules of others for what comes in (%s) may filter what is redirected: %s", strings.Join(mayFilter, ", "), admit))
	}
	return notes
}

// sees reports whether a chain sees packets of one of the families.
func sees(b kernel.NFTBase, families []rules.Family) bool {
	return b.Table.Family != "ip" && b.Table.Family != "ip6" || slices.ContainsFunc(families, func(f rules.Family) bool { return nftFamily(f) == b.Table.Family })
}

// nftTranslations says which chains of others come before ours in nftables at OUTPUT,
// where all of iptables' come behind: what they translate passes the proxy by.
func (s *session) nftTranslations(p *tproxy.Plan) (notes []string) {
	if p.Backend != tproxy.NFTables {
		return nil
	}
	bases, err := s.basesOfOthers()
	if err != nil {
		return []string{fmt.Sprintf("whether chains of others translate before ours cannot be told: %v", err)}
	}
	for _, b := range bases {
		table := b.Table.Family + " " + b.Table.Name
		if b.Hook != string(rules.Output) || !inFront(b) || !sees(b, p.Families) {
			continue
		}
		comes := "comes before ours"
		if b.Priority == ownPriority(b.Hook) {
			comes = "has the priority of ours, and of such the one that was made last comes first"
		}
		notes = append(notes, fmt.Sprintf("chain %s of table %s, priority %d, %s: what it translates of what this host sends passes the proxy by", b.Chain, table, b.Priority, comes))
	}
	return notes
}

// others says where a rule of others in front of ours keeps connections from the
// proxy: they would pass it by.
func (t *transaction) others(p *tproxy.Plan) (notes []string) {
	notes = t.nftTranslations(p)
	for _, j := range t.jobs {
		if j.variant.Backend != p.Backend || !slices.Contains(p.Families, j.family) {
			continue
		}
		f := j.family
		set := only(rules.NAT, rules.After(f, j.before.all, j.before.Ours, p.Rules))
		for _, d := range []struct {
			what   string
			off    bool
			port   uint16
			packet sim.Packet
		}{
			{"inbound", p.Config.Inbound.Off, p.Config.Inbound.Port, sim.Packet{Path: sim.In}},
			{"outbound", p.Config.Outbound.Off, p.Config.Outbound.Port, sim.Packet{Path: sim.Out}},
		} {
			d.packet.Protocol, d.packet.UID = rules.TCP, stranger
			d.packet.Source = netip.AddrPortFrom(somewhere[f], 40000)
			d.packet.Destination = netip.AddrPortFrom(here[f], strangePort)
			if d.packet.Path == sim.Out {
				d.packet.Source, d.packet.Destination = netip.AddrPortFrom(here[f], 40000), netip.AddrPortFrom(somewhere[f], strangePort)
			}
			env := sim.EnvOf(here[f])
			// What our own rules leave alone says nothing about those of others.
			if alone := sim.Decide(p.Rules.Lower(f), env, d.packet); d.off || alone.Kind != sim.Redirected {
				continue
			}
			trace := sim.Walk(set, env, d.packet)
			if trace.Kind != sim.Unknown && (trace.Kind != sim.Redirected || trace.Port != d.port) {
				notes = append(notes, fmt.Sprintf("a rule of others keeps %s %s connections from the proxy: %s", d.what, f, trace.Summary()))
			}
		}
	}
	return notes
}

// kuma says what of Kuma's own installers was found, and what they left beside rules.
func (t *transaction) kuma(done string) (notes []string) {
	for _, j := range t.jobs {
		where := fmt.Sprintf("%s %s", j.variant.Backend, j.family)
		if found := j.before.Kuma; len(found) > 0 {
			notes = append(notes, fmt.Sprintf("rules of Kuma's own installer, %s: %s (%s)", done, where, strings.Join(found, ", ")))
		}
		if slices.Contains(j.before.Kuma, "mangle MESH_TPROXY") {
			notes = append(notes, "Kuma's installer may have left a route for its TPROXY mode; to see it: ip rule list fwmark 1337")
		}
		for _, d := range j.before.Doubtful {
			notes = append(notes, fmt.Sprintf("left in %s: %s; Kuma's own installer makes such a rule, and so may anybody; if it is Kuma's: %s -t %s -D %s %s",
				where, d, strings.TrimSuffix(filepath.Base(j.variant.For(j.family).Restore), "-restore"), d.Table, d.Chain, d.Rule.Listed()))
		}
	}
	if t.elsewhere {
		return notes
	}
	for _, path := range t.m.glob(kumaBackups...) {
		notes = append(notes, fmt.Sprintf("%s is a copy of the rules that Kuma's own installer left; nothing reads it any more", path))
	}
	return notes
}

// kumaBackups are what Kuma's installers leave beside rules: a copy of all rules for
// each time that they replaced them (pkg/transparentproxy/config/utils.go), in the
// folder for temporary files.
var kumaBackups = []string{
	filepath.Join(os.TempDir(), "iptables-rules.????-??-??-??????.txt.backup"),
	filepath.Join(os.TempDir(), "ip6tables-rules.????-??-??-??????.txt.backup"),
}

// A user and a port that nobody is likely to have named.
const (
	stranger    = 3_999_999_999
	strangePort = 49_151
)

// otherFilter speaks of the filter table of the variant that was not chosen,
// whose policy cannot be told without a save, which may make tables.
func (t *transaction) otherFilter(p *tproxy.Plan) (notes []string) {
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		for _, f := range p.Families {
			tables, err := t.m.tables(b == tproxy.IPTablesNFT, f)
			if b == tproxy.IPTablesNFT && p.Backend == tproxy.NFTables {
				continue // see nftFilters
			}
			if b != p.Backend && err == nil && slices.Contains(tables, rules.Filter) {
				notes = append(notes, fmt.Sprintf("the %s filter table of %s is there too and may filter: let it admit TCP to port %d", f, b, p.Config.Inbound.Port))
			}
		}
	}
	return notes
}

// Documentation addresses (RFC 5737, RFC 3849): another host, and this one.
var (
	somewhere = map[rules.Family]netip.Addr{rules.IPv4: netip.MustParseAddr("192.0.2.1"), rules.IPv6: netip.MustParseAddr("2001:db8::1")}
	here      = map[rules.Family]netip.Addr{rules.IPv4: netip.MustParseAddr("192.0.2.2"), rules.IPv6: netip.MustParseAddr("2001:db8::2")}
)

// inputFilter walks a redirected connection through the filter table as
// iptables-save showed it: INPUT sees it with the proxy's port. It returns what becomes
// of the connection, and, unless it passes, what to say of it.
func inputFilter(f rules.Family, all rules.Set, port uint16) (sim.Kind, string) {
	var filter rules.Set
	for _, c := range all.Bases {
		if c.Table == rules.Filter && c.Hook == rules.Input {
			c.Rules = forRedirected(c.Rules)
			filter.Bases = append(filter.Bases, c)
		}
	}
	for _, c := range all.Chains {
		if c.Table == rules.Filter {
			c.Rules = forRedirected(c.Rules)
			filter.Chains = append(filter.Chains, c)
		}
	}
	packet := sim.Packet{
		Path: sim.In, Protocol: rules.TCP,
		Source:      netip.AddrPortFrom(somewhere[f], 40000),
		Destination: netip.AddrPortFrom(here[f], port),
	}
	program := "iptables"
	if f == rules.IPv6 {
		program = "ip6tables"
	}
	// ctstate DNAT: only what was translated, not a connection that names the
	// proxy's port itself (conntrack in iptables-extensions(8)).
	admit := fmt.Sprintf("%s -I INPUT -p tcp --dport %d -m conntrack --ctstate DNAT -j ACCEPT", program, port)
	trace := sim.Walk(filter, sim.EnvOf(here[f]), packet)
	switch trace.Kind {
	case sim.Untouched:
		return trace.Kind, ""
	case sim.Unknown:
		return trace.Kind, fmt.Sprintf("whether the %s filter of INPUT admits redirected connections, which come to port %d, cannot be told (%s); this rule makes it: %s", f, port, trace.Reason, admit)
	}
	return trace.Kind, fmt.Sprintf("the %s filter of INPUT drops redirected connections, which come to port %d (%s); admit them: %s", f, port, trace.Summary(), admit)
}

// forRedirected leaves out of rules what is known of a redirected connection
// from another host: it was translated, and it did not come through lo. Through
// which interface else it came is not known.
func forRedirected(in []rules.Rule) (out []rules.Rule) {
	for _, r := range in {
		if slices.Contains(r.Matches, rules.Match(rules.InInterface{Name: "lo"})) {
			continue
		}
		r.Matches = slices.DeleteFunc(slices.Clone(r.Matches), func(m rules.Match) bool {
			return m == rules.Match(rules.CTState{States: "DNAT"}) || m == rules.Match(rules.InInterface{Name: "lo", Not: true})
		})
		out = append(out, r)
	}
	return out
}
