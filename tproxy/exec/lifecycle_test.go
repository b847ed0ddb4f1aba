package exec

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// lifecycle drives a fake host through installs, removals, foreign edits and
// kills, in any order. Its invariant: what is foreign stays as it is, and a
// removal leaves nothing of ours.
type lifecycle struct {
	m       *fakeMachine
	foreign int // rules made so far
	// alone is a host on which the others work without us.
	alone map[string]*tproxytest.Netfilter
	// direct are the variants that have a firewalld's chains for direct rules.
	direct map[string]bool
}

var configs = []tproxy.Config{
	{},
	{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("80,443,8000-8010")}},
	{DNS: tproxy.DNS{CaptureAll: true}},
	{Inbound: tproxy.Inbound{Off: true}, DNS: tproxy.DNS{Redirect: true}},
	{IPFamilyMode: tproxy.IPv4Only, ProxyUIDs: []tproxy.UID{1000680000}, DisableComments: true},
	{Backend: tproxy.IPTablesLegacy},
	{Backend: tproxy.NFTables, DNS: tproxy.DNS{CaptureAll: true, SkipConntrackZoneSplit: true}, Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("1,3,5-9")}},
	{Backend: tproxy.NFTables, IPFamilyMode: tproxy.IPv4Only},
	{Backend: tproxy.IPTablesNFT, Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("1-20,30,40,50,60,70,80,90,100,110,120,130,140,150,160")}},
}

func (l *lifecycle) apply(t *rapid.T) {
	c := rapid.SampledFrom(configs).Draw(t, "config")
	r := Runner{machine: l.m}
	p := l.m.plan(t, c)
	if _, err := r.Apply(context.Background(), p); err != nil {
		t.Fatalf("Apply: %v", err)
	}
	for _, f := range p.Families {
		want := rules.Compare(f, l.ours(t, p.Backend, f), p.WithRecord(tproxy.Record{PassthroughAddressOurs: len(p.Families) == 2}))
		if len(want) > 0 {
			t.Fatalf("after Apply, %s departs from the plan: %v", f, want)
		}
	}
	for _, b := range tproxy.Backends() {
		for _, f := range rules.Families() {
			if b == p.Backend && (f == rules.IPv4 || len(p.Families) == 2) {
				continue
			}
			if o := l.ours(t, b, f); len(o.Bases)+len(o.Chains) > 0 {
				t.Fatalf("after Apply, rules of ours are left in %s %s", b, f)
			}
		}
	}
	writes := l.m.writes
	again := l.m.plan(t, p.Config)
	report, err := r.Apply(context.Background(), again)
	if err != nil || report.Changed || l.m.writes != writes {
		t.Fatalf("the same again: %v, %+v, %d writes", err, report, l.m.writes-writes)
	}
}

func (l *lifecycle) ours(t *rapid.T, b tproxy.Backend, f rules.Family) rules.Set {
	if b == tproxy.NFTables {
		if l.m.table == nil {
			return rules.Set{}
		}
		if s := l.m.table.Set(); s.Has(f) {
			return s
		}
		return rules.Set{}
	}
	all, err := rules.ParseSave(f, l.m.of(b == tproxy.IPTablesNFT, f).Save())
	if err != nil {
		t.Fatalf("ParseSave: %v", err)
	}
	ours, _ := all.Ours(f, tproxy.Known())
	return ours
}

func (l *lifecycle) remove(t *rapid.T) {
	r := Runner{machine: l.m}
	if _, err := r.Remove(context.Background(), RemoveOptions{}); err != nil {
		t.Fatalf("Remove: %v", err)
	}
	l.nothingOfOurs(t)
}

func (l *lifecycle) nothingOfOurs(t *rapid.T) {
	for _, b := range tproxy.Backends() {
		for _, f := range rules.Families() {
			if o := l.ours(t, b, f); len(o.Bases)+len(o.Chains) > 0 {
				t.Fatalf("Remove left something in %s %s:\n%s", b, f, l.m.all())
			}
		}
	}
	if l.m.table != nil {
		t.Fatalf("Remove left the table\n%s", l.m.table.Text())
	}
	if len(l.m.addresses) > 0 {
		t.Fatalf("Remove left %v on lo", l.m.addresses)
	}
}

// killed makes an install die before a commit, or between two programs.
func (l *lifecycle) killed(t *rapid.T) {
	c := rapid.SampledFrom(configs).Draw(t, "config")
	n := rapid.IntRange(0, 6).Draw(t, "commits")
	p := l.m.plan(t, c)
	l.m.stop = func(rules.Table) bool { n--; l.m.dead = n < 0; return l.m.dead }
	if _, err := (&Runner{machine: l.m}).Apply(context.Background(), p); err != nil && !l.m.dead {
		t.Fatalf("Apply: %v", err)
	}
	l.m.stop, l.m.dead = nil, false
}

// killedRemoval is killed for Remove.
func (l *lifecycle) killedRemoval(t *rapid.T) {
	n := rapid.IntRange(0, 6).Draw(t, "commits")
	l.m.stop = func(rules.Table) bool { n--; l.m.dead = n < 0; return l.m.dead }
	if _, err := (&Runner{machine: l.m}).Remove(context.Background(), RemoveOptions{}); err != nil && !l.m.dead {
		t.Fatalf("Remove: %v", err)
	}
	l.m.stop, l.m.dead = nil, false
}

// wayBack takes a snapshot, installs, perhaps killed in it, and restores, perhaps killed
// in that too, until it is done: what is ours is then as it was.
func (l *lifecycle) wayBack(t *rapid.T) {
	if l.m.table != nil { // what others have in it cannot come back
		n := l.m.table.Known()
		l.m.table = &n
	}
	r := Runner{machine: l.m}
	s, err := r.Snapshot(context.Background())
	if err != nil {
		t.Fatalf("Snapshot: %v", err)
	}
	address := l.m.addresses[passthrough6]
	was := map[place]rules.Set{}
	for _, b := range tproxy.Backends() {
		for _, f := range rules.Families() {
			was[place{b, f}] = l.ours(t, b, f)
		}
	}
	l.killed(t)
	n := rapid.IntRange(0, 6).Draw(t, "commits of the way back")
	l.m.stop = func(rules.Table) bool { n--; l.m.dead = n < 0; return l.m.dead }
	if _, err := r.Restore(context.Background(), s, RestoreOptions{}); err != nil && !l.m.dead {
		t.Fatalf("Restore: %v", err)
	}
	l.m.stop, l.m.dead = nil, false
	if _, err := r.Restore(context.Background(), s, RestoreOptions{}); err != nil {
		t.Fatalf("Restore: %v", err)
	}
	for at, want := range was {
		if d := rules.Compare(at.family, l.ours(t, at.backend, at.family), want); len(d) > 0 {
			t.Fatalf("after Restore, %s %s departs from what it was: %v", at.backend, at.family, d)
		}
	}
	if l.m.addresses[passthrough6] != address {
		t.Fatalf("after Restore, ::6 is there: %v, and was %v", l.m.addresses[passthrough6], address)
	}
}

func (l *lifecycle) edit(t *rapid.T) {
	p := rapid.SampledFrom(prefixes).Draw(t, "variant")
	chain := rapid.SampledFrom([]string{"PREROUTING", "OUTPUT", "POSTROUTING"}).Draw(t, "chain")
	if d := chain + "_direct"; l.direct[p] && chain != "POSTROUTING" && rapid.Bool().Draw(t, "direct") {
		chain = d
	}
	place := rapid.SampledFrom([]string{"-A " + chain, "-I " + chain + " 1"}).Draw(t, "place")
	l.foreign++
	script := fmt.Sprintf("*nat\n%s -p tcp -m tcp --dport %d -m comment --comment \"foreign: mentions KUMA_MESH_INBOUND\" -j ACCEPT\nCOMMIT\n", place, 1000+l.foreign%60000)
	for _, n := range []*tproxytest.Netfilter{l.m.netfilter[p], l.alone[p]} {
		if err := n.Restore([]byte(script), nil); err != nil {
			t.Fatalf("foreign edit: %v", err)
		}
	}
}

// meddle is what somebody does in our table of nftables: a rule more, a chain that is
// empty, something that no table of ours has.
func (l *lifecycle) meddle(t *rapid.T) {
	if l.m.table == nil {
		t.Skip("no table")
	}
	n := *l.m.table
	n.Chains = slices.Clone(n.Chains)
	c := &n.Chains[rapid.IntRange(0, len(n.Chains)-1).Draw(t, "chain")]
	switch rapid.IntRange(0, 4).Draw(t, "by") {
	case 0:
		c.Rules = append(slices.Clone(c.Rules), rules.NativeRule{Action: rules.Accept{}, Comment: "of others"})
	case 1:
		c.Rules = append(slices.Clone(c.Rules), rules.NativeRule{Unknown: "tcp option"})
	case 2:
		if strings.HasSuffix(c.Name, "KUMA_MESH_RECORD") {
			t.Skip("whose ::6 is cannot be told then")
		}
		c.Rules = nil
	case 3:
		n.Strange = []string{"object \"q\""}
	case 4:
		n.Chains = append(n.Chains, rules.NativeChain{Name: "theirs", Type: "filter", Hook: rules.Input, Priority: 7})
	}
	l.m.table = &n
}

// reload is what a reload of firewalld makes of jumps of ours, where its direct.xml has
// them: it makes its chains for direct rules, and they stand there instead.
func (l *lifecycle) reload(t *rapid.T) {
	p := rapid.SampledFrom(prefixes).Draw(t, "variant")
	n := l.m.netfilter[p]
	must := func(n *tproxytest.Netfilter, script string) {
		if err := n.Restore([]byte(script), nil); err != nil {
			t.Fatalf("reload: %v\n%s", err, script)
		}
	}
	if !l.direct[p] {
		l.direct[p] = true
		for _, n := range []*tproxytest.Netfilter{n, l.alone[p]} {
			must(n, directChains)
		}
	}
	all, err := rules.ParseSave(n.Family, n.Save())
	if err != nil {
		t.Fatalf("ParseSave: %v", err)
	}
	for _, c := range tproxy.Find(n.Family, all).Ours.Bases {
		for _, r := range c.Rules {
			if r.Via == "" && c.Table == rules.NAT {
				must(n, fmt.Sprintf("*nat\n-D %s %s\n-A %s_direct %s\nCOMMIT\n", c.Hook, r, c.Hook, r))
			}
		}
	}
}

// directChains is how firewalld makes them.
const directChains = `*nat
:PREROUTING_direct - [0:0]
:OUTPUT_direct - [0:0]
-I PREROUTING 1 -m comment --comment "foreign:" -j PREROUTING_direct
-I OUTPUT 1 -m comment --comment "foreign:" -j OUTPUT_direct
COMMIT
`

// stop is what firewalld's end makes of them: its chains go, with all in them.
func (l *lifecycle) stop(t *rapid.T) {
	p := rapid.SampledFrom(prefixes).Draw(t, "variant")
	if !l.direct[p] {
		t.Skip("no firewalld")
	}
	l.direct[p] = false
	for _, n := range []*tproxytest.Netfilter{l.m.netfilter[p], l.alone[p]} {
		script := strings.NewReplacer("-I PREROUTING 1", "-D PREROUTING", "-I OUTPUT 1", "-D OUTPUT", "COMMIT", "-X PREROUTING_direct\n-X OUTPUT_direct\nCOMMIT").Replace(directChains)
		if err := n.Restore([]byte(script), nil); err != nil {
			t.Fatalf("stop: %v\n%s", err, script)
		}
	}
}

// beset makes f happen while others change their rules, before any of its programs.
func (l *lifecycle) beset(f func(*rapid.T)) func(*rapid.T) {
	return func(t *rapid.T) {
		edits := rapid.SliceOfN(rapid.IntRange(0, 12), 1, 5).Draw(t, "edits before program")
		n := 0
		l.m.onRun = func(command) (result, bool) {
			if slices.Contains(edits, n) {
				l.edit(t)
			}
			n++
			return result{}, false
		}
		l.m.onCommit = func([]rules.NativeCommand) (int, error) { l.m.onRun(command{}); return -1, nil }
		defer func() { l.m.onRun, l.m.onCommit = nil, nil }()
		f(t)
	}
}

// foreignText is everything that is not ours, in order.
func foreignText(netfilter map[string]*tproxytest.Netfilter) string {
	var b strings.Builder
	for _, p := range prefixes {
		for line := range strings.Lines(string(netfilter[p].Save())) {
			if strings.Contains(line, "foreign:") {
				b.WriteString(p + " " + line)
			}
		}
	}
	return b.String()
}

func TestLifecycle(t *testing.T) {
	proc := fakeProc(t)
	rapid.Check(t, func(t *rapid.T) {
		l := &lifecycle{m: newFakeMachineAt(proc), alone: newFakeMachineAt(proc).netfilter, direct: map[string]bool{}}
		l.m.noTable = ""
		untouched := func(f func(*rapid.T)) func(*rapid.T) {
			return func(t *rapid.T) {
				f(t)
				if now, want := foreignText(l.m.netfilter), foreignText(l.alone); now != want {
					t.Fatalf("foreign rules are\n%s\nand without us\n%s", now, want)
				}
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"apply":  untouched(l.apply),
			"remove": untouched(l.remove),
			"kill":   untouched(l.killed),
			"kill2":  untouched(l.killedRemoval),
			"edit":   untouched(l.edit),
			"meddle": untouched(l.meddle),
			"back":   untouched(l.wayBack),
			"reload": untouched(l.reload),
			"stop":   untouched(l.stop),

			"apply while others write":  untouched(l.beset(l.apply)),
			"remove while others write": untouched(l.beset(l.remove)),
			"kill while others write":   untouched(l.beset(l.killed)),
			"kill2 while others write":  untouched(l.beset(l.killedRemoval)),
			"back while others write":   untouched(l.beset(l.wayBack)),
		})
		l.remove(t)
	})
}
