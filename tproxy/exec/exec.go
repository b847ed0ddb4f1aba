// Package exec carries out what tproxy plans: it observes the machine
// ([Runner.Probe]), puts a plan's rules in place ([Runner.Apply]), or for a while
// ([Runner.Try]), and takes them out again ([Runner.Remove]). It is the only writer of
// rules.
//
// Everything happens in the network namespace of the calling thread: a caller
// that has locked its goroutine to a thread and entered another namespace there
// (setns(2)) works on that one.
package exec

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// What an error of this package can be, to errors.Is.
var (
	// ErrNotRoot says that the process lacks CAP_NET_ADMIN or CAP_NET_RAW in the
	// user namespace that owns the network namespace.
	ErrNotRoot = errors.New("not permitted: root, or CAP_NET_ADMIN and CAP_NET_RAW, is needed")
	// ErrLocked says that somebody else held the xtables lock, or was installing
	// in the same network namespace, for longer than the Config's Wait.
	ErrLocked = errors.New("locked by another process")
	// ErrNoModule says that the kernel lacks something that a rule needs.
	ErrNoModule = errors.New("the kernel lacks a module")
	// ErrUnsupported says that this is not Linux.
	ErrUnsupported = errors.ErrUnsupported
)

// Runner observes and changes a machine. The zero Runner works and logs
// nothing. A Runner may be used by several goroutines.
type Runner struct {
	// Log gets what is done, at level Debug, and what is odd, at level Warn.
	Log *slog.Logger
	// Version is what the record of an install says of the program that made it.
	// Empty means this module's version in that program, where it has one.
	Version string
	// ComeBack is the command, a program by its absolute path and arguments, that a unit of
	// systemd runs at boot, with one more argument: rules, for which it calls BringBack, or
	// names, for BringBackNames. Without one, or where the program is of somebody whom root
	// must not trust, the unit loads saved scripts by programs of the host instead: sh,
	// iptables-restore or nft, ip and resolvectl.
	ComeBack []string
	// FilesElsewhere says that the files which this process sees are not those of the
	// network namespace's processes, as in a CNI plugin: resolv.conf, nsswitch.conf and
	// systemd-resolved are neither read nor changed, and a Config that needs them
	// changed is refused.
	FilesElsewhere bool
	// LockFile is the lock of iptables-legacy that the processes which are started take
	// (XTABLES_LOCKFILE in iptables(8), since 1.8.6). Empty means that of the environment,
	// or /run/xtables.lock: one for all network namespaces.
	LockFile string
	// BeforeProgram, if not nil, is called before each process that is started, on the
	// thread that starts it. With the rules in nftables none is, as a rule.
	BeforeProgram func()

	machine machine // nil is the one that we run on
}

// Report says what Apply or Remove did.
type Report struct {
	// Changed is whether anything was written.
	Changed bool
	// Backend holds the rules now, for the reason Why. For Remove it is Auto.
	Backend tproxy.Backend
	Why     string
	// Before is what was installed before; nil where nothing was.
	Before *Installation
	// Families says what was done for each family, in order.
	Families []FamilyReport
	// Steps are those that did something, in order, as text.
	Steps []string
	// Cut is how many redirected connections a removal cut, or would cut: with the last
	// rule for it, the kernel lets go of conntrack. It is 0 where rules of others hold
	// it.
	Cut int
	// Retries is how often a step was tried again: others held the xtables lock or
	// changed their rules, or the kernel was busy.
	Retries int
	// Processes is how many processes were started.
	Processes int
	// Trial is what has to be confirmed now, for Try; nil where nothing was changed, and
	// so nothing can be put back.
	Trial *Trial
	// Notes is what the operator should know now: who does not listen yet, what
	// the host's own packet filter does to a redirected connection.
	Notes []string
}

// FamilyReport says what was done to the rules of one family.
type FamilyReport struct {
	Family  rules.Family
	Backend tproxy.Backend
	// Changes is how the live rules departed from the plan's before; for Remove,
	// what was taken out. Empty when there was nothing to do.
	Changes []rules.Change
	// Script is what was given to iptables-restore, or would be (see
	// RemoveOptions.DryRun); nil when there was nothing to do.
	Script []byte
}

// RemoveOptions say how to remove.
type RemoveOptions struct {
	// DryRun only says what would be done: nothing is written.
	DryRun bool
	// Drain is how long connections that are redirected may go on, while new ones
	// already go direct; 0 cuts them at once. With all of them ended, Remove does not
	// wait any longer. Other runs in this network namespace wait meanwhile.
	Drain time.Duration
	// ResolvConf is a file that may hold a nameserver of ours, beside the one that the
	// record of the install names; empty means /etc/resolv.conf.
	ResolvConf string
	// Wait, WaitInterval, MaxRetries and SleepBetweenRetries are those of
	// tproxy.Config.
	Wait, WaitInterval  time.Duration
	MaxRetries          int
	SleepBetweenRetries time.Duration
}

// ApplyError says which step failed and how the host was left. It wraps the
// cause.
type ApplyError struct {
	Step    string       // as text
	Family  rules.Family // 0 where the step has none
	Table   rules.Table  // "" where not known
	Program string       // what reported the failure
	Version string       // of Program, with what it lacks, where known
	// Line is the line of the script, from 1, and Rule its text; 0 and "" where
	// the program did not say.
	Line   int
	Rule   string
	Stderr string // of the program, trimmed
	Remedy string // what to do about it
	// Undone are the steps that were taken back, in order, and Left those for
	// which that failed too, with the reason. With nothing in Left the host is as
	// it was before.
	Undone, Left []string
	Err          error
}

func (e *ApplyError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %v", e.Step, e.Err)
	if e.Stderr != "" {
		fmt.Fprintf(&b, ": %s", e.Stderr)
	}
	if e.Rule != "" {
		fmt.Fprintf(&b, "\n  line %d: %s", e.Line, e.Rule)
	}
	if e.Version != "" {
		fmt.Fprintf(&b, "\n  by %s", e.Version)
	}
	for _, u := range e.Undone {
		fmt.Fprintf(&b, "\n  undone: %s", u)
	}
	for _, l := range e.Left {
		fmt.Fprintf(&b, "\n  could not be undone: %s", l)
	}
	if e.Remedy != "" {
		fmt.Fprintf(&b, "\n  %s", e.Remedy)
	}
	return b.String()
}

func (e *ApplyError) Unwrap() error { return e.Err }
