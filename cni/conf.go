package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/kube"
)

// Versions are those of the CNI specification that the plugin speaks.
func Versions() []string { return []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} }

// AnnotationsCapability is the capability by which containerd (1.5 and later) and CRI-O
// (1.29 and later) hand a plugin the annotations of a pod, in runtimeConfig.
const AnnotationsCapability = "io.kubernetes.cri.pod-annotations"

// Conf is the plugin's entry in a network configuration list. A key that is neither
// here nor one of the specification's is an error to every command but DEL.
type Conf struct {
	// Settings are variables of the control plane, KUMA_RUNTIME_KUBERNETES_... (see
	// kube.ReadSettings).
	Settings map[string]string `json:"settings"`
	// Config has the keys of Kuma's configuration, as the ConfigMap
	// kuma-transparent-proxy-config has them; it counts as that.
	Config json.RawMessage `json:"config"`
	// Annotations are those of every container of the network, where the runtime
	// and CNI_ARGS have none: for a runtime that is not Kubernetes's.
	Annotations map[string]string `json:"annotations"`
	// ExcludeNamespaces are namespaces of Kubernetes whose pods are left alone.
	ExcludeNamespaces []string `json:"excludeNamespaces"`
	// OnFailure is what becomes of a pod whose rules cannot be installed: "refuse",
	// which is the default, does not let it start; "pass" lets it start without them,
	// and says so in the log.
	OnFailure string `json:"onFailure"`
	// LogFile is the file to which lines of JSON are appended; empty means standard
	// error, which is the runtime's. LogLevel is debug, info (the default), warn or
	// error.
	LogFile  string `json:"logFile"`
	LogLevel string `json:"logLevel"`
}

// The values of Conf.OnFailure.
const (
	Refuse = "refuse"
	Pass   = "pass"
)

// conf is Conf beside what a runtime puts in.
type conf struct {
	Conf
	CNIVersion    string                     `json:"cniVersion"`
	Name          string                     `json:"name"`
	Type          string                     `json:"type"`
	RuntimeConfig map[string]json.RawMessage `json:"runtimeConfig"`
	PrevResult    json.RawMessage            `json:"prevResult"`
	level         slog.Level
}

var ownKeys = []string{"settings", "config", "annotations", "excludeNamespaces", "onFailure", "logFile", "logLevel"}

// theirKeys are those of the specification, and what beside them a runtime or another
// plugin's author writes into every entry (SPEC.md, section 1, and CONVENTIONS.md).
var theirKeys = []string{"cniVersion", "cniVersions", "name", "type", "capabilities", "runtimeConfig", "prevResult", "args", "ipam", "dns", "ipMasq", "disableCheck", "disableGC", "loadOnlyInlinedPlugins"}

// parse reads the plugin's entry. What can be read of it is returned with an error too.
func parse(text []byte) (*conf, error) {
	c := &conf{}
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(text, &keys); err != nil {
		return c, failed(types.ErrDecodingFailure, "the network configuration cannot be read", err)
	}
	var unknown []string
	for k := range keys {
		if !slices.Contains(ownKeys, k) && !slices.Contains(theirKeys, k) && !strings.HasPrefix(k, "cni.dev/") {
			unknown = append(unknown, k)
		}
	}
	if err := json.Unmarshal(text, c); err != nil {
		return c, failed(types.ErrDecodingFailure, "the network configuration cannot be read", err)
	}
	var faults []error
	if unknown != nil {
		slices.Sort(unknown)
		faults = append(faults, fmt.Errorf("unknown keys %q: accepted are %s, and those of the CNI specification", unknown, strings.Join(ownKeys, ", ")))
	}
	if c.OnFailure == "" {
		c.OnFailure = Refuse
	}
	if c.OnFailure != Refuse && c.OnFailure != Pass {
		faults = append(faults, fmt.Errorf("onFailure: %q: accepted is %s or %s", c.OnFailure, Refuse, Pass))
		c.OnFailure = Refuse
	}
	if c.LogLevel != "" && c.level.UnmarshalText([]byte(c.LogLevel)) != nil {
		faults = append(faults, fmt.Errorf("logLevel: %q: accepted is debug, info, warn or error", c.LogLevel))
	}
	if faults != nil {
		return c, failed(types.ErrInvalidNetworkConfig, "the network configuration is not accepted", errors.Join(faults...))
	}
	return c, nil
}

// previous returns the result of the plugin before this one, as it came.
func (c *conf) previous() (json.RawMessage, error) {
	if given(c.PrevResult) {
		if _, err := create.Create(c.CNIVersion, c.PrevResult); err != nil {
			return nil, failed(types.ErrDecodingFailure, "prevResult cannot be read", err)
		}
		return c.PrevResult, nil
	}
	return nil, failed(types.ErrInvalidNetworkConfig, "there is no prevResult",
		errors.New("this plugin makes no interface: put it into the list behind one that does, such as bridge or ptp"))
}

// settings are the control plane's.
func (c *conf) settings() (kube.Settings, error) {
	var documents []kube.Document
	if given(c.Config) {
		documents = append(documents, kube.Document{Name: "config", JSON: c.Config})
	}
	s, err := kube.ReadSettings(c.Settings, documents...)
	if err == nil {
		err = redirectable(s.Config)
	}
	if err != nil {
		return s, failed(types.ErrInvalidNetworkConfig, "the settings of the control plane in the network configuration are not accepted", err)
	}
	s.Decode = jsonOf
	return s, nil
}

// redirectable refuses what takes files of the pod's, which has none yet.
func redirectable(c tproxy.Config) error {
	var faults []tproxy.ConfigFault
	if c.DNS.Redirect && !c.DNS.CaptureAll {
		faults = append(faults, tproxy.ConfigFault{Path: "redirect.dns.captureAll", Value: "false",
			What: "takes the nameservers of the pod's resolv.conf, which is not there before its containers are", Accepted: "true, or redirect.dns.enabled: false"})
	}
	if a := c.DNS.ControlPlane; a.IsValid() {
		faults = append(faults, tproxy.ConfigFault{Value: a.String(), What: "is to go into the pod's resolv.conf, which is not there before its containers are", Accepted: "no address of a control plane"})
	}
	if faults != nil {
		return &tproxy.ConfigError{Faults: faults}
	}
	return nil
}

func given(raw json.RawMessage) bool {
	raw = bytes.TrimSpace(raw)
	return len(raw) > 0 && !bytes.Equal(raw, []byte("null"))
}
