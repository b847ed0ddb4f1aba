package exec

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

const othersDirect = `<?xml version="1.0" encoding="utf-8"?>
<!-- of the host -->
<direct>
  <rule ipv="ipv4" table="nat" chain="OUTPUT" priority="0">-p tcp --dport 9 -j ACCEPT</rule>
</direct>
`

// booted is a host with systemd, and with firewalld installed where running names it.
func booted(t *testing.T, running ...string) *fakeMachine {
	t.Helper()
	m := newFakeMachine(t)
	m.root, m.running = t.TempDir(), running
	m.bus = func([]string) result { return result{Stdout: []byte("s \"RUNNING\"\n")} }
	for _, f := range []string{"etc/systemd/system/multi-user.target.wants", "usr/lib/systemd/system", "usr/local/bin"} {
		m.folder(t, f)
	}
	m.file(t, "usr/lib/systemd/system/nftables.service", "[Unit]\n")
	m.file(t, "usr/local/bin/kumactl", "")
	if len(running) > 0 {
		m.folder(t, "etc/firewalld")
		m.file(t, "usr/lib/systemd/system/firewalld.service", "[Unit]\n")
		m.file(t, "etc/firewalld/direct.xml", othersDirect)
	}
	return m
}

func (m *fakeMachine) folder(t *testing.T, name string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(m.root, name), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (m *fakeMachine) file(t *testing.T, name, text string) {
	t.Helper()
	m.folder(t, filepath.Dir(name))
	if err := os.WriteFile(filepath.Join(m.root, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (m *fakeMachine) text(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(m.root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// tree is everything on the disk.
func (m *fakeMachine) tree(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(m.root, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		short := strings.TrimPrefix(name, m.root)
		fmt.Fprintf(&b, "%s %s", info.Mode(), short)
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			to, _ := os.Readlink(name)
			fmt.Fprintf(&b, " -> %s", to)
		case info.Mode().IsRegular():
			text, _ := os.ReadFile(name)
			fmt.Fprintf(&b, "\n%s", text)
		}
		b.WriteString("\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func (m *fakeMachine) runner() *Runner {
	return &Runner{machine: m, Version: "1.2.3", ComeBack: []string{"/usr/local/bin/kumactl", "install", "transparent-proxy", "come-back"}}
}

// stored installs; the error is that of Build or Apply.
func (m *fakeMachine) store(t *testing.T, c tproxy.Config) (*Report, error) {
	t.Helper()
	h, err := m.runner().Probe(t.Context(), c.Needs())
	if err != nil {
		t.Fatal(err)
	}
	p, err := tproxy.Build(c, h)
	if err != nil {
		return nil, err
	}
	return m.runner().Apply(t.Context(), p)
}

func (m *fakeMachine) mustStore(t *testing.T, c tproxy.Config) *Report {
	t.Helper()
	r, err := m.store(t, c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func sameText(t *testing.T, what, want, got string) {
	t.Helper()
	if want != got {
		t.Errorf("%s: got\n%s\nnot\n%s", what, got, want)
	}
}

// An install comes back by what is here; the same again writes nothing, and an uninstall
// leaves every byte as it was.
func TestStore(t *testing.T) {
	for _, test := range []struct {
		name    string
		running []string
		c       tproxy.Config
		files   []string
	}{
		{"systemd", nil, tproxy.Config{}, []string{"etc/systemd/system/nftables.service.d/kuma-transparent-proxy.conf"}},
		{"firewalld", []string{"firewalld"}, tproxy.Config{}, []string{"etc/systemd/system/firewalld.service.d/kuma-transparent-proxy.conf"}},
		{"systemd beside firewalld", []string{"firewalld"}, tproxy.Config{Persist: tproxy.PersistSystemd}, nil},
		{"without comments", []string{"firewalld"}, tproxy.Config{DisableComments: true, IPFamilyMode: tproxy.IPv4Only}, nil},
	} {
		m := booted(t, test.running...)
		m.populate(t)
		before, host := m.tree(t), m.all()
		r := m.mustStore(t, test.c)
		direct := len(test.running) > 0 && test.c.Persist == tproxy.PersistAuto
		if !slices.ContainsFunc(r.Steps, func(s string) bool { return strings.Contains(s, persist.UnitName) }) {
			t.Errorf("%s: steps %q", test.name, r.Steps)
		}
		for _, f := range append(test.files, "etc/kuma-tproxy/install.json", "etc/systemd/system/"+persist.UnitName, "etc/systemd/system/multi-user.target.wants/"+persist.UnitName) {
			if _, err := os.Stat(filepath.Join(m.root, f)); err != nil && !strings.Contains(f, ".wants/") {
				t.Errorf("%s: %v", test.name, err)
			}
		}
		if !strings.Contains(m.text(t, "etc/systemd/system/"+persist.UnitName), "ExecStart=/usr/local/bin/kumactl install transparent-proxy come-back rules\n") {
			t.Errorf("%s: %s", test.name, m.text(t, "etc/systemd/system/"+persist.UnitName))
		}
		if direct {
			d, err := persist.ReadDirect([]byte(m.text(t, "etc/firewalld/direct.xml")))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range r.Families {
				live, err := rules.ParseSave(f.Family, m.netfilter[map[rules.Family]string{rules.IPv4: "iptables-nft", rules.IPv6: "ip6tables-nft"}[f.Family]].Save())
				if err != nil {
					t.Fatal(err)
				}
				if diff := rules.Compare(f.Family, d.Rules(f.Family), tproxy.Find(f.Family, live).Ours); diff != nil {
					t.Errorf("%s: %s", test.name, diff)
				}
			}
		} else if len(test.running) > 0 && m.text(t, "etc/firewalld/direct.xml") != othersDirect {
			t.Errorf("%s: direct.xml was changed", test.name)
		}
		stored := m.tree(t)
		m.commands, m.writes = nil, 0
		if r := m.mustStore(t, test.c); r.Changed || m.writes > 0 {
			t.Errorf("%s: the same again: %q, %q", test.name, r.Steps, m.programs())
		}
		s, err := m.runner().Status(t.Context())
		if err != nil || s.State != StateInstalled {
			t.Errorf("%s: %+v, %v", test.name, s, err)
		}
		sameText(t, test.name+", the same again", stored, m.tree(t))
		dry, err := m.runner().Remove(t.Context(), RemoveOptions{DryRun: true})
		if err != nil || !slices.ContainsFunc(dry.Steps, func(s string) bool { return strings.Contains(s, persist.UnitName) }) {
			t.Errorf("%s: dry run of uninstall: %+v, %v", test.name, dry, err)
		}
		sameText(t, test.name+", a dry run", stored, m.tree(t))
		if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
		sameText(t, test.name+", uninstalled", before, m.tree(t))
		sameText(t, test.name+", uninstalled", host, m.all())
	}
}

// From one way to another, each install leaves what it alone would have made.
func TestStoreChangesWays(t *testing.T) {
	ways := []tproxy.Config{{}, {Persist: tproxy.PersistSystemd}, {Persist: tproxy.PersistNone}, {Persist: tproxy.PersistFirewalld, Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("9005")}}}
	alone := func(c tproxy.Config) string {
		m := booted(t, "firewalld")
		m.mustStore(t, c)
		return m.tree(t)
	}
	for _, from := range ways {
		for _, to := range ways {
			m := booted(t, "firewalld")
			m.mustStore(t, from)
			m.mustStore(t, to)
			sameText(t, fmt.Sprintf("%s to %s", from.Persist, to.Persist), alone(to), m.tree(t))
		}
	}
}

// The program is killed at each of its writes to the disk, and at each command of
// systemd: the next install finishes, and the next uninstall leaves nothing.
func TestStoreKilled(t *testing.T) {
	run := func(uninstalls bool, at int) (m *fakeMachine, before string, killed bool) {
		m = booted(t, "firewalld")
		before = m.tree(t)
		if uninstalls {
			m.mustStore(t, tproxy.Config{})
		}
		n := 0
		dies := func() bool { n++; return n == at }
		m.onWrite = dies
		m.onRun = func(c command) (result, bool) {
			if filepath.Base(c.Path) == "systemctl" && dies() {
				m.dead = true
			}
			return result{Exit: 1, Stderr: []byte("killed")}, m.dead
		}
		if uninstalls {
			_, _ = m.runner().Remove(t.Context(), RemoveOptions{})
		} else {
			_, _ = m.store(t, tproxy.Config{})
		}
		killed = m.dead
		m.dead, m.onWrite, m.onRun = false, nil, nil
		return m, before, killed
	}
	whole := func() string { m := booted(t, "firewalld"); m.mustStore(t, tproxy.Config{}); return m.tree(t) }()
	for _, uninstalls := range []bool{false, true} {
		at := 1
		for ; ; at++ {
			m, before, killed := run(uninstalls, at)
			if !killed {
				break
			}
			if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
				t.Fatalf("uninstall after a kill at %d: %v", at, err)
			}
			sameText(t, fmt.Sprintf("uninstalled after a kill at %d", at), before, m.tree(t))
			m, _, _ = run(uninstalls, at)
			m.mustStore(t, tproxy.Config{})
			sameText(t, fmt.Sprintf("installed after a kill at %d", at), whole, m.tree(t))
		}
		if at < 15 {
			t.Errorf("%d writes", at)
		}
	}
}

// What cannot be kept is an error, and the host is as it was: rules, address and disk.
func TestStoreFails(t *testing.T) {
	const unit = "etc/systemd/system/" + persist.UnitName
	for _, test := range []struct {
		name string
		do   func(t *testing.T, m *fakeMachine)
		c    tproxy.Config
		want string
	}{
		{"the unit does not start", func(_ *testing.T, m *fakeMachine) {
			m.onRun = func(c command) (result, bool) {
				return result{Exit: 1, Stderr: []byte("Job failed")}, len(c.Args) > 1 && c.Args[0] == "restart"
			}
		}, tproxy.Config{}, "Job failed"},
		{"systemd goes down", func(_ *testing.T, m *fakeMachine) { m.systemState = "stopping" }, tproxy.Config{}, `systemd is in state "stopping"`},
		{"a unit of others", func(t *testing.T, m *fakeMachine) { m.file(t, unit, "[Unit]\n") }, tproxy.Config{}, "is there and is not ours"},
		{"a unit that is masked", func(t *testing.T, m *fakeMachine) {
			if err := os.Symlink("/dev/null", filepath.Join(m.root, unit)); err != nil {
				t.Fatal(err)
			}
		}, tproxy.Config{}, "is there and is not ours"},
		{"a drop-in of others", func(t *testing.T, m *fakeMachine) {
			m.file(t, "etc/systemd/system/nftables.service.d/kuma-transparent-proxy.conf", "")
		}, tproxy.Config{}, "is there and is not ours"},
		{"a folder that others may write to", func(t *testing.T, m *fakeMachine) {
			m.folder(t, "etc/kuma-tproxy")
			if err := os.Chmod(filepath.Join(m.root, "etc/kuma-tproxy"), 0o777); err != nil {
				t.Fatal(err)
			}
			m.file(t, "etc/kuma-tproxy/proxy.yaml", "")
		}, tproxy.Config{}, "with mode 0777: others could have root run at boot"},
		{"a folder that is a symbolic link", func(t *testing.T, m *fakeMachine) {
			if err := os.Symlink("/srv", filepath.Join(m.root, "etc/kuma-tproxy")); err != nil {
				t.Fatal(err)
			}
		}, tproxy.Config{}, "/etc/kuma-tproxy\" is no folder"},
		{"a program of somebody's on PATH", func(t *testing.T, m *fakeMachine) {
			m.folder(t, "usr/sbin")
			m.file(t, "usr/sbin/ip", "")
			if err := errors.Join(os.Chmod(filepath.Join(m.root, "usr/sbin/ip"), 0o757), os.Chmod(filepath.Join(m.root, "usr/local/bin"), 0o777)); err != nil {
				t.Fatal(err)
			}
		}, tproxy.Config{}, "/usr/sbin/ip, which root would run at boot: /usr/sbin/ip, with mode 0757, can be changed"},
		{"not XML", func(t *testing.T, m *fakeMachine) { m.file(t, "etc/firewalld/direct.xml", "rules:\n") }, tproxy.Config{}, "direct.xml line 1"},
		{"an element that nobody knows", func(t *testing.T, m *fakeMachine) {
			m.file(t, "etc/firewalld/direct.xml", "<direct><rich/></direct>")
		}, tproxy.Config{Persist: tproxy.PersistFirewalld}, "direct.xml line 1"},
		{"read-only", func(t *testing.T, m *fakeMachine) {
			if err := os.Chmod(filepath.Join(m.root, "etc/firewalld/direct.xml"), 0o444); err != nil {
				t.Fatal(err)
			}
		}, tproxy.Config{}, "is read-only, with mode 0444"},
		{"a symbolic link", func(t *testing.T, m *fakeMachine) {
			name := filepath.Join(m.root, "etc/firewalld/direct.xml")
			if err := errors.Join(os.Rename(name, name+".real"), os.Symlink("direct.xml.real", name)); err != nil {
				t.Fatal(err)
			}
		}, tproxy.Config{}, "is a symbolic link, to direct.xml.real"},
		{"firewalld has failed", func(_ *testing.T, m *fakeMachine) {
			m.bus = func([]string) result { return result{Stdout: []byte("s \"FAILED\"\n")} }
		}, tproxy.Config{}, "firewalld is in state failed"},
		{"a rule that iptables refuses", func(_ *testing.T, m *fakeMachine) {
			m.onRun = func(c command) (result, bool) {
				return result{Exit: 2, Stderr: []byte("Bad argument")}, slices.Contains(c.Args, "--test")
			}
		}, tproxy.Config{}, "trying the direct rules of firewalld"},
	} {
		m := booted(t, "firewalld")
		m.populate(t)
		test.do(t, m)
		before, host := m.tree(t), m.all()
		if _, err := m.store(t, test.c); err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "--persist") {
			t.Errorf("%s: %v", test.name, err)
		}
		sameText(t, test.name, before, m.tree(t))
		sameText(t, test.name, host, m.all())
		m.onRun, m.systemState = nil, ""
		if _, err := m.store(t, tproxy.Config{Persist: tproxy.PersistNone}); err != nil {
			t.Errorf("%s: without coming back: %v", test.name, err)
		}
		sameText(t, test.name+", without coming back", before, m.tree(t))
		if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
			t.Errorf("%s: uninstall: %v", test.name, err)
		}
		sameText(t, test.name+", uninstalled", before, m.tree(t))
		sameText(t, test.name+", uninstalled", host, m.all())
	}
}

// While systemd starts, nobody waits for it; one that is degraded works.
func TestStoreBySystemsState(t *testing.T) {
	for state, want := range map[string]string{"running": "restart " + persist.UnitName, "degraded": "restart " + persist.UnitName,
		"starting": "--no-block restart " + persist.UnitName, "initializing": "--no-block restart " + persist.UnitName} {
		m := booted(t)
		m.systemState = state
		m.mustStore(t, tproxy.Config{})
		if ran := m.programs(); !slices.Contains(ran, "systemctl "+want) || !slices.Contains(ran, "systemctl daemon-reload") {
			t.Errorf("%s: %q", state, ran)
		}
	}
}

// In a network namespace, or a container, whose files are the host's, they stay.
func TestStoreElsewhere(t *testing.T) {
	m := booted(t, "firewalld")
	m.mustStore(t, tproxy.Config{})
	before := m.tree(t)
	m.noSystemd, m.elsewhere = "another", "another"
	m.init = "host"
	r := m.mustStore(t, tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("9005")}})
	if !r.Changed {
		t.Error("nothing was changed")
	}
	if m.text(t, "etc/kuma-tproxy/install.json") == "" || strings.Contains(m.tree(t), "9005") {
		t.Error("the host's files were changed")
	}
	if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(m.tree(t), "/etc/systemd/system/"+persist.UnitName) {
		t.Errorf("the host's unit was taken away, of\n%s", before)
	}
}

// Where no program can come back, or root must not trust it, saved scripts do.
func TestStoreScripts(t *testing.T) {
	m := booted(t)
	before := m.tree(t)
	if err := os.Chmod(filepath.Join(m.root, "usr/local/bin"), 0o777); err != nil {
		t.Fatal(err)
	}
	r := m.mustStore(t, tproxy.Config{})
	if !slices.ContainsFunc(r.Notes, func(n string) bool {
		return strings.Contains(n, "/usr/local/bin, with mode 0777, can be changed by others")
	}) {
		t.Errorf("%q", r.Notes)
	}
	unit := m.text(t, "etc/systemd/system/"+persist.UnitName)
	for _, want := range []string{
		"ExecStart=/usr/sbin/ip -6 address replace ::6/128 dev lo\n",
		"grep -q '^:KUMA_MESH_RECORD ' || exec '/usr/sbin/iptables-nft-restore' --noflush --wait=5 </etc/kuma-tproxy/rules.v4\"\n",
		"</etc/kuma-tproxy/rules.v6\"\n", "RequiresMountsFor="} {
		if !strings.Contains(unit, want) {
			t.Errorf("%q is not in\n%s", want, unit)
		}
	}
	// What they load is what was installed.
	host := m.all()
	script := m.text(t, "etc/kuma-tproxy/rules.v4")
	fresh := newFakeMachine(t)
	fresh.edit(t, "iptables-nft", script)
	for _, f := range []rules.Family{rules.IPv4} {
		live, err := rules.ParseSave(f, fresh.netfilter["iptables-nft"].Save())
		if err != nil {
			t.Fatal(err)
		}
		now, err := rules.ParseSave(f, m.netfilter["iptables-nft"].Save())
		if err != nil {
			t.Fatal(err)
		}
		if diff := rules.Compare(f, live, now); diff != nil {
			t.Errorf("%s", diff)
		}
	}
	sameText(t, "looked at", host, m.all())
	if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(m.root, "usr/local/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	sameText(t, "uninstalled", before, m.tree(t))
}

// tryStored installs on trial, and returns its number.
func (m *fakeMachine) tryStored(t *testing.T, c tproxy.Config) (id string) {
	t.Helper()
	h, err := m.runner().Probe(t.Context(), c.Needs())
	if err != nil {
		t.Fatal(err)
	}
	p, err := tproxy.Build(c, h)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.runner().Try(t.Context(), p, TrialOptions{Within: time.Minute, Watch: func(_ context.Context, tr Trial) (string, error) {
		id = tr.ID
		return "a test", nil
	}}); err != nil {
		t.Fatal(err)
	}
	return id
}

// An install on trial comes back only once it is confirmed, and until then the one before.
func TestStoreOnTrial(t *testing.T) {
	m := booted(t, "firewalld")
	m.mustStore(t, tproxy.Config{})
	former := m.tree(t)
	c := tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("9005")}}
	alone := booted(t, "firewalld")
	alone.mustStore(t, c)
	id := m.tryStored(t, c)
	sameText(t, "on trial", former, m.tree(t))
	if r, err := m.runner().BringBack(t.Context()); err != nil || len(r.Steps) > 0 || !strings.Contains(strings.Join(r.Notes, ""), "waits for its confirmation") {
		t.Errorf("brought back in between: %+v, %v", r, err)
	}
	if s, err := m.runner().Status(t.Context()); err != nil || s.State != StateInstalled {
		t.Errorf("%+v, %v", s, err)
	}
	m.clock = time.Hour
	if _, err := m.watchOver(id); err != nil {
		t.Fatal(err)
	}
	sameText(t, "put back", former, m.tree(t))
	if s, err := m.runner().Status(t.Context()); err != nil || s.State != StateInstalled {
		t.Errorf("%+v, %v", s, err)
	}

	m.tryStored(t, c)
	m.onRun = func(c command) (result, bool) {
		return result{Exit: 1, Stderr: []byte("Job failed")}, len(c.Args) > 1 && c.Args[0] == "restart"
	}
	if _, err := m.runner().Confirm(t.Context(), ConfirmOptions{}); err == nil || !strings.Contains(err.Error(), "Job failed") {
		t.Errorf("confirmed: %v", err)
	}
	sameText(t, "not confirmed", former, m.tree(t))
	if tr, _, err := m.runner().Trial(t.Context()); err != nil || tr == nil {
		t.Errorf("%+v, %v", tr, err)
	}
	m.onRun = nil
	if _, err := m.runner().Confirm(t.Context(), ConfirmOptions{}); err != nil {
		t.Fatal(err)
	}
	sameText(t, "confirmed", alone.tree(t), m.tree(t))
	if s, err := m.runner().Status(t.Context()); err != nil || s.State != StateInstalled {
		t.Errorf("%+v, %v", s, err)
	}
}

// A confirm is killed at each of its writes to the disk, and nobody confirms again: what
// comes back is what did before.
func TestStoreConfirmKilled(t *testing.T) {
	c := tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("9005")}}
	for _, former := range []bool{false, true} {
		at := 1
		for ; ; at++ {
			m := booted(t, "firewalld")
			if former {
				m.mustStore(t, tproxy.Config{})
			}
			before := m.tree(t)
			id := m.tryStored(t, c)
			n := 0
			m.onWrite = func() bool { n++; return n == at }
			_, err := m.runner().Confirm(t.Context(), ConfirmOptions{})
			m.dead, m.onWrite = false, nil
			if err == nil {
				break
			}
			m.clock = time.Hour
			if _, err := m.watchOver(id); err != nil {
				t.Fatal(err)
			}
			sameText(t, fmt.Sprintf("killed at %d", at), before, m.tree(t))
			if s, err := m.runner().Status(t.Context()); err != nil || len(s.Drift) > 0 {
				t.Errorf("killed at %d: %+v, %v", at, s, err)
			}
		}
		if at < 4 {
			t.Errorf("%d writes", at)
		}
	}
}

// BringBack makes what was installed, whatever became of it, and what was observed for it
// holds: at boot nobody listens yet.
func TestBringBack(t *testing.T) {
	m := booted(t)
	m.populate(t)
	empty := m.all()
	c := tproxy.Config{ProxyUser: "kuma-dp", DNS: tproxy.DNS{Redirect: true}}
	m.files[tproxy.DefaultResolvConf] = "nameserver 192.0.2.1\n"
	if r, err := m.runner().BringBack(t.Context()); err != nil || len(r.Steps) > 0 || !strings.Contains(strings.Join(r.Notes, ""), "nothing is saved") {
		t.Errorf("nothing is saved: %+v, %v", r, err)
	}
	m.mustStore(t, c)
	want := m.all()
	if r, err := m.runner().BringBack(t.Context()); err != nil || r.Changed {
		t.Errorf("%+v, %v", r, err)
	}
	// A boot: another kernel's tables, no resolv.conf, no users of the name service.
	boot := func() *fakeMachine {
		b := newFakeMachine(t)
		b.root = m.root
		b.populate(t)
		b.users = map[string]uint32{}
		sameText(t, "booted", empty, b.all())
		return b
	}
	b := boot()
	r, err := b.runner().BringBack(t.Context())
	if err != nil || !r.Changed {
		t.Fatalf("%+v, %v", r, err)
	}
	sameText(t, "brought back", want, b.all())

	// A firewall flushes the rules, and ::6 stays: it is still ours.
	fresh := newFakeMachine(t)
	fresh.populate(t)
	m.netfilter = fresh.netfilter
	if r, err := m.runner().BringBack(t.Context()); err != nil || !r.Changed {
		t.Fatalf("%+v, %v", r, err)
	}
	sameText(t, "brought back after a flush", want, m.all())
	fresh = newFakeMachine(t)
	fresh.populate(t)
	m.netfilter = fresh.netfilter
	tree := m.tree(t)
	if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	sameText(t, "uninstalled after a flush", empty, m.all())
	m.mustStore(t, c)
	sameText(t, "installed again", tree, m.tree(t))

	// By whoever installs at the moment: then it is looked at alone.
	b = boot()
	b.held = true
	s, err := b.runner().session()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.writeState(storingKind, storingFile{PID: 4711, Started: "815"}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.runner().BringBack(t.Context()); err == nil || !strings.Contains(err.Error(), "they are not so") {
		t.Errorf("looked at: %v", err)
	}
	sameText(t, "looked at", empty, b.all())
	if err := s.writeState(storingKind, storingFile{PID: 4711, Started: "another"}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.runner().BringBack(t.Context()); !errors.Is(err, ErrLocked) {
		t.Errorf("another process of that number: %v", err)
	}

	// Its file.
	b = boot()
	for text, want := range map[string]string{"{": "unexpected end", `{"version":9}`: "version 9 of the form: accepted is 1"} {
		b.file(t, "etc/kuma-tproxy/install.json", text)
		if _, err := b.runner().BringBack(t.Context()); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), savedName) {
			t.Errorf("%s: %v", text, err)
		}
	}
	sameText(t, "a bad file", empty, b.all())
}

// What would bring an install back, or no longer does, is drift.
func TestStatusOfStored(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(t *testing.T, m *fakeMachine)
		want string
	}{
		{"disabled", func(t *testing.T, m *fakeMachine) {
			if err := os.Remove(filepath.Join(m.root, "etc/systemd/system/multi-user.target.wants", persist.UnitName)); err != nil {
				t.Fatal(err)
			}
		}, "the unit " + persist.UnitName},
		{"another configuration is saved", func(t *testing.T, m *fakeMachine) {
			m.file(t, "etc/kuma-tproxy/install.json", strings.ReplaceAll(m.text(t, "etc/kuma-tproxy/install.json"), "15006", "16006"))
		}, "the unit " + persist.UnitName},
		{"the unit runs something else", func(t *testing.T, m *fakeMachine) {
			const unit = "etc/systemd/system/" + persist.UnitName
			m.file(t, unit, strings.ReplaceAll(m.text(t, unit), "/usr/local/bin/kumactl install transparent-proxy come-back rules", "/bin/true"))
		}, "the unit " + persist.UnitName},
		{"its program is gone", func(t *testing.T, m *fakeMachine) {
			if err := os.Remove(filepath.Join(m.root, "usr/local/bin/kumactl")); err != nil {
				t.Fatal(err)
			}
		}, "the unit " + persist.UnitName},
		{"direct.xml was written anew", func(t *testing.T, m *fakeMachine) { m.file(t, "etc/firewalld/direct.xml", othersDirect) }, "the rules in " + directName},
		{"direct.xml is not XML", func(t *testing.T, m *fakeMachine) { m.file(t, "etc/firewalld/direct.xml", "<") }, "direct.xml line 1"},
	} {
		m := booted(t, "firewalld")
		m.mustStore(t, tproxy.Config{})
		test.do(t, m)
		s, err := m.runner().Status(t.Context())
		if err != nil || s.State != StateDrifted || len(s.Drift) != 1 || s.Drift[0].Kind != tproxy.DriftStored || !strings.Contains(s.Drift[0].String(), test.want) {
			t.Errorf("%s: %+v, %v", test.name, s, err)
		}
	}
	// The rules are gone, and a restart would bring them back.
	m := booted(t, "firewalld")
	m.mustStore(t, tproxy.Config{})
	gone := newFakeMachine(t)
	m.netfilter, m.addresses = gone.netfilter, gone.addresses
	s, err := m.runner().Status(t.Context())
	if err != nil || s.State != StateDrifted || len(s.Drift) != 2 {
		t.Errorf("%+v, %v", s, err)
	}
	// What is about a run alone is not in the record.
	m = booted(t, "firewalld")
	m.mustStore(t, tproxy.Config{Wait: 9 * time.Second, MaxRetries: 7})
	if s, err := m.runner().Status(t.Context()); err != nil || s.State != StateInstalled {
		t.Errorf("%+v, %v", s, err)
	}
	// Another program that looks, as another kumactl: which one comes back is no drift.
	m = booted(t, "firewalld")
	m.mustStore(t, tproxy.Config{})
	if s, err := (&Runner{machine: m}).Status(t.Context()); err != nil || s.State != StateInstalled {
		t.Errorf("%+v, %v", s, err)
	}
}

// What Kuma's --store-firewalld left goes, and nothing else, whatever brings ours back.
func TestStoreCleansKumas(t *testing.T) {
	const left = `<rule ipv="ipv4" table="nat" chain="OUTPUT" priority="4">-p tcp -j KUMA_MESH_OUTBOUND</rule><chain ipv="ipv4" table="nat" chain="KUMA_MESH_OUTBOUND"/>`
	for _, c := range []tproxy.Config{{}, {Persist: tproxy.PersistNone}, {Persist: tproxy.PersistSystemd}} {
		m := booted(t, "firewalld")
		m.file(t, "etc/firewalld/direct.xml", strings.Replace(othersDirect, "</direct>", left+"\n</direct>", 1))
		r := m.mustStore(t, c)
		if text := m.text(t, "etc/firewalld/direct.xml"); strings.Contains(text, left) {
			t.Errorf("%s: %s", c.Persist, text)
		}
		if said := strings.Join(r.Notes, "\n"); c.Persist != tproxy.PersistAuto && !strings.Contains(said, "rules of Kuma's own --store-firewalld go from") {
			t.Errorf("%s: %s", c.Persist, said)
		}
		if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
		if text := m.text(t, "etc/firewalld/direct.xml"); strings.Contains(text, "MESH") || !strings.Contains(text, "--dport 9 -j ACCEPT") {
			t.Errorf("%s, uninstalled: %s", c.Persist, text)
		}
	}
}

// A unit of others of our name is not taken away, nor what goes with it.
func TestRemoveLeavesUnitsOfOthers(t *testing.T) {
	m := booted(t)
	m.file(t, "etc/systemd/system/"+persist.UnitName, "[Unit]\n")
	if err := os.Symlink("../"+persist.UnitName, filepath.Join(m.root, "etc/systemd/system/multi-user.target.wants", persist.UnitName)); err != nil {
		t.Fatal(err)
	}
	m.mustStore(t, tproxy.Config{Persist: tproxy.PersistNone})
	before := m.tree(t)
	if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	sameText(t, "uninstalled", before, m.tree(t))
}

// A direct.xml that is a bind mount cannot be replaced: it is written to, and cut.
func TestStoreBindMount(t *testing.T) {
	m := booted(t, "firewalld")
	m.mounted = directName
	before := m.tree(t)
	m.mustStore(t, tproxy.Config{})
	if r := m.mustStore(t, tproxy.Config{}); r.Changed {
		t.Errorf("the same again: %q", r.Steps)
	}
	m.mustStore(t, tproxy.Config{IPFamilyMode: tproxy.IPv4Only})
	alone := booted(t, "firewalld")
	alone.mustStore(t, tproxy.Config{IPFamilyMode: tproxy.IPv4Only})
	sameText(t, "shorter", alone.tree(t), m.tree(t))
	m.onRun = func(c command) (result, bool) {
		return result{Exit: 1, Stderr: []byte("Job failed")}, len(c.Args) > 1 && c.Args[0] == "restart"
	}
	if _, err := m.store(t, tproxy.Config{}); err == nil {
		t.Error("no error")
	}
	sameText(t, "failed", alone.tree(t), m.tree(t))
	m.onRun = nil
	if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	sameText(t, "uninstalled", before, m.tree(t))
}

// What others keep in a folder of our name is no half of an install.
func TestFilesBesideOurs(t *testing.T) {
	for _, name := range []string{"etc/kuma-tproxy/proxy.yaml", "etc/kuma-tproxy/.git/HEAD"} {
		m := booted(t)
		m.file(t, name, "a: 1\n")
		before := m.tree(t)
		if s, err := m.runner().Status(t.Context()); err != nil || s.State != StateAbsent {
			t.Errorf("%+v, %v", s, err)
		}
		if r, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil || r.Changed {
			t.Errorf("%+v, %v", r, err)
		}
		m.mustStore(t, tproxy.Config{})
		if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
		sameText(t, "uninstalled", before, m.tree(t))
	}
}

// Ours in a direct.xml that was moved, and linked to, since is not passed over: firewalld
// loads it.
func TestRemoveOursBehindLink(t *testing.T) {
	for _, to := range []string{"direct.xml.git", "/etc/firewalld/direct.xml.git"} {
		m := booted(t, "firewalld")
		m.mustStore(t, tproxy.Config{})
		name := filepath.Join(m.root, "etc/firewalld/direct.xml")
		if err := errors.Join(os.Rename(name, name+".git"), os.Symlink(to, name)); err != nil {
			t.Fatal(err)
		}
		before, host := m.tree(t), m.all()
		if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err == nil || !strings.Contains(err.Error(), "is a symbolic link, to "+to) {
			t.Errorf("%v", err)
		}
		sameText(t, "uninstalled", before, m.tree(t))
		sameText(t, "uninstalled", host, m.all())
		m.file(t, "etc/firewalld/direct.xml.git", othersDirect)
		if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
			t.Errorf("of others: %v", err)
		}
	}
}

// A direct.xml that is no file keeps nobody from what does not take it.
func TestDirectIsFolder(t *testing.T) {
	m := booted(t, "firewalld")
	name := filepath.Join(m.root, "etc/firewalld/direct.xml")
	if err := errors.Join(os.Remove(name), os.Mkdir(name, 0o755)); err != nil {
		t.Fatal(err)
	}
	before := m.tree(t)
	if _, err := m.store(t, tproxy.Config{Persist: tproxy.PersistFirewalld}); err == nil || !strings.Contains(err.Error(), "is no regular file") {
		t.Errorf("%v", err)
	}
	for _, by := range []tproxy.Persist{tproxy.PersistNone, tproxy.PersistSystemd} {
		m.mustStore(t, tproxy.Config{Persist: by})
		if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
		sameText(t, by.String(), before, m.tree(t))
	}
}

// Root runs no program that people can replace, as those of a group that they all are in.
func TestUnstable(t *testing.T) {
	for _, test := range []struct {
		mode fs.FileMode
		gid  int
		want string
	}{
		{0o755, 100, ""}, {0o775, 0, ""}, {0o775, 50, ""},
		{0o775, 100, "mode 0775, can be changed by others"}, {0o775, 1000, "can be changed by others"}, {0o757, 0, "can be changed by others"},
	} {
		m := booted(t)
		dir := filepath.Join(m.root, "usr/local/bin")
		if err := errors.Join(os.Chown(dir, 0, test.gid), os.Chmod(dir, test.mode)); err != nil {
			t.Skip(err)
		}
		s, err := m.runner().session()
		if err != nil {
			t.Fatal(err)
		}
		if got := s.unstable(); !strings.Contains(got, test.want) || (got == "") != (test.want == "") {
			t.Errorf("%04o of %d: %q", test.mode, test.gid, got)
		}
	}
}

// The script that tells systemd-resolved leaves no half, which its next start would take
// for done, and no more than an address on the interface.
func TestNamesScript(t *testing.T) {
	dir := t.TempDir()
	program := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
		return p
	}
	ip := program("ip", `cd `+dir+`; echo "$*" >>log
case "$*" in
"link show"*) test -e link ;;
*"route get"*) echo "x via y src 192.0.2.7 uid 0" ;;
"link add"*) touch link ;;
"link delete"*) rm link ;;
esac
`)
	resolvectl := program("resolvectl", `test "$1" = default-route || test -e `+dir+`/up || exit 1`)
	for server, prefix := range map[string]string{"10.0.0.9": "/32", "fd00::9": "/128"} {
		script := filepath.Join(dir, "names.sh")
		if err := os.WriteFile(script, []byte(namesText(ip, resolvectl, netip.MustParseAddr(server))), 0o644); err != nil {
			t.Fatal(err)
		}
		for _, up := range []bool{false, false, true, true} {
			if up {
				program("up", "")
			}
			out, err := osexec.CommandContext(t.Context(), "sh", "-e", script).CombinedOutput()
			if _, gone := os.Stat(filepath.Join(dir, "link")); (err == nil) != up || (gone == nil) != up {
				t.Errorf("%s, %t: %v, %v, %s", server, up, err, gone, out)
			}
		}
		if log, err := os.ReadFile(filepath.Join(dir, "log")); err != nil || !strings.Contains(string(log), "address add 192.0.2.7"+prefix+" dev "+tproxy.MeshLink+"\n") {
			t.Errorf("%s: %s, %v", server, log, err)
		}
		for _, f := range []string{"link", "up", "log"} {
			_ = os.Remove(filepath.Join(dir, f))
		}
	}
}

// Without comments in the kernel the direct rules have none either, and so they are tried.
func TestStoreBare(t *testing.T) {
	m := booted(t, "firewalld")
	tried := false
	m.onRun = func(c command) (result, bool) {
		if strings.Contains(string(c.Stdin), "-m comment") {
			return result{Exit: 2, Stderr: []byte("iptables-restore v1.8.9 (nf_tables): Couldn't load match `comment':No such file or directory\n\nError occurred at line: 5\n")}, true
		}
		tried = tried || slices.Contains(c.Args, "--test")
		return result{}, false
	}
	m.mustStore(t, tproxy.Config{DisableComments: true})
	if text := m.text(t, "etc/firewalld/direct.xml"); !tried || strings.Contains(text, "-m comment") || !strings.Contains(text, "MESH_RECORD") {
		t.Errorf("tried: %t, %s", tried, text)
	}
	if r := m.mustStore(t, tproxy.Config{DisableComments: true}); r.Changed {
		t.Errorf("the same again: %q", r.Steps)
	}
}
