package tproxy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// MarshalJSON writes the Config with Kuma v3's keys, in a fixed order:
//
//   - a key of Kuma's with its effective value, but a port, a wait, a retry and a
//     path of resolv.conf that are not set are left out: to Kuma and to us that is
//     the default, and what is read back is what was written;
//   - a key of ours (redirect.inbound.captureSSH, redirect.dns.redirectTCP, backend,
//     persist and those of resolv.conf) only where it is not at its default, so that Kuma
//     loads the rest.
//
// Besides keys of ours, Kuma does not load ranges of ports and more than one of
// ProxyUIDs. What the Config ignores is not written (ProxyUser beside
// ProxyUIDs); a number in ProxyUser is read back as ProxyUIDs, a negative Wait,
// MaxRetries or SleepBetweenRetries, which is Kuma's 0, as -1 s, -1 and -1 ns, and
// DNS.CaptureAll with DNS.Redirect beside it, which means the same: in Kuma's file
// captureAll counts only where DNS is enabled.
//
// The error is a *ConfigError: an invalid Config has no text.
func (c Config) MarshalJSON() ([]byte, error) {
	faults := c.faults()
	for _, k := range keys {
		if s, ok := k.value(&c).(string); ok && !utf8.ValidString(s) {
			faults = append(faults, ConfigFault{Path: k.path, Value: s, What: "is not UTF-8", Accepted: "text that JSON can hold"})
		}
	}
	if faults != nil {
		return nil, &ConfigError{faults}
	}
	values, err := c.values()
	if err != nil {
		return nil, err
	}
	return document(values), nil
}

// values are what stands behind each of the keys, in their order, as JSON; nil for one
// that is left out. The Config has no faults.
func (c Config) values() ([][]byte, error) {
	out := make([][]byte, len(keys))
	buf := make([]byte, 0, 512)
	for i := range keys {
		v := keys[i].value(&c)
		start := len(buf)
		switch v := v.(type) {
		case nil:
			continue
		case bool:
			buf = strconv.AppendBool(buf, v)
		case uint16:
			buf = strconv.AppendUint(buf, uint64(v), 10)
		case int64:
			buf = strconv.AppendInt(buf, v, 10)
		case string:
			buf = appendText(buf, v)
		case []string:
			buf = append(buf, '[')
			for j, e := range v {
				if j > 0 {
					buf = append(buf, ',')
				}
				buf = appendText(buf, e)
			}
			buf = append(buf, ']')
		default:
			text, err := json.Marshal(v)
			if err != nil {
				return nil, err
			}
			buf = append(buf, text...)
		}
		out[i] = buf[start:len(buf):len(buf)]
	}
	return out, nil
}

// appendText appends a text as encoding/json writes it, without its help where nothing
// has to be escaped.
func appendText(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			text, _ := json.Marshal(s) // a text has no error
			return append(b, text...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

// document writes the keys that have a value.
func document(values [][]byte) []byte {
	out := make([]byte, 1, 512)
	out[0] = '{'
	open := "" // the object that the last key stands in, with its dot
	for i, k := range keys {
		if values[i] == nil {
			continue
		}
		at := strings.LastIndexByte(k.path, '.') + 1
		group, name := k.path[:at], k.path[at:]
		for !strings.HasPrefix(group, open) {
			out = append(out, '}')
			open = open[:strings.LastIndexByte(open[:len(open)-1], '.')+1]
		}
		if out[len(out)-1] != '{' {
			out = append(out, ',')
		}
		for rest := group[len(open):]; rest != ""; {
			var g string
			g, rest, _ = strings.Cut(rest, ".")
			out = append(strconv.AppendQuote(out, g), ":{"...)
		}
		open = group
		out = append(append(strconv.AppendQuote(out, name), ':'), values[i]...)
	}
	for range strings.Count(open, ".") + 1 {
		out = append(out, '}')
	}
	return out
}

// UnmarshalJSON reads a configuration with Kuma v3's keys and ours over the
// Config: a key that is not there, or null, leaves its field as it was, and a
// list takes the place of the list before it. Types are those that Kuma takes.
//
// A key of Kuma's whose feature is not built yet is accepted at its default, and
// so are dryRun and verbose: a Config has no place for them, and to pass over a
// dryRun would be to write what somebody said not to write. A Decoder returns them.
//
// redirect.dns.captureAll without redirect.dns.enabled redirects nothing, as in
// Kuma; a Decoder warns of it.
//
// The error is that of encoding/json for text that is no JSON, and otherwise a
// *ConfigError with every fault of the text; the Config is then unchanged. What
// holds between several keys, Config.Validate says: they can come from several
// texts.
func (c *Config) UnmarshalJSON(text []byte) error {
	r := reader{config: *c}
	return r.text(text, c)
}

// A Decoder reads configurations as Config.UnmarshalJSON does, and tells what a
// Config has no place for. The zero Decoder is strict.
type Decoder struct {
	// AllowUnknown makes a warning of a key that is not known, where a
	// configuration can be newer than its reader: in a pod's kuma-init, for one.
	AllowUnknown bool
}

// Decoded is what a text says beside a Config.
type Decoded struct {
	Settings Settings
	// Warnings are what has no effect: with AllowUnknown the keys that are not
	// known, and redirect.dns.captureAll without redirect.dns.enabled.
	Warnings []ConfigFault
}

// Settings are those keys of Kuma's configuration that are about a run, and not
// about rules.
type Settings struct {
	DryRun  bool // only say what would be done
	Verbose bool // log every step
}

// Decode reads text over c, as Config.UnmarshalJSON does and with its errors; an
// error leaves c unchanged.
func (d Decoder) Decode(text []byte, c *Config) (Decoded, error) {
	var out Decoded
	r := reader{config: *c, settings: &out.Settings, allowUnknown: d.AllowUnknown}
	if err := r.text(text, c); err != nil {
		return Decoded{}, err
	}
	out.Warnings = r.warnings
	return out, nil
}

// Key is a key of the configuration, Kuma's or ours.
type Key struct {
	Path    string // such as redirect.inbound.port
	Kind    Kind
	Default string // as JSON
}

// Kind is what the value of a key is.
type Kind uint8

// The kinds of values.
const (
	Boolean Kind = iota
	Number       // a whole number
	Text
	List // a list of strings or numbers, or one string with commas in it
)

// Keys lists all keys, in the order in which they are written.
func Keys() []Key {
	out := make([]Key, len(keys))
	for i, k := range keys {
		out[i] = Key{k.path, k.kind, k.standard}
	}
	return out
}

// A key is one leaf of the configuration. The order of keys is that of the
// output; the keys of one object stand together.
type key struct {
	path     string
	kind     Kind
	standard string // the default, as JSON
	// value is what to write, nil for nothing.
	value func(*Config) any
	read  func(*reader, json.RawMessage) []ConfigFault // without the path
}

var keys = []key{
	field("kumaDPUser", Text, `""`, func(c *Config) *Config { return c }, writeUser, readUser),
	field("ipFamilyMode", Text, `"dualstack"`, func(c *Config) *IPFamilyMode { return &c.IPFamilyMode },
		func(m IPFamilyMode) any { return m.String() }, readName(ParseIPFamilyMode, "dualstack or ipv4")),

	field("redirect.inbound.enabled", Boolean, "true", func(c *Config) *bool { return &c.Inbound.Off }, writeNot, readNot),
	port("redirect.inbound.port", DefaultInboundPort, func(c *Config) *uint16 { return &c.Inbound.Port }),
	notYet("redirect.inbound.includePorts", List, "[]", `""`),
	ports("redirect.inbound.excludePorts", func(c *Config) *rules.Ports { return &c.Inbound.ExcludePorts }),
	{"redirect.inbound.excludePortsForUIDs", List, "[]", nothing,
		refuse("has no meaning: who sent a packet from another host is not known here", "[]", `""`)},
	prefixes("redirect.inbound.excludePortsForIPs", func(c *Config) *[]netip.Prefix { return &c.Inbound.ExcludeIPs }),
	notYet("redirect.inbound.insertRedirectInsteadOfAppend", Boolean, "false"),
	boolean("redirect.inbound.captureSSH", func(c *Config) *bool { return &c.Inbound.CaptureSSH }, writeTrue),

	field("redirect.outbound.enabled", Boolean, "true", func(c *Config) *bool { return &c.Outbound.Off }, writeNot, readNot),
	port("redirect.outbound.port", DefaultOutboundPort, func(c *Config) *uint16 { return &c.Outbound.Port }),
	notYet("redirect.outbound.includePorts", List, "[]", `""`),
	ports("redirect.outbound.excludePorts", func(c *Config) *rules.Ports { return &c.Outbound.ExcludePorts }),
	field("redirect.outbound.excludePortsForUIDs", List, "[]", func(c *Config) *[]UIDExclusion { return &c.Outbound.ExcludePortsForUIDs },
		writeList[UIDExclusion], readExclusions),
	prefixes("redirect.outbound.excludePortsForIPs", func(c *Config) *[]netip.Prefix { return &c.Outbound.ExcludeIPs }),
	notYet("redirect.outbound.insertRedirectInsteadOfAppend", Boolean, "false"),

	field("redirect.dns.enabled", Boolean, "false", func(c *Config) *DNS { return &c.DNS }, func(d DNS) any { return d.On() },
		func(d *DNS, raw json.RawMessage) []ConfigFault { return readBool(&d.Redirect, raw) }),
	boolean("redirect.dns.captureAll", func(c *Config) *bool { return &c.DNS.CaptureAll }, write[bool]),
	port("redirect.dns.port", DefaultDNSPort, func(c *Config) *uint16 { return &c.DNS.Port }),
	boolean("redirect.dns.skipConntrackZoneSplit", func(c *Config) *bool { return &c.DNS.SkipConntrackZoneSplit }, write[bool]),
	field("redirect.dns.resolvConfigPath", Text, strconv.Quote(DefaultResolvConf), func(c *Config) *string { return &c.DNS.ResolvConf },
		writeSet, readString("a path")),
	field("redirect.dns.controlPlaneIP", Text, `""`, func(c *Config) *netip.Addr { return &c.DNS.ControlPlane }, writeAddress, readAddress),
	boolean("redirect.dns.modifySharedResolvConfig", func(c *Config) *bool { return &c.DNS.ModifyShared }, writeTrue),
	boolean("redirect.dns.redirectTCP", func(c *Config) *bool { return &c.DNS.RedirectTCP }, writeTrue),
	notYet("redirect.vnet.networks", List, "[]", `""`),

	// Kuma had them from 2.9 to 2.12, and wrote them all, whether enabled or not.
	{"ebpf.enabled", Boolean, "false", nothing, refuse("is not supported: there are iptables rules alone, as in Kuma by now", "false")},
	unused("ebpf.instanceIP"),
	unused("ebpf.instanceIPEnvVarName"),
	unused("ebpf.bpffsPath"),
	unused("ebpf.cgroupPath"),
	unused("ebpf.programsSourcePath"),
	unused("ebpf.tcAttachIface"),

	notYet("dropInvalidPackets", Boolean, "false"),
	notYet("log.enabled", Boolean, "false"),
	notYet("log.level", Number, "7"),
	field("wait", Number, "5", func(c *Config) *time.Duration { return &c.Wait }, writeWait, readWait),
	field("waitInterval", Number, "0", func(c *Config) *time.Duration { return &c.WaitInterval },
		func(d time.Duration) any { return d.Microseconds() }, readInterval),
	field("retry.maxRetries", Number, strconv.Itoa(DefaultMaxRetries), func(c *Config) *int { return &c.MaxRetries }, writeRetries, readRetries),
	field("retry.sleepBetweenRetries", Text, strconv.Quote(DefaultSleepBetweenRetries.String()),
		func(c *Config) *time.Duration { return &c.SleepBetweenRetries }, writeSleep, readSleep),
	// Kuma's word for one of the ways of persist, which is read behind it (see
	// reader.persistence). Left out where it is false: the sum of a record that an earlier
	// version wrote is one without it.
	{"storeFirewalld", Boolean, "false", func(c *Config) any { return writeTrue(c.Persist == PersistFirewalld) },
		func(r *reader, raw json.RawMessage) []ConfigFault {
			r.stores = new(bool)
			return readBool(r.stores, raw)
		}},
	// Kuma's Helm chart writes all of them, empty.
	notYet("iptablesExecutables.iptables", Text, `""`),
	notYet("iptablesExecutables.iptables-save", Text, `""`),
	notYet("iptablesExecutables.iptables-restore", Text, `""`),
	notYet("iptablesExecutables.ip6tables", Text, `""`),
	notYet("iptablesExecutables.ip6tables-save", Text, `""`),
	notYet("iptablesExecutables.ip6tables-restore", Text, `""`),
	boolean("comments.disabled", func(c *Config) *bool { return &c.DisableComments }, write[bool]),
	setting("verbose", func(s *Settings) *bool { return &s.Verbose }),
	setting("dryRun", func(s *Settings) *bool { return &s.DryRun }),
	boolean("cniMode", func(c *Config) *bool { return &c.Pod }, write[bool]),
	field("backend", Text, `"auto"`, func(c *Config) *Backend { return &c.Backend }, writeBackend,
		readName(ParseBackend, "auto, nftables, iptables-nft or iptables-legacy")),
	{"persist", Text, `"auto"`, func(c *Config) any { return writePersist(c.Persist) }, func(r *reader, raw json.RawMessage) []ConfigFault {
		r.persist = new(Persist)
		return readName(ParsePersist, acceptedPersist)(r.persist, raw)
	}},
}

// field makes a key of a field of the Config.
func field[T any](path string, kind Kind, standard string, of func(*Config) *T, write func(T) any, read func(*T, json.RawMessage) []ConfigFault) key {
	return key{path, kind, standard,
		func(c *Config) any { return write(*of(c)) },
		func(r *reader, raw json.RawMessage) []ConfigFault { return read(of(&r.config), raw) }}
}

// boolean makes a key of a field that is false unless it is set.
func boolean(path string, of func(*Config) *bool, write func(bool) any) key {
	return field(path, Boolean, "false", of, write, readBool)
}

func port(path string, standard uint16, of func(*Config) *uint16) key {
	return field(path, Number, strconv.Itoa(int(standard)), of, writeSet, func(p *uint16, raw json.RawMessage) []ConfigFault {
		return readNumber(raw, 1, rules.MaxPort, "a port from 1 to 65535", func(n int64) { *p = uint16(n) })
	})
}

func ports(path string, of func(*Config) *rules.Ports) key {
	const accepted = "a port from 1 to 65535, a range such as 80-90, or a list of them"
	return field(path, List, "[]", of, write, func(p *rules.Ports, raw json.RawMessage) []ConfigFault {
		var entries []string
		faults := eachEntry(raw, ",", true, accepted, func(e string) error {
			_, err := rules.ParsePorts(e)
			entries = append(entries, e)
			return err
		})
		*p, _ = rules.ParsePorts(strings.Join(entries, ",")) // its errors are faults already
		return faults
	})
}

func prefixes(path string, of func(*Config) *[]netip.Prefix) key {
	return field(path, List, "[]", of, writeList[netip.Prefix], func(list *[]netip.Prefix, raw json.RawMessage) []ConfigFault {
		*list = nil
		return eachEntry(raw, ",", false, acceptedPrefix, func(e string) error {
			p, err := parsePrefix(e)
			*list = append(*list, p)
			return err
		})
	})
}

// setting makes a key that is about a run.
func setting(path string, of func(*Settings) *bool) key {
	return key{path, Boolean, "false", nothing, func(r *reader, raw json.RawMessage) []ConfigFault {
		var v bool
		if faults := readBool(&v, raw); faults != nil {
			return faults
		}
		if r.settings != nil {
			*of(r.settings) = v
		} else if v {
			return bad(raw, "is about a run, for which a Config has no place", "the default, false, or a Decoder, which returns it")
		}
		return nil
	}}
}

// notYet makes a key of Kuma's whose feature is not built yet: it has to be at
// its default, of which there can be several spellings.
func notYet(path string, kind Kind, defaults ...string) key {
	read := refuse("is known, not supported yet", defaults...)
	return key{path, kind, defaults[0], nothing, func(r *reader, raw json.RawMessage) []ConfigFault {
		faults := read(r, raw)
		for i := range faults {
			faults[i].NotYet = true
		}
		return faults
	}}
}

// unused makes a key of text that nothing asks for any more.
func unused(path string) key {
	return key{path, Text, `""`, nothing, func(_ *reader, raw json.RawMessage) []ConfigFault {
		return readString("a text")(new(string), raw)
	}}
}

func nothing(*Config) any { return nil }

// refuse reads nothing but a default.
func refuse(why string, defaults ...string) func(*reader, json.RawMessage) []ConfigFault {
	return func(_ *reader, raw json.RawMessage) []ConfigFault {
		var b bytes.Buffer
		_ = json.Compact(&b, raw) // it is JSON: it was read before
		if slices.Contains(defaults, b.String()) {
			return nil
		}
		return bad(raw, why, "the default, "+defaults[0])
	}
}

func bad(raw json.RawMessage, what, accepted string) []ConfigFault {
	return []ConfigFault{{Value: quotable(raw), What: what, Accepted: accepted}}
}

// quotable is a value as it stands in an error: a string without its quotes,
// nothing longer than a line.
func quotable(raw json.RawMessage) string {
	var s string
	if raw[0] != '"' || json.Unmarshal(raw, &s) != nil {
		s = string(raw)
	}
	return short(s)
}

func short(s string) string {
	const most = 60
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "..."
	}
	return s
}

func write[T any](v T) any { return v }

// writeSet leaves out the zero value.
func writeSet[T comparable](v T) any {
	var zero T
	if v == zero {
		return nil
	}
	return v
}

func writeAddress(a netip.Addr) any {
	if !a.IsValid() {
		return nil
	}
	return a
}

func readAddress(a *netip.Addr, raw json.RawMessage) []ConfigFault {
	var s string
	if json.Unmarshal(raw, &s) != nil {
		return bad(raw, "is not accepted", acceptedServer)
	}
	if *a = (netip.Addr{}); s == "" {
		return nil
	}
	v, err := netip.ParseAddr(s)
	if err != nil {
		return bad(raw, "is no IP address", acceptedServer)
	}
	*a = v.Unmap()
	return nil
}

func writeTrue(v bool) any { return writeSet(v) }

func writeNot(v bool) any { return !v }

func writeList[T fmt.Stringer](list []T) any {
	out := make([]string, len(list)) // not nil: Kuma's default is a list
	for i, v := range list {
		out[i] = v.String()
	}
	return out
}

func writeUser(c Config) any {
	if len(c.ProxyUIDs) == 0 {
		return c.ProxyUser
	}
	out := make([]string, len(c.ProxyUIDs))
	for i, u := range c.ProxyUIDs {
		out[i] = strconv.FormatUint(uint64(u), 10)
	}
	return strings.Join(out, ",")
}

func writeWait(d time.Duration) any {
	if d == 0 {
		return nil
	}
	return int64(max(d, 0) / time.Second)
}

func writeRetries(n int) any {
	if n == 0 {
		return nil
	}
	return max(n, 0)
}

func writeSleep(d time.Duration) any {
	if d == 0 {
		return nil
	}
	return max(d, 0).String()
}

func writeBackend(b Backend) any {
	if b == Auto {
		return nil
	}
	return b.String()
}

func readBool(v *bool, raw json.RawMessage) []ConfigFault {
	if json.Unmarshal(raw, v) != nil {
		return bad(raw, "is no boolean", "true or false")
	}
	return nil
}

func readNot(v *bool, raw json.RawMessage) []ConfigFault {
	on := !*v
	faults := readBool(&on, raw)
	*v = !on
	return faults
}

func readString(accepted string) func(*string, json.RawMessage) []ConfigFault {
	return func(s *string, raw json.RawMessage) []ConfigFault {
		if json.Unmarshal(raw, s) != nil {
			return bad(raw, "is no text", accepted+" in quotes")
		}
		return nil
	}
}

func readName[T any](parse func(string) (T, error), accepted string) func(*T, json.RawMessage) []ConfigFault {
	return func(v *T, raw json.RawMessage) []ConfigFault {
		var name string
		if faults := readString(accepted)(&name, raw); faults != nil {
			return faults
		}
		parsed, err := parse(name)
		if err != nil {
			return bad(raw, "is not accepted", accepted)
		}
		*v = parsed
		return nil
	}
}

// readUser reads numbers as ProxyUIDs and anything else as ProxyUser.
func readUser(c *Config, raw json.RawMessage) []ConfigFault {
	const accepted = "a user's name, a UID from 0 to 4294967294, or a comma list of UIDs"
	var text string
	if isNumber(raw) {
		text = string(raw) // as Kuma takes it, whose YAML makes text of it
	} else if faults := readString(accepted)(&text, raw); faults != nil {
		return faults
	}
	c.ProxyUIDs, c.ProxyUser = nil, text
	if text == "" {
		return nil
	}
	var uids []UID
	for part := range strings.SplitSeq(text, ",") {
		uid, err := strconv.ParseUint(strings.TrimSpace(part), 10, 32)
		if err != nil {
			break
		}
		uids = append(uids, UID(uid))
	}
	if len(uids) == strings.Count(text, ",")+1 {
		c.ProxyUIDs, c.ProxyUser = uids, ""
	}
	if isNumber(raw) && c.ProxyUser != "" || (Config{ProxyUIDs: c.ProxyUIDs, ProxyUser: c.ProxyUser}).faults() != nil {
		return bad(raw, "is no user", accepted)
	}
	return nil
}

func readNumber(raw json.RawMessage, lowest, highest int64, accepted string, set func(int64)) []ConfigFault {
	n, err := strconv.ParseInt(string(raw), 10, 64) // a quoted number fails here, as it does in Kuma
	if err != nil || n < lowest || n > highest {
		return bad(raw, "is not accepted", accepted)
	}
	set(n)
	return nil
}

// readWait reads Kuma's 0 as not to wait: Kuma then calls iptables without
// --wait.
func readWait(d *time.Duration, raw json.RawMessage) []ConfigFault {
	return readNumber(raw, 0, 1<<31-1, "whole seconds from 0 to 2147483647", func(n int64) {
		if *d = time.Duration(n) * time.Second; n == 0 {
			*d = -time.Second
		}
	})
}

func readInterval(d *time.Duration, raw json.RawMessage) []ConfigFault {
	return readNumber(raw, 0, 999999, "whole microseconds from 0 to 999999", func(n int64) {
		*d = time.Duration(n) * time.Microsecond
	})
}

// readRetries reads Kuma's 0 as none: the zero value of a Config is the default.
func readRetries(n *int, raw json.RawMessage) []ConfigFault {
	return readNumber(raw, 0, maxRetries, acceptedRetries, func(v int64) {
		if *n = int(v); v == 0 {
			*n = -1
		}
	})
}

// readSleep takes no bare number: to Kuma 2 is two nanoseconds, and to its reader
// two seconds.
func readSleep(d *time.Duration, raw json.RawMessage) []ConfigFault {
	var text string
	if json.Unmarshal(raw, &text) != nil {
		return bad(raw, "is no duration", acceptedSleep)
	}
	v, err := time.ParseDuration(text)
	if err != nil || v < 0 || v > maxSleep {
		return bad(raw, "is not accepted", acceptedSleep)
	}
	if *d = v; v == 0 {
		*d = -1
	}
	return nil
}

func readExclusions(list *[]UIDExclusion, raw json.RawMessage) []ConfigFault {
	*list = nil
	// A number is a UID: Kuma's YAML makes text of it.
	return eachEntry(raw, ";", true, acceptedExclusion, func(e string) error {
		x, err := ParseUIDExclusion(e)
		*list = append(*list, x)
		return err
	})
}

// isNumber tells a number of JSON by how it begins.
func isNumber(raw json.RawMessage) bool { return raw[0] == '-' || '0' <= raw[0] && raw[0] <= '9' }

// eachEntry parses each entry of a list of strings, or of one string; entries
// can be separated within a string. With numbers, either can be a number too.
func eachEntry(raw json.RawMessage, separator string, numbers bool, accepted string, parse func(string) error) (faults []ConfigFault) {
	list := []json.RawMessage{raw}
	if raw[0] == '[' {
		_ = json.Unmarshal(raw, &list) // it is JSON: it was read before
	} else if string(raw) == `""` {
		return nil
	}
	for _, item := range list {
		var text string
		switch {
		case isNumber(item) && numbers:
			text = string(item)
		case item[0] != '"':
			faults = append(faults, bad(item, "is not accepted", accepted)...)
			continue
		default:
			_ = json.Unmarshal(item, &text)
		}
		for e := range strings.SplitSeq(text, separator) {
			e = strings.TrimSpace(e)
			if e == "" {
				faults = append(faults, ConfigFault{Value: text, What: "has an empty entry", Accepted: accepted})
			} else if err := parse(e); err != nil {
				faults = append(faults, entryFault(e, accepted, err))
			}
		}
	}
	return faults
}

// entryFault says of an entry what its parser said of it, once.
func entryFault(entry, accepted string, err error) ConfigFault {
	detail := strings.ReplaceAll(err.Error(), "\n", "; ")
	detail = strings.TrimLeft(strings.TrimPrefix(detail, strconv.Quote(entry)), ": ")
	if strings.HasPrefix(detail, "accepted is ") {
		return ConfigFault{Value: entry, What: "cannot be read", Accepted: accepted}
	}
	return ConfigFault{Value: entry, What: "cannot be read (" + detail + ")", Accepted: accepted}
}

// mostFaults bounds the work that a hostile text can make.
const mostFaults = 1000

// reader collects the faults of one text.
type reader struct {
	config       Config
	settings     *Settings // nil where there is no place for them
	allowUnknown bool
	faults       []ConfigFault
	warnings     []ConfigFault

	stores  *bool // storeFirewalld, and persist; nil where the text does not say
	persist *Persist
}

// text reads a whole text over r.config, and gives it to c if nothing is wrong.
func (r *reader) text(text []byte, c *Config) error {
	var all json.RawMessage
	if err := json.Unmarshal(text, &all); err != nil {
		return err
	}
	// In Kuma's file DNS is on where it is enabled, and captureAll says how.
	before := r.config.DNS
	r.config.DNS.Redirect = before.On()
	r.object("", all)
	if r.faults != nil {
		return &ConfigError{r.faults}
	}
	d := &r.config.DNS
	if d.Redirect == before.On() && d.CaptureAll == before.CaptureAll {
		d.Redirect = before.Redirect
	} else if d.CaptureAll && !d.Redirect {
		d.CaptureAll = false
		r.warnings = append(r.warnings, ConfigFault{Path: "redirect.dns.captureAll", Value: "true",
			What: "has no effect, as in Kuma: DNS is not redirected", Accepted: "redirect.dns.enabled, true, beside it"})
	}
	if !r.persistence() {
		return &ConfigError{r.faults}
	}
	*c = r.config
	return nil
}

// persistence is what two keys say of one field: ours, or Kuma's where ours is not
// there. It reports whether they agree.
func (r *reader) persistence() bool {
	p := &r.config.Persist
	switch {
	case r.persist != nil && r.stores != nil && *r.stores && *r.persist != PersistFirewalld:
		r.add("storeFirewalld", []ConfigFault{{Value: "true", What: fmt.Sprintf("contradicts persist, %s", r.persist), Accepted: "only one of the two, or persist: firewalld"}})
		return false
	case r.persist != nil:
		*p = *r.persist
	case r.stores == nil:
	case *r.stores:
		*p = PersistFirewalld
	case *p == PersistFirewalld:
		*p = PersistAuto
	}
	return true
}

// writePersist leaves out what Kuma's key says.
func writePersist(p Persist) any {
	if p == PersistAuto || p == PersistFirewalld {
		return nil
	}
	return p.String()
}

// object reads the members of the object at a path; the path of the whole text
// is empty.
func (r *reader) object(path string, raw json.RawMessage) {
	switch {
	case string(raw) == "null":
		return
	case path == "iptablesExecutables" && raw[0] == '"':
		// Kuma takes name:path,... here too.
		if string(raw) != `""` {
			f := bad(raw, "is known, not supported yet", `the default, ""`)
			f[0].NotYet = true
			r.add(path, f)
		}
		return
	case raw[0] != '{':
		r.add(path, bad(raw, "is no object", "an object with the keys "+strings.Join(members(path), ", ")))
		return
	}
	seen := map[string]bool{}
	d := json.NewDecoder(bytes.NewReader(raw))
	_, _ = d.Token() // the brace; errors cannot be: it was read before
	for d.More() {
		token, _ := d.Token()
		name, _ := token.(string)
		var value json.RawMessage
		if d.Decode(&value) != nil {
			return
		}
		at := name
		if path != "" {
			at = path + "." + name
		}
		switch {
		case len(r.faults)+len(r.warnings) > mostFaults:
			return // a file of another kind, and nobody reads on
		case seen[name]:
			r.add(at, bad(value, "is given twice", "a key once"))
		default:
			seen[name] = true
			r.member(at, name, value)
		}
	}
}

func (r *reader) member(path, name string, raw json.RawMessage) {
	i := slices.IndexFunc(keys, func(k key) bool { return k.path == path })
	switch {
	case name == "" || strings.Contains(name, ".") || i < 0 && members(path) == nil:
		r.unknown(ConfigFault{Path: or(short(path), "."), Value: short(name), What: "is no key of the configuration", Accepted: nearest(path) + ", the nearest one"})
	case i < 0:
		r.object(path, raw)
	case string(raw) != "null":
		r.add(path, keys[i].read(r, raw))
	}
}

func (r *reader) unknown(f ConfigFault) {
	if r.allowUnknown {
		r.warnings = append(r.warnings, f)
	} else {
		r.faults = append(r.faults, f)
	}
}

func (r *reader) add(path string, faults []ConfigFault) {
	for _, f := range faults {
		f.Path = or(path, ".")
		r.faults = append(r.faults, f)
	}
}

// members lists the keys of the object at a path, nil when there is no such
// object.
func members(path string) (out []string) {
	for _, k := range keys {
		rest := "." + k.path
		if path != "" {
			var inside bool
			if rest, inside = strings.CutPrefix(k.path, path); !inside || !strings.HasPrefix(rest, ".") {
				continue
			}
		}
		name, _, _ := strings.Cut(rest[1:], ".")
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

// nearest is the path of the key, or of the object, that is most like an
// unknown path. A right name in a wrong place counts as one slip.
func nearest(path string) string {
	last := func(p string) string { return p[strings.LastIndexByte(p, '.')+1:] }
	best, least := "", -1
	try := func(known string) {
		d := min(distance(path, known), 1+distance(last(path), last(known)))
		if least < 0 || d < least {
			best, least = known, d
		}
	}
	for _, k := range keys {
		for i, b := range []byte(k.path) {
			if b == '.' {
				try(k.path[:i])
			}
		}
		try(k.path)
	}
	return best
}

// distance is Levenshtein's: how many characters to insert, delete or replace
// to make one string of the other. Only the first characters count, which are
// more than any key has: a file can hold a key of any length.
func distance(a, b string) int {
	s, t := []rune(a), []rune(b)
	s = s[:min(len(s), 100)]
	row := make([]int, len(t)+1)
	for j := range row {
		row[j] = j
	}
	for i, x := range s {
		diagonal := row[0]
		row[0] = i + 1
		for j, y := range t {
			cost := diagonal
			if x != y {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(t)]
}
