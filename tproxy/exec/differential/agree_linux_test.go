package differential

import (
	"fmt"
	"maps"
	"os"
	osexec "os/exec"
	"os/signal"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// flowsEach is how many flows a config gets with each backend.
const flowsEach = 100

// variants are those of iptables, for what is about its programs.
var variants = []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy}

// tally adds up trials.
type tally struct {
	configs, refused, flows, retries int
	byBackend                        map[tproxy.Backend]int
	rows, kinds                      map[string]int
	start                            time.Time
}

func newTally() *tally {
	return &tally{byBackend: map[tproxy.Backend]int{}, rows: map[string]int{}, kinds: map[string]int{}, start: time.Now()}
}

// try tries a seed with each backend; false says that it was refused, or
// that it failed.
func (y *tally) try(t *testing.T, seed, flows int) bool {
	t.Helper()
	trial, ok := draw(seed, flows)
	if !ok {
		y.refused++
		return false
	}
	y.configs++
	for _, trial.backend = range tproxy.Backends() {
		o, err := trial.run(t.Context(), t.TempDir())
		if err != nil {
			t.Errorf("seed %d, %s: %v\nconfig: %#v\nhost: %#v", seed, trial.backend, err, trial.cfg, trial.host)
			return false
		}
		y.flows += o.flows
		y.retries += o.retries
		y.byBackend[trial.backend] += o.flows
		for r, n := range o.rows {
			y.rows[r] += n
		}
		for k, n := range o.kinds {
			y.kinds[k] += n
		}
		if o.problems != nil {
			t.Error(trial.report(o))
			return false
		}
	}
	return true
}

func (y *tally) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "checked on %d configurations and %d kernel flows, %s\n", y.configs, y.flows, where())
	for i, backend := range tproxy.Backends() {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%s %d", backend, y.byBackend[backend])
	}
	fmt.Fprintf(&b, "; in %s; %d sent again after a timeout; %d configurations refused on their host\n", time.Since(y.start).Round(time.Second), y.retries, y.refused)
	b.WriteString("\nrow      flows\n")
	for _, r := range y.all() {
		fmt.Fprintf(&b, "%-6s %7d\n", r, y.rows[r])
	}
	b.WriteString("\nflows\n")
	for _, k := range slices.Sorted(maps.Keys(y.kinds)) {
		fmt.Fprintf(&b, "%7d %s\n", y.kinds[k], k)
	}
	return b.String()
}

// where says what it was checked on, such as "kernel 6.18, iptables 1.8.9".
func where() string {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err.Error()
	}
	version, err := osexec.Command("iptables-nft-restore", "--version").Output()
	if err != nil {
		return err.Error()
	}
	kernel := strings.SplitN(string(release), ".", 3)
	return "kernel " + strings.Join(kernel[:2], ".") + ", iptables " + strings.TrimPrefix(strings.Fields(string(version))[1], "v")
}

// all are the rows of the contract, B2 as what it stands for.
func (y *tally) all() []string {
	out := slices.DeleteFunc(tproxytest.Rows(), func(r string) bool { return r == "B2" })
	return slices.Sorted(slices.Values(append(out, "B2:A1", "B2:A2", "B2:A3", "B2:A5")))
}

// missing are the rows that no flow reached.
func (y *tally) missing() []string {
	return slices.DeleteFunc(y.all(), func(r string) bool { return y.rows[r] > 0 })
}

// The kernel, the walk and the contract agree about random flows: a sample, or
// what -seed names.
func TestKernelAgrees(t *testing.T) {
	require(t)
	y := newTally()
	if *seedFlag != 0 {
		if !y.try(t, *seedFlag, flowsEach) && !t.Failed() {
			t.Errorf("the config of seed %d is refused on its host", *seedFlag)
		}
	}
	for seed := 1; *seedFlag == 0 && y.configs < 4 && !t.Failed(); seed++ {
		y.try(t, seed, 30)
	}
	t.Log(y)
}

// TestDifferential is the whole: each row of the contract is reached.
func TestDifferential(t *testing.T) {
	suite(t, "differential", "TPROXY_SUITE does not name differential")
	y := newTally()
	failures := 0
	for seed := 1; y.configs < *configsFlag && failures < 3; seed++ {
		before := y.refused
		if !y.try(t, seed, flowsEach) && y.refused == before {
			failures++
		}
	}
	for _, r := range y.missing() {
		t.Errorf("no flow reached row %s", r)
	}
	if *configsFlag >= 100 && (y.configs < 100 || y.flows < 10000) {
		t.Errorf("%d configurations and %d flows; want 100 and 10000", y.configs, y.flows)
	}
	t.Log(y)
	if *outFlag == "" {
		return
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("Command: TPROXY_SUITE=differential go test ./tproxy/exec/differential -run TestDifferential -args %s\nDate: %s\nKernel: %s\nDisagreements: %d\n\n%s",
		strings.Join(os.Args[slices.Index(os.Args, "-out"):], " "), time.Now().Format(time.DateOnly), strings.TrimSpace(string(release)), failures, y)
	if err := os.WriteFile(*outFlag, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestSoak tries new configs until it is stopped, or for the time in SOAK.
func TestSoak(t *testing.T) {
	suite(t, "soak", "run by make soak")
	end := make(<-chan time.Time)
	if s := os.Getenv("SOAK"); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatalf("SOAK=%q: accepted is a duration such as 30m", s)
		}
		end = time.After(d)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt)
	y, said := newTally(), time.Now()
	seed := int(time.Now().Unix()) * 1000
	for !t.Failed() {
		select {
		case <-end:
		case <-stop:
		default:
			y.try(t, seed, flowsEach)
			if seed++; time.Since(said) > 10*time.Second {
				said = time.Now()
				fmt.Printf("%s: %d configurations, %d flows, all agree; next is seed %d\n", said.Sub(y.start).Round(time.Second), y.configs, y.flows, seed)
			}
			continue
		}
		break
	}
	fmt.Println(y)
}
