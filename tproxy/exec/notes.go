package exec

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// listening says which of the proxy's ports nobody answers yet: until the proxy
// starts, what is redirected there is refused.
func (s *session) listening(p *tproxy.Plan) (notes []string) {
	for _, d := range []struct {
		name string
		off  bool
		port uint16
	}{
		{"inbound", p.Config.Inbound.Off, p.Config.Inbound.Port},
		{"outbound", p.Config.Outbound.Off, p.Config.Outbound.Port},
	} {
		if d.off {
			continue
		}
		if there, err := s.m.procs().ListensOn(d.port); err == nil && !there {
			notes = append(notes, fmt.Sprintf("nothing listens on the proxy's %s port %d yet: until the proxy runs, %[1]s connections are refused", d.name, d.port))
		}
	}
	return notes
}

// filters says what the host's own packet filter makes of a redirected
// connection, which it sees with the proxy's port.
func (t *transaction) filters(p *tproxy.Plan) (notes []string) {
	if p.Config.Inbound.Off {
		return nil
	}
	for _, j := range t.jobs {
		if j.variant.Backend == p.Backend && slices.Contains(p.Families, j.family) {
			notes = append(notes, inputFilter(j.family, j.before.all, p.Config.Inbound.Port)...)
		}
	}
	notes = append(notes, t.otherFilter(p)...)
	foreign, err := t.m.foreignTables()
	if err != nil {
		t.log.Warn("tables of nftables cannot be listed", "error", err)
	}
	var others []string
	for _, name := range foreign {
		if strings.HasSuffix(name, " firewalld") {
			notes = append(notes, "firewalld runs here and accepts whatever was translated: ports that its zones close now reach the proxy; exclude what must stay closed")
			continue
		}
		others = append(others, name)
	}
	if len(others) > 0 {
		notes = append(notes, fmt.Sprintf("tables of nftables that iptables does not show (%s) may filter too: let them admit TCP to port %d", strings.Join(others, ", "), p.Config.Inbound.Port))
	}
	return notes
}

// otherFilter speaks of the filter table of the variant that was not chosen,
// whose policy cannot be told without a save, which may make tables.
func (t *transaction) otherFilter(p *tproxy.Plan) (notes []string) {
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		for _, f := range p.Families {
			tables, err := t.m.tables(b == tproxy.IPTablesNFT, f)
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
// iptables-save showed it: INPUT sees it with the proxy's port.
func inputFilter(f rules.Family, all rules.Set, port uint16) []string {
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
		return nil
	case sim.Unknown:
		return []string{fmt.Sprintf("whether the %s filter of INPUT admits redirected connections, which come to port %d, cannot be told (%s); this rule makes it: %s", f, port, trace.Reason, admit)}
	}
	return []string{fmt.Sprintf("the %s filter of INPUT drops redirected connections, which come to port %d (%s); admit them: %s", f, port, trace.Summary(), admit)}
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
