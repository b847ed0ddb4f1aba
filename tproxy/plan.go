package tproxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Plan is all that an install does, as data: the rules, the steps beside them
// with their undo, the backend and why it was chosen.
type Plan struct {
	// Config is the Config with every default filled in and every list in
	// canonical order.
	Config Config
	// ProxyUIDs are the users that the proxy runs as.
	ProxyUIDs rules.UIDs
	Rules     rules.Set
	// Families are those that get rules, in the order in which they do.
	Families []rules.Family
	// Backend is never Auto.
	Backend    Backend
	BackendWhy string
	// Persist is what brings the install back after a restart, for the reason PersistWhy;
	// it is never PersistAuto.
	Persist    Persist
	PersistWhy string
	// Nameservers are those whose queries are redirected; empty where all are,
	// or none.
	Nameservers []netip.Addr
	Steps       []Step
	// Host is what the plan was made for.
	Host Host
	// Notes is what the operator should know.
	Notes []string
}

// Commits are the families whose rules are put in place apart: each of Families, or, with
// NFTables, 0, which is all of them in one.
func (p *Plan) Commits() []rules.Family {
	if p.Backend == NFTables {
		return []rules.Family{0}
	}
	return p.Families
}

// Goes reports whether what is ours in a family of a backend, 0 with NFTables, is to be
// taken out once the plan's rules are in place.
func (p *Plan) Goes(b Backend, f rules.Family) bool {
	return b != p.Backend || !slices.Contains(p.Commits(), f)
}

// Step is one change that an install makes. The types of this package are the
// only ones.
type Step interface {
	// String says what the step does.
	String() string
	// Undo says how it is taken back when a later step fails, and on uninstall.
	Undo() string
	step()
}

// AddAddress adds an address to the loopback interface, unless it is there.
type AddAddress struct{ Prefix netip.Prefix }

const inTable = "rules of IPv4 and IPv6 in table inet " + NFTable

// ReplaceRules replaces what is ours in the tables of a family by the plan's
// rules, in one transaction a table. With NFTables there is one step and one
// transaction for both families, and Family is 0.
type ReplaceRules struct {
	Family  rules.Family
	Backend Backend
}

// RemoveRules takes out what is ours in the tables of another backend, once the
// new rules are in place. Of NFTables it is the table, and Family is 0.
type RemoveRules struct {
	Family  rules.Family
	Backend Backend
}

// PutNameserver makes an address the first nameserver of a resolv.conf, with a backup
// of the file beside it.
type PutNameserver struct {
	Path    string
	Address netip.Addr
	// Shared is whether the file may be the host's, in another network namespace.
	Shared bool

	do, undo string // where the file was looked at
}

// SplitNames has systemd-resolved ask a control plane for the names of the mesh, and
// for no other.
type SplitNames struct {
	Address netip.Addr
	By      Split

	do, undo string // where systemd-resolved was looked at
}

func (PutNameserver) step() {}
func (SplitNames) step()    {}
func (AddAddress) step()    {}
func (ReplaceRules) step()  {}
func (RemoveRules) step()   {}

func (s AddAddress) String() string { return fmt.Sprintf("ip address add %s dev lo", s.Prefix) }

// Undo removes the address.
func (s AddAddress) Undo() string { return fmt.Sprintf("ip address del %s dev lo", s.Prefix) }

func (s PutNameserver) String() string {
	if s.do != "" {
		return s.do
	}
	return fmt.Sprintf("nameserver %s first in %s", s.Address, s.Path)
}

// Undo takes the nameserver out again.
func (s PutNameserver) Undo() string {
	if s.undo != "" {
		return s.undo
	}
	return s.Path + " as it was; what somebody else changed meanwhile stays"
}

func (s SplitNames) String() string {
	if s.do != "" {
		return s.do
	}
	return fmt.Sprintf("names of the mesh to %s, by systemd-resolved", s.Address)
}

// Undo has the names of the mesh resolved like all others again.
func (s SplitNames) Undo() string {
	if s.undo != "" {
		return s.undo
	}
	return "names of the mesh as before, by systemd-resolved"
}

func (s ReplaceRules) String() string {
	if s.Backend == NFTables {
		return inTable
	}
	return fmt.Sprintf("%s rules by %s", s.Family, program(s.Backend, s.Family))
}

// Undo puts back what was ours before, or nothing.
func (s ReplaceRules) Undo() string {
	if s.Backend == NFTables {
		return "the former " + inTable
	}
	return fmt.Sprintf("the former %s rules by %s", s.Family, program(s.Backend, s.Family))
}

func (s RemoveRules) String() string {
	if s.Backend == NFTables {
		return "no table inet " + NFTable
	}
	return fmt.Sprintf("no %s rules of ours in %s", s.Family, s.Backend)
}

// Undo puts back what was ours before.
func (s RemoveRules) Undo() string {
	if s.Backend == NFTables {
		return "the former " + inTable
	}
	return fmt.Sprintf("the former %s rules by %s", s.Family, program(s.Backend, s.Family))
}

func program(b Backend, f rules.Family) string {
	name := b.String() + "-restore"
	if f == rules.IPv6 {
		name = "ip6" + strings.TrimPrefix(name, "ip")
	}
	return name
}

// NFTable is the table of nftables, of the family inet, that holds the rules with the
// backend NFTables. What stands in a table of that name is ours.
const NFTable = "kuma-tproxy"

// The chains of ours. A chain of one of these names in its table is ours, and
// nothing else is.
const (
	chainInbound   = "KUMA_MESH_INBOUND"
	chainOutbound  = "KUMA_MESH_OUTBOUND"
	chainLoopback  = "KUMA_MESH_OUTBOUND_LOOPBACK"
	chainDNS       = "KUMA_MESH_DNS"
	chainDNSTCP    = "KUMA_MESH_DNS_TCP"
	chainZone      = "KUMA_MESH_DNS_ZONE"
	chainZoneQuery = "KUMA_MESH_DNS_ZONE_QUERY"
	chainRecord    = "KUMA_MESH_RECORD"
	chainNames     = "KUMA_MESH_NAMES"
)

// The jumps of ours, which are the same for every Config.
var (
	jumpInbound = rules.Rule{
		Matches: []rules.Match{rules.TCP, rules.SYN{}, rules.DestinationLocal{}},
		Action:  rules.Jump{Chain: chainInbound},
		Why:     commentPrefix + "a new TCP connection to an address of this host",
	}
	jumpOutbound = rules.Rule{
		Matches: []rules.Match{rules.TCP, rules.SYN{}},
		Action:  rules.Jump{Chain: chainOutbound},
		Why:     commentPrefix + "a new TCP connection of a process of this host",
	}
	jumpDNS = rules.Rule{
		Matches: []rules.Match{rules.UDP, rules.DestinationPorts{Ports: rules.Port(53)}},
		Action:  rules.Jump{Chain: chainDNS},
		Why:     commentPrefix + "a DNS query of a process of this host",
	}
	jumpZone = rules.Rule{
		Matches: []rules.Match{rules.UDP},
		Action:  rules.Jump{Chain: chainZone},
		Why:     commentPrefix + "redirected DNS queries have a conntrack zone of their own",
	}
)

// jumpNames takes what leaves by the interface of ours.
var jumpNames = rules.Rule{
	Matches: []rules.Match{rules.OutInterface{Name: MeshLink}},
	Action:  rules.Jump{Chain: chainNames},
	Why:     commentPrefix + "systemd-resolved asks the control plane for names of the mesh",
}

// commentPrefix begins the comment of every jump, and of the record: Kuma's own
// uninstall looks for it.
const commentPrefix = "kuma/mesh/transparent/proxy/"

// Known returns what rules.Set.Ours takes for ours: every chain and every jump
// that this or an earlier version of the module makes. What Kuma's own installers
// make beside it, Find knows.
func Known() rules.Set {
	return rules.Set{
		Bases: []rules.BaseChain{
			{Table: rules.NAT, Hook: rules.Prerouting, Rules: []rules.Rule{jumpInbound}},
			{Table: rules.NAT, Hook: rules.Output, Place: rules.First, Rules: []rules.Rule{jumpDNS, jumpOutbound}},
			{Table: rules.Raw, Hook: rules.Output, Place: rules.First, Rules: []rules.Rule{jumpZone}},
			{Table: rules.Mangle, Hook: rules.Output, Place: rules.First, Rules: []rules.Rule{jumpNames}},
		},
		Chains: []rules.Chain{
			{Table: rules.NAT, Name: chainInbound},
			{Table: rules.NAT, Name: chainOutbound},
			{Table: rules.NAT, Name: chainLoopback},
			{Table: rules.NAT, Name: chainDNS},
			{Table: rules.NAT, Name: chainDNSTCP},
			{Table: rules.NAT, Name: chainRecord},
			{Table: rules.Raw, Name: chainZone},
			{Table: rules.Raw, Name: chainZoneQuery},
			{Table: rules.Mangle, Name: chainNames},
		},
	}
}

// Draining returns the rules that stand while an uninstall waits: the chains of ours, to
// which nothing leads any more, so that no connection is redirected. They hold conntrack,
// with which the kernel would let go of the connections that are redirected, and say to
// a next run, if this one is killed, what was installed and whom to wait for. Where there
// is no record, rec says at least whose ::6 is.
func Draining(ours rules.Set, rec Record) rules.Set {
	out := ours
	// A base chain of nftables without rules is still what translates the packets of the
	// connections that were redirected.
	out.Bases = slices.Clone(ours.Bases)
	for i := range out.Bases {
		out.Bases[i].Rules = nil
	}
	if _, ok := ours.Chain(rules.NAT, chainRecord); !ok {
		rec.Bare = true
		out.Chains = append(slices.Clone(ours.Chains), rules.Chain{Table: rules.NAT, Name: chainRecord, Rules: rec.rules()})
	}
	return out
}
