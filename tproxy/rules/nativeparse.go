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

// ParseNative reads what Native.Text writes, and what a person made of it with other
// spaces; it is no parser of all that nft(8) reads. The error names the line.
func ParseNative(text []byte) (Native, error) {
	p := nativeParser{}
	for i, line := range strings.Split(string(text), "\n") {
		words, err := nativeWords(line)
		if err == nil && !isPrintable(strings.ReplaceAll(line, "\t", " ")) {
			err = fmt.Errorf("%q holds more than printable ASCII", line)
		}
		if err == nil && len(words) > 0 {
			err = p.line(words)
		}
		if err != nil {
			return Native{}, fmt.Errorf("line %d: %w", i+1, err)
		}
	}
	if p.in != "" || p.Table == "" {
		return Native{}, fmt.Errorf("the text ends within its table, or has none")
	}
	return p.Native, nil
}

// nativeParser reads a table line by line; in is what it stands in: "", table, set,
// chain.
type nativeParser struct {
	Native
	in   string
	done bool
}

// nativeWords splits a line: what stands in quotation marks is one word, with them, and
// so are brackets with what is between.
func nativeWords(line string) (out []string, err error) {
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimLeft(line, " \t") {
		end := strings.IndexAny(line, " \t")
		switch line[0] {
		case '"':
			if end = strings.IndexByte(line[1:], '"'); end >= 0 {
				end += 2
			}
		case '(':
			if end = strings.IndexByte(line, ')'); end >= 0 {
				end++
			}
		default:
			if end < 0 {
				end = len(line)
			}
		}
		if end < 0 {
			return nil, fmt.Errorf("%q does not end", line)
		}
		out = append(out, line[:end])
		line = line[end:]
	}
	return out, nil
}

// nativeIdentifier reports whether nft(8) reads the name as one (src/scanner.l).
func nativeIdentifier(s string) bool {
	letter := func(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }
	for i, c := range []byte(s) {
		if !letter(c) && (i == 0 || !(c >= '0' && c <= '9' || strings.IndexByte("/\\_.-", c) >= 0)) {
			return false
		}
	}
	return s != ""
}

func (p *nativeParser) line(w []string) error {
	switch {
	case p.done:
		return fmt.Errorf("%q stands behind the table", strings.Join(w, " "))
	case len(w) > 1 && w[len(w)-1] == "{" && !nativeIdentifier(w[len(w)-2]):
		return fmt.Errorf("%q: no name in nftables", w[len(w)-2])
	case p.in == "" && len(w) == 4 && w[0] == "table" && w[1] == "inet" && w[3] == "{":
		p.in, p.Table = "table", w[2]
	case p.in == "table" && len(w) == 3 && w[0] == "set" && w[2] == "{":
		p.in = "set"
		p.Sets = append(p.Sets, NativeSet{Name: w[1]})
	case p.in == "table" && len(w) == 3 && w[0] == "chain" && w[2] == "{":
		p.in = "chain"
		p.Chains = append(p.Chains, NativeChain{Name: w[1]})
	case len(w) == 1 && w[0] == "}":
		p.done = p.in == "table"
		p.in = map[string]string{"set": "table", "chain": "table"}[p.in]
	case p.in == "set":
		return p.set(w)
	case p.in == "chain":
		c := &p.Chains[len(p.Chains)-1]
		if w[0] == "type" {
			return c.parseHead(w)
		}
		r, err := parseNativeRule(w)
		c.Rules = append(c.Rules, r)
		return err
	default:
		return fmt.Errorf("%q: no part of a table of ours", strings.Join(w, " "))
	}
	return nil
}

func (p *nativeParser) set(w []string) error {
	s := &p.Sets[len(p.Sets)-1]
	switch {
	case len(w) == 2 && w[0] == "type":
		s.Type = w[1]
	case len(w) == 2 && w[0] == "flags" && w[1] == "interval":
	case len(w) > 4 && w[0] == "elements" && w[1] == "=" && w[2] == "{" && w[len(w)-1] == "}":
		k := slices.IndexFunc(nativeKeys[:], func(k nativeKey) bool { return k.set == s.Type && s.Type != "" })
		if k < 0 {
			return fmt.Errorf("set %q is of type %q", s.Name, s.Type)
		}
		for _, e := range w[3 : len(w)-1] {
			m := NativeMatch{Key: NativeKey(k)}
			if err := m.parseValue(strings.TrimSuffix(e, ",")); err != nil {
				return err
			}
			s.Elements = append(s.Elements, Native{}.elements(m)...)
		}
	default:
		return fmt.Errorf("%q: no part of a set of ours", strings.Join(w, " "))
	}
	return nil
}

// parseHead reads "type nat hook output priority -101; policy accept;".
func (c *NativeChain) parseHead(w []string) error {
	if len(w) != 8 || w[2] != "hook" || w[4] != "priority" || w[6] != "policy" || w[7] != "accept;" {
		return fmt.Errorf("%q: no head of a chain of ours", strings.Join(w, " "))
	}
	priority, err := strconv.ParseInt(strings.TrimSuffix(w[5], ";"), 10, 32)
	c.Type, c.Hook, c.Priority = w[1], Hook(strings.ToUpper(w[3])), int32(priority)
	if err == nil && !isHook(Mangle, string(c.Hook)) { // mangle has all hooks
		err = fmt.Errorf("%q is no hook", w[3])
	}
	return err
}

func parseNativeRule(w []string) (r NativeRule, err error) {
	for len(w) > 0 {
		n, err := r.parseStatement(w)
		if err != nil {
			return r, err
		}
		w = w[n:]
	}
	if r.Action == nil {
		r.Action = Nothing{}
	}
	return r, nil
}

// parseStatement reads what the words begin with, and returns how many it is.
func (r *NativeRule) parseStatement(w []string) (n int, err error) {
	word := func(i int) string {
		if i < len(w) {
			return w[i]
		}
		return ""
	}
	act := func(a Action, words int) (int, error) {
		if r.Action != nil {
			return 0, fmt.Errorf("%q: a second action", w[0])
		}
		r.Action = a
		return words, nil
	}
	number := func(s string, bits int) uint64 {
		v, e := strconv.ParseUint(s, 0, bits)
		if e != nil && err == nil {
			err = fmt.Errorf("%q: accepted is a number", s)
		}
		return v
	}
	switch w[0] {
	case "counter":
		r.Counted = true
		return 1, nil
	case "comment":
		if len(word(1)) < 2 || word(1)[0] != '"' {
			return 0, fmt.Errorf("a comment without a text")
		}
		r.Comment = word(1)[1 : len(word(1))-1]
		return 2, nil
	case "return":
		return act(Return{}, 1)
	case "accept":
		return act(Accept{}, 1)
	case "drop":
		return act(Drop{}, 1)
	case "notrack":
		return act(NoTrack{}, 1)
	case "jump", "goto":
		if !nativeIdentifier(word(1)) {
			return 0, fmt.Errorf("%s to %q: no name of a chain", w[0], word(1))
		}
		if w[0] == "jump" {
			return act(Jump{word(1)}, 2)
		}
		return act(Goto{word(1)}, 2)
	case "redirect":
		port := number(strings.TrimPrefix(word(2), ":"), 16)
		n, again := act(Redirect{uint16(port)}, 3)
		return min(n, len(w)), firstError(err, again)
	}
	switch {
	case w[0] == "ct" && word(1) == "zone":
		zone := number(word(3), 16)
		n, again := act(CTZone{uint16(zone)}, 4)
		return min(n, len(w)), firstError(err, again)
	case w[0] == "meta" && word(1) == "mark" && word(2) == "set":
		mask, value := number(word(6), 32), number(word(8), 32)
		n, again := act(SetMark{Value: uint32(value), Mask: ^uint32(mask)}, 9)
		return min(n, len(w)), firstError(err, again)
	}
	var m NativeMatch
	if n, err = m.parse(w); err == nil {
		r.Matches = append(r.Matches, m)
	}
	return n, err
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// parse reads the match that the words begin with.
func (m *NativeMatch) parse(w []string) (n int, err error) {
	for k := range nativeKeys {
		key := strings.Fields(nativeKeys[k].text)
		if len(key) == 0 || len(w) <= len(key) {
			continue
		}
		if key[0] == "th" && (w[0] == "tcp" || w[0] == "udp") {
			key[0] = w[0]
		}
		if slices.Equal(w[:len(key)], key) {
			m.Key, n = NativeKey(k), len(key)
		}
	}
	if m.Key == 0 {
		return 0, fmt.Errorf("%q: no match of ours", w[0])
	}
	if w[n] == "&" && n+1 < len(w) {
		mask := NativeMatch{Key: m.Key}
		if err := mask.parseValue(w[n+1]); err != nil {
			return 0, err
		}
		m.Mask, n = mask.First, n+2
	}
	if n < len(w) && (w[n] == m.Key.unequal() || w[n] == "==" && m.Key != KeyCTState) {
		m.Not, n = w[n] != "==", n+1
	}
	if n >= len(w) {
		return 0, fmt.Errorf("%q: a match without a value", strings.Join(w, " "))
	}
	return n + 1, m.parseValue(w[n])
}

// parseValue reads a value, a range, a prefix or the name of a set.
func (m *NativeMatch) parseValue(s string) error {
	if name, ok := strings.CutPrefix(s, "@"); ok && m.Key.SetType() != "" && nativeIdentifier(name) {
		m.Set = name
		return nil
	}
	switch m.Key {
	case KeyCTState:
		var bits uint32
		for name := range strings.SplitSeq(strings.ToUpper(s), ",") {
			bit, ok := nativeStates[name]
			if !ok {
				return fmt.Errorf("%q: no state of a connection", name)
			}
			bits |= bit
		}
		m.Mask = be32(bits)
		return nil
	case KeyInInterface, KeyOutInterface:
		m.First = []byte(strings.Trim(s, `"`))
		return CheckInterface(interfaceOf(m.First))
	}
	if p, err := netip.ParsePrefix(s); err == nil && m.Key.Address() && p.Addr().BitLen() == m.Key.Size()*8 {
		r := prefixRange(p)
		m.First = r.First
		m.Mask = make([]byte, len(r.First))
		for i := range m.Mask {
			m.Mask[i] = ^(r.First[i] ^ r.Last[i])
		}
		return nil
	}
	first, last, isRange := strings.Cut(s, "-")
	var err error
	if m.First, err = m.Key.value(first); err == nil && isRange {
		m.Last, err = m.Key.value(last)
	}
	if err == nil && isRange && bytes.Compare(m.First, m.Last) >= 0 {
		err = fmt.Errorf("%q is no range", s)
	}
	return err
}

// value is text backwards.
func (k NativeKey) value(s string) ([]byte, error) {
	for word, v := range map[string][]byte{
		"syn": {synBit}, "(fin | syn | rst | ack)": {synMask}, "local": be32(rtnLocal),
		"ipv4": {nativeFamilies[IPv4]}, "ipv6": {nativeFamilies[IPv6]}, "tcp": {byte(TCP)}, "udp": {byte(UDP)},
	} {
		if s == word && len(v) == k.Size() {
			return v, nil
		}
	}
	if a, err := netip.ParseAddr(s); err == nil && a.BitLen() == k.Size()*8 {
		return a.AsSlice(), nil
	}
	n, err := strconv.ParseUint(s, 0, k.Size()*8)
	if err != nil || k.Address() {
		return nil, fmt.Errorf("%q: no value of %s", s, nativeKeys[k].text)
	}
	return binary.BigEndian.AppendUint64(nil, n)[8-k.Size():], nil
}
