//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	osexec "os/exec"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// What a child does, by the environment variable that makes one.
const (
	roleEnv       = "KUMA_TPROXY_BENCH"
	roleOurs      = "library"
	roleBare      = "bare"
	roleBareAgain = "bare again"
	roleKumactl   = "kumactl"
	roleNFT       = "nft -f"
)

// The sequence of each child.
const (
	opInstall = iota
	opAgain
	opAnother
	opUninstall
	ops
)

var opNames = [ops]string{"install", "the same again", "another config", "uninstall"}

// cell is one combination that is measured.
type cell struct {
	Backend tproxy.Backend
	N       int
	Listen  bool
	Kumactl string
	Scripts [ops][2][]byte // of the two families; of nftables the first is of both
	Bare    [ops][2][]byte // what bare is given
}

// sample is what one child measured.
type sample struct {
	Times     [ops]time.Duration
	Processes [ops]int
	Scripts   [ops][2][]byte
}

const maxPorts = 10000

// ports returns every second port, so that no two make a range.
func ports(n, from int) rules.Ports {
	ranges := make([]rules.PortRange, n)
	for i := range ranges {
		p := uint16(from + 2*i)
		ranges[i] = rules.PortRange{First: p, Last: p}
	}
	p, err := rules.PortsOf(ranges...)
	if err != nil {
		panic(err)
	}
	return p
}

// config returns the config that is installed first, or, with one port more
// that is excluded, the other one.
func (c cell) config(another bool) tproxy.Config {
	in := ports(c.N, 30001)
	if another {
		in = in.Union(rules.Port(9100))
	}
	return tproxy.Config{
		ProxyUIDs: []tproxy.UID{tproxy.DefaultProxyUID},
		Backend:   c.Backend,
		Inbound:   tproxy.Inbound{ExcludePorts: in},
		Outbound:  tproxy.Outbound{ExcludePorts: ports(c.N, 30000)},
	}
}

// measure is the main function of a child, which has a network namespace of its
// own.
func measure(role string) error {
	var c cell
	if err := json.NewDecoder(os.Stdin).Decode(&c); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	if c.Listen {
		l, err := net.Listen("tcp", ":22")
		if err != nil {
			return err
		}
		defer l.Close()
	}
	var s sample
	var step func(op int) error
	ctx := context.Background()
	switch role {
	case roleOurs:
		// What a process pays once, such as its first page faults, is in the
		// figures of kumactl.
		if _, err := (&exec.Runner{}).Probe(ctx, c.config(false).Needs()); err != nil {
			return err
		}
		step = func(op int) error { return c.library(ctx, op, &s) }
	case roleKumactl:
		step = c.process
	case roleNFT:
		step = c.nft
	default:
		step = c.bare
	}
	for op := range ops {
		start := time.Now()
		if err := step(op); err != nil {
			return fmt.Errorf("%s: %w", opNames[op], err)
		}
		s.Times[op] = time.Since(start)
	}
	return json.NewEncoder(os.Stdout).Encode(s)
}

// library does what an importer does.
func (c cell) library(ctx context.Context, op int, s *sample) error {
	runner := &exec.Runner{}
	var report *exec.Report
	if op == opUninstall {
		var err error
		if report, err = runner.Remove(ctx, exec.RemoveOptions{}); err != nil {
			return err
		}
	} else {
		config := c.config(op == opAnother)
		host, err := runner.Probe(ctx, config.Needs())
		if err != nil {
			return err
		}
		plan, err := tproxy.Build(config, host)
		if err != nil {
			return err
		}
		if report, err = runner.Apply(ctx, plan); err != nil {
			return err
		}
	}
	if report.Changed == (op == opAgain) {
		return fmt.Errorf("changed: %t", report.Changed)
	}
	s.Processes[op] = report.Processes
	for i, f := range report.Families {
		s.Scripts[op][i] = f.Script
	}
	return nil
}

// bare does what could not be less: the two processes of both families.
func (c cell) bare(op int) error {
	for i, prefix := range []string{"iptables", "ip6tables"} {
		name := prefix + strings.TrimPrefix(c.Backend.String(), "iptables")
		if c.Backend == tproxy.NFTables {
			name = prefix + "-nft"
		}
		var cmd *osexec.Cmd
		if op == opAgain {
			cmd = osexec.Command(name + "-save")
		} else {
			cmd = osexec.Command(name+"-restore", "--noflush")
			cmd.Stdin = bytes.NewReader(c.Bare[op][i])
		}
		if err := start(cmd); err != nil {
			return err
		}
	}
	return nil
}

// nft does the same as the library, by nft(8).
func (c cell) nft(op int) error {
	if op == opAgain {
		return start(osexec.Command("nft", "list", "table", "inet", tproxy.NFTable))
	}
	cmd := osexec.Command("nft", "-f", "-")
	cmd.Stdin = bytes.NewReader(c.Scripts[op][0])
	return start(cmd)
}

// process runs kumactl.
func (c cell) process(op int) error {
	config := c.config(op == opAnother)
	args := []string{"uninstall", "transparent-proxy"}
	if op != opUninstall {
		args = []string{
			"install", "transparent-proxy", "--kuma-dp-user", fmt.Sprint(config.ProxyUIDs[0]), "--backend", c.Backend.String(),
			"--exclude-inbound-ports", config.Inbound.ExcludePorts.String(),
			"--exclude-outbound-ports", config.Outbound.ExcludePorts.String(),
		}
	}
	return start(osexec.Command(c.Kumactl, args...))
}

// start runs a process and reads what it says, as the library does.
func start(cmd *osexec.Cmd) error {
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", cmd, err, bytes.TrimSpace(errOut.Bytes()))
	}
	return nil
}

// loopbackUp sets lo up, which a new namespace has down (netdevice(7)).
func loopbackUp() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	var request struct { // struct ifreq
		name  [16]byte
		flags uint16
		_     [22]byte
	}
	copy(request.name[:], "lo")
	request.flags = syscall.IFF_UP
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return fmt.Errorf("lo up: %w", errno)
	}
	return nil
}
