package rules

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
)

// NativeVerb is what a NativeCommand does.
type NativeVerb uint8

// The verbs, as nft(8) has them.
const (
	AddTable NativeVerb = iota + 1
	DeleteTable
	AddSet // with its elements
	DeleteSet
	AddChain
	FlushChain
	DeleteChain
	AddRule // at the end of its chain
)

// NativeCommand is one command of a transaction on the table.
type NativeCommand struct {
	Verb  NativeVerb
	Table string
	Set   NativeSet   // of AddSet; of DeleteSet only the name
	Chain NativeChain // of the verbs about chains, and of AddRule; its Rules say nothing
	Rule  NativeRule  // of AddRule
}

// NativeTransition returns the commands that turn live into want, in one transaction;
// none where there is nothing to do. A nil live is that there is no table, a nil want
// that there is to be none.
//
// Chains that are right stay and keep their counters, and of the others the rules are
// exchanged and the chain stays: a packet is judged by the rules of before or by those
// of after, at each hook, as the kernel looks once which are in force (nft_do_chain,
// net/netfilter/nf_tables_core.c). A table that is not as Native makes them, and a set
// or a hook that somebody has changed, go with the table, which is made anew.
func NativeTransition(live, want *Native) []NativeCommand {
	switch {
	case want == nil && live == nil:
		return nil
	case want == nil:
		return []NativeCommand{{Verb: DeleteTable, Table: live.Table}}
	case live == nil:
		return want.commands()
	case !live.keeps(want):
		return append([]NativeCommand{{Verb: DeleteTable, Table: live.Table}}, want.commands()...)
	}
	t := want.Table
	var out []NativeCommand
	for _, s := range want.Sets {
		if _, there := live.set(s.Name); !there {
			out = append(out, NativeCommand{Verb: AddSet, Table: t, Set: s})
		}
	}
	for _, c := range want.Chains {
		if _, there := live.chain(c.Name); !there {
			out = append(out, NativeCommand{Verb: AddChain, Table: t, Chain: c.bare()})
		}
	}
	for _, c := range want.Chains {
		l, _ := live.chain(c.Name)
		if slices.EqualFunc(l.Rules, c.Rules, NativeRule.Equal) {
			continue
		}
		if len(l.Rules) > 0 {
			out = append(out, NativeCommand{Verb: FlushChain, Table: t, Chain: c.bare()})
		}
		out = c.addRules(out, t)
	}
	return append(out, live.gone(want)...)
}

// NativeAfter returns what live becomes by the commands, nil for no table. As the kernel
// it carries out all or none: of one that is refused it returns the place, from 0, and
// the reason.
func NativeAfter(live *Native, commands []NativeCommand) (after *Native, failed int, err error) {
	if live != nil {
		after = &Native{live.Table, slices.Clone(live.Sets), slices.Clone(live.Chains), live.Strange}
	}
	for i, c := range commands {
		if after == nil && c.Verb != AddTable {
			return live, i, fmt.Errorf("%s: there is no table", c)
		}
		switch c.Verb {
		case AddTable:
			if after == nil {
				after = &Native{Table: c.Table}
			}
		case DeleteTable:
			after = nil
		default:
			if err := after.carryOut(c); err != nil {
				return live, i, fmt.Errorf("%s: %w", c, err)
			}
		}
	}
	return after, 0, nil
}

func (n *Native) carryOut(c NativeCommand) error {
	_, setThere := n.set(c.Set.Name)
	at := slices.IndexFunc(n.Chains, func(k NativeChain) bool { return k.Name == c.Chain.Name })
	switch c.Verb {
	case AddSet, DeleteSet:
		switch adds := c.Verb == AddSet; {
		case adds && setThere:
			return errors.New("it is there")
		case adds:
			n.Sets = append(n.Sets, c.Set)
		case !setThere:
			return errors.New("it is not there")
		case n.uses(c.Set.Name):
			return errors.New("it is in use")
		default:
			n.Sets = slices.DeleteFunc(n.Sets, func(s NativeSet) bool { return s.Name == c.Set.Name })
		}
		return nil
	case AddChain:
		if at >= 0 {
			return errors.New("it is there")
		}
		n.Chains = append(n.Chains, c.Chain)
		return nil
	}
	if at < 0 {
		return errors.New("the chain is not there")
	}
	switch c.Verb {
	case FlushChain:
		n.Chains[at].Rules = nil
	case DeleteChain:
		if n.uses(c.Chain.Name) || len(n.Chains[at].Rules) > 0 {
			return errors.New("it is in use")
		}
		n.Chains = slices.Delete(n.Chains, at, at+1)
	case AddRule:
		if to := c.Rule.target(); to != "" {
			if _, there := n.chain(to); !there {
				return fmt.Errorf("chain %q is not there", to)
			}
		}
		for _, m := range c.Rule.Matches {
			if _, there := n.set(m.Set); m.Set != "" && !there {
				return fmt.Errorf("set %q is not there", m.Set)
			}
		}
		n.Chains[at].Rules = append(slices.Clone(n.Chains[at].Rules), c.Rule)
	}
	return nil
}

// uses reports whether a rule leads to the chain, or looks into the set.
func (n *Native) uses(name string) bool {
	return slices.ContainsFunc(n.Chains, func(k NativeChain) bool {
		return slices.ContainsFunc(k.Rules, func(r NativeRule) bool {
			return r.target() == name || slices.ContainsFunc(r.Matches, func(m NativeMatch) bool { return m.Set == name })
		})
	})
}

func (r NativeRule) target() string { return Rule{Action: r.Action}.Target() }

// commands make the table.
func (n *Native) commands() []NativeCommand {
	out := []NativeCommand{{Verb: AddTable, Table: n.Table}}
	for _, s := range n.Sets {
		out = append(out, NativeCommand{Verb: AddSet, Table: n.Table, Set: s})
	}
	for _, c := range n.Chains {
		out = append(out, NativeCommand{Verb: AddChain, Table: n.Table, Chain: c.bare()})
	}
	for _, c := range n.Chains {
		out = c.addRules(out, n.Table)
	}
	return out
}

func (c NativeChain) addRules(out []NativeCommand, table string) []NativeCommand {
	for _, r := range c.Rules {
		out = append(out, NativeCommand{Verb: AddRule, Table: table, Chain: c.bare(), Rule: r})
	}
	return out
}

// bare is the chain without its rules.
func (c NativeChain) bare() NativeChain {
	c.Rules = nil
	return c
}

// gone are the commands that take out what want does not have: rules first, as they
// hold the chains that they lead to, and the sets that they look into.
func (n *Native) gone(want *Native) (out []NativeCommand) {
	var chains []NativeCommand
	for _, l := range n.Chains {
		if _, stays := want.chain(l.Name); stays {
			continue
		}
		if len(l.Rules) > 0 {
			out = append(out, NativeCommand{Verb: FlushChain, Table: n.Table, Chain: l.bare()})
		}
		chains = append(chains, NativeCommand{Verb: DeleteChain, Table: n.Table, Chain: l.bare()})
	}
	out = append(out, chains...)
	for _, l := range n.Sets {
		if _, stays := want.set(l.Name); !stays {
			out = append(out, NativeCommand{Verb: DeleteSet, Table: n.Table, Set: NativeSet{Name: l.Name, Type: l.Type}})
		}
	}
	return out
}

// keeps reports whether the table can become want without being made anew.
func (n *Native) keeps(want *Native) bool {
	if len(n.Strange) > 0 {
		return false
	}
	for _, w := range want.Sets {
		if l, there := n.set(w.Name); there && !l.equal(w) {
			return false
		}
	}
	for _, w := range want.Chains {
		if l, there := n.chain(w.Name); there && (l.Type != w.Type || l.Hook != w.Hook || l.Priority != w.Priority) {
			return false
		}
	}
	return true
}

// Equal reports whether two tables do the same: the same sets, and the same chains with
// the same rules in the same order. Counters do not matter, nor does the order of the
// chains. One with something Strange or Unknown in it equals none.
func (n *Native) Equal(m *Native) bool {
	return n.Table == m.Table && len(n.Sets) == len(m.Sets) && len(n.Chains) == len(m.Chains) &&
		len(m.Strange) == 0 && len(NativeTransition(n, m)) == 0
}

// Same reports whether two readings are of one table that nobody has changed between
// them: as Equal, but with what is Strange or Unknown, and with the order of all. What
// was counted does not matter.
func (n *Native) Same(m *Native) bool {
	return n.Table == m.Table && slices.Equal(n.Strange, m.Strange) && slices.EqualFunc(n.Sets, m.Sets, func(a, b NativeSet) bool { return a.Name == b.Name && a.equal(b) }) &&
		slices.EqualFunc(n.Chains, m.Chains, func(a, b NativeChain) bool {
			return a.Name == b.Name && a.Type == b.Type && a.Hook == b.Hook && a.Priority == b.Priority &&
				slices.EqualFunc(a.Rules, b.Rules, func(a, b NativeRule) bool {
					unknown := a.Unknown == b.Unknown
					a.Unknown, b.Unknown = "", ""
					return unknown && a.Equal(b)
				})
		})
}

// Equal reports whether two rules are the same but for what they counted. One with
// something Unknown in it equals none.
func (r NativeRule) Equal(q NativeRule) bool {
	return r.Unknown == "" && q.Unknown == "" && r.Counted == q.Counted && r.Action == q.Action && r.Comment == q.Comment &&
		slices.EqualFunc(r.Matches, q.Matches, NativeMatch.Equal)
}

// Equal reports whether two matches are the same.
func (m NativeMatch) Equal(o NativeMatch) bool {
	return m.Key == o.Key && m.Not == o.Not && m.Set == o.Set &&
		bytes.Equal(m.First, o.First) && bytes.Equal(m.Last, o.Last) && bytes.Equal(m.Mask, o.Mask)
}

func (s NativeSet) equal(t NativeSet) bool {
	return s.Name == t.Name && s.Type == t.Type && slices.EqualFunc(s.Elements, t.Elements, func(a, b NativeRange) bool {
		return bytes.Equal(a.First, b.First) && bytes.Equal(a.Last, b.Last)
	})
}

func (n *Native) set(name string) (NativeSet, bool) {
	if i := slices.IndexFunc(n.Sets, func(s NativeSet) bool { return s.Name == name }); i >= 0 {
		return n.Sets[i], true
	}
	return NativeSet{}, false
}

func (n *Native) chain(name string) (NativeChain, bool) {
	if i := slices.IndexFunc(n.Chains, func(c NativeChain) bool { return c.Name == name }); i >= 0 {
		return n.Chains[i], true
	}
	return NativeChain{}, false
}
