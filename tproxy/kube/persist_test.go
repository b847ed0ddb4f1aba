package kube_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/kube"
)

// Whatever an annotation or the settings say, nothing of a host brings a pod's rules back.
func TestPodNeverPersists(t *testing.T) {
	for text, asked := range map[string]string{
		`{}`: "", `{"persist":"none"}`: "", `{"persist":"auto"}`: "", `{"storeFirewalld":false}`: "",
		`{"persist":"systemd"}`: "persist", `{"persist":"firewalld"}`: "persist", `{"storeFirewalld":true}`: "storeFirewalld",
	} {
		mapped, err := kube.ReadSettings(nil, kube.Document{Name: "map", JSON: []byte(text)})
		if err != nil {
			t.Fatal(err)
		}
		for name, in := range map[string]struct {
			annotations map[string]string
			settings    kube.Settings
		}{
			kube.KeyConfig: {map[string]string{kube.KeyConfig: text}, kube.Settings{}},
			"map":          {nil, mapped},
		} {
			r, err := kube.Configure(in.annotations, in.settings)
			if err != nil {
				t.Fatalf("%s by %s: %v", text, name, err)
			}
			plan, err := tproxy.Build(r.Config, tproxy.Host{})
			if err != nil || plan.Persist != tproxy.PersistNone || len(plan.Stores()) > 0 {
				t.Errorf("%s by %s: %v, %v", text, name, r.Config.Persist, err)
			}
			if c := r.Config.Persist; c != tproxy.PersistNone && c != tproxy.PersistAuto {
				t.Errorf("%s by %s: %v", text, name, c)
			}
			warned := slices.ContainsFunc(r.Warnings, func(f tproxy.ConfigFault) bool { return f.Path == asked && strings.Contains(f.Source, name) })
			if warned != (asked != "") {
				t.Errorf("%s by %s: warned of %v", text, name, r.Warnings)
			}
		}
	}
}
