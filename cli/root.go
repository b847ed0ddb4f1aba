package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// Root returns kumactl, the program of this module: install, uninstall, inspect
// and explain with the commands of this package under them, and --version. Another program mounts
// the commands and does without.
func Root(o Options) *cobra.Command {
	root := group("kumactl", "Transparent proxying for Kuma on this host")
	if root.Version = o.Version; o.Version == "" {
		root.Version = "unknown"
	}
	root.CompletionOptions.DisableDefaultCmd = true
	ownConfigFile(root)
	install := group("install", "Install on this host")
	install.AddCommand(InstallTransparentProxy(o))
	uninstall := group("uninstall", "Take out what install put on this host")
	uninstall.AddCommand(UninstallTransparentProxy(o))
	explain := group("explain", "Say what becomes of a connection on this host")
	explain.AddCommand(ExplainTransparentProxy(o))
	inspect := group("inspect", "Say how what was installed stands")
	inspect.AddCommand(InspectTransparentProxy(o))
	root.AddCommand(install, uninstall, inspect, explain)
	return root
}

// ownConfigFile is the flag of Kuma's kumactl that says how it reaches a control plane.
// Its injector gives it to containers of a pod, so it is accepted here, and not read.
func ownConfigFile(root *cobra.Command) {
	const name = "config-file"
	root.PersistentFlags().String(name, "", "not read")
	_ = root.PersistentFlags().MarkHidden(name) // it is there
	root.PersistentPreRun = func(cmd *cobra.Command, _ []string) {
		if cmd.Flags().Changed(name) {
			cmd.PrintErrf("Note: --%s is not read: there is no control plane to reach; a file of the transparent proxy's configuration is named with --config\n", name)
		}
	}
}

// group returns a command that does nothing but hold others: alone it prints its
// help, and anything that is none of its commands is a fault.
func group(use, short string) *cobra.Command {
	cmd := &cobra.Command{
		Use:          use,
		Short:        short,
		Args:         cobra.ArbitraryArgs,
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			var line strings.Builder
			fmt.Fprintf(&line, "unknown command %q for %q", args[0], cmd.CommandPath())
			for _, s := range cmd.SuggestionsFor(args[0]) {
				fmt.Fprintf(&line, ": did you mean %s", s)
			}
			return &usageError{[]string{line.String()}}
		},
	}
	usageErrors(cmd)
	return cmd
}
