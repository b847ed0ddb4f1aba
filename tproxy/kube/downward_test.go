package kube_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kumahq/kuma-tproxy/tproxy/kube"
)

func TestParseDownwardAPI(t *testing.T) {
	got, err := kube.ParseDownwardAPI("/etc/podinfo/annotations", []byte(`kubernetes.io/config.source="api"
traffic.kuma.io/exclude-inbound-ports=""
traffic.kuma.io/transparent-proxy-config="kumaDPUser: \"5678\"\nredirect:\n  dns:\n    enabled: true\n"
`))
	want := map[string]string{
		"kubernetes.io/config.source": "api",
		kube.KeyInboundPorts:          "",
		kube.KeyConfig:                "kumaDPUser: \"5678\"\nredirect:\n  dns:\n    enabled: true\n",
	}
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Errorf("%v: -want +got\n%s", err, d)
	}
	if got, err := kube.ParseDownwardAPI("f", nil); err != nil || len(got) != 0 {
		t.Errorf("a pod without annotations: %v, %v", got, err)
	}
	_, err = kube.ParseDownwardAPI("f", []byte("a=\"1\"\nb=2\n\nno\na=\"3\"\nc='x'\nd=\"x\n=\"x\""))
	const line = `: accepted is lines of the downward API, key="value"`
	wantErr := `f:2: "b=2" is no annotation` + line + `
f:4: "no" is no annotation` + line + `
f:5: "a=\"3\"" is there twice` + line + `
f:6: "c='x'" is no annotation` + line + `
f:7: "d=\"x" is no annotation` + line + `
f:8: "=\"x\"" is no annotation` + line
	if err == nil || err.Error() != wantErr {
		t.Errorf("-want +got\n%s", cmp.Diff(wantErr, err.Error()))
	}
}
