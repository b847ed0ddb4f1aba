package cli

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

// comeBackName is the command that a unit of systemd runs at boot.
const comeBackName = "come-back"

// comeBackCommand is for that unit alone.
func comeBackCommand(o Options) *cobra.Command {
	cmd := innerCommand(comeBackName, "Install again what was saved, at boot", "This is what the units run that install --persist makes.",
		func(cmd *cobra.Command, args []string) error { return comeBack(cmd, args, o) })
	addFlags(cmd, []flagGroup{{"This run", []flag{{"verbose", "false", "log every step to standard error"}}}})
	return cmd
}

func comeBack(cmd *cobra.Command, args []string, o Options) error {
	p := newParser(cmd, nil)
	verbose := p.bool("verbose")
	if len(args) != 1 || args[0] != "rules" && args[0] != "names" {
		p.fault(fmt.Sprintf("%s: %q: accepted is rules or names", comeBackName, args))
	}
	if err := p.err(); err != nil {
		return err
	}
	runner := o.runner(logger(cmd, verbose))
	do := runner.BringBack
	if args[0] == "names" {
		do = runner.BringBackNames
	}
	report, err := do(cmd.Context())
	if err != nil {
		return explain(cmd, err)
	}
	var out page
	for _, s := range report.Steps {
		out.linef("%s", s)
	}
	if len(report.Steps) == 0 {
		out.linef("nothing to do: everything is in place")
	}
	out.notes(report.Notes)
	unsaid(cmd, write(cmd.OutOrStdout(), out.Bytes()))
	return nil
}

// comeBackCommandLine is how a unit runs that command; nil where this program cannot be
// named.
func comeBackCommandLine(leaf *cobra.Command) []string {
	program, err := os.Executable()
	if err != nil {
		return nil
	}
	if program, err = filepath.EvalSymlinks(program); err != nil {
		return nil // deleted, or replaced
	}
	return append(append([]string{program}, leafPath(leaf)...), comeBackName)
}
