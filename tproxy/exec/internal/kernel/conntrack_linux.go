package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"syscall"
)

// Of include/uapi/linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h and
// nf_conntrack_tcp.h.
const (
	ctMsgGet = 1<<8 | 1 // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET

	ctaTupleReply = 2
	ctaStatus     = 3
	ctaProtoInfo  = 4

	ctaTupleProto   = 2
	ctaProtoNum     = 1
	ctaProtoSrcPort = 2

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
	family := uint8(syscall.AF_INET)
	if f == IPv6 {
		family = syscall.AF_INET6
	}
	found, err := dump(syscall.NETLINK_NETFILTER, ctMsgGet, nfgen(family), 0, func(body []byte) (struct{}, bool) {
		return struct{}{}, body[0] == family && isRedirected(body, ports)
	})
	switch {
	case err == nil:
		return len(found), nil
	case errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.EOPNOTSUPP), errors.Is(err, syscall.EPROTONOSUPPORT), errors.Is(err, syscall.ESOCKTNOSUPPORT):
		return 0, fmt.Errorf("connections of %s: %w: %w", f, errors.ErrUnsupported, err)
	}
	return 0, fmt.Errorf("connections of %s: %w", f, err)
}

// isRedirected reports whether a connection is TCP, lives, had its destination
// translated, and is answered from one of the ports.
func isRedirected(body []byte, ports []uint16) bool {
	var status uint32
	var state, proto uint8
	var port uint16
	for typ, value := range attrs(body, nfgenHeader) {
		switch typ {
		case ctaStatus:
			status, _ = number(value)
		case ctaTupleReply:
			for typ, value := range attrs(value, 0) {
				if typ != ctaTupleProto {
					continue
				}
				for typ, value := range attrs(value, 0) {
					switch {
					case typ == ctaProtoNum && len(value) == 1:
						proto = value[0]
					case typ == ctaProtoSrcPort && len(value) == 2:
						port = binary.BigEndian.Uint16(value)
					}
				}
			}
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
	return proto == syscall.IPPROTO_TCP && status&ipsDstNAT != 0 && state >= tcpSynSent && state <= tcpLastAck && slices.Contains(ports, port)
}
