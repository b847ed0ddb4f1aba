package cni

import (
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var sumOfConfig = regexp.MustCompile(`sum=[0-9a-f]{8}`)

// A pod gets the same rules from kuma-init, which reads the downward API, as from kuma-cni,
// which the runtime tells.
func TestSameRulesAsKumaInit(t *testing.T) {
	program := filepath.Join(t.TempDir(), "kumactl")
	if out, err := osexec.Command("go", "build", "-o", program, "github.com/kumahq/kuma-tproxy/cli/cmd/kumactl").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	settings := map[string]string{
		"KUMA_RUNTIME_KUBERNETES_SIDECAR_TRAFFIC_EXCLUDE_INBOUND_PORTS":            "9901",
		"KUMA_RUNTIME_KUBERNETES_SIDECAR_TRAFFIC_EXCLUDE_OUTBOUND_PORTS":           "5432",
		"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_UID":                   "2102",
		"KUMA_RUNTIME_KUBERNETES_INJECTOR_BUILTIN_DNS_ENABLED":                     "true",
		"KUMA_RUNTIME_KUBERNETES_APPLICATION_PROBE_PROXY_PORT":                     "9001",
		"KUMA_RUNTIME_KUBERNETES_INJECTOR_SIDECAR_CONTAINER_REDIRECT_PORT_INBOUND": "16006",
	}
	for name, annotations := range map[string][]string{
		"none":      nil,
		"cleared":   {"traffic.kuma.io/exclude-inbound-ports", "", "traffic.kuma.io/exclude-outbound-ports", ""},
		"others":    {"traffic.kuma.io/exclude-inbound-ports", "1234,80-90", "traffic.kuma.io/exclude-outbound-ips", "10.0.0.0/8,fd00::/8", "traffic.kuma.io/exclude-outbound-ports-for-uids", "tcp:443:1001;udp:53:1002"},
		"IPv4":      {"kuma.io/transparent-proxying-ip-family-mode", "ipv4"},
		"a gateway": {"kuma.io/gateway", "enabled"},
		"conflict":  {"kuma.io/sidecar-uid", "0"},
	} {
		t.Run(name, func(t *testing.T) {
			plugin := newLab(t)
			plugin.add(plugin.args(map[string]any{"settings": settings}, annotations...))
			byCNI := plugin.save(plugin.Host)
			plugin.Close()

			pod := newLab(t)
			file := filepath.Join(t.TempDir(), "annotations")
			var text strings.Builder
			for k, v := range injected(annotations...) {
				text.WriteString(k + "=" + quoteLine(v) + "\n")
			}
			if err := os.WriteFile(file, []byte(text.String()), 0o644); err != nil {
				t.Fatal(err)
			}
			cmd := osexec.Command(program, "install", "transparent-proxy", "--pod-annotations="+file)
			cmd.Env = append(os.Environ(), "KUBERNETES_SERVICE_HOST=10.96.0.1", "XTABLES_LOCKFILE="+filepath.Join(t.TempDir(), "lock"))
			for k, v := range settings {
				cmd.Env = append(cmd.Env, k+"="+v)
			}
			var out []byte
			if err := pod.In(pod.Host, func() (err error) { out, err = cmd.CombinedOutput(); return err }); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if byInit := pod.save(pod.Host); words(byInit) != words(byCNI) || byCNI == "" {
				t.Errorf("by kuma-init\n%s\nby kuma-cni\n%s", byInit, byCNI)
			}
		})
	}
}

// words leaves of the record what it says of the whole configuration, and not which program
// has installed.
func words(save string) string {
	var out strings.Builder
	for line := range strings.Lines(save) {
		if strings.Contains(line, "kuma/mesh/transparent/proxy/kuma-tproxy 1 ") {
			line = sumOfConfig.FindString(line)
		}
		out.WriteString(line)
	}
	return out.String()
}

// quoteLine is how a volume of the downward API writes a value.
func quoteLine(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s) + `"`
}
