package exec_test

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// others is a direct.xml as somebody wrote it by hand.
const others = `<?xml version='1.0' encoding="UTF-8"?>
<!-- the database's; KUMA_MESH_OUTBOUND comes later -->
<direct >
	<chain ipv='ipv4' table="nat" chain="MINE"></chain>
  <rule priority="-5" ipv="ipv4" table="nat" chain="OUTPUT">-p tcp --dport 7777 -m comment --comment 'for KUMA_MESH_OUTBOUND' -j MINE</rule>
  <rule ipv="ipv4" table="nat" chain="OUTPUT" priority="20000"><![CDATA[-p tcp --dport 7778]]> -j MINE</rule>
  <rule ipv="ipv4" table="nat" chain="PREROUTING" priority="3"> -p tcp --dport 7779
    -j MINE</rule><rule ipv="ipv6" table="raw" chain="OUTPUT" priority="0">-p tcp --dport 7780 -j ACCEPT</rule>
</direct>
`

// comments are what a rule's reason may be made of at worst.
var comments = []string{`a "quoted" and a \ backslash`, `"`, `\`, `it's <this> & "that"; $(x)`, "%%REJECT%%", "--table", `"-j ACCEPT"`, "]]>-->", "!"}

// The real firewalld loads what MergeDirect wrote beside rules of others, in the order of
// the plan, reloads it without doubling it, and lets go of it alone.
func TestFirewalldLoadsDirect(t *testing.T) {
	runtimeSuite(t, "firewalld", "firewall-cmd", "dbus-daemon", "ip")
	for _, c := range []struct {
		name     string
		settings []string
		direct   bool // whether built-in chains have a chain for direct rules
		escapes  bool // whether comments come as they are
	}{
		{"nftables", []string{"FirewallBackend=nftables"}, false, true},
		{"iptables", []string{"FirewallBackend=iptables"}, true, true},
		{"individual calls", []string{"FirewallBackend=nftables", "IndividualCalls=yes"}, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &firewalld{world: newWorld(t, tproxy.IPTablesNFT), direct: c.direct}
			// Its default rejects what goes to ::/96, where a redirected connection
			// of this host goes: ::1. It looks at the interface from before.
			settings := append(c.settings, "RFC3964_IPv4=no")
			f.file = filepath.Join(f.firewalld(settings...), "direct.xml")
			f.loads(c.escapes)
		})
	}
}

type firewalld struct {
	*world
	file   string
	direct bool
}

func (f *firewalld) write(text []byte) {
	f.Helper()
	if err := os.WriteFile(f.file, text, 0o644); err != nil {
		f.Fatal(err)
	}
}

func (f *firewalld) read() []byte {
	f.Helper()
	text, err := os.ReadFile(f.file)
	if err != nil {
		f.Fatal(err)
	}
	return text
}

func (f *firewalld) reload(how string) {
	f.Helper()
	f.on("", "firewall-cmd", "--check-config")
	f.on("", "firewall-cmd", how)
}

// all is what the kernel has in a family, with the chains for direct rules in the place
// of the built-in chains that jump to them.
func (f *firewalld) all(family rules.Family) rules.Set {
	f.Helper()
	all, err := rules.ParseSave(family, []byte(f.on("", f.program(family, "save"))))
	if err != nil {
		f.Fatal(err)
	}
	for i, b := range all.Bases {
		if c, ok := all.Chain(b.Table, string(b.Hook)+"_direct"); ok == f.direct && ok {
			all.Bases[i].Rules = c.Rules
			all.Chains = slices.DeleteFunc(all.Chains, func(d rules.Chain) bool { return d.Table == c.Table && d.Name == c.Name })
		} else if ok {
			f.Errorf("%s %s has a chain for direct rules", b.Table, b.Hook)
		}
	}
	return all
}

// has compares what is there of ours, and the words of others' rules in their order.
func (f *firewalld) has(want rules.Set, foreign bool) {
	f.Helper()
	for _, family := range rules.Families() {
		all := f.all(family)
		ours, references := all.Ours(family, tproxy.Known())
		if changes := rules.Compare(family, ours, want); changes != nil || len(references) > 0 {
			f.Errorf("%s: %v, references %v", family, changes, references)
		}
		order := func(t rules.Table, h rules.Hook) (out []string) {
			b, _ := all.Base(t, h)
			for _, r := range b.Rules {
				switch {
				case strings.Contains(r.String(), "--dport 77"):
					_, port, _ := strings.Cut(r.String(), "--dport ")
					out = append(out, port[:4])
				case len(out) == 0 || out[len(out)-1] != "ours":
					out = append(out, "ours")
				}
			}
			return out
		}
		output, prerouting, raw := []string{"ours", "7777", "7778"}, []string{"7779", "ours"}, []string(nil)
		if family == rules.IPv6 {
			output, prerouting, raw = []string{"ours"}, []string{"ours"}, []string{"ours", "7780"}
		}
		if !foreign {
			output, prerouting, raw = []string{"ours"}, []string{"ours"}, []string{"ours"}
		}
		if !want.Has(family) {
			ours := func(s string) bool { return s == "ours" }
			output, prerouting, raw = slices.DeleteFunc(output, ours), slices.DeleteFunc(prerouting, ours), slices.DeleteFunc(raw, ours)
		}
		if got := order(rules.NAT, rules.Output); !slices.Equal(got, output) {
			f.Errorf("%s nat OUTPUT has %q, want %q", family, got, output)
		}
		if got := order(rules.NAT, rules.Prerouting); !slices.Equal(got, prerouting) {
			f.Errorf("%s nat PREROUTING has %q, want %q", family, got, prerouting)
		}
		if got := order(rules.Raw, rules.Output); raw != nil && !slices.Equal(got, raw) {
			f.Errorf("%s raw OUTPUT has %q, want %q", family, got, raw)
		}
	}
}

func (f *firewalld) merge(file []byte, s rules.Set) []byte {
	f.Helper()
	merged, err := persist.MergeDirect(file, s)
	if err != nil {
		f.Fatal(err)
	}
	return merged
}

func (f *firewalld) loads(escapes bool) {
	config := tproxy.Config{
		Inbound:  tproxy.Inbound{ExcludePorts: rules.MustPorts("9005,1001-1040,2,4,6,8,10,12,14,16,18,20,24,26,28,30"), ExcludeIPs: prefixes("internet")},
		Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("8443"), ExcludeIPs: prefixes("container")},
		DNS:      tproxy.DNS{Redirect: true, ResolvConf: f.resolvConf(netlab.Resolver4, netlab.Resolver6)},
	}
	plan, err := f.plan(config)
	if err != nil {
		f.Fatal(err)
	}
	set := plan.WithRecord(tproxy.Record{Version: "v0.1.0"})
	if !escapes { // quotes stand in the record
		set.Chains = slices.DeleteFunc(set.Chains, func(c rules.Chain) bool { return tproxy.IsRecord(c.Table, c.Name) })
	} else {
		for i, why := range comments {
			set.Chains[0].Rules = append(set.Chains[0].Rules, rules.Rule{
				Matches: []rules.Match{rules.TCP, rules.DestinationPorts{Ports: rules.Port(uint16(60000 + i))}}, Action: rules.Return{}, Why: why,
			})
		}
	}
	f.write([]byte(others))
	f.reload("--reload")
	f.has(rules.Set{}, true)
	// Rules of ours are there already, by our own restore.
	for _, family := range rules.Families() {
		f.on(string(set.IPTables(family)), f.program(family, "restore"), "--noflush")
	}
	merged := f.merge([]byte(others), set)
	f.write(merged)
	f.reload("--reload")
	f.has(set, true)
	d, err := persist.ReadDirect(merged)
	if err != nil {
		f.Fatal(err)
	}
	for _, family := range rules.Families() {
		if changes := rules.Compare(family, d.Rules(family), set); changes != nil {
			f.Errorf("the file, %s: %v", family, changes)
		}
	}
	f.reload("--reload")
	f.has(set, true)
	f.reload("--complete-reload")
	f.has(set, true)

	f.serve()
	f.proxy(netlab.Answer)
	f.check(
		flow{"A5", "outside host:8080 => in"}, flow{"A3", "outside host:22 => app"},
		flow{"B11", "1000 internet:443 => out"}, flow{"B8", "1000 internet:8443 => remote"}, flow{"B3", "5678 internet:443 => remote"},
	)
	for uid, want := range map[uint32]string{appUID: "dns", proxyUID: "resolver"} {
		seen, err := f.Dial(f.Host, uid, "udp", netip.AddrPort{}, netip.AddrPortFrom(netlab.Resolver4, 53))
		if err != nil || seen.Who != want {
			f.Errorf("a query of %d is answered by %s, %v; want %s", uid, seen, err, want)
		}
	}

	rest, r, err := persist.RemoveDirect(f.read())
	if err != nil || r.Rewritten || string(rest) != others {
		f.Errorf("removal left %q, %+v, %v", rest, r.Rewritten, err)
	}
	f.write(rest)
	f.reload("--reload")
	f.has(rules.Set{}, true)

	// Somebody has firewall-cmd write the file anew.
	f.write(merged)
	f.until(func() bool { // until it has noticed, it would write what it had read before
		return strings.Contains(f.on("", "firewall-cmd", "--permanent", "--direct", "--get-all-rules"), "KUMA_MESH_INBOUND")
	})
	f.on("", "firewall-cmd", "--permanent", "--direct", "--add-rule", "ipv4", "filter", "INPUT", "7", "-p", "tcp", "--dport", "7781", "-j", "ACCEPT")
	again := f.read()
	if bytes.Contains(again, []byte("<!--")) {
		f.Fatalf("firewall-cmd kept comments:\n%s", again)
	}
	f.reload("--reload")
	f.has(set, true)
	if rewritten := f.merge(again, set); !bytes.Equal(f.merge(rewritten, set), rewritten) {
		f.Error("merged twice, it is not as merged once")
	} else {
		f.write(rewritten)
		f.reload("--reload")
		f.has(set, true)
	}
	rest, r, err = persist.RemoveDirect(again)
	if err != nil || !r.Rewritten || bytes.Contains(rest, []byte(`chain="KUMA`)) || !bytes.Contains(rest, []byte("7781")) {
		f.Errorf("removal left %q, rewritten %t, %v", rest, r.Rewritten, err)
	}
	f.write(rest)
	f.reload("--reload")
	f.has(rules.Set{}, true)

	// A file of our own.
	f.write(f.merge(nil, set))
	f.reload("--reload")
	f.has(set, false)
	if rest, _, err := persist.RemoveDirect(f.read()); rest != nil || err != nil {
		f.Errorf("removal left %q, %v", rest, err)
	}
	if err := os.Remove(f.file); err != nil {
		f.Fatal(err)
	}
	f.reload("--reload")
	f.has(rules.Set{}, false)
}
