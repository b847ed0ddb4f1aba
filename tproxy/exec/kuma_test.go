package exec

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// kumas are installs of Kuma's own.
var kumas = map[string]oldkuma.Options{
	"defaults":   {},
	"all DNS":    {DNS: true, UID: 1234},
	"servers":    {DNS: true, Servers: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("2001:db8::53")}},
	"everything": oldkuma.Everything(),
}

// kuma installs as Kuma's own installer does.
func (m *fakeMachine) kuma(t *testing.T, variant string, i oldkuma.Installer, o oldkuma.Options) {
	t.Helper()
	for _, v := range []string{"iptables-" + variant, "ip6tables-" + variant} {
		m.edit(t, v, oldkuma.Script(i, m.netfilter[v].Family, o))
	}
	m.addresses[passthrough6] = true
}

func eachKuma(t *testing.T, run func(t *testing.T, variant string, i oldkuma.Installer, o oldkuma.Options)) {
	for _, variant := range []string{"nft", "legacy"} {
		for _, i := range oldkuma.Installers() {
			for name, o := range kumas {
				t.Run(fmt.Sprintf("%s/%s/%s", variant, i, name), func(t *testing.T) { run(t, variant, i, o) })
			}
		}
	}
}

// without is the state but for the record, which has the Config that was asked for, and
// for what bare installs leave in doubt.
func (m *fakeMachine) without(doubtful bool) []string {
	return slices.DeleteFunc(m.state(), func(line string) bool {
		return strings.HasPrefix(line, "-A KUMA_MESH_RECORD ") || doubtful && (strings.Contains(line, "-d 10.8.0.1/32 -j RETURN") || strings.Contains(line, "-d fd08::1/128 -j RETURN") ||
			strings.Contains(line, "--ctstate INVALID -j DROP"))
	})
}

// What Kuma's installers left is replaced by an install, whichever it was, and the
// rules are those of an install on a fresh host; an uninstall leaves what stood there
// before Kuma's.
func TestKumaIsReplaced(t *testing.T) {
	for _, c := range []tproxy.Config{{}, {DNS: tproxy.DNS{CaptureAll: true}, DisableComments: true}, {IPFamilyMode: tproxy.IPv4Only}} {
		eachKuma(t, func(t *testing.T, variant string, i oldkuma.Installer, o oldkuma.Options) {
			bare := i == oldkuma.Second || i == oldkuma.ThirdBare
			fresh := newFakeMachine(t)
			fresh.populate(t)
			for _, v := range prefixes { // Kuma's makes the table
				fresh.edit(t, v, "*mangle\nCOMMIT\n")
			}
			before := fresh.without(false)
			m := newFakeMachine(t)
			m.populate(t)
			for _, v := range prefixes {
				m.edit(t, v, "*mangle\nCOMMIT\n")
			}
			m.kuma(t, variant, i, o)
			at := c
			at.Backend = tproxy.IPTablesNFT
			if variant == "legacy" {
				at.Backend = tproxy.IPTablesLegacy
			}
			fresh.install(t, at)
			r := m.install(t, c) // stays where Kuma's rules are
			if r.Backend != at.Backend {
				t.Errorf("backend %s: %s", r.Backend, r.Why)
			}
			for _, v := range prefixes {
				f := m.netfilter[v].Family
				d := rules.Compare(f, m.ours(t, v), fresh.ours(t, v))
				if d = slices.DeleteFunc(d, func(c rules.Change) bool { return c.Chain == "KUMA_MESH_RECORD" }); len(d) > 0 {
					t.Errorf("%s is not as on a fresh host: %v", v, d)
				}
			}
			if len(o.Networks) == 0 { // with them, the jump stood in front, and stays there
				same(t, "after the install", m.without(bare), fresh.without(bare))
			}
			if len(r.Notes) == 0 || !strings.HasPrefix(r.Notes[0], "rules of Kuma's own installer, replaced: iptables-"+variant+" IPv4 (nat PREROUTING, ") {
				t.Errorf("notes %q", r.Notes)
			}
			if again := m.install(t, c); again.Changed {
				t.Errorf("the same again: %+v", again)
			}
			m.uninstall(t)
			same(t, "after the uninstall", m.without(bare), before)
		})
	}
}

// An uninstall without an install in between takes Kuma's rules out too, with ::6,
// which Kuma's installer adds (K4) and never removes.
func TestKumaIsUninstalled(t *testing.T) {
	eachKuma(t, func(t *testing.T, variant string, i oldkuma.Installer, o oldkuma.Options) {
		bare := i == oldkuma.Second || i == oldkuma.ThirdBare
		m := newFakeMachine(t)
		m.populate(t)
		for _, v := range prefixes {
			m.edit(t, v, "*mangle\nCOMMIT\n")
		}
		before := m.without(false)
		m.kuma(t, variant, i, o)
		m.uninstall(t)
		same(t, "after the uninstall", m.without(bare), before)
	})
}

// A failure anywhere puts Kuma's rules back where they stood.
func TestKumaIsPutBack(t *testing.T) {
	eachKuma(t, func(t *testing.T, variant string, i oldkuma.Installer, o oldkuma.Options) {
		ready := func() *fakeMachine {
			m := newFakeMachine(t)
			m.populate(t)
			m.kuma(t, variant, i, o)
			for _, v := range prefixes { // and others came later
				m.edit(t, v, "*nat\n-I OUTPUT 2 -p tcp -m tcp --dport 11 -j ACCEPT\n-A OUTPUT -p tcp -m tcp --dport 10 -j ACCEPT\n-A PREROUTING -p tcp -m tcp --dport 10 -j ACCEPT\nCOMMIT\n")
			}
			return m
		}
		commits := 0
		m := ready()
		m.stop = func(rules.Table) bool { commits++; return false }
		c := tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}
		m.install(t, c)
		if commits < 4 {
			t.Fatalf("%d commits", commits)
		}
		for n := range commits {
			m := ready()
			before := m.state()
			p := m.plan(t, c)
			at := n
			m.stop = func(rules.Table) bool { at--; return at == -1 }
			e := applyError(t, m.attempt(context.Background(), p))
			m.unchanged(t, before)
			if len(e.Left) > 0 {
				t.Errorf("commit %d: left %q", n, e.Left)
			}
		}
	})
}

// Killed between two commits, the next install or uninstall finishes the job.
func TestKumaKilledInBetween(t *testing.T) {
	eachKuma(t, func(t *testing.T, variant string, i oldkuma.Installer, o oldkuma.Options) {
		bare := i == oldkuma.Second || i == oldkuma.ThirdBare
		c := tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}
		for n := range 8 {
			m := newFakeMachine(t)
			m.populate(t)
			for _, v := range prefixes {
				m.edit(t, v, "*mangle\nCOMMIT\n")
			}
			before := m.without(false)
			m.kuma(t, variant, i, o)
			p := m.plan(t, c)
			at := n
			m.stop = func(rules.Table) bool { at--; m.dead = at < 0; return m.dead }
			_ = m.attempt(context.Background(), p)
			m.stop, m.dead = nil, false
			if n%2 == 0 {
				m.install(t, c)
			}
			m.uninstall(t)
			same(t, fmt.Sprintf("after %d commits", n), m.without(bare), before)
		}
	})
}

// Beside Kuma's rules stand others that resemble them: by their name, by a comment,
// by their shape with another user or port. They stay (K13).
func TestKumaLookAlikesStay(t *testing.T) {
	const alike = `*nat
:KUMA_MESH_MINE - [0:0]
:MESH_OUTPUTS - [0:0]
-A OUTPUT -p tcp -m comment --comment "kuma/mesh/transparent/proxy/mine" -j KUMA_MESH_MINE
-A OUTPUT -p tcp -m tcp --dport 7 -m comment --comment "kuma/mesh/transparent/proxy/mine" -j ACCEPT
-A OUTPUT -p udp -m udp --dport 53 -m owner --uid-owner 77 -m comment --comment "instead of KUMA_MESH" -j RETURN
-A OUTPUT -p udp -m udp --dport 53 -m owner --uid-owner 77 -j RETURN
-A OUTPUT -p udp -m udp --dport 5353 -j REDIRECT --to-ports 15053
-A OUTPUT -p tcp -m tcp --dport 25 -m owner --uid-owner 77 -j RETURN
-A PREROUTING -i docker9 -p udp -m udp --dport 53 -j REDIRECT --to-ports 5300
-A KUMA_MESH_MINE -j RETURN
COMMIT
*raw
-A OUTPUT -p udp -m udp --dport 53 -m owner --uid-owner 77 -j CT --zone 7
-A PREROUTING -p udp -m udp --sport 53 -j CT --notrack
COMMIT
`
	eachKuma(t, func(t *testing.T, variant string, i oldkuma.Installer, o oldkuma.Options) {
		bare := i == oldkuma.Second || i == oldkuma.ThirdBare
		m := newFakeMachine(t)
		m.populate(t)
		for _, v := range prefixes {
			m.edit(t, v, "*mangle\nCOMMIT\n")
			m.edit(t, v, alike)
		}
		before := m.without(false)
		m.kuma(t, variant, i, o)
		m.install(t, tproxy.Config{})
		m.uninstall(t)
		same(t, "after the uninstall", m.without(bare), before)
	})
}

// A chain with a name of Kuma 1.x's that holds what Kuma does not write is
// somebody's, and is in nobody's way.
func TestForeignChainWithANameOfKumas(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	for _, v := range prefixes {
		m.edit(t, v, `*nat
:MESH_INBOUND - [0:0]
-A PREROUTING -p tcp -j MESH_INBOUND
-A MESH_INBOUND -p tcp -m tcp --dport 80 -j DNAT --to-destination :8080
COMMIT
`)
	}
	before := m.state()
	if r := m.install(t, tproxy.Config{}); strings.Contains(fmt.Sprint(r.Notes), "own installer") {
		t.Errorf("notes %q", r.Notes)
	}
	m.uninstall(t)
	m.unchanged(t, before)
}

// A rule that Kuma's installer made without a comment and that could be anybody's is
// left, and named with the way to delete it.
func TestDoubtfulRulesAreNamed(t *testing.T) {
	m := newFakeMachine(t)
	o := oldkuma.Everything()
	o.DNS, o.Log, o.ExcludeForUIDs = false, false, nil // nothing stands around it
	m.kuma(t, "nft", oldkuma.Second, o)
	r := m.install(t, tproxy.Config{})
	for _, want := range []string{
		"left in iptables-nft IPv4: nat OUTPUT #1: -A OUTPUT -d 10.8.0.1/32 -j RETURN;",
		"if it is Kuma's: iptables-nft -t nat -D OUTPUT -d 10.8.0.1/32 -j RETURN",
		"if it is Kuma's: ip6tables-nft -t mangle -D PREROUTING -m conntrack --ctstate INVALID -j DROP",
	} {
		if !strings.Contains(strings.Join(r.Notes, "\n"), want) {
			t.Errorf("no note %q in\n%s", want, strings.Join(r.Notes, "\n"))
		}
	}
}

// K17, K12: the copies of rules that pile up in the folder for temporary files, and
// a backup of resolv.conf from long ago, are named and not touched.
func TestKumasFilesAreNamed(t *testing.T) {
	m := newFakeMachine(t)
	m.kuma(t, "nft", oldkuma.Third, oldkuma.Options{})
	backup := strings.Replace(kumaBackups[1], "????-??-??-??????", "2026-10-01-101112", 1)
	m.files[backup], m.etc = "", t.TempDir()
	stale := filepath.Join(m.etc, "resolv.conf.kuma-backup")
	if err := os.WriteFile(stale, []byte("nameserver 192.0.2.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, notes := range [][]string{m.install(t, tproxy.Config{}).Notes, m.uninstall(t).Notes} {
		text := strings.Join(notes, "\n")
		if !strings.Contains(text, backup+" is a copy") || !strings.Contains(text, stale+" is not a backup of ours") {
			t.Errorf("notes\n%s", text)
		}
	}
	if text, err := os.ReadFile(stale); err != nil || string(text) != "nameserver 192.0.2.1\n" || len(m.files) != 1 {
		t.Errorf("%q, %v, files %v", text, err, m.files)
	}
}
