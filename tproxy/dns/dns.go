// Package dns reads resolv.conf. It is pure: bytes come in, and who reads the
// file is the caller's affair.
package dns

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strconv"
	"strings"
)

// MaxNameservers is how many nameservers the C library asks: MAXNS in
// <resolv.h>, and the same in musl (src/network/lookup.h).
const MaxNameservers = 3

// Default is the nameserver that the C library asks when resolv.conf is
// missing or names none: the one on this host (resolv.conf(5)). Parse does not
// put it in: whether to count it is the caller's choice.
func Default() netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, 1}) }

// Config is what a resolv.conf says.
type Config struct {
	// Nameservers are all that are listed, in the order of the file, with
	// duplicates. An IPv6 address has the zone that the file gives it.
	//
	// Redirection takes all of them and not only those in Used: c-ares, dnsmasq
	// and miekg/dns read more than three, and a query to a server that is left
	// out would go past the proxy, while a rule for one that nobody asks costs
	// nothing.
	Nameservers []netip.Addr
	// Ignored are the lines that look like a nameserver and are none.
	Ignored []Line
}

// Line is a line of the file.
type Line struct {
	Number int    // from 1
	Text   string // without the line feed
	Why    string // why it is ignored
}

// Used returns the nameservers that the C library asks: the first three. There
// is none where it falls back to Default.
func (c Config) Used() []netip.Addr {
	n := min(len(c.Nameservers), MaxNameservers)
	return c.Nameservers[:n:n]
}

// Parse reads a resolv.conf; any bytes are one. A line names a nameserver when
// glibc (resolv/res_init.c, res_vinit_1) or musl (src/network/resolvconf.c)
// reads it so: the keyword at the very start of the line, white space, an
// address, and whatever follows behind white space. Where they differ, the more
// lenient one counts, for its queries have to be captured too: a carriage
// return is white space to musl and not to glibc 2.36, which then reads none.
//
// A line that starts with '#' or ';' is a comment. Behind an address, these
// signs begin one only after white space.
func Parse(text []byte) Config {
	var c Config
	number := 0
	for line := range bytes.Lines(text) {
		number++
		whole := strings.TrimSuffix(string(line), "\n")
		a, why := nameserver(whole)
		switch {
		case a.IsValid():
			c.Nameservers = append(c.Nameservers, a)
		case why != "":
			c.Ignored = append(c.Ignored, Line{number, whole, why})
		}
	}
	return c
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
