package exec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

var passthrough6 = netip.MustParsePrefix("::6/128")

// programs lists the programs of iptables that were started, with their
// arguments, and forgets them.
func (m *fakeMachine) programs() (out []string) {
	for _, c := range m.commands {
		out = append(out, strings.Join(append([]string{filepath.Base(c.Path)}, c.Args...), " "))
	}
	m.commands = nil
	return out
}

func (m *fakeMachine) install(t *testing.T, c tproxy.Config) *Report {
	t.Helper()
	r, err := (&Runner{machine: m}).Apply(context.Background(), m.plan(t, c))
	if err != nil {
		t.Fatalf("Apply: %v", err)
	}
	return r
}

func (m *fakeMachine) uninstall(t *testing.T) *Report {
	t.Helper()
	r, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{})
	if err != nil {
		t.Fatalf("Remove: %v", err)
	}
	return r
}

// edit is what another program does to the rules.
func (m *fakeMachine) edit(t *testing.T, variant, script string) {
	t.Helper()
	if err := m.netfilter[variant].Restore([]byte(script), nil); err != nil {
		t.Fatalf("foreign edit of %s: %v", variant, err)
	}
}

// populate puts foreign rules into every table that we use, so that all() is
// the same, empty tables and all, before and after.
func (m *fakeMachine) populate(t *testing.T) {
	t.Helper()
	for _, v := range prefixes {
		m.edit(t, v, `*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -p tcp -m tcp --dport 9 -j ACCEPT
-A DOCKER -p tcp -m tcp --dport 8080 -j RETURN
COMMIT
*raw
-A OUTPUT -p udp -m udp --dport 9 -j ACCEPT
COMMIT
`)
	}
}

// ours is what Known finds in a variant.
func (m *fakeMachine) ours(t *testing.T, variant string) rules.Set {
	t.Helper()
	n := m.netfilter[variant]
	all, err := rules.ParseSave(n.Family, n.Save())
	if err != nil {
		t.Fatalf("ParseSave: %v", err)
	}
	ours, _ := all.Ours(n.Family, tproxy.Known())
	return ours
}

// state is all(), but for the order of the chains, which says nothing.
func (m *fakeMachine) state() []string {
	var out, table []string
	chain := func(line string) string {
		if name, ok := strings.CutPrefix(line, ":"); ok {
			return ":" + name
		}
		return strings.Fields(line)[1]
	}
	for line := range strings.Lines(m.all()) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case line == "COMMIT":
			slices.SortStableFunc(table, func(a, b string) int { return strings.Compare(chain(a), chain(b)) })
			out, table = append(out, table...), nil
		case line[0] == ':' || line[0] == '-':
			table = append(table, line)
		default:
			out = append(out, line)
		}
	}
	return out
}

// unchanged reports what of a machine is not as it was.
func (m *fakeMachine) unchanged(t *testing.T, before []string) {
	t.Helper()
	if d := cmp.Diff(before, m.state()); d != "" {
		t.Errorf("the host is not as before (-before +now):\n%s", d)
	}
}

func same(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n  %s\nwant\n  %s", what, strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func applyError(t *testing.T, err error) *ApplyError {
	t.Helper()
	e, ok := errors.AsType[*ApplyError](err)
	if !ok {
		t.Fatalf("error %v is no *ApplyError", err)
	}
	return e
}

const (
	refuse = "iptables-restore v1.8.9: \nline 2: CHAIN_ADD failed (Invalid argument): chain X"
	both   = tproxy.IPTablesNFT
)

func TestFreshInstall(t *testing.T) {
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		t.Run(b.String(), func(t *testing.T) {
			m := newFakeMachine(t)
			p := m.plan(t, tproxy.Config{Backend: b, DNS: tproxy.DNS{CaptureAll: true}})
			same(t, "processes of Probe and Build", m.programs(), nil)
			r, err := (&Runner{machine: m}).Apply(context.Background(), p)
			if err != nil {
				t.Fatal(err)
			}
			ip, ip6 := b.String(), "ip6"+strings.TrimPrefix(b.String(), "ip")
			same(t, "processes", m.programs(), []string{ip + "-restore --noflush --wait=5", ip6 + "-restore --noflush --wait=5"})
			same(t, "steps", r.Steps, []string{
				"IPv4 rules by " + ip + "-restore", "IPv6 rules by " + ip6 + "-restore", "ip address add ::6/128 dev lo"})
			if !r.Changed || r.Processes != 2 || r.Retries != 0 || r.Backend != b || r.Why != "asked for" {
				t.Errorf("report: %+v", r)
			}
			if !m.addresses[passthrough6] {
				t.Error("::6 is not on lo")
			}
			for i, f := range p.Families {
				if r.Families[i].Family != f || !bytes.Equal(r.Families[i].Script, p.Rules.IPTables(f)) {
					t.Errorf("%s was given\n%s\nand the plan says\n%s", f, r.Families[i].Script, p.Rules.IPTables(f))
				}
			}
			if len(r.Notes) < 2 || !strings.Contains(strings.Join(r.Notes, "\n"), "nothing listens on the proxy's inbound port 15006") {
				t.Errorf("notes: %q", r.Notes)
			}
		})
	}
}

func TestInstallTheSameOnlyReads(t *testing.T) {
	for _, c := range configs {
		m := newFakeMachine(t)
		m.populate(t)
		m.install(t, c)
		m.programs()
		before, writes := m.state(), m.writes
		r := m.install(t, c)
		want := 2
		switch {
		case c.Backend == tproxy.NFTables:
			want = 0
		case c.IPFamilyMode == tproxy.IPv4Only:
			want = 1
		}
		if r.Changed || len(r.Steps) > 0 || r.Processes != want || m.writes != writes {
			t.Errorf("%+v: the same again: %+v, %d writes", c, r, m.writes-writes)
		}
		m.unchanged(t, before)
		for _, p := range m.programs() {
			if !strings.HasSuffix(p, "-save") {
				t.Errorf("%s was started", p)
			}
		}
		for _, f := range r.Families {
			if len(f.Changes) > 0 || f.Script != nil {
				t.Errorf("changes %v, script %s", f.Changes, f.Script)
			}
		}
	}
}

func TestAnotherConfigTouchesWhatChangedAlone(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	m.install(t, tproxy.Config{})
	m.programs()
	r := m.install(t, tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("80")}})
	same(t, "processes", m.programs(), []string{"iptables-nft-save", "ip6tables-nft-save",
		"iptables-nft-restore --noflush --wait=5", "ip6tables-nft-restore --noflush --wait=5"})
	for _, f := range r.Families {
		for line := range strings.Lines(string(f.Script)) {
			if line != "*nat\n" && line != "COMMIT\n" && !strings.Contains(line, "KUMA_MESH_INBOUND ") && !strings.Contains(line, "KUMA_MESH_RECORD ") {
				t.Errorf("%s: %s", f.Family, line)
			}
		}
		changes := slices.DeleteFunc(f.Changes, func(c rules.Change) bool { return c.Chain == "KUMA_MESH_RECORD" }) // it says which Config
		if len(changes) != 1 || changes[0].Kind != rules.MissingRule {
			t.Errorf("changes: %v", changes)
		}
	}
	same(t, "steps", r.Steps, []string{"IPv4 rules by iptables-nft-restore", "IPv6 rules by ip6tables-nft-restore"})
}

func TestIPv6Off(t *testing.T) {
	m := newFakeMachine(t)
	m.noIPv6 = "disable_ipv6 is 1"
	p := m.plan(t, tproxy.Config{})
	r, err := (&Runner{machine: m}).Apply(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	same(t, "processes", m.programs(), []string{"iptables-nft-restore --noflush --wait=5"})
	if len(m.addresses) > 0 || len(r.Families) != 1 || !slices.Contains(p.Notes, "IPv6 is off here (disable_ipv6 is 1) and left out") {
		t.Errorf("addresses %v, report %+v, notes %q", m.addresses, r, p.Notes)
	}
}

func TestIPv4ModeAfterDualStack(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	m.install(t, tproxy.Config{})
	m.programs()
	r := m.install(t, tproxy.Config{IPFamilyMode: tproxy.IPv4Only})
	same(t, "steps", r.Steps, []string{"ip address del ::6/128 dev lo", "IPv4 rules by iptables-nft-restore", "no IPv6 rules of ours in iptables-nft"})
	if o := m.ours(t, "ip6tables-nft"); len(o.Bases)+len(o.Chains) > 0 || len(m.addresses) > 0 {
		t.Errorf("left: %v, %v", o, m.addresses)
	}
	if rec, err := tproxy.ReadRecord(m.ours(t, "iptables-nft")); err != nil || rec.PassthroughAddressOurs {
		t.Errorf("record: %+v, %v", rec, err)
	}
}

func TestMoveToAnotherVariant(t *testing.T) {
	for _, to := range []tproxy.Backend{tproxy.IPTablesLegacy, tproxy.IPTablesNFT} {
		t.Run(to.String(), func(t *testing.T) {
			from := tproxy.IPTablesNFT
			if to == from {
				from = tproxy.IPTablesLegacy
			}
			m := newFakeMachine(t)
			m.populate(t)
			m.install(t, tproxy.Config{Backend: from})
			m.programs()
			r := m.install(t, tproxy.Config{Backend: to})
			v6 := func(b tproxy.Backend) string { return "ip6" + strings.TrimPrefix(b.String(), "ip") }
			same(t, "processes", m.programs(), []string{
				to.String() + "-save", v6(to) + "-save", from.String() + "-save", v6(from) + "-save",
				// The new rules are in before the old ones go.
				to.String() + "-restore --noflush --wait=5", v6(to) + "-restore --noflush --wait=5",
				from.String() + "-restore --noflush --wait=5", v6(from) + "-restore --noflush --wait=5"})
			for _, p := range []string{from.String(), v6(from)} {
				if o := m.ours(t, p); len(o.Bases)+len(o.Chains) > 0 {
					t.Errorf("%s still holds %v", p, o)
				}
			}
			// The record moves with the rules: ::6 is still ours.
			if rec, _ := tproxy.ReadRecord(m.ours(t, to.String())); !rec.PassthroughAddressOurs {
				t.Error("the record lost that ::6 is ours")
			}
			if r.Backend != to {
				t.Errorf("backend %s", r.Backend)
			}
			m.uninstall(t)
			if len(m.addresses) > 0 {
				t.Error("::6 was left on lo")
			}
		})
	}
}

// scenarios are installs and removals that have something to undo.
var scenarios = []struct {
	name   string
	before []tproxy.Config
	run    tproxy.Config
	remove bool
}{
	{name: "fresh", run: tproxy.Config{Backend: both, DNS: tproxy.DNS{CaptureAll: true}}},
	{name: "fresh legacy", run: tproxy.Config{Backend: tproxy.IPTablesLegacy}},
	{name: "another config", before: []tproxy.Config{{Backend: both, DNS: tproxy.DNS{CaptureAll: true}}}, run: tproxy.Config{Backend: both, Outbound: tproxy.Outbound{Off: true}}},
	{name: "no comments", before: []tproxy.Config{{Backend: both}}, run: tproxy.Config{Backend: both, DNS: tproxy.DNS{CaptureAll: true}}},
	{name: "move", before: []tproxy.Config{{Backend: both, DNS: tproxy.DNS{CaptureAll: true}}}, run: tproxy.Config{Backend: tproxy.IPTablesLegacy}},
	{name: "ipv4", before: []tproxy.Config{{Backend: both}}, run: tproxy.Config{Backend: both, IPFamilyMode: tproxy.IPv4Only}},
	{name: "remove", before: []tproxy.Config{{Backend: both, DNS: tproxy.DNS{CaptureAll: true}}}, remove: true},
}

// attempt runs a scenario's last part.
func (m *fakeMachine) attempt(ctx context.Context, p *tproxy.Plan) error {
	r := Runner{machine: m}
	var err error
	if p == nil {
		_, err = r.Remove(ctx, RemoveOptions{})
	} else {
		_, err = r.Apply(ctx, p)
	}
	return err
}

// prepare brings a machine to where a scenario starts.
func prepare(t *testing.T, i int) (*fakeMachine, *tproxy.Plan) {
	t.Helper()
	m := newFakeMachine(t)
	m.populate(t)
	for _, c := range scenarios[i].before {
		m.install(t, c)
	}
	m.programs()
	if scenarios[i].remove {
		return m, nil
	}
	return m, m.plan(t, scenarios[i].run)
}

func TestEveryProcessThatFailsIsUndone(t *testing.T) {
	for i, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			m, p := prepare(t, i)
			if err := m.attempt(context.Background(), p); err != nil {
				t.Fatal(err)
			}
			total := len(m.commands)
			for n := range total {
				m, p := prepare(t, i)
				before := m.state()
				at := n
				var failed string
				m.onRun = func(c command) (result, bool) {
					at--
					if at != -1 {
						return result{}, false
					}
					failed = c.Path
					return result{Exit: 1, Stderr: []byte(refuse)}, true
				}
				e := applyError(t, m.attempt(context.Background(), p))
				m.unchanged(t, before)
				if e.Step == "" || e.Family == 0 || e.Program != failed || e.Stderr != refuse || len(e.Left) > 0 || !strings.Contains(e.Error(), "exit code 1") {
					t.Errorf("process %d (%s): %#v", n, failed, e)
				}
				if strings.HasSuffix(failed, "-restore") {
					if e.Line != 2 || e.Rule == "" || e.Table == "" || !strings.Contains(e.Error(), "line 2: "+e.Rule) {
						t.Errorf("process %d (%s): line %d, rule %q, table %q", n, failed, e.Line, e.Rule, e.Table)
					}
					if n == total-1 && len(e.Undone) == 0 {
						t.Error("nothing is said to be undone")
					}
				}
			}
		})
	}
}

func TestEveryCommitThatFailsIsUndone(t *testing.T) {
	for i, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			m, p := prepare(t, i)
			var tables []rules.Table
			m.stop = func(t rules.Table) bool { tables = append(tables, t); return false }
			if err := m.attempt(context.Background(), p); err != nil {
				t.Fatal(err)
			}
			for n, table := range tables {
				m, p := prepare(t, i)
				before := m.state()
				at := n
				m.stop = func(rules.Table) bool { at--; return at == -1 }
				e := applyError(t, m.attempt(context.Background(), p))
				m.unchanged(t, before)
				if e.Table != table || e.Rule != "COMMIT" || len(e.Left) > 0 {
					t.Errorf("commit %d of table %s: %#v", n, table, e)
				}
			}
		})
	}
}

func TestAddressThatFailsIsUndone(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	p := m.plan(t, tproxy.Config{})
	before := m.state()
	cause := errors.New("IPv6 is off on lo")
	_, err := (&Runner{machine: noAddress{m, cause}}).Apply(context.Background(), p)
	e := applyError(t, err)
	m.unchanged(t, before)
	if !errors.Is(err, cause) || e.Step != "ip address add ::6/128 dev lo" || e.Family != rules.IPv6 || !strings.Contains(e.Remedy, "--ip-family-mode=ipv4") {
		t.Error(err)
	}
	same(t, "undone", e.Undone, []string{"the former IPv6 rules by ip6tables-nft-restore", "the former IPv4 rules by iptables-nft-restore"})
}

// noAddress is a machine whose lo takes no address.
type noAddress struct {
	*fakeMachine
	err error
}

func (m noAddress) addAddress(netip.Prefix) (bool, error) { return false, m.err }

func TestUndoThatFailsIsLeft(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	broken := false
	m.onRun = func(c command) (result, bool) {
		broken = broken || strings.HasSuffix(c.Path, "ip6tables-nft-restore")
		if broken && strings.HasSuffix(c.Path, "-restore") {
			return result{Exit: 1, Stderr: []byte("No buffer space available")}, true
		}
		return result{}, false
	}
	e := applyError(t, m.attempt(context.Background(), m.plan(t, tproxy.Config{})))
	if len(e.Left) != 1 || !strings.Contains(e.Left[0], "the former IPv4 rules by iptables-nft-restore") || !strings.Contains(e.Left[0], "No buffer space") {
		t.Errorf("left: %q", e.Left)
	}
	if !strings.Contains(e.Error(), "could not be undone: the former IPv4 rules") {
		t.Errorf("the error does not say what is left: %v", e)
	}
	m.onRun = nil
	m.install(t, tproxy.Config{}) // the next run finishes the job
	m.uninstall(t)
}

func TestCancelledIsUndone(t *testing.T) {
	for i, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			m, p := prepare(t, i)
			if err := m.attempt(context.Background(), p); err != nil {
				t.Fatal(err)
			}
			for n := range len(m.commands) - 1 { // after the last one it is done
				m, p := prepare(t, i)
				before := m.state()
				ctx, cancel := context.WithCancel(context.Background())
				at := n
				m.onRun = func(command) (result, bool) {
					if at--; at == -1 {
						cancel()
					}
					return result{}, false
				}
				err := m.attempt(ctx, p)
				if !errors.Is(err, context.Canceled) {
					t.Errorf("cancelled at process %d: %v", n, err)
				}
				m.unchanged(t, before)
				cancel()
			}
			m, p = prepare(t, i)
			before := m.state()
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			if err := m.attempt(ctx, p); !errors.Is(err, context.Canceled) || len(m.commands) > 0 {
				t.Errorf("cancelled before: %v, %d processes", err, len(m.commands))
			}
			m.unchanged(t, before)
		})
	}
}

func TestNotRoot(t *testing.T) {
	m := newFakeMachine(t)
	p := m.plan(t, tproxy.Config{})
	m.notRoot = true
	for _, p := range []*tproxy.Plan{p, nil} {
		if err := m.attempt(context.Background(), p); !errors.Is(err, ErrNotRoot) || len(m.commands) > 0 {
			t.Errorf("%v, %v", err, m.commands)
		}
	}
	// A probe without root could not look; the reason is still that.
	p.Host.Variants[1].Unknown = "permission denied"
	if err := m.attempt(context.Background(), p); !errors.Is(err, ErrNotRoot) {
		t.Error(err)
	}
}

func TestAnotherRunHoldsTheLock(t *testing.T) {
	m := newFakeMachine(t)
	p := m.plan(t, tproxy.Config{})
	m.held = true
	for _, p := range []*tproxy.Plan{p, nil} {
		if err := m.attempt(context.Background(), p); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "42") || len(m.commands) > 0 {
			t.Errorf("%v, %v", err, m.commands)
		}
	}
}

func TestXtablesLockNamesItsHolder(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	m.onRun = func(c command) (result, bool) {
		return result{Exit: 4, Stderr: []byte("Another app is currently holding the xtables lock. Stopped waiting after 5s.")}, strings.HasSuffix(c.Path, "-restore")
	}
	err := m.attempt(context.Background(), m.plan(t, tproxy.Config{Backend: tproxy.IPTablesLegacy, MaxRetries: -1}))
	e := applyError(t, err)
	if !errors.Is(err, ErrLocked) || e.Remedy != "process 42 (kube-proxy) holds the xtables lock; wait for it, or wait longer with --wait" {
		t.Error(err)
	}
	m.unchanged(t, before)
}

// K18: with --wait 0 Kuma waits all the same, because iptables-legacy-restore
// 1.8.9 takes 0, and no --wait at all, for "for ever".
func TestK18WaitZeroDoesNotWait(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	c := tproxy.Config{Backend: tproxy.IPTablesLegacy, Wait: -1}
	err := m.attempt(context.Background(), m.plan(t, c))
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "process 42 (kube-proxy)") {
		t.Error(err)
	}
	m.unchanged(t, before)
	for _, p := range m.programs() {
		if strings.Contains(p, "-restore") {
			t.Errorf("%s was started", p)
		}
	}
	if _, err := (&Runner{machine: unlocked{m}}).Apply(context.Background(), m.plan(t, c)); err != nil {
		t.Fatal(err)
	}
	for _, p := range m.programs() {
		if strings.Contains(p, "-restore") && !strings.HasSuffix(p, "-restore --noflush --wait=1") {
			t.Errorf("%s was started", p)
		}
	}
}

// unlocked is a machine where nobody holds the lock of iptables-legacy.
type unlocked struct{ *fakeMachine }

func (unlocked) lockHolder(string) (int, string, bool) { return 0, "", false }

// before makes another program change the rules while our restore, the n-th
// of that program, is being started.
func (m *fakeMachine) before(program string, n int, edit func()) {
	m.onRun = func(c command) (result, bool) {
		if filepath.Base(c.Path) == program {
			if n--; n == 0 {
				edit()
			}
		}
		return result{}, false
	}
}

const jumpOut = `-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m comment --comment "kuma/mesh/transparent/proxy/a new TCP connection of a process of this host" -j KUMA_MESH_OUTBOUND`

func TestRetryWhenTheRulesChangeUnderUs(t *testing.T) {
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		t.Run(b.String(), func(t *testing.T) {
			m := newFakeMachine(t)
			m.populate(t)
			m.install(t, tproxy.Config{Backend: b})
			// Without comments the jumps are made anew, and one that is to be
			// deleted is deleted by somebody else.
			p := m.plan(t, tproxy.Config{Backend: b, DisableComments: true})
			tries := 0
			m.onRun = func(c command) (result, bool) {
				if filepath.Base(c.Path) != b.String()+"-restore" {
					return result{}, false
				}
				if tries++; tries > 1 {
					return result{}, false
				}
				m.edit(t, b.String(), "*nat\n-D OUTPUT "+jumpOut+"\nCOMMIT\n")
				if b == tproxy.IPTablesLegacy { // which says no more than this
					return result{Exit: 1, Stderr: []byte("iptables-restore: line 9 failed")}, true
				}
				return result{}, false
			}
			r, err := (&Runner{machine: m}).Apply(context.Background(), p)
			if err != nil {
				t.Fatal(err)
			}
			if r.Retries != 1 || tries != 2 || !r.Changed {
				t.Errorf("%d tries, report %+v", tries, r)
			}
			if c := rules.Compare(rules.IPv4, m.ours(t, b.String()), p.WithRecord(tproxy.Record{PassthroughAddressOurs: true})); len(c) > 0 {
				t.Errorf("departs: %v", c)
			}
		})
	}
}

func TestRetriesAreBounded(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	tries := 0
	m.onRun = func(c command) (result, bool) {
		if filepath.Base(c.Path) != "iptables-nft-restore" {
			return result{}, false
		}
		tries++
		m.edit(t, "iptables-nft", fmt.Sprintf("*nat\n-A OUTPUT -p tcp -m tcp --dport %d -j ACCEPT\nCOMMIT\n", tries))
		return result{Exit: 4, Stderr: []byte("line 1: TABLE_ADD failed (Device or resource busy)")}, true
	}
	err := m.attempt(context.Background(), m.plan(t, tproxy.Config{MaxRetries: -1}))
	if e := applyError(t, err); tries != maxTries || len(e.Left) > 0 || !strings.Contains(e.Stderr, "busy") {
		t.Errorf("%d tries: %v", tries, err)
	}
	if o := m.ours(t, "iptables-nft"); len(o.Bases)+len(o.Chains) > 0 {
		t.Errorf("left: %v", o)
	}
}

func TestNoRetryWhenNothingChanged(t *testing.T) {
	// The raw table is refused each time: that nat went in is our own doing.
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	tries := 0
	m.stop = func(t rules.Table) bool {
		if t == rules.Raw {
			tries++
		}
		return t == rules.Raw
	}
	err := m.attempt(context.Background(), m.plan(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}))
	if e := applyError(t, err); tries != 1 || e.Table != rules.Raw {
		t.Errorf("%d tries: %v", tries, err)
	}
	m.unchanged(t, before)
}

// A restore that did its work and then failed is no reason to forget what is to
// be undone when a later step fails.
func TestFailureAfterTheCommitIsUndone(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	m.onRun = func(c command) (result, bool) {
		switch filepath.Base(c.Path) {
		case "iptables-nft-restore":
			if len(m.ours(t, "iptables-nft").Chains) > 0 {
				return result{}, false
			}
			if err := m.netfilter["iptables-nft"].Restore(c.Stdin, nil); err != nil {
				t.Fatal(err)
			}
			return result{Exit: -1}, true
		case "ip6tables-nft-restore":
			return result{Exit: 1, Stderr: []byte("no")}, true
		}
		return result{}, false
	}
	applyError(t, m.attempt(context.Background(), m.plan(t, tproxy.Config{})))
	m.unchanged(t, before)
}

func TestForeignJumpToOurChainIsNamed(t *testing.T) {
	jump := "-A DOCKER -p tcp -m tcp --dport 7 -j KUMA_MESH_DNS"
	for name, run := range map[string]func(*fakeMachine) error{
		"another config": func(m *fakeMachine) error { return m.attempt(context.Background(), m.plan(t, tproxy.Config{})) },
		"another variant": func(m *fakeMachine) error {
			return m.attempt(context.Background(), m.plan(t, tproxy.Config{Backend: tproxy.IPTablesLegacy}))
		},
		"removal": func(m *fakeMachine) error { return m.attempt(context.Background(), nil) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newFakeMachine(t)
			m.populate(t)
			m.install(t, tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
			m.edit(t, "ip6tables-nft", "*nat\n"+jump+"\nCOMMIT\n")
			before, writes := m.state(), m.writes
			err := run(m)
			e := applyError(t, err)
			if !strings.Contains(e.Err.Error(), "nat DOCKER #2: "+jump) || e.Family != rules.IPv6 || e.Table != rules.NAT || e.Remedy == "" {
				t.Error(err)
			}
			if m.writes != writes {
				t.Errorf("%d writes before it was seen", m.writes-writes)
			}
			m.unchanged(t, before)
		})
	}
}

// The rule comes between our reading and our writing.
func TestForeignJumpThatComesLateIsNamed(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	m.install(t, tproxy.Config{})
	m.before("iptables-nft-restore", 1, func() {
		m.edit(t, "iptables-nft", "*nat\n-A DOCKER -j KUMA_MESH_INBOUND\nCOMMIT\n")
	})
	err := m.attempt(context.Background(), nil)
	if e := applyError(t, err); !strings.Contains(e.Err.Error(), "nat DOCKER #2: -A DOCKER -j KUMA_MESH_INBOUND") {
		t.Error(err)
	}
	if !m.addresses[passthrough6] || len(m.ours(t, "iptables-nft").Chains) == 0 {
		t.Errorf("the removal was not undone:\n%s", m.all())
	}
}

func TestDoubledJumpsBecomeOne(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	m.install(t, tproxy.Config{})
	m.edit(t, "iptables-nft", "*nat\n-A OUTPUT "+jumpOut+"\n-A OUTPUT "+jumpOut+"\nCOMMIT\n")
	if r := m.install(t, tproxy.Config{}); !r.Changed || len(r.Families[0].Changes) != 2 {
		t.Errorf("report %+v", r)
	}
	if n := strings.Count(string(m.netfilter["iptables-nft"].Save()), "-j KUMA_MESH_OUTBOUND\n"); n != 1 {
		t.Errorf("%d jumps\n%s", n, m.all())
	}
	m.edit(t, "iptables-nft", "*nat\n-A OUTPUT "+jumpOut+"\nCOMMIT\n")
	m.uninstall(t)
	if strings.Contains(m.all(), "KUMA_MESH") {
		t.Errorf("left:\n%s", m.all())
	}
}

// Each chain of ours is emptied in turn, and each table of ours taken out.
func TestHalfAnInstallIsCompleted(t *testing.T) {
	c := tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}
	whole := newFakeMachine(t)
	whole.populate(t)
	whole.install(t, c)
	want := whole.all()
	for _, v := range []string{"iptables-nft", "ip6tables-nft"} {
		var edits []string
		ours := whole.ours(t, v)
		for _, ch := range ours.Chains {
			edits = append(edits, fmt.Sprintf("*%s\n:%s - [0:0]\nCOMMIT\n", ch.Table, ch.Name))
		}
		raw := rules.Set{}
		for _, ch := range ours.Chains {
			if ch.Table == rules.Raw {
				raw.Chains = append(raw.Chains, ch)
			}
		}
		for _, b := range ours.Bases {
			if b.Table == rules.Raw {
				raw.Bases = append(raw.Bases, b)
			}
		}
		edits = append(edits, string(rules.Transition(whole.netfilter[v].Family, raw, rules.Set{})),
			string(rules.Transition(whole.netfilter[v].Family, ours, rules.Set{})))
		for _, e := range edits {
			m := newFakeMachine(t)
			m.populate(t)
			m.install(t, c)
			m.edit(t, v, e)
			if m.all() == want {
				t.Fatalf("no edit: %s", e)
			}
			r := m.install(t, c)
			p := m.plan(t, c)
			f := m.netfilter[v].Family
			if d := rules.Compare(f, m.ours(t, v), p.WithRecord(tproxy.Record{PassthroughAddressOurs: true})); len(d) > 0 || !r.Changed || len(r.Steps) != 1 {
				t.Errorf("after\n%s%v\n%+v", e, d, r)
			}
			m.uninstall(t)
			if strings.Contains(m.all(), "KUMA_MESH") || len(m.addresses) > 0 {
				t.Errorf("left:\n%s", m.all())
			}
		}
	}
}

// The jumps of ours in one hook end in the plan's order, whichever is missing.
func TestMissingJumpIsPutBackOnce(t *testing.T) {
	c := tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}
	m := newFakeMachine(t)
	m.populate(t)
	m.install(t, c)
	m.edit(t, "iptables-nft", "*nat\n-D OUTPUT "+jumpOut+"\nCOMMIT\n")
	m.install(t, c)
	if r := m.install(t, c); r.Changed {
		t.Errorf("the third install changed something: %+v", r)
	}
}

// ::6 on lo is ours when we made it, and only then taken away.
func TestPassthroughAddress(t *testing.T) {
	add := func(m *fakeMachine) { m.addresses[passthrough6] = true }
	del := func(m *fakeMachine) { delete(m.addresses, passthrough6) }
	dual := func(m *fakeMachine) { m.install(t, tproxy.Config{}) }
	silent := func(m *fakeMachine) { m.install(t, tproxy.Config{DisableComments: true}) }
	legacy := func(m *fakeMachine) { m.install(t, tproxy.Config{Backend: tproxy.IPTablesLegacy}) }
	ipv4 := func(m *fakeMachine) { m.install(t, tproxy.Config{IPFamilyMode: tproxy.IPv4Only}) }
	remove := func(m *fakeMachine) { m.uninstall(t) }
	type act = func(*fakeMachine)
	for _, c := range []struct {
		name  string
		acts  []act
		there bool
	}{
		{"made", []act{dual}, true},
		{"made, removed", []act{dual, remove}, false},
		{"made without comments, removed", []act{silent, remove}, false},
		{"made, again, removed", []act{dual, dual, remove}, false},
		{"made, moved, removed", []act{dual, legacy, remove}, false},
		{"made, comments off, removed", []act{dual, silent, remove}, false},
		{"made, ipv4", []act{dual, ipv4}, false},
		{"made, ipv4, made again", []act{dual, ipv4, dual}, true},
		{"made, ipv4, made again, removed", []act{dual, ipv4, dual, remove}, false},
		{"made, lost, removed", []act{dual, del, remove}, false},
		{"made, lost, again", []act{dual, del, dual}, true},
		{"made, lost, again, removed", []act{dual, del, dual, remove}, false},
		{"there", []act{add, dual}, true},
		{"there, removed", []act{add, dual, remove}, true},
		{"there, again, removed", []act{add, dual, dual, remove}, true},
		{"there, moved, removed", []act{add, dual, legacy, remove}, true},
		{"there, ipv4, removed", []act{add, dual, ipv4, remove}, true},
		{"there, lost, again, removed", []act{add, dual, del, dual, remove}, false},
		{"ipv4 never touches it", []act{add, ipv4, remove}, true},
		{"ipv4 never makes it", []act{ipv4}, false},
		{"removed, then foreign", []act{dual, remove, add, dual, remove}, true},
	} {
		m := newFakeMachine(t)
		for _, a := range c.acts {
			a(m)
		}
		if m.addresses[passthrough6] != c.there {
			t.Errorf("%s: there is %v", c.name, m.addresses[passthrough6])
		}
	}
}

func TestPlanForAnotherMachine(t *testing.T) {
	m := newFakeMachine(t)
	p, err := tproxy.Build(tproxy.Config{}, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	err = m.attempt(context.Background(), p)
	if e := applyError(t, err); !errors.Is(err, ErrUnsupported) || !strings.Contains(e.Remedy, "install the package iptables") || len(m.commands) > 0 {
		t.Error(err)
	}
	p.Host.Variants = []tproxy.Variant{{Backend: tproxy.IPTablesLegacy}}
	err = m.attempt(context.Background(), p)
	if e := applyError(t, err); !errors.Is(err, ErrUnsupported) || !strings.Contains(e.Remedy, "Runner.Probe") || len(m.commands) > 0 {
		t.Error(err)
	}
}

func TestUnknownVariantIsNoGround(t *testing.T) {
	m := newFakeMachine(t)
	blind := blindMachine{m, errors.New("netlink: operation not supported by seccomp")}
	r := Runner{machine: blind}
	h, err := r.Probe(context.Background(), tproxy.Config{}.Needs())
	if err != nil {
		t.Fatal(err)
	}
	p, err := tproxy.Build(tproxy.Config{}, h)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(context.Background(), p); err == nil || !strings.Contains(err.Error(), "whether rules of ours stand in iptables-legacy cannot be told: netlink: ") {
		t.Errorf("Apply: %v", err)
	}
	if _, err := r.Remove(context.Background(), RemoveOptions{}); err == nil || !strings.Contains(err.Error(), "whether rules of ours stand in iptables-legacy cannot be told: netlink: ") {
		t.Errorf("Remove: %v", err)
	}
	if m.writes > 0 {
		t.Errorf("%d writes", m.writes)
	}
}

// blindMachine does not show the tables of iptables-legacy.
type blindMachine struct {
	*fakeMachine
	err error
}

func (m blindMachine) tables(nft bool, f rules.Family) ([]rules.Table, error) {
	if nft {
		return m.fakeMachine.tables(nft, f)
	}
	return nil, m.err
}

// K7: with --disable-comments Kuma can neither install again nor uninstall.
func TestK7NoComments(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	c := tproxy.Config{DisableComments: true, DNS: tproxy.DNS{CaptureAll: true}}
	m.install(t, c)
	if strings.Contains(strings.ReplaceAll(m.all(), "kuma/mesh/transparent/proxy/kuma-tproxy 1", ""), "kuma/mesh") {
		t.Errorf("there are comments:\n%s", m.all())
	}
	if r := m.install(t, c); r.Changed {
		t.Errorf("the same again: %+v", r)
	}
	m.install(t, tproxy.Config{})
	m.install(t, c)
	m.uninstall(t)
	m.unchanged(t, before)
}

// K13: in Kuma a foreign rule whose comment mentions KUMA_MESH is deleted, and
// a foreign chain named KUMA_MESH* blocks the install.
func TestK13ForeignNamesAndComments(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	for _, v := range prefixes {
		m.edit(t, v, `*nat
:KUMA_MESH_FOREIGN - [0:0]
:KUMA_MESH_INBOUNDS - [0:0]
-A PREROUTING -p tcp -m tcp --dport 1 -m comment --comment "see KUMA_MESH_INBOUND" -j ACCEPT
-A OUTPUT -p tcp -m comment --comment "kuma/mesh/transparent/proxy/a new TCP connection of a process of this host" -j KUMA_MESH_FOREIGN
-A KUMA_MESH_FOREIGN -m comment --comment "kuma-tproxy 1 passthrough-address=ours" -j RETURN
COMMIT
*filter
:KUMA_MESH_INBOUND - [0:0]
-A INPUT -p tcp -j KUMA_MESH_INBOUND
COMMIT
*raw
:KUMA_MESH_INBOUND - [0:0]
-A OUTPUT -p tcp -j KUMA_MESH_INBOUND
COMMIT
`)
	}
	m.addresses[passthrough6] = true
	before := m.state()
	for _, c := range configs {
		m.install(t, c)
	}
	m.uninstall(t)
	m.unchanged(t, before)
}

// K14: a re-install of Kuma's zeroes the counters of foreign rules, for it
// writes whole tables. Our scripts have no line for a foreign rule or chain,
// nor for the policy of a built-in one, and --noflush is always there.
func TestK14ForeignRulesAreNotWritten(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	known := tproxy.Known()
	m.onRun = func(c command) (result, bool) {
		if !strings.HasSuffix(c.Path, "-restore") {
			return result{}, false
		}
		if !slices.Contains(c.Args, "--noflush") {
			t.Errorf("%s", c)
		}
		var table rules.Table
		for line := range strings.Lines(string(c.Stdin)) {
			line = strings.TrimSuffix(line, "\n")
			verb, rest, _ := strings.Cut(line, " ")
			chain, spec, _ := strings.Cut(rest, " ")
			if name, ok := strings.CutPrefix(verb, ":"); ok {
				verb, chain = ":", name
			}
			_, mine := known.Chain(table, chain)
			switch {
			case line[0] == '*':
				table = rules.Table(line[1:])
			case line == "COMMIT":
			case mine:
			case verb == "-A", verb == "-I", verb == "-D":
				base, ok := known.Base(table, rules.Hook(chain))
				_, r, err := rules.ParseRule(rules.IPv4, "-A "+chain+" "+strings.TrimLeft(spec, "123 "))
				r.Why = ""
				if !ok || err != nil || !slices.ContainsFunc(base.Rules, func(k rules.Rule) bool { k.Why = ""; return k.Equal(r) }) {
					t.Errorf("%s writes %q, which is not ours (%v)", c, line, err)
				}
			default:
				t.Errorf("%s writes %q", c, line)
			}
		}
		return result{}, false
	}
	for _, c := range configs {
		m.install(t, c)
		m.install(t, c)
	}
	m.uninstall(t)
}

// K15: a rule that somebody adds between Kuma's save and its restore is lost.
func TestK15RuleAddedMeanwhileStays(t *testing.T) {
	const masquerade = "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE"
	for i, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			m, p := prepare(t, i)
			b := "iptables-nft"
			if p != nil {
				b = p.Backend.String()
			}
			m.before(b+"-restore", 1, func() { m.edit(t, b, "*nat\n"+masquerade+"\n-I OUTPUT 1 -p tcp -m tcp --dport 77 -j ACCEPT\nCOMMIT\n") })
			if err := m.attempt(context.Background(), p); err != nil {
				t.Fatal(err)
			}
			if s := string(m.netfilter[b].Save()); !strings.Contains(s, masquerade) || !strings.Contains(s, "--dport 77 -j ACCEPT") {
				t.Errorf("lost:\n%s", s)
			}
		})
	}
}

// K24: Kuma applies IPv4 first and only warns when IPv6 fails.
func TestK24IPv6FailureUndoesIPv4(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	m.onRun = func(c command) (result, bool) {
		return result{Exit: 3, Stderr: []byte("ip6tables-restore v1.8.9 (legacy): can't initialize ip6tables table `nat': Table does not exist (do you need to insmod?)")},
			filepath.Base(c.Path) == "ip6tables-nft-restore"
	}
	err := m.attempt(context.Background(), m.plan(t, tproxy.Config{}))
	e := applyError(t, err)
	if !errors.Is(err, ErrNoModule) || e.Family != rules.IPv6 {
		t.Error(err)
	}
	m.unchanged(t, before)
	same(t, "undone", e.Undone, []string{"the former IPv4 rules by iptables-nft-restore"})
}
