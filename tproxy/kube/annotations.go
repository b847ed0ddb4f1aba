package kube

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// The annotations that steer traffic, or say whether it is steered
// (pkg/plugins/runtime/k8s/metadata/annotations.go of Kuma).
const (
	KeyInjected      = "kuma.io/sidecar-injected"                 // "true" by the injector
	KeyIgnore        = "kuma.io/ignore"                           // true: the pod is no part of the mesh
	KeyConfig        = "traffic.kuma.io/transparent-proxy-config" // all of it, by the injector
	KeyConfigMap     = "traffic.kuma.io/transparent-proxy-configmap-name"
	KeyInboundPorts  = "traffic.kuma.io/exclude-inbound-ports"
	KeyInboundIPs    = "traffic.kuma.io/exclude-inbound-ips"
	KeyOutboundPorts = "traffic.kuma.io/exclude-outbound-ports"
	KeyOutboundUIDs  = "traffic.kuma.io/exclude-outbound-ports-for-uids"
	KeyOutboundIPs   = "traffic.kuma.io/exclude-outbound-ips"
	KeyDropInvalid   = "traffic.kuma.io/drop-invalid-packets"
	KeyLogs          = "traffic.kuma.io/iptables-logs"
	KeyFamily        = "kuma.io/transparent-proxying-ip-family-mode"
	KeyGateway       = "kuma.io/gateway"
	KeyProbePort     = "kuma.io/application-probe-proxy-port"

	// What belongs to the control plane.
	KeyUID          = "kuma.io/sidecar-uid"
	KeyProxying     = "kuma.io/transparent-proxying"
	KeyInboundPort  = "kuma.io/transparent-proxying-inbound-port"  // before Kuma 3
	KeyOutboundPort = "kuma.io/transparent-proxying-outbound-port" // before Kuma 3
	KeyDNS          = "kuma.io/builtin-dns"
	KeyDNSPort      = "kuma.io/builtin-dns-port"
)

// steer is an annotation that steers traffic.
type steer struct {
	read func(c *configuring, name, value string)
}

// steering are the annotations that are known, by name. It is filled in by init, since
// the readers look names up.
var steering map[string]steer

func init() {
	steering = map[string]steer{
		KeyInjected:      {func(*configuring, string, string) {}},
		KeyIgnore:        {func(*configuring, string, string) {}},
		KeyConfig:        {func(*configuring, string, string) {}},
		KeyConfigMap:     {(*configuring).workload},
		KeyInboundPorts:  {(*configuring).inboundPorts},
		KeyInboundIPs:    list(pathInboundIPs, readInboundIPs),
		KeyOutboundPorts: list(pathOutboundPorts, readOutboundPorts),
		KeyOutboundUIDs:  list(pathOutboundUIDs, readOutboundUIDs),
		KeyOutboundIPs:   list(pathOutboundIPs, readOutboundIPs),
		KeyFamily:        list(pathFamily, readFamily),
		KeyDropInvalid:   mode(pathDrop, func(c *configuring) *bool { return &c.drop }),
		KeyLogs:          mode(pathLog, func(c *configuring) *bool { return &c.log }),
		KeyGateway:       {(*configuring).gateway},
		KeyProbePort:     {(*configuring).probePort},
		KeyUID:           theirs(pathUser),
		KeyInboundPort:   theirs(pathInboundPort),
		KeyOutboundPort:  theirs(pathOutboundPort),
		KeyDNSPort:       theirs(pathDNSPort),
		KeyProxying:      {(*configuring).proxying},
		KeyDNS:           {(*configuring).dns},
	}
}

// list makes an annotation of a value that takes the place of the control plane's.
func list(path string, read func(string, *tproxy.Config) []tproxy.ConfigFault) steer {
	return steer{func(c *configuring, name, value string) {
		found := read(value, &c.result.Config)
		for i := range found {
			found[i].Source = name
		}
		c.faults = append(c.faults, found...)
		c.result.Sources[path] = Source{ByAnnotation, name}
	}}
}

// mode makes an annotation of what only Kuma's rules can do.
func mode(path string, of func(*configuring) *bool) steer {
	return steer{func(c *configuring, name, value string) {
		on, ok := readBool(value)
		if !ok {
			c.fault(tproxy.ConfigFault{Source: name, Value: short(value), What: "is no boolean", Accepted: "true, yes, false or no"})
			return
		}
		*of(c) = on
		c.result.Sources[path] = Source{ByAnnotation, name}
	}}
}

// theirs makes an annotation of what belongs to the control plane.
func theirs(path string) steer {
	return steer{func(c *configuring, name, value string) {
		if used := whose(c.settings.Config)[path]; strings.TrimSpace(value) != used {
			c.conflict(Conflict{name, path, value, used, c.settings.from(path)})
		}
	}}
}

func (c *configuring) conflict(x Conflict) { c.result.Conflicts = append(c.result.Conflicts, x) }

// workload is the name of a ConfigMap of the pod's own, which can be read with the API
// server alone, or where it is mounted.
func (c *configuring) workload(name, value string) {
	if strings.TrimSpace(value) == "" {
		return
	}
	c.fault(tproxy.ConfigFault{Source: name, Value: short(value), What: "names a ConfigMap that cannot be read here",
		Accepted: "an init container, which has it mounted, or its keys in " + KeyConfig})
}

// inboundPorts is the pod's own list, beside which stays what the injector has added.
func (c *configuring) inboundPorts(name, value string) {
	list(pathInboundPorts, readInboundPorts).read(c, name, value)
	in := &c.result.Config.Inbound
	in.ExcludePorts = in.ExcludePorts.Union(c.added(in.ExcludePorts))
}

// gateway is whether the proxy is a gateway, to which nothing is to be redirected.
func (c *configuring) gateway(name, value string) {
	on, ok := readEnabled(value)
	if v := strings.TrimSpace(value); v == "provided" || v == "builtin" {
		on, ok = true, true
	}
	if !ok {
		c.fault(tproxy.ConfigFault{Source: name, Value: short(value), What: "is not accepted", Accepted: "enabled, provided, builtin or disabled"})
	} else if on {
		c.result.Config.Inbound.Off = true
		c.result.Sources[pathInbound] = Source{ByAnnotation, name}
	}
}

func (c *configuring) probePort(name, value string) {
	found := readProbePort(value, &c.probe)
	for i := range found {
		found[i].Source = name
	}
	c.faults = append(c.faults, found...)
}

func (c *configuring) proxying(name, value string) {
	if on, ok := readEnabled(value); !ok || !on {
		c.conflict(Conflict{name, "", value, "enabled", "always"})
	}
}

func (c *configuring) dns(name, value string) {
	used := c.result.Config.DNS.On()
	if on, ok := readEnabled(value); !ok || on != used {
		words := map[bool]string{true: "enabled", false: "disabled"}
		c.conflict(Conflict{name, pathDNS, value, words[used], c.result.Sources[pathDNS].String()})
	}
}

// Injected reports whether the injector has given a pod a proxy, and with it whether
// there is anything to do for the pod; if not, it says why. It looks at one
// annotation alone, and is what a CNI plugin asks first.
func Injected(annotations map[string]string) (ok bool, why string) {
	switch v, there := annotations[KeyInjected]; {
	case !there:
		return false, "no annotation " + KeyInjected
	case v != "true":
		return false, "annotation " + KeyInjected + " is " + strconv.Quote(short(v)) + `, not "true"`
	}
	return true, ""
}

const acceptedPorts = "ports from 1 to 65535 and ranges such as 80-90, with commas between them"

// portsOf reads a list of ports.
func portsOf(text string, to *rules.Ports) []tproxy.ConfigFault {
	ports, err := rules.ParsePorts(text)
	if err != nil {
		return unread(text, err, acceptedPorts)
	}
	*to = ports
	return nil
}

func readInboundPorts(text string, c *tproxy.Config) []tproxy.ConfigFault {
	return portsOf(text, &c.Inbound.ExcludePorts)
}

func readOutboundPorts(text string, c *tproxy.Config) []tproxy.ConfigFault {
	return portsOf(text, &c.Outbound.ExcludePorts)
}

// prefixesOf reads a list of addresses.
func prefixesOf(text string, to *[]netip.Prefix) []tproxy.ConfigFault {
	prefixes, err := tproxy.ParsePrefixes(text)
	if err != nil {
		return unread(text, err, "addresses, and CIDRs without host bits such as 10.0.0.0/8 or fd00::/8, with commas between them")
	}
	*to = prefixes
	return nil
}

func readInboundIPs(text string, c *tproxy.Config) []tproxy.ConfigFault {
	return prefixesOf(text, &c.Inbound.ExcludeIPs)
}

func readOutboundIPs(text string, c *tproxy.Config) []tproxy.ConfigFault {
	return prefixesOf(text, &c.Outbound.ExcludeIPs)
}

func readOutboundUIDs(text string, c *tproxy.Config) []tproxy.ConfigFault {
	list, err := tproxy.ParseUIDExclusions(text)
	if err != nil {
		return unread(text, err, "proto:ports:uids, ports:uids or uids, such as tcp:22,80-90:1000-1005, with ; between several")
	}
	c.Outbound.ExcludePortsForUIDs = list
	return nil
}

func readFamily(text string, c *tproxy.Config) []tproxy.ConfigFault {
	mode, err := tproxy.ParseIPFamilyMode(strings.TrimSpace(text))
	if err != nil {
		return bad(text, "is no mode", "dualstack or ipv4")
	}
	c.IPFamilyMode = mode
	return nil
}

func readProbePort(text string, to *uint16) []tproxy.ConfigFault {
	n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 16)
	if err != nil {
		return bad(text, "is no port", "a port from 1 to 65535, or 0 where there is no probe proxy")
	}
	*to = uint16(n)
	return nil
}

// readBool reads a boolean as Kuma's annotations have them; an empty one clears.
func readBool(text string) (on, ok bool) {
	switch strings.TrimSpace(text) {
	case "true", "yes":
		return true, true
	case "false", "no", "":
		return false, true
	}
	return false, false
}

func readEnabled(text string) (on, ok bool) {
	switch strings.TrimSpace(text) {
	case "enabled":
		return true, true
	case "disabled":
		return false, true
	}
	return readBool(text)
}

func bad(value, what, accepted string) []tproxy.ConfigFault {
	return []tproxy.ConfigFault{{Value: short(value), What: what, Accepted: accepted}}
}

// mostFaults bounds what is said of one value, which can be as long as all annotations
// of a pod: 256 KiB.
const mostFaults = 20

// unread makes a fault of each line of an error.
func unread(value string, err error, accepted string) (out []tproxy.ConfigFault) {
	for line := range strings.SplitSeq(err.Error(), "\n") {
		if len(out) == mostFaults {
			break // nobody reads on
		}
		out = append(out, tproxy.ConfigFault{Value: short(value), What: "cannot be read (" + short(line) + ")", Accepted: accepted})
	}
	return out
}

func oneLine(err error) string { return short(strings.ReplaceAll(err.Error(), "\n", "; ")) }

// short is a value as it stands in an error, no longer than a line.
func short(s string) string {
	const most = 120
	if len(s) <= most {
		return s
	}
	if r := []rune(s[:min(len(s), 4*most)]); len(r) > most {
		return string(r[:most]) + "..."
	}
	return s
}

// nearest is the known annotation under traffic.kuma.io/ that is most like a name.
func nearest(name string) string {
	best, least := "", -1
	for known := range steering {
		if d := distance(name, known); strings.HasPrefix(known, "traffic.") && (least < 0 || d < least || d == least && known < best) {
			best, least = known, d
		}
	}
	return best
}

// distance is Levenshtein's, of as many bytes as a name can have.
func distance(a, b string) int {
	a = a[:min(len(a), 100)]
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
