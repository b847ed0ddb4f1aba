// Command cni installs transparent proxying in another network namespace, as a
// CNI plugin does for a pod, or takes it out again.
//
//	cni /run/netns/pod
//	cni -remove /run/netns/pod
//
// A real plugin speaks CNI on top of this, and may enter the namespace with
// ns.WithNetNSPath of github.com/containernetworking/plugins.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

func main() {
	remove := flag.Bool("remove", false, "take the rules out")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: cni [-remove] PATH")
		os.Exit(2)
	}
	do := install
	if *remove {
		do = uninstall
	}
	if err := inNamespace(flag.Arg(0), func() error { return do(context.Background()) }); err != nil {
		fmt.Fprintln(os.Stderr, "cni:", err)
		os.Exit(1)
	}
}

// install does what install does on a host, on the calling thread: everything
// that exec reads and starts is in that thread's network namespace.
func install(ctx context.Context) error {
	// Pod: SSH is captured like the rest, and nobody looks for remote shells.
	cfg := tproxy.Config{ProxyUIDs: []tproxy.UID{5678}, Pod: true}
	var runner exec.Runner
	host, err := runner.Probe(ctx, cfg.Needs())
	if err != nil {
		return err
	}
	plan, err := tproxy.Build(cfg, host)
	if err != nil {
		return err
	}
	_, err = runner.Apply(ctx, plan)
	return err
}

func uninstall(ctx context.Context) error {
	var runner exec.Runner
	_, err := runner.Remove(ctx, exec.RemoveOptions{})
	return err
}

// inNamespace runs f in the network namespace at the path. A namespace is the
// thread's: the goroutine must stay on it, and f must start no goroutine that
// counts on the namespace.
func inNamespace(path string, f func() error) error {
	runtime.LockOSThread()
	back, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer back.Close()
	defer func() {
		// A thread that cannot go back is not given to other goroutines: it stays
		// locked and ends with this one.
		if setns(back) == nil {
			runtime.UnlockOSThread()
		}
	}()
	to, err := os.Open(path)
	if err != nil {
		return err
	}
	defer to.Close()
	if err := setns(to); err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	return f()
}

// sysSetns is the number of setns(2), for which package syscall has no name on
// older architectures; golang.org/x/sys/unix.Setns would do.
var sysSetns = map[string]uintptr{"amd64": 308, "arm64": 268, "s390x": 339, "ppc64le": 350}[runtime.GOARCH]

func setns(file *os.File) error {
	_, _, errno := syscall.RawSyscall(sysSetns, file.Fd(), syscall.CLONE_NEWNET, 0)
	if errno != 0 {
		return fmt.Errorf("setns: %w", errno)
	}
	return nil
}
