package kube

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Result is what a pod's annotations mean.
type Result struct {
	// Config is valid, and of a pod: SSH is captured like the rest, nothing brings the
	// install back after a restart (Persist), and whom the proxy runs as and its ports
	// are those of the Settings. Where it redirects the queries to some nameservers
	// (DNS.Redirect without DNS.CaptureAll), whoever installs it has to read resolv.conf
	// in the pod: a CNI plugin cannot.
	Config tproxy.Config
	// Sources says where the values of Config come from, by the key of Kuma's
	// configuration, such as redirect.inbound.excludePorts. A key that is not there
	// is at its default.
	Sources map[string]Source
	// Always are the inbound ports that Config leaves alone whatever the pod's
	// lists say: those of the Settings, and the one of the probe proxy.
	Always rules.Ports
	// ByInit is whether the injector has said that an init container installs the
	// rules (cniMode: false in traffic.kuma.io/transparent-proxy-config), so that a
	// CNI plugin has to leave the pod alone.
	ByInit bool
	// Conflicts are values that differ from what the control plane says, and are
	// not used.
	Conflicts []Conflict
	// Ignored are the annotations under kuma.io/ that do not steer traffic, and
	// are nothing to this package, sorted.
	Ignored []string
	// Warnings are keys of the ConfigMaps, and of
	// traffic.kuma.io/transparent-proxy-config, that have no effect.
	Warnings []tproxy.ConfigFault
}

// Source is where a value comes from.
type Source struct {
	By   Origin
	Name string // of the annotation, the variable or the document
}

// String names the source; that of a value that nobody gave is "default".
func (s Source) String() string {
	switch s.By {
	case ByAnnotation:
		return "annotation " + s.Name
	case ByInjector:
		return "injector, " + s.Name
	case ByControlPlane:
		return "control plane, " + s.Name
	}
	return "default"
}

// Origin is who said a value.
type Origin uint8

// The origins, of which a later one wins where it may.
const (
	ByDefault      Origin = iota // nobody said
	ByControlPlane               // for every pod
	ByInjector                   // computed for this pod
	ByAnnotation                 // the pod's own
)

// Conflict is a value that differs from the control plane's where that one counts.
type Conflict struct {
	Source string // the annotation, or the document and its key
	Path   string // the key of the configuration; empty where there is none
	Value  string // what it says
	Used   string // what the control plane says, which is used
	From   string // where that comes from; "default" where nobody said
}

// String says all of it in a line.
func (c Conflict) String() string {
	where := c.Source
	if c.Path != "" && !isAnnotation(c.Source) {
		where += ": " + c.Path
	}
	return fmt.Sprintf("%s: %q is not used: the control plane says %s (%s)", where, short(c.Value), c.Used, c.From)
}

func isAnnotation(source string) bool {
	_, ok := steering[source]
	return ok && source != KeyConfig
}

// Configure reads a pod's annotations over the settings of the control plane.
//
// The error is a *tproxy.ConfigError with all faults, each with the annotation in
// Source: a value that is not accepted, a key under traffic.kuma.io/ that is not known,
// and what only Kuma's rules can do. An annotation that asks for what belongs to the
// control plane is no error, but a Conflict of the Result; so it is if its value makes
// no sense.
func Configure(annotations map[string]string, s Settings) (Result, error) {
	c := &configuring{settings: s, annotations: annotations, drop: s.DropInvalidPackets, log: s.Log}
	c.begin()
	c.computed()
	for _, name := range slices.Sorted(maps.Keys(annotations)) {
		c.annotation(name, annotations[name])
	}
	c.always()
	c.kept()
	c.unsupported()
	r := &c.result
	if c.faults == nil {
		from := map[string]string{}
		for path, src := range r.Sources {
			from[path] = src.Name
		}
		c.faults = located(validate(r.Config), from)
	}
	if c.faults != nil {
		return Result{}, &tproxy.ConfigError{Faults: c.faults}
	}
	return *r, nil
}

// configuring is one Configure.
type configuring struct {
	settings    Settings
	annotations map[string]string
	result      Result
	faults      []tproxy.ConfigFault
	drop, log   bool // what only Kuma's rules can do
	probe       uint16
	written     rules.Ports // the inbound ports that the injector has computed
}

// begin takes what a pod without annotations gets.
func (c *configuring) begin() {
	s := c.settings
	c.result = Result{Config: clone(s.Config), Sources: map[string]Source{},
		Conflicts: slices.Clone(s.conflicts), Warnings: slices.Clone(s.warnings)}
	identify(&c.result.Config, s.Config)
	for path, name := range s.From {
		c.result.Sources[path] = Source{ByControlPlane, name}
	}
	c.probe = s.ProbeProxyPort
}

// computed takes the configuration that the injector has computed for the pod: all of
// it, but who the proxy is.
func (c *configuring) computed() {
	text := c.annotations[KeyConfig]
	if strings.TrimSpace(text) == "" {
		return
	}
	json := []byte(text)
	if decode := c.settings.Decode; decode != nil {
		var err error
		if json, err = decode(json); err != nil {
			c.faults = append(c.faults, faultsOf(KeyConfig, err)...)
			return
		}
	}
	d, faults := readDocument(KeyConfig, json)
	if c.faults = append(c.faults, faults...); faults != nil || d.tree == nil {
		return
	}
	c.replace(d)
	c.drop, c.log = d.drop != nil && *d.drop, d.log != nil && *d.log
	for path, on := range map[string]bool{pathDrop: c.drop, pathLog: c.log} {
		if delete(c.result.Sources, path); on {
			c.result.Sources[path] = Source{ByInjector, KeyConfig}
		}
	}
	c.result.ByInit = d.given(pathCNI) && !d.is(pathCNI)
	c.result.Warnings = append(c.result.Warnings, d.warnings...)
}

// replace puts a computed configuration in the place of the settings.
func (c *configuring) replace(d document) {
	s := c.settings
	for _, x := range s.differ(d.config, d.given) {
		x.Source = KeyConfig
		c.conflict(x)
	}
	c.written = d.config.Inbound.ExcludePorts
	sources := map[string]Source{}
	for _, path := range identity {
		if src, ok := c.result.Sources[path]; ok {
			sources[path] = src
		}
	}
	for _, k := range tproxy.Keys() {
		if d.given(k.Path) && !slices.Contains(identity, k.Path) {
			sources[k.Path] = Source{ByInjector, KeyConfig}
		}
	}
	c.result.Config, c.result.Sources = clone(d.config), sources
	identify(&c.result.Config, s.Config)
}

// added are the inbound ports that the injector has added to a pod's own list, as for
// probes: those that it computed and neither the pod nor the control plane's list names.
// Where it has not even computed the pod's own in, it has not looked at the list.
func (c *configuring) added(own rules.Ports) rules.Ports {
	if !without(own, c.written).IsEmpty() {
		return rules.Ports{}
	}
	return without(c.written, c.settings.Config.Inbound.ExcludePorts)
}

// annotation reads one annotation.
func (c *configuring) annotation(name, value string) {
	if a, ok := steering[name]; ok {
		a.read(c, name, value)
		return
	}
	if strings.HasPrefix(name, "traffic.kuma.io/") {
		c.fault(tproxy.ConfigFault{Source: name, Value: short(value), What: "has no meaning: there is no such annotation",
			Accepted: nearest(name) + ", the nearest one"})
	} else if strings.HasPrefix(name, "kuma.io/") {
		c.result.Ignored = append(c.result.Ignored, name)
	}
}

func (c *configuring) fault(f tproxy.ConfigFault) { c.faults = append(c.faults, f) }

// always excludes the ports that no list of the pod's can redirect.
func (c *configuring) always() {
	r := &c.result
	r.Always = c.settings.Always
	if c.probe != 0 {
		r.Always = r.Always.Union(rules.Port(c.probe))
	}
	r.Config.Inbound.ExcludePorts = r.Config.Inbound.ExcludePorts.Union(r.Always)
	if _, ok := r.Sources[pathInboundPorts]; !ok && !r.Always.IsEmpty() {
		r.Sources[pathInboundPorts] = Source{ByInjector, "ports of probes"}
	}
	r.Config.Pod = true
}

// kept takes out by what an install would come back on a host: the runtime makes a pod
// anew, and the host's units and firewalld are not a pod's to write.
func (c *configuring) kept() {
	r := &c.result
	p := r.Config.Persist
	if p == tproxy.PersistAuto || p == tproxy.PersistNone {
		return // Build chooses none for a pod
	}
	path := pathPersist
	if _, ok := r.Sources[path]; !ok {
		path = pathStore
	}
	r.Warnings = append(r.Warnings, tproxy.ConfigFault{Source: r.Sources[path].Name, Path: path, Value: p.String(),
		What: "has no effect on a pod, which its runtime makes anew", Accepted: "auto or none"})
	delete(r.Sources, pathPersist)
	delete(r.Sources, pathStore)
	r.Config.Persist = tproxy.PersistNone
}

// unsupported refuses what only Kuma's rules can do.
func (c *configuring) unsupported() {
	for _, m := range []struct {
		path string
		on   bool
	}{{pathDrop, c.drop}, {pathLog, c.log}} {
		if m.on {
			c.fault(tproxy.ConfigFault{Source: c.result.Sources[m.path].Name, Path: m.path, Value: "true",
				What: "is known, not supported yet", Accepted: "the default, false", NotYet: true})
		}
	}
}

// identity are the keys that belong to the control plane.
var identity = []string{pathUser, pathInboundPort, pathOutboundPort, pathDNSPort}

// identify gives a Config the proxy of another.
func identify(c *tproxy.Config, of tproxy.Config) {
	c.ProxyUIDs, c.ProxyUser = slices.Clone(of.ProxyUIDs), of.ProxyUser
	if len(c.ProxyUIDs) == 0 && c.ProxyUser == "" {
		c.ProxyUIDs = []tproxy.UID{tproxy.DefaultProxyUID}
	}
	c.Inbound.Port, c.Outbound.Port, c.DNS.Port = of.InboundPort(), of.OutboundPort(), of.DNSPort()
}

// user is the proxy's user as text.
func user(c tproxy.Config) string {
	if len(c.ProxyUIDs) == 0 && c.ProxyUser != "" {
		return c.ProxyUser
	}
	uids := c.ProxyUIDs
	if len(uids) == 0 {
		uids = []tproxy.UID{tproxy.DefaultProxyUID}
	}
	return rules.UIDsOf(uids...).String()
}

// whose says who the proxy is, by the keys of identity.
func whose(c tproxy.Config) map[string]string {
	port := func(p uint16) string { return strconv.Itoa(int(p)) }
	return map[string]string{pathUser: user(c), pathInboundPort: port(c.InboundPort()),
		pathOutboundPort: port(c.OutboundPort()), pathDNSPort: port(c.DNSPort())}
}

// differ lists where a Config names another proxy, of the keys that count.
func (s Settings) differ(c tproxy.Config, counts func(path string) bool) (out []Conflict) {
	ours, theirs := whose(s.Config), whose(c)
	for _, path := range identity {
		if counts(path) && ours[path] != theirs[path] {
			out = append(out, Conflict{Path: path, Value: theirs[path], Used: ours[path], From: s.from(path)})
		}
	}
	return out
}

// from says where the settings have a value from.
func (s Settings) from(path string) string {
	if name, ok := s.From[path]; ok {
		return name
	}
	return "default"
}

// clone copies the lists too, so that no result shares one with the settings.
func clone(c tproxy.Config) tproxy.Config {
	c.ProxyUIDs = slices.Clone(c.ProxyUIDs)
	c.Inbound.ExcludeIPs = slices.Clone(c.Inbound.ExcludeIPs)
	c.Outbound.ExcludeIPs = slices.Clone(c.Outbound.ExcludeIPs)
	c.Outbound.ExcludePortsForUIDs = slices.Clone(c.Outbound.ExcludePortsForUIDs)
	return c
}

// without are the ports of p that q does not hold.
func without(p, q rules.Ports) rules.Ports {
	var out []rules.PortRange
	for _, r := range p.Ranges() {
		first := uint32(r.First)
		for _, o := range q.Ranges() {
			if o.Last < uint16(first) || o.First > r.Last {
				continue
			}
			if uint32(o.First) > first {
				out = append(out, rules.PortRange{First: uint16(first), Last: o.First - 1})
			}
			first = uint32(o.Last) + 1
			if first > uint32(r.Last) {
				break
			}
		}
		if first <= uint32(r.Last) {
			out = append(out, rules.PortRange{First: uint16(first), Last: r.Last})
		}
	}
	ports, _ := rules.PortsOf(out...) // none is 0 or reversed
	return ports
}

// validate are the faults of a Config.
func validate(c tproxy.Config) []tproxy.ConfigFault {
	return faultsOf("", c.Validate())
}

// located gives faults their sources.
func located(faults []tproxy.ConfigFault, from map[string]string) []tproxy.ConfigFault {
	for i := range faults {
		faults[i].Source = from[faults[i].Path]
	}
	return faults
}
