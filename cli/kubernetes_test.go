package cli_test

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/kumahq/kuma-tproxy/cli"
)

// podTemplate is what a Deployment says of its pods, as far as kuma-init is concerned.
type podTemplate struct {
	Spec struct {
		Template struct {
			Metadata struct{ Annotations map[string]string }
			Spec     struct {
				InitContainers []struct {
					Command, Args []string
					Env           []struct{ Name, Value string }
				} `yaml:"initContainers"`
			}
		}
	}
}

// The init containers of both Deployments of the examples are given what the kubelet would
// give them, and would install the same rules.
func TestDeploymentsOfTheExamples(t *testing.T) {
	t.Setenv("POD", "KUBERNETES_SERVICE_HOST is set and nothing listens on port 22")
	var said []string
	for _, name := range []string{"deployment.yaml", "deployment-annotations.yaml"} {
		text, err := os.ReadFile(filepath.Join("..", "examples", "kubernetes", name))
		if err != nil {
			t.Fatal(err)
		}
		var d podTemplate
		if err := yaml.Unmarshal(text, &d); err != nil {
			t.Fatal(err)
		}
		annotations := d.Spec.Template.Metadata.Annotations
		c := d.Spec.Template.Spec.InitContainers[0]
		for _, v := range c.Env {
			t.Setenv(v.Name, v.Value)
		}
		var podinfo strings.Builder
		for _, key := range slices.Sorted(maps.Keys(annotations)) {
			fmt.Fprintf(&podinfo, "%v=%q\n", key, annotations[key])
		}
		args := slices.Concat(c.Command[1:], c.Args, []string{"--dry-run"})
		mounts := map[string]string{
			"/tmp/transparent-proxy/base/config.yaml": annotations["traffic.kuma.io/transparent-proxy-config"],
			"/etc/podinfo/annotations":                podinfo.String(),
		}
		for at, text := range mounts {
			file := filepath.Join(t.TempDir(), filepath.Base(at))
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			for i, a := range args {
				args[i] = strings.ReplaceAll(a, at, file)
			}
		}
		root := cli.Root(cli.Options{Runner: newFake})
		var out bytes.Buffer
		root.SetOut(&out)
		root.SetErr(&out)
		root.SetArgs(args)
		if err := root.Execute(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, &out)
		}
		said = append(said, out.String())
	}
	for _, want := range []string{"# Inbound: to port 15006, except ports 8081,9001\n", "ports 5678,8900,9092", "# DNS: every query to port 15053"} {
		if !strings.Contains(said[1], want) {
			t.Errorf("nothing of %q in\n%s", want, said[1])
		}
	}
	if n := len(rulesOf(said[0])); n < 20 {
		t.Errorf("%d rules", n)
	}
	if d := cmp.Diff(rulesOf(said[0]), rulesOf(said[1])); d != "" {
		t.Errorf("-deployment.yaml +deployment-annotations.yaml\n%s", d)
	}
}

// rulesOf are the lines of a dry run that are rules, less the record of the install.
func rulesOf(out string) (lines []string) {
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "-") && !strings.Contains(line, "KUMA_MESH_RECORD") {
			lines = append(lines, line)
		}
	}
	return lines
}
