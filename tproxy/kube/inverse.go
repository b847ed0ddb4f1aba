package kube

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// Annotations is the way back from Configure: the annotations by which a pod gets c
// from a control plane with these settings, so that an injector can hand a CNI plugin
// everything. What no annotation can say goes into
// traffic.kuma.io/transparent-proxy-config, as JSON, which is YAML; whom the proxy runs
// as and its ports are written so that a plugin with other settings notices.
//
// Pod counts as set in c, and a Persist as none. The error is a *tproxy.ConfigError with what no annotation
// can make of these settings: another proxy, or an inbound port redirected that is
// among Always.
func Annotations(c tproxy.Config, s Settings) (map[string]string, error) {
	c = asPod(c)
	want, err := c.MarshalJSON()
	if err != nil {
		return nil, err
	}
	out := sayable(c, s)
	if got, err := obtained(out, s); err == nil && bytes.Equal(got, want) {
		return out, nil
	}
	out[KeyConfig] = string(want)
	got, err := obtained(out, s)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(got, want) {
		return nil, &tproxy.ConfigError{Faults: unsaid(want, got)}
	}
	return out, nil
}

// asPod is a Config with what Configure fills in.
func asPod(c tproxy.Config) tproxy.Config {
	c = clone(c)
	identify(&c, c)
	c.Pod = true
	if c.Persist != tproxy.PersistAuto {
		c.Persist = tproxy.PersistNone
	}
	return c
}

// sayable writes what annotations of their own can say.
func sayable(c tproxy.Config, s Settings) map[string]string {
	out := map[string]string{
		KeyInjected:      "true",
		KeyInboundPorts:  c.Inbound.ExcludePorts.String(),
		KeyInboundIPs:    joined(c.Inbound.ExcludeIPs, ","),
		KeyOutboundPorts: c.Outbound.ExcludePorts.String(),
		KeyOutboundUIDs:  exclusions(c.Outbound.ExcludePortsForUIDs),
		KeyOutboundIPs:   joined(c.Outbound.ExcludeIPs, ","),
		KeyFamily:        c.IPFamilyMode.String(),
		KeyInboundPort:   strconv.Itoa(int(c.InboundPort())),
		KeyOutboundPort:  strconv.Itoa(int(c.OutboundPort())),
		KeyDNSPort:       strconv.Itoa(int(c.DNSPort())),
	}
	if len(c.ProxyUIDs) > 0 {
		out[KeyUID] = user(c)
	}
	if c.Inbound.Off {
		out[KeyGateway] = "enabled"
	}
	if p := s.ProbeProxyPort; p != 0 && !c.Inbound.ExcludePorts.Contains(p) {
		out[KeyProbePort] = "0"
	}
	if s.DropInvalidPackets {
		out[KeyDropInvalid] = "false"
	}
	if s.Log {
		out[KeyLogs] = "false"
	}
	return out
}

func joined[T interface{ String() string }](list []T, separator string) string {
	texts := make([]string, len(list))
	for i, v := range list {
		texts[i] = v.String()
	}
	return strings.Join(texts, separator)
}

// exclusions has a separator behind the only one too: without any, a comma in it could
// stand between several.
func exclusions(list []tproxy.UIDExclusion) string {
	if len(list) == 0 {
		return ""
	}
	return joined(list, ";") + ";"
}

// obtained is what Configure makes of annotations, as text.
func obtained(annotations map[string]string, s Settings) ([]byte, error) {
	r, err := Configure(annotations, s)
	if err != nil {
		return nil, err
	}
	return asPod(r.Config).MarshalJSON()
}

// unsaid are the keys by which two texts differ.
func unsaid(want, got []byte) (out []tproxy.ConfigFault) {
	var w, g map[string]any
	_, _ = json.Unmarshal(want, &w), json.Unmarshal(got, &g) // they were written here
	for _, k := range tproxy.Keys() {
		wanted, _ := lookup(w, k.Path)
		is, _ := lookup(g, k.Path)
		a, _ := json.Marshal(wanted)
		b, _ := json.Marshal(is)
		if bytes.Equal(a, b) {
			continue
		}
		out = append(out, tproxy.ConfigFault{Path: k.Path, Value: short(text(a, k)),
			What: "is not for an annotation to say", Accepted: "what the control plane says, " + short(text(b, k))})
	}
	return out
}

// text is a value of a key; one that was left out is the default.
func text(value []byte, k tproxy.Key) string {
	if string(value) == "null" {
		return k.Default
	}
	return string(value)
}
