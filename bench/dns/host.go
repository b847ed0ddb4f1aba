//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	osexec "os/exec"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// host has the server, and the rules of its way.
type host struct {
	*crowd.Host
	way    way
	server *osexec.Cmd
	said   bytes.Buffer
}

func newHost(w way, resolvConf string) (h *host, err error) {
	h = &host{way: w}
	if h.Host, err = crowd.Bare(w.backend); err != nil {
		return nil, err
	}
	err = errors.Join(
		h.Sysctl(h.Lab.Host, "net/ipv4/ip_local_port_range", "16384 65535"),
		h.Sysctl(h.Lab.Host, "net/netfilter/nf_conntrack_udp_timeout", "1"),
		h.Sysctl(h.Lab.Host, "net/netfilter/nf_conntrack_udp_timeout_stream", "1"))
	if err != nil {
		return h, err
	}
	// Bound to loopback: it answers from the address that it was asked at.
	h.server = osexec.Command("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file=", "--bind-interfaces",
		"--port="+fmt.Sprint(tproxy.DefaultDNSPort), "--listen-address=127.0.0.1", "--listen-address=::1", "--address=/#/192.0.2.7")
	h.server.Stderr = &h.said
	h.server.SysProcAttr = as(tproxy.DefaultProxyUID)
	if err := h.In(h.Lab.Host, h.server.Start); err != nil {
		h.server = nil
		return h, err
	}
	if w.tracked {
		for _, f := range rules.Families() {
			program := map[rules.Family]string{rules.IPv4: "iptables-nft", rules.IPv6: "ip6tables-nft"}[f]
			if _, err := h.Run(context.Background(), h.Lab.Host, "", program, "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT"); err != nil {
				return h, err
			}
		}
	}
	if w.backend != tproxy.Auto {
		plan, err := h.Plan(tproxy.Config{DNS: tproxy.DNS{Redirect: true, ResolvConf: resolvConf, SkipConntrackZoneSplit: w.skip}})
		if err == nil {
			_, err = h.Apply(plan)
		}
		if err != nil {
			return h, err
		}
	}
	for _, f := range rules.Families() {
		for deadline := time.Now().Add(5 * time.Second); ; {
			s, err := h.fresh(f, 1)
			if err == nil && s.lost == 0 {
				break
			}
			if time.Now().After(deadline) {
				return h, fmt.Errorf("%s: dnsmasq does not answer over %s: %w: %s", w.name, f, err, &h.said)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return h, nil
}

func (h *host) close() {
	if h.server != nil {
		_ = h.server.Process.Kill()
		_ = h.server.Wait()
	}
	h.Close()
}

func as(uid uint32) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}, Pdeathsig: syscall.SIGKILL}
}

// ends are the client's address and the server's on this way.
func (h *host) ends(f rules.Family) (from netip.Addr, to netip.AddrPort) {
	switch {
	case h.way.backend == tproxy.Auto && f == rules.IPv4:
		return netlab.Host4, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), tproxy.DefaultDNSPort)
	case h.way.backend == tproxy.Auto:
		return netlab.Host6, netip.AddrPortFrom(netip.IPv6Loopback(), tproxy.DefaultDNSPort)
	case f == rules.IPv4:
		return netlab.Host4, netip.AddrPortFrom(netlab.Client4, 53)
	}
	return netlab.Host6, netip.AddrPortFrom(netlab.Client6, 53)
}

// sample is one measurement: queries, those without an answer, and answers a second.
type sample struct {
	sent, lost int
	rate       float64
}

// measure has an application ask for length seconds, at a rate or, where that is 0, as
// fast as it can.
func (h *host) measure(c column, rate float64, names string) (sample, error) {
	ports := manners[c.manner].ports
	if ports == 0 {
		return h.fresh(c.family, 0)
	}
	from, to := h.ends(c.family)
	args := []string{"-s", to.Addr().String(), "-p", strconv.Itoa(int(to.Port())), "-a", from.String(), "-d", names, "-c", strconv.Itoa(ports),
		"-l", fmt.Sprint(length), "-t", fmt.Sprint(patience.Seconds())}
	if rate > 0 {
		args = append(args, "-Q", fmt.Sprintf("%.0f", rate))
	}
	var text bytes.Buffer
	cmd := osexec.Command("dnsperf", args...)
	cmd.Stdout, cmd.Stderr = &text, &text
	cmd.SysProcAttr = as(crowd.AppUID)
	if err := h.In(h.Lab.Host, cmd.Start); err != nil {
		return sample{}, err
	}
	if err := cmd.Wait(); err != nil {
		return sample{}, fmt.Errorf("dnsperf: %w: %s", err, &text)
	}
	return parse(text.String())
}

var (
	sentLine = regexp.MustCompile(`(?m)^ *Queries sent: +(\d+)`)
	lostLine = regexp.MustCompile(`(?m)^ *Queries lost: +(\d+)`)
	goodLine = regexp.MustCompile(`(?m)^ *Response codes: +NOERROR (\d+) \(100\.00%\)$`)
	rateLine = regexp.MustCompile(`(?m)^ *Queries per second: +([\d.]+)`)
)

// parse reads what dnsperf prints at the end.
func parse(text string) (s sample, err error) {
	var good int
	for _, line := range []struct {
		is    *regexp.Regexp
		value any
	}{{sentLine, &s.sent}, {lostLine, &s.lost}, {goodLine, &good}, {rateLine, &s.rate}} {
		m := line.is.FindStringSubmatch(text)
		if m == nil {
			return s, fmt.Errorf("dnsperf does not say %q, or an answer was an error:\n%s", line.is, text)
		}
		if _, err := fmt.Sscan(m[1], line.value); err != nil {
			return s, err
		}
	}
	if good+s.lost != s.sent {
		return s, fmt.Errorf("%d queries, %d answers and %d lost:\n%s", s.sent, good, s.lost, text)
	}
	return s, nil
}

// fresh asks n times, or for length seconds where that is 0, each time from a new
// socket, with the kernel's own calls.
func (h *host) fresh(f rules.Family, n int) (s sample, err error) {
	from, to := h.ends(f)
	address := func(a netip.Addr, port uint16) syscall.Sockaddr {
		if a.Is4() {
			return &syscall.SockaddrInet4{Addr: a.As4(), Port: int(port)}
		}
		return &syscall.SockaddrInet6{Addr: a.As16(), Port: int(port)}
	}
	src, dst := address(from, 0), address(to.Addr(), to.Port())
	domain := syscall.AF_INET
	if f == rules.IPv6 {
		domain = syscall.AF_INET6
	}
	query, err := dns.Query(0x1337, "host0.example")
	if err != nil {
		return s, err
	}
	wait := syscall.NsecToTimeval(int64(patience))
	buf := make([]byte, 512)
	once := func() error {
		fd, err := syscall.Socket(domain, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer syscall.Close(fd)
		if err := errors.Join(syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &wait),
			syscall.Bind(fd, src), syscall.Connect(fd, dst)); err != nil {
			return err
		}
		if _, err := syscall.Write(fd, query); err != nil {
			return err
		}
		s.sent++
		for {
			switch _, err := syscall.Read(fd, buf); err {
			case nil:
				return nil
			case syscall.EINTR:
			case syscall.EAGAIN, syscall.ECONNREFUSED:
				s.lost++
				return nil
			default:
				return err
			}
		}
	}
	start := time.Now()
	err = h.In(h.Lab.Host, func() error {
		return netlab.As(crowd.AppUID, crowd.AppUID, func() error {
			for n == 0 && time.Since(start).Seconds() < length || s.sent < n {
				if err := once(); err != nil {
					return err
				}
			}
			return nil
		})
	})
	s.rate = float64(s.sent-s.lost) / time.Since(start).Seconds()
	return s, err
}
