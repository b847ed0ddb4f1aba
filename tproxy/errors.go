package tproxy

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// ConfigError lists everything that is wrong with a Config.
type ConfigError struct{ Faults []ConfigFault }

// ConfigFault is one thing that is wrong with a Config.
type ConfigFault struct {
	// Source is where the value stands, such as config.yaml:12; empty where
	// nobody said.
	Source   string
	Path     string // as Kuma's configuration spells it, such as redirect.inbound.port
	Value    string
	What     string // what is wrong with the value
	Accepted string // what would do
	// NotYet is whether nothing is wrong with the value but that its feature is
	// not built yet.
	NotYet bool
}

// String says all of it in a line.
func (f ConfigFault) String() string {
	where := printable(f.Path)
	if f.Source != "" {
		where = strings.TrimSuffix(printable(f.Source)+": "+where, ": ")
	}
	return fmt.Sprintf("%s: %q %s: accepted is %s", where, f.Value, f.What, f.Accepted)
}

// printable quotes a name that is none of ours where it would break the line.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) || !utf8.ValidString(s) {
		return strconv.Quote(s)
	}
	return s
}

func (e *ConfigError) Error() string {
	lines := make([]string, len(e.Faults))
	for i, f := range e.Faults {
		lines[i] = f.String()
	}
	return strings.Join(lines, "\n")
}

// RefusedError says why a valid Config must not be installed on this host, and
// what to choose instead. Nothing was changed.
type RefusedError struct{ Reasons []Refusal }

// Refusal is one reason to refuse.
type Refusal struct {
	What   string // what would happen
	Remedy string // what is left to choose
}

func (e *RefusedError) Error() string {
	lines := make([]string, len(e.Reasons))
	for i, r := range e.Reasons {
		lines[i] = r.What + ": " + r.Remedy
	}
	return strings.Join(lines, "\n")
}
