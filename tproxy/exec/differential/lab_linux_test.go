package differential

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	osexec "os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

var (
	passthrough4, passthrough6 = tproxy.PassthroughAddresses()

	// containers and clients are by family, IPv4 first.
	containers = [2]netip.Addr{netlab.Container4, netlab.Container6}
	clients    = [2]netip.Addr{netlab.Client4, netlab.Client6}
	loopbacks  = [2]netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	passing    = [2]netip.Addr{passthrough4, passthrough6}

	// env is the lab's host: its own addresses, and those of the generators.
	env = func() sim.Env {
		e := sim.EnvOf(netlab.Host4, netlab.Host6, netlab.Bridge4, netlab.Bridge6)
		e.Local = append(e.Local, tproxytest.Env().Local...)
		return e
	}()
	// onLink6 are the addresses of the host's network that the client has: it
	// answers ARP for any address that is local to it, but not NDP.
	onLink6 = []netip.Addr{netlab.Client6, netip.MustParseAddr("fd00::9"), netip.MustParseAddr("fd00::53")}
)

// index is 0 for IPv4 and 1 for IPv6.
func index(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

var (
	bridges = []netip.Prefix{netip.MustParsePrefix("172.17.0.0/16"), netip.MustParsePrefix("fd01::/64")}
	nowhere = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"),
		netip.MustParsePrefix("10.0.0.0/32"), netip.MustParsePrefix("10.0.0.255/32"),
		netip.MustParsePrefix("::/128"), netip.MustParsePrefix("::ffff:0:0/96"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8")}
	link6 = netip.MustParsePrefix("fd00::/64")
)

func within(list []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
}

// remote reports whether the client answers for the address, and sends from it:
// it has nearly all there are.
func remote(a netip.Addr) bool {
	return !env.IsLocal(a) && !within(bridges, a) && !within(nowhere, a) && (!link6.Contains(a) || slices.Contains(onLink6, a))
}

// lab is netlab's, with a client that is the whole internet, and servers that
// come as they are needed.
type lab struct {
	*netlab.Lab
	servers map[endpoint]string
	closers []func()
}

// endpoint is where a server listens: over TCP at the unspecified address.
type endpoint struct {
	n       *netlab.Namespace
	network string
	at      netip.AddrPort
}

func newLab(ctx context.Context) (*lab, error) {
	n, err := netlab.New(ctx)
	if err != nil {
		return nil, err
	}
	l := &lab{Lab: n, servers: map[endpoint]string{}}
	if err := errors.Join(l.AddContainer(ctx), l.internet(ctx)); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// internet makes every address local to the client, but for the host's and the
// container's, which throw sends on to the main table (ip-route(8)).
func (l *lab) internet(ctx context.Context) error {
	host := []string{}
	// A rule of any kind takes the tables local and main apart, which are one
	// otherwise (fib_unmerge, net/ipv4/fib_rules.c), and throw is left of both.
	client := []string{"rule add pref 100 lookup main", "route add local 0.0.0.0/0 dev lo table local", "-6 route add throw fe80::/10 table local", "-6 route add local ::/0 dev lo table local"}
	reach := func(p netip.Prefix, onLink bool) {
		f, via := "", netlab.Host4
		if p.Addr().Is6() {
			f, via = "-6 ", netlab.Host6
		}
		client = append(client, f+"route add throw "+p.String()+" table local")
		if !onLink {
			client = append(client, f+"route add "+p.String()+" via "+via.String()+" dev eth0")
		}
	}
	for _, p := range bridges {
		reach(p, false)
	}
	reach(netip.PrefixFrom(netlab.Host4, 32), true)
	reach(netip.PrefixFrom(netlab.Host6, 128), true)
	for _, p := range tproxytest.Env().Local {
		nodad := ""
		if p.Addr().Is6() {
			nodad = " nodad"
		}
		host = append(host, "address add "+p.String()+" dev eth0"+nodad)
		reach(p, false)
	}
	for _, a := range onLink6[1:] {
		client = append(client, "address add "+a.String()+"/128 dev eth0 nodad")
	}
	return errors.Join(
		l.Sysctl(l.Host, "net/ipv6/ip_nonlocal_bind", "1"), // ::6 comes later
		l.ip(ctx, l.Host, host), l.ip(ctx, l.Client, client),
		l.Sysctl(l.Client, "net/ipv4/ip_nonlocal_bind", "1"), l.Sysctl(l.Client, "net/ipv6/ip_nonlocal_bind", "1"),
		l.Settle(l.Host), l.Settle(l.Client))
}

func (l *lab) ip(ctx context.Context, n *netlab.Namespace, lines []string) error {
	// A batch has one family.
	for _, six := range []bool{false, true} {
		var b strings.Builder
		for _, line := range lines {
			rest, is := strings.CutPrefix(line, "-6 ")
			if is == six {
				b.WriteString(rest + "\n")
			}
		}
		args := []string{"-batch", "-"}
		if six {
			args = append([]string{"-6"}, args...)
		}
		if _, err := l.Run(ctx, n, b.String(), "ip", args...); err != nil {
			return err
		}
	}
	return nil
}

func (l *lab) close() {
	for _, c := range slices.Backward(l.closers) {
		c()
	}
	l.Close()
}

// become makes the lab's host what the generators drew: its users, its
// resolv.conf, its resolvers, ::6.
func (l *lab) become(ctx context.Context, h tproxy.Host, resolvConf string) error {
	var users, conf strings.Builder
	users.WriteString("root:x:0:0::/root:/bin/sh\n")
	for _, u := range h.Users {
		fmt.Fprintf(&users, "%s:x:%d:%d::/:/bin/false\n", u.Name, u.UID, u.UID)
	}
	for _, a := range h.Nameservers {
		fmt.Fprintf(&conf, "nameserver %s\n", a)
	}
	if err := errors.Join(os.WriteFile(passwd, []byte(users.String()), 0o644), os.WriteFile(resolvConf, []byte(conf.String()), 0o644)); err != nil {
		return err
	}
	if h.PassthroughAddress {
		if err := errors.Join(l.ip(ctx, l.Host, []string{"address add ::6/128 dev lo nodad"}), l.Settle(l.Host)); err != nil {
			return err
		}
	}
	for _, r := range h.LocalResolvers {
		if err := l.resolver(r); err != nil {
			return err
		}
	}
	return nil
}

// resolver starts a resolver, a process of its own.
func (l *lab) resolver(r tproxy.LocalResolver) error {
	at := netip.AddrPortFrom(r.Address, 53)
	var file *os.File
	err := l.In(l.Host, func() error {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		defer c.Close()
		file, err = c.File()
		return err
	})
	if err != nil {
		return err
	}
	defer file.Close()
	cmd := osexec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", resolverEnv, r.UID))
	cmd.ExtraFiles, cmd.Stderr = []*os.File{file}, os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	l.closers = append(l.closers, func() { _ = in.Close(); _ = cmd.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		return fmt.Errorf("resolver at %s: %q, %w", at, line, err)
	}
	l.servers[endpoint{l.Host, "udp", at}] = "stub"
	return nil
}

// serve starts a server at the endpoint, unless there is one.
func (l *lab) serve(e endpoint, uid uint32, name string) error {
	if _, there := l.servers[e]; there {
		return nil
	}
	l.servers[e] = name
	return l.In(e.n, func() error {
		return netlab.As(uid, uid, func() error {
			if e.network == "udp" {
				c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(e.at))
				if err != nil {
					return err
				}
				l.closers = append(l.closers, func() { _ = c.Close() })
				go answerUDP(c, name)
				return nil
			}
			// Not tcp: that listens at both families for "::".
			ln, err := net.ListenTCP([]string{"tcp4", "tcp6"}[index(e.at.Addr())], net.TCPAddrFromAddrPort(e.at))
			if err != nil {
				return err
			}
			l.closers = append(l.closers, func() { _ = ln.Close() })
			go func() {
				for {
					c, err := ln.AcceptTCP()
					if err != nil {
						return // closed
					}
					go answerTCP(c, name)
				}
			}()
			return nil
		})
	})
}

// answerTCP waits for a line, so that what it answers is of now, and not of when
// the connection came.
func answerTCP(c *net.TCPConn, name string) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
		return
	}
	fmt.Fprintln(c, name, netlab.OriginalDestination(c), c.LocalAddr(), c.RemoteAddr())
}

// answerUDP has to be at the address that was asked.
func answerUDP(c *net.UDPConn, name string) {
	buf := make([]byte, 1500)
	for {
		_, from, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = c.WriteToUDPAddrPort(fmt.Appendln(nil, name, c.LocalAddr(), c.LocalAddr(), from), from)
		}
	}
}

// seen is what became of a flow: who answered, or why nobody did; and how the
// server saw the connection.
type seen struct {
	who                   string
	original, local, from netip.AddrPort
	// tracked is the conntrack entry of the flow on the host.
	tracked track
}

func (s seen) String() string {
	out := s.who
	if s.local.IsValid() {
		out = fmt.Sprintf("%s answered at %s, for %s, from %s", s.who, s.local, s.original, s.from)
	}
	if s.tracked.to.IsValid() {
		out += fmt.Sprintf("; conntrack: to %s in zone %d", s.tracked.to, s.tracked.zone)
	}
	return out
}

// track is where conntrack says that a flow goes.
type track struct {
	to   netip.AddrPort
	zone uint16
}

// dial opens a flow as the packet says.
func (l *lab) dial(n *netlab.Namespace, p sim.Packet) (c net.Conn, err error) {
	d := net.Dialer{Timeout: netlab.Patience, LocalAddr: net.TCPAddrFromAddrPort(p.Source)}
	network := "tcp"
	if p.Protocol == rules.UDP {
		network, d.LocalAddr = "udp", net.UDPAddrFromAddrPort(p.Source)
	}
	err = l.In(n, func() error {
		return netlab.As(p.UID, p.GID, func() (err error) {
			c, err = d.Dial(network, p.Destination.String())
			return err
		})
	})
	return c, err
}

// ask asks who is at the other end.
func ask(c net.Conn) (s seen) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(netlab.Patience))
	if _, err := io.WriteString(c, "?\n"); err != nil {
		return failed(err)
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return failed(err)
	}
	var original, local, from string
	if _, err := fmt.Sscan(line, &s.who, &original, &local, &from); err != nil {
		return failed(fmt.Errorf("answer %q", line))
	}
	s.original, _ = netip.ParseAddrPort(original)
	s.local, _ = netip.ParseAddrPort(local)
	s.from, _ = netip.ParseAddrPort(from)
	return s
}

func failed(err error) seen {
	timeout, ok := errors.AsType[net.Error](err)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return seen{who: netlab.Refused}
	case ok && timeout.Timeout():
		return seen{who: netlab.Timeout}
	}
	return seen{who: err.Error()}
}

// connection is a flow as conntrack knows it.
type connection struct {
	protocol rules.Protocol
	from, to netip.AddrPort
}

// conntrack is where conntrack says that each flow goes; ok is false where the kernel
// does not list them.
func (l *lab) conntrack() (out map[connection]track, ok bool, err error) {
	entries, ok, err := l.Conntrack(l.Host)
	out = map[connection]track{}
	for _, e := range entries {
		out[connection{rules.Protocol(e.Protocol), e.From, e.To}] = track{e.Server, e.Zone}
	}
	return out, ok, err
}
