// Kumactl installs and uninstalls transparent proxying for Kuma on a Linux host.
// It is independent work, not the Kuma project's program of that name, which can
// mount the same commands.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/kumahq/kuma-tproxy/cli"
)

func main() { os.Exit(run()) }

func run() int {
	// A hangup too: the terminal may go while the rules are put in place, and a
	// run that is told so stops between two steps and undoes them.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// A second one ends the program where it stands.
	context.AfterFunc(ctx, stop)
	// Who reads what we print may go away (| head): without this, the next line
	// would end the program between two steps (SIGPIPE in os/signal).
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	return cli.ExitCode(cli.Root(cli.Options{Version: version()}).ExecuteContext(ctx))
}

// version is the module's, as the go command recorded it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	return info.Main.Version
}
