package persist

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// DirectError says where a direct.xml holds what cannot be read or must not be edited.
type DirectError struct {
	Line, Column int // counted from 1; the column in characters
	What         string
}

func (e *DirectError) Error() string {
	return fmt.Sprintf("direct.xml line %d, column %d: %s", e.Line, e.Column, e.What)
}

// span is a part of the text.
type span struct{ start, end int }

// document is a direct.xml with the places of its parts.
type document struct {
	text                 []byte
	rooted               bool
	open                 span // the start tag of the root
	close                span // its end tag; empty in <direct/>
	entries              []Entry
	first                map[chain]int // where the first rule of a chain starts
	marks                []mark
	at, lines, lineStart int // how far lines are counted
}

// mark is a comment of ours.
type mark struct {
	span
	form form // 0 for the end
}

// bom may stand in front of a text in UTF-8.
const bom = "\ufeff"

func (d *document) fault(at int, format string, args ...any) error {
	line, column := d.position(at)
	return &DirectError{line, column, fmt.Sprintf(format, args...)}
}

// position is the line and the column, from 1, of a byte; it goes on from the one before.
func (d *document) position(at int) (line, column int) {
	if at < d.at {
		d.at, d.lines, d.lineStart = 0, 0, 0
	}
	for i, c := range d.text[d.at:at] {
		if c == '\n' {
			d.lines++
			d.lineStart = d.at + i + 1
		}
	}
	d.at = at
	return 1 + d.lines, 1 + utf8.RuneCount(d.text[d.lineStart:at])
}

// The attributes of each element, all of which it must have (firewalld.direct(5)).
var attributes = map[string][]string{
	"direct":      {},
	"chain":       {"ipv", "table", "chain"},
	"rule":        {"ipv", "table", "chain", "priority"},
	"passthrough": {"ipv"},
}

var ipTables = []string{"security", "raw", "mangle", "nat", "filter"}

// The tables of each ipv (firewall/core/ipXtables.py and ebtables.py, BUILT_IN_CHAINS).
var tablesOf = map[string][]string{"ipv4": ipTables, "ipv6": ipTables, "eb": {"broute", "nat", "filter"}}

// parse reads a direct.xml. What makes firewalld load none of its entries is an error.
func parse(text []byte) (*document, error) {
	d := &document{text: text, first: map[chain]int{}}
	skip := 0
	if bytes.HasPrefix(text, []byte(bom)) {
		skip = len(bom)
	}
	x := xml.NewDecoder(bytes.NewReader(text[skip:]))
	x.CharsetReader = func(charset string, r io.Reader) (io.Reader, error) {
		switch strings.ToLower(charset) {
		case "utf8", "us-ascii", "ascii":
			return r, nil
		}
		return nil, errors.New("it is not in UTF-8")
	}
	var entry *Entry
	var content strings.Builder
	depth := 0
	for {
		start := skip + int(x.InputOffset())
		token, err := x.Token()
		end := skip + int(x.InputOffset())
		if err == io.EOF {
			return d, nil
		}
		if err != nil {
			what := err.Error()
			if syntax, ok := errors.AsType[*xml.SyntaxError](err); ok {
				what = syntax.Msg
			}
			return nil, d.fault(end, "not XML that firewalld reads: %s", what)
		}
		switch token := token.(type) {
		case xml.ProcInst:
			if token.Target == "xml" && start != skip {
				return nil, d.fault(start, "an XML declaration stands first in a file")
			}
		case xml.Directive:
			if d.rooted || bytes.IndexByte(token, '[') >= 0 {
				return nil, d.fault(start, "a document type with declarations is not read here")
			}
		case xml.Comment:
			if f, ours := markForm(string(token)); ours {
				d.marks = append(d.marks, mark{span{start, end}, f})
			}
		case xml.CharData:
			if entry != nil {
				content.Write(token)
			} else if depth == 0 && len(bytes.TrimSpace(token)) > 0 {
				return nil, d.fault(start, "text outside of the element direct")
			}
		case xml.StartElement:
			depth++
			if err := d.startElement(token, start, depth); err != nil {
				return nil, err
			}
			if depth == 1 {
				d.rooted, d.open = true, span{start, end}
				continue
			}
			if entry, err = d.entry(token, start); err != nil {
				return nil, err
			}
			content.Reset()
		case xml.EndElement:
			depth--
			if depth == 0 {
				d.close = span{start, end}
				continue
			}
			entry.end = end
			if entry.Kind != ChainEntry {
				// firewalld does it with the parsed text.
				entry.Args, err = splitArgs(strings.ReplaceAll(content.String(), "\n", " "))
				if err != nil {
					return nil, d.fault(entry.start, "the arguments of this %s cannot be split: %v", entry.Kind, err)
				}
			}
			if _, ok := d.first[chainOf(*entry)]; !ok && entry.Kind == RuleEntry {
				d.first[chainOf(*entry)] = entry.start
			}
			d.entries = append(d.entries, *entry)
			entry = nil
		}
	}
}

func (d *document) startElement(e xml.StartElement, start, depth int) error {
	name := e.Name.Local
	known, ok := attributes[name]
	switch {
	case e.Name.Space != "" || !ok:
		return d.fault(start, "unknown element %q: known are direct, chain, rule and passthrough", name)
	case depth == 1 && name != "direct":
		return d.fault(start, "the root is %q, and that of a direct.xml is direct", name)
	case depth == 1 && d.rooted:
		return d.fault(start, "a second root")
	case depth == 2 && name == "direct", depth > 2:
		return d.fault(start, "element %q within another", name)
	}
	for i, a := range e.Attr {
		if a.Name.Space != "" || !slices.Contains(known, a.Name.Local) {
			return d.fault(start, "unknown attribute %q of %s", a.Name.Local, name)
		}
		if slices.ContainsFunc(e.Attr[:i], func(b xml.Attr) bool { return b.Name == a.Name }) {
			return d.fault(start, "attribute %q of %s stands twice", a.Name.Local, name)
		}
	}
	for _, k := range known {
		if !slices.ContainsFunc(e.Attr, func(a xml.Attr) bool { return a.Name.Local == k }) {
			return d.fault(start, "%s has no attribute %s", name, k)
		}
	}
	return nil
}

func (d *document) entry(e xml.StartElement, start int) (*Entry, error) {
	out := &Entry{Kind: EntryKind(e.Name.Local), span: span{start: start}}
	out.Line, out.Column = d.position(start)
	for _, a := range e.Attr {
		switch a.Name.Local {
		case "ipv":
			out.IPv = a.Value
		case "table":
			out.Table = a.Value
		case "chain":
			out.Chain = a.Value
		case "priority":
			n, err := priority(a.Value)
			if err != nil {
				return nil, d.fault(start, "priority %q is no number", a.Value)
			}
			out.Priority = n
		}
	}
	tables, ok := tablesOf[out.IPv]
	if !ok {
		return nil, d.fault(start, "ipv %q: accepted are ipv4, ipv6 and eb", out.IPv)
	}
	if out.Kind != PassthroughEntry && !slices.Contains(tables, out.Table) {
		return nil, d.fault(start, "table %q: accepted for %s are %s", out.Table, out.IPv, strings.Join(tables, ", "))
	}
	return out, nil
}

// priority reads a number as int of Python does, as far as such files have it.
func priority(s string) (int, error) {
	s = strings.TrimSpace(s)
	if strings.HasPrefix(s, "_") || strings.HasSuffix(s, "_") || strings.Contains(s, "__") {
		return 0, strconv.ErrSyntax
	}
	return strconv.Atoi(strings.ReplaceAll(s, "_", ""))
}

var escaped = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;")

// appendXML writes an entry of ours as an element.
func (e Entry) appendXML(b []byte) []byte {
	b = fmt.Appendf(b, `<%s ipv="%s" table="%s" chain="%s"`, e.Kind, e.IPv, escaped.Replace(e.Table), escaped.Replace(e.Chain))
	if e.Kind == ChainEntry {
		return append(b, "/>"...)
	}
	return fmt.Appendf(b, ` priority="%d">%s</rule>`, e.Priority, escaped.Replace(joinArgs(e.Args)))
}
