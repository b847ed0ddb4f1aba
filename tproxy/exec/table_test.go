package exec

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// native is a Config that a table of nftables holds, with every kind of rule.
var native = tproxy.Config{Backend: tproxy.NFTables, DNS: tproxy.DNS{CaptureAll: true}, Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("1,3,5-9")}}

// refused tries to install while the kernel refuses one command, and returns how.
func (m *fakeMachine) refused(t *testing.T, c tproxy.Config, errno syscall.Errno, which func(i int, c rules.NativeCommand) bool) *ApplyError {
	t.Helper()
	p := m.plan(t, c)
	m.onCommit = func(list []rules.NativeCommand) (int, error) {
		for i, c := range list {
			if which(i, c) {
				return i, errno
			}
		}
		return -1, nil
	}
	defer func() { m.onCommit = nil }()
	_, err := (&Runner{machine: m}).Apply(context.Background(), p)
	e, _ := errors.AsType[*ApplyError](err)
	if err != nil && e == nil {
		t.Fatalf("not an ApplyError: %v", err)
	}
	return e
}

// Whichever command of the transaction the kernel refuses, the error names it, the host is
// as before, and the next run does it: over nothing, over another install, and from
// another backend.
func TestEachCommandRefused(t *testing.T) {
	formers := map[string]func(*fakeMachine){
		"over nothing": func(*fakeMachine) {},
		"over another": func(m *fakeMachine) {
			m.install(t, tproxy.Config{Backend: tproxy.NFTables, IPFamilyMode: tproxy.IPv4Only})
		},
		"from iptables-nft": func(m *fakeMachine) { m.install(t, tproxy.Config{Backend: tproxy.IPTablesNFT}) },
	}
	for name, former := range formers {
		t.Run(name, func(t *testing.T) {
			m := newFakeMachine(t)
			m.populate(t)
			former(m)
			before := m.state()
			n := 0
			for ; ; n++ {
				var command string
				e := m.refused(t, native, syscall.EINVAL, func(i int, c rules.NativeCommand) bool {
					if i == n {
						command = c.String()
					}
					return i == n
				})
				if e == nil {
					break // there are no more
				}
				if e.Line != n+1 || e.Rule != command || e.Step == "" || len(e.Left) > 0 || !errors.Is(e, syscall.EINVAL) {
					t.Errorf("command %d, %q: %+v", n, command, e)
				}
				m.unchanged(t, before)
			}
			if n < 10 {
				t.Errorf("%d commands", n)
			}
			if r := m.install(t, native); r.Changed {
				t.Errorf("the run in which no command was refused has not done it: %+v", r)
			}
		})
	}
}

// What a kernel lacks it says of the command that needs it.
func TestKernelWithoutAFeature(t *testing.T) {
	for _, c := range []struct {
		word   string // in the command
		errno  syscall.Errno
		is     error
		remedy string
	}{
		{"add table", syscall.EOPNOTSUPP, ErrUnsupported, "CONFIG_NF_TABLES_INET"},
		{"type nat", syscall.ENOENT, ErrNoModule, "modprobe nft_chain_nat"},
		{"type nat", syscall.EOPNOTSUPP, ErrNoModule, "takes Linux 5.2"},
		{"redirect to", syscall.ENOENT, ErrNoModule, "modprobe nft_redir"},
		{"fib ", syscall.ENOENT, ErrNoModule, "modprobe nft_fib_inet"},
		{"ct zone", syscall.ENOENT, ErrNoModule, "modprobe nft_ct"},
		{"ct zone", syscall.EOPNOTSUPP, ErrNoModule, "--skip-dns-conntrack-zone-split"},
		{"add table", syscall.EPERM, ErrNotRoot, "CAP_NET_ADMIN"},
	} {
		m := newFakeMachine(t)
		m.populate(t)
		before := m.state()
		e := m.refused(t, native, c.errno, func(_ int, command rules.NativeCommand) bool { return strings.Contains(command.String(), c.word) })
		if e == nil || !errors.Is(e, c.is) || !strings.Contains(e.Remedy, c.remedy) || !strings.Contains(e.Rule, c.word) {
			t.Errorf("%s of %q: %+v", c.errno, c.word, e)
		}
		m.unchanged(t, before)
	}
}

// A step behind the table fails: the table is what it was, but for what others had in it,
// and that the error says. Where nothing was done to the table, nothing is gone.
func TestUndoOfATableWithRulesOfOthers(t *testing.T) {
	for _, touched := range []bool{false, true} {
		m := newFakeMachine(t)
		m.install(t, native)
		n := *m.table
		n.Strange = []string{`object "quota"`}
		m.table = &n
		known := n.Known()
		if !touched {
			e := m.refused(t, native, syscall.ENOMEM, func(i int, _ rules.NativeCommand) bool { return true })
			if e == nil || len(e.Left) > 0 || !m.table.Same(&n) {
				t.Errorf("refused: %+v", e)
			}
			continue
		}
		p := m.plan(t, native)
		_, err := (&Runner{machine: &failsBehind{m}}).Apply(context.Background(), p)
		e, ok := errors.AsType[*ApplyError](err)
		if !ok || len(e.Left) != 1 || !strings.Contains(e.Left[0], `what others had in the table inet kuma-tproxy is gone: object "quota"`) {
			t.Errorf("%+v", err)
		}
		if !m.table.Equal(&known) {
			t.Errorf("the table is not what is known of the former one")
		}
	}
}

// failsBehind is a machine on which ::6 is gone and cannot be put on lo.
type failsBehind struct{ *fakeMachine }

func (*failsBehind) hasAddress(netip.Addr) (bool, error) { return false, nil }

func (*failsBehind) addAddress(netip.Prefix) (bool, error) { return false, syscall.ENOMEM }

// Where the kernel lacks what a table takes, what was left open is iptables, on trial or
// not, and what was asked for is an error; nothing of the try is left.
func TestKernelWithoutWhatATableTakes(t *testing.T) {
	open := tproxy.Config{Inbound: native.Inbound}
	without := func(commands []rules.NativeCommand) (int, error) {
		for i, c := range commands {
			if _, redirects := c.Rule.Action.(rules.Redirect); redirects {
				return i, syscall.ENOENT
			}
		}
		return -1, nil
	}
	for _, on := range []string{"for good", "on trial"} {
		m := newFakeMachine(t)
		m.noTable, m.onCommit = "", without
		p := m.plan(t, open)
		if p.Backend != tproxy.NFTables {
			t.Fatalf("planned for %s", p.Backend)
		}
		var r *Report
		var err error
		if on == "for good" {
			r, err = (&Runner{machine: m}).Apply(context.Background(), p)
		} else {
			r, err = (&Runner{machine: m}).Try(context.Background(), p, TrialOptions{Within: MaxTrial, Watch: func(context.Context, Trial) (string, error) { return "by hand", nil }})
		}
		if err != nil || r.Backend != tproxy.IPTablesNFT || m.table != nil || !strings.Contains(strings.Join(r.Notes, "\n"), "nftables was tried first, and this kernel cannot: ") {
			t.Errorf("%s: %+v, %v", on, r, err)
		}
		if on == "on trial" && (r.Trial == nil || r.Trial.Left <= 0) {
			t.Errorf("the trial is %+v", r.Trial)
		}
	}
	m := newFakeMachine(t)
	m.noTable, m.onCommit = "", without
	before := m.state()
	asked := open
	asked.Backend = tproxy.NFTables
	if _, err := (&Runner{machine: m}).Apply(context.Background(), m.plan(t, asked)); !errors.Is(err, ErrNoModule) {
		t.Errorf("asked for: %v", err)
	}
	m.unchanged(t, before)
	for _, v := range prefixes { // and where there is no iptables
		m.missing[v+"-save"], m.missing[v+"-restore"] = true, true
	}
	for _, plain := range []string{"iptables", "ip6tables"} {
		m.missing[plain+"-save"], m.missing[plain+"-restore"] = true, true
	}
	if _, err := (&Runner{machine: m}).Apply(context.Background(), m.plan(t, open)); !errors.Is(err, ErrNoModule) {
		t.Errorf("without iptables: %v", err)
	}
	m.unchanged(t, before)
}
