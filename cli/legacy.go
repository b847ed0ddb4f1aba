package cli

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// notBuilt are flags of Kuma v3, and the two that go with its keys, whose features
// are not built yet: accepted at their default, so that a command line that says
// what is so anyway goes on working.
var notBuilt = []struct{ name, standard, key string }{
	{"include-inbound-ports", "", "redirect.inbound.includePorts"},
	{"redirect-inbound-insert-instead-of-append", "false", "redirect.inbound.insertRedirectInsteadOfAppend"},
	{"include-outbound-ports", "", "redirect.outbound.includePorts"},
	{"redirect-outbound-insert-instead-of-append", "false", "redirect.outbound.insertRedirectInsteadOfAppend"},
	{"vnet", "", "redirect.vnet.networks"},
	{"drop-invalid-packets", "false", "dropInvalidPackets"},
	{"iptables-logs", "false", "log.enabled"},
	{"iptables-executables", "", executables},
}

// legacyFlag is a flag of Kuma 1.x or 2.x that v3 no longer has. It does what
// it did where that has a meaning here, and says what to use instead; otherwise it
// is a fault of one line.
type legacyFlag struct {
	name, standard string
	use            func(p *parser, c *tproxy.Config, name string)
}

var legacyFlags = []legacyFlag{
	{"skip-resolv-conf", "false", (*parser).legacySkip},
	{"kuma-dp-uid", "", (*parser).legacyUser},
	{"redirect-inbound-port-v6", "", (*parser).legacyPortV6},
	{"ipv6-disabled", "false", (*parser).legacyIPv6},
	{"skip-conntrack-zone-split", "false", func(p *parser, c *tproxy.Config, name string) {
		c.DNS.SkipConntrackZoneSplit = p.bool(name)
		p.deprecated(name, "use --skip-dns-conntrack-zone-split")
	}},
	{"exclude-outbound-tcp-ports-for-uids", "", legacyExclusions("tcp")},
	{"exclude-outbound-udp-ports-for-uids", "", legacyExclusions("udp")},
	{"redirect-dns-upstream-target-chain", "RETURN", func(p *parser, _ *tproxy.Config, name string) {
		if s := p.text(name); s != "" && s != "RETURN" {
			p.fault(fmt.Sprintf("--%s: %q is not supported: accepted is RETURN, which is what the proxy's own queries do", name, s))
			return
		}
		p.deprecated(name, "it has no effect")
	}},
	{"experimental-transparent-proxy-engine", "false", noEffect("there is one engine")},
	{"ebpf-enabled", "false", (*parser).legacyEBPF},
	{"ebpf-programs-source-path", "", noEffect("there are iptables rules alone")},
	{"ebpf-instance-ip", "", noEffect("there are iptables rules alone")},
	{"ebpf-bpffs-path", "", noEffect("there are iptables rules alone")},
	{"ebpf-cgroup-path", "", noEffect("there are iptables rules alone")},
	{"ebpf-tc-attach-iface", "", noEffect("there are iptables rules alone")},
}

// hiddenFlags are those that the help does not show.
func hiddenFlags() (out []flag) {
	for _, f := range notBuilt {
		out = append(out, flag{name: f.name, standard: f.standard})
	}
	for _, f := range legacyFlags {
		out = append(out, flag{name: f.name, standard: f.standard})
	}
	return out
}

// legacy reads the flags of other versions of Kuma.
func (p *parser) legacy(c *tproxy.Config) {
	for _, f := range notBuilt {
		for _, s := range p.each(f.name) {
			if f.standard == "false" && !p.bool(f.name) || f.standard == "" && strings.TrimSpace(s) == "" {
				continue
			}
			p.fault(fmt.Sprintf("--%s: %q is known, not supported yet: accepted is the default, %q", f.name, s, f.standard))
		}
	}
	for _, f := range legacyFlags {
		if p.given(f.name) {
			f.use(p, c, f.name)
		}
	}
}

// deprecated says what to use in the place of a flag that was accepted.
func (p *parser) deprecated(name, instead string) {
	if !p.refused[name] {
		p.note(fmt.Sprintf("--%s is deprecated: %s", name, instead))
	}
}

func noEffect(why string) func(*parser, *tproxy.Config, string) {
	return func(p *parser, _ *tproxy.Config, name string) { p.deprecated(name, "it has no effect: "+why) }
}

// legacyEBPF is a switch that must be off.
func (p *parser) legacyEBPF(_ *tproxy.Config, name string) {
	if p.bool(name) {
		p.fault(fmt.Sprintf("--%s: %q is not supported: accepted is false: there are iptables rules alone", name, p.text(name)))
		return
	}
	p.deprecated(name, "it has no effect: there are iptables rules alone")
}

// legacySkip is the contrary of a flag of today.
func (p *parser) legacySkip(c *tproxy.Config, name string) {
	const current = "modify-resolv-conf"
	skip := p.bool(name)
	if p.given(current) && skip == p.bool(current) {
		p.refuse(name, p.text(name), "only --"+current)
	}
	p.deprecated(name, fmt.Sprintf("use --%s=%t", current, !skip))
	if skip {
		c.DNS.ControlPlane = netip.Addr{}
	}
}

func (p *parser) legacyUser(c *tproxy.Config, name string) {
	if s := p.text(name); p.given("kuma-dp-user") && s != p.text("kuma-dp-user") {
		p.refuse(name, s, "the same as --kuma-dp-user, or only one of the two")
	}
	c.ProxyUIDs, c.ProxyUser = nil, p.text(name)
	p.deprecated(name, "use --kuma-dp-user")
}

// legacyPortV6 takes the port of IPv4 alone: Kuma has had one port for both since
// 2.9.
func (p *parser) legacyPortV6(c *tproxy.Config, name string) {
	if port := p.port(name); port != 0 && port != c.InboundPort() {
		p.refuse(name, p.text(name), fmt.Sprintf("%d, the port of --redirect-inbound-port, which is that of IPv6 too; --ip-family-mode ipv4 leaves IPv6 untouched", c.InboundPort()))
	}
	p.deprecated(name, "use --redirect-inbound-port, which is about IPv6 too")
}

func (p *parser) legacyIPv6(c *tproxy.Config, name string) {
	if off := p.bool(name); off && p.given("ip-family-mode") && c.IPFamilyMode != tproxy.IPv4Only {
		p.refuse(name, "true", "--ip-family-mode ipv4, or only one of the two")
	} else if off {
		c.IPFamilyMode = tproxy.IPv4Only
	}
	p.deprecated(name, "use --ip-family-mode ipv4")
}

// legacyExclusions reads ports:uids of a protocol. Like any list of flags, it
// takes the place of one in a file.
func legacyExclusions(protocol string) func(*parser, *tproxy.Config, string) {
	const current = "exclude-outbound-ports-for-uids"
	return func(p *parser, c *tproxy.Config, name string) {
		list := &c.Outbound.ExcludePortsForUIDs
		tcpGiven := protocol == "udp" && p.given("exclude-outbound-tcp-ports-for-uids") // and read already
		if !p.given(current) && !tcpGiven {
			*list = nil
		}
		for _, s := range p.each(name) {
			e, err := tproxy.ParseUIDExclusion(protocol + ":" + s)
			if strings.Count(s, ":") != 1 || err != nil {
				p.refuse(name, s, "ports:uids, such as 22,80-90:1000-1005")
				continue
			}
			*list = append(*list, e)
		}
		p.deprecated(name, fmt.Sprintf("use --%s %s:ports:uids", current, protocol))
	}
}
