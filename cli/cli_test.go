package cli_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/kumahq/kuma-tproxy/cli"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// TestMain lets the scripts run the test binary as programs: kumactl, on this
// machine, fakectl, on one that the script's environment makes up, and configof,
// which copies the section config of a document.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"kumactl": func() { os.Exit(cli.ExitCode(cli.Root(cli.Options{Version: "v0-test"}).Execute())) },
		"fakectl": func() { os.Exit(cli.ExitCode(cli.Root(cli.Options{Runner: newFake}).Execute())) },
		"configof": func() {
			if err := configOf(os.Args[1], os.Args[2]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		},
	})
}

func configOf(from, to string) error {
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	var doc struct {
		Config yaml.Node `yaml:"config"`
	}
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return err
	}
	if text, err = yaml.Marshal(&doc.Config); err != nil {
		return err
	}
	return os.WriteFile(to, text, 0o600)
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "script"),
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("UPDATE") != "",
		Setup:               func(e *testscript.Env) error { e.Setenv("NL", "\n"); return nil },
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"code": exitCode, "scripts": scripts},
	})
}

// exitCode is the script command "code N prog args...": the program exits with N.
func exitCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N prog args...")
	}
	want := args[0]
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	if err != nil {
		got = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if got != want {
		ts.Fatalf("exit code %s, want %s", got, want)
	}
}

// scripts is the script command "scripts": it cuts the last standard output into
// the files head, IPv4 and IPv6, as an operator's awk would.
func scripts(ts *testscript.TestScript, neg bool, args []string) {
	parts := map[string]string{"head": "", "IPv4": "", "IPv6": ""}
	name := "head"
	for line := range strings.Lines(ts.ReadFile("stdout")) {
		if strings.HasPrefix(line, "###") {
			name = strings.Trim(line, "# \n")
			continue
		}
		parts[name] += line
	}
	for name, text := range parts {
		ts.Check(os.WriteFile(ts.MkAbs(name), []byte(text), 0o600))
	}
}

// fake is a machine made of environment variables: PROBE, APPLY and REMOVE are
// the errors that these calls return, USERS the users, and so on.
type fake struct{ log *slog.Logger }

func newFake(log *slog.Logger) cli.Runner { return fake{log} }

func named(name string) error {
	switch name {
	case "":
		return nil
	case "unsupported":
		return exec.ErrUnsupported
	case "notroot":
		return exec.ErrNotRoot
	case "permission":
		return &fs.PathError{Op: "open", Path: "/proc/1", Err: fs.ErrPermission}
	case "locked":
		return fmt.Errorf("%w: process 77 (iptables) holds /run/xtables.lock", exec.ErrLocked)
	case "module":
		return &exec.ApplyError{Step: "IPv6 rules by ip6tables-nft-restore", Family: rules.IPv6, Line: 3, Rule: "-A OUTPUT -j X",
			Undone: []string{"the former IPv4 rules by iptables-nft-restore"}, Err: exec.ErrNoModule}
	}
	return errors.New(name)
}

func (f fake) Probe(_ context.Context, n tproxy.Needs) (tproxy.Host, error) {
	f.log.Debug("probe", "needs", fmt.Sprintf("%+v", n))
	if err := named(os.Getenv("PROBE")); err != nil {
		return tproxy.Host{}, err
	}
	h := tproxy.Host{IPv6Off: os.Getenv("IPV6OFF"), Pod: os.Getenv("POD"), PassthroughAddress: os.Getenv("ADDRESS") != ""}
	for name := range strings.FieldsSeq(os.Getenv("USERS")) {
		h.Users = append(h.Users, tproxy.User{Name: name, UID: tproxy.DefaultProxyUID})
	}
	for a := range strings.FieldsSeq(os.Getenv("NAMESERVERS")) {
		h.Nameservers = append(h.Nameservers, netip.MustParseAddr(a))
	}
	if n.Nameserver != nil {
		h.Nameserver.Refused = os.Getenv("MANAGED")
		f.log.Debug("nameserver", "shared", n.Nameserver.Shared)
	}
	if why := os.Getenv("UNKNOWN"); why != "" {
		there := tproxy.Programs{Save: "/usr/sbin/x-save", Restore: "/usr/sbin/x-restore"}
		h.Variants = []tproxy.Variant{{Backend: tproxy.IPTablesNFT, IPv4: there, IPv6: there, Unknown: why}}
	}
	switch why := os.Getenv("PERSISTENCE"); why {
	case "":
	case "systemd":
		h.Persistence = tproxy.Persistence{Observed: true, NoFirewalld: "firewalld is not installed"}
	case "firewalld":
		h.Persistence = tproxy.Persistence{Observed: true, Firewalld: true}
	default:
		h.Persistence = tproxy.Persistence{Observed: true, NoSystemd: why, Elsewhere: why}
	}
	if os.Getenv("SHELL_PORT") != "" {
		h.RemoteShells = []tproxy.RemoteShell{{Port: 2222, Why: "sshd, process 4711, listens on it"}}
	}
	return h, nil
}

func (f fake) BringBack(context.Context) (*exec.Report, error) {
	if err := named(os.Getenv("BRING_BACK")); err != nil {
		return nil, err
	}
	return &exec.Report{Steps: strings.FieldsFunc(os.Getenv("BROUGHT"), func(r rune) bool { return r == ',' })}, nil
}

func (f fake) BringBackNames(context.Context) (*exec.Report, error) {
	return &exec.Report{Steps: []string{"names in .mesh to 10.0.0.9"}}, named(os.Getenv("BRING_BACK"))
}

func (f fake) Apply(_ context.Context, p *tproxy.Plan) (*exec.Report, error) {
	f.log.Debug("apply", "wait", p.Config.Wait, "interval", p.Config.WaitInterval)
	if t, _ := f.trial(); t != nil {
		return nil, &exec.PendingError{Trial: *t}
	}
	if err := named(os.Getenv("APPLY")); err != nil {
		return nil, err
	}
	r := &exec.Report{Changed: os.Getenv("SAME") == "", Backend: p.Backend, Why: p.BackendWhy}
	for _, family := range p.Families {
		fr := exec.FamilyReport{Family: family, Backend: p.Backend}
		if r.Changed {
			fr.Changes = rules.Compare(family, rules.Set{}, p.Rules)
			r.Steps = append(r.Steps, tproxy.ReplaceRules{Family: family, Backend: p.Backend}.String())
		}
		r.Families = append(r.Families, fr)
	}
	r.Notes = []string{"nothing listens on port 15006 yet"}
	var err error
	r.Before, err = f.Installed(context.Background())
	return r, err
}

// What waits, or how the last one ended, is in the variable TRIAL.
func (f fake) trial() (*exec.Trial, *exec.TrialOutcome) {
	t := &exec.Trial{ID: "1a2b3c4d", Within: time.Minute, Left: 41500 * time.Millisecond, Began: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), By: "process 7", Watched: true, PID: 7}
	last := &exec.TrialOutcome{ID: "0", At: t.Began}
	switch os.Getenv("TRIAL") {
	case "":
		return nil, nil
	case "unwatched":
		t.Watched, t.PID = false, 0
	case "over":
		t.Left = -time.Second
	case "confirmed":
		last.Confirmed = true
		return nil, last
	case "put back":
		last.PutBack, last.Steps = true, []string{"IPv4 rules"}
		return nil, last
	}
	return t, nil
}

func (f fake) Try(ctx context.Context, p *tproxy.Plan, o exec.TrialOptions) (*exec.Report, error) {
	f.log.Debug("try", "within", o.Within)
	r, err := f.Apply(ctx, p)
	if err == nil && r.Changed {
		r.Trial = &exec.Trial{ID: "1a2b3c4d", Within: o.Within, Left: o.Within, By: "process 7", Watched: true}
	}
	return r, err
}

func (f fake) Confirm(_ context.Context, o exec.ConfirmOptions) (exec.Trial, error) {
	f.log.Debug("confirm", "wait", o.Wait)
	t, last := f.trial()
	if t == nil {
		return exec.Trial{}, &exec.NoTrialError{Last: last}
	}
	return *t, nil
}

func (f fake) Trial(context.Context) (*exec.Trial, *exec.TrialOutcome, error) {
	if err := named(os.Getenv("LOOK")); err != nil {
		return nil, nil, err
	}
	t, last := f.trial()
	return t, last, nil
}

func (f fake) WatchTrial(context.Context, string, func() error) (*exec.TrialOutcome, error) {
	return nil, errors.New("not on a fake machine")
}

func (f fake) Remove(_ context.Context, o exec.RemoveOptions) (*exec.Report, error) {
	f.log.Debug("remove", "options", fmt.Sprintf("%+v", o))
	if err := named(os.Getenv("REMOVE")); err != nil {
		return nil, err
	}
	if os.Getenv("SAME") != "" {
		return &exec.Report{}, nil
	}
	plan, err := tproxy.Build(tproxy.Config{}, tproxy.Host{})
	if err != nil {
		return nil, err
	}
	r := &exec.Report{Changed: !o.DryRun, Cut: 3, Steps: []string{"no IPv4 rules of ours in iptables-nft", "ip address del ::6/128 dev lo"}}
	r.Families = []exec.FamilyReport{{
		Family: rules.IPv4, Backend: tproxy.IPTablesNFT,
		Changes: rules.Compare(rules.IPv4, plan.Rules, rules.Set{}),
		Script:  rules.Transition(rules.IPv4, plan.Rules, rules.Set{}),
	}}
	return r, nil
}

// Watch sees two states, and is interrupted then.
func (f fake) Watch(ctx context.Context, _ exec.WatchOptions, each func(*exec.Status) error) error {
	s, err := f.Status(ctx)
	if err == nil {
		err = each(s)
	}
	if err == nil {
		err = each(&exec.Status{State: exec.StateInstalled})
	}
	return err
}

// Preflight finds what the variables FOUND and SILENT say.
func (f fake) Preflight(ctx context.Context, p *tproxy.Plan) (*exec.Preflight, error) {
	if err := named(os.Getenv("PREFLIGHT")); err != nil {
		return nil, err
	}
	if os.Getenv("FOUND") == "" {
		return nil, exec.ErrUnsupported
	}
	status, err := f.Status(ctx)
	if err != nil {
		return nil, err
	}
	silent, _ := f.Silent(ctx, p)
	return &exec.Preflight{
		Status: status, Silent: silent,
		Hindered: []tproxy.Drift{{Kind: tproxy.DriftShadowed, Family: rules.IPv4, Table: rules.NAT, Chain: "OUTPUT", Index: 1, Is: "-p tcp -m tcp --dport 443 -j ACCEPT", Why: "a packet"}},
		Captured: []exec.Connection{{Local: netip.MustParseAddrPort("10.0.0.2:40000"), Remote: netip.MustParseAddrPort("10.0.0.9:6514"), PID: 71, Program: "rsyslogd"}},
		Ways:     []tproxy.RemoteShell{{Port: 22, Why: "sshd, process 4711, listens on it"}},
	}, nil
}

func (fake) Silent(context.Context, *tproxy.Plan) ([]string, error) {
	if s := os.Getenv("SILENT"); s != "" {
		return []string{s}, nil
	}
	return nil, nil
}

// Status is what the variable STATUS says: a state, or nothing of an install.
func (f fake) Status(ctx context.Context) (*exec.Status, error) {
	if err := named(os.Getenv("STATUS_ERROR")); err != nil {
		return nil, err
	}
	i, err := f.Installed(ctx)
	if err != nil {
		return nil, err
	}
	s := &exec.Status{State: exec.State(cmp.Or(os.Getenv("STATUS"), "absent"))}
	if i != nil {
		s.Backend, s.Families, s.Version, s.Config = i.Backend, i.Families, i.Record.Version, &i.Config
		s.Counters = []exec.Counter{
			{Family: rules.IPv4, Table: rules.NAT, Chain: "PREROUTING", Index: 1, Why: "a jump", Packets: 9, Bytes: 540},
			{Family: rules.IPv4, Table: rules.NAT, Chain: "KUMA_MESH_INBOUND", Index: 2, Verdict: "in", Why: "inbound goes to the proxy's port 15006", Packets: 7, Bytes: 420},
			{Family: rules.IPv4, Table: rules.NAT, Chain: "KUMA_MESH_INBOUND", Index: 1, Verdict: "excluded", Why: "SSH is protected", Packets: 2, Bytes: 120},
		}
	}
	if os.Getenv("PERSISTENCE") != "" && i != nil {
		s.Persist, s.PersistWhy = tproxy.PersistSystemd, "systemd is process 1"
	}
	switch s.State {
	case exec.StateDrifted:
		s.Drift = []tproxy.Drift{
			{Kind: tproxy.DriftMissing, Family: rules.IPv4, Table: rules.NAT, Chain: "KUMA_MESH_INBOUND", Index: 1, Was: "-p tcp -m tcp --dport 22 -j RETURN", Why: "SSH is protected"},
			{Kind: tproxy.DriftAddress, Family: rules.IPv6, Was: "::6/128 on lo", Why: "the proxy hands inbound connections on from there"},
		}
	case exec.StateUnknown:
		s.Reasons = []string{"not permitted"}
	}
	return s, nil
}

// Installed is what the variable INSTALLED says: kuma, broken, or a configuration.
func (f fake) Installed(context.Context) (*exec.Installation, error) {
	f.log.Debug("installed")
	if err := named(os.Getenv("FORMER")); err != nil {
		return nil, err
	}
	i := &exec.Installation{Backend: tproxy.IPTablesLegacy, Families: []rules.Family{rules.IPv4}}
	switch what := os.Getenv("INSTALLED"); what {
	case "":
		return nil, nil
	case "kuma":
		i.Kuma, i.Unknown = true, tproxy.ErrNoRecord
	case "broken":
		i.Unknown = &tproxy.RecordError{What: "is cut off"}
	default:
		var c tproxy.Config
		if err := json.Unmarshal([]byte(what), &c); err != nil {
			return nil, err
		}
		plan, err := tproxy.Build(c, tproxy.Host{})
		if err != nil {
			return nil, err
		}
		i.Config, i.Record.Version = plan.Config, "v0.8"
	}
	return i, nil
}

// Live is the rules of an install, and those of the file LIVE4.
func (f fake) Live(_ context.Context, to ...netip.Addr) (exec.Live, error) {
	if err := named(os.Getenv("LIVE")); err != nil {
		return exec.Live{}, err
	}
	l := exec.Live{Local: []netip.Prefix{netip.MustParsePrefix("10.0.0.7/24"), netip.MustParsePrefix("fd00::7/64")}, Routes: map[netip.Addr]exec.Route{}}
	for i, file := range strings.Fields(os.Getenv("LIVE4")) {
		text, err := os.ReadFile(file)
		if err != nil {
			return l, err
		}
		set, err := rules.ParseSave(rules.IPv4, text)
		if err != nil {
			return l, err
		}
		l.Rules = append(l.Rules, exec.LiveRules{Family: rules.IPv4, Backend: tproxy.IPTablesNFT + tproxy.Backend(i), Set: set})
	}
	for name := range strings.SplitSeq(os.Getenv("HIDDEN"), ",") {
		if name != "" {
			l.Hidden = append(l.Hidden, exec.Hidden{What: name, Hooks: []rules.Hook{rules.Prerouting}})
		}
	}
	for _, a := range to {
		l.Routes[a] = exec.Route{Interface: "eth0", Source: netip.MustParseAddr("10.0.0.7")}
	}
	return l, nil
}

// foreign is a program that is not ours, with kumactl's persistent flags, and
// our commands in it.
func foreign(o cli.Options) (root *cobra.Command, out *bytes.Buffer) {
	root = &cobra.Command{Use: "meshctl"}
	root.PersistentFlags().String("config-file", "", "path to the configuration file")
	root.PersistentFlags().Duration("api-timeout", 0, "the timeout for api calls")
	root.PersistentFlags().String("log-level", "off", "log level")
	root.PersistentFlags().Bool("no-config", false, "if set no config file will be created")
	install := &cobra.Command{Use: "install"}
	install.AddCommand(cli.InstallTransparentProxy(o))
	uninstall := &cobra.Command{Use: "uninstall"}
	uninstall.AddCommand(cli.UninstallTransparentProxy(o))
	inspect := &cobra.Command{Use: "inspect"}
	inspect.AddCommand(cli.InspectTransparentProxy(o))
	explain := &cobra.Command{Use: "explain"}
	explain.AddCommand(cli.ExplainTransparentProxy(o))
	root.AddCommand(install, uninstall, inspect, explain)
	out = new(bytes.Buffer)
	root.SetOut(out)
	root.SetErr(out)
	return root, out
}

// recorder is a Runner on which everything works, that keeps the plan.
type recorder struct {
	plan   *tproxy.Plan
	remove *exec.RemoveOptions
	ctx    context.Context
}

func (r *recorder) BringBack(context.Context) (*exec.Report, error) {
	return nil, errors.ErrUnsupported
}
func (r *recorder) BringBackNames(context.Context) (*exec.Report, error) {
	return nil, errors.ErrUnsupported
}

func (r *recorder) Preflight(context.Context, *tproxy.Plan) (*exec.Preflight, error) {
	return nil, exec.ErrUnsupported
}

func (r *recorder) Silent(context.Context, *tproxy.Plan) ([]string, error) { return nil, nil }

func (r *recorder) Watch(context.Context, exec.WatchOptions, func(*exec.Status) error) error {
	return nil
}

func (r *recorder) Status(context.Context) (*exec.Status, error) { return &exec.Status{}, nil }

func (r *recorder) Probe(context.Context, tproxy.Needs) (tproxy.Host, error) {
	return tproxy.Host{}, nil
}

func (r *recorder) Apply(ctx context.Context, p *tproxy.Plan) (*exec.Report, error) {
	r.plan, r.ctx = p, ctx
	return &exec.Report{Changed: true, Backend: p.Backend}, nil
}

func (r *recorder) Try(ctx context.Context, p *tproxy.Plan, _ exec.TrialOptions) (*exec.Report, error) {
	return r.Apply(ctx, p)
}

func (r *recorder) Confirm(context.Context, exec.ConfirmOptions) (exec.Trial, error) {
	return exec.Trial{}, nil
}

func (r *recorder) Trial(context.Context) (*exec.Trial, *exec.TrialOutcome, error) {
	return nil, nil, nil
}

func (r *recorder) WatchTrial(context.Context, string, func() error) (*exec.TrialOutcome, error) {
	return nil, nil
}

func (r *recorder) Remove(ctx context.Context, o exec.RemoveOptions) (*exec.Report, error) {
	r.remove, r.ctx = &o, ctx
	return &exec.Report{Changed: true}, nil
}

func (r *recorder) Installed(context.Context) (*exec.Installation, error) { return nil, nil }

func (r *recorder) Live(context.Context, ...netip.Addr) (exec.Live, error) {
	return exec.Live{}, nil
}

func (r *recorder) options() cli.Options {
	return cli.Options{Runner: func(*slog.Logger) cli.Runner { return r }}
}

func TestForeignRootMounts(t *testing.T) {
	type key struct{}
	ctx := context.WithValue(t.Context(), key{}, "of the foreign root")
	for _, verb := range []string{"install", "uninstall"} {
		rec := new(recorder)
		root, out := foreign(rec.options())
		root.SetArgs([]string{"--log-level", "info", "--no-config", verb, "transparent-proxy", "--wait", "7", "--config-file", "x"})
		if err := root.ExecuteContext(ctx); err != nil {
			t.Fatalf("%s: %v", verb, err)
		}
		last := map[string]string{
			"install":   "transparent proxy setup completed successfully\n",
			"uninstall": "transparent proxy cleanup completed successfully\n",
		}[verb]
		if !strings.HasSuffix(out.String(), "\n"+last) && out.String() != last {
			t.Errorf("%s: the last line is not %q in\n%s", verb, last, out)
		}
		if rec.ctx == nil || rec.ctx.Value(key{}) == nil {
			t.Errorf("%s: the Runner did not get the command's context", verb)
		}
	}
}

func TestHelpHidesForeignFlags(t *testing.T) {
	for _, args := range [][]string{
		{"install", "transparent-proxy", "--help"},
		{"uninstall", "transparent-proxy", "-h"},
		{"help", "install", "transparent-proxy"},
		{"explain", "transparent-proxy", "--help"},
	} {
		root, out := foreign(cli.Options{})
		root.SetArgs(args)
		if err := root.Execute(); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"config-file", "api-timeout", "log-level", "no-config", "Global Flags"} {
			if strings.Contains(out.String(), name) {
				t.Errorf("%v: the help shows %s", args, name)
			}
		}
		if want := "meshctl " + strings.TrimPrefix(strings.Join(args[:2], " "), "help "); !strings.Contains(out.String(), want) {
			t.Errorf("%v: the help does not show how it is mounted, %q:\n%s", args, want, out)
		}
	}
}

func TestErrorsArePrintedOnceUnderAForeignRoot(t *testing.T) {
	root, out := foreign(new(recorder).options())
	root.SetArgs([]string{"install", "transparent-proxy", "--exclude-inbound-ports", "0"})
	err := root.Execute()
	if cli.ExitCode(err) != 2 {
		t.Errorf("exit code %d for %v", cli.ExitCode(err), err)
	}
	if n := strings.Count(out.String(), "--exclude-inbound-ports"); n != 1 {
		t.Errorf("the fault is printed %d times:\n%s", n, out)
	}
}

// Each call makes a command of its own: no run leaves a flag behind.
func TestCommandsHoldNoState(t *testing.T) {
	for _, args := range [][]string{{"--exclude-inbound-ports", "80"}, nil} {
		rec := new(recorder)
		cmd := cli.InstallTransparentProxy(rec.options())
		cmd.SetOut(new(bytes.Buffer))
		cmd.SetArgs(args)
		if args == nil {
			cmd.SetArgs([]string{})
		}
		if err := cmd.Execute(); err != nil {
			t.Fatal(err)
		}
		if got := !rec.plan.Config.Inbound.ExcludePorts.IsEmpty(); got != (args != nil) {
			t.Errorf("%v: ports excluded: %v", args, rec.plan.Config.Inbound.ExcludePorts)
		}
	}
}

func TestExitCode(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), 1},
		{&tproxy.RefusedError{}, 1},
		{exec.ErrNotRoot, 1},
		{context.Canceled, 1},
		{&cli.UnknownError{}, 1},
		{&tproxy.ConfigError{}, 2},
		{fmt.Errorf("wrapped: %w", &tproxy.ConfigError{}), 2},
	} {
		if got := cli.ExitCode(c.err); got != c.want {
			t.Errorf("ExitCode(%v) = %d, want %d", c.err, got, c.want)
		}
	}
}

// failing is an output that is gone.
type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

// Failure means a host that is as before, so output that is lost after the
// change is a warning; of a dry run the output is all there is.
func TestLostOutput(t *testing.T) {
	for _, args := range [][]string{{}, {"--dry-run"}, {"--output", "json"}} {
		for _, leaf := range []*cobra.Command{cli.InstallTransparentProxy(new(recorder).options()), cli.UninstallTransparentProxy(new(recorder).options())} {
			var warning bytes.Buffer
			leaf.SetOut(failing{})
			leaf.SetErr(&warning)
			leaf.SetArgs(args)
			err := leaf.Execute()
			if slices.Contains(args, "--dry-run") {
				if err == nil || !strings.Contains(err.Error(), "broken pipe") {
					t.Errorf("%v: error %v", args, err)
				}
			} else if err != nil || !strings.Contains(warning.String(), "broken pipe") {
				t.Errorf("%s %v: error %v, warning %q", leaf.Short, args, err, warning.String())
			}
		}
	}
}
