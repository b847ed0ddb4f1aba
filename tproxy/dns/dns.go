// Package dns reads and edits resolv.conf. Parse, Format and the editing of our
// own line are pure: bytes come in and bytes go out. [Owner] says who manages the
// file, from an [Env] that the caller observed. [Manager] installs our nameserver
// and takes it out again, with a backup, over a small [FS]; the package itself
// touches no file.
package dns

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// MaxNameservers is how many nameservers the C library asks: MAXNS in
// <resolv.h>, and the same in musl (src/network/lookup.h).
const MaxNameservers = 3

// MaxSize is how long a resolv.conf may be to be edited, in bytes. The longest
// that is of use to anybody has a few hundred.
const MaxSize = 64 << 10

// Default is the nameserver that the C library asks when resolv.conf is
// missing or names none: the one on this host (resolv.conf(5)). Parse does not
// put it in: whether to count it is the caller's choice.
func Default() netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, 1}) }

// Config is what a resolv.conf says.
type Config struct {
	// Lines are all lines, in the order of the file. [Format] writes them; the
	// other fields are what Parse read in them.
	Lines []Line
	// Unterminated is whether the last line lacks its line feed.
	Unterminated bool

	// Nameservers are all that are listed, in the order of the file, with
	// duplicates. An IPv6 address has the zone that the file gives it.
	//
	// Redirection takes all of them and not only those in Used: c-ares, dnsmasq
	// and miekg/dns read more than three, and a query to a server that is left
	// out would go past the proxy, while a rule for one that nobody asks costs
	// nothing.
	Nameservers []netip.Addr
	// Search is the search list: that of the last "search" or "domain" that
	// names one, for they replace each other (resolv.conf(5)).
	Search []string
	// Options are those of all "options" lines, for they add up.
	Options []string
	// Ignored are the lines that look like a nameserver and are none.
	Ignored []Line
}

// Line is a line of the file.
type Line struct {
	Number int    // from 1
	Text   string // without the line feed; a carriage return is part of it
	// Keyword is what the C library reads the line as: nameserver, domain, search,
	// options or sortlist. It is empty for comments, blank lines, and for what
	// the library passes over.
	Keyword string
	// Address is the nameserver that the line names, if it does.
	Address netip.Addr
	// Why is the reason for which a line that looks like a nameserver is none.
	Why string
}

// Used returns the nameservers that the C library asks: the first three. There
// is none where it falls back to Default.
func (c Config) Used() []netip.Addr {
	n := min(len(c.Nameservers), MaxNameservers)
	return c.Nameservers[:n:n]
}

// Parse reads a resolv.conf; any bytes are one, and Format gives the same bytes
// again. A line names a nameserver when glibc (resolv/res_init.c, res_vinit_1) or
// musl (src/network/resolvconf.c) reads it so: the keyword at the very start of
// the line, white space, an address, and whatever follows behind white space.
// Where they differ, the more lenient one counts, for its queries have to be
// captured too: a carriage return is white space to musl and not to glibc 2.36,
// which then reads none.
//
// A line that starts with '#' or ';' is a comment. Behind an address, these
// signs begin one only after white space.
func Parse(text []byte) Config {
	c := Config{Unterminated: len(text) > 0 && text[len(text)-1] != '\n'}
	for raw := range bytes.Lines(text) {
		l := Line{Number: len(c.Lines) + 1, Text: strings.TrimSuffix(string(raw), "\n")}
		values := l.read()
		switch {
		case l.Address.IsValid():
			c.Nameservers = append(c.Nameservers, l.Address)
		case l.Why != "":
			c.Ignored = append(c.Ignored, l)
		case l.Keyword == "domain" && len(values) > 0:
			c.Search = values[:1]
		case l.Keyword == "search" && len(values) > 0:
			c.Search = values
		case l.Keyword == "options":
			c.Options = append(c.Options, values...)
		}
		c.Lines = append(c.Lines, l)
	}
	return c
}

// Format writes the lines of a Config as they were read, byte for byte.
func Format(c Config) []byte {
	var b bytes.Buffer
	for i, l := range c.Lines {
		b.WriteString(l.Text)
		if i < len(c.Lines)-1 || !c.Unterminated {
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}

// TextError says why a text is no resolv.conf to edit.
type TextError struct{ Why string }

func (e *TextError) Error() string { return "no resolv.conf to edit: " + e.Why }

// CheckText returns a *TextError for what is too long, or binary: to add a line
// to such a file would make of somebody's mistake one of ours. White space and
// every byte from 0x80 are text; other control characters are not.
func CheckText(text []byte) error {
	if len(text) > MaxSize {
		return &TextError{fmt.Sprintf("it is longer than %d bytes, the most that is accepted", MaxSize)}
	}
	for i, b := range text {
		if b < 0x20 && !strings.ContainsRune(white, rune(b)) || b == 0x7f {
			return &TextError{fmt.Sprintf("byte %d is 0x%02x, a control character: the file is binary, and only text is accepted", i, b)}
		}
	}
	return nil
}

// keywords are those that resolv.conf(5) lists.
var keywords = []string{keyword, "domain", "search", "options", "sortlist"}

// read fills in what the line says, and returns its values.
func (l *Line) read() (values []string) {
	if l.Address, l.Why = nameserver(l.Text); l.Address.IsValid() {
		l.Keyword = keyword
		return nil
	}
	// A C string ends at NUL.
	text, _, _ := strings.Cut(l.Text, "\x00")
	i := strings.IndexAny(text, white)
	if i < 0 || !slices.Contains(keywords, text[:i]) {
		return nil
	}
	l.Keyword = text[:i]
	return strings.FieldsFunc(text[i:], func(r rune) bool { return strings.ContainsRune(white, r) })
}

const keyword = "nameserver"

// white is isspace(3).
const white = " \t\n\v\f\r"

// nameserver returns the address of a line, or the reason for which it is none,
// or nothing when the line is about something else.
func nameserver(line string) (a netip.Addr, why string) {
	// A C string ends at NUL.
	line, _, _ = strings.Cut(line, "\x00")
	rest, ok := strings.CutPrefix(line, keyword)
	if !ok || rest == "" || !strings.ContainsRune(white, rune(rest[0])) {
		return netip.Addr{}, lookalike(line)
	}
	rest = strings.TrimLeft(rest, white)
	if i := strings.IndexAny(rest, white); i >= 0 {
		rest = rest[:i]
	}
	switch a, ok := address(rest); {
	case ok:
		return a, ""
	case rest == "":
		return netip.Addr{}, "has no address"
	}
	return netip.Addr{}, strconv.Quote(rest) + " is no IPv4 or IPv6 address"
}

// lookalike says why a line that somebody may have meant to name a nameserver
// does not.
func lookalike(line string) string {
	trimmed := strings.TrimPrefix(line, "\ufeff")
	word := strings.TrimLeft(trimmed, white)
	if i := strings.IndexAny(word, white); i >= 0 {
		word = word[:i]
	}
	switch {
	case !strings.EqualFold(word, keyword):
		return ""
	case trimmed != line:
		return "a byte order mark stands in front of the keyword"
	case word == line:
		return "has no address"
	case !strings.HasPrefix(line, word):
		return "white space stands in front of the keyword: the C library does not read the line, Go's resolver does"
	}
	return "the keyword is not in lower case"
}

// address reads what inet_aton(3) or inet_pton(3) read.
func address(s string) (netip.Addr, bool) {
	if a, ok := aton(s); ok {
		return a, true
	}
	bare, zone, _ := strings.Cut(s, "%")
	a, err := netip.ParseAddr(bare)
	if err != nil || !a.Is6() {
		return netip.Addr{}, false
	}
	// glibc takes an address whose zone it does not know, and an empty one.
	return a.WithZone(zone), true
}

// aton reads IPv4 as inet_aton(3) does: one to four numbers, decimal, octal
// behind a 0 or hexadecimal behind 0x, of which the last fills the bytes that
// are left. So 127.1 is 127.0.0.1 and 010.0.0.1 is 8.0.0.1.
func aton(s string) (netip.Addr, bool) {
	parts := strings.Split(s, ".")
	if len(parts) > 4 {
		return netip.Addr{}, false
	}
	var sum uint64
	for i, p := range parts {
		base, digits := 10, p
		switch {
		case len(p) > 2 && (p[:2] == "0x" || p[:2] == "0X"):
			base, digits = 16, p[2:]
		case len(p) > 1 && p[0] == '0':
			base = 8
		}
		bits := 8
		if i == len(parts)-1 {
			bits = 8 * (5 - len(parts))
		}
		n, err := strconv.ParseUint(digits, base, bits)
		if err != nil {
			return netip.Addr{}, false
		}
		sum = sum<<bits | n
	}
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(sum))
	return netip.AddrFrom4(b), true
}
