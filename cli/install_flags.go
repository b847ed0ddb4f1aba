package cli

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// The flags of install are Kuma's, by name and default, and ours beside them.
func installFlags() []flagGroup {
	return []flagGroup{
		{"The proxy", []flag{
			{"kuma-dp-user", "", "`user` that runs kuma-dp, by name or number (default UID 5678, else the user kuma-dp)"},
		}},
		{"Inbound connections", []flag{
			{"redirect-inbound", "true", "redirect connections from other hosts to the proxy; false for a gateway"},
			{"redirect-inbound-port", "15006", "`port` of the proxy, the Dataplane's redirectPortInbound"},
			{"exclude-inbound-ports", "", "destination `ports` that are not redirected, such as 8080,9000-9010; repeatable"},
			{"exclude-inbound-ips", "", "source `addresses` and CIDRs that are not redirected; repeatable"},
			{"capture-ssh", "false", "redirect port 22 too, which is left alone without this flag"},
		}},
		{"Outbound connections", []flag{
			{"redirect-outbound", "true", "redirect connections of this host's processes to the proxy"},
			{"redirect-outbound-port", "15001", "`port` of the proxy, the Dataplane's redirectPortOutbound"},
			{"exclude-outbound-ports", "", "TCP destination `ports` that are not redirected, such as 443,8000-8100; repeatable"},
			{"exclude-outbound-ports-for-uids", "", "`spec` proto:ports:uids that is not redirected, as tcp:22,80-90:1000-1005; repeatable"},
			{"exclude-outbound-ips", "", "destination `addresses` and CIDRs that are not redirected; repeatable"},
		}},
		{"DNS", []flag{
			{"redirect-dns", "false", "redirect DNS queries to the nameservers of resolv.conf to the proxy"},
			{"redirect-all-dns-traffic", "false", "redirect every DNS query to the proxy, whomever it is sent to"},
			{"redirect-dns-port", "15053", "`port` of the proxy for DNS queries"},
			{"skip-dns-conntrack-zone-split", "false", "leave redirected queries in the default conntrack zone"},
		}},
		{"The host", append([]flag{
			{"ip-family-mode", "dualstack", "`mode`: dualstack, or ipv4 to leave IPv6 untouched"},
			{"modify-iptables", "true", "put the rules in place; false leaves iptables alone"},
			{"backend", "auto", "what holds the rules, by `name`: auto, iptables-nft or iptables-legacy"},
			{"iptables-mode", "", "`mode`: nft or legacy, short for --backend iptables-nft or iptables-legacy"},
			{"persist", "none", "`how` the rules come back after a reboot: none is the only way so far"},
			{"disable-comments", "false", "leave the reason out of each rule"},
		}, lockFlags()...)},
		{"This run", runFlags()},
	}
}

func lockFlags() []flag {
	return []flag{
		{"wait", "5", "`seconds` to wait for the xtables lock; 0 does not wait"},
		{"wait-interval", "0", "`microseconds` between two tries for the lock; 0 leaves it to iptables"},
	}
}

func runFlags() []flag {
	return []flag{
		{"dry-run", "false", "print what would be done and write nothing; works without root and anywhere"},
		{"output", "text", "`format`: text or json"},
		{"verbose", "false", "log every step to standard error"},
	}
}

// run is what install and uninstall have in common.
type run struct {
	dryRun, json, verbose bool
	wait, waitInterval    time.Duration
}

func (p *parser) run() run {
	return run{
		dryRun:       p.bool("dry-run"),
		json:         p.oneOf("output", "text", "json") == 1,
		verbose:      p.bool("verbose"),
		wait:         p.wait(),
		waitInterval: time.Duration(p.number("wait-interval", 999999, "microseconds from 0 to 999999")) * time.Microsecond,
	}
}

// wait returns tproxy.Config's Wait, which is negative for not at all.
func (p *parser) wait() time.Duration {
	n := p.number("wait", 1<<31-1, "whole seconds from 0, which does not wait, to 2147483647")
	if n == 0 {
		return -time.Second
	}
	return time.Duration(n) * time.Second
}

// request is what an install was asked for.
type request struct {
	run
	config         tproxy.Config
	modifyIPTables bool
	// modeChosen is whether somebody chose the IP family mode, so that the
	// Dataplane should say it too.
	modeChosen bool
}

// request reads the flags of install; what is wrong is in p.faults.
func (p *parser) request() request {
	r := request{run: p.run(), modifyIPTables: p.bool("modify-iptables"), modeChosen: p.given("ip-family-mode")}
	r.config = tproxy.Config{
		ProxyUser:       p.text("kuma-dp-user"),
		Inbound:         p.inbound(),
		Outbound:        p.outbound(),
		DNS:             p.dns(),
		IPFamilyMode:    p.ipFamilyMode(),
		DisableComments: p.bool("disable-comments"),
		Backend:         p.backend(),
		Wait:            r.wait,
		WaitInterval:    r.waitInterval,
	}
	p.oneOf("persist", "none")
	p.validate(r.config)
	return r
}

func (p *parser) inbound() tproxy.Inbound {
	return tproxy.Inbound{
		Off:          !p.bool("redirect-inbound"),
		Port:         p.port("redirect-inbound-port"),
		ExcludePorts: p.ports("exclude-inbound-ports"),
		ExcludeIPs:   p.prefixes("exclude-inbound-ips"),
		CaptureSSH:   p.bool("capture-ssh"),
	}
}

func (p *parser) outbound() tproxy.Outbound {
	return tproxy.Outbound{
		Off:                 !p.bool("redirect-outbound"),
		Port:                p.port("redirect-outbound-port"),
		ExcludePorts:        p.ports("exclude-outbound-ports"),
		ExcludePortsForUIDs: p.uidExclusions("exclude-outbound-ports-for-uids"),
		ExcludeIPs:          p.prefixes("exclude-outbound-ips"),
	}
}

func (p *parser) dns() tproxy.DNS {
	d := tproxy.DNS{
		Redirect:               p.bool("redirect-dns"),
		CaptureAll:             p.bool("redirect-all-dns-traffic"),
		Port:                   p.port("redirect-dns-port"),
		SkipConntrackZoneSplit: p.bool("skip-dns-conntrack-zone-split"),
	}
	if d.Redirect && d.CaptureAll {
		p.refuse("redirect-dns", "true", "only one of --redirect-dns and --redirect-all-dns-traffic")
	}
	return d
}

func (p *parser) ipFamilyMode() tproxy.IPFamilyMode {
	modes := []tproxy.IPFamilyMode{tproxy.DualStack, tproxy.IPv4Only}
	return modes[p.oneOf("ip-family-mode", modes[0].String(), modes[1].String())]
}

func (p *parser) backend() tproxy.Backend {
	b, err := tproxy.ParseBackend(p.text("backend"))
	if err != nil {
		p.refuseAll("backend", err)
	}
	if !p.given("iptables-mode") {
		return b
	}
	modes := []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy}
	mode := modes[p.oneOf("iptables-mode", "nft", "legacy")]
	if p.given("backend") && err == nil && b != mode {
		p.refuse("iptables-mode", p.text("iptables-mode"), "the same as --backend "+b.String()+", or only one of the two")
	}
	return mode
}

// ports reads a list of ports that may be given more than once: an exclusion is
// never lost to a later one.
func (p *parser) ports(name string) (sum rules.Ports) {
	for _, s := range p.each(name) {
		ports, err := rules.ParsePorts(s)
		if err != nil {
			p.refuseAll(name, err)
		}
		sum = sum.Union(ports)
	}
	return sum
}

func (p *parser) prefixes(name string) (all []netip.Prefix) {
	for _, s := range p.each(name) {
		prefixes, err := tproxy.ParsePrefixes(s)
		if err != nil {
			p.refuseAll(name, err)
		}
		all = append(all, prefixes...)
	}
	return all
}

func (p *parser) uidExclusions(name string) (all []tproxy.UIDExclusion) {
	for _, s := range p.each(name) {
		e, err := tproxy.ParseUIDExclusion(s)
		if err != nil {
			p.refuseAll(name, err)
			continue
		}
		all = append(all, e)
	}
	return all
}

// validate adds what is wrong with values that are well formed each for itself.
func (p *parser) validate(c tproxy.Config) {
	// A port that was refused is 0, which would stand for the default: let it
	// stand for one that no other port is equal to.
	ports := []*uint16{&c.Inbound.Port, &c.Outbound.Port, &c.DNS.Port}
	for _, port := range ports {
		for free := uint16(1); *port == 0; free++ {
			if !slices.ContainsFunc(ports, func(q *uint16) bool { return *q == free }) {
				*port = free
			}
		}
	}
	p.configError(c.Validate())
}

// configError notes the faults of a *tproxy.ConfigError by the names of the
// flags, and reports whether err is one.
func (p *parser) configError(err error) bool {
	ce, ok := errors.AsType[*tproxy.ConfigError](err)
	if !ok {
		return false
	}
	names := flagNames()
	for _, f := range ce.Faults {
		f.Path = strings.TrimSpace(f.Path)
		if name, known := names[f.Path]; known {
			f.Path = name
		}
		f.What = inFlags(f.What, names)
		p.fault(f.String())
	}
	return true
}

// flagNames maps Kuma's keys to the flags.
func flagNames() map[string]string {
	return map[string]string{
		"kumaDPUser":                            "--kuma-dp-user",
		"ipFamilyMode":                          "--ip-family-mode",
		"backend":                               "--backend",
		"wait":                                  "--wait",
		"waitInterval":                          "--wait-interval",
		"comments.disabled":                     "--disable-comments",
		"redirect.inbound.enabled":              "--redirect-inbound",
		"redirect.inbound.port":                 "--redirect-inbound-port",
		"redirect.inbound.captureSSH":           "--capture-ssh",
		"redirect.inbound.excludePorts":         "--exclude-inbound-ports",
		"redirect.inbound.excludePortsForIPs":   "--exclude-inbound-ips",
		"redirect.outbound.enabled":             "--redirect-outbound",
		"redirect.outbound.port":                "--redirect-outbound-port",
		"redirect.outbound.excludePorts":        "--exclude-outbound-ports",
		"redirect.outbound.excludePortsForUIDs": "--exclude-outbound-ports-for-uids",
		"redirect.outbound.excludePortsForIPs":  "--exclude-outbound-ips",
		"redirect.dns.enabled":                  "--redirect-dns",
		"redirect.dns.captureAll":               "--redirect-all-dns-traffic",
		"redirect.dns.port":                     "--redirect-dns-port",
		"redirect.dns.skipConntrackZoneSplit":   "--skip-dns-conntrack-zone-split",
	}
}

// inFlags puts the flag's name in the place of each word that is a dotted key.
func inFlags(s string, names map[string]string) string {
	words := strings.Split(s, " ")
	for i, w := range words {
		if name, ok := names[w]; ok && strings.Contains(w, ".") {
			words[i] = name
		}
	}
	return strings.Join(words, " ")
}
