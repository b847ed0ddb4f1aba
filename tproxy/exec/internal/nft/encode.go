package nft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Batch is a transaction for the kernel, as bytes.
type Batch struct {
	bytes []byte
	// owners has for each message but the first and the last, which are the batch's
	// own, the index of its command. The sequence number of a message is its place.
	owners []int32
}

// Bytes are what is sent to the kernel.
func (b *Batch) Bytes() []byte { return b.bytes }

// command is whose message has that sequence number, -1 if it is the batch's.
func (b *Batch) command(seq uint32) int {
	if seq == 0 || uint64(seq) > uint64(len(b.owners)) {
		return -1
	}
	return int(b.owners[seq-1])
}

// last is the sequence number of the message that the kernel acknowledges. One is
// enough, as there is one outcome, and each costs a message to read.
func (b *Batch) last() uint32 { return uint32(len(b.owners)) }

// generation is where in Bytes the generation stands that the batch is made for.
const generation = netlinkHeader + nfgenHeader + attrHeader

// maxElements is how long a list of elements gets: an attribute's length has 16 bits.
// It leaves room for one element more.
const maxElements = 1<<16 - 1 - 128

// Encode makes one transaction of the commands, for a kernel of that byte order.
// Tables, sets and chains that it adds must not be there yet, or the kernel refuses. It
// panics on what no rules.NativeTransition makes: a verb, a match or an action that is
// none.
func Encode(commands []rules.NativeCommand, order binary.ByteOrder) *Batch {
	e := &encoder{little: order.Uint16([]byte{1, 0}) == 1}
	e.b = make([]byte, 0, estimate(commands))
	e.owners = make([]int32, 0, len(commands)+len(commands)/8+8)
	at := e.begin(batchBegin, 0, 0, subsystem>>8)
	e.u32(batchGenID, 0) // none: nf_tables_valid_genid, net/netfilter/nf_tables_api.c
	e.end(at)
	last := 0
	for i := range commands {
		e.current = int32(i)
		last = e.command(&commands[i])
	}
	if last > 0 {
		flags := e.b[last+6:]
		e.put16(flags, flagRequest|flagAck|e.get16(flags))
	}
	e.end(e.begin(batchEnd, 0, uint32(len(e.owners)+1), subsystem>>8))
	return &Batch{bytes: e.b, owners: e.owners}
}

// estimate is about how many bytes the commands take: enough for one allocation.
func estimate(commands []rules.NativeCommand) int {
	n := 256
	for i := range commands {
		c := &commands[i]
		n += 512 + 160*len(c.Rule.Matches) + len(c.Rule.Comment)
		for _, r := range c.Set.Elements[:min(1, len(c.Set.Elements))] {
			n += len(c.Set.Elements) * 2 * (24 + max(4, len(r.First)))
		}
	}
	return n
}

type encoder struct {
	b       []byte
	little  bool
	owners  []int32
	current int32
	sets    uint32
}

func (e *encoder) put16(b []byte, v uint16) {
	if e.little {
		binary.LittleEndian.PutUint16(b, v)
	} else {
		binary.BigEndian.PutUint16(b, v)
	}
}

func (e *encoder) get16(b []byte) uint16 {
	if e.little {
		return binary.LittleEndian.Uint16(b)
	}
	return binary.BigEndian.Uint16(b)
}

func (e *encoder) append16(v uint16) {
	e.b = append(e.b, 0, 0)
	e.put16(e.b[len(e.b)-2:], v)
}

func (e *encoder) append32(v uint32) {
	if e.little {
		e.b = binary.LittleEndian.AppendUint32(e.b, v)
	} else {
		e.b = binary.BigEndian.AppendUint32(e.b, v)
	}
}

// begin starts a message, whose length end puts in.
func (e *encoder) begin(typ, flags uint16, seq uint32, resource uint16) (at int) {
	at = len(e.b)
	e.append32(0)
	e.append16(typ)
	e.append16(flagRequest | flags)
	e.append32(seq)
	e.append32(0) // the port: the kernel fills it in
	family := byte(familyInet)
	if typ < subsystem {
		family = 0 // AF_UNSPEC, as nft(8) has it
	}
	e.b = append(e.b, family, 0)
	e.b = binary.BigEndian.AppendUint16(e.b, resource)
	return at
}

func (e *encoder) end(at int) {
	if e.little {
		binary.LittleEndian.PutUint32(e.b[at:], uint32(len(e.b)-at))
	} else {
		binary.BigEndian.PutUint32(e.b[at:], uint32(len(e.b)-at))
	}
}

// message starts one of the command at hand, about its table.
func (e *encoder) message(typ, flags uint16, table string) (at int) {
	e.owners = append(e.owners, e.current)
	at = e.begin(typ, flags, uint32(len(e.owners)), 0)
	e.text(attrTable, table)
	return at
}

// header is that of an attribute: two numbers of 16 bits, the length first.
func (e *encoder) header(typ uint16, length int) {
	if e.little {
		e.append32(uint32(attrHeader+length) | uint32(typ)<<16)
	} else {
		e.append32(uint32(attrHeader+length)<<16 | uint32(typ))
	}
}

func (e *encoder) pad() {
	for len(e.b)%4 != 0 {
		e.b = append(e.b, 0)
	}
}

func (e *encoder) bytes(typ uint16, v []byte) {
	e.header(typ, len(v))
	e.b = append(e.b, v...)
	e.pad()
}

func (e *encoder) text(typ uint16, v string) {
	e.header(typ, len(v)+1)
	e.b = append(append(e.b, v...), 0)
	e.pad()
}

// u32 is a number as an attribute: in network byte order in nf_tables.
func (e *encoder) u32(typ uint16, v uint32) {
	e.header(typ, 4)
	e.b = binary.BigEndian.AppendUint32(e.b, v)
}

func (e *encoder) nest(typ uint16) (at int) {
	at = len(e.b)
	e.header(typ|nested, 0)
	return at
}

func (e *encoder) close(at int) { e.put16(e.b[at:], uint16(len(e.b)-at)) }

// command appends the messages of a command and returns where the last one begins.
func (e *encoder) command(c *rules.NativeCommand) (at int) {
	switch c.Verb {
	case rules.AddTable:
		at = e.message(newTable, flagCreate|flagExcl, c.Table)
		e.u32(tableFlags, 0)
	case rules.DeleteTable:
		at = e.message(delTable, 0, c.Table)
	case rules.AddSet:
		return e.set(c.Table, &c.Set)
	case rules.DeleteSet:
		at = e.message(delSet, 0, c.Table)
		e.text(setName, c.Set.Name)
	case rules.AddChain:
		at = e.message(newChain, flagCreate|flagExcl, c.Table)
		e.chain(&c.Chain)
	case rules.FlushChain:
		at = e.message(delRule, 0, c.Table)
		e.text(ruleChain, c.Chain.Name)
	case rules.DeleteChain:
		at = e.message(delChain, 0, c.Table)
		e.text(chainName, c.Chain.Name)
	case rules.AddRule:
		at = e.message(newRule, flagCreate|flagAppend, c.Table)
		e.text(ruleChain, c.Chain.Name)
		e.rule(&c.Rule)
	default:
		panic(fmt.Sprintf("no command of nf_tables has verb %d", c.Verb))
	}
	e.end(at)
	return at
}

func (e *encoder) chain(c *rules.NativeChain) {
	e.text(chainName, c.Name)
	if c.Hook == "" {
		return
	}
	hook := slices.Index(hooks, c.Hook)
	if hook < 0 {
		panic(fmt.Sprintf("no hook of nf_tables is called %q", c.Hook))
	}
	e.text(chainType, c.Type)
	e.u32(chainPolicy, verdictAccept)
	at := e.nest(chainHook)
	e.u32(hookNumber, uint32(hook))
	e.u32(hookPriority, uint32(c.Priority))
	e.close(at)
}

// hooks by their number: NF_INET_* of include/uapi/linux/netfilter.h.
var hooks = []rules.Hook{rules.Prerouting, rules.Input, rules.Forward, rules.Output, rules.Postrouting}

func (e *encoder) set(table string, s *rules.NativeSet) (at int) {
	kind, ok := setTypes[s.Type]
	if !ok {
		panic(fmt.Sprintf("no set of nf_tables is of type %q", s.Type))
	}
	at = e.message(newSet, flagCreate|flagExcl, table)
	e.text(setName, s.Name)
	e.u32(setFlags, setInterval)
	e.u32(setKeyType, kind.number)
	e.u32(setKeyLen, uint32(kind.size))
	e.sets++
	e.u32(setID, e.sets)
	e.header(setUserdata, 6)
	e.b = append(e.b, udataKeyByteOrder, 4)
	e.append32(kind.order)
	e.pad()
	e.end(at)
	return e.elements(at, table, s)
}

// elements appends the elements of a set. An element goes as far as the next one that
// is marked as an end; nft(8) puts such an end in front of all, unless one begins at 0,
// and none behind what runs to the maximum.
func (e *encoder) elements(last int, table string, s *rules.NativeSet) int {
	list := 0
	room := func() {
		if list > 0 && len(e.b)-list <= maxElements {
			return
		}
		if list > 0 {
			e.close(list)
			e.end(last)
		}
		last = e.message(newSetElem, flagCreate|flagExcl, table)
		e.text(elemListSet, s.Name)
		list = e.nest(elemListElements)
	}
	size := setTypes[s.Type].size
	begin, end := e.template(size, 0), e.template(size, elemIntervalEnd)
	add := func(t template, key []byte) (at []byte) {
		e.b = append(e.b, t.room[:t.length]...)
		at = e.b[len(e.b)-size-pad4(size):][:size]
		copy(at, key)
		return at
	}
	for i := range s.Elements {
		r := &s.Elements[i]
		room()
		if i == 0 && !all(r.First, 0) {
			add(end, zeros[:size])
		}
		if !all(r.Last, 0xff) {
			add(begin, r.First)
			increment(add(end, r.Last))
			continue
		}
		at := len(e.b)
		add(begin, r.First)
		e.header(elemUserdata, 6)
		e.b = append(e.b, udataElemFlags, 4)
		e.append32(udataOpen)
		e.pad()
		e.close(at)
	}
	if list > 0 {
		e.close(list)
		e.end(last)
	}
	return last
}

// template is an element whose key, at its end, is still to be filled in.
type template struct {
	room   [3*attrHeader + 8 + 16]byte
	length int
}

func (e *encoder) template(size int, flags uint32) (t template) {
	start := len(e.b)
	at := e.nest(listElem)
	if flags != 0 {
		e.u32(elemFlags, flags)
	}
	e.data(elemKey, network, zeros[:size])
	e.close(at)
	t.length = copy(t.room[:], e.b[start:])
	e.b = e.b[:start]
	return t
}

func pad4(n int) int { return -n & 3 }

func all(b []byte, c byte) bool {
	return !slices.ContainsFunc(b, func(d byte) bool { return d != c })
}

// increment adds one to a number in network byte order.
func increment(b []byte) {
	for i := len(b) - 1; i >= 0; i-- {
		b[i]++
		if b[i] != 0 {
			return
		}
	}
}

func (e *encoder) rule(r *rules.NativeRule) {
	if r.Unknown != "" {
		panic("a rule that is not understood cannot be written: " + r.Unknown)
	}
	list := e.nest(ruleExpressions)
	for i := range r.Matches {
		e.match(&r.Matches[i])
	}
	if r.Counted {
		e.close2(e.expression("counter"))
	}
	e.action(r.Action)
	e.close(list)
	if r.Comment != "" {
		e.header(ruleUserdata, len(r.Comment)+3)
		e.b = append(e.b, udataRuleComment, byte(len(r.Comment)+1))
		e.b = append(append(e.b, r.Comment...), 0)
		e.pad()
	}
}

// expression starts one with its data, which close2 ends.
func (e *encoder) expression(name string) (element, data int) {
	element = e.nest(listElem)
	e.text(exprName, name)
	return element, e.nest(exprData)
}

func (e *encoder) close2(element, data int) {
	e.close(data)
	e.close(element)
}

// form is the byte order that the kernel has data in.
type form uint8

const (
	network form = iota
	host         // as the machine has it
)

func formOf(k rules.NativeKey) form {
	if k.HostOrder() {
		return host
	}
	return network
}

// data is what a register is compared with or gets: v, which is in network byte order.
func (e *encoder) data(typ uint16, f form, v []byte) {
	at := e.nest(typ)
	e.bytes(dataValue, v)
	if f == host && e.little {
		slices.Reverse(e.b[at+2*attrHeader:][:len(v)])
	}
	e.close(at)
}

func (e *encoder) match(m *rules.NativeMatch) {
	if m.Key.Size() == 0 {
		panic(fmt.Sprintf("no key of nf_tables has number %d", m.Key))
	}
	l := loads[m.Key]
	order := formOf(m.Key)
	equal, differs := uint32(opEq), uint32(opNeq)
	if m.Not {
		equal, differs = differs, equal
	}
	switch {
	case m.Set != "":
		e.load(l)
		e.hton(m.Key)
		e.lookup(m.Set, m.Not)
	case m.Last != nil:
		e.load(l)
		e.hton(m.Key)
		e.between(m)
	case m.Mask != nil && m.First == nil:
		e.load(l)
		e.bitwise(order, m.Mask, zeros[:len(m.Mask)])
		e.compare(network, differs, zeros[:len(m.Mask)])
	case m.Mask != nil:
		if n := shorter(m.Key, m.First, m.Mask); n > 0 {
			l.length = uint32(n)
			e.load(l)
			e.compare(network, equal, m.First[:n])
			return
		}
		e.load(l)
		e.bitwise(order, m.Mask, zeros[:len(m.Mask)])
		e.compare(order, equal, m.First)
	case m.Key == rules.KeyInInterface || m.Key == rules.KeyOutInterface:
		e.load(l)
		e.name(equal, m.First)
	default:
		e.load(l)
		e.compare(order, equal, m.First)
	}
}

var zeros [16]byte

func (e *encoder) load(l load) {
	element, data := e.expression(l.expr)
	switch l.expr {
	case "meta":
		e.u32(metaKey, l.key)
		e.u32(metaDReg, reg1)
	case "ct":
		e.u32(ctKey, l.key)
		e.u32(ctDReg, reg1)
	case "fib":
		e.u32(fibFlags, l.key)
		e.u32(fibResult, fibAddrType)
		e.u32(fibDReg, reg1)
	case "payload":
		e.u32(payloadDReg, reg1)
		e.u32(payloadBase, l.key)
		e.u32(payloadOffset, l.offset)
		e.u32(payloadLen, l.length)
	}
	e.close2(element, data)
}

// hton turns what is in the register to network byte order, for one that is not.
func (e *encoder) hton(k rules.NativeKey) {
	if !k.HostOrder() {
		return
	}
	element, data := e.expression("byteorder")
	e.u32(byteorderSReg, reg1)
	e.u32(byteorderDReg, reg1)
	e.u32(byteorderOp, opHton)
	e.u32(byteorderLen, uint32(k.Size()))
	e.u32(byteorderSize, uint32(k.Size()))
	e.close2(element, data)
}

func (e *encoder) compare(f form, op uint32, v []byte) {
	element, data := e.expression("cmp")
	e.u32(cmpSReg, reg1)
	e.u32(cmpOp, op)
	e.data(cmpData, f, v)
	e.close2(element, data)
}

// name compares with the name of an interface: all 16 bytes, or the beginning.
func (e *encoder) name(op uint32, name []byte) {
	if begin, ok := bytes.CutSuffix(name, []byte{'*'}); ok {
		e.compare(network, op, begin)
		return
	}
	var room [16]byte
	copy(room[:], name)
	e.compare(network, op, room[:])
}

func (e *encoder) between(m *rules.NativeMatch) {
	if !m.Not {
		e.compare(network, opGTE, m.First)
		e.compare(network, opLTE, m.Last)
		return
	}
	element, data := e.expression("range")
	e.u32(rangeSReg, reg1)
	e.u32(rangeOp, opNeq)
	e.data(rangeFrom, network, m.First)
	e.data(rangeTo, network, m.Last)
	e.close2(element, data)
}

// bitwise keeps the bits of mask and flips those of xor.
func (e *encoder) bitwise(f form, mask, xor []byte) {
	element, data := e.expression("bitwise")
	e.u32(bitwiseSReg, reg1)
	e.u32(bitwiseDReg, reg1)
	e.u32(bitwiseLen, uint32(len(mask)))
	e.data(bitwiseMask, f, mask)
	e.data(bitwiseXor, f, xor)
	e.close2(element, data)
}

func (e *encoder) lookup(set string, not bool) {
	element, data := e.expression("lookup")
	e.u32(lookupSReg, reg1)
	e.text(lookupSet, set)
	if not {
		e.u32(lookupFlags, lookupNot)
	}
	e.close2(element, data)
}

func (e *encoder) action(a rules.Action) {
	switch a := a.(type) {
	case rules.Nothing:
	case rules.Return:
		e.verdict(verdictReturn, "")
	case rules.Accept:
		e.verdict(verdictAccept, "")
	case rules.Drop:
		e.verdict(verdictDrop, "")
	case rules.Jump:
		e.verdict(verdictJump, a.Chain)
	case rules.Goto:
		e.verdict(verdictGoto, a.Chain)
	case rules.Redirect:
		e.immediate(network, a.Port)
		element, data := e.expression("redir")
		e.u32(redirMin, reg1)
		e.u32(redirFlags, protoSpecified)
		e.close2(element, data)
	case rules.CTZone:
		e.immediate(host, a.Zone)
		element, data := e.expression("ct")
		e.u32(ctKey, ctZone)
		e.u32(ctSReg, reg1)
		e.close2(element, data)
	case rules.NoTrack:
		at := e.nest(listElem)
		e.text(exprName, "notrack")
		e.close(at)
	case rules.SetMark:
		e.setMark(a)
	default:
		panic(fmt.Sprintf("no rule of nf_tables for %T", a))
	}
}

func (e *encoder) setMark(a rules.SetMark) {
	var mask, value [4]byte
	binary.BigEndian.PutUint32(mask[:], ^a.Mask)
	binary.BigEndian.PutUint32(value[:], a.Value)
	e.load(loads[rules.KeyMark])
	e.bitwise(host, mask[:], value[:])
	element, data := e.expression("meta")
	e.u32(metaKey, markKey)
	e.u32(metaSReg, reg1)
	e.close2(element, data)
}

func (e *encoder) immediate(f form, v uint16) {
	element, data := e.expression("immediate")
	e.u32(immediateDReg, reg1)
	e.data(immediateData, f, []byte{byte(v >> 8), byte(v)})
	e.close2(element, data)
}

func (e *encoder) verdict(code int32, chain string) {
	element, data := e.expression("immediate")
	e.u32(immediateDReg, regVerdict)
	value := e.nest(immediateData)
	judge := e.nest(dataJudge)
	e.u32(codeJudge, uint32(code))
	if chain != "" {
		e.text(chainJump, chain)
	}
	e.close(judge)
	e.close(value)
	e.close2(element, data)
}
