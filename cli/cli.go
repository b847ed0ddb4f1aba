// Package cli holds the commands by which a host gets transparent proxying and
// loses it again, and by which one asks how it stands and what becomes of a connection:
// leaves named transparent-proxy, which a cobra program mounts under its own install,
// uninstall, inspect and explain. The program kumactl of this module is
// [Root] and nothing else.
//
// The commands return their errors and never exit; [ExitCode] turns an error
// into the code to exit with. They write to the command's OutOrStdout and
// ErrOrStderr, stop between two steps when the command's context is done, and
// hold no state outside themselves.
//
// A configuration is read as Kuma's users have it, from files, from the environment
// and from flags; [Loader] does that for a program that is no command.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

// Runner observes and changes the machine; *exec.Runner is one.
type Runner interface {
	// Probe observes what n asks for and writes nothing.
	Probe(ctx context.Context, n tproxy.Needs) (tproxy.Host, error)
	// Apply carries out a plan, whole or not at all.
	Apply(ctx context.Context, p *tproxy.Plan) (*exec.Report, error)
	// Try is Apply for a while: unless it is confirmed, the former state is put back.
	Try(ctx context.Context, p *tproxy.Plan, o exec.TrialOptions) (*exec.Report, error)
	// Confirm makes an install that waits final.
	Confirm(ctx context.Context, o exec.ConfirmOptions) (exec.Trial, error)
	// Trial returns the install that waits, nil where none does, and how the last one
	// ended; it writes nothing.
	Trial(ctx context.Context) (*exec.Trial, *exec.TrialOutcome, error)
	// WatchTrial puts the former state back unless the install is confirmed.
	WatchTrial(ctx context.Context, id string, ready func() error) (*exec.TrialOutcome, error)
	// BringBack installs again what was saved when an install was made, and
	// BringBackNames tells systemd-resolved of it again.
	BringBack(ctx context.Context) (*exec.Report, error)
	BringBackNames(ctx context.Context) (*exec.Report, error)
	// Remove takes out whatever an install left, whoever made it.
	Remove(ctx context.Context, o exec.RemoveOptions) (*exec.Report, error)
	// Installed reads what is installed, nil where nothing is, and writes nothing.
	Installed(ctx context.Context) (*exec.Installation, error)
	// Status compares what is installed with what was, and writes nothing.
	Status(ctx context.Context) (*exec.Status, error)
	// Watch is Status again and again, whenever it is another than before.
	Watch(ctx context.Context, o exec.WatchOptions, each func(*exec.Status) error) error
	// Preflight says what an install of a plan would find, and writes nothing.
	Preflight(ctx context.Context, p *tproxy.Plan) (*exec.Preflight, error)
	// Silent says on which of the ports that a plan redirects to nobody listens.
	Silent(ctx context.Context, p *tproxy.Plan) ([]string, error)
	// Live reads the rules that are there, and the ways to the addresses, and
	// writes nothing.
	Live(ctx context.Context, to ...netip.Addr) (exec.Live, error)
}

// Options say how the commands work. The zero Options are those of kumactl.
type Options struct {
	// Runner makes the Runner of one run, which logs to log. Nil means an
	// *exec.Runner: this machine.
	Runner func(log *slog.Logger) Runner
	// Version is what Root prints for --version, and what the record of an install
	// says of its maker. Empty means "unknown" to Root, and to the record the version
	// of this library in the program, where it was built from a version.
	Version string
	// AllowUnknown makes a note of a key in a file that is not known, where a
	// configuration can be newer than its reader: in a pod's kuma-init, for one.
	AllowUnknown bool
}

// logger makes the log of a run of cmd, on the command's standard error: warnings,
// and with verbose everything.
func logger(cmd *cobra.Command, verbose bool) *slog.Logger {
	level := slog.LevelWarn
	if verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
}

// runner makes the Runner of a run.
func (o Options) runner(log *slog.Logger) Runner {
	if o.Runner != nil {
		return o.Runner(log)
	}
	return &exec.Runner{Log: log, Version: o.Version}
}

// installer makes the Runner of a run that may have an install come back: leaf is the
// command that installs.
func (o Options) installer(log *slog.Logger, leaf *cobra.Command) Runner {
	if o.Runner != nil {
		return o.Runner(log)
	}
	return &exec.Runner{Log: log, Version: o.Version, ComeBack: comeBackCommandLine(leaf)}
}

// ExitCode is what a program exits with after err: 0 for nil, 2 for bad flags
// and bad configuration, 1 for everything else, which left the host as it was,
// and for a verdict that is unknown (*UnknownError). An inspect's *StateError has codes
// of its own: 1 drifted, 2 could not tell, 3 not installed.
func ExitCode(err error) int {
	if e, ok := errors.AsType[*StateError](err); ok {
		return e.code()
	}
	switch {
	case err == nil:
		return 0
	case isUsage(err):
		return 2
	}
	return 1
}

func isUsage(err error) bool {
	if _, ok := errors.AsType[*usageError](err); ok {
		return true
	}
	_, ok := errors.AsType[*tproxy.ConfigError](err)
	return ok
}

// usageError is everything that is wrong with a command line, a line each.
type usageError struct{ faults []string }

func (e *usageError) Error() string {
	if len(e.faults) == 1 {
		return e.faults[0]
	}
	return fmt.Sprintf("%d faults:\n  %s", len(e.faults), strings.Join(e.faults, "\n  "))
}

// explain adds to an error of the Runner what a user of cmd can do about it.
func explain(cmd *cobra.Command, err error) error {
	_, step := errors.AsType[*exec.ApplyError](err) // says itself what to do
	_, pending := errors.AsType[*exec.PendingError](err)
	switch {
	case pending:
		return fmt.Errorf("%w\n  to keep it: %s confirm; otherwise wait, or uninstall, which takes everything out at once", err, cmd.CommandPath())
	case errors.Is(err, exec.ErrNotRoot):
		return fmt.Errorf("%w\n  run it as root: sudo %s", err, cmd.CommandPath())
	case errors.Is(err, exec.ErrUnsupported) && !step:
		return fmt.Errorf("%w: transparent proxying needs Linux; --dry-run works here too", err)
	}
	return err
}

// write writes what a command has to say at once, so that a reader sees all or
// nothing of it.
func write(w io.Writer, text []byte) error {
	if _, err := w.Write(text); err != nil {
		return fmt.Errorf("write the output: %w", err)
	}
	return nil
}
