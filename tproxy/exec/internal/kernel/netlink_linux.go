package kernel

import (
	"encoding/binary"
	"errors"
	"iter"
	"syscall"
)

// Of include/uapi/linux/netlink.h, missing in package syscall.
const (
	nlmFDumpIntr   = 0x10 // NLM_F_DUMP_INTR: something changed during the dump
	netlinkHeader  = syscall.NLMSG_HDRLEN
	dumpTries      = 100 // beside a client that commits again and again, some succeed
	receiveSeconds = 10
	// The kernel sends at most 32 KiB at once (netlink_dump,
	// net/netlink/af_netlink.c).
	receiveBuffer = 64 << 10
)

// ErrChanging is for what could not be read in one piece.
var ErrChanging = errors.New("changed while it was read, every time")

// Netlink is an open socket, of the network namespace of the thread that
// opened it.
type Netlink struct {
	fd  int
	buf []byte
}

// OpenNetlink opens a socket of that protocol, NETLINK_ROUTE for one.
func OpenNetlink(proto int) (*Netlink, error) {
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, proto)
	if err != nil {
		return nil, err
	}
	// The kernel answers within the call that asks or the one that reads: the
	// limit is for emulations of it.
	err = syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &syscall.Timeval{Sec: receiveSeconds})
	if err != nil {
		syscall.Close(fd)
		return nil, err
	}
	return &Netlink{fd: fd, buf: make([]byte, receiveBuffer)}, nil
}

// Close ends it.
func (n *Netlink) Close() { syscall.Close(n.fd) }

// FD is its file descriptor.
func (n *Netlink) FD() int { return n.fd }

// Send sends one request.
func (n *Netlink) Send(typ, flags uint16, body []byte) error {
	b := make([]byte, netlinkHeader, netlinkHeader+len(body))
	binary.NativeEndian.PutUint32(b[0:], uint32(netlinkHeader+len(body)))
	binary.NativeEndian.PutUint16(b[4:], typ)
	binary.NativeEndian.PutUint16(b[6:], flags|syscall.NLM_F_REQUEST)
	return syscall.Sendto(n.fd, append(b, body...), 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK})
}

// Receive hands over the body of each message until the end of the answer, its
// error, or until each returns false.
func (n *Netlink) Receive(each func(body []byte) bool) (interrupted bool, err error) {
	for {
		size, from, err := syscall.Recvfrom(n.fd, n.buf, syscall.MSG_TRUNC)
		if errors.Is(err, syscall.EINTR) {
			continue // the runtime's own signals: SO_RCVTIMEO is not restarted (signal(7))
		}
		if err != nil {
			return interrupted, err
		}
		if sa, ok := from.(*syscall.SockaddrNetlink); !ok || sa.Pid != 0 {
			continue // not the kernel's
		}
		if size > len(n.buf) {
			return interrupted, syscall.EMSGSIZE
		}
		for b := n.buf[:size]; len(b) >= netlinkHeader; {
			length := int(binary.NativeEndian.Uint32(b))
			if length < netlinkHeader || length > len(b) {
				return interrupted, syscall.EBADMSG
			}
			typ := binary.NativeEndian.Uint16(b[4:])
			if binary.NativeEndian.Uint16(b[6:])&nlmFDumpIntr != 0 {
				interrupted = true
			}
			body := b[netlinkHeader:length]
			switch typ {
			case syscall.NLMSG_ERROR, syscall.NLMSG_DONE:
				// Both carry a negative errno or 0; an old NLMSG_DONE is empty.
				if len(body) >= 4 {
					if code := int32(binary.NativeEndian.Uint32(body)); code < 0 {
						return interrupted, syscall.Errno(-code)
					}
				}
				return interrupted, nil
			case syscall.NLMSG_NOOP:
			default:
				if !each(body) {
					return interrupted, nil
				}
			}
			b = b[min(align(length), len(b)):]
		}
	}
}

// dump asks for all objects of a type and keeps what item accepts, at most
// limit of them (0 is no limit). It asks again if they changed meanwhile.
func dump[T any](proto int, typ uint16, body []byte, limit int, item func(body []byte) (T, bool)) ([]T, error) {
	for range dumpTries {
		all, interrupted, err := dumpOnce(proto, typ, body, limit, item)
		if err != nil || !interrupted {
			return all, err
		}
	}
	return nil, ErrChanging
}

func dumpOnce[T any](proto int, typ uint16, body []byte, limit int, item func(body []byte) (T, bool)) (all []T, interrupted bool, err error) {
	n, err := OpenNetlink(proto)
	if err != nil {
		return nil, false, err
	}
	defer n.Close()
	if err := n.Send(typ, syscall.NLM_F_DUMP, body); err != nil {
		return nil, false, err
	}
	interrupted, err = n.Receive(func(body []byte) bool {
		if v, ok := item(body); ok {
			all = append(all, v)
		}
		return limit == 0 || len(all) < limit
	})
	if limit > 0 && len(all) == limit {
		interrupted = false // as many as were asked for, whatever else changed
	}
	return all, interrupted, err
}

// change sends one request and returns the kernel's verdict.
func change(proto int, typ, flags uint16, body []byte) error {
	n, err := OpenNetlink(proto)
	if err != nil {
		return err
	}
	defer n.Close()
	if err := n.Send(typ, flags|syscall.NLM_F_ACK, body); err != nil {
		return err
	}
	_, err = n.Receive(func([]byte) bool { return true })
	return err
}

// AppendAttr appends an attribute in the byte order of the machine.
func AppendAttr(b []byte, typ uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(attrHeader+len(value)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, value...)
	return append(b, make([]byte, align(len(value))-len(value))...)
}

// attrs walks the attributes behind a message's fixed header of that size.
func attrs(body []byte, header int) iter.Seq2[uint16, []byte] {
	return Attrs(binary.NativeEndian, body[min(header, len(body)):])
}
