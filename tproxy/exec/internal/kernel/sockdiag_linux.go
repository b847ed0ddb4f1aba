package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/procfs"
)

// Of include/uapi/linux/sock_diag.h and inet_diag.h.
const (
	netlinkSockDiag  = 4  // NETLINK_SOCK_DIAG
	sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY
	tcpListen        = 10 // TCP_LISTEN of include/net/tcp_states.h

	// struct inet_diag_req_v2: family, protocol, ext, pad, states, id.
	inetDiagReqSize = 8 + inetDiagIDSize
	// struct inet_diag_sockid: ports, addresses, interface, cookie; the ports
	// and addresses in network order.
	inetDiagIDSize = 2*2 + 2*16 + 4 + 2*4
	// struct inet_diag_msg: family, state, timer, retrans, id, expires, rqueue,
	// wqueue, uid, inode.
	inetDiagIDOff    = 4
	inetDiagUIDOff   = inetDiagIDOff + inetDiagIDSize + 3*4
	inetDiagInodeOff = inetDiagUIDOff + 4
	inetDiagMsgSize  = inetDiagInodeOff + 4
)

// ListeningTCP returns the listening TCP sockets of the calling thread's
// network namespace, IPv4 first. It is what /proc/net/tcp and tcp6 say of them,
// without the walk through the hash table of all connections of the machine
// that reading those costs (sock_diag(7); 10 ms a file with 262,144 buckets,
// kernel 6.18). Asking may load the kernel's module. The error is for a kernel
// without it.
func ListeningTCP() ([]procfs.Socket, error) {
	var all []procfs.Socket
	for _, family := range []byte{syscall.AF_INET, syscall.AF_INET6} {
		request := make([]byte, inetDiagReqSize)
		request[0], request[1] = family, syscall.IPPROTO_TCP
		binary.NativeEndian.PutUint32(request[4:], 1<<tcpListen)
		found, err := dump(netlinkSockDiag, sockDiagByFamily, request, 0, parseInetDiag)
		if err != nil {
			return nil, fmt.Errorf("listening TCP sockets: %w", err)
		}
		all = append(all, found...)
	}
	return all, nil
}

func parseInetDiag(body []byte) (procfs.Socket, bool) {
	if len(body) < inetDiagMsgSize || body[0] != syscall.AF_INET && body[0] != syscall.AF_INET6 {
		return procfs.Socket{}, false
	}
	id := body[inetDiagIDOff:]
	endpoint := func(port, addr []byte) netip.AddrPort {
		a := netip.AddrFrom4([4]byte(addr[:4]))
		if body[0] == syscall.AF_INET6 {
			a = netip.AddrFrom16([16]byte(addr[:16]))
		}
		return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
	}
	return procfs.Socket{
		Local:     endpoint(id[0:], id[4:]),
		Remote:    endpoint(id[2:], id[20:]),
		UID:       binary.NativeEndian.Uint32(body[inetDiagUIDOff:]),
		Inode:     uint64(binary.NativeEndian.Uint32(body[inetDiagInodeOff:])),
		Listening: body[1] == tcpListen,
	}, true
}
