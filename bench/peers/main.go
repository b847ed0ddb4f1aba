//go:build linux

// Command peers measures the installers of other meshes against this module: those that
// are published as Go modules and can be imported, which is Istio's. See README.md in
// this folder for those that cannot.
//
// What an install, the same again, another config and an uninstall take, and how many
// programs they start, each sequence in a fresh network namespace, interleaved; which
// connections escape while another config is installed; and what google/nftables takes
// by itself for a table of our shape. The machine's own rules are never touched. It
// needs root.
//
//	go -C bench/peers run . -out ../results/peers.txt
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
)

func main() {
	var err error
	if os.Getenv(roleEnv) != "" {
		err = measure()
	} else {
		code, inside, there := netlab.Reexec()
		if there == nil && !inside {
			os.Exit(code)
		}
		if err = there; err == nil {
			err = run(os.Args[1:])
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		os.Exit(1)
	}
}

// The parts of the page, which -only chooses from.
const (
	partInstall   = "install"
	partReinstall = "reinstall"
	partNetlink   = "netlink"
)

var parts = []string{partInstall, partReinstall, partNetlink}

func run(args []string) error {
	flags := flag.NewFlagSet("peers", flag.ExitOnError)
	rounds := flags.Int("rounds", 11, "rounds; the medians are over them")
	slow := flags.Int("slow", 1, "rounds of what takes minutes each: Istio's iptables from 500 ports on; 0 leaves it out")
	list := flags.String("n", "0,20,1000", "excluded `ports` in each direction, a comma list")
	reinstalls := flags.Int("reinstalls", 20, "re-installs under load")
	only := flags.String("only", strings.Join(parts, ","), "the `parts` to measure, a comma list")
	out := flags.String("out", "", "write the results to this `file` too")
	date := flags.String("date", time.Now().Format(time.DateOnly), "the `date` in the results")
	if err := flags.Parse(args); err != nil {
		return err
	}
	sizes, err := parseSizes(*list)
	if err != nil {
		return err
	}
	chosen := strings.Split(*only, ",")
	for _, part := range chosen {
		if !slices.Contains(parts, part) {
			return fmt.Errorf("-only %q: accepted is a list of %s", part, strings.Join(parts, ", "))
		}
	}
	// Istio logs, and says on stdout what it programs; the page is for the reader.
	if err := silence(); err != nil {
		return err
	}
	p, err := crowd.NewPage(strings.TrimSpace("go -C bench/peers run . "+strings.Join(args, " ")), *date)
	if err != nil {
		return err
	}
	p.Linef("Programs: iptables %s, nft %s", said("iptables-nft", "--version"), said("nft", "--version"))
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	p.Linef("CPUs: %d; others' load on the machine when this began (/proc/loadavg): %s", runtime.NumCPU(), strings.Join(strings.Fields(string(load))[:3], " "))
	p.Linef("Peers: istio.io/istio %s\n", version("istio.io/istio"))
	do := map[string]func() error{
		partInstall:   func() error { return installPage(p, sizes, *rounds, *slow) },
		partReinstall: func() error { return reinstallPage(p, *reinstalls) },
		partNetlink:   func() error { return netlinkPage(p, sizes, 3**rounds) },
	}
	for _, part := range parts {
		if slices.Contains(chosen, part) {
			if err := do[part](); err != nil {
				return err
			}
		}
	}
	return p.Write(*out)
}

// version is that of a module in this program.
func version(module string) string {
	info, _ := debug.ReadBuildInfo()
	for _, m := range info.Deps {
		if m.Path == module {
			return m.Version
		}
	}
	return "?"
}

// said is the version in a program's first line.
func said(name string, args ...string) string {
	out, err := osexec.Command(name, args...).Output()
	if err != nil {
		return err.Error()
	}
	for word := range strings.FieldsSeq(string(out)) {
		if number, is := strings.CutPrefix(word, "v"); is {
			return number
		}
	}
	return strings.TrimSpace(string(out))
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// again marks the second measurement of ours, for the noise.
const again = " again"

// contestant is one column of a round: an installer, or ours once more.
type contestant struct {
	installer
	label string
}

func contestants() (all []contestant) {
	for _, i := range installers() {
		all = append(all, contestant{i, i.name})
		if i.ours() {
			all = append(all, contestant{i, i.name + again})
		}
	}
	return all
}

// times are those of one contestant with so many ports, by step.
type times struct{ wall, cpu [ops][]time.Duration }

// slowFrom is how many ports make a slow installer slow.
const slowFrom = 500

// installPage measures and prints what installs take.
func installPage(p *crowd.Page, sizes []int, rounds, slow int) error {
	p.Linef("Rounds: %d, interleaved. Ours again to ours is the noise; CPU time is of the process and all programs that it starts.\n", rounds)
	for _, n := range sizes {
		all := contestants()
		took, processes := map[string]*times{}, map[string][ops]int{}
		for _, c := range all {
			took[c.label] = &times{}
		}
		if n >= slowFrom && slow == 0 {
			all = slices.DeleteFunc(all, func(c contestant) bool { return c.slow })
		}
		for round := range rounds {
			for k := range all {
				c := all[(k+round)%len(all)]
				if c.slow && n >= slowFrom && round >= slow {
					continue
				}
				s, err := child(cell{Installer: c.name, N: n})
				if err != nil {
					return err
				}
				if was, is := processes[c.name]; is && was != s.Processes {
					return fmt.Errorf("%s, N=%d: %v programs were started, and before %v", c.name, n, s.Processes, was)
				}
				processes[c.name] = s.Processes
				for op := range ops {
					t := took[c.label]
					t.wall[op], t.cpu[op] = append(t.wall[op], s.Times[op]), append(t.cpu[op], s.CPU[op])
				}
			}
			fmt.Fprintf(os.Stderr, "N=%d: round %d of %d\r", n, round+1, rounds)
		}
		fmt.Fprintln(os.Stderr)
		printInstalls(p, n, all, took, processes)
	}
	return nil
}

// printInstalls prints the tables of one number of ports.
func printInstalls(p *crowd.Page, n int, all []contestant, took map[string]*times, processes map[string][ops]int) {
	row := func(first string, cells [ops]string) {
		var line strings.Builder
		fmt.Fprintf(&line, "%-44s", first)
		for _, c := range cells {
			fmt.Fprintf(&line, " %14s", c)
		}
		p.Linef("%s", line.String())
	}
	wall := func(t *times) [ops][]time.Duration { return t.wall }
	onCPU := func(t *times) [ops][]time.Duration { return t.cpu }
	ratios := func(of func(*times) [ops][]time.Duration) {
		for _, c := range all {
			against := c.against
			if c.label == c.name+again {
				against = c.name // the noise
			}
			if against == "" {
				continue
			}
			own, others := of(took[c.label]), of(took[against])
			var cells [ops]string
			for op := range cells {
				cells[op] = fmt.Sprintf("%.2f", crowd.Median(crowd.Ratios(own[op], others[op][:len(own[op])])))
			}
			row(c.label+" / ours", cells)
		}
	}
	medians := func(of func(*times) [ops][]time.Duration) {
		for _, c := range all {
			own := of(took[c.label])
			var cells [ops]string
			for op := range cells {
				cells[op] = fmt.Sprintf("%.1f", ms(crowd.Median(own[op])))
			}
			label := c.label
			if rounds := len(own[0]); rounds < len(took[all[0].label].wall[0]) {
				label += fmt.Sprintf(" (rounds: %d)", rounds)
			}
			row(label, cells)
		}
	}
	p.Linef("N=%d ports excluded in each direction", n)
	row("Wall time to ours, median of the rounds", opNames)
	ratios(wall)
	row("CPU time to ours, median of the rounds", opNames)
	ratios(onCPU)
	row("Programs started", opNames)
	for _, c := range all {
		if counted, is := processes[c.label]; is { // not ours again
			var cells [ops]string
			for op := range cells {
				cells[op] = fmt.Sprint(counted[op])
			}
			row(c.label, cells)
		}
	}
	row("Wall time, medians, ms", opNames)
	medians(wall)
	row("CPU time, medians, ms", opNames)
	medians(onCPU)
	p.Linef("")
}

// child runs one sequence in a fresh network namespace, which goes with it.
func child(c cell) (sample, error) {
	var s sample
	in, err := json.Marshal(c)
	if err != nil {
		return s, err
	}
	self, err := filepath.EvalSymlinks("/proc/self/exe")
	if err != nil {
		return s, err
	}
	cmd := osexec.Command(self)
	// Without what makes a machine a pod.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "KUBERNETES_SERVICE_HOST=") })
	cmd.Env = append(cmd.Env, roleEnv+"=1")
	cmd.Stdin = bytes.NewReader(in)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.Output()
	if err != nil {
		return s, fmt.Errorf("%s, N=%d: %w: %s", c.Installer, c.N, err, out)
	}
	// The kernel takes a namespace down in the background: not in the next one's time.
	time.Sleep(15 * time.Millisecond)
	return s, json.Unmarshal(out, &s)
}
