package exec

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// readingTable is the step of reading our table of nftables.
const readingTable = "reading table inet " + tproxy.NFTable

// savedTable reads our table of nftables: what save is to a variant of iptables.
func (s *session) savedTable() (live, error) {
	n, err := s.m.ownTable()
	if err != nil {
		return live{}, &ApplyError{Step: readingTable, Err: err}
	}
	return liveTable(n), nil
}

// liveTable is what a table holds; nil is none. All of it is ours.
func liveTable(n *rules.Native) live {
	if n == nil {
		return live{}
	}
	set := n.Set()
	return live{all: set, Found: tproxy.Found{Ours: set}, table: n}
}

// basesOfOthers are the base chains of nftables that are not of our table.
func (s *session) basesOfOthers() ([]kernel.NFTBase, error) {
	bases, err := s.m.bases()
	return slices.DeleteFunc(slices.Clone(bases), func(b kernel.NFTBase) bool { return b.Table == ownTable }), err
}

// ownTable is the one of ours.
var ownTable = kernel.NFTTable{Family: "inet", Name: tproxy.NFTable}

// orNFTables says why no rules can stand in nftables, after the reason for iptables.
func (s *session) orNFTables() string {
	if why := s.m.noNFTables(); why != "" {
		return ", and no table in nftables: " + why
	}
	return ""
}

// change is what one transaction of a job is to do.
type change struct {
	script   []byte                // for iptables-restore, or what nft(8) would read
	commands []rules.NativeCommand // of nftables
}

func (c change) nothing() bool { return len(c.script) == 0 && len(c.commands) == 0 }

// first says what departs from what is wanted, in a line.
func (c change) first(changes []rules.Change) string {
	if len(changes) > 0 {
		return changes[0].String()
	}
	line, _, _ := strings.Cut(string(c.script), "\n")
	return line
}

func sameTable(a, b *rules.Native) bool {
	return (a == nil) == (b == nil) && (a == nil || a.Same(b))
}

// change leads from what was read to want.
func (j *job) change(now live, want rules.Set) (change, error) {
	if j.variant.Backend != tproxy.NFTables {
		return change{script: rules.Transition(j.family, now.Ours, want)}, nil
	}
	if j.table != nil {
		return tableChange(now.table, j.table), nil
	}
	if !holds(want) {
		return tableChange(now.table, nil), nil
	}
	n, err := want.Native(tproxy.NFTable)
	if err != nil {
		return change{}, &ApplyError{Step: j.step, Err: err}
	}
	return tableChange(now.table, &n), nil
}

func tableChange(now, want *rules.Native) (c change) {
	c.commands = rules.NativeTransition(now, want)
	if now == nil && want != nil {
		c.script = want.Text()
	} else {
		c.script = rules.NativeScript(c.commands)
	}
	return c
}

// changeBack leads from what was read to what the job had found.
func (j *job) changeBack(now live) change {
	if j.variant.Backend != tproxy.NFTables {
		return change{script: rules.Transition(j.family, now.Ours, j.before.Ours)}
	}
	switch {
	case sameTable(now.table, j.before.table): // with what of others stands in it
		return change{}
	case j.before.table == nil:
		return tableChange(now.table, nil)
	}
	n := j.before.table.Known()
	return tableChange(now.table, &n)
}

// goneForGood is an error that names what of others stood in our table, and that putting
// the table back cannot make again.
func (j *job) goneForGood(now live) error {
	if j.before.table == nil || sameTable(now.table, j.before.table) {
		return nil
	}
	if others := j.before.table.Others(); len(others) > 0 {
		return fmt.Errorf("what others had in the table inet %s is gone: %s", j.before.table.Table, strings.Join(others, "; "))
	}
	return nil
}

// compare lists how what was read departs from want: of a table of nftables in both
// families, each rule of the table once.
func (j *job) compare(now live, want rules.Set) (out []rules.Change) {
	if j.variant.Backend != tproxy.NFTables {
		return rules.Compare(j.family, now.Ours, want)
	}
	var is, wanted rules.Native
	if now.table != nil {
		is = *now.table
		is.Strange = nil
	}
	switch {
	case j.table != nil:
		wanted = *j.table
	case holds(want):
		wanted, _ = want.Native(tproxy.NFTable) // change has the error
	}
	type place struct {
		kind  rules.ChangeKind
		table rules.Table
		chain string
		at    int
	}
	told := make(map[place]int)
	for _, f := range rules.Families() {
		for _, c := range rules.Compare(f, is.For(f), wanted.For(f)) {
			if c.Rule.At > 0 { // as it stands in the table, of which it may be a part
				c.Index = c.Rule.At
			}
			if slices.ContainsFunc(is.Chains, func(l rules.NativeChain) bool { return l.Name == c.Chain }) {
				c.Table = "" // none of ours, to which any may lead
			}
			p := place{c.Kind, c.Table, c.Chain, c.Index}
			i, again := told[p]
			switch {
			case !again:
				told[p] = len(out)
				out = append(out, c)
			case out[i].Family != f:
				out[i].Family = 0
			}
		}
	}
	return out
}

// drained is the table with nothing that redirects, and with the chains that hold
// conntrack and say what was installed (see tproxy.Draining); what others have in it that
// can be made again is made again.
func drained(n *rules.Native, rec tproxy.Record) (*rules.Native, error) {
	out := n.Known()
	record, err := tproxy.Draining(rules.Set{}, rec).Native(out.Table)
	if err != nil {
		return nil, err
	}
	for i := range out.Chains {
		if out.Chains[i].Hook != "" {
			out.Chains[i].Rules = nil
		}
	}
	for _, c := range record.Chains {
		if !slices.ContainsFunc(out.Chains, func(l rules.NativeChain) bool { return l.Name == c.Name }) {
			out.Chains = append(out.Chains, c)
		}
	}
	return &out, nil
}

// of reports whether the job is about a family: that of nftables is about both.
func (j *job) of(f rules.Family) bool { return j.family == 0 || j.family == f }

// commitTable carries out commands in one transaction.
func (s *session) commitTable(step string, commands []rules.NativeCommand) error {
	at, err := s.m.commitTable(commands)
	if err == nil {
		return nil
	}
	e := &ApplyError{Step: step, Err: err}
	if at >= 0 && at < len(commands) {
		c := commands[at]
		e.Line, e.Rule = at+1, c.String()
		name := cmp.Or(c.Chain.Name, c.Set.Name)
		if t, _, ok := strings.Cut(name, "."); ok {
			e.Table = rules.Table(t)
		}
	}
	s.diagnoseTable(e)
	return e
}

// nftModules are the kernel modules behind what a command says, and what else there is to
// do. A kernel without zones has no such key of ct (nft_ct_set_init, net/netfilter/nft_ct.c).
var nftModules = []nftModule{
	{"redirect to", "nft_redir", ""},
	{"fib ", "nft_fib_inet", ""},
	{"ct zone", "nft_ct", ", or leave the zones out with --skip-dns-conntrack-zone-split, which a kernel without CONFIG_NF_CONNTRACK_ZONES takes"},
	{"ct state", "nft_ct", ""},
	{"type nat", "nft_chain_nat", "; a chain of nat in the family inet takes Linux 5.2"},
	{"type route", "nf_tables", "; a chain of route in the family inet takes Linux 5.2"},
}

type nftModule struct{ word, module, more string }

// diagnoseTable names the cause and the remedy of what the kernel has refused.
func (s *session) diagnoseTable(e *ApplyError) {
	const otherwise = "--backend iptables-nft or iptables-legacy"
	lacks := -1 // which module, where the kernel says that it has no such thing
	if errors.Is(e.Err, syscall.ENOENT) || errors.Is(e.Err, syscall.EOPNOTSUPP) {
		lacks = slices.IndexFunc(nftModules, func(m nftModule) bool { return strings.Contains(e.Rule, m.word) })
	}
	switch {
	case errors.Is(e.Err, syscall.EPERM):
		e.Err = fmt.Errorf("%w (%w)", ErrNotRoot, e.Err)
		e.Remedy = "run as root, or with CAP_NET_ADMIN; if you did, a security module (SELinux, seccomp) denies it: see its log"
	case lacks >= 0: // EOPNOTSUPP is an ErrUnsupported too
		e.Err = fmt.Errorf("%w (%w)", ErrNoModule, e.Err)
		e.Remedy = fmt.Sprintf("modprobe %s, or %s%s", nftModules[lacks].module, otherwise, nftModules[lacks].more)
	case errors.Is(e.Err, errors.ErrUnsupported):
		e.Err = fmt.Errorf("%w (%w)", ErrUnsupported, e.Err)
		e.Remedy = "this kernel has no nf_tables, or none for the family inet (CONFIG_NF_TABLES_INET): " + otherwise
	case errors.Is(e.Err, syscall.EINVAL) && strings.Contains(e.Rule, "meta skuid") && s.mapsUIDs():
		e.Remedy = "this is a user namespace, where rules can name only the UIDs that it has: see /proc/self/uid_map"
	}
}
