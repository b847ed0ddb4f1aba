package cni

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/kube"
)

// Runner observes and changes the network namespace that the calling thread is in;
// *exec.Runner is one.
type Runner interface {
	// Probe observes what n asks for and writes nothing.
	Probe(ctx context.Context, n tproxy.Needs) (tproxy.Host, error)
	// Apply carries out a plan, whole or not at all.
	Apply(ctx context.Context, p *tproxy.Plan) (*exec.Report, error)
	// Remove takes out whatever an install left.
	Remove(ctx context.Context, o exec.RemoveOptions) (*exec.Report, error)
	// Status compares what is installed with what was, and writes nothing.
	Status(ctx context.Context) (*exec.Status, error)
}

// Plugin answers the commands of the CNI specification. The zero Plugin is kuma-cni.
type Plugin struct {
	// Source says what a pod is where the runtime does not; nil is nobody.
	Source Source
	// Runner makes the Runner of one command, which logs to log; lockFile is the lock
	// of iptables-legacy, the file of the pod's namespace. Nil means an *exec.Runner.
	Runner func(log *slog.Logger, lockFile string) Runner
	// Version is what the record of an install says of its maker. Empty means the
	// version of this library in the program, where it was built from a version.
	Version string
	// Stdout gets the results, Stderr the log where it has no file; nil means those
	// of the process.
	Stdout, Stderr io.Writer

	// enter is inNamespace, but for tests.
	enter func(path string, f func() error) (own bool, err error)
}

// Main is the body of the program: it answers the command in the environment (CNI_COMMAND)
// and returns the code to exit with. An interrupt, and a SIGTERM, is looked at between
// two steps: what was done is undone.
func Main(p *Plugin) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A runtime that has gone must not end us between two steps (SIGPIPE in os/signal).
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	// Package skel looks at CNI_NETNS once more when the command has succeeded: it has no
	// pods in the host's network, fails a DEL of one, and waits for ever for who writes to
	// a FIFO. What is at that path, inNamespace has seen, of who is not left alone.
	os.Setenv("CNI_NETNS_OVERRIDE", "1")
	about := "kuma-cni " + cmp.Or(p.Version, buildVersion()) + ": a chained CNI plugin for transparent proxying"
	err := skel.PluginMainFuncsWithError(p.Funcs(ctx), version.PluginSupports(Versions()...), about)
	if err == nil {
		return 0
	}
	text, _ := json.MarshalIndent(err, "", "    ") // two texts and a number
	fmt.Fprintf(p.stdout(), "%s\n", text)
	return 1
}

// Funcs are the commands, for a main of one's own.
func (p *Plugin) Funcs(ctx context.Context) skel.CNIFuncs {
	with := func(f func(context.Context, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
		return func(a *skel.CmdArgs) error { return f(ctx, a) }
	}
	return skel.CNIFuncs{Add: with(p.add), Check: with(p.check), Del: with(p.del), GC: with(p.gc), Status: with(p.status)}
}

func (p *Plugin) stdout() io.Writer { return or[io.Writer](p.Stdout, os.Stdout) }
func (p *Plugin) stderr() io.Writer { return or[io.Writer](p.Stderr, os.Stderr) }

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

func (p *Plugin) runner(log *slog.Logger, lockFile string) Runner {
	if p.Runner != nil {
		return p.Runner(log, lockFile)
	}
	r := &exec.Runner{Log: log, Version: p.Version, FilesElsewhere: true, LockFile: lockFile}
	if lockFile != "" { // it is used in a pod's namespace
		r.BeforeProgram = sync.OnceFunc(func() { hideNames(log) })
	}
	return r
}

// in runs f on a thread in the pod's namespace.
func (c *call) in(f func() error) (own bool, err error) {
	if c.enter != nil {
		return c.enter(c.pod.NetNS, f)
	}
	if c.Runner == nil {
		return inNamespace(c.pod.NetNS, f)
	}
	return inNamespace(c.pod.NetNS, func() error { hideNames(c.log); return f() }) // what an embedder's starts is not known
}

func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return ""
}

// call is a command about a pod.
type call struct {
	*Plugin
	*conf
	pod  Pod
	args map[string]string
	log  *slog.Logger
	// settled is the reason for which the pod is left alone; empty means that it is
	// not.
	settled string
	from    string // who has described it; empty where nobody has
	result  kube.Result
}

// begin reads what the runtime says. The call is returned with an error too.
func (p *Plugin) begin(verb string, a *skel.CmdArgs) (*call, error) {
	c, err := parse(a.StdinData)
	args := arguments(a.Args)
	pod := Pod{Namespace: args["K8S_POD_NAMESPACE"], Name: args["K8S_POD_NAME"], UID: args["K8S_POD_UID"],
		ContainerID: a.ContainerID, NetNS: a.Netns, IfName: a.IfName}
	return &call{Plugin: p, conf: c, pod: pod, args: args, log: p.logger(c, verb, pod)}, err
}

// decide finds out whether the pod is left alone.
func (c *call) decide(ctx context.Context) error {
	if slices.Contains(c.ExcludeNamespaces, c.pod.Namespace) && c.pod.Namespace != "" {
		c.settled = "its namespace is in excludeNamespaces"
		return nil
	}
	d, err := c.describe(ctx, c.conf, c.pod, c.args)
	switch {
	case err != nil:
		return err
	case d == nil:
		return nil
	}
	c.from = d.by
	switch injected, why := kube.Injected(d.Annotations); {
	case !injected:
		c.settled = why
	case d.HostNetwork:
		c.settled = "it is in the host's network"
	case slices.Contains(d.InitContainers, InitContainer):
		c.settled = "its init container " + InitContainer + " installs the rules"
	default:
		return c.configure(d.Annotations)
	}
	return nil
}

// configure reads the annotations.
func (c *call) configure(annotations map[string]string) error {
	settings, err := c.settings()
	if err != nil {
		return err
	}
	if c.result, err = kube.Configure(annotations, settings); err == nil && !c.result.ByInit {
		err = redirectable(c.result.Config)
	}
	if err != nil {
		return failed(ErrAnnotations, "the pod's annotations are not accepted", err)
	}
	if c.result.ByInit {
		c.settled = kube.KeyConfig + " says that an init container installs the rules"
	}
	for _, conflict := range c.result.Conflicts {
		c.log.Warn("not the pod's to say", "conflict", conflict.String())
	}
	for _, w := range c.result.Warnings {
		c.log.Warn("without effect", "key", w.String())
	}
	return nil
}

var errNoAnnotations = errors.New("the runtime hands none, which takes containerd 1.5 or CRI-O 1.29 and \"capabilities\": {\"" + AnnotationsCapability +
	"\": true} in the plugin's entry of the network configuration; nor are there " + AnnotationsArg + " in CNI_ARGS or annotations in that entry")

// add installs the rules, and hands on the result of the plugin before.
func (p *Plugin) add(ctx context.Context, a *skel.CmdArgs) error {
	start := time.Now()
	c, err := p.begin("ADD", a)
	if err != nil {
		return c.pod.of(err)
	}
	previous, err := c.previous()
	if err != nil {
		return c.pod.of(err)
	}
	if err = c.decide(ctx); err == nil && c.settled == "" {
		if c.from == "" {
			err = failed(ErrNoAnnotations, "nobody says what the pod's annotations are", errNoAnnotations)
		} else {
			err = c.install(ctx, start)
		}
	}
	if err != nil {
		if err = c.excuse(c.pod.of(err)); err != nil {
			return err
		}
	} else if c.settled != "" {
		c.log.Debug("left alone", "why", c.settled)
	}
	_, err = p.stdout().Write(append(slices.Clip(previous), '\n'))
	return err
}

// excuse is the error, or nil where the pod is to start all the same. With half of the
// rules left it is not: that is no network at all.
func (c *call) excuse(err error) error {
	e, _ := errors.AsType[*types.Error](err)
	if c.OnFailure == Pass && e != nil && e.Code != ErrLeft {
		c.log.Error("the pod starts without its rules, as onFailure says", "error", err.Error(), "code", e.Code)
		return nil
	}
	c.log.Error("refused", "error", err.Error())
	return err
}

// install puts the rules into the pod's namespace.
func (c *call) install(ctx context.Context, start time.Time) error {
	var report *exec.Report
	own, err := c.in(func() (err error) {
		r := c.runner(c.log, c.pod.NetNS)
		plan, err := c.plan(ctx, r)
		if err != nil {
			return err
		}
		report, err = r.Apply(ctx, plan)
		return applied(err)
	})
	switch {
	case own:
		c.settled = "it is in the host's network"
		return nil
	case err != nil:
		return entered(err)
	}
	sources := make([]any, 0, len(c.result.Sources))
	for path, s := range c.result.Sources {
		sources = append(sources, slog.String(path, s.String()))
	}
	c.log.Info("installed", "changed", report.Changed, "backend", report.Backend.String(), "annotations", c.from, slog.Group("sources", sources...),
		"processes", report.Processes, "retries", report.Retries, "took", time.Since(start).String())
	return nil
}

// plan is what the pod is to have, on the thread that is in its namespace.
func (c *call) plan(ctx context.Context, r Runner) (*tproxy.Plan, error) {
	host, err := r.Probe(ctx, c.result.Config.Needs())
	if err != nil {
		return nil, failed(ErrRules, "the network namespace cannot be observed", err)
	}
	plan, err := tproxy.Build(c.result.Config, host)
	if _, bad := errors.AsType[*tproxy.ConfigError](err); bad {
		return nil, failed(ErrAnnotations, "the pod's annotations are not accepted", err)
	}
	if err != nil {
		return nil, failed(ErrRules, "there can be no rules here", err)
	}
	return plan, nil
}

// applied gives an error of Apply its code.
func applied(err error) error {
	if err == nil {
		return nil
	}
	code, msg := ErrRules, "the rules could not be installed, and none are left"
	if errors.Is(err, exec.ErrLocked) {
		code = types.ErrTryAgainLater
	}
	if e, ok := errors.AsType[*exec.ApplyError](err); ok && len(e.Left) > 0 {
		code, msg = ErrLeft, "the rules could not be installed, and some are left"
	}
	return failed(code, msg, err)
}

// entered gives an error of a namespace that cannot be entered its code.
func entered(err error) error {
	if _, ok := errors.AsType[*types.Error](err); ok {
		return err
	}
	return failed(types.ErrInvalidNetNS, "the network namespace CNI_NETNS cannot be entered", err)
}

// delWait is how long DEL waits for the lock: the rules go with the namespace anyway.
const delWait = 2 * time.Second

// del takes the rules out, where the namespace is still there. It never fails: nothing
// of a pod that is left over would justify one that cannot be removed.
func (p *Plugin) del(ctx context.Context, a *skel.CmdArgs) error {
	c, err := p.begin("DEL", a)
	if err != nil {
		c.log.Warn("not read", "error", err.Error())
	}
	if err := c.decide(ctx); err != nil {
		c.log.Debug("not decided", "error", err.Error())
	}
	if c.pod.NetNS == "" || c.settled != "" {
		c.log.Debug("nothing to do", "netns", c.pod.NetNS, "why", c.settled)
		return nil
	}
	var report *exec.Report
	own, err := c.in(func() (err error) {
		report, err = c.runner(c.log, c.pod.NetNS).Remove(ctx, exec.RemoveOptions{Wait: delWait, MaxRetries: -1})
		return err
	})
	switch {
	case own:
		c.log.Debug("nothing to do", "why", "it is in the host's network")
	case gone(err):
		c.log.Debug("the namespace has gone", "error", err.Error())
	case err != nil:
		c.log.Warn("the rules stay, until the namespace goes", "error", err.Error())
	default:
		c.log.Info("removed", "changed", report.Changed, "processes", report.Processes)
	}
	return nil
}

// gc has nothing to collect: no state is kept outside of the namespaces.
func (p *Plugin) gc(_ context.Context, a *skel.CmdArgs) error {
	_, err := p.begin("GC", a)
	return err
}
