package exec

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// While an uninstall drains, nothing is redirected and some rule holds conntrack; afterwards
// nothing of ours is left. It does not wait longer than it has to.
func TestDrain(t *testing.T) {
	for _, kuma := range []bool{false, true} {
		m := newFakeMachine(t)
		m.populate(t)
		before := m.state()
		if kuma {
			m.kuma(t, "nft", oldkuma.Third, oldkuma.Options{DNS: true})
		} else {
			m.install(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
		}
		looks := 0
		m.connections = func() int {
			looks++
			for _, v := range []string{"iptables-nft", "ip6tables-nft"} {
				nat := m.netfilter[v].Set()
				for _, h := range []rules.Hook{rules.Prerouting, rules.Output} {
					b, _ := nat.Base(rules.NAT, h)
					for _, r := range b.Rules {
						if strings.Contains(r.Target(), "MESH") {
							t.Errorf("look %d: %s %s %s", looks, v, h, r)
						}
					}
				}
				if !slices.ContainsFunc(nat.Chains, func(c rules.Chain) bool {
					return slices.ContainsFunc(c.Rules, func(r rules.Rule) bool { _, ok := r.Action.(rules.Redirect); return ok })
				}) {
					t.Errorf("look %d: %s: nothing holds conntrack", looks, v)
				}
				if raw, _ := nat.Base(rules.Raw, rules.Output); strings.Contains(raw.Rules[0].Target(), "MESH") {
					t.Errorf("look %d: zones are left", looks)
				}
			}
			if !m.addresses[passthrough6] {
				t.Errorf("look %d: ::6 is gone already", looks)
			}
			return max(0, 5-looks)
		}
		start := time.Now()
		r, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{Drain: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); looks < 5 || took > time.Minute || r.Cut != 0 {
			t.Errorf("%d looks in %s, %d cut", looks, took, r.Cut)
		}
		if len(r.Families) != 2 || len(r.Families[0].Changes) == 0 || !r.Changed {
			t.Errorf("%+v", r)
		}
		m.unchanged(t, before)
	}
}

// What has not ended in time is cut, and counted, and so is what goes without a drain.
func TestCut(t *testing.T) {
	for _, drain := range []time.Duration{0, time.Millisecond} {
		m := newFakeMachine(t)
		m.populate(t)
		before := m.state()
		m.install(t, tproxy.Config{})
		m.connections = func() int { return 7 }
		dry, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{DryRun: true, Drain: drain})
		if err != nil || dry.Cut != 14 || !strings.Contains(strings.Join(dry.Notes, "\n"), "14 redirected connections that live now would be cut") {
			t.Errorf("dry: %+v, %v", dry, err)
		}
		r, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{Drain: drain})
		if err != nil || r.Cut != 14 || !strings.Contains(strings.Join(r.Notes, "\n"), "were cut") {
			t.Errorf("%+v, %v", r, err)
		}
		m.unchanged(t, before)
	}
}

// Where a rule of others holds conntrack, none is cut, wherever it stands.
func TestNoneIsCutWhereOthersHoldConntrack(t *testing.T) {
	for _, b := range tproxy.Backends() {
		for where, hold := range map[string]func(*fakeMachine){
			"iptables-nft": func(m *fakeMachine) {
				m.edit(t, "iptables-nft", "*nat\n-A POSTROUTING -o eth0 -j MASQUERADE\nCOMMIT\n")
			},
			"ip6tables-legacy": func(m *fakeMachine) {
				m.edit(t, "ip6tables-legacy", "*nat\n-A POSTROUTING -o eth0 -j MASQUERADE\nCOMMIT\n")
			},
			"another table of theirs": func(m *fakeMachine) {
				m.tracks = true
				m.nftBases = []kernel.NFTBase{{Table: kernel.NFTTable{Family: "ip", Name: "theirs"}, Chain: "post", Type: "nat", Hook: "POSTROUTING", Priority: 100}}
			},
			"nowhere": func(m *fakeMachine) { m.populate(t) },
		} {
			m := newFakeMachine(t)
			hold(m)
			m.install(t, tproxy.Config{Backend: b})
			m.connections = func() int { return 7 }
			if r := m.uninstall(t); r.Cut != 0 && where != "nowhere" || r.Cut != 14 && where == "nowhere" {
				t.Errorf("%s, held in %s: %d cut", b, where, r.Cut)
			}
		}
	}
	for _, rule := range []string{"-A POSTROUTING -o eth0 -j MASQUERADE", "-A OUTPUT -m conntrack --ctstate NEW -j ACCEPT", "-A OUTPUT -p tcp -m tcp --dport 1 -j REDIRECT --to-ports 2"} {
		m := newFakeMachine(t)
		m.edit(t, "iptables-nft", "*nat\n"+rule+"\nCOMMIT\n")
		m.install(t, tproxy.Config{})
		m.connections = func() int { return 7 }
		if r := m.uninstall(t); r.Cut != 0 {
			t.Errorf("%s: %d cut", rule, r.Cut)
		}
	}
}

// A rule of others that only looks at conntrack translates nothing: with the last chain of
// nat, which is in our table, the redirected connections go. iptables' chains stay.
func TestCutWhereOthersOnlyLookAtConntrack(t *testing.T) {
	for _, b := range tproxy.Backends() {
		m := newFakeMachine(t)
		m.edit(t, "iptables-nft", "*filter\n-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT\nCOMMIT\n")
		m.install(t, tproxy.Config{Backend: b})
		m.connections = func() int { return 7 }
		want := 0
		if b == tproxy.NFTables {
			want = 14
		}
		if r := m.uninstall(t); r.Cut != want {
			t.Errorf("%s: %d cut, want %d", b, r.Cut, want)
		}
	}
}

// A drain that is cancelled, or fails, puts everything back.
func TestDrainIsUndone(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	m.install(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
	before := m.state()
	ctx, cancel := context.WithCancel(context.Background())
	m.connections = func() int { cancel(); return 1 }
	_, err := (&Runner{machine: m}).Remove(ctx, RemoveOptions{Drain: time.Hour})
	if e := applyError(t, err); !errors.Is(err, context.Canceled) || len(e.Left) > 0 {
		t.Error(err)
	}
	m.unchanged(t, before)

	m.connections = nil
	commits := 0
	m.stop = func(rules.Table) bool { commits++; return false }
	m.uninstallDraining(t)
	for n := range commits {
		m := newFakeMachine(t)
		m.populate(t)
		m.install(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
		at := n
		m.stop = func(rules.Table) bool { at--; return at == -1 }
		_, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{Drain: time.Hour})
		if e := applyError(t, err); len(e.Left) > 0 {
			t.Errorf("commit %d: left %q", n, e.Left)
		}
		m.unchanged(t, before)
	}
	// Killed, the next uninstall finishes it, without flags.
	for n := range commits {
		m := newFakeMachine(t)
		m.populate(t)
		clean := m.state()
		m.install(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
		at := n
		m.stop = func(rules.Table) bool { at--; m.dead = at < 0; return m.dead }
		_, _ = (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{Drain: time.Hour})
		m.stop, m.dead = nil, false
		m.uninstall(t)
		m.unchanged(t, clean)
	}
}

// A drain that was killed does not hide from the next uninstall which connections are
// redirected: it counts them, and waits for them where it is asked to.
func TestKilledDrainIsCounted(t *testing.T) {
	for _, drain := range []time.Duration{0, time.Millisecond} {
		m := newFakeMachine(t)
		m.populate(t)
		clean := m.state()
		m.install(t, tproxy.Config{Inbound: tproxy.Inbound{Port: 1}})
		m.connections = func() int { m.dead = true; return 7 }
		if _, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{Drain: time.Millisecond}); err == nil {
			t.Fatal("not killed")
		}
		m.dead = false
		if i, err := (&Runner{machine: m}).Installed(context.Background()); err != nil || i.Unknown != nil || i.Config.Inbound.Port != 1 {
			t.Errorf("what was installed: %+v, %v", i, err)
		}
		m.connections = func() int { return 7 }
		for i := range 2 {
			r, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{DryRun: i == 0, Drain: drain})
			if err != nil || r.Cut != 14 || len(r.Notes) != 1 {
				t.Errorf("%+v, %v", r, err)
			}
		}
		m.unchanged(t, clean)
	}
}

func (m *fakeMachine) uninstallDraining(t *testing.T) {
	t.Helper()
	if _, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{Drain: time.Hour}); err != nil {
		t.Fatal(err)
	}
}

// A table that drains keeps its chains at the hooks, which translate what lives, and
// whatever others have put into it is no obstacle.
func TestDrainOfATable(t *testing.T) {
	m := newFakeMachine(t)
	m.noTable = ""
	m.populate(t)
	m.install(t, tproxy.Config{Backend: tproxy.NFTables, DNS: tproxy.DNS{CaptureAll: true}})
	m.table.Strange = []string{"object theirs"}
	m.table.Chains = append(m.table.Chains, rules.NativeChain{Name: "theirs", Rules: []rules.NativeRule{{Unknown: "expression log"}, {Counted: true, Action: rules.Return{}}}})
	looks := 0
	m.connections = func() int {
		looks++
		hooks, redirects := 0, 0
		for _, c := range m.table.Chains {
			if c.Hook != "" {
				hooks++
				if len(c.Rules) > 0 {
					t.Errorf("look %d: %s has rules", looks, c.Name)
				}
			}
			for _, r := range c.Rules {
				if _, ok := r.Action.(rules.Redirect); ok {
					redirects++
				}
			}
		}
		if hooks != 3 || redirects == 0 {
			t.Errorf("look %d: %d hooks and %d rules that redirect", looks, hooks, redirects)
		}
		return max(0, 5-looks)
	}
	if _, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{Drain: time.Hour}); err != nil || m.table != nil || looks < 5 {
		t.Errorf("%v; the table: %v; %d looks", err, m.table, looks)
	}
}
