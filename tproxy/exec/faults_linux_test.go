package exec_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// change is a change of what is installed, in tests of faults.
type change struct {
	name  string
	start func(w *world)
	run   func(w *world) error
}

var (
	faultConfig = tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}
	faultOther  = tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("80,443")}, DNS: tproxy.DNS{CaptureAll: true, SkipConntrackZoneSplit: true}}

	applyOne = func(w *world) error {
		c := faultConfig
		c.MaxRetries = -1
		p, err := w.plan(c)
		if err == nil {
			_, err = w.apply(p)
		}
		return err
	}
	changes = []change{
		{"install", func(*world) {}, applyOne},
		{"upgrade", func(w *world) { w.install(faultOther) }, applyOne},
		{"from Kuma", func(w *world) { w.kuma(oldkuma.Third, oldkuma.Options{DNS: true, DropInvalid: true}) }, applyOne},
		{"uninstall", func(w *world) { w.install(faultConfig) }, func(w *world) error {
			_, err := w.remove(exec.RemoveOptions{MaxRetries: -1})
			return err
		}},
	}
)

// perTable is each table of each family as text, without what moves by itself. The
// order of chains says nothing, and an empty table is none.
func (w *world) perTable() map[string]string {
	w.Helper()
	out := map[string]string{}
	for _, f := range rules.Families() {
		set, err := rules.ParseSave(f, []byte(w.on("", w.program(f, "save"))))
		if err != nil {
			w.Fatal(err)
		}
		for _, t := range []rules.Table{rules.NAT, rules.Raw, rules.Mangle, rules.Filter} {
			var bases, chains []string
			for _, c := range set.Bases {
				for _, r := range c.Rules {
					if c.Table == t {
						bases = append(bases, fmt.Sprintf("%s %s", c.Hook, r))
					}
				}
			}
			for _, c := range set.Chains {
				if c.Table == t {
					var text strings.Builder
					text.WriteString(c.Name)
					for _, r := range c.Rules {
						text.WriteString("\n  " + r.String())
					}
					chains = append(chains, text.String())
				}
			}
			slices.Sort(chains)
			out[fmt.Sprintf("%s %s", f, t)] = strings.Join(append(bases, chains...), "\n")
		}
	}
	out["inet"] = w.nftable()
	return out
}

// A system call that commits something fails, or the program is killed in it, one
// after the other, in the programs of each family: then each table is as before or as
// after, and all are as before where the program lived; and the same without flags
// finishes the job.
func TestStressFaults(t *testing.T) { faults(t, true) }

func TestFaults(t *testing.T) { faults(t, false) }

func faults(t *testing.T, whole bool) {
	if whole {
		onlyIn(t, "stress")
	}
	kinds := []string{"error=ENOBUFS", "error=EPERM", "error=ENOSPC", "error=EAGAIN", "signal=SIGKILL"}
	for _, c := range changes {
		t.Run(c.name, func(t *testing.T) {
			eachVariant(t, func(w *world) {
				netlab.Require(w, "strace")
				call := "sendmsg" // which carries the batch; what it reads it asks for by sendto
				if w.backend == tproxy.IPTablesLegacy {
					call = "setsockopt"
				}
				c.start(w)
				before := w.perTable()
				if err := c.run(w); err != nil {
					w.Fatal(err)
				}
				after := w.perTable()
				in := w.injector()
				tried := 0
				for _, f := range rules.Families() {
					for n := 1; ; n++ {
						reached, some := false, kinds
						if !whole { // a sample
							at := rand.IntN(len(kinds))
							some = kinds[at : at+1]
						}
						for _, kind := range some {
							w.uninstall()
							c.start(w)
							hit := in.during(w.program(f, "restore"), call, kind, n, func() { w.judge(c, kind, before, after) })
							reached = reached || hit
							if hit {
								tried++
							}
							if err := c.run(w); err != nil {
								w.Errorf("%s of %s number %d: the next run fails: %v", kind, call, n, err)
							}
							w.sameTables(fmt.Sprintf("%s of %s number %d, and the next run", kind, call, n), w.perTable(), after)
						}
						if !reached {
							break
						}
					}
				}
				w.Logf("%d faults", tried)
			})
		})
	}
}

// judge makes the change, which may fail, and looks at what is left.
func (w *world) judge(c change, kind string, before, after map[string]string) {
	w.Helper()
	err := c.run(w)
	now := w.perTable()
	for table, text := range now {
		if text != before[table] && text != after[table] {
			w.Errorf("%s: %s is neither as before nor as after:\n%s", kind, table, text)
		}
	}
	switch {
	case err == nil: // it was tried again, or did not matter
		w.sameTables(kind+", without an error", now, after)
	default:
		w.sameTables(fmt.Sprintf("%s, undone after %v", kind, err), now, before)
	}
}

func (w *world) sameTables(what string, got, want map[string]string) {
	w.Helper()
	for table, text := range got {
		if text != want[table] {
			w.Errorf("%s: %s is\n%s\nwant\n%s", what, table, text, want[table])
		}
	}
}

// injector lets strace(1) interfere with programs of iptables.
type injector struct {
	*world
	order, log string
}

func (w *world) injector() *injector {
	w.Helper()
	dir := w.TempDir()
	in := &injector{w, filepath.Join(dir, "order"), filepath.Join(dir, "log")}
	for _, f := range rules.Families() {
		name := w.program(f, "restore")
		w.fake(name, fmt.Sprintf(`if [ -s %[1]s ] && read program inject <%[1]s && [ "$program" = %[2]s ]; then
	: >%[1]s
	exec strace -o %[3]s -e "trace=${inject%%%%:*}" -e "inject=$inject" $real "$@"
fi
exec $real "$@"`, in.order, name, in.log))
	}
	return in
}

var struck = regexp.MustCompile(`INJECTED|killed by SIGKILL`)

// during runs f while the n-th call in the next run of the program fails. It reports
// whether there was such a call.
func (in *injector) during(program, call, kind string, n int, f func()) bool {
	in.Helper()
	_ = os.Remove(in.log)
	if err := os.WriteFile(in.order, fmt.Appendf(nil, "%s %s:%s:when=%d\n", program, call, kind, n), 0o644); err != nil {
		in.Fatal(err)
	}
	f()
	if err := os.WriteFile(in.order, nil, 0o644); err != nil {
		in.Fatal(err)
	}
	log, _ := os.ReadFile(in.log)
	return struck.Match(log)
}

// Our own process is killed at any moment: each table is as before or as after, and
// the next run, with no flags, finishes the job.
func TestStressKilled(t *testing.T) { killedAnywhere(t, 40) }

func TestKilled(t *testing.T) { killedAnywhere(t, 8) }

func killedAnywhere(t *testing.T, times int) {
	if times > 20 {
		onlyIn(t, "stress")
	}
	for _, c := range changes {
		t.Run(c.name, func(t *testing.T) {
			eachBackend(t, func(w *world) {
				c.start(w)
				before := w.perTable()
				start := time.Now()
				if err := c.run(w); err != nil {
					w.Fatal(err)
				}
				took := time.Since(start)
				after := w.perTable()
				for range times {
					w.uninstall()
					c.start(w)
					w.killAt(c.name, time.Duration(rand.Int64N(int64(2*took))))
					// What it started goes on for itself, and holds the lock.
					if err := w.waitForLock(); err != nil {
						w.Fatal(err)
					}
					now := w.perTable()
					for table, text := range now {
						if text != before[table] && text != after[table] {
							w.Errorf("killed: %s is neither as before nor as after:\n%s", table, text)
						}
					}
					if err := c.run(w); err != nil {
						w.Errorf("the next run fails: %v", err)
					}
					w.sameTables("after a kill and the next run", w.perTable(), after)
				}
			})
		})
	}
}

// childMarker makes the test binary a program that makes a change, to be killed.
const childMarker = "TPROXY_EXEC_CHANGE"

// child makes the change that childMarker names: "install iptables-nft".
func child(order string) int {
	name, backend, _ := strings.Cut(order, "/")
	b, err := tproxy.ParseBackend(backend)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var runner exec.Runner
	if name == "uninstall" {
		_, err = runner.Remove(context.Background(), exec.RemoveOptions{})
	} else {
		c := faultConfig
		if name == "other" {
			c = faultOther
		}
		c.Backend = b
		host, probeErr := runner.Probe(context.Background(), c.Needs())
		host.RemoteShells = nil
		plan, buildErr := tproxy.Build(c, host)
		if probeErr != nil || buildErr != nil {
			fmt.Fprintln(os.Stderr, probeErr, buildErr)
			return 1
		}
		_, err = runner.Apply(context.Background(), plan)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// child is the program that makes a change.
func (w *world) child(name string) *osexec.Cmd {
	cmd := osexec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childMarker+"="+name+"/"+w.backend.String())
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// killAt makes a change in a process of its own and kills it after that time.
func (w *world) killAt(name string, after time.Duration) {
	w.Helper()
	cmd := w.child(name)
	if err := w.In(w.Host, cmd.Start); err != nil {
		w.Fatal(err)
	}
	time.Sleep(after)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// Two runs at the same time, each a process of its own, end as one of them.
func TestTwoAtOnce(t *testing.T) {
	eachBackend(t, func(w *world) {
		ends := map[string]map[string]string{}
		for _, name := range []string{"install", "other", "uninstall"} {
			if err := w.inChild(name)(); err != nil {
				w.Fatal(err)
			}
			ends[name] = w.perTable()
		}
		won := map[string]int{}
		for i, pair := range slices.Repeat([][2]string{{"install", "other"}, {"install", "uninstall"}, {"other", "uninstall"}, {"install", "install"}}, 4) {
			if i%2 == 1 {
				w.install(faultOther)
			}
			waits := []func() error{w.inChild(pair[0]), w.inChild(pair[1])}
			for k, wait := range waits {
				if err := wait(); err != nil {
					w.Errorf("%s: %v", pair[k], err)
				}
			}
			now := w.perTable()
			switch {
			case maps.Equal(now, ends[pair[0]]):
				won[pair[0]]++
			case maps.Equal(now, ends[pair[1]]):
				won[pair[1]]++
			default:
				w.Errorf("%s and %s at once: neither", pair[0], pair[1])
				w.sameTables(pair[0], now, ends[pair[0]])
			}
		}
		w.Logf("ended as %v", won)
	})
}

// inChild begins a change in a process of its own, and returns how it ends.
func (w *world) inChild(name string) (wait func() error) {
	w.Helper()
	var says bytes.Buffer
	cmd := w.child(name)
	cmd.Stderr = &says
	if err := w.In(w.Host, cmd.Start); err != nil {
		w.Fatal(err)
	}
	return func() error {
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("%w: %s", err, says.String())
		}
		return nil
	}
}

// waitForLock returns when nobody of us works on the host any more.
func (w *world) waitForLock() error {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		_, err := w.remove(exec.RemoveOptions{DryRun: true})
		if err == nil && !w.restoring() {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("somebody still works: %w", err)
		}
	}
}

// restoring reports whether a program of iptables runs on the host.
func (w *world) restoring() bool {
	var here string
	if w.In(w.Host, func() (err error) { here, err = os.Readlink("/proc/thread-self/ns/net"); return err }) != nil {
		return false
	}
	links, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, link := range links {
		there, _ := os.Readlink(link)
		comm, _ := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(link)), "comm"))
		if there == here && strings.Contains(string(comm), "tables") {
			return true
		}
	}
	return false
}
