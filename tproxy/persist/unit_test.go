package persist_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy/persist"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

var _ = flag.Bool("update", false, "write the golden files")

var (
	service = persist.Service{
		Description: "Transparent proxying of the mesh",
		Commands:    [][]string{{"/usr/local/bin/kumactl", "install", "transparent-proxy", "--transparent-proxy-config-file", "/etc/kuma/tp $1 100%.yaml"}},
		Files:       []string{"/etc/kuma/tp $1 100%.yaml"},
		Modules:     []string{"ip_tables", "ip6-tables"},
		Writable:    []string{"/run"},
	}
	names = persist.Service{
		Description: "Names of the mesh",
		Commands:    [][]string{{"/home/kuma/bin/kumactl", "install", "transparent-proxy"}},
		Writable:    []string{"/run"}, Capabilities: []string{"CAP_SYS_PTRACE"},
	}
)

func TestUnitGolden(t *testing.T) {
	var got []tproxytest.Section
	add := func(name string, text []byte, err error) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, tproxytest.Section{Name: name, Text: string(text)})
	}
	text, err := persist.Unit(nil, service)
	add(persist.UnitName, text, err)
	text, err = persist.NamesUnit(nil, names)
	add(persist.NamesUnitName, text, err)
	text, err = persist.DropIn(nil)
	add(persist.DropInName, text, err)
	tproxytest.Golden(t, "testdata/units.txtar", got...)
}

// TestUnitReplaces: what is ours is replaced, whatever became of it; what is not ours
// never is, and neither is deleted.
func TestUnitReplaces(t *testing.T) {
	makers := map[string]func([]byte) ([]byte, error){
		"unit":    func(f []byte) ([]byte, error) { return persist.Unit(f, service) },
		"names":   func(f []byte) ([]byte, error) { return persist.NamesUnit(f, names) },
		"drop-in": persist.DropIn,
	}
	for name, make := range makers {
		fresh, err := make(nil)
		if err != nil {
			t.Fatal(err)
		}
		mark, _, _ := strings.Cut(string(fresh), "\n")
		for what, file := range map[string]string{
			"the same":         string(fresh),
			"of another kind":  mark + "\n",
			"edited":           "[Unit]\n" + string(fresh) + "Description=mine\n",
			"carriage returns": strings.ReplaceAll(string(fresh), "\n", "\r\n"),
		} {
			again, err := make([]byte(file))
			if err != nil || !bytes.Equal(again, fresh) {
				t.Errorf("%s, %s: %v\n%s", name, what, err, cmp.Diff(string(fresh), string(again)))
			}
			if !persist.OurUnit([]byte(file)) {
				t.Errorf("%s, %s: is not ours", name, what)
			}
		}
		for what, file := range map[string]string{
			"empty, and so masked (systemd.unit(5))": "",
			"another's":                              "[Unit]\nDescription=Made by kuma-tproxy\n[Service]\nExecStart=/bin/true\n",
			"a word in a line":                       "[Unit]\nDescription=see " + mark + "\n",
			"without its mark":                       strings.TrimPrefix(string(fresh), mark),
			"a mark cut short":                       mark[:len(mark)-1],
			"long and no text":                       strings.Repeat("\x00", 1<<16),
			"ours in a comment":                      "# " + mark + "\n",
		} {
			out, err := make([]byte(file))
			var e *persist.UnitError
			if out != nil || !errors.As(err, &e) || !strings.Contains(err.Error(), "not ours") || !strings.Contains(err.Error(), fmt.Sprintf("%q", mark)) || len(err.Error()) > 1500 {
				t.Errorf("%s, %s: %v\n%s", name, what, err, out)
			}
			if persist.OurUnit([]byte(file)) {
				t.Errorf("%s, %s: is ours", name, what)
			}
		}
		if persist.OurUnit(nil) {
			t.Error("no file is ours")
		}
	}
}

func TestUnitNamesEveryFault(t *testing.T) {
	_, err := persist.Unit(nil, persist.Service{
		Description:  "two\nlines",
		Commands:     [][]string{{"kumactl"}, {}, {"/bin/"}, {"/bin/$HOME"}, {"/bin/'"}, {"/bin/true", "fine", "a\nb", "\xff", "c\x00d", "\r", "\u0085"}},
		Files:        []string{"etc/x", "/y\n[Service]"},
		Modules:      []string{"ip_tables", "../x", ""},
		Writable:     []string{"run", "-/run"},
		Capabilities: []string{"CAP_SYS_PTRACE", "~CAP_KILL"},
	})
	var e *persist.UnitError
	if !errors.As(err, &e) {
		t.Fatal(err)
	}
	var parts []string
	for _, f := range e.Faults {
		parts = append(parts, f.Part)
		if !strings.Contains(err.Error(), fmt.Sprintf("%s %q: accepted is %s", f.Part, f.Value, f.Accepted)) || f.Accepted == "" {
			t.Errorf("%v is not in %s", f, err)
		}
	}
	want := []string{
		"description", "command 1, program", "command 2", "command 3, program", "command 4, program", "command 5, program",
		"command 6, argument 2", "command 6, argument 3", "command 6, argument 4", "command 6, argument 5", "command 6, argument 6",
		"file 1", "file 2", "writable path 1", "writable path 2", "module 2", "module 3", "capability 2",
	}
	if d := cmp.Diff(want, parts); d != "" {
		t.Error(d)
	}
	if _, err := persist.Unit(nil, persist.Service{Description: `\`}); err == nil || !strings.Contains(err.Error(), "description") || !strings.Contains(err.Error(), "commands") {
		t.Error(err)
	}
}

// A Service that writes to a home has it read-only but for that, and programs there are
// found.
func TestUnitHome(t *testing.T) {
	for _, c := range []struct {
		path, want string
	}{
		{"/usr/bin/kumactl", "yes"}, {"/homes/x", "yes"}, {"/rootfs/x", "yes"}, {"/run/users/1", "yes"},
		{"/home/u/kumactl", "read-only"}, {"/root/kumactl", "read-only"}, {"/run/user/1000/kumactl", "read-only"},
		{"/opt/../home/u/kumactl", "read-only"}, {"//home//kumactl", "read-only"},
	} {
		for where, s := range map[string]persist.Service{
			"program":  {Description: "x", Commands: [][]string{{c.path}}},
			"file":     {Description: "x", Commands: [][]string{{"/bin/true"}}, Files: []string{c.path}},
			"writable": {Description: "x", Commands: [][]string{{"/bin/true"}}, Writable: []string{c.path}},
		} {
			text, err := persist.Unit(nil, s)
			if err != nil {
				t.Fatal(err)
			}
			if got := read(t, text).only("ProtectHome"); got != c.want {
				t.Errorf("%s %s: ProtectHome=%s", where, c.path, got)
			}
		}
	}
}

// TestUnitNoStringAddsALine: whatever a Service says, systemd reads of it what was meant,
// and nothing else; or the error names what it is.
func TestUnitNoStringAddsALine(t *testing.T) {
	odd := rapid.StringOfN(rapid.RuneFrom([]rune("ab $%{}\"'\\;#=[]-@!+:|\u00a0é~n")), 0, 8, -1)
	known := rapid.SampledFrom([]string{"", ";", `\`, "%n", "$HOME", "${HOME}", "$$", "%%", `\x0a`, "\u2028", " ", "#", "a=b", `"`})
	text := rapid.OneOf(odd, known, odd, known, odd, known, odd, known, rapid.String(),
		rapid.SampledFrom([]string{"a\n[Service]", "\nExecStart=/bin/x", "\r", "\x00", "\u0085", "\xff"}))
	path := rapid.Map(text, func(s string) string { return "/" + s })
	program := rapid.OneOf(path, rapid.Map(rapid.StringOfN(rapid.RuneFrom([]rune("ab %{};#=[]-@!+:|\u00a0é~n")), 1, 8, -1), func(s string) string { return "/" + s }))
	rapid.Check(t, func(t *rapid.T) {
		s := persist.Service{
			Description: text.Draw(t, "description"),
			Commands: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) []string {
				return append([]string{program.Draw(t, "program")}, rapid.SliceOfN(text, 0, 3).Draw(t, "args")...)
			}), 1, 3).Draw(t, "commands"),
			Files:    rapid.SliceOfN(path, 0, 2).Draw(t, "files"),
			Writable: rapid.SliceOfN(path, 0, 2).Draw(t, "writable"),
		}
		for _, make := range []func([]byte, persist.Service) ([]byte, error){persist.Unit, persist.NamesUnit} {
			file, err := make(nil, s)
			if bad := firstUnwritable(s); (err != nil) != (bad != "") {
				t.Fatalf("%s: %v", bad, err)
			}
			if err != nil {
				continue
			}
			again, err := make(file, s)
			if err != nil || !bytes.Equal(file, again) {
				t.Fatalf("again: %v\n%s", err, again)
			}
			means(t, file, s)
		}
	})
}

// means compares a unit with the Service that it is to run, and with the unit of a plain
// one.
func means(t rapid.TB, file []byte, s persist.Service) {
	u := read(t, file)
	if got := u.only("Description"); strings.TrimSpace(specifiers(got)) != strings.TrimSpace(s.Description) {
		t.Fatalf("description %q became %q", s.Description, got)
	}
	var commands [][]string
	for _, c := range u["ExecStart"] {
		w := words(t, c)
		for i := range w {
			if i > 0 {
				w[i] = variables(t, w[i])
			}
		}
		commands = append(commands, w)
	}
	if d := cmp.Diff(s.Commands, commands); d != "" {
		t.Fatalf("commands %s\n%s", d, file)
	}
	wanted := slices.Clone(s.Files)
	for _, c := range s.Commands {
		wanted = append(wanted, c[0])
	}
	slices.Sort(wanted)
	mounts := words(t, u.only("RequiresMountsFor"))
	slices.Sort(mounts)
	if d := cmp.Diff(slices.Compact(wanted), mounts); d != "" {
		t.Fatalf("RequiresMountsFor %s", d)
	}
	var writable []string
	for _, l := range u["ReadWritePaths"] {
		for _, w := range words(t, l) {
			writable = append(writable, strings.TrimPrefix(w, "-"))
		}
	}
	if d := cmp.Diff(s.Writable, writable, cmp.Comparer(func(a, b []string) bool { return slices.Equal(a, b) })); d != "" {
		t.Fatalf("ReadWritePaths %s", d)
	}
}

// firstUnwritable is what of a Service no unit can hold, told in another way than Unit
// does.
func firstUnwritable(s persist.Service) string {
	bad := func(v string) bool {
		for i, r := range v {
			if r < 0x20 || r >= 0x7f && r < 0xa0 || r == 0xfffd && !strings.HasPrefix(v[i:], "\ufffd") {
				return true
			}
		}
		return false
	}
	if bad(s.Description) || s.Description == "" || strings.HasSuffix(strings.TrimSpace(s.Description), `\`) {
		return "description " + s.Description
	}
	for _, c := range s.Commands {
		if strings.ContainsAny(c[0], "$'\"\\") || c[0][len(c[0])-1] == '/' {
			return c[0]
		}
	}
	for _, v := range slices.Concat(append(slices.Clone(s.Commands), s.Files, s.Writable)...) {
		if bad(v) {
			return fmt.Sprintf("%q", v)
		}
	}
	return ""
}

// unit is a unit as systemd.syntax(7) reads it: the values of each key.
type unit map[string][]string

func (u unit) only(key string) string {
	if len(u[key]) != 1 {
		return fmt.Sprintf("%d of them", len(u[key]))
	}
	return u[key][0]
}

// settings are the keys that a unit of ours may have, and in which section.
var settings = map[string]string{}

func init() {
	for section, keys := range map[string]string{
		"Unit":    "Description DefaultDependencies Conflicts Wants Before After ReloadPropagatedFrom StartLimitIntervalSec RequiresMountsFor",
		"Service": "Type RemainAfterExit ExecStartPre ExecStart ExecReload TimeoutStartSec StandardError UMask CapabilityBoundingSet ProtectSystem ReadWritePaths ProtectHome NoNewPrivileges PrivateDevices ProtectClock ProtectControlGroups ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables LockPersonality MemoryDenyWriteExecute RestrictAddressFamilies RestrictNamespaces RestrictRealtime RestrictSUIDSGID SystemCallArchitectures SystemCallFilter KeyringMode",
		"Install": "WantedBy",
	} {
		for k := range strings.FieldsSeq(keys) {
			settings[k] = section
		}
	}
}

// read reads a unit of ours. It fails at a key that none of ours has, or that stands
// twice where it may not.
func read(t rapid.TB, file []byte) unit {
	u := unit{}
	section := ""
	lines := strings.FieldsFunc(string(file), func(r rune) bool { return strings.ContainsRune("\n\r\x00", r) })
	for _, line := range lines {
		line = strings.Trim(line, " \t")
		switch {
		case line == "", strings.HasPrefix(line, "#"), strings.HasPrefix(line, ";"):
			continue
		case strings.HasSuffix(line, `\`):
			t.Fatalf("line %q goes on", line)
		case line[0] == '[':
			section = strings.Trim(line, "[]")
			continue
		}
		key, value, is := strings.Cut(line, "=")
		if !is || settings[key] != section {
			t.Fatalf("in [%s] there is %q", section, line)
		}
		u[key] = append(u[key], strings.Trim(value, " \t"))
	}
	return u
}

// words splits a value as systemd's extract_first_word does with quotes and escapes, and
// replaces specifiers.
func words(t rapid.TB, value string) (out []string) {
	for i := 0; i < len(value); {
		if value[i] == ' ' || value[i] == '\t' {
			i++
			continue
		}
		if value[i] == ';' && (i+1 == len(value) || value[i+1] == ' ') {
			t.Fatalf("%q is two commands", value)
		}
		var word []byte
		quote := byte(0)
		for ; i < len(value) && (quote != 0 || value[i] != ' ' && value[i] != '\t'); i++ {
			c := value[i]
			switch {
			case c == '\\':
				i++
				if i == len(value) || !strings.ContainsRune(`\"`, rune(value[i])) {
					t.Fatalf("%q: an escape with a meaning of its own", value)
				}
				word = append(word, value[i])
			case quote != 0 && c == quote:
				quote = 0
			case quote == 0 && (c == '"' || c == '\''):
				quote = c
			default:
				word = append(word, c)
			}
		}
		if quote != 0 {
			t.Fatalf("%q: a quote is not closed", value)
		}
		out = append(out, specifiers(string(word)))
	}
	return out
}

// specifiers replaces %%, and shows any other.
func specifiers(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '%' {
			if i++; i == len(s) || s[i] != '%' {
				return "A SPECIFIER"
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// variables replaces $$, and fails at any other dollar.
func variables(t rapid.TB, s string) string {
	rest := strings.ReplaceAll(s, "$$", "")
	if strings.Contains(rest, "$") {
		t.Fatalf("%q: a variable", s)
	}
	return strings.ReplaceAll(s, "$$", "$")
}
