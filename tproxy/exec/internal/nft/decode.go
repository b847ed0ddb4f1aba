package nft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"
	"math/bits"
	"slices"

	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// decoder puts together a table from what a kernel of that byte order answers. The
// methods take the body of a message: a struct nfgenmsg, and attributes.
type decoder struct {
	order  binary.ByteOrder
	family byte // of the table
	rules.Native
	sets map[string]*setReading
}

// setReading is a set whose elements are being read.
type setReading struct {
	at    int // in Native.Sets
	kind  setType
	edges []edge
}

// edge is an element as the kernel has it: where a range begins, or where one ends.
type edge struct {
	key []byte
	end bool
}

func (d *decoder) attrs(b []byte) iter.Seq2[uint16, []byte] { return kernel.Attrs(d.order, b) }

func (d *decoder) strange(format string, args ...any) {
	if s := fmt.Sprintf(format, args...); !slices.Contains(d.Strange, s) {
		d.Strange = append(d.Strange, s)
	}
}

// mine are the attributes of a message if it is of the table.
func (d *decoder) mine(body []byte) (attrs []byte, ok bool) {
	if len(body) < nfgenHeader || body[0] != d.family {
		return nil, false
	}
	for typ, v := range d.attrs(body[nfgenHeader:]) {
		if typ == attrTable {
			return body[nfgenHeader:], kernel.CString(v) == d.Table
		}
	}
	return nil, false
}

func be32(v []byte) (uint32, bool) {
	if len(v) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(v), true
}

func (d *decoder) table(body []byte) {
	attrs, ok := d.mine(body)
	if !ok {
		return
	}
	for typ, v := range d.attrs(attrs) {
		switch typ {
		case attrTable, tableUse, tableHandle, tablePad, tableUserdata:
		case tableFlags:
			switch n, ok := be32(v); {
			case ok && n == 1: // NFT_TABLE_F_DORMANT
				d.strange(rules.NativeDormant)
			case !ok || n != 0:
				d.strange("flags %#x of the table", n)
			}
		default:
			d.strange("attribute %d of the table", typ)
		}
	}
}

func (d *decoder) chain(body []byte) {
	attrs, ok := d.mine(body)
	if !ok {
		return
	}
	var c rules.NativeChain
	var odd []string
	note := func(format string, args ...any) { odd = append(odd, fmt.Sprintf(format, args...)) }
	for typ, v := range d.attrs(attrs) {
		switch typ {
		case attrTable, chainHandle, chainUse, chainUserdata:
		case chainName:
			c.Name = kernel.CString(v)
		case chainType:
			c.Type = kernel.CString(v)
		case chainPolicy:
			if n, ok := be32(v); !ok || n != verdictAccept {
				note("policy drop")
			}
		case chainFlags:
			if n, ok := be32(v); !ok || n&^1 != 0 { // NFT_CHAIN_BASE
				note("flags %#x", n)
			}
		case chainHook:
			d.hook(&c, v, note)
		default:
			note("attribute %d", typ)
		}
	}
	if (c.Hook != "") != (c.Type != "") || c.Hook != "" && !slices.Contains([]string{"nat", "filter", "route"}, c.Type) {
		note("type %q", c.Type)
	}
	for _, o := range odd {
		d.strange("chain %s: %s", c.Name, o)
	}
	d.Chains = append(d.Chains, c)
}

func (d *decoder) hook(c *rules.NativeChain, list []byte, note func(string, ...any)) {
	for typ, v := range d.attrs(list) {
		n, ok := be32(v)
		switch {
		case ok && typ == hookNumber && int(n) < len(hooks):
			c.Hook = hooks[n]
		case ok && typ == hookPriority:
			c.Priority = int32(n)
		case ok && typ == hookNumber:
			note("hook %d", n)
		default:
			note("attribute %d of the hook", typ)
		}
	}
}

// other is an object or a flowtable: no table of ours has any.
func (d *decoder) other(what string, body []byte) {
	attrs, ok := d.mine(body)
	if !ok {
		return
	}
	for typ, v := range d.attrs(attrs) {
		if typ == setName { // NFTA_OBJ_NAME, NFTA_FLOWTABLE_NAME
			d.strange("%s %s", what, kernel.CString(v))
		}
	}
}

func (d *decoder) set(body []byte) {
	attrs, ok := d.mine(body)
	if !ok {
		return
	}
	var s rules.NativeSet
	var flags, number, size uint32
	var odd []string
	for typ, v := range d.attrs(attrs) {
		n, _ := be32(v)
		switch typ {
		case attrTable, setID, setUserdata, setPad, setHandle, setBackend, setCount:
		case setName:
			s.Name = kernel.CString(v)
		case setFlags:
			flags = n
		case setKeyType:
			number = n
		case setKeyLen:
			size = n
		case setDesc:
			if len(v) > 0 {
				odd = append(odd, "a size, or several fields")
			}
		default:
			odd = append(odd, fmt.Sprintf("attribute %d", typ))
		}
	}
	for name, kind := range setTypes {
		if kind.number == number && kind.size == int(size) {
			s.Type = name
		}
	}
	if s.Type == "" {
		odd = append(odd, fmt.Sprintf("keys of type %d and %d bytes", number, size))
	}
	if flags != setInterval {
		odd = append(odd, fmt.Sprintf("flags %#x", flags))
	}
	for _, o := range odd {
		d.strange("set %s: %s", s.Name, o)
	}
	if d.sets == nil {
		d.sets = map[string]*setReading{}
	}
	if odd == nil {
		d.sets[s.Name] = &setReading{at: len(d.Sets), kind: setTypes[s.Type]}
	}
	d.Sets = append(d.Sets, s)
}

// elements takes a part of the elements of a set, in no order.
func (d *decoder) elements(body []byte) {
	attrs, ok := d.mine(body)
	if !ok {
		return
	}
	var name string
	var list []byte
	for typ, v := range d.attrs(attrs) {
		switch typ {
		case elemListSet:
			name = kernel.CString(v)
		case elemListElements:
			list = v
		}
	}
	in, ok := d.sets[name]
	if !ok {
		return // it is Strange
	}
	for _, v := range d.attrs(list) {
		e, odd := d.element(v)
		if odd == "" && len(e.key) != in.kind.size {
			odd = fmt.Sprintf("an element of %d bytes", len(e.key))
		}
		if odd != "" {
			d.strange("set %s: %s", name, odd)
			continue
		}
		in.edges = append(in.edges, e)
	}
}

func (d *decoder) element(b []byte) (e edge, odd string) {
	for typ, v := range d.attrs(b) {
		switch typ {
		case elemPad, elemUserdata: // a comment, and what nft(8) needs for its text
		case elemKey:
			for typ, v := range d.attrs(v) {
				if typ == dataValue {
					e.key = bytes.Clone(v)
				}
			}
		case elemFlags:
			n, ok := be32(v)
			if !ok || n&^elemIntervalEnd != 0 {
				return e, fmt.Sprintf("an element with flags %#x", n)
			}
			e.end = n != 0
		default:
			return e, fmt.Sprintf("an element with attribute %d", typ)
		}
	}
	return e, ""
}

// ranges makes the ranges of all sets out of their edges.
func (d *decoder) ranges() {
	for name, in := range d.sets {
		slices.SortFunc(in.edges, func(a, b edge) int {
			if n := bytes.Compare(a.key, b.key); n != 0 {
				return n
			}
			if a.end == b.end {
				return 0
			}
			if a.end {
				return -1 // one range ends, the next one begins
			}
			return 1
		})
		out := make([]rules.NativeRange, 0, len(in.edges)/2+1)
		var first []byte
		for _, e := range in.edges {
			switch {
			case !e.end && first == nil:
				first = e.key
			case !e.end:
				d.strange("set %s: a range in another one", name)
			case first != nil:
				decrement(e.key)
				out = append(out, rules.NativeRange{First: first, Last: e.key})
				first = nil
			case !all(e.key, 0):
				d.strange("set %s: the end of no range", name)
			}
		}
		if first != nil {
			out = append(out, rules.NativeRange{First: first, Last: bytes.Repeat([]byte{0xff}, len(first))})
		}
		d.Sets[in.at].Elements = out
	}
}

// decrement takes one off a number in network byte order.
func decrement(b []byte) {
	for i := len(b) - 1; i >= 0; i-- {
		b[i]--
		if b[i] != 0xff {
			return
		}
	}
}

// rule reads a rule and says to which chain it belongs.
func (d *decoder) rule(body []byte) (chain string, r rules.NativeRule, ok bool) {
	attrs, ok := d.mine(body)
	if !ok {
		return "", r, false
	}
	var odd string
	var list []expression
	for typ, v := range d.attrs(attrs) {
		switch typ {
		case attrTable, ruleHandle, rulePosition, rulePad:
		case ruleChain:
			chain = kernel.CString(v)
		case ruleExpressions:
			list = d.expressions(v)
		case ruleUserdata:
			r.Comment, odd = comment(v)
		default:
			odd = fmt.Sprintf("attribute %d of the rule", typ)
		}
	}
	reader := ruleReader{decoder: d, list: list, rule: &r}
	reader.read()
	switch {
	case odd != "":
		r = rules.NativeRule{Unknown: odd, Comment: r.Comment, Counter: r.Counter}
	case reader.odd != "": // which comes behind what was understood
		r = rules.NativeRule{Unknown: reader.odd, Matches: r.Matches, Comment: r.Comment, Counter: r.Counter}
	}
	return chain, r, true
}

// addRule puts a rule at the end of its chain.
func (d *decoder) addRule(body []byte) {
	chain, r, ok := d.rule(body)
	if !ok {
		return
	}
	for i := range d.Chains {
		if d.Chains[i].Name == chain {
			d.Chains[i].Rules = append(d.Chains[i].Rules, r)
			return
		}
	}
	d.strange("a rule in no chain, %s", chain)
}

// comment is that of a rule's userdata, which is a list of type, length and value.
func comment(b []byte) (text, odd string) {
	for len(b) >= 2 {
		typ, length := b[0], int(b[1])
		if len(b) < 2+length {
			break
		}
		v := b[2 : 2+length]
		if typ != udataRuleComment || length == 0 || v[length-1] != 0 || bytes.IndexByte(v, 0) != length-1 {
			return text, fmt.Sprintf("userdata of type %d", typ)
		}
		text, b = string(v[:length-1]), b[2+length:]
	}
	if len(b) > 0 {
		return text, "userdata of no form"
	}
	return text, ""
}

// expression is one of a rule.
type expression struct {
	name  string
	attrs []attr
}

type attr struct {
	typ uint16
	v   []byte
}

func (d *decoder) expressions(b []byte) (out []expression) {
	for _, element := range d.attrs(b) {
		var x expression
		for typ, v := range d.attrs(element) {
			switch typ {
			case exprName:
				x.name = kernel.CString(v)
			case exprData:
				for typ, v := range d.attrs(v) {
					x.attrs = append(x.attrs, attr{typ, v})
				}
			}
		}
		out = append(out, x)
	}
	return out
}

// is reports whether the expression is of that name and has these numbers, given as
// pairs of attribute and value, and besides at most the attributes of may.
func (x *expression) is(name string, may []uint16, pairs ...uint32) bool {
	if x.name != name {
		return false
	}
	found := 0
	for _, a := range x.attrs {
		if slices.Contains(may, a.typ) {
			continue
		}
		n, ok := be32(a.v)
		i := 0
		for i < len(pairs) && pairs[i] != uint32(a.typ) {
			i += 2
		}
		if !ok || i == len(pairs) || pairs[i+1] != n {
			return false
		}
		found++
	}
	return found == len(pairs)/2
}

func (x *expression) attr(typ uint16) []byte {
	for _, a := range x.attrs {
		if a.typ == typ {
			return a.v
		}
	}
	return nil
}

func (x *expression) number(typ uint16) (uint32, bool) { return be32(x.attr(typ)) }

// String is what the expression is called where it is not understood.
func (x *expression) String() string {
	first := func(typ uint16) uint32 { n, _ := x.number(typ); return n }
	switch x.name {
	case "payload":
		return fmt.Sprintf("payload %d at %d", first(payloadBase), first(payloadOffset))
	case "meta", "ct":
		return fmt.Sprintf("%s key %d", x.name, first(metaKey)) // NFTA_CT_KEY is 2 too
	case "":
		return "expression without a name"
	}
	return "expression " + x.name
}

// ruleReader reads the expressions of a rule: matches, a counter, an action.
type ruleReader struct {
	*decoder
	list []expression
	rule *rules.NativeRule
	odd  string
}

// peek is the expression that comes n behind the next one; past the end, an empty one.
func (r *ruleReader) peek(n int) *expression {
	if n < len(r.list) {
		return &r.list[n]
	}
	return &expression{}
}

func (r *ruleReader) read() {
	r.rule.Action = rules.Nothing{}
	for r.match() {
	}
	if len(r.list) > 0 && r.list[0].name == "counter" {
		r.counter()
	}
	if len(r.list) > 0 {
		r.action()
	}
	if len(r.list) > 0 {
		r.odd = r.list[0].String()
		if k, _, ok := loaded(&r.list[0]); ok && r.guarded(k) && len(r.list) > 1 && r.list[1].name != "" {
			r.odd += " and " + r.list[1].name
		}
	}
	// What is behind what was not understood may count too.
	for i := range r.list {
		if r.list[i].name == "counter" {
			r.list = r.list[i:]
			r.counter()
			return
		}
	}
}

func (r *ruleReader) counter() {
	x := r.list[0]
	for _, a := range x.attrs {
		switch {
		case a.typ == counterBytes && len(a.v) == 8:
			r.rule.Counter.Bytes = binary.BigEndian.Uint64(a.v)
		case a.typ == counterPackets && len(a.v) == 8:
			r.rule.Counter.Packets = binary.BigEndian.Uint64(a.v)
		}
	}
	r.rule.Counted = true
	r.list = r.list[1:]
}

// match takes one match, if one comes next.
func (r *ruleReader) match() bool {
	if len(r.list) == 0 {
		return false
	}
	key, length, ok := loaded(&r.list[0])
	if !ok || !r.guarded(key) {
		return false
	}
	m := rules.NativeMatch{Key: key}
	n := r.compared(&m, length)
	if n == 0 || !ours(&m) {
		return false
	}
	r.rule.Matches = append(r.rule.Matches, m)
	r.list = r.list[1+n:]
	return true
}

// guarded reports whether the matches before say of which protocol the packet is, where
// the key is a place in its header: in that of another one something else stands there.
func (r *ruleReader) guarded(k rules.NativeKey) bool {
	guard, values := rules.KeyFamily, []byte{2} // NFPROTO_IPV4
	switch k {
	default:
		return true
	case rules.KeySource4, rules.KeyDestination4:
	case rules.KeySource6, rules.KeyDestination6:
		values = []byte{10}
	case rules.KeyTCPFlags:
		guard, values = rules.KeyProtocol, []byte{6}
	case rules.KeySourcePort, rules.KeyDestinationPort:
		guard, values = rules.KeyProtocol, []byte{6, 17, 33, 132, 136} // TCP, UDP, DCCP, SCTP, UDP-Lite
	}
	if guard == rules.KeyFamily && r.family != familyInet { // a table of one family sees no other
		return r.family == values[0]
	}
	return slices.ContainsFunc(r.rule.Matches, func(m rules.NativeMatch) bool {
		return m.Key == guard && !m.Not && m.Mask == nil && m.Last == nil && len(m.First) == 1 && slices.Contains(values, m.First[0])
	})
}

// ours reports whether a rule of rules.Set.Native compares the key in this way. Of another
// comparison nobody behind would ask.
func ours(m *rules.NativeMatch) bool {
	equal, between, prefix := m.Mask == nil && m.Last == nil && m.Set == "", m.Mask == nil, isPrefix(m.Mask)
	switch m.Key {
	case rules.KeyFamily, rules.KeyProtocol:
		return equal && !m.Not
	case rules.KeyInInterface, rules.KeyOutInterface, rules.KeySourceType, rules.KeyDestinationType:
		return equal
	case rules.KeySource4, rules.KeySource6, rules.KeyDestination4, rules.KeyDestination6:
		return between || prefix
	case rules.KeySourcePort, rules.KeyDestinationPort, rules.KeyUID, rules.KeyGID:
		return between
	case rules.KeyTCPFlags:
		return m.Mask != nil
	case rules.KeyCTState:
		return m.Mask != nil && m.First == nil
	case rules.KeyMark:
		return equal || m.Mask != nil
	}
	return false
}

// isPrefix reports whether a mask is ones and then zeros.
func isPrefix(mask []byte) bool {
	ended := false
	for _, c := range mask {
		switch {
		case ended && c != 0:
			return false
		case c != 0xff:
			ended = true
			if bits.LeadingZeros8(^c)+bits.TrailingZeros8(c) != 8 {
				return false
			}
		}
	}
	return len(mask) > 0
}

// loaded is the key that the expression puts into register 1, and how many bytes of it.
func loaded(x *expression) (key rules.NativeKey, length int, ok bool) {
	for k := rules.NativeKey(1); k.Size() > 0; k++ {
		l := loads[k]
		switch {
		case l.expr != x.name:
		case l.expr == "meta" && x.is("meta", nil, metaKey, l.key, metaDReg, reg1),
			l.expr == "ct" && x.is("ct", nil, ctKey, l.key, ctDReg, reg1),
			l.expr == "fib" && x.is("fib", nil, fibFlags, l.key, fibResult, fibAddrType, fibDReg, reg1):
			return k, k.Size(), true
		case l.expr == "payload" &&
			x.is("payload", []uint16{payloadLen}, payloadDReg, reg1, payloadBase, l.key, payloadOffset, l.offset):
			n, _ := x.number(payloadLen)
			return k, int(n), n == l.length || k.Address() && n > 0 && n < l.length
		}
	}
	return 0, 0, false
}

// compared puts into m what the expressions behind the one that loads compare with,
// and returns how many they are; 0 if they are none of ours.
func (r *ruleReader) compared(m *rules.NativeMatch, length int) int {
	host, size := m.Key.HostOrder(), m.Key.Size()
	at := 1
	turned := r.peek(at).is("byteorder", nil, byteorderSReg, reg1, byteorderDReg, reg1,
		byteorderOp, opHton, byteorderLen, uint32(size), byteorderSize, uint32(size))
	if turned {
		at++
	}
	switch x := r.peek(at); {
	case turned == host && length == size && r.ranged(m, at):
		if x.name == "cmp" {
			at++
		}
		return at
	case turned:
		return 0
	case x.name == "bitwise" && length == size:
		return r.masked(m, x)
	case x.name == "cmp":
		op, v, ok := r.cmp(x)
		if !ok || op > opNeq {
			return 0
		}
		m.Not = op == opNeq
		return r.equal(m, v, length)
	}
	return 0
}

// ranged is a look-up, or a comparison with a range.
func (r *ruleReader) ranged(m *rules.NativeMatch, at int) bool {
	x, next := r.peek(at), r.peek(at+1)
	size := m.Key.Size()
	switch x.name {
	case "lookup":
		flags, _ := x.number(lookupFlags)
		m.Set, m.Not = kernel.CString(x.attr(lookupSet)), flags == lookupNot
		return m.Set != "" && flags <= lookupNot && x.is("lookup", []uint16{lookupSet, lookupFlags}, lookupSReg, reg1)
	case "range":
		m.Not, m.First, m.Last = true, r.value(x.attr(rangeFrom)), r.value(x.attr(rangeTo))
		return len(m.First) == size && len(m.Last) == size &&
			x.is("range", []uint16{rangeFrom, rangeTo}, rangeSReg, reg1, rangeOp, opNeq)
	case "cmp":
		from, first, ok := r.cmp(x)
		to, last, okNext := r.cmp(next)
		if !ok || !okNext || from != opGTE || to != opLTE || len(first) != size || len(last) != size {
			return false
		}
		m.First, m.Last = first, last
		return true
	}
	return false
}

// masked is a bitwise and the comparison behind it.
func (r *ruleReader) masked(m *rules.NativeMatch, x *expression) int {
	mask, xor, ok := r.bitwise(x, m.Key.Size())
	op, v, okNext := r.cmp(r.peek(2))
	if !ok || !okNext || op > opNeq || len(v) != len(mask) || !all(xor, 0) {
		return 0
	}
	m.Not, m.Mask = op == opNeq, r.network(m.Key, mask)
	if m.Key == rules.KeyCTState {
		if !all(v, 0) {
			return 0
		}
		m.Not = !m.Not // "differs from 0" is that a bit is set
		return 2
	}
	m.First = r.network(m.Key, v)
	return 2
}

// equal is a comparison with v, after length bytes were loaded.
func (r *ruleReader) equal(m *rules.NativeMatch, v []byte, length int) int {
	size := m.Key.Size()
	switch {
	case m.Key == rules.KeyInInterface || m.Key == rules.KeyOutInterface:
		end := bytes.IndexByte(v, 0)
		switch {
		case len(v) < size && len(v) > 0 && end < 0:
			m.First = append(bytes.Clone(v), '*')
		case len(v) == size && end > 0 && all(v[end:], 0) && v[end-1] != '*':
			m.First = bytes.Clone(v[:end])
		default:
			return 0
		}
	case len(v) != length:
		return 0
	case length < size: // a prefix of whole bytes
		m.First, m.Mask = make([]byte, size), make([]byte, size)
		copy(m.First, v)
		copy(m.Mask, bytes.Repeat([]byte{0xff}, length))
	default:
		m.First = r.network(m.Key, v)
	}
	return 1
}

// network is a value of the key in network byte order.
func (r *ruleReader) network(k rules.NativeKey, v []byte) []byte {
	v = bytes.Clone(v)
	if k.HostOrder() && r.order.Uint16([]byte{1, 0}) == 1 {
		slices.Reverse(v)
	}
	return v
}

// value is the data in an attribute, nil if it is none.
func (d *decoder) value(b []byte) (out []byte) {
	for typ, v := range d.attrs(b) {
		if typ != dataValue || out != nil {
			return nil
		}
		out = bytes.Clone(v)
	}
	return out
}

func (d *decoder) cmp(x *expression) (op uint32, v []byte, ok bool) {
	op, _ = x.number(cmpOp)
	v = d.value(x.attr(cmpData))
	return op, v, v != nil && x.is("cmp", []uint16{cmpOp, cmpData}, cmpSReg, reg1)
}

func (d *decoder) bitwise(x *expression, size int) (mask, xor []byte, ok bool) {
	mask, xor = d.value(x.attr(bitwiseMask)), d.value(x.attr(bitwiseXor))
	op, _ := x.number(bitwiseOp)
	return mask, xor, len(mask) == size && len(xor) == size && op == 0 &&
		x.is("bitwise", []uint16{bitwiseMask, bitwiseXor, bitwiseOp}, bitwiseSReg, reg1, bitwiseDReg, reg1, bitwiseLen, uint32(size))
}

// action takes what is left, if it is one action.
func (r *ruleReader) action() {
	a, n := r.acted()
	if n == 0 || n != len(r.list) {
		return
	}
	r.rule.Action, r.list = a, nil
}

// acted is the action that comes next, and of how many expressions it is; 0 if it is
// none of ours.
func (r *ruleReader) acted() (rules.Action, int) {
	x, next := r.peek(0), r.peek(1)
	switch {
	case x.is("notrack", nil):
		return rules.NoTrack{}, 1
	case x.is("immediate", []uint16{immediateData}, immediateDReg, regVerdict):
		return r.verdict(x)
	case x.is("immediate", []uint16{immediateData}, immediateDReg, reg1):
		v := r.value(x.attr(immediateData))
		switch {
		case len(v) == 2 && redirects(next):
			return rules.Redirect{Port: binary.BigEndian.Uint16(v)}, 2
		case len(v) == 2 && next.is("ct", nil, ctKey, ctZone, ctSReg, reg1):
			return rules.CTZone{Zone: r.order.Uint16(v)}, 2
		case len(v) == 4 && next.is("meta", nil, metaKey, markKey, metaSReg, reg1):
			return rules.SetMark{Value: r.order.Uint32(v), Mask: 1<<32 - 1}, 2
		}
	case x.is("meta", nil, metaKey, markKey, metaDReg, reg1):
		mask, xor, ok := r.bitwise(next, 4)
		if ok && r.peek(2).is("meta", nil, metaKey, markKey, metaSReg, reg1) {
			return rules.SetMark{Value: r.order.Uint32(xor), Mask: ^r.order.Uint32(mask)}, 3
		}
	}
	return nil, 0
}

// redirects is to the one port in register 1; the kernel says the minimum again as the
// maximum (nft_redir_init, net/netfilter/nft_redir.c).
func redirects(x *expression) bool {
	most, ok := x.number(redirMax)
	return (!ok || most == reg1) && x.is("redir", []uint16{redirMax}, redirMin, reg1, redirFlags, protoSpecified)
}

func (r *ruleReader) verdict(x *expression) (rules.Action, int) {
	var chain string
	var code uint32
	for typ, v := range r.attrs(x.attr(immediateData)) {
		if typ != dataJudge {
			return nil, 0
		}
		for typ, v := range r.attrs(v) {
			switch typ {
			case codeJudge:
				n, ok := be32(v)
				if !ok {
					return nil, 0
				}
				code = n
			case chainJump:
				chain = kernel.CString(v)
			default:
				return nil, 0
			}
		}
	}
	switch int32(code) {
	case verdictReturn:
		return rules.Return{}, 1
	case verdictAccept:
		return rules.Accept{}, 1
	case verdictDrop:
		return rules.Drop{}, 1
	case verdictJump:
		return rules.Jump{Chain: chain}, 1
	case verdictGoto:
		return rules.Goto{Chain: chain}, 1
	}
	return nil, 0
}
