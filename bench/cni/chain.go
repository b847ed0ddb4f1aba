//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// bench is a runtime, as far as networks go.
type bench struct {
	plugins, program, dir string
	backend               tproxy.Backend
	scripts               [2][]byte // of both families
	table                 []byte    // for nft, with backend nftables
	processes             int
	pods                  atomic.Int64
}

// pod is a fresh network namespace, with a name on a disk that is ours.
type pod struct {
	id, path string
}

// newPod makes one. The thread that did ends with it.
func (b *bench) newPod() (*pod, error) {
	p := &pod{id: fmt.Sprintf("pod%d", b.pods.Add(1))}
	p.path = filepath.Join(b.dir, p.id)
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := os.WriteFile(p.path, nil, 0o600)
		if err == nil {
			err = syscall.Unshare(syscall.CLONE_NEWNET)
		}
		if err == nil {
			err = syscall.Mount("/proc/thread-self/ns/net", p.path, "", syscall.MS_BIND, "")
		}
		done <- err
	}()
	return p, <-done
}

// end lets go of the namespace; the kernel takes it down in the background: not in the
// next one's time.
func (p *pod) end() error {
	err := errors.Join(syscall.Unmount(p.path, syscall.MNT_DETACH), os.Remove(p.path))
	time.Sleep(15 * time.Millisecond)
	return err
}

// command is one call of a plugin.
func (b *bench) command(verb, program string, p *pod, stdin []byte) *osexec.Cmd {
	cmd := osexec.Command(program)
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_CONTAINERID="+p.id, "CNI_NETNS="+p.path, "CNI_IFNAME=eth0", "CNI_PATH="+b.plugins,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME="+p.id)
	return cmd
}

func (b *bench) call(verb, program string, p *pod, stdin []byte) (out []byte, took time.Duration, err error) {
	cmd := b.command(verb, program, p, stdin)
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	start := time.Now()
	out, err = cmd.Output()
	took = time.Since(start)
	if err != nil {
		return nil, 0, fmt.Errorf("%s %s: %w: %s%s", verb, program, err, out, errOut.Bytes())
	}
	return out, took, nil
}

func (b *bench) bridge(verb string, p *pod) (result json.RawMessage, took time.Duration, err error) {
	return b.call(verb, filepath.Join(b.plugins, "bridge"), p, entry(map[string]any{"type": "bridge", "bridge": "br-bench", "isGateway": true,
		"ipam": map[string]any{"type": "host-local", "dataDir": filepath.Join(b.dir, "ipam"), "ranges": []any{[]any{map[string]string{"subnet": "10.96.0.0/16"}}}}}, nil))
}

// ours is the plugin's entry: a pod as an injector leaves it, with an exclusion each way.
func (b *bench) ours(previous json.RawMessage, injected bool) []byte {
	return entry(map[string]any{"type": "kuma-cni", "config": map[string]string{"backend": b.backend.String()}, "logFile": filepath.Join(b.dir, "log"),
		"runtimeConfig": map[string]any{"io.kubernetes.cri.pod-annotations": map[string]string{"kubernetes.io/config.source": "api",
			"kuma.io/sidecar-injected": strconv.FormatBool(injected), "traffic.kuma.io/exclude-inbound-ports": "1234", "traffic.kuma.io/exclude-outbound-ports": "5432"}}}, previous)
}

var processes = regexp.MustCompile(`"processes":(\d+)`)

// prepare makes what has to be there once, loads modules and programs, and takes the text
// that the bare programs are given from pods of our own plugin.
func (b *bench) prepare() error {
	backend := b.backend
	b.backend, b.table = b.variant(), nil
	err := b.sample(func(p *pod) error {
		for i, f := range rules.Families() {
			saved, err := b.in(p, nil, b.restore(f, "-save"))
			if err != nil {
				return err
			}
			all, err := rules.ParseSave(f, saved)
			if err != nil {
				return err
			}
			b.scripts[i] = rules.Transition(f, rules.Set{}, tproxy.Find(f, all).Ours)
		}
		return nil
	})
	if b.backend = backend; backend == tproxy.NFTables && err == nil {
		err = b.sample(func(p *pod) (err error) {
			b.table, err = b.in(p, nil, "nft", "--stateless", "list", "table", "inet", tproxy.NFTable)
			return err
		})
	}
	if err == nil && (len(b.scripts[0]) == 0 || len(b.scripts[1]) == 0) {
		err = errors.New("the plugin has installed nothing")
	}
	return err
}

// variant is that of the bare restores.
func (b *bench) variant() tproxy.Backend {
	if b.backend == tproxy.NFTables {
		return tproxy.IPTablesNFT
	}
	return b.backend
}

// sample looks at a pod of ours.
func (b *bench) sample(look func(*pod) error) error {
	p, err := b.newPod()
	if err != nil {
		return err
	}
	result, _, err := b.bridge("ADD", p)
	if err == nil {
		_, _, err = b.call("ADD", b.program, p, b.ours(result, true))
	}
	if err != nil {
		return err
	}
	log, err := os.ReadFile(filepath.Join(b.dir, "log"))
	if m := processes.FindAllSubmatch(log, -1); m != nil {
		b.processes, _ = strconv.Atoi(string(m[len(m)-1][1])) // digits
	}
	err2 := look(p)
	_, _, err3 := b.bridge("DEL", p)
	return errors.Join(err, err2, err3, p.end())
}

func (b *bench) restore(f rules.Family, verb string) string {
	name := b.variant().String()
	if f == rules.IPv6 {
		name = "ip6" + strings.TrimPrefix(name, "ip")
	}
	return name + verb
}

// in runs a program in the pod's namespace.
func (b *bench) in(p *pod, stdin []byte, name string, args ...string) (out []byte, err error) {
	cmd := osexec.Command(name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	err2 := inside(p, func() { out, err = cmd.Output() })
	return out, errors.Join(err, err2)
}

// inside runs f on a thread in the pod's namespace.
func inside(p *pod, f func()) error {
	ns, err := os.Open(p.path)
	if err != nil {
		return err
	}
	defer ns.Close()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		_, _, errno := syscall.RawSyscall(sysSetns, ns.Fd(), syscall.CLONE_NEWNET, 0)
		if errno != 0 {
			done <- errno
			return
		}
		f()
		done <- nil
	}()
	return <-done
}

// sysSetns is setns(2), which package syscall does not name everywhere.
var sysSetns = map[string]uintptr{"amd64": 308, "arm64": 268}[runtime.GOARCH]

// with is the chain with us.
func (b *bench) with(note func(string, time.Duration)) error {
	p, err := b.newPod()
	if err != nil {
		return err
	}
	result, first, err := b.bridge("ADD", p)
	if err != nil {
		return err
	}
	_, second, err := b.call("ADD", b.program, p, b.ours(result, true))
	if err != nil {
		return err
	}
	note(addOurs, second)
	note(addChain, first+second)
	_, second, err = b.call("DEL", b.program, p, b.ours(result, true))
	if err != nil {
		return err
	}
	_, first, err = b.bridge("DEL", p)
	note(delOurs, second)
	note(delChain, first+second)
	return errors.Join(err, p.end())
}

func (b *bench) without(note func(string, time.Duration)) error {
	p, err := b.newPod()
	if err != nil {
		return err
	}
	_, took, err := b.bridge("ADD", p)
	if err != nil {
		return err
	}
	note(addBridge, took)
	_, took, err = b.bridge("DEL", p)
	note(delBridge, took)
	return errors.Join(err, p.end())
}

// bare is what nobody can do with fewer processes of iptables.
func (b *bench) bare(note func(string, time.Duration)) error {
	return b.programs(note, addBare, func(p *pod) (err error) {
		for i, f := range rules.Families() {
			cmd := osexec.Command(b.restore(f, "-restore"), "--noflush", "--wait=5")
			cmd.Stdin = bytes.NewReader(b.scripts[i])
			cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE="+p.path)
			err = errors.Join(err, cmd.Run())
		}
		return err
	})
}

// loaded is the same for our table of nftables.
func (b *bench) loaded(note func(string, time.Duration)) error {
	if b.table == nil {
		return nil
	}
	return b.programs(note, addTable, func(*pod) error {
		cmd := osexec.Command("nft", "-f", "-")
		cmd.Stdin = bytes.NewReader(b.table)
		return cmd.Run()
	})
}

// programs runs what takes a pod of the chain without us, in its namespace.
func (b *bench) programs(note func(string, time.Duration), what string, run func(*pod) error) error {
	p, err := b.newPod()
	if err != nil {
		return err
	}
	if _, _, err = b.bridge("ADD", p); err != nil {
		return err
	}
	var took time.Duration
	err2 := inside(p, func() {
		start := time.Now()
		err = run(p)
		took = time.Since(start)
	})
	note(what, took)
	_, _, err3 := b.bridge("DEL", p)
	return errors.Join(err, err2, err3, p.end())
}

// alone is a pod that is left alone.
func (b *bench) alone(note func(string, time.Duration)) error {
	p, err := b.newPod()
	if err != nil {
		return err
	}
	_, took, err := b.call("ADD", b.program, p, b.ours(json.RawMessage(`{"cniVersion":"1.0.0"}`), false))
	note(addAlone, took)
	return errors.Join(err, p.end())
}

// atOnce starts many pods at the same time.
func (b *bench) atOnce(n int, ours bool) (total time.Duration, each series, err error) {
	pods := make([]*pod, n)
	for i := range pods {
		if pods[i], err = b.newPod(); err != nil {
			return 0, nil, err
		}
	}
	each = make(series, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	start := time.Now()
	for i, p := range pods {
		wg.Go(func() {
			begin := time.Now()
			result, _, err := b.bridge("ADD", p)
			if err == nil && ours {
				_, _, err = b.call("ADD", b.program, p, b.ours(result, true))
			}
			each[i], errs[i] = time.Since(begin), err
		})
	}
	wg.Wait()
	total = time.Since(start)
	for _, p := range pods {
		_, _, err := b.bridge("DEL", p)
		errs = append(errs, err, p.end())
	}
	return total, each, errors.Join(errs...)
}

// memory is the highest peak of the plugin's process in n ADDs, in KiB. Rusage would not
// do: what the kernel counts there begins with the memory of who started the process
// (exec_mmap, fs/exec.c). So it is stopped at its end, and its VmHWM read (proc_pid_status(5)).
func (b *bench) memory(n int) (most int, err error) {
	for range n {
		p, err := b.newPod()
		if err != nil {
			return 0, err
		}
		done := make(chan error)
		peak := 0
		go func() {
			runtime.LockOSThread() // ptrace(2) is the thread's
			defer runtime.UnlockOSThread()
			var err error
			peak, err = peakOf(b.command("ADD", b.program, p, b.ours(json.RawMessage(`{"cniVersion":"1.0.0"}`), true)))
			done <- err
		}()
		if err := errors.Join(<-done, p.end()); err != nil {
			return 0, err
		}
		most = max(most, peak)
	}
	return most, nil
}

// traceExit is PTRACE_O_TRACEEXIT, and exitEvent the status of its stop (linux/ptrace.h).
const (
	traceExit = 1 << 6
	exitEvent = 6
)

func peakOf(cmd *osexec.Cmd) (kib int, err error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	pid := cmd.Process.Pid
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &status, 0, nil); err != nil {
		return 0, err
	}
	if err := syscall.PtraceSetOptions(pid, traceExit); err != nil {
		return 0, err
	}
	for signal := 0; ; signal = 0 {
		if err := syscall.PtraceCont(pid, signal); err != nil {
			return 0, err
		}
		if _, err := syscall.Wait4(pid, &status, 0, nil); err != nil {
			return 0, err
		}
		switch {
		case status.Exited() || status.Signaled():
			if status.ExitStatus() != 0 {
				return 0, fmt.Errorf("the plugin ended with %d", status.ExitStatus())
			}
			return kib, nil
		case status.Stopped() && int(status)>>16 == exitEvent:
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			if err != nil {
				return 0, err
			}
			for line := range strings.Lines(string(text)) {
				if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
					_, _ = fmt.Sscan(rest, &kib)
				}
			}
		case status.Stopped() && status.StopSignal() != syscall.SIGTRAP:
			signal = int(status.StopSignal())
		}
	}
}
