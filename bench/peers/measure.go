//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	osexec "os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// roleEnv says that a process is a child that measures.
const roleEnv = "KUMA_TPROXY_PEERS"

// The sequence of each child.
const (
	opInstall = iota
	opAgain
	opAnother
	opUninstall
	ops
)

var opNames = [ops]string{"install", "the same again", "another config", "uninstall"}

// cell is one sequence: an installer with so many excluded ports.
type cell struct {
	Installer string
	N         int
}

// sample is what one child measured.
type sample struct {
	Times     [ops]time.Duration // on the wall
	CPU       [ops]time.Duration // of the process and of the programs it started
	Processes [ops]int
}

const maxPorts = 10000

// everySecond returns n ports, no two of which make a range.
func everySecond(n, from int) (rules.Ports, error) {
	ranges := make([]rules.PortRange, n)
	for i := range ranges {
		p := uint16(from + 2*i)
		ranges[i] = rules.PortRange{First: p, Last: p}
	}
	return rules.PortsOf(ranges...)
}

// excluded are N ports each way, and for the other config one more inbound.
func excluded(n, op int) (p ports, err error) {
	if p.in, err = everySecond(n, 30001); err != nil {
		return p, err
	}
	p.out, err = everySecond(n, 30000)
	if op >= opAnother {
		p.in = p.in.Union(rules.Port(9100))
	}
	return p, err
}

// measure is the main function of a child, which has a network namespace of its own.
func measure() error {
	var c cell
	if err := json.NewDecoder(os.Stdin).Decode(&c); err != nil {
		return err
	}
	i, err := find(c.Installer)
	if err != nil {
		return err
	}
	if err := errors.Join(silence(), loopbackUp()); err != nil {
		return err
	}
	l, err := net.Listen("tcp", ":22") // as on a VM: our Probe looks whose it is
	if err != nil {
		return err
	}
	defer l.Close()
	// What a process pays once, such as its first page faults, is paid elsewhere, by
	// everybody.
	err = elsewhere(func() error {
		for op := range ops {
			if _, err := i.step(op, 0); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("before the measurement: %w", err)
	}
	var s sample
	for op := range ops {
		if err := i.timed(op, c.N, &s); err != nil {
			return fmt.Errorf("%s: %w", opNames[op], err)
		}
	}
	return json.NewEncoder(os.Stdout).Encode(s)
}

// timed does one step, counts the programs that it starts, and looks whether the rules
// are there. To be told of a program costs it some microseconds.
func (i installer) timed(op, n int, s *sample) error {
	w, err := watchPrograms()
	if err != nil {
		return err
	}
	defer w.Close()
	before, err := cpu()
	if err != nil {
		return err
	}
	start := time.Now()
	said, err := i.step(op, n)
	if err != nil {
		return err
	}
	s.Times[op] = time.Since(start)
	after, err := cpu()
	if err != nil {
		return err
	}
	s.CPU[op] = after - before
	names, err := w.started()
	if err != nil {
		return err
	}
	if s.Processes[op] = len(names); said != unknown && said != len(names) {
		return fmt.Errorf("its report says that %d programs were started: %q", said, names)
	}
	return i.check(op != opUninstall)
}

// cpu is the time that this process, and those of its children that have ended, were
// on a CPU: other load on the machine disturbs it less than the wall's.
func cpu() (sum time.Duration, err error) {
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if err := syscall.Getrusage(who, &u); err != nil {
			return 0, fmt.Errorf("getrusage: %w", err)
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return sum, nil
}

// step does one of the sequence.
func (i installer) step(op, n int) (processes int, err error) {
	p, err := excluded(n, op)
	if err != nil {
		return 0, err
	}
	do := i.install
	if op == opUninstall {
		do = i.uninstall
	}
	return do(context.Background(), p)
}

// check looks whether this network namespace has the rules that redirect, in both
// families, or has none of them.
func (i installer) check(want bool) error {
	for _, args := range i.lists {
		out, err := osexec.Command(args[0], args[1:]...).Output()
		if err != nil {
			return fmt.Errorf("%s: %w", strings.Join(args, " "), err)
		}
		for _, port := range []string{"15006", "15001"} {
			if redirects(string(out), port) != want {
				return fmt.Errorf("%s: a rule that redirects to %s: %t, want %t", strings.Join(args, " "), port, !want, want)
			}
		}
	}
	return nil
}

// redirects reports whether a list of rules, as iptables-save or nft prints it, has
// one that redirects to the port.
func redirects(list, port string) bool {
	for line := range strings.Lines(list) {
		line = strings.TrimSpace(line)
		if strings.HasSuffix(line, "--to-ports "+port) || strings.Contains(line+" ", "redirect to :"+port+" ") {
			return true
		}
	}
	return false
}

// elsewhere runs f in a network namespace of its own, on a thread that ends with it.
func elsewhere(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread is not used again
		err := syscall.Unshare(syscall.CLONE_NEWNET)
		if err == nil {
			err = loopbackUp()
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// loopbackUp sets lo up, which a new namespace has down (netdevice(7)).
func loopbackUp() error {
	if out, err := osexec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	return nil
}

func parseSizes(list string) (sizes []int, err error) {
	for s := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 || n > maxPorts {
			return nil, fmt.Errorf("-n %q: accepted is a list of numbers from 0 to %d", s, maxPorts)
		}
		sizes = append(sizes, n)
	}
	return sizes, nil
}
