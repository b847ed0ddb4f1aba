package exec

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func TestRemoveRestoresTheHost(t *testing.T) {
	for _, c := range configs {
		m := newFakeMachine(t)
		m.populate(t)
		before := m.state()
		m.install(t, c)
		r := m.uninstall(t)
		m.unchanged(t, before)
		if !r.Changed || r.Backend != tproxy.Auto || len(r.Families) == 0 || len(r.Families[0].Changes) == 0 {
			t.Errorf("%+v: report %+v", c, r)
		}
	}
}

func TestRemoveReadsAndWritesEachFamilyOnce(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
	m.programs()
	r := m.uninstall(t)
	same(t, "processes", m.programs(), []string{"iptables-nft-save", "ip6tables-nft-save",
		"iptables-nft-restore --noflush --wait=5", "ip6tables-nft-restore --noflush --wait=5"})
	same(t, "steps", r.Steps, []string{"ip address del ::6/128 dev lo", "no IPv4 rules of ours in iptables-nft", "no IPv6 rules of ours in iptables-nft"})
	if r.Processes != 4 {
		t.Errorf("%d processes", r.Processes)
	}
	// raw goes before nat: no query stands in a zone that is not redirected.
	for _, f := range r.Families {
		if s := string(f.Script); !strings.HasPrefix(s, "*raw\n") || !strings.Contains(s, "\n*nat\n") {
			t.Errorf("%s: %s", f.Family, s)
		}
	}
}

func TestRemoveNothing(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	r := m.uninstall(t)
	if r.Changed || r.Processes != 0 || len(r.Steps) > 0 || m.writes > 0 {
		t.Errorf("report %+v", r)
	}
	m.unchanged(t, before)
}

func TestRemoveBothVariants(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	m.install(t, tproxy.Config{Backend: tproxy.IPTablesNFT, DisableComments: true})
	for i, f := range rules.Families() { // as another program of ours would have left them
		p, err := tproxy.Build(tproxy.Config{}, tproxy.Host{})
		if err != nil {
			t.Fatal(err)
		}
		m.edit(t, prefixes[2+i], string(p.Rules.IPTables(f)))
	}
	if r := m.uninstall(t); len(r.Families) != 4 {
		t.Errorf("report %+v", r)
	}
	m.unchanged(t, before)
}

func TestRemoveDryRunWritesNothing(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	m.install(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
	m.programs()
	before, writes := m.state(), m.writes
	m.held = true // nor does it need the lock
	dry, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	same(t, "processes", m.programs(), []string{"iptables-nft-save", "ip6tables-nft-save"})
	m.unchanged(t, before)
	if m.writes != writes || dry.Changed {
		t.Errorf("%d writes, %+v", m.writes-writes, dry)
	}
	m.held = false
	r := m.uninstall(t)
	same(t, "steps of the dry run", dry.Steps, r.Steps)
	for i := range r.Families {
		if string(r.Families[i].Script) != string(dry.Families[i].Script) {
			t.Errorf("the dry run said\n%s\nand it was\n%s", dry.Families[i].Script, r.Families[i].Script)
		}
	}
}

func TestRemoveDryRunOfALostAddress(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, tproxy.Config{})
	delete(m.addresses, passthrough6)
	r, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{DryRun: true})
	if err != nil || slices.Contains(r.Steps, "ip address del ::6/128 dev lo") {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestRemoveWithoutTheProgramNamesIt(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, tproxy.Config{Backend: tproxy.IPTablesLegacy})
	for _, name := range []string{"ip6tables-legacy-save", "ip6tables-legacy-restore"} {
		m.missing[name] = true
	}
	before, writes := m.state(), m.writes
	_, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{})
	e := applyError(t, err)
	if e.Family != rules.IPv6 || !strings.Contains(err.Error(), "the programs of iptables-legacy for IPv6 are not") || e.Remedy == "" || m.writes != writes {
		t.Error(err)
	}
	m.unchanged(t, before)
	// Empty chains, after somebody's iptables -F, are ours still.
	m = newFakeMachine(t)
	m.edit(t, "iptables-legacy", "*nat\n:KUMA_MESH_INBOUND - [0:0]\nCOMMIT\n")
	for _, p := range prefixes[2:] {
		m.missing[p+"-save"], m.missing[p+"-restore"] = true, true
	}
	if _, err := (&Runner{machine: chainsAreNoRules{m}}).Remove(context.Background(), RemoveOptions{}); err == nil {
		t.Error("an emptied chain of ours was overlooked")
	}
}

// chainsAreNoRules is a machine whose tables have no rules, as the kernel says
// of a table of nft that has chains alone.
type chainsAreNoRules struct{ *fakeMachine }

func (chainsAreNoRules) hasRules(bool, rules.Family, rules.Table) (bool, error) { return false, nil }

func TestRemoveWait(t *testing.T) {
	for _, c := range []struct {
		o    RemoveOptions
		want string
	}{
		{RemoveOptions{}, "--noflush --wait=5"},
		{RemoveOptions{Wait: 7 * time.Second}, "--noflush --wait=7"},
		{RemoveOptions{Wait: 100 * time.Millisecond}, "--noflush --wait=1"},
		{RemoveOptions{Wait: -1}, "--noflush --wait=1"},
		{RemoveOptions{Wait: time.Second, WaitInterval: 250 * time.Microsecond}, "--noflush --wait=1 --wait-interval=250"},
	} {
		m := newFakeMachine(t)
		m.install(t, tproxy.Config{Backend: tproxy.IPTablesLegacy, IPFamilyMode: tproxy.IPv4Only})
		m.programs()
		if _, err := (&Runner{machine: unlocked{m}}).Remove(context.Background(), c.o); err != nil {
			t.Fatal(err)
		}
		same(t, "processes", m.programs(), []string{"iptables-legacy-save", "iptables-legacy-restore " + c.want})
	}
	// The nft restore takes no lock, and its --wait-interval is not always known.
	m := newFakeMachine(t)
	m.install(t, tproxy.Config{IPFamilyMode: tproxy.IPv4Only, WaitInterval: time.Millisecond})
	same(t, "processes", m.programs(), []string{"iptables-nft-restore --noflush --wait=5"})
}

// K6: Kuma's uninstall fails for any other user than 5678 and kuma-dp, because
// it has no flag to name it.
func TestK6RemoveNeedsNoFlags(t *testing.T) {
	for _, c := range []tproxy.Config{
		{ProxyUser: "envoy"},
		{ProxyUIDs: []tproxy.UID{0}},
		{ProxyUIDs: []tproxy.UID{1000680000, 7, 8, 4294967294}, DisableComments: true},
		{ProxyUser: "envoy", Backend: tproxy.IPTablesLegacy, DNS: tproxy.DNS{Redirect: true}},
	} {
		m := newFakeMachine(t)
		m.files["/etc/resolv.conf"] = "nameserver 10.0.0.2\n"
		m.users["envoy"] = 991
		m.populate(t)
		before := m.state()
		m.install(t, c)
		delete(m.users, "envoy")
		delete(m.files, "/etc/resolv.conf")
		m.uninstall(t)
		m.unchanged(t, before)
	}
}

func TestRemoveFinishesWhatAKillLeft(t *testing.T) {
	for i, s := range scenarios {
		for n := range 8 {
			m, p := prepare(t, i)
			clean := newFakeMachine(t)
			clean.populate(t)
			at := n
			m.stop = func(rules.Table) bool { at--; m.dead = at < 0; return m.dead }
			err := m.attempt(context.Background(), p)
			if err != nil && !m.dead {
				t.Fatal(err)
			}
			if m.dead && len(applyError(t, err).Left) == 0 {
				t.Errorf("%s, killed at commit %d: %v", s.name, n, err)
			}
			m.stop, m.dead = nil, false
			m.uninstall(t)
			m.unchanged(t, clean.state())
		}
	}
}

func TestRemoveUnreadableSave(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, tproxy.Config{})
	writes := m.writes
	for _, out := range []string{"*nat\n-A NOWHERE -j ACCEPT\nCOMMIT\n", "*nat\n:PREROUTING ACCEPT [0:0]\n", "garbage\n"} {
		m.onRun = func(c command) (result, bool) {
			return result{Stdout: []byte(out)}, filepath.Base(c.Path) == "ip6tables-nft-save"
		}
		_, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{})
		e := applyError(t, err)
		if _, ok := errors.AsType[*rules.ParseError](err); !ok || e.Family != rules.IPv6 || m.writes != writes {
			t.Errorf("%q: %v", out, err)
		}
	}
}

// What is there is read under the lock: another run may have ended while we
// waited for it.
func TestRemoveSeesWhatCameBeforeItsTurn(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	p := m.plan(t, tproxy.Config{})
	m.onLock = func() {
		m.onLock = nil
		if _, err := (&Runner{machine: m}).Apply(context.Background(), p); err != nil {
			t.Errorf("the run before: %v", err)
		}
	}
	if r := m.uninstall(t); !r.Changed {
		t.Errorf("report %+v", r)
	}
	m.unchanged(t, before)
}

// Two installs for different variants, planned at the same time, end as one.
func TestApplySeesWhatCameBeforeItsTurn(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	nft := m.plan(t, tproxy.Config{Backend: tproxy.IPTablesNFT})
	legacy := m.plan(t, tproxy.Config{Backend: tproxy.IPTablesLegacy, IPFamilyMode: tproxy.IPv4Only})
	for _, p := range []*tproxy.Plan{nft, legacy} {
		if err := m.attempt(context.Background(), p); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []bool{false, false, true, false} {
		if got := strings.Contains(string(m.netfilter[prefixes[i]].Save()), ":KUMA_MESH_INBOUND"); got != want {
			t.Errorf("%s: ours is %v, want %v", prefixes[i], got, want)
		}
	}
	if len(m.addresses) > 0 {
		t.Errorf("left on lo: %v", m.addresses)
	}
}
