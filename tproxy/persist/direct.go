package persist

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// EntryKind is the name of an entry's element.
type EntryKind string

// The kinds of entry, see firewalld.direct(5).
const (
	ChainEntry       EntryKind = "chain"
	RuleEntry        EntryKind = "rule"
	PassthroughEntry EntryKind = "passthrough"
)

// Owner says whose an entry is.
type Owner uint8

// The owners.
const (
	Others Owner = iota
	// Ours is what MergeDirect replaces and RemoveDirect takes out: what this module
	// made, and what Kuma's own installers left.
	Ours
	// Doubtful is a rule that an installer of Kuma's may have made, and anybody else
	// as well (see tproxy.Found). It is left alone.
	Doubtful
)

// Entry is an element of a direct.xml.
type Entry struct {
	Kind  EntryKind
	IPv   string // ipv4, ipv6 or eb
	Table string // empty for a passthrough
	Chain string // empty for a passthrough
	// Priority orders the rules of a chain, the lowest first.
	Priority int
	// Args are the arguments, as firewalld splits the text.
	Args []string
	// Rule is what the arguments of a rule of ipv4 or ipv6 say; without an Action
	// where they cannot be read.
	Rule  rules.Rule
	Owner Owner
	// Line and Column, in characters, of the element; counted from 1.
	Line, Column int

	span
}

func (e Entry) String() string {
	switch e.Kind {
	case ChainEntry:
		return fmt.Sprintf("%s %s chain %s", e.IPv, e.Table, e.Chain)
	case RuleEntry:
		return fmt.Sprintf("%s %s %s %d: %s", e.IPv, e.Table, e.Chain, e.Priority, joinArgs(e.Args))
	}
	return fmt.Sprintf("%s passthrough: %s", e.IPv, joinArgs(e.Args))
}

// chain is what an entry is about.
type chain struct{ ipv, table, name string }

func chainOf(e Entry) chain { return chain{e.IPv, e.Table, e.Chain} }

// sameChain reports whether two entries are about one chain.
func (e Entry) sameChain(o Entry) bool { return chainOf(e) == chainOf(o) }

// family is the one that an entry is of; 0 for a bridge.
func (e Entry) family() rules.Family {
	switch e.IPv {
	case "ipv4":
		return rules.IPv4
	case "ipv6":
		return rules.IPv6
	}
	return 0
}

// Direct is what a direct.xml holds.
type Direct struct {
	// Entries stand in the order in which firewalld loads them: the chains, the rules,
	// those of each chain by priority, the passthroughs. Rules of equal priority stand
	// in the order of the file, which firewalld does not promise.
	Entries []Entry
	// Kuma are the chains, and the built-in chains, with something in them that Kuma's
	// own installers wrote, as "ipv4 nat OUTPUT".
	Kuma []string
}

// ReadDirect reads a direct.xml; nil, or a text without an element, has no entries. The
// error is a *[DirectError]: it is what makes firewalld load nothing of the file, or what
// is not understood here.
func ReadDirect(file []byte) (Direct, error) {
	d, err := parse(file)
	if err != nil {
		return Direct{}, err
	}
	kuma := d.own()
	out := Direct{Entries: slices.Clone(d.entries), Kuma: kuma}
	slices.SortStableFunc(out.Entries, d.loads)
	return out, nil
}

// loads orders entries as firewalld loads them: chains of rules come as they first
// stand in the file.
func (d *document) loads(a, b Entry) int {
	kinds := []EntryKind{ChainEntry, RuleEntry, PassthroughEntry}
	if a.Kind != b.Kind {
		return slices.Index(kinds, a.Kind) - slices.Index(kinds, b.Kind)
	}
	if a.Kind != RuleEntry {
		return a.start - b.start
	}
	if a.sameChain(b) {
		switch {
		case a.Priority < b.Priority:
			return -1
		case a.Priority > b.Priority:
			return 1
		}
		return a.start - b.start
	}
	return d.first[chainOf(a)] - d.first[chainOf(b)]
}

// Rules returns what is ours in family f, as firewalld loads it: to compare with the
// rules of a plan (rules.Compare). A rule that stands twice is loaded once. With
// FirewallBackend=iptables the kernel has the rules of a base chain in another, such as
// OUTPUT_direct.
func (d Direct) Rules(f rules.Family) rules.Set {
	out := rules.Set{Only: f}
	seen := map[string]bool{}
	for _, e := range d.Entries {
		if text := e.String(); e.Owner == Ours && e.family() == f && !seen[text] {
			seen[text] = true
			out = add(out, e)
		}
	}
	return out
}

// add adds an entry to a Set: a chain, or a rule at the end of its chain.
func add(s rules.Set, e Entry) rules.Set {
	t := rules.Table(e.Table)
	var list *[]rules.Rule
	if hook := rules.Hook(e.Chain); e.Kind == RuleEntry && slices.Contains(hooks, hook) {
		i := slices.IndexFunc(s.Bases, func(c rules.BaseChain) bool { return c.Table == t && c.Hook == hook })
		if i < 0 {
			i = len(s.Bases)
			s.Bases = append(s.Bases, rules.BaseChain{Table: t, Hook: hook})
		}
		list = &s.Bases[i].Rules
	} else {
		i := slices.IndexFunc(s.Chains, func(c rules.Chain) bool { return c.Table == t && c.Name == e.Chain })
		if i < 0 {
			i = len(s.Chains)
			s.Chains = append(s.Chains, rules.Chain{Table: t, Name: e.Chain})
		}
		list = &s.Chains[i].Rules
	}
	if e.Kind == RuleEntry {
		r := e.Rule
		if r.Action == nil { // it cannot be read, and keeps its place
			r.Action = rules.Nothing{}
		}
		*list = append(*list, r)
	}
	return s
}

var hooks = []rules.Hook{rules.Prerouting, rules.Input, rules.Forward, rules.Output, rules.Postrouting}

// own finds out whose the entries are.
func (d *document) own() (kuma []string) {
	for _, ipv := range []string{"ipv4", "ipv6"} {
		var of []*Entry
		for i := range d.entries {
			if e := &d.entries[i]; e.IPv == ipv && e.Kind != PassthroughEntry {
				of = append(of, e)
			}
		}
		slices.SortStableFunc(of, func(a, b *Entry) int { return d.loads(*a, *b) })
		var all rules.Set
		for _, e := range of {
			if e.Kind == RuleEntry {
				if r, err := parseArgs(e.family(), e.Args); err == nil {
					e.Rule = r
				}
			}
			all = add(all, *e)
		}
		found := tproxy.Find(map[string]rules.Family{"ipv4": rules.IPv4, "ipv6": rules.IPv6}[ipv], all)
		for _, k := range found.Kuma {
			kuma = append(kuma, ipv+" "+k)
		}
		at := map[string]int{} // of the rule in its chain
		for _, e := range of {
			if e.Kind == RuleEntry {
				at[e.Table+" "+e.Chain]++
			}
			e.Owner = ownerOf(found, *e, at[e.Table+" "+e.Chain])
		}
	}
	return kuma
}

// ownerOf says whose an entry is; at is a rule's place in its chain, from 1.
func ownerOf(found tproxy.Found, e Entry, at int) Owner {
	t := rules.Table(e.Table)
	if _, ok := found.Ours.Chain(t, e.Chain); ok {
		return Ours
	}
	if e.Kind != RuleEntry {
		return Others
	}
	// One for a chain that is spelt OUTPUT_direct MergeDirect did not write.
	if slices.Contains(hooks, rules.Hook(e.Chain)) && found.Ours.Covers(t, e.Chain, at) {
		return Ours
	}
	if slices.ContainsFunc(found.Doubtful, func(r rules.Reference) bool {
		return r.Table == t && r.Chain == e.Chain && r.Index == at
	}) {
		return Doubtful
	}
	return Others
}

// form is how a block of ours came into the file, and so how it goes.
type form string

const (
	inRoot   form = "in the root"
	inClosed form = "in a root that had no end tag" // <direct/>
	withRoot form = "with the root"
	withFile form = "with the file"
)

const (
	markBegin = " kuma-tproxy: ours begins, "
	markMore  = "; uninstall takes it out "
	markEnd   = " kuma-tproxy: ours ends "
)

// markForm reads a comment of ours; the form of the one at the end is empty.
func markForm(comment string) (f form, ours bool) {
	if comment == markEnd {
		return "", true
	}
	for _, f := range []form{inRoot, inClosed, withRoot, withFile} {
		if comment == markBegin+string(f)+markMore {
			return f, true
		}
	}
	return "", false
}

// header is the first line of a file that firewalld writes, but for the quotes.
const header = `<?xml version="1.0" encoding="utf-8"?>`

// block is what is put into a file. Nothing of it stands outside of the two marks, but
// for the header of a file that is new.
func block(f form, entries []Entry, nl string) []byte {
	var b []byte
	if f == withFile {
		b = append(append(b, header...), nl...)
	}
	b = append(b, "<!--"+markBegin+string(f)+markMore+"-->"+nl...)
	root := f == withRoot || f == withFile
	if root {
		b = append(append(b, "<direct>"...), nl...)
	}
	for _, e := range entries {
		b = append(e.appendXML(append(b, "  "...)), nl...)
	}
	if root {
		b = append(append(b, "</direct>"...), nl...)
	}
	b = append(b, "<!--"+markEnd+"-->"...)
	if f == withFile {
		b = append(b, nl...)
	}
	return b
}

// Where rules in built-in chains stand among those of others, unless those of others go
// further: rules that come later have room on both sides.
const (
	firstPriority = -10_000
	lastPriority  = 10_000
)

// firewall-cmd hands priorities over D-Bus, as 32 bits.
const (
	lowestPriority  = -1 << 31
	highestPriority = 1<<31 - 1
)

// MergeDirect puts a Set, such as tproxy.Plan.WithRecord returns, into a direct.xml and
// returns the new file. nil is a file that is not there. What is ours in the file already
// is replaced, what Kuma's own installers left goes, and every other byte stays. Merging
// the same again changes nothing. A Set without rules is RemoveDirect.
//
// The rules of a chain have strictly increasing priorities for each family, as the order
// of equal ones is not fixed. In a built-in chain those of a BaseChain that is
// [rules.First] have lower priorities than every direct rule of others there, and those
// of one that is Last have higher ones, -10000 and 10000 unless others go further: a
// direct rule that somebody adds with the usual priorities of 0 and above goes behind the
// first and in front of the last as well. That is an order among direct rules alone.
// firewalld flushes the tables of iptables and then inserts all direct rules from the
// first place on, so with FirewallBackend=nftables both stand in front of what others
// append later, such as Docker's, and with iptables they stand in OUTPUT_direct, to which
// OUTPUT jumps first. In front of them come rules that others insert, passthroughs with
// -I, and maybe direct rules for a chain that is spelt OUTPUT_direct.
//
// A comment with quotes or backslashes reaches the kernel as it is by iptables-restore;
// with IndividualCalls=yes in firewalld.conf its escapes stay in it.
//
// The error is a *[DirectError], a *rules.InvalidError for a Set that is not valid, or
// says what of the Set could not be told from rules of others when it has to go. There is
// no new file then.
func MergeDirect(file []byte, s rules.Set) ([]byte, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	ours, err := entriesOf(s)
	if err != nil {
		return nil, err
	}
	rest, _, err := strip(file, ours)
	if err != nil || len(ours) == 0 {
		return rest, err
	}
	d, err := parse(rest)
	if err != nil {
		return nil, err
	}
	if err := d.prioritize(s, ours); err != nil {
		return nil, err
	}
	nl := "\n"
	if i := bytes.IndexByte(rest, '\n'); i > 0 && rest[i-1] == '\r' {
		nl = "\r\n"
	}
	switch {
	case rest == nil:
		return block(withFile, ours, nl), nil
	case !d.rooted:
		return slices.Concat(rest, block(withRoot, ours, nl)), nil
	case d.close.start == d.close.end:
		tag := rest[:d.open.end-len("/>")]
		return slices.Concat(tag, []byte(">"), block(inClosed, ours, nl), []byte("</direct>"), rest[d.open.end:]), nil
	}
	return slices.Concat(rest[:d.close.start], block(inRoot, ours, nl), rest[d.close.start:]), nil
}

// entriesOf are the chains and rules of a Set, in its order, the rules of built-in chains
// in front. They are taken from the script, which is what is tried and tested.
func entriesOf(s rules.Set) (out []Entry, err error) {
	for _, f := range rules.Families() {
		e := Entry{IPv: fmt.Sprintf("ipv%d", f)}
		var chains, list []Entry
		for line := range strings.Lines(string(s.IPTables(f))) {
			line = strings.TrimSuffix(line, "\n")
			switch verb, rest, _ := strings.Cut(line, " "); {
			case line[0] == '*':
				e.Table = line[1:]
			case line[0] == ':':
				e.Kind, e.Chain, e.Args = ChainEntry, verb[1:], nil
				chains = append(chains, e)
			case verb == "-A", verb == "-I":
				e.Kind = RuleEntry
				e.Chain, rest, _ = strings.Cut(rest, " ")
				at := len(list)
				if verb == "-I" { // the last one comes first, each in front
					rest = strings.TrimPrefix(rest, "1 ")
					for at > 0 && list[at-1].sameChain(e) {
						at--
					}
				}
				e.Args = scriptArgs(rest)
				list = slices.Insert(list, at, e)
			}
		}
		out = slices.Concat(out, chains, list)
	}
	for _, e := range out {
		if e.Kind == ChainEntry && !tproxy.KnownChain(rules.Table(e.Table), e.Chain) || e.Kind == RuleEntry && !known(e) {
			return nil, fmt.Errorf("%s is not of tproxy.Known: it could not be told from an entry of others", e)
		}
	}
	return out, nil
}

// known reports whether a rule is in a chain of ours, or is a jump of ours.
func known(e Entry) bool {
	if !slices.Contains(hooks, rules.Hook(e.Chain)) {
		return tproxy.KnownChain(rules.Table(e.Table), e.Chain)
	}
	r, err := parseArgs(e.family(), e.Args)
	if err != nil {
		return false
	}
	e.Rule = r
	ours, _ := add(rules.Set{}, e).Ours(e.family(), tproxy.Known())
	return len(ours.Bases) > 0
}

// prioritize gives the rules of ours, in order, their priorities in a file of others.
func (d *document) prioritize(s rules.Set, ours []Entry) error {
	for i := 0; i < len(ours); {
		n := 1
		for i+n < len(ours) && ours[i].Kind == ours[i+n].Kind && ours[i].sameChain(ours[i+n]) {
			n++
		}
		list := ours[i : i+n]
		i += n
		if list[0].Kind != RuleEntry {
			continue
		}
		from := 0
		if base, ok := s.Base(rules.Table(list[0].Table), rules.Hook(list[0].Chain)); ok {
			from = lastPriority
			if base.Place == rules.First {
				from = firstPriority
			}
			for _, e := range d.entries {
				switch {
				case e.Kind != RuleEntry || !e.sameChain(list[0]):
				case base.Place == rules.First && e.Priority < lowestPriority+n, base.Place == rules.Last && e.Priority > highestPriority-n:
					return d.fault(e.start, "priority %d leaves no room for rules of ours beside it: accepted are %d to %d", e.Priority, lowestPriority, highestPriority)
				case base.Place == rules.First:
					from = min(from, e.Priority-n)
				default:
					from = max(from, e.Priority+1)
				}
			}
		}
		for j := range list {
			list[j].Priority = from + j
		}
	}
	return nil
}

// Removal is what RemoveDirect took out.
type Removal struct {
	// Removed are the entries, as the file had them.
	Removed []Entry
	// Kuma are the chains, and the built-in chains, out of which something went that
	// Kuma's own installers wrote, as "ipv4 nat OUTPUT".
	Kuma []string
	// Doubtful are rules that an installer of Kuma's may have made. They were left.
	Doubtful []Entry
	// Rewritten is whether the entries were not as MergeDirect left them: somebody else
	// edited them or, as firewall-cmd --permanent --direct does, wrote the file anew.
	// They were taken out one by one, and what MergeDirect had found there cannot be
	// told byte for byte.
	Rewritten bool
	// Empty is whether no entry is left, as in the file that Kuma's --store-firewalld
	// writes: firewalld does the same without that file.
	Empty bool
}

// RemoveDirect takes out of a direct.xml what is ours: chains by table and name, the
// rules in them, rules that are exactly ours, and what Kuma's own installers left, known
// as tproxy.Find knows it. A rule of others stays, whatever words are in it.
//
// After MergeDirect alone the new file is, byte for byte, what MergeDirect was given,
// less what was ours or Kuma's there. It is nil where the file was made by MergeDirect:
// delete it. An empty file is not nil.
//
// The error is a *[DirectError]; nothing was taken out then. A rule of others that jumps
// to a chain of ours is one, as with a single bad rule firewalld loads none.
func RemoveDirect(file []byte) (out []byte, r Removal, err error) { return strip(file, nil) }

// strip takes out what is ours; keep are the entries that come in its place.
func strip(file []byte, keep []Entry) ([]byte, Removal, error) {
	d, err := parse(file)
	if err != nil {
		return nil, Removal{}, err
	}
	r := Removal{Kuma: d.own(), Empty: true}
	for _, e := range d.entries {
		switch e.Owner {
		case Ours:
			r.Removed = append(r.Removed, e)
			continue
		case Doubtful:
			r.Doubtful = append(r.Doubtful, e)
		}
		r.Empty = false
	}
	if err := d.references(r.Removed, keep); err != nil {
		return nil, Removal{}, err
	}
	out, whole, err := d.cut(r.Removed)
	r.Rewritten = !whole && (len(r.Removed) > 0 || len(d.marks) > 0)
	return out, r, err
}

// references is an error for an entry of others that needs a chain of ours which goes.
func (d *document) references(gone, keep []Entry) error {
	for _, e := range d.entries {
		if e.Owner == Ours {
			continue
		}
		for _, c := range gone {
			same := func(k Entry) bool { return k.Kind == ChainEntry && k.sameChain(c) }
			if c.Kind != ChainEntry || c.IPv != e.IPv || e.Kind == RuleEntry && c.Table != e.Table || slices.ContainsFunc(keep, same) {
				continue
			}
			for i, a := range e.Args {
				if a == c.Chain && (e.Kind == PassthroughEntry || i > 0 && slices.Contains(jumps, e.Args[i-1])) {
					return d.fault(e.start, "a %s of others needs the chain %s, which goes: take it out first", e.Kind, c.Chain)
				}
			}
		}
	}
	return nil
}

var jumps = []string{"-j", "--jump", "-g", "--goto"}

// splice is a part of the text that something else takes the place of.
type splice struct {
	span
	with string
}

// cut takes the entries of ours and the marks out; whole is whether that brought back
// what MergeDirect found.
func (d *document) cut(ours []Entry) (out []byte, whole bool, err error) {
	if len(ours) == 0 && len(d.marks) == 0 {
		return d.text, true, nil
	}
	var cuts []splice
	in, outside, err := d.marked(ours)
	if err != nil {
		return nil, false, err
	}
	if len(in) > 0 {
		if s, ok := d.undo(in); ok {
			if s.start == 0 && s.end == len(d.text) && d.marks[0].form == withFile {
				return nil, true, nil
			}
			cuts, whole, ours = []splice{s}, len(outside) == 0, outside
		}
	}
	if len(cuts) == 0 {
		for _, m := range d.marks {
			cuts = append(cuts, d.line(m.span))
		}
	}
	for _, e := range ours {
		cuts = append(cuts, d.line(e.span))
	}
	slices.SortFunc(cuts, func(a, b splice) int { return a.start - b.start })
	out = make([]byte, 0, len(d.text))
	at := 0
	for _, c := range cuts {
		if c.start < at { // a mark within an entry
			continue
		}
		out = append(append(out, d.text[at:c.start]...), c.with...)
		at = c.end
	}
	return append(out, d.text[at:]...), whole, nil
}

// marked parts the entries of ours into those between the marks and the others. A chain
// that stands in both has been made by somebody else as well.
func (d *document) marked(ours []Entry) (in, outside []Entry, err error) {
	if len(d.marks) != 2 || d.marks[0].form == "" || d.marks[1].form != "" {
		return nil, ours, nil
	}
	for _, e := range ours {
		if e.start > d.marks[0].end && e.end < d.marks[1].start {
			in = append(in, e)
		} else {
			outside = append(outside, e)
		}
	}
	for _, e := range outside {
		if e.Kind == ChainEntry && slices.ContainsFunc(in, func(o Entry) bool { return o.Kind == ChainEntry && o.sameChain(e) }) {
			return nil, nil, d.fault(e.start, "the chain %s is of ours and stands here a second time: take it out first", e.Chain)
		}
	}
	return in, outside, nil
}

// undo is the splice that takes back what MergeDirect did, if the block is as it wrote
// it.
func (d *document) undo(in []Entry) (splice, bool) {
	begin, end := d.marks[0], d.marks[1]
	nl := "\n"
	if bytes.HasPrefix(d.text[begin.end:], []byte("\r\n")) {
		nl = "\r\n"
	}
	b := block(begin.form, in, nl)
	s := splice{span: span{begin.start, end.end}}
	if begin.form == withFile {
		return splice{span: span{0, len(d.text)}}, bytes.Equal(d.text, b)
	}
	if !bytes.Equal(d.text[s.start:s.end], b) {
		return splice{}, false
	}
	if begin.form == inClosed && s.start == d.open.end && s.end == d.close.start && string(d.text[s.end:d.close.end]) == "</direct>" {
		s = splice{span{s.start - 1, d.close.end}, "/>"}
	}
	return s, true
}

// line is the part to cut, with its line if it has one to itself.
func (d *document) line(s span) splice {
	start, end := s.start, s.end
	for start > 0 && (d.text[start-1] == ' ' || d.text[start-1] == '\t') {
		start--
	}
	for end < len(d.text) && (d.text[end] == ' ' || d.text[end] == '\t' || d.text[end] == '\r') {
		end++
	}
	if start > 0 && d.text[start-1] == '\n' && end < len(d.text) && d.text[end] == '\n' {
		return splice{span: span{start, end + 1}}
	}
	return splice{span: s}
}
