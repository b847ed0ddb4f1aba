package exec

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/procfs"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// The test binary under another name is a program of iptables, with its rules
// in files of fakeDir: it is started as a process, by the real machine. It ends
// before any test or TestMain begins.
func init() {
	if exit, ok := fakeProgram(); ok {
		os.Exit(exit)
	}
}

// fakeDir is the variable that makes the test binary a fake program.
const fakeDir = "KUMA_TPROXY_FAKE_DIR"

// answer is what a program is told to do instead of its work.
type answer struct {
	Stdout, Stderr string
	Exit           int
	Killed         bool // by SIGKILL
	Work           bool // and then fail as it says
}

// fakeProgram does the work of the program that the binary was started as; ok
// is false where that is no program.
func fakeProgram() (exit int, ok bool) {
	dir, name := os.Getenv(fakeDir), filepath.Base(os.Args[0])
	if dir == "" || strings.HasSuffix(name, ".test") {
		return 0, false
	}
	fail := func(err error) (int, bool) {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		return 1, true
	}
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fail(err)
	}
	fmt.Fprintf(log, "%s LC_ALL=%s\n", strings.Join(append([]string{name}, os.Args[1:]...), " "), os.Getenv("LC_ALL"))
	log.Close()
	key := name
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		key += "--version"
	}
	path := filepath.Join(dir, key+".json")
	if text, err := os.ReadFile(path); err == nil {
		if !strings.HasSuffix(key, "--version") {
			os.Remove(path) // once: what is undone is no failure
		}
		var a answer
		if err := json.Unmarshal(text, &a); err != nil {
			return fail(err)
		}
		if a.Work {
			if err := work(dir, name, io.Discard); err != nil {
				return fail(err)
			}
		}
		io.WriteString(os.Stdout, a.Stdout)
		io.WriteString(os.Stderr, a.Stderr)
		if a.Killed {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			time.Sleep(time.Minute)
		}
		return a.Exit, true
	}
	if key != name {
		variant := "nf_tables"
		if strings.Contains(name, "legacy") {
			variant = "legacy"
		}
		fmt.Printf("%s v1.8.9 (%s)\n", name, variant)
		return 0, true
	}
	if err := work(dir, name, os.Stdout); err != nil {
		return fail(err)
	}
	return 0, true
}

// work is save's or restore's. The rules are the scripts so far.
func work(dir, name string, out io.Writer) error {
	prefix, verb := name[:strings.LastIndexByte(name, '-')], name[strings.LastIndexByte(name, '-')+1:]
	n, err := fakeRules(dir, prefix)
	if err != nil {
		return err
	}
	switch verb {
	case "save":
		_, err := out.Write(n.Save())
		return err
	case "restore":
		script, err := io.ReadAll(os.Stdin)
		if err != nil {
			return err
		}
		if err := n.Restore(script, nil); err != nil {
			return err
		}
		f, err := os.OpenFile(filepath.Join(dir, prefix+".scripts"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		f.Write(script)
		return f.Close()
	}
	return fmt.Errorf("no such program")
}

func fakeRules(dir, prefix string) (*tproxytest.Netfilter, error) {
	n := &tproxytest.Netfilter{Family: rules.IPv4, Generator: prefix + "-save v1.8.9"}
	if strings.HasPrefix(prefix, "ip6") {
		n.Family = rules.IPv6
	}
	if strings.Contains(prefix, "nft") {
		n.Generator += " (nf_tables)"
	}
	script, err := os.ReadFile(filepath.Join(dir, prefix+".scripts"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return n, n.Restore(script, nil)
}

// fakeHost is the real machine, which starts processes and looks for programs,
// over fake programs and with everything else made up: the rules and addresses
// of this one are neither read nor written.
type fakeHost struct {
	system
	t         *testing.T
	dir       string // rules and answers
	bin       string // on PATH
	addresses map[netip.Prefix]bool
	proc      string
	holder    string // of the xtables lock
}

// newFakeHost has the programs of those prefixes.
func newFakeHost(t *testing.T, prefixes ...string) *fakeHost {
	h := &fakeHost{t: t, dir: t.TempDir(), bin: t.TempDir(), addresses: make(map[netip.Prefix]bool), proc: fakeProc(t)}
	for _, p := range prefixes {
		h.program(p)
		h.program(p + "-save")
		h.program(p + "-restore")
	}
	t.Setenv(fakeDir, h.dir)
	t.Setenv("PATH", h.bin)
	t.Setenv("GORACE", "atexit_sleep_ms=0") // with -race each process would sleep a second at its end
	dirs := programDirs
	programDirs = nil
	t.Cleanup(func() { programDirs = dirs })
	return h
}

func (h *fakeHost) program(name string) {
	h.t.Helper()
	self, err := os.Executable()
	if err == nil {
		err = os.Symlink(self, filepath.Join(h.bin, name))
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// will tells a program, or one with --version, what to do.
func (h *fakeHost) will(name string, a answer) {
	h.t.Helper()
	text, err := json.Marshal(a)
	if err == nil {
		err = os.WriteFile(filepath.Join(h.dir, strings.ReplaceAll(name, " ", "")+".json"), text, 0o600)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// log returns what was started since, one a line.
func (h *fakeHost) log() []string {
	h.t.Helper()
	path := filepath.Join(h.dir, "log")
	text, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	os.Remove(path)
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

// others puts a rule of somebody else's there, and with it a table.
func (h *fakeHost) others(prefixes ...string) {
	h.t.Helper()
	for _, p := range prefixes {
		if err := os.WriteFile(filepath.Join(h.dir, p+".scripts"), []byte("*nat\n-A OUTPUT -p tcp -m tcp --dport 9 -j ACCEPT\nCOMMIT\n"), 0o600); err != nil {
			h.t.Fatal(err)
		}
	}
}

func (h *fakeHost) rules(prefix string) string {
	h.t.Helper()
	n, err := fakeRules(h.dir, prefix)
	if err != nil {
		h.t.Fatal(err)
	}
	return string(n.Save())
}

func (h *fakeHost) of(nft bool, f rules.Family) *fakeMachine {
	m := newFakeMachineAt(h.proc)
	for p := range m.netfilter {
		n, err := fakeRules(h.dir, p)
		if err != nil {
			h.t.Fatal(err)
		}
		m.netfilter[p] = n
	}
	return m
}

func (h *fakeHost) tables(nft bool, f rules.Family) ([]rules.Table, error) {
	return h.of(nft, f).tables(nft, f)
}

func (h *fakeHost) chains(nft bool, f rules.Family, t rules.Table) ([]string, error) {
	return h.of(nft, f).chains(nft, f, t)
}

func (h *fakeHost) hasRules(nft bool, f rules.Family, t rules.Table) (bool, error) {
	return h.of(nft, f).hasRules(nft, f, t)
}

func (h *fakeHost) send(_ uint32, to netip.AddrPort) (netip.AddrPort, error) {
	return to, nil
}
func (h *fakeHost) foreignTables() ([]string, error)        { return nil, nil }
func (h *fakeHost) ipv6Off() (bool, string, error)          { return false, "", nil }
func (h *fakeHost) localAddresses() ([]netip.Prefix, error) { return nil, nil }
func (h *fakeHost) hasAddress(a netip.Addr) (bool, error)   { return h.addresses[hostPrefix(a)], nil }
func (h *fakeHost) lockHolder(string) (int, string, bool)   { return 77, h.holder, h.holder != "" }
func (h *fakeHost) privileged() error                       { return nil }
func (h *fakeHost) procs() procfs.FS {
	return procfs.FS{Root: h.proc, FileRoot: h.proc, UnitDirs: []string{}}
}
func (h *fakeHost) readFile(string) ([]byte, error) { return nil, fs.ErrNotExist }
func (h *fakeHost) delAddress(p netip.Prefix) (bool, error) {
	was := h.addresses[p]
	delete(h.addresses, p)
	return was, nil
}

func (h *fakeHost) addAddress(p netip.Prefix) (bool, error) {
	was := h.addresses[p]
	h.addresses[p] = true
	return !was, nil
}

func (h *fakeHost) lock(context.Context, time.Duration) (lock, error) {
	return lock{unlock: func() {}}, nil
}

func (h *fakeHost) plan(c tproxy.Config) *tproxy.Plan {
	h.t.Helper()
	host, err := (&Runner{machine: h}).Probe(context.Background(), c.Needs())
	if err != nil {
		h.t.Fatalf("Probe: %v", err)
	}
	p, err := tproxy.Build(c, host)
	if err != nil {
		h.t.Fatalf("Build: %v", err)
	}
	return p
}

// noNFTables: it is about programs.
func (h *fakeHost) noNFTables() string { return "a host of programs alone" }

func (h *fakeHost) tracked() (bool, error) { return false, nil }
