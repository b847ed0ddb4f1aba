package rules

import (
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
)

// span is an inclusive range of numbers.
type span[T uint16 | uint32] struct{ First, Last T }

// PortRange is a range of ports, both ends included.
type PortRange = span[uint16]

// UIDRange is a range of user or group IDs, both ends included.
type UIDRange = span[uint32]

func (s span[T]) String() string { return string(s.append(nil)) }

func (s span[T]) append(b []byte) []byte {
	b = strconv.AppendUint(b, uint64(s.First), 10)
	if s.First != s.Last {
		b = strconv.AppendUint(append(b, '-'), uint64(s.Last), 10)
	}
	return b
}

// spans is sorted, without overlaps, and neighbours are merged.
type spans[T uint16 | uint32] []span[T]

func mergeSpans[T uint16 | uint32](in []span[T]) spans[T] {
	if len(in) == 0 {
		return nil
	}
	s := slices.Clone(in)
	slices.SortFunc(s, func(a, b span[T]) int {
		switch {
		case a.First < b.First:
			return -1
		case a.First > b.First:
			return 1
		}
		return 0
	})
	out := s[:1]
	for _, r := range s[1:] {
		last := &out[len(out)-1]
		// uint64: the successor of the highest value must not wrap.
		if uint64(r.First) <= uint64(last.Last)+1 {
			last.Last = max(last.Last, r.Last)
		} else {
			out = append(out, r)
		}
	}
	return spans[T](slices.Clip(out))
}

func (s spans[T]) contains(v T) bool {
	_, found := slices.BinarySearchFunc(s, v, func(r span[T], v T) int {
		switch {
		case r.Last < v:
			return -1
		case r.First > v:
			return 1
		}
		return 0
	})
	return found
}

func (s spans[T]) String() string { return string(s.append(nil)) }

func (s spans[T]) append(b []byte) []byte {
	for i, r := range s {
		if i > 0 {
			b = append(b, ',')
		}
		b = r.append(b)
	}
	return b
}

// parseSpans reads a comma list of numbers and ranges; every bad entry is
// reported.
func parseSpans[T uint16 | uint32](list string, lowest, highest uint64, what string) (spans[T], error) {
	var out []span[T]
	var errs []error
	for entry := range strings.SplitSeq(list, ",") {
		e := strings.TrimSpace(entry)
		first, last, isRange := strings.Cut(e, "-")
		if !isRange {
			last = first
		}
		a, errA := strconv.ParseUint(first, 10, 64)
		b, errB := strconv.ParseUint(last, 10, 64)
		switch {
		case e == "":
			errs = append(errs, fmt.Errorf("empty entry in %q: accepted is %s", list, what))
		case errA != nil || errB != nil || strings.HasPrefix(first, "+") || strings.HasPrefix(last, "+"):
			errs = append(errs, fmt.Errorf("%q: accepted is %s", e, what))
		case a < lowest || b < lowest || a > highest || b > highest:
			errs = append(errs, fmt.Errorf("%q is out of range: accepted is %s", e, what))
		case a > b:
			errs = append(errs, fmt.Errorf("%q is reversed: write %d-%d", e, b, a))
		default:
			out = append(out, span[T]{T(a), T(b)})
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return mergeSpans(out), nil
}

// Ports is a set of TCP or UDP ports, 1 to 65535, held as sorted, merged
// ranges. The zero value is empty. Port 0 does not exist.
type Ports struct{ s spans[uint16] }

// MaxPort is the highest port.
const MaxPort = 65535

const acceptedPorts = "a port from 1 to 65535 or a range such as 80-90"

// ParsePorts reads "22", "80-90" or a comma list of such entries; the empty
// string is the empty set. The error names every entry that is not accepted.
func ParsePorts(list string) (Ports, error) {
	if strings.TrimSpace(list) == "" {
		return Ports{}, nil
	}
	s, err := parseSpans[uint16](list, 1, MaxPort, acceptedPorts)
	return Ports{s}, err
}

// MustPorts is ParsePorts for lists that stand in the source; it panics on an
// error.
func MustPorts(list string) Ports {
	p, err := ParsePorts(list)
	if err != nil {
		panic(err)
	}
	return p
}

// PortsOf returns the set of the given ports and ranges; an error names port 0
// and reversed ranges.
func PortsOf(ranges ...PortRange) (Ports, error) {
	for _, r := range ranges {
		if r.First == 0 || r.First > r.Last {
			return Ports{}, fmt.Errorf("%d-%d: accepted is %s", r.First, r.Last, acceptedPorts)
		}
	}
	return Ports{mergeSpans(ranges)}, nil
}

// Port returns the set of one port, which must not be 0.
func Port(p uint16) Ports {
	if p == 0 {
		panic("rules: port 0 does not exist")
	}
	return Ports{spans[uint16]{{p, p}}}
}

// IsEmpty reports whether there is no port in the set.
func (p Ports) IsEmpty() bool { return len(p.s) == 0 }

// Contains reports whether the port is in the set.
func (p Ports) Contains(port uint16) bool { return p.s.contains(port) }

// Ranges returns the sorted ranges. The caller must not change them.
func (p Ports) Ranges() []PortRange { return p.s }

// Len returns how many ports are in the set.
func (p Ports) Len() int {
	n := 0
	for _, r := range p.s {
		n += int(r.Last-r.First) + 1
	}
	return n
}

// Union returns the ports that are in any of the sets.
func (p Ports) Union(more ...Ports) Ports {
	all := slices.Clone(p.s)
	for _, q := range more {
		all = append(all, q.s...)
	}
	return Ports{mergeSpans(all)}
}

// Intersect returns the ports that are in both sets.
func (p Ports) Intersect(q Ports) Ports {
	var out spans[uint16]
	for i, j := 0, 0; i < len(p.s) && j < len(q.s); {
		first, last := max(p.s[i].First, q.s[j].First), min(p.s[i].Last, q.s[j].Last)
		if first <= last {
			out = append(out, PortRange{first, last})
		}
		if p.s[i].Last < q.s[j].Last {
			i++
		} else {
			j++
		}
	}
	return Ports{out}
}

// Equal reports whether both sets hold the same ports.
func (p Ports) Equal(q Ports) bool { return slices.Equal(p.s, q.s) }

// String writes the set as ParsePorts reads it.
func (p Ports) String() string { return p.s.String() }

// GoString writes the set as Go source.
func (p Ports) GoString() string { return fmt.Sprintf("rules.MustPorts(%q)", p.String()) }

// MarshalText writes the set as ParsePorts reads it.
func (p Ports) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what ParsePorts reads.
func (p *Ports) UnmarshalText(text []byte) (err error) {
	*p, err = ParsePorts(string(text))
	return err
}

// MarshalJSON writes a list of numbers, a range as the string "80-90".
func (p Ports) MarshalJSON() ([]byte, error) {
	b := []byte{'['}
	for i, r := range p.s {
		if i > 0 {
			b = append(b, ',')
		}
		if r.First == r.Last {
			b = strconv.AppendUint(b, uint64(r.First), 10)
		} else {
			b = strconv.AppendQuote(b, r.String())
		}
	}
	return append(b, ']'), nil
}

// UnmarshalJSON reads a number, a string as ParsePorts reads it, or a list of
// either, as Kuma's configuration files have them; null is the empty set. Every
// bad entry is reported.
func (p *Ports) UnmarshalJSON(data []byte) error {
	var one any
	d := json.NewDecoder(strings.NewReader(string(data)))
	d.UseNumber()
	if err := d.Decode(&one); err != nil {
		return err
	}
	list, ok := one.([]any)
	if !ok {
		if one == nil {
			*p = Ports{}
			return nil
		}
		list = []any{one}
	}
	var all []PortRange
	var errs []error
	for _, e := range list {
		var text string
		switch e := e.(type) {
		case json.Number:
			text = e.String()
		case string:
			text = e
			if e == "" && ok {
				errs = append(errs, fmt.Errorf("empty entry: accepted is %s", acceptedPorts))
				continue
			}
		default:
			errs = append(errs, fmt.Errorf("%v: accepted is %s, or a list of them", e, acceptedPorts))
			continue
		}
		q, err := ParsePorts(text)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, q.s...)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	*p = Ports{mergeSpans(all)}
	return nil
}

// maxSlots is XT_MULTI_PORTS in linux/netfilter/xt_multiport.h: how many ports
// one multiport match holds; a range takes two.
const maxSlots = 15

func (p Ports) slots() int {
	n := 0
	for _, r := range p.s {
		n += r.slots()
	}
	return n
}

func (s span[T]) slots() int {
	if s.First == s.Last {
		return 1
	}
	return 2
}

// packs cuts the set into sets of at most maxSlots slots, in order.
func (p Ports) packs() iter.Seq[Ports] {
	return func(yield func(Ports) bool) {
		start, used := 0, 0
		for i, r := range p.s {
			if used+r.slots() > maxSlots {
				if !yield(Ports{p.s[start:i]}) {
					return
				}
				start, used = i, 0
			}
			used += r.slots()
		}
		if start < len(p.s) {
			yield(Ports{p.s[start:]})
		}
	}
}

// MaxUID is the highest user or group ID: 2^32-1 is (uid_t)-1, which stands for
// no user (chown(2), uid_valid in linux/uidgid.h).
const MaxUID = 1<<32 - 2

// UIDs is a set of user or group IDs, 0 to 2^32-2, held as sorted, merged
// ranges. The zero value is empty.
type UIDs struct{ s spans[uint32] }

const acceptedUIDs = "a number from 0 to 4294967294 or a range such as 1000-1005"

// ParseUIDs reads "1000", "1000-1005" or a comma list of such entries; the
// empty string is the empty set.
func ParseUIDs(list string) (UIDs, error) {
	if strings.TrimSpace(list) == "" {
		return UIDs{}, nil
	}
	s, err := parseSpans[uint32](list, 0, MaxUID, acceptedUIDs)
	return UIDs{s}, err
}

// MustUIDs is ParseUIDs for lists that stand in the source; it panics on an
// error.
func MustUIDs(list string) UIDs {
	u, err := ParseUIDs(list)
	if err != nil {
		panic(err)
	}
	return u
}

// UIDsOf returns the set of the given IDs. An ID above MaxUID is left to
// Validate's caller: there is no such user.
func UIDsOf(ids ...uint32) UIDs {
	in := make([]UIDRange, len(ids))
	for i, id := range ids {
		in[i] = UIDRange{id, id}
	}
	return UIDs{mergeSpans(in)}
}

// IsEmpty reports whether there is no ID in the set.
func (u UIDs) IsEmpty() bool { return len(u.s) == 0 }

// Contains reports whether the ID is in the set.
func (u UIDs) Contains(id uint32) bool { return u.s.contains(id) }

// Ranges returns the sorted ranges. The caller must not change them.
func (u UIDs) Ranges() []UIDRange { return u.s }

// Union returns the IDs that are in either set.
func (u UIDs) Union(v UIDs) UIDs {
	switch {
	case u.IsEmpty():
		return v
	case v.IsEmpty():
		return u
	}
	return UIDs{mergeSpans(slices.Concat(u.s, v.s))}
}

// Equal reports whether both sets hold the same IDs.
func (u UIDs) Equal(v UIDs) bool { return slices.Equal(u.s, v.s) }

// String writes the set as ParseUIDs reads it.
func (u UIDs) String() string { return u.s.String() }

// GoString writes the set as Go source.
func (u UIDs) GoString() string { return fmt.Sprintf("rules.MustUIDs(%q)", u.String()) }
