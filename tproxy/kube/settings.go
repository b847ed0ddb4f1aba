package kube

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// DefaultProbeProxyPort is where kuma-dp answers the kubelet's probes in place of the
// application, as in Kuma.
const DefaultProbeProxyPort uint16 = 9001

// Settings are what the control plane says of every pod. The zero Settings are a
// control plane that redirects both directions and no DNS, and knows no probe proxy;
// those of a control plane of which nothing is set are ReadSettings(nil).
type Settings struct {
	// Config is that of a pod without annotations. Whose connections are left alone
	// (ProxyUIDs, ProxyUser) and the ports of the proxy are no pod's to change. Pod
	// counts as set.
	Config tproxy.Config
	// ProbeProxyPort is where kuma-dp answers probes, which is not redirected
	// unless a pod says that its own is another; 0 means that there is none.
	ProbeProxyPort uint16
	// Always are ports that are not redirected inbound whatever a pod says: those
	// that the injector adds, as for a readiness probe of the proxy.
	Always rules.Ports
	// DropInvalidPackets and Log are what Kuma's rules can do and ours cannot yet: a
	// pod for which one of them holds is an error of Configure.
	DropInvalidPackets, Log bool
	// From says where values of Config come from, by their key: the name of a
	// variable, or of a document. One that is not there is at its default.
	From map[string]string
	// Decode makes JSON of YAML, for the annotation
	// traffic.kuma.io/transparent-proxy-config. Nil takes JSON alone, which is what
	// Annotations writes.
	Decode func(text []byte) ([]byte, error)

	conflicts []Conflict           // of ConfigMaps with the environment
	warnings  []tproxy.ConfigFault // of ConfigMaps
}

// WithConfig are the settings with a configuration over them that an init container has
// from its files, the control plane's ConfigMap and the pod's own among them. From says
// which keys of c are given, and where each comes from; the others, and those of an empty
// list or of dualstack, leave the settings as they are.
//
// Who the proxy is, the files say where the settings say nothing of it (From): they are
// the control plane's word too. Where both do, and differ, it is a Conflict of what
// Configure returns, and the settings count. The error is a *tproxy.ConfigError: c is not
// valid.
func (s Settings) WithConfig(c tproxy.Config, from map[string]string) (Settings, error) {
	text, err := c.MarshalJSON()
	if err != nil {
		return Settings{}, err
	}
	d, faults := readDocument("", text)
	if faults != nil {
		return Settings{}, &tproxy.ConfigError{Faults: faults} // this cannot be: it was written here
	}
	out := s
	out.Config, out.From = clone(s.Config), maps.Clone(s.From)
	if out.From == nil {
		out.From = map[string]string{}
	}
	out.conflicts = slices.Clone(s.conflicts)
	said := func(path string) bool { return s.From[path] != "" }
	for _, conflict := range s.differ(c, func(path string) bool { return from[path] != "" && said(path) }) {
		conflict.Source = from[conflict.Path]
		out.conflicts = append(out.conflicts, conflict)
	}
	for _, k := range tproxy.Keys() {
		name := from[k.Path]
		switch {
		case name == "", slices.Contains(identity, k.Path) && said(k.Path), slices.Contains(clearable, k.Path) && atDefault(d, k.Path):
			remove(d.tree, k.Path)
		default:
			out.From[k.Path] = name
		}
	}
	if _, err := (tproxy.Decoder{}).Decode(d.text(), &out.Config); err != nil {
		return Settings{}, err
	}
	out.Config.Pod = true
	return out, nil
}

// Document is a configuration with Kuma's keys, as JSON.
type Document struct {
	Name string // for messages, such as that of a ConfigMap
	JSON []byte
}

// The variables of Kuma's control plane that are about traffic
// (pkg/config/plugins/runtime/k8s/config.go).
const (
	envPrefix    = "KUMA_RUNTIME_KUBERNETES_"
	envTraffic   = envPrefix + "SIDECAR_TRAFFIC_"
	envContainer = envPrefix + "INJECTOR_SIDECAR_CONTAINER_"
	envDNS       = envPrefix + "INJECTOR_BUILTIN_DNS_"
	envProbes    = envPrefix + "APPLICATION_PROBE_PROXY_PORT"
)

// variable is a variable of the control plane.
type variable struct {
	name string
	path string // of the key of the configuration; empty where there is none
	read func(*Settings, string) []tproxy.ConfigFault
}

var variables = []variable{
	{envContainer + "UID", pathUser, func(s *Settings, text string) []tproxy.ConfigFault {
		uid, err := strconv.ParseUint(text, 10, 32)
		if err != nil || uid > rules.MaxUID {
			return bad(text, "is no user", "a UID from 0 to 4294967294")
		}
		s.Config.ProxyUIDs, s.Config.ProxyUser = []tproxy.UID{tproxy.UID(uid)}, ""
		return nil
	}},
	{envContainer + "REDIRECT_PORT_INBOUND", pathInboundPort, portVariable(func(s *Settings) *uint16 { return &s.Config.Inbound.Port })},
	{envContainer + "REDIRECT_PORT_OUTBOUND", pathOutboundPort, portVariable(func(s *Settings) *uint16 { return &s.Config.Outbound.Port })},
	{envContainer + "IP_FAMILY_MODE", pathFamily, func(s *Settings, text string) []tproxy.ConfigFault { return readFamily(text, &s.Config) }},
	{envDNS + "ENABLED", pathDNS, func(s *Settings, text string) []tproxy.ConfigFault {
		on, err := strconv.ParseBool(text)
		if err != nil {
			return bad(text, "is no boolean", "true or false")
		}
		s.Config.DNS.Redirect, s.Config.DNS.CaptureAll = on, on
		return nil
	}},
	{envDNS + "PORT", pathDNSPort, portVariable(func(s *Settings) *uint16 { return &s.Config.DNS.Port })},
	{envTraffic + "EXCLUDE_INBOUND_PORTS", pathInboundPorts, overConfig(readInboundPorts)},
	{envTraffic + "EXCLUDE_OUTBOUND_PORTS", pathOutboundPorts, overConfig(readOutboundPorts)},
	{envTraffic + "EXCLUDE_INBOUND_IPS", pathInboundIPs, overConfig(readInboundIPs)},
	{envTraffic + "EXCLUDE_OUTBOUND_IPS", pathOutboundIPs, overConfig(readOutboundIPs)},
	{envProbes, "", func(s *Settings, text string) []tproxy.ConfigFault { return readProbePort(text, &s.ProbeProxyPort) }},
}

func overConfig(read func(string, *tproxy.Config) []tproxy.ConfigFault) func(*Settings, string) []tproxy.ConfigFault {
	return func(s *Settings, text string) []tproxy.ConfigFault { return read(text, &s.Config) }
}

func portVariable(of func(*Settings) *uint16) func(*Settings, string) []tproxy.ConfigFault {
	return func(s *Settings, text string) []tproxy.ConfigFault {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return bad(text, "is no port", "a port from 1 to 65535")
		}
		*of(s) = uint16(n)
		return nil
	}
}

// ReadSettings reads the settings of a control plane from its environment, the
// variables that begin with KUMA_RUNTIME_KUBERNETES_ and are about traffic, and from
// ConfigMaps with Kuma's keys, a later one over an earlier one. A variable that is not
// set, or empty, is at Kuma's default: the proxy runs as UID 5678, its ports are 15006,
// 15001 and 15053, all DNS is redirected, and the probe proxy's port is 9001.
//
// A key of a ConfigMap wins over a variable, but an empty list and a dualstack do not,
// since Helm writes all keys. Whom the proxy runs as, and its ports, the variables
// alone say: the control plane starts the proxy from them, so that a ConfigMap that
// says another is a Conflict of what Configure returns, and is not used.
//
// The error is a *tproxy.ConfigError with all faults, each with its variable, or its
// document and key, in Source.
func ReadSettings(env map[string]string, configMaps ...Document) (Settings, error) {
	s := Settings{ProbeProxyPort: DefaultProbeProxyPort, From: map[string]string{}}
	s.Config = tproxy.Config{
		ProxyUIDs: []tproxy.UID{tproxy.DefaultProxyUID},
		Pod:       true,
		// As Kuma's Helm chart has them (values.yaml, transparentProxy.configMap).
		DNS: tproxy.DNS{Redirect: true, CaptureAll: true},
	}
	var faults []tproxy.ConfigFault
	for _, v := range variables {
		text := strings.TrimSpace(env[v.name])
		if text == "" {
			continue
		}
		found := v.read(&s, text)
		for i := range found {
			found[i].Source = v.name
		}
		if faults = append(faults, found...); found == nil && v.path != "" {
			s.From[v.path] = v.name
		}
	}
	for _, d := range configMaps {
		faults = append(faults, s.configMap(d)...)
	}
	if faults == nil {
		faults = located(validate(s.Config), s.From)
	}
	if faults != nil {
		return Settings{}, &tproxy.ConfigError{Faults: faults}
	}
	return s, nil
}
