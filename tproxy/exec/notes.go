package exec

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
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

func inputFilter(f rules.Family, all rules.Set, port uint16) []string { return nil }
