package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/cli"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

const prefix = "KUMA_TRANSPARENT_PROXY_"

// canonical is a Config with its defaults filled in, as text: Configs that mean
// the same have the same.
func canonical(t tproxytest.Fataler, c tproxy.Config) string {
	t.Helper()
	p, err := tproxy.Build(c, tproxy.Host{Users: someUsers})
	if err != nil {
		t.Fatalf("%v", err)
	}
	text, err := json.MarshalIndent(p.Config, "", " ")
	if err != nil {
		t.Fatalf("%v", err)
	}
	return string(text)
}

func sameConfig(t *testing.T, what string, got, want tproxy.Config) {
	t.Helper()
	if d := cmp.Diff(canonical(t, want), canonical(t, got)); d != "" {
		t.Errorf("%s: want -, got +\n%s", what, d)
	}
}

var someUsers = []tproxy.User{{Name: "kuma-dp", UID: 77}, {Name: "dataplane", UID: 78}}

// populated is a recorder on a host with some users.
type populated struct{ recorder }

func (*populated) Probe(context.Context, tproxy.Needs) (tproxy.Host, error) {
	return tproxy.Host{Users: someUsers}, nil
}

func loadText(t *testing.T, text string, environ ...string) *cli.Loaded {
	t.Helper()
	l, err := cli.Loader{Environ: environ}.LoadSources(cli.Source{Name: "config.yaml", Text: []byte(text)})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// installed runs the install command and returns the Config that it planned with.
func installed(t *testing.T, environ []string, args ...string) (c *tproxy.Config, stderr string, err error) {
	t.Helper()
	for _, e := range environ {
		name, v, _ := strings.Cut(e, "=")
		t.Setenv(name, v)
	}
	defer func() {
		for _, e := range environ {
			name, _, _ := strings.Cut(e, "=")
			_ = os.Unsetenv(name)
		}
	}()
	rec := new(populated)
	cmd := cli.InstallTransparentProxy(cli.Options{Runner: func(*slog.Logger) cli.Runner { return rec }})
	var out, errOut bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&errOut)
	cmd.SetArgs(append([]string{"--output=text"}, args...)) // with none at all it would take ours
	err = cmd.Execute()
	if rec.plan != nil {
		c = &rec.plan.Config
	}
	return c, errOut.String(), err
}

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// helmYAML is what the ConfigMap kuma-transparent-proxy-config holds when Kuma is
// installed by Helm without values of one's own.
const helmYAML = `comments:
  disabled: false
dropInvalidPackets: false
ipFamilyMode: dualstack
iptablesExecutables:
  ip6tables: ""
  ip6tables-restore: ""
  ip6tables-save: ""
  iptables: ""
  iptables-restore: ""
  iptables-save: ""
kumaDPUser: "5678"
log:
  enabled: false
redirect:
  dns:
    captureAll: true
    enabled: true
    port: 15053
    resolvConfigPath: /etc/resolv.conf
    skipConntrackZoneSplit: false
  inbound:
    enabled: true
    excludePorts: []
    excludePortsForIPs: []
    excludePortsForUIDs: []
    includePorts: []
    insertRedirectInsteadOfAppend: false
    port: 15006
  outbound:
    enabled: true
    excludePorts: []
    excludePortsForIPs: []
    excludePortsForUIDs: []
    includePorts: []
    insertRedirectInsteadOfAppend: false
    port: 15001
  vnet:
    networks: []
retry:
  maxRetries: 4
  sleepBetweenRetries: 2s
storeFirewalld: false
verbose: false
wait: 5
waitInterval: 0
`

// The same by a file of YAML, of JSON, by the environment and by flags.
func TestHelmConfigMap(t *testing.T) {
	want := tproxy.Config{
		ProxyUIDs: []tproxy.UID{5678},
		DNS:       tproxy.DNS{Redirect: true, CaptureAll: true},
	}
	l := loadText(t, helmYAML)
	sameConfig(t, "YAML", l.Config, want)
	if l.Settings != (tproxy.Settings{}) || l.Warnings != nil {
		t.Errorf("%+v, %v", l.Settings, l.Warnings)
	}
	if got := l.From["redirect.dns.port"]; got != "config.yaml:19" {
		t.Errorf("redirect.dns.port is from %s", got)
	}
	var tree any
	if err := yaml.Unmarshal([]byte(helmYAML), &tree); err != nil {
		t.Fatal(err)
	}
	text, err := json.MarshalIndent(tree, "", "\t") // tabs, which YAML forbids
	if err != nil {
		t.Fatal(err)
	}
	sameConfig(t, "JSON", loadText(t, string(text)).Config, want)

	environ, args := everywhere(t, tree)
	l, err = cli.Loader{Environ: environ}.Load()
	if err != nil || l.Warnings != nil {
		t.Fatal(err, l)
	}
	sameConfig(t, "environment", l.Config, want)
	// Not both of them on a command line, and no empty exclusion.
	args = slices.DeleteFunc(args, func(a string) bool { return a == "--redirect-dns=true" || a == "--exclude-outbound-ports-for-uids=" })
	c, stderr, err := installed(t, nil, args...)
	if err != nil || strings.Contains(stderr, "Note") {
		t.Fatal(err, stderr)
	}
	sameConfig(t, "flags", *c, want)
	c, _, err = installed(t, nil, "--config", write(t, "config.yaml", helmYAML))
	if err != nil {
		t.Fatal(err)
	}
	sameConfig(t, "--config", *c, want)
}

// flagOf maps keys to flags; inverse are those that say the contrary of the key.
var flagOf = map[string]string{
	"kumaDPUser": "kuma-dp-user", "ipFamilyMode": "ip-family-mode",
	"redirect.inbound.enabled": "redirect-inbound", "redirect.inbound.port": "redirect-inbound-port",
	"redirect.inbound.includePorts": "include-inbound-ports", "redirect.inbound.excludePorts": "exclude-inbound-ports",
	"redirect.inbound.excludePortsForIPs":            "exclude-inbound-ips",
	"redirect.inbound.insertRedirectInsteadOfAppend": "redirect-inbound-insert-instead-of-append",
	"redirect.inbound.captureSSH":                    "capture-ssh",
	"redirect.outbound.enabled":                      "redirect-outbound", "redirect.outbound.port": "redirect-outbound-port",
	"redirect.outbound.includePorts": "include-outbound-ports", "redirect.outbound.excludePorts": "exclude-outbound-ports",
	"redirect.outbound.excludePortsForIPs":            "exclude-outbound-ips",
	"redirect.outbound.excludePortsForUIDs":           "exclude-outbound-ports-for-uids",
	"redirect.outbound.insertRedirectInsteadOfAppend": "redirect-outbound-insert-instead-of-append",
	"redirect.dns.enabled":                            "redirect-dns", "redirect.dns.captureAll": "redirect-all-dns-traffic",
	"redirect.dns.port": "redirect-dns-port", "redirect.dns.skipConntrackZoneSplit": "skip-dns-conntrack-zone-split",
	"redirect.dns.controlPlaneIP": "kuma-cp-ip", "redirect.dns.modifySharedResolvConfig": "modify-resolv-conf",
	"redirect.dns.redirectTCP": "redirect-dns-tcp", "redirect.dns.resolvConfigPath": "resolv-conf", "redirect.vnet.networks": "vnet",
	"dropInvalidPackets": "drop-invalid-packets", "log.enabled": "iptables-logs", "wait": "wait", "waitInterval": "wait-interval",
	"retry.maxRetries": "max-retries", "retry.sleepBetweenRetries": "sleep-between-retries", "storeFirewalld": "store-firewalld", "persist": "persist",
	"comments.disabled": "disable-comments", "dryRun": "dry-run", "verbose": "verbose", "backend": "backend",
	"ebpf.enabled": "ebpf-enabled",
}

// plain is a value as environment variables and flags have it.
func plain(v any) string {
	switch v := v.(type) {
	case []any:
		var all []string
		for _, item := range v {
			all = append(all, fmt.Sprint(item))
		}
		if slices.ContainsFunc(all, func(s string) bool { return strings.Contains(s, ":") && !strings.Contains(s, "::") }) {
			return strings.Join(all, ";") // proto:ports:uids
		}
		return strings.Join(all, ",")
	}
	return fmt.Sprint(v)
}

// leaves are the values of a tree by their paths.
func leaves(tree any, path string, out map[string]any) {
	m, ok := tree.(map[string]any)
	if !ok {
		out[path] = tree
		return
	}
	for name, v := range m {
		leaves(v, strings.TrimPrefix(path+"."+name, "."), out)
	}
}

// everywhere is what a configuration is as variables and as flags.
func everywhere(t *testing.T, tree any) (environ, args []string) {
	t.Helper()
	all := map[string]any{}
	leaves(tree, "", all)
	for path, v := range all {
		if name, ok := envOf[path]; ok {
			environ = append(environ, name+"="+plain(v))
		} else if !strings.HasPrefix(path, "iptablesExecutables.") {
			t.Errorf("%s has no variable", path)
		}
		if name, ok := flagOf[path]; ok {
			args = append(args, "--"+name+"="+plain(v))
		}
	}
	slices.Sort(environ)
	slices.Sort(args)
	return environ, args
}

// envOf maps all keys to their variables, letter by letter.
var envOf = func() map[string]string {
	names := map[string]string{
		"kumaDPUser":                               "KUMA_DP_USER",
		"ipFamilyMode":                             "IP_FAMILY_MODE",
		"redirect.dns.enabled":                     "REDIRECT_DNS_ENABLED",
		"redirect.dns.captureAll":                  "REDIRECT_DNS_CAPTURE_ALL",
		"redirect.dns.port":                        "REDIRECT_DNS_PORT",
		"redirect.dns.skipConntrackZoneSplit":      "REDIRECT_DNS_SKIP_CONNTRACK_ZONE_SPLIT",
		"redirect.dns.resolvConfigPath":            "REDIRECT_DNS_RESOLV_CONFIG_PATH",
		"redirect.dns.controlPlaneIP":              "REDIRECT_DNS_CONTROL_PLANE_IP",
		"redirect.dns.modifySharedResolvConfig":    "REDIRECT_DNS_MODIFY_SHARED_RESOLV_CONFIG",
		"redirect.dns.redirectTCP":                 "REDIRECT_DNS_REDIRECT_TCP",
		"redirect.vnet.networks":                   "REDIRECT_VNET_NETWORKS",
		"redirect.inbound.captureSSH":              "REDIRECT_INBOUND_CAPTURE_SSH",
		"dropInvalidPackets":                       "DROP_INVALID_PACKETS",
		"log.enabled":                              "LOG_ENABLED",
		"log.level":                                "LOG_LEVEL",
		"wait":                                     "WAIT",
		"waitInterval":                             "WAIT_INTERVAL",
		"retry.maxRetries":                         "RETRY_MAX_RETRIES",
		"retry.sleepBetweenRetries":                "RETRY_SLEEP_BETWEEN_RETRIES",
		"storeFirewalld":                           "STORE_FIREWALLD",
		"comments.disabled":                        "COMMENTS_DISABLED",
		"cniMode":                                  "CNI_MODE",
		"verbose":                                  "VERBOSE",
		"dryRun":                                   "DRY_RUN",
		"backend":                                  "BACKEND",
		"persist":                                  "PERSIST",
		"ebpf.enabled":                             "EBPF_ENABLED",
		"ebpf.instanceIP":                          "EBPF_INSTANCE_IP",
		"ebpf.instanceIPEnvVarName":                "EBPF_INSTANCE_IP_ENV_VAR_NAME",
		"ebpf.bpffsPath":                           "EBPF_BPFFS_PATH",
		"ebpf.cgroupPath":                          "EBPF_CGROUP_PATH",
		"ebpf.programsSourcePath":                  "EBPF_PROGRAMS_SOURCE_PATH",
		"ebpf.tcAttachIface":                       "EBPF_TC_ATTACH_IFACE",
		"iptablesExecutables":                      "IPTABLES_EXECUTABLES",
		"redirect.D.enabled":                       "REDIRECT_D_ENABLED",
		"redirect.D.port":                          "REDIRECT_D_PORT",
		"redirect.D.includePorts":                  "REDIRECT_D_INCLUDE_PORTS",
		"redirect.D.excludePorts":                  "REDIRECT_D_EXCLUDE_PORTS",
		"redirect.D.excludePortsForUIDs":           "REDIRECT_D_EXCLUDE_PORTS_FOR_UIDS",
		"redirect.D.excludePortsForIPs":            "REDIRECT_D_EXCLUDE_PORTS_FOR_IPS",
		"redirect.D.insertRedirectInsteadOfAppend": "REDIRECT_D_INSERT_REDIRECT_INSTEAD_OF_APPEND",
	}
	out := map[string]string{}
	for path, name := range names {
		if !strings.Contains(path, ".D.") {
			out[path] = prefix + name
			continue
		}
		for _, d := range []string{"inbound", "outbound"} {
			out[strings.Replace(path, ".D.", "."+d+".", 1)] = prefix + strings.Replace(name, "_D_", "_"+strings.ToUpper(d)+"_", 1)
		}
	}
	return out
}()

// Every key has its variable, and a value that is refused names it.
func TestEnvironmentNames(t *testing.T) {
	keys := tproxy.Keys()
	keys = slices.DeleteFunc(keys, func(k tproxy.Key) bool { return strings.HasPrefix(k.Path, "iptablesExecutables") })
	keys = append(keys, tproxy.Key{Path: "iptablesExecutables"})
	if len(keys) != len(envOf) {
		t.Errorf("%d keys, %d variables", len(keys), len(envOf))
	}
	for _, k := range keys {
		name := envOf[k.Path]
		if name == "" {
			t.Errorf("%s has no variable", k.Path)
			continue
		}
		l, err := cli.Loader{Environ: []string{name + "="}}.Load()
		if err != nil || len(l.From) > 0 || l.Warnings != nil {
			t.Errorf("%s, empty: %+v, %v", name, l, err)
		}
		l, err = cli.Loader{Environ: []string{name + "=,"}}.Load()
		switch {
		case strings.HasPrefix(k.Path, "ebpf.") && k.Path != "ebpf.enabled", k.Path == "redirect.dns.resolvConfigPath":
			if err != nil || l.From[k.Path] != name {
				t.Errorf("%s: %+v, %v", name, l, err)
			}
		default:
			e, ok := errors.AsType[*tproxy.ConfigError](err)
			if !ok || e.Faults[0].Source != name || !strings.HasPrefix(err.Error(), name+`: ","`) || strings.Contains(err.Error(), "no such variable") {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// pair is two values of a key that both differ from its default.
type pair struct{ a, b string }

// values has them as JSON. With one that is not built yet, b is the default.
var values = map[string]pair{
	"kumaDPUser": {`"dataplane"`, `"1234"`}, "ipFamilyMode": {`"ipv4"`, `"dualstack"`},
	"redirect.inbound.enabled": {"false", "true"}, "redirect.inbound.port": {"16006", "17006"},
	"redirect.inbound.excludePorts": {`[80,"90-99"]`, "[443]"}, "redirect.inbound.excludePortsForIPs": {`["10.0.0.0/8","fd00::1"]`, `["192.0.2.7"]`},
	"redirect.inbound.captureSSH": {"true", "false"},
	"redirect.outbound.enabled":   {"false", "true"}, "redirect.outbound.port": {"16001", "17001"},
	"redirect.outbound.excludePorts": {`[80,"90-99"]`, "[443]"}, "redirect.outbound.excludePortsForIPs": {`["10.0.0.0/8","fd00::1"]`, `["192.0.2.7"]`},
	"redirect.outbound.excludePortsForUIDs": {`["tcp:22,80-90:1000-1005","*:*:7"]`, `["udp:53:8"]`},
	"redirect.dns.enabled":                  {"true", "false"}, "redirect.dns.captureAll": {"true", "false"}, "redirect.dns.port": {"16053", "17053"},
	"redirect.dns.skipConntrackZoneSplit": {"true", "false"}, "redirect.dns.resolvConfigPath": {`"/a"`, `"/b"`},
	"redirect.dns.controlPlaneIP": {`"10.0.0.9"`, `"fd00::9"`}, "redirect.dns.modifySharedResolvConfig": {"true", "false"},
	"redirect.dns.redirectTCP": {"true", "false"},
	"wait":                     {"7", "0"}, "waitInterval": {"1", "2"}, "retry.maxRetries": {"0", "9"}, "retry.sleepBetweenRetries": {`"1s"`, `"0s"`},
	"comments.disabled": {"true", "false"}, "cniMode": {"true", "false"}, "persist": {`"systemd"`, `"none"`}, "backend": {`"iptables-legacy"`, `"iptables-nft"`},

	"redirect.inbound.includePorts": {"[1]", "[]"}, "redirect.outbound.includePorts": {"[1]", "[]"},
	"redirect.inbound.insertRedirectInsteadOfAppend": {"true", "false"}, "redirect.outbound.insertRedirectInsteadOfAppend": {"true", "false"},
	"redirect.vnet.networks": {`["docker0:172.17.0.0/16"]`, "[]"}, "dropInvalidPackets": {"true", "false"}, "log.enabled": {"true", "false"},
	"log.level": {"4", "7"}, "storeFirewalld": {"true", "false"},
	"iptablesExecutables.iptables": {`"/x"`, `""`}, "iptablesExecutables.iptables-save": {`"/x"`, `""`}, "iptablesExecutables.iptables-restore": {`"/x"`, `""`},
	"iptablesExecutables.ip6tables": {`"/x"`, `""`}, "iptablesExecutables.ip6tables-save": {`"/x"`, `""`}, "iptablesExecutables.ip6tables-restore": {`"/x"`, `""`},
}

// notPaired are keys of which one value alone is accepted, or all, or that are of
// a run (TestSettingsPrecedence).
var notPaired = []string{"redirect.inbound.excludePortsForUIDs", "ebpf.", "dryRun", "verbose"}

func notBuilt(path string) bool {
	for _, p := range []string{"includePorts", "insertRedirect", "vnet", "dropInvalid", "log.", "iptablesExec"} {
		if strings.Contains(path, p) {
			return true
		}
	}
	return false
}

func document(path, value string) string {
	names := strings.Split(path, ".")
	slices.Reverse(names)
	for _, name := range names {
		value = fmt.Sprintf("{%q:%s}", name, value)
	}
	return value
}

// sourcesOf are the ways to give a key a value, the weakest first. give returns nil
// for a way that the key does not have.
var sourcesOf = []struct {
	name string
	give func(t *testing.T, path, value string) (environ, args []string, has bool)
}{
	{"file", func(t *testing.T, path, value string) ([]string, []string, bool) {
		return nil, []string{"--config", write(t, "a.yaml", document(path, value))}, true
	}},
	{"later file", func(t *testing.T, path, value string) ([]string, []string, bool) {
		return nil, []string{"--config", write(t, "b.yaml", document(path, value))}, true
	}},
	{"environment", func(t *testing.T, path, value string) ([]string, []string, bool) {
		return []string{envOf[path] + "=" + plain(parsed(t, value))}, nil, envOf[path] != ""
	}},
	{"flag", func(t *testing.T, path, value string) ([]string, []string, bool) {
		return nil, []string{"--" + flagOf[path] + "=" + plain(parsed(t, value))}, flagOf[path] != ""
	}},
}

func parsed(t *testing.T, value string) (v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(value), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// Every key, and every pair of sources: the stronger one wins, and a list takes
// the place of the list before it.
func TestPrecedence(t *testing.T) {
	checked := 0
	for _, k := range tproxy.Keys() {
		v, ok := values[k.Path]
		if !ok {
			if !slices.ContainsFunc(notPaired, func(p string) bool { return strings.HasPrefix(k.Path, p) }) {
				t.Errorf("%s has no values here", k.Path)
			}
			continue
		}
		// DNS has to be on for captureAll to show.
		base := []string{"--config", `{"redirect":{"dns":{"enabled":` + fmt.Sprint(k.Path == "redirect.dns.captureAll") + `}}}`}
		for i, weak := range sourcesOf {
			for _, strong := range sourcesOf[i+1:] {
				for _, order := range [][2]string{{v.a, v.b}, {v.b, v.a}} {
					weakEnv, weakArgs, has1 := weak.give(t, k.Path, order[0])
					strongEnv, strongArgs, has2 := strong.give(t, k.Path, order[1])
					if !has1 || !has2 {
						continue
					}
					what := fmt.Sprintf("%s: %s from the %s, %s from the %s", k.Path, order[0], weak.name, order[1], strong.name)
					got, _, err := installed(t, append(weakEnv, strongEnv...), slices.Concat(base, weakArgs, strongArgs)...)
					// An empty variable is as if it were not there.
					wins := order[1]
					if strong.name == "environment" && plain(parsed(t, wins)) == "" {
						wins = order[0]
					}
					checked++
					if notBuilt(k.Path) {
						if (err == nil) != (wins == v.b) {
							t.Errorf("%s: error %v", what, err)
						}
						continue
					}
					if err != nil {
						t.Errorf("%s: %v", what, err)
						continue
					}
					want, _, err := installed(t, nil, append(base, "--config", document(k.Path, wins))...)
					if err != nil {
						t.Fatal(err)
					}
					sameConfig(t, what, *got, *want)
				}
			}
		}
		if !notBuilt(k.Path) && canonical(t, loadText(t, document(k.Path, v.a)).Config) == canonical(t, loadText(t, document(k.Path, v.b)).Config) && k.Path != "redirect.dns.captureAll" {
			t.Errorf("%s: %s and %s mean the same", k.Path, v.a, v.b)
		}
	}
	if checked < 300 {
		t.Errorf("%d pairs were checked", checked)
	}
	t.Logf("%d pairs", checked)
}

// What of a run stands in a file or in the environment has its effect, and a flag
// wins.
func TestSettingsPrecedence(t *testing.T) {
	for _, test := range []struct {
		environ []string
		args    []string
		dry     bool
		verbose bool
	}{
		{nil, nil, false, false},
		{nil, []string{"--config={dryRun: true, verbose: true}"}, true, true},
		{[]string{prefix + "DRY_RUN=1", prefix + "VERBOSE=t"}, nil, true, true},
		{[]string{prefix + "DRY_RUN=false"}, []string{"--config={dryRun: true, verbose: true}"}, false, true},
		{nil, []string{"--config={dryRun: true}", "--config={dryRun: false, verbose: true}"}, false, true},
		{[]string{prefix + "DRY_RUN=true"}, []string{"--dry-run=false", "--verbose"}, false, true},
		{nil, []string{"--config={dryRun: true, verbose: true}", "--dry-run=false", "--verbose=false"}, false, false},
		{nil, []string{"--config={dryRun: false}", "--dry-run"}, true, false},
	} {
		c, stderr, err := installed(t, append(test.environ, prefix+"WAIT=9"), test.args...)
		verbose := strings.Contains(stderr, "level=DEBUG msg=configuration key=wait value=9 from=KUMA_TRANSPARENT_PROXY_WAIT")
		if err != nil || (c == nil) != test.dry || verbose != test.verbose {
			t.Errorf("%v %v: dry %v, verbose %v, %v", test.environ, test.args, c == nil, verbose, err)
		}
	}
}

// K2: Kuma reads the environment only beside a --config.
func TestK2EnvironmentWithoutConfig(t *testing.T) {
	for _, args := range [][]string{nil, {"--config", "{}"}, {"--config="}} {
		c, _, err := installed(t, []string{prefix + "REDIRECT_INBOUND_PORT=16006", prefix + "REDIRECT_OUTBOUND_EXCLUDE_PORTS=443,8000-8100"}, args...)
		if err != nil {
			t.Fatal(err)
		}
		if c.Inbound.Port != 16006 || c.Outbound.ExcludePorts.String() != "443,8000-8100" {
			t.Errorf("%v: %#v", args, c)
		}
	}
}

// K3: Kuma documents a list of files with commas, and takes it for one file.
func TestK3ConfigIsAList(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for name, text := range map[string]string{
		"a.yaml":   "redirect: {inbound: {port: 1, excludePorts: [80]}, outbound: {port: 2}}",
		"b.yaml":   "redirect: {inbound: {excludePorts: [90]}, outbound: {port: 3}}",
		"c,d.yaml": "redirect: {outbound: {port: 4}}",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		values []string
		in     uint16
		out    uint16
		ports  string
	}{
		{[]string{"a.yaml,b.yaml"}, 1, 3, "90"},
		{[]string{" a.yaml , b.yaml "}, 1, 3, "90"},
		{[]string{"b.yaml,a.yaml"}, 1, 2, "80"},
		{[]string{"a.yaml", "b.yaml"}, 1, 3, "90"},
		{[]string{"a.yaml", "", "-"}, 1, 5, "80"},
		{[]string{"-,a.yaml"}, 1, 2, "80"},
		{[]string{"c,d.yaml"}, 0, 4, ""}, // its very name
		{[]string{"a.yaml", "c,d.yaml"}, 1, 4, "80"},
	} {
		l, err := cli.Loader{Stdin: strings.NewReader("redirect: {outbound: {port: 5}}")}.Load(test.values...)
		if err != nil {
			t.Errorf("%q: %v", test.values, err)
			continue
		}
		c := l.Config
		if c.Inbound.Port != test.in || c.Outbound.Port != test.out || c.Inbound.ExcludePorts.String() != test.ports {
			t.Errorf("%q: %#v", test.values, c)
		}
	}
}

// K9 and K11: UIDs beyond 16 bits, and more than 15 ports, of one exclusion; K10:
// users have no meaning for packets from other hosts. By file, variable and flag.
func TestK9K10K11ExclusionsForUIDs(t *testing.T) {
	var ports []string
	for p := range 20 {
		ports = append(ports, fmt.Sprint(1000+2*p))
	}
	exclusion := "tcp:" + strings.Join(ports, ",") + ":1000680000-1000689999"
	for name, c := range map[string]*tproxy.Config{
		"file":     first(installed(t, nil, "--config", document("redirect.outbound.excludePortsForUIDs", fmt.Sprintf("[%q]", exclusion)))),
		"variable": first(installed(t, []string{prefix + "REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS=" + exclusion})),
		"flag":     first(installed(t, nil, "--exclude-outbound-ports-for-uids", exclusion)),
	} {
		if c == nil || len(c.Outbound.ExcludePortsForUIDs) != 1 || c.Outbound.ExcludePortsForUIDs[0].String() != exclusion {
			t.Errorf("%s: %#v", name, c)
		}
	}
	for name, give := range map[string][]string{"a.yaml:1": nil, prefix + "REDIRECT_INBOUND_EXCLUDE_PORTS_FOR_UIDS": {prefix + "REDIRECT_INBOUND_EXCLUDE_PORTS_FOR_UIDS=1001"}} {
		text := "{}"
		if give == nil {
			text = document("redirect.inbound.excludePortsForUIDs", `["1001"]`)
		}
		_, err := cli.Loader{Environ: give}.LoadSources(cli.Source{Name: "a.yaml", Text: []byte(text)})
		if err == nil || !strings.HasPrefix(err.Error(), name+": ") || !strings.Contains(err.Error(), "has no meaning: who sent a packet from another host is not known here") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func first(c *tproxy.Config, _ string, _ error) *tproxy.Config { return c }

// What Kuma's documentation shows, and what is the same.
func TestKumasDocumentation(t *testing.T) {
	ports := `redirect:
  inbound:
    excludePorts: [1234]
  outbound:
    excludePorts: [5678, 8900]
`
	ips := `redirect:
  inbound:
    excludePortsForIPs: [10.0.0.0/8]
  outbound:
    excludePortsForIPs: [192.168.10.1, fd10::/16]
`
	defaults := `ipFamilyMode: "dualstack"
redirect:
  inbound: {enabled: true, port: 15006}
  outbound: {enabled: true, port: 15001}
  dns: {port: 15053, resolvConfigPath: "/etc/resolv.conf"}
ebpf: {bpffsPath: "/run/kuma/bpf", cgroupPath: "/sys/fs/cgroup", programsSourcePath: "/tmp/kuma-ebpf"}
retry: {maxRetries: 4, sleepBetweenRetries: "2s"}
log: {level: 7}
wait: 5
`
	for _, same := range [][]struct {
		environ []string
		args    []string
	}{
		{
			{nil, []string{"--config", ports}}, // a text of several lines
			{nil, []string{"--config", write(t, "c.yaml", ports)}},
			{nil, []string{"--config", `{"redirect":{"inbound":{"excludePorts":[1234]},"outbound":{"excludePorts":[5678,8900]}}}`}},
			{[]string{prefix + "REDIRECT_INBOUND_EXCLUDE_PORTS=1234", prefix + "REDIRECT_OUTBOUND_EXCLUDE_PORTS=5678,8900"}, nil},
			{nil, []string{"--exclude-inbound-ports", "1234", "--exclude-outbound-ports", "5678,8900"}},
		}, {
			{nil, []string{"--config", ips}},
			{[]string{prefix + "REDIRECT_INBOUND_EXCLUDE_PORTS_FOR_IPS=10.0.0.0/8", prefix + "REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_IPS=192.168.10.1,fd10::/16"}, nil},
			{nil, []string{"--exclude-inbound-ips", "10.0.0.0/8", "--exclude-outbound-ips", "192.168.10.1,fd10::/16"}},
			{nil, []string{"--exclude-inbound-ips", "10.0.0.0/8", "--exclude-outbound-ips", "192.168.10.1", "--exclude-outbound-ips", "fd10::/16"}},
		}, {
			{nil, []string{"--config", "{ kumaDPUser: 1234, verbose: true }"}},
			{nil, []string{"--config", "kumaDPUser: 1234\nverbose: true"}},
			{nil, []string{"--config", "kumaDPUser: 1234"}},
			{nil, []string{"--kuma-dp-user", "1234", "--verbose"}},
			{[]string{prefix + "KUMA_DP_USER=1234"}, nil},
		}, {
			{nil, []string{"--config", defaults}},
			{nil, nil},
		}, {
			{nil, []string{"--exclude-outbound-ports-for-uids", "1000-1100;udp:*:2000"}},
			{nil, []string{"--exclude-outbound-ports-for-uids", "1000-1100", "--exclude-outbound-ports-for-uids", "udp:*:2000"}},
			{[]string{prefix + "REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS=1000-1100;udp:*:2000"}, nil},
			{[]string{prefix + "REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS=1000-1100,udp:*:2000"}, nil}, // as Kuma's reader splits
			{nil, []string{"--config", `{"redirect":{"outbound":{"excludePortsForUIDs":["1000-1100","udp:*:2000"]}}}`}},
			{nil, []string{"--config", `{"redirect":{"outbound":{"excludePortsForUIDs":"1000-1100;udp:*:2000"}}}`}},
		}, {
			{[]string{prefix + "REDIRECT_DNS_PORT=10002"}, []string{"--config", "{redirect: {dns: {port: 10001}}}", "--redirect-dns-port", "10003"}},
			{nil, []string{"--redirect-dns-port", "10003"}},
		}, {
			{nil, []string{"--redirect-all-dns-traffic"}},
			{nil, []string{"--config", "{redirect: {dns: {enabled: true, captureAll: true}}}"}},
			{[]string{prefix + "REDIRECT_DNS_ENABLED=true", prefix + "REDIRECT_DNS_CAPTURE_ALL=true"}, nil},
			{nil, []string{"--config", "{redirect: {dns: {captureAll: true}}}", "--redirect-dns"}},
		},
	} {
		want, _, err := installed(t, same[0].environ, same[0].args...)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range same[1:] {
			got, _, err := installed(t, s.environ, s.args...)
			if err != nil {
				t.Errorf("%v %q: %v", s.environ, s.args, err)
				continue
			}
			sameConfig(t, fmt.Sprintf("%v %q", s.environ, s.args), *got, *want)
		}
	}
}

// A file with every key, and the same by the environment and by flags.
func TestEveryKey(t *testing.T) {
	const text = `kumaDPUser: "1234"
ipFamilyMode: ipv4
redirect:
  inbound:
    enabled: false
    port: 16006
    includePorts: []
    excludePorts: [22, "80-90"]
    excludePortsForUIDs: []
    excludePortsForIPs: [10.0.0.0/8, "fd00::1"]
    insertRedirectInsteadOfAppend: false
    captureSSH: true
  outbound:
    enabled: false
    port: 16001
    includePorts: []
    excludePorts: [443]
    excludePortsForUIDs: ["tcp:22,80-90:1000-1005", "*:*:7"]
    excludePortsForIPs: [192.0.2.7]
    insertRedirectInsteadOfAppend: false
  dns:
    enabled: true
    captureAll: true
    port: 16053
    skipConntrackZoneSplit: true
    resolvConfigPath: /run/resolv.conf
    controlPlaneIP: 10.0.0.9
    modifySharedResolvConfig: true
    redirectTCP: true
  vnet: {networks: []}
ebpf: {enabled: false, instanceIP: "", instanceIPEnvVarName: INSTANCE_IP, bpffsPath: /a, cgroupPath: /b, programsSourcePath: /c, tcAttachIface: ""}
dropInvalidPackets: false
log: {enabled: false, level: 7}
wait: 9
waitInterval: 250
retry: {maxRetries: 7, sleepBetweenRetries: 1m30s}
storeFirewalld: false
iptablesExecutables: {iptables: "", iptables-save: "", iptables-restore: "", ip6tables: "", ip6tables-save: "", ip6tables-restore: ""}
comments: {disabled: true}
verbose: false
dryRun: false
cniMode: false
backend: iptables-legacy
persist: none
`
	var tree map[string]any
	if err := yaml.Unmarshal([]byte(text), &tree); err != nil {
		t.Fatal(err)
	}
	l := loadText(t, text)
	for _, k := range tproxy.Keys() {
		if l.From[k.Path] == "" {
			t.Errorf("%s is not in the file", k.Path)
		}
	}
	if l.Config.MaxRetries != 7 || l.Config.SleepBetweenRetries != 90*time.Second || l.Config.WaitInterval != 250*time.Microsecond || !l.Config.Inbound.CaptureSSH {
		t.Errorf("%#v", l.Config)
	}
	environ, args := everywhere(t, tree)
	byEnv, err := cli.Loader{Environ: environ}.Load()
	if err != nil || byEnv.Warnings != nil {
		t.Fatal(err, byEnv)
	}
	sameConfig(t, "environment", byEnv.Config, l.Config)
	byFlags, _, err := installed(t, nil, slices.DeleteFunc(args, func(a string) bool { return a == "--redirect-dns=true" })...)
	if err != nil {
		t.Fatal(err)
	}
	sameConfig(t, "flags", *byFlags, l.Config)
}

// Read, write, read: what is written means the same, and is read back as it is.
func TestConfigsAreReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := tproxytest.Configs().Draw(t, "config")
		c.Wait = time.Duration(rapid.IntRange(-1, 100).Draw(t, "wait")) * time.Second
		c.MaxRetries = rapid.IntRange(-1, 10).Draw(t, "retries")
		c.SleepBetweenRetries = time.Duration(rapid.IntRange(-1, 1e9).Draw(t, "sleep"))
		c.DNS.ControlPlane = rapid.SampledFrom([]netip.Addr{{}, netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fe80::1%eth0")}).Draw(t, "control plane")
		c.DNS.ModifyShared = rapid.Bool().Draw(t, "shared")
		c.DNS.ResolvConf = rapid.SampledFrom([]string{"", "/etc/resolv.conf", "yes", "0x10", "a: b #c", "'\"\\", " x ", "~", "&a", "*a", "<<", "\u007f\u0085\u2028\ufeff", "-", "é\U0001f600"}).Draw(t, "path")
		asJSON, err := json.MarshalIndent(c, "", rapid.SampledFrom([]string{"", "  ", "\t"}).Draw(t, "indent"))
		if err != nil {
			t.Fatal(err)
		}
		asYAML := yamlText(t, asJSON)
		var read []string
		for _, text := range [][]byte{asJSON, asYAML} {
			l, err := cli.Loader{}.LoadSources(cli.Source{Name: "x", Text: text})
			if err != nil {
				t.Fatalf("%s\n%v", text, err)
			}
			again, err := json.MarshalIndent(l.Config, "", "\t")
			if err != nil {
				t.Fatal(err)
			}
			m, err := cli.Loader{}.LoadSources(cli.Source{Name: "x", Text: again})
			if err != nil || fmt.Sprintf("%#v", m.Config) != fmt.Sprintf("%#v", l.Config) {
				t.Fatalf("%s\n%#v\n%#v\n%v", again, l.Config, m.Config, err)
			}
			read = append(read, canonical(t, l.Config))
		}
		if want := canonical(t, c); read[0] != want || read[1] != want {
			t.Fatalf("%s\n%s", asYAML, cmp.Diff(want, read[1]))
		}
	})
}

// yamlText is a document as the command writes it with --output yaml.
func yamlText(t tproxytest.Fataler, text []byte) []byte {
	t.Helper()
	out, err := cli.YAMLOf(text)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return out
}

// With --output yaml the section config loads, and is the Config that was planned.
func TestOutputLoadsBack(t *testing.T) {
	for _, format := range []string{"json", "yaml"} {
		rec := new(recorder)
		cmd := cli.InstallTransparentProxy(rec.options())
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.SetArgs([]string{"--output", format, "--exclude-inbound-ports", "80-90", "--redirect-all-dns-traffic", "--capture-ssh", "--max-retries", "0"})
		if err := cmd.Execute(); err != nil {
			t.Fatal(err)
		}
		from, to := write(t, "plan", out.String()), write(t, "config", "")
		if err := configOf(from, to); err != nil {
			t.Fatalf("%v\n%s", err, out.String())
		}
		text, err := os.ReadFile(to)
		if err != nil {
			t.Fatal(err)
		}
		sameConfig(t, format, loadText(t, string(text)).Config, rec.plan.Config)
	}
}
