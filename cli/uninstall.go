package cli

import (
	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

const uninstallLong = `Take out whatever install put on this host, and leave all else as it is. What is
there is found without flags: whatever user, comments or variant of iptables it
was installed with.`

const uninstallExample = `  kumactl uninstall transparent-proxy
  kumactl uninstall transparent-proxy --dry-run`

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
	addFlags(cmd, []flagGroup{{"The host", lockFlags()}, {"This run", runFlags()}})
	return cmd
}

func uninstall(cmd *cobra.Command, args []string, o Options) error {
	p := newParser(cmd, args)
	r := p.run()
	if err := p.err(); err != nil {
		return err
	}
	remove := exec.RemoveOptions{DryRun: r.dryRun, Wait: r.wait, WaitInterval: r.waitInterval}
	report, err := o.runner(cmd, r.verbose).Remove(cmd.Context(), remove)
	if err != nil && r.dryRun && unseen(err) {
		report, err = &exec.Report{Notes: []string{"this machine could not be observed (" + err.Error() + "): what uninstall would do is not known"}}, nil
		return r.printRemoval(cmd.OutOrStdout(), report, false)
	}
	if err != nil {
		return explain(cmd, err)
	}
	if r.dryRun {
		return r.printRemoval(cmd.OutOrStdout(), report, true)
	}
	unsaid(cmd, r.printUninstalled(cmd.OutOrStdout(), report))
	return nil
}
