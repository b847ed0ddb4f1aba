package bootlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Programs are those that it takes.
var Programs = []string{"debootstrap", "systemd-nspawn", "nsenter"}

// mirror is debootstrap's own default; TPROXY_DEBIAN_MIRROR names another.
const mirror = "http://deb.debian.org/debian"

// Make makes the root of a Debian in a folder that does not exist, in about half a
// minute. outside, if not empty, is a network namespace, as a file, from which the
// archive can be reached.
func Make(ctx context.Context, folder, suite string, packages []string, outside string) error {
	from := mirror
	if m := os.Getenv("TPROXY_DEBIAN_MIRROR"); m != "" {
		from = m
	}
	args := []string{"debootstrap", "--variant=minbase", "--include=" + strings.Join(packages, ","), suite, folder, from}
	if _, err := os.Stat("/usr/share/debootstrap/scripts/" + suite); err != nil {
		args = append(args, "/usr/share/debootstrap/scripts/sid") // newer than debootstrap
	}
	if outside != "" {
		args = append([]string{"nsenter", "--net=" + outside}, args...)
	}
	out, err := osexec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("debootstrap of %s: %w\n%s", suite, err, last(out))
	}
	return nil
}

// Machine is a booted Debian.
type Machine struct {
	folder, name string
	nspawn       *osexec.Cmd
	console      *buffer
	ended        chan struct{}
	leader       int
}

// buffer is one that is read while somebody writes.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// bootTime is how long it may take to boot; it takes a second.
const bootTime = time.Minute

// Boot boots a root in a network namespace, given as a file; where that is empty, in a new
// one that has lo alone and goes with the machine. Close it.
func Boot(ctx context.Context, folder, name, network string) (*Machine, error) {
	m := &Machine{folder: folder, name: name}
	if err := m.boot(ctx, network); err != nil {
		return nil, err
	}
	return m, nil
}

func (m *Machine) boot(ctx context.Context, network string) error {
	m.ended, m.leader, m.console = make(chan struct{}), 0, new(buffer)
	where := "--network-namespace-path=" + network
	if network == "" {
		where = "--private-network"
	}
	m.nspawn = osexec.Command("systemd-nspawn", "--quiet", "--directory="+m.folder, "--machine="+m.name, where,
		"--capability=CAP_NET_ADMIN,CAP_NET_RAW", "--register=no", "--keep-unit", "--boot", "--console=read-only", "--", "--show-status=true")
	// systemd has given cgroup v1 up in its version 258; nspawn takes the host's
	// unless it is told.
	m.nspawn.Env = append(os.Environ(), "UNIFIED_CGROUP_HIERARCHY=1", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1")
	m.nspawn.Stdout, m.nspawn.Stderr = m.console, m.console
	m.nspawn.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := m.nspawn.Start(); err != nil {
		return err
	}
	go func(nspawn *osexec.Cmd, ended chan struct{}) { _ = nspawn.Wait(); close(ended) }(m.nspawn, m.ended)
	if err := m.booted(ctx); err != nil {
		m.Close()
		return fmt.Errorf("boot of %s: %w\n%s", m.name, err, last([]byte(m.console.String())))
	}
	return nil
}

// Console is what was printed on the console since the boot.
func (m *Machine) Console() string { return m.console.String() }

// Reboot has the machine go down in order and boots it again, in a network namespace as
// in Boot: it must be another one, as the kernel's rules stay with a namespace that stays.
func (m *Machine) Reboot(ctx context.Context, network string) error {
	_, _ = m.Run(ctx, "systemctl", "reboot") // which may end before it has an answer
	select {
	case <-m.ended: // with code 133, see systemd-nspawn(1): here, that nobody boots it again
	case <-time.After(bootTime):
		m.Close()
		return fmt.Errorf("reboot of %s: it does not go down\n%s", m.name, last([]byte(m.console.String())))
	}
	return m.boot(ctx, network)
}

// PowerCut kills the machine as a power cut does, and boots it again as Reboot does.
func (m *Machine) PowerCut(ctx context.Context, network string) error {
	m.Kill()
	return m.boot(ctx, network)
}

// Put writes a file of the machine, and makes the folders above it; what stood there is
// replaced. mode is octal, as for chmod(1).
func (m *Machine) Put(ctx context.Context, name, mode string, data []byte) error {
	cmd := m.command(ctx, "sh", "-c", `mkdir -p "${1%/*}" && rm -f "$1" && cat >"$1" && chmod "$2" "$1"`, "sh", name, mode)
	cmd.Stdin = bytes.NewReader(data)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, last(out))
	}
	return nil
}

func (m *Machine) booted(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	for ; ; time.Sleep(50 * time.Millisecond) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-m.ended:
			return errors.New("it ended")
		default:
		}
		// Each time, as the first child is not the last: it sets up the machine's
		// namespaces, and ends.
		if m.leader = childOf(m.nspawn.Process.Pid); m.leader == 0 {
			continue
		}
		// It fails where a unit has, and says so.
		switch state, _ := m.Run(ctx, "systemctl", "is-system-running"); strings.TrimSpace(state) {
		case "running", "degraded":
			return nil
		}
	}
}

// childOf returns a child of a process; 0 where there is none yet.
func childOf(pid int) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0
	}
	child, _, _ := strings.Cut(string(text), " ")
	n, err := strconv.Atoi(child)
	if err != nil {
		return 0
	}
	return n
}

// Run runs a program in the machine and returns what it printed; the error holds what
// it printed to stderr.
func (m *Machine) Run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := m.command(ctx, name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(errOut.Bytes()))
	}
	return out.String(), nil
}

// command runs in the machine.
func (m *Machine) command(ctx context.Context, name string, args ...string) *osexec.Cmd {
	return osexec.CommandContext(ctx, "nsenter", append([]string{"--target=" + strconv.Itoa(m.leader), "--all", "--root", "--wd", "--",
		"env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", name}, args...)...)
}

// powerOff is for systemd as process 1 (systemd(1), SIGNALS): SIGRTMIN+4.
const powerOff = syscall.Signal(34 + 4)

// Close ends the machine.
func (m *Machine) Close() {
	if m.leader != 0 {
		_ = syscall.Kill(m.leader, powerOff)
	}
	select {
	case <-m.ended:
		return
	case <-time.After(10 * time.Second):
	}
	if m.leader != 0 {
		_ = syscall.Kill(m.leader, syscall.SIGKILL)
	}
	_ = m.nspawn.Process.Kill()
	<-m.ended
}

// Kill ends the machine as a power cut does.
func (m *Machine) Kill() {
	_ = syscall.Kill(m.leader, syscall.SIGKILL)
	<-m.ended
}

// last is the end of a long output.
func last(out []byte) []byte {
	out = bytes.TrimSpace(out)
	return out[max(0, len(out)-2000):]
}
