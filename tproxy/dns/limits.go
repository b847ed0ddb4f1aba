package dns

import (
	"fmt"
	"strings"
)

// The limits of C libraries on a search list. glibc has none since 2.26
// (resolv.conf(5)); before, MAXDNSRCH names in a buffer of 256 bytes with its
// final zero (<resolv.h>, MAXDNSRCH and defdname of 2.25).
const (
	MaxSearch      = 6
	MaxSearchBytes = 255
)

// MaxLine is the longest line that musl reads, in bytes without the line feed: its
// buffer of 256 has to hold the line feed and a zero. It passes over longer ones
// (src/network/resolvconf.c).
const MaxLine = 254

// Limit is a limit of a C library that a file goes beyond, so that the library
// does not read all of it.
type Limit struct {
	Line    int    // the first line that is not read, or not in full, from 1
	What    string // what there is too much of
	Has     int    // how much there is
	Max     int    // how much the library reads
	Library string // which one
}

func (l Limit) String() string {
	return fmt.Sprintf("line %d: %d %s, and %s reads %d", l.Line, l.Has, l.What, l.Library, l.Max)
}

// Limits returns the limits that the file goes beyond, in the order of its lines.
func (c Config) Limits() []Limit {
	var out []Limit
	nameservers, search := 0, -1
	for i, l := range c.Lines {
		if l.Address.IsValid() {
			if nameservers++; nameservers == MaxNameservers+1 {
				out = append(out, Limit{l.Number, "nameservers", len(c.Nameservers), MaxNameservers, "the C library"})
			}
		}
		if (l.Keyword == "search" || l.Keyword == "domain") && l.names() != "" {
			search = i
		}
		if l.Keyword != "" && len(l.Text) > MaxLine {
			out = append(out, Limit{l.Number, "bytes in a line", len(l.Text), MaxLine, "musl, which passes over the whole line,"})
		}
	}
	if search < 0 {
		return out
	}
	const old = "glibc before 2.26"
	l := c.Lines[search]
	if len(c.Search) > MaxSearch {
		out = append(out, Limit{l.Number, "names in the search list", len(c.Search), MaxSearch, old})
	}
	if n := len(l.names()); n > MaxSearchBytes {
		out = append(out, Limit{l.Number, "bytes in the search list", n, MaxSearchBytes, old})
	}
	return out
}

// names returns what follows the keyword.
func (l Line) names() string {
	text, _, _ := strings.Cut(l.Text, "\x00")
	return strings.Trim(text[len(l.Keyword):], white)
}
