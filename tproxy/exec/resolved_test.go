package exec

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// systemd is what a host shows on which systemd-resolved manages resolv.conf.
type systemd struct{ version int }

const stubFile = "/run/systemd/resolve/stub-resolv.conf"

func (systemd) Lstat(name string) (dns.Info, error) {
	switch {
	case name == dns.DefaultPath:
		return dns.Info{Kind: dns.Symlink}, nil
	case name == stubFile:
		return dns.Info{Kind: dns.Regular, ID: "1"}, nil
	case strings.HasPrefix(stubFile, name+"/"), name == "/etc":
		return dns.Info{Kind: dns.Directory}, nil
	}
	return dns.Info{}, fs.ErrNotExist
}

func (systemd) ReadFile(name string, _ int) ([]byte, error) {
	if name == stubFile {
		return []byte("nameserver 127.0.0.53\n"), nil
	}
	return nil, fs.ErrNotExist
}

func (systemd) Readlink(string) (string, error) { return ".." + stubFile, nil }

func (s systemd) Glob(pattern string) []string {
	name := fmt.Sprintf("/usr/lib/systemd/libsystemd-shared-%d.so", s.version)
	if ok, _ := path.Match(pattern, name); ok {
		return []string{name}
	}
	return nil
}

// withSystemd makes the machine a host with a systemd of that version, whose
// systemd-resolved answers on the bus.
func (m *fakeMachine) withSystemd(t *testing.T, version int) {
	m.etc, m.resolved, m.init = t.TempDir(), systemd{version}, "host"
	m.files[tproxy.DefaultResolvConf] = "nameserver 127.0.0.53\n"
	m.routes = map[netip.Addr]kernel.Route{
		controlPlane:                     {Interface: "eth0", Source: netip.MustParseAddr("10.0.0.2")},
		netip.MustParseAddr("10.0.0.10"): {Interface: "eth0", Source: netip.MustParseAddr("10.0.0.2")},
	}
	m.bus = newBus(m).call
}

// bus is systemd-resolved as busctl(1) speaks to it.
type bus struct {
	m     *fakeMachine
	links map[uint32]map[string]string // by index, the property and its value
	fail  string                       // a method that fails
	deaf  int                          // how often it does not know an interface yet
}

func newBus(m *fakeMachine) *bus {
	return &bus{m: m, links: map[uint32]map[string]string{}}
}

func (b *bus) call(args []string) result {
	args = slices.DeleteFunc(slices.Clone(args), func(a string) bool { return strings.HasPrefix(a, "--") })
	no := func(why string) result { return result{Exit: 1, Stderr: []byte("Call failed: " + why)} }
	if b.m.dead {
		return no("killed")
	}
	if args[0] == "get-property" {
		i, err := strconv.ParseUint(string(rune(unhex(args[2][len(resolve1Path+"/link/_"):][:2])))+args[2][len(resolve1Path+"/link/_")+2:], 10, 32)
		if err != nil || uint32(i) != b.m.link.Index {
			return no("no such object")
		}
		var out strings.Builder
		for _, p := range args[4:] {
			fmt.Fprintln(&out, b.links[uint32(i)][p])
		}
		return result{Stdout: []byte(out.String())}
	}
	method, signature, rest := strings.TrimPrefix(args[4], "SetLink"), args[5], args[6:]
	i, _ := strconv.ParseUint(rest[0], 10, 32)
	switch {
	case args[0] != "call" || args[3] != resolve1+".Manager":
		return no("unknown method")
	case method == b.fail:
		return no("refused")
	case b.deaf > 0:
		b.deaf--
		return no("Link " + rest[0] + " not known")
	case uint32(i) != b.m.link.Index || b.m.link.Index == 0:
		return no("Link " + rest[0] + " not known")
	}
	b.m.writes++
	if b.links[uint32(i)] == nil {
		b.links[uint32(i)] = map[string]string{}
	}
	value := strings.Join(rest[1:], " ")
	switch signature = strings.TrimPrefix(signature, "i"); signature {
	case "s":
		value = strconv.Quote(value)
	case "a(sb)":
		value = fmt.Sprintf("%s %q %s", rest[1], rest[2], rest[3])
	}
	b.links[uint32(i)][method] = signature + " " + value
	return result{}
}

func unhex(s string) byte {
	n, _ := strconv.ParseUint(s, 16, 8)
	return byte(n)
}

// everything is what an install changes; empty tables may stay.
func (m *fakeMachine) everything(t *testing.T) string {
	t.Helper()
	var out strings.Builder
	for line := range strings.Lines(m.all()) {
		if !strings.HasPrefix(line, "*") && !strings.HasPrefix(line, ":") && !strings.HasPrefix(line, "#") && line != "COMMIT\n" {
			out.WriteString(line)
		}
	}
	err := filepath.WalkDir(m.etc, func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			text, _ := os.ReadFile(name)
			out.WriteString(name + ": " + string(text) + "\n")
		} else if err == nil {
			out.WriteString(name + "\n")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// The names of the mesh are a step of the plan like any other, by either way: in with
// the rules, the same again changes nothing, another address takes the place of the
// first, and out without flags.
func TestSplitNames(t *testing.T) {
	for _, version := range []int{252, 258} {
		t.Run(strconv.Itoa(version), func(t *testing.T) {
			m := newFakeMachine(t)
			m.withSystemd(t, version)
			m.lastLink = 41
			before := m.everything(t)
			p, err := m.probed(t, withNames)
			if err != nil {
				t.Fatal(err)
			}
			link := version < 258
			if _, has := p.Rules.Chain(rules.Mangle, "KUMA_MESH_NAMES"); has != link {
				t.Errorf("a chain for the interface of ours: %v", has)
			}
			if now := m.everything(t); now != before {
				t.Errorf("looking changed\n%s\nto\n%s", before, now)
			}
			r := m.installNames(t, withNames)
			done := strings.Join(r.Steps, "\n")
			if !strings.Contains(done, "names in .mesh to 10.0.0.9") || strings.Contains(done, "nameserver") {
				t.Errorf("steps %q", r.Steps)
			}
			if link != (m.link.Index != 0) {
				t.Errorf("interface %+v", m.link)
			}
			if r := m.installNames(t, withNames); r.Changed || len(r.Steps) > 0 {
				t.Errorf("the same again: %q", r.Steps)
			}
			other := tproxy.Config{DNS: tproxy.DNS{ControlPlane: netip.MustParseAddr("10.0.0.10")}}
			if r := m.installNames(t, other); !strings.Contains(strings.Join(r.Steps, "\n"), "names in .mesh to 10.0.0.10") {
				t.Errorf("another address: %q", r.Steps)
			}
			m.installNames(t, tproxy.Config{})
			if m.link.Index != 0 {
				t.Errorf("after an install without: %+v", m.link)
			}
			m.installNames(t, withNames)
			dry, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{DryRun: true})
			if err != nil || !strings.Contains(strings.Join(dry.Steps, "\n"), "any more") {
				t.Errorf("dry run: %q, %v", dry.Steps, err)
			}
			m.uninstall(t)
			if now := m.everything(t); now != before {
				t.Errorf("after the uninstall\n%s\nbefore\n%s", now, before)
			}
		})
	}
}

// A systemd that was upgraded splits in the other way: the new one is in before the
// old one goes.
func TestSplitNamesInTheOtherWay(t *testing.T) {
	m := newFakeMachine(t)
	m.withSystemd(t, 257)
	before := m.everything(t)
	m.installNames(t, withNames)
	m.resolved = systemd{258}
	r := m.installNames(t, withNames)
	if m.link.Index != 0 || !strings.Contains(r.Steps[len(r.Steps)-1], "no interface kuma-mesh any more") {
		t.Errorf("interface %+v, steps %q", m.link, r.Steps)
	}
	m.uninstall(t)
	if now := m.everything(t); now != before {
		t.Errorf("after the uninstall\n%s\nbefore\n%s", now, before)
	}
}

// Somebody changed what systemd-resolved knows of the interface: install puts it right.
func TestSplitNamesAreRepaired(t *testing.T) {
	m := newFakeMachine(t)
	m.withSystemd(t, 252)
	b := newBus(m)
	m.bus = b.call
	b.deaf = 3 // it hears of the interface a moment later
	m.installNames(t, withNames)
	for name, spoil := range map[string]func(){
		"default route": func() { b.links[m.link.Index]["DefaultRoute"] = "b true" },
		"server":        func() { b.links[m.link.Index]["DNS"] = "a(iay) 1 2 4 10 0 0 1" },
		"no server":     func() { b.links[m.link.Index]["DNS"] = "a(iay) 0" },
		"down":          func() { m.link.Up = false },
		"address":       func() { m.link.Addresses = nil },
		"gone":          func() { m.link = kernel.Link{} },
	} {
		spoil()
		if r := m.installNames(t, withNames); !r.Changed {
			t.Errorf("%s: nothing changed", name)
		}
		if got := b.links[m.link.Index]; got["DNS"] != "a(iay) 1 2 4 10 0 0 9" || got["DefaultRoute"] != "b false" || got["Domains"] != `a(sb) 1 "mesh" true` || got["DNSSEC"] != `s "no"` {
			t.Errorf("%s: %v", name, got)
		}
		if r := m.installNames(t, withNames); r.Changed {
			t.Errorf("%s, again: %q", name, r.Steps)
		}
	}
}

// What fails is undone, with the rules; the error says what.
func TestSplitNamesFail(t *testing.T) {
	for _, method := range []string{"DefaultRoute", "Domains", "DNS"} {
		m := newFakeMachine(t)
		m.withSystemd(t, 252)
		b := newBus(m)
		m.bus = b.call
		before := m.everything(t)
		p, err := m.probed(t, withNames)
		if err != nil {
			t.Fatal(err)
		}
		b.fail = method
		_, err = (&Runner{machine: m}).Apply(context.Background(), p)
		e, ok := errors.AsType[*ApplyError](err)
		if !ok || !strings.Contains(e.Step, "names in .mesh") || !strings.Contains(err.Error(), "SetLink"+method) || len(e.Left) > 0 || len(e.Undone) == 0 {
			t.Errorf("%s: %v", method, err)
		}
		if now := m.everything(t); now != before {
			t.Errorf("%s: afterwards\n%s\nbefore\n%s", method, now, before)
		}
		// Over an install with another address, that one stays.
		b.fail = ""
		m.installNames(t, withNames)
		was := m.everything(t)
		p, err = m.probed(t, tproxy.Config{DNS: tproxy.DNS{ControlPlane: netip.MustParseAddr("10.0.0.10")}})
		if err != nil {
			t.Fatal(err)
		}
		first := true
		m.bus = func(args []string) result {
			if first && slices.Contains(args, "SetLink"+method) {
				first = false
				return result{Exit: 1, Stderr: []byte("refused")}
			}
			return b.call(args)
		}
		if _, err = (&Runner{machine: m}).Apply(context.Background(), p); err == nil {
			t.Errorf("%s: no error", method)
		}
		if now := m.everything(t); now != was {
			t.Errorf("%s: the former install is\n%s\nwas\n%s", method, now, was)
		}
		if got := b.links[m.link.Index]["DNS"]; got != "a(iay) 1 2 4 10 0 0 9" {
			t.Errorf("%s: the former server is %s", method, got)
		}
	}
}

// What could not be put back is said.
func TestSplitNamesCannotBePutBack(t *testing.T) {
	m := newFakeMachine(t)
	m.withSystemd(t, 252)
	b := newBus(m)
	m.bus = b.call
	m.installNames(t, withNames)
	p, err := m.probed(t, tproxy.Config{DNS: tproxy.DNS{ControlPlane: netip.MustParseAddr("10.0.0.10")}})
	if err != nil {
		t.Fatal(err)
	}
	b.fail = "Domains"
	_, err = (&Runner{machine: m}).Apply(context.Background(), p)
	e, ok := errors.AsType[*ApplyError](err)
	if !ok || len(e.Left) != 1 || !strings.Contains(e.Left[0], "the interface kuma-mesh as it was") || !strings.Contains(e.Left[0], "SetLinkDomains") {
		t.Errorf("%v", err)
	}
}

// A systemd-resolved that does not read its files again is no success either.
func TestReloadFails(t *testing.T) {
	m := newFakeMachine(t)
	m.withSystemd(t, 258)
	before := m.everything(t)
	m.onRun = func(c command) (result, bool) {
		return result{Exit: 1, Stderr: []byte("Job failed.")}, filepath.Base(c.Path) == "systemctl"
	}
	p, err := m.probed(t, withNames)
	if err != nil {
		t.Fatal(err)
	}
	_, err = (&Runner{machine: m}).Apply(context.Background(), p)
	e, ok := errors.AsType[*ApplyError](err)
	if !ok || !strings.Contains(err.Error(), "systemctl try-reload-or-restart systemd-resolved.service: exit code 1: Job failed.") || len(e.Left) > 0 {
		t.Errorf("%v", err)
	}
	if now := m.everything(t); now != before {
		t.Errorf("afterwards\n%s\nbefore\n%s", now, before)
	}
}

// One that does not read its files again keeps no uninstall from taking them out.
func TestUninstallReloadFails(t *testing.T) {
	m := newFakeMachine(t)
	m.withSystemd(t, 258)
	before := m.everything(t)
	m.installNames(t, withNames)
	m.onRun = func(c command) (result, bool) {
		return result{Exit: 1, Stderr: []byte("Job failed.")}, filepath.Base(c.Path) == "systemctl"
	}
	m.uninstall(t)
	if now := m.everything(t); now != before {
		t.Errorf("afterwards\n%s\nbefore\n%s", now, before)
	}
}

// Where systemd is gone since, an uninstall takes the file out all the same.
func TestUninstallWhereSystemctlIsGone(t *testing.T) {
	m := newFakeMachine(t)
	m.withSystemd(t, 258)
	before := m.everything(t)
	m.installNames(t, withNames)
	m.missing["systemctl"] = true
	m.uninstall(t)
	if now := m.everything(t); now != before {
		t.Errorf("afterwards\n%s\nbefore\n%s", now, before)
	}
	p, err := m.probed(t, withNames)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (&Runner{machine: m}).Apply(context.Background(), p); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "systemctl") {
		t.Errorf("an install: %v", err)
	}
}

// An interface that systemd-resolved says nothing of, as after a kill or while it does
// not run, goes with an uninstall, and with an install that has no use for it.
func TestHalfAnInterfaceGoes(t *testing.T) {
	for name, spoil := range map[string]func(*fakeMachine){
		"no settings":         func(m *fakeMachine) { m.bus = newBus(m).call },
		"resolved is stopped": func(m *fakeMachine) { m.bus = func([]string) result { return result{Exit: 1} } },
		"no busctl":           func(m *fakeMachine) { m.missing["busctl"] = true },
		"no address":          func(m *fakeMachine) { m.link.Addresses = nil },
	} {
		for _, again := range []bool{false, true} {
			m := newFakeMachine(t)
			m.withSystemd(t, 252)
			before := m.everything(t)
			m.installNames(t, withNames)
			spoil(m)
			if again {
				m.installNames(t, tproxy.Config{})
			} else {
				m.uninstall(t)
			}
			if m.link.Index != 0 {
				t.Errorf("%s, install %v: %+v stays", name, again, m.link)
			}
			m.uninstall(t)
			if now := m.everything(t); now != before {
				t.Errorf("%s, install %v: afterwards\n%s\nbefore\n%s", name, again, now, before)
			}
		}
	}
}

// Where it cannot be, nothing is changed and the reason is said.
func TestSplitNamesAreRefused(t *testing.T) {
	for name, test := range map[string]struct {
		version int
		change  func(*fakeMachine)
		want    string
	}{
		"another network namespace": {258, func(m *fakeMachine) { m.init = "elsewhere" }, "another network namespace"},
		"interface of others":       {252, func(m *fakeMachine) { m.link = kernel.Link{Index: 7} }, "is not ours"},
		"no way":                    {252, func(m *fakeMachine) { m.routes = nil }, "no way to the control plane"},
		"file of others": {258, func(m *fakeMachine) {
			dir := filepath.Join(m.etc, "dns-delegate.d")
			if os.Mkdir(dir, 0o755) != nil || os.WriteFile(filepath.Join(dir, filepath.Base(dns.DelegatePath)), []byte("[Delegate]\n"), 0o644) != nil {
				panic(dir)
			}
		}, "is not ours"},
	} {
		m := newFakeMachine(t)
		m.withSystemd(t, test.version)
		test.change(m)
		before := m.everything(t)
		_, err := m.probed(t, withNames)
		if _, ok := errors.AsType[*tproxy.RefusedError](err); !ok || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", name, err)
		}
		m.installNames(t, tproxy.Config{})
		m.uninstall(t)
		if now := m.everything(t); now != before {
			t.Errorf("%s: afterwards\n%s\nbefore\n%s", name, now, before)
		}
	}
}

func TestBusAddress(t *testing.T) {
	for _, a := range []string{"10.0.0.9", "fd00::9"} {
		a := netip.MustParseAddr(a)
		if got, ok := readBusAddress("a(iay) " + busAddresses(a)); !ok || got != a {
			t.Errorf("%s: %s", a, got)
		}
	}
	for _, bad := range []string{"", "a(iay) 0", "a(iay) 1 2 4 10 0 0", "a(iay) 2 2 4 10 0 0 9 2 4 10 0 0 8", "a(iay) 1 2 4 10 0 0 999", "a(iay) 1 10 4 10 0 0 9", "s 1 2 4 10 0 0 9"} {
		if got, ok := readBusAddress(bad); ok {
			t.Errorf("%q: %s", bad, got)
		}
	}
	for index, want := range map[uint32]string{4: "/org/freedesktop/resolve1/link/_34", 12: "/org/freedesktop/resolve1/link/_312"} {
		if got := linkPath(index); got != want {
			t.Errorf("%d: %s", index, got)
		}
	}
}
