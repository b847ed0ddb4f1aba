package dns

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

// anyFile draws files: of lines as people and programs write them, and of bytes
// that nobody writes.
func anyFile() *rapid.Generator[[]byte] {
	line := rapid.OneOf(
		rapid.SampledFrom([]string{
			"", "# by hand", "; by hand", "search a b", "domain lan", "options ndots:5 edns0", "sortlist 130.155.160.0/255.255.240.0",
			"nameserver 10.0.0.1", "nameserver\t10.0.0.2 # lan", "nameserver fe80::1%eth0", "nameserver 010.1", " nameserver 10.0.0.3",
			"Nameserver 10.0.0.4", "nameserver", "nameserver x", "\ufeffnameserver 10.0.0.5", "# kuma", "nameserver 10.0.0.1\x00",
		}),
		rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 20), func(b []byte) string { return string(b) }),
	)
	return rapid.Custom(func(t *rapid.T) []byte {
		var b bytes.Buffer
		for range rapid.IntRange(0, 8).Draw(t, "lines") {
			b.WriteString(line.Draw(t, "line"))
			b.WriteString(rapid.SampledFrom([]string{"\n", "\r\n", "\n\n"}).Draw(t, "end"))
		}
		if rapid.Bool().Draw(t, "unterminated") {
			b.WriteString(line.Draw(t, "last"))
		}
		return b.Bytes()
	})
}

func TestFormatIsWhatWasParsed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := anyFile().Draw(t, "file")
		c := Parse(text)
		if got := Format(c); !bytes.Equal(got, text) {
			t.Fatalf("%q became %q", text, got)
		}
		for i, l := range c.Lines {
			if l.Number != i+1 {
				t.Fatalf("line %d has number %d", i+1, l.Number)
			}
		}
	})
	long := bytes.Repeat([]byte("nameserver 10.0.0.1\r\n"), MaxSize/21)
	if got := Format(Parse(long)); !bytes.Equal(got, long) {
		t.Error("a long file changed")
	}
}

func TestParseSearchAndOptions(t *testing.T) {
	for _, test := range []struct {
		text            string
		search, options []string
	}{
		{"", nil, nil},
		{"search a b\tc\n", []string{"a", "b", "c"}, nil},
		{"domain lan\n", []string{"lan"}, nil},
		{"domain lan wan\n", []string{"lan"}, nil},
		// The last one counts, whichever it is (resolv.conf(5)).
		{"domain lan\nsearch a b\n", []string{"a", "b"}, nil},
		{"search a b\ndomain lan\n", []string{"lan"}, nil},
		// One without a name is passed over (res_vinit_1).
		{"search a\nsearch\nsearch \ndomain \t\n", []string{"a"}, nil},
		{"search .\n", []string{"."}, nil},
		{"#search a\n search b\nsearches c\n", nil, nil},
		{"search a\x00 b\n", []string{"a"}, nil},
		{"search a\r\n", []string{"a"}, nil},
		{"options ndots:5 edns0\noptions\ttrust-ad\n", nil, []string{"ndots:5", "edns0", "trust-ad"}},
	} {
		c := Parse([]byte(test.text))
		if !slices.Equal(c.Search, test.search) || !slices.Equal(c.Options, test.options) {
			t.Errorf("%q: search %q, options %q", test.text, c.Search, c.Options)
		}
	}
}

func TestLimits(t *testing.T) {
	names := func(n int, name string) string { return "search" + strings.Repeat(" "+name, n) }
	for _, test := range []struct {
		name, text string
		want       []Limit
	}{
		{"none", "nameserver ::1\nnameserver ::2\nnameserver ::3\n" + names(6, "a") + "\n", nil},
		{"four nameservers", "# x\nnameserver ::1\nnameserver ::2\nnameserver ::3\nnameserver ::4\nnameserver ::5\n",
			[]Limit{{5, "nameservers", 5, 3, "the C library"}}},
		{"seven names", names(7, "a") + "\n", []Limit{{1, "names in the search list", 7, 6, "glibc before 2.26"}}},
		{"long names", "\n" + names(5, strings.Repeat("a", 51)) + "\n", []Limit{
			{2, "bytes in a line", 266, 254, "musl, which passes over the whole line,"},
			{2, "bytes in the search list", 259, 255, "glibc before 2.26"},
		}},
		{"a list that another replaces", names(7, "a") + "\ndomain lan\n", nil},
		{"a long comment", "#" + strings.Repeat("x", 300) + "\n", nil},
		{"musl's longest line", "search " + strings.Repeat("a", 254-7) + "\n", nil},
	} {
		if d := cmp.Diff(test.want, Parse([]byte(test.text)).Limits(), cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s: %s", test.name, d)
		}
	}
	if got, want := (Limit{5, "nameservers", 4, 3, "the C library"}).String(), "line 5: 4 nameservers, and the C library reads 3"; got != want {
		t.Error(got)
	}
}

func TestCheckText(t *testing.T) {
	for text, want := range map[string]string{
		"":                                    "",
		"search caf\xe9\tx\v\f\r\n\u00e9":     "",
		strings.Repeat("x", MaxSize):          "",
		strings.Repeat("x", MaxSize+1):        "longer than 65536 bytes",
		"nameserver 10.0.0.1\x00":             "byte 19 is 0x00",
		"\x7fELF\x02\x01":                     "byte 0 is 0x7f",
		"\x1f\x8b\x08":                        "byte 0 is 0x1f",
		"nameserver 10.0.0.1\n\x1b[1mx\x1b[m": "byte 20 is 0x1b",
	} {
		err := CheckText([]byte(text))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%.30q: %v", text, err)
		}
		if _, ok := errors.AsType[*TextError](err); err != nil && !ok {
			t.Errorf("%T", err)
		}
	}
}
