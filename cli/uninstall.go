package cli

import (
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

const uninstallLong = `Take out whatever install put on this host, and leave all else as it is. What is
there is found without flags: whatever user, comments or variant of iptables it
was installed with, whichever version installed it, and Kuma's own installers too.

Connections that are redirected at that moment are cut, and their number is said;
--drain gives them time, while new ones already go direct.

A nameserver that install put into resolv.conf goes too; the rules say into which file.
So does what would bring the install back after a restart: the unit of systemd, and our
rules in firewalld's direct.xml, of which the rest stays as it is.

Each flag but --drain, --resolv-conf and --output has a variable KUMA_TRANSPARENT_PROXY_*, which it wins over.`

const uninstallExample = `  kumactl uninstall transparent-proxy
  kumactl uninstall transparent-proxy --dry-run
  kumactl uninstall transparent-proxy --drain 30s`

// UninstallTransparentProxy returns the command transparent-proxy that puts a
// host back as it was before InstallTransparentProxy's, for mounting under an
// uninstall command.
func UninstallTransparentProxy(o Options) *cobra.Command {
	cmd := &cobra.Command{
		Use:          "transparent-proxy",
		Short:        "Take this host's transparent proxying out again",
		Long:         uninstallLong,
		Example:      uninstallExample,
		Args:         cobra.ArbitraryArgs, // faults of the command line like others
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return uninstall(cmd, args, o)
		},
	}
	addFlags(cmd, []flagGroup{{"Connections", []flag{
		{"drain", "0s", "`duration` for which redirected connections may go on; 0s cuts them at once"},
	}}, {"The host", append([]flag{
		{"resolv-conf", "/etc/resolv.conf", "`file` to look for a nameserver of ours in, beside that of the install"},
	}, lockFlags()...)}, {"This run", runFlags()}})
	return cmd
}

func uninstall(cmd *cobra.Command, args []string, o Options) error {
	p := newParser(cmd, args)
	loaded := p.load(Loader{Environ: uninstallEnviron()}, nil)
	r, c := p.run(loaded.Settings), loaded.Config
	p.lock(&c)
	drain := p.duration("drain", "30s or 5m")
	if err := p.err(); err != nil {
		return err
	}
	log := logger(cmd, r.Verbose)
	p.logSources(log, c)
	report, err := o.runner(log).Remove(cmd.Context(), exec.RemoveOptions{
		DryRun: r.DryRun,
		Drain:  drain, ResolvConf: p.text("resolv-conf"),
		Wait: c.Wait, WaitInterval: c.WaitInterval,
		MaxRetries: c.MaxRetries, SleepBetweenRetries: c.SleepBetweenRetries,
	})
	if err != nil && r.DryRun && unseen(err) {
		report, err = &exec.Report{Notes: []string{"this machine could not be observed (" + err.Error() + "): what uninstall would do is not known"}}, nil
		return r.printRemoval(cmd.OutOrStdout(), report, false)
	}
	if err != nil {
		return explain(cmd, err)
	}
	if r.DryRun {
		return r.printRemoval(cmd.OutOrStdout(), report, true)
	}
	unsaid(cmd, r.printUninstalled(cmd.OutOrStdout(), report))
	return nil
}

// uninstallEnviron are the variables that say how to uninstall. What the others
// say, an uninstall must not fail of.
func uninstallEnviron() (out []string) {
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		switch strings.TrimPrefix(name, envPrefix) {
		case "WAIT", "WAIT_INTERVAL", "RETRY_MAX_RETRIES", "RETRY_SLEEP_BETWEEN_RETRIES", "DRY_RUN", "VERBOSE":
			out = append(out, e)
		}
	}
	return out
}
