package differential

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// A check that cannot fail shows nothing: each of these takes one rule out, of
// the plan before it is installed or of the kernel afterwards, and has to be seen
// in the row that the rule is for, and in no other.
func TestDisagreementIsSeen(t *testing.T) {
	require(t)
	base := trial{
		seed: 1, // of the packets
		cfg: tproxy.Config{
			Inbound:  tproxy.Inbound{ExcludeIPs: []netip.Prefix{netip.PrefixFrom(netlab.Client4, 32), netip.PrefixFrom(netlab.Client6, 128)}},
			Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("8443")},
			DNS:      tproxy.DNS{CaptureAll: true, RedirectTCP: true},
		},
	}
	base.drawPackets(150)
	for _, p := range []string{
		"in tcp 10.0.0.9:4000 > 10.0.0.2:22", "in tcp [fd00::9]:4000 > [fd00::2]:22",
		"out tcp uid=5678 10.0.0.2:4001 > 10.0.0.7:22", "out tcp uid=5678 [fd00::2]:4001 > [fd00::7]:22",
		"out tcp uid=1000 10.0.0.2:4002 > 8.8.8.8:53", "out tcp uid=1000 [fd00::2]:4002 > [2001:4860:4860::8888]:53",
	} {
		base.packets = append(base.packets, sim.MustPacket(p))
	}
	var o outcome
	for _, c := range []struct {
		name string
		// why is of the rule that is taken out.
		why    string
		kernel bool
		rows   []string
		says   string
	}{
		{"nothing", "", false, nil, ""},
		{"the proxy's connections, plan", "the proxy's own connections", false, []string{"B3"}, "the walk through the plan says redirected"},
		{"SSH, kernel", "SSH is protected unless --capture-ssh is given", true, []string{"A3", "B2:A3"}, "the kernel did not bring it to app"},
		{"excluded sources, kernel", "source excluded by --exclude-inbound-ips", true, []string{"A2", "B2:A2"}, "Seen: in answered"},
		{"the handed on, kernel", "the proxy hands an inbound connection on", true, []string{"B1"}, "what the kernel lists says redirected"},
		{"DNS over TCP, kernel", "every DNS query over TCP goes to the proxy's DNS port 15053", true, []string{"B9-dns"}, "the kernel did not bring it to dns"},
		{"the zone, kernel", "kuma/mesh/transparent/proxy/redirected DNS queries have a conntrack zone of their own", true, []string{"C3", "Z"}, "conntrack has it in another zone"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tr, found := base, c.why == ""
			for _, tr.backend = range variants {
				if c.kernel {
					tr.kernel = func(l *lab, p *tproxy.Plan) error { found = true; return l.delete(t, p, c.why) }
				} else {
					tr.plan = func(p *tproxy.Plan) { found = without(&p.Rules, c.why) || found }
				}
				var err error
				if o, err = tr.run(t.Context(), t.TempDir()); err != nil {
					t.Fatal(err)
				}
				if !found {
					t.Fatalf("there is no rule %q", c.why)
				}
				rows := map[string]bool{}
				for _, p := range o.problems {
					rows[p.row] = true
					if !slices.Contains(c.rows, p.row) {
						t.Errorf("%s: %s", tr.backend, p.what)
					}
				}
				if (len(rows) > 0) != (c.rows != nil) {
					t.Errorf("%s: %d problems, in rows %v; want some in %v", tr.backend, len(o.problems), rows, c.rows)
				}
				report := tr.report(o)
				for _, want := range []string{"seed 1, " + tr.backend.String(), "config: tproxy.Config{", c.says, " script:\n*nat\n", "* nat "} {
					if len(o.problems) > 0 && !strings.Contains(report, want) {
						t.Errorf("the report does not hold %q:\n%s", want, report)
					}
				}
			}
		})
	}
}

// without takes the rules of that reason out.
func without(s *rules.Set, why string) bool {
	found := false
	cut := func(list []rules.Rule) []rules.Rule {
		return slices.DeleteFunc(slices.Clone(list), func(r rules.Rule) bool {
			found = found || r.Why == why
			return r.Why == why
		})
	}
	for i := range s.Bases {
		s.Bases[i].Rules = cut(s.Bases[i].Rules)
	}
	for i := range s.Chains {
		s.Chains[i].Rules = cut(s.Chains[i].Rules)
	}
	return found
}

// delete deletes the rules of that reason from the kernel, behind our back.
func (l *lab) delete(t *testing.T, p *tproxy.Plan, why string) error {
	t.Helper()
	for _, f := range rules.Families() {
		program := p.Backend.String()
		if f == rules.IPv6 {
			program = "ip6" + strings.TrimPrefix(program, "ip")
		}
		lower := p.Rules.Lower(f)
		list := map[string][]rules.Rule{}
		for _, c := range lower.Chains {
			list[string(c.Table)+" "+c.Name] = c.Rules
		}
		for _, b := range lower.Bases {
			list[string(b.Table)+" "+string(b.Hook)] = b.Rules // of ours alone, and ours are all there are
		}
		for where, rs := range list {
			table, chain, _ := strings.Cut(where, " ")
			for i := len(rs) - 1; i >= 0; i-- {
				if rs[i].Why != why {
					continue
				}
				if _, err := l.Run(t.Context(), l.Host, "", program, "-t", table, "-D", chain, fmt.Sprint(i+1)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
