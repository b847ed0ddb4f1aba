package exec

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
)

const confText = "# of the host\r\nsearch example.org\nnameserver 192.0.2.1 \n"

var (
	controlPlane = netip.MustParseAddr("10.0.0.9")
	withNames    = tproxy.Config{DNS: tproxy.DNS{ControlPlane: controlPlane}}
)

// conf gives the machine a resolv.conf.
func (m *fakeMachine) conf(t *testing.T, text string) (path string) {
	t.Helper()
	m.etc = t.TempDir()
	path = filepath.Join(m.etc, "resolv.conf")
	if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
		t.Fatal(err)
	}
	m.files[tproxy.DefaultResolvConf] = text
	return path
}

// probed is the plan of a Config for the machine as it is observed.
func (m *fakeMachine) probed(t *testing.T, c tproxy.Config) (*tproxy.Plan, error) {
	t.Helper()
	if text, err := os.ReadFile(filepath.Join(m.etc, "resolv.conf")); err == nil {
		m.files[tproxy.DefaultResolvConf] = string(text)
	}
	h, err := (&Runner{machine: m}).Probe(context.Background(), c.Needs())
	if err != nil {
		t.Fatal(err)
	}
	h.RemoteShells = nil
	return tproxy.Build(c, h)
}

func (m *fakeMachine) installNames(t *testing.T, c tproxy.Config) *Report {
	t.Helper()
	p, err := m.probed(t, c)
	if err != nil {
		t.Fatal(err)
	}
	r, err := (&Runner{machine: m}).Apply(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func wantFile(t *testing.T, path, want string) {
	t.Helper()
	if text, err := os.ReadFile(path); err != nil || string(text) != want {
		t.Errorf("%s: %q, %v; want %q", filepath.Base(path), text, err, want)
	}
}

func nameservers(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, a := range dns.Parse(text).Nameservers {
		out = append(out, a.String())
	}
	return strings.Join(out, " ")
}

// The nameserver is a step of the plan like any other: in with the rules, the same
// again changes nothing, and out with them, byte for byte, without flags.
func TestNameserver(t *testing.T) {
	m := newFakeMachine(t)
	path := m.conf(t, confText)
	r := m.installNames(t, withNames)
	if got := nameservers(t, path); got != "10.0.0.9 192.0.2.1" || !strings.Contains(strings.Join(r.Steps, "\n"), "nameserver 10.0.0.9 first in ") {
		t.Errorf("nameservers %s, steps %q", got, r.Steps)
	}
	wantFile(t, path+".kuma-backup", confText)
	if r := m.installNames(t, withNames); r.Changed || len(r.Steps) > 0 {
		t.Errorf("the same again: %+v", r)
	}
	dry, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{DryRun: true})
	if err != nil || !strings.Contains(strings.Join(dry.Steps, "\n"), "resolv.conf as it was before the install") {
		t.Errorf("dry run: %q, %v", dry.Steps, err)
	}
	if got := nameservers(t, path); got != "10.0.0.9 192.0.2.1" {
		t.Errorf("after a dry run: %s", got)
	}
	m.uninstall(t)
	wantFile(t, path, confText)
	if left, _ := filepath.Glob(filepath.Join(m.etc, "*")); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", info, err)
	}
}

// K12: what somebody else wrote since stays; only our line goes.
func TestK12NewerResolvConfStays(t *testing.T) {
	m := newFakeMachine(t)
	path := m.conf(t, confText)
	m.installNames(t, withNames)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(text, "options edns0\n"...), 0o640); err != nil {
		t.Fatal(err)
	}
	m.uninstall(t)
	wantFile(t, path, confText+"options edns0\n")
}

// An install that does not ask for it takes a former one's nameserver out; another
// address takes its place.
func TestNameserverOfAnotherInstall(t *testing.T) {
	m := newFakeMachine(t)
	path := m.conf(t, confText)
	m.installNames(t, withNames)
	m.installNames(t, tproxy.Config{DNS: tproxy.DNS{ControlPlane: netip.MustParseAddr("fd00::9")}})
	if got := nameservers(t, path); got != "fd00::9 192.0.2.1" {
		t.Errorf("another address: %s", got)
	}
	m.installNames(t, tproxy.Config{})
	wantFile(t, path, confText)
}

// The record of the install says where the file is: uninstall needs no flag.
func TestNameserverElsewhere(t *testing.T) {
	m := newFakeMachine(t)
	m.conf(t, confText)
	other := filepath.Join(m.etc, "other.conf")
	if err := os.WriteFile(other, []byte(confText), 0o644); err != nil {
		t.Fatal(err)
	}
	c := withNames
	c.DNS.ResolvConf = "/etc/other.conf"
	m.installNames(t, c)
	if got := nameservers(t, other); got != "10.0.0.9 192.0.2.1" {
		t.Errorf("nameservers %s", got)
	}
	m.uninstall(t)
	wantFile(t, other, confText)

	// Where the rules are gone, with a flag.
	m.installNames(t, c)
	for _, n := range m.netfilter {
		*n = *newFakeMachineAt(m.proc).netfilter[prefixes[0]]
	}
	if _, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{ResolvConf: "/etc/other.conf"}); err != nil {
		t.Fatal(err)
	}
	wantFile(t, other, confText)
}

// What cannot be changed is found before anything is written, and refused.
func TestNameserverIsRefused(t *testing.T) {
	m := newFakeMachine(t)
	path := m.conf(t, confText)
	p, err := m.probed(t, withNames)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o755)); err != nil {
		t.Fatal(err)
	}
	before := m.state()
	_, err = m.probed(t, withNames)
	if _, ok := errors.AsType[*tproxy.RefusedError](err); !ok || !strings.Contains(err.Error(), "--modify-resolv-conf=false") {
		t.Errorf("Build: %v", err)
	}
	// And with a file that went bad since the plan was made.
	_, err = (&Runner{machine: m}).Apply(context.Background(), p)
	if e := applyError(t, err); !strings.Contains(e.Remedy, "--modify-resolv-conf=false") {
		t.Errorf("Apply: %v", err)
	}
	m.unchanged(t, before)
}

// A step in front that fails leaves the file alone, and one behind is undone with it:
// here the file goes bad while the rules are written.
func TestNameserverThatFailsIsUndone(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	path := m.conf(t, confText)
	before := m.state()
	p, err := m.probed(t, withNames)
	if err != nil {
		t.Fatal(err)
	}
	m.before("ip6tables-nft-restore", 1, func() {
		if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o755)); err != nil {
			t.Error(err)
		}
	})
	_, err = (&Runner{machine: m}).Apply(context.Background(), p)
	if e := applyError(t, err); len(e.Undone) < 2 || len(e.Left) > 0 {
		t.Errorf("undone %q, left %q: %v", e.Undone, e.Left, err)
	}
	m.unchanged(t, before)
}

// The control plane's server is one of those whose queries are redirected, before the
// first install as after it.
func TestNameserverIsCaptured(t *testing.T) {
	m := newFakeMachine(t)
	m.conf(t, confText)
	c := withNames
	c.DNS.Redirect = true
	m.installNames(t, c)
	p, err := m.probed(t, c)
	if err != nil || len(p.Nameservers) != 2 || p.Nameservers[0] != controlPlane {
		t.Errorf("%v, %v", p.Nameservers, err)
	}
	if r := m.installNames(t, c); r.Changed {
		t.Errorf("the same again: %+v", r)
	}
	without := c
	without.DNS.ControlPlane = netip.Addr{}
	if p, err = m.probed(t, without); err != nil || len(p.Nameservers) != 1 {
		t.Errorf("%v, %v", p.Nameservers, err)
	}
}

// Where nothing answers, a warning names the causes, and the install stands.
func TestControlPlaneThatDoesNotAnswer(t *testing.T) {
	m := newFakeMachine(t)
	m.conf(t, confText)
	m.unanswered = errors.New("connection refused")
	if notes := strings.Join(m.installNames(t, withNames).Notes, "\n"); !strings.Contains(notes, "no DNS server answers at 10.0.0.9:53 (connection refused)") || !strings.Contains(notes, "KUMA_DNS_SERVER_PORT=53") || !strings.Contains(notes, "--redirect-dns") {
		t.Errorf("notes\n%s", notes)
	}
	m.unanswered = nil
	if notes := strings.Join(m.installNames(t, withNames).Notes, "\n"); strings.Contains(notes, "no DNS server") {
		t.Errorf("notes\n%s", notes)
	}
}

// A resolv.conf that cannot be read is no concern of an install that does not ask for
// names, nor of an uninstall of one.
func TestOddResolvConfIsNoConcern(t *testing.T) {
	for name, odd := range map[string]func(path string) error{
		"dangling":  func(path string) error { return os.Symlink("gone", path) },
		"loop":      func(path string) error { return os.Symlink("resolv.conf", path) },
		"directory": func(path string) error { return os.Mkdir(path, 0o755) },
		"binary":    func(path string) error { return os.WriteFile(path, []byte("\x00\xff\n"), 0o644) },
		"too long":  func(path string) error { return os.WriteFile(path, make([]byte, 1<<17), 0o644) },
		"device":    func(path string) error { return os.Symlink("/dev/null", path) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newFakeMachine(t)
			m.populate(t)
			m.etc = t.TempDir()
			if err := odd(filepath.Join(m.etc, "resolv.conf")); err != nil {
				t.Fatal(err)
			}
			before := m.state()
			if r := m.install(t, tproxy.Config{}); !r.Changed {
				t.Errorf("%+v", r)
			}
			m.uninstall(t)
			m.unchanged(t, before)
		})
	}
}

// Where the C library asks systemd-resolved by its socket, no query goes to port 53, and
// an install that is about DNS says so.
func TestNSSwitchIsNoted(t *testing.T) {
	for hosts, want := range map[string]bool{"files mymachines resolve [!UNAVAIL=return] dns": true, "files dns": false} {
		m := newFakeMachine(t)
		m.conf(t, confText)
		m.files["/etc/nsswitch.conf"] = "passwd: files\nhosts: " + hosts + "\n"
		for _, c := range []tproxy.Config{withNames, {DNS: tproxy.DNS{Redirect: true}}, {DNS: tproxy.DNS{CaptureAll: true}}, {}} {
			p, err := m.probed(t, c)
			if err != nil {
				t.Fatal(err)
			}
			about := c.DNS.On() || c.DNS.ControlPlane.IsValid()
			if got := strings.Contains(strings.Join(p.Notes, "\n"), "nsswitch.conf"); got != (want && about) {
				t.Errorf("%s, %+v: notes %q", hosts, c.DNS, p.Notes)
			}
		}
	}
}
