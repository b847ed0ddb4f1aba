package tproxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// UID is a user ID, 0 to 2^32-2.
type UID = uint32

// The values that stand for an unset field, as in Kuma.
const (
	DefaultProxyUID            UID    = 5678
	DefaultProxyUser                  = "kuma-dp" // when no user has the UID 5678
	DefaultInboundPort         uint16 = 15006
	DefaultOutboundPort        uint16 = 15001
	DefaultDNSPort             uint16 = 15053
	DefaultWait                       = 5 * time.Second
	DefaultMaxRetries                 = 4
	DefaultSleepBetweenRetries        = 2 * time.Second
	DefaultResolvConf                 = "/etc/resolv.conf"
)

// SSHPort is the port that is protected unless Inbound.CaptureSSH says
// otherwise.
const SSHPort uint16 = 22

// Config says what to redirect. Its zero value is Kuma's default: both
// directions on, no DNS, both families, proxy UID 5678, SSH protected.
//
// JSON has Kuma's keys, those of `kumactl install transparent-proxy --config`.
type Config struct {
	// ProxyUIDs are the users that the proxy runs as, whose connections are not
	// redirected. Empty means ProxyUser, or 5678.
	ProxyUIDs []UID
	// ProxyUser is the proxy's user by name, or a number as text. A name becomes
	// a number when the machine is probed (Host.Users); it is an error for Build
	// where it did not. Ignored where ProxyUIDs is set.
	ProxyUser string

	IPFamilyMode IPFamilyMode
	Inbound      Inbound
	Outbound     Outbound
	DNS          DNS

	// Pod says that the rules are for a pod's network namespace (cniMode in
	// Kuma's file): SSH is captured like the rest.
	Pod bool
	// DisableComments leaves the reasons out of the kernel's rules.
	DisableComments bool
	// Backend is the variant of iptables to use; the zero value lets Build choose
	// from what the host has.
	Backend Backend
	// Persist is what brings the install back after a restart; the zero value lets Build
	// choose from what the host has. Nothing of a host that was not observed is chosen.
	Persist Persist
	// Wait is how long to wait for the xtables lock, in whole seconds; the zero
	// value means 5 s and a negative one not at all.
	Wait time.Duration
	// WaitInterval is how long iptables sleeps between two tries for the lock,
	// in whole microseconds; zero leaves it to iptables (1 s).
	WaitInterval time.Duration
	// MaxRetries is how often a step that failed is tried again where that can
	// help: somebody held the xtables lock for all of Wait, or the kernel was
	// busy. At most 1000; the zero value means 4, or none where Wait is negative,
	// and a negative one means none. That others changed their rules meanwhile is
	// not counted here.
	MaxRetries int
	// SleepBetweenRetries is how long to sleep before each of them, at most an
	// hour; the zero value means 2 s and a negative one not at all.
	SleepBetweenRetries time.Duration
}

// Retries returns how often to try again and how long to sleep before each time,
// neither of them negative.
func (c Config) Retries() (most int, sleep time.Duration) {
	most = c.MaxRetries
	if most == 0 && c.Wait >= 0 {
		most = DefaultMaxRetries
	}
	return max(most, 0), max(or(c.SleepBetweenRetries, DefaultSleepBetweenRetries), 0)
}

// IPFamilyMode says for which families there are rules.
type IPFamilyMode uint8

const (
	// DualStack redirects IPv4 and, unless it is off on the host, IPv6.
	DualStack IPFamilyMode = iota
	// IPv4Only leaves IPv6 untouched.
	IPv4Only
)

// String writes the mode as Kuma's configuration has it.
func (m IPFamilyMode) String() string {
	switch m {
	case DualStack:
		return "dualstack"
	case IPv4Only:
		return "ipv4"
	}
	return fmt.Sprintf("IPFamilyMode(%d)", uint8(m))
}

// ParseIPFamilyMode reads "dualstack" or "ipv4".
func ParseIPFamilyMode(s string) (IPFamilyMode, error) {
	switch s {
	case "", "dualstack":
		return DualStack, nil
	case "ipv4":
		return IPv4Only, nil
	}
	return 0, fmt.Errorf("%q: accepted is dualstack or ipv4", s)
}

// Inbound says what happens to TCP connections from other hosts.
type Inbound struct {
	Off  bool
	Port uint16 // of the proxy; 0 means 15006
	// ExcludePorts are destination ports that are not redirected.
	ExcludePorts rules.Ports
	// ExcludeIPs are source addresses whose connections are not redirected.
	ExcludeIPs []netip.Prefix
	// CaptureSSH redirects port 22 like any other.
	CaptureSSH bool
}

// Outbound says what happens to TCP connections of this host's processes.
type Outbound struct {
	Off  bool
	Port uint16 // of the proxy; 0 means 15001
	// ExcludePorts are TCP destination ports that are not redirected.
	ExcludePorts rules.Ports
	// ExcludePortsForUIDs are not redirected for some users.
	ExcludePortsForUIDs []UIDExclusion
	// ExcludeIPs are destination addresses that are not redirected, TCP and DNS.
	ExcludeIPs []netip.Prefix
}

// UIDExclusion excludes destination ports for the processes of some users. As
// text it is proto:ports:uids, as Kuma writes it.
type UIDExclusion struct {
	// Protocol is rules.TCP or rules.UDP; 0 means both.
	Protocol rules.Protocol
	// Ports are the destination ports; empty means all.
	Ports rules.Ports
	// UIDs are the users; empty is an error.
	UIDs rules.UIDs
}

// String writes the exclusion as ParseUIDExclusion reads it.
func (e UIDExclusion) String() string { return e.what() + e.UIDs.String() }

// what is the exclusion's text without its users.
func (e UIDExclusion) what() string {
	proto, ports := "*", "*"
	if e.Protocol != 0 {
		proto = e.Protocol.String()
	}
	if !e.Ports.IsEmpty() {
		ports = e.Ports.String()
	}
	return proto + ":" + ports + ":"
}

// Names reports whether the exclusion names the protocol, the port and the user.
func (e UIDExclusion) Names(p rules.Protocol, port uint16, uid UID) bool {
	return (e.Protocol == 0 || e.Protocol == p) && (e.Ports.IsEmpty() || e.Ports.Contains(port)) && e.UIDs.Contains(uid)
}

const acceptedExclusion = "proto:ports:uids, ports:uids or uids, such as tcp:22,80-90:1000-1005"

// ParseUIDExclusions reads several exclusions that stand in one text, as an
// environment variable or an annotation has them: with ";" between them, also
// behind the last one. Without any ";", commas can stand between exclusions, as
// Kuma's reader of the environment takes them, or within the only one, as its
// flags do; where both can be read and mean different things, that is an error.
func ParseUIDExclusions(list string) ([]UIDExclusion, error) {
	if strings.TrimSpace(list) == "" {
		return nil, nil
	}
	if strings.Contains(list, ";") {
		return parseExclusions(strings.Split(strings.TrimSuffix(strings.TrimSpace(list), ";"), ";"))
	}
	one, errOne := parseExclusions([]string{list})
	several, errSeveral := parseExclusions(strings.Split(list, ","))
	switch {
	case errSeveral != nil:
		return one, errOne
	case errOne != nil:
		return several, nil
	case !slices.EqualFunc(canonicalExclusions(one), canonicalExclusions(several), func(a, b UIDExclusion) bool { return a.String() == b.String() }):
		return nil, fmt.Errorf("%q can be read as one exclusion and as several: put ; between exclusions, and behind the only one", list)
	}
	return one, nil
}

func parseExclusions(entries []string) (out []UIDExclusion, err error) {
	var errs []string
	for _, s := range entries {
		e, err := ParseUIDExclusion(strings.TrimSpace(s))
		if err != nil {
			errs = append(errs, err.Error())
		}
		out = append(out, e)
	}
	if errs != nil {
		return nil, fmt.Errorf("%s", strings.Join(errs, "\n"))
	}
	return out, nil
}

// ParseUIDExclusion reads "proto:ports:uids", "ports:uids" or "uids", as Kuma
// writes them: proto is tcp, udp, both as a comma list, "*" or empty; ports is
// a list of ports and ranges, "*" or empty for all; uids is a list of numbers
// and ranges. Examples: "tcp:22,80-90:1000-1005", "1001".
func ParseUIDExclusion(s string) (UIDExclusion, error) {
	parts := strings.Split(s, ":")
	var proto, ports, uids string
	switch len(parts) {
	case 1:
		uids = parts[0]
	case 2:
		ports, uids = parts[0], parts[1]
	case 3:
		proto, ports, uids = parts[0], parts[1], parts[2]
	default:
		return UIDExclusion{}, fmt.Errorf("%q: accepted is %s", s, acceptedExclusion)
	}
	var e UIDExclusion
	var err error
	if e.Protocol, err = parseProtocols(proto); err != nil {
		return UIDExclusion{}, fmt.Errorf("%q: %w", s, err)
	}
	if ports = strings.TrimSpace(ports); ports != "*" {
		if e.Ports, err = rules.ParsePorts(ports); err != nil {
			return UIDExclusion{}, fmt.Errorf("%q: %w", s, err)
		}
	}
	if e.UIDs, err = rules.ParseUIDs(uids); err != nil {
		return UIDExclusion{}, fmt.Errorf("%q: %w", s, err)
	}
	if e.UIDs.IsEmpty() {
		return UIDExclusion{}, fmt.Errorf("%q: names no user: accepted is a number from 0 to 4294967294, a range such as 1000-1005, or a list of them", s)
	}
	return e, nil
}

func parseProtocols(list string) (rules.Protocol, error) {
	var tcp, udp bool
	for p := range strings.SplitSeq(list, ",") {
		switch strings.TrimSpace(p) {
		case "tcp":
			tcp = true
		case "udp":
			udp = true
		case "", "*":
			tcp, udp = true, true
		default:
			return 0, fmt.Errorf("protocol %q: accepted is tcp, udp or *", p)
		}
	}
	switch {
	case tcp && udp:
		return 0, nil
	case tcp:
		return rules.TCP, nil
	}
	return rules.UDP, nil
}

// DNS says what happens to DNS queries, which are those of this host's processes to
// port 53 over UDP and, with RedirectTCP, over TCP.
type DNS struct {
	// Redirect redirects queries to the nameservers of resolv.conf.
	Redirect bool
	// CaptureAll redirects queries to whomever they are sent.
	CaptureAll bool
	Port       uint16 // of the proxy; 0 means 15053
	// RedirectTCP redirects to Port over TCP too what is redirected over UDP, as far as
	// Outbound does not leave it alone, nor is it to this host itself. Without Redirect
	// or CaptureAll it has no effect.
	RedirectTCP bool
	// SkipConntrackZoneSplit leaves redirected queries in the default zone.
	SkipConntrackZoneSplit bool
	// ResolvConf is the path of resolv.conf; empty means /etc/resolv.conf.
	ResolvConf string
	// ControlPlane is the address of the control plane, whose DNS server on port 53
	// becomes the first nameserver of ResolvConf, so that names in .mesh resolve. The
	// zero Addr leaves the file as it is, without a nameserver that we put there.
	ControlPlane netip.Addr
	// ModifyShared writes ResolvConf also where it is the host's and this is another
	// network namespace than the host's, which is refused otherwise.
	ModifyShared bool
}

// On reports whether any query is to be redirected.
func (d DNS) On() bool { return d.Redirect || d.CaptureAll }

// InboundPort is the proxy's port for inbound connections.
func (c Config) InboundPort() uint16 { return or(c.Inbound.Port, DefaultInboundPort) }

// OutboundPort is the proxy's port for outbound connections.
func (c Config) OutboundPort() uint16 { return or(c.Outbound.Port, DefaultOutboundPort) }

// DNSPort is the proxy's port for DNS queries.
func (c Config) DNSPort() uint16 { return or(c.DNS.Port, DefaultDNSPort) }

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// Backend is what holds the rules.
type Backend uint8

const (
	// Auto chooses from what the host has; Plan.Backend never is Auto.
	Auto Backend = iota
	// IPTablesNFT is iptables over the kernel's nf_tables.
	IPTablesNFT
	// IPTablesLegacy is iptables over the kernel's ip_tables.
	IPTablesLegacy
	// NFTables is a table of our own in the kernel's nf_tables, for both families,
	// written over netlink without any program.
	NFTables
)

// String writes the backend as ParseBackend reads it.
func (b Backend) String() string {
	switch b {
	case Auto:
		return "auto"
	case IPTablesNFT:
		return "iptables-nft"
	case IPTablesLegacy:
		return "iptables-legacy"
	case NFTables:
		return "nftables"
	}
	return fmt.Sprintf("Backend(%d)", uint8(b))
}

const acceptedBackend = "auto, nftables, iptables-nft or iptables-legacy"

// Backends lists what can hold the rules, in the order in which they are looked at.
func Backends() []Backend { return []Backend{NFTables, IPTablesNFT, IPTablesLegacy} }

// ParseBackend reads "auto", "nftables", "iptables-nft" or "iptables-legacy".
func ParseBackend(s string) (Backend, error) {
	for b := Auto; b <= NFTables; b++ {
		if s == b.String() {
			return b, nil
		}
	}
	return 0, fmt.Errorf("%q: accepted is %s", s, acceptedBackend)
}

// ParsePrefixes reads a comma list of addresses and CIDRs of either family. The
// error names every entry that is not accepted.
func ParsePrefixes(list string) ([]netip.Prefix, error) {
	if strings.TrimSpace(list) == "" {
		return nil, nil
	}
	var out []netip.Prefix
	var errs []string
	for entry := range strings.SplitSeq(list, ",") {
		p, err := parsePrefix(strings.TrimSpace(entry))
		if err != nil {
			errs = append(errs, err.Error())
			continue
		}
		out = append(out, p)
	}
	if errs != nil {
		return nil, fmt.Errorf("%s", strings.Join(errs, "\n"))
	}
	return out, nil
}

const acceptedPrefix = "an IPv4 or IPv6 address, or a CIDR without host bits such as 10.0.0.0/8 or fd00::/8"

func parsePrefix(s string) (netip.Prefix, error) {
	if s == "" {
		return netip.Prefix{}, fmt.Errorf("empty entry: accepted is %s", acceptedPrefix)
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		p := netip.PrefixFrom(a, a.BitLen())
		return p, checkPrefix(p, s)
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q: accepted is %s", s, acceptedPrefix)
	}
	return p, checkPrefix(p, s)
}

func checkPrefix(p netip.Prefix, text string) error {
	switch {
	case !p.IsValid() || p.Addr().Zone() != "" || p.Addr().Is4In6():
		return fmt.Errorf("%q: accepted is %s", text, acceptedPrefix)
	case p != p.Masked():
		return fmt.Errorf("%q has host bits set: write %s for the network or %s for the one address", text, p.Masked(), p.Addr())
	}
	return nil
}

// canonicalPrefixes sorts the prefixes, IPv4 first, and leaves out those that
// another one holds.
func canonicalPrefixes(in []netip.Prefix) []netip.Prefix {
	if len(in) == 0 {
		return nil
	}
	ps := slices.Clone(in)
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits() // the wider one first
	})
	out := ps[:1]
	for _, p := range ps[1:] {
		// Sorted so, a prefix that holds p is the last one that was kept.
		if last := out[len(out)-1]; last.Overlaps(p) {
			continue
		}
		out = append(out, p)
	}
	return slices.Clip(out)
}

// canonicalExclusions sorts and merges the exclusions: those of one protocol
// and one set of ports become one.
func canonicalExclusions(in []UIDExclusion) []UIDExclusion {
	if len(in) == 0 {
		return nil
	}
	users := make(map[string][]rules.UIDs) // by protocol and ports
	for _, e := range in {
		what := e.what()
		users[what] = append(users[what], e.UIDs)
	}
	type keyed struct {
		text string
		e    UIDExclusion
	}
	merged := make([]keyed, 0, len(users))
	for _, e := range in {
		what := e.what()
		if u, ok := users[what]; ok {
			delete(users, what)
			e.UIDs = union(u)
			merged = append(merged, keyed{what + e.UIDs.String(), e})
		}
	}
	slices.SortFunc(merged, func(a, b keyed) int { return strings.Compare(a.text, b.text) })
	out := make([]UIDExclusion, len(merged))
	for i, m := range merged {
		out[i] = m.e
	}
	return out
}

// union halves the list, so that a long one is not copied for each of its sets.
func union(us []rules.UIDs) rules.UIDs {
	if len(us) == 1 {
		return us[0]
	}
	return union(us[:len(us)/2]).Union(union(us[len(us)/2:]))
}
