package exec

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
)

// noFiles is a machine whose files about names are not to be touched.
type noFiles struct {
	*fakeMachine
	touched []string
}

func (m *noFiles) readFile(path string) ([]byte, error) {
	m.touched = append(m.touched, path)
	return m.fakeMachine.readFile(path)
}

func (m *noFiles) resolvConf(path string, shared bool) dns.Manager {
	m.touched = append(m.touched, path)
	return m.fakeMachine.resolvConf(path, shared)
}

func (m *noFiles) delegate() dns.DelegateManager {
	m.touched = append(m.touched, dns.DelegatePath)
	return m.fakeMachine.delegate()
}

func (m *noFiles) glob(patterns ...string) []string {
	m.touched = append(m.touched, patterns...)
	return nil
}

// A pod's rules: a nameserver of ours in the host's resolv.conf is the host's, and no
// command looks for it.
func TestFilesElsewhere(t *testing.T) {
	m := &noFiles{fakeMachine: newFakeMachine(t)}
	path := m.conf(t, confText)
	m.installNames(t, withNames)
	if _, err := (&Runner{machine: m.fakeMachine}).Remove(context.Background(), RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	m.installNames(t, withNames) // and its rules are another namespace's: these are gone
	for _, n := range m.netfilter {
		*n = *newFakeMachine(t).netfilter["iptables-nft"]
	}
	before, err := os.ReadFile(path)
	if err != nil || string(before) == confText {
		t.Fatalf("%q, %v", before, err)
	}
	m = &noFiles{fakeMachine: newFakeMachine(t)}
	m.etc, m.files = strings.TrimSuffix(path, "/resolv.conf"), map[string]string{tproxy.DefaultResolvConf: string(before)}
	r := &Runner{machine: m, FilesElsewhere: true}
	c := tproxy.Config{Pod: true, ProxyUIDs: []tproxy.UID{5678}, DNS: tproxy.DNS{Redirect: true, CaptureAll: true}}
	h, err := r.Probe(t.Context(), c.Needs())
	if err != nil || len(h.Nameservers)+len(h.LocalResolvers) > 0 {
		t.Fatalf("%+v, %v", h, err)
	}
	plan, err := tproxy.Build(c, h)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(t.Context(), plan); err != nil {
		t.Fatal(err)
	}
	if s, err := r.Status(t.Context()); err != nil || s.State != StateInstalled {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := r.Snapshot(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := r.Remove(t.Context(), RemoveOptions{}); err != nil {
		t.Error(err)
	}
	if s, err := r.Status(t.Context()); err != nil || s.State != StateAbsent {
		t.Errorf("%+v, %v", s, err)
	}
	// The lists of conntrack are none of these.
	if i := slices.IndexFunc(m.touched, func(p string) bool { return !strings.HasPrefix(p, "/proc/") }); i >= 0 {
		t.Errorf("touched: %q", m.touched)
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Errorf("%q became %q, %v", before, after, err)
	}
	// What takes those files cannot be had.
	c.DNS = tproxy.DNS{ControlPlane: controlPlane}
	if h, err = r.Probe(t.Context(), c.Needs()); err != nil || !strings.Contains(h.Nameserver.Refused, tproxy.DefaultResolvConf) {
		t.Errorf("%+v, %v", h.Nameserver, err)
	}
	if _, err := tproxy.Build(c, h); !errors.As(err, new(*tproxy.RefusedError)) {
		t.Errorf("%v", err)
	}
}

// recorder is a machine that keeps what was started.
type recorder struct {
	*fakeMachine
	lockFiles, asked []string
}

func (m *recorder) run(ctx context.Context, c command) (result, error) {
	m.lockFiles = append(m.lockFiles, c.LockFile)
	return m.fakeMachine.run(ctx, c)
}

func (m *recorder) lockHolder(file string) (int, string, bool) {
	m.asked = append(m.asked, file)
	return 0, "", false
}

// Every process gets the lock of iptables-legacy that the Runner names, and who holds it is
// looked up there.
func TestLockFile(t *testing.T) {
	m := &recorder{fakeMachine: newFakeMachine(t)}
	r := &Runner{machine: m, LockFile: "/run/netns/pod"}
	c := tproxy.Config{Backend: tproxy.IPTablesLegacy, Wait: -1}
	h, err := r.Probe(t.Context(), c.Needs())
	if err != nil {
		t.Fatal(err)
	}
	h.RemoteShells = nil
	plan, err := tproxy.Build(c, h)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(t.Context(), plan); err != nil {
		t.Fatal(err)
	}
	all := slices.Concat(m.lockFiles, m.asked)
	if len(m.lockFiles) < 2 || len(m.asked) == 0 || slices.ContainsFunc(all, func(f string) bool { return f != "/run/netns/pod" }) {
		t.Errorf("started with %q, asked for %q", m.lockFiles, m.asked)
	}
	// The real one hands it to the process.
	got, err := system{}.run(t.Context(), command{Path: "/usr/bin/env", LockFile: "/x/y"})
	if err != nil || !strings.Contains(string(got.Stdout), "\nXTABLES_LOCKFILE=/x/y\n") {
		t.Errorf("%s, %v", got.Stdout, err)
	}
}
