package kube_test

import (
	"fmt"
	"maps"
	"slices"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/kube"
)

// A control plane leaves port 1111 alone in every pod; this pod leaves 8080 alone
// instead, and would like to be the proxy.
func ExampleConfigure() {
	settings, err := kube.ReadSettings(map[string]string{
		"KUMA_RUNTIME_KUBERNETES_SIDECAR_TRAFFIC_EXCLUDE_INBOUND_PORTS":  "1111",
		"KUMA_RUNTIME_KUBERNETES_SIDECAR_TRAFFIC_EXCLUDE_OUTBOUND_PORTS": "443",
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	annotations := map[string]string{
		"kuma.io/sidecar-injected":              "true",
		"traffic.kuma.io/exclude-inbound-ports": "8080",
		"kuma.io/sidecar-uid":                   "0",
	}
	if ok, why := kube.Injected(annotations); !ok {
		fmt.Println("not in the mesh:", why)
		return
	}
	result, err := kube.Configure(annotations, settings)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("inbound:", result.Config.Inbound.ExcludePorts, "from", result.Sources["redirect.inbound.excludePorts"])
	fmt.Println("outbound:", result.Config.Outbound.ExcludePorts, "from", result.Sources["redirect.outbound.excludePorts"])
	fmt.Println("whatever the pod says:", result.Always)
	for _, c := range result.Conflicts {
		fmt.Println(c)
	}
	// Output:
	// inbound: 8080,9001 from annotation traffic.kuma.io/exclude-inbound-ports
	// outbound: 443 from control plane, KUMA_RUNTIME_KUBERNETES_SIDECAR_TRAFFIC_EXCLUDE_OUTBOUND_PORTS
	// whatever the pod says: 9001
	// kuma.io/sidecar-uid: "0" is not used: the control plane says 5678 (default)
}

func ExampleAnnotations() {
	settings, err := kube.ReadSettings(nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	c := settings.Config
	c.Inbound.Off, c.IPFamilyMode = true, tproxy.IPv4Only
	annotations, err := kube.Annotations(c, settings)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, name := range slices.Sorted(maps.Keys(annotations)) {
		fmt.Printf("%s: %q\n", name, annotations[name])
	}
	// Output:
	// kuma.io/application-probe-proxy-port: "0"
	// kuma.io/builtin-dns-port: "15053"
	// kuma.io/gateway: "enabled"
	// kuma.io/sidecar-injected: "true"
	// kuma.io/sidecar-uid: "5678"
	// kuma.io/transparent-proxying-inbound-port: "15006"
	// kuma.io/transparent-proxying-ip-family-mode: "ipv4"
	// kuma.io/transparent-proxying-outbound-port: "15001"
	// traffic.kuma.io/exclude-inbound-ips: ""
	// traffic.kuma.io/exclude-inbound-ports: ""
	// traffic.kuma.io/exclude-outbound-ips: ""
	// traffic.kuma.io/exclude-outbound-ports: ""
	// traffic.kuma.io/exclude-outbound-ports-for-uids: ""
}

func ExampleParseDownwardAPI() {
	annotations, err := kube.ParseDownwardAPI("/etc/podinfo/annotations", []byte("traffic.kuma.io/exclude-inbound-ports=\"8080\"\n"))
	fmt.Println(annotations, err)
	// Output: map[traffic.kuma.io/exclude-inbound-ports:8080] <nil>
}
