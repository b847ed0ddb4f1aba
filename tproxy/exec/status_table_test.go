package exec

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// withTables is a machine whose kernel has nftables, with an install there.
func withTables(t *testing.T, c tproxy.Config) *fakeMachine {
	t.Helper()
	m := newFakeMachine(t)
	m.noTable = ""
	p := m.plan(t, c)
	if p.Backend != tproxy.NFTables {
		t.Fatalf("backend %s", p.Backend)
	}
	if _, err := (&Runner{machine: m}).Apply(context.Background(), p); err != nil {
		t.Fatal(err)
	}
	return m
}

var tableConfig = tproxy.Config{
	Inbound:  tproxy.Inbound{ExcludePorts: rules.MustPorts("9005,7000-7010")},
	Outbound: tproxy.Outbound{ExcludeIPs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.3.0.0/16")}},
	DNS:      tproxy.DNS{CaptureAll: true},
}

// in edits a chain of the table.
func in(m *fakeMachine, chain string, do func(c *rules.NativeChain)) {
	for i := range m.table.Chains {
		if c := &m.table.Chains[i]; c.Name == chain {
			c.Rules = slices.Clone(c.Rules)
			do(c)
		}
	}
}

// Each thing that somebody does to the table is told once, for both families, in the
// words of nft(8).
func TestStatusOfATable(t *testing.T) {
	const outbound, inbound = "nat.KUMA_MESH_OUTBOUND", "nat.KUMA_MESH_INBOUND"
	dropped := rules.NativeRule{Counted: true, Action: rules.Drop{}}
	for name, c := range map[string]struct {
		edit  func(m *fakeMachine)
		state State
		want  []string
	}{
		"as it was": {func(*fakeMachine) {}, StateInstalled, nil},
		"a rule is gone": {func(m *fakeMachine) {
			in(m, inbound, func(c *rules.NativeChain) { c.Rules = slices.Delete(c.Rules, 0, 1) })
		}, StateDrifted, []string{"- missing: nat KUMA_MESH_INBOUND #1 meta l4proto tcp tcp dport 22 counter return [SSH is protected unless --capture-ssh is given]"}},
		"a rule more": {func(m *fakeMachine) {
			in(m, inbound, func(c *rules.NativeChain) { c.Rules = slices.Insert(c.Rules, 1, dropped) })
		}, StateDrifted, []string{"+ extra: nat KUMA_MESH_INBOUND #2 counter drop"}},
		"a rule twice": {func(m *fakeMachine) {
			in(m, inbound, func(c *rules.NativeChain) { c.Rules = append(c.Rules, c.Rules[0]) })
		}, StateDrifted, []string{"+ doubled: nat KUMA_MESH_INBOUND #4 meta l4proto tcp tcp dport 22 counter return [SSH is protected unless --capture-ssh is given]"}},
		"another order": {func(m *fakeMachine) {
			in(m, inbound, func(c *rules.NativeChain) { c.Rules[0], c.Rules[2] = c.Rules[2], c.Rules[0] })
		}, StateDrifted, []string{"~ reordered: nat KUMA_MESH_INBOUND [the rules stand in another order]"}},
		"a rule otherwise": {func(m *fakeMachine) {
			in(m, outbound, func(c *rules.NativeChain) { c.Rules[len(c.Rules)-1].Action = rules.Redirect{Port: 9} })
		}, StateDrifted, []string{"~ changed: nat KUMA_MESH_OUTBOUND #5 meta l4proto tcp counter redirect to :9, was meta l4proto tcp counter redirect to :15001 [outbound goes to the proxy's port 15001]"}},
		"a rule of another kind": {func(m *fakeMachine) {
			in(m, outbound, func(c *rules.NativeChain) {
				c.Rules = slices.Insert(c.Rules, 0, rules.NativeRule{Unknown: "expression log"})
			})
		}, StateDrifted, []string{"+ extra: nat KUMA_MESH_OUTBOUND #1 a rule with expression log"}},
		"elements of a set": {func(m *fakeMachine) {
			for i, s := range m.table.Sets {
				if strings.HasPrefix(s.Name, "v4-") {
					m.table.Sets[i].Elements = []rules.NativeRange{s.Elements[1], {First: []byte{10, 7, 0, 0}, Last: []byte{10, 7, 255, 255}}}
				}
			}
		}, StateDrifted, []string{
			"- missing: in set v4-", ": 10.1.0.0/16 [an element of what rules look for]",
			"+ extra: in set v4-", ": 10.7.0.0/16 [an element that the install has not]"}},
		"a set more": {func(m *fakeMachine) {
			m.table.Sets = append(m.table.Sets, rules.NativeSet{Name: "mine", Type: "uid"})
		}, StateDrifted, []string{"+ extra: set mine [the install has no such set]"}},
		"another priority": {func(m *fakeMachine) {
			in(m, "nat.OUTPUT", func(c *rules.NativeChain) { c.Priority = 7 })
		}, StateDrifted, []string{"~ changed: nat OUTPUT type nat hook output priority 7, was type nat hook output priority -101 [the kernel calls it elsewhere]"}},
		"dormant": {func(m *fakeMachine) { m.table.Strange = []string{rules.NativeDormant} }, StateDrifted,
			[]string{"~ changed: the table is dormant [nothing of it sees a packet]"}},
		"a policy": {func(m *fakeMachine) { m.table.Strange = []string{"chain raw.OUTPUT: policy drop"} }, StateDrifted,
			[]string{"~ changed: raw OUTPUT policy drop [the install has it otherwise]"}},
		"an object": {func(m *fakeMachine) { m.table.Strange = []string{"object o"} }, StateDrifted,
			[]string{"+ extra: object o [the install has no such thing]"}},
		"a chain more": {func(m *fakeMachine) { m.table.Chains = append(m.table.Chains, rules.NativeChain{Name: "foo"}) }, StateDrifted,
			[]string{"+ extra: chain foo [the install has no such chain]"}},
		"a chain less": {func(m *fakeMachine) {
			in(m, "nat.OUTPUT", func(c *rules.NativeChain) { c.Rules = nil })
			m.table.Chains = slices.DeleteFunc(m.table.Chains, func(c rules.NativeChain) bool { return c.Name == outbound })
		}, StateDrifted, []string{"- missing: nat KUMA_MESH_OUTBOUND [the chain is not there]", "- missing: nat OUTPUT #1", "- missing: nat OUTPUT #2"}},
		"no record": {func(m *fakeMachine) {
			m.table.Chains = slices.DeleteFunc(m.table.Chains, func(c rules.NativeChain) bool { return c.Name == "nat.KUMA_MESH_RECORD" })
		}, StateUnknown, []string{"no record"}},
		"Kuma's beside it": {func(m *fakeMachine) {
			m.edit(t, "iptables-nft", oldkuma.Script(oldkuma.First, rules.IPv4, oldkuma.Everything()))
		}, StateDrifted, []string{"+ elsewhere: IPv4 rules of ours in iptables-nft"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := withTables(t, tableConfig)
			c.edit(m)
			s := m.status(t)
			s.says(t, c.state, c.want...)
			lines := len(c.want)
			if name == "elements of a set" {
				lines = 2
			}
			more := name == "a policy" || name == "Kuma's beside it" // of what comes of it
			if c.state != StateUnknown && !more && (len(s.Drift) != lines || len(s.Reasons) != 0) {
				t.Errorf("%q", s.lines())
			}
		})
	}
}

// An install in the table and one in iptables: which decides what is known, and not what
// was meant.
func TestStatusOfTwoInstalls(t *testing.T) {
	m := newFakeMachine(t)
	m.noTable = ""
	c := tproxy.Config{Backend: tproxy.IPTablesNFT}
	if _, err := (&Runner{machine: m}).Apply(context.Background(), m.plan(t, c)); err != nil {
		t.Fatal(err)
	}
	m.table = withTables(t, tproxy.Config{}).table
	m.status(t).says(t, StateUnknown, "installs stand in nftables and in iptables-nft, each with a record, and the one in nftables decides what this host sends")
}

// Each rule of the table is counted once, and says of which family it is if it is of
// one alone.
func TestStatusCountsATableOnce(t *testing.T) {
	m := withTables(t, tableConfig)
	places, families := map[string]int{}, map[rules.Family]int{}
	for i := range m.table.Chains {
		for j := range m.table.Chains[i].Rules {
			m.table.Chains[i].Rules[j].Counter = rules.Counter{Packets: uint64(1000*i + j), Bytes: 1}
			if c := m.table.Chains[i]; c.Name != "nat.KUMA_MESH_RECORD" {
				places[c.Name]++
			}
		}
	}
	for _, c := range m.status(t).Counters {
		name := string(c.Table) + "." + c.Chain
		i := slices.IndexFunc(m.table.Chains, func(n rules.NativeChain) bool { return n.Name == name })
		if i < 0 || c.Packets != uint64(1000*i+c.Index-1) {
			t.Errorf("%+v is not at its place", c)
		}
		places[name]--
		families[c.Family]++
	}
	for name, n := range places {
		if n != 0 {
			t.Errorf("%s: %d rules not counted once", name, n)
		}
	}
	if families[0] == 0 || families[rules.IPv4] == 0 || families[rules.IPv6] == 0 {
		t.Errorf("%v", families)
	}
}

// What an install in nftables says of others it reads without a program.
func TestNotesOfATable(t *testing.T) {
	base := func(table, chain, kind, hook string, priority int32, drops bool) kernel.NFTBase {
		family, name, _ := strings.Cut(table, " ")
		return kernel.NFTBase{Table: kernel.NFTTable{Family: family, Name: name}, Chain: chain, Type: kind, Hook: hook, Priority: priority, Drops: drops}
	}
	for name, c := range map[string]struct {
		bases []kernel.NFTBase
		want  string // of the note about others; empty is none
		state State  // of an inspect afterwards
	}{
		"our own":         {[]kernel.NFTBase{base("inet kuma-tproxy", "nat.OUTPUT", "nat", "OUTPUT", -101, false)}, "", StateInstalled},
		"a policy":        {[]kernel.NFTBase{base("ip filter", "INPUT", "filter", "INPUT", 0, true)}, "chain INPUT of table ip filter drops what no rule of it accepts, redirected connections too: let it admit TCP to port 15006", StateInstalled},
		"rules of others": {[]kernel.NFTBase{base("inet mine", "in", "filter", "INPUT", 0, false)}, "(inet mine) may filter what is redirected", StateInstalled},
		"in front":        {[]kernel.NFTBase{base("ip early", "out", "nat", "OUTPUT", -150, false)}, "chain out of table ip early, priority -150, comes before ours: what it translates", StateUnknown},
		"at our priority": {[]kernel.NFTBase{base("inet early", "out", "nat", "OUTPUT", -101, false)}, "has the priority of ours", StateUnknown},
		"iptables' own":   {[]kernel.NFTBase{base("ip late", "out", "nat", "OUTPUT", -100, false)}, "", StateInstalled},
		"nat coming in":   {[]kernel.NFTBase{base("ip late", "in", "nat", "PREROUTING", -98, false)}, "", StateInstalled},
		"nat before ours": {[]kernel.NFTBase{base("ip late", "in", "nat", "PREROUTING", -99, false)}, "", StateUnknown},
	} {
		m := newFakeMachine(t)
		m.noTable, m.nftBases = "", c.bases
		for _, b := range c.bases {
			m.foreign = append(m.foreign, b.Table.Family+" "+b.Table.Name)
		}
		p := m.plan(t, tproxy.Config{})
		m.commands = nil
		r, err := (&Runner{machine: m}).Apply(context.Background(), p)
		if err != nil {
			t.Fatal(err)
		}
		var notes []string
		for _, n := range r.Notes {
			if !strings.HasPrefix(n, "nothing listens") {
				notes = append(notes, n)
			}
		}
		if len(m.commands) > 0 || c.want == "" && notes != nil || c.want != "" && (len(notes) != 1 || !strings.Contains(notes[0], c.want)) {
			t.Errorf("%s: %d programs, notes %q, want %q", name, len(m.commands), notes, c.want)
		}
		if s := m.status(t); s.State != c.state {
			t.Errorf("%s: %q", name, s.lines())
		}
	}
}

// What a run reports of the table is told once, not for each family.
func TestChangesOfATable(t *testing.T) {
	m := withTables(t, tableConfig)
	r, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	want, got := 0, 0
	for _, c := range m.table.Chains {
		want += len(c.Rules)
		if c.Hook == "" {
			want++
		}
	}
	for _, f := range r.Families {
		got += len(f.Changes)
	}
	if got != want || len(r.Families) != 1 {
		t.Errorf("%d changes of %d families, want %d\n%v", got, len(r.Families), want, r.Families)
	}
}

// With a table of nftables the kernel tells of every change: nothing is polled.
func TestWatchATable(t *testing.T) {
	m := withTables(t, tproxy.Config{})
	synctest.Test(t, func(t *testing.T) {
		seen, end := m.seenBy(t, WatchOptions{Poll: time.Second})
		defer end()
		same(t, "at first", seen(), []string{"installed"})
		in(m, "nat.KUMA_MESH_INBOUND", func(c *rules.NativeChain) { c.Rules = nil })
		time.Sleep(5 * time.Minute)
		same(t, "without a word of the kernel's", seen(), []string{"installed"})
		m.changed()
		time.Sleep(time.Second)
		same(t, "with one", seen(), []string{"installed", "drifted"})
	})
}
