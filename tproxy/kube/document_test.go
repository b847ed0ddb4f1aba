package kube_test

import (
	"errors"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/kube"
)

// What is asked for in another type is not passed over as if it were not asked for.
func TestModesAreBooleans(t *testing.T) {
	for text, path := range map[string]string{
		`{"dropInvalidPackets":"true"}`: "dropInvalidPackets", `{"log":{"enabled":"yes"}}`: "log.enabled",
		`{"dropInvalidPackets":1}`: "dropInvalidPackets", `{"dropInvalidPackets":null,"log":{"enabled":false}}`: "",
	} {
		_, err := kube.Configure(map[string]string{kube.KeyConfig: text}, kube.Settings{})
		e, _ := errors.AsType[*tproxy.ConfigError](err)
		if path == "" && err == nil {
			continue
		}
		if e == nil || len(e.Faults) != 1 || e.Faults[0].Path != path || e.Faults[0].Source != kube.KeyConfig || e.Faults[0].NotYet {
			t.Errorf("%s: %v", text, err)
		}
	}
}
