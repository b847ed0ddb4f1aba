package kube

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// The keys of the configuration that are met here by name.
const (
	pathUser          = "kumaDPUser"
	pathFamily        = "ipFamilyMode"
	pathInbound       = "redirect.inbound.enabled"
	pathInboundPort   = "redirect.inbound.port"
	pathInboundPorts  = "redirect.inbound.excludePorts"
	pathInboundIPs    = "redirect.inbound.excludePortsForIPs"
	pathOutboundPort  = "redirect.outbound.port"
	pathOutboundPorts = "redirect.outbound.excludePorts"
	pathOutboundUIDs  = "redirect.outbound.excludePortsForUIDs"
	pathOutboundIPs   = "redirect.outbound.excludePortsForIPs"
	pathDNS           = "redirect.dns.enabled"
	pathDNSAll        = "redirect.dns.captureAll"
	pathDNSPort       = "redirect.dns.port"
	pathDrop          = "dropInvalidPackets"
	pathLog           = "log.enabled"
	pathLogLevel      = "log.level"
	pathDryRun        = "dryRun"
	pathCNI           = "cniMode"
	pathPersist       = "persist"
	pathStore         = "storeFirewalld"
)

// document is a text with Kuma's keys, in parts.
type document struct {
	tree      map[string]any // as JSON, numbers as json.Number
	config    tproxy.Config  // over the zero Config
	drop, log *bool          // where it says so
	warnings  []tproxy.ConfigFault
}

// given reports whether the text has a value for a key.
func (d document) given(path string) bool {
	v, ok := lookup(d.tree, path)
	return ok && v != nil
}

// is reports whether a key is there and true.
func (d document) is(path string) bool {
	v, _ := lookup(d.tree, path)
	return v == true
}

// readDocument takes a text apart. What asks for something that only Kuma can do is
// returned, and not a fault: a pod can say otherwise.
func readDocument(name string, text []byte) (d document, faults []tproxy.ConfigFault) {
	if len(bytes.TrimSpace(text)) == 0 || string(bytes.TrimSpace(text)) == "null" {
		return document{}, nil // a document of YAML that holds nothing
	}
	decoded, err := tproxy.Decoder{AllowUnknown: true}.Decode(text, &d.config)
	modes := false
	for _, f := range faultsOf(name, err) {
		switch f.Path {
		case pathDrop, pathLog, pathLogLevel:
			if f.NotYet {
				modes = true
				continue
			}
		}
		faults = append(faults, f)
	}
	if faults != nil {
		return document{}, faults
	}
	r := json.NewDecoder(bytes.NewReader(text))
	r.UseNumber()
	if err := r.Decode(&d.tree); err != nil {
		return document{}, faultsOf(name, err)
	}
	for _, m := range []struct {
		path string
		to   **bool
	}{{pathDrop, &d.drop}, {pathLog, &d.log}} {
		if v, ok := lookup(d.tree, m.path); ok && v != nil {
			if _, is := v.(bool); !is {
				// Not supported, its type is not looked at by the Decoder.
				return document{}, []tproxy.ConfigFault{{Source: name, Path: m.path, Value: short(fmt.Sprint(v)), What: "is no boolean", Accepted: "true or false"}}
			}
			*m.to = new(v == true)
		}
	}
	for _, path := range []string{pathDrop, pathLog, pathLogLevel} {
		remove(d.tree, path)
	}
	if modes {
		if decoded, err = (tproxy.Decoder{AllowUnknown: true}).Decode(d.text(), &d.config); err != nil {
			return document{}, faultsOf(name, err)
		}
	}
	if decoded.Settings.DryRun {
		faults = append(faults, tproxy.ConfigFault{Source: name, Path: pathDryRun, Value: "true",
			What: "is about a run, and not about a pod", Accepted: "the default, false"})
	}
	for _, w := range decoded.Warnings {
		w.Source = name
		d.warnings = append(d.warnings, w)
	}
	return d, faults
}

// text writes what is left of a document.
func (d document) text() []byte {
	text, _ := json.Marshal(d.tree) // it came from JSON
	return text
}

// faultsOf are the faults of an error of a document.
func faultsOf(name string, err error) []tproxy.ConfigFault {
	if err == nil {
		return nil
	}
	e, ok := errors.AsType[*tproxy.ConfigError](err)
	if !ok {
		return []tproxy.ConfigFault{{Source: name, What: "cannot be read (" + oneLine(err) + ")", Accepted: "a configuration with the keys of kumactl install transparent-proxy --config"}}
	}
	for i := range e.Faults {
		e.Faults[i].Source = name
	}
	return e.Faults
}

func lookup(tree map[string]any, path string) (any, bool) {
	for {
		first, rest, more := strings.Cut(path, ".")
		v, ok := tree[first]
		if !more || !ok {
			return v, ok
		}
		if tree, ok = v.(map[string]any); !ok {
			return nil, false
		}
		path = rest
	}
}

func remove(tree map[string]any, path string) {
	for {
		first, rest, more := strings.Cut(path, ".")
		if !more {
			delete(tree, first)
			return
		}
		var ok bool
		if tree, ok = tree[first].(map[string]any); !ok {
			return
		}
		path = rest
	}
}

// configMap reads a ConfigMap over the settings.
func (s *Settings) configMap(m Document) []tproxy.ConfigFault {
	d, faults := readDocument(m.Name, m.JSON)
	if faults != nil || d.tree == nil {
		return faults
	}
	for _, c := range s.differ(d.config, func(path string) bool { return d.given(path) && !atDefault(d, path) }) {
		c.Source = m.Name
		s.conflicts = append(s.conflicts, c)
	}
	for _, path := range identity {
		remove(d.tree, path)
	}
	for _, path := range clearable {
		if atDefault(d, path) {
			remove(d.tree, path)
		}
	}
	remove(d.tree, pathCNI) // whoever installs, it is a pod
	for _, m := range []struct{ to, from *bool }{{&s.DropInvalidPackets, d.drop}, {&s.Log, d.log}} {
		if m.from != nil {
			*m.to = *m.from
		}
	}
	for path, given := range map[string]bool{pathDrop: d.drop != nil, pathLog: d.log != nil} {
		if given {
			s.From[path] = m.Name
		}
	}
	if _, err := (tproxy.Decoder{AllowUnknown: true}).Decode(d.text(), &s.Config); err != nil {
		return faultsOf(m.Name, err)
	}
	for _, k := range tproxy.Keys() {
		if d.given(k.Path) {
			s.From[k.Path] = m.Name
		}
	}
	s.warnings = append(s.warnings, d.warnings...)
	return nil
}

// clearable are the keys whose default does not count where all keys are written, as in
// a ConfigMap of Helm's.
var clearable = []string{pathInboundPorts, pathInboundIPs, pathOutboundPorts, pathOutboundUIDs, pathOutboundIPs, pathFamily}

// atDefault reports of a list, a text or a port whether its value is the default.
func atDefault(d document, path string) bool {
	v, _ := lookup(d.tree, path)
	switch v := v.(type) {
	case nil:
		return true
	case []any:
		return len(v) == 0
	case string:
		return v == "" || path == pathFamily && v == tproxy.DualStack.String()
	case json.Number:
		for _, k := range tproxy.Keys() {
			if k.Path == path {
				return v.String() == k.Default
			}
		}
	}
	return false
}
