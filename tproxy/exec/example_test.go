package exec_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

// This one changes the machine, so it is compiled and never run.
func Example() {
	ctx := context.Background()
	cfg := tproxy.Config{ProxyUser: "kuma-dp"}
	var runner exec.Runner
	host, err := runner.Probe(ctx, cfg.Needs())
	if err != nil {
		log.Fatal(err)
	}
	plan, err := tproxy.Build(cfg, host)
	if err != nil {
		log.Fatal(err)
	}
	report, err := runner.Apply(ctx, plan)
	if step, ok := errors.AsType[*exec.ApplyError](err); ok {
		log.Fatalf("%s failed, %d steps undone: %s", step.Step, len(step.Undone), step.Remedy)
	}
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(report.Changed, report.Backend)

	if _, err := runner.Remove(ctx, exec.RemoveOptions{}); err != nil {
		log.Fatal(err)
	}
}

// An error is one of a few kinds, whatever it says.
func ExampleApplyError() {
	var err error = &exec.ApplyError{
		Step:   "IPv4 rules by iptables-legacy-restore",
		Err:    exec.ErrLocked,
		Remedy: "wait longer with --wait",
	}
	fmt.Println(errors.Is(err, exec.ErrLocked))
	fmt.Println(err)
	// Output:
	// true
	// IPv4 rules by iptables-legacy-restore: locked by another process
	//   wait longer with --wait
}
