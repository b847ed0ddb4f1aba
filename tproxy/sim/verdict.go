package sim

import (
	"fmt"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Kind is what becomes of a packet.
type Kind uint8

const (
	// Unknown means that the walk cannot tell.
	Unknown Kind = iota
	// Untouched reaches the address and port it was sent to.
	Untouched
	// Redirected reaches a port of this host.
	Redirected
	// Refused is answered with a reset, or rejected by a filter.
	Refused
	// Dropped is discarded silently.
	Dropped
)

var kindNames = [...]string{Unknown: "unknown", Untouched: "untouched", Redirected: "redirected", Refused: "refused", Dropped: "dropped"}

func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Verdict is what becomes of a packet. Two verdicts can be compared with ==.
type Verdict struct {
	Kind Kind
	// Port is where a Redirected packet goes.
	Port uint16
	// Zone is the conntrack zone of the packet's connection.
	Zone uint16
	// Elsewhere is whether a DNAT rule, which is none of ours, sends an Untouched
	// packet to another address or port. The walk ends there: what filters make
	// of it is not followed.
	Elsewhere bool
}

func (v Verdict) String() string {
	s := v.Kind.String()
	if v.Kind == Redirected {
		s = fmt.Sprintf("%s to port %d", s, v.Port)
	}
	if v.Elsewhere {
		s += ", sent elsewhere"
	}
	if v.Zone != 0 {
		s = fmt.Sprintf("%s in zone %d", s, v.Zone)
	}
	return s
}

// Trace is a walk.
type Trace struct {
	Packet Packet
	Verdict
	// Steps are the rules that the packet met, in order.
	Steps []Step
	// Reason is why the verdict is what it is.
	Reason string
}

// Step is a rule on a packet's way.
type Step struct {
	Table rules.Table
	Chain string // the chain's or the hook's name
	Index int    // of the rule in its chain, from 1
	Rule  rules.Rule
	// Matched is whether all matches held.
	Matched bool
	// Because is why the rule does not match, or why that cannot be told.
	Because string
	// Set is which of the Sets of WalkAll has the rule, from 0.
	Set int
	// Hook is where the packet was when it met the rule.
	Hook rules.Hook
}

// Place writes table, chain and index, such as "nat PREROUTING #1".
func (s Step) Place() string { return fmt.Sprintf("%s %s #%d", s.Table, s.Chain, s.Index) }

// why is the rule's reason, or, where it has none, the rule.
func (s Step) why() string {
	if s.Rule.Why != "" {
		return s.Rule.Why
	}
	return s.Rule.String()
}

// String writes the step as a line.
func (s Step) String() string {
	if !s.Matched {
		return fmt.Sprintf("  %s %s: %s", s.Place(), s.why(), s.Because)
	}
	return fmt.Sprintf("* %s %s", s.Place(), s.why())
}

// Deciding returns the step that made the verdict; ok is false where no rule
// did.
func (t Trace) Deciding() (step Step, ok bool) {
	for i := len(t.Steps) - 1; i >= 0; i-- {
		s := t.Steps[i]
		switch t.Kind {
		case Unknown:
			return s, true
		case Dropped, Refused, Redirected:
			if !s.Matched {
				continue
			}
			switch a := s.Rule.Action.(type) {
			case rules.Redirect:
				if (t.Kind == Redirected || t.Kind == Refused && a.Port == 0) && s.Table == rules.NAT {
					return s, true
				}
			case rules.Drop:
				if t.Kind == Dropped {
					return s, true
				}
			case rules.Reject:
				if t.Kind == Refused {
					return s, true
				}
			}
		case Untouched:
			if _, dnat := s.Rule.Action.(rules.Translate); t.Elsewhere && s.Matched && dnat {
				return s, true
			}
			// Where nat has no rule about it, the zone has: the first CT holds.
			if a, ct := s.Rule.Action.(rules.CTZone); ct && s.Matched && a.Zone == t.Zone && (!ok || step.Table == rules.Raw) {
				step, ok = s, true
			}
			// POSTROUTING is about the source.
			if !s.Matched || s.Table != rules.NAT || s.Rule.Target() != "" || s.Hook == rules.Postrouting {
				continue
			}
			// A rule without matches only marks the end of a chain: what sent the
			// packet on before says more.
			if !ok || len(step.Rule.Matches) == 0 && len(s.Rule.Matches) > 0 {
				step, ok = s, true
			}
		}
	}
	return step, ok
}

// Route writes the rules that led to a step of the Trace, and it, such as
// "nat PREROUTING #1 -> DOCKER #2".
func (t Trace) Route(s Step) string {
	text := fmt.Sprintf("%s #%d", s.Chain, s.Index)
	at := len(t.Steps) - 1
	for at >= 0 && !(t.Steps[at].Set == s.Set && t.Steps[at].Place() == s.Place()) {
		at--
	}
	for chain, i := s.Chain, at-1; i >= 0; i-- {
		if from := t.Steps[i]; from.Matched && from.Set == s.Set && from.Table == s.Table && from.Rule.Target() == chain {
			text = fmt.Sprintf("%s #%d -> %s", from.Chain, from.Index, text)
			chain = from.Chain
		}
	}
	return fmt.Sprintf("%s %s", s.Table, text)
}

// Summary writes the walk as one line: the rules that matched, the reason, the
// verdict.
func (t Trace) Summary() string {
	var places []string
	for _, s := range t.Steps {
		if s.Matched {
			places = append(places, s.Place())
		}
	}
	line := t.Reason + " => " + t.Verdict.String()
	if places != nil {
		line = strings.Join(places, ", ") + ": " + line
	}
	return line
}

// String writes the walk for people: the packet, a line for each rule it met,
// with a star where the rule matched, and the summary.
func (t Trace) String() string {
	var b strings.Builder
	b.WriteString(t.Packet.String() + "\n")
	for _, s := range t.Steps {
		b.WriteString(s.String() + "\n")
	}
	b.WriteString(t.Summary() + "\n")
	return b.String()
}
