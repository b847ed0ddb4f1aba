package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/google/go-cmp/cmp"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
)

// standard is where a distribution puts the plugins of containernetworking/plugins.
var standard = []string{"/usr/lib/cni", "/usr/libexec/cni", "/opt/cni/bin"}

// pluginDir is a folder with kuma-cni, which is this test binary.
func pluginDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	self, err := os.Executable()
	for _, name := range []string{"kuma-cni", "first"} {
		if err == nil {
			err = os.Symlink(self, filepath.Join(dir, name))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// findStandard finds one of the standard plugins.
func findStandard(t *testing.T, name string) {
	t.Helper()
	if _, err := invoke.FindInPath(name, standard); err != nil {
		cannotRun(t, "cni", "%v (Debian: containernetworking-plugins)", err)
	}
}

// containers is a container runtime, as far as networks go, on the lab's client: the
// plugins and their bridge are there, and a pod is a namespace.
type containers struct {
	*lab
	*libcni.CNIConfig
	list *libcni.NetworkConfigList
	conf *libcni.RuntimeConf
	path []string
	said bytes.Buffer
}

// on starts the plugins of a runtime in its own network namespace, the lab's client.
type on struct {
	invoke.Exec
	lab *lab
}

func (o on) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) (out []byte, err error) {
	inside := o.lab.In(o.lab.Client, func() error {
		out, err = o.Exec.ExecPlugin(ctx, path, stdin, env)
		return nil
	})
	return out, errors.Join(inside, err)
}

func newRuntime(t *testing.T, cniVersion, first string, entry map[string]any) *containers {
	t.Helper()
	w := newLab(t)
	findStandard(t, "bridge")
	r := &containers{lab: w, path: append([]string{pluginDir(t)}, standard...)}
	plugins := []any{}
	ipam := map[string]any{"type": "host-local", "dataDir": t.TempDir(), "ranges": []any{[]any{map[string]string{"subnet": "10.77.0.0/24"}}},
		"routes": []any{map[string]string{"dst": "0.0.0.0/0"}}}
	switch first {
	case "bridge":
		plugins = append(plugins, map[string]any{"type": "bridge", "bridge": "br-cni", "isGateway": true, "ipam": ipam})
	case "ptp":
		plugins = append(plugins, map[string]any{"type": "ptp", "ipam": ipam})
	case "first": // Debian's plugins do not speak 1.1.0 yet
		plugins = append(plugins, map[string]any{"type": "first"})
	case "loopback":
		plugins = append(plugins, map[string]any{"type": "loopback"})
	}
	own := map[string]any{"type": "kuma-cni", "capabilities": map[string]bool{AnnotationsCapability: true}}
	maps.Copy(own, entry)
	text, err := json.Marshal(map[string]any{"cniVersion": cniVersion, "name": "net-" + first, "plugins": append(plugins, own)})
	if err == nil {
		r.list, err = libcni.ConfListFromBytes(text)
	}
	if err != nil {
		t.Fatal(err)
	}
	r.CNIConfig = libcni.NewCNIConfigWithCacheDir(r.path, t.TempDir(), on{&invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: &r.said}}, w})
	r.conf = &libcni.RuntimeConf{ContainerID: "c1", IfName: "eth1", NetNS: w.Host.Path(), Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "demo"}, {"K8S_POD_NAME", "web"}},
		CapabilityArgs: map[string]any{AnnotationsCapability: injected(excluded...)}}
	return r
}

// gone takes what the runtime knows of annotations away.
func (r *containers) gone() *libcni.RuntimeConf {
	c := *r.conf
	c.CapabilityArgs = nil
	return &c
}

func atLeast(t *testing.T, v, least string) bool {
	t.Helper()
	ok, err := version.GreaterThanOrEqualTo(v, least)
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

// Every verb, in every version of the specification, behind each of four plugins.
func TestLibCNI(t *testing.T) {
	for i, v := range Versions() {
		first := []string{"bridge", "ptp", "loopback", "first"}[i]
		t.Run(v+" behind "+first, func(t *testing.T) {
			ctx := t.Context()
			r := newRuntime(t, v, first, nil)
			if _, err := r.ValidateNetworkList(ctx, r.list); err != nil {
				t.Fatal(err)
			}
			if atLeast(t, v, "1.1.0") {
				if err := r.GetStatusNetworkList(ctx, r.list); err != nil {
					t.Errorf("STATUS: %v", err)
				}
			}
			r.proxy()
			result, err := r.AddNetworkList(ctx, r.list, r.conf)
			if err != nil {
				t.Fatalf("%v: %s", err, &r.said)
			}
			r.meshed()
			// The result is that of the plugin before.
			alone := newRuntime(t, v, first, nil)
			alone.list.Plugins = alone.list.Plugins[:1]
			before, err := alone.AddNetworkList(ctx, alone.list, alone.conf)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(shape(t, before), shape(t, result)); d != "" {
				t.Errorf("the result is another one: %s", d)
			}
			if atLeast(t, v, "0.4.0") {
				for _, c := range []*libcni.RuntimeConf{r.conf, r.gone()} {
					if err := r.CheckNetworkList(ctx, r.list, c); err != nil {
						t.Errorf("CHECK: %v", err)
					}
				}
				if _, err := r.Lab.Run(ctx, r.Host, "", "nft", "flush", "chain", "inet", tproxy.NFTable, "nat.KUMA_MESH_OUTBOUND"); err != nil {
					t.Fatal(err)
				}
				for _, c := range []*libcni.RuntimeConf{r.conf, r.gone()} {
					if err := r.CheckNetworkList(ctx, r.list, c); err == nil || !strings.Contains(err.Error(), "demo/web") {
						t.Errorf("CHECK of drift: %v", err)
					}
				}
			}
			if atLeast(t, v, "1.1.0") {
				if err := r.GCNetworkList(ctx, r.list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "c1", IfName: "eth1"}}}); err != nil {
					t.Errorf("GC: %v", err)
				}
			}
			// containerd calls DEL again, without a namespace.
			if err := r.DelNetworkList(ctx, r.list, r.conf); err != nil {
				t.Errorf("DEL: %v", err)
			}
			r.direct()
			again := r.gone()
			again.NetNS = ""
			for range 2 {
				if err := r.DelNetworkList(ctx, r.list, again); err != nil {
					t.Errorf("DEL again: %v", err)
				}
			}
		})
	}
}

// shape is a result without what differs from pod to pod.
func shape(t *testing.T, r types.Result) any {
	t.Helper()
	text, err := json.Marshal(r)
	var v any
	if err == nil {
		err = json.Unmarshal(text, &v)
	}
	if err != nil {
		t.Fatal(err)
	}
	var strip func(any)
	strip = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			delete(v, "mac")
			delete(v, "sandbox")
			if name, ok := v["name"].(string); ok && strings.HasPrefix(name, "veth") {
				v["name"] = "veth"
			}
			for _, e := range v {
				strip(e)
			}
		case []any:
			for _, e := range v {
				strip(e)
			}
		}
	}
	strip(v)
	return v
}

// A pod that is refused: the runtime gets a code, a message and details, and a DEL
// follows.
func TestLibCNIRefused(t *testing.T) {
	r := newRuntime(t, "1.0.0", "ptp", nil)
	r.conf.CapabilityArgs[AnnotationsCapability] = injected("traffic.kuma.io/exclude-inbound-ports", "http")
	_, err := r.AddNetworkList(t.Context(), r.list, r.conf)
	e := cniError(t, err)
	if e.Code != ErrAnnotations || !strings.Contains(e.Msg, "pod demo/web") || !strings.Contains(e.Details, "traffic.kuma.io/exclude-inbound-ports") || !strings.Contains(e.Details, `"http"`) {
		t.Errorf("code %d: %v", e.Code, e)
	}
	if saved := r.save(r.Host); strings.Contains(saved, "KUMA") {
		t.Errorf("left: %s", saved)
	}
	if err := r.DelNetworkList(t.Context(), r.list, r.conf); err != nil {
		t.Error(err)
	}
	// Alone in its list it has nothing to hand on.
	r.list.Plugins = r.list.Plugins[1:]
	r.conf.CapabilityArgs[AnnotationsCapability] = injected()
	if _, err = r.AddNetworkList(t.Context(), r.list, r.conf); err == nil || !strings.Contains(err.Error(), "there is no prevResult") {
		t.Error(err)
	}
}

// A pod without a sidecar, and one in the host's network, have the result of the plugin
// before and nothing else.
func TestLibCNILeftAlone(t *testing.T) {
	r := newRuntime(t, "1.0.0", "ptp", nil)
	r.conf.CapabilityArgs[AnnotationsCapability] = map[string]string{"kubernetes.io/config.seen": "now"}
	before := r.save(r.Host)
	if _, err := r.AddNetworkList(t.Context(), r.list, r.conf); err != nil {
		t.Fatal(err)
	}
	if after := r.save(r.Host); after != before {
		t.Errorf("changed: %s", after)
	}
	if err := r.DelNetworkList(t.Context(), r.list, r.conf); err != nil {
		t.Error(err)
	}
}

// The specification's own tool, built from the same module.
func TestCnitool(t *testing.T) {
	r := newRuntime(t, "1.0.0", "ptp", map[string]any{"annotations": injected(excluded...)})
	tool := filepath.Join(t.TempDir(), "cnitool")
	build := osexec.Command("go", "build", "-o", tool, "github.com/containernetworking/cni/cnitool")
	if out, err := build.CombinedOutput(); err != nil {
		cannotRun(t, "cni", "cnitool cannot be built: %v: %s", err, out)
	}
	conf := t.TempDir()
	if err := os.WriteFile(filepath.Join(conf, "10.conflist"), r.list.Bytes, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CNI_PATH", strings.Join(r.path, ":"))
	t.Setenv("NETCONFPATH", conf)
	t.Setenv("CNI_IFNAME", "eth1") // the lab has an eth0
	r.proxy()
	for _, verb := range []string{"add", "check", "del", "del"} {
		if out, err := r.Lab.Run(t.Context(), r.Client, "", tool, verb, "net-ptp", r.Host.Path()); err != nil {
			t.Fatalf("cnitool %s: %v: %s", verb, err, out)
		}
		switch verb {
		case "add":
			r.meshed()
		case "del":
			r.direct()
		}
	}
}

// The protocol itself: what is no command, no version, no configuration.
func TestProtocol(t *testing.T) {
	netlab.Require(t)
	plugin := filepath.Join(pluginDir(t), "kuma-cni")
	run := func(stdin string, env ...string) (string, int) {
		cmd := osexec.Command(plugin)
		cmd.Env, cmd.Stdin = append(os.Environ(), env...), strings.NewReader(stdin)
		out, err := cmd.Output()
		if _, ok := errors.AsType[*osexec.ExitError](err); err != nil && !ok {
			t.Fatal(err)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	out, code := run("", "CNI_COMMAND=VERSION")
	if want := `{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}`; strings.TrimSpace(out) != want || code != 0 {
		t.Errorf("VERSION: %d %s", code, out)
	}
	env := []string{"CNI_CONTAINERID=c1", "CNI_NETNS=/proc/self/ns/net", "CNI_IFNAME=eth0", "CNI_PATH=/x"}
	for name, c := range map[string]struct {
		command, stdin string
		code           uint // 0 is no error
	}{
		"no such command":             {"PATCH", `{"cniVersion":"1.0.0","name":"n"}`, types.ErrInvalidEnvironmentVariables},
		"a version to come":           {"ADD", `{"cniVersion":"2.0.0","name":"n"}`, types.ErrIncompatibleCNIVersion},
		"a version that is too old":   {"ADD", `{"cniVersion":"0.2.0","name":"n"}`, types.ErrIncompatibleCNIVersion},
		"DEL of a version to come":    {"DEL", `{"cniVersion":"9.9.9","name":"n"}`, types.ErrIncompatibleCNIVersion},
		"no version":                  {"ADD", `{"name":"n"}`, types.ErrIncompatibleCNIVersion},
		"CHECK before it was":         {"CHECK", `{"cniVersion":"0.3.1","name":"n"}`, types.ErrIncompatibleCNIVersion},
		"no JSON":                     {"ADD", `{"cniVersion"`, types.ErrDecodingFailure},
		"no name":                     {"ADD", `{"cniVersion":"1.0.0"}`, types.ErrInvalidNetworkConfig},
		"a pod in the host's network": {"ADD", fmt.Sprintf(`{"cniVersion":"1.0.0","name":"n","prevResult":{"cniVersion":"1.0.0"},"runtimeConfig":{%q:{"kuma.io/sidecar-injected":"true"}}}`, AnnotationsCapability), 0},
		"DEL of one":                  {"DEL", `{"cniVersion":"1.0.0","name":"n"}`, 0},
		"the node":                    {"STATUS", `{"cniVersion":"1.1.0","name":"n"}`, 0},
	} {
		out, code := run(c.stdin, append(env, "CNI_COMMAND="+c.command)...)
		var e types.Error
		_ = json.Unmarshal([]byte(out), &e)
		if e.Code != c.code || (code == 0) != (c.code == 0) {
			t.Errorf("%s: exit code %d, code %d, want %d: %s", name, code, e.Code, c.code, out)
		}
	}
	if out, err := osexec.Command("iptables-nft-save").Output(); err != nil || bytes.Contains(out, []byte("KUMA")) {
		t.Errorf("the host's network was touched: %v, %s", err, out)
	}
}
