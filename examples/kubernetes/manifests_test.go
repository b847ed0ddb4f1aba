// Package kubernetes_test reads the manifests of this folder as the published types have
// them, strictly, and checks that they mean to the library what they say.
package kubernetes_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/kube"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// deployment reads a manifest; a field that the type does not have, or has as another
// type, is an error.
func deployment(t *testing.T, file string) *appsv1.Deployment {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	d := &appsv1.Deployment{}
	if err := yaml.UnmarshalStrict(text, d); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	if d.APIVersion != appsv1.SchemeGroupVersion.String() || d.Kind != "Deployment" {
		t.Errorf("%s: %s %s", file, d.APIVersion, d.Kind)
	}
	return d
}

// variables are the environment of a container.
func variables(c corev1.Container) map[string]string {
	out := map[string]string{}
	for _, v := range c.Env {
		out[v.Name] = v.Value
	}
	return out
}

// values are those of Kuma's chart that are about traffic.
type values struct {
	ControlPlane struct {
		EnvVars map[string]string `json:"envVars"`
	} `json:"controlPlane"`
	TransparentProxy struct {
		ConfigMap struct {
			Enabled bool            `json:"enabled"`
			Name    string          `json:"name"`
			Config  json.RawMessage `json:"config"`
		} `json:"configMap"`
	} `json:"transparentProxy"`
}

func chartValues(t *testing.T) (v values) {
	t.Helper()
	text, err := os.ReadFile("values.yaml")
	if err == nil {
		err = yaml.UnmarshalStrict(text, &v)
	}
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// settings are those of the control plane of values.yaml.
func settings(t *testing.T) kube.Settings {
	t.Helper()
	v := chartValues(t)
	m := v.TransparentProxy.ConfigMap
	return read(t, v.ControlPlane.EnvVars, kube.Document{Name: m.Name, JSON: m.Config})
}

func read(t *testing.T, env map[string]string, configMaps ...kube.Document) kube.Settings {
	t.Helper()
	s, err := kube.ReadSettings(env, configMaps...)
	if err != nil {
		t.Fatal(err)
	}
	s.Decode = func(text []byte) ([]byte, error) { return yaml.YAMLToJSON(text) }
	return s
}

// want is what the pods of both Deployments get.
func want(t *testing.T) tproxy.Config {
	t.Helper()
	ips, err := tproxy.ParsePrefixes("169.254.169.254")
	if err != nil {
		t.Fatal(err)
	}
	uids, err := tproxy.ParseUIDExclusions("tcp:443:1000;")
	if err != nil {
		t.Fatal(err)
	}
	return tproxy.Config{
		ProxyUIDs: []tproxy.UID{5678},
		Inbound:   tproxy.Inbound{Port: 15006, ExcludePorts: rules.MustPorts("8081,9001")},
		Outbound:  tproxy.Outbound{Port: 15001, ExcludePorts: rules.MustPorts("5678,8900,9092"), ExcludeIPs: ips, ExcludePortsForUIDs: uids},
		DNS:       tproxy.DNS{Redirect: true, CaptureAll: true, Port: 15053},
		Pod:       true,
	}
}

// gets checks what a pod gets of a control plane.
func gets(t *testing.T, annotations map[string]string, s kube.Settings, want tproxy.Config) kube.Result {
	t.Helper()
	if ok, why := kube.Injected(annotations); !ok {
		t.Errorf("the pod is left alone: %s", why)
	}
	r, err := kube.Configure(annotations, s)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Conflicts) > 0 || len(r.Warnings) > 0 || len(r.Ignored) > 0 {
		t.Errorf("conflicts %v, warnings %v, ignored %v", r.Conflicts, r.Warnings, r.Ignored)
	}
	if d := cmp.Diff(text(t, want), text(t, r.Config)); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	return r
}

func text(t *testing.T, c tproxy.Config) string {
	t.Helper()
	out, err := c.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// What the injector has computed is what the author's annotations mean by themselves.
func TestDeployment(t *testing.T) {
	d := deployment(t, "deployment.yaml")
	annotations := d.Spec.Template.Annotations
	if r := gets(t, annotations, settings(t), want(t)); !r.ByInit {
		t.Error("a CNI plugin would install rules too")
	}
	delete(annotations, kube.KeyConfig)
	if r := gets(t, annotations, settings(t), want(t)); r.ByInit {
		t.Error("no CNI plugin would install rules")
	}
	init := d.Spec.Template.Spec.InitContainers[0]
	if got := variables(init)["XTABLES_LOCKFILE"]; got != "/tmp/xtables.lock" {
		t.Errorf("XTABLES_LOCKFILE is %q", got)
	}
	for _, c := range []string{"deployment.yaml", "deployment-annotations.yaml"} {
		confined(t, deployment(t, c).Spec.Template.Spec)
	}
}

// confined checks that an init container has two capabilities and a root to read alone,
// and the proxy the user that the rules leave alone; and that each mount has its volume.
func confined(t *testing.T, pod corev1.PodSpec) {
	t.Helper()
	c := pod.InitContainers[0].SecurityContext
	if !slices.Equal(c.Capabilities.Add, []corev1.Capability{"NET_ADMIN", "NET_RAW"}) || !slices.Equal(c.Capabilities.Drop, []corev1.Capability{"ALL"}) || !*c.ReadOnlyRootFilesystem {
		t.Errorf("the init container may do %+v", c)
	}
	if u := *pod.Containers[0].SecurityContext.RunAsUser; u != 5678 {
		t.Errorf("the proxy runs as %d", u)
	}
	for _, container := range slices.Concat(pod.InitContainers, pod.Containers) {
		for _, m := range container.VolumeMounts {
			if !slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
				t.Errorf("%s mounts %s, which is no volume", container.Name, m.Name)
			}
		}
	}
}

// The init container that reads the annotations itself has the settings in its
// environment.
func TestDeploymentThatReadsItsAnnotations(t *testing.T) {
	d := deployment(t, "deployment-annotations.yaml")
	gets(t, d.Spec.Template.Annotations, read(t, variables(d.Spec.Template.Spec.InitContainers[0])), want(t))
}

// Helm's values and the patch are one and the same.
func TestControlPlane(t *testing.T) {
	env := variables(deployment(t, "control-plane.yaml").Spec.Template.Spec.Containers[0])
	if d := cmp.Diff(chartValues(t).ControlPlane.EnvVars, env); d != "" {
		t.Errorf("-values.yaml +control-plane.yaml\n%s", d)
	}
	// A pod that says nothing has the settings, and one that says nothing aloud none.
	c := want(t)
	c.Inbound.ExcludePorts, c.Outbound.ExcludePorts, c.Outbound.ExcludePortsForUIDs = rules.MustPorts("1234,9001"), rules.MustPorts("5678,8900"), nil
	gets(t, map[string]string{kube.KeyInjected: "true"}, settings(t), c)
	c.Inbound.ExcludePorts, c.Outbound.ExcludePorts = rules.MustPorts("9001"), rules.Ports{}
	gets(t, map[string]string{kube.KeyInjected: "true", kube.KeyInboundPorts: "", kube.KeyOutboundPorts: ""}, settings(t), c)
}

// The conflist is one to libcni, and the plugin in it has the same settings.
func TestConflist(t *testing.T) {
	list, err := libcni.ConfListFromFile("10-kuma-cni.conflist")
	if err != nil {
		t.Fatal(err)
	}
	last := list.Plugins[len(list.Plugins)-1]
	if last.Network.Type != "kuma-cni" || !last.Network.Capabilities["io.kubernetes.cri.pod-annotations"] {
		t.Errorf("%s %v", last.Network.Type, last.Network.Capabilities)
	}
	var plugin struct {
		Settings map[string]string `json:"settings"`
		Config   json.RawMessage   `json:"config"`
	}
	if err := json.Unmarshal(last.Bytes, &plugin); err != nil {
		t.Fatal(err)
	}
	s := read(t, plugin.Settings, kube.Document{Name: "config", JSON: plugin.Config})
	if d := cmp.Diff(text(t, settings(t).Config), text(t, s.Config)); d != "" {
		t.Errorf("-values.yaml +conflist\n%s", d)
	}
	annotations := deployment(t, "deployment.yaml").Spec.Template.Annotations
	delete(annotations, kube.KeyConfig) // which is for an init container
	gets(t, annotations, s, want(t))
}

// Each file is read by a test, and stands in the index.
func TestIndex(t *testing.T) {
	index, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*.[cy]*")
	if err != nil || len(files) != 5 {
		t.Errorf("%q, %v", files, err)
	}
	for _, f := range files {
		if !slices.Contains([]string{"10-kuma-cni.conflist", "control-plane.yaml", "deployment.yaml", "deployment-annotations.yaml", "values.yaml"}, f) || !strings.Contains(string(index), "["+f+"]("+f+")") {
			t.Errorf("%s is in no index", f)
		}
	}
}
