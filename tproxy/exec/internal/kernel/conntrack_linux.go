package kernel

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"syscall"
)

// Of include/uapi/linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h and
// nf_conntrack_tcp.h.
const (
	ctMsgGet = 1<<8 | 1 // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaStatus     = 3
	ctaProtoInfo  = 4

	ctaTupleIP      = 1
	ctaTupleProto   = 2
	ctaProtoNum     = 1
	ctaProtoSrcPort = 2
	ctaProtoDstPort = 3

	ctaProtoInfoTCP  = 1
	ctaProtoTCPState = 1

	ipsDstNAT = 1 << 5 // IPS_DST_NAT

	tcpSynSent, tcpLastAck = 1, 6 // TCP_CONNTRACK_*; TIME_WAIT and CLOSE come behind
)

// Redirected counts the live TCP connections of a family whose destination was
// translated to one of the ports, in the calling thread's network namespace. Without
// CAP_NET_ADMIN the error is fs.ErrPermission; where the kernel cannot list its
// connections (nf_conntrack_netlink), errors.ErrUnsupported.
func Redirected(f Family, ports ...uint16) (int, error) {
	found, err := connections(f, func(body []byte) (struct{}, bool) {
		return struct{}{}, isRedirected(body, ports)
	})
	return len(found), err
}

// connections lists those connections of a family that pick picks.
func connections[T any](f Family, pick func(body []byte) (T, bool)) ([]T, error) {
	family := uint8(syscall.AF_INET)
	if f == IPv6 {
		family = syscall.AF_INET6
	}
	found, err := dump(syscall.NETLINK_NETFILTER, ctMsgGet, nfgen(family), 0, func(body []byte) (none T, _ bool) {
		if body[0] != family {
			return none, false
		}
		return pick(body)
	})
	switch {
	case err == nil:
		return found, nil
	case errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.EOPNOTSUPP), errors.Is(err, syscall.EPROTONOSUPPORT), errors.Is(err, syscall.ESOCKTNOSUPPORT):
		return nil, fmt.Errorf("connections of %s: %w: %w", f, errors.ErrUnsupported, err)
	}
	return nil, fmt.Errorf("connections of %s: %w", f, err)
}

// Send sends an empty datagram over UDP, as the user would, and returns where the rules
// of this host have sent it, as conntrack knows it: where it was sent to, if nothing
// translated it. The rest is as for Redirected; a user that there is not is ErrNoUser.
func Send(uid uint32, to netip.AddrPort) (netip.AddrPort, error) {
	conn, err := dialAs(uid, to)
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer conn.Close()
	if _, err := conn.Write(nil); err != nil {
		return netip.AddrPort{}, err
	}
	from := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	f := IPv4
	if to.Addr().Is6() {
		f = IPv6
	}
	found, err := connections(f, func(body []byte) (netip.AddrPort, bool) {
		var sent, answered tuple
		for typ, value := range attrs(body, nfgenHeader) {
			switch typ {
			case ctaTupleOrig:
				sent = tupleOf(value)
			case ctaTupleReply:
				answered = tupleOf(value)
			}
		}
		return answered.source, sent == tuple{syscall.IPPROTO_UDP, plain(from), plain(to)}
	})
	switch {
	case err != nil:
		return netip.AddrPort{}, err
	case len(found) == 0:
		return to, nil // untracked
	}
	return found[len(found)-1], nil
}

// dialAs opens a socket that belongs to the user: iptables' owner match looks at the
// filesystem UID with which it was opened (owner_mt, net/netfilter/xt_owner.c).
func dialAs(uid uint32, to netip.AddrPort) (*net.UDPConn, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	was, err := fsuid()
	if err != nil {
		return nil, err
	}
	if was != uid {
		// setfsuid(2) does not tell of failure.
		_ = syscall.Setfsuid(int(uid))
		defer func() { _ = syscall.Setfsuid(int(was)) }()
		if is, err := fsuid(); err != nil || is != uid {
			return nil, fmt.Errorf("UID %d: %w", uid, cmp.Or(err, ErrNoUser))
		}
	}
	return net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
}

// fsuid is the filesystem UID of this thread: the last number of Uid:
// (proc_pid_status(5)).
func fsuid() (uint32, error) {
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return 0, err
	}
	_, ids, _ := bytes.Cut(status, []byte("\nUid:"))
	ids, _, _ = bytes.Cut(ids, []byte("\n"))
	var all [4]uint32
	if _, err := fmt.Sscan(string(ids), &all[0], &all[1], &all[2], &all[3]); err != nil {
		return 0, fmt.Errorf("/proc/thread-self/status: Uid: %q: %w", ids, err)
	}
	return all[3], nil
}

// plain is the address as conntrack has it.
func plain(p netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(p.Addr().Unmap().WithZone(""), p.Port())
}

// tuple is one direction of a connection.
type tuple struct {
	protocol            uint8
	source, destination netip.AddrPort
}

func tupleOf(value []byte) (t tuple) {
	var from, to netip.Addr
	var sport, dport uint16
	for typ, value := range attrs(value, 0) {
		for inner, value := range attrs(value, 0) {
			switch {
			case typ == ctaTupleIP:
				// CTA_IP_V4_SRC, CTA_IP_V4_DST, CTA_IP_V6_SRC, CTA_IP_V6_DST
				a, _ := netip.AddrFromSlice(value)
				if inner%2 == 1 {
					from = a
				} else {
					to = a
				}
			case typ == ctaTupleProto && inner == ctaProtoNum && len(value) == 1:
				t.protocol = value[0]
			case typ == ctaTupleProto && inner == ctaProtoSrcPort && len(value) == 2:
				sport = binary.BigEndian.Uint16(value)
			case typ == ctaTupleProto && inner == ctaProtoDstPort && len(value) == 2:
				dport = binary.BigEndian.Uint16(value)
			}
		}
	}
	t.source, t.destination = netip.AddrPortFrom(from, sport), netip.AddrPortFrom(to, dport)
	return t
}

// isRedirected reports whether a connection is TCP, lives, had its destination
// translated, and is answered from one of the ports.
func isRedirected(body []byte, ports []uint16) bool {
	var status uint32
	var state uint8
	var reply tuple
	for typ, value := range attrs(body, nfgenHeader) {
		switch typ {
		case ctaStatus:
			status, _ = number(value)
		case ctaTupleReply:
			reply = tupleOf(value)
		case ctaProtoInfo:
			for typ, value := range attrs(value, 0) {
				if typ != ctaProtoInfoTCP {
					continue
				}
				for typ, value := range attrs(value, 0) {
					if typ == ctaProtoTCPState && len(value) == 1 {
						state = value[0]
					}
				}
			}
		}
	}
	return reply.protocol == syscall.IPPROTO_TCP && status&ipsDstNAT != 0 && state >= tcpSynSent && state <= tcpLastAck && slices.Contains(ports, reply.source.Port())
}
