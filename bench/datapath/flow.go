//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"syscall"
	"time"
	"unsafe"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// The flows, by name. "own" is the proxy's, which nobody redirects; first and last are of
// the list of exclusions.
const (
	flowOut, flowOwn, flowIn                           = "out", "own", "in"
	flowOutFirst, flowOutLast, flowInFirst, flowInLast = "out first", "out last", "in first", "in last"
	flowQuery, flowQueryNew                            = "query", "query, new port"
)

// flow is from where to where packets go.
type flow struct {
	name   string
	family rules.Family
	from   *netlab.Namespace
	uid    uint32
	dst    netip.AddrPort
	// Who answers.
	by   *netlab.Namespace
	at   netip.AddrPort
	byID uint32
}

// flow finds a flow by its name; ok is whether the way has it.
func (h *host) flow(f rules.Family, name string) (_ flow, ok bool) {
	hostAddr, client, local, every := netlab.Host4, netlab.Client4, netip.MustParseAddr("127.0.0.1"), netip.IPv4Unspecified()
	if f == rules.IPv6 {
		hostAddr, client, local, every = netlab.Host6, netlab.Client6, netip.IPv6Loopback(), netip.IPv6Unspecified()
	}
	to := netip.AddrPortFrom
	w, i := h.way, 0
	if name == flowOutLast || name == flowInLast {
		i = w.list.n - 1
	}
	out := flow{name: name, family: f, from: h.Host, uid: crowd.AppUID, dst: to(client, 443), by: h.Client, byID: crowd.AppUID}
	in := flow{name: name, family: f, from: h.Client, uid: crowd.AppUID, dst: to(hostAddr, 80), by: h.Host, byID: crowd.AppUID}
	answer := func(fl flow) (flow, bool) { fl.at = fl.dst; return fl, w.list.n > 0 || name == flowOwn }
	redirected := func(fl flow, port uint16, on bool) (flow, bool) {
		// REDIRECT chooses an address of the interface, whichever it is (nf_nat_redirect.c).
		fl.by, fl.byID, fl.at = h.Host, tproxy.DefaultProxyUID, to(every, port)
		direct := to(hostAddr, port)
		if fl.from == h.Host {
			direct = to(local, port)
			fl.at = direct
		}
		if !on { // where the redirection would have sent it
			fl.dst = direct
		}
		return fl, true
	}
	switch name {
	case flowOwn:
		out.uid = tproxy.DefaultProxyUID
		return answer(out)
	case flowOut:
		return redirected(out, tproxy.DefaultOutboundPort, w.redirects)
	case flowIn:
		return redirected(in, tproxy.DefaultInboundPort, w.redirects)
	case flowOutFirst, flowOutLast:
		if out.dst = to(client, port(i)); !w.list.ports {
			out.dst = to(prefix(f, max(i, 0)).Addr(), 443)
		}
		return answer(out)
	case flowInFirst, flowInLast:
		in.dst = to(hostAddr, port(i))
		if !w.list.ports {
			in.dst = to(map[string]netip.Addr{flowInFirst: first[f], flowInLast: last[f]}[name], 80)
		}
		return answer(in)
	}
	out.dst = to(client, 53)
	fl, _ := redirected(out, tproxy.DefaultDNSPort, w.dns)
	return fl, w.dns || !w.redirects
}

// measure is what is measured of a flow.
type measure struct {
	name  string
	flows []string
	few   bool // the lists in between are left out
	// prepare opens what answers, and once does count of what is measured.
	prepare func(*host, flow) (closers, error)
	once    func(*host, flow, closers, int) error
	count   int
	unit    float64 // how many of what is reported one of count is
}

// The measures, by name.
const (
	connecting = "a new connection"
	accepting  = "a new connection, accepted"
	packets    = "an established packet"
	streaming  = "throughput"
	querying   = "a query"
)

// streamed is how many bytes one stream sends at a time.
const streamed = 1 << 16

var (
	lasting  = []string{flowOut, flowOwn, flowIn}
	measures = []measure{
		{connecting, append(lasting, flowOutFirst, flowOutLast, flowInFirst, flowInLast), false, nobody, refused, 10, 1},
		{accepting, []string{flowOut, flowIn}, false, listening, accepted, 6, 1},
		{packets, lasting, true, connected, bounced, 15, 2},
		{streaming, lasting, true, connected, sent, 8, streamed},
		{querying, []string{flowQuery}, true, talking, asked, 12, 1},
		{querying, []string{flowQueryNew}, true, answering, askedAnew, 8, 1},
	}
)

// batches is how many times count makes one measurement: the lower quartile of them. An
// interrupt takes as long as several connections, meets some of the batches, and is
// counted to the thread that it meets.
const batches = 20

// sample measures once: ns of one.
func (h *host) sample(m measure, fl flow) (float64, error) {
	open, err := m.prepare(h, fl)
	defer open.close()
	if err != nil {
		return 0, err
	}
	var times []float64
	err = h.In(fl.from, func() error {
		return netlab.As(fl.uid, fl.uid, func() error {
			for range batches / 4 { // what was in the caches is another host's
				if err := m.once(h, fl, open, m.count); err != nil {
					return err
				}
			}
			for range batches {
				start := h.clock()
				if err := m.once(h, fl, open, m.count); err != nil {
					return err
				}
				times = append(times, float64(h.clock()-start)/float64(m.count)/m.unit)
			}
			return nil
		})
	})
	if err != nil {
		return 0, err
	}
	slices.Sort(times)
	return times[batches/4], nil
}

// busy is how long this thread has had a processor (CLOCK_THREAD_CPUTIME_ID of
// clock_gettime(2)), in ns: what other processes do is not in it.
func busy() int64 {
	const threadCPU = 3
	var t syscall.Timespec
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, threadCPU, uintptr(unsafe.Pointer(&t)), 0); errno != 0 {
		panic(errno) // it is there since Linux 2.6.12
	}
	return t.Nano()
}

var began = time.Now()

// wall is the time, in ns.
func wall() int64 { return int64(time.Since(began)) }

// complete is whether the thread's own clock counts what the kernel does for a packet at
// the end of a system call (softirq). A kernel with CONFIG_IRQ_TIME_ACCOUNTING leaves it
// out (update_rq_clock_task, kernel/sched/core.c); in the batch that was interrupted
// least the two clocks agree, or never.
func complete(busy, wall []float64) bool {
	for i := range busy {
		if busy[i] > 0.9*wall[i] {
			return true
		}
	}
	return false
}

// choose finds the clock to measure with.
func choose(h *host) (clock func() int64, name string, err error) {
	fl, _ := h.flow(rules.IPv4, flowOut)
	open, err := nobody(h, fl)
	defer open.close()
	var cpu, all []float64
	for range 10 * batches {
		b, w := busy(), wall()
		if err == nil {
			err = refused(h, fl, open, 10)
		}
		cpu, all = append(cpu, float64(busy()-b)), append(all, float64(wall()-w))
	}
	if complete(cpu, all) {
		return busy, "the thread's processor time", err
	}
	return wall, "wall time (the kernel's clock for a thread leaves out softirq)", err
}

// closers are open sockets: the one that answers is the first.
type closers []int

func (c closers) close() {
	for _, fd := range c {
		_ = syscall.Close(fd)
	}
}

func address(a netip.AddrPort) syscall.Sockaddr {
	if a.Addr().Is4() {
		return &syscall.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &syscall.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func (fl flow) socket(kind int) (int, error) {
	domain := syscall.AF_INET
	if fl.family == rules.IPv6 {
		domain = syscall.AF_INET6
	}
	return syscall.Socket(domain, kind|syscall.SOCK_CLOEXEC, 0)
}

// nobody answers: there is only the client's socket.
func nobody(h *host, fl flow) (open closers, err error) {
	err = h.In(fl.from, func() error {
		return netlab.As(fl.uid, fl.uid, func() error {
			fd, err := fl.socket(syscall.SOCK_STREAM)
			if err != nil {
				return err
			}
			open = closers{fd}
			every := netip.IPv4Unspecified()
			if fl.family == rules.IPv6 {
				every = netip.IPv6Unspecified()
			}
			return syscall.Bind(fd, address(netip.AddrPortFrom(every, 0)))
		})
	})
	return open, err
}

// refused connects to where nobody listens: a SYN and a reset, and conntrack forgets
// the connection at once (nf_conntrack_tcp_packet, net/netfilter/nf_conntrack_proto_tcp.c).
// The socket is as before (__inet_stream_connect, net/ipv4/af_inet.c) and so is its port,
// so that conntrack's buckets are in the cache: they would be a tenth of it all, and noise.
func refused(_ *host, fl flow, open closers, n int) error {
	dst := address(fl.dst)
	for range n {
		if err := syscall.Connect(open[0], dst); err != syscall.ECONNREFUSED {
			return fmt.Errorf("to %s, where nobody listens: %v", fl.dst, err)
		}
	}
	return nil
}

// bound opens what answers.
func (h *host) bound(fl flow, kind int) (open closers, err error) {
	err = h.In(fl.by, func() error {
		return netlab.As(fl.byID, fl.byID, func() error {
			fd, err := fl.socket(kind)
			if err != nil {
				return err
			}
			open = closers{fd}
			return errors.Join(syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1), syscall.Bind(fd, address(fl.at)))
		})
	})
	if err != nil {
		return open, fmt.Errorf("listen at %s: %w", fl.at, err)
	}
	return open, nil
}

func listening(h *host, fl flow) (closers, error) {
	open, err := h.bound(fl, syscall.SOCK_STREAM)
	if err == nil {
		err = errors.Join(syscall.Listen(open[0], 16), syscall.SetNonblock(open[0], true))
	}
	return open, err
}

// accepted connects, accepts and resets. The reset leaves no TIME_WAIT behind.
func accepted(_ *host, fl flow, open closers, n int) error {
	for range n {
		c, s, err := fl.connect(open[0])
		syscall.Close(c)
		syscall.Close(s)
		if err != nil {
			return err
		}
	}
	return nil
}

// connect makes a connection that is reset when it is closed.
func (fl flow) connect(listener int) (c, s int, err error) {
	s = -1
	if c, err = fl.socket(syscall.SOCK_STREAM); err != nil {
		return -1, s, err
	}
	if err = syscall.SetsockoptLinger(c, syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1}); err != nil {
		return c, s, err
	}
	if err = syscall.Connect(c, address(fl.dst)); err != nil {
		return c, s, fmt.Errorf("connect to %s: %w", fl.dst, err)
	}
	// The handshake is over, and was with this listener or another one.
	err = eventually(func() (err error) {
		s, _, err = syscall.Accept4(listener, syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK)
		return err
	})
	if err != nil {
		return c, s, fmt.Errorf("to %s: nobody came to %s: %w", fl.dst, fl.at, err)
	}
	return c, s, nil
}

// connected opens a listener, and both ends of a connection.
func connected(h *host, fl flow) (open closers, err error) {
	if open, err = listening(h, fl); err != nil {
		return open, err
	}
	err = h.In(fl.from, func() error {
		return netlab.As(fl.uid, fl.uid, func() error {
			c, s, err := fl.connect(open[0])
			for _, fd := range []int{c, s} {
				if fd >= 0 {
					open = append(open, fd)
				}
				if err == nil {
					err = errors.Join(syscall.SetNonblock(fd, true), syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1))
				}
			}
			return err
		})
	})
	return open, err
}

// bounced sends a byte there and back.
func bounced(_ *host, _ flow, open closers, n int) error {
	b := []byte{1}
	for range n {
		for _, ends := range [2][2]int{{open[1], open[2]}, {open[2], open[1]}} {
			if _, err := syscall.Write(ends[0], b); err != nil {
				return err
			}
			if err := eventually(func() error { _, err := syscall.Read(ends[1], b); return err }); err != nil {
				return err
			}
		}
	}
	return nil
}

// patience is how long a packet may take. As a rule it is there when the system call that
// sent it ends, and later only where ksoftirqd had to help.
const patience = 300 * time.Millisecond

// eventually does without a wait for what the kernel has nearly always done.
func eventually(f func() error) error {
	err := f()
	if err != syscall.EAGAIN {
		return err
	}
	for deadline := time.Now().Add(patience); err == syscall.EAGAIN && time.Now().Before(deadline); {
		err = f()
	}
	return err
}

// sent writes n times as much as one packet of the loopback holds at most, and reads it.
func sent(_ *host, _ flow, open closers, n int) error {
	var buf [streamed]byte
	left, unread := n*streamed, n*streamed
	for deadline := (time.Time{}); unread > 0; {
		w, err := syscall.Write(open[1], buf[:min(left, streamed)])
		if err != nil && err != syscall.EAGAIN {
			return err
		}
		left -= max(w, 0)
		r := 0
		for err = nil; err == nil && r < unread; {
			var k int
			if k, err = syscall.Read(open[2], buf[:]); k == 0 && err == nil {
				return io.ErrUnexpectedEOF
			}
			r += max(k, 0)
		}
		if err != nil && err != syscall.EAGAIN {
			return err
		}
		unread -= r
		switch {
		case w > 0 || r > 0:
			deadline = time.Time{}
		case deadline.IsZero():
			deadline = time.Now().Add(patience)
		case time.Now().After(deadline):
			return fmt.Errorf("the stream stands, %d bytes before its end", unread)
		}
	}
	return nil
}

// answering opens the server of queries.
func answering(h *host, fl flow) (closers, error) {
	return h.bound(fl, syscall.SOCK_DGRAM|syscall.SOCK_NONBLOCK)
}

// talking opens the server and one client.
func talking(h *host, fl flow) (closers, error) {
	open, err := answering(h, fl)
	if err != nil {
		return open, err
	}
	err = h.In(fl.from, func() error {
		return netlab.As(fl.uid, fl.uid, func() error {
			fd, err := fl.client()
			if fd >= 0 {
				open = append(open, fd)
			}
			return err
		})
	})
	return open, err
}

// client opens a socket to ask with.
func (fl flow) client() (int, error) {
	fd, err := fl.socket(syscall.SOCK_DGRAM | syscall.SOCK_NONBLOCK)
	if err != nil {
		return -1, err
	}
	return fd, syscall.Connect(fd, address(fl.dst))
}

// asked asks and answers n times.
func asked(_ *host, fl flow, open closers, n int) error {
	for range n {
		if err := fl.ask(open[1], open[0]); err != nil {
			return err
		}
	}
	return nil
}

// askedAnew asks from a new port each time, as the C library does.
func askedAnew(_ *host, fl flow, open closers, n int) error {
	for range n {
		fd, err := fl.client()
		if err == nil {
			err = fl.ask(fd, open[0])
		}
		if fd >= 0 {
			syscall.Close(fd)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// query is what is asked, and the answer.
var query, _ = dns.Query(0x1337, "host0.example")

func (fl flow) ask(client, server int) error {
	var buf [512]byte
	var from syscall.Sockaddr
	if _, err := syscall.Write(client, query); err != nil {
		return fmt.Errorf("a query to %s: %w", fl.dst, err)
	}
	err := eventually(func() (err error) { _, from, err = syscall.Recvfrom(server, buf[:], 0); return err })
	if err != nil {
		return fmt.Errorf("to %s: no query came to %s: %w", fl.dst, fl.at, err)
	}
	if err := syscall.Sendto(server, query, 0, from); err != nil {
		return fmt.Errorf("an answer from %s: %w", fl.at, err)
	}
	if err := eventually(func() error { _, err := syscall.Read(client, buf[:]); return err }); err != nil {
		return fmt.Errorf("no answer from %s: %w", fl.dst, err)
	}
	return nil
}

// check tries each flow once: it has to arrive where its name says, where only that
// socket is open, and nowhere else.
func (h *host) check() error {
	var errs []error
	for _, m := range measures {
		if m.name != accepting && m.name != querying {
			continue
		}
		names := m.flows
		if m.name == accepting {
			names = measures[0].flows
		}
		for _, f := range rules.Families() {
			for _, name := range names {
				fl, ok := h.flow(f, name)
				if !ok {
					continue
				}
				m.count = 1
				if _, err := h.sample(m, fl); err != nil {
					errs = append(errs, fmt.Errorf("%s, %s: %w", f, name, err))
				}
			}
		}
	}
	return errors.Join(errs...)
}
