package netlab

import (
	"errors"
	"fmt"
	"os"
	osexec "os/exec"
	"runtime"
	"strings"
	"syscall"
)

// The main thread is kept for the main goroutine, so that no other ever changes
// its namespace or its user: /proc/PID and /proc/self/net show the main thread's.
func init() { runtime.LockOSThread() }

// marker is set in the child of Reexec, to the outer network namespace.
const marker = "TPROXY_NETLAB"

// absent is why this process is not in a lab.
var absent = errors.New("the program did not start by netlab.Main or netlab.Reexec")

// Outside is the network namespace that the program was started in, as a file: for
// what has to be fetched.
func Outside() string { return fmt.Sprintf("/proc/%d/ns/net", os.Getppid()) }

// Main is the body of a TestMain: it runs the tests inside the lab. Where that is
// impossible it runs them outside, and those that call Require are skipped.
func Main(m interface{ Run() int }) {
	code, inside, err := Reexec()
	if err != nil {
		absent = err
	}
	if inside || err != nil {
		code = m.Run()
	}
	os.Exit(code)
}

// Reexec runs this program again, with its arguments, in network and mount
// namespaces of its own, with an empty /run. In that child it returns with inside
// true; in the parent when the child has ended, with its exit code. The error says
// why there can be no lab.
//
// Without root the child is root of a new user namespace. Which UIDs exist there
// is /etc/subuid's to say: 1 to 65535 as a rule.
func Reexec() (code int, inside bool, err error) {
	outer, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return 1, false, err
	}
	if was := os.Getenv(marker); was != "" {
		if was == outer {
			return 1, false, fmt.Errorf("%s is set, but this is the outer network namespace", marker)
		}
		return 0, true, arrive()
	}
	cmd := osexec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		self, err := os.Executable()
		if err != nil {
			return 1, false, err
		}
		// A map of several UIDs takes newuidmap(1), which unshare(1) calls. Tried
		// first with a program that does nothing: afterwards a failure is the
		// program's own.
		flags := []string{"--user", "--map-root-user", "--map-auto", "--net", "--mount"}
		if out, err := osexec.Command("unshare", append(flags, "true")...).CombinedOutput(); err != nil {
			return 1, false, fmt.Errorf("not root, and no user namespace with several UIDs: unshare %s: %w: %s", strings.Join(flags, " "), err, strings.TrimSpace(string(out)))
		}
		cmd = osexec.Command("unshare", append(append(flags, self), os.Args[1:]...)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	} else {
		cmd.Args[0] = os.Args[0]
	}
	cmd.Env = append(os.Environ(), marker+"="+outer)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		var errno syscall.Errno
		errors.As(err, &errno)
		return 1, false, fmt.Errorf("new network and mount namespaces: %w (errno %d)", err, int(errno))
	}
	if err := cmd.Wait(); cmd.ProcessState == nil {
		return 1, false, err
	}
	if code = cmd.ProcessState.ExitCode(); code < 0 {
		code = 1 // killed
	}
	return code, false, nil
}

// arrive makes the child's surroundings its own.
func arrive() error {
	// A child of this process is no child of Reexec.
	if err := os.Unsetenv(marker); err != nil {
		return err
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("an empty /run: %w", err)
	}
	if out, err := osexec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	absent = nil
	return nil
}

// Require skips the test, with the reason, unless there are a lab and the
// programs. Where TPROXY_REQUIRE names kernel it fails instead.
func Require(t interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}, programs ...string) {
	t.Helper()
	err := absent
	for _, p := range programs {
		if err == nil {
			_, err = osexec.LookPath(p)
		}
	}
	switch {
	case err == nil:
	case strings.Contains(os.Getenv("TPROXY_REQUIRE"), "kernel"):
		t.Fatalf("TPROXY_REQUIRE names kernel: %v", err)
	default:
		t.Skipf("no lab: %v", err)
	}
}
