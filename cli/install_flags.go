package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// The flags of install are Kuma's, by name and default, and ours beside them.
func installFlags() []flagGroup {
	return []flagGroup{
		{"The configuration", []flag{
			{"config", "", "`file` of YAML or JSON, - for standard input, or several with commas; repeatable"},
			{podAnnotations, "", "`file` of the downward API with a pod's annotations, which win over the configuration"},
			{"reuse-config", "false", "begin with the configuration that is installed here; files, variables and flags win over it"},
		}},
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
			{"redirect-dns-tcp", "false", "redirect over TCP too what one of the above redirects over UDP, unless outbound leaves it alone"},
			{"redirect-dns-port", "15053", "`port` of the proxy for DNS queries"},
			{"skip-dns-conntrack-zone-split", "false", "leave redirected queries in the default conntrack zone"},
			{"resolv-conf", "/etc/resolv.conf", "`file` that names the nameservers, for --redirect-dns and --kuma-cp-ip"},
			{"kuma-cp-ip", "", "`address` of the control plane, which becomes the first nameserver of --resolv-conf"},
			{"modify-resolv-conf", "true", "do that; given as true, also where the file is another network namespace's"},
		}},
		{"The host", append([]flag{
			{"ip-family-mode", "dualstack", "`mode`: dualstack, or ipv4 to leave IPv6 untouched"},
			{"modify-iptables", "true", "put the rules in place; false leaves iptables alone"},
			{"backend", "auto", "what holds the rules, by `name`: auto, nftables, iptables-nft or iptables-legacy"},
			{"iptables-mode", "", "`mode`: nft or legacy, short for --backend iptables-nft or iptables-legacy"},
			{"persist", "auto", "`how` the rules come back after a restart: auto, systemd, firewalld or none"},
			{"store-firewalld", "false", "short for --persist firewalld"},
			{"disable-comments", "false", "leave the reason out of each rule"},
		}, lockFlags()...)},
		{"This run", append([]flag{
			{"require-proxy", "false", "refuse while nothing listens on a port of the proxy that is redirected to"},
			{"confirm-within", "", "`duration`, 5s to 24h, after which the former state is put back, unless the command confirm was given"},
		}, runFlags()...)},
	}
}

func lockFlags() []flag {
	return []flag{
		{"wait", "5", "`seconds` to wait for the xtables lock; 0 does not wait"},
		{"wait-interval", "0", "`microseconds` between two tries for the lock; 0 leaves it to iptables"},
		{"max-retries", "4", "`times` to try again when the lock was not had or the kernel was busy"},
		{"sleep-between-retries", "2s", "`duration` to sleep before trying again"},
	}
}

func runFlags() []flag {
	return []flag{
		{"dry-run", "false", "print what would be done and write nothing; works without root and anywhere"},
		{"output", "text", "`format`: text, json or yaml"},
		{"verbose", "false", "log every step to standard error"},
	}
}

// run is what install, uninstall and explain have in common.
type run struct {
	tproxy.Settings
	format format
}

// run reads the flags of a run over the settings of files and the environment.
func (p *parser) run(s tproxy.Settings) run {
	r := run{s, p.format()}
	set(p, "dry-run", &r.DryRun, p.bool)
	set(p, "verbose", &r.Verbose, p.bool)
	return r
}

func (p *parser) format() format {
	return []format{asText, asJSON, asYAML}[p.oneOf("output", "text", "json", "yaml")]
}

// set sets a field to the value of a flag, where the flag is given.
func set[T any](p *parser, name string, field *T, read func(name string) T) {
	if p.given(name) {
		*field = read(name)
	}
}

// lock reads the flags about the lock of iptables.
func (p *parser) lock(c *tproxy.Config) {
	set(p, "wait", &c.Wait, p.wait)
	set(p, "wait-interval", &c.WaitInterval, func(name string) time.Duration {
		return time.Duration(p.number(name, 999999, "microseconds from 0 to 999999")) * time.Microsecond
	})
	set(p, "max-retries", &c.MaxRetries, func(name string) int {
		if n := p.number(name, 1000, "a number from 0, which does not try again, to 1000"); n > 0 {
			return int(n)
		}
		return -1
	})
	set(p, "sleep-between-retries", &c.SleepBetweenRetries, func(name string) time.Duration {
		if d := p.duration(name, "2s or 500ms"); d > 0 || p.refused[name] {
			return d
		}
		return -1
	})
}

// wait returns tproxy.Config's Wait, which is negative for not at all.
func (p *parser) wait(name string) time.Duration {
	n := p.number(name, 1<<31-1, "whole seconds from 0, which does not wait, to 2147483647")
	if n == 0 {
		return -time.Second
	}
	return time.Duration(n) * time.Second
}

// duration returns a duration from 0 to an hour; 0 when it is not accepted.
func (p *parser) duration(name, example string) time.Duration {
	s := p.text(name)
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || d > time.Hour {
		p.refuse(name, s, "a duration from 0s to 1h with its unit, such as "+example)
		return 0
	}
	return d
}

// request is what an install was asked for.
type request struct {
	run
	config         tproxy.Config
	modifyIPTables bool
	requireProxy   bool
	// modeChosen is whether somebody chose the IP family mode, so that the
	// Dataplane should say it too.
	modeChosen bool
	version    string        // of the program, where it says one
	within     time.Duration // in which the install has to be confirmed; 0 is final at once
	path       string        // of the command
}

// request reads the configuration and the flags of install over it, and says the notes
// on them; what is wrong is in p.faults. The error is that of reading what is installed.
func (p *parser) request(cmd *cobra.Command, o Options) (request, error) {
	base, err := p.reuse(cmd, o)
	if err != nil {
		return request{}, explain(cmd, err)
	}
	loaded := p.load(Loader{AllowUnknown: o.AllowUnknown, Environ: os.Environ(), Stdin: cmd.InOrStdin(), base: base}, p.each("config"))
	r := request{run: p.run(loaded.Settings), config: loaded.Config, modifyIPTables: p.bool("modify-iptables"), requireProxy: p.bool("require-proxy"), version: o.Version, within: p.trial(), path: cmd.CommandPath()}
	c := &r.config
	kept := p.pod(c)
	set(p, "kuma-dp-user", &c.ProxyUser, func(name string) string {
		c.ProxyUIDs = nil
		return p.text(name)
	})
	set(p, "ip-family-mode", &c.IPFamilyMode, p.ipFamilyMode)
	p.inbound(&c.Inbound)
	c.Inbound.ExcludePorts = c.Inbound.ExcludePorts.Union(kept)
	p.outbound(&c.Outbound)
	p.dns(&c.DNS)
	set(p, "disable-comments", &c.DisableComments, p.bool)
	p.backend(&c.Backend)
	p.lock(c)
	p.persist(&c.Persist)
	p.legacy(c)
	if a := c.DNS.ControlPlane; a.IsValid() && !r.modifyIPTables {
		p.refuse("kuma-cp-ip", a.String(), "with --modify-iptables alone: the rules hold the record of it")
	}
	_, r.modeChosen = loaded.From["ipFamilyMode"]
	r.modeChosen = r.modeChosen || p.given("ip-family-mode") || c.IPFamilyMode != tproxy.DualStack
	if !p.notLoaded {
		p.validate(r.config)
	}
	p.say(cmd)
	return r, nil
}

// load reads the files and the environment. With a fault in them there is nothing.
func (p *parser) load(l Loader, values []string) *Loaded {
	sources, faults := l.sources(values)
	loaded, err := l.load(sources, faults, p.overridden())
	if e, ok := errors.AsType[*tproxy.ConfigError](err); ok {
		for _, f := range e.Faults {
			p.fault(f.String())
		}
	}
	if err != nil {
		p.notLoaded = true
		return &Loaded{}
	}
	p.from = loaded.From
	for _, w := range loaded.Warnings {
		p.note(w.String())
	}
	return loaded
}

// overridden are the keys of flags that are given, as far as a value of another
// key, or one that is not accepted, hangs on them.
func (p *parser) overridden() map[string]leaf {
	out := map[string]leaf{}
	for _, f := range notBuilt {
		if p.given(f.name) {
			out[f.key] = leaf{}
		}
	}
	if p.given("persist") || p.given("store-firewalld") && p.bool("store-firewalld") {
		out["persist"], out["storeFirewalld"] = leaf{}, leaf{}
	} else if p.given("store-firewalld") {
		out["storeFirewalld"] = leaf{}
	}
	p.podModes(out)
	dns := func(name string, value bool, paths ...string) {
		for _, path := range paths {
			out[path] = leaf{json: strconv.AppendBool(nil, value), from: "--" + name}
		}
	}
	if name := "redirect-dns"; p.given(name) {
		dns(name, p.bool(name), "redirect.dns.enabled")
	}
	// As in Kuma, this flag enables the redirection too.
	if name := "redirect-all-dns-traffic"; p.given(name) && p.bool(name) {
		dns(name, true, "redirect.dns.captureAll", "redirect.dns.enabled")
	} else if p.given(name) {
		dns(name, false, "redirect.dns.captureAll")
	}
	return out
}

func (p *parser) inbound(in *tproxy.Inbound) {
	set(p, "redirect-inbound", &in.Off, p.not)
	set(p, "redirect-inbound-port", &in.Port, p.port)
	set(p, "exclude-inbound-ports", &in.ExcludePorts, p.ports)
	set(p, "exclude-inbound-ips", &in.ExcludeIPs, p.prefixes)
	set(p, "capture-ssh", &in.CaptureSSH, p.bool)
}

func (p *parser) outbound(out *tproxy.Outbound) {
	set(p, "redirect-outbound", &out.Off, p.not)
	set(p, "redirect-outbound-port", &out.Port, p.port)
	set(p, "exclude-outbound-ports", &out.ExcludePorts, p.ports)
	set(p, "exclude-outbound-ports-for-uids", &out.ExcludePortsForUIDs, p.uidExclusions)
	set(p, "exclude-outbound-ips", &out.ExcludeIPs, p.prefixes)
}

// dns reads the flags about DNS that overridden did not read.
func (p *parser) dns(d *tproxy.DNS) {
	if p.bool("redirect-dns") && p.bool("redirect-all-dns-traffic") {
		p.refuse("redirect-dns", "true", "only one of --redirect-dns and --redirect-all-dns-traffic")
	}
	set(p, "redirect-dns-tcp", &d.RedirectTCP, p.bool)
	set(p, "redirect-dns-port", &d.Port, p.port)
	set(p, "skip-dns-conntrack-zone-split", &d.SkipConntrackZoneSplit, p.bool)
	set(p, "resolv-conf", &d.ResolvConf, p.text)
	set(p, "kuma-cp-ip", &d.ControlPlane, p.server)
	set(p, "modify-resolv-conf", &d.ModifyShared, p.bool)
	if p.given("modify-resolv-conf") && !d.ModifyShared {
		d.ControlPlane = netip.Addr{}
	}
}

// server returns the address of a DNS server; none for an empty value.
func (p *parser) server(name string) netip.Addr {
	s := p.text(name)
	if s == "" {
		return netip.Addr{}
	}
	a, err := dns.ParseAddress(s)
	if e, ok := errors.AsType[*dns.AddressError](err); ok {
		p.refused[name] = true
		p.fault(fmt.Sprintf("--%s: %q %s: accepted is %s", name, s, e.What, e.Accepted))
		return netip.Addr{}
	}
	return a
}

func (p *parser) ipFamilyMode(name string) tproxy.IPFamilyMode {
	modes := []tproxy.IPFamilyMode{tproxy.DualStack, tproxy.IPv4Only}
	return modes[p.oneOf(name, modes[0].String(), modes[1].String())]
}

func (p *parser) backend(to *tproxy.Backend) {
	b, err := tproxy.ParseBackend(p.text("backend"))
	if err != nil {
		p.refuseAll("backend", err)
	}
	if p.given("backend") {
		*to = b
	}
	if !p.given("iptables-mode") {
		return
	}
	modes := []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy}
	*to = modes[p.oneOf("iptables-mode", "nft", "legacy")]
	if p.given("backend") && err == nil && b != *to {
		p.refuse("iptables-mode", p.text("iptables-mode"), "the same as --backend "+b.String()+", or only one of the two")
	}
}

// persist reads by what the install comes back.
func (p *parser) persist(to *tproxy.Persist) {
	const short = "store-firewalld"
	how, err := tproxy.ParsePersist(p.text("persist"))
	if err != nil || p.text("persist") == "" {
		p.refuse("persist", p.text("persist"), "auto, systemd, firewalld or none")
	}
	if p.given("persist") {
		*to = how
	}
	if !p.given(short) {
		return
	}
	switch store := p.bool(short); {
	case store && p.given("persist") && how != tproxy.PersistFirewalld && err == nil:
		p.refuse(short, "true", "--persist firewalld, or only one of the two")
	case store:
		*to = tproxy.PersistFirewalld
	case *to == tproxy.PersistFirewalld && p.given("persist"):
		p.refuse(short, "false", "--persist other than firewalld, or only one of the two")
	case *to == tproxy.PersistFirewalld:
		*to = tproxy.PersistAuto
	}
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
	for _, list := range p.each(name) {
		for s := range strings.SplitSeq(list, ";") {
			e, err := tproxy.ParseUIDExclusion(strings.TrimSpace(s))
			if err != nil {
				p.refuseAll(name, err)
				continue
			}
			all = append(all, e)
		}
	}
	return all
}

// validate adds what is wrong with values that are well formed each for itself.
func (p *parser) validate(c tproxy.Config) {
	// A port that was refused is 0, which would stand for the default: let it
	// stand for one that no other port is equal to.
	ports := map[string]*uint16{"redirect-inbound-port": &c.Inbound.Port, "redirect-outbound-port": &c.Outbound.Port, "redirect-dns-port": &c.DNS.Port}
	for name, port := range ports {
		for free := uint16(1); p.refused[name] && *port == 0; free++ {
			if free != c.InboundPort() && free != c.OutboundPort() && free != c.DNSPort() {
				*port = free
			}
		}
	}
	p.configError(c.Validate())
}

// configError notes the faults of a *tproxy.ConfigError by the sources of the
// values, and reports whether err is one.
func (p *parser) configError(err error) bool {
	ce, ok := errors.AsType[*tproxy.ConfigError](err)
	if !ok {
		return false
	}
	for _, f := range ce.Faults {
		f.Source, f.Path = p.place(strings.TrimSpace(f.Path))
		words := strings.Split(f.What, " ")
		for i, w := range words {
			if _, known := keyKinds[w]; known && strings.Contains(w, ".") {
				if source, path := p.place(w); path == "" {
					words[i] = source
				} else if words[i] = path; source != "" {
					words[i] = path + " (" + source + ")"
				}
			}
		}
		f.What = strings.Join(words, " ")
		p.fault(f.String())
	}
	return true
}

// place says where the value of a key comes from: the path is empty where the
// source says it all, and the source where nobody gave a value and no flag could.
func (p *parser) place(path string) (source, _ string) {
	name, hasFlag := flagNames()[path]
	from, loaded := p.from[path]
	switch {
	case path == "kumaDPUser" && p.given("kuma-dp-uid"):
		return "--kuma-dp-uid", ""
	case hasFlag && p.given(name):
		return "--" + name, ""
	case loaded && strings.HasPrefix(from, envPrefix):
		return from, ""
	case loaded:
		return from, path
	case hasFlag:
		return "--" + name, ""
	}
	return "", path
}

// flagNames maps Kuma's keys to the names of the flags.
func flagNames() map[string]string {
	return map[string]string{
		"kumaDPUser":                            "kuma-dp-user",
		"ipFamilyMode":                          "ip-family-mode",
		"backend":                               "backend",
		"persist":                               "persist",
		"storeFirewalld":                        "store-firewalld",
		"wait":                                  "wait",
		"waitInterval":                          "wait-interval",
		"comments.disabled":                     "disable-comments",
		"redirect.inbound.enabled":              "redirect-inbound",
		"redirect.inbound.port":                 "redirect-inbound-port",
		"redirect.inbound.captureSSH":           "capture-ssh",
		"redirect.inbound.excludePorts":         "exclude-inbound-ports",
		"redirect.inbound.excludePortsForIPs":   "exclude-inbound-ips",
		"redirect.outbound.enabled":             "redirect-outbound",
		"redirect.outbound.port":                "redirect-outbound-port",
		"redirect.outbound.excludePorts":        "exclude-outbound-ports",
		"redirect.outbound.excludePortsForUIDs": "exclude-outbound-ports-for-uids",
		"redirect.outbound.excludePortsForIPs":  "exclude-outbound-ips",
		"redirect.dns.enabled":                  "redirect-dns",
		"redirect.dns.captureAll":               "redirect-all-dns-traffic",
		"redirect.dns.port":                     "redirect-dns-port",
		"redirect.dns.skipConntrackZoneSplit":   "skip-dns-conntrack-zone-split",
		"redirect.dns.resolvConfigPath":         "resolv-conf",
		"redirect.dns.controlPlaneIP":           "kuma-cp-ip",
		"redirect.dns.modifySharedResolvConfig": "modify-resolv-conf",
		"redirect.dns.redirectTCP":              "redirect-dns-tcp",
		"retry.maxRetries":                      "max-retries",
		"retry.sleepBetweenRetries":             "sleep-between-retries",
		"verbose":                               "verbose",
		"dryRun":                                "dry-run",
	}
}

// logSources logs where each value came from that is not the default.
func (p *parser) logSources(log *slog.Logger, c tproxy.Config) {
	text, err := json.Marshal(c)
	if err != nil {
		return // it is said elsewhere
	}
	values := map[string]member{}
	if doc, _ := document("", text); doc != nil {
		doc.lines("", values)
	}
	for _, k := range tproxy.Keys() {
		from, given := p.from[k.Path]
		if name, hasFlag := flagNames()[k.Path]; hasFlag && p.given(name) {
			from, given = "--"+name, true
		}
		m, written := values[k.Path]
		if !given || !written {
			continue
		}
		var b bytes.Buffer
		m.value.encode(&b, k.Path, nil)
		if b.String() != k.Default {
			log.Debug("configuration", "key", k.Path, "value", b.String(), "from", from)
		}
	}
}
