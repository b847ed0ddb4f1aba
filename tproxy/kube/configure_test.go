package kube_test

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/kube"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

const traffic = "KUMA_RUNTIME_KUBERNETES_SIDECAR_TRAFFIC_"

// settings reads settings that have to be good.
func settings(t testing.TB, env map[string]string, configMaps ...string) kube.Settings {
	t.Helper()
	var docs []kube.Document
	for _, text := range configMaps {
		docs = append(docs, kube.Document{Name: "ConfigMap kuma-transparent-proxy-config", JSON: []byte(text)})
	}
	s, err := kube.ReadSettings(env, docs...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// inPod is what a pod of a control plane of which nothing is set gets, with changes.
func inPod(change func(*tproxy.Config)) tproxy.Config {
	c := tproxy.Config{
		ProxyUIDs: []tproxy.UID{5678},
		Inbound:   tproxy.Inbound{Port: 15006, ExcludePorts: rules.MustPorts("9001")},
		Outbound:  tproxy.Outbound{Port: 15001},
		DNS:       tproxy.DNS{Redirect: true, CaptureAll: true, Port: 15053},
		Pod:       true,
	}
	if change != nil {
		change(&c)
	}
	return c
}

func TestConfigure(t *testing.T) {
	prefixes := func(list string) []netip.Prefix {
		p, err := tproxy.ParsePrefixes(list)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	exclusions := func(list string) []tproxy.UIDExclusion {
		e, err := tproxy.ParseUIDExclusions(list)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	global := map[string]string{
		traffic + "EXCLUDE_INBOUND_PORTS":                                   "1111",
		traffic + "EXCLUDE_OUTBOUND_PORTS":                                  "2222,3333",
		traffic + "EXCLUDE_INBOUND_IPS":                                     "10.1.0.0/16",
		traffic + "EXCLUDE_OUTBOUND_IPS":                                    "10.2.0.1,fd00::/8",
		"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_IP_FAMILY_MODE": "ipv4",
	}
	globally := func(c *tproxy.Config) {
		c.Inbound.ExcludePorts, c.Outbound.ExcludePorts = rules.MustPorts("1111,9001"), rules.MustPorts("2222,3333")
		c.Inbound.ExcludeIPs, c.Outbound.ExcludeIPs = prefixes("10.1.0.0/16"), prefixes("10.2.0.1,fd00::/8")
		c.IPFamilyMode = tproxy.IPv4Only
	}
	for _, c := range []struct {
		name        string
		env         map[string]string
		configMap   string
		annotations map[string]string
		want        func(*tproxy.Config)
	}{
		{name: "nothing is set"},
		{name: "the control plane's settings", env: global, want: globally},
		{name: "each annotation wins", env: global, annotations: map[string]string{
			kube.KeyInboundPorts: "8080, 9000-9010", kube.KeyOutboundPorts: "443", kube.KeyInboundIPs: "192.0.2.0/24",
			kube.KeyOutboundIPs: "2001:db8::1", kube.KeyFamily: "dualstack", kube.KeyOutboundUIDs: "tcp:22:1000-1005;udp:53:1001",
		}, want: func(c *tproxy.Config) {
			c.Inbound.ExcludePorts, c.Outbound.ExcludePorts = rules.MustPorts("8080,9000-9010"), rules.MustPorts("443")
			c.Inbound.ExcludeIPs, c.Outbound.ExcludeIPs = prefixes("192.0.2.0/24"), prefixes("2001:db8::1")
			c.Outbound.ExcludePortsForUIDs = exclusions("tcp:22:1000-1005;udp:53:1001")
		}},
		{name: "an empty one clears", env: global, annotations: map[string]string{
			kube.KeyInboundPorts: "", kube.KeyOutboundPorts: "", kube.KeyInboundIPs: " ", kube.KeyOutboundIPs: "", kube.KeyFamily: "", kube.KeyOutboundUIDs: "",
			kube.KeyDropInvalid: "", kube.KeyLogs: "",
		}},
		{name: "the first annotation of the two leaves the second setting", env: global,
			annotations: map[string]string{kube.KeyInboundPorts: ""},
			want: func(c *tproxy.Config) {
				globally(c)
				c.Inbound.ExcludePorts = rules.MustPorts("9001")
			}},
		{name: "a UID of OpenShift, and a trailing separator", annotations: map[string]string{kube.KeyOutboundUIDs: "tcp:22,80-90:1000680000;"},
			want: func(c *tproxy.Config) { c.Outbound.ExcludePortsForUIDs = exclusions("tcp:22,80-90:1000680000;") }},
		{name: "a gateway", annotations: map[string]string{kube.KeyGateway: "enabled"}, want: func(c *tproxy.Config) { c.Inbound.Off = true }},
		{name: "a gateway that is provided", annotations: map[string]string{kube.KeyGateway: "provided"}, want: func(c *tproxy.Config) { c.Inbound.Off = true }},
		{name: "no gateway", annotations: map[string]string{kube.KeyGateway: "disabled"}},
		{name: "a probe proxy of the pod's own", annotations: map[string]string{kube.KeyProbePort: "9002"},
			want: func(c *tproxy.Config) { c.Inbound.ExcludePorts = rules.MustPorts("9002") }},
		{name: "no probe proxy", annotations: map[string]string{kube.KeyProbePort: "0"}, want: func(c *tproxy.Config) { c.Inbound.ExcludePorts = rules.Ports{} }},
		{name: "a proxy of the control plane's own", env: map[string]string{
			"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_UID":                    "1000680000",
			"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_REDIRECT_PORT_INBOUND":  "16006",
			"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_REDIRECT_PORT_OUTBOUND": "16001",
			"KUMA_RUNTIME_KUBERNETES_INJECTOR_BUILTIN_DNS_PORT":                         "16053",
			"KUMA_RUNTIME_KUBERNETES_INJECTOR_BUILTIN_DNS_ENABLED":                      "false",
			"KUMA_RUNTIME_KUBERNETES_APPLICATION_PROBE_PROXY_PORT":                      "0",
		}, want: func(c *tproxy.Config) {
			c.ProxyUIDs = []tproxy.UID{1000680000}
			c.Inbound.Port, c.Outbound.Port, c.DNS = 16006, 16001, tproxy.DNS{Port: 16053}
			c.Inbound.ExcludePorts = rules.Ports{}
		}},
		{name: "a ConfigMap wins over a variable, an empty list of it does not", env: global,
			configMap: `{"redirect":{"inbound":{"excludePorts":[4444]},"outbound":{"excludePorts":[]}},"ipFamilyMode":"dualstack"}`,
			want: func(c *tproxy.Config) {
				globally(c)
				c.Inbound.ExcludePorts = rules.MustPorts("4444,9001")
			}},
		{name: "a ConfigMap turns DNS off", configMap: `{"redirect":{"dns":{"enabled":false}}}`, want: func(c *tproxy.Config) { c.DNS.Redirect, c.DNS.CaptureAll = false, false }},
		{name: "a pod says no to what is not supported", configMap: `{"dropInvalidPackets":true,"log":{"enabled":true,"level":4}}`,
			annotations: map[string]string{kube.KeyDropInvalid: "false", kube.KeyLogs: "no"}},
		{name: "computed by the injector", env: global, annotations: map[string]string{
			kube.KeyConfig: `{"kumaDPUser":"5678","redirect":{"inbound":{"excludePorts":[8081]},"outbound":{"enabled":false}},"cniMode":true}`,
		}, want: func(c *tproxy.Config) { // all of it: the control plane's settings are in it
			c.Inbound.ExcludePorts, c.Outbound.Off = rules.MustPorts("8081,9001"), true
			c.DNS.Redirect, c.DNS.CaptureAll = false, false
		}},
		{name: "a port that the injector added survives the pod's list", env: global, annotations: map[string]string{
			kube.KeyInboundPorts: "8080", kube.KeyConfig: `{"redirect":{"inbound":{"excludePorts":[8080,8081,9001]}}}`,
		}, want: func(c *tproxy.Config) {
			c.Inbound.ExcludePorts = rules.MustPorts("8080,8081,9001")
			c.DNS.Redirect, c.DNS.CaptureAll = false, false
		}},
		{name: "and its clearing, which takes the control plane's list", env: global, annotations: map[string]string{
			kube.KeyInboundPorts: "", kube.KeyConfig: `{"redirect":{"inbound":{"excludePorts":[1111,8081,9001]}}}`,
		}, want: func(c *tproxy.Config) {
			c.Inbound.ExcludePorts = rules.MustPorts("8081,9001")
			c.DNS.Redirect, c.DNS.CaptureAll = false, false
		}},
		{name: "a list that the injector has not looked at is replaced", env: global, annotations: map[string]string{
			kube.KeyInboundPorts: "8080", kube.KeyConfig: `{"redirect":{"inbound":{"excludePorts":[8081,8082]}}}`,
		}, want: func(c *tproxy.Config) {
			c.Inbound.ExcludePorts = rules.MustPorts("8080,9001")
			c.DNS.Redirect, c.DNS.CaptureAll = false, false
		}},
		{name: "an empty computed one is none", env: global, annotations: map[string]string{kube.KeyConfig: " "}, want: globally},
		{name: "annotations that say nothing here", annotations: map[string]string{
			"kubernetes.io/config.source": "api", "kuma.io/mesh": "default", kube.KeyInjected: "true", "traffic.sidecar.istio.io/excludeInboundPorts": "1",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var configMaps []string
			if c.configMap != "" {
				configMaps = append(configMaps, c.configMap)
			}
			got, err := kube.Configure(c.annotations, settings(t, c.env, configMaps...))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(text(t, inPod(c.want)), text(t, got.Config)); d != "" {
				t.Errorf("-want +got\n%s", d)
			}
			if len(got.Conflicts) > 0 {
				t.Errorf("conflicts %v", got.Conflicts)
			}
			if _, err := tproxy.Build(got.Config, tproxy.Host{}); err != nil {
				t.Error(err)
			}
		})
	}
}

// text writes a Config in lines, so that a difference reads.
func text(t testing.TB, c tproxy.Config) string {
	t.Helper()
	b, err := c.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(b), ",", ",\n")
}

// What belongs to the control plane is not for a pod to say.
func TestConflicts(t *testing.T) {
	s := settings(t, map[string]string{"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_UID": "5679"},
		`{"kumaDPUser":"5680","redirect":{"inbound":{"port":15006},"outbound":{"port":16001}}}`)
	got, err := kube.Configure(map[string]string{
		kube.KeyUID:         "0",
		kube.KeyInboundPort: "15006",
		kube.KeyDNSPort:     "not a port",
		kube.KeyDNS:         "disabled",
		kube.KeyProxying:    "disabled",
		kube.KeyConfig:      `{"kumaDPUser":"kuma-dp","redirect":{"inbound":{"port":15007},"dns":{"enabled":true,"captureAll":true}}}`,
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	for _, c := range got.Conflicts {
		said = append(said, c.String())
	}
	want := []string{
		`ConfigMap kuma-transparent-proxy-config: kumaDPUser: "5680" is not used: the control plane says 5679 (KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_UID)`,
		`ConfigMap kuma-transparent-proxy-config: redirect.outbound.port: "16001" is not used: the control plane says 15001 (default)`,
		`traffic.kuma.io/transparent-proxy-config: kumaDPUser: "kuma-dp" is not used: the control plane says 5679 (KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_UID)`,
		`traffic.kuma.io/transparent-proxy-config: redirect.inbound.port: "15007" is not used: the control plane says 15006 (default)`,
		`kuma.io/builtin-dns: "disabled" is not used: the control plane says enabled (injector, traffic.kuma.io/transparent-proxy-config)`,
		`kuma.io/builtin-dns-port: "not a port" is not used: the control plane says 15053 (default)`,
		`kuma.io/sidecar-uid: "0" is not used: the control plane says 5679 (KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_UID)`,
		`kuma.io/transparent-proxying: "disabled" is not used: the control plane says enabled (always)`,
	}
	if d := cmp.Diff(want, said); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	if d := cmp.Diff(text(t, inPod(func(c *tproxy.Config) { c.ProxyUIDs = []tproxy.UID{5679} })), text(t, got.Config)); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

func TestSources(t *testing.T) {
	s := settings(t, map[string]string{traffic + "EXCLUDE_OUTBOUND_PORTS": "2222", traffic + "EXCLUDE_INBOUND_PORTS": "1111"},
		`{"redirect":{"outbound":{"excludePortsForIPs":["10.0.0.1"]}},"wait":7}`)
	s.Always = rules.MustPorts("9902")
	got, err := kube.Configure(map[string]string{kube.KeyInboundPorts: "8080", kube.KeyProbePort: "9003", "kuma.io/mesh": "m", "kuma.io/init-first": "true", "other.io/x": "y"}, s)
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	for _, path := range slices.Sorted(maps.Keys(got.Sources)) {
		said = append(said, path+" "+got.Sources[path].String())
	}
	want := []string{
		"redirect.inbound.excludePorts annotation traffic.kuma.io/exclude-inbound-ports",
		"redirect.outbound.excludePorts control plane, " + traffic + "EXCLUDE_OUTBOUND_PORTS",
		"redirect.outbound.excludePortsForIPs control plane, ConfigMap kuma-transparent-proxy-config",
		"wait control plane, ConfigMap kuma-transparent-proxy-config",
	}
	if d := cmp.Diff(want, said); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	if d := cmp.Diff([]string{"kuma.io/init-first", "kuma.io/mesh"}, got.Ignored); d != "" {
		t.Errorf("ignored: -want +got\n%s", d)
	}
	if want := rules.MustPorts("9003,9902"); !got.Always.Equal(want) {
		t.Errorf("always %s, want %s", got.Always, want)
	}
	if want := rules.MustPorts("8080,9003,9902"); !got.Config.Inbound.ExcludePorts.Equal(want) {
		t.Errorf("excluded %s, want %s", got.Config.Inbound.ExcludePorts, want)
	}
	if s := got.Sources["redirect.outbound.enabled"].String(); s != "default" {
		t.Errorf("a value that nobody gave is from %s", s)
	}
}

func TestByInit(t *testing.T) {
	for text, want := range map[string]bool{`{"cniMode":false}`: true, `{"cniMode":true}`: false, `{}`: false, ``: false} {
		got, err := kube.Configure(map[string]string{kube.KeyConfig: text}, kube.Settings{})
		if err != nil || got.ByInit != want || !got.Config.Pod {
			t.Errorf("%s: by init %t, pod %t, %v", text, got.ByInit, got.Config.Pod, err)
		}
	}
}

// All faults are said together, each with its annotation, its value and what would do.
func TestConfigureFaults(t *testing.T) {
	_, err := kube.Configure(map[string]string{
		kube.KeyInboundPorts:                    "80,0,abc",
		kube.KeyOutboundPorts:                   "70000",
		kube.KeyInboundIPs:                      "10.0.0.1/8",
		kube.KeyOutboundIPs:                     "10.0.0.0/33",
		kube.KeyOutboundUIDs:                    "tcp:22",
		kube.KeyFamily:                          "ipv6",
		kube.KeyGateway:                         "maybe",
		kube.KeyProbePort:                       "",
		kube.KeyDropInvalid:                     "true",
		kube.KeyLogs:                            "on",
		kube.KeyConfigMap:                       "my-config",
		kube.KeyConfig:                          `{"redirect":{"inbound":{"excludePorts":[0]}}}`,
		"traffic.kuma.io/exclude-inbound-port":  "80",
		"traffic.kuma.io/exclude-outbound-cidr": strings.Repeat("x", 500),
	}, settings(t, nil))
	e, ok := errors.AsType[*tproxy.ConfigError](err)
	if !ok {
		t.Fatalf("%v", err)
	}
	want := []string{
		`traffic.kuma.io/transparent-proxy-config: redirect.inbound.excludePorts: "0" cannot be read (is out of range: accepted is a port from 1 to 65535 or a range such as 80-90): accepted is a port from 1 to 65535, a range such as 80-90, or a list of them`,
		`kuma.io/application-probe-proxy-port: "" is no port: accepted is a port from 1 to 65535, or 0 where there is no probe proxy`,
		`kuma.io/gateway: "maybe" is not accepted: accepted is enabled, provided, builtin or disabled`,
		`kuma.io/transparent-proxying-ip-family-mode: "ipv6" is no mode: accepted is dualstack or ipv4`,
		`traffic.kuma.io/exclude-inbound-ips: "10.0.0.1/8" cannot be read ("10.0.0.1/8" has host bits set: write 10.0.0.0/8 for the network or 10.0.0.1 for the one address): accepted is addresses, and CIDRs without host bits such as 10.0.0.0/8 or fd00::/8, with commas between them`,
		`traffic.kuma.io/exclude-inbound-port: "80" has no meaning: there is no such annotation: accepted is traffic.kuma.io/exclude-inbound-ports, the nearest one`,
		`traffic.kuma.io/exclude-inbound-ports: "80,0,abc" cannot be read ("0" is out of range: accepted is a port from 1 to 65535 or a range such as 80-90): accepted is ports from 1 to 65535 and ranges such as 80-90, with commas between them`,
		`traffic.kuma.io/exclude-inbound-ports: "80,0,abc" cannot be read ("abc": accepted is a port from 1 to 65535 or a range such as 80-90): accepted is ports from 1 to 65535 and ranges such as 80-90, with commas between them`,
		`traffic.kuma.io/exclude-outbound-cidr: "` + strings.Repeat("x", 120) + `..." has no meaning: there is no such annotation: accepted is traffic.kuma.io/exclude-outbound-ips, the nearest one`,
		`traffic.kuma.io/exclude-outbound-ips: "10.0.0.0/33" cannot be read ("10.0.0.0/33": accepted is an IPv4 or IPv6 address, or a CIDR without host bits such as 10.0.0.0/8 or fd00::/8): accepted is addresses, and CIDRs without host bits such as 10.0.0.0/8 or fd00::/8, with commas between them`,
		`traffic.kuma.io/exclude-outbound-ports: "70000" cannot be read ("70000" is out of range: accepted is a port from 1 to 65535 or a range such as 80-90): accepted is ports from 1 to 65535 and ranges such as 80-90, with commas between them`,
		`traffic.kuma.io/exclude-outbound-ports-for-uids: "tcp:22" cannot be read ("tcp:22": "tcp": accepted is a port from 1 to 65535 or a range such as 80-90): accepted is proto:ports:uids, ports:uids or uids, such as tcp:22,80-90:1000-1005, with ; between several`,
		`traffic.kuma.io/iptables-logs: "on" is no boolean: accepted is true, yes, false or no`,
		`traffic.kuma.io/transparent-proxy-configmap-name: "my-config" names a ConfigMap that cannot be read here: accepted is an init container, which has it mounted, or its keys in traffic.kuma.io/transparent-proxy-config`,
		`traffic.kuma.io/drop-invalid-packets: dropInvalidPackets: "true" is known, not supported yet: accepted is the default, false`,
	}
	var got []string
	for _, f := range e.Faults {
		got = append(got, f.String())
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

func TestConfigureFaultsOne(t *testing.T) {
	for _, c := range []struct {
		name        string
		annotations map[string]string
		settings    kube.Settings
		want        string
	}{
		{"a ConfigMap asks for what is not supported", nil, settings(t, nil, `{"log":{"enabled":true}}`),
			`ConfigMap kuma-transparent-proxy-config: log.enabled: "true" is known, not supported yet: accepted is the default, false`},
		{"so does the injector", map[string]string{kube.KeyConfig: `{"dropInvalidPackets":true}`}, kube.Settings{},
			`traffic.kuma.io/transparent-proxy-config: dropInvalidPackets: "true" is known, not supported yet: accepted is the default, false`},
		{"a dry run", map[string]string{kube.KeyConfig: `{"dryRun":true}`}, kube.Settings{},
			`traffic.kuma.io/transparent-proxy-config: dryRun: "true" is about a run, and not about a pod: accepted is the default, false`},
		{"no JSON, and nothing that reads YAML", map[string]string{kube.KeyConfig: "cniMode: true"}, kube.Settings{},
			`traffic.kuma.io/transparent-proxy-config: "" cannot be read (invalid character 'c' looking for beginning of value): accepted is a configuration with the keys of kumactl install transparent-proxy --config`},
		{"what reads YAML cannot", map[string]string{kube.KeyConfig: "a: b: c"}, kube.Settings{Decode: func([]byte) ([]byte, error) { return nil, errors.New("line 1:\nno YAML") }},
			`traffic.kuma.io/transparent-proxy-config: "" cannot be read (line 1:; no YAML): accepted is a configuration with the keys of kumactl install transparent-proxy --config`},
		{"two ports of the proxy are one", nil, kube.Settings{Config: tproxy.Config{Inbound: tproxy.Inbound{Port: 15001}}},
			`redirect.outbound.port: "15001" is redirect.inbound.port too: accepted is a port of the proxy for each of inbound, outbound and DNS`},
	} {
		if _, err := kube.Configure(c.annotations, c.settings); err == nil || err.Error() != c.want {
			t.Errorf("%s:\n%v\n%s", c.name, err, c.want)
		}
	}
	// A value as long as all annotations of a pod, and nobody reads on.
	_, err := kube.Configure(map[string]string{kube.KeyInboundPorts: strings.Repeat("x,", 128<<10)}, kube.Settings{})
	if e, ok := errors.AsType[*tproxy.ConfigError](err); !ok || len(e.Faults) > 20 || len(err.Error()) > 20000 {
		t.Errorf("%d bytes of error", len(fmt.Sprint(err)))
	}
}

func TestReadSettingsFaults(t *testing.T) {
	_, err := kube.ReadSettings(map[string]string{
		traffic + "EXCLUDE_INBOUND_PORTS":                                          "80,x",
		traffic + "EXCLUDE_INBOUND_IPS":                                            "10.0.0.1/8",
		"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_UID":                   "kuma-dp",
		"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_REDIRECT_PORT_INBOUND": "0",
		"KUMA_RUNTIME_KUBERNETES_INJECTOR_BUILTIN_DNS_ENABLED":                     "on",
		"KUMA_RUNTIME_KUBERNETES_APPLICATION_PROBE_PROXY_PORT":                     "65536",
		"KUMA_RUNTIME_KUBERNETES_CONTROLLERS_CONCURRENCY_POD_CONTROLLER":           "not ours to read",
	}, kube.Document{Name: "ConfigMap c", JSON: []byte(`{"redirect":{"inbound":{"excludePorts":["x"]}},"dropInvalidPackets":true,"wait":"x"}`)})
	e, ok := errors.AsType[*tproxy.ConfigError](err)
	if !ok {
		t.Fatal(err)
	}
	var got []string
	for _, f := range e.Faults {
		got = append(got, strings.TrimPrefix(f.Source+" "+f.Path+" "+f.Value, "KUMA_RUNTIME_KUBERNETES_"))
	}
	want := []string{
		"INJECTOR_SIDECAR_CONTAINER_UID  kuma-dp",
		"INJECTOR_SIDECAR_CONTAINER_REDIRECT_PORT_INBOUND  0",
		"INJECTOR_BUILTIN_DNS_ENABLED  on",
		"SIDECAR_TRAFFIC_EXCLUDE_INBOUND_PORTS  80,x",
		"SIDECAR_TRAFFIC_EXCLUDE_INBOUND_IPS  10.0.0.1/8",
		"APPLICATION_PROBE_PROXY_PORT  65536",
		"ConfigMap c redirect.inbound.excludePorts x",
		"ConfigMap c wait x",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	// What holds between several has the variables too.
	_, err = kube.ReadSettings(map[string]string{"KUMA_RUNTIME_KUBERNETES_INJECTOR_BUILTIN_DNS_PORT": "15006"})
	if err == nil || !strings.HasPrefix(err.Error(), "KUMA_RUNTIME_KUBERNETES_INJECTOR_BUILTIN_DNS_PORT: redirect.dns.port: ") {
		t.Error(err)
	}
}

// What kuma-init has from its files is over the settings, and says who the proxy is where
// the environment does not.
func TestWithConfig(t *testing.T) {
	files := tproxy.Config{ProxyUIDs: []tproxy.UID{1234}, Inbound: tproxy.Inbound{Port: 16006, ExcludePorts: rules.MustPorts("8080,8081")}, Outbound: tproxy.Outbound{Port: 16001}}
	from := map[string]string{"kumaDPUser": "base.yaml:1", "redirect.inbound.port": "base.yaml:4", "redirect.outbound.port": "base.yaml:7",
		"redirect.inbound.excludePorts": "base.yaml:9", "redirect.outbound.excludePorts": "base.yaml:10", "redirect.dns.enabled": "custom.yaml:3"}
	s := settings(t, map[string]string{
		"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_REDIRECT_PORT_OUTBOUND": "17001",
		traffic + "EXCLUDE_INBOUND_PORTS":                                           "1111",
		traffic + "EXCLUDE_OUTBOUND_PORTS":                                          "2222",
		traffic + "EXCLUDE_OUTBOUND_IPS":                                            "10.0.0.1",
	})
	before := fmt.Sprint(s)
	s, err := s.WithConfig(files, from)
	if err != nil {
		t.Fatal(err)
	}
	got, err := kube.Configure(map[string]string{kube.KeyUID: "5678"}, s)
	if err != nil {
		t.Fatal(err)
	}
	want := tproxy.Config{ProxyUIDs: []tproxy.UID{1234}, Inbound: tproxy.Inbound{Port: 16006, ExcludePorts: rules.MustPorts("8080,8081,9001")},
		Outbound: tproxy.Outbound{Port: 17001, ExcludePorts: rules.MustPorts("2222"), ExcludeIPs: must(tproxy.ParsePrefixes("10.0.0.1"))}, DNS: tproxy.DNS{Port: 15053}, Pod: true}
	if d := cmp.Diff(text(t, want), text(t, got.Config)); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	if d := cmp.Diff(`[base.yaml:7: redirect.outbound.port: "16001" is not used: the control plane says 17001 (KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_REDIRECT_PORT_OUTBOUND) `+
		`kuma.io/sidecar-uid: "5678" is not used: the control plane says 1234 (base.yaml:1)]`, fmt.Sprint(got.Conflicts)); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	for path, name := range map[string]string{"kumaDPUser": "base.yaml:1", "redirect.inbound.excludePorts": "base.yaml:9", "redirect.dns.enabled": "custom.yaml:3",
		"redirect.outbound.excludePorts": traffic + "EXCLUDE_OUTBOUND_PORTS"} {
		if got.Sources[path] != (kube.Source{By: kube.ByControlPlane, Name: name}) {
			t.Errorf("%s is from %s", path, got.Sources[path])
		}
	}
	// The settings before are as they were.
	again := settings(t, map[string]string{
		"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_REDIRECT_PORT_OUTBOUND": "17001",
		traffic + "EXCLUDE_INBOUND_PORTS":                                           "1111",
		traffic + "EXCLUDE_OUTBOUND_PORTS":                                          "2222",
		traffic + "EXCLUDE_OUTBOUND_IPS":                                            "10.0.0.1",
	})
	if fmt.Sprint(again) != before {
		t.Error("the settings have changed")
	}
	if _, err := s.WithConfig(tproxy.Config{Inbound: tproxy.Inbound{Port: 15001}}, nil); err == nil {
		t.Error("a Config that is not valid is accepted")
	}
}

func TestWarnings(t *testing.T) {
	got, err := kube.Configure(map[string]string{kube.KeyConfig: `{"newer":{"key":1},"verbose":true}`}, settings(t, nil, `{"redirect":{"inbond":{}}}`))
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	for _, w := range got.Warnings {
		said = append(said, w.Source+" "+w.Path)
	}
	if d := cmp.Diff([]string{"ConfigMap kuma-transparent-proxy-config redirect.inbond", "traffic.kuma.io/transparent-proxy-config newer"}, said); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

func TestInjected(t *testing.T) {
	for _, c := range []struct {
		annotations map[string]string
		ok          bool
		why         string
	}{
		{nil, false, "no annotation kuma.io/sidecar-injected"},
		{map[string]string{kube.KeyInjected: "true"}, true, ""},
		{map[string]string{kube.KeyInjected: "false"}, false, `annotation kuma.io/sidecar-injected is "false", not "true"`},
		{map[string]string{kube.KeyInjected: "True"}, false, `annotation kuma.io/sidecar-injected is "True", not "true"`},
		{map[string]string{kube.KeyInjected: "true", "kuma.io/ignore": "true"}, true, ""},
		{map[string]string{kube.KeyInjected: "true", kube.KeyIgnore: "false"}, true, ""},
		{map[string]string{kube.KeyIgnore: "false", kube.KeyInboundPorts: "80"}, false, "no annotation kuma.io/sidecar-injected"},
	} {
		if ok, why := kube.Injected(c.annotations); ok != c.ok || why != c.why {
			t.Errorf("%v: %t, %s", c.annotations, ok, why)
		}
	}
}

func BenchmarkInjected(b *testing.B) {
	none := map[string]string{"kubernetes.io/config.source": "api", "kuma.io/mesh": "default"}
	for b.Loop() {
		kube.Injected(none)
	}
}

func BenchmarkConfigure(b *testing.B) {
	s := settings(b, nil)
	annotations := map[string]string{kube.KeyInjected: "true", kube.KeyInboundPorts: "8080,9000-9010", kube.KeyOutboundUIDs: "tcp:22:1000;", kube.KeyConfig: string(must(inPod(nil).MarshalJSON()))}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := kube.Configure(annotations, s); err != nil {
			b.Fatal(err)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
