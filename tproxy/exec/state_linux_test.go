package exec_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/go-iptables/iptables"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// some Configs, which together have every kind of rule.
func (w *world) some() []tproxy.Config {
	w.Helper()
	return []tproxy.Config{
		{},
		{
			ProxyUIDs: []tproxy.UID{5678, w.uid(1000680000)},
			Inbound:   tproxy.Inbound{ExcludePorts: rules.MustPorts("1-20,30,40,50,60,70,80,90,100,110,120,130,140,150,160,65535"), ExcludeIPs: prefixes("internet", "client")},
			Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("8443"), ExcludeIPs: prefixes("client"), ExcludePortsForUIDs: []tproxy.UIDExclusion{
				{Protocol: rules.TCP, Ports: rules.MustPorts("1-10,443"), UIDs: rules.MustUIDs("1000-2000").Union(rules.UIDsOf(w.uid(rules.MaxUID)))}, {UIDs: rules.MustUIDs("33")}}},
			DNS: tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(netlab.Resolver4, netlab.Resolver6)},
		},
		{DisableComments: true, DNS: tproxy.DNS{CaptureAll: true}, Inbound: tproxy.Inbound{Off: true}},
		{IPFamilyMode: tproxy.IPv4Only, Outbound: tproxy.Outbound{Off: true}},
	}
}

// What the kernel lists parses back to the plan, and go-iptables, which knows
// nothing of ours, finds each chain and each rule.
func TestKernelHoldsThePlan(t *testing.T) {
	eachBackend(t, func(w *world) {
		for _, c := range w.some() {
			p, err := w.plan(c)
			if err != nil {
				w.Fatal(err)
			}
			if _, err := w.apply(p); err != nil {
				w.Fatal(err)
			}
			rec := tproxy.Record{PassthroughAddressOurs: len(p.Families) == 2}
			for _, f := range p.Families {
				want := p.WithRecord(rec)
				if d := rules.Compare(f, w.ours(f), want); len(d) > 0 {
					w.Errorf("%s: %v", f, d)
				}
				if w.backend == tproxy.NFTables {
					continue // go-iptables does not know of it
				}
				if err := w.In(w.Host, func() error { return w.witness(f, want) }); err != nil {
					w.Errorf("go-iptables, %s: %v", f, err)
				}
			}
		}
	})
}

func (w *world) witness(f rules.Family, want rules.Set) error {
	protocol := iptables.ProtocolIPv4
	if f == rules.IPv6 {
		protocol = iptables.ProtocolIPv6
	}
	ipt, err := iptables.New(iptables.IPFamily(protocol), iptables.Path(w.program(f, "")))
	if err != nil {
		return err
	}
	check := func(t rules.Table, chain string, list []rules.Rule) error {
		for _, r := range list {
			if want.NoComments && !r.Record {
				r.Why = ""
			}
			found, err := ipt.Exists(string(t), chain, words(r.String())...)
			if err != nil || !found {
				return fmt.Errorf("%s %s %s: %v, %w", t, chain, r, found, err)
			}
		}
		return nil
	}
	set := want.Lower(f)
	for _, b := range set.Bases {
		if err := check(b.Table, string(b.Hook), b.Rules); err != nil {
			return err
		}
	}
	for _, c := range set.Chains {
		list, err := ipt.List(string(c.Table), c.Name)
		if err != nil {
			return err
		}
		if len(list) != len(c.Rules)+1 { // and its -N
			return fmt.Errorf("%s %s: %q; want %d rules", c.Table, c.Name, list, len(c.Rules))
		}
		if err := check(c.Table, c.Name, c.Rules); err != nil {
			return err
		}
	}
	return nil
}

var wordOrQuoted = regexp.MustCompile(`"(?:[^"\\]|\\.)*"|\S+`)

// words splits a rule into arguments.
func words(rule string) []string {
	out := wordOrQuoted.FindAllString(rule, -1)
	for i, a := range out {
		if strings.HasPrefix(a, `"`) {
			out[i] = strings.NewReplacer(`\"`, `"`, `\\`, `\`, `\'`, `'`).Replace(a[1 : len(a)-1])
		}
	}
	return out
}

// foreign are rules of others, with counters, policies, and everything that could
// be taken for ours.
const foreign = `*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUMA_MESH_MINE - [0:0]
:OUTSIDERS - [0:0]
[7:420] -A PREROUTING -p tcp -m tcp --dport 9 -m comment --comment "redirects to KUMA_MESH_INBOUND" -j ACCEPT
[0:0] -A PREROUTING -p tcp -m comment --comment "kuma/mesh/transparent/proxy/mine" -j OUTSIDERS
[8:480] -A OUTPUT -p tcp -m tcp --dport 9 -m comment --comment "not KUMA_MESH_OUTBOUND" -j KUMA_MESH_MINE
[9:540] -A POSTROUTING -s 0.0.0.0/0 -o eth9 -j MASQUERADE
[3:33] -A KUMA_MESH_MINE -m owner --uid-owner 5678 -j RETURN
[4:44] -A OUTSIDERS -p tcp -m tcp --dport 15006 -j RETURN
COMMIT
*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
[5:55] -A PREROUTING -p udp -m udp --dport 53 -j CT --zone 2
[6:66] -A OUTPUT -p udp -m comment --comment KUMA_MESH_DNS_ZONE -j CT --notrack
COMMIT
*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
[1:11] -A OUTPUT -p icmp -j MARK --set-xmark 0x1/0xffffffff
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:KUMA_MESH_INBOUND - [0:0]
[2:22] -A INPUT -p tcp -m tcp --dport 15006 -j KUMA_MESH_INBOUND
[2:22] -A KUMA_MESH_INBOUND -j RETURN
COMMIT
`

// strangers puts the rules of others in, and makes the link silent so that no
// counter moves by itself.
func (w *world) strangers() {
	w.Helper()
	w.on("", "ip", "link", "set", "eth0", "down")
	for _, f := range rules.Families() {
		text := foreign
		if f == rules.IPv6 {
			text = strings.NewReplacer("-s 0.0.0.0/0", "-s ::/0", "-p icmp", "-p ipv6-icmp").Replace(text)
		}
		w.on(text, w.program(f, "restore"), "--counters", "--noflush")
	}
	// ip6tables-nft-restore 1.8.9 reads the counters and forgets them: some
	// packets, then.
	w.check(flow{"strangers", "5678 loopback:9 => refused"})
}

// K13, K14, K17: after an uninstall every table is byte for byte what it was
// before the install, and in between rules, chains, policies and counters of
// others are all there; nothing is left in the directory for temporary files.
func TestOthersRulesAreOthers(t *testing.T) {
	eachBackend(t, func(w *world) {
		tmp := w.TempDir()
		w.Setenv("TMPDIR", tmp)
		w.strangers()
		before := w.tables()
		theirs := make(map[rules.Family]string)
		for _, f := range rules.Families() {
			theirs[f] = w.save(f)
			if !regexp.MustCompile(`(?m)^\[[1-9]\d*:\d+\] -A KUMA_MESH_MINE`).MatchString(theirs[f]) {
				w.Errorf("%s: nothing counted in\n%s", f, theirs[f])
			}
		}
		for _, c := range w.some() {
			w.install(c)
			for f, text := range theirs {
				all := w.save(f)
				for line := range strings.Lines(text) {
					if !strings.Contains(all, line) {
						w.Errorf("%s: missing after the install: %s", f, line)
					}
				}
			}
			if again := w.install(c); again.Changed {
				w.Errorf("the same again: %+v", again)
			}
		}
		w.uninstall()
		w.same("the tables", before, w.tables())
		if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
			w.Errorf("temporary files: %v, %v", left, err)
		}
	})
}

// Installing the same again changes not even a counter, and says so; another
// Config takes the place of the first.
func TestInstallAgain(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		for _, c := range w.some() {
			w.install(c)
			w.check(flow{"B4", "1000 loopback:80 => app"}) // counters that are not zero
			w.on("", "ip", "link", "set", "eth0", "down")
			before := w.tables()
			r := w.install(c)
			if r.Changed || len(r.Steps) > 0 {
				w.Errorf("the same again: %+v", r)
			}
			w.same("the tables", before, w.tables())
			w.on("", "ip", "link", "set", "eth0", "up")
		}
		r := w.uninstall()
		if !r.Changed {
			w.Errorf("uninstall: %+v", r)
		}
		if r = w.uninstall(); r.Changed || len(r.Steps) > 0 {
			w.Errorf("uninstall again: %+v", r)
		}
	})
}

// K6, K7: an uninstall needs to know neither user nor comments.
func TestUninstallNeedsNoFlags(t *testing.T) {
	eachBackend(t, func(w *world) {
		for _, comments := range []bool{true, false} {
			c := tproxy.Config{ProxyUIDs: []tproxy.UID{1234}, DisableComments: !comments, DNS: tproxy.DNS{CaptureAll: true}}
			w.install(c)
			if r := w.install(c); r.Changed {
				w.Errorf("comments %v: the same again: %+v", comments, r)
			}
			w.uninstall()
			for _, f := range rules.Families() {
				if o := w.ours(f); len(o.Bases)+len(o.Chains) > 0 {
					w.Errorf("comments %v: %s: left: %v", comments, f, o)
				}
			}
			if a := w.on("", "ip", "-o", "address", "show", "dev", "lo"); strings.Contains(a, "::6/128") {
				w.Errorf("comments %v: left on lo: %s", comments, a)
			}
		}
		// Empty tables may stay; nobody takes the host for one of this variant.
		p, err := w.plan(tproxy.Config{})
		if err != nil {
			w.Fatal(err)
		}
		for _, v := range p.Host.Variants {
			if v.Rules || len(v.Ours) > 0 || v.Unknown != "" {
				w.Errorf("after the uninstall: %+v", v)
			}
		}
	})
}

// K16: rules that were made with nft in the table that iptables-nft uses, and that
// iptables cannot say, live through an install and an uninstall.
func TestRulesMadeWithNFTLiveOn(t *testing.T) {
	w := newWorld(t, tproxy.IPTablesNFT)
	netlab.Require(t, "nft")
	w.iptables("-t nat -A PREROUTING -p tcp --dport 9 -j ACCEPT", "-t nat -A OUTPUT -p tcp --dport 9 -j ACCEPT")
	w.on(`add set ip nat s1 { type ipv4_addr; flags interval; elements = { 192.0.2.0/24, 198.51.100.7 } }
add rule ip nat PREROUTING ip daddr @s1 accept
add rule ip nat OUTPUT ip daddr @s1 counter accept
add rule ip6 nat OUTPUT ip6 daddr { 2001:db8::1, 2001:db8::2 } accept
add table inet mine
add chain inet mine in { type filter hook input priority 0; policy accept; }
add rule inet mine in tcp dport { 22, 80 } accept
`, "nft", "-f", "-")
	before := w.on("", "nft", "list", "ruleset")
	r := w.install(tproxy.Config{})
	installed := w.on("", "nft", "list", "ruleset")
	for _, line := range []string{"ip daddr @s1 accept", "ip daddr @s1 counter packets 0 bytes 0 accept", "ip6 daddr { 2001:db8::1, 2001:db8::2 } accept", "198.51.100.7", "tcp dport { 22, 80 } accept"} {
		if strings.Count(installed, line) != strings.Count(before, line) {
			w.Errorf("%q: not as before:\n%s", line, installed)
		}
	}
	if !slices.ContainsFunc(r.Notes, func(n string) bool { return strings.Contains(n, "inet mine") }) {
		w.Errorf("no note names the table that iptables does not show: %q", r.Notes)
	}
	w.uninstall()
	w.same("nft list ruleset", before, w.on("", "nft", "list", "ruleset"))
}

// fake puts a program of that name before the real one on PATH. It may call the
// real one as $real; --version is the real one's answer.
func (w *world) fake(name, script string) {
	w.Helper()
	real, err := osexec.LookPath(name)
	if err != nil {
		w.Fatal(err)
	}
	dir := w.TempDir()
	text := fmt.Sprintf("#!/bin/sh\nreal=%s\ncase $1 in --version) exec $real --version;; esac\n%s\n", real, script)
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
		w.Fatal(err)
	}
	// Beside it, for who wants to know its version, the program itself.
	base := strings.TrimSuffix(name, "-restore")
	if err := os.Symlink(filepath.Join(filepath.Dir(real), base), filepath.Join(dir, base)); err != nil {
		w.Fatal(err)
	}
	w.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// K15: a rule that somebody adds between our reading and our writing stays.
func TestRuleAddedMeanwhileStays(t *testing.T) {
	eachVariant(t, func(w *world) {
		once := filepath.Join(w.TempDir(), "once")
		w.fake(w.program(rules.IPv4, "restore"), fmt.Sprintf(
			`[ -e %[1]s ] || { : >%[1]s; %[2]s -t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE; %[2]s -t nat -I OUTPUT 1 -p tcp --dport 9 -j ACCEPT; }
exec $real "$@"`, once, w.program(rules.IPv4, "")))
		for _, c := range w.some()[:2] {
			_ = os.Remove(once)
			w.install(c)
		}
		_ = os.Remove(once)
		w.uninstall()
		all := w.on("", w.program(rules.IPv4, "save"), "-t", "nat")
		for _, rule := range []string{"-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE", "-A OUTPUT -p tcp -m tcp --dport 9 -j ACCEPT"} {
			if n := strings.Count(all, rule); n != 3 {
				w.Errorf("%q stands there %d times; want 3:\n%s", rule, n, all)
			}
		}
		if strings.Contains(all, "KUMA_MESH") {
			w.Errorf("left:\n%s", all)
		}
	})
}

// K24: when IPv6 fails, IPv4 is as it was before, and the error says all of it.
func TestFailureOfIPv6UndoesIPv4(t *testing.T) {
	eachVariant(t, func(w *world) {
		w.strangers()
		before := w.tables()
		path := os.Getenv("PATH")
		w.fake(w.program(rules.IPv6, "restore"), "cat >/dev/null; echo 'ip6tables-restore: line 6 failed' >&2; exit 1")
		fresh, err := w.plan(tproxy.Config{})
		if err != nil {
			w.Fatal(err)
		}
		_, err = w.apply(fresh)
		e, ok := errors.AsType[*exec.ApplyError](err)
		if !ok || e.Family != rules.IPv6 || len(e.Undone) != 1 || len(e.Left) > 0 || e.Line != 6 || e.Rule == "" || e.Version == "" {
			w.Errorf("%#v, %v", e, err)
		}
		w.same("the tables", before, w.tables())

		// And from one Config to another.
		w.Setenv("PATH", path)
		w.install(tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("80")}})
		before = w.tables()
		w.fake(w.program(rules.IPv6, "restore"), "cat >/dev/null; exit 1")
		again, err := w.plan(tproxy.Config{})
		if err != nil {
			w.Fatal(err)
		}
		if _, err := w.apply(again); err == nil {
			w.Error("no error")
		}
		w.same("the tables", before, w.tables())
		w.Setenv("PATH", path)
		w.uninstall()
	})
}

func (w *world) passthroughOnLo() bool {
	w.Helper()
	return strings.Contains(w.on("", "ip", "-o", "-6", "address", "show", "dev", "lo"), "inet6 ::6/128")
}

// The address that the proxy hands IPv6 connections on from: ours if we made it.
func TestPassthroughAddressIsMadeAndRemoved(t *testing.T) {
	eachBackend(t, func(w *world) {
		for _, comments := range []bool{true, false} {
			c := tproxy.Config{DisableComments: !comments}
			r := w.install(c)
			if !w.passthroughOnLo() || !slices.ContainsFunc(r.Steps, func(s string) bool { return strings.Contains(s, "::6/128") }) {
				w.Errorf("::6 on lo: %v; steps %q", w.passthroughOnLo(), r.Steps)
			}
			// Another Config, and one that has no use for it: still ours.
			c.Inbound.ExcludePorts = rules.MustPorts("80")
			w.install(c)
			if !w.passthroughOnLo() {
				w.Error("::6 is gone after a second install")
			}
			w.uninstall()
			if w.passthroughOnLo() {
				w.Error("::6 is left")
			}
			w.on("", "ip", "address", "add", "::6/128", "dev", "lo")
			w.install(c)
			w.uninstall()
			if !w.passthroughOnLo() {
				w.Error("::6, which was there before, is gone")
			}
			w.on("", "ip", "address", "del", "::6/128", "dev", "lo")
			// It goes when IPv6 is no longer wanted.
			w.install(c)
			c.IPFamilyMode = tproxy.IPv4Only
			w.install(c)
			if w.passthroughOnLo() {
				w.Error("::6 is left with --ip-family-mode=ipv4")
			}
			w.uninstall()
		}
	})
}

// Where IPv6 is off it is left out, and the plan says so.
func TestIPv6OffIsLeftOut(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		if err := w.Sysctl(w.Host, "net/ipv6/conf/lo/disable_ipv6", "1"); err != nil {
			w.Fatal(err)
		}
		// Off on lo alone: what goes through eth0 would pass the proxy by.
		_, err := w.plan(tproxy.Config{})
		if _, refused := errors.AsType[*tproxy.RefusedError](err); !refused || !strings.Contains(err.Error(), "--ip-family-mode=ipv4") {
			w.Errorf("IPv6 off on lo alone: %v", err)
		}
		if err := w.Sysctl(w.Host, "net/ipv6/conf/all/disable_ipv6", "1"); err != nil {
			w.Fatal(err)
		}
		p, err := w.plan(tproxy.Config{})
		if err != nil {
			w.Fatal(err)
		}
		if !slices.ContainsFunc(p.Notes, func(n string) bool { return strings.Contains(n, "IPv6 is off") }) {
			w.Errorf("notes %q", p.Notes)
		}
		if _, err := w.apply(p); err != nil {
			w.Fatal(err)
		}
		if o := w.ours(rules.IPv6); len(o.Chains) > 0 {
			w.Errorf("IPv6 rules: %v", o)
		}
		w.checkFamilies([]int{0}, flow{"A5", "outside host:80 => in"}, flow{"B11", "1000 internet:80 => out"})
		w.uninstall()
	})
}

// K25: an address of the link alone is IPv6 that works: it is captured too.
func TestLinkLocalIsCaptured(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		w.on("", "ip", "-6", "address", "flush", "dev", "eth0", "scope", "global")
		m := regexp.MustCompile(`inet6 (fe80::[0-9a-f:]+)/`).FindStringSubmatch(w.on("", "ip", "-o", "-6", "address", "show", "dev", "eth0"))
		if m == nil {
			w.Fatal("no address of the link")
		}
		link := netip.AddrPortFrom(netip.MustParseAddr(m[1]).WithZone("20"), 80) // eth0 of the client
		if seen, err := w.Dial(w.Client, 0, "tcp", netip.AddrPort{}, link); err != nil || seen.Who != "app" {
			w.Errorf("before: %v, %v; want app", seen, err)
		}
		w.install(tproxy.Config{})
		if seen, err := w.Dial(w.Client, 0, "tcp", netip.AddrPort{}, link); err != nil || seen.Who != "in" {
			w.Errorf("%v, %v; want in", seen, err)
		}
	})
}

// K4, K5: to look changes nothing: no table comes into being, no address.
func TestLookingTouchesNothing(t *testing.T) {
	look := func(w *world) {
		w.Helper()
		before := w.tables()
		for _, c := range w.some() {
			if _, err := w.plan(c); err != nil {
				w.Fatal(err)
			}
		}
		if _, err := w.remove(exec.RemoveOptions{DryRun: true}); err != nil {
			w.Fatal(err)
		}
		w.same("everything", before, w.tables())
	}
	eachBackend(t, func(w *world) {
		look(w)
		for _, names := range []string{"ip_tables_names", "ip6_tables_names"} {
			if got := w.on("", "cat", "/proc/thread-self/net/"+names); got != "" {
				w.Errorf("%s: %s", names, got)
			}
		}
		w.strangers()
		look(w)
		w.install(tproxy.Config{})
		look(w)
		w.uninstall()
		look(w)
	})
}

// An install with one variant leaves the other's tables alone, and an install
// with the other takes the first's rules out.
func TestVariantsDoNotMeet(t *testing.T) {
	w := newWorld(t, tproxy.IPTablesNFT)
	netlab.Require(t, "iptables-legacy-restore", "ip6tables-legacy-restore")
	w.serve()
	w.proxy(netlab.Answer)
	w.install(tproxy.Config{})
	for _, names := range []string{"ip_tables_names", "ip6_tables_names"} {
		if got := w.on("", "cat", "/proc/thread-self/net/"+names); got != "" {
			w.Errorf("an install with iptables-nft made legacy tables: %s: %s", names, got)
		}
	}
	for _, b := range []tproxy.Backend{tproxy.IPTablesLegacy, tproxy.IPTablesNFT} {
		other := *w
		other.backend = b
		r := other.install(tproxy.Config{Backend: b})
		if r.Backend != b || !r.Changed {
			w.Errorf("%+v", r)
		}
		if n := len(w.ours(rules.IPv4).Chains); (n > 0) != (b == tproxy.IPTablesNFT) {
			w.Errorf("after an install with %s, iptables-nft has %d chains of ours", b, n)
		}
		w.check(flow{"A5", "outside host:80 => in"}, flow{"B11", "1000 internet:80 => out"})
	}
	w.uninstall()
}

// K23: a rule of somebody else behind our jump still sees what we exclude.
func TestRulesBehindOursSeeWhatIsExcluded(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		w.install(tproxy.Config{
			Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("8080")},
			Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("8443"), ExcludeIPs: prefixes("client"), ExcludePortsForUIDs: []tproxy.UIDExclusion{
				{Protocol: rules.TCP, Ports: rules.MustPorts("2525"), UIDs: rules.MustUIDs("1001")}}},
			DNS: tproxy.DNS{CaptureAll: true},
		})
		w.iptables("-t nat -A OUTPUT -p tcp -m comment --comment behind", "-t nat -A PREROUTING -p tcp -m comment --comment behind",
			"-t nat -A OUTPUT -p udp --dport 53 -m comment --comment behind")
		excluded := []flow{
			{"A3", "outside host:22 => app"}, {"A3", "outside host:8080 => app"},
			{"B3", "5678 internet:80 => remote"}, {"B4", "1000 host:80 => app"}, {"B6", "1000 client:80 => remote"},
			{"B7", "1001 internet:2525 => remote"}, {"B8", "1000 internet:8443 => remote"}, {"B9", "1000 internet:53 => remote"},
			{"C1", "5678 udp internet:53 => resolver"},
		}
		w.check(excluded...)
		counted := regexp.MustCompile(`(?m)^\[(\d+):\d+\] -A (?:OUTPUT|PREROUTING) .*--comment behind`)
		for _, f := range rules.Families() {
			var packets int
			for _, m := range counted.FindAllStringSubmatch(w.on("", w.program(f, "save"), "-c", "-t", "nat"), -1) {
				var n int
				fmt.Sscan(m[1], &n)
				packets += n
			}
			if packets != len(excluded) {
				w.Errorf("%s: the rules behind ours saw %d packets; want %d", f, packets, len(excluded))
			}
		}
	})
}

// K18: who does not want to wait for the lock of iptables-legacy does not, is told
// who holds it, and who waits gets it.
func TestLockOfIPTables(t *testing.T) {
	hold := func(w *world) (release func()) {
		f, err := os.OpenFile("/run/xtables.lock", os.O_CREATE|os.O_RDONLY, 0o600)
		if err != nil {
			w.Fatal(err)
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
			w.Fatal(err)
		}
		return func() { _ = f.Close() }
	}
	t.Run("iptables-legacy", func(t *testing.T) {
		w := newWorld(t, tproxy.IPTablesLegacy)
		release := hold(w)
		defer release()
		p, err := w.plan(tproxy.Config{Wait: -1})
		if err != nil {
			w.Fatal(err)
		}
		start := time.Now()
		_, err = w.apply(p)
		if took := time.Since(start); took > 700*time.Millisecond {
			w.Errorf("took %s", took)
		}
		if !errors.Is(err, exec.ErrLocked) || !strings.Contains(fmt.Sprint(err), fmt.Sprintf("process %d", os.Getpid())) {
			w.Errorf("error %v; want one that names process %d", err, os.Getpid())
		}
		w.Logf("the error: %v", err)
		time.AfterFunc(300*time.Millisecond, release)
		r := w.install(tproxy.Config{Wait: 5 * time.Second, WaitInterval: 50 * time.Millisecond})
		if !r.Changed {
			w.Errorf("%+v", r)
		}
	})
	t.Run("iptables-nft", func(t *testing.T) {
		w := newWorld(t, tproxy.IPTablesNFT)
		defer hold(w)()
		if r := w.install(tproxy.Config{Wait: -1}); !r.Changed { // it has no such lock
			w.Errorf("%+v", r)
		}
	})
}

// Contract 4.9: a drop policy sees a redirected connection with the proxy's port,
// and the note tells the rule that mends it.
func TestDropPolicyIsNoted(t *testing.T) {
	eachVariant(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		w.iptables("-A INPUT -i lo -j ACCEPT", "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A INPUT -p ipv6-icmp -j ACCEPT",
			"-A INPUT -p tcp -m multiport --dports 22,80 -j ACCEPT", "-P INPUT DROP")
		before := []flow{{"before", "outside host:80 => app"}, {"before", "outside host:22 => app"}}
		w.check(before...)
		r := w.install(tproxy.Config{})
		w.check(flow{"A5", "outside host:80 => timeout"}, flow{"A3", "outside host:22 => app"})
		mends := 0
		for _, n := range r.Notes {
			if !strings.Contains(n, "15006") || !strings.Contains(n, "INPUT") {
				continue
			}
			m := regexp.MustCompile(`(ip6?tables) (-I INPUT .*)`).FindStringSubmatch(n)
			if m == nil {
				w.Errorf("a note without the rule that mends it: %q", n)
				continue
			}
			mends++
			f := rules.IPv4
			if m[1] == "ip6tables" {
				f = rules.IPv6
			}
			w.on("", w.program(f, ""), strings.Fields(m[2])...)
		}
		if mends != 2 {
			w.Errorf("%d rules that mend it; want one a family: %q", mends, r.Notes)
		}
		w.check(flow{"A5", "outside host:80 => in"}, flow{"A3", "outside host:22 => app"})
		if r := w.install(tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("8080")}}); slices.ContainsFunc(r.Notes, func(n string) bool { return strings.Contains(n, "INPUT") }) {
			w.Errorf("mended, and still noted: %q", r.Notes)
		}
	})
}
