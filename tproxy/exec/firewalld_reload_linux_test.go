package exec_test

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// An install whose rules are in direct.xml too stays one install, through firewalld's
// reloads, and whoever makes it again, makes another or takes it out finds it where
// firewalld puts direct rules: OUTPUT with FirewallBackend=nftables, OUTPUT_direct with
// iptables.
func TestFirewalldReloadOfAnInstall(t *testing.T) {
	runtimeSuite(t, "firewalld", "firewall-cmd", "dbus-daemon", "ip")
	for _, backend := range []string{"nftables", "iptables"} {
		t.Run(backend, func(t *testing.T) {
			f := &firewalld{world: newWorld(t, tproxy.IPTablesNFT), direct: backend == "iptables"}
			f.file = filepath.Join(f.firewalld("FirewallBackend="+backend, "RFC3964_IPv4=no"), "direct.xml")
			f.write([]byte(others))
			f.reload("--reload")
			f.serve()
			f.proxy(netlab.Answer)
			f.lives()
		})
	}
}

// foreign is what the kernel lists of others, in order, without counters.
func (f *firewalld) foreign() string {
	f.Helper()
	var b strings.Builder
	for _, family := range rules.Families() {
		all, err := rules.ParseSave(family, []byte(f.on("", f.program(family, "save"))))
		if err != nil {
			f.Fatal(err)
		}
		ours := tproxy.Find(family, all).Ours
		each := func(t rules.Table, chain string, list []rules.Rule) {
			for i, r := range list {
				if !ours.Covers(t, chain, i+1) {
					fmt.Fprintf(&b, "%s %s -A %s %s\n", family, t, chain, r.Listed())
				}
			}
		}
		for _, c := range all.Bases {
			each(c.Table, string(c.Hook), c.Rules)
		}
		for _, c := range all.Chains {
			if _, mine := ours.Chain(c.Table, c.Name); !mine {
				fmt.Fprintf(&b, "%s %s :%s\n", family, c.Table, c.Name)
				each(c.Table, c.Name, c.Rules)
			}
		}
	}
	return b.String()
}

// once says that the install stands, where its jumps are, and each there once; and that
// the same again changes nothing.
func (f *firewalld) once(when string, c tproxy.Config, via string) {
	f.Helper()
	if s := f.status(); s.State != exec.StateInstalled {
		f.Errorf("%s: %s", when, said(s))
	}
	for _, family := range rules.Families() {
		save := f.on("", f.program(family, "save"))
		for hook, chain := range map[string]string{"OUTPUT": "KUMA_MESH_OUTBOUND", "PREROUTING": "KUMA_MESH_INBOUND"} {
			var at []string
			for line := range strings.Lines(nat(save)) {
				if strings.Contains(line, "-j "+chain+"\n") && !strings.HasPrefix(line, "-A KUMA") {
					at = append(at, strings.Fields(line)[1])
				}
			}
			if len(at) != 1 || at[0] != hook+via {
				f.Errorf("%s: %s jumps to %s stand in %q, want one in %s", when, family, chain, at, hook+via)
			}
		}
	}
	if r := f.install(c); r.Changed {
		f.Errorf("%s: the same again changes %+v", when, r.Families)
	}
}

func (f *firewalld) lives() {
	via := ""
	if f.direct {
		via = "_direct"
	}
	flows := []flow{
		{"A5", "outside host:8080 => in"}, {"A3", "outside host:22 => app"},
		{"B11", "1000 internet:443 => out"}, {"B3", "5678 internet:443 => remote"},
	}
	before := f.foreign()
	c := tproxy.Config{Persist: tproxy.PersistFirewalld}
	f.install(c)
	f.once("live, and in the file", c, "")
	for _, how := range []string{"--reload", "--reload", "--complete-reload"} {
		f.reload(how)
		f.once(how, c, via)
		f.check(flows...)
	}

	// Another one, over that which firewalld loaded.
	c.Outbound.ExcludePorts = rules.MustPorts("8443")
	if r := f.install(c); !r.Changed {
		f.Error("another install changed nothing")
	}
	f.once("another", c, via)
	f.check(append(flows, flow{"B8", "1000 internet:8443 => remote"})...)
	f.reload("--reload")
	f.once("another, reloaded", c, via)

	// Somebody's jump once more: one of them goes.
	output, _ := f.ours(rules.IPv4).Base(rules.NAT, rules.Output)
	f.on("*nat\n-I OUTPUT 1 "+output.Rules[0].Listed()+"\nCOMMIT\n", f.program(rules.IPv4, "restore"), "--noflush")
	if s := f.status(); s.State != exec.StateDrifted || !strings.Contains(said(s), "+ doubled: IPv4 nat OUTPUT #") {
		f.Errorf("doubled: %s", said(s))
	}
	if r := f.install(c); !r.Changed {
		f.Error("a jump that is there twice stayed")
	}
	f.once("mended", c, via)

	f.goesBack(c, via)
	if f.direct {
		f.notLedTo(c)
	}
	f.same("others' rules", before, f.foreign())
	f.uninstall()
	if left := f.read(); string(left) != others {
		f.Errorf("an uninstall left %q", left)
	}
	f.same("others' rules after uninstall", before, f.foreign())
	for _, how := range []string{"--reload", "--complete-reload"} {
		f.reload(how)
		f.same("others' rules after uninstall and "+how, before, f.foreign())
	}
	if s := f.status(); s.State != exec.StateAbsent {
		f.Errorf("after uninstall: %s", said(s))
	}
	f.rewritten()
}

// rewritten has firewall-cmd make its runtime permanent, with a direct rule that somebody
// added: it writes the file anew, ours in it without the marks.
func (f *firewalld) rewritten() {
	f.Helper()
	f.write(f.merge([]byte(others), f.set(tproxy.Config{})))
	f.reload("--reload")
	f.on("", "firewall-cmd", "--direct", "--add-rule", "ipv4", "nat", "OUTPUT", "5", "-p", "tcp", "--dport", "7790", "-j", "ACCEPT")
	f.on("", "firewall-cmd", "--runtime-to-permanent")
	file := f.read()
	if bytes.Contains(file, []byte("<!--")) || !bytes.Contains(file, []byte("7790")) || !bytes.Contains(file, []byte("KUMA_MESH_OUTBOUND")) {
		f.Errorf("firewall-cmd wrote\n%s", file)
	}
	again := f.merge(file, f.set(tproxy.Config{}))
	if !bytes.Equal(f.merge(again, f.set(tproxy.Config{})), again) {
		f.Error("merged twice, it is not as merged once")
	}
	rest, r, err := persist.RemoveDirect(file)
	if err != nil || !r.Rewritten || bytes.Contains(rest, []byte(`chain="KUMA`)) || !bytes.Contains(rest, []byte("7790")) || !bytes.Contains(rest, []byte("7778")) {
		f.Errorf("removal left, rewritten %t, %v\n%s", r.Rewritten, err, rest)
	}
	f.write(rest)
	f.reload("--reload")
	for _, family := range rules.Families() {
		if ours := f.ours(family); len(ours.Bases)+len(ours.Chains) > 0 {
			f.Errorf("%s: left %v", family, ours)
		}
	}
}

// set are the rules of a config with a record, as for direct.xml.
func (f *firewalld) set(c tproxy.Config) rules.Set {
	f.Helper()
	plan, err := f.plan(c)
	if err != nil {
		f.Fatal(err)
	}
	return plan.WithRecord(tproxy.Record{Version: "v0.1.0"})
}

// goesBack takes the install out and has a Snapshot put it back where it was.
func (f *firewalld) goesBack(c tproxy.Config, via string) {
	f.Helper()
	err := f.In(f.Host, func() error {
		var r exec.Runner
		s, err := r.Snapshot(f.Context())
		if err == nil {
			_, err = r.Remove(f.Context(), exec.RemoveOptions{})
		}
		if err == nil {
			_, err = r.Restore(f.Context(), s, exec.RestoreOptions{})
		}
		return err
	})
	if err != nil {
		f.Error(err)
	}
	for _, r := range f.install(c).Families { // which stores them again: that is not of a Snapshot
		if len(r.Changes) > 0 {
			f.Errorf("restored: an install changes %s", r.Changes)
		}
	}
	f.once("restored", c, via)
}

// notLedTo takes away what leads to the chain for direct rules: a jump there is none then.
func (f *firewalld) notLedTo(c tproxy.Config) {
	f.Helper()
	edit := func(line string) {
		f.Helper()
		f.on("*nat\n"+line+"\nCOMMIT\n", f.program(rules.IPv4, "restore"), "--noflush")
	}
	edit("-D OUTPUT -j OUTPUT_direct")
	if s := f.status(); s.State != exec.StateDrifted || !strings.Contains(said(s), "- missing: IPv4 nat OUTPUT #1 ") || !strings.Contains(said(s), "[OUTPUT does not lead to OUTPUT_direct]") {
		f.Errorf("not led to: %s", said(s))
	}
	f.checkFamilies([]int{0}, flow{"not led to", "1000 internet:443 => remote"})
	if r := f.install(c); !r.Changed {
		f.Error("a jump that is not met was left")
	}
	f.check(flow{"B11", "1000 internet:443 => out"})
	edit("-I OUTPUT 2 -j OUTPUT_direct") // where it was, behind ours
	if s := f.status(); s.State != exec.StateInstalled {
		f.Errorf("led to again: %s", said(s))
	}
}

// kumas are entries as Kuma's --store-firewalld wrote them (its fault K8): what is of IPv6
// stands there as ipv4, and a single one keeps firewalld from loading any.
const kumas = `  <chain ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND"></chain>
  <chain ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND_REDIRECT"></chain>
  <rule ipv="ipv4" table="nat" chain="OUTPUT" priority="3">-p tcp -j KUMA_MESH_OUTBOUND</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND" priority="3">-s ::6/128 -o lo -j RETURN</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND" priority="3">-m owner --uid-owner 5678 -j RETURN</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND" priority="3">-j KUMA_MESH_OUTBOUND_REDIRECT</rule>
  <rule ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND_REDIRECT" priority="3">-p tcp -j REDIRECT --to-ports 15001</rule>
`

// The real firewalld loads nothing of a file with Kuma's entries, and with ours in their
// place, or without any, everything that others have in it.
func TestFirewalldLoadsAgainAfterKuma(t *testing.T) {
	runtimeSuite(t, "firewalld", "firewall-cmd", "dbus-daemon", "ip")
	f := &firewalld{world: newWorld(t, tproxy.IPTablesNFT)}
	f.file = filepath.Join(f.firewalld("FirewallBackend=nftables", "RFC3964_IPv4=no"), "direct.xml")
	broken := strings.Replace(others, "</direct>", kumas+"</direct>", 1)
	f.write([]byte(broken))
	if out, err := f.Lab.Run(f.Context(), f.Host, "", "firewall-cmd", "--reload"); err == nil {
		t.Errorf("firewalld loads Kuma's entries: %s", out)
	}
	if save := f.on("", f.program(rules.IPv4, "save")); strings.Contains(save, "7777") {
		t.Errorf("firewalld loads some of it:\n%s", save)
	}
	set := f.set(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, ResolvConf: f.resolvConf(netlab.Resolver4, netlab.Resolver6)}})
	f.write(f.merge([]byte(broken), set))
	f.reload("--reload")
	f.has(set, true)
	rest, r, err := persist.RemoveDirect([]byte(broken))
	if err != nil || string(rest) != others || len(r.Kuma) == 0 {
		t.Errorf("removal left %q, %q, %v", rest, r.Kuma, err)
	}
	f.write(rest)
	f.reload("--reload")
	f.has(rules.Set{}, true)
}
