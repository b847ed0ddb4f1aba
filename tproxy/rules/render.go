package rules

import (
	"net/netip"
	"strconv"
	"strings"
)

// tableOrder is the order in which a script commits tables: nat goes in before
// raw, so that no query is put in a zone before it is redirected; what is taken
// out goes the other way round.
var tableOrder = [...]Table{NAT, Raw, Mangle, Filter}

// IPTables returns the Set as a script for iptables-restore --noflush, or
// ip6tables-restore for IPv6: what a fresh install feeds it. It holds no line
// for a built-in chain, whose policy is not ours and which iptables-nft would
// delete and make again. A Set without rules for the family is no bytes.
//
// It panics with the *InvalidError of Validate on a Set that must not be
// rendered; every Set of tproxy.Build is valid.
func (s Set) IPTables(f Family) []byte {
	if err := s.Validate(); err != nil {
		panic(err)
	}
	return s.AppendIPTables(nil, f)
}

// AppendIPTables appends the script of IPTables to b. The Set must be valid.
func (s Set) AppendIPTables(b []byte, f Family) []byte {
	if !s.Has(f) {
		return b
	}
	if b == nil {
		b = make([]byte, 0, 2048)
	}
	var scratch []Rule
	for _, t := range tableOrder {
		start := len(b)
		b = append(b, '*')
		b = append(b, t...)
		b = append(b, '\n')
		head := len(b)
		for _, c := range s.Chains {
			if c.Table == t {
				b = appendDeclaration(b, c.Name)
			}
		}
		for _, c := range s.Bases {
			if c.Table == t {
				scratch = lowerInto(scratch[:0], c.Rules, f)
				b = s.appendBase(b, c, scratch)
			}
		}
		for _, c := range s.Chains {
			if c.Table != t {
				continue
			}
			for i := range c.Rules {
				scratch = c.Rules[i].lower(scratch[:0], f)
				for j := range scratch {
					b = s.appendLine(b, "-A ", c.Name, &scratch[j])
				}
			}
		}
		if len(b) == head {
			b = b[:start]
			continue
		}
		b = append(b, "COMMIT\n"...)
	}
	return b
}

func lowerInto(out, rules []Rule, f Family) []Rule {
	for i := range rules {
		out = rules[i].lower(out, f)
	}
	return out
}

// appendDeclaration appends the line that makes a chain, or, under --noflush,
// empties the one that is there.
func appendDeclaration(b []byte, name string) []byte {
	b = append(b, ':')
	b = append(b, name...)
	return append(b, " - [0:0]\n"...)
}

func (s Set) appendBase(b []byte, c BaseChain, lines []Rule) []byte {
	for i := range lines {
		if c.Place == First {
			// The last one first, each in front: see headFirst.
			b = s.appendLine(b, "-I ", string(c.Hook)+" 1", &lines[len(lines)-1-i])
		} else {
			b = s.appendLine(b, "-A ", string(c.Hook), &lines[i])
		}
	}
	return b
}

// appendLine appends a rule that is one line already, with its comment unless
// comments are off.
func (s Set) appendLine(b []byte, verb, chain string, r *Rule) []byte {
	b = append(b, verb...)
	b = append(b, chain...)
	b = r.appendSpec(b, !s.NoComments || r.Record, true)
	return append(b, '\n')
}

// String returns the rule as iptables-save writes it behind the chain's name,
// in the family of its addresses.
func (r Rule) String() string {
	b := r.appendSpec(nil, true, false)
	if len(b) == 0 {
		return ""
	}
	return string(b[1:])
}

// appendSpec appends the rule as iptables-save lists it, or as a script has to
// say it.
func (r *Rule) appendSpec(b []byte, comment, script bool) []byte {
	tcp := false // whether the match extension of the protocol was named
	var proto Protocol
	for _, m := range r.Matches {
		switch m := m.(type) {
		case Protocol:
			proto = m
		case SYN:
			b, tcp = appendExtension(b, proto, tcp), true
		case SourcePorts:
			if len(m.Ports.s) == 1 {
				b, tcp = appendExtension(b, proto, tcp), true
			}
		case DestinationPorts:
			if len(m.Ports.s) == 1 {
				b, tcp = appendExtension(b, proto, tcp), true
			}
		case OwnerUID:
			if script {
				b = appendOwner(b, " --uid-owner ", m.UIDs, m.Not)
				continue
			}
		case OwnerGID:
			if script {
				b = appendOwner(b, " --gid-owner ", m.GIDs, m.Not)
				continue
			}
		}
		b = m.appendIPTables(b)
	}
	if comment && r.Why != "" {
		// Behind the matches: in front of them, every packet would pay for it
		// (63 µs a connection against 23 with 1,000 rules, iptables-nft, kernel 6.18).
		b = append(b, ` -m comment --comment "`...)
		b = appendEscaped(b, r.Why)
		b = append(b, '"')
	}
	return r.Action.appendAction(b)
}

func appendEscaped(b []byte, text string) []byte {
	if strings.IndexByte(text, '"') < 0 && strings.IndexByte(text, '\\') < 0 {
		return append(b, text...) // as almost every comment is
	}
	for _, c := range []byte(text) {
		if c == '"' || c == '\\' {
			b = append(b, '\\')
		}
		b = append(b, c)
	}
	return b
}

func appendExtension(b []byte, p Protocol, named bool) []byte {
	if named {
		return b
	}
	b = append(b, " -m "...)
	return append(b, p.String()...)
}

func appendNot(b []byte, not bool) []byte {
	if not {
		b = append(b, " !"...)
	}
	return b
}

func appendPrefixes(b []byte, option string, ps []netip.Prefix, not bool) []byte {
	b = appendNot(b, not)
	b = append(b, option...)
	for i, p := range ps {
		if i > 0 {
			b = append(b, ',')
		}
		b = p.AppendTo(b)
	}
	return b
}

func (m Source) appendIPTables(b []byte) []byte {
	return appendPrefixes(b, " -s ", m.Prefixes, m.Not)
}

func (m Destination) appendIPTables(b []byte) []byte {
	return appendPrefixes(b, " -d ", m.Prefixes, m.Not)
}

func (m InInterface) appendIPTables(b []byte) []byte {
	return append(append(appendNot(b, m.Not), " -i "...), m.Name...)
}

func (m OutInterface) appendIPTables(b []byte) []byte {
	return append(append(appendNot(b, m.Not), " -o "...), m.Name...)
}

func (p Protocol) appendIPTables(b []byte) []byte {
	b = append(b, " -p "...)
	if p == TCP || p == UDP {
		return append(b, p.String()...)
	}
	return strconv.AppendUint(b, uint64(p), 10)
}

func (m SYN) appendIPTables(b []byte) []byte { return append(appendNot(b, m.Not), " --syn"...) }

func (m SourcePorts) appendIPTables(b []byte) []byte {
	return appendPorts(b, " --sport ", " -m multiport --sports ", m.Ports, m.Not)
}

func (m DestinationPorts) appendIPTables(b []byte) []byte {
	return appendPorts(b, " --dport ", " -m multiport --dports ", m.Ports, m.Not)
}

// appendPorts writes one range with the protocol's own match and more with
// multiport, which refuses a range of one port such as 80:80.
func appendPorts(b []byte, single, multi string, p Ports, not bool) []byte {
	if len(p.s) == 1 {
		b = append(appendNot(b, not), single...)
	} else if not {
		b = append(append(b, " -m multiport !"...), multi[len(" -m multiport"):]...)
	} else {
		b = append(b, multi...)
	}
	for i, r := range p.s {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, uint64(r.First), 10)
		if r.First != r.Last {
			b = append(b, ':')
			b = strconv.AppendUint(b, uint64(r.Last), 10)
		}
	}
	return b
}

func (m SourceLocal) appendIPTables(b []byte) []byte {
	b = append(b, " -m addrtype"...)
	return append(appendNot(b, m.Not), " --src-type LOCAL"...)
}

func (m DestinationLocal) appendIPTables(b []byte) []byte {
	b = append(b, " -m addrtype"...)
	return append(appendNot(b, m.Not), " --dst-type LOCAL"...)
}

func (m OwnerUID) appendIPTables(b []byte) []byte {
	return m.UIDs.s.append(append(appendNot(append(b, " -m owner"...), m.Not), " --uid-owner "...))
}

func (m OwnerGID) appendIPTables(b []byte) []byte {
	return m.GIDs.s.append(append(appendNot(append(b, " -m owner"...), m.Not), " --gid-owner "...))
}

// appendOwner writes an owner for a script, one ID as a range too: of "5678" iptables asks the name
// service for a user of that name first, and there may be one with another UID
// (owner_parse_uid, extensions/libxt_owner.c). Listed, it is one number again.
func appendOwner(b []byte, option string, ids UIDs, not bool) []byte {
	b = append(b, " -m owner"...)
	b = append(appendNot(b, not), option...)
	for i, r := range ids.s {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, uint64(r.First), 10)
		b = append(b, '-')
		b = strconv.AppendUint(b, uint64(r.Last), 10)
	}
	return b
}

func (m CTState) appendIPTables(b []byte) []byte {
	b = append(b, " -m conntrack"...)
	return append(append(appendNot(b, m.Not), " --ctstate "...), m.States...)
}

func (m Mark) appendIPTables(b []byte) []byte {
	b = append(appendNot(append(b, " -m mark"...), m.Not), " --mark "...)
	b = appendHex(b, m.Value)
	if m.Mask != allBits {
		b = appendHex(append(b, '/'), m.Mask)
	}
	return b
}

// allBits is the mask that iptables-save leaves out.
const allBits = 1<<32 - 1

func appendHex(b []byte, n uint32) []byte {
	return strconv.AppendUint(append(b, "0x"...), uint64(n), 16)
}

func (o Opaque) appendIPTables(b []byte) []byte { return append(append(b, ' '), o.text...) }

func (Return) appendAction(b []byte) []byte  { return append(b, " -j RETURN"...) }
func (Accept) appendAction(b []byte) []byte  { return append(b, " -j ACCEPT"...) }
func (Drop) appendAction(b []byte) []byte    { return append(b, " -j DROP"...) }
func (Nothing) appendAction(b []byte) []byte { return b }

func (a Reject) appendAction(b []byte) []byte {
	b = append(b, " -j REJECT"...)
	if a.With != "" {
		b = append(append(b, " --reject-with "...), a.With...)
	}
	return b
}

func (a Jump) appendAction(b []byte) []byte { return append(append(b, " -j "...), a.Chain...) }
func (a Goto) appendAction(b []byte) []byte { return append(append(b, " -g "...), a.Chain...) }

func (a Redirect) appendAction(b []byte) []byte {
	return strconv.AppendUint(append(b, " -j REDIRECT --to-ports "...), uint64(a.Port), 10)
}

func (a CTZone) appendAction(b []byte) []byte {
	return strconv.AppendUint(append(b, " -j CT --zone "...), uint64(a.Zone), 10)
}

func (NoTrack) appendAction(b []byte) []byte { return append(b, " -j CT --notrack"...) }

func (a SetMark) appendAction(b []byte) []byte {
	b = appendHex(append(b, " -j MARK --set-xmark "...), a.Value)
	return appendHex(append(b, '/'), a.Mask)
}

func (a Translate) appendAction(b []byte) []byte {
	b = append(append(b, " -j "...), a.Target...)
	if a.To != "" {
		b = append(append(b, a.option()...), a.To...)
	}
	for _, o := range []struct {
		is   bool
		text string
	}{{a.Random, " --random"}, {a.RandomFully, " --random-fully"}, {a.Persistent, " --persistent"}} {
		if o.is {
			b = append(b, o.text...)
		}
	}
	return b
}

// option is the one that To stands behind.
func (a Translate) option() string {
	switch a.Target {
	case "DNAT":
		return " --to-destination "
	case "SNAT":
		return " --to-source "
	}
	return " --to-ports "
}

func (o Opaque) appendAction(b []byte) []byte { return append(append(b, ' '), o.text...) }
