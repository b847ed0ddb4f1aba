package rules

import (
	"fmt"
	"slices"
	"strings"
)

// NativeDormant is what is Strange of a table whose chains are called by nobody: nft(8)
// calls it dormant.
const NativeDormant = "the table is dormant"

// For returns the table as packets of a family meet it: a rule for each of the kernel's
// that can be about them, with its place in its chain (Rule.At), and base chains where
// the kernel calls them (BaseChain.Offset). Lowered, it is what Set has for the family.
//
// What no rule of a Set says is Opaque; of a dormant table there are no base chains.
// What is Strange elsewhere makes opaque what it concerns: the chain that it names, the
// rules that look into the set that it names, or all.
func (n Native) For(f Family) Set {
	out := Set{Only: f}
	dormant := slices.Contains(n.Strange, NativeDormant)
	for i := range n.Chains {
		c := &n.Chains[i]
		odd := n.oddAt(c.Name)
		t, name, ours := c.place()
		list := n.rulesFor(f, c, t, ours)
		if odd != "" && odd != droppingPolicy {
			list = append([]Rule{unknown(odd)}, list...)
		}
		switch {
		case c.Hook != "" && dormant:
		case c.Hook != "":
			out.Bases = append(out.Bases, n.baseFor(c, t, list, odd == droppingPolicy))
		case ours:
			out.Chains = append(out.Chains, Chain{Table: t, Name: name, Rules: list})
		default: // any of the chains at the hooks may lead there
			for _, t := range tableOrder {
				out.Chains = append(out.Chains, Chain{Table: t, Name: c.Name, Rules: list})
			}
		}
	}
	return out
}

// droppingPolicy is what is Strange of a chain that drops at its end.
const droppingPolicy = "policy drop"

// oddAt is what of the Strange concerns a chain as a whole, or "".
func (n Native) oddAt(chain string) string {
	var odd []string
	for _, s := range n.Strange {
		kind, rest, _ := strings.Cut(s, " ")
		name, what, named := strings.Cut(rest, ": ")
		switch {
		case s == NativeDormant:
		case kind == "object", kind == "flowtable": // nothing happens to packets but by rules
		case kind == "set" && named: // see rulesFor
		case kind == "chain" && named && name != chain:
		case kind == "chain" && named:
			odd = append(odd, what)
		default:
			odd = append(odd, s)
		}
	}
	return strings.Join(odd, ", ")
}

// place is the table and the name of a chain, ours being whether its name is as Native
// makes them.
func (c *NativeChain) place() (t Table, name string, ours bool) {
	first, name, _ := strings.Cut(c.Name, ".")
	t = Table(first)
	ours = slices.Contains(tableOrder[:], t) && (isHook(t, name) && name == string(c.Hook) || !isHook(t, name) && validName(name) && c.Hook == "")
	if !ours && c.Hook != "" {
		switch c.Type {
		case "nat":
			t = NAT
		case "route":
			t = Mangle
		default:
			t = Filter
		}
	}
	return t, name, ours
}

func (n Native) baseFor(c *NativeChain, t Table, list []Rule, drops bool) BaseChain {
	b := BaseChain{Table: t, Hook: c.Hook, Rules: list, Offset: c.Priority - Priority(t, c.Hook)}
	if c.Name != nativeName(t, string(c.Hook)) {
		b.Name = c.Name
	}
	if kind, _ := nativeBase(b); kind != c.Type && (kind == "nat" || c.Type == "nat") {
		b.Rules = append([]Rule{unknown(fmt.Sprintf("type %s hook %s priority %d", c.Type, strings.ToLower(string(c.Hook)), c.Priority))}, b.Rules...)
	}
	if drops {
		b.Policy = "DROP"
	}
	return b
}

// rulesFor are those of a chain that can be about a family.
func (n Native) rulesFor(f Family, c *NativeChain, t Table, ours bool) (out []Rule) {
	for i := range c.Rules {
		r := c.Rules[i]
		if !r.isFor(f) {
			continue
		}
		r.Matches = slices.DeleteFunc(slices.Clone(r.Matches), func(m NativeMatch) bool { return m.Key == KeyFamily })
		odd := r.Unknown
		r.Unknown = ""
		one := n.rule(&r)
		if odd != "" { // what is in front of that holds, or the rule is nothing
			one.Matches = append(one.Matches, Opaque{odd})
			one.Action, one.Record = Opaque{odd}, false
		}
		for k, m := range r.Matches {
			if n.unsure(m) {
				one.Matches = append(one.Matches, Opaque{string(r.Matches[k].append(nil, 0))})
			}
		}
		one.At = i + 1
		n.lead(&one, r.target(), t, ours)
		out = append(out, one)
	}
	return out
}

// isFor reports whether a rule can be about packets of a family.
func (r *NativeRule) isFor(f Family) bool {
	for _, m := range r.Matches {
		if m.Key == KeyFamily && (len(m.First) != 1 || (m.First[0] == nativeFamilies[f]) == m.Not) {
			return false
		}
	}
	return true
}

// unsure reports whether it cannot be told what a match says, though there is one of a
// Set like it: a set that was not read whole, and an owner that is excepted (see
// negatedOwner).
func (n Native) unsure(m NativeMatch) bool {
	if m.Not && (m.Key == KeyUID || m.Key == KeyGID) {
		return true
	}
	return n.looksIntoStrange(m)
}

// lead sets where a rule leads: to a chain of the same table by its name there.
func (n Native) lead(r *Rule, target string, t Table, ours bool) {
	if target == "" {
		return
	}
	name := target
	to, _ := n.chain(target)
	if in, short, known := to.place(); known {
		name = short
		if in != t || !ours {
			r.Action = Opaque{"jump " + target}
			return
		}
	}
	switch r.Action.(type) {
	case Jump:
		r.Action = Jump{name}
	case Goto:
		r.Action = Goto{name}
	}
}

// String writes the elements as nft(8) does, without the braces.
func (s NativeSet) String() string { return string(s.appendElements(nil)) }

// Count is how many rules the table has, those of a record left out.
func (n *Native) Count() (sum int) {
	for _, c := range n.Chains {
		for i := range c.Rules {
			if !c.Rules[i].isRecord() {
				sum++
			}
		}
	}
	return sum
}
