package tproxy

import (
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Record is what the rules themselves do not show of an install. It stands in the
// comments of a chain that nothing jumps to, so that no packet pays for it and no
// file can disagree with the rules, in the rules of each family.
type Record struct {
	// Version is that of the program that installed, empty where it is not known.
	Version string
	// PassthroughAddressOurs is whether we put ::6 on lo, so that uninstall takes it
	// away again.
	PassthroughAddressOurs bool
	// Bare says that the kernel has no comments (xt_comment): the record then holds
	// PassthroughAddressOurs alone.
	Bare bool

	config string   // what the rules do not show of the Config, as JSON
	shown  []string // the lists that the rules show, and the record does not hold
	sum    string   // of the whole Config
}

// ErrNoRecord says that there is no record: nothing of ours is installed, or what is
// there is Kuma's, or half of an install.
var ErrNoRecord = errors.New("the rules hold no record of an install")

// RecordError says that there is a record that cannot be read, or that is not about
// the rules around it.
type RecordError struct{ What string }

func (e *RecordError) Error() string { return "the record of the install " + e.What }

const (
	// The comments bear Kuma's prefix: its own uninstall refuses chains of ours
	// without any comment of its kind, as --disable-comments would leave them.
	recordMark    = commentPrefix + "kuma-tproxy "
	recordFormat  = "1"
	recordAddress = "::6=ours"

	// chunk is how much of a record one comment holds, in bytes: with the mark, the
	// format and the number it stays below the 128 that nftables takes in a comment
	// (NFTNL_UDATA_COMMENT_MAXLEN), and the 255 of iptables.
	chunk = 76
)

// unrecorded are the keys that are about a run, and not about what is installed.
var unrecorded = []string{"wait", "waitInterval", "retry.maxRetries", "retry.sleepBetweenRetries"}

// longList is from how many bytes on a list is not held by the record too, where the
// rules show it. One that the record holds is known also when somebody changed the
// rules, and then which of them can be told.
const longList = 256

// The lists that the rules show, so that a long one is not held twice.
var listed = []struct {
	path string
	same func(c, d *Config) bool
	take func(c, from *Config)
}{
	{"redirect.inbound.excludePorts",
		func(c, d *Config) bool { return c.Inbound.ExcludePorts.Equal(d.Inbound.ExcludePorts) },
		func(c, from *Config) { c.Inbound.ExcludePorts = from.Inbound.ExcludePorts }},
	{"redirect.inbound.excludePortsForIPs",
		func(c, d *Config) bool {
			return visible(c.Inbound.ExcludeIPs) && slices.Equal(c.Inbound.ExcludeIPs, d.Inbound.ExcludeIPs)
		},
		func(c, from *Config) { c.Inbound.ExcludeIPs = from.Inbound.ExcludeIPs }},
	{"redirect.outbound.excludePorts",
		func(c, d *Config) bool { return c.Outbound.ExcludePorts.Equal(d.Outbound.ExcludePorts) },
		func(c, from *Config) { c.Outbound.ExcludePorts = from.Outbound.ExcludePorts }},
	{"redirect.outbound.excludePortsForIPs",
		func(c, d *Config) bool {
			return visible(c.Outbound.ExcludeIPs) && slices.Equal(c.Outbound.ExcludeIPs, d.Outbound.ExcludeIPs)
		},
		func(c, from *Config) { c.Outbound.ExcludeIPs = from.Outbound.ExcludeIPs }},
}

// visible reports whether every one of the addresses is listed by the kernel: of all
// addresses nothing is.
func visible(list []netip.Prefix) bool {
	return !slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Bits() == 0 })
}

// WithRecord returns the plan's rules with another record in them, which also holds
// the plan's Config.
func (p *Plan) WithRecord(rec Record) rules.Set {
	s := p.Rules
	s.Chains = slices.Clone(p.Rules.Chains)
	for i := range s.Chains {
		if s.Chains[i].Table == rules.NAT && s.Chains[i].Name == chainRecord {
			s.Chains[i].Rules = rec.of(p).rules()
		}
	}
	return s
}

// of completes the record with the plan's Config.
func (r Record) of(p *Plan) Record {
	c := p.Config
	shows := shown(c, p.Rules)
	if len(p.Families) == 1 { // the rules name addresses of both families, and one gets them
		other := func(a netip.Prefix) bool { return a.Addr().Is4() != (p.Families[0] == rules.IPv4) }
		shows.Inbound.ExcludeIPs = slices.DeleteFunc(shows.Inbound.ExcludeIPs, other)
		shows.Outbound.ExcludeIPs = slices.DeleteFunc(shows.Outbound.ExcludeIPs, other)
	}
	values, err := c.values()
	if err != nil {
		panic(err) // a plan's Config is valid
	}
	r.shown = make([]string, 0, len(listed))
	for _, l := range listed {
		i := slices.IndexFunc(keys, func(k key) bool { return k.path == l.path })
		if len(values[i]) > longList && l.same(&c, &shows) {
			r.shown = append(r.shown, l.path)
		}
	}
	r.sum = sumOf(values)
	for i, k := range keys {
		if string(values[i]) == k.standard || slices.Contains(unrecorded, k.path) || slices.Contains(r.shown, k.path) {
			values[i] = nil
		}
	}
	r.config = ascii(document(values))
	return r
}

// sumOf is a checksum of all that a record and its rules say of a Config.
func sumOf(values [][]byte) string {
	var buf []byte
	for i, v := range values {
		if v != nil && !slices.Contains(unrecorded, keys[i].path) {
			buf = append(append(buf, keys[i].path...), v...)
		}
	}
	return fmt.Sprintf("%08x", crc32.ChecksumIEEE(buf))
}

// ascii writes what is not ASCII as JSON can: a comment holds bytes that print. So it
// does with an apostrophe: in a comment of nftables it stands for a quotation mark
// (rules.Set.Native).
func ascii(text []byte) string {
	if !slices.ContainsFunc(text, func(b byte) bool { return b >= 0x7f || b == '\'' }) {
		return string(text)
	}
	var b strings.Builder
	for _, r := range string(text) {
		if r < 0x7f && r != '\'' {
			b.WriteRune(r)
			continue
		}
		for _, u := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&b, `\u%04x`, u)
		}
	}
	return b.String()
}

// text is the record in words; the Config stands last.
func (r Record) text() string {
	var b strings.Builder
	b.Grow(128 + len(r.config))
	if r.PassthroughAddressOurs { // first: in one comment, whatever else is lost
		b.WriteString(recordAddress + " ")
	}
	if v := plainWord(r.Version); v != "" {
		b.WriteString("version=" + v + " ")
	}
	if len(r.shown) == len(listed) {
		b.WriteString("lists=rules ")
	} else if len(r.shown) > 0 {
		b.WriteString("lists=" + strings.Join(r.shown, ",") + " ")
	}
	b.WriteString("sum=")
	b.WriteString(r.sum)
	b.WriteString(" config=")
	b.WriteString(r.config)
	return b.String()
}

// plainWord leaves out of a version what would not stay one word.
func plainWord(s string) string {
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x7f || r == '"' || r == '\'' || r == '\\' {
			return -1
		}
		return r
	}, s[:min(len(s), 64)])
}

func (r Record) rules() []rules.Rule {
	if r.Bare {
		out := []rules.Rule{{Action: rules.Return{}}}
		if r.PassthroughAddressOurs {
			out = append(out, rules.Rule{Matches: []rules.Match{rules.Destination{Prefixes: passthrough[1:]}}, Action: rules.Return{}})
		}
		return out
	}
	text := r.text()
	n := (len(text) + chunk - 1) / chunk
	out := make([]rules.Rule, 0, n)
	for i := range n {
		part := text[i*chunk : min((i+1)*chunk, len(text))]
		why := recordMark + recordFormat + " " + strconv.Itoa(i+1) + "/" + strconv.Itoa(n) + " " + part
		out = append(out, rules.Rule{Action: rules.Return{}, Why: why, Record: true})
	}
	return out
}

// ReadRecord returns the record in what Find found in one family. The error is
// ErrNoRecord, or a *RecordError for one that this version cannot read; the Record
// then holds what could be read of it.
func ReadRecord(ours rules.Set) (Record, error) {
	chain, ok := ours.Chain(rules.NAT, chainRecord)
	if !ok {
		return Record{}, ErrNoRecord
	}
	var rec Record
	var text strings.Builder
	whole, count := true, 0
	for i, r := range chain.Rules {
		rest, marked := strings.CutPrefix(r.Why, recordMark)
		if !marked {
			if r.Why == "" && r.Action == rules.Action(rules.Return{}) {
				rec.Bare = true
				rec.PassthroughAddressOurs = rec.PassthroughAddressOurs || len(r.Matches) > 0
			}
			continue
		}
		format, rest, _ := strings.Cut(rest, " ")
		number, part, numbered := strings.Cut(rest, " ")
		if format != recordFormat {
			rec.PassthroughAddressOurs = rec.PassthroughAddressOurs || strings.Contains(r.Why, recordAddress)
			return rec, &RecordError{fmt.Sprintf("has the format %q of another version: this one reads %s", format, recordFormat)}
		}
		whole = whole && numbered && number == fmt.Sprintf("%d/%d", i+1, len(chain.Rules))
		text.WriteString(part)
		count++
	}
	switch {
	case count == 0 && rec.Bare:
		return rec, nil
	case count == 0:
		return rec, ErrNoRecord
	}
	err := rec.read(text.String())
	rec.Bare = false
	if !whole {
		err = &RecordError{"is not whole: comments are missing, or doubled"}
		rec.PassthroughAddressOurs = strings.Contains(text.String(), recordAddress)
	}
	return rec, err
}

// read takes the words of a record apart.
func (r *Record) read(text string) error {
	words, config, has := strings.Cut(text, "config=")
	r.config = config
	for w := range strings.FieldsSeq(words) {
		name, value, _ := strings.Cut(w, "=")
		switch {
		case w == recordAddress:
			r.PassthroughAddressOurs = true
		case name == "version":
			r.Version = value
		case name == "sum":
			r.sum = value
		case w == "lists=rules":
			for _, l := range listed {
				r.shown = append(r.shown, l.path)
			}
		case name == "lists":
			r.shown = strings.Split(value, ",")
		}
	}
	if !has || r.sum == "" {
		return &RecordError{"is cut off"}
	}
	return nil
}

// Installed returns the Config of an install, from the record in what Find found in
// each family and from the rules themselves. A family without rules is the zero Set.
// The error is that of ReadRecord, or a *RecordError where the rules are not those of
// the record.
func Installed(v4, v6 rules.Set) (Config, Record, error) {
	rec, err := ReadRecord(v4)
	if errors.Is(err, ErrNoRecord) {
		rec, err = ReadRecord(v6)
	}
	if err != nil {
		return Config{}, rec, err
	}
	if rec.Bare {
		return Config{}, rec, &RecordError{"holds no configuration: the kernel has no comments (xt_comment)"}
	}
	var c Config
	if _, err := (Decoder{}).Decode([]byte(rec.config), &c); err != nil {
		return Config{}, rec, &RecordError{fmt.Sprintf("holds a configuration that cannot be read: %v", err)}
	}
	// As Plan.Config has it: with every default filled in.
	c = c.canonical(Host{}, rules.UIDsOf(c.ProxyUIDs...))
	shows := shown(c, v4, v6)
	for _, l := range listed {
		if slices.Contains(rec.shown, l.path) {
			l.take(&c, &shows)
		}
	}
	if values, err := c.values(); err != nil || sumOf(values) != rec.sum {
		return Config{}, rec, &RecordError{"does not fit the rules beside it: somebody changed one of them"}
	}
	return c, rec, nil
}

// shown reads the lists of a Config off the rules that were made for it.
func shown(c Config, sets ...rules.Set) (out Config) {
	var inbound, outbound []rules.Ports
	for _, s := range sets {
		in, _ := s.Chain(rules.NAT, chainInbound)
		for i, r := range in.Rules {
			p, ok := partsOf(r)
			switch {
			case !ok || r.Action != rules.Action(rules.Return{}):
			case i == 0 && !c.Pod && !c.Inbound.CaptureSSH: // SSH
			case p.from:
				out.Inbound.ExcludeIPs = append(out.Inbound.ExcludeIPs, addressesOf(r)...)
			case p.ports:
				inbound = append(inbound, p.dport)
			}
		}
		o, _ := s.Chain(rules.NAT, chainOutbound)
		for i, r := range o.Rules {
			p, ok := partsOf(r)
			switch {
			case !ok || r.Action != rules.Action(rules.Return{}) || p.owned():
			case c.DNS.On() && i == len(o.Rules)-2: // DNS over TCP
			case p.to:
				out.Outbound.ExcludeIPs = append(out.Outbound.ExcludeIPs, addressesOf(r)...)
			case p.ports:
				outbound = append(outbound, p.dport)
			}
		}
	}
	out.Inbound.ExcludePorts = rules.Ports{}.Union(inbound...)
	out.Outbound.ExcludePorts = rules.Ports{}.Union(outbound...)
	out.Inbound.ExcludeIPs = canonicalPrefixes(out.Inbound.ExcludeIPs)
	out.Outbound.ExcludeIPs = canonicalPrefixes(out.Outbound.ExcludeIPs)
	return out
}

func addressesOf(r rules.Rule) (out []netip.Prefix) {
	for _, m := range r.Matches {
		switch m := m.(type) {
		case rules.Source:
			out = append(out, m.Prefixes...)
		case rules.Destination:
			out = append(out, m.Prefixes...)
		}
	}
	return out
}

// String says what an operator wants to know of a record.
func (r Record) String() string {
	if r.Version == "" {
		return "an unknown version"
	}
	return "version " + strconv.Quote(r.Version)
}

// ConfigChange is a key of the configuration that has another value in another Config.
type ConfigChange struct {
	Path    string // such as redirect.inbound.port
	Was, Is string // as JSON
}

func (c ConfigChange) String() string { return fmt.Sprintf("%s: %s, was %s", c.Path, c.Is, c.Was) }

// ConfigChanges lists what differs in Config now from what it was, in the order of the
// keys. What is about a run alone, such as the wait for a lock, is left out. Both have
// to be valid; those of a Plan and of Installed compare with each other.
func ConfigChanges(was, now Config) (out []ConfigChange) {
	a, err := was.values()
	b, err2 := now.values()
	if err != nil || err2 != nil {
		return nil
	}
	for i, k := range keys {
		if slices.Contains(unrecorded, k.path) || string(a[i]) == string(b[i]) {
			continue
		}
		c := ConfigChange{k.path, k.standard, k.standard}
		if a[i] != nil {
			c.Was = string(a[i])
		}
		if b[i] != nil {
			c.Is = string(b[i])
		}
		if c.Was != c.Is {
			out = append(out, c)
		}
	}
	return out
}
