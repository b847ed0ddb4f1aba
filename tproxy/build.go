package tproxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// PassthroughAddresses are the addresses from which the proxy hands an inbound
// connection on to the application, as Envoy's bootstrap in Kuma has them.
func PassthroughAddresses() (v4, v6 netip.Addr) {
	return passthrough4.Addr(), passthrough6.Addr()
}

// The addresses that rules name. They are fixed: no Config changes them.
var (
	passthrough4 = netip.MustParsePrefix("127.0.0.6/32")
	passthrough6 = netip.MustParsePrefix("::6/128")
	loopback4    = netip.MustParsePrefix("127.0.0.0/8")
	loopback6    = netip.MustParsePrefix("::1/128")

	passthrough = []netip.Prefix{passthrough4, passthrough6}
	loopback    = []netip.Prefix{loopback4, loopback6}
)

// The matches and steps that are the same for every Config.
var (
	lo              rules.Match = rules.OutInterface{Name: "lo"}
	ssh             rules.Match = rules.DestinationPorts{Ports: rules.Port(SSHPort)}
	fromPassthrough rules.Match = rules.Source{Prefixes: passthrough}
	toPassthrough   rules.Match = rules.Destination{Prefixes: passthrough[:1]}
	toOthers        rules.Match = rules.Destination{Prefixes: loopback, Not: true}

	addPassthrough Step = AddAddress{passthrough6}
)

// routeAnew has a packet routed as if it had not been bound to the interface of ours,
// which leads nowhere: a packet whose mark changes in OUTPUT of mangle is
// (ipt_mangle_out, net/ipv4/netfilter/iptable_mangle.c; nf_route_table_hook4,
// net/netfilter/nft_chain_route.c), by the socket's own binding, which
// systemd-resolved has taken back by then. One bit, because any change does.
var routeAnew = rule("to the control plane by the way that others go", rules.SetMark{Value: meshMark, Mask: meshMark})

const meshMark = 0x10

// dnsZone is the conntrack zone of redirected queries and of the answers to
// them. Everything else stays in the default zone, 0.
const dnsZone = 2

// Validate returns a *ConfigError with every fault of the Config, or nil.
func (c Config) Validate() error {
	if f := c.faults(); f != nil {
		return &ConfigError{f}
	}
	return nil
}

func (c Config) faults() (out []ConfigFault) {
	fault := func(path string, value any, what, accepted string) {
		out = append(out, ConfigFault{Path: path, Value: fmt.Sprint(value), What: what, Accepted: accepted})
	}
	for _, u := range c.ProxyUIDs {
		if u > rules.MaxUID {
			fault("kumaDPUser", u, "is no user", "a UID from 0 to 4294967294")
		}
	}
	if len(c.ProxyUIDs) == 0 && c.ProxyUser != "" {
		if uid, err := strconv.ParseUint(c.ProxyUser, 10, 64); err == nil && uid > rules.MaxUID {
			fault("kumaDPUser", c.ProxyUser, "is no user", "a user's name or a UID from 0 to 4294967294")
		} else if err != nil && !validUserName(c.ProxyUser) {
			fault("kumaDPUser", c.ProxyUser, "is no user name", "a user's name or a UID from 0 to 4294967294")
		}
	}
	if c.IPFamilyMode > IPv4Only {
		fault("ipFamilyMode", c.IPFamilyMode, "is no mode", "dualstack or ipv4")
	}
	if c.Backend > NFTables {
		fault("backend", c.Backend, "is no backend", acceptedBackend)
	}
	if c.Persist > PersistNone {
		fault("persist", c.Persist, "is no way to come back", acceptedPersist)
	}
	ports := []struct {
		path string
		port uint16
	}{
		{"redirect.inbound.port", c.InboundPort()},
		{"redirect.outbound.port", c.OutboundPort()},
		{"redirect.dns.port", c.DNSPort()},
	}
	for i, p := range ports {
		for _, q := range ports[:i] {
			if p.port == q.port {
				fault(p.path, p.port, "is "+q.path+" too", "a port of the proxy for each of inbound, outbound and DNS")
			}
		}
	}
	for _, l := range []struct {
		path string
		ips  []netip.Prefix
	}{
		{"redirect.inbound.excludePortsForIPs", c.Inbound.ExcludeIPs},
		{"redirect.outbound.excludePortsForIPs", c.Outbound.ExcludeIPs},
	} {
		for _, p := range l.ips {
			switch {
			case !p.IsValid() || p.Addr().Zone() != "" || p.Addr().Is4In6():
				fault(l.path, p, "is no address", acceptedPrefix)
			case p != p.Masked():
				fault(l.path, p, "has host bits set", fmt.Sprintf("%s for the network or %s for the one address", p.Masked(), p.Addr()))
			}
		}
	}
	for _, e := range c.Outbound.ExcludePortsForUIDs {
		if e.Protocol != 0 && e.Protocol != rules.TCP && e.Protocol != rules.UDP {
			fault("redirect.outbound.excludePortsForUIDs", e, "names another protocol", "tcp, udp or *")
		}
		if r := e.UIDs.Ranges(); len(r) == 0 || r[len(r)-1].Last > rules.MaxUID {
			fault("redirect.outbound.excludePortsForUIDs", e, "names no user", "UIDs from 0 to 4294967294")
		}
	}
	if a := c.DNS.ControlPlane; a.IsValid() && (a.IsUnspecified() || a.IsMulticast() || a.Is4In6()) {
		fault("redirect.dns.controlPlaneIP", a, "is no address of a server", acceptedServer)
	}
	return append(out, c.patienceFaults()...)
}

const acceptedServer = "an IPv4 or IPv6 address of one machine, such as 10.0.0.53 or fd00::53"

// patienceFaults are those of the waits and the retries.
func (c Config) patienceFaults() (out []ConfigFault) {
	fault := func(path string, value any, what, accepted string) {
		out = append(out, ConfigFault{Path: path, Value: fmt.Sprint(value), What: what, Accepted: accepted})
	}
	if c.Wait > 0 && c.Wait%time.Second != 0 || c.Wait >= 1<<31*time.Second {
		fault("wait", c.Wait, "is not whole seconds", "0 s to 2^31-1 s in whole seconds")
	}
	if c.WaitInterval < 0 || c.WaitInterval%time.Microsecond != 0 || c.WaitInterval >= time.Second {
		fault("waitInterval", c.WaitInterval, "is out of range", "0 µs to 999999 µs")
	}
	if c.MaxRetries > maxRetries {
		fault("retry.maxRetries", c.MaxRetries, "is out of range", acceptedRetries)
	}
	if c.SleepBetweenRetries > maxSleep {
		fault("retry.sleepBetweenRetries", c.SleepBetweenRetries, "is out of range", acceptedSleep)
	}
	return out
}

// The bounds of trying again: more would be to hang.
const (
	maxRetries      = 1000
	maxSleep        = time.Hour
	acceptedRetries = "a number from 0 to 1000"
	acceptedSleep   = "a duration from 0s to 1h with its unit, such as 2s or 500ms"
)

// validUserName refuses what no name service takes, so that the name can stand
// in messages: useradd(8), NOTES, less its rule on the case.
func validUserName(s string) bool {
	if len(s) == 0 || len(s) > 256 || s[0] == '-' {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == ':' || r == '/' || r == ',' || r == 0x7f })
}

// Build turns a Config into a Plan for a host. It is pure: the same Config and
// Host give the same Plan, and the order of a list never matters.
//
// The error is a *ConfigError with all faults of the Config, or a *RefusedError
// with all reasons for which a valid Config must not be installed on this host:
// a port by which it is operated would be captured, or DNS would loop.
func Build(c Config, h Host) (*Plan, error) {
	faults := c.faults()
	proxy, err := c.proxy(h)
	if err != nil && len(faults) == 0 {
		faults = append(faults, *err)
	}
	if faults != nil {
		return nil, &ConfigError{faults}
	}
	p := &Plan{Config: c.canonical(h, proxy), ProxyUIDs: proxy, Host: h}
	p.Notes = append(p.Notes, h.Notes...)
	p.families()
	p.nameservers()
	if c.DNS.RedirectTCP && !p.DNSOverTCP() {
		p.note("--redirect-dns-tcp has no effect: %s", p.noDNSOverTCP())
	}
	var refused []Refusal
	if why := p.Host.IPv6Uncaptured; why != "" && p.Config.IPFamilyMode != IPv4Only {
		refused = append(refused, Refusal{"IPv6 is up and cannot be redirected: " + why,
			"switch it on there with sysctl net.ipv6.conf.lo.disable_ipv6=0, or leave IPv6 untouched with --ip-family-mode=ipv4"})
	}
	if why := p.Host.Nameserver.Refused; why != "" && p.Config.DNS.ControlPlane.IsValid() {
		refused = append(refused, Refusal{why, "leave names as they are resolved now with --modify-resolv-conf=false"})
	}
	refused = append(refused, p.lockout()...)
	refused = append(refused, p.loops()...)
	if r := p.choosePersist(); r != nil {
		refused = append(refused, *r)
	}
	if r := p.chooseBackend(); r != nil {
		refused = append(refused, *r)
	}
	if refused != nil {
		return nil, &RefusedError{refused}
	}
	p.Rules = p.set()
	p.Rules = p.WithRecord(Record{PassthroughAddressOurs: slices.Contains(p.Families, rules.IPv6) && !p.Host.PassthroughAddress})
	p.steps()
	return p, nil
}

// proxy returns the proxy's users as numbers.
func (c Config) proxy(h Host) (rules.UIDs, *ConfigFault) {
	if len(c.ProxyUIDs) > 0 {
		return rules.UIDsOf(c.ProxyUIDs...), nil
	}
	if c.ProxyUser == "" {
		for _, u := range h.Users {
			if u.UID == DefaultProxyUID {
				return rules.UIDsOf(DefaultProxyUID), nil
			}
		}
		for _, u := range h.Users {
			if u.Name == DefaultProxyUser {
				return rules.UIDsOf(u.UID), nil
			}
		}
		return rules.UIDsOf(DefaultProxyUID), nil
	}
	if uid, err := strconv.ParseUint(c.ProxyUser, 10, 32); err == nil {
		return rules.UIDsOf(uint32(uid)), nil
	}
	for _, u := range h.Users {
		if u.Name == c.ProxyUser {
			return rules.UIDsOf(u.UID), nil
		}
	}
	return rules.UIDs{}, &ConfigFault{Path: "kumaDPUser", Value: c.ProxyUser, What: "is no user of this host",
		Accepted: fmt.Sprintf("a user that exists or a UID; to create it: useradd -u %d -U %s", DefaultProxyUID, c.ProxyUser)}
}

// canonical returns the Config with its defaults filled in and its lists in
// order.
func (c Config) canonical(h Host, proxy rules.UIDs) Config {
	c.ProxyUIDs = nil
	for _, r := range proxy.Ranges() {
		for u := uint64(r.First); u <= uint64(r.Last); u++ {
			c.ProxyUIDs = append(c.ProxyUIDs, UID(u))
		}
	}
	c.Inbound.Port, c.Outbound.Port, c.DNS.Port = c.InboundPort(), c.OutboundPort(), c.DNSPort()
	c.Inbound.ExcludeIPs = canonicalPrefixes(c.Inbound.ExcludeIPs)
	c.Outbound.ExcludeIPs = canonicalPrefixes(c.Outbound.ExcludeIPs)
	c.Outbound.ExcludePortsForUIDs = canonicalExclusions(c.Outbound.ExcludePortsForUIDs)
	c.DNS.ResolvConf = or(c.DNS.ResolvConf, DefaultResolvConf)
	c.Wait = or(c.Wait, DefaultWait)
	if c.MaxRetries, c.SleepBetweenRetries = c.Retries(); c.MaxRetries == 0 {
		c.MaxRetries = -1 // zero would be the default
	}
	if c.SleepBetweenRetries == 0 {
		c.SleepBetweenRetries = -1
	}
	c.Pod = c.Pod || h.Pod != ""
	return c
}

func (p *Plan) note(format string, args ...any) {
	p.Notes = append(p.Notes, fmt.Sprintf(format, args...))
}

func (p *Plan) families() {
	p.Families = []rules.Family{rules.IPv4}
	switch {
	case p.Config.IPFamilyMode == IPv4Only:
		p.note("IPv6 is left untouched, as the IP family mode ipv4 says")
	case p.Host.IPv6Off != "":
		p.note("IPv6 is off here (%s) and left out", p.Host.IPv6Off)
	default:
		p.Families = append(p.Families, rules.IPv6)
	}
}

// nameservers picks those of resolv.conf whose queries are redirected.
func (p *Plan) nameservers() {
	if !p.Config.DNS.On() || p.Config.DNS.CaptureAll {
		return
	}
	for _, f := range p.Families {
		found := false
		for _, a := range p.Host.Nameservers {
			if a = a.Unmap().WithZone(""); a.Is4() == (f == rules.IPv4) {
				found = true
				p.Nameservers = append(p.Nameservers, a)
			}
		}
		if !found {
			p.note("no %s nameserver in %s: %s DNS is not captured", f, p.Config.DNS.ResolvConf, f)
		}
	}
	slices.SortFunc(p.Nameservers, netip.Addr.Compare)
	p.Nameservers = slices.Compact(p.Nameservers)
}

// lockout refuses to capture a port by which the machine is operated.
func (p *Plan) lockout() (out []Refusal) {
	if p.Config.Inbound.Off || p.Config.Pod {
		return nil
	}
	for _, s := range p.Host.RemoteShells {
		if p.protectsSSH() && s.Port == SSHPort || p.Config.Inbound.ExcludePorts.Contains(s.Port) {
			continue
		}
		remedy := fmt.Sprintf("add --exclude-inbound-ports %d", s.Port)
		if s.Port == SSHPort {
			remedy = "leave out --capture-ssh, or " + remedy
		}
		out = append(out, Refusal{fmt.Sprintf("port %d is a way into this host (%s) and would be captured", s.Port, s.Why), remedy})
	}
	return out
}

func (p *Plan) protectsSSH() bool { return !p.Config.Pod && !p.Config.Inbound.CaptureSSH }

// loops refuses DNS redirection that would come back to itself: the proxy asks
// a local resolver, whose own query upstream would be redirected to the proxy.
// A resolver with a user of its own is left alone by that user. One that no user
// tells, as Docker's in a container, whose daemon is root as the container's programs
// are, is not left alone: while it is the only nameserver that is captured, nothing
// that it asks itself is.
func (p *Plan) loops() (out []Refusal) {
	d := p.Config.DNS
	if !d.On() {
		return nil
	}
	for _, r := range p.Host.LocalResolvers {
		var who string
		switch {
		case r.Untold != "":
			who = r.Untold
		case r.UID == 0:
			who = "runs as root"
		case p.ProxyUIDs.Contains(r.UID):
			who = "runs as the proxy's user"
		default:
			continue
		}
		others := slices.ContainsFunc(p.Nameservers, func(a netip.Addr) bool { return a != r.Address.Unmap().WithZone("") })
		if !d.CaptureAll && !others {
			if r.Untold == "" && r.UID == 0 {
				p.note("the local resolver %s runs as root, so no DNS query of root's processes is captured", r)
			}
			continue
		}
		remedy := fmt.Sprintf("leave %s the only nameserver in %s", r.Address, d.ResolvConf)
		if d.CaptureAll {
			remedy = fmt.Sprintf("redirect only what goes to %s (--redirect-dns, with no other nameserver in %s)", r.Address, d.ResolvConf)
		}
		if r.Untold == "" {
			remedy = fmt.Sprintf("run %s as a user of its own, or %s", r.Program, remedy)
		}
		out = append(out, Refusal{
			fmt.Sprintf("%s answers DNS on this host and %s: its own queries upstream cannot be told from those of others, and would come back to it", r, who),
			remedy,
		})
	}
	return out
}

func (p *Plan) steps() {
	p.Steps = make([]Step, 0, 3)
	for _, f := range p.Commits() {
		p.Steps = append(p.Steps, ReplaceRules{f, p.Backend})
	}
	for _, v := range p.Host.Variants {
		for _, f := range v.Ours {
			if p.Goes(v.Backend, f) {
				p.Steps = append(p.Steps, RemoveRules{f, v.Backend})
			}
		}
	}
	// Behind the rules, whose record says that the address is ours: a kill in
	// between leaves nothing that nobody owns.
	if slices.Contains(p.Families, rules.IPv6) && !p.Host.PassthroughAddress {
		p.Steps = append(p.Steps, addPassthrough)
	}
	n, f := p.Config.Needs().Nameserver, p.Host.Nameserver
	switch {
	case n == nil:
	case f.Split == NoSplit:
		n.do, n.undo = f.Do, f.Undo
		p.Steps = append(p.Steps, *n)
	default:
		p.Steps = append(p.Steps, SplitNames{n.Address, f.Split, f.Do, f.Undo})
	}
	p.Steps = append(p.Steps, p.storage()...)
}

// set makes the rules. Their order is that of the rows of section 2 of the
// contract, and each bears the row's reason.
func (p *Plan) set() rules.Set {
	c := p.Config
	s := rules.Set{
		NoComments: c.DisableComments,
		Bases:      make([]rules.BaseChain, 0, 3),
		Chains:     make([]rules.Chain, 0, 8),
	}
	if len(p.Families) == 1 {
		s.Only = p.Families[0]
	}
	nat := func(name string, r []rules.Rule) {
		s.Chains = append(s.Chains, rules.Chain{Table: rules.NAT, Name: name, Rules: r})
	}
	output := rules.BaseChain{Table: rules.NAT, Hook: rules.Output, Place: rules.First}
	if !c.Inbound.Off {
		// Behind what is there: a port that Docker published answers as before.
		s.Bases = append(s.Bases, rules.BaseChain{Table: rules.NAT, Hook: rules.Prerouting, Rules: []rules.Rule{jumpInbound}})
		nat(chainInbound, p.inbound())
	}
	if c.DNS.On() {
		output.Rules = append(output.Rules, jumpDNS)
	}
	output.Rules = append(output.Rules, jumpOutbound)
	s.Bases = append(s.Bases, output)
	nat(chainOutbound, p.outbound())
	nat(chainLoopback, p.loopback())
	if p.DNSOverTCP() {
		nat(chainDNSTCP, p.dnsOverTCP())
	}
	if c.DNS.On() {
		redirect := p.captured(rules.UDP, p.Nameservers, rules.Redirect{Port: c.DNS.Port}, "goes to the proxy's DNS port "+decimal(c.DNS.Port))
		nat(chainDNS, append(p.dnsExclusions(), redirect...))
		if !c.DNS.SkipConntrackZoneSplit {
			s.Bases = append(s.Bases, rules.BaseChain{Table: rules.Raw, Hook: rules.Output, Place: rules.First, Rules: []rules.Rule{jumpZone}})
			s.Chains = append(s.Chains,
				rules.Chain{Table: rules.Raw, Name: chainZone, Rules: p.zone()},
				rules.Chain{Table: rules.Raw, Name: chainZoneQuery, Rules: p.zoneQueries()})
		}
	}
	if c.DNS.ControlPlane.IsValid() && p.Host.Nameserver.Split == SplitLink {
		s.Bases = append(s.Bases, rules.BaseChain{Table: rules.Mangle, Hook: rules.Output, Place: rules.First, Rules: []rules.Rule{jumpNames}})
		s.Chains = append(s.Chains, rules.Chain{Table: rules.Mangle, Name: chainNames, Rules: []rules.Rule{routeAnew}})
	}
	nat(chainRecord, nil) // filled once the rules are there: it says what they do not
	return s
}

// rule makes a rule; the matches must stand in canonical order.
func rule(why string, action rules.Action, matches ...rules.Match) rules.Rule {
	return rules.Rule{Matches: matches, Action: action, Why: why}
}

func decimal(port uint16) string { return strconv.Itoa(int(port)) }

// inbound is rows A2 to A5; row A0 and A1 are the jump.
func (p *Plan) inbound() (out []rules.Rule) {
	in := p.Config.Inbound
	out = make([]rules.Rule, 0, 4)
	if p.protectsSSH() {
		out = append(out, rule("SSH is protected unless --capture-ssh is given", rules.Return{},
			rules.TCP, ssh))
	}
	if len(in.ExcludeIPs) > 0 {
		out = append(out, rule("source excluded by --exclude-inbound-ips", rules.Return{},
			rules.Source{Prefixes: in.ExcludeIPs}))
	}
	if !in.ExcludePorts.IsEmpty() {
		out = append(out, rule("port excluded by --exclude-inbound-ports", rules.Return{},
			rules.TCP, rules.DestinationPorts{Ports: in.ExcludePorts}))
	}
	return append(out, rule("inbound goes to the proxy's port "+decimal(in.Port), rules.Redirect{Port: in.Port}, rules.TCP))
}

// outbound is rows B3 and B5 to B11; what leaves through lo goes to loopback
// first, and what goes to port 53 to dnsOverTCP, so that no other connection pays for
// their rules.
func (p *Plan) outbound() (out []rules.Rule) {
	o := p.Config.Outbound
	out = make([]rules.Rule, 0, 6+len(o.ExcludePortsForUIDs))
	out = append(out, rule("to this host itself", rules.Goto{Chain: chainLoopback}, lo))
	if o.Off {
		return out
	}
	out = append(out, rule("the proxy's own connections", rules.Return{}, p.owner()))
	if len(o.ExcludeIPs) > 0 {
		out = append(out, rule("destination excluded by --exclude-outbound-ips", rules.Return{},
			rules.Destination{Prefixes: o.ExcludeIPs}))
	}
	for _, e := range o.ExcludePortsForUIDs {
		if e.Protocol == rules.UDP {
			continue
		}
		m := []rules.Match{rules.TCP}
		if !e.Ports.IsEmpty() {
			m = append(m, rules.DestinationPorts{Ports: e.Ports})
		}
		out = append(out, rule(excludedForUIDs, rules.Return{}, append(m, rules.OwnerUID{UIDs: e.UIDs})...))
	}
	if !o.ExcludePorts.IsEmpty() {
		out = append(out, rule("port excluded by --exclude-outbound-ports", rules.Return{},
			rules.TCP, rules.DestinationPorts{Ports: o.ExcludePorts}))
	}
	queries := rules.DestinationPorts{Ports: rules.Port(53)}
	switch {
	case p.DNSOverTCP():
		out = append(out, rule("DNS over TCP", rules.Goto{Chain: chainDNSTCP}, rules.TCP, queries))
	case p.Config.DNS.On():
		out = append(out, rule("DNS over TCP is not captured", rules.Return{}, rules.TCP, queries))
	}
	return append(out, rule("outbound goes to the proxy's port "+decimal(o.Port), rules.Redirect{Port: o.Port}, rules.TCP))
}

const excludedForUIDs = "user excluded by --exclude-outbound-ports-for-uids"

// loopback is rows B0, B1, B2 and B4: what leaves through lo.
func (p *Plan) loopback() []rules.Rule {
	in, out := p.Config.Inbound, p.Config.Outbound
	redirects := rules.Port(in.Port).Union(rules.Port(out.Port))
	owner := p.owner()
	r := append(make([]rules.Rule, 0, 5), rule("the proxy must not connect to itself: refused", rules.Redirect{Port: 0},
		rules.TCP, rules.DestinationPorts{Ports: redirects}, owner))
	if !in.Off {
		r = append(r,
			rule("the proxy hands an inbound connection on", rules.Return{},
				fromPassthrough),
			rule("the proxy calls its own host", rules.Jump{Chain: chainInbound},
				toPassthrough, owner),
			rule("the proxy calls its own host", rules.Jump{Chain: chainInbound},
				toOthers, owner))
	}
	return append(r, rule("to this host itself: untouched", rules.Return{}))
}

func (p *Plan) owner() rules.Match { return rules.OwnerUID{UIDs: p.ProxyUIDs} }

// dnsExclusions is rows C1, C2 and C2a, the same in nat and in raw.
func (p *Plan) dnsExclusions() (out []rules.Rule) {
	out = append(out, rule("the proxy's own queries", rules.Return{}, p.owner()))
	for _, e := range p.Config.Outbound.ExcludePortsForUIDs {
		if e.Protocol != rules.TCP && (e.Ports.IsEmpty() || e.Ports.Contains(53)) {
			out = append(out, rule(excludedForUIDs, rules.Return{}, rules.OwnerUID{UIDs: e.UIDs}))
		}
	}
	out = append(out, p.resolvers("a local resolver asks upstream")...)
	if ips := p.Config.Outbound.ExcludeIPs; len(ips) > 0 {
		out = append(out, rule("destination excluded by --exclude-outbound-ips", rules.Return{}, rules.Destination{Prefixes: ips}))
	}
	return out
}

// resolvers is row C2a.
func (p *Plan) resolvers(why string) []rules.Rule {
	var uids []UID
	for _, r := range p.Host.LocalResolvers {
		if r.Untold == "" {
			uids = append(uids, r.UID)
		}
	}
	if uids == nil {
		return nil
	}
	return []rules.Rule{rule(why, rules.Return{}, rules.OwnerUID{UIDs: rules.UIDsOf(uids...)})}
}

// dnsOverTCP is row B9 where DNSOverTCP says so. The rows before it are outbound's, which
// goes here: what is let go here is untouched.
//
// There is no conntrack zone for TCP. The zones are for UDP, where an entry outlives its
// socket: the proxy's own query from the same source port to the same server would be
// taken for more of the application's, and come back to the proxy. Over TCP the port is
// not free while the connection is open, and afterwards a SYN makes conntrack forget it
// and begin a new one, which meets the rules (nf_conntrack_tcp_packet in
// net/netfilter/nf_conntrack_proto_tcp.c).
func (p *Plan) dnsOverTCP() []rules.Rule {
	port := p.Config.DNS.Port
	out := p.resolvers("a local resolver asks upstream over TCP")
	out = append(out, p.captured(rules.TCP, p.serversOverTCP(), rules.Redirect{Port: port}, "over TCP goes to the proxy's DNS port "+decimal(port))...)
	if p.Config.DNS.CaptureAll {
		return out
	}
	return append(out, rule("DNS over TCP to another server: untouched", rules.Return{}))
}

// DNSOverTCP reports whether any query over TCP is redirected.
func (p *Plan) DNSOverTCP() bool { return p.Config.DNS.RedirectTCP && p.noDNSOverTCP() == "" }

// noDNSOverTCP is the reason for which RedirectTCP has no effect, or would have none;
// empty where it has one.
func (p *Plan) noDNSOverTCP() string {
	c := p.Config
	switch {
	case !c.DNS.On():
		return "DNS is not redirected without --redirect-dns or --redirect-all-dns-traffic"
	case c.Outbound.Off:
		return "outbound connections are not redirected"
	case c.Outbound.ExcludePorts.Contains(53):
		return "--exclude-outbound-ports names port 53"
	case !c.DNS.CaptureAll && len(p.serversOverTCP()) == 0:
		return "no nameserver in " + c.DNS.ResolvConf + " is another host, and connections of this host to itself are left alone"
	}
	return ""
}

// serversOverTCP are the Nameservers but for loopback, to which row B4 comes first.
func (p *Plan) serversOverTCP() []netip.Addr {
	return slices.DeleteFunc(slices.Clone(p.Nameservers), netip.Addr.IsLoopback)
}

// captured is row C3 over a protocol, with the given action.
func (p *Plan) captured(over rules.Protocol, nameservers []netip.Addr, action rules.Action, why string) []rules.Rule {
	if p.Config.DNS.CaptureAll {
		return []rules.Rule{rule("every DNS query "+why, action, over, rules.DestinationPorts{Ports: rules.Port(53)})}
	}
	if len(nameservers) == 0 {
		return nil
	}
	servers := make([]netip.Prefix, len(nameservers))
	for i, a := range nameservers {
		servers[i] = netip.PrefixFrom(a, a.BitLen())
	}
	return []rules.Rule{rule("a query to a nameserver of resolv.conf "+why, action,
		rules.Destination{Prefixes: servers}, over, rules.DestinationPorts{Ports: rules.Port(53)})}
}

// zone sends queries on, and puts the proxy's answers in the zone of the queries
// that were redirected to it; not those to port 53, whose queries are in none.
func (p *Plan) zone() []rules.Rule {
	return []rules.Rule{
		rule("queries", rules.Goto{Chain: chainZoneQuery},
			rules.UDP, rules.DestinationPorts{Ports: rules.Port(53)}),
		rule("the proxy's answers to redirected queries", rules.CTZone{Zone: dnsZone},
			rules.UDP, rules.SourcePorts{Ports: rules.Port(p.Config.DNS.Port)}, p.owner()),
	}
}

// zoneQueries puts what is redirected in its zone. The answer of a DNS server on
// this host to one who asked from port 53 is UDP to port 53 as well, and raw has
// no state to tell it from a query: in the zone it would be new, and nat would
// redirect it. So what comes from port 53 stays in the default zone, where it is
// what it is; a query from there is redirected all the same.
func (p *Plan) zoneQueries() []rules.Rule {
	out := []rules.Rule{rule("from port 53: perhaps the answer of a server here", rules.Return{},
		rules.UDP, rules.SourcePorts{Ports: rules.Port(53)})}
	out = append(out, p.dnsExclusions()...)
	return append(out, p.captured(rules.UDP, p.Nameservers, rules.CTZone{Zone: dnsZone}, "is redirected")...)
}
