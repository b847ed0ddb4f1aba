package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

const installLong = `Redirect this host's TCP connections, and DNS if asked, to the Kuma data plane
proxy: iptables rules for IPv4 and IPv6, all of them or none.

  1. Create the user that runs the proxy: useradd -u 5678 -U kuma-dp
  2. Run this as root. The connections of that user are not redirected.
  3. Give the Dataplane resource the transparentProxying section printed at the end.
  4. Run kuma-dp as that user.

SSH: port 22 is not redirected unless --capture-ssh is given. Install refuses, and
changes nothing, when another port by which this host is operated would be
redirected; --exclude-inbound-ports leaves it alone. In a pod nothing is excluded
unasked.

Each setting is a flag, else a variable KUMA_TRANSPARENT_PROXY_*, else a key of a
file of --config, the last file first, else its default. Files and variables are
those of Kuma; flags of its earlier versions say what to use instead. In a pod, between
flags and variables stand the pod's annotations, of the file of --pod-annotations, and
below all files the settings of its control plane, KUMA_RUNTIME_KUBERNETES_*.

Installing the same again changes nothing; another configuration replaces the rules
in one step, whichever version installed them, Kuma's own too, and what differs is
printed. --reuse-config begins with what is installed, so that an upgrade keeps each
exclusion. The uninstall command of the same name puts the host back as it was.

--persist says what brings the install back after a restart of this host or of its
firewall: a unit of systemd, for rules in iptables firewalld where it runs, or nothing,
which is said.

--confirm-within 60s puts the former state back by itself, unless the command confirm
below this one is given in that time: even if you have cut yourself off, this session
is gone, or this process was killed.`

const installExample = `  kumactl install transparent-proxy --kuma-dp-user kuma-dp
  kumactl install transparent-proxy --exclude-inbound-ports 2222,9100 --redirect-dns
  kumactl install transparent-proxy --reuse-config --redirect-dns
  kumactl install transparent-proxy --confirm-within 60s
  kumactl install transparent-proxy confirm
  kumactl install transparent-proxy --config base.yaml,custom.yaml --dry-run`

// InstallTransparentProxy returns the command transparent-proxy that redirects a
// host's connections to the proxy, for mounting under an install command.
func InstallTransparentProxy(o Options) *cobra.Command {
	cmd := &cobra.Command{
		Use:          "transparent-proxy",
		Short:        "Redirect this host's connections to the Kuma data plane proxy",
		Long:         installLong,
		Example:      installExample,
		Args:         cobra.ArbitraryArgs, // faults of the command line like others
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return install(cmd, args, o)
		},
	}
	addFlags(cmd, installFlags())
	addHidden(cmd, hiddenFlags())
	cmd.AddCommand(confirmCommand(o), watchCommand(o), comeBackCommand(o))
	return cmd
}

func install(cmd *cobra.Command, args []string, o Options) error {
	p := newParser(cmd, args)
	r, err := p.request(cmd, o)
	if err != nil {
		return err
	}
	log := logger(cmd, r.Verbose)
	runner := o.installer(log, cmd)
	if err := p.err(); err != nil {
		p.unknownUser(cmd.Context(), runner, r.config)
		return p.err()
	}
	p.logSources(log, r.config)
	if !r.modifyIPTables {
		return r.nothing(cmd)
	}
	host, err := r.probe(cmd, runner)
	if err != nil {
		return explain(cmd, err)
	}
	plan, err := tproxy.Build(r.config, host)
	if err != nil {
		if p.configError(err) {
			return p.err()
		}
		return err
	}
	if r.DryRun {
		before, err := standing(cmd.Context(), runner)
		if err != nil {
			return explain(cmd, err)
		}
		notes, err := r.trialNotes(cmd, runner)
		if err != nil {
			return explain(cmd, err)
		}
		plan.Notes = append(plan.Notes, notes...)
		found, err := runner.Preflight(cmd.Context(), plan)
		if err != nil && !unseen(err) {
			return explain(cmd, err)
		}
		if err := r.printPlan(cmd.OutOrStdout(), plan, before, found); err != nil {
			return err
		}
		if found != nil {
			return r.proxyListens(found.Silent)
		}
		return nil
	}
	if r.requireProxy {
		silent, err := runner.Silent(cmd.Context(), plan)
		if err == nil {
			err = r.proxyListens(silent)
		}
		if err != nil {
			return explain(cmd, err)
		}
	}
	report, err := r.apply(cmd, runner, log, plan)
	if err != nil {
		return explain(cmd, err)
	}
	unsaid(cmd, r.printInstalled(cmd.OutOrStdout(), plan, report))
	return nil
}

// proxyListens is the refusal of --require-proxy.
func (r request) proxyListens(silent []string) error {
	if !r.requireProxy || len(silent) == 0 {
		return nil
	}
	return fmt.Errorf("--require-proxy: nothing was changed\n  %s\n  start the proxy first, or leave out --require-proxy", strings.Join(silent, "\n  "))
}

// apply carries the plan out, for good or on trial.
func (r request) apply(cmd *cobra.Command, runner Runner, log *slog.Logger, plan *tproxy.Plan) (*exec.Report, error) {
	if r.within == 0 {
		return runner.Apply(cmd.Context(), plan)
	}
	report, err := runner.Try(cmd.Context(), plan, exec.TrialOptions{Within: r.within, Watch: watcher(cmd, log)})
	if err == nil && report.Trial == nil {
		report.Notes = append(report.Notes, "nothing to confirm: everything was in place already")
	}
	return report, err
}

// unknownUser adds to the faults of a command line that the proxy's user does
// not exist, where that can be seen.
func (p *parser) unknownUser(ctx context.Context, runner Runner, c tproxy.Config) {
	host, err := runner.Probe(ctx, justUser(c))
	if err != nil {
		return
	}
	_, err = tproxy.Build(tproxy.Config{ProxyUser: c.ProxyUser}, tproxy.Host{Users: host.Users})
	p.configError(err)
}

// justUser is the need to know the proxy's user and nothing else.
func justUser(c tproxy.Config) tproxy.Needs {
	n := c.Needs()
	return tproxy.Needs{User: n.User, DefaultUser: n.DefaultUser}
}

// probe observes the host. A dry run makes do with less where nothing, or not
// all, can be seen.
func (r request) probe(cmd *cobra.Command, runner Runner) (tproxy.Host, error) {
	host, err := runner.Probe(cmd.Context(), r.config.Needs())
	if err == nil && r.DryRun {
		host.Notes = slices.Concat(host.Notes, blindSpots(host))
	}
	if err == nil || !r.DryRun || !unseen(err) {
		return host, err
	}
	note := fmt.Sprintf("this machine could not be observed (%v): what follows is for a plain Linux with both families", err)
	host, err = runner.Probe(cmd.Context(), justUser(r.config))
	if err != nil {
		host = tproxy.Host{}
		if name := r.config.Needs().User; !isNumber(name) {
			host.Users = []tproxy.User{{Name: name, UID: tproxy.DefaultProxyUID}}
			note += fmt.Sprintf("; the user %s is shown as UID %d", name, tproxy.DefaultProxyUID)
		}
	}
	return tproxy.Host{Users: host.Users, Notes: []string{note}}, nil
}

// blindSpots says what a dry run could not see and an install would have to.
func blindSpots(h tproxy.Host) (notes []string) {
	if len(h.Variants) == 0 {
		notes = append(notes, "no iptables was found here: an install would need it")
	}
	for _, v := range h.Variants {
		if v.Unknown != "" {
			notes = append(notes, fmt.Sprintf("what %s holds could not be seen (%s): an install may choose the backend otherwise", v.Backend, v.Unknown))
		}
	}
	return notes
}

// unseen reports whether the error says that somebody else, or another machine,
// would see what could not be seen.
func unseen(err error) bool {
	return errors.Is(err, exec.ErrUnsupported) || errors.Is(err, exec.ErrNotRoot) || errors.Is(err, fs.ErrPermission)
}

// isNumber reports whether s is empty or digits alone, and so no name.
func isNumber(s string) bool {
	for _, c := range s {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}
