package dns

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

var cp, cp6 = netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("fd00::53")

// lines is what is added for an address.
func lines(a netip.Addr) string { return mark(a) + "\nnameserver " + a.String() + "\n" }

func mustAdd(t interface {
	Helper()
	Fatal(...any)
}, text []byte, a netip.Addr) Edit {
	t.Helper()
	e, err := AddNameserver(text, a)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestAddNameserver(t *testing.T) {
	own := lines(cp)
	for _, test := range []struct {
		name, text, want string
		outOfReach       string
	}{
		{"empty", "", own, "127.0.0.1"},
		{"no nameserver", "search lan\n", own + "search lan\n", "127.0.0.1"},
		{"one", "nameserver 10.0.0.1\n", own + "nameserver 10.0.0.1\n", ""},
		{"a header stays the header", "# Generated\nsearch lan\nnameserver 10.0.0.1\n", "# Generated\nsearch lan\n" + own + "nameserver 10.0.0.1\n", ""},
		{"no final line feed", "nameserver 10.0.0.1", own + "nameserver 10.0.0.1", ""},
		{"carriage returns stay theirs", "# x\r\nnameserver 10.0.0.1\r\n", "# x\r\n" + own + "nameserver 10.0.0.1\r\n", ""},
		{"in front of what Go's resolver reads", "#\n nameserver 10.0.0.1\nnameserver 10.0.0.2\n", "#\n" + own + " nameserver 10.0.0.1\nnameserver 10.0.0.2\n", ""},
		{"two", "nameserver ::1\nnameserver ::2\n", own + "nameserver ::1\nnameserver ::2\n", ""},
		{"three", "nameserver ::1\nnameserver ::2\nnameserver ::3\n", own + "nameserver ::1\nnameserver ::2\nnameserver ::3\n", "::3"},
		{"four", "nameserver ::1\nnameserver ::2\nnameserver ::3\nnameserver ::4\n", own + "nameserver ::1\nnameserver ::2\nnameserver ::3\nnameserver ::4\n", "::3"},
		{"another of ours", lines(cp6) + "nameserver ::1\n", own + "nameserver ::1\n", ""},
		{"ours is not first any more", "nameserver ::1\n" + own + "search lan\n", own + "nameserver ::1\nsearch lan\n", ""},
		{"twice", own + own + "nameserver ::1\n", own + "nameserver ::1\n", ""},
	} {
		e, err := AddNameserver([]byte(test.text), cp)
		if err != nil || string(e.Text) != test.want || e.Listed != 0 {
			t.Errorf("%s: %v, line %d\n%s", test.name, err, e.Listed, e.Text)
		}
		if got := strings.Trim(fmt.Sprint(e.OutOfReach), "[]"); got != test.outOfReach {
			t.Errorf("%s: out of reach are %s", test.name, got)
		}
	}
}

func TestAddNameserverAlreadyListed(t *testing.T) {
	for _, text := range []string{
		"nameserver 10.9.9.9\n", "# x\nnameserver 10.9.9.9 # by hand\nnameserver ::1\n", "nameserver ::ffff:10.9.9.9\n",
		"nameserver 10.9.9.9\nnameserver 10.9.9.9\n", "nameserver 012.9.2313\n",
	} {
		e := mustAdd(t, []byte(text), cp)
		if string(e.Text) != text || e.Listed == 0 {
			t.Errorf("%q: line %d, %q", text, e.Listed, e.Text)
		}
	}
	_, err := AddNameserver([]byte("# x\nnameserver ::1\nnameserver 10.9.9.9 # cp\n"), cp)
	listed, ok := errors.AsType[*AlreadyListedError](err)
	if !ok || listed.Line.Number != 3 || listed.Address != cp {
		t.Fatalf("%v", err)
	}
	const want = `line 3 lists the nameserver 10.9.9.9 behind others: "nameserver 10.9.9.9 # cp"; take that line out, or make it the first nameserver, and install again`
	if err.Error() != want {
		t.Error(err)
	}
	// The address that ours had is free again when ours goes to another.
	e := mustAdd(t, []byte("nameserver fd00::53\n"+lines(cp)), cp6)
	if string(e.Text) != "nameserver fd00::53\n" {
		t.Errorf("%q", e.Text)
	}
	if _, err := AddNameserver([]byte("nameserver ::1\x00"), cp); err == nil {
		t.Error("binary")
	}
	if _, err := AddNameserver([]byte(strings.Repeat("#\n", MaxSize/2)), cp); err == nil {
		t.Error("longer than the limit afterwards")
	}
}

// People edit the file, around our lines and in them.
func TestRemoveNameserverAfterEdits(t *testing.T) {
	m, ns := mark(cp)+"\n", "nameserver 10.9.9.9\n"
	for _, test := range []struct{ name, text, want string }{
		{"untouched", "# x\n" + m + ns + "nameserver ::1\n", "# x\nnameserver ::1\n"},
		{"nothing of ours", "nameserver 10.9.9.9\n", "nameserver 10.9.9.9\n"},
		{"a line in between", m + "nameserver ::1\n" + ns, "nameserver ::1\n"},
		{"sorted", m + "nameserver ::1\n" + ns + "options x\n", "nameserver ::1\noptions x\n"},
		{"the mark moved down", ns + "search lan\n" + m, "search lan\n"},
		{"our line is gone", m + "nameserver ::1\n", "nameserver ::1\n"},
		{"our line has another address", m + "nameserver 10.9.9.8\n", "nameserver 10.9.9.8\n"},
		{"our line is a comment", m + "#nameserver 10.9.9.9\n", "#nameserver 10.9.9.9\n"},
		{"our line has a comment", m + "nameserver 10.9.9.9 # why?\n", ""},
		{"the mark is gone", ns + "nameserver ::1\n", ns + "nameserver ::1\n"},
		{"the mark says less", "#\n" + m[:len(markHead)+8] + "\n" + ns, "#\n"},
		{"the mark is indented", "\t" + m + ns, ""},
		{"a second line of theirs", m + ns + ns, ns},
		{"theirs in front", ns + m + ns, ns},
		{"carriage returns", strings.ReplaceAll(m+ns+"search a\n", "\n", "\r\n"), "search a\r\n"},
		{"no final line feed", "search a\n" + m + strings.TrimSuffix(ns, "\n"), "search a\n"},
		{"the mark alone", m, ""},
		{"a mark that is none", markHead + "what?\n" + ns, markHead + "what?\n" + ns},
	} {
		if got := RemoveNameserver([]byte(test.text)); string(got) != test.want {
			t.Errorf("%s: %q", test.name, got)
		}
	}
}

func TestEditProperties(t *testing.T) {
	addr := rapid.SampledFrom([]netip.Addr{cp, cp6, netip.MustParseAddr("fe80::53%eth0"), netip.MustParseAddr("127.0.0.1")})
	rapid.Check(t, func(t *rapid.T) {
		text := anyFile().Draw(t, "file")
		a, b := addr.Draw(t, "address"), addr.Draw(t, "another")
		if !bytes.Equal(RemoveNameserver(text), text) {
			t.Fatalf("took something out of a file without a mark: %q", text)
		}
		e, err := AddNameserver(text, a)
		if err != nil {
			if CheckText(text) == nil {
				t.Fatal(err)
			}
			return
		}
		c := Parse(e.Text)
		if c.Nameservers[0] != a {
			t.Fatalf("%s is not first in %q", a, e.Text)
		}
		if n := strings.Count(string(e.Text), a.String()); n != 1 {
			t.Fatalf("%s stands %d times in %q", a, n, e.Text)
		}
		if got := RemoveNameserver(e.Text); !bytes.Equal(got, text) {
			t.Fatalf("add and remove made %q of %q", got, text)
		}
		if again := mustAdd(t, e.Text, a); !bytes.Equal(again.Text, e.Text) {
			t.Fatalf("adding twice: %q, %q", again.Text, e.Text)
		}
		other := mustAdd(t, e.Text, b)
		if direct := mustAdd(t, text, b); !bytes.Equal(other.Text, direct.Text) || !slices.Equal(other.OutOfReach, direct.OutOfReach) {
			t.Fatalf("%s then %s: %q, and %s alone: %q", a, b, other.Text, b, direct.Text)
		}
		// Somebody puts a line anywhere: it stays, and nothing else does.
		ls := slices.Collect(strings.Lines(string(e.Text)))
		i := rapid.IntRange(0, len(ls)).Draw(t, "place")
		if i == len(ls) && i > 0 && !strings.HasSuffix(ls[i-1], "\n") {
			return
		}
		const theirs = "options theirs\n"
		got := string(RemoveNameserver([]byte(strings.Join(slices.Insert(ls, i, theirs), ""))))
		if !strings.Contains(got, theirs) || strings.Replace(got, theirs, "", 1) != string(text) {
			t.Fatalf("with a line at %d: %q", i, got)
		}
	})
}

func FuzzEdit(f *testing.F) {
	for _, seed := range []string{"", "nameserver 10.0.0.1", "#\r\nnameserver ::1\r\n", lines(cp), lines(cp6) + "nameserver ::1\n", mark(cp), "nameserver 10.9.9.9\n" + mark(cp) + "\n", markHead} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if got := Format(Parse(text)); !bytes.Equal(got, text) {
			t.Fatalf("%q became %q", text, got)
		}
		rest := RemoveNameserver(text)
		if HasOurs(rest) || !bytes.Equal(RemoveNameserver(rest), rest) {
			t.Fatalf("%q has something of ours", rest)
		}
		e, err := AddNameserver(text, cp)
		if err != nil {
			return
		}
		if e.Listed == 0 && !bytes.Equal(RemoveNameserver(e.Text), rest) || Parse(e.Text).Nameservers[0].Unmap() != cp {
			t.Fatalf("%q: %q", text, e.Text)
		}
		if again, err := AddNameserver(e.Text, cp); err != nil || !bytes.Equal(again.Text, e.Text) {
			t.Fatalf("%q, then %q: %v", e.Text, again.Text, err)
		}
		Parse(e.Text).Limits()
	})
}

func TestUnmarked(t *testing.T) {
	got := Unmarked([]byte("nameserver ::1\n"+lines(cp)+"nameserver 10.9.9.9\n"), cp)
	if len(got) != 1 || got[0].Number != 4 {
		t.Errorf("%+v", got)
	}
}

func TestParseAddress(t *testing.T) {
	for s, want := range map[string]string{
		"10.0.0.53": "10.0.0.53", "fd00::53": "fd00::53", "FD00:0::53": "fd00::53", "::ffff:10.0.0.53": "10.0.0.53",
		"127.0.0.1": "127.0.0.1", "::1": "::1", "fe80::1%eth0": "fe80::1%eth0",
	} {
		if a, err := ParseAddress(s); err != nil || a.String() != want {
			t.Errorf("%s: %v, %v", s, a, err)
		}
	}
	for s, want := range map[string]string{
		"": "is no IP address", "kuma-cp": "is no IP address", "kuma-cp.example.com": "is no IP address", "10.1": "is no IP address",
		"010.0.0.53": "is no IP address", "10.0.0.0/8": "is no IP address", "10.0.0.53 ": "is no IP address",
		"10.0.0.53:5653": "has a port", "[fd00::53]:53": "has a port",
		"0.0.0.0": "is unspecified", "::": "is unspecified", "::ffff:0.0.0.0": "is unspecified",
		"224.0.0.251": "is multicast", "ff02::fb": "is multicast", "255.255.255.255": "is the broadcast address",
		"fe80::1": "names no interface", "fd00::1%eth0": "is not link-local",
		"fe80::1%eth0\nnameserver 6.6.6.6": "names no interface that could exist", "fe80::1%a b": "names no interface that could exist",
		"fe80::1%1234567890123456": "names no interface that could exist",
	} {
		_, err := ParseAddress(s)
		if _, ok := errors.AsType[*AddressError](err); !ok || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), fmt.Sprintf("%q", s)) {
			t.Errorf("%q: %v", s, err)
		}
	}
	if _, err := AddNameserver(nil, netip.Addr{}); err == nil {
		t.Error("the zero address was added")
	}
	if _, err := AddNameserver(nil, netip.MustParseAddr("fe80::1").WithZone("a\nb")); err == nil {
		t.Error("a zone began a line")
	}
}
