package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Of include/uapi/linux/netlink.h and asm-generic/socket.h, missing in package syscall.
const (
	solNetlink      = 270
	netlinkCapAck   = 10 // an error repeats the header of its message, not all of it
	netlinkExtAck   = 11
	flagCapped      = 0x100 // NLM_F_CAPPED
	flagAckTLVs     = 0x200 // NLM_F_ACK_TLVS
	attrMessage     = 1     // NLMSGERR_ATTR_MSG
	attrOffset      = 2     // NLMSGERR_ATTR_OFFS
	answerBuffer    = 16 << 10
	readTries       = 10
	sendBufferSpare = 4 << 10 // of what the kernel counts beside the bytes
)

// Conn is a socket, of the network namespace of the thread that opened it. One
// goroutine at a time may use it.
//
// It is worth keeping: a socket of netfilter that was used is closed only when the kernel
// has disposed of what a commit deleted, of whichever socket that was (nft_rcv_nl_event,
// net/netfilter/nf_tables_api.c). That takes an RCU grace period, 12 to 16 ms where RCU is
// not expedited; asking and committing go on meanwhile. A process that ends closes it too
// and waits as long, so there is nothing to gain in leaving it open at the end; in one that
// lives on, Close can be called from another goroutine.
type Conn struct {
	n      *kernel.Netlink
	answer []byte
	stale  bool // whether answers may be left to read
}

// Open opens a Conn.
func Open() (*Conn, error) {
	n, err := kernel.OpenNetlink(syscall.NETLINK_NETFILTER)
	if err != nil {
		return nil, kernel.NFTError("socket", err)
	}
	// A kernel without these says less (both are of 4.12).
	_ = syscall.SetsockoptInt(n.FD(), solNetlink, netlinkCapAck, 1)
	_ = syscall.SetsockoptInt(n.FD(), solNetlink, netlinkExtAck, 1)
	return &Conn{n: n}, nil
}

// Close ends it.
func (c *Conn) Close() { c.n.Close() }

// Supported is nil where the kernel has nf_tables; asking may load the module. Where it
// has none, the error is errors.ErrUnsupported, and without CAP_NET_ADMIN
// fs.ErrPermission.
func (c *Conn) Supported() error {
	_, err := c.generation()
	return err
}

// Send has the kernel carry out a batch: all of it, or nothing. Unless since is 0, the
// batch is refused with ErrChanged if it was not the last generation any more (see
// List). The error is *Error for a refusal, and ErrUnknown where the answer was lost.
func (c *Conn) Send(b *Batch, since uint32) error {
	if b.last() == 0 {
		return nil
	}
	if c.stale {
		c.drain()
	}
	binary.BigEndian.PutUint32(b.bytes[generation:], since)
	to := &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}
	for enlarged := false; ; {
		// The kernel carries it out within the call, so what fails here was not done.
		switch err := syscall.Sendto(c.n.FD(), b.bytes, 0, to); {
		case err == nil:
			return c.verdict(b)
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EMSGSIZE) && !enlarged:
			enlarged = true
			if err := c.enlarge(len(b.bytes)); err != nil {
				return err
			}
		default:
			e := &Error{Command: -1}
			if !errors.As(err, &e.Errno) {
				return fmt.Errorf("nf_tables batch: %w", err)
			}
			if e.Errno == syscall.EMSGSIZE {
				e.Message = fmt.Sprintf("it has %d bytes, and net.core.wmem_max of the host allows less", len(b.bytes))
			}
			return e
		}
	}
}

// enlarge makes the socket take a message of that size.
func (c *Conn) enlarge(size int) error {
	size += sendBufferSpare
	err := syscall.SetsockoptInt(c.n.FD(), syscall.SOL_SOCKET, syscall.SO_SNDBUFFORCE, size)
	if err != nil {
		// CAP_NET_ADMIN of a user namespace is not enough for that (socket(7)): as much
		// as net.core.wmem_max allows.
		err = syscall.SetsockoptInt(c.n.FD(), syscall.SOL_SOCKET, syscall.SO_SNDBUF, size)
	}
	if err != nil {
		return fmt.Errorf("nf_tables batch of %d bytes: send buffer: %w", size, err)
	}
	return nil
}

// verdict reads the kernel's answer. It has put all of it into the socket already:
// first an error of the commit, then what it says of messages, in their order.
func (c *Conn) verdict(b *Batch) error {
	if c.answer == nil {
		c.answer = make([]byte, answerBuffer)
	}
	var refusal *Error
	lost := false
	flags := 0
	for {
		size, from, err := syscall.Recvfrom(c.n.FD(), c.answer, flags)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.ENOBUFS): // more errors than the socket holds
			lost, flags = true, syscall.MSG_DONTWAIT
			continue
		case err != nil && refusal != nil:
			return refusal
		case err != nil:
			c.stale = true
			if errors.Is(err, syscall.EAGAIN) || lost {
				return fmt.Errorf("nf_tables batch: %w", ErrUnknown)
			}
			return fmt.Errorf("nf_tables batch: %w: %w", ErrUnknown, err)
		}
		if sa, ok := from.(*syscall.SockaddrNetlink); !ok || sa.Pid != 0 {
			continue // not the kernel's
		}
		end := false
		refusal, end = answers(refusal, b, c.answer[:size])
		switch {
		case end && refusal != nil:
			return refusal
		case end:
			return nil
		case refusal != nil:
			flags = syscall.MSG_DONTWAIT // whatever else is there
		}
	}
}

// answers reads messages of the kernel's answer to b, adds to refusal what they refuse,
// and says whether that to the last of b was among them.
func answers(refusal *Error, b *Batch, buf []byte) (_ *Error, end bool) {
	order := binary.NativeEndian
	for len(buf) >= netlinkHeader {
		length := int(order.Uint32(buf))
		if length < netlinkHeader || length > len(buf) {
			return refusal, end
		}
		body := buf[netlinkHeader:length]
		// struct nlmsgerr: the error, and the header of the message that it is about.
		if order.Uint16(buf[4:]) == syscall.NLMSG_ERROR && len(body) >= 4+netlinkHeader {
			seq := order.Uint32(body[4+8:])
			end = end || seq == b.last()
			if code := int32(order.Uint32(body)); code < 0 {
				if refusal == nil {
					refusal = newError(b.command(seq), syscall.Errno(-code), body, order.Uint16(buf[6:]))
				} else {
					refusal.More++
				}
			}
		}
		buf = buf[min((length+3)&^3, len(buf)):]
	}
	return refusal, end
}

func newError(command int, errno syscall.Errno, body []byte, flags uint16) *Error {
	e := &Error{Command: command, Errno: errno, changed: command < 0 && errno == syscall.ERESTART}
	if flags&flagAckTLVs == 0 {
		return e
	}
	skip := 4 + netlinkHeader
	if flags&flagCapped == 0 {
		skip = 4 + int(binary.NativeEndian.Uint32(body[4:]))
	}
	for typ, v := range kernel.Attrs(binary.NativeEndian, body[min(skip, len(body)):]) {
		switch {
		case typ == attrMessage:
			e.Message = kernel.CString(v)
		case typ == attrOffset && len(v) == 4:
			e.Offset = binary.NativeEndian.Uint32(v)
		}
	}
	return e
}

// drain reads what is left of answers nobody waits for any more.
func (c *Conn) drain() {
	for {
		_, _, err := syscall.Recvfrom(c.n.FD(), c.answer, syscall.MSG_DONTWAIT)
		if err != nil && !errors.Is(err, syscall.EINTR) && !errors.Is(err, syscall.ENOBUFS) {
			c.stale = false
			return
		}
	}
}

// List reads the table inet of that name, nil if there is none, and says which
// generation of the rules that was: all tables of the network namespace count as one.
// What the table holds and no rules.Set.Native makes is in Strange, and in Unknown of
// its rule.
//
// A reading counts if no commit came in between. Where others commit all the time, there
// is none such: after some, three in a row that are the same do.
func (c *Conn) List(table string) (*rules.Native, uint32, error) {
	return c.listOf(familyInet, "inet", table)
}

// families are the NFPROTO_* of tables that see packets of IP alone.
var families = map[string]byte{"inet": familyInet, "ip": familyIPv4, "ip6": familyIPv6}

// ListForeign reads a table of others, of the family inet, ip or ip6, as List does. A
// rule with something Unknown has the Matches that come in front of that; a rule of a
// table of ip or ip6 does not name its family.
func (c *Conn) ListForeign(family, table string) (*rules.Native, error) {
	number, ok := families[family]
	if !ok {
		return nil, fmt.Errorf("nf_tables family %q: want inet, ip or ip6", family)
	}
	n, _, err := c.listOf(number, family, table)
	return n, err
}

func (c *Conn) listOf(family byte, name, table string) (*rules.Native, uint32, error) {
	if c.stale {
		c.drain()
	}
	what := fmt.Sprintf("table %s %q", name, table)
	var last *rules.Native
	same := 0 // how many in a row were last
	for try := range 2 * readTries {
		before, err := c.generation()
		if err != nil {
			return nil, 0, err
		}
		n, whole, err := c.list(family, table)
		if err != nil {
			return nil, 0, kernel.NFTError(what, err)
		}
		after, err := c.generation()
		if err != nil {
			return nil, 0, err
		}
		switch torn := n == nil && !whole; {
		case torn:
			same = 0
		case same > 0 && (last == nil) == (n == nil) && (n == nil || n.Same(last)):
			same++
		default:
			same = 1
		}
		if whole && before == after || same >= 3 && try >= readTries {
			return n, after, nil
		}
		last = n
	}
	return nil, 0, fmt.Errorf("nf_tables %s: %w", what, kernel.ErrChanging)
}

// generation is the number of the last commit.
func (c *Conn) generation() (uint32, error) {
	var id uint32
	found := false
	_, err := c.ask(getGen, syscall.NLM_F_ACK, []byte{syscall.AF_UNSPEC, 0, 0, 0}, func(body []byte) {
		for typ, v := range kernel.Attrs(binary.NativeEndian, body[min(nfgenHeader, len(body)):]) {
			if n, ok := be32(v); ok && typ == genID {
				id, found = n, true
			}
		}
	})
	if err == nil && !found {
		err = syscall.EBADMSG
	}
	return id, kernel.NFTError("generation", err)
}

// ask sends a request and hands over the answers.
func (c *Conn) ask(typ, flags uint16, request []byte, each func(body []byte)) (whole bool, err error) {
	if err := c.n.Send(typ, flags, request); err != nil {
		return false, err
	}
	interrupted, err := c.n.Receive(func(body []byte) bool { each(body); return true })
	return !interrupted, err
}

// list reads the table once; whole is false if some table changed meanwhile, and then
// it is nil where a part of it was there and is gone.
func (c *Conn) list(family byte, table string) (_ *rules.Native, whole bool, err error) {
	d := decoder{order: binary.NativeEndian, family: family, Native: rules.Native{Table: table}}
	request := kernel.AppendAttr([]byte{family, 0, 0, 0}, attrTable, append([]byte(table), 0))
	if _, err := c.ask(getTable, syscall.NLM_F_ACK, request, d.table); err != nil {
		if errors.Is(err, syscall.ENOENT) {
			return nil, true, nil
		}
		return nil, false, err
	}
	whole = true
	dump := func(typ uint16, request []byte, each func([]byte)) {
		if err == nil {
			var all bool
			all, err = c.ask(typ, syscall.NLM_F_DUMP, request, each)
			whole = whole && all
		}
	}
	dump(getChain, request, d.chain)
	dump(getSet, request, d.set)
	dump(getObject, request, func(body []byte) { d.other("object", body) })
	dump(getFlowtable, request, func(body []byte) { d.other("flowtable", body) })
	for _, s := range d.Sets {
		dump(getSetElem, kernel.AppendAttr(request[:len(request):len(request)], elemListSet, append([]byte(s.Name), 0)), d.elements)
	}
	dump(getRule, request, d.addRule)
	d.ranges()
	if errors.Is(err, syscall.ENOENT) { // something was there that is gone
		return nil, false, nil
	}
	return &d.Native, whole, err
}
