package exec

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// snapped is a Snapshot that has been through JSON.
func (m *fakeMachine) snapped(t *testing.T) *Snapshot {
	t.Helper()
	writes := m.writes
	s, err := (&Runner{machine: m}).Snapshot(context.Background())
	if err != nil {
		t.Fatalf("Snapshot: %v", err)
	}
	if m.writes != writes {
		t.Error("a snapshot wrote something")
	}
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var out Snapshot
	if err := json.Unmarshal(text, &out); err != nil {
		t.Fatal(err)
	}
	return &out
}

func (m *fakeMachine) restored(t *testing.T, s *Snapshot) *Report {
	t.Helper()
	r, err := (&Runner{machine: m}).Restore(context.Background(), s, RestoreOptions{})
	if err != nil {
		t.Fatalf("Restore: %v", err)
	}
	return r
}

// formers are states that an install can find.
func formers(t *testing.T) map[string]func(m *fakeMachine) {
	out := map[string]func(m *fakeMachine){
		"nothing": func(*fakeMachine) {},
		"::6 of somebody else": func(m *fakeMachine) {
			m.addresses[passthrough6] = true
		},
		"half of an install": func(m *fakeMachine) {
			n := 2
			m.stop = func(rules.Table) bool { n--; m.dead = n < 0; return m.dead }
			_, err := (&Runner{machine: m}).Apply(context.Background(), m.plan(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}))
			if m.stop, m.dead = nil, false; err == nil {
				t.Error("it was not killed")
			}
		},
		"an edited install": func(m *fakeMachine) {
			m.install(t, tproxy.Config{Backend: tproxy.IPTablesNFT})
			m.edit(t, "iptables-nft", "*nat\n-A KUMA_MESH_INBOUND -p tcp -m tcp --dport 99 -m hashlimit --hashlimit-name x -j RETURN\n-I OUTPUT 1 -p tcp -m tcp --dport 7 -j ACCEPT\nCOMMIT\n")
		},
		"an edited table": func(m *fakeMachine) {
			m.install(t, tproxy.Config{Backend: tproxy.NFTables})
			n := *m.table
			n.Chains = slices.Clone(n.Chains)
			n.Chains[0].Rules = append(slices.Clone(n.Chains[0].Rules), rules.NativeRule{Action: rules.Accept{}, Comment: "of others"})
			n.Chains = append(n.Chains, rules.NativeChain{Name: "theirs", Type: "filter", Hook: rules.Input, Priority: 7})
			m.table = &n
		},
		"both variants": func(m *fakeMachine) {
			m.install(t, tproxy.Config{Backend: tproxy.IPTablesNFT})
			was := m.netfilter["iptables-nft"].Save()
			m.install(t, tproxy.Config{Backend: tproxy.IPTablesLegacy})
			m.edit(t, "iptables-nft", string(was))
		},
	}
	for i, c := range configs {
		out[fmt.Sprintf("config %d", i)] = func(m *fakeMachine) { m.install(t, c) }
	}
	for _, variant := range []string{"nft", "legacy"} {
		for _, i := range oldkuma.Installers() {
			out[fmt.Sprintf("Kuma's %s in %s", i, variant)] = func(m *fakeMachine) { m.kuma(t, variant, i, oldkuma.Everything()) }
		}
	}
	return out
}

// Whatever stood there comes back exactly, from whatever was installed over it, and then
// nothing is left to do. What others changed meanwhile stays.
func TestRestoreIsTheWayBack(t *testing.T) {
	proc := fakeProc(t)
	for name, former := range formers(t) {
		for i, c := range configs {
			t.Run(fmt.Sprintf("%s, then config %d", name, i), func(t *testing.T) {
				const foreign = "*nat\n-I OUTPUT 1 -p tcp -m tcp --dport 4242 -j ACCEPT\n-A PREROUTING -p tcp -m tcp --dport 4243 -j ACCEPT\n-A DOCKER -p tcp -m tcp --dport 4244 -j RETURN\nCOMMIT\n"
				before, alone := newFakeMachineAt(proc), newFakeMachineAt(proc)
				for _, m := range []*fakeMachine{before, alone} {
					m.populate(t)
					for _, v := range prefixes {
						m.edit(t, v, "*mangle\nCOMMIT\n")
					}
					former(m)
				}
				alone.edit(t, "iptables-nft", foreign)
				snapshot := before.snapped(t)
				was := before.state()
				before.install(t, c)
				before.restored(t, snapshot)
				before.unchanged(t, was)

				before.install(t, c)
				before.edit(t, "iptables-nft", foreign)
				before.restored(t, snapshot)
				// Others' rules among ours may stand elsewhere among them, nowhere else.
				if got, want := before.others(t), alone.others(t); got != want {
					t.Errorf("foreign rules\n%s\nwant\n%s", got, want)
				}
				if !sameTable(before.table, alone.table) && (before.table == nil || !before.table.Equal(alone.table)) {
					t.Errorf("the table is %v, and was %v", before.table, alone.table)
				}
				for _, v := range prefixes {
					f := before.netfilter[v].Family
					if d := rules.Compare(f, before.found(t, v), alone.found(t, v)); len(d) > 0 {
						t.Errorf("%s departs from what it was: %v", v, d)
					}
				}
				writes := before.writes
				if r := before.restored(t, snapshot); r.Changed || len(r.Steps) > 0 || before.writes != writes {
					t.Errorf("once more: %+v", r)
				}
			})
		}
	}
}

// found is what Find finds in a variant.
func (m *fakeMachine) found(t *testing.T, variant string) rules.Set {
	t.Helper()
	n := m.netfilter[variant]
	all, err := rules.ParseSave(n.Family, n.Save())
	if err != nil {
		t.Fatal(err)
	}
	return tproxy.Find(n.Family, all).Ours
}

// others is what is not ours, in the order of each chain.
func (m *fakeMachine) others(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, v := range prefixes {
		mine := m.found(t, v)
		for _, c := range m.netfilter[v].Set().Bases {
			own, _ := mine.Base(c.Table, c.Hook)
			for _, r := range c.Rules {
				if !strings.Contains(fmt.Sprint(own.Rules), r.String()) {
					fmt.Fprintln(&b, v, c.Table, c.Hook, r)
				}
			}
		}
		for _, c := range m.netfilter[v].Set().Chains {
			if _, is := mine.Chain(c.Table, c.Name); !is {
				fmt.Fprintln(&b, v, c)
			}
		}
	}
	return b.String()
}

// Killed at each commit of the way back, it is finished by the next try; a commit that
// fails is undone.
func TestRestoreKilledOrFailing(t *testing.T) {
	proc := fakeProc(t)
	for name, former := range formers(t) {
		t.Run(name, func(t *testing.T) {
			for n := 0; ; n++ {
				m := newFakeMachineAt(proc)
				m.populate(t)
				for _, v := range prefixes {
					m.edit(t, v, "*mangle\nCOMMIT\n")
				}
				former(m)
				was, snapshot := m.state(), m.snapped(t)
				m.install(t, tproxy.Config{Backend: tproxy.IPTablesLegacy, DNS: tproxy.DNS{CaptureAll: true}, Outbound: tproxy.Outbound{Port: 16001}})
				tried := m.state()

				left := n
				m.stop = func(rules.Table) bool { left--; return left == -1 }
				_, err := (&Runner{machine: m}).Restore(context.Background(), snapshot, RestoreOptions{})
				if e, ok := errors.AsType[*ApplyError](err); left < 0 && (!ok || len(e.Left) > 0) {
					t.Fatalf("commit %d failed: %v", n, err)
				}
				if left < 0 {
					m.unchanged(t, tried)
				}
				left = n
				m.stop = func(rules.Table) bool { left--; m.dead = left < 0; return m.dead }
				_, err = (&Runner{machine: m}).Restore(context.Background(), snapshot, RestoreOptions{})
				killed := m.dead
				if m.stop, m.dead = nil, false; err != nil && !killed {
					t.Fatal(err)
				}
				m.restored(t, snapshot)
				m.unchanged(t, was)
				if !killed {
					return
				}
			}
		})
	}
}

// ::6 of somebody else, that goes meanwhile, is not ours to bring back.
func TestRestoreLeavesAddressesOfOthers(t *testing.T) {
	m := newFakeMachine(t)
	m.addresses[passthrough6] = true
	s := m.snapped(t)
	m.install(t, tproxy.Config{})
	delete(m.addresses, passthrough6)
	if m.restored(t, s); len(m.addresses) > 0 {
		t.Errorf("%v", m.addresses)
	}
}

// The nameserver of ours comes back, or goes, and what somebody else wrote into the file
// meanwhile stays.
func TestRestoreNames(t *testing.T) {
	other := tproxy.Config{DNS: tproxy.DNS{ControlPlane: controlPlane.Next()}}
	m := newFakeMachine(t)
	path := m.conf(t, confText)
	none := m.snapped(t)
	m.installNames(t, withNames)
	one := m.snapped(t)
	with, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m.installNames(t, other)
	m.restored(t, one)
	wantFile(t, path, string(with))
	if r := m.restored(t, one); r.Changed {
		t.Errorf("once more: %q", r.Steps)
	}
	m.installNames(t, tproxy.Config{})
	wantFile(t, path, confText)
	m.restored(t, one)
	wantFile(t, path, string(with))
	if err := os.WriteFile(path, append(with, "# edited\n"...), 0o640); err != nil {
		t.Fatal(err)
	}
	r, err := (&Runner{machine: m}).Restore(context.Background(), none, RestoreOptions{LeaveNames: true})
	if err != nil || !r.Changed {
		t.Errorf("%+v, %v", r, err)
	}
	wantFile(t, path, string(with)+"# edited\n")
	m.restored(t, none)
	wantFile(t, path, confText+"# edited\n")
	if left, _ := filepath.Glob(filepath.Join(m.etc, "*")); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

// So does what systemd-resolved was told, in both of its ways.
func TestRestoreSplitNames(t *testing.T) {
	other := tproxy.Config{DNS: tproxy.DNS{ControlPlane: controlPlane.Next()}}
	for _, version := range []int{252, 258} {
		m := newFakeMachine(t)
		m.withSystemd(t, version)
		none := m.snapped(t)
		m.installNames(t, withNames)
		one := m.snapped(t)
		if one.Nameserver == nil || one.Nameserver.Address != controlPlane {
			t.Fatalf("%d: %+v", version, one.Nameserver)
		}
		for _, c := range []tproxy.Config{other, {}} {
			m.installNames(t, c)
			m.restored(t, one)
			if got := m.snapped(t).Nameserver; got == nil || *got != *one.Nameserver {
				t.Errorf("%d: %+v", version, got)
			}
			if r := m.restored(t, one); r.Changed {
				t.Errorf("%d: once more: %q", version, r.Steps)
			}
		}
		m.restored(t, none)
		if got := m.snapped(t); !got.Empty() {
			t.Errorf("%d: %+v", version, got)
		}
	}
}

func TestSnapshotJSON(t *testing.T) {
	for text, want := range map[string]string{
		`{"version":2}`: "version 2: accepted is 1",
		`{}`:            "version 0: accepted is 1",
		`{"version":1,"rules":[{"backend":"nft","family":"IPv4"}]}`:                          `backend "nft"`,
		`{"version":1,"rules":[{"backend":"nftables","family":"","text":"eA=="}]}`:           "of nftables",
		`{"version":1,"rules":[{"backend":"nftables","text":"dGFibGUgaW5ldCB4IHsKfQo="}]}`:   `table "x" of nftables: accepted is kuma-tproxy`,
		`{"version":1,"rules":[{"backend":"auto","family":"IPv4"}]}`:                         `backend "auto"`,
		`{"version":1,"rules":[{"backend":"iptables-nft","family":"IPX"}]}`:                  `family "IPX"`,
		`{"version":1,"rules":[{"backend":"iptables-nft","family":"IPv4","text":"KmJhZA"}]}`: "base64",
		`{"version":1,"rules":[{"backend":"iptables-nft","family":"IPv4","text":"eA=="}]}`:   "IPv4 rules of iptables-nft",
		`{"version":1,"nameserver":{"split":0,"address":"10.0.0.1"}}`:                        "a path",
		`{"version":1,"nameserver":{"split":3,"path":"/x","address":"10.0.0.1"}}`:            "0 to 2",
	} {
		s := Snapshot{PassthroughAddress: true}
		if err := json.Unmarshal([]byte(text), &s); err == nil || !strings.Contains(err.Error(), want) || !s.PassthroughAddress {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestSnapshotNeedsRoot(t *testing.T) {
	m := newFakeMachine(t)
	m.notRoot = true
	r := Runner{machine: m}
	_, err := r.Snapshot(context.Background())
	_, err2 := r.Restore(context.Background(), &Snapshot{}, RestoreOptions{})
	if !errors.Is(err, ErrNotRoot) || !errors.Is(err2, ErrNotRoot) || len(m.commands) > 0 {
		t.Errorf("%v, %v", err, err2)
	}
}
