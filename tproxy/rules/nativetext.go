package rules

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// NFTables returns the Set as text for nft -f: a table of that name of the family
// inet. It panics where Native does, and where that is an error.
func (s Set) NFTables(table string) []byte {
	n, err := s.Native(table)
	if err != nil {
		panic(err)
	}
	return n.Text()
}

// Text returns the table as nft(8) reads it. Fed to nft -f where there is no such table
// it makes this one.
func (n Native) Text() []byte {
	b := fmt.Appendf(nil, "table inet %s {\n", n.Table)
	for i, s := range n.Sets {
		if i > 0 {
			b = append(b, '\n')
		}
		b = fmt.Appendf(b, "\tset %s {\n\t\ttype %s\n\t\tflags interval\n", s.Name, s.Type)
		if len(s.Elements) > 0 { // nft(8) reads no empty braces
			b = append(s.appendElements(append(b, "\t\telements = { "...)), " }\n"...)
		}
		b = append(b, "\t}\n"...)
	}
	for i, c := range n.Chains {
		if i > 0 || len(n.Sets) > 0 {
			b = append(b, '\n')
		}
		b = fmt.Appendf(b, "\tchain %s {\n", c.Name)
		if c.Hook != "" {
			b = append(append(append(b, "\t\t"...), c.head()...), '\n')
		}
		for _, r := range c.Rules {
			b = append(r.append(append(b, "\t\t"...)), '\n')
		}
		b = append(b, "\t}\n"...)
	}
	return append(b, "}\n"...)
}

// head is the line of a base chain.
func (c NativeChain) head() string {
	return fmt.Sprintf("type %s hook %s priority %d; policy accept;", c.Type, strings.ToLower(string(c.Hook)), c.Priority)
}

// NativeScript returns the commands as text for nft -f, a line for each: the line of a
// command is its number, counted from 1.
func NativeScript(commands []NativeCommand) []byte {
	var b []byte
	for _, c := range commands {
		b = append(append(b, c.String()...), '\n')
	}
	return b
}

// String returns the command as nft(8) writes it.
func (c NativeCommand) String() string {
	switch c.Verb {
	case AddTable:
		return "add table inet " + c.Table
	case DeleteTable:
		return "delete table inet " + c.Table
	case AddSet:
		b := fmt.Appendf(nil, "add set inet %s %s { type %s; flags interval; ", c.Table, c.Set.Name, c.Set.Type)
		if len(c.Set.Elements) > 0 {
			b = append(c.Set.appendElements(append(b, "elements = { "...)), " }; "...)
		}
		return string(append(b, '}'))
	case DeleteSet:
		return fmt.Sprintf("delete set inet %s %s", c.Table, c.Set.Name)
	case AddChain:
		if c.Chain.Hook == "" {
			return fmt.Sprintf("add chain inet %s %s", c.Table, c.Chain.Name)
		}
		return fmt.Sprintf("add chain inet %s %s { %s }", c.Table, c.Chain.Name, c.Chain.head())
	case FlushChain:
		return fmt.Sprintf("flush chain inet %s %s", c.Table, c.Chain.Name)
	case DeleteChain:
		return fmt.Sprintf("delete chain inet %s %s", c.Table, c.Chain.Name)
	case AddRule:
		return string(c.Rule.append(fmt.Appendf(nil, "add rule inet %s %s ", c.Table, c.Chain.Name)))
	}
	return fmt.Sprintf("NativeVerb(%d)", c.Verb)
}

// String returns the rule as nft(8) writes it behind the chain's name.
func (r NativeRule) String() string { return string(r.append(nil)) }

func (r NativeRule) append(b []byte) []byte {
	if r.Unknown != "" {
		return append(b, r.Unknown...)
	}
	var proto Protocol
	start := len(b)
	space := func() {
		if len(b) > start {
			b = append(b, ' ')
		}
	}
	for _, m := range r.Matches {
		if m.Key == KeyProtocol && len(m.First) == 1 {
			proto = Protocol(m.First[0])
		}
		space()
		b = m.append(b, proto)
	}
	if r.Counted {
		space()
		b = append(b, "counter"...)
	}
	if a := nativeAction(r.Action); a != "" {
		space()
		b = append(b, a...)
	}
	if r.Comment != "" {
		space()
		b = append(append(append(b, `comment "`...), r.Comment...), '"')
	}
	return b
}

func nativeAction(a Action) string {
	switch a := a.(type) {
	case Return:
		return "return"
	case Accept:
		return "accept"
	case Drop:
		return "drop"
	case Jump:
		return "jump " + a.Chain
	case Goto:
		return "goto " + a.Chain
	case Redirect:
		return "redirect to :" + strconv.Itoa(int(a.Port))
	case CTZone:
		return "ct zone set " + strconv.Itoa(int(a.Zone))
	case NoTrack:
		return "notrack"
	case SetMark:
		return fmt.Sprintf("meta mark set meta mark & 0x%08x ^ 0x%08x", ^a.Mask, a.Value)
	}
	return "" // Nothing
}

// append writes the match; proto is the protocol that a match before it has named.
func (m NativeMatch) append(b []byte, proto Protocol) []byte {
	name := nativeKeys[m.Key].text
	if proto == TCP || proto == UDP {
		name = strings.Replace(name, "th ", proto.String()+" ", 1)
	}
	b = append(b, name...)
	equal, unequal := " ", " "+m.Key.unequal()+" "
	if m.Mask != nil && m.Key != KeyCTState && !m.isPrefix() {
		b = append(append(b, " & "...), m.Key.text(m.Mask, true)...)
		equal = " == "
	}
	if m.Not {
		b = append(b, unequal...)
	} else {
		b = append(b, equal...)
	}
	switch {
	case m.Set != "":
		return append(append(b, '@'), m.Set...)
	case m.Key == KeyCTState:
		return append(b, strings.ToLower(statesOf(m.Mask))...)
	case m.isPrefix():
		bits := 0
		for _, c := range m.Mask {
			for ; c&0x80 != 0; c <<= 1 {
				bits++
			}
		}
		b = append(b, m.Key.text(m.First, false)...)
		return strconv.AppendInt(append(b, '/'), int64(bits), 10)
	}
	b = append(b, m.Key.text(m.First, false)...)
	if m.Last != nil {
		b = append(append(b, '-'), m.Key.text(m.Last, false)...)
	}
	return b
}

// unequal is how nft(8) writes that the key has another value, and of the states of a
// connection that it has none of them: "!=" would compare with all of their bits.
func (k NativeKey) unequal() string {
	if k == KeyCTState {
		return "!"
	}
	return "!="
}

// isPrefix reports whether the match is about a prefix of addresses.
func (m NativeMatch) isPrefix() bool { return m.Mask != nil && m.Key.Address() }

// text writes a value, or the mask of one.
func (k NativeKey) text(v []byte, mask bool) string {
	switch k {
	case KeyFamily:
		if i := slices.Index(v, nativeFamilies[IPv6]); i == 0 {
			return "ipv6"
		}
		return "ipv4"
	case KeyProtocol:
		if p := Protocol(v[0]); p == TCP || p == UDP {
			return p.String()
		}
	case KeyInInterface, KeyOutInterface:
		return `"` + string(v) + `"`
	case KeySource4, KeySource6, KeyDestination4, KeyDestination6:
		a, _ := netip.AddrFromSlice(v)
		return a.String()
	case KeyTCPFlags:
		switch {
		case mask && bytes.Equal(v, []byte{synMask}):
			return "(fin | syn | rst | ack)"
		case bytes.Equal(v, []byte{synBit}):
			return "syn"
		}
		return fmt.Sprintf("%#02x", v[0])
	case KeySourceType, KeyDestinationType:
		if bytes.Equal(v, be32(rtnLocal)) {
			return "local"
		}
	case KeyMark:
		return fmt.Sprintf("0x%08x", binary.BigEndian.Uint32(v))
	}
	return strconv.FormatUint(numberOf(v), 10)
}

// appendElements writes the ranges of a set.
func (s NativeSet) appendElements(b []byte) []byte {
	addresses := s.Type == KeySource4.SetType() || s.Type == KeySource6.SetType()
	one := func(v []byte) []byte {
		if a, ok := netip.AddrFromSlice(v); addresses && ok {
			return a.AppendTo(b)
		}
		return strconv.AppendUint(b, numberOf(v), 10)
	}
	for i, r := range s.Elements {
		if i > 0 {
			b = append(b, ", "...)
		}
		b = one(r.First)
		if bytes.Equal(r.First, r.Last) {
			continue
		}
		if p, ok := r.prefix(); addresses && ok {
			b = strconv.AppendInt(append(b, '/'), int64(p.Bits()), 10)
			continue
		}
		b = append(b, '-')
		b = one(r.Last)
	}
	return b
}
