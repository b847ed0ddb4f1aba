package persist

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// FirewalldLine is the line for iptables-restore that firewalld makes of a rule's text.
func FirewalldLine(t rapid.TB, text string) string {
	t.Helper()
	args, err := splitArgs(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range args {
		// Words of firewalld's templates, and the option by which it finds the table.
		if slices.Contains([]string{"%%REJECT%%", "%%ICMP%%", "%%LOGTYPE%%", "-t", "--table"}, a) {
			t.Fatalf("firewalld replaces %s in %q", a, text)
		}
	}
	return restoreLine(args)
}

// split has what shlex.split of Python 3.11 makes of each text.
var split = []struct {
	text string
	args []string
}{
	{"", nil},
	{" \t\r\n", nil},
	{"-j ACCEPT", []string{"-j", "ACCEPT"}},
	{"a '' \"\" b", []string{"a", "", "", "b"}},
	{`a'b c'd"e f"g`, []string{"ab cde fg"}},
	{`'a\b' "a\b" a\b`, []string{`a\b`, `a\b`, "ab"}},
	{`"\"" "\\" "\'" \" \\ \ a`, []string{`"`, `\`, `\'`, `"`, `\`, " a"}},
	{`'it'"'"'s' it\'s`, []string{"it's", "it's"}},
	{"a#b # c", []string{"a#b", "#", "c"}},
	{"a\vb\u00a0c\u2003d", []string{"a\vb\u00a0c\u2003d"}},
	{"a;b|c&d $(e) `f`", []string{"a;b|c&d", "$(e)", "`f`"}},
}

// unsplit are texts that shlex.split refuses, and with them firewalld the whole file.
var unsplit = []string{"'", `"`, `\`, `"\`, `"\"`, `'\''`, "a 'b\" c"}

func TestSplitArgs(t *testing.T) {
	for _, c := range split {
		if got, err := splitArgs(c.text); err != nil || !slices.Equal(got, c.args) {
			t.Errorf("%q: %q, %v, want %q", c.text, got, err, c.args)
		}
	}
	for _, text := range unsplit {
		if got, err := splitArgs(text); err == nil {
			t.Errorf("%q: %q", text, got)
		}
	}
}

func checkArgs(t *rapid.T) {
	args := rapid.SliceOf(rapid.OneOf(rapid.StringMatching(`[ -~]*`), rapid.String())).Draw(t, "arguments")
	got, err := splitArgs(joinArgs(args))
	if err != nil || !slices.Equal(got, args) {
		t.Fatalf("%q is %q, %v", joinArgs(args), got, err)
	}
}

func TestJoinArgs(t *testing.T) { rapid.Check(t, checkArgs) }

func FuzzArgs(f *testing.F) { f.Fuzz(rapid.MakeFuzz(checkArgs)) }
