package kube_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/kube"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// drawSettings draws what a control plane can say.
func drawSettings(t *rapid.T) kube.Settings {
	s := kube.Settings{
		Config:         tproxytest.Configs().Draw(t, "settings"),
		ProbeProxyPort: rapid.SampledFrom([]uint16{0, 9001, 8080}).Draw(t, "probe proxy"),
		Always:         rapid.SampledFrom([]rules.Ports{{}, rules.MustPorts("9902"), rules.MustPorts("80-90,9902")}).Draw(t, "always"),
		From:           map[string]string{},
	}
	if rapid.Bool().Draw(t, "from variables") {
		s.From["kumaDPUser"] = "KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_UID"
	}
	return s
}

// values are what annotations can say, half of it nonsense.
var values = map[string][]string{
	kube.KeyInjected:      {"true", "false"},
	kube.KeyIgnore:        {"true", "false"},
	kube.KeyConfigMap:     {"", "mine"},
	kube.KeyInboundPorts:  {"", "80", "22,8080-8090", "1-65535", "0", "x"},
	kube.KeyInboundIPs:    {"", "10.0.0.0/8", "::1,127.0.0.1", "0.0.0.0/0", "10.0.0.1/8"},
	kube.KeyOutboundPorts: {"", "443", "15001,15006", "1-65535", "-1"},
	kube.KeyOutboundUIDs:  {"", "tcp:22:1000;", "*:*:0-4294967294;", "5678", ";"},
	kube.KeyOutboundIPs:   {"", "10.0.0.53", "::/0", "localhost"},
	kube.KeyFamily:        {"", "ipv4", "dualstack", "ipv6"},
	kube.KeyDropInvalid:   {"", "false", "true"},
	kube.KeyLogs:          {"", "no", "yes"},
	kube.KeyGateway:       {"enabled", "disabled", "provided", "x"},
	kube.KeyProbePort:     {"0", "9001", "9902", "65536"},
	kube.KeyUID:           {"0", "5678", "1000", "root", ""},
	kube.KeyProxying:      {"enabled", "disabled", "x"},
	kube.KeyInboundPort:   {"15006", "1", "x"},
	kube.KeyOutboundPort:  {"15001", "80", ""},
	kube.KeyDNS:           {"enabled", "disabled"},
	kube.KeyDNSPort:       {"15053", "53"},
	"kuma.io/mesh":        {"default"},
	"traffic.kuma.io/new": {"80"},
}

// drawAnnotations draws what a pod can say; most often it makes sense.
func drawAnnotations(t *rapid.T) map[string]string {
	out := map[string]string{}
	sense := rapid.IntRange(0, 3).Draw(t, "sense") > 0
	for _, name := range slices.Sorted(maps.Keys(values)) {
		list := values[name]
		if rapid.IntRange(0, 2).Draw(t, name) > 0 || sense && strings.HasSuffix(name, "/new") {
			continue
		}
		if sense && !strings.HasPrefix(name, "kuma.io/") {
			list = list[:2]
		}
		out[name] = rapid.SampledFrom(list).Draw(t, name+" says")
	}
	switch rapid.IntRange(0, 3).Draw(t, "computed") {
	case 0:
		c := tproxytest.Configs().Draw(t, "computed config")
		out[kube.KeyConfig] = string(must(c.MarshalJSON()))
	case 1:
		out[kube.KeyConfig] = rapid.SampledFrom([]string{"", "{}", `{"kumaDPUser":0}`, `{"kumaDPUser":"root","cniMode":false}`, "["}).Draw(t, "computed text")
	}
	return out
}

// eachPod checks a property of many pods of many control planes, and that most of
// them had a Result.
func eachPod(t *testing.T, check func(t *rapid.T, annotations map[string]string, s kube.Settings, r kube.Result)) {
	good := 0
	rapid.Check(t, func(t *rapid.T) {
		s, annotations := drawSettings(t), drawAnnotations(t)
		r, err := kube.Configure(annotations, s)
		if err != nil {
			return
		}
		good++
		check(t, annotations, s, r)
	})
	if t.Logf("%d pods", good); good < 10 {
		t.Errorf("%d pods had a result", good)
	}
}

// For all annotations the proxy of the result is the control plane's.
func TestTheProxyIsTheControlPlanes(t *testing.T) {
	eachPod(t, func(t *rapid.T, annotations map[string]string, s kube.Settings, r kube.Result) {
		want, got := s.Config, r.Config
		if len(want.ProxyUIDs) == 0 && want.ProxyUser == "" {
			want.ProxyUIDs = []tproxy.UID{5678}
		}
		if fmt.Sprint(want.ProxyUIDs) != fmt.Sprint(got.ProxyUIDs) || want.ProxyUser != got.ProxyUser {
			t.Errorf("%v: the proxy is %v %q, not %v %q", annotations, got.ProxyUIDs, got.ProxyUser, want.ProxyUIDs, want.ProxyUser)
		}
		if want.InboundPort() != got.InboundPort() || want.OutboundPort() != got.OutboundPort() || want.DNSPort() != got.DNSPort() {
			t.Errorf("%v: ports %d %d %d", annotations, got.InboundPort(), got.OutboundPort(), got.DNSPort())
		}
		if !got.Pod {
			t.Errorf("%v: no pod", annotations)
		}
		// What is not used is said.
		who := got.ProxyUser
		if len(got.ProxyUIDs) > 0 {
			who = rules.UIDsOf(got.ProxyUIDs...).String()
		}
		uid, asked := annotations[kube.KeyUID]
		if said := strings.Contains(fmt.Sprint(r.Conflicts), kube.KeyUID+":"); said != (asked && uid != who) {
			t.Errorf("%v: conflicts %v", annotations, r.Conflicts)
		}
	})
}

func TestAlwaysIsExcludedWhateverThePodSays(t *testing.T) {
	eachPod(t, func(t *rapid.T, annotations map[string]string, s kube.Settings, r kube.Result) {
		if left := s.Always.Intersect(r.Config.Inbound.ExcludePorts); !left.Equal(s.Always) {
			t.Errorf("%v: %s of %s", annotations, left, s.Always)
		}
		probe := s.ProbeProxyPort
		if own, ok := annotations[kube.KeyProbePort]; ok {
			_, _ = fmt.Sscan(own, &probe)
		}
		if probe != 0 && !r.Config.Inbound.ExcludePorts.Contains(probe) {
			t.Errorf("%v: the probe proxy's port %d is redirected", annotations, probe)
		}
	})
}

// An annotation beats the global setting for every key that may, and an empty one
// clears it.
func TestAnnotationBeatsGlobal(t *testing.T) {
	for _, k := range []struct {
		name string
		of   func(tproxy.Config) string
		say  func(tproxy.Config) string
	}{
		{kube.KeyInboundPorts, func(c tproxy.Config) string { return c.Inbound.ExcludePorts.String() }, nil},
		{kube.KeyOutboundPorts, func(c tproxy.Config) string { return c.Outbound.ExcludePorts.String() }, nil},
		{kube.KeyInboundIPs, func(c tproxy.Config) string { return words(c.Inbound.ExcludeIPs, ",") }, nil},
		{kube.KeyOutboundIPs, func(c tproxy.Config) string { return words(c.Outbound.ExcludeIPs, ",") }, nil},
		{kube.KeyOutboundUIDs, func(c tproxy.Config) string { return words(c.Outbound.ExcludePortsForUIDs, ";") },
			func(c tproxy.Config) string { return words(c.Outbound.ExcludePortsForUIDs, ";") + ";" }},
		{kube.KeyFamily, func(c tproxy.Config) string { return c.IPFamilyMode.String() }, nil},
	} {
		t.Run(k.name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				s := drawSettings(t)
				s.Always, s.ProbeProxyPort = rules.Ports{}, 0
				own := tproxytest.Configs().Draw(t, "own")
				if k.name == kube.KeyFamily { // which is seldom drawn
					own.IPFamilyMode = tproxy.IPFamilyMode(rapid.IntRange(0, 1).Draw(t, "family"))
				}
				say := k.of
				if k.say != nil {
					say = k.say
				}
				annotations := map[string]string{k.name: say(own)}
				if rapid.Bool().Draw(t, "computed") {
					annotations[kube.KeyConfig] = string(must(s.Config.MarshalJSON()))
				}
				if k.of(own) == "" {
					annotations[k.name] = ""
				}
				r, err := kube.Configure(annotations, s)
				if err != nil || k.of(r.Config) != k.of(own) {
					t.Errorf("%q of %q: %q, %v", annotations[k.name], k.of(s.Config), k.of(r.Config), err)
				}
				if src := r.Sources; err == nil && !strings.Contains(fmt.Sprint(src), k.name) {
					t.Errorf("sources %v", src)
				}
				annotations[k.name] = ""
				r, err = kube.Configure(annotations, s)
				if err != nil || k.of(r.Config) != k.of(tproxy.Config{}) {
					t.Errorf("not cleared: %q, %v", k.of(r.Config), err)
				}
			})
		})
	}
}

func words[T fmt.Stringer](list []T, separator string) string {
	var out []string
	for _, v := range list {
		out = append(out, v.String())
	}
	return strings.Join(out, separator)
}

// Config to annotations and back is identity, whatever the other settings are; where
// the proxy is another there is no way.
func TestConfigToAnnotationsAndBack(t *testing.T) {
	whole, refused := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		s, c := drawSettings(t), tproxytest.Configs().Draw(t, "config")
		other := rapid.IntRange(0, 9).Draw(t, "other") == 0
		if !other {
			c.ProxyUIDs, c.ProxyUser = s.Config.ProxyUIDs, s.Config.ProxyUser
			c.Inbound.Port, c.Outbound.Port, c.DNS.Port = s.Config.Inbound.Port, s.Config.Outbound.Port, s.Config.DNS.Port
			c.Inbound.ExcludePorts = c.Inbound.ExcludePorts.Union(s.Always)
		}
		annotations, err := kube.Annotations(c, s)
		if err != nil {
			if refused++; !other {
				t.Fatal(err)
			}
			return
		}
		if _, ok := annotations[kube.KeyConfig]; ok {
			whole++
		}
		if ok, why := kube.Injected(annotations); !ok {
			t.Error(why)
		}
		r, err := kube.Configure(annotations, s)
		if err != nil {
			t.Fatal(err)
		}
		c.Pod = true
		if got, want := plain(t, r.Config), plain(t, c); got != want {
			t.Errorf("%v:\n%s\n%s", annotations, got, want)
		}
		if len(r.Conflicts) > 0 {
			t.Errorf("conflicts %v", r.Conflicts)
		}
	})
	if whole == 0 || refused == 0 {
		t.Errorf("%d needed the whole configuration, %d were refused", whole, refused)
	}
}

// plain is what is installed of a Config.
func plain(t *rapid.T, c tproxy.Config) string {
	plan, err := tproxy.Build(c, tproxy.Host{Users: []tproxy.User{{Name: "kuma-dp", UID: 5678}}, Nameservers: nil})
	if err != nil {
		t.Fatal(err)
	}
	return string(must(plan.Config.MarshalJSON())) + string(plan.Rules.IPTables(rules.IPv4))
}

// What is read is what was written (pkg/fieldpath of Kubernetes, FormatMap).
func TestDownwardAPIRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := rapid.MapOf(rapid.StringMatching(`[a-z./-]{1,20}`), rapid.String()).Draw(t, "annotations")
		var b strings.Builder
		for _, key := range slices.Sorted(maps.Keys(want)) {
			fmt.Fprintf(&b, "%v=%q\n", key, want[key])
		}
		got, err := kube.ParseDownwardAPI("f", []byte(b.String()))
		if err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: %v, %v", b.String(), got, err)
		}
	})
}

func FuzzConfigure(f *testing.F) {
	f.Add(kube.KeyConfig, `{"kumaDPUser":"5678","redirect":{"inbound":{"excludePorts":[1,"80-90"]}},"log":{"enabled":true}}`)
	f.Add(kube.KeyConfig, `{"log":3,"dropInvalidPackets":true,"redirect":null}`)
	f.Add(kube.KeyOutboundUIDs, "tcp:22,80-90:1000-1005;1001")
	f.Add(kube.KeyInboundIPs, "::ffff:1.2.3.4,10.0.0.0/8")
	f.Add("traffic.kuma.io/x", "\xff")
	f.Add(kube.KeyProbePort, "9002")
	s, err := kube.ReadSettings(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, name, value string) {
		r, err := kube.Configure(map[string]string{name: value}, s)
		if err != nil {
			if err.Error() == "" || strings.Count(err.Error(), "\n") > 1100 {
				t.Errorf("error %q", err)
			}
			return
		}
		if r.Config.ProxyUIDs[0] != 5678 || r.Config.InboundPort() != 15006 {
			t.Errorf("the proxy is %v", r.Config)
		}
		if err := r.Config.Validate(); err != nil {
			t.Error(err)
		}
		annotations, err := kube.Annotations(r.Config, s)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := kube.Configure(annotations, s); err != nil {
			t.Error(err)
		}
	})
}

func FuzzParseDownwardAPI(f *testing.F) {
	f.Add([]byte("a=\"b\\n\"\nkuma.io/gateway=\"enabled\"\n"))
	f.Add([]byte("a='b'\n=\n\"\"=\"\""))
	f.Fuzz(func(t *testing.T, text []byte) {
		if got, err := kube.ParseDownwardAPI("f", text); (got == nil) == (err == nil) {
			t.Errorf("%v, %v", got, err)
		}
	})
}
