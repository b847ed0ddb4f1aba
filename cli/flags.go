package cli

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// flag is one flag of a command.
type flag struct {
	name     string
	standard string // what it is when not given
	usage    string // one line; a `word` in it names the value
}

// flagGroup is the flags that stand together in the help.
type flagGroup struct {
	title string
	flags []flag
}

// text keeps what was given for a flag as it was given: what is wrong with it is
// said together with all else that is wrong, where cobra would stop at the
// first.
type text struct {
	standard string
	given    []string
	kind     string
}

// String returns the last value.
func (t *text) String() string {
	if len(t.given) == 0 {
		return t.standard
	}
	return t.given[len(t.given)-1]
}

// Set adds a value; none is refused here.
func (t *text) Set(s string) error {
	t.given = append(t.given, s)
	return nil
}

// Type is "bool" for a flag that needs no value.
func (t *text) Type() string { return t.kind }

// isSwitch reports whether the flag is true or false, and needs no value to be
// true.
func (f flag) isSwitch() bool { return f.standard == "true" || f.standard == "false" }

func (f flag) add(to *pflag.FlagSet) *pflag.Flag {
	v := &text{standard: f.standard, kind: "text"}
	pf := to.VarPF(v, f.name, "", f.usage)
	if f.isSwitch() {
		v.kind, pf.NoOptDefVal = "bool", "true"
	}
	return pf
}

// addFlags gives cmd the flags, and a help that shows them in their groups and
// no flag of a command above it: a foreign root's flags are not ours to explain.
func addFlags(cmd *cobra.Command, groups []flagGroup) {
	sets := make([]*pflag.FlagSet, len(groups))
	for i, g := range groups {
		sets[i] = pflag.NewFlagSet(g.title, pflag.ContinueOnError)
		sets[i].SortFlags = false
		for _, f := range g.flags {
			f.add(sets[i])
		}
		cmd.Flags().AddFlagSet(sets[i])
	}
	cmd.InitDefaultHelpFlag()
	sets[len(sets)-1].AddFlag(cmd.Flags().Lookup("help"))
	usage := func(cmd *cobra.Command) string {
		var b strings.Builder
		fmt.Fprintf(&b, "Usage:\n  %s [flags]\n", cmd.CommandPath())
		if cmd.Example != "" {
			fmt.Fprintf(&b, "\nExamples:\n%s\n", cmd.Example)
		}
		for i, c := range cmd.Commands() {
			if i == 0 {
				b.WriteString("\nCommands:\n")
			}
			if c.IsAvailableCommand() {
				fmt.Fprintf(&b, "  %-12s %s\n", c.Name(), c.Short)
			}
		}
		for i, g := range groups {
			fmt.Fprintf(&b, "\n%s:\n%s", g.title, sets[i].FlagUsages())
		}
		return b.String()
	}
	cmd.SetUsageFunc(func(cmd *cobra.Command) error {
		return write(cmd.OutOrStderr(), []byte(usage(cmd)))
	})
	cmd.SetHelpFunc(func(cmd *cobra.Command, _ []string) {
		fmt.Fprintf(cmd.OutOrStdout(), "%s\n\n%s", cmd.Long, usage(cmd))
	})
	usageErrors(cmd)
}

// usageErrors makes an unknown flag, or one without its value, a fault of the
// command line.
func usageErrors(cmd *cobra.Command) {
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if errors.Is(err, pflag.ErrHelp) {
			return err
		}
		line := fmt.Sprintf("%v: see %s --help", err, cmd.CommandPath())
		if e, ok := errors.AsType[*pflag.NotExistError](err); ok && e.GetSpecifiedName() == "config-file" {
			line += "; a file of the transparent proxy's configuration is named with --config"
		}
		return &usageError{[]string{line}}
	})
}

// addHidden gives cmd flags that its help does not show.
func addHidden(cmd *cobra.Command, flags []flag) {
	hidden := pflag.NewFlagSet("", pflag.ContinueOnError)
	for _, f := range flags {
		f.add(hidden).Hidden = true
	}
	cmd.Flags().AddFlagSet(hidden)
}

// parser reads the flags of a command and gathers what is wrong with them.
type parser struct {
	flags     *pflag.FlagSet
	faults    []string
	refused   map[string]bool   // the flags whose values are not accepted
	notes     []string          // what the user should know
	from      map[string]string // where the values of keys come from, but for flags
	notLoaded bool              // whether files or the environment have faults
}

// newParser begins with the arguments that are no flags: there must be none.
func newParser(cmd *cobra.Command, args []string) *parser {
	p := &parser{flags: cmd.Flags(), refused: map[string]bool{}}
	for _, a := range args {
		line := fmt.Sprintf("argument %q: accepted are flags only", a)
		if a == "true" || a == "false" {
			line += fmt.Sprintf("; a switch takes its value behind =, as in --dry-run=%s", a)
		}
		p.fault(line)
	}
	return p
}

func (p *parser) err() error {
	if p.faults == nil {
		return nil
	}
	return &usageError{p.faults}
}

// fault notes a line once.
func (p *parser) fault(line string) {
	if !slices.Contains(p.faults, line) {
		p.faults = append(p.faults, line)
	}
}

// note notes a line for the user once.
func (p *parser) note(line string) {
	if !slices.Contains(p.notes, line) {
		p.notes = append(p.notes, line)
	}
}

// say writes the notes to the command's standard error.
func (p *parser) say(cmd *cobra.Command) {
	for _, n := range p.notes {
		cmd.PrintErrf("Note: %s\n", n)
	}
}

// refuse notes that a flag's value is not accepted.
func (p *parser) refuse(name, value, accepted string) {
	p.refused[name] = true
	p.fault(fmt.Sprintf("--%s: %q: accepted is %s", name, value, accepted))
}

// refuseAll notes an error that has a line for each bad part of a flag's value.
func (p *parser) refuseAll(name string, err error) {
	p.refused[name] = true
	for line := range strings.SplitSeq(err.Error(), "\n") {
		p.fault(fmt.Sprintf("--%s: %s", name, line))
	}
}

func (p *parser) given(name string) bool { return p.flags.Changed(name) }

func (p *parser) text(name string) string { return p.flags.Lookup(name).Value.String() }

// each returns every value that was given for a flag, in order.
func (p *parser) each(name string) []string {
	if t, ok := p.flags.Lookup(name).Value.(*text); ok {
		return t.given
	}
	return nil
}

func (p *parser) bool(name string) bool {
	s := p.text(name)
	b, err := strconv.ParseBool(s)
	if err != nil {
		p.refuse(name, s, "true or false")
	}
	return b
}

func (p *parser) not(name string) bool { return !p.bool(name) }

// oneOf returns the place of the flag's value among the accepted ones.
func (p *parser) oneOf(name string, accepted ...string) int {
	s := p.text(name)
	i := slices.Index(accepted, s)
	if i < 0 {
		last := len(accepted) - 1
		p.refuse(name, s, strings.TrimPrefix(strings.Join(accepted[:last], ", ")+" or ", " or ")+accepted[last])
	}
	return max(i, 0)
}

// number returns a number from 0 to highest.
func (p *parser) number(name string, highest uint64, accepted string) uint64 {
	s := p.text(name)
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > highest {
		p.refuse(name, s, accepted)
		return 0
	}
	return n
}

// port returns the one port that a flag names; 0 when it is not accepted.
func (p *parser) port(name string) uint16 {
	s := p.text(name)
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		p.refuse(name, s, "a port from 1 to 65535")
		return 0
	}
	return uint16(n)
}
