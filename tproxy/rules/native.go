package rules

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"
)

// Native is a Set as one table of nftables, of the family inet: the chains of all its
// tables, those at the hooks among them, and the sets that rules look things up in. It
// is as near to the kernel's form as to the text of nft(8): each rule is one rule of
// the kernel. Set.Native makes one, Native.Set reads one back.
type Native struct {
	Table  string // its name
	Sets   []NativeSet
	Chains []NativeChain
	// Strange is what a table holds that none made by Set.Native does, in words: a
	// flowtable, an object, a set of another kind.
	Strange []string
}

// NativeChain is a chain. That of a rules.Chain is called after the table and the
// chain, such as nat.KUMA_MESH_INBOUND, that of a BaseChain after the table and the
// hook, such as nat.PREROUTING: a table of nftables has one room of names.
type NativeChain struct {
	Name string
	// Type, Hook and Priority are those of a base chain; Hook is empty for any other.
	// The policy is to accept.
	Type     string // nat, filter or route
	Hook     Hook
	Priority int32
	Rules    []NativeRule
}

// NativeRule is a rule. All matches must hold, in their order; then the packet is
// counted if Counted says so, and Action decides.
type NativeRule struct {
	Matches []NativeMatch
	Counted bool
	// Action is a Return, Accept, Drop, Jump, Goto, Redirect, CTZone, NoTrack, SetMark
	// or Nothing. Chain names are those of NativeChain.
	Action  Action
	Comment string // at most MaxNativeComment bytes
	// Unknown says what the kernel has in the rule that no rule of Set.Native has; the
	// rest says nothing then. Only reading makes one.
	Unknown string
	// Counter is what the kernel counted. It is not part of a rule's identity.
	Counter Counter
}

// MaxNativeComment is the longest comment of a rule in bytes
// (NFTNL_UDATA_COMMENT_MAXLEN of libnftnl, less its NUL).
const MaxNativeComment = 127

// NativeKey is what a NativeMatch looks at. The zero value is none.
type NativeKey uint8

// The keys, with what nft(8) calls them.
const (
	KeyFamily          NativeKey = iota + 1 // meta nfproto
	KeyProtocol                             // meta l4proto
	KeyInInterface                          // iifname
	KeyOutInterface                         // oifname
	KeySource4                              // ip saddr
	KeySource6                              // ip6 saddr
	KeyDestination4                         // ip daddr
	KeyDestination6                         // ip6 daddr
	KeyTCPFlags                             // tcp flags
	KeySourcePort                           // tcp sport, udp sport
	KeyDestinationPort                      // tcp dport, udp dport
	KeySourceType                           // fib saddr type
	KeyDestinationType                      // fib daddr type
	KeyUID                                  // meta skuid
	KeyGID                                  // meta skgid
	KeyCTState                              // ct state
	KeyMark                                 // meta mark
)

type nativeKey struct {
	text string
	size int
	set  string
}

// nativeKeys has for each key its text in nft(8), its size in bytes, and the type that
// a set of it has.
var nativeKeys = [...]nativeKey{
	KeyFamily:          {"meta nfproto", 1, ""},
	KeyProtocol:        {"meta l4proto", 1, ""},
	KeyInInterface:     {"iifname", 16, ""},
	KeyOutInterface:    {"oifname", 16, ""},
	KeySource4:         {"ip saddr", 4, "ipv4_addr"},
	KeySource6:         {"ip6 saddr", 16, "ipv6_addr"},
	KeyDestination4:    {"ip daddr", 4, "ipv4_addr"},
	KeyDestination6:    {"ip6 daddr", 16, "ipv6_addr"},
	KeyTCPFlags:        {"tcp flags", 1, ""},
	KeySourcePort:      {"th sport", 2, "inet_service"},
	KeyDestinationPort: {"th dport", 2, "inet_service"},
	KeySourceType:      {"fib saddr type", 4, ""},
	KeyDestinationType: {"fib daddr type", 4, ""},
	KeyUID:             {"meta skuid", 4, "uid"},
	KeyGID:             {"meta skgid", 4, "gid"},
	KeyCTState:         {"ct state", 4, ""},
	KeyMark:            {"meta mark", 4, ""},
}

// Size is how many bytes a value of the key has.
func (k NativeKey) Size() int {
	if k == 0 || int(k) >= len(nativeKeys) {
		return 0
	}
	return nativeKeys[k].size
}

// SetType is the type of a set that is looked up by the key, as nft(8) calls it; empty
// for a key by which none is.
func (k NativeKey) SetType() string {
	if k.Size() == 0 {
		return ""
	}
	return nativeKeys[k].set
}

// Address reports whether the key is an address of a packet.
func (k NativeKey) Address() bool {
	switch k {
	case KeySource4, KeySource6, KeyDestination4, KeyDestination6:
		return true
	}
	return false
}

// HostOrder reports whether the kernel holds values of the key in the machine's byte
// order. A comparison with a range, and a look-up in a set of ranges, is of the value
// turned to network byte order first, as nft does it.
func (k NativeKey) HostOrder() bool {
	switch k {
	case KeySourceType, KeyDestinationType, KeyUID, KeyGID, KeyCTState, KeyMark:
		return true
	}
	return false
}

// NativeMatch is one comparison. First alone is equality, First and Last are a range,
// both ends included, First and Mask are that the bits of Mask are those of First, and
// Set is a look-up. Numbers are in network byte order whatever the kernel does; the
// name of an interface has no NUL, and ends in "*" where it stands for all with that
// beginning.
//
// A KeyCTState with a Mask holds where any of its bits is set, and First is nil.
type NativeMatch struct {
	Key         NativeKey
	Not         bool
	First, Last []byte
	Mask        []byte
	Set         string
}

// NativeSet is a set of ranges: sorted, and none overlaps another.
type NativeSet struct {
	// Name says what is in it: the kind, and a sum of the elements. So a set never
	// changes under the rules that look things up in it: rules with other elements
	// have another set.
	Name     string
	Type     string // as SetType has it
	Elements []NativeRange
}

// NativeRange is an element of a set, both ends included.
type NativeRange struct{ First, Last []byte }

// nativeBase is the type and the priority of a base chain. One that goes first comes
// before those of others, iptables' among them, whichever was registered first; those
// are at the priorities of enum nf_ip_hook_priorities, linux/netfilter_ipv4.h. One that
// goes last comes behind them: in nat, it does not see what they have translated.
func nativeBase(c BaseChain) (kind string, priority int32) {
	kind = "filter"
	switch c.Table {
	case NAT:
		kind, priority = "nat", -100
	case Raw:
		priority = -300
	case Mangle:
		priority = -150
		if c.Hook == Output {
			kind = "route" // it looks for the route again, as that of iptables does
		}
	}
	if c.Place == First {
		return kind, priority - 1
	}
	return kind, priority + 1
}

// Native returns the Set as a table of nftables of that name, for both families, or
// the one of Only. It panics with the *InvalidError of Validate on a Set that must not
// be rendered, as IPTables does; the error is for a valid one that holds what no rule
// of ours does: a REJECT, an address translation, a comment that nftables does not
// take.
func (s Set) Native(table string) (Native, error) {
	if err := s.Validate(); err != nil {
		panic(err)
	}
	n := &nativeMaker{Native: Native{Table: table}, set: s}
	for _, c := range s.Bases {
		kind, priority := nativeBase(c)
		out := NativeChain{Name: nativeName(c.Table, string(c.Hook)), Type: kind, Hook: c.Hook, Priority: priority}
		n.chain(out, c.Table, string(c.Hook), c.Rules)
	}
	for _, c := range s.Chains {
		n.chain(NativeChain{Name: nativeName(c.Table, c.Name)}, c.Table, c.Name, c.Rules)
	}
	if n.faults != nil {
		return Native{}, &InvalidError{n.faults}
	}
	slices.SortFunc(n.Sets, func(a, b NativeSet) int { return cmp.Compare(a.Name, b.Name) })
	return n.Native, nil
}

func nativeName(t Table, name string) string { return string(t) + "." + name }

// nativeMaker makes a Native of a Set.
type nativeMaker struct {
	Native
	set    Set
	table  Table // of the chain at hand
	faults []Fault
}

func (n *nativeMaker) chain(out NativeChain, t Table, name string, list []Rule) {
	n.table = t
	for i := range list {
		if what := nativeFault(&list[i], !n.set.NoComments || list[i].Record); what != "" {
			n.faults = append(n.faults, Fault{t, name, i + 1, what})
			continue
		}
		out.Rules = n.rules(out.Rules, &list[i])
	}
	n.Chains = append(n.Chains, out)
}

// nativeFault is why a rule cannot be one of nftables, or "".
func nativeFault(r *Rule, commented bool) string {
	switch r.Action.(type) {
	case Reject, Translate:
		return fmt.Sprintf("%T: no rule of a table of our own does that", r.Action)
	}
	for _, m := range r.Matches {
		switch m := m.(type) {
		case CTState:
			if strings.Contains(m.States, "SNAT") || strings.Contains(m.States, "DNAT") {
				return fmt.Sprintf("connection states %q: nftables knows those that are translated otherwise", m.States)
			}
		case OwnerUID:
			if m.Not {
				return negatedOwner
			}
		case OwnerGID:
			if m.Not {
				return negatedOwner
			}
		}
	}
	switch {
	case !commented:
	case len(r.Why) > MaxNativeComment:
		return fmt.Sprintf("a comment of %d bytes; nftables takes %d", len(r.Why), MaxNativeComment)
	case strings.Contains(r.Why, `"`) && !r.Record, strings.Contains(r.Why, "'") && r.Record:
		return fmt.Sprintf("comment %q: nft(8) has no way to write a quotation mark", r.Why)
	}
	return ""
}

// iptables counts a packet without a socket among those of other owners (owner_mt,
// net/netfilter/xt_owner.c), and meta skuid does not (nft_meta_get_eval_skugid,
// net/netfilter/nft_meta.c).
const negatedOwner = "an owner that is excepted: of packets without one nftables says otherwise than iptables"

// rules appends the rules of the kernel that r is: one, or one for each family where it
// is about addresses.
func (n *nativeMaker) rules(out []NativeRule, r *Rule) []NativeRule {
	addresses := slices.ContainsFunc(r.Matches, func(m Match) bool { return m.rank() <= Destination{}.rank() })
	if !addresses {
		only := n.set.Only
		if r.Record { // no packet meets it
			only = 0
		}
		return append(out, n.rule(r, only))
	}
	for _, f := range Families() {
		if (n.set.Only == 0 || n.set.Only == f) && r.For(f) {
			out = append(out, n.rule(r, f))
		}
	}
	return out
}

// rule is r in a family, or, with 0, in both.
func (n *nativeMaker) rule(r *Rule, f Family) NativeRule {
	out := NativeRule{Counted: !r.Record, Action: r.Action}
	switch {
	case r.Record: // it has JSON in it, and nft(8) cannot write its quotation marks
		out.Comment = strings.ReplaceAll(r.Why, `"`, "'")
	case !n.set.NoComments:
		out.Comment = r.Why
	}
	switch a := r.Action.(type) {
	case Jump:
		out.Action = Jump{nativeName(n.table, a.Chain)}
	case Goto:
		out.Action = Goto{nativeName(n.table, a.Chain)}
	}
	if f != 0 {
		out.Matches = append(out.Matches, NativeMatch{Key: KeyFamily, First: []byte{nativeFamilies[f]}})
	}
	for _, m := range r.Matches {
		out.Matches = n.match(out.Matches, m, f)
	}
	// The protocol in front: what is of another one pays for one comparison.
	slices.SortStableFunc(out.Matches, func(a, b NativeMatch) int { return nativeRank(a.Key) - nativeRank(b.Key) })
	return out
}

func nativeRank(k NativeKey) int {
	switch k {
	case KeyFamily:
		return 0
	case KeyProtocol:
		return 1
	}
	return 2
}

// nativeFamilies are the NFPROTO_* of linux/netfilter.h.
var nativeFamilies = map[Family]byte{IPv4: 2, IPv6: 10}

// rtnLocal is the type of an address of this host (RTN_LOCAL, linux/rtnetlink.h).
const rtnLocal = 2

// The bits of the connection states in the kernel (NF_CT_STATE_BIT in
// linux/netfilter/nf_conntrack_common.h).
var nativeStates = map[string]uint32{"INVALID": 1, "ESTABLISHED": 2, "RELATED": 4, "NEW": 8, "UNTRACKED": 64}

// synMask is FIN, SYN, RST and ACK, and synBit SYN (linux/tcp.h).
const (
	synMask = 0x17
	synBit  = 0x02
)

func (n *nativeMaker) match(out []NativeMatch, m Match, f Family) []NativeMatch {
	switch m := m.(type) {
	case Source:
		return n.prefixes(out, []NativeKey{KeySource4, KeySource6}, m.Prefixes, m.Not, f)
	case Destination:
		return n.prefixes(out, []NativeKey{KeyDestination4, KeyDestination6}, m.Prefixes, m.Not, f)
	case InInterface:
		return nativeInterface(out, KeyInInterface, m.Name, m.Not)
	case OutInterface:
		return nativeInterface(out, KeyOutInterface, m.Name, m.Not)
	case Protocol:
		return append(out, NativeMatch{Key: KeyProtocol, First: []byte{byte(m)}})
	case SYN:
		return append(out, NativeMatch{Key: KeyTCPFlags, Not: m.Not, First: []byte{synBit}, Mask: []byte{synMask}})
	case SourcePorts:
		return n.ranges(out, KeySourcePort, "ports", nativeSpans(m.Ports.s), m.Not)
	case DestinationPorts:
		return n.ranges(out, KeyDestinationPort, "ports", nativeSpans(m.Ports.s), m.Not)
	case SourceLocal:
		return append(out, NativeMatch{Key: KeySourceType, Not: m.Not, First: be32(rtnLocal)})
	case DestinationLocal:
		return append(out, NativeMatch{Key: KeyDestinationType, Not: m.Not, First: be32(rtnLocal)})
	case OwnerUID:
		return n.ranges(out, KeyUID, "uids", nativeSpans(m.UIDs.s), m.Not)
	case OwnerGID:
		return n.ranges(out, KeyGID, "gids", nativeSpans(m.GIDs.s), m.Not)
	case CTState:
		var bits uint32
		for s := range strings.SplitSeq(m.States, ",") {
			bits |= nativeStates[s]
		}
		return append(out, NativeMatch{Key: KeyCTState, Not: m.Not, Mask: be32(bits)})
	case Mark:
		out = append(out, NativeMatch{Key: KeyMark, Not: m.Not, First: be32(m.Value)})
		if m.Mask != allBits {
			out[len(out)-1].Mask = be32(m.Mask)
		}
		return out
	}
	panic(fmt.Sprintf("no match of nftables for %T", m)) // Validate refuses Opaque
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

func nativeSpans[T uint16 | uint32](s spans[T]) []NativeRange {
	out := make([]NativeRange, len(s))
	size := binary.Size(T(0))
	room := make([]byte, 0, 2*size*len(s))
	for i, r := range s {
		for _, v := range []T{r.First, r.Last} {
			if size == 2 {
				room = binary.BigEndian.AppendUint16(room, uint16(v))
			} else {
				room = binary.BigEndian.AppendUint32(room, uint32(v))
			}
		}
		end := len(room)
		out[i] = NativeRange{room[end-2*size : end-size : end-size], room[end-size : end : end]}
	}
	return out
}

// nativeInterface writes "eth+" of iptables as "eth*"; of "+" nothing is said, as
// every interface is meant.
func nativeInterface(out []NativeMatch, k NativeKey, name string, not bool) []NativeMatch {
	if name == "+" {
		return out
	}
	if begin, ok := strings.CutSuffix(name, "+"); ok {
		name = begin + "*"
	}
	return append(out, NativeMatch{Key: k, Not: not, First: []byte(name)})
}

// prefixes is those of the family. A set takes no range that lies in another one, so
// such are left out: they add nothing.
func (n *nativeMaker) prefixes(out []NativeMatch, keys []NativeKey, ps []netip.Prefix, not bool, f Family) []NativeMatch {
	key, kind := keys[0], "v4"
	if f == IPv6 {
		key, kind = keys[1], "v6"
	}
	var mine []netip.Prefix
	for _, p := range ps {
		if f.holds(p.Addr()) {
			mine = append(mine, p)
		}
	}
	// Sorted, one that holds others stands in front of them.
	slices.SortFunc(mine, netip.Prefix.Compare)
	var ranges []NativeRange
	for _, p := range mine {
		r := prefixRange(p)
		if k := len(ranges); k > 0 && bytes.Compare(r.Last, ranges[k-1].Last) <= 0 {
			continue
		}
		ranges = append(ranges, r)
	}
	switch {
	case len(ranges) == 0:
		return out // with Not: none of the family is excepted
	case len(ranges) == 1 && allZero(ranges[0].First) && allOnes(ranges[0].Last):
		return out // every address
	case len(ranges) == 1 && !bytes.Equal(ranges[0].First, ranges[0].Last):
		// As nft writes a prefix, and for the kernel one step less.
		mask := make([]byte, key.Size())
		for i := range mask {
			mask[i] = ^(ranges[0].First[i] ^ ranges[0].Last[i])
		}
		return append(out, NativeMatch{Key: key, Not: not, First: ranges[0].First, Mask: mask})
	}
	return n.ranges(out, key, kind, ranges, not)
}

func allZero(b []byte) bool { return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) }
func allOnes(b []byte) bool { return !slices.ContainsFunc(b, func(c byte) bool { return c != 0xff }) }

func prefixRange(p netip.Prefix) NativeRange {
	first := p.Masked().Addr().AsSlice()
	last := slices.Clone(first)
	for i := p.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 0x80 >> (i % 8)
	}
	return NativeRange{first, last}
}

// ranges is one comparison, or, of more than one range, a look-up in a set.
func (n *nativeMaker) ranges(out []NativeMatch, k NativeKey, kind string, ranges []NativeRange, not bool) []NativeMatch {
	if len(ranges) > 1 {
		return append(out, NativeMatch{Key: k, Not: not, Set: n.named(k, kind, ranges)})
	}
	m := NativeMatch{Key: k, Not: not, First: ranges[0].First}
	if !bytes.Equal(ranges[0].First, ranges[0].Last) {
		m.Last = ranges[0].Last
	}
	return append(out, m)
}

// named returns the name of the set that holds the ranges, and adds it if no rule
// before has asked for it.
func (n *nativeMaker) named(k NativeKey, kind string, ranges []NativeRange) string {
	sum := fnv.New64a()
	for _, r := range ranges {
		sum.Write(r.First)
		sum.Write(r.Last)
	}
	want := NativeSet{Name: fmt.Sprintf("%s-%016x", kind, sum.Sum64()), Type: k.SetType(), Elements: ranges}
	for {
		s, there := n.Native.set(want.Name)
		switch {
		case !there:
			n.Sets = append(n.Sets, want)
			return want.Name
		case s.equal(want):
			return want.Name
		}
		want.Name += "-" // another list with the same sum
	}
}
