package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Family is an IP version. The zero Family stands for both.
type Family uint8

// The families; their values are the IP version numbers.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families lists both families in the order in which they are applied.
func Families() []Family { return []Family{IPv4, IPv6} }

func (f Family) String() string {
	switch f {
	case IPv4:
		return "IPv4"
	case IPv6:
		return "IPv6"
	case 0:
		return "IPv4 and IPv6"
	}
	return fmt.Sprintf("Family(%d)", uint8(f))
}

// holds reports whether the address belongs to the family.
func (f Family) holds(a netip.Addr) bool { return f == 0 || a.Is4() == (f == IPv4) }

// Table is a netfilter table, see iptables(8).
type Table string

// The tables that a Set can use.
const (
	Raw    Table = "raw"
	Mangle Table = "mangle"
	NAT    Table = "nat"
	Filter Table = "filter"
)

// Security is the table that comes behind filter, for mandatory access control
// (SECMARK in iptables-extensions(8)). It is only read: a Set of ours has no
// rules there.
const Security Table = "security"

// Hook is a netfilter hook: the place on a packet's way at which a base chain
// sees it.
type Hook string

// The hooks, as /usr/include/linux/netfilter.h names them.
const (
	Prerouting  Hook = "PREROUTING"
	Input       Hook = "INPUT"
	Forward     Hook = "FORWARD"
	Output      Hook = "OUTPUT"
	Postrouting Hook = "POSTROUTING"
)

// Set is a rule set: base chains, which the kernel calls at its hooks, and
// chains, which rules jump to. The order of the slices is the order of the
// rules. The same Set serves both families: a rule with addresses is rendered
// only for the families of its addresses.
type Set struct {
	// Only limits the Set to one family; the zero value means both.
	Only Family
	// NoComments leaves every rule's Why out of what is rendered, except that
	// of a record (see Rule.Record).
	NoComments bool

	Bases  []BaseChain
	Chains []Chain

	// Detours are those that Ours found, whether there are rules of ours in them or
	// not. They are no part of what is rendered.
	Detours []Detour
}

// Place says where in a base chain, among the rules of others, ours go.
type Place uint8

const (
	// Last appends our rules behind those that are there.
	Last Place = iota
	// First inserts our rules in front of those that are there.
	First
)

// BaseChain is the part of a built-in chain that belongs to a Set, or, when it
// was parsed, all of it.
type BaseChain struct {
	Table Table
	Hook  Hook
	// Place is where a script puts the rules; it says nothing in a parsed Set.
	Place Place
	// Policy is the verdict at the chain's end, ACCEPT or DROP. It is set by
	// ParseSave and never rendered: the policy of a built-in chain is not ours.
	Policy string
	// Offset is how far from where iptables has the chain of that table and hook the
	// kernel calls this one, where it was read of nftables: one below 0 comes before
	// iptables', one above behind them. It says nothing to a script.
	Offset int32
	// Name is that in nftables, where it is another than the hook's.
	Name  string
	Rules []Rule
}

// Priority is where iptables has the chain of a table at a hook, among all that see a
// packet there: the lowest comes first (enum nf_ip_hook_priorities in
// linux/netfilter_ipv4.h, and for security that of iptables-legacy). Chains of nat are
// called at once, in the order of their own priorities, where iptables' are
// (nf_nat_inet_fn in net/netfilter/nf_nat_core.c).
func Priority(t Table, h Hook) int32 {
	switch t {
	case Raw:
		return -300
	case Mangle:
		return -150
	case NAT:
		if h == Input || h == Postrouting {
			return 100
		}
		return -100
	case Security:
		return 50
	}
	return 0
}

// Chain is a chain of our own, which does nothing until a rule jumps to it.
type Chain struct {
	Table Table
	// Name has at most 28 bytes (XT_EXTENSION_MAXNAMELEN in
	// linux/netfilter/x_tables.h), letters, digits and "_-.".
	Name  string
	Rules []Rule
}

// Rule matches packets and acts on them. A rule without matches meets every
// packet. All matches must hold.
type Rule struct {
	// Matches stand in canonical order (see Rule.Normalize) in every rule that
	// this module makes.
	Matches []Match
	Action  Action
	// Why is the reason for the rule: the comment in the kernel, the line in an
	// explanation. At most 255 bytes of printable ASCII reach the kernel
	// (XT_MAX_COMMENT_LEN is 256 with its NUL).
	Why string
	// Record marks a rule whose Why is data that has to be found again: it is
	// rendered even where comments are switched off.
	Record bool
	// At is where Ours found the rule in its base chain, from 1, the rules of
	// others counted; Transition puts a rule back in that place. It is not part
	// of a rule's identity.
	At int
	// Via is the Detour in which Ours found a rule of a base chain, and At counts
	// there; empty where it stands in the base chain itself. It is not part of a
	// rule's identity.
	Via string
	// Unmet is whether the base chain does not lead to Via: the rule is there, and
	// stands for none in the base chain.
	Unmet bool
	// Counter is what the kernel counted, where ParseSave was given counters.
	// It is not part of a rule's identity.
	Counter Counter

	listed string // see Listed
}

// Listed is how the line that ParseSave or ParseRule read goes on behind the
// chain's name; empty for a rule that was not read. The order of the matches in it
// is the kernel's, and iptables -D finds a rule only in that order.
func (r Rule) Listed() string { return r.listed }

// Counter counts the packets, and their bytes, that met a rule.
type Counter struct{ Packets, Bytes uint64 }

// Match is a condition on a packet. The types of this package are the only
// ones.
type Match interface {
	rank() int
	appendIPTables(b []byte) []byte
}

// Protocol matches the layer 4 protocol.
type Protocol uint8

// The protocols that rules need, by their IANA number.
const (
	TCP Protocol = 6
	UDP Protocol = 17
)

func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// Source matches packets whose source address is in one of the prefixes, or,
// with Not, in none. For a family of which there is no prefix, a rule with
// Source does not exist; with Not, the match says nothing there.
type Source struct {
	Prefixes []netip.Prefix
	Not      bool
}

// Destination is Source for the destination address.
type Destination struct {
	Prefixes []netip.Prefix
	Not      bool
}

// InInterface matches the interface that a packet came in through. A Name that
// ends in "+" matches every interface with that prefix.
type InInterface struct {
	Name string
	Not  bool
}

// OutInterface matches the interface that a packet leaves through, see
// InInterface.
type OutInterface struct {
	Name string
	Not  bool
}

// SYN matches the packet that opens a TCP connection: of FIN, SYN, RST and ACK
// it has SYN alone (--syn in iptables-extensions(8)). The rule needs TCP.
type SYN struct{ Not bool }

// SourcePorts matches the source port. The rule needs TCP or UDP.
type SourcePorts struct {
	Ports Ports
	Not   bool
}

// DestinationPorts matches the destination port. The rule needs TCP or UDP.
type DestinationPorts struct {
	Ports Ports
	Not   bool
}

// SourceLocal matches packets from an address of this host (addrtype
// --src-type LOCAL in iptables-extensions(8)).
type SourceLocal struct{ Not bool }

// DestinationLocal matches packets to an address of this host (addrtype
// --dst-type LOCAL in iptables-extensions(8), fib daddr type local in nft(8)).
type DestinationLocal struct{ Not bool }

// OwnerUID matches packets of a socket whose owner's UID is in one of the
// ranges. It holds in OUTPUT and POSTROUTING alone (-m owner in
// iptables-extensions(8)).
type OwnerUID struct {
	UIDs UIDs
	Not  bool
}

// OwnerGID is OwnerUID for the primary group.
type OwnerGID struct {
	GIDs UIDs
	Not  bool
}

// CTState matches the state of the packet's connection: NEW, ESTABLISHED,
// RELATED, INVALID, UNTRACKED, sorted and joined with commas.
type CTState struct {
	States string
	Not    bool
}

// Mark matches packets whose mark has Value in the bits of Mask (-m mark in
// iptables-extensions(8)).
type Mark struct {
	Value, Mask uint32
	Not         bool
}

// Action is what a rule does with the packets it matches. The types of this
// package are the only ones.
type Action interface{ appendAction(b []byte) []byte }

// Return goes back to the calling chain; from a base chain, to its policy.
type Return struct{}

// Accept ends the hook's table with the packet let through.
type Accept struct{}

// Drop discards the packet silently.
type Drop struct{}

// Reject discards the packet and answers: With is the value of --reject-with.
type Reject struct{ With string }

// Jump goes on in a chain and comes back behind the rule.
type Jump struct{ Chain string }

// Goto goes on in a chain and does not come back behind the rule, but behind
// the rule that called the chain it stands in.
type Goto struct{ Chain string }

// Redirect sends the connection to a port of this host (REDIRECT in
// iptables-extensions(8)). To port 0, where nothing can listen, it refuses the
// connection: the kernel answers with a reset.
type Redirect struct{ Port uint16 }

// CTZone puts the packet's connection in a conntrack zone (CT --zone in
// iptables-extensions(8)) and goes on with the next rule. Only in raw.
type CTZone struct{ Zone uint16 }

// NoTrack keeps the packet out of connection tracking, and so out of nat (CT
// --notrack in iptables-extensions(8)), and goes on with the next rule. Only in
// raw.
type NoTrack struct{}

// SetMark gives the packet another mark, its own with the bits of Mask cleared
// and those of Value flipped (MARK --set-xmark in iptables-extensions(8)), and
// goes on with the next rule.
type SetMark struct{ Value, Mask uint32 }

// Translate changes an address of the connection (DNAT, SNAT and MASQUERADE in
// iptables-extensions(8)). No rule of ours does: it is how others answer first.
type Translate struct {
	Target string // DNAT, SNAT or MASQUERADE
	// To is the address, the range of addresses, the ports or both, such as
	// "172.17.0.2:80", as it is listed; empty for a MASQUERADE without ports.
	To                              string
	Random, RandomFully, Persistent bool
}

// Opaque is a match or an action that ParseSave does not know. Nothing else
// makes one with a text; the renderer refuses it.
type Opaque struct{ text string }

// Text returns the words as iptables-save printed them.
func (o Opaque) Text() string { return o.text }

// Equal makes go-cmp compare the texts.
func (o Opaque) Equal(p Opaque) bool { return o == p }

// Nothing is the action of a rule without a target: it only counts.
type Nothing struct{}

// The order in which iptables-save prints the built-in matches, and ours after
// them: those that are cheap and drop out early first.
func (Source) rank() int           { return 0 }
func (Destination) rank() int      { return 1 }
func (InInterface) rank() int      { return 2 }
func (OutInterface) rank() int     { return 3 }
func (Protocol) rank() int         { return 4 }
func (SYN) rank() int              { return 5 }
func (SourcePorts) rank() int      { return 6 }
func (DestinationPorts) rank() int { return 7 }
func (SourceLocal) rank() int      { return 8 }
func (DestinationLocal) rank() int { return 9 }
func (OwnerUID) rank() int         { return 10 }
func (OwnerGID) rank() int         { return 11 }
func (CTState) rank() int          { return 12 }
func (Mark) rank() int             { return 13 }
func (Opaque) rank() int           { return 14 }

// Normalize puts the matches in canonical order, so that rules with the same
// meaning compare as equal.
func (r *Rule) Normalize() {
	if !slices.IsSortedFunc(r.Matches, byRank) {
		r.Matches = slices.Clone(r.Matches)
		slices.SortStableFunc(r.Matches, byRank)
	}
}

func byRank(a, b Match) int { return a.rank() - b.rank() }

// For reports whether the rule exists in family f: it does unless it names
// addresses, and none of f.
func (r Rule) For(f Family) bool {
	for _, m := range r.Matches {
		var ps []netip.Prefix
		switch m := m.(type) {
		case Source:
			if m.Not {
				continue
			}
			ps = m.Prefixes
		case Destination:
			if m.Not {
				continue
			}
			ps = m.Prefixes
		default:
			continue
		}
		if !slices.ContainsFunc(ps, func(p netip.Prefix) bool { return f.holds(p.Addr()) }) {
			return false
		}
	}
	return true
}

// Has reports whether the Set has rules for family f.
func (s Set) Has(f Family) bool {
	return (s.Only == 0 || s.Only == f) && (len(s.Bases) > 0 || len(s.Chains) > 0)
}

// Chain returns the chain of that name in the table.
func (s Set) Chain(t Table, name string) (Chain, bool) {
	for _, c := range s.Chains {
		if c.Table == t && c.Name == name {
			return c, true
		}
	}
	return Chain{}, false
}

// Base returns the base chain of the table at the hook.
func (s Set) Base(t Table, h Hook) (BaseChain, bool) {
	for _, c := range s.Bases {
		if c.Table == t && c.Hook == h {
			return c, true
		}
	}
	return BaseChain{}, false
}

// Target returns the chain that the rule jumps or goes to, or "".
func (r Rule) Target() string {
	switch a := r.Action.(type) {
	case Jump:
		return a.Chain
	case Goto:
		return a.Chain
	}
	return ""
}

// Fault is one thing that is wrong with a Set.
type Fault struct {
	Table Table
	Chain string // the chain's or the hook's name
	Rule  int    // counted from 1; 0 is the chain itself
	What  string
}

// InvalidError lists all faults of a Set.
type InvalidError struct{ Faults []Fault }

func (e *InvalidError) Error() string {
	var b strings.Builder
	for i, f := range e.Faults {
		if i > 0 {
			b.WriteString("; ")
		}
		fmt.Fprintf(&b, "%s %s", f.Table, f.Chain)
		if f.Rule > 0 {
			fmt.Fprintf(&b, " rule %d", f.Rule)
		}
		b.WriteString(": " + f.What)
	}
	return b.String()
}

// MaxChainName is the longest name of a chain in bytes: XT_EXTENSION_MAXNAMELEN
// (29, linux/netfilter/x_tables.h) less its NUL.
const MaxChainName = 28

// MaxWhy is the longest comment in bytes: XT_MAX_COMMENT_LEN (256,
// linux/netfilter/xt_comment.h) less its NUL. iptables cuts longer ones
// silently.
const MaxWhy = 255

// Validate returns an *InvalidError with everything for which the Set could
// not be rendered or would not mean what it says: opaque parts, strings that
// would not stay in their place in a script, jumps to chains that are not
// there, ports without a protocol that has them.
func (s Set) Validate() error {
	var faults []Fault
	for i, c := range s.Bases {
		if !slices.Contains(tableOrder[:], c.Table) || !isHook(c.Table, string(c.Hook)) {
			faults = append(faults, Fault{c.Table, fmt.Sprintf("%q", c.Hook), 0, fmt.Sprintf("table %q has no such hook", c.Table)})
		}
		for _, d := range s.Bases[:i] {
			if d.Table == c.Table && d.Hook == c.Hook {
				faults = append(faults, Fault{c.Table, string(c.Hook), 0, "the base chain stands twice"})
			}
		}
		faults = s.check(faults, c.Table, string(c.Hook), c.Rules)
	}
	for i, c := range s.Chains {
		if !validName(c.Name) {
			faults = append(faults, Fault{c.Table, fmt.Sprintf("%q", c.Name), 0, fmt.Sprintf("a chain's name has 1 to %d letters, digits and _-. and begins with a letter", MaxChainName)})
		}
		if isTarget(c.Name) || isHook(Mangle, c.Name) { // mangle has all hooks
			faults = append(faults, Fault{c.Table, c.Name, 0, "the name is a hook's or a target's"})
		}
		if !slices.Contains(tableOrder[:], c.Table) {
			faults = append(faults, Fault{c.Table, c.Name, 0, fmt.Sprintf("there is no table %q", c.Table)})
		}
		for _, d := range s.Chains[:i] {
			if d.Table == c.Table && d.Name == c.Name {
				faults = append(faults, Fault{c.Table, c.Name, 0, "the chain stands twice"})
			}
		}
		faults = s.check(faults, c.Table, c.Name, c.Rules)
	}
	if faults != nil {
		return &InvalidError{faults}
	}
	return nil
}

func (s Set) check(faults []Fault, t Table, chain string, rules []Rule) []Fault {
	for i := range rules {
		r := &rules[i]
		bad := func(format string, args ...any) {
			faults = append(faults, Fault{t, chain, i + 1, fmt.Sprintf(format, args...)})
		}
		r.check(bad)
		if name := r.Target(); name != "" {
			if _, ok := s.Chain(t, name); !ok {
				bad("jumps to %q, which is not there", name)
			}
		}
	}
	return faults
}

func (r *Rule) check(bad func(string, ...any)) {
	var proto Protocol
	for _, m := range r.Matches {
		if p, ok := m.(Protocol); ok {
			proto = p
		}
	}
	ports := proto == TCP || proto == UDP
	for i, m := range r.Matches {
		if i > 0 && m.rank() < r.Matches[i-1].rank() {
			bad("matches are not in canonical order")
		}
		if i > 0 && m.rank() == r.Matches[i-1].rank() {
			bad("two matches of one kind, %T", m)
		}
		switch m := m.(type) {
		case Source:
			checkPrefixes(bad, m.Prefixes, m.Not)
		case Destination:
			checkPrefixes(bad, m.Prefixes, m.Not)
		case InInterface:
			checkInterface(bad, m.Name, m.Not)
		case OutInterface:
			checkInterface(bad, m.Name, m.Not)
		case SYN:
			if proto != TCP {
				bad("SYN without tcp")
			}
		case SourcePorts:
			if !ports || m.Ports.IsEmpty() {
				bad("source ports without tcp or udp, or none")
			}
			if m.Not && m.Ports.slots() > maxSlots {
				bad("more than %d ports cannot be negated in one rule", maxSlots)
			}
		case DestinationPorts:
			if !ports || m.Ports.IsEmpty() {
				bad("destination ports without tcp or udp, or none")
			}
			if m.Not && m.Ports.slots() > maxSlots {
				bad("more than %d ports cannot be negated in one rule", maxSlots)
			}
		case OwnerUID:
			checkOwner(bad, m.UIDs, m.Not)
		case OwnerGID:
			checkOwner(bad, m.GIDs, m.Not)
		case CTState:
			last := ""
			for s := range strings.SplitSeq(m.States, ",") {
				if !isState(s) {
					bad("%q is no connection state", s)
				}
				if s <= last {
					bad("connection states %q are not sorted", m.States)
				}
				last = s
			}
		case Opaque:
			bad("opaque match %q", m.text)
		}
	}
	switch a := r.Action.(type) {
	case nil:
		bad("no action")
	case Jump:
		if a.Chain == "" {
			bad("jumps to no chain")
		}
	case Goto:
		if a.Chain == "" {
			bad("goes to no chain")
		}
	case CTZone:
		if a.Zone == 0 { // listed as a CT without options
			bad("zone 0 is that of every connection")
		}
	case Redirect:
		if !ports {
			bad("redirect without tcp or udp")
		}
	case Translate:
		if !a.valid(ports) {
			bad("%q is no translation", strings.TrimSpace(string(a.appendAction(nil))))
		}
	case Reject:
		if a.With != "" && !validName(a.With) {
			bad("%q is no way to reject", a.With)
		}
	case Opaque:
		bad("opaque action %q", a.text)
	}
	if len(r.Why) > MaxWhy {
		bad("a comment of %d bytes; at most %d reach the kernel", len(r.Why), MaxWhy)
	}
	if !isPrintable(r.Why) {
		bad("comment %q holds more than printable ASCII", r.Why)
	}
}

// valid reports whether iptables can say it; ports is whether the rule is about a
// protocol that has them.
func (a Translate) valid(ports bool) bool {
	if strings.Trim(a.To, "0123456789abcdefABCDEF.:[]-/") != "" || strings.HasPrefix(a.To, "-") {
		return false
	}
	// A port is behind the address of IPv4, behind the bracket of IPv6, or alone.
	hasPort := strings.HasPrefix(a.To, ":") && strings.Count(a.To, ":") == 1 || strings.Contains(a.To, "]:") ||
		strings.Contains(a.To, ".") && strings.Contains(a.To, ":")
	switch a.Target {
	case "DNAT":
		return a.To != "" && !a.RandomFully && (ports || !hasPort)
	case "SNAT":
		return a.To != "" && (ports || !hasPort)
	case "MASQUERADE":
		return !a.Persistent && (a.To == "" || ports)
	}
	return false
}

func isPrintable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

func checkPrefixes(bad func(string, ...any), ps []netip.Prefix, not bool) {
	if len(ps) == 0 {
		bad("an address match without addresses")
	}
	var n4, n6 int
	for _, p := range ps {
		switch {
		case !p.IsValid() || p.Addr().Zone() != "" || p.Addr().Is4In6():
			bad("%q is no prefix", p)
		case p != p.Masked():
			bad("prefix %q has host bits", p)
		case not && p.Bits() == 0: // iptables-nft refuses it
			bad("no address is outside of %q", p)
		case p.Addr().Is4():
			n4++
		default:
			n6++
		}
	}
	if not && (n4 > 1 || n6 > 1) {
		bad("more than one prefix of a family cannot be negated in one rule")
	}
}

func checkOwner(bad func(string, ...any), ids UIDs, not bool) {
	if ids.IsEmpty() {
		bad("an owner match without an owner")
	}
	if not && len(ids.Ranges()) > 1 {
		bad("more than one range of owners cannot be negated in one rule")
	}
}

func checkInterface(bad func(string, ...any), name string, not bool) {
	if not && name == "+" { // iptables-legacy-save lists the rule without it
		bad("no interface is outside of \"+\"")
	}
	if err := CheckInterface(name); err != nil {
		bad("%v", err)
	}
}

// CheckInterface returns an error unless name can be the name of a network
// interface, or, ending in "+", a prefix of such names: 1 to 15 bytes
// (IFNAMSIZ in linux/if.h), no white space, slash, colon or control
// character (dev_valid_name in net/core/dev.c), and nothing that a shell, nft
// or iptables-restore would read as more than a name.
func CheckInterface(name string) error {
	ok := len(name) >= 1 && len(name) <= 15 && name != "." && name != ".." && name[0] != '-' && name[0] != '!'
	for i, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-', c == '.', c == '@':
		case c == '+' && i == len(name)-1:
		default:
			ok = false
		}
	}
	if !ok {
		return fmt.Errorf("interface %q: accepted is a name of 1 to 15 letters, digits, \"_\", \"-\", \".\" or \"@\", which may end in \"+\"", name)
	}
	return nil
}

func validName(s string) bool {
	if len(s) == 0 || len(s) > MaxChainName {
		return false
	}
	for i, c := range []byte(s) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_'
		if !letter && (i == 0 || !(c >= '0' && c <= '9' || c == '-' || c == '.')) {
			return false
		}
	}
	return true
}
