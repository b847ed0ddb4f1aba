package rules

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Set returns the table as a Set: what Native makes of a Set does to packets what the
// Set does, and lowered for a family the two are the same rules. What no rule of a Set
// says becomes Opaque, and so does what is Strange: which packets it concerns cannot be
// told.
func (n Native) Set() Set {
	out := Set{Only: n.only()}
	strange := n.Strange
	for i := range n.Chains {
		if !n.addChain(&out, &n.Chains[i]) {
			strange = append(slices.Clip(strange), "chain "+n.Chains[i].Name)
		}
	}
	if len(strange) > 0 {
		for i := range out.Bases {
			out.Bases[i].Rules = append([]Rule{unknown(strings.Join(strange, ", "))}, out.Bases[i].Rules...)
		}
	}
	return out
}

// Known returns the table without what no table made by Set.Native has: what can be
// made again of it. A set of which not all is known goes with the rules that look into it.
func (n Native) Known() Native {
	unknown := func(r NativeRule) bool { return r.Unknown != "" || slices.ContainsFunc(r.Matches, n.looksIntoStrange) }
	n.Sets = slices.DeleteFunc(slices.Clone(n.Sets), n.isStrange)
	n.Chains = slices.Clone(n.Chains)
	for i := range n.Chains {
		c := &n.Chains[i]
		c.Rules = slices.DeleteFunc(slices.Clone(c.Rules), unknown)
	}
	n.Strange = nil
	return n
}

// isStrange reports whether something of a set was not understood.
func (n Native) isStrange(s NativeSet) bool {
	return s.Type == "" || slices.ContainsFunc(n.Strange, func(what string) bool { return strings.HasPrefix(what, "set "+s.Name+": ") })
}

func (n Native) looksIntoStrange(m NativeMatch) bool {
	s, _ := n.set(m.Set)
	return m.Set != "" && n.isStrange(s)
}

// Others are what Known leaves out, in words, such as "a rule of chain nat.OUTPUT: tcp
// option".
func (n Native) Others() []string {
	out := slices.Clone(n.Strange)
	for _, c := range n.Chains {
		for _, r := range c.Rules {
			switch {
			case r.Unknown != "":
				out = append(out, fmt.Sprintf("a rule of chain %s: %s", c.Name, r.Unknown))
			case slices.ContainsFunc(r.Matches, n.looksIntoStrange):
				out = append(out, fmt.Sprintf("a rule of chain %s: %s", c.Name, r))
			}
		}
	}
	return out
}

// only is the family that every rule is for, but for a record, which no packet meets;
// or 0.
func (n Native) only() (f Family) {
	for _, c := range n.Chains {
		for i := range c.Rules {
			g := c.Rules[i].family()
			if g == 0 && c.Rules[i].isRecord() {
				continue
			}
			if g == 0 || f != 0 && f != g {
				return 0
			}
			f = g
		}
	}
	return f
}

// isRecord reports whether the rule is one whose text is data (Rule.Record).
func (r *NativeRule) isRecord() bool {
	_, returns := r.Action.(Return)
	return !r.Counted && returns && len(r.Matches) == 0 && r.Comment != ""
}

// family is the one that the rule is for, or 0.
func (r NativeRule) family() Family {
	for _, m := range r.Matches {
		if m.Key == KeyFamily && !m.Not && len(m.First) == 1 {
			for f, number := range nativeFamilies {
				if number == m.First[0] {
					return f
				}
			}
		}
	}
	return 0
}

// addChain adds one to the Set, and reports whether its name is that of one.
func (n Native) addChain(out *Set, c *NativeChain) bool {
	t, name, _ := strings.Cut(c.Name, ".")
	table := Table(t)
	if !slices.Contains(tableOrder[:], table) || !isHook(table, name) && !validName(name) || (c.Hook != "") != isHook(table, name) {
		return false
	}
	list := make([]Rule, 0, len(c.Rules))
	one := func(i int) Rule {
		r := n.rule(&c.Rules[i])
		if f := c.Rules[i].family(); f != 0 && out.Only == 0 && c.Rules[i].Unknown == "" {
			r.limit(f)
		}
		return r
	}
	for i := 0; i < len(c.Rules); i++ {
		r := one(i)
		if i+1 < len(c.Rules) && c.Rules[i].family() == IPv4 && c.Rules[i+1].family() == IPv6 {
			if both, ok := excepting(r, one(i+1)); ok {
				r, i = both, i+1
			}
		}
		list = append(list, r)
	}
	if c.Hook == "" {
		out.Chains = append(out.Chains, Chain{Table: table, Name: name, Rules: list})
		return true
	}
	b := BaseChain{Table: table, Hook: c.Hook, Place: First, Rules: list}
	kind, priority := nativeBase(b)
	if c.Priority != priority {
		b.Place = Last
		_, priority = nativeBase(b)
	}
	if kind != c.Type || priority != c.Priority || name != string(c.Hook) {
		b.Rules = append([]Rule{unknown(fmt.Sprintf("type %s hook %s priority %d", c.Type, strings.ToLower(string(c.Hook)), c.Priority))}, b.Rules...)
	}
	out.Bases = append(out.Bases, b)
	return true
}

func unknown(what string) Rule {
	return Rule{Matches: []Match{Opaque{what}}, Action: Opaque{what}}
}

// rule turns one back, but for the family that it is for.
func (n Native) rule(r *NativeRule) Rule {
	out := Rule{Action: r.Action, Why: r.Comment, Counter: r.Counter}
	if r.Unknown != "" {
		u := unknown(r.Unknown)
		u.Why, u.Counter = r.Comment, r.Counter
		return u
	}
	if r.isRecord() {
		out.Record, out.Why = true, strings.ReplaceAll(r.Comment, "'", `"`)
	}
	switch a := r.Action.(type) {
	case Jump:
		out.Action = Jump{unqualified(a.Chain)}
	case Goto:
		out.Action = Goto{unqualified(a.Chain)}
	}
	for _, m := range r.Matches {
		if m.Key != KeyFamily {
			out.Matches = append(out.Matches, n.match(m))
		}
	}
	out.Normalize()
	return out
}

// limit makes a rule one of a family alone, where its addresses do not.
func (r *Rule) limit(f Family) {
	src, dst := addressesOf(*r)
	switch every := []netip.Prefix{everywhere(f)}; {
	case src != nil && !src.Not || dst != nil && !dst.Not:
		return
	case src == nil:
		r.Matches = append(r.Matches, Source{Prefixes: every})
	case dst == nil:
		r.Matches = append(r.Matches, Destination{Prefixes: every})
	default:
		r.Matches = append(r.Matches, Opaque{"meta nfproto " + strings.ToLower(f.String())})
	}
	r.Normalize()
}

func addressesOf(r Rule) (src *Source, dst *Destination) {
	for _, m := range r.Matches {
		switch m := m.(type) {
		case Source:
			src = &m
		case Destination:
			dst = &m
		}
	}
	return src, dst
}

// excepting makes one rule of the two, for IPv4 and for IPv6, that a rule becomes which
// excepts addresses; ok is whether they are that. Apart they would not say that they are
// of one family.
func excepting(a, b Rule) (out Rule, ok bool) {
	plain := func(r Rule) []Match {
		return slices.DeleteFunc(slices.Clone(r.Matches), func(m Match) bool {
			_, limited := m.(Opaque)
			return m.rank() <= Destination{}.rank() || limited
		})
	}
	out = Rule{Action: a.Action, Why: a.Why, Matches: plain(a), Counter: Counter{a.Counter.Packets + b.Counter.Packets, a.Counter.Bytes + b.Counter.Bytes}}
	if q := (Rule{Action: b.Action, Why: b.Why, Matches: plain(b)}); !q.Equal(out) {
		return Rule{}, false
	}
	srcA, dstA := addressesOf(a)
	srcB, dstB := addressesOf(b)
	excepts := false
	join := func(p, q *Source) (*Source, bool) {
		whole := func(m *Source) bool { return m == nil || len(m.Prefixes) == 1 && m.Prefixes[0].Bits() == 0 && !m.Not }
		switch {
		case whole(p) && whole(q):
			return nil, true
		case whole(p) && q.Not:
			excepts = true
			return q, true
		case whole(q) && p.Not:
			excepts = true
			return p, true
		case whole(p):
			p = &Source{Prefixes: []netip.Prefix{everywhere(IPv4)}}
		case whole(q):
			q = &Source{Prefixes: []netip.Prefix{everywhere(IPv6)}}
		}
		excepts = excepts || p.Not
		return &Source{slices.Concat(p.Prefixes, q.Prefixes), p.Not}, p.Not == q.Not
	}
	src, ok1 := join(srcA, srcB)
	dst, ok2 := join((*Source)(dstA), (*Source)(dstB))
	if src != nil {
		out.Matches = append(out.Matches, *src)
	}
	if dst != nil {
		out.Matches = append(out.Matches, Destination(*dst))
	}
	out.Normalize()
	return out, ok1 && ok2 && excepts
}

func unqualified(name string) string {
	_, name, _ = strings.Cut(name, ".")
	return name
}

func everywhere(f Family) netip.Prefix {
	if f == IPv6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

// match turns one back; what none of ours is becomes Opaque.
func (n Native) match(m NativeMatch) Match {
	strange := func() Match { return Opaque{string(m.append(nil, 0))} }
	if len(m.First) == 0 && m.Set == "" && m.Key != KeyCTState {
		return strange()
	}
	switch m.Key {
	case KeySource4, KeySource6:
		if ps := n.prefixesOf(m); ps != nil {
			return Source{ps, m.Not}
		}
	case KeyDestination4, KeyDestination6:
		if ps := n.prefixesOf(m); ps != nil {
			return Destination{ps, m.Not}
		}
	case KeyInInterface:
		return InInterface{interfaceOf(m.First), m.Not}
	case KeyOutInterface:
		return OutInterface{interfaceOf(m.First), m.Not}
	case KeyProtocol:
		if !m.Not {
			return Protocol(m.First[0])
		}
	case KeyTCPFlags:
		if m.First[0] == synBit && bytes.Equal(m.Mask, []byte{synMask}) {
			return SYN{m.Not}
		}
	case KeySourcePort:
		if s := spansOf[uint16](n.elements(m)); s != nil {
			return SourcePorts{Ports{s}, m.Not}
		}
	case KeyDestinationPort:
		if s := spansOf[uint16](n.elements(m)); s != nil {
			return DestinationPorts{Ports{s}, m.Not}
		}
	case KeyUID:
		if s := spansOf[uint32](n.elements(m)); s != nil {
			return OwnerUID{UIDs{s}, m.Not}
		}
	case KeyGID:
		if s := spansOf[uint32](n.elements(m)); s != nil {
			return OwnerGID{UIDs{s}, m.Not}
		}
	case KeySourceType:
		if bytes.Equal(m.First, be32(rtnLocal)) {
			return SourceLocal{m.Not}
		}
	case KeyDestinationType:
		if bytes.Equal(m.First, be32(rtnLocal)) {
			return DestinationLocal{m.Not}
		}
	case KeyCTState:
		if s := statesOf(m.Mask); s != "" {
			return CTState{s, m.Not}
		}
	case KeyMark:
		mask := uint32(allBits)
		if len(m.Mask) == 4 {
			mask = binary.BigEndian.Uint32(m.Mask)
		}
		return Mark{binary.BigEndian.Uint32(m.First), mask, m.Not}
	}
	return strange()
}

// elements are the ranges that a match is about; nil if they are no ranges.
func (n Native) elements(m NativeMatch) []NativeRange {
	switch {
	case m.Set != "":
		s, _ := n.set(m.Set)
		if s.Type != m.Key.SetType() {
			return nil
		}
		return s.Elements
	case m.Mask != nil:
		r := NativeRange{slices.Clone(m.First), slices.Clone(m.First)}
		for i := range m.Mask {
			r.Last[i] |= ^m.Mask[i]
		}
		return []NativeRange{r}
	case m.Last != nil:
		return []NativeRange{{m.First, m.Last}}
	}
	return []NativeRange{{m.First, m.First}}
}

// prefixesOf are the addresses that a match is about; nil if they are no prefixes.
func (n Native) prefixesOf(m NativeMatch) (out []netip.Prefix) {
	for _, r := range n.elements(m) {
		p, ok := r.prefix()
		if !ok {
			return nil
		}
		out = append(out, p)
	}
	return out
}

// prefix is the one that the range is, if it is one.
func (r NativeRange) prefix() (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(r.First)
	if !ok || len(r.Last) != len(r.First) {
		return netip.Prefix{}, false
	}
	bits := 0
	for bits < a.BitLen() && (r.First[bits/8]^r.Last[bits/8])&(0x80>>(bits%8)) == 0 {
		bits++
	}
	p := netip.PrefixFrom(a, bits)
	q := prefixRange(p)
	return p, bytes.Equal(q.First, r.First) && bytes.Equal(q.Last, r.Last)
}

func spansOf[T uint16 | uint32](ranges []NativeRange) spans[T] {
	out := make([]span[T], 0, len(ranges))
	size := binary.Size(T(0))
	for _, r := range ranges {
		if len(r.First) != size || len(r.Last) != size {
			return nil
		}
		first, last := numberOf(r.First), numberOf(r.Last)
		if first > last {
			return nil
		}
		out = append(out, span[T]{T(first), T(last)})
	}
	return mergeSpans(out)
}

func numberOf(b []byte) (n uint64) {
	for _, c := range b {
		n = n<<8 | uint64(c)
	}
	return n
}

func interfaceOf(b []byte) string {
	if begin, ok := strings.CutSuffix(string(b), "*"); ok {
		return begin + "+"
	}
	return string(b)
}

// statesOf names the bits, or is empty where one has no name.
func statesOf(mask []byte) string {
	bits := numberOf(mask)
	var names []string
	for name, bit := range nativeStates {
		if bits&uint64(bit) != 0 {
			names = append(names, name)
			bits &^= uint64(bit)
		}
	}
	if bits != 0 {
		return ""
	}
	slices.SortFunc(names, cmp.Compare[string])
	return strings.Join(names, ",")
}
