package cli_test

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/cli"
)

// A program mounts the commands under its own install and uninstall, whatever
// flags its root has, and exits with the code that an error stands for.
func Example() {
	root := &cobra.Command{Use: "meshctl"}
	root.PersistentFlags().String("config-file", "", "path to the configuration file")
	install := &cobra.Command{Use: "install"}
	uninstall := &cobra.Command{Use: "uninstall"}
	root.AddCommand(install, uninstall)

	var opts cli.Options // this machine
	install.AddCommand(cli.InstallTransparentProxy(opts))
	uninstall.AddCommand(cli.UninstallTransparentProxy(opts))

	root.SetErr(os.Stdout)
	root.SetArgs([]string{"install", "transparent-proxy", "--redirect-inbound-port", "0", "--exclude-inbound-ips", "10.0.0.1/8"})
	err := root.Execute()
	fmt.Println("exit code", cli.ExitCode(err))
	// Output:
	// Error: 2 faults:
	//   --redirect-inbound-port: "0": accepted is a port from 1 to 65535
	//   --exclude-inbound-ips: "10.0.0.1/8" has host bits set: write 10.0.0.0/8 for the network or 10.0.0.1 for the one address
	// exit code 2
}
