// Command kumactl is a host program that installs transparent proxying by the
// library: observe, plan, and then print the plan or carry it out.
//
//	kumactl install -user kuma-dp [-dry-run]
//	kumactl uninstall
//
// The commands that a real kumactl mounts, with all flags, are in the module's
// folder cli.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

func main() {
	// An interrupt ends an install between two steps, and what was done is undone.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	runner := exec.Runner{Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	err := run(ctx, os.Stdout, &runner, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "kumactl:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer, runner *exec.Runner, args []string) error {
	switch {
	case len(args) > 0 && args[0] == "install":
		return install(ctx, out, runner, args[1:])
	case len(args) == 1 && args[0] == "uninstall":
		return uninstall(ctx, out, runner)
	}
	return errors.New("usage: kumactl install [-user NAME] [-dry-run] | uninstall")
}

func install(ctx context.Context, out io.Writer, runner *exec.Runner, args []string) error {
	flags := flag.NewFlagSet("install", flag.ContinueOnError)
	user := flags.String("user", "", "the `user` that kuma-dp runs as")
	dryRun := flags.Bool("dry-run", false, "print the plan and change nothing")
	if err := flags.Parse(args); err != nil {
		return err
	}

	cfg := tproxy.Config{ProxyUser: *user}
	host, err := runner.Probe(ctx, cfg.Needs()) // reads, and changes nothing
	if err != nil {
		return err
	}
	plan, err := tproxy.Build(cfg, host) // refuses what would lock you out
	if err != nil {
		return err
	}
	if *dryRun {
		for _, step := range plan.Steps {
			fmt.Fprintf(out, "# %s; undo: %s\n", step, step.Undo())
		}
		for _, f := range plan.Families {
			fmt.Fprintf(out, "### %s ###\n%s", f, plan.Rules.IPTables(f))
		}
		return nil
	}
	report, err := runner.Apply(ctx, plan) // all, or nothing and an error
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "changed: %t; backend: %s (%s)\n", report.Changed, report.Backend, report.Why)
	for _, note := range append(plan.Notes, report.Notes...) {
		fmt.Fprintln(out, "note:", note)
	}
	return nil
}

// uninstall finds what was installed by itself, whoever the proxy's user was.
func uninstall(ctx context.Context, out io.Writer, runner *exec.Runner) error {
	report, err := runner.Remove(ctx, exec.RemoveOptions{})
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "changed: %t\n", report.Changed)
	return nil
}
