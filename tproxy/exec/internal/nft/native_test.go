package nft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
func num(v uint32) []byte  { return binary.BigEndian.AppendUint32(nil, v) }

func proto(p byte) rules.NativeMatch {
	return rules.NativeMatch{Key: rules.KeyProtocol, First: []byte{p}}
}

func family(p byte) rules.NativeMatch {
	return rules.NativeMatch{Key: rules.KeyFamily, First: []byte{p}}
}

// everything is a table with each set, match and action that there is, of the text
// that nft(8) takes.
func everything() *rules.Native {
	const none = ""
	n := &rules.Native{Table: "mine", Sets: []rules.NativeSet{
		{Name: "gids", Type: "gid", Elements: []rules.NativeRange{{First: num(7), Last: num(7)}, {First: num(1000), Last: num(1<<32 - 1)}}},
		{Name: "ports", Type: "inet_service", Elements: []rules.NativeRange{
			{First: be16(0), Last: be16(2)}, {First: be16(80), Last: be16(80)}, {First: be16(60000), Last: be16(65535)}}},
		{Name: "uids", Type: "uid", Elements: []rules.NativeRange{{First: num(5678), Last: num(5678)}, {First: num(6000), Last: num(6009)}}},
		{Name: "v4", Type: "ipv4_addr", Elements: []rules.NativeRange{
			{First: []byte{10, 0, 0, 0}, Last: []byte{10, 255, 255, 255}}, {First: []byte{192, 0, 2, 1}, Last: []byte{192, 0, 2, 1}}}},
		{Name: "v6", Type: "ipv6_addr", Elements: []rules.NativeRange{
			{First: append([]byte{0xfd}, make([]byte, 15)...), Last: append([]byte{0xfd}, bytes.Repeat([]byte{0xff}, 15)...)},
			{First: bytes.Repeat([]byte{0xff}, 16), Last: bytes.Repeat([]byte{0xff}, 16)}}},
	}}
	key := func(k rules.NativeKey, first []byte) rules.NativeMatch {
		return rules.NativeMatch{Key: k, First: first}
	}
	masked := func(k rules.NativeKey, first, mask []byte) rules.NativeMatch {
		return rules.NativeMatch{Key: k, First: first, Mask: mask}
	}
	between := func(k rules.NativeKey, first, last []byte) rules.NativeMatch {
		return rules.NativeMatch{Key: k, First: first, Last: last}
	}
	in := func(k rules.NativeKey, set string) rules.NativeMatch { return rules.NativeMatch{Key: k, Set: set} }
	not := func(m rules.NativeMatch) rules.NativeMatch { m.Not = true; return m }
	rule := func(a rules.Action, comment string, ms ...rules.NativeMatch) rules.NativeRule {
		return rules.NativeRule{Matches: ms, Counted: true, Action: a, Comment: comment}
	}
	six := func(s ...byte) []byte { return append(s, make([]byte, 16-len(s))...) }
	n.Chains = []rules.NativeChain{
		{Name: "raw.OUTPUT", Type: "filter", Hook: rules.Output, Priority: -300, Rules: []rules.NativeRule{
			rule(rules.CTZone{Zone: 0x1234}, "a zone", proto(17), key(rules.KeyUID, num(5678)), key(rules.KeyDestinationPort, be16(53))),
			rule(rules.NoTrack{}, none, key(rules.KeyOutInterface, []byte("lo"))),
			rule(rules.SetMark{Value: 0x10203, Mask: 0xff0f0f0f}, none, masked(rules.KeyMark, num(0x100), num(0xf00))),
			rule(rules.SetMark{Value: 0x15, Mask: 1<<32 - 1}, none, key(rules.KeyMark, num(0x1020304))),
			rule(rules.SetMark{Value: 0x15, Mask: 0}, none, not(masked(rules.KeyMark, num(0x100), num(0xf00)))),
		}},
		{Name: "filter.INPUT", Type: "filter", Hook: rules.Input, Rules: []rules.NativeRule{
			rule(rules.Drop{}, "invalid", proto(6), rules.NativeMatch{Key: rules.KeyCTState, Mask: num(1)}),
			rule(rules.Drop{}, none, rules.NativeMatch{Key: rules.KeyCTState, Mask: num(0x4a)}),
			rule(rules.Accept{}, none, rules.NativeMatch{Key: rules.KeyCTState, Not: true, Mask: num(8)}),
			rule(rules.Accept{}, none, rules.NativeMatch{Key: rules.KeyCTState, Not: true, Mask: num(0x0a)}),
			{Action: rules.Return{}, Comment: "not counted"},
		}},
		{Name: "mangle.OUTPUT", Type: "route", Hook: rules.Output, Priority: -150},
		{Name: "mangle.FORWARD", Type: "filter", Hook: rules.Forward, Priority: -150},
		{Name: "mangle.POSTROUTING", Type: "filter", Hook: rules.Postrouting, Priority: 1<<31 - 1},
		{Name: "nat.PREROUTING", Type: "nat", Hook: rules.Prerouting, Priority: -101, Rules: []rules.NativeRule{
			rule(rules.Jump{Chain: "nat.OTHER"}, "a jump", proto(6), masked(rules.KeyTCPFlags, []byte{2}, []byte{0x17}), key(rules.KeyDestinationType, num(2))),
			rule(rules.Goto{Chain: "nat.OTHER"}, none, not(key(rules.KeySourceType, num(2))), not(key(rules.KeyInInterface, []byte("eth*")))),
		}},
		{Name: "nat.OTHER", Rules: []rules.NativeRule{
			rule(rules.Return{}, none, proto(6), in(rules.KeyDestinationPort, "ports")),
			rule(rules.Return{}, none, proto(17), not(in(rules.KeySourcePort, "ports"))),
			rule(rules.Return{}, none, proto(6), between(rules.KeySourcePort, be16(80), be16(90)), not(between(rules.KeyDestinationPort, be16(80), be16(90)))),
			rule(rules.Return{}, none, in(rules.KeyUID, "uids"), not(in(rules.KeyGID, "gids"))),
			rule(rules.Return{}, none, between(rules.KeyUID, num(5), num(10)), not(between(rules.KeyGID, num(5), num(10))), not(key(rules.KeyGID, num(5)))),
			rule(rules.Return{}, none, family(2), in(rules.KeySource4, "v4"), not(in(rules.KeyDestination4, "v4"))),
			rule(rules.Return{}, none, family(10), not(in(rules.KeySource6, "v6")), in(rules.KeyDestination6, "v6")),
			rule(rules.Return{}, none, family(2), masked(rules.KeySource4, []byte{127, 0, 0, 0}, []byte{255, 0, 0, 0}),
				not(masked(rules.KeyDestination4, []byte{10, 0, 128, 0}, []byte{255, 255, 128, 0}))),
			rule(rules.Return{}, none, family(10), masked(rules.KeySource6, six(0xfd), six(0xff)), not(masked(rules.KeyDestination6, six(0x20, 0x80), six(0xff, 0xe0)))),
			rule(rules.Return{}, none, family(2), key(rules.KeyDestination4, []byte{127, 0, 0, 6}), not(key(rules.KeySource4, []byte{127, 0, 0, 1}))),
			rule(rules.Accept{}, none, key(rules.KeyInInterface, []byte("fifteen-bytes-x")), proto(132)),
			rule(rules.Redirect{Port: 15006}, "the end", proto(6)),
		}},
	}
	return n
}

// natives draws tables that the kernel takes: what redirects is reached from NAT alone,
// and no chain leads back.
func natives() *rapid.Generator[*rules.Native] {
	return rapid.Custom(func(t *rapid.T) *rules.Native {
		n := &rules.Native{Table: "mine"}
		for i := range rapid.IntRange(0, 4).Draw(t, "sets") {
			key := rapid.SampledFrom([]rules.NativeKey{rules.KeySourcePort, rules.KeyUID, rules.KeyGID, rules.KeySource4, rules.KeySource6}).Draw(t, "type")
			n.Sets = append(n.Sets, rules.NativeSet{Name: fmt.Sprintf("s%d", i), Type: key.SetType(), Elements: drawRanges(t, key.Size())})
		}
		for i, c := range []rules.NativeChain{
			{Name: "nat", Type: "nat", Hook: rules.Prerouting, Priority: -101}, {Name: "out", Type: "nat", Hook: rules.Output, Priority: -101},
			{Name: "filter", Type: "filter", Hook: rules.Input}, {Name: "raw", Type: "filter", Hook: rules.Output, Priority: -300},
			{Name: "A"}, {Name: "B"}, {Name: "C"},
		} {
			if i < 4 && rapid.Bool().Draw(t, "no "+c.Name) {
				continue
			}
			nat := c.Type != "filter" // chains of no hook are reached from those of nat alone
			var targets []string
			if nat {
				targets = []string{"A", "B", "C"}[max(0, i-3):]
			}
			for range rapid.IntRange(0, 4).Draw(t, "rules of "+c.Name) {
				c.Rules = append(c.Rules, drawRule(t, n.Sets, targets, nat))
			}
			n.Chains = append(n.Chains, c)
		}
		return n
	})
}

// drawRanges draws ranges of numbers of a size: sorted, none next to another.
func drawRanges(t *rapid.T, size int) (out []rules.NativeRange) {
	limit := []byte{0, 1, 2, 3, 0x7f, 0x80, 0xfd, 0xfe, 0xff}
	number := rapid.Custom(func(t *rapid.T) string {
		b := make([]byte, size)
		for i := range b {
			b[i] = rapid.OneOf(rapid.SampledFrom(limit), rapid.Byte()).Draw(t, "byte")
		}
		return string(b)
	})
	edges := rapid.SliceOfNDistinct(rapid.OneOf(number, rapid.Just(string(make([]byte, size))), rapid.Just(string(bytes.Repeat([]byte{0xff}, size)))), 2, 12, rapid.ID).Draw(t, "edges")
	slices.Sort(edges)
	for len(edges) > 0 {
		r := rules.NativeRange{First: []byte(edges[0]), Last: []byte(edges[0])}
		edges = edges[1:]
		if len(edges) > 0 && rapid.Bool().Draw(t, "a range") {
			r.Last = []byte(edges[0])
			edges = edges[1:]
		}
		after := bytes.Clone(r.Last)
		increment(after)
		if len(edges) > 0 && edges[0] == string(after) {
			edges = edges[1:]
		}
		out = append(out, r)
	}
	return out
}

func drawRule(t *rapid.T, sets []rules.NativeSet, targets []string, nat bool) rules.NativeRule {
	r := rules.NativeRule{Counted: rapid.Bool().Draw(t, "counted")}
	for range rapid.IntRange(0, 4).Draw(t, "matches") {
		r.Matches = append(r.Matches, drawMatch(t, sets)...)
	}
	bits := rapid.SampledFrom([]uint32{0, 1, 0x4000, 0x01020304, 1<<32 - 1})
	actions := []rules.Action{rules.Nothing{}, rules.Return{}, rules.Accept{}, rules.Drop{}, rules.NoTrack{},
		rules.CTZone{Zone: rapid.Uint16().Draw(t, "zone")}, rules.SetMark{Value: bits.Draw(t, "value"), Mask: bits.Draw(t, "mask")}}
	if nat {
		actions = append(actions, rules.Redirect{Port: rapid.Uint16().Draw(t, "port")}, rules.Redirect{})
		// The kernel asks who redirects for the transport's header.
		r.Matches = append([]rules.NativeMatch{proto(6)}, r.Matches...)
	}
	for _, target := range targets {
		actions = append(actions, rules.Jump{Chain: target}, rules.Goto{Chain: target})
	}
	r.Action = rapid.SampledFrom(actions).Draw(t, "action")
	r.Comment = rapid.StringOfN(rapid.RuneFrom([]rune(` !"#'\azé`)), 0, -1, rules.MaxNativeComment).Draw(t, "comment")
	return r
}

func drawMatch(t *rapid.T, sets []rules.NativeSet) []rules.NativeMatch {
	m := rules.NativeMatch{Not: rapid.Bool().Draw(t, "not")}
	var keys []rules.NativeKey
	for k := rules.NativeKey(1); k.Size() > 0; k++ {
		keys = append(keys, k)
	}
	m.Key = rapid.SampledFrom(keys).Draw(t, "key")
	ms := guards(t, m.Key)
	bytesOf := func(label string) []byte {
		return rapid.SliceOfN(rapid.Byte(), m.Key.Size(), m.Key.Size()).Draw(t, label)
	}
	switch m.Key {
	case rules.KeyInInterface, rules.KeyOutInterface:
		m.First = []byte(rapid.SampledFrom([]string{"lo", "eth*", "fifteen-bytes-x", "fifteen-bytes-x*", "a*"}).Draw(t, "name"))
		return append(ms, m)
	case rules.KeyCTState:
		m.Mask = num(rapid.Uint32Range(1, 127).Draw(t, "states"))
		return append(ms, m)
	}
	var fit []string
	for _, s := range sets {
		if s.Type == m.Key.SetType() {
			fit = append(fit, s.Name)
		}
	}
	form := rapid.IntRange(0, 3).Draw(t, "form")
	switch m.Key {
	case rules.KeyFamily, rules.KeyProtocol:
		m.Not, form = false, 0
	case rules.KeySourceType, rules.KeyDestinationType:
		form = 0
	case rules.KeyTCPFlags:
		form = 1
	case rules.KeyMark:
		form = min(form, 1)
	}
	switch {
	case form == 1 && (m.Key == rules.KeyMark || m.Key == rules.KeyTCPFlags):
		m.First, m.Mask = bytesOf("first"), bytesOf("mask")
		m.Mask[0] &^= 1 // one of all bits is none
	case form == 1 && m.Key.Address():
		m.First, m.Mask = bytesOf("first"), make([]byte, m.Key.Size())
		for i := range rapid.IntRange(1, 8*len(m.Mask)-1).Draw(t, "bits") {
			m.Mask[i/8] |= 0x80 >> (i % 8)
		}
		if rapid.Bool().Draw(t, "masked") {
			for i := range m.First {
				m.First[i] &= m.Mask[i]
			}
		}
	case form == 2:
		m.First, m.Last = bytesOf("first"), bytesOf("last")
		if bytes.Compare(m.First, m.Last) > 0 {
			m.First, m.Last = m.Last, m.First
		}
	case form == 3 && len(fit) > 0:
		m.Set = rapid.SampledFrom(fit).Draw(t, "set")
	default:
		m.First = bytesOf("value")
	}
	return append(ms, m)
}

// guards are the matches without which nobody can say what the key is.
func guards(t *rapid.T, k rules.NativeKey) []rules.NativeMatch {
	switch k {
	case rules.KeySource4, rules.KeyDestination4:
		return []rules.NativeMatch{family(2)}
	case rules.KeySource6, rules.KeyDestination6:
		return []rules.NativeMatch{family(10)}
	case rules.KeyTCPFlags:
		return []rules.NativeMatch{proto(6)}
	case rules.KeySourcePort, rules.KeyDestinationPort:
		return []rules.NativeMatch{proto(rapid.SampledFrom([]byte{6, 17, 33, 132, 136}).Draw(t, "protocol"))}
	}
	return nil
}

// TestNatives shows what is drawn, so that nothing is missing unseen.
func TestNatives(t *testing.T) {
	seen := map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		for _, c := range natives().Draw(t, "table").Chains {
			for _, r := range c.Rules {
				seen[fmt.Sprintf("%T", r.Action)]++
				for _, m := range r.Matches {
					seen[fmt.Sprintf("key %d", m.Key)]++
					if m.Set != "" {
						seen["a look-up"]++
					}
				}
			}
		}
	})
	for k := rules.NativeKey(1); k.Size() > 0; k++ {
		if loads[k].expr == "" {
			t.Errorf("no way to load key %d", k)
		}
		if seen[fmt.Sprintf("key %d", k)] == 0 {
			t.Errorf("key %d is never drawn", k)
		}
	}
	for _, what := range []string{"a look-up", "rules.Nothing", "rules.Return", "rules.Accept", "rules.Drop", "rules.NoTrack",
		"rules.CTZone", "rules.SetMark", "rules.Redirect", "rules.Jump", "rules.Goto"} {
		if seen[what] == 0 {
			t.Errorf("%s is never drawn", what)
		}
	}
}
