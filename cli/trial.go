package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

const confirmLong = `Make an install that was made with --confirm-within final. Unless that is said in
time, the former state comes back by itself, even if this session is gone by then.

With --status nothing is changed: it says how long is left, or how the last such
install ended.

Exit codes: 0 confirmed, or with --status an install waits; 1 none waits: there was
none, or it is too late; 2 bad flags.`

const confirmExample = `  kumactl install transparent-proxy --confirm-within 60s
  kumactl install transparent-proxy confirm
  kumactl install transparent-proxy confirm --status --output json`

// confirmCommand is the command that makes an install final.
func confirmCommand(o Options) *cobra.Command {
	cmd := &cobra.Command{
		Use:          "confirm",
		Short:        "Make an install that waits for its confirmation final",
		Long:         confirmLong,
		Example:      confirmExample,
		Args:         cobra.ArbitraryArgs, // faults of the command line like others
		SilenceUsage: true,
		RunE:         func(cmd *cobra.Command, args []string) error { return confirm(cmd, args, o) },
	}
	addFlags(cmd, []flagGroup{{"This run", []flag{
		{"status", "false", "say how long is left, and change nothing"},
		{"wait", "5", "`seconds` to wait for an install, or for what is being put back; 0 does not wait"},
		{"output", "text", "`format`: text, json or yaml"},
		{"verbose", "false", "log every step to standard error"},
	}}})
	return cmd
}

func confirm(cmd *cobra.Command, args []string, o Options) error {
	p := newParser(cmd, args)
	r := run{format: p.format()}
	status, wait := p.bool("status"), p.wait("wait")
	runner := o.installer(logger(cmd, p.bool("verbose")), cmd.Parent())
	if err := p.err(); err != nil {
		return err
	}
	if status {
		return r.trialStatus(cmd, runner)
	}
	t, err := runner.Confirm(cmd.Context(), exec.ConfirmOptions{Wait: wait})
	if err != nil {
		return explain(cmd, err)
	}
	if r.format != asText {
		unsaid(cmd, r.writeDocument(cmd.OutOrStdout(), confirmJSON{Confirmed: true, Trial: trialOf(&t)}))
		return nil
	}
	var out page
	if t.Left > 0 {
		out.linef("confirmed with %s left: the install of %s is final", seconds(t.Left), t.Began.Format(time.RFC3339))
	} else {
		out.linef("confirmed: the install of %s is final; its time was over, and nobody had put the former state back", t.Began.Format(time.RFC3339))
	}
	unsaid(cmd, write(cmd.OutOrStdout(), out.Bytes()))
	return nil
}

// trialStatus says what waits. Where nothing does, the error says so.
func (r run) trialStatus(cmd *cobra.Command, runner Runner) error {
	t, last, err := runner.Trial(cmd.Context())
	if err != nil {
		return explain(cmd, err)
	}
	none := error(nil)
	if t == nil {
		none = &exec.NoTrialError{Last: last}
	}
	if r.format != asText {
		return errors.Join(r.writeDocument(cmd.OutOrStdout(), confirmJSON{Trial: trialOf(t), Last: outcomeOf(last)}), none)
	}
	if t == nil {
		return none // it says it all
	}
	var out page
	switch {
	case t.Left > 0 && t.Watched:
		out.linef("%s left of %s to confirm the install of %s; then the former state is put back", seconds(t.Left), t.Within, t.Began.Format(time.RFC3339))
	case t.Watched:
		out.linef("the time to confirm the install of %s is over: the former state is being put back", t.Began.Format(time.RFC3339))
	default:
		out.linef("%s left of %s to confirm the install of %s, but nobody watches any more: the next install behind that puts the former state back first", seconds(max(t.Left, 0)), t.Within, t.Began.Format(time.RFC3339))
	}
	if t.By != "" {
		out.linef("  by %s", t.By)
	}
	if last != nil && last.ID == t.ID && last.Err != "" {
		out.linef("  %s", last)
	}
	out.linef("  to keep it: %s", cmd.CommandPath())
	return write(cmd.OutOrStdout(), out.Bytes())
}

// seconds rounds up: what has a moment left is not over.
func seconds(d time.Duration) string { return (d + time.Second - 1).Truncate(time.Second).String() }

// confirmJSON is what confirm --output json prints.
type confirmJSON struct {
	Confirmed bool         `json:"confirmed"`
	Trial     *trialJSON   `json:"trial,omitempty"` // that waits, or waited
	Last      *outcomeJSON `json:"last,omitempty"`  // how the one before it ended
}

// trialJSON is an install that waits for its confirmation.
type trialJSON struct {
	ID          string `json:"id"`
	Within      string `json:"within"`
	LeftSeconds int64  `json:"leftSeconds"` // rounded up; 0 when it is over
	Began       string `json:"began"`
	By          string `json:"by,omitempty"`
	Watched     bool   `json:"watched"`
	PID         int    `json:"pid,omitempty"`
}

type outcomeJSON struct {
	ID        string   `json:"id"`
	At        string   `json:"at"`
	Confirmed bool     `json:"confirmed"`
	PutBack   bool     `json:"putBack"`
	Steps     []string `json:"steps,omitempty"`
	Error     string   `json:"error,omitempty"`
}

func trialOf(t *exec.Trial) *trialJSON {
	if t == nil {
		return nil
	}
	left := int64((max(t.Left, 0) + time.Second - 1) / time.Second)
	return &trialJSON{t.ID, t.Within.String(), left, t.Began.Format(time.RFC3339), t.By, t.Watched, t.PID}
}

func outcomeOf(o *exec.TrialOutcome) *outcomeJSON {
	if o == nil {
		return nil
	}
	return &outcomeJSON{o.ID, o.At.Format(time.RFC3339), o.Confirmed, o.PutBack, o.Steps, o.Err}
}

// trial reads the flag that makes an install one on trial; 0 is none.
func (p *parser) trial() time.Duration {
	const name = "confirm-within"
	if !p.given(name) {
		return 0
	}
	s := p.text(name)
	d, err := time.ParseDuration(s)
	if err != nil || d < exec.MinTrial || d > exec.MaxTrial {
		p.refuse(name, s, fmt.Sprintf("a duration from %s to %s with its unit, such as 60s or 5m", exec.MinTrial, exec.MaxTrial))
		return 0
	}
	return d
}

// trialNotes is what a dry run says of trials.
func (r request) trialNotes(cmd *cobra.Command, runner Runner) (notes []string, err error) {
	t, _, err := runner.Trial(cmd.Context())
	switch {
	case err != nil && !unseen(err):
		return nil, err
	case err == nil && t != nil:
		notes = append(notes, "this install would be refused: "+(&exec.PendingError{Trial: *t}).Error())
	}
	if r.within > 0 {
		notes = append(notes, fmt.Sprintf("the former state would be put back unless this is confirmed within %s, by %s", r.within, watchKind()))
	}
	return notes, nil
}

// trial says that the install is not final yet, and what to do.
func (p *page) trial(t *exec.Trial, path string) {
	if t == nil {
		return
	}
	p.linef("Not final yet: unless it is confirmed within %s, the former state is put back", t.Within)
	p.linef("  by %s\n  to keep it: %s confirm\n", t.By, path)
}

// watchName is the command that the process runs which puts the former state back.
const watchName = "put-back-unless-confirmed"

// watchCommand is for that process alone.
func watchCommand(o Options) *cobra.Command {
	cmd := innerCommand(watchName, "Wait for a confirmation, and put the former state back without",
		"This is what install --confirm-within starts.", func(cmd *cobra.Command, args []string) error { return watch(cmd, args, o) })
	addFlags(cmd, []flagGroup{{"This run", []flag{
		{"trial", "", "`number` of the install that waits"},
		{"ready-fd", "0", "`file` descriptor to say on that the watch is there; 0 says it to systemd"},
	}}})
	return cmd
}

// innerCommand is a command that another program runs, and nobody types.
func innerCommand(use, short, long string, run func(*cobra.Command, []string) error) *cobra.Command {
	return &cobra.Command{
		Use:          use,
		Short:        short,
		Long:         long + " It is of no use to anybody else.",
		Hidden:       true,
		Args:         cobra.ArbitraryArgs,
		SilenceUsage: true,
		// What a foreign root does before its commands is not for us: nobody is there
		// to whom it could fail, and it may take a home, or a network.
		PersistentPreRunE:  func(*cobra.Command, []string) error { return nil },
		PersistentPostRunE: func(*cobra.Command, []string) error { return nil },
		RunE:               run,
	}
}

func watch(cmd *cobra.Command, args []string, o Options) error {
	p := newParser(cmd, args)
	fd := p.number("ready-fd", 1<<16, "a number of a file descriptor")
	if err := p.err(); err != nil {
		return err
	}
	ready := notifySystemd
	if fd > 0 {
		pipe := os.NewFile(uintptr(fd), "ready")
		defer pipe.Close() // without a word: then there is no watch
		ready = func() error {
			_, err := pipe.WriteString(readyWord)
			return errors.Join(err, pipe.Close())
		}
	}
	// The terminal may go. Whoever ends this process, as a system does that shuts down,
	// has the former state at once: a trial that nobody watches is none.
	signal.Ignore(syscall.SIGHUP)
	ctx, stop := signal.NotifyContext(context.WithoutCancel(cmd.Context()), os.Interrupt, syscall.SIGTERM)
	defer stop()
	outcome, err := o.installer(logger(cmd, false), cmd.Parent()).WatchTrial(ctx, p.text("trial"), ready)
	switch {
	case err != nil:
		return err
	case outcome == nil:
		cmd.PrintErrln("confirmed, or uninstalled: nothing to put back")
	default:
		cmd.PrintErrf("%s\n  %s\n", outcome, strings.Join(outcome.Steps, "\n  "))
	}
	return nil
}

// watchArgs are the arguments by which this program runs the watch: the commands that
// lead to the leaf that runs, below whatever root it is mounted.
func watchArgs(leaf *cobra.Command, t exec.Trial, readyFD int) []string {
	return append(leafPath(leaf), watchName, "--trial="+t.ID, fmt.Sprintf("--ready-fd=%d", readyFD))
}

// leafPath are the commands that lead to a leaf, below whatever root it is mounted.
func leafPath(leaf *cobra.Command) (path []string) {
	for c := leaf; c.HasParent(); c = c.Parent() {
		path = append([]string{c.Name()}, path...)
	}
	return path
}
