package exec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// These tests start real processes: the programs of fakeprogram_test.go.

// Two processes a family, and one where it has no table: nothing is there to be saved.
func TestProcesses(t *testing.T) {
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		for _, fresh := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/fresh=%t", b, fresh), func(t *testing.T) {
				v4, v6 := b.String(), "ip6"+strings.TrimPrefix(b.String(), "ip")
				h := newFakeHost(t, v4, v6)
				want := []string{v4 + "-restore --noflush --wait=5 LC_ALL=C", v6 + "-restore --noflush --wait=5 LC_ALL=C"}
				if !fresh {
					h.others(v4, v6)
					want = append([]string{v4 + "-save LC_ALL=C", v6 + "-save LC_ALL=C"}, want...)
				}
				r := Runner{machine: h}
				p := h.plan(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
				h.log()
				report, err := r.Apply(context.Background(), p)
				if err != nil {
					t.Fatal(err)
				}
				same(t, "processes", h.log(), want)
				if !h.addresses[passthrough6] || report.Processes != len(want) || report.Backend != b || report.Why != "the only one with all its programs here" {
					t.Errorf("%d processes, %s: %s", report.Processes, report.Backend, report.Why)
				}
				if report, err = r.Apply(context.Background(), h.plan(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})); err != nil || report.Changed {
					t.Errorf("the same again: %v", err)
				}
				if _, err := r.Remove(context.Background(), RemoveOptions{}); err != nil {
					t.Fatal(err)
				}
				if s := h.rules(v4) + h.rules(v6); strings.Contains(s, "KUMA") || len(h.addresses) > 0 {
					t.Errorf("left: %s", s)
				}
			})
		}
	}
}

// lineOf finds a line of a script.
func lineOf(t *testing.T, script []byte, part string) int {
	t.Helper()
	for i, l := range bytes.Split(script, []byte("\n")) {
		if bytes.Contains(l, []byte(part)) {
			return i + 1
		}
	}
	t.Fatalf("no line with %q in\n%s", part, script)
	return 0
}

func TestRestoreFailures(t *testing.T) {
	const (
		nft    = "iptables-nft-restore v1.8.9 (nf_tables): "
		legacy = "iptables-restore v1.8.9 (legacy): "
		locked = "Can't lock /run/xtables.lock: Resource temporarily unavailable\nAnother app is currently holding the xtables lock. Stopped waiting after 5s.\n"
	)
	for _, c := range []struct {
		name   string
		legacy bool
		holder string
		stderr string // %d is the line of the rule
		rule   string // a part of a line of the script
		a      answer
		is     error // nil: none of our sentinels
		remedy string
		says   string
	}{
		{name: "a line failed", legacy: true, stderr: "iptables-restore: line %d failed\n", rule: "--uid-owner", a: answer{Exit: 1}},
		{name: "a commit failed", legacy: true, stderr: "iptables-restore: line %d failed\n", rule: "COMMIT", a: answer{Exit: 1}},
		{name: "syntax", stderr: nft + "Bad argument `x'\nError occurred at line: %d\nTry `iptables-nft-restore -h' or 'iptables-nft-restore --help' for more information.\n", rule: "--dport 22", a: answer{Exit: 2}},
		{name: "chain gone", stderr: nft + "Chain 'KUMA_MESH_INBOUND' does not exist\nError occurred at line: %d\n", rule: "-A PREROUTING", a: answer{Exit: 2}},
		{name: "nothing said", a: answer{Exit: 1}, says: "exit code 1"},
		{name: "killed", a: answer{Killed: true}, says: "killed by a signal"},
		{name: "killed by a shell's account", a: answer{Exit: 137}, says: "exit code 137"},
		{name: "locked", legacy: true, holder: "kube-proxy", stderr: locked, a: answer{Exit: 4}, is: ErrLocked, remedy: "process 77 (kube-proxy) holds the xtables lock"},
		{name: "locked by nobody knows", legacy: true, stderr: locked, a: answer{Exit: 4}, is: ErrLocked, remedy: "somebody held the xtables lock"},
		{name: "read-only /run", legacy: true, holder: "kube-proxy", stderr: "Fatal: can't open lock file /run/xtables.lock: Read-only file system\n", a: answer{Exit: 4}, remedy: "XTABLES_LOCKFILE"},
		{name: "EAGAIN is no lock", holder: "kube-proxy", stderr: nft + "\nline %d: RULE_APPEND failed (Resource temporarily unavailable): rule in chain KUMA_MESH_INBOUND\n", rule: "--dport 22", a: answer{Exit: 4}},
		{name: "no match in the kernel", stderr: nft + "\nline %d: RULE_APPEND failed (No such file or directory): rule in chain KUMA_MESH_OUTBOUND\n", rule: "-A KUMA_MESH_OUTBOUND -m owner --uid-owner", a: answer{Exit: 4}, is: ErrNoModule, remedy: "modprobe xt_owner"},
		{name: "no target in the kernel", stderr: nft + "\nline %d: RULE_APPEND failed (No such file or directory): rule in chain KUMA_MESH_INBOUND\n", rule: "-j REDIRECT --to-ports 15006", a: answer{Exit: 4}, is: ErrNoModule, remedy: "modprobe xt_REDIRECT"},
		{name: "revision", stderr: "Warning: Extension addrtype revision 0 not supported, missing kernel module?\n" + nft + "line %d: RULE_APPEND failed (No such file or directory): rule in chain PREROUTING\n", rule: "-A PREROUTING", a: answer{Exit: 4}, is: ErrNoModule, remedy: "modprobe xt_addrtype"},
		{name: "no match installed", legacy: true, stderr: legacy + "Couldn't load match `owner':No such file or directory\n\nError occurred at line: %d\n", rule: "--uid-owner", a: answer{Exit: 2}, is: ErrNoModule, remedy: "modprobe xt_owner"},
		{name: "no CT", stderr: nft + "Couldn't load target `CT':No such file or directory\n\nError occurred at line: %d\n", rule: "-j CT", a: answer{Exit: 2}, is: ErrNoModule, remedy: "modprobe xt_CT, or leave the zones out with --skip-dns-conntrack-zone-split"},
		{name: "no comment", stderr: nft + "Couldn't load match `comment':No such file or directory\n\nError occurred at line: %d\n", rule: "-m comment", a: answer{Exit: 2}, is: ErrNoModule, remedy: "modprobe xt_comment, or leave the comments out with --disable-comments"},
		{name: "no table", legacy: true, stderr: legacy + "iptables-restore: unable to initialize table 'nat'\nError occurred at line: 1\ncan't initialize iptables table `nat': Table does not exist (do you need to insmod?)\n", a: answer{Exit: 1}, is: ErrNoModule, remedy: "iptable_nat"},
		{name: "which module is not said", legacy: true, stderr: "iptables-restore: line %d failed: No chain/target/match by that name.\n", rule: "COMMIT", a: answer{Exit: 1}, is: ErrNoModule, remedy: "modprobe -a iptable_nat iptable_raw ip6table_nat ip6table_raw xt_owner xt_REDIRECT xt_addrtype"},
		{name: "no nf_tables", stderr: nft + "Could not fetch rule set generation id: Invalid argument\n", a: answer{Exit: 4}, is: ErrNoModule, remedy: "nf_tables"},
		{name: "not root", legacy: true, stderr: legacy + "can't initialize iptables table `nat': Permission denied (you must be root)\n", a: answer{Exit: 3}, is: ErrNotRoot, remedy: "CAP_NET_ADMIN"},
		{name: "seccomp", stderr: nft + "Could not fetch rule set generation id: Operation not permitted\n", a: answer{Exit: 4}, is: ErrNotRoot, remedy: "a security module (SELinux, seccomp)"},
		{name: "too old for --wait", legacy: true, stderr: "iptables-restore: unrecognized option '--wait=5'\nTry `iptables-restore -h' for more information.\n", a: answer{Exit: 1}, remedy: "too old: iptables-restore has --wait since 1.6.2"},
		{name: "an option of a rule", legacy: true, stderr: legacy + "unknown option \"--uid-owner\"\nError occurred at line: %d\n", rule: "--uid-owner", a: answer{Exit: 2}},
		{name: "a line that is not there", stderr: "line 4711 failed", a: answer{Exit: 1}},
		{name: "no end of words", stderr: strings.Repeat("warning: nothing of interest\n", 50000), a: answer{Exit: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := "iptables-nft"
			if c.legacy {
				b = "iptables-legacy"
			}
			h := newFakeHost(t, b)
			h.holder = c.holder
			if err := os.WriteFile(filepath.Join(h.dir, b+".scripts"), []byte("*nat\n-A OUTPUT -p tcp -m tcp --dport 9 -j ACCEPT\nCOMMIT\n*raw\n-A OUTPUT -p udp -m udp --dport 9 -j ACCEPT\nCOMMIT\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			before := h.rules(b)
			p := h.plan(tproxy.Config{IPFamilyMode: tproxy.IPv4Only, DNS: tproxy.DNS{CaptureAll: true}, MaxRetries: -1})
			script := p.Rules.IPTables(rules.IPv4)
			line := 0
			if c.rule != "" {
				line = lineOf(t, script, c.rule)
				c.stderr = fmt.Sprintf(c.stderr, line)
			} else if strings.Contains(c.stderr, "at line: 1\n") {
				line = 1
			}
			c.a.Stderr = c.stderr
			h.will(b+"-restore", c.a)
			_, err := (&Runner{machine: h}).Apply(context.Background(), p)
			e := applyError(t, err)
			for _, sentinel := range []error{ErrLocked, ErrNotRoot, ErrNoModule, ErrUnsupported} {
				if errors.Is(err, sentinel) != (sentinel == c.is) {
					t.Errorf("is %q: %v", sentinel, errors.Is(err, sentinel))
				}
			}
			if e.Step != "IPv4 rules by "+b+"-restore" || e.Family != rules.IPv4 || e.Program != filepath.Join(h.bin, b+"-restore") || e.Version != "iptables 1.8.9 ("+b+")" {
				t.Errorf("%#v", e)
			}
			if c.remedy == "" && e.Remedy != "" || !strings.Contains(e.Remedy, c.remedy) || !strings.Contains(err.Error(), e.Remedy) {
				t.Errorf("remedy %q, want %q", e.Remedy, c.remedy)
			}
			if e.Line != line || line > 0 && (e.Rule == "" || !strings.Contains(err.Error(), e.Rule) || !strings.Contains(e.Rule, c.rule)) {
				t.Errorf("line %d, rule %q, want line %d", e.Line, e.Rule, line)
			}
			if !strings.Contains(err.Error(), c.says) || len(err.Error()) > 6000 || !strings.HasPrefix(strings.TrimSpace(c.stderr), e.Stderr) {
				t.Errorf("%d bytes: %.6000s", len(err.Error()), err)
			}
			if after := h.rules(b); after != before || len(e.Left) > 0 {
				t.Errorf("left %q:\n%s", e.Left, after)
			}
			if len(e.Undone) > 0 {
				t.Errorf("undone: %q", e.Undone)
			}
		})
	}
}

// What a restore did before it died, or said no, is read, not guessed.
func TestRestoreThatFailsBehindTheCommit(t *testing.T) {
	for _, a := range []answer{{Killed: true, Work: true}, {Exit: 1, Work: true}} {
		h := newFakeHost(t, "iptables-nft")
		h.will("iptables-nft-restore", a)
		c := tproxy.Config{IPFamilyMode: tproxy.IPv4Only, DNS: tproxy.DNS{CaptureAll: true}}
		r, err := (&Runner{machine: h}).Apply(context.Background(), h.plan(c))
		if err != nil || !r.Changed || r.Retries != 1 || len(r.Steps) != 1 || len(r.Families[0].Changes) == 0 {
			t.Errorf("%+v: %+v, %v", a, r, err)
		}
	}
}

func TestSaveFailures(t *testing.T) {
	whole := "# Generated by iptables-nft-save v1.8.9 (nf_tables) on Mon Nov 23 12:00:00 2026\n*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp -m tcp --dport 9 -j ACCEPT\nCOMMIT\n# Completed on Mon Nov 23 12:00:00 2026\n"
	for _, c := range []struct {
		name  string
		a     answer
		is    error
		says  string
		table rules.Table
		ok    bool
	}{
		{name: "exit 1", a: answer{Exit: 1, Stderr: "iptables-save v1.8.9 (nf_tables): no\n"}, says: "exit code 1: iptables-save v1.8.9 (nf_tables): no"},
		{name: "not root", a: answer{Exit: 4, Stderr: "Could not fetch rule set generation id: Permission denied (you must be root)\n"}, is: ErrNotRoot},
		{name: "no nf_tables", a: answer{Exit: 1, Stderr: "iptables-nft-save v1.8.9: Failed to initialize nft: Protocol not supported\n"}, is: ErrNoModule},
		{name: "no end of words", a: answer{Exit: 1, Stderr: strings.Repeat("line 1 failed\n", 50000)}, says: "exit code 1"},
		{name: "killed", a: answer{Killed: true, Stdout: whole}, says: "killed by a signal"},
		{name: "garbage", a: answer{Stdout: "\x7fELF\x00\x01\x02"}, says: "line 1: unknown kind of line"},
		{name: "truncated", a: answer{Stdout: whole[:len(whole)-70]}, says: "without the COMMIT of table nat"},
		{name: "truncated in a line", a: answer{Stdout: whole[:strings.Index(whole, "--dport")]}},
		{name: "failed behind a whole output", a: answer{Stdout: whole, Exit: 1}, says: "exit code 1"},
		{name: "nat of nft", a: answer{Stdout: "# Table `nat' is incompatible, use 'nft' tool.\n"}, table: rules.NAT, says: "table ip nat holds rules that were made with nft"},
		{name: "raw of nft behind others", a: answer{Stdout: whole + "# Table `filter' is incompatible, use 'nft' tool.\n# Table `mangle' is incompatible, use 'nft' tool.\n# Table `raw' is incompatible, use 'nft' tool.\n"}, table: rules.Raw, says: "table ip raw holds rules"},
		{name: "tables that are not ours of nft", a: answer{Stdout: "# Table `filter' is incompatible, use 'nft' tool.\n# Table `nationwide' is incompatible, use 'nft' tool.\n"}, ok: true},
		{name: "warnings", a: answer{Stdout: whole, Stderr: "# Warning: iptables-legacy tables present, use iptables-legacy-save to see them\n"}, ok: true},
		{name: "no rules", ok: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newFakeHost(t, "iptables-nft")
			h.others("iptables-nft")
			p := h.plan(tproxy.Config{IPFamilyMode: tproxy.IPv4Only})
			h.will("iptables-nft-save", c.a)
			h.log()
			_, err := (&Runner{machine: h}).Apply(context.Background(), p)
			if c.ok {
				if err != nil {
					t.Error(err)
				}
				return
			}
			e := applyError(t, err)
			if c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) || len(err.Error()) > 6000 {
				t.Errorf("%.6000s", err)
			}
			if e.Step != "reading the IPv4 rules of iptables-nft" || e.Family != rules.IPv4 || e.Table != c.table || e.Line != 0 || e.Rule != "" || e.Program != filepath.Join(h.bin, "iptables-nft-save") {
				t.Errorf("%#v", e)
			}
			for _, l := range h.log() {
				if strings.Contains(l, "-restore") {
					t.Errorf("%s was started", l)
				}
			}
		})
	}
}

func TestProgramThatVanished(t *testing.T) {
	h := newFakeHost(t, "iptables-nft")
	h.others("iptables-nft")
	p := h.plan(tproxy.Config{IPFamilyMode: tproxy.IPv4Only})
	for _, name := range []string{"iptables-nft-restore", "iptables-nft-save"} {
		if err := os.Remove(filepath.Join(h.bin, name)); err != nil {
			t.Fatal(err)
		}
		_, err := (&Runner{machine: h}).Apply(context.Background(), p)
		if e := applyError(t, err); !errors.Is(err, fs.ErrNotExist) || !strings.HasSuffix(e.Program, name) {
			t.Errorf("%v", err)
		}
	}
}

// An old iptables says so itself, by go-iptables.
func TestVersionInTheError(t *testing.T) {
	for text, want := range map[string]string{
		"iptables v1.4.21\n":         "iptables 1.4.21 (iptables-legacy), whose restore has no --wait",
		"iptables v1.6.1\n":          "iptables 1.6.1 (iptables-legacy), whose restore has no --wait",
		"iptables v1.6.2\n":          "iptables 1.6.2 (iptables-legacy)",
		"iptables v1.8.9 (legacy)\n": "iptables 1.8.9 (iptables-legacy)",
		"what?\n":                    "",
	} {
		h := newFakeHost(t, "iptables-legacy")
		p := h.plan(tproxy.Config{IPFamilyMode: tproxy.IPv4Only})
		h.will("iptables-legacy --version", answer{Stdout: text})
		h.will("iptables-legacy-restore", answer{Exit: 1, Stderr: "iptables-restore: unrecognized option '--wait=5'\n"})
		_, err := (&Runner{machine: h}).Apply(context.Background(), p)
		if e := applyError(t, err); e.Version != want || want != "" && !strings.Contains(err.Error(), "by "+want) {
			t.Errorf("%q: version %q, want %q", text, e.Version, want)
		}
	}
}

// K17: Kuma leaves backups of the rules in /tmp, under names that anybody can
// guess. Nothing here writes a file.
func TestK17NoFiles(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	h := newFakeHost(t, "iptables-nft", "ip6tables-nft")
	r := Runner{machine: h}
	if _, err := r.Apply(context.Background(), h.plan(tproxy.Config{})); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Remove(context.Background(), RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	if files, err := os.ReadDir(tmp); err != nil || len(files) > 0 {
		t.Errorf("%v, %v", files, err)
	}
}
