package procfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"net/netip"
	"os"
	"slices"
	"strconv"
)

// Socket is a line of /proc/net/tcp, tcp6, udp or udp6 (proc_net(5)).
type Socket struct {
	// Local and Remote are as the kernel has them: an IPv4 connection of an
	// IPv6 socket keeps its v4-mapped addresses.
	Local, Remote netip.AddrPort
	// Inode is 0 for what no process holds any more or yet (TIME_WAIT,
	// SYN_RECV).
	Inode uint64
	UID   uint32
	// Listening: a TCP socket in LISTEN, a UDP socket that is not connected and
	// so takes datagrams of anybody.
	Listening bool
}

// States of include/net/tcp_states.h; an unconnected UDP socket is in
// TCP_CLOSE.
const (
	stateClose  = 7
	stateListen = 10
)

// TCP returns the TCP sockets of the calling thread's network namespace, IPv4
// first. An absent tcp6 is IPv6 switched off and no error.
func (f FS) TCP() ([]Socket, error) {
	return f.sockets("tcp", "tcp6", stateListen)
}

// UDP returns the bound UDP sockets of the calling thread's network namespace,
// IPv4 first. An absent udp6 is IPv6 switched off and no error.
func (f FS) UDP() ([]Socket, error) {
	return f.sockets("udp", "udp6", stateClose)
}

// ListensOn says whether a TCP socket of either family, whatever its address,
// listens on the port in the calling thread's network namespace.
func (f FS) ListensOn(port uint16) (bool, error) {
	sockets, err := f.listeningTCP()
	for _, s := range sockets {
		if s.Local.Port() == port {
			return true, nil
		}
	}
	return false, err
}

func (f FS) listeningTCP() ([]Socket, error) {
	if f.Listening != nil {
		if sockets, err := f.Listening(); err == nil {
			return sockets, nil
		}
	}
	sockets, err := f.TCP()
	return slices.DeleteFunc(sockets, func(s Socket) bool { return !s.Listening }), err
}

// ListensUDP returns the UDP sockets that a datagram to addr:port may reach
// from anybody: unconnected, and bound to that address, to the unspecified one
// of its family or, for IPv4, to [::]. That an IPv6 socket is IPV6_V6ONLY, or
// bound to a device, proc does not tell: such sockets are returned too.
func (f FS) ListensUDP(addr netip.Addr, port uint16) ([]Socket, error) {
	sockets, err := f.UDP()
	addr = addr.Unmap().WithZone("")
	var hit []Socket
	for _, s := range sockets {
		if !s.Listening || s.Local.Port() != port {
			continue
		}
		local := s.Local.Addr().Unmap()
		wildcard := local.IsUnspecified() && (local.Is6() || addr.Is4())
		if wildcard || local == addr {
			hit = append(hit, s)
		}
	}
	return hit, err
}

func (f FS) sockets(v4, v6 string, listening uint64) ([]Socket, error) {
	if err := f.supported(); err != nil {
		return nil, err
	}
	var all []Socket
	for _, name := range []string{v4, v6} {
		path := f.path("thread-self", "net", name)
		text, err := os.ReadFile(path)
		if name == v6 && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if all, err = parseSockets(all, text, listening, littleEndian); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return all, nil
}

var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// parseSockets appends the sockets of one file, which a kernel of that byte
// order wrote: get_tcp4_sock (net/ipv4/tcp_ipv4.c) prints the
// network-order address as one native word, get_tcp6_sock
// (net/ipv6/tcp_ipv6.c) as four; ports are printed in order.
func parseSockets(all []Socket, text []byte, listening uint64, little bool) ([]Socket, error) {
	_, text, _ = bytes.Cut(text, []byte("\n")) // the heading
	if n := len(text) / 128; cap(all)-len(all) < n {
		// An IPv4 line is 128 bytes of UDP and 150 of TCP: grow once.
		all = append(make([]Socket, 0, len(all)+n+1), all...)
	}
	for len(text) > 0 {
		var line []byte
		line, text, _ = bytes.Cut(text, []byte("\n"))
		rest := line
		// sl local remote st tx:rx tr:when retrnsmt uid timeout inode
		var fields [10][]byte
		for i := range fields {
			fields[i], rest = nextField(rest)
		}
		if len(fields[0]) == 0 {
			continue
		}
		local, ok1 := parseEndpoint(fields[1], little)
		remote, ok2 := parseEndpoint(fields[2], little)
		state, ok3 := parseNumber(fields[3], 16, 8)
		uid, ok4 := parseNumber(fields[7], 10, 32)
		inode, ok5 := parseNumber(fields[9], 10, 64)
		if !ok1 || !ok2 || !ok3 || !ok4 || !ok5 {
			return nil, fmt.Errorf("not a socket: %q", line)
		}
		all = append(all, Socket{
			Local:     local,
			Remote:    remote,
			Inode:     inode,
			UID:       uint32(uid),
			Listening: state == listening,
		})
	}
	return all, nil
}

func nextField(b []byte) (field, rest []byte) {
	for len(b) > 0 && b[0] == ' ' {
		b = b[1:]
	}
	if i := bytes.IndexByte(b, ' '); i >= 0 {
		return b[:i], b[i:]
	}
	return b, nil
}

func parseNumber(b []byte, base, bits int) (uint64, bool) {
	n, err := strconv.ParseUint(string(b), base, bits)
	return n, err == nil
}

func parseEndpoint(b []byte, little bool) (netip.AddrPort, bool) {
	// 8 or 32 hexadecimal digits, a colon, 4 digits.
	if len(b) != 8+1+4 && len(b) != 32+1+4 {
		return netip.AddrPort{}, false
	}
	colon := len(b) - 5
	port, ok := parseNumber(b[colon+1:], 16, 16)
	if b[colon] != ':' || !ok {
		return netip.AddrPort{}, false
	}
	var raw [16]byte
	for i := 0; i < colon; i += 8 {
		word, ok := parseNumber(b[i:i+8], 16, 32)
		if !ok {
			return netip.AddrPort{}, false
		}
		if little {
			word = uint64(bits.ReverseBytes32(uint32(word)))
		}
		binary.BigEndian.PutUint32(raw[i/2:], uint32(word))
	}
	addr := netip.AddrFrom16(raw)
	if colon == 8 {
		addr = netip.AddrFrom4([4]byte(raw[:4]))
	}
	return netip.AddrPortFrom(addr, uint16(port)), true
}
