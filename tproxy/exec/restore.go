package exec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-iptables/iptables"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/nft"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// live is what iptables-save said of a family.
type live struct {
	text []byte
	all  rules.Set
	tproxy.Found
	table *rules.Native // of nftables
}

// savedText is what iptables-save prints of a family, and the step that it is.
func (s *session) savedText(ctx context.Context, v tproxy.Variant, f rules.Family) (text []byte, step string, err error) {
	path := v.For(f).Save
	step = fmt.Sprintf("reading the %s rules of %s", f, v.Backend)
	c := command{Path: path}
	if s.counters {
		c.Args = []string{"-c"}
	}
	r, err := s.run(ctx, c)
	if err != nil {
		return nil, step, &ApplyError{Step: step, Family: f, Program: path, Err: err}
	}
	if r.Exit != 0 {
		return nil, step, s.failure(ctx, step, f, v, path, nil, r)
	}
	return r.Stdout, step, nil
}

// save reads the rules of a family. Where the kernel has no table for it there are none,
// and no process need be started to hear so: as in a network namespace that is new.
func (s *session) save(ctx context.Context, v tproxy.Variant, f rules.Family) (live, error) {
	if v.Backend == tproxy.NFTables {
		return s.savedTable()
	}
	if tables, err := s.m.tables(v.Backend == tproxy.IPTablesNFT, f); err == nil && len(tables) == 0 {
		return live{}, nil
	}
	path := v.For(f).Save
	text, step, err := s.savedText(ctx, v, f)
	if err != nil {
		return live{}, err
	}
	// iptables-nft-save passes over a table that holds what iptables cannot say.
	for _, t := range []rules.Table{rules.NAT, rules.Raw} {
		if incompatible(text, t) {
			return live{}, &ApplyError{Step: step, Family: f, Table: t, Program: path,
				Err:    fmt.Errorf("table %s %s holds rules that were made with nft and that iptables cannot read", nftFamily(f), t),
				Remedy: fmt.Sprintf("move them to a table of another name and run this again (to see them: nft list table %s %s); install can use --backend iptables-legacy as well", nftFamily(f), t)}
		}
	}
	all, err := rules.ParseSave(f, text)
	if err != nil {
		return live{}, &ApplyError{Step: step, Family: f, Program: path, Err: err}
	}
	l := live{text: text, all: all, Found: tproxy.Find(f, all)}
	l.add(f, s.former[place{v.Backend, f}])
	return l, nil
}

// place is where rules stand.
type place struct {
	backend tproxy.Backend
	family  rules.Family
}

// add counts among what is ours what was ours in a former state. Some rules of Kuma's
// are known by what stands around them (tproxy.Find), and on the way back to them there
// is a moment, between two tables, in which nothing does.
func (l *live) add(f rules.Family, former rules.Set) {
	if len(former.Bases)+len(former.Chains) == 0 {
		return
	}
	more, _ := l.all.Ours(f, former)
	for _, c := range more.Chains {
		if _, known := l.Ours.Chain(c.Table, c.Name); !known {
			l.Ours.Chains = append(l.Ours.Chains, c)
		}
	}
	for _, c := range more.Bases {
		i := slices.IndexFunc(l.Ours.Bases, func(b rules.BaseChain) bool { return b.Table == c.Table && b.Hook == c.Hook })
		if i < 0 {
			i = len(l.Ours.Bases)
			l.Ours.Bases = append(l.Ours.Bases, rules.BaseChain{Table: c.Table, Hook: c.Hook, Place: c.Place})
		}
		b := &l.Ours.Bases[i]
		for _, r := range c.Rules {
			if !slices.ContainsFunc(b.Rules, func(q rules.Rule) bool { return q.At == r.At && q.Via == r.Via }) {
				b.Rules = append(b.Rules, r)
			}
		}
		base, _ := l.all.Base(c.Table, c.Hook)
		all := l.all.Inline(base)
		place := func(r rules.Rule) int {
			return slices.IndexFunc(all, func(q rules.Rule) bool { return q.At == r.At && q.Via == r.Via })
		}
		slices.SortFunc(b.Rules, func(p, q rules.Rule) int { return place(p) - place(q) })
	}
	l.References = slices.DeleteFunc(l.References, func(r rules.Reference) bool { return l.Ours.Covers(r.Table, r.Chain, r.Index) })
}

// incompatible reports whether iptables-nft-save passed over a table.
func incompatible(text []byte, t rules.Table) bool {
	return bytes.Contains(text, fmt.Appendf(nil, "# Table `%s' is incompatible, use 'nft' tool", t))
}

// restore feeds a script to iptables-restore.
func (s *session) restore(ctx context.Context, v tproxy.Variant, f rules.Family, step string, script []byte) error {
	c := command{Path: v.For(f).Restore, Args: []string{"--noflush"}, Stdin: script}
	// Always with --wait=N: without it, and with 0, the legacy restore of 1.8.9
	// waits for ever. Not to wait at all is to look who holds the lock, and to
	// give whom we cannot see, or who takes it now, one second. The nft one
	// takes no lock and ignores the option (iptables-restore(8)). It is never
	// written as "-w N", which the legacy one reads as a file's name.
	seconds := max(1, (s.wait+time.Second-1)/time.Second)
	c.Args = append(c.Args, fmt.Sprintf("--wait=%d", seconds))
	if v.Backend == tproxy.IPTablesLegacy {
		if s.wait <= 0 {
			if pid, comm, ok := s.m.lockHolder(s.lockFile); ok {
				return &ApplyError{Step: step, Family: f, Err: ErrLocked, Remedy: heldBy(pid, comm)}
			}
		}
		if s.waitInterval > 0 {
			c.Args = append(c.Args, fmt.Sprintf("--wait-interval=%d", s.waitInterval/time.Microsecond))
		}
	}
	r, err := s.run(ctx, c)
	if err != nil {
		return &ApplyError{Step: step, Family: f, Program: c.Path, Err: err}
	}
	if r.Exit != 0 {
		return s.failure(ctx, step, f, v, c.Path, script, r)
	}
	return nil
}

// test has iptables-restore read a script and try it, without a commit.
func (s *session) test(ctx context.Context, v tproxy.Variant, f rules.Family, step string, script []byte) error {
	c := command{Path: v.For(f).Restore, Args: []string{"--noflush", "--test", fmt.Sprintf("--wait=%d", max(1, s.wait/time.Second))}, Stdin: script}
	r, err := s.run(ctx, c)
	if err != nil {
		return &ApplyError{Step: step, Family: f, Program: c.Path, Err: err}
	}
	if r.Exit != 0 {
		return s.failure(ctx, step, f, v, c.Path, script, r)
	}
	return nil
}

// maxStderr is how much of a program's stderr an error keeps, in bytes.
const maxStderr = 4096

func heldBy(pid int, comm string) string {
	return fmt.Sprintf("process %d (%s) holds the xtables lock; wait for it, or wait longer with --wait", pid, comm)
}

// failedLine finds the line that iptables-restore names: "line 12 failed",
// "line 5: RULE_APPEND failed (...)", "Error occurred at line: 12".
var failedLine = regexp.MustCompile(`line:? (\d+)`)

// failure makes an error of what a program of iptables left.
func (s *session) failure(ctx context.Context, step string, f rules.Family, v tproxy.Variant, path string, script []byte, r result) *ApplyError {
	e := &ApplyError{Step: step, Family: f, Program: path, Stderr: string(r.Stderr[:min(len(r.Stderr), maxStderr)]), Err: fmt.Errorf("exit code %d", r.Exit)}
	if r.Exit < 0 {
		e.Err = errors.New("killed by a signal")
	}
	lines := bytes.Split(script, []byte("\n"))
	if m := failedLine.FindStringSubmatch(e.Stderr); m != nil && script != nil {
		if n, err := strconv.Atoi(m[1]); err == nil && n >= 1 && n <= len(lines) {
			e.Line, e.Rule = n, string(lines[n-1])
			for _, l := range lines[:n] {
				if t, ok := bytes.CutPrefix(l, []byte("*")); ok {
					e.Table = rules.Table(t)
				}
			}
		}
	}
	e.Version = s.version(path, f, v.Backend)
	s.diagnose(e, v, script)
	return e
}

// diagnose names the cause and the remedy, where the words of iptables tell.
func (s *session) diagnose(e *ApplyError, v tproxy.Variant, script []byte) {
	says := func(words ...string) bool {
		for _, w := range words {
			if strings.Contains(e.Stderr, w) {
				return true
			}
		}
		return false
	}
	cause := func(err error) { e.Err = fmt.Errorf("%w (%w)", err, e.Err) }
	switch {
	case says("holding the xtables lock", "Can't lock "):
		cause(ErrLocked)
		if pid, comm, ok := s.m.lockHolder(s.lockFile); ok {
			e.Remedy = heldBy(pid, comm)
		} else {
			e.Remedy = "somebody held the xtables lock for the whole time; wait longer with --wait"
		}
	case says("can't open lock file") && says("Read-only file system", "No such file or directory", "Permission denied"):
		e.Remedy = "the lock of iptables-legacy must be writable: mount /run writable, or name another file in XTABLES_LOCKFILE"
	case says("Permission denied", "you must be root", "Operation not permitted"):
		cause(ErrNotRoot)
		e.Remedy = "run as root, or with CAP_NET_ADMIN and CAP_NET_RAW; if you did, a security module (SELinux, seccomp) denies it: see its log"
	case says("Invalid argument") && strings.Contains(e.Rule, "--uid-owner") && s.mapsUIDs():
		e.Remedy = "this is a user namespace, where rules can name only the UIDs that it has: see /proc/self/uid_map"
	case says("missing kernel module", "do you need to insmod", "No chain/target/match by that name", "Couldn't load match", "Couldn't load target", "Extension ", "(No such file or directory)", "Could not fetch rule set generation id", "Failed to initialize nft", "Protocol not supported"):
		cause(ErrNoModule)
		e.Remedy = remedyFor(v.Backend, e, script)
	case says("--wait") && says("unrecognized option", "unknown option"):
		e.Remedy = "this iptables is too old: iptables-restore has --wait since 1.6.2"
	}
}

// mapsUIDs reports whether this is a user namespace with some UIDs only
// (user_namespaces(7)).
func (s *session) mapsUIDs() bool {
	text, err := s.m.readFile("/proc/self/uid_map")
	f := strings.Fields(string(text))
	return err == nil && (len(f) != 3 || f[0] != "0" || f[2] != "4294967295")
}

// modules are the kernel modules behind what a rule says, in the order in which
// they are looked for.
var modules = []struct{ word, module, instead string }{
	{"--uid-owner", "xt_owner", ""},
	{"-j REDIRECT", "xt_REDIRECT", ""},
	{"-m addrtype", "xt_addrtype", ""},
	{"-m multiport", "xt_multiport", ""},
	{"-j CT ", "xt_CT", ", or leave the zones out with --skip-dns-conntrack-zone-split"},
	{"-m comment", "xt_comment", ", or leave the comments out with --disable-comments"},
}

// remedyFor names the module that a failed rule, or, when iptables only says
// that the commit failed, one of the script's rules needs.
func remedyFor(b tproxy.Backend, e *ApplyError, script []byte) string {
	rule, certain := e.Rule, e.Rule != "" && e.Rule != "COMMIT"
	for _, m := range modules {
		// iptables names the extension that it misses, whichever line it stands on.
		name := strings.TrimPrefix(m.module, "xt_")
		if strings.Contains(e.Stderr, "`"+name+"'") || strings.Contains(e.Stderr, "Extension "+name+" ") {
			return "modprobe " + m.module + m.instead
		}
	}
	var all []string
	for _, m := range modules {
		if certain && strings.Contains(rule, m.word) {
			return "modprobe " + m.module + m.instead
		}
		if bytes.Contains(script, []byte(m.word)) {
			all = append(all, m.module)
		}
	}
	if b == tproxy.IPTablesNFT {
		all = append([]string{"nf_tables", "nft_compat", "nft_chain_nat"}, all...)
	} else {
		all = append([]string{"iptable_nat", "iptable_raw", "ip6table_nat", "ip6table_raw"}, all...)
	}
	return "one of these modules is missing; to load them: modprobe -a " + strings.Join(all, " ")
}

// lacksComments reports whether a restore failed because the kernel, or iptables, has
// no comments.
func lacksComments(err error) bool {
	e, ok := errors.AsType[*ApplyError](err)
	return ok && errors.Is(err, ErrNoModule) && strings.HasPrefix(e.Remedy, "modprobe xt_comment")
}

// version says which iptables failed, and what it is too old for. It costs a
// process, which a failure is worth.
func (s *session) version(path string, f rules.Family, b tproxy.Backend) string {
	base := strings.TrimSuffix(strings.TrimSuffix(path, "-restore"), "-save")
	proto := iptables.ProtocolIPv4
	if f == rules.IPv6 {
		proto = iptables.ProtocolIPv6
	}
	s.processes++
	ipt, err := iptables.New(iptables.IPFamily(proto), iptables.Path(base))
	if err != nil {
		return ""
	}
	v1, v2, v3 := ipt.GetIptablesVersion()
	text := fmt.Sprintf("iptables %d.%d.%d (%s)", v1, v2, v3, b)
	if v1 == 1 && (v2 < 6 || v2 == 6 && v3 < 2) {
		text += ", whose restore has no --wait"
	}
	return text
}

// passes reports whether a failure can be gone in a moment though no rule
// changed: somebody holds the lock, or the kernel is busy.
func passes(err error) bool {
	e, ok := errors.AsType[*ApplyError](err)
	if !ok || errors.Is(err, ErrLocked) {
		return ok
	}
	if errors.Is(e.Err, nft.ErrUnknown) {
		return true // of a batch whose answer was lost: it was not done, or the rules would have changed
	}
	for _, errno := range []syscall.Errno{syscall.EAGAIN, syscall.EBUSY, syscall.ENOBUFS, syscall.EINTR} {
		if errors.Is(e.Err, errno) {
			return true
		}
	}
	return slices.ContainsFunc([]string{"Resource temporarily unavailable", "Device or resource busy", "Resource busy"},
		func(words string) bool { return strings.Contains(e.Stderr, words) })
}

// pass sleeps where a failure passes and may be tried again, and reports whether
// it did; n counts. The sleep ends with ctx, which is no reason to try again.
func (s *session) pass(ctx context.Context, step string, err error, n *int) bool {
	if *n >= s.maxRetries || !passes(err) {
		return false
	}
	s.log.Warn("failed; trying again", "step", step, "retry", *n+1, "of", s.maxRetries, "in", s.sleep, "error", err)
	select {
	case <-ctx.Done():
	case <-time.After(s.sleep):
	}
	if ctx.Err() != nil {
		return false
	}
	*n++
	s.retries++
	return true
}

// retryable reports whether trying again can help once the rules are found to
// have changed. The words do not tell: of a rule that somebody else deleted
// meanwhile the legacy restore says "line 3 failed" and nothing more.
func retryable(err error) bool {
	_, ok := errors.AsType[*ApplyError](err)
	return ok && !errors.Is(err, ErrLocked) && !errors.Is(err, ErrNotRoot)
}
