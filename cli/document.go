package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// Bounds of a text. A configuration has 60 keys in objects four deep, and a list
// of ports 65535 entries; what goes beyond is something else, or hostile.
const (
	maxDocument = 1 << 20 // bytes
	maxDepth    = 20
	maxValues   = 200_000 // with those that aliases repeat; 16 bytes of text count as one
	maxFaults   = 1000
	maxLines    = 10_000 // whose places are kept
)

// value is a value of a document, and where it stands.
type value struct {
	line    int
	text    string          // of a scalar, as it stands there
	json    json.RawMessage // of a scalar
	old     json.RawMessage // true or false for a word that YAML 1.1 takes for one, such as yes
	object  bool
	members []member
	named   map[string]int // the place of each member
	list    bool
	items   []*value
	bad     bool // there is a fault of it already, and nothing more to say
}

type member struct {
	name  string
	line  int
	value *value
}

var null = json.RawMessage("null")

// badAt stands for a value of which there is a fault.
func badAt(line int) *value { return &value{line: line, json: null, bad: true} }

// document reads a text of JSON or YAML. The faults are those of the text; what
// its keys mean is not looked at. The value is nil for a text without any.
func document(name string, text []byte) (*value, []tproxy.ConfigFault) {
	r := &documentReader{name: name, left: maxValues, open: map[*yaml.Node]bool{}}
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	switch {
	case len(text) > maxDocument:
		r.whole(1, fmt.Sprintf("%d bytes", len(text)), "is too long", fmt.Sprintf("at most %d bytes", maxDocument))
	case !utf8.Valid(text):
		r.notUTF8(text)
	case json.Valid(text):
		return r.readJSON(text)
	default:
		return r.readYAML(text)
	}
	return nil, r.faults
}

type documentReader struct {
	name   string
	faults []tproxy.ConfigFault
	left   int                 // values that may still be read
	open   map[*yaml.Node]bool // those that are being read
}

func (r *documentReader) fault(line int, path, value, what, accepted string) {
	if len(r.faults) < maxFaults {
		r.faults = append(r.faults, tproxy.ConfigFault{
			Source: fmt.Sprintf("%s:%d", r.name, line), Path: short(path), Value: short(value), What: what, Accepted: accepted})
	}
}

// whole notes a fault of the text, and not of a key.
func (r *documentReader) whole(line int, value, what, accepted string) {
	r.fault(line, "", value, what, accepted)
}

// short is a text as it stands in an error: nothing longer than a line.
func short(s string) string { return cut(s, 60) }

func cut(s string, most int) string {
	if c := []rune(s); len(c) > most {
		return string(c[:most]) + "..."
	}
	return s
}

func (r *documentReader) notUTF8(text []byte) {
	line := 1
	for l := range bytes.Lines(text) {
		if !utf8.Valid(l) {
			r.whole(line, strings.TrimSpace(string(l)), "is not UTF-8", "YAML or JSON in UTF-8")
			return
		}
		line++
	}
}

// enter counts a value, or a key, and reports whether it may be read. That it may
// not is said once.
func (r *documentReader) enter(line, depth int, path, text string) bool {
	switch {
	case r.left <= 0:
		return false
	case depth > maxDepth:
		r.left = 0
		r.fault(line, path, strconv.Itoa(depth), "objects within each other are too many", fmt.Sprintf("at most %d", maxDepth))
		return false
	}
	if r.left -= 1 + len(text)/16; r.left <= 0 {
		r.fault(line, path, strconv.Itoa(maxValues), "values and more are too many", "fewer, also where aliases repeat them")
		return false
	}
	return true
}

// joined is the path of a member. A name longer than any key's is cut off, so
// that a path stays one.
func joined(path, name string) string {
	if path == "" {
		return short(name)
	}
	return path + "." + short(name)
}

// add adds a member unless there is one of its name, and reports whether it did.
func (v *value) add(m member) (first member, added bool) {
	if i, ok := v.named[m.name]; ok {
		return v.members[i], false
	}
	if v.named == nil {
		v.named = map[string]int{}
	}
	v.named[m.name] = len(v.members)
	v.members = append(v.members, m)
	return m, true
}

// add adds a member that must be the only one of its name.
func (r *documentReader) add(v *value, path string, m member) {
	if first, added := v.add(m); !added {
		r.fault(m.line, path, m.value.quoted(), fmt.Sprintf("is given twice, first in line %d", first.line), "a key once")
	}
}

// quoted is the value as an error quotes it.
func (v *value) quoted() string {
	switch {
	case v.object:
		return "{...}"
	case v.list:
		return "[...]"
	}
	return v.text
}

// readJSON reads text that is JSON. YAML's reader would not do: JSON may be
// indented with tabs.
func (r *documentReader) readJSON(text []byte) (*value, []tproxy.ConfigFault) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	line, counted := 1, int64(0)
	at := func() int {
		line += bytes.Count(text[counted:d.InputOffset()], []byte("\n"))
		counted = d.InputOffset()
		return line
	}
	var read func(path string, depth int) *value
	read = func(path string, depth int) *value {
		token, err := d.Token()
		v := &value{line: at()}
		if err != nil || !r.enter(v.line, depth, path, "") {
			return badAt(v.line)
		}
		switch token {
		case json.Delim('{'):
			v.object = true
			for d.More() && r.left > 0 {
				token, _ := d.Token()
				name, _ := token.(string)
				m := member{name: name, line: at()}
				m.value = read(joined(path, name), depth+1)
				r.add(v, joined(path, name), m)
			}
			_, _ = d.Token()
		case json.Delim('['):
			v.list = true
			for d.More() && r.left > 0 {
				v.items = append(v.items, read(path, depth+1))
			}
			_, _ = d.Token()
		default:
			v.json, _ = json.Marshal(token) // it came from JSON
			v.text = fmt.Sprint(token)
		}
		return v
	}
	v := read("", 0)
	return v, r.faults
}

// syntax is what YAML's reader says of a text that is none.
var syntax = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)

func (r *documentReader) readYAML(text []byte) (v *value, _ []tproxy.ConfigFault) {
	d := yaml.NewDecoder(bytes.NewReader(text))
	for n := 0; ; n++ {
		var doc yaml.Node
		err := d.Decode(&doc)
		switch {
		case errors.Is(err, io.EOF):
			return v, r.faults
		case err != nil:
			r.notYAML(text, err)
			return nil, r.faults
		case len(doc.Content) == 0:
		case n == 0:
			v = r.node(doc.Content[0], "", 0)
		case doc.Content[0].Value != "" || doc.Content[0].Kind != yaml.ScalarNode: // not only a last ---
			r.whole(doc.Content[0].Line, "---", "begins a second document", "one document")
			return nil, r.faults
		}
	}
}

func (r *documentReader) notYAML(text []byte, err error) {
	line, what := 1, err.Error()
	if m := syntax.FindStringSubmatch(what); m != nil {
		what = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil {
			line = n
			// Errors of its parser count lines from 0 (parser.fail in decode.go).
			if strings.HasPrefix(what, "did not find expected ") {
				line++
			}
		}
	}
	lines := strings.Split(string(text), "\n")
	line = min(line, len(lines)) // it can be the one behind the last
	value := strings.TrimSpace(lines[line-1])
	r.whole(line, value, "is no YAML ("+what+")", "YAML or JSON")
}

// node makes a value of a node of YAML.
func (r *documentReader) node(n *yaml.Node, path string, depth int) *value {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	v := &value{line: n.Line}
	if r.open[n] {
		r.fault(n.Line, path, "&"+n.Anchor, "holds itself", "an alias of another value")
		return badAt(n.Line)
	}
	if !r.enter(n.Line, depth, path, n.Value) {
		return badAt(n.Line)
	}
	if n.Style&yaml.TaggedStyle != 0 && !slices.Contains([]string{"!!str", "!!int", "!!float", "!!bool", "!!null", "!!map", "!!seq"}, n.ShortTag()) {
		r.fault(n.Line, path, n.Tag, "is a tag that has no meaning here", "a value without a tag")
		return badAt(n.Line)
	}
	r.open[n] = true
	defer delete(r.open, n)
	switch n.Kind {
	case yaml.MappingNode:
		v.object = true
		r.mapping(v, n, path, depth)
	case yaml.SequenceNode:
		v.list = true
		for _, item := range n.Content {
			v.items = append(v.items, r.node(item, path, depth+1))
		}
	default:
		r.scalar(v, n, path)
	}
	return v
}

// mapping reads the members of an object, and behind them those that are merged
// into it (yaml.org/type/merge.html): its own win, and earlier ones.
func (r *documentReader) mapping(v *value, n *yaml.Node, path string, depth int) {
	merged := -1
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		if k.Kind == yaml.AliasNode {
			k = k.Alias
		}
		switch {
		case !r.enter(k.Line, depth, path, k.Value):
			return
		case k.Kind != yaml.ScalarNode:
			r.fault(k.Line, joined(path, "?"), "?", "is a key that is no text", "a key of the configuration")
		case k.ShortTag() == "!!merge" && merged >= 0:
			r.fault(k.Line, joined(path, "<<"), "<<", fmt.Sprintf("is given twice, first in line %d", n.Content[merged].Line), "a key once")
		case k.ShortTag() == "!!merge":
			merged = i
		default:
			at := joined(path, k.Value)
			r.add(v, at, member{k.Value, k.Line, r.node(n.Content[i+1], at, depth+1)})
		}
	}
	if merged >= 0 {
		r.merge(v, n.Content[merged+1], path, depth)
	}
}

func (r *documentReader) merge(v *value, n *yaml.Node, path string, depth int) {
	from := []*yaml.Node{n}
	if n.Kind == yaml.SequenceNode {
		from = n.Content
	}
	for _, n := range from {
		m := r.node(n, path, depth+1)
		switch {
		case m.object:
		case m.bad:
			continue
		default:
			r.fault(n.Line, joined(path, "<<"), m.quoted(), "is no object", "an alias of an object, or a list of them")
			continue
		}
		for _, own := range m.members {
			v.add(own)
		}
	}
}

var decimal = regexp.MustCompile(`^(0|-?[1-9][0-9]*)$`)

// oldBooleans are the words that YAML 1.1, and so Kuma, takes for booleans
// (yaml.org/type/bool.html), beside true and false.
var oldBooleans = map[string]json.RawMessage{
	"y": json.RawMessage("true"), "yes": json.RawMessage("true"), "on": json.RawMessage("true"), "true": json.RawMessage("true"),
	"n": json.RawMessage("false"), "no": json.RawMessage("false"), "off": json.RawMessage("false"), "false": json.RawMessage("false"),
}

// oldBoolean returns nil for what is none, such as yEs.
func oldBoolean(s string) json.RawMessage {
	lower := strings.ToLower(s)
	if s != "" && s != lower && s != strings.ToUpper(s) && s != strings.ToUpper(s[:1])+lower[1:] {
		return nil
	}
	return oldBooleans[lower]
}

func (r *documentReader) scalar(v *value, n *yaml.Node, path string) {
	v.text, v.json = n.Value, null
	plain := n.Style&^yaml.FlowStyle == 0 // neither quoted nor with a tag
	switch n.ShortTag() {
	case "!!null":
	case "!!bool":
		if b := oldBoolean(n.Value); b != nil {
			v.json = b
		} else {
			v.bad = true
			r.fault(n.Line, path, n.Value, "is no boolean", "true or false")
		}
	case "!!int", "!!float":
		// 017 is fifteen to some and seventeen to others, and 0x11 and 1_7 are what
		// nobody writes on purpose.
		if decimal.MatchString(n.Value) {
			v.json = json.RawMessage(n.Value)
		} else {
			v.bad = true
			r.fault(n.Line, path, n.Value, "is not written as a whole number", "decimal digits without a zero in front, or text in quotes")
		}
	default:
		v.json, _ = json.Marshal(n.Value) // it is UTF-8
		if plain {
			v.old = oldBoolean(n.Value)
		}
	}
}

// encode writes the value as JSON. booleans are the paths at which a word of
// YAML 1.1 stands for true or false.
func (v *value) encode(b *bytes.Buffer, path string, booleans map[string]bool) {
	switch {
	case v.object:
		b.WriteByte('{')
		for i, m := range v.members {
			if i > 0 {
				b.WriteByte(',')
			}
			name, _ := json.Marshal(m.name) // it is UTF-8
			b.Write(name)
			b.WriteByte(':')
			m.value.encode(b, joined(path, m.name), booleans)
		}
		b.WriteByte('}')
	case v.list:
		v.encodeList(b, path)
	case v.old != nil && booleans[path]:
		b.Write(v.old)
	default:
		b.Write(v.json)
	}
}

// encodeList leaves out entries of which there is a fault already.
func (v *value) encodeList(b *bytes.Buffer, path string) {
	good := slices.DeleteFunc(slices.Clone(v.items), func(item *value) bool { return item.bad })
	if len(good) == 0 && len(v.items) > 0 {
		b.Write(null)
		return
	}
	b.WriteByte('[')
	for i, item := range good {
		if i > 0 {
			b.WriteByte(',')
		}
		item.encode(b, path, nil)
	}
	b.WriteByte(']')
}

// lines is where each path of the document stands: a key's line, and the value.
func (v *value) lines(path string, out map[string]member) {
	for _, m := range v.members {
		if len(out) > maxLines {
			return
		}
		at := joined(path, m.name)
		out[at] = m
		m.value.lines(at, out)
	}
}

// lineOf is the line of a text in a value: that of the entry of a list that holds
// it, else the value's own.
func (m member) lineOf(text string) int {
	for _, same := range []func(a, b string) bool{func(a, b string) bool { return a == b }, strings.Contains} {
		for _, item := range m.value.items {
			if text != "" && same(item.text, text) {
				return item.line
			}
		}
	}
	if m.value.line > 0 && !m.value.object && !m.value.list {
		return m.value.line
	}
	return m.line
}
