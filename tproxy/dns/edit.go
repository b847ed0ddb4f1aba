package dns

import (
	"bytes"
	"fmt"
	"hash/crc32"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Edit is what adding our nameserver makes of a file.
type Edit struct {
	Text []byte
	// Listed is the number of the line that names our address first without
	// being ours; 0 where there is none. Nothing is added then.
	Listed int
	// OutOfReach are the nameservers that the C library asked and does not ask
	// any more: the third, which ours pushes behind MaxNameservers, or Default
	// where the file names none.
	OutOfReach []netip.Addr
}

// AlreadyListedError says that somebody else's line names our nameserver behind
// others. Two lines of one address would have the C library ask it twice, and to
// move theirs would be to lose its place.
type AlreadyListedError struct {
	Address netip.Addr
	Line    Line
}

func (e *AlreadyListedError) Error() string {
	return fmt.Sprintf("line %d lists the nameserver %s behind others: %q; take that line out, or make it the first nameserver, and install again", e.Line.Number, e.Address, e.Line.Text)
}

// A mark is a comment line of its own, and our nameserver's line follows it. A
// comment behind an address is not read by every C library. The mark holds a sum
// of the address and not the address: so the address stands on one line only,
// and whoever edits our line, or puts one of theirs in between, keeps what is
// theirs.
const (
	markHead = "# kuma-tproxy "
	markTail = `: added by "kumactl install transparent-proxy", taken out by uninstall`
)

func sum(a netip.Addr) uint32 { return crc32.ChecksumIEEE([]byte(a.Unmap().String())) }

func mark(a netip.Addr) string { return fmt.Sprintf("%s%08x%s", markHead, sum(a), markTail) }

// marked returns the sum in a mark. What follows it may have been edited.
func (l Line) marked() (uint32, bool) {
	rest, ok := strings.CutPrefix(strings.TrimLeft(l.Text, white), markHead)
	if !ok || len(rest) < 8 {
		return 0, false
	}
	n, err := strconv.ParseUint(rest[:8], 16, 32)
	return uint32(n), err == nil
}

// ours returns which lines are ours: every mark, and for each the first line
// behind it that names its address, or else the first in front of it.
func (c Config) ours() []bool {
	out := make([]bool, len(c.Lines))
	for i, l := range c.Lines {
		s, ok := l.marked()
		if !ok {
			continue
		}
		out[i] = true
		is := func(j int) bool {
			return !out[j] && c.Lines[j].Address.IsValid() && sum(c.Lines[j].Address) == s
		}
		j := i + 1
		for j < len(c.Lines) && !is(j) {
			j++
		}
		if j == len(c.Lines) {
			for j = 0; j < i && !is(j); j++ {
			}
		}
		if j != i && j < len(c.Lines) {
			out[j] = true
		}
	}
	return out
}

// HasOurs reports whether a mark of ours is in the file.
func HasOurs(text []byte) bool { return slices.Contains(Parse(text).ours(), true) }

// AddNameserver makes a nameserver the first of the file. The line stands in front
// of the first nameserver, so that a header stays the header, or at the top where
// there is none. What was ours before is taken out, so adding twice is adding
// once, and another address replaces the former.
//
// Every other byte stays: RemoveNameserver gives the file back as it was. Our
// lines end in a line feed whatever the others end in, because glibc takes a
// carriage return for a part of the address.
//
// The error is an *AddressError, a *TextError or an *AlreadyListedError.
func AddNameserver(text []byte, a netip.Addr) (Edit, error) {
	a = a.Unmap()
	if err := checkAddress(a.String(), a); err != nil {
		return Edit{}, err
	}
	if err := CheckText(text); err != nil {
		return Edit{}, err
	}
	c := Parse(text)
	drop := c.ours()
	at := -1 // where the first nameserver is, or what Go's resolver takes for one
	var others []netip.Addr
	for i, l := range c.Lines {
		if drop[i] || !l.Address.IsValid() && l.Why == "" {
			continue
		}
		if l.Address.IsValid() && same(l.Address, a) {
			if at >= 0 {
				return Edit{}, &AlreadyListedError{a, l}
			}
			return Edit{Text: without(text, drop), Listed: l.Number}, nil
		}
		if at < 0 {
			at = i
		}
		if l.Address.IsValid() {
			others = append(others, l.Address)
		}
	}
	var b bytes.Buffer
	add := func() { b.WriteString(mark(a) + "\n" + keyword + " " + a.String() + "\n") }
	if at < 0 {
		add()
	}
	i := 0
	for raw := range bytes.Lines(text) {
		if i == at {
			add()
		}
		if !drop[i] {
			b.Write(raw)
		}
		i++
	}
	e := Edit{Text: b.Bytes()}
	switch {
	case len(others) == 0:
		e.OutOfReach = []netip.Addr{Default()}
	case len(others) >= MaxNameservers:
		e.OutOfReach = []netip.Addr{others[MaxNameservers-1]}
	}
	return e, CheckText(e.Text)
}

func same(a, b netip.Addr) bool { return a.Unmap() == b.Unmap() }

// RemoveNameserver takes our lines out of a file, and nothing else. A line of ours
// that somebody edited is theirs; our mark goes.
func RemoveNameserver(text []byte) []byte { return without(text, Parse(text).ours()) }

func without(text []byte, drop []bool) []byte {
	var b bytes.Buffer
	i := 0
	for raw := range bytes.Lines(text) {
		if !drop[i] {
			b.Write(raw)
		}
		i++
	}
	return b.Bytes()
}

// Unmarked returns the lines that name an address without a mark of ours.
func Unmarked(text []byte, a netip.Addr) []Line {
	c := Parse(text)
	drop := c.ours()
	var out []Line
	for i, l := range c.Lines {
		if !drop[i] && l.Address.IsValid() && same(l.Address, a) {
			out = append(out, l)
		}
	}
	return out
}
