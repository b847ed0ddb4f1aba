package exec_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// tool is the program kumactl, built once.
var tool = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "kumactl")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "kumactl")
	build := osexec.Command("go", "build", "-trimpath", "-o", path, "./cli/cmd/kumactl")
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	if toolFile, err = os.Open(path); err != nil {
		return "", err
	}
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), toolFile.Fd()), nil
})

// toolFile is the program as a file that goes with this process.
var toolFile *os.File

// How long the trials of these tests last: the least that there is, where the end of it is
// waited for, and enough for a slow machine, where not.
const (
	within = exec.MinTrial
	long   = 10 * time.Minute
)

// command is an install of kumactl's, or another verb, on the lab's host. It ends with
// the test.
func (w *world) command(verb string, args ...string) *osexec.Cmd {
	w.Helper()
	path, err := tool()
	if err != nil {
		w.Fatal(err)
	}
	cmd := osexec.CommandContext(w.Context(), path, append([]string{verb, "transparent-proxy"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd
}

func (w *world) kumactl(verb string, args ...string) (string, error) {
	w.Helper()
	cmd := w.command(verb, args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := w.In(w.Host, cmd.Start); err != nil {
		w.Fatal(err)
	}
	err := cmd.Wait()
	return out.String(), err
}

func (w *world) mustKumactl(verb string, args ...string) string {
	w.Helper()
	out, err := w.kumactl(verb, args...)
	if err != nil {
		w.Fatalf("%s %q: %v\n%s", verb, args, err, out)
	}
	return out
}

// trial are the arguments of an install on trial: outbound connections to 8443 are
// redirected, and inbound ones to 80 are not.
func (w *world) trial(within time.Duration) []string {
	return []string{"--confirm-within", within.String(), "--backend", w.backend.String(), "--exclude-inbound-ports", "80", "--redirect-dns=false"}
}

// standing is an install that a trial replaces.
var standing = tproxy.Config{Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("8443")}, DNS: tproxy.DNS{CaptureAll: true}}

// The flows of nothing, of an install that stands, and of the one on trial.
var (
	flowsOfNothing  = []flow{{"", "outside host:80 => app"}, {"", "outside host:8080 => app"}, {"", "1000 internet:8443 => remote"}, {"", "1000 internet:443 => remote"}}
	flowsOfStanding = []flow{{"", "outside host:80 => in"}, {"", "outside host:8080 => in"}, {"", "1000 internet:8443 => remote"}, {"", "1000 internet:443 => out"}}
	flowsOfTrial    = []flow{{"", "outside host:80 => app"}, {"", "outside host:8080 => in"}, {"", "1000 internet:8443 => out"}, {"", "1000 internet:443 => out"}}
)

// ruled is what both variants and our table hold of everybody's rules, and ::6.
func (w *world) ruled() string {
	w.Helper()
	return w.on("", "sh", "-c", `for f in iptables ip6tables; do for v in nft legacy; do $f-$v-save 2>/dev/null | grep ^-A; done; done; ip -o address show dev lo | grep -o 'inet6 ::6.*'; true`) + w.nftable()
}

// pending is what confirm --status says; nil where nothing waits.
func (w *world) pending() (status struct {
	Trial *struct {
		ID          string
		LeftSeconds int
		Watched     bool
		PID         int
	}
	Last *struct {
		ID                 string
		Confirmed, PutBack bool
		Error              string
	}
}) {
	w.Helper()
	cmd := w.command("install", "confirm", "--status", "--output", "json")
	var out strings.Builder
	cmd.Stdout = &out
	if err := w.In(w.Host, cmd.Start); err != nil {
		w.Fatal(err)
	}
	err := cmd.Wait()
	if e := json.Unmarshal([]byte(out.String()), &status); e != nil || (err == nil) != (status.Trial != nil) {
		w.Fatalf("%v, %v: %s", e, err, out.String())
	}
	return status
}

// over waits until no trial waits any more.
func (w *world) over() {
	w.Helper()
	for deadline := time.Now().Add(within + 30*time.Second); w.pending().Trial != nil; time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.Fatalf("the former state is not put back: %+v", w.pending())
		}
	}
}

// eachFormer runs a test for a host without anything, for one with an install, and for
// one with Kuma's rules, with each backend.
func eachFormer(t *testing.T, run func(w *world, former []flow)) {
	t.Helper()
	for name, prepare := range map[string]func(w *world) []flow{
		"nothing":  func(*world) []flow { return flowsOfNothing },
		"standing": func(w *world) []flow { w.install(standing); return flowsOfStanding },
		"Kuma's": func(w *world) []flow {
			w.kuma(oldkuma.Third, oldkuma.Options{DNS: true})
			return []flow{{"", "outside host:80 => in"}, {"", "1000 internet:8443 => out"}}
		},
		// The way back leads to another backend.
		"elsewhere": func(w *world) []flow {
			all := tproxy.Backends()
			c := standing
			c.Backend = all[(slices.Index(all, w.backend)+1)%len(all)]
			w.install(c)
			return flowsOfStanding
		},
	} {
		for _, b := range tproxy.Backends() {
			t.Run(fmt.Sprintf("%s/%s", name, b), func(t *testing.T) {
				t.Parallel() // most of it is waiting
				w := newWorld(t, b)
				w.serve()
				w.proxy(netlab.Answer)
				run(w, prepare(w))
			})
		}
	}
}

// Nobody confirms: the former state is there again, and on the way back no connection
// escapes that both redirect, and none from before is reset. The watch is told to end, so
// that a slow machine has time for the flows before that; what it does then is the same.
func TestTrialIsPutBack(t *testing.T) {
	eachFormer(t, func(w *world, former []flow) {
		w.check(former...)
		before := w.ruled()
		out := w.mustKumactl("install", w.trial(long)...)
		if !strings.Contains(out, "Not final yet: unless it is confirmed within 10m0s") || !strings.Contains(out, "in a session of its own") {
			w.Errorf("%s", out)
		}
		w.check(flowsOfTrial...)
		again, err := w.kumactl("install", "--backend", w.backend.String())
		if err == nil || !strings.Contains(again, "waits to be confirmed within 10m0s") {
			w.Errorf("a second install: %v\n%s", err, again)
		}
		if s := w.pending(); s.Trial == nil || !s.Trial.Watched || s.Trial.PID == 0 || s.Trial.LeftSeconds > 600 {
			w.Errorf("%+v", s)
		}
		var load *netlab.Load
		if len(former) != len(flowsOfNothing) || former[0] != flowsOfNothing[0] {
			if load, err = w.Load(
				netlab.Stream{Name: "in", From: w.Client, To: netip.AddrPortFrom(netlab.Host6, 8080), Want: "in", Else: "app", Held: 5},
				netlab.Stream{Name: "out", From: w.Host, UID: appUID, To: netip.AddrPortFrom(netlab.Internet4, 443), Want: "out", Else: "remote", Held: 5}); err != nil {
				w.Fatal(err)
			}
		}
		if err := syscall.Kill(w.pending().Trial.PID, syscall.SIGTERM); err != nil {
			w.Fatal(err)
		}
		w.over()
		if load != nil {
			unharmed(w, load)
		}
		w.same("after the way back", before, w.ruled())
		w.check(former...)
		if s := w.pending(); s.Last == nil || !s.Last.PutBack || s.Last.Error != "" {
			w.Errorf("%+v", s)
		}
		if out, err := w.kumactl("install", "confirm"); err == nil || !strings.Contains(out, "too late") {
			w.Errorf("confirmed: %v\n%s", err, out)
		}
	})
}

// Nobody confirms in time, and nobody is there any more.
func TestTrialIsOver(t *testing.T) {
	atOnce(t, func(w *world) {
		w.serve()
		before := w.ruled()
		w.mustKumactl("install", w.trial(within)...)
		start := time.Now()
		if w.ruled() == before {
			w.Error("nothing was changed")
		}
		w.over()
		if took := time.Since(start); took < within-time.Second {
			w.Errorf("it was over after %s", took)
		}
		w.same("after its time", before, w.ruled())
		w.check(flowsOfNothing...)
	}, "")
}

// atOnce runs a test with each backend and for each name, all at the same time: most of it
// is waiting, for which t.Parallel waits as well.
func atOnce(t *testing.T, run func(w *world), names ...string) {
	t.Helper()
	var all sync.WaitGroup
	for _, name := range names {
		for _, b := range tproxy.Backends() {
			all.Go(func() { t.Run(b.String()+"/"+name, func(t *testing.T) { run(newWorld(t, b)) }) })
		}
	}
	all.Wait()
}

// Confirmed in time it stays, and the watch goes.
func TestTrialIsConfirmed(t *testing.T) {
	atOnce(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		w.install(standing)
		w.mustKumactl("install", w.trial(within)...)
		tried, pid := w.ruled(), w.pending().Trial.PID
		if out := w.mustKumactl("install", "confirm"); !strings.Contains(out, "is final") {
			w.Errorf("%s", out)
		}
		w.until(func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) || zombie(pid) })
		time.Sleep(within + time.Second)
		w.same("after its time", tried, w.ruled())
		w.check(flowsOfTrial...)
		if out := w.mustKumactl("install", w.trial(within)...); !strings.Contains(out, "nothing to confirm") || w.pending().Trial != nil {
			w.Errorf("the same again: %s", out)
		}
	}, "")
}

// zombie reports whether a process has ended, and nobody has asked how.
func zombie(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}

// Whoever installs may go at any moment: the process killed, or its whole session with
// it, while it installs or behind that.
func TestTrialOutlivesWhoInstalls(t *testing.T) {
	outlives(t, 0, 15, 40, 90)
}

func TestStressTrialOutlivesWhoInstalls(t *testing.T) {
	onlyIn(t, "stress")
	for ms := 1; ms < 50; ms += 4 {
		outlives(t, ms, ms+1, ms+2, ms+3)
	}
}

// outlives is the test for a kill after each of those milliseconds; 0 is one of the whole
// session, when the install is done.
func outlives(t *testing.T, milliseconds ...int) {
	for len(milliseconds) > 0 {
		n := min(4, len(milliseconds)) // at a time: what is killed when is to vary
		var names []string
		for _, ms := range milliseconds[:n] {
			names = append(names, strconv.Itoa(ms))
		}
		milliseconds = milliseconds[n:]
		atOnce(t, func(w *world) {
			after, err := strconv.Atoi(filepath.Base(w.Name()))
			if err != nil {
				w.Fatal(err)
			}
			w.serve()
			w.proxy(netlab.Answer)
			w.install(standing)
			before := w.ruled()
			cmd := w.command("install", w.trial(within)...)
			if after == 0 { // its shell goes on
				args := cmd.Args
				cmd = osexec.CommandContext(w.Context(), "sh", "-c", `"$@"; sleep 100`, "sh", cmd.Path)
				cmd.Args = append(cmd.Args, args[1:]...)
				cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
			}
			if err := w.In(w.Host, cmd.Start); err != nil {
				w.Fatal(err)
			}
			time.Sleep(time.Duration(after) * time.Millisecond)
			if after == 0 {
				w.until(func() bool { return w.ruled() != before })
				w.until(func() bool { s := w.pending(); return s.Trial != nil && s.Trial.Watched })
				_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGHUP) // of the terminal
			}
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			_ = cmd.Wait()
			if s := w.pending(); s.Trial == nil {
				w.same("killed before the watch", before, w.ruled())
			} else if !s.Trial.Watched {
				w.Error("something waits, and nobody watches")
			} else {
				w.Logf("killed with a trial that waits, the rules changed: %v", w.ruled() != before)
			}
			w.over()
			w.same("after the way back", before, w.ruled())
			w.check(flowsOfStanding...)
			// Nothing is in the way of the next one.
			w.mustKumactl("install", w.trial(long)...)
			w.mustKumactl("uninstall")
		}, names...)
	}
}

// Either the confirmation or the way back wins, never both and never neither, however
// close they are.
func TestConfirmAtTheLastMoment(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.install(standing)
		before := w.ruled()
		p, err := w.plan(tproxy.Config{})
		if err != nil {
			w.Fatal(err)
		}
		wins := map[bool]int{}
		for i := range 32 {
			ctx, cancel := context.WithCancel(w.Context())
			type end struct {
				o   *exec.TrialOutcome
				err error
			}
			ended := make(chan end, 1)
			watch := func(_ context.Context, tr exec.Trial) (string, error) {
				there := make(chan error, 1)
				go func() {
					var e end
					if err := w.In(w.Host, func() error {
						e.o, e.err = w.runner.WatchTrial(ctx, tr.ID, func() error { there <- nil; return nil })
						return nil
					}); err != nil {
						e.err = err
					}
					if e.err != nil {
						there <- e.err
					}
					ended <- e
				}()
				return "a test", <-there
			}
			if err := w.In(w.Host, func() error {
				_, err := w.runner.Try(w.Context(), p, exec.TrialOptions{Within: time.Hour, Watch: watch})
				return err
			}); err != nil {
				w.Fatal(err)
			}
			tried := w.ruled()
			// The end of the watch stands for the end of the time: what follows is the same.
			go func() {
				time.Sleep(time.Duration(i%8) * time.Millisecond)
				cancel()
			}()
			time.Sleep(time.Duration(i/8) * time.Millisecond)
			err := w.In(w.Host, func() error { _, err := w.runner.Confirm(w.Context(), exec.ConfirmOptions{}); return err })
			e := <-ended
			cancel()
			_, late := errors.AsType[*exec.NoTrialError](err)
			switch {
			case err == nil && e.err == nil && e.o == nil && w.ruled() == tried:
				w.install(standing)
				w.same("installed over it", before, w.ruled())
			case late && e.err == nil && e.o != nil && e.o.PutBack && w.ruled() == before:
			default:
				w.Fatalf("confirm: %v; watch: %+v, %v; rules as on trial: %v, as before: %v", err, e.o, e.err, w.ruled() == tried, w.ruled() == before)
			}
			wins[err == nil]++
		}
		w.Logf("confirmed %d times, put back %d times", wins[true], wins[false])
		if wins[true] == 0 || wins[false] == 0 {
			w.Error("one of the two never won: nothing was tried")
		}
	})
}

// The watch is killed too: that is seen, the next install behind the time keeps the
// promise, and an uninstall takes everything out at any time.
func TestTrialWhoseWatchIsKilled(t *testing.T) {
	atOnce(t, func(w *world) {
		empty := w.ruled()
		w.install(standing)
		before := w.ruled()
		kill := func() {
			w.Helper()
			w.mustKumactl("install", w.trial(within)...)
			pid := w.pending().Trial.PID
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				w.Fatal(err)
			}
			w.until(func() bool { return !w.pending().Trial.Watched })
		}
		kill()
		if out, err := w.kumactl("install", "--backend", w.backend.String()); err == nil || !strings.Contains(out, "nobody watches any more") {
			w.Errorf("%v\n%s", err, out)
		}
		time.Sleep(within)
		if out := w.mustKumactl("install", "--backend", w.backend.String(), "--exclude-outbound-ports", "8443", "--redirect-all-dns-traffic"); !strings.Contains(out, "that was done now") {
			w.Errorf("%s", out)
		}
		w.same("after the next install, of the former Config", plainRecords(before), plainRecords(w.ruled()))
		kill()
		if out := w.mustKumactl("uninstall"); !strings.Contains(out, "an install waited to be confirmed: that is over") {
			w.Errorf("%s", out)
		}
		w.same("after an uninstall", empty, w.ruled())
		if s := w.pending(); s.Trial != nil {
			w.Errorf("%+v", s)
		}
	}, "")
}

// plainRecords leaves the records out: they hold the version of the program.
func plainRecords(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.Contains(line, "KUMA_MESH_RECORD") && !strings.Contains(line, "proxy/kuma-tproxy ") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// What a trial keeps only root can read, and what cannot be kept is an error before
// anything is changed.
func TestStateOfATrial(t *testing.T) {
	w := newWorld(t, tproxy.IPTablesNFT)
	const dir = "/run/kuma-tproxy"
	before := w.ruled()
	refused := func(what string) {
		t.Helper()
		out, err := w.kumactl("install", w.trial(long)...)
		if err == nil || !strings.Contains(out, "state of the install on trial") || !strings.Contains(out, what) {
			t.Errorf("%v\n%s", err, out)
		}
		w.same("after "+what, before, w.ruled())
	}
	aside := dir + "-aside"
	_ = os.Rename(dir, aside) // of other tests
	defer func() { _ = os.RemoveAll(dir); _ = os.Rename(aside, dir) }()
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("not a directory")
	if err := errors.Join(os.Remove(dir), os.Mkdir(dir, 0o755), os.Chmod(dir, 0o777)); err != nil {
		t.Fatal(err)
	}
	refused("others could write to it")
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_RDONLY, "mode=700"); err != nil {
		t.Fatal(err)
	}
	refused("read-only file system")
	if err := errors.Join(syscall.Unmount(dir, 0), os.Remove(dir)); err != nil {
		t.Fatal(err)
	}
	w.mustKumactl("install", w.trial(long)...)
	files, err := filepath.Glob(dir + "/*")
	if err != nil || len(files) != 3 {
		t.Errorf("%v, %v", files, err)
	}
	for _, f := range append(files, dir) {
		if info, err := os.Stat(f); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v", f, info.Mode(), err)
		}
	}
	pid := w.pending().Trial.PID
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if f := strings.Fields(string(text)); err != nil || f[5] != strconv.Itoa(pid) || f[6] != "0" { // proc_pid_stat(5): session, tty_nr
		t.Errorf("the watch: %s, %v", text, err)
	}
	for link, want := range map[string]string{"cwd": "/", "fd/0": "/dev/null", "fd/1": "/dev/null", "fd/2": "/dev/null"} {
		if got, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", pid, link)); got != want {
			t.Errorf("the watch: %s is %s, %v", link, got, err)
		}
	}
	w.mustKumactl("uninstall")
}
