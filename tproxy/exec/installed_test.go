package exec

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func (m *fakeMachine) installed(t *testing.T) *Installation {
	t.Helper()
	writes := m.writes
	i, err := (&Runner{machine: m}).Installed(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if m.writes != writes {
		t.Error("looking wrote something")
	}
	return i
}

// What is installed is read from the rules: by which version, and which Config.
func TestInstalled(t *testing.T) {
	for _, c := range configs {
		m := newFakeMachine(t)
		m.populate(t)
		if i := m.installed(t); i != nil {
			t.Fatalf("nothing is installed: %+v", i)
		}
		p := m.plan(t, c)
		r, err := (&Runner{machine: m, Version: "v1.2.3"}).Apply(context.Background(), p)
		if err != nil || r.Before != nil {
			t.Fatalf("%v, before: %+v", err, r.Before)
		}
		i := m.installed(t)
		if i == nil || i.Unknown != nil || i.Backend != p.Backend || fmt.Sprint(i.Families) != fmt.Sprint(p.Families) || i.Record.Version != "v1.2.3" || i.Kuma {
			t.Fatalf("%+v", i)
		}
		if d := tproxy.ConfigChanges(p.Config, i.Config); len(d) > 0 {
			t.Errorf("%v: %v", c, d)
		}
		// The next install is told what was there.
		other := p.Config
		other.Inbound.Port, other.Wait = 1006, 77
		other.Outbound.ExcludePorts = other.Outbound.ExcludePorts.Union(rules.Port(53))
		r, err = (&Runner{machine: m}).Apply(context.Background(), m.plan(t, tproxy.Config{
			ProxyUIDs: other.ProxyUIDs, Inbound: other.Inbound, Outbound: other.Outbound, DNS: other.DNS, IPFamilyMode: other.IPFamilyMode,
			DisableComments: other.DisableComments, Backend: other.Backend}))
		if err != nil || r.Before == nil {
			t.Fatal(err)
		}
		var paths []string
		for _, d := range tproxy.ConfigChanges(r.Before.Config, m.installed(t).Config) {
			paths = append(paths, d.Path)
		}
		same(t, "changes", paths, []string{"redirect.inbound.port", "redirect.outbound.excludePorts"})
	}
}

// Of Kuma's rules the Config is not known, and that they are Kuma's is.
func TestInstalledByKuma(t *testing.T) {
	m := newFakeMachine(t)
	m.kuma(t, "legacy", oldkuma.First, oldkuma.Options{})
	i := m.installed(t)
	if i == nil || !i.Kuma || i.Backend != tproxy.IPTablesLegacy || !errors.Is(i.Unknown, tproxy.ErrNoRecord) {
		t.Errorf("%+v", i)
	}
	r := m.install(t, tproxy.Config{})
	if r.Before == nil || !r.Before.Kuma {
		t.Errorf("before: %+v", r.Before)
	}
}

func TestInstalledNeedsRoot(t *testing.T) {
	m := newFakeMachine(t)
	m.notRoot = true
	if _, err := (&Runner{machine: m}).Installed(context.Background()); !errors.Is(err, ErrNotRoot) {
		t.Error(err)
	}
}

// Without comments in the kernel, an install without comments does without its
// record too, says so, changes nothing the second time, and is taken out as any.
func TestNoCommentsInTheKernel(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	m.onRun = func(c command) (result, bool) {
		i := strings.Index(string(c.Stdin), "-m comment")
		if i < 0 {
			return result{}, false
		}
		line := strings.Count(string(c.Stdin)[:i], "\n") + 1
		return result{Exit: 2, Stderr: fmt.Appendf(nil, "iptables-restore v1.8.9 (nf_tables): Couldn't load match `comment':No such file or directory\n\nError occurred at line: %d\n", line)}, true
	}
	_, err := (&Runner{machine: m}).Apply(context.Background(), m.plan(t, tproxy.Config{}))
	if e := applyError(t, err); !strings.Contains(e.Remedy, "--disable-comments") || !errors.Is(err, ErrNoModule) {
		t.Errorf("with comments: %v", err)
	}
	m.unchanged(t, before)
	c := tproxy.Config{DisableComments: true, DNS: tproxy.DNS{CaptureAll: true}}
	r := m.install(t, c)
	if !strings.Contains(strings.Join(r.Notes, "\n"), "the kernel has no comments (xt_comment): the rules hold no record") {
		t.Errorf("notes %q", r.Notes)
	}
	if i := m.installed(t); i == nil || i.Unknown == nil || !i.Record.Bare {
		t.Errorf("%+v", i)
	}
	if r := m.install(t, c); r.Changed {
		t.Errorf("the same again: %+v", r)
	}
	m.uninstall(t)
	m.unchanged(t, before)
}
