package exec

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// somePrograms is a machine with the programs that are listed: what each name
// leads to, and what it says to --version.
type somePrograms struct {
	*fakeMachine
	target  map[string]string
	version map[string]result
}

func (m somePrograms) find(name string) (string, string) {
	if target, ok := m.target[name]; ok {
		return "/sbin/" + name, target
	}
	return "", ""
}

func (m somePrograms) run(ctx context.Context, c command) (result, error) {
	if len(c.Args) == 1 && c.Args[0] == "--version" {
		m.commands = append(m.commands, c)
		if r, ok := m.version[filepath.Base(c.Path)]; ok {
			return r, nil
		}
		return result{Exit: 127}, nil
	}
	return m.fakeMachine.run(ctx, c)
}

func says(text string) result { return result{Stdout: []byte(text + "\n")} }

// link makes the four programs of each prefix lead to a binary.
func link(binary string, prefixes ...string) map[string]string {
	out := make(map[string]string)
	for _, p := range prefixes {
		for _, verb := range []string{"-save", "-restore"} {
			out[p+verb] = binary
			if binary == "" {
				out[p+verb] = "/sbin/" + p + verb
			}
		}
	}
	return out
}

// version is what the programs say.
func version(text string, prefixes ...string) map[string]result {
	out := make(map[string]result)
	for _, p := range prefixes {
		for _, verb := range []string{"-save", "-restore", ""} {
			out[p+verb] = says(strings.ReplaceAll(text, "NAME", p+verb))
		}
	}
	return out
}

func union[V any](ms ...map[string]V) map[string]V {
	out := make(map[string]V)
	for _, m := range ms {
		maps.Copy(out, m)
	}
	return out
}

func TestVariants(t *testing.T) {
	const (
		nftMulti    = "/usr/sbin/xtables-nft-multi"
		legacyMulti = "/usr/sbin/xtables-legacy-multi"
	)
	names := func(p string) tproxy.Programs {
		return tproxy.Programs{Save: "/sbin/" + p + "-save", Restore: "/sbin/" + p + "-restore"}
	}
	unknown := result{Exit: 1, Stderr: []byte("iptables-save: unrecognized option '--version'\nLook at manual page `iptables-save.8' for more information.")}
	for _, c := range []struct {
		name    string
		target  map[string]string
		version map[string]result
		want    []tproxy.Variant
	}{
		{
			name:   "Debian",
			target: union(link(nftMulti, "iptables-nft", "ip6tables-nft", "iptables", "ip6tables"), link(legacyMulti, "iptables-legacy", "ip6tables-legacy")),
			want: []tproxy.Variant{
				{Backend: tproxy.IPTablesNFT, IPv4: names("iptables-nft"), IPv6: names("ip6tables-nft"), Default: true},
				{Backend: tproxy.IPTablesLegacy, IPv4: names("iptables-legacy"), IPv6: names("ip6tables-legacy")},
			},
		},
		{
			name:   "Debian with update-alternatives to legacy",
			target: union(link(nftMulti, "iptables-nft", "ip6tables-nft"), link(legacyMulti, "iptables-legacy", "ip6tables-legacy", "iptables", "ip6tables")),
			want: []tproxy.Variant{
				{Backend: tproxy.IPTablesNFT, IPv4: names("iptables-nft"), IPv6: names("ip6tables-nft")},
				{Backend: tproxy.IPTablesLegacy, IPv4: names("iptables-legacy"), IPv6: names("ip6tables-legacy"), Default: true},
			},
		},
		{
			name:    "plain names only, nft",
			target:  link("", "iptables", "ip6tables"),
			version: version("NAME v1.8.7 (nf_tables)", "iptables", "ip6tables"),
			want:    []tproxy.Variant{{Backend: tproxy.IPTablesNFT, Version: "1.8.7", IPv4: names("iptables"), IPv6: names("ip6tables"), Default: true}},
		},
		{
			name:    "plain names only, legacy",
			target:  link("", "iptables", "ip6tables"),
			version: version("NAME v1.8.9 (legacy)", "iptables", "ip6tables"),
			want:    []tproxy.Variant{{Backend: tproxy.IPTablesLegacy, Version: "1.8.9", IPv4: names("iptables"), IPv6: names("ip6tables"), Default: true}},
		},
		{
			name:    "before 1.8, without a word",
			target:  link("", "iptables"),
			version: version("NAME v1.6.1", "iptables"),
			want:    []tproxy.Variant{{Backend: tproxy.IPTablesLegacy, Version: "1.6.1", IPv4: names("iptables"), Default: true}},
		},
		{
			name:   "before 1.8, save and restore do not know --version",
			target: link("", "iptables", "ip6tables"),
			version: union(version("NAME v1.4.21", "iptables", "ip6tables"),
				map[string]result{"iptables-save": unknown, "iptables-restore": unknown, "ip6tables-save": unknown, "ip6tables-restore": unknown}),
			want: []tproxy.Variant{{Backend: tproxy.IPTablesLegacy, Version: "1.4.21", IPv4: names("iptables"), IPv6: names("ip6tables"), Default: true}},
		},
		{
			name:   "before 1.8, one binary",
			target: link("/sbin/xtables-multi", "iptables", "ip6tables"),
			want:   []tproxy.Variant{{Backend: tproxy.IPTablesLegacy, IPv4: names("iptables"), IPv6: names("ip6tables"), Default: true}},
		},
		{
			name:    "a name that lies",
			target:  link("", "iptables-nft", "ip6tables-nft"),
			version: version("NAME v1.8.9 (legacy)", "iptables-nft", "ip6tables-nft"),
			want:    []tproxy.Variant{{Backend: tproxy.IPTablesLegacy, Version: "1.8.9", IPv4: names("iptables-nft"), IPv6: names("ip6tables-nft")}},
		},
		{
			name:    "a link that lies",
			target:  union(link(legacyMulti, "iptables-nft"), link(nftMulti, "iptables-legacy")),
			version: nil,
			want: []tproxy.Variant{
				{Backend: tproxy.IPTablesNFT, IPv4: names("iptables-legacy")},
				{Backend: tproxy.IPTablesLegacy, IPv4: names("iptables-nft")},
			},
		},
		{
			name:    "something else under the name",
			target:  link("", "iptables", "ip6tables"),
			version: map[string]result{"iptables-save": says("hello"), "iptables-restore": {Exit: 127}, "ip6tables-save": {Exit: 1}, "ip6tables-restore": says("")},
		},
		{
			name:    "of IPv6 there is nothing",
			target:  link(nftMulti, "iptables-nft"),
			version: nil,
			want:    []tproxy.Variant{{Backend: tproxy.IPTablesNFT, IPv4: names("iptables-nft")}},
		},
		{name: "nothing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newFakeMachine(t)
			r := Runner{machine: somePrograms{m, c.target, c.version}}
			h, err := r.Probe(context.Background(), tproxy.Needs{})
			if err != nil {
				t.Fatal(err)
			}
			if !slices.EqualFunc(h.Variants, c.want, func(a, b tproxy.Variant) bool {
				return a.Backend == b.Backend && a.Version == b.Version && a.IPv4 == b.IPv4 && a.IPv6 == b.IPv6 && a.Default == b.Default && a.Rules == b.Rules && len(a.Ours) == len(b.Ours) && a.Unknown == b.Unknown
			}) {
				t.Errorf("got\n%+v\nwant\n%+v", h.Variants, c.want)
			}
			if m.writes > 0 {
				t.Errorf("%d writes", m.writes)
			}
		})
	}
}

// A file called iptables-nft-save that says it is legacy, as a process.
func TestNameThatLies(t *testing.T) {
	h := newFakeHost(t, "iptables-nft")
	for _, name := range []string{"iptables-nft-save", "iptables-nft-restore"} {
		h.will(name+" --version", answer{Stdout: name + " v1.8.9 (legacy)\n"})
	}
	host, err := (&Runner{machine: h}).Probe(context.Background(), tproxy.Needs{})
	if err != nil || len(host.Variants) != 1 || host.Variants[0].Backend != tproxy.IPTablesLegacy {
		t.Errorf("%+v, %v", host.Variants, err)
	}
	same(t, "processes", h.log(), []string{"iptables-nft-save --version LC_ALL=C", "iptables-nft-restore --version LC_ALL=C"})
}

func TestProgramOfAVariant(t *testing.T) {
	h := newFakeHost(t)
	write := func(dir, name string, mode os.FileMode) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("#!/bin/true\n"), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	sbin := t.TempDir()
	programDirs = []string{sbin}
	if path, target := h.find("iptables-save"); path != "" || target != "" {
		t.Errorf("found %q, %q", path, target)
	}
	write(sbin, "plain", 0o644)
	if path, _ := h.find("plain"); path != "" {
		t.Errorf("%s cannot be started", path)
	}
	if err := os.Mkdir(filepath.Join(sbin, "folder"), 0o755); err != nil {
		t.Fatal(err)
	}
	if path, _ := h.find("folder"); path != "" {
		t.Errorf("%s is a folder", path)
	}
	multi := write(sbin, "xtables-nft-multi", 0o755)
	for link, to := range map[string]string{"iptables-save": "alternatives", "alternatives": multi} {
		if err := os.Symlink(to, filepath.Join(sbin, link)); err != nil {
			t.Fatal(err)
		}
	}
	if path, target := h.find("iptables-save"); path != filepath.Join(sbin, "iptables-save") || filepath.Base(target) != "xtables-nft-multi" {
		t.Errorf("found %q, %q", path, target)
	}
	first := write(h.bin, "iptables-save", 0o755) // PATH comes first
	if path, target := h.find("iptables-save"); path != first || filepath.Base(target) != "iptables-save" {
		t.Errorf("found %q, %q", path, target)
	}
	// Of the working folder nothing is started, whatever PATH says.
	t.Chdir(h.bin)
	t.Setenv("PATH", ".")
	if path, _ := h.find("iptables-save"); path != filepath.Join(sbin, "iptables-save") {
		t.Errorf("found %q", path)
	}
}

// What Probe sees in the kernel, and what Build chooses for it.
func TestBackendChoice(t *testing.T) {
	dual := func(m *fakeMachine) {}
	for _, c := range []struct {
		name   string
		asked  tproxy.Backend
		mode   tproxy.IPFamilyMode
		setup  func(*fakeMachine)
		target map[string]string // nil: both variants, under their own names
		want   tproxy.Backend
		why    string // or the refusal
	}{
		{name: "both, neither in use", setup: dual, want: tproxy.IPTablesNFT, why: "both are here, and neither is in use"},
		{name: "the default", setup: dual, want: tproxy.IPTablesLegacy, why: "it is what iptables means on this host",
			target: union(link("xtables-nft-multi", "iptables-nft", "ip6tables-nft"), link("xtables-legacy-multi", "iptables", "ip6tables"))},
		{name: "legacy holds rules", setup: func(m *fakeMachine) {
			m.edit(t, "iptables-legacy", "*filter\n-A INPUT -p tcp -j ACCEPT\nCOMMIT\n")
		}, want: tproxy.IPTablesLegacy, why: "the other one holds no rules"},
		{name: "legacy has an empty table", setup: func(m *fakeMachine) {
			m.edit(t, "iptables-legacy", "*nat\nCOMMIT\n")
		}, want: tproxy.IPTablesNFT, why: "both are here, and neither is in use"},
		{name: "both hold rules", setup: func(m *fakeMachine) { m.populate(t) }, want: tproxy.IPTablesNFT, why: "both are here, and neither is in use"},
		{name: "ours are in legacy", setup: func(m *fakeMachine) {
			m.install(t, tproxy.Config{Backend: tproxy.IPTablesLegacy})
			m.edit(t, "iptables-nft", "*filter\n-A INPUT -p tcp -j ACCEPT\nCOMMIT\n")
		}, want: tproxy.IPTablesLegacy, why: "our rules are there already"},
		{name: "asked for", asked: tproxy.IPTablesLegacy, setup: dual, want: tproxy.IPTablesLegacy, why: "asked for"},
		{name: "only legacy", setup: dual, target: link("xtables-legacy-multi", "iptables-legacy", "ip6tables-legacy"), want: tproxy.IPTablesLegacy, why: "the only one with all its programs here"},
		{name: "nft for IPv4 alone", setup: dual, target: union(link("xtables-nft-multi", "iptables-nft"), link("xtables-legacy-multi", "iptables-legacy", "ip6tables-legacy")), want: tproxy.IPTablesLegacy, why: "the only one with all its programs here"},
		{name: "nft for IPv4 alone, and IPv4 is asked for", mode: tproxy.IPv4Only, setup: dual, target: link("xtables-nft-multi", "iptables-nft"), want: tproxy.IPTablesNFT, why: "the only one with all its programs here"},
		{name: "the one asked for is missing", asked: tproxy.IPTablesNFT, setup: dual, target: link("xtables-legacy-multi", "iptables-legacy", "ip6tables-legacy"), why: "iptables-nft (asked for) cannot be used: iptables-nft-save, iptables-nft-restore, ip6tables-nft-save, ip6tables-nft-restore not found"},
		{name: "ours are where no program is", asked: tproxy.IPTablesNFT, setup: func(m *fakeMachine) {
			m.install(t, tproxy.Config{Backend: tproxy.IPTablesLegacy})
		}, target: link("xtables-nft-multi", "iptables-nft", "ip6tables-nft"), why: "IPv4 rules of ours stand in iptables-legacy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newFakeMachine(t)
			c.setup(m)
			var on machine = m
			if c.target != nil {
				on = somePrograms{m, c.target, nil}
			}
			writes := m.writes
			cfg := tproxy.Config{Backend: c.asked, IPFamilyMode: c.mode}
			h, err := (&Runner{machine: on}).Probe(context.Background(), cfg.Needs())
			if err != nil {
				t.Fatal(err)
			}
			p, err := tproxy.Build(cfg, h)
			if c.want == tproxy.Auto {
				if err == nil || !strings.Contains(err.Error(), c.why) {
					t.Errorf("Build: %v", err)
				}
			} else if err != nil || p.Backend != c.want || p.BackendWhy != c.why {
				t.Errorf("%+v, %v; want %s, %s", p, err, c.want, c.why)
			}
			if m.writes != writes {
				t.Error("something was written by looking")
			}
		})
	}
}

// K5: a run of Kuma's makes the tables of iptables-legacy, whichever variant it
// uses. Here no program of a variant that holds nothing of ours is started.
func TestK5OtherVariantIsNotStarted(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, tproxy.Config{})
	m.install(t, tproxy.Config{DisableComments: true})
	m.uninstall(t)
	m.uninstall(t)
	for _, p := range m.programs() {
		if strings.Contains(p, "legacy") {
			t.Errorf("%s was started", p)
		}
	}
	for _, p := range []string{"iptables-legacy", "ip6tables-legacy"} {
		if s := m.netfilter[p].Save(); len(s) > 0 {
			t.Errorf("%s: %s", p, s)
		}
	}
}
