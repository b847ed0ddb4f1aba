//go:build linux

// Command cni measures what kuma-cni adds to the start and to the end of a pod: the real
// program as the second plugin of a chain behind the bridge plugin of
// containernetworking/plugins, in a fresh network namespace each time, against the same
// chain without it and against the bare iptables-restore --noflush and ip6tables-restore
// --noflush of the same rules in a namespace that the same chain has made. With nftables,
// the restores are those of iptables-nft, and nft -f loads the table.
//
// Everything is interleaved in one run, in an order that turns from round to round, in
// network and mount namespaces of its own. It needs root and the package
// containernetworking-plugins.
//
//	go run ./bench/cni -rounds 200 -out bench/results/cni.txt
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
)

// programEnv is the plugin that was built before the namespaces were entered.
const programEnv = "KUMA_TPROXY_BENCH_CNI"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cni:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("cni", flag.ExitOnError)
	rounds := flags.Int("rounds", 200, "rounds; the medians are over them")
	parallel := flags.Int("parallel", 20, "pods at once")
	bursts := flags.Int("bursts", 10, "how often that many start at once")
	out := flags.String("out", "", "write the results to this `file` too")
	date := flags.String("date", time.Now().Format(time.DateOnly), "the `date` in the results")
	plugins := flags.String("plugins", "/usr/lib/cni", "the `folder` of the standard plugins")
	_ = flags.Parse(args) // it exits
	if os.Geteuid() != 0 {
		return errors.New("root is needed: network namespaces are made")
	}
	if os.Getenv(programEnv) == "" {
		dir, err := os.MkdirTemp("", "kuma-cni")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		program := filepath.Join(dir, "kuma-cni")
		build := osexec.Command("go", "build", "-trimpath", "-o", program, "./cni/cmd/kuma-cni")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if text, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("go build: %w: %s", err, text)
		}
		os.Setenv(programEnv, program)
	}
	code, inside, err := netlab.Reexec()
	if err != nil {
		return err
	}
	if !inside {
		if code != 0 {
			return fmt.Errorf("exit code %d", code)
		}
		return nil
	}
	b := &bench{plugins: *plugins, program: os.Getenv(programEnv)}
	if b.dir, err = os.MkdirTemp("", "bench"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	var text bytes.Buffer
	fmt.Fprintf(&text, "Command: go run ./bench/cni %s\nDate: %s\nKernel: %s\niptables: %s\nRounds: %d, interleaved, each in a fresh network namespace; %d times %d pods at once\n",
		strings.Join(args, " "), *date, kernelRelease(), iptablesVersion(), *rounds, *bursts, *parallel)
	for _, backend := range tproxy.Backends() {
		if err := b.measure(&text, backend, *rounds, *bursts, *parallel); err != nil {
			return err
		}
	}
	if _, err := os.Stdout.Write(text.Bytes()); err != nil || *out == "" {
		return err
	}
	return os.WriteFile(*out, text.Bytes(), 0o644)
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

// series are times of one thing.
type series []time.Duration

func (s series) String() string {
	sorted := slices.Sorted(slices.Values(s))
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	return fmt.Sprintf("%8.2f %8.2f", ms(crowd.Median(s)), ms(sorted[(len(sorted)-1)*99/100]))
}

// measure does all for one backend.
func (b *bench) measure(w io.Writer, backend tproxy.Backend, rounds, bursts, parallel int) error {
	b.backend = backend
	if err := b.prepare(); err != nil {
		return err
	}
	times := map[string]series{}
	note := func(what string, d time.Duration) { times[what] = append(times[what], d) }
	roles := []func(func(string, time.Duration)) error{b.with, b.without, b.bare, b.loaded, b.alone}
	for round := range rounds {
		for k := range roles {
			if err := roles[(k+round)%len(roles)](note); err != nil {
				return err
			}
		}
		fmt.Fprintf(os.Stderr, "%s: round %d of %d\r", backend, round+1, rounds)
	}
	fmt.Fprintln(os.Stderr)
	memory, err := b.memory(20)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "\n%s\n%-64s %8s %8s\n", backend, "wall ms", "median", "p99")
	for _, what := range []string{addBridge, addOurs, addChain, addBare, addTable, addAlone, delBridge, delOurs, delChain} {
		if len(times[what]) > 0 {
			fmt.Fprintf(w, "%-64s %s\n", what, times[what])
		}
	}
	ratio := func(what, to string) float64 { return crowd.Median(crowd.Ratios(times[what], times[to])) }
	fmt.Fprintf(w, "our part of ADD to the bare restore: %.2f; of the medians: %.2f\n", ratio(addOurs, addBare), float64(crowd.Median(times[addOurs]))/float64(crowd.Median(times[addBare])))
	if len(times[addTable]) > 0 {
		fmt.Fprintf(w, "our part of ADD to nft -f: %.2f\n", ratio(addOurs, addTable))
	}
	fmt.Fprintf(w, "ADD of the chain with us to without: %.2f; DEL: %.2f\n", ratio(addChain, addBridge), ratio(delChain, delBridge))
	fmt.Fprintf(w, "processes that an ADD starts beside the plugin itself: %d; peak memory of the plugin's process: %.1f MiB\n", b.processes, float64(memory)/1024)
	return b.burst(w, bursts, parallel)
}

// burst starts many pods at once.
func (b *bench) burst(w io.Writer, bursts, parallel int) error {
	all, each := map[bool]series{}, map[bool]series{}
	for range bursts {
		for _, ours := range []bool{true, false} {
			total, pods, err := b.atOnce(parallel, ours)
			if err != nil {
				return err
			}
			all[ours], each[ours] = append(all[ours], total), append(each[ours], pods...)
		}
	}
	fmt.Fprintf(w, "%-64s %s\n%-64s %s\n", fmt.Sprintf("ADD, %d at once, one pod, the chain with us", parallel), each[true], "ADD, the same, without us", each[false])
	fmt.Fprintf(w, "%-64s %s\n%-64s %s\n", fmt.Sprintf("ADD, %d at once, until the last, with us", parallel), all[true], "ADD, the same, without us", all[false])
	_, err := fmt.Fprintf(w, "until the last, with us to without: %.2f\n", crowd.Median(crowd.Ratios(all[true], all[false])))
	return err
}

// What is measured.
const (
	addBridge = "ADD, the chain without us: bridge, host-local"
	addOurs   = "ADD, our part: the process kuma-cni"
	addChain  = "ADD, the chain with us"
	addBare   = "the bare restores of the same rules"
	addTable  = "nft -f of the same table"
	addAlone  = "ADD, our part, for a pod without a sidecar"
	delBridge = "DEL, the chain without us"
	delOurs   = "DEL, our part"
	delChain  = "DEL, the chain with us"
)

// entry is what a plugin is given.
func entry(plugin map[string]any, prevResult json.RawMessage) []byte {
	e := map[string]any{"cniVersion": "1.0.0", "name": "bench"}
	maps.Copy(e, plugin)
	if prevResult != nil {
		e["prevResult"] = prevResult
	}
	text, err := json.Marshal(e)
	if err != nil {
		panic(err)
	}
	return text
}
