package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

// readyWord is what a watch says when it is there.
const readyWord = "ready\n"

// readyTime is how long that may take; it takes some 10 ms, and half a second where the
// watch of a trial that has just been confirmed is still there.
const readyTime = 15 * time.Second

// watcher returns what starts the process that puts the former state back. It outlives
// this one and its session: where systemd runs, as a unit of its own, because the end of
// a login scope takes along whatever was started there (systemd-logind.service(8),
// KillUserProcesses=); else as a process in a session of its own.
func watcher(leaf *cobra.Command, log *slog.Logger) func(context.Context, exec.Trial) (string, error) {
	return func(ctx context.Context, t exec.Trial) (string, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyTime)
		defer cancel()
		var failed error
		if program, err := bySystemd(); err == nil {
			by, err := startUnit(ctx, program, leaf, t)
			if err == nil {
				return by, nil
			}
			failed = err
			log.Warn("systemd does not watch, so a process does", "error", err)
		} else {
			log.Debug("systemd is not asked to watch", "why", err)
		}
		by, err := startProcess(ctx, leaf, t)
		return by, errors.Join(err, failed)
	}
}

// watchKind says which it would be.
func watchKind() string {
	if _, err := bySystemd(); err == nil {
		return "a transient unit of systemd"
	}
	return "a process in a session of its own"
}

// bySystemd returns the path of this program for systemd, or why that cannot run the
// watch: it starts what it starts in its own namespaces.
func bySystemd() (program string, err error) {
	if info, err := os.Stat("/run/systemd/system"); err != nil || !info.IsDir() {
		return "", errors.New("systemd is not the first process here (sd_booted(3))")
	}
	for _, ns := range []string{"net", "mnt", "pid"} {
		ours, err := os.Readlink("/proc/thread-self/ns/" + ns)
		theirs, err2 := os.Readlink("/proc/1/ns/" + ns)
		if err := errors.Join(err, err2); err != nil {
			return "", err
		}
		if ours != theirs {
			return "", fmt.Errorf("the namespace %s is not that of process 1", ns)
		}
	}
	if _, err := osexec.LookPath("systemd-run"); err != nil {
		return "", err
	}
	if program, err = os.Executable(); err != nil {
		return "", err
	}
	there, err := os.Stat(program)
	if err != nil {
		return "", err
	}
	if self, err := os.Stat("/proc/self/exe"); err != nil || !os.SameFile(there, self) {
		return "", fmt.Errorf("%s is another file by now than this program", program)
	}
	return program, nil
}

// startUnit has systemd run the watch, and returns when the watch has told systemd that
// it is there.
func startUnit(ctx context.Context, program string, leaf *cobra.Command, t exec.Trial) (string, error) {
	unit := "kuma-tproxy-trial-" + t.ID
	args := []string{"--quiet", "--collect", "--unit=" + unit, "--description=Put transparent proxying back as it was, unless it is confirmed"}
	for _, p := range []string{
		"Type=notify", "TimeoutStartSec=10", // without it, systemd-run does not wait until the watch is there
		"KillMode=mixed",       // iptables ends what it writes
		"Restart=on-abnormal",  // one that is killed is there again, with the same deadline
		"OOMScoreAdjust=-1000", // and not among the first to be killed
	} {
		args = append(args, "--property="+p)
	}
	for _, name := range []string{"PATH", "XTABLES_LOCKFILE"} { // the same programs and the same lock
		if v, ok := os.LookupEnv(name); ok {
			args = append(args, "--setenv="+name+"="+v)
		}
	}
	args = append(append(args, "--", program), watchArgs(leaf, t, 0)...)
	cmd := osexec.CommandContext(ctx, "systemd-run", args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		// Half of a start must not be there beside the process that is started instead.
		_ = osexec.Command("systemctl", "stop", unit+".service").Run()
		return "", fmt.Errorf("systemd-run: %w: %s", err, bytes.TrimSpace(out.Bytes()))
	}
	return fmt.Sprintf("the transient unit %s of systemd (journalctl -u %[1]s)", unit), nil
}

// startProcess starts the watch as a process without a terminal, which is nobody's child
// when this one ends. It is in the network namespace of this thread.
func startProcess(ctx context.Context, leaf *cobra.Command, t exec.Trial) (string, error) {
	if os.Getpid() == 1 {
		// pid_namespaces(7)
		return "", errors.New("this is the first process of its PID namespace: when it ends, the kernel kills whatever would put the former state back; run the command in a container that goes on")
	}
	read, write, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer read.Close()
	keepToOurselves()
	cmd := osexec.Command("/proc/self/exe")
	cmd.Args = append([]string{os.Args[0]}, watchArgs(leaf, t, 3)...)
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{write}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	write.Close()
	if err != nil {
		return "", err
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := read.SetReadDeadline(deadline); err != nil {
			return "", err
		}
	}
	said, err := io.ReadAll(io.LimitReader(read, int64(len(readyWord))))
	if string(said) != readyWord {
		_ = cmd.Process.Kill()
		return "", errors.Join(fmt.Errorf("the process that is to put the former state back did not start: %w", cmd.Wait()), err)
	}
	go func() { _ = cmd.Wait() }() // for a program that lives longer
	return fmt.Sprintf("process %d, in a session of its own", cmd.Process.Pid), nil
}

// keepToOurselves has no process that is started from here on inherit descriptors that
// this one inherited: somebody may wait for the end of a pipe.
func keepToOurselves() {
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, f := range open {
		if fd, err := strconv.Atoi(f.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
}

// notifySystemd says that the watch is there (sd_notify(3)).
func notifySystemd() error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return errors.New("NOTIFY_SOCKET is not set: there is nobody to say to that the watch is there")
	}
	if strings.HasPrefix(name, "@") || filepath.IsAbs(name) {
		conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			return err
		}
		_, err = conn.Write([]byte("READY=1"))
		return errors.Join(err, conn.Close())
	}
	return fmt.Errorf("NOTIFY_SOCKET %q: accepted is a path, or an abstract name that begins with @", name)
}
