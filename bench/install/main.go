//go:build linux

// Command install measures what an install, the same again, another config and
// an uninstall cost, against the bare iptables-restore --noflush and
// ip6tables-restore --noflush of the same scripts, one after the other; with the
// backend nftables, against those of iptables-nft of the same config, and against nft -f
// of the same text.
//
// Everything is interleaved in one run: in each round, each of the measured
// programs does its sequence in a fresh network namespace, in an order that
// turns from round to round. The machine's own rules are never touched. It
// needs root.
//
//	go run ./bench/install -rounds 15 -kumactl ./kumactl -out bench/results/install.txt
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/tproxy"
)

func main() {
	if role := os.Getenv(roleEnv); role != "" {
		if err := measure(role); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if err := run(os.Args[1:]); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			os.Exit(2)
		}
		fmt.Fprintln(os.Stderr, "install:", err)
		os.Exit(1)
	}
}

// run is what the user started; what it measures runs in children.
func run(args []string) error {
	flags := flag.NewFlagSet("install", flag.ContinueOnError)
	rounds := flags.Int("rounds", 15, "rounds; the medians are over them")
	sizes := flags.String("n", "0,20,1000", "excluded `ports` in each direction, a comma list")
	more := flags.String("more", "10000", "the same, for the backend nftables alone")
	kumactl := flags.String("kumactl", "", "also measure the process of this kumactl (`path`)")
	out := flags.String("out", "", "write the results to this `file` too")
	date := flags.String("date", time.Now().Format(time.DateOnly), "the `date` in the results")
	listen := flags.Bool("listen", true, "something listens on port 22, as on a VM: Probe looks whose it is")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("root is needed: network namespaces are made")
	}
	cells, err := cellsOf(*sizes, *more)
	if err != nil {
		return err
	}
	for i := range cells {
		cells[i].Listen = *listen
	}
	roles := []string{roleOurs, roleBare, roleBareAgain, roleNFT}
	if *kumactl != "" {
		path, err := filepath.Abs(*kumactl)
		if err != nil {
			return err
		}
		roles = append(roles, roleKumactl)
		for i := range cells {
			cells[i].Kumactl = path
		}
	}
	results, err := before(cells)
	if err != nil {
		return err
	}
	start := time.Now()
	for round := range *rounds {
		for i, c := range cells {
			for k := range roles {
				role := roles[(k+round)%len(roles)]
				if role == roleNFT && c.Backend != tproxy.NFTables {
					continue
				}
				s, err := child(role, c)
				if err != nil {
					return err
				}
				if role == roleOurs && !slices.EqualFunc(s.Scripts[:], c.Scripts[:], func(a, b [2][]byte) bool { return bytes.Equal(a[0], b[0]) && bytes.Equal(a[1], b[1]) }) {
					return fmt.Errorf("%s N=%d: the scripts differ from those of the first round", c.Backend, c.N)
				}
				t := results[i].times[role]
				for op := range t {
					t[op] = append(t[op], s.Times[op])
				}
				results[i].times[role] = t
			}
		}
		fmt.Fprintf(os.Stderr, "round %d of %d\r", round+1, *rounds)
	}
	fmt.Fprintln(os.Stderr)
	var text bytes.Buffer
	command := "go run ./bench/install " + strings.Join(args, " ")
	fmt.Fprintf(&text, "Command: %s\nDate: %s\nKernel: %s\niptables: %s\nRounds: %d, interleaved, in %s; something listens on port 22: %t\n\n",
		strings.TrimSpace(command), *date, kernelRelease(), iptablesVersion(), *rounds, time.Since(start).Round(time.Second), *listen)
	report(&text, results, roles)
	if _, err := os.Stdout.Write(text.Bytes()); err != nil || *out == "" {
		return err
	}
	return os.WriteFile(*out, text.Bytes(), 0o644)
}

// cellsOf are the combinations of each backend with the sizes, and of nftables with more.
func cellsOf(sizes, more string) (cells []cell, err error) {
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy, tproxy.NFTables} {
		list := sizes
		if b == tproxy.NFTables && more != "" {
			list += "," + more
		}
		for s := range strings.SplitSeq(list, ",") {
			n, err := strconv.Atoi(s)
			if err != nil || n < 0 || n > maxPorts {
				return nil, fmt.Errorf("size %q of -n or -more: accepted is a list of numbers from 0 to %d", s, maxPorts)
			}
			cells = append(cells, cell{Backend: b, N: n})
		}
	}
	return cells, nil
}

// before makes the scripts that bare is given, outside of the measurement, and loads the
// kernel's modules and the programs into the page cache.
func before(cells []cell) ([]result, error) {
	results := make([]result, len(cells))
	for i, c := range cells {
		first, err := child(roleOurs, c)
		if err != nil {
			return nil, err
		}
		cells[i].Scripts, cells[i].Bare = first.Scripts, first.Scripts
		if c.Backend == tproxy.NFTables { // bare are the restores of the same config
			c.Backend = tproxy.IPTablesNFT
			other, err := child(roleOurs, c)
			if err != nil {
				return nil, err
			}
			cells[i].Bare = other.Scripts
		}
		results[i] = result{cell: cells[i], times: map[string][ops][]time.Duration{}, processes: first.Processes}
	}
	return results, nil
}

// child runs one sequence in a fresh network namespace, which goes with it.
func child(role string, c cell) (sample, error) {
	var s sample
	in, err := json.Marshal(c)
	if err != nil {
		return s, err
	}
	cmd := osexec.Command("/proc/self/exe")
	cmd.Env = append(environ(), roleEnv+"="+role)
	cmd.Stdin = bytes.NewReader(in)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.Output()
	if err != nil {
		return s, fmt.Errorf("%s, %s, N=%d: %w", role, c.Backend, c.N, err)
	}
	// The kernel takes a namespace down in the background: not in the next one's
	// time.
	time.Sleep(15 * time.Millisecond)
	return s, json.Unmarshal(out, &s)
}

// environ is without what makes a machine a pod.
func environ() []string {
	return slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "KUBERNETES_SERVICE_HOST=") })
}

func kernelRelease() string {
	text, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text))
}

func iptablesVersion() string {
	out, err := osexec.Command("iptables-nft-restore", "--version").Output()
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(strings.TrimPrefix(string(out), "iptables-nft-restore "))
}

// result is what was measured of one cell.
type result struct {
	cell
	times     map[string][ops][]time.Duration // by role
	processes [ops]int
}

func report(w io.Writer, results []result, roles []string) {
	row := func(first, second string, cells [ops]string) {
		fmt.Fprintf(w, "%-24s %-6s", first, second)
		for _, c := range cells {
			fmt.Fprintf(w, " %14s", c)
		}
		fmt.Fprintln(w)
	}
	ratio := func(title, role, to string) {
		fmt.Fprintf(w, "%s\n", title)
		row("", "N", opNames)
		for _, r := range results {
			if r.times[role][opInstall] == nil || r.times[to][opInstall] == nil {
				continue // not measured of this backend
			}
			var c [ops]string
			for op := range c {
				c[op] = fmt.Sprintf("%.2f", crowd.Median(crowd.Ratios(r.times[role][op], r.times[to][op])))
			}
			row(r.Backend.String(), strconv.Itoa(r.N), c)
		}
		fmt.Fprintln(w)
	}
	fmt.Fprint(w, `N is the number of excluded ports in each direction. Bare is, for install, another config and uninstall,
the restores of both families of the same scripts, and for the same again the saves of both; for nftables they
are those of iptables-nft with the same config.

`)
	ratio("Ratio to bare, median of the rounds: the library (Probe, Build and Apply, or Remove, in a process that runs)", roleOurs, roleBare)
	if slices.Contains(roles, roleKumactl) {
		ratio("Ratio to bare, median of the rounds: the process kumactl", roleKumactl, roleBare)
	}
	ratio("Ratio to nft -f of the same text, and to nft list table: the library", roleOurs, roleNFT)
	ratio("Noise: the same of bare to bare", roleBareAgain, roleBare)
	fmt.Fprintln(w, "Processes that the library starts")
	row("", "N", opNames)
	for _, r := range results {
		var c [ops]string
		for op := range c {
			c[op] = strconv.Itoa(r.processes[op])
		}
		row(r.Backend.String(), strconv.Itoa(r.N), c)
	}
	fmt.Fprintln(w, "\nMedians, ms")
	row("", "N", opNames)
	for _, r := range results {
		for _, role := range roles {
			if r.times[role][opInstall] == nil {
				continue
			}
			var c [ops]string
			for op := range c {
				c[op] = fmt.Sprintf("%.1f", float64(crowd.Median(r.times[role][op]))/float64(time.Millisecond))
			}
			row(r.Backend.String()+" "+role, strconv.Itoa(r.N), c)
		}
	}
}
