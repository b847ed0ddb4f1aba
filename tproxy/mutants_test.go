package tproxy_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	. "github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// full uses every feature, so that its plan has every rule but those of fullTCP's.
var full = tproxy.Config{
	Inbound: tproxy.Inbound{
		ExcludePorts: rules.MustPorts("2222,9000-9010"),
		ExcludeIPs:   []netip.Prefix{netip.MustParsePrefix("10.0.0.8/31"), netip.MustParsePrefix("fd00::9/128")},
	},
	Outbound: tproxy.Outbound{
		ExcludePorts:        rules.MustPorts("3306,5432"),
		ExcludePortsForUIDs: []tproxy.UIDExclusion{{Ports: rules.MustPorts("53,443"), UIDs: rules.MustUIDs("1001")}},
		ExcludeIPs:          []netip.Prefix{netip.MustParsePrefix("93.184.216.0/24"), netip.MustParsePrefix("2606:2800::/32")},
	},
	DNS: tproxy.DNS{CaptureAll: true},
}

var fullHost = tproxy.Host{
	Nameservers:    []netip.Addr{netip.MustParseAddr("127.0.0.53")},
	LocalResolvers: []tproxy.LocalResolver{{Address: netip.MustParseAddr("127.0.0.53"), UID: 101, PID: 7, Program: "systemd-resolved"}},
}

// fullTCP redirects DNS over TCP as well, to the nameservers alone.
var (
	fullTCP = with(full, func(c *tproxy.Config) { c.DNS = tproxy.DNS{Redirect: true, RedirectTCP: true} })

	fullTCPHost = tproxy.Host{
		Nameservers:    []netip.Addr{netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("10.0.0.53"), netip.MustParseAddr("fd00::53")},
		LocalResolvers: fullHost.LocalResolvers,
	}
)

// mutants says which theorem guards which rule: without the rule, it must have
// a counterexample. A mutant changes the rules that have the reason.
var mutants = []struct {
	why     string
	theorem int
	change  func(*rules.Rule) // nil takes the rule out
}{
	{"kuma/mesh/transparent/proxy/a new TCP connection to an address of this host", 4, nil},
	{"kuma/mesh/transparent/proxy/a new TCP connection to an address of this host", 4, without[rules.DestinationLocal]},
	{"kuma/mesh/transparent/proxy/a new TCP connection to an address of this host", 4, without[rules.SYN]},
	{"kuma/mesh/transparent/proxy/a new TCP connection of a process of this host", 4, nil},
	{"kuma/mesh/transparent/proxy/a new TCP connection of a process of this host", 4, without[rules.SYN]},
	{"kuma/mesh/transparent/proxy/a DNS query of a process of this host", 4, nil},
	{"kuma/mesh/transparent/proxy/redirected DNS queries have a conntrack zone of their own", 4, nil},
	{"SSH is protected unless --capture-ssh is given", 2, nil},
	{"source excluded by --exclude-inbound-ips", 4, nil},
	{"port excluded by --exclude-inbound-ports", 1, nil},
	{"inbound goes to the proxy's port 15006", 4, nil},
	{"to this host itself", 4, nil},
	{"to this host itself", 3, nil},
	{"the proxy's own connections", 3, nil},
	{"the proxy's own connections", 4, without[rules.OwnerUID]},
	{"destination excluded by --exclude-outbound-ips", 4, nil},
	{"user excluded by --exclude-outbound-ports-for-uids", 4, nil},
	{"port excluded by --exclude-outbound-ports", 1, nil},
	{"DNS over TCP is not captured", 4, nil},
	{"DNS over TCP", 4, nil},
	{"a local resolver asks upstream over TCP", 3, nil},
	{"a query to a nameserver of resolv.conf over TCP goes to the proxy's DNS port 15053", 4, nil},
	{"outbound goes to the proxy's port 15001", 4, nil},
	{"the proxy must not connect to itself: refused", 3, nil},
	{"the proxy must not connect to itself: refused", 4, without[rules.OwnerUID]},
	{"the proxy hands an inbound connection on", 3, nil},
	{"the proxy calls its own host", 4, nil},
	{"the proxy calls its own host", 4, without[rules.OwnerUID]},
	{"the proxy's own queries", 3, nil},
	{"a local resolver asks upstream", 3, nil},
	{"every DNS query goes to the proxy's DNS port 15053", 4, nil},
	{"the proxy's answers to redirected queries", 4, nil},
	{"queries", 4, nil},
	{"from port 53: perhaps the answer of a server here", 4, nil},
	{"every DNS query is redirected", 4, nil},
	{"a query to a nameserver of resolv.conf goes to the proxy's DNS port 15053", 4, nil},
	{"a query to a nameserver of resolv.conf is redirected", 4, nil},
}

// unguarded are the rules that no theorem misses, and why.
var unguarded = map[string]string{
	"to this host itself: untouched":            "the chain ends there: it is for whoever reads the rules",
	"DNS over TCP to another server: untouched": "the same",
}

// wholes are the plans that have every rule between them.
func wholes(t *testing.T) (out []Case) {
	t.Helper()
	for _, one := range []struct {
		cfg  tproxy.Config
		host tproxy.Host
	}{{full, fullHost}, {fullTCP, fullTCPHost}} {
		c, err := NewCase(one.cfg, one.host, Env())
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
	}
	return out
}

// mutateOne changes the first of the cases that has the rule.
func mutateOne(cases []Case, why string, change func(*rules.Rule)) (whole, mutant Case, found bool) {
	for _, whole = range cases {
		mutant = whole
		if mutant.Rules, found = mutate(whole.Rules, why, change); found {
			break
		}
	}
	return whole, mutant, found
}

func without[M rules.Match](r *rules.Rule) {
	r.Matches = slices.DeleteFunc(slices.Clone(r.Matches), func(m rules.Match) bool { _, is := m.(M); return is })
}

// mutate returns the Set with the rules of that reason changed or taken out.
func mutate(s rules.Set, why string, change func(*rules.Rule)) (out rules.Set, found bool) {
	edit := func(list []rules.Rule) (kept []rules.Rule) {
		for _, r := range list {
			if r.Why == why {
				if found = true; change == nil {
					continue
				}
				change(&r)
			}
			kept = append(kept, r)
		}
		return kept
	}
	s.Bases, s.Chains = slices.Clone(s.Bases), slices.Clone(s.Chains)
	for i := range s.Bases {
		s.Bases[i].Rules = edit(s.Bases[i].Rules)
	}
	for i := range s.Chains {
		s.Chains[i].Rules = edit(s.Chains[i].Rules)
	}
	return s, found
}

// counterexample looks for a packet for which the theorem does not hold.
func counterexample(c Case, number int) error {
	packets := Packets(c.Config, c.Host, c.Env)
	theorem := Theorems()[slices.IndexFunc(Theorems(), func(o Theorem) bool { return o.Number == number })]
	for seed := range 10000 {
		if err := theorem.Holds(c, packets.Example(seed)); err != nil {
			return err
		}
	}
	return nil
}

func TestEveryTheoremCanFail(t *testing.T) {
	all := wholes(t)
	guarded := map[string]bool{}
	for _, m := range mutants {
		guarded[m.why] = true
		_, c, found := mutateOne(all, m.why, m.change)
		if !found {
			t.Errorf("there is no rule %q", m.why)
			continue
		}
		err := counterexample(c, m.theorem)
		if err == nil {
			t.Errorf("theorem %d holds without %q", m.theorem, m.why)
			continue
		}
		what, _, _ := strings.Cut(err.Error(), "\n")
		t.Logf("without %q, theorem %d: %s", m.why, m.theorem, what)
	}
	for _, whole := range all {
		for _, c := range whole.Rules.Chains {
			for _, r := range c.Rules {
				if !guarded[r.Why] && unguarded[r.Why] == "" && !r.Record { // nothing jumps to a record
					t.Errorf("no mutant takes out %q", r.Why)
				}
			}
		}
		for _, n := range []int{1, 2, 3, 4} {
			if err := counterexample(whole, n); err != nil {
				t.Errorf("theorem %d: %v", n, err)
			}
		}
	}
}

// Theorem 6 speaks of the same rules in other forms: one that loses a rule is seen.
func TestOtherFormsCanFail(t *testing.T) {
	all := wholes(t)
	for _, m := range mutants {
		if m.change != nil {
			continue
		}
		whole, less, _ := mutateOne(all, m.why, nil)
		packets := Packets(whole.Config, whole.Host, whole.Env)
		forms, found := forms(t, less.Rules), false
		for seed := 0; seed < 10000 && !found; seed++ {
			found = disagree(whole, forms, packets.Example(seed)) != nil
		}
		if !found {
			t.Errorf("rendered without %q, no packet fares otherwise", m.why)
		}
	}
}

// Theorems 5 and 8 speak of scripts: a Config with another list gives other
// bytes, and a line in a comment is not rendered.
func TestScriptTheoremsCanFail(t *testing.T) {
	other := full
	other.Inbound.ExcludePorts = rules.MustPorts("2222")
	if err := Order(full, other, fullHost); err == nil {
		t.Error("theorem 5 does not see that a list differs")
	}
	c, err := NewCase(full, fullHost, Env())
	if err != nil {
		t.Fatal(err)
	}
	set, _ := mutate(c.Rules, "queries", func(r *rules.Rule) { r.Why = "x\n-A OUTPUT -j DROP" })
	if set.Validate() == nil {
		t.Error("theorem 8: a comment with a line in it is valid")
	}
}
