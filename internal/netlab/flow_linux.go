package netlab

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Patience is how long a connection, an answer, waits for the other side. Nothing
// in the lab takes a millisecond; a machine under load may.
const Patience = time.Second

// What becomes of a flow that nobody answers, in Seen.Who.
const (
	Refused  = "refused"  // a TCP reset, or ICMP says that nobody listens there
	Rejected = "rejected" // ICMP says that there is no way, or that it is prohibited
	Timeout  = "timeout"
	Closed   = "closed" // accepted, and closed without a word
)

// Seen is what became of a flow.
type Seen struct {
	// Who is the name of the server that answered, or Refused, Rejected, Timeout,
	// Closed.
	Who string
	// Original is the destination that the client meant, as the server's kernel
	// has it (SO_ORIGINAL_DST); for UDP the address that the server listens at.
	Original netip.AddrPort
	// From is the client's address as the server sees it.
	From netip.AddrPort
	// Self is the client's own address.
	Self netip.AddrPort
}

func (s Seen) String() string {
	if !s.Original.IsValid() {
		return s.Who
	}
	return fmt.Sprintf("%s (for %s, from %s)", s.Who, s.Original, s.From)
}

// Counter counts the connections or packets that a server was sent.
type Counter struct{ n atomic.Int64 }

// Count returns how many there were.
func (c *Counter) Count() int { return int(c.n.Load()) }

// ListenTCP starts a server of the user's that answers each connection with one
// line, which Dial reads, and then sends back what it gets, until the other side
// closes. An unspecified address listens on all of its family.
func (l *Lab) ListenTCP(n *Namespace, uid uint32, name string, addrs ...netip.AddrPort) (*Counter, error) {
	count := &Counter{}
	return count, l.serveTCP(n, uid, addrs, count, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, name+" "+OriginalDestination(c).String()+" "+remote(c).String()+"\n")
		_, _ = io.Copy(c, c)
	})
}

// ListenUDP starts a server of the user's that answers each packet. It listens at
// the addresses given and answers from them: the unspecified one would answer from
// the wrong address behind REDIRECT.
func (l *Lab) ListenUDP(n *Namespace, uid uint32, name string, addrs ...netip.AddrPort) (*Counter, error) {
	count := &Counter{}
	return count, l.serveUDP(n, uid, addrs, count, func(c *net.UDPConn, at, from netip.AddrPort, _ []byte) {
		_, _ = c.WriteToUDPAddrPort([]byte(name+" "+at.String()+" "+from.String()+"\n"), from)
	})
}

func (l *Lab) serveTCP(n *Namespace, uid uint32, addrs []netip.AddrPort, count *Counter, serve func(*net.TCPConn)) error {
	for _, a := range addrs {
		var ln *net.TCPListener
		err := l.In(n, func() error {
			return As(uid, uid, func() (err error) {
				ln, err = net.ListenTCP("tcp"+version(a.Addr()), net.TCPAddrFromAddrPort(a))
				return err
			})
		})
		if err != nil {
			return err
		}
		l.onClose(func() { _ = ln.Close() })
		go func() {
			for {
				c, err := ln.AcceptTCP()
				if err != nil {
					return // closed
				}
				count.n.Add(1)
				go func() {
					defer c.Close()
					serve(c)
				}()
			}
		}()
	}
	return nil
}

func (l *Lab) serveUDP(n *Namespace, uid uint32, addrs []netip.AddrPort, count *Counter, serve func(c *net.UDPConn, at, from netip.AddrPort, query []byte)) error {
	for _, a := range addrs {
		var c *net.UDPConn
		err := l.In(n, func() error {
			return As(uid, uid, func() (err error) {
				c, err = net.ListenUDP("udp"+version(a.Addr()), net.UDPAddrFromAddrPort(a))
				return err
			})
		})
		if err != nil {
			return err
		}
		l.onClose(func() { _ = c.Close() })
		go func() {
			buf := make([]byte, 1500)
			for {
				k, from, err := c.ReadFromUDPAddrPort(buf)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					continue // somebody refused an answer
				}
				count.n.Add(1)
				query := append([]byte(nil), buf[:k]...)
				// Not in this goroutine: a proxy waits for its own query.
				go serve(c, a, from, query)
			}
		}()
	}
	return nil
}

// version is the end of a network's name: "4" or "6".
func version(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

func remote(c net.Conn) netip.AddrPort {
	return netip.MustParseAddrPort(c.RemoteAddr().String())
}

// OriginalDestination is where the client connected to, before the host's rules
// translated it, as conntrack has it; or the connection's own address where
// conntrack does not know it.
func OriginalDestination(c *net.TCPConn) netip.AddrPort {
	local := netip.MustParseAddrPort(c.LocalAddr().String())
	raw, err := c.SyscallConn()
	if err != nil {
		return local
	}
	// SO_ORIGINAL_DST in linux/netfilter_ipv4.h and IP6T_SO_ORIGINAL_DST in
	// linux/netfilter_ipv6/ip6_tables.h. The two calls of package syscall are for
	// other options, and have room for a sockaddr_in and a sockaddr_in6.
	const original = 80
	out := local
	_ = raw.Control(func(fd uintptr) {
		if local.Addr().Is4() {
			if r, err := syscall.GetsockoptIPv6Mreq(int(fd), syscall.IPPROTO_IP, original); err == nil {
				b := r.Multiaddr
				out = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
			}
			return
		}
		if r, err := syscall.GetsockoptIPv6MTUInfo(int(fd), syscall.IPPROTO_IPV6, original); err == nil {
			p := r.Addr.Port // in network byte order
			out = netip.AddrPortFrom(netip.AddrFrom16(r.Addr.Addr), ntohs(p))
		}
	})
	return out
}

// Dial sends one flow, "tcp" or "udp", from a process of the user's, and tells who
// answered. src may be zero: the kernel chooses; with port 0 it chooses the port.
// The error says that the flow could not even be sent.
func (l *Lab) Dial(n *Namespace, uid uint32, network string, src, dst netip.AddrPort) (Seen, error) {
	h, err := l.hold(n, uid, network, src, dst)
	h.Close()
	return outcome(h.Seen, err)
}

// Held is a TCP connection that stays open.
type Held struct {
	Seen
	conn net.Conn
	read *bufio.Reader
}

// Hold is Dial for a connection that is to live on.
func (l *Lab) Hold(n *Namespace, uid uint32, dst netip.AddrPort) (*Held, error) {
	h, err := l.hold(n, uid, "tcp", netip.AddrPort{}, dst)
	if err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// Alive reports whether the other side still sends back what it is sent.
func (h *Held) Alive() bool {
	_ = h.conn.SetDeadline(time.Now().Add(Patience))
	if _, err := io.WriteString(h.conn, "still there?\n"); err != nil {
		return false
	}
	line, err := h.read.ReadString('\n')
	return err == nil && line == "still there?\n"
}

// Close ends the connection with a reset, so that a client which makes thousands
// of them does not wait for their ports (TIME_WAIT).
func (h *Held) Close() {
	if h.conn == nil {
		return
	}
	if c, ok := h.conn.(*net.TCPConn); ok {
		_ = c.SetLinger(0)
	}
	_ = h.conn.Close()
}

// hold connects and reads the answer's first line.
func (l *Lab) hold(n *Namespace, uid uint32, network string, src, dst netip.AddrPort) (*Held, error) {
	h := &Held{}
	var err error
	if h.conn, err = l.dial(n, uid, network, src, dst); err != nil {
		h.conn = nil
		return h, err
	}
	h.read = bufio.NewReader(h.conn)
	h.Self = netip.MustParseAddrPort(h.conn.LocalAddr().String())
	_ = h.conn.SetDeadline(time.Now().Add(Patience))
	if network == "udp" {
		if _, err := io.WriteString(h.conn, "?"); err != nil {
			return h, err
		}
	}
	line, err := h.read.ReadString('\n')
	if err != nil {
		return h, err
	}
	words := strings.Fields(line)
	if len(words) != 3 {
		return h, fmt.Errorf("%s to %s: answer %q", network, dst, line)
	}
	h.Who = words[0]
	h.Original, _ = netip.ParseAddrPort(words[1])
	h.From, _ = netip.ParseAddrPort(words[2])
	return h, nil
}

func (l *Lab) dial(n *Namespace, uid uint32, network string, src, dst netip.AddrPort) (c net.Conn, err error) {
	d := net.Dialer{Timeout: Patience}
	if src.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(src)
		if network == "udp" {
			d.LocalAddr = net.UDPAddrFromAddrPort(src)
		}
	}
	err = l.In(n, func() error {
		return As(uid, uid, func() (err error) {
			c, err = d.Dial(network+version(dst.Addr()), dst.String())
			return err
		})
	})
	return c, err
}

// outcome turns what the network did into Seen, and leaves what we did an error.
func outcome(s Seen, err error) (Seen, error) {
	if err == nil {
		return s, nil
	}
	timeout, ok := errors.AsType[net.Error](err)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		s.Who = Refused
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EACCES):
		s.Who = Rejected
	case ok && timeout.Timeout():
		s.Who = Timeout
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		s.Who = Closed
	default:
		return s, err
	}
	return s, nil
}

// Mode is what a Proxy does with a connection.
type Mode uint8

const (
	// Answer answers itself, as the server "in", "out" or "dns".
	Answer Mode = iota
	// Pass hands it on to its original destination: what came to in from the
	// passthrough address 127.0.0.6 or ::6, what came to out from its own; and a
	// query to Upstream.
	Pass
)

// Proxy is a small transparent proxy on the lab's host.
type Proxy struct {
	// UID is the user that it runs as.
	UID uint32
	// In, Out and DNS are its ports; 0 leaves one out. DNS is of UDP and TCP.
	In, Out, DNS uint16
	Mode         Mode
	// Upstream is whom Pass asks, over what it was asked over.
	Upstream netip.AddrPort
	// IPv4Only leaves IPv6 out, as a proxy does for --ip-family-mode=ipv4.
	IPv4Only bool

	// Ins, Outs, Queries and, over TCP, Streams count what came, after Start. A proxy
	// in a loop stops at 50 and closes what comes.
	Ins, Outs, Queries, Streams *Counter
}

// Start starts the proxy on the lab's host.
func (p *Proxy) Start(l *Lab) error {
	everywhere := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	// REDIRECT sends the host's own packets to these (redirect_tg4 and
	// nf_nat_redirect_ipv6, net/netfilter/nf_nat_redirect.c).
	loopback := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	if p.IPv4Only {
		everywhere, loopback = everywhere[:1], loopback[:1]
	}
	at := func(addrs []netip.Addr, port uint16) (out []netip.AddrPort) {
		for _, a := range addrs {
			if port != 0 {
				out = append(out, netip.AddrPortFrom(a, port))
			}
		}
		return out
	}
	var err error
	if p.Mode == Answer {
		if p.Ins, err = l.ListenTCP(l.Host, p.UID, "in", at(everywhere, p.In)...); err != nil {
			return err
		}
		if p.Outs, err = l.ListenTCP(l.Host, p.UID, "out", at(everywhere, p.Out)...); err != nil {
			return err
		}
		if p.Streams, err = l.ListenTCP(l.Host, p.UID, "dns", at(everywhere, p.DNS)...); err != nil {
			return err
		}
		p.Queries, err = l.ListenUDP(l.Host, p.UID, "dns", at(loopback, p.DNS)...)
		return err
	}
	p.Ins, p.Outs, p.Queries, p.Streams = &Counter{}, &Counter{}, &Counter{}, &Counter{}
	pass := func(count *Counter, to func(*net.TCPConn) netip.AddrPort, src4, src6 netip.AddrPort) func(*net.TCPConn) {
		return func(c *net.TCPConn) {
			if count.Count() > 50 {
				return
			}
			dst, src := to(c), src4
			if dst.Addr().Is6() {
				src = src6
			}
			up, err := l.dial(l.Host, p.UID, "tcp", src, dst)
			if err != nil {
				return
			}
			defer up.Close()
			go func() { _, _ = io.Copy(up, c); _ = up.(*net.TCPConn).CloseWrite() }()
			_, _ = io.Copy(c, up)
		}
	}
	passthrough4, passthrough6 := netip.MustParseAddrPort("127.0.0.6:0"), netip.MustParseAddrPort("[::6]:0")
	if err = l.serveTCP(l.Host, p.UID, at(everywhere, p.In), p.Ins, pass(p.Ins, OriginalDestination, passthrough4, passthrough6)); err != nil {
		return err
	}
	if err = l.serveTCP(l.Host, p.UID, at(everywhere, p.Out), p.Outs, pass(p.Outs, OriginalDestination, netip.AddrPort{}, netip.AddrPort{})); err != nil {
		return err
	}
	asked := func(*net.TCPConn) netip.AddrPort { return p.Upstream }
	if err = l.serveTCP(l.Host, p.UID, at(everywhere, p.DNS), p.Streams, pass(p.Streams, asked, netip.AddrPort{}, netip.AddrPort{})); err != nil {
		return err
	}
	return l.serveUDP(l.Host, p.UID, at(loopback, p.DNS), p.Queries, func(c *net.UDPConn, _, from netip.AddrPort, query []byte) {
		if p.Queries.Count() > 50 {
			return
		}
		up, err := l.dial(l.Host, p.UID, "udp", netip.AddrPort{}, p.Upstream)
		if err != nil {
			return
		}
		defer up.Close()
		_ = up.SetDeadline(time.Now().Add(Patience))
		answer := make([]byte, 1500)
		if _, err = up.Write(query); err != nil {
			return
		}
		if k, err := up.Read(answer); err == nil {
			_, _ = c.WriteToUDPAddrPort(answer[:k], from)
		}
	})
}
