package cni

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// What is installed, for whom, and from whose word.
func TestAddInstalls(t *testing.T) {
	ports := func(list string) func(*tproxy.Config) {
		return func(c *tproxy.Config) { c.Inbound.ExcludePorts = rules.MustPorts(list) }
	}
	inJSON := `{"kuma.io/sidecar-injected":"true","traffic.kuma.io/exclude-inbound-ports":"7"}`
	for name, c := range map[string]struct {
		more   map[string]any
		args   string
		source *source
		want   func(*tproxy.Config)
	}{
		"a pod as it is": {nil, "", nil, ports("9001")},
		"an annotation":  {runtimeConfig(injected("traffic.kuma.io/exclude-inbound-ports", "1234")), "", nil, ports("1234,9001")},
		"a setting":      {map[string]any{"settings": map[string]string{"KUMA_RUNTIME_KUBERNETES_SIDECAR_TRAFFIC_EXCLUDE_INBOUND_PORTS": "22"}}, "", nil, ports("22,9001")},
		"the control plane's UID": {map[string]any{"settings": map[string]string{"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_UID": "7"},
			"runtimeConfig": map[string]any{AnnotationsCapability: injected("kuma.io/sidecar-uid", "0")}}, "", nil,
			func(c *tproxy.Config) { c.ProxyUIDs = []tproxy.UID{7}; ports("9001")(c) }},
		"the ConfigMap's keys": {map[string]any{"config": map[string]any{"ipFamilyMode": "ipv4"}}, "", nil, func(c *tproxy.Config) {
			c.IPFamilyMode = tproxy.IPv4Only
			ports("9001")(c)
		}},
		"the injector's YAML": {runtimeConfig(injected("traffic.kuma.io/transparent-proxy-config", "cniMode: true\nredirect:\n  dns: {enabled: true, captureAll: true}\n  inbound:\n    excludePorts: [8]\n")), "", nil,
			ports("8,9001")},
		"CNI_ARGS, JSON":   {map[string]any{"runtimeConfig": nil}, AnnotationsArg + "=" + inJSON, nil, ports("7,9001")},
		"CNI_ARGS, base64": {map[string]any{"runtimeConfig": nil}, AnnotationsArg + "=" + base64.RawStdEncoding.EncodeToString([]byte(inJSON)), nil, ports("7,9001")},
		"CNI_ARGS, base64 for URLs, with what would end it": {map[string]any{"runtimeConfig": nil},
			AnnotationsArg + "=" + base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(inJSON, "}", `,"a/b":"x=y;z???>>>"}`, 1))), nil, ports("7,9001")},
		"the conflist": {map[string]any{"runtimeConfig": nil, "annotations": injected("traffic.kuma.io/exclude-inbound-ports", "3")}, "", nil, ports("3,9001")},
		"the first of two that agree": {map[string]any{"annotations": injected("traffic.kuma.io/exclude-inbound-ports", "3")}, "", nil,
			ports("9001")}, // what the first one does not say counts as not said
		"an embedder":                       {map[string]any{"runtimeConfig": nil}, "", &source{d: &Description{Annotations: injected("traffic.kuma.io/exclude-inbound-ports", "4")}}, ports("4,9001")},
		"an embedder is not asked":          {nil, "", &source{err: errors.New("slow")}, ports("9001")},
		"another key of the capability":     {map[string]any{"runtimeConfig": map[string]any{"cgroupPath": "/x", AnnotationsCapability: injected()}}, "", nil, ports("9001")},
		"a key that a runtime may bring":    {map[string]any{"cni.dev/attachments": []string{}}, "", nil, ports("9001")},
		"a namespace that is not left out":  {map[string]any{"excludeNamespaces": []string{"kube-system", ""}}, "", nil, ports("9001")},
		"an annotation that is not of Kuma": {runtimeConfig(injected("a/b", strings.Repeat("x", MaxAnnotations))), "", nil, ports("9001")},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if c.source != nil {
				w.Source = c.source
			}
			a := args(entry(c.more))
			a.Args += ";" + c.args
			if err := w.add(context.Background(), a); err != nil {
				t.Fatal(err)
			}
			if got := w.out.String(); got != previous+"\n" {
				t.Errorf("printed %q", got)
			}
			if len(w.applied) != 1 || !slices.Equal(w.entered, []string{"/run/netns/pod"}) || w.lockFile != "/run/netns/pod" {
				t.Fatalf("%d installs, entered %q, lock %q", len(w.applied), w.entered, w.lockFile)
			}
			want := tproxy.Config{ProxyUIDs: []tproxy.UID{5678}, Pod: true, DNS: tproxy.DNS{Redirect: true, CaptureAll: true}}
			c.want(&want)
			plan, err := tproxy.Build(want, w.seen)
			if err != nil {
				t.Fatal(err)
			}
			if d := tproxy.ConfigChanges(plan.Config, w.applied[0].Config); d != nil {
				t.Errorf("installed: %v", d)
			}
			if log := w.log.String(); !strings.Contains(log, `"pod":"demo/web"`) || !strings.Contains(log, `"msg":"installed"`) {
				t.Errorf("log %s", log)
			}
			if c.source != nil && (c.source.err == nil) != (len(c.source.asked) == 1) {
				t.Errorf("asked %v", c.source.asked)
			}
		})
	}
}

// Who is left alone: nothing is entered, observed or said.
func TestAddLeavesAlone(t *testing.T) {
	for name, c := range map[string]struct {
		more   map[string]any
		source Source
	}{
		"no annotations at all":           {runtimeConfig(nil), nil},
		"none that is the mesh's":         {runtimeConfig(map[string]string{"kubernetes.io/config.seen": "now"}), nil},
		"not injected":                    {runtimeConfig(map[string]string{"kuma.io/sidecar-injected": "false"}), nil},
		"not injected, with a bad port":   {runtimeConfig(map[string]string{"traffic.kuma.io/exclude-inbound-ports": "x"}), nil},
		"static ones do not inject a pod": {map[string]any{"runtimeConfig": map[string]any{AnnotationsCapability: map[string]string{"a": "b"}}, "annotations": injected()}, nil},
		"an excluded namespace":           {map[string]any{"excludeNamespaces": []string{"kube-system", "demo"}, "runtimeConfig": nil}, nil},
		"the host's network":              {map[string]any{"runtimeConfig": nil}, &source{d: &Description{Annotations: injected(), HostNetwork: true}}},
		"kuma-init":                       {map[string]any{"runtimeConfig": nil}, &source{d: &Description{Annotations: injected(), InitContainers: []string{"a", "kuma-init"}}}},
		"kuma-init, by the injector":      {runtimeConfig(injected("traffic.kuma.io/transparent-proxy-config", "cniMode: false")), nil},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.Source = c.source
			for _, verb := range []string{"ADD", "CHECK", "DEL"} {
				f := map[string]func(*Plugin) error{
					"ADD":   func(p *Plugin) error { return p.add(t.Context(), args(entry(c.more))) },
					"CHECK": func(p *Plugin) error { return p.check(t.Context(), args(entry(c.more))) },
					"DEL":   func(p *Plugin) error { return p.del(t.Context(), args(entry(c.more))) },
				}[verb]
				if err := f(&w.Plugin); err != nil {
					t.Errorf("%s: %v", verb, err)
				}
			}
			if w.out.String() != previous+"\n" || w.work() > 0 || len(w.entered) > 0 || w.log.Len() > 0 {
				t.Errorf("printed %q, work %d, entered %q, log %s", &w.out, w.work(), w.entered, &w.log)
			}
		})
	}
}

// A pod whose namespace turns out to be the host's is left alone too.
func TestAddInTheHostsNetwork(t *testing.T) {
	w := newWorld(t)
	w.own = true
	if err := w.add(t.Context(), args(entry(nil))); err != nil || w.out.String() != previous+"\n" || w.work() > 0 {
		t.Errorf("%v, %q, %d", err, &w.out, w.work())
	}
}

// badPods are pods that must not start without their rules.
var badPods = map[string]struct {
	more  map[string]any
	args  string
	code  uint
	says  []string
	world func(*world)
}{
	"a bad port": {more: runtimeConfig(injected("traffic.kuma.io/exclude-inbound-ports", "80,x,70000")), code: ErrAnnotations,
		says: []string{"traffic.kuma.io/exclude-inbound-ports", `"x"`, "70000", "accepted is"}},
	"two bad ones": {more: runtimeConfig(injected("traffic.kuma.io/exclude-outbound-ports", "0", "kuma.io/transparent-proxying-ip-family-mode", "ipv5")), code: ErrAnnotations,
		says: []string{"traffic.kuma.io/exclude-outbound-ports", "kuma.io/transparent-proxying-ip-family-mode"}},
	"an unknown key": {more: runtimeConfig(injected("traffic.kuma.io/exclude-inbound-port", "80")), code: ErrAnnotations,
		says: []string{"traffic.kuma.io/exclude-inbound-port:", "traffic.kuma.io/exclude-inbound-ports"}},
	"broken YAML": {more: runtimeConfig(injected("traffic.kuma.io/transparent-proxy-config", "a: [")), code: ErrAnnotations,
		says: []string{"traffic.kuma.io/transparent-proxy-config"}},
	"a key of YAML that is no text": {more: runtimeConfig(injected("traffic.kuma.io/transparent-proxy-config", "[1]: 2")), code: ErrAnnotations,
		says: []string{"traffic.kuma.io/transparent-proxy-config"}},
	"nameservers of a file that is not there": {more: runtimeConfig(injected("traffic.kuma.io/transparent-proxy-config", "redirect: {dns: {enabled: true}}")), code: ErrAnnotations,
		says: []string{"redirect.dns.captureAll", "resolv.conf"}},
	"annotations that are no text": {more: runtimeConfig(map[string]any{"kuma.io/sidecar-injected": true}), code: types.ErrDecodingFailure,
		says: []string{AnnotationsCapability}},
	"CNI_ARGS that cannot be read": {more: map[string]any{"runtimeConfig": nil}, args: AnnotationsArg + "=%%%", code: types.ErrInvalidEnvironmentVariables,
		says: []string{AnnotationsArg, "base64"}},
	"two sources that contradict": {more: map[string]any{"annotations": injected("traffic.kuma.io/exclude-inbound-ports", "2"),
		"runtimeConfig": map[string]any{AnnotationsCapability: injected("traffic.kuma.io/exclude-inbound-ports", "1")}}, code: ErrContradiction,
		says: []string{"traffic.kuma.io/exclude-inbound-ports", `"1" by runtimeConfig`, `"2" by annotations in the network configuration`}},
	"CNI_ARGS that contradicts": {args: AnnotationsArg + `={"kuma.io/sidecar-injected":"false"}`, code: ErrContradiction,
		says: []string{"kuma.io/sidecar-injected", "by runtimeConfig", "by CNI_ARGS"}},
	"a huge annotation": {more: runtimeConfig(injected("traffic.kuma.io/exclude-inbound-ports", strings.Repeat("1,", MaxAnnotations/2))), code: ErrAnnotations,
		says: []string{"traffic.kuma.io/exclude-inbound-ports", strconv.Itoa(MaxAnnotations)}},
	"nobody says": {more: map[string]any{"runtimeConfig": map[string]any{"cgroupPath": "/x"}}, code: ErrNoAnnotations,
		says: []string{AnnotationsCapability, AnnotationsArg, "capabilities"}},
	"a source that fails": {more: map[string]any{"runtimeConfig": nil}, code: ErrNoAnnotations, says: []string{"the test's source", "refused to say"},
		world: func(w *world) { w.Source = &source{err: errors.New("refused to say")} }},
	"a source that does not know": {more: map[string]any{"runtimeConfig": nil}, code: ErrNoAnnotations, world: func(w *world) { w.Source = &source{} }},
	"settings that are none": {more: map[string]any{"settings": map[string]string{"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_UID": "root"}}, code: types.ErrInvalidNetworkConfig,
		says: []string{"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_UID", `"root"`}},
	"a namespace that is none": {code: types.ErrInvalidNetNS, says: []string{"/run/netns/pod", "no network namespace"},
		world: func(w *world) { w.enterErr = fmt.Errorf("/run/netns/pod: %w", errNotNamespace) }},
	"a namespace that cannot be observed": {code: ErrRules, says: []string{"no netlink"}, world: func(w *world) { w.probeErr = errors.New("no netlink") }},
	"a step that fails":                   {code: ErrRules, says: []string{"none are left", "exit code 1"}, world: func(w *world) { w.applyErr = &exec.ApplyError{Err: errors.New("exit code 1")} }},
	"a lock that is held": {code: types.ErrTryAgainLater, says: []string{"none are left"},
		world: func(w *world) { w.applyErr = &exec.ApplyError{Err: exec.ErrLocked} }},
}

// Closed by default: an error that names the pod and what is wrong, and no result.
func TestAddRefuses(t *testing.T) {
	for name, c := range badPods {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if c.world != nil {
				c.world(w)
			}
			a := args(entry(c.more))
			a.Args += ";" + c.args
			e := cniError(t, w.add(t.Context(), a))
			if e.Code != c.code || !strings.Contains(e.Msg, "pod demo/web") || !strings.HasPrefix(e.Msg, "kuma-cni: ") || e.Details == "" || len(e.Error()) > maxDetails+500 {
				t.Errorf("code %d, want %d: %s", e.Code, c.code, e)
			}
			for _, s := range c.says {
				if !strings.Contains(e.Error(), s) {
					t.Errorf("%q is not in: %s", s, e)
				}
			}
			if w.out.Len() > 0 || len(w.applied) > 0 || !strings.Contains(w.log.String(), `"level":"ERROR"`) {
				t.Errorf("printed %q, installed %d, log %s", &w.out, len(w.applied), &w.log)
			}
		})
	}
}

// Open by choice: the pod starts, and the log says without what.
func TestAddPassesByChoice(t *testing.T) {
	for name, c := range badPods {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if c.world != nil {
				c.world(w)
			}
			more := map[string]any{"onFailure": "pass"}
			maps.Copy(more, c.more)
			a := args(entry(more))
			a.Args += ";" + c.args
			if err := w.add(t.Context(), a); err != nil {
				t.Fatal(err)
			}
			if w.out.String() != previous+"\n" || len(w.applied) > 0 || !strings.Contains(w.log.String(), "starts without its rules") || !strings.Contains(w.log.String(), "demo/web") {
				t.Errorf("printed %q, log %s", &w.out, &w.log)
			}
		})
	}
}

// What no choice lets pass: a configuration that is none, and half of the rules.
func TestAddAlwaysRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		more map[string]any
		code uint
		says string
		left bool
	}{
		"no prevResult":       {map[string]any{"prevResult": nil}, types.ErrInvalidNetworkConfig, "behind one that does", false},
		"a bad prevResult":    {map[string]any{"prevResult": []int{1}}, types.ErrDecodingFailure, "prevResult", false},
		"an unknown key":      {map[string]any{"onFailur": "pass"}, types.ErrInvalidNetworkConfig, "onFailur", false},
		"a key in capitals":   {map[string]any{"OnFailure": "pass"}, types.ErrInvalidNetworkConfig, "OnFailure", false},
		"another policy":      {map[string]any{"onFailure": "open"}, types.ErrInvalidNetworkConfig, "accepted is refuse or pass", false},
		"no level":            {map[string]any{"logLevel": "loud"}, types.ErrInvalidNetworkConfig, "accepted is debug, info, warn or error", false},
		"settings of no text": {map[string]any{"settings": map[string]any{"A": 1}}, types.ErrDecodingFailure, "settings", false},
		"rules that are left": {nil, ErrLeft, "IPv4 rules", true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if c.left {
				w.applyErr = &exec.ApplyError{Err: exec.ErrLocked, Left: []string{"IPv4 rules: no"}}
			}
			more := map[string]any{"onFailure": "pass"}
			maps.Copy(more, c.more)
			e := cniError(t, w.add(t.Context(), args(entry(more))))
			if e.Code != c.code || !strings.Contains(e.Error(), c.says) || !strings.Contains(e.Msg, "pod demo/web") || w.out.Len() > 0 {
				t.Errorf("code %d, want %d: %s; printed %q", e.Code, c.code, e, &w.out)
			}
		})
	}
}

// Outside of Kubernetes there is no pod's name.
func TestErrorNamesTheContainer(t *testing.T) {
	w := newWorld(t)
	a := args(entry(map[string]any{"runtimeConfig": nil}))
	a.Args = ""
	if e := cniError(t, w.add(t.Context(), a)); !strings.Contains(e.Msg, "container c1") {
		t.Error(e)
	}
}

// Whatever bytes an annotation has, it is one of two: accepted, or an error that names it.
func TestAnyAnnotation(t *testing.T) {
	keys := []string{"traffic.kuma.io/exclude-inbound-ports", "traffic.kuma.io/exclude-outbound-ports", "traffic.kuma.io/exclude-outbound-ips",
		"traffic.kuma.io/exclude-outbound-ports-for-uids", "traffic.kuma.io/transparent-proxy-config", "kuma.io/transparent-proxying-ip-family-mode"}
	refused := 0
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(&testing.T{})
		key := rapid.SampledFrom(keys).Draw(t, "key")
		value := rapid.OneOf(rapid.String(), rapid.StringMatching(`[0-9,:; {}a-z.-]{0,20}`)).Draw(t, "value")
		err := w.add(context.Background(), args(entry(runtimeConfig(injected(key, value)))))
		if err == nil {
			if len(w.applied) != 1 || w.out.String() != previous+"\n" {
				t.Fatalf("%d installs, %q", len(w.applied), &w.out)
			}
			return
		}
		refused++
		if e, ok := errors.AsType[*types.Error](err); !ok || e.Code != ErrAnnotations || !strings.Contains(e.Error(), key) || !strings.Contains(e.Error(), "demo/web") || len(w.applied) > 0 || w.out.Len() > 0 {
			t.Fatalf("%v", err)
		}
	})
	if refused == 0 {
		t.Error("nothing was refused")
	}
}

func TestLog(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	secret := "s3cret"
	w := newWorld(t)
	more := runtimeConfig(injected("example.com/token", secret))
	more["logFile"], more["logLevel"] = file, "debug"
	for range 2 {
		a := args(entry(more))
		a.Args += ";TOKEN=" + secret
		if err := w.add(t.Context(), a); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil || strings.Count(string(text), "\n") != 2 || strings.Contains(string(text), secret) || w.log.Len() > 0 {
		t.Errorf("%s, %v; standard error: %s", text, err, &w.log)
	}
	// A file that cannot be one is no reason to refuse a pod.
	for _, path := range []string{t.TempDir(), "/dev/null", filepath.Join(file, "x")} {
		w := newWorld(t)
		more["logFile"] = path
		if err := w.add(t.Context(), args(entry(more))); err != nil || !strings.Contains(w.log.String(), "the log goes to standard error") || !strings.Contains(w.log.String(), "installed") {
			t.Errorf("%s: %v, %s", path, err, &w.log)
		}
	}
}

func TestArguments(t *testing.T) {
	got := arguments("IgnoreUnknown=1;K8S_POD_NAME=a=b;;x;=y")
	if d := cmp.Diff(map[string]string{"IgnoreUnknown": "1", "K8S_POD_NAME": "a=b", "": "y"}, got); d != "" {
		t.Error(d)
	}
}

func TestDel(t *testing.T) {
	for name, c := range map[string]struct {
		netns string
		stdin []byte
		world func(*world)
		want  int // removals
	}{
		"a pod":                        {"/run/netns/pod", entry(nil), nil, 1},
		"again, as containerd does":    {"", entry(map[string]any{"prevResult": nil}), nil, 0},
		"no prevResult":                {"/run/netns/pod", entry(map[string]any{"prevResult": nil}), nil, 1},
		"no annotations":               {"/run/netns/pod", entry(map[string]any{"runtimeConfig": nil}), nil, 1},
		"bad annotations":              {"/run/netns/pod", entry(runtimeConfig(injected("traffic.kuma.io/x", "y"))), nil, 1},
		"a configuration that is none": {"/run/netns/pod", []byte(`{"name":"n","onFailure":3,"what":1}`), nil, 1},
		"a namespace that has gone":    {"/run/netns/pod", entry(nil), func(w *world) { w.enterErr = fs.ErrNotExist }, 0},
		"a path that is no namespace":  {"/run/netns/pod", entry(nil), func(w *world) { w.enterErr = errNotNamespace }, 0},
		"another failure":              {"/run/netns/pod", entry(nil), func(w *world) { w.enterErr = fs.ErrPermission }, 0},
		"a removal that fails":         {"/run/netns/pod", entry(nil), func(w *world) { w.removeErr = exec.ErrLocked }, 1},
		"the host's network":           {"/run/netns/pod", entry(nil), func(w *world) { w.own = true }, 0},
		"a source that fails":          {"/run/netns/pod", entry(map[string]any{"runtimeConfig": nil}), func(w *world) { w.Source = &source{err: fs.ErrClosed} }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if c.world != nil {
				c.world(w)
			}
			for range 2 {
				a := args(c.stdin)
				a.Netns = c.netns
				if err := w.del(t.Context(), a); err != nil || w.out.Len() > 0 {
					t.Errorf("%v, printed %q", err, &w.out)
				}
			}
			if w.removes != 2*c.want {
				t.Errorf("%d removals", w.removes)
			}
		})
	}
}

func TestGCAndStatus(t *testing.T) {
	w := newWorld(t)
	a := args(entry(map[string]any{"cniVersion": "1.1.0", "prevResult": nil, "runtimeConfig": nil, "cni.dev/valid-attachments": []any{}}))
	if err := errors.Join(w.gc(t.Context(), a), w.status(t.Context(), a)); err != nil || w.applies+w.removes > 0 {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		more  map[string]any
		world func(*world)
		code  uint
		says  string
	}{
		"no iptables":      {nil, func(w *world) { w.seen.Variants = nil }, ErrUnavailable, "iptables"},
		"none for IPv6":    {nil, func(w *world) { w.seen.Variants[0].IPv6 = tproxy.Programs{} }, ErrUnavailable, "IPv6"},
		"not to be looked": {nil, func(w *world) { w.probeErr = fs.ErrPermission }, ErrUnavailable, "permission"},
		"bad settings":     {map[string]any{"settings": map[string]string{"KUMA_RUNTIME_KUBERNETES_INJECTOR_BUILTIN_DNS_PORT": "x"}}, func(*world) {}, types.ErrInvalidNetworkConfig, "BUILTIN_DNS_PORT"},
		"a bad key":        {map[string]any{"x": 1}, func(*world) {}, types.ErrInvalidNetworkConfig, `"x"`},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c.world(w)
			if e := cniError(t, w.status(t.Context(), args(entry(c.more)))); e.Code != c.code || !strings.Contains(e.Error(), c.says) {
				t.Errorf("code %d, want %d: %s", e.Code, c.code, e)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	config := func(list string) *tproxy.Config {
		plan, err := tproxy.Build(tproxy.Config{ProxyUIDs: []tproxy.UID{5678}, Pod: true, DNS: tproxy.DNS{Redirect: true, CaptureAll: true},
			Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts(list)}}, newWorld(t).seen)
		if err != nil {
			t.Fatal(err)
		}
		return &plan.Config
	}
	nobody := map[string]any{"runtimeConfig": nil, "prevResult": nil}
	for name, c := range map[string]struct {
		more   map[string]any
		status exec.Status
		there  bool // ::6
		code   uint // 0 is fine
		says   string
	}{
		"as installed, and meant":            {nil, exec.Status{State: exec.StateInstalled, Config: config("9001")}, true, 0, ""},
		"as installed, and meant otherwise":  {nil, exec.Status{State: exec.StateInstalled, Config: config("7,9001")}, true, ErrDiffers, "redirect.inbound.excludePorts"},
		"as installed, and nobody says":      {nobody, exec.Status{State: exec.StateInstalled, Config: config("7")}, true, 0, ""},
		"drifted":                            {nil, exec.Status{State: exec.StateDrifted, Config: config("9001"), Drift: drift("gone rule")}, true, ErrDiffers, "gone rule"},
		"drifted, and nobody says":           {nobody, exec.Status{State: exec.StateDrifted, Drift: drift("gone rule")}, true, ErrDiffers, "gone rule"},
		"nothing, and should":                {nil, exec.Status{State: exec.StateAbsent}, false, ErrDiffers, "nothing is installed"},
		"nothing, and nobody says":           {nobody, exec.Status{State: exec.StateAbsent}, false, 0, ""},
		"nothing any more, and nobody says":  {nobody, exec.Status{State: exec.StateAbsent}, true, ErrDiffers, "any more"},
		"not to be told":                     {nil, exec.Status{State: exec.StateUnknown, Reasons: []string{"no root"}}, true, ErrUntold, "no root"},
		"annotations that are none any more": {runtimeConfig(injected("traffic.kuma.io/x", "")), exec.Status{State: exec.StateInstalled, Config: config("9001")}, true, ErrAnnotations, "traffic.kuma.io/x"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.stands, w.seen.PassthroughAddress = c.status, c.there
			err := w.check(t.Context(), args(entry(c.more)))
			if c.code == 0 {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if e := cniError(t, err); e.Code != c.code || !strings.Contains(e.Error(), c.says) || !strings.Contains(e.Msg, "demo/web") {
				t.Errorf("code %d, want %d: %s", e.Code, c.code, e)
			}
		})
	}
}

// A pod that is none of ours costs microseconds.
func BenchmarkLeftAlone(b *testing.B) {
	a := args(entry(runtimeConfig(map[string]string{"kubernetes.io/config.seen": "2026-11-28T09:00:00Z", "kubernetes.io/config.source": "api", "prometheus.io/scrape": "true"})))
	b.ReportAllocs()
	for b.Loop() {
		w := newWorld(b)
		if err := w.add(context.Background(), a); err != nil || w.work() > 0 {
			b.Fatal(err)
		}
	}
}

// The entry of the manifests is one that the plugin takes.
func TestExampleOfTheManifests(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "examples", "kubernetes", "10-kuma-cni.conflist"))
	var list struct{ Plugins []map[string]any }
	if err == nil {
		err = json.Unmarshal(text, &list)
	}
	if err != nil {
		t.Fatal(err)
	}
	more := list.Plugins[len(list.Plugins)-1]
	more["runtimeConfig"] = map[string]any{AnnotationsCapability: injected()}
	w := newWorld(t)
	if err := w.add(t.Context(), args(entry(more))); err != nil {
		t.Fatal(err)
	}
	if got := w.applied[0].Config.Outbound.ExcludePorts.String(); got != "5678,8900" || more["type"] != "kuma-cni" {
		t.Errorf("%v excludes %s", more, got)
	}
	if err := w.Plugin.status(t.Context(), args(entry(more))); err != nil {
		t.Error(err)
	}
}
