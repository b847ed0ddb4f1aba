package cli_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kumahq/kuma-tproxy/cli"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Each text, and all that is said of it.
var badTexts = []struct {
	name string
	text string
	want []string
}{
	{"unknown key", "wait: 5\nredirect:\n  inbound:\n    exludePorts: [80]\n",
		[]string{`c.yaml:4: redirect.inbound.exludePorts: "exludePorts" is no key of the configuration: accepted is redirect.inbound.excludePorts, the nearest one`}},
	{"unknown key of null", "wait: 5\nwiat:\n", []string{`c.yaml:2: wiat: "wiat" is no key of the configuration: accepted is wait, the nearest one`}},
	{"several faults together", "wait: x\nredirect:\n  inbound:\n    port: 70000\n    port: 1\n  inbond: {}\n",
		[]string{
			`c.yaml:5: redirect.inbound.port: "1" is given twice, first in line 4: accepted is a key once`,
			`c.yaml:1: wait: "x" is not accepted: accepted is whole seconds from 0 to 2147483647`,
			`c.yaml:4: redirect.inbound.port: "70000" is not accepted: accepted is a port from 1 to 65535`,
			`c.yaml:6: redirect.inbond: "inbond" is no key of the configuration: accepted is redirect.inbound, the nearest one`,
		}},
	{"entries of a list have lines", "redirect:\n  inbound:\n    excludePorts:\n    - 80\n    - 0\n    - 90-80\n    - 1,x\n",
		[]string{
			`c.yaml:5: redirect.inbound.excludePorts: "0" cannot be read (is out of range: accepted is a port from 1 to 65535 or a range such as 80-90): accepted is a port from 1 to 65535, a range such as 80-90, or a list of them`,
			`c.yaml:6: redirect.inbound.excludePorts: "90-80" cannot be read (is reversed: write 80-90): accepted is a port from 1 to 65535, a range such as 80-90, or a list of them`,
			`c.yaml:7: redirect.inbound.excludePorts: "x" cannot be read: accepted is a port from 1 to 65535, a range such as 80-90, or a list of them`,
		}},
	{"not yet", "dropInvalidPackets: true\nredirect:\n  vnet:\n    networks: [docker0:172.17.0.0/16]\n",
		[]string{
			`c.yaml:1: dropInvalidPackets: "true" is known, not supported yet: accepted is the default, false`,
			`c.yaml:4: redirect.vnet.networks: "[\"docker0:172.17.0.0/16\"]" is known, not supported yet: accepted is the default, []`,
		}},
	{"eBPF", "ebpf:\n  enabled: true\n", []string{`c.yaml:2: ebpf.enabled: "true" is not supported: there are iptables rules alone, as in Kuma by now: accepted is the default, false`}},

	// Numbers.
	{"a quoted port", `redirect: {inbound: {port: "15006"}}`, []string{`c.yaml:1: redirect.inbound.port: "15006" is not accepted: accepted is a port from 1 to 65535`}}, // as in Kuma
	{"octal", "redirect:\n  inbound:\n    port: 017", []string{`c.yaml:3: redirect.inbound.port: "017" is not written as a whole number: accepted is decimal digits without a zero in front, or text in quotes`}},
	{"octal of YAML 1.2", "wait: 0o17", []string{`c.yaml:1: wait: "0o17" is not written as a whole number`}},
	{"hexadecimal", "wait: 0x10", []string{`c.yaml:1: wait: "0x10" is not written as a whole number`}},
	{"underscored", "redirect: {inbound: {excludePorts: [80, 8_080]}}", []string{`c.yaml:1: redirect.inbound.excludePorts: "8_080" is not written as a whole number`}},
	{"a float", "redirect: {inbound: {port: 15006.0}}", []string{`c.yaml:1: redirect.inbound.port: "15006.0" is not written as a whole number`}},
	{"an exponent", "wait: 1e1", []string{`c.yaml:1: wait: "1e1" is not written as a whole number`}},
	{"an exponent in JSON", `{"wait": 1e1}`, []string{`c.yaml:1: wait: "1e1" is not accepted: accepted is whole seconds`}},
	{"infinity", "wait: .inf", []string{`c.yaml:1: wait: ".inf" is not written as a whole number`}},
	{"a user in octal", "kumaDPUser: 010", []string{`c.yaml:1: kumaDPUser: "010" is not written as a whole number`}},
	{"beyond 64 bits", "wait: 99999999999999999999", []string{`c.yaml:1: wait: "99999999999999999999" is not accepted`}},
	{"negative", "wait: -1", []string{`c.yaml:1: wait: "-1" is not accepted`}},

	// Types.
	{"text for a boolean", `cniMode: "true"`, []string{`c.yaml:1: cniMode: "true" is no boolean: accepted is true or false`}},
	{"a word of no YAML", "cniMode: yEs", []string{`c.yaml:1: cniMode: "yEs" is no boolean`}},
	{"a boolean for text", "kumaDPUser: true", []string{`c.yaml:1: kumaDPUser: "true" is no text`}},
	{"a list for an object", "redirect:\n- inbound\n", []string{`c.yaml:1: redirect: "[\"inbound\"]" is no object: accepted is an object with the keys inbound, outbound, dns, vnet`}},
	{"an object for a list", "redirect: {inbound: {excludePorts: {a: 1}}}", []string{`c.yaml:1: redirect.inbound.excludePorts: "{\"a\":1}" is not accepted`}},
	{"a list of lists", "redirect: {inbound: {excludePorts: [[80]]}}", []string{`c.yaml:1: redirect.inbound.excludePorts: "[80]" is not accepted`}},
	{"null in a list", "redirect: {inbound: {excludePorts: [80, ~]}}", []string{`c.yaml:1: redirect.inbound.excludePorts: "null" is not accepted`}},
	{"text", "hello", []string{`c.yaml:1: "hello" is no object: accepted is an object with the keys kumaDPUser, ipFamilyMode,`}},
	{"a list", "\n- a\n", []string{`c.yaml:2: "[\"a\"]" is no object`}},
	{"a number of nanoseconds", "retry: {sleepBetweenRetries: 2}", []string{`c.yaml:1: retry.sleepBetweenRetries: "2" is no duration: accepted is a duration from 0s to 1h with its unit, such as 2s or 500ms`}},

	// Keys.
	{"twice", "wait: 1\nwaitInterval: 2\nwait: 1\n", []string{`c.yaml:3: wait: "1" is given twice, first in line 1: accepted is a key once`}},
	{"twice, an object", "log: {}\nlog:\n  level: 7\n", []string{`c.yaml:2: log: "{...}" is given twice, first in line 1: accepted is a key once`}},
	{"twice in JSON", "{\n\"wait\": 1,\n\"wait\": 2}", []string{`c.yaml:3: wait: "2" is given twice, first in line 2: accepted is a key once`}},
	{"a number as a key", "80: x", []string{`c.yaml:1: 80: "80" is no key of the configuration`}},
	{"null as a key", "~: x", []string{`c.yaml:1: ~: "~" is no key of the configuration`}},
	{"an empty key", `"": x`, []string{`c.yaml:1: "" is no key of the configuration`}},
	{"a list as a key", "? [a, b]\n: 1\n", []string{`c.yaml:1: ?: "?" is a key that is no text: accepted is a key of the configuration`}},
	{"a dotted key", "redirect.inbound.port: 80", []string{`c.yaml:1: redirect.inbound.port: "redirect.inbound.port" is no key of the configuration`}},
	{"another spelling", "kumaDpUser: x", []string{`c.yaml:1: kumaDpUser: "kumaDpUser" is no key of the configuration: accepted is kumaDPUser, the nearest one`}},

	// Syntax.
	{"truncated", "redirect:\n  inbound: {port: 80\n", []string{`c.yaml:2: "inbound: {port: 80" is no YAML (did not find expected ',' or '}'): accepted is YAML or JSON`}},
	{"truncated JSON", "{\"redirect\": {\n\"inbound\": {\"port\"", []string{`c.yaml:2: "\"inbound\": {\"port\"" is no YAML (`}},
	{"truncated in a string", "redirect:\n  dns:\n    resolvConfigPath: \"/etc/", []string{`c.yaml:3: "resolvConfigPath: \"/etc/" is no YAML (found unexpected end of stream): accepted is YAML or JSON`}},
	{"a tab", "redirect:\n\tinbound:\n", []string{`c.yaml:2: "inbound:" is no YAML (found character that cannot start any token): accepted is YAML or JSON`}},
	{"two colons", "wait: 1: 2", []string{`c.yaml:1: "wait: 1: 2" is no YAML (mapping values are not allowed in this context): accepted is YAML or JSON`}},
	{"indentation", "redirect:\n   dns: {}\n  inbound: {}\n", []string{`c.yaml:3: "inbound: {}" is no YAML (did not find expected key`}},
	{"a star", "redirect: {outbound: {excludePortsForUIDs: [*:80:1000]}}", []string{`is no YAML (`}},
	{"an unknown anchor", "wait: *x", []string{`c.yaml:1: "wait: *x" is no YAML (unknown anchor 'x' referenced): accepted is YAML or JSON`}},
	{"two documents", "wait: 1\n---\nwait: 2\n", []string{`c.yaml:3: "---" begins a second document: accepted is one document`}},
	{"a second document that is none", "wait: 1\n---\n[", []string{`is no YAML (`}},
	{"not UTF-8", "wait: 1\nkumaDPUser: \"\xff\"\n", []string{`c.yaml:2: "kumaDPUser: \"\xff\"" is not UTF-8: accepted is YAML or JSON in UTF-8`}},
	{"UTF-16", "\xff\xfew\x00a\x00", []string{`c.yaml:1: "\xff\xfew\x00a\x00" is not UTF-8: accepted is YAML or JSON in UTF-8`}},
	{"another YAML", "%YAML 1.2\n---\nwait: 7\n", []string{`c.yaml:1: "%YAML 1.2" is no YAML (found incompatible YAML document)`}}, // as in Kuma
	{"binary", "\x00\x01\x02", []string{`c.yaml:1: "\x00\x01\x02" is no YAML (control characters are not allowed): accepted is YAML or JSON`}},
	{"too long", "#" + strings.Repeat("x", 1<<20), []string{`c.yaml:1: "1048577 bytes" is too long: accepted is at most 1048576 bytes`}},
	{"another tag", "wait: !!binary aGVsbG8=", []string{`c.yaml:1: wait: "!!binary" is a tag that has no meaning here: accepted is a value without a tag`}},
	{"a tag of one's own", "wait: !seconds 5", []string{`c.yaml:1: wait: "!seconds" is a tag that has no meaning here`}},
	{"a tag that is wrong", "cniMode: !!bool maybe", []string{`c.yaml:1: cniMode: "maybe" is no boolean: accepted is true or false`}},

	// Aliases and depth.
	{"a loop", "wait: &a [*a]", []string{`c.yaml:1: wait: "&a" holds itself: accepted is an alias of another value`}},
	{"a merge of itself", "redirect: &a\n  <<: *a\n", []string{`c.yaml:1: redirect: "&a" holds itself: accepted is an alias of another value`}},
	{"a merge of a number", "redirect:\n  <<: 5\n", []string{`c.yaml:2: redirect.<<: "5" is no object: accepted is an alias of an object, or a list of them`}},
	{"two merges", "a: &a {}\nlog:\n  <<: *a\n  <<: *a\n", []string{
		`c.yaml:4: log.<<: "<<" is given twice, first in line 3: accepted is a key once`, `c.yaml:1: a: "a" is no key`}},
	{"a billion laughs", laughs(), []string{`values and more are too many: accepted is fewer, also where aliases repeat them`}},
	{"aliases of a long text", "a: &a " + strings.Repeat("x", 500_000) + "\nb: [" + strings.Repeat("*a,", 100_000) + "]", []string{`values and more are too many`}},
	{"deep", strings.Repeat("[", 9000) + strings.Repeat("]", 9000), []string{`c.yaml:1: "21" objects within each other are too many: accepted is at most 20`}},
	{"deep in YAML", "a: " + strings.Repeat("{a: ", 9000) + strings.Repeat("}", 9000), []string{`"21" objects within each other are too many: accepted is at most 20`}},
	{"deeper than the reader goes", strings.Repeat("[", 20_000), []string{`is no YAML (exceeded max depth of 10000): accepted is YAML or JSON`}},
}

func laughs() string {
	var b strings.Builder
	b.WriteString("a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n")
	for i := range 9 {
		fmt.Fprintf(&b, "a%d: &a%d [%s]\n", i+1, i+1, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d, ", i), 9), ", "))
	}
	return b.String()
}

func TestBadTexts(t *testing.T) {
	for _, test := range badTexts {
		t.Run(test.name, func(t *testing.T) {
			start := time.Now()
			l, err := cli.Loader{}.LoadSources(cli.Source{Name: "c.yaml", Text: []byte(test.text)})
			if took := time.Since(start); took > 3*time.Second {
				t.Errorf("took %s", took)
			}
			e, ok := errors.AsType[*tproxy.ConfigError](err)
			if !ok || l != nil {
				t.Fatalf("%v, %+v", err, l)
			}
			if len(e.Faults) != len(test.want) && !strings.Contains(test.want[0], "too many") {
				t.Errorf("%d faults, want %d:\n%v", len(e.Faults), len(test.want), err)
			}
			for i, want := range test.want {
				if i < len(e.Faults) && !strings.Contains(e.Faults[i].String(), want) {
					t.Errorf("\n%s\nwant\n%s", e.Faults[i], want)
				}
			}
			for line := range strings.SplitSeq(err.Error(), "\n") {
				if len(line) > 1200 {
					t.Errorf("a line of %d bytes", len(line))
				}
			}
		})
	}
}

// What is unusual, and no fault.
func TestGoodTexts(t *testing.T) {
	wait := tproxy.Config{Wait: 7 * time.Second}
	pod := tproxy.Config{Pod: true}
	for text, want := range map[string]tproxy.Config{
		"":                                   {},
		"\n\n":                               {},
		"# wait: 5\n":                        {},
		"---\n":                              {},
		"{}":                                 {},
		"null":                               {},
		"~":                                  {},
		"wait:\n":                            {},
		"redirect:\n":                        {},
		"redirect: {inbound: }":              {},
		"\ufeffwait: 7\n":                    wait,
		"\ufeff{\"wait\": 7}":                wait,
		"wait: 7\r\n":                        wait,
		"%YAML 1.1\n---\nwait: 7\n":          wait,
		"---\nwait: 7\n...\n":                wait,
		"wait: 7\n---\n":                     wait,
		"{wait: 7,}":                         wait,
		"{\n\t\"wait\": 7\n}\n":              wait,
		"wait: !!int 7":                      wait,
		"wait: 7 # seconds\nlog: ~":          wait,
		"\"wait\": 7":                        wait,
		"? wait\n: 7\n":                      wait,
		"ebpf: &w {enabled: false}\nwait: 7": wait,
		"cniMode: true":                      pod,
		"cniMode: True":                      pod,
		// As Kuma's reader of YAML 1.1 has it.
		"cniMode: yes": pod,
		"cniMode: On":  pod,
		"cniMode: Y":   pod,
		"cniMode: NO":  {},
		"cniMode: off": {},
		"{cniMode: n}": {},
		// A word that is a boolean elsewhere is text where text is asked for.
		"kumaDPUser: \"yes\"":    {ProxyUser: "yes"},
		"kumaDPUser: on":         {ProxyUser: "on"},
		"kumaDPUser: 1234":       {ProxyUIDs: []tproxy.UID{1234}},
		"kumaDPUser: !!str 1234": {ProxyUIDs: []tproxy.UID{1234}},
		"kumaDPUser: 2026-11-24": {ProxyUser: "2026-11-24"},
		// Aliases and merge keys.
		"log: {level: &l 7}\nwait: *l":                                                                   wait,
		"comments: &off {disabled: true}\nlog: {enabled: false}\nwait: 7\n":                              {Wait: 7 * time.Second, DisableComments: true},
		"redirect:\n  inbound: &d {port: 1, excludePorts: [80]}\n  outbound:\n    <<: *d\n    port: 2\n": ports(),
		"redirect:\n  outbound: &o {port: 2}\n  inbound: &i {port: 1, excludePorts: [80]}\n  dns: {}\n  vnet: {}\nwait: 7\n": func() tproxy.Config {
			c := ports()
			c.Outbound.ExcludePorts, c.Wait = tproxy.Config{}.Outbound.ExcludePorts, wait.Wait
			return c
		}(),
		"redirect:\n  inbound: &d {port: 1, excludePorts: [80]}\n  outbound:\n    <<: [{port: 2}, *d]\n": ports(),
	} {
		l, err := cli.Loader{}.LoadSources(cli.Source{Name: "c.yaml", Text: []byte(text)})
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if d := cmp.Diff(fmt.Sprintf("%#v", want), fmt.Sprintf("%#v", l.Config)); d != "" {
			t.Errorf("%q: %s", text, d)
		}
	}
}

func ports() (c tproxy.Config) {
	c.Inbound.Port, c.Outbound.Port = 1, 2
	c.Inbound.ExcludePorts = rules.MustPorts("80")
	c.Outbound.ExcludePorts = rules.MustPorts("80")
	return c
}

// With AllowUnknown it is a warning, with its place, and the rest is loaded.
func TestAllowUnknown(t *testing.T) {
	text := "wait: 7\nredirect:\n  inbound:\n    exludePorts: {a: [1]}\n    port: 16006\nnewest: 1\n"
	l, err := cli.Loader{AllowUnknown: true}.LoadSources(cli.Source{Name: "c.yaml", Text: []byte(text)})
	if err != nil || l.Config.Wait != 7*time.Second || l.Config.Inbound.Port != 16006 {
		t.Fatal(l, err)
	}
	var got []string
	for _, w := range l.Warnings {
		got = append(got, w.String())
	}
	if d := cmp.Diff([]string{
		`c.yaml:4: redirect.inbound.exludePorts: "exludePorts" is no key of the configuration: accepted is redirect.inbound.excludePorts, the nearest one`,
		`c.yaml:6: newest: "newest" is no key of the configuration: accepted is wait, the nearest one`,
	}, got); d != "" {
		t.Error(d)
	}
	_, err = cli.Loader{AllowUnknown: true}.LoadSources(cli.Source{Name: "c.yaml", Text: []byte(text + "wait: x\n")})
	if err == nil || strings.Contains(err.Error(), "no key") {
		t.Error(err)
	}
}

// A kuma-init that is older than its control plane says what it does not know, and
// does the rest.
func TestAllowUnknownIsANote(t *testing.T) {
	rec := new(recorder)
	o := rec.options()
	o.AllowUnknown = true
	cmd := cli.InstallTransparentProxy(o)
	var out, errOut bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&errOut)
	cmd.SetArgs([]string{"--config", write(t, "c.yaml", "wait: 7\nwaits: 8\n")})
	if err := cmd.Execute(); err != nil || rec.plan.Config.Wait != 7*time.Second {
		t.Fatal(err)
	}
	if got := errOut.String(); !strings.HasPrefix(got, "Note: ") || !strings.HasSuffix(got, `c.yaml:2: waits: "waits" is no key of the configuration: accepted is wait, the nearest one`+"\n") {
		t.Error(got)
	}
}

// Files that are none, or none to read.
func TestBadFiles(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for name, text := range map[string]string{"long": "#" + strings.Repeat("x", 1<<20), "secret": "wait: 5\n", "bad,name": "wait: x\n"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo("fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("loop", "loop"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir("folder", 0o700); err != nil {
		t.Fatal(err)
	}
	const accepted = `: accepted is a file of YAML or JSON, or - for standard input`
	cases := map[string][]string{
		"missing.yaml":         {`--config: "missing.yaml" does not exist` + accepted},
		"missing/x.yaml":       {`--config: "missing/x.yaml" does not exist` + accepted},
		"secret/x.yaml":        {`--config: "secret/x.yaml" cannot be read (not a directory)` + accepted},
		"folder":               {`--config: "folder" is a directory` + accepted},
		"fifo":                 {`--config: "fifo" is no regular file` + accepted},
		"/dev/zero":            {`--config: "/dev/zero" is no regular file` + accepted},
		"loop":                 {`--config: "loop" cannot be read (too many levels of symbolic links)` + accepted},
		"long":                 {`--config: "long" cannot be read (it is longer than 1048576 bytes)` + accepted},
		"folder,missing":       {`--config: "folder" is a directory` + accepted, `--config: "missing" does not exist` + accepted},
		"bad,name":             {`bad,name:1: wait: "x" is not accepted: accepted is whole seconds from 0 to 2147483647`},
		"-,-":                  {`--config: "-" is given twice: accepted is standard input once`},
		"{":                    {`--config:1: "{" is no YAML (did not find expected node content): accepted is YAML or JSON`},
		`{"wait": "x"}`:        {`--config:1: wait: "x" is not accepted: accepted is whole seconds from 0 to 2147483647`},
		"log: {}\nwait: x":     {`--config:2: wait: "x" is not accepted: accepted is whole seconds from 0 to 2147483647`},
		strings.Repeat("x", 9): {`--config: "xxxxxxxxx" does not exist` + accepted},
	}
	if os.Geteuid() != 0 {
		if err := os.Chmod("secret", 0); err != nil {
			t.Fatal(err)
		}
		cases["secret"] = []string{`--config: "secret" cannot be read (permission denied)` + accepted}
	}
	for value, want := range cases {
		l, err := cli.Loader{Stdin: strings.NewReader("")}.Load(value)
		if err == nil || l != nil {
			t.Errorf("%q: %+v", value, l)
			continue
		}
		if d := cmp.Diff(strings.Join(want, "\n"), err.Error()); d != "" {
			t.Errorf("%q: %s", value, d)
		}
	}
	if _, err := (cli.Loader{}).Load("-"); err == nil || !strings.Contains(err.Error(), `"-" cannot be read (there is no standard input)`) {
		t.Error(err)
	}
	_, err := cli.Loader{Stdin: failingReader{}}.Load("-")
	if err == nil || !strings.Contains(err.Error(), `"-" cannot be read (the cable is cut)`) {
		t.Error(err)
	}
	_, err = cli.Loader{Stdin: strings.NewReader("log: {}\nwait: x\n")}.Load("-")
	if err == nil || !strings.HasPrefix(err.Error(), `standard input:2: wait: "x"`) {
		t.Error(err)
	}
	if filepath.Dir(dir) == dir {
		t.Error(dir)
	}
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errors.New("the cable is cut") }

func TestBadEnvironment(t *testing.T) {
	for _, test := range []struct{ name, value, want string }{
		{"REDIRECT_INBOUND_ENABLED", "yes", `"yes" is no boolean: accepted is true or false`},
		{"CNI_MODE", "2", `"2" is no boolean: accepted is true or false`},
		{"REDIRECT_INBOUND_PORT", "0", `"0" is not accepted: accepted is a port from 1 to 65535`},
		{"REDIRECT_INBOUND_PORT", "0x3A9E", `"0x3A9E" is not accepted: accepted is a port from 1 to 65535`},
		{"REDIRECT_INBOUND_PORT", "15006,15007", `"15006,15007" is not accepted: accepted is a port`},
		{"REDIRECT_INBOUND_EXCLUDE_PORTS", "1,,2", `"1,,2" has an empty entry: accepted is a port`},
		{"REDIRECT_INBOUND_EXCLUDE_PORTS", "1,x", `"x" cannot be read: accepted is a port`},
		{"REDIRECT_INBOUND_EXCLUDE_PORTS", "[1]", `"[1]" cannot be read: accepted is a port`},
		{"REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_IPS", "10.0.0.1/8", `"10.0.0.1/8" cannot be read (has host bits set: write 10.0.0.0/8`},
		{"REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS", "80,443:1000", `"80,443:1000" cannot be read ("80,443:1000" can be read as one exclusion and as several: put ; between exclusions, and behind the only one): accepted is proto:ports:uids, ports:uids or uids, such as tcp:22,80-90:1000-1005, with ; between several`},
		{"REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS", "icmp:1:1", `"icmp:1:1" cannot be read ("icmp:1:1": protocol "icmp": accepted is tcp, udp or *)`},
		{"WAIT", "5s", `"5s" is not accepted: accepted is whole seconds from 0 to 2147483647`},
		{"WAIT_INTERVAL", "-1", `"-1" is not accepted: accepted is whole microseconds`},
		{"RETRY_MAX_RETRIES", "1001", `"1001" is not accepted: accepted is a number from 0 to 1000`},
		{"RETRY_SLEEP_BETWEEN_RETRIES", "2", `"2" is not accepted: accepted is a duration from 0s to 1h with its unit`},
		{"IP_FAMILY_MODE", "ipv6", `"ipv6" is not accepted: accepted is dualstack or ipv4`},
		{"BACKEND", "nft", `"nft" is not accepted: accepted is auto, nftables, iptables-nft or iptables-legacy`},
		{"KUMA_DP_USER", "1,x", `"1,x" is no user: accepted is a user's name`},
		{"KUMA_DP_USER", "\xff", `"\xff" is not UTF-8: accepted is text in UTF-8`},
		{"STORE_FIREWALLD", "yes", `"yes" is no boolean: accepted is true or false`},
		{"PERSIST", "disk", `"disk" is not accepted: accepted is auto, systemd, firewalld or none`},
		{"DROP_INVALID_PACKETS", "true", `"true" is known, not supported yet: accepted is the default, false`},
		{"LOG_LEVEL", "4", `"4" is known, not supported yet: accepted is the default, 7`},
		{"REDIRECT_VNET_NETWORKS", "a:10.0.0.0/8", `"a:10.0.0.0/8" is known, not supported yet: accepted is the default, []`},
		{"IPTABLES_EXECUTABLES", "iptables:/x", `"iptables:/x" is known, not supported yet: accepted is the default, ""`},
		{"EBPF_ENABLED", "true", `"true" is not supported: there are iptables rules alone`},
		{"REDIRECT_INBOUND_CHAIN_NAME", "MINE", `"MINE" is not supported: chains have fixed names: accepted is the default, INBOUND`},
	} {
		l, err := cli.Loader{Environ: []string{"PATH=/bin", prefix + test.name + "=" + test.value}}.Load()
		if err == nil || l != nil || !strings.HasPrefix(err.Error(), prefix+test.name+": ") || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s=%s: %v", test.name, test.value, err)
		}
	}
	// Several at once, and the files beside them.
	_, err := cli.Loader{Environ: []string{prefix + "WAIT=x", prefix + "CNI_MODE=x"}}.LoadSources(cli.Source{Name: "c", Text: []byte("log: 5")})
	if err == nil || strings.Count(err.Error(), "\n") != 2 {
		t.Error(err)
	}
}

// Others share the environment: what is not known there is no error.
func TestUnknownVariables(t *testing.T) {
	l, err := cli.Loader{Environ: []string{prefix + "REDIRECT_INBOND_PORT=1", prefix + "=2", prefix + "LATER=", "KUMA_OTHER=3",
		prefix + "REDIRECT_OUTBOUND_CHAIN_NAME=OUTBOUND", prefix + "WAIT=1", prefix + "WAIT=7", prefix + "WAIT_INTERVAL= "}}.Load()
	if err != nil || l.Config.Wait != 7*time.Second || len(l.From) != 1 || len(l.Warnings) != 2 {
		t.Fatalf("%+v, %v", l, err)
	}
	long, err := cli.Loader{Environ: []string{prefix + strings.Repeat("X\xff", 1<<16) + "=" + strings.Repeat("y", 1<<16)}}.Load()
	if err != nil || len(long.Warnings) != 1 || len(long.Warnings[0].String()) > 1000 {
		t.Errorf("%d, %v", len(long.Warnings), err)
	}
	if got, want := l.Warnings[1].String(), prefix+`REDIRECT_INBOND_PORT: "1" has no effect: there is no such variable: accepted is `+prefix+`REDIRECT_INBOUND_PORT, the nearest one`; got != want {
		t.Errorf("%s", got)
	}
}

// What holds between values names the source of each.
func TestFaultsNameTheirSources(t *testing.T) {
	file := write(t, "c.yaml", "log: {}\nredirect:\n  inbound:\n    port: 15001\n")
	for _, test := range []struct {
		environ []string
		args    []string
		want    string
	}{
		{nil, []string{"--config", file}, `--redirect-outbound-port: "15001" is redirect.inbound.port (` + file + `:4) too: accepted is a port of the proxy for each of inbound, outbound and DNS`},
		{nil, []string{"--config", file, "--redirect-outbound-port=15001"}, `--redirect-outbound-port: "15001" is redirect.inbound.port (` + file + `:4) too`},
		{[]string{prefix + "REDIRECT_DNS_PORT=15001"}, []string{"--config", file, "--redirect-outbound-port=1"},
			prefix + `REDIRECT_DNS_PORT: "15001" is redirect.inbound.port (` + file + `:4) too`},
		{[]string{prefix + "REDIRECT_INBOUND_PORT=1"}, []string{"--redirect-dns-port=1"}, `--redirect-dns-port: "1" is ` + prefix + `REDIRECT_INBOUND_PORT too`},
		{nil, []string{"--config", `{"redirect":{"inbound":{"port":1},"dns":{"port":1}}}`}, `--config:1: redirect.dns.port: "1" is redirect.inbound.port (--config:1) too`},
		{nil, []string{"--config", "{kumaDPUser: nobody-here}"}, `--config:1: kumaDPUser: "nobody-here" is no user of this host: accepted is a user that exists or a UID; to create it: useradd -u 5678 -U nobody-here`},
		{[]string{prefix + "KUMA_DP_USER=a b"}, nil, prefix + `KUMA_DP_USER: "a b" is no user: accepted is a user's name`},
		{nil, []string{"--kuma-dp-uid", "nobody-here"}, `--kuma-dp-uid: "nobody-here" is no user of this host`},
	} {
		_, _, err := installed(t, test.environ, test.args...)
		if err == nil || !strings.HasPrefix(err.Error(), test.want) || cli.ExitCode(err) != 2 {
			t.Errorf("%v %q:\n%v\nwant\n%s", test.environ, test.args, err, test.want)
		}
	}
}

// Faults of files, of the environment and of flags are said together, and nothing
// is asked of the machine but who the user is.
func TestFaultsOfAllSourcesTogether(t *testing.T) {
	c, _, err := installed(t, []string{prefix + "WAIT=x"}, "--config", "{log: 5}", "--config", "missing.yaml", "--redirect-dns-port", "0")
	if err == nil || c != nil || !strings.HasPrefix(err.Error(), "4 faults:\n") {
		t.Errorf("%v", err)
	}
}
