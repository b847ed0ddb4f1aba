package exec

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/files"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/procfs"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// fakeMachine is a host in memory. Its rules are transactional and it checks
// references, as the kernel does.
type fakeMachine struct {
	netfilter map[string]*tproxytest.Netfilter // by the programs' prefix
	addresses map[netip.Prefix]bool
	files     map[string]string
	users     map[string]uint32
	env       map[string]string
	proc      string
	noIPv6    string
	notRoot   bool
	missing   map[string]bool // programs
	nftBases  []kernel.NFTBase
	natives   map[string][]string // by family and table
	routes    map[netip.Addr]kernel.Route
	local     []netip.Prefix
	held      bool
	foreign   []string // tables of nftables
	tracks    bool     // whether a rule in them needs conntrack
	// tablesOfOthers are those that can be read, by family and name.
	tablesOfOthers map[string]*rules.Native
	// table is ours in nftables, and noTable why there cannot be one; onCommit, if set, is
	// called before each transaction and may refuse it, or the command of that number.
	table    *rules.Native
	noTable  string
	onCommit func([]rules.NativeCommand) (int, error)
	// sent is where a datagram goes that is sent to an address; nil is as it was sent.
	sent func(uid uint32, to netip.AddrPort) (netip.AddrPort, error)
	// connections is how many redirected ones there are at each look, per family.
	connections func() int
	dead        bool   // nothing more can be written
	etc         string // a folder of the real machine for what stands in /etc; empty is none
	unanswered  error
	changed     func() // of the monitor, while somebody listens
	deaf        error  // the monitor's
	// resolved, if not nil, is a host whose resolv.conf systemd-resolved manages; init
	// is the network namespace of its process 1.
	resolved dns.View
	init     string
	bus      func(args []string) result // busctl
	link     kernel.Link                // of ours; the zero Link is none
	lastLink uint32
	onLock   func() // what happens while we wait for the lock

	kept      map[string]string // the state of trials
	stateErr  error             // of writing it
	booted    string
	clock     time.Duration // since boot
	onUptime  func()
	unwatched bool

	// root, if not empty, is a folder in which the host's /etc stands, and booted by
	// systemd, unless noSystemd or elsewhere say otherwise.
	root                 string
	noSystemd, elsewhere string
	running              []string // processes
	systemState          string
	onWrite              func() (dies bool) // of files
	mounted              string             // a file that is a bind mount

	commands []command
	writes   int // restores that were started, addresses changed
	// onRun, if set, is called before each process and may answer in its place.
	onRun func(c command) (r result, answered bool)
	// stop, if set, is asked before each COMMIT whether the program dies there.
	stop func(rules.Table) bool
}

var errKilled = errors.New("killed")

var prefixes = []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"}

func newFakeMachine(t *testing.T) *fakeMachine { return newFakeMachineAt(fakeProc(t)) }

func newFakeMachineAt(proc string) *fakeMachine {
	m := &fakeMachine{
		netfilter: make(map[string]*tproxytest.Netfilter),
		addresses: make(map[netip.Prefix]bool),
		files:     make(map[string]string),
		users:     map[string]uint32{"kuma-dp": 5678},
		env:       make(map[string]string),
		missing:   make(map[string]bool),
		proc:      proc,
		noTable:   "the fake machine has none",
	}
	for _, p := range prefixes {
		f := rules.IPv4
		if strings.HasPrefix(p, "ip6") {
			f = rules.IPv6
		}
		g := p + "-save v1.8.9 (nf_tables)"
		if before, ok := strings.CutSuffix(p, "-legacy"); ok {
			g = before + "-save v1.8.9"
		}
		m.netfilter[p] = &tproxytest.Netfilter{Family: f, Generator: g}
	}
	return m
}

// fakeProc is a /proc in which nobody listens.
func fakeProc(t testing.TB) string {
	dir := t.TempDir()
	writeProc(t, dir, "thread-self/net/tcp", "header\n")
	writeProc(t, dir, "thread-self/net/udp", "header\n")
	return dir
}

func writeProc(t testing.TB, dir, name, text string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (m *fakeMachine) run(_ context.Context, c command) (result, error) {
	if m.dead {
		return result{}, errKilled
	}
	m.commands = append(m.commands, c)
	if m.onRun != nil {
		if r, ok := m.onRun(c); ok {
			return r, nil
		}
	}
	name := filepath.Base(c.Path)
	switch name {
	case "busctl":
		return m.bus(c.Args), nil
	case "journalctl":
		return result{}, nil
	case "systemctl":
		if c.Args[0] == "is-system-running" {
			return result{Stdout: []byte(cmp.Or(m.systemState, "running") + "\n")}, nil
		}
		m.writes++
		return result{}, nil
	}
	if p, ok := strings.CutSuffix(name, "-save"); ok {
		return result{Stdout: m.netfilter[p].Save()}, nil
	}
	p, ok := strings.CutSuffix(name, "-restore")
	if !ok {
		return result{Exit: 127}, nil
	}
	if slices.Contains(c.Args, "--test") {
		copied := &tproxytest.Netfilter{Family: m.netfilter[p].Family}
		err := copied.Restore(m.netfilter[p].Save(), nil)
		if err == nil {
			err = copied.Restore(c.Stdin, nil)
		}
		if err != nil {
			return result{Stderr: []byte(name + ": " + err.Error()), Exit: 1}, nil
		}
		return result{}, nil
	}
	m.writes++
	if err := m.netfilter[p].Restore(c.Stdin, m.stop); err != nil {
		return result{Stderr: []byte(name + ": " + err.Error()), Exit: 1}, nil
	}
	return result{}, nil
}

func (m *fakeMachine) noNFTables() string               { return m.noTable }
func (m *fakeMachine) hasOwnTable() (bool, error)       { return m.table != nil, nil }
func (m *fakeMachine) ownTable() (*rules.Native, error) { return m.table, nil }

func (m *fakeMachine) foreignTable(family, name string) (*rules.Native, error) {
	return m.tablesOfOthers[family+" "+name], nil
}

func (m *fakeMachine) commitTable(commands []rules.NativeCommand) (int, error) {
	if m.dead {
		return -1, errKilled
	}
	if m.onCommit != nil {
		if at, err := m.onCommit(commands); err != nil {
			return at, err
		}
	}
	if m.stop != nil && m.stop("") {
		return -1, errKilled
	}
	after, failed, err := rules.NativeAfter(m.table, commands)
	if err != nil {
		return failed, err
	}
	m.writes++
	m.table = after
	return 0, nil
}

func (m *fakeMachine) ask(netip.Addr) error { return m.unanswered }

func (m *fakeMachine) resolvConf(path string, _ bool) dns.Manager {
	at := "/nonexistent"
	if m.etc != "" {
		at = m.etc
	}
	if m.resolved != nil {
		return dns.Manager{
			Env:        dns.Env{Path: path, View: m.resolved, Program: func(string) string { return "" }, Running: func(string) bool { return false }},
			FS:         files.FS{},
			Namespaces: dns.Namespaces{Self: "host", Init: m.init},
		}
	}
	path = filepath.Join(at, filepath.Base(path))
	return dns.Manager{
		Env:        dns.Env{Path: path, Program: func(string) string { return "" }, Running: func(comm string) bool { return slices.Contains(m.running, comm) }},
		FS:         files.FS{},
		Namespaces: dns.Namespaces{Meant: true},
	}
}

func (m *fakeMachine) delegate() dns.DelegateManager {
	at := "/nonexistent"
	if m.etc != "" {
		at = m.etc
	}
	return dns.DelegateManager{Path: filepath.Join(at, "dns-delegate.d", filepath.Base(dns.DelegatePath)), FS: files.FS{}}
}

func (m *fakeMachine) meshLink() (kernel.Link, bool, error) { return m.link, m.link.Index != 0, nil }

func (m *fakeMachine) addMeshLink(_ string, address netip.Prefix) (kernel.Link, error) {
	if m.dead {
		return kernel.Link{}, errKilled
	}
	m.writes++
	m.lastLink++
	m.link = kernel.Link{Index: m.lastLink, Ours: true, Up: true, Addresses: []netip.Prefix{address}}
	return m.link, nil
}

func (m *fakeMachine) delMeshLink(l kernel.Link) (bool, error) {
	if m.dead {
		return false, errKilled
	}
	m.writes++
	was := m.link.Index == l.Index
	m.link = kernel.Link{}
	return was, nil
}

func (m *fakeMachine) find(name string) (string, string) {
	if m.missing[name] {
		return "", ""
	}
	if m.resolved != nil && (name == "busctl" || name == "systemctl") {
		return "/usr/bin/" + name, "/usr/bin/" + name
	}
	if m.root != "" && slices.Contains([]string{"busctl", "systemctl", "journalctl", "sh", "ip", "resolvectl", "nft"}, name) {
		return "/usr/sbin/" + name, "/usr/sbin/" + name
	}
	plain := !strings.Contains(name, "-nft") && !strings.Contains(name, "-legacy")
	if plain {
		return "", ""
	}
	multi := "xtables-nft-multi"
	if strings.Contains(name, "legacy") {
		multi = "xtables-legacy-multi"
	}
	return "/usr/sbin/" + name, "/usr/sbin/" + multi
}

func (m *fakeMachine) of(nft bool, f rules.Family) *tproxytest.Netfilter {
	p := "iptables"
	if f == rules.IPv6 {
		p = "ip6tables"
	}
	if nft {
		return m.netfilter[p+"-nft"]
	}
	return m.netfilter[p+"-legacy"]
}

func (m *fakeMachine) tables(nft bool, f rules.Family) ([]rules.Table, error) {
	return m.of(nft, f).Tables(), nil
}

func (m *fakeMachine) chains(nft bool, f rules.Family, t rules.Table) (out []string, _ error) {
	for _, c := range m.of(nft, f).Set().Chains {
		if c.Table == t {
			out = append(out, c.Name)
		}
	}
	return out, nil
}

func (m *fakeMachine) hasRules(nft bool, f rules.Family, t rules.Table) (bool, error) {
	s := m.of(nft, f).Set()
	for _, c := range s.Bases {
		if c.Table == t && len(c.Rules) > 0 {
			return true, nil
		}
	}
	for _, c := range s.Chains {
		if c.Table == t {
			return true, nil
		}
	}
	return false, nil
}

func (m *fakeMachine) foreignTables() ([]string, error) { return m.foreign, nil }
func (m *fakeMachine) tracked() (bool, error)           { return m.tracks, nil }

func (m *fakeMachine) send(uid uint32, to netip.AddrPort) (netip.AddrPort, error) {
	if m.sent == nil {
		return to, nil
	}
	return m.sent(uid, to)
}

func (m *fakeMachine) bases() ([]kernel.NFTBase, error) { return m.nftBases, nil }

func (m *fakeMachine) native(f rules.Family, t rules.Table) ([]string, error) {
	return m.natives[fmt.Sprintf("%s %s", nftFamily(f), t)], nil
}

func (m *fakeMachine) routeTo(a netip.Addr) (kernel.Route, error) { return m.routes[a], nil }

func (m *fakeMachine) redirected(rules.Family, []uint16) (int, error) {
	if m.connections == nil {
		return 0, nil
	}
	return m.connections(), nil
}

func (m *fakeMachine) ipv6Off() (bool, string, error) { return m.noIPv6 != "", m.noIPv6, nil }

func (m *fakeMachine) hasAddress(a netip.Addr) (bool, error) { return m.addresses[hostPrefix(a)], nil }

func (m *fakeMachine) addAddress(p netip.Prefix) (bool, error) {
	if m.dead {
		return false, errKilled
	}
	if m.addresses[p] {
		return false, nil
	}
	m.writes++
	m.addresses[p] = true
	return true, nil
}

func (m *fakeMachine) delAddress(p netip.Prefix) (bool, error) {
	if m.dead {
		return false, errKilled
	}
	if !m.addresses[p] {
		return false, nil
	}
	m.writes++
	delete(m.addresses, p)
	return true, nil
}

func (m *fakeMachine) localAddresses() ([]netip.Prefix, error) { return m.local, nil }

func (m *fakeMachine) lock(context.Context, time.Duration) (lock, error) {
	if m.held {
		return lock{}, fmt.Errorf("%w: by process 42", ErrLocked)
	}
	if m.onLock != nil {
		m.onLock()
	}
	return lock{unlock: func() {}}, nil
}

func (m *fakeMachine) readState(name string) ([]byte, error) {
	text, ok := m.kept[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return []byte(text), nil
}

func (m *fakeMachine) writeState(name string, text []byte) error {
	if m.dead {
		return errKilled
	}
	if m.stateErr != nil {
		return m.stateErr
	}
	if m.kept == nil {
		m.kept = map[string]string{}
	}
	m.kept[name] = string(text)
	return nil
}

func (m *fakeMachine) removeState(name string) error {
	if m.dead {
		return errKilled
	}
	delete(m.kept, name)
	return nil
}

func (m *fakeMachine) network() (string, error) { return "net-1", nil }
func (m *fakeMachine) boot() (string, error)    { return "boot " + m.booted, nil }

func (m *fakeMachine) uptime() (time.Duration, error) {
	if m.onUptime != nil {
		m.onUptime()
	}
	return m.clock, nil
}

func (m *fakeMachine) watch(context.Context) (func(), error) { return func() {}, nil }

func (m *fakeMachine) watched() (int, bool) { return 43, !m.unwatched }

func (m *fakeMachine) lockHolder(string) (int, string, bool) { return 42, "kube-proxy", true }

func (m *fakeMachine) userByName(name string) (uint32, bool) {
	uid, ok := m.users[name]
	return uid, ok
}

func (m *fakeMachine) userByID(uid uint32) (string, bool) {
	for name, u := range m.users {
		if u == uid {
			return name, true
		}
	}
	return "", false
}

func (m *fakeMachine) readFile(path string) ([]byte, error) {
	text, ok := m.files[path]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return []byte(text), nil
}

func (m *fakeMachine) glob(patterns ...string) (out []string) {
	for name := range m.files {
		if slices.ContainsFunc(patterns, func(p string) bool { ok, _ := filepath.Match(p, name); return ok }) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func (m *fakeMachine) monitor(changed func()) (func(), error) {
	m.changed = changed
	return func() { m.changed = nil }, m.deaf
}

func (m *fakeMachine) environ(key string) string { return m.env[key] }
func (m *fakeMachine) procs() procfs.FS {
	return procfs.FS{Root: m.proc, FileRoot: m.proc, UnitDirs: []string{}}
}

func (m *fakeMachine) privileged() error {
	if m.notRoot {
		return ErrNotRoot
	}
	return nil
}

// all is everything that a machine holds, as text, to compare.
func (m *fakeMachine) all() string {
	var b strings.Builder
	for _, p := range prefixes {
		fmt.Fprintf(&b, "%s\n%s", p, m.netfilter[p].Save())
	}
	if m.table != nil { // the order of chains says nothing
		n := *m.table
		n.Chains = slices.SortedFunc(slices.Values(n.Chains), func(a, b rules.NativeChain) int { return cmp.Compare(a.Name, b.Name) })
		n.Sets = slices.SortedFunc(slices.Values(n.Sets), func(a, b rules.NativeSet) int { return cmp.Compare(a.Name, b.Name) })
		fmt.Fprintf(&b, "%q %q\n", n.Text(), n.Strange)
	}
	fmt.Fprintf(&b, "%v\n", m.addresses)
	if m.link.Index != 0 {
		fmt.Fprintf(&b, "%v\n", m.link.Addresses)
	}
	return b.String()
}

// plan builds a Config for the machine, which can have a table of nftables from when one
// is asked for.
func (m *fakeMachine) plan(t tproxytest.Fataler, c tproxy.Config) *tproxy.Plan {
	t.Helper()
	if c.Backend == tproxy.NFTables {
		m.noTable = ""
	}
	r := Runner{machine: m}
	h, err := r.Probe(context.Background(), c.Needs())
	if err != nil {
		t.Fatalf("Probe: %v", err)
	}
	p, err := tproxy.Build(c, h)
	if err != nil {
		t.Fatalf("Build: %v", err)
	}
	return p
}
