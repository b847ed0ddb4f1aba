//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
)

// process is a daemon that ends with this one.
type process struct {
	cmd  *osexec.Cmd
	said bytes.Buffer
}

func start(in *netlab.Namespace, lab *netlab.Lab, name string, args ...string) (*process, error) {
	p := &process{cmd: osexec.Command(name, args...)}
	p.cmd.Stdout, p.cmd.Stderr = &p.said, &p.said
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return p, lab.In(in, p.cmd.Start)
}

// stop ends it as systemd does, and waits.
func (p *process) stop() error {
	if p == nil || p.cmd.ProcessState != nil {
		return nil
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	err := p.cmd.Wait()
	if _, ended := errors.AsType[*osexec.ExitError](err); ended {
		return nil // how it says that it was told to
	}
	return err
}

// host is one with a firewalld of its own.
type host struct {
	*crowd.Host
	etc    string // what firewalld takes for /etc/firewalld
	plan   *tproxy.Plan
	daemon *process
}

// control is a table of one's own, which redirects a port that the plan excludes.
var control = fmt.Sprintf(`table inet control {
	chain output {
		type nat hook output priority -100; policy accept;
		meta skuid %d tcp dport %d redirect to :%d
	}
}
`, crowd.AppUID, crowd.ExcludedOut, tproxy.DefaultOutboundPort)

// newHosts makes a host for each backend of firewalld, and a bus for both.
func newHosts() (hosts map[string]*host, stop func(), err error) {
	hosts = make(map[string]*host)
	var bus *process
	stop = func() {
		for _, h := range hosts {
			_ = h.daemon.stop()
			h.Close()
			_ = os.RemoveAll(h.etc)
		}
		_ = bus.stop()
	}
	for _, b := range backends {
		h, err := newHost(b)
		if err != nil {
			return hosts, stop, err
		}
		hosts[b] = h
	}
	if err := os.MkdirAll("/run/dbus", 0o755); err != nil {
		return hosts, stop, err
	}
	h := hosts[backends[0]]
	bus, err = start(h.Lab.Host, h.Lab, "dbus-daemon", "--system", "--nofork", "--nopidfile", "--nosyslog")
	if err == nil {
		err = until(func() bool { _, err := os.Stat("/run/dbus/system_bus_socket"); return err == nil })
	}
	return hosts, stop, err
}

func newHost(backend string) (*host, error) {
	c, err := crowd.New(tproxy.IPTablesNFT)
	if err != nil {
		return nil, err
	}
	h := &host{Host: c}
	h.etc, err = os.MkdirTemp("", "firewalld")
	if err == nil {
		err = os.CopyFS(h.etc, os.DirFS("/etc/firewalld"))
	}
	if err == nil {
		// Its default, RFC3964_IPv4, rejects what is redirected over IPv6.
		err = h.set("FirewallBackend="+backend, "RFC3964_IPv4=no")
	}
	if err == nil {
		h.plan, err = h.Plan(tproxy.Config{})
	}
	if err == nil {
		_, err = h.Run(context.Background(), h.Lab.Host, control, "nft", "-f", "-")
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// set sets settings of firewalld.conf.
func (h *host) set(settings ...string) error {
	path := filepath.Join(h.etc, "firewalld.conf")
	text, err := os.ReadFile(path)
	lines := strings.Split(string(text), "\n")
	for _, s := range settings {
		key, _, _ := strings.Cut(s, "=")
		lines = append(slices.DeleteFunc(lines, func(l string) bool { return strings.HasPrefix(l, key+"=") }), s)
	}
	if err == nil {
		err = os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o644)
	}
	return err
}

func until(done func() bool) error {
	for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return errors.New("it takes more than 20 seconds")
		}
	}
	return nil
}

func (h *host) startFirewalld() (err error) {
	h.daemon, err = start(h.Lab.Host, h.Lab, "firewalld", "--nofork", "--nopid", "--log-target=console", "--system-config", h.etc)
	if err != nil {
		return err
	}
	return until(func() bool {
		out, _ := h.Run(context.Background(), h.Lab.Host, "", "firewall-cmd", "--state")
		return strings.Contains(out, "running")
	})
}

func (h *host) tell(args ...string) error {
	_, err := h.Run(context.Background(), h.Lab.Host, "", "firewall-cmd", args...)
	return err
}

func (h *host) version() string {
	out, _ := osexec.Command("firewall-offline-cmd", "--version").Output()
	return strings.TrimSpace(string(out))
}

// prepare starts firewalld with the rules in place.
func (h *host) prepare(place string) error {
	path := filepath.Join(h.etc, "direct.xml")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if place == inFile {
		text, err := persist.MergeDirect(nil, h.plan.WithRecord(tproxy.Record{}))
		if err == nil {
			err = os.WriteFile(path, text, 0o644)
		}
		if err != nil {
			return err
		}
	}
	if err := h.startFirewalld(); err != nil {
		return err
	}
	if place == liveOnly {
		if _, err := h.Apply(h.plan); err != nil {
			return err
		}
	}
	if !h.redirects() {
		return fmt.Errorf("the rules redirect nothing at first: %s", &h.daemon.said)
	}
	return nil
}

// to are the destinations of a stream, one for each family.
func to(port uint16) []netip.AddrPort {
	return []netip.AddrPort{netip.AddrPortFrom(netlab.Internet4, port), netip.AddrPortFrom(netlab.Internet6, port)}
}

// redirects reports whether connections of both families go to the proxy now.
func (h *host) redirects() bool {
	for _, a := range to(crowd.RedirectedOut) {
		if seen, err := h.Dial(h.Lab.Host, crowd.AppUID, "tcp", netip.AddrPort{}, a); err != nil || seen.Who != "out" {
			return false
		}
	}
	return true
}

// measure does the change under load.
func (h *host) measure(place string, c change) (s sample, err error) {
	if err := h.prepare(place); err != nil {
		return s, err
	}
	ours, control := h.connect(to(crowd.RedirectedOut)), h.connect(to(crowd.ExcludedOut))
	time.Sleep(100 * time.Millisecond)
	begun := time.Now()
	err = c.do(h)
	s.took = time.Since(begun)
	time.Sleep(time.Second)
	back := h.redirects()
	s.ours, s.control = ours.stop(begun), control.stop(begun)
	s.ours.back = back
	if err == nil {
		err = h.daemon.stop()
	}
	if err == nil && place == liveOnly { // firewalld's end has left nothing
		_, err = h.Remove(exec.RemoveOptions{})
	}
	return s, err
}
