package exec

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Snapshot is everything of ours, and of Kuma's own installers, that a network
// namespace holds at one moment: what Restore makes of it again. The zero Snapshot is
// that of a host without any. It marshals to JSON and back. What brings an install back
// after a restart is no part of it: that holds with the Config, not with the moment.
type Snapshot struct {
	// Rules are what iptables-save printed, wherever something of ours stood in it. It
	// is kept as text, so that what nobody can make a Config of, Kuma's rules or half of
	// an install, comes back as well. Others' rules in it are never restored.
	Rules []SnapshotRules
	// PassthroughAddress is whether ::6 was on lo and ours.
	PassthroughAddress bool
	// Nameserver is how names of the mesh were resolved by us; nil is not at all.
	Nameserver *SnapshotNameserver
}

// SnapshotRules is what iptables-save printed of a family, or, with NFTables and Family
// 0, the table as nft(8) reads it.
type SnapshotRules struct {
	Backend tproxy.Backend
	Family  rules.Family
	Text    []byte
}

// SnapshotNameserver is a control plane that we had names of the mesh asked of.
type SnapshotNameserver struct {
	// Split is by what of systemd-resolved; NoSplit is the first nameserver of Path.
	Split   tproxy.Split
	Path    string
	Address netip.Addr
	// Shared is whether Path may be the host's, in another network namespace.
	Shared bool
}

// Empty reports whether nothing of ours stood there.
func (s *Snapshot) Empty() bool {
	return len(s.Rules) == 0 && !s.PassthroughAddress && s.Nameserver == nil
}

// snapshotVersion is that of the form in JSON.
const snapshotVersion = 1

type snapshotJSON struct {
	Version            int                     `json:"version"`
	Rules              []snapshotRulesJSON     `json:"rules"`
	PassthroughAddress bool                    `json:"passthroughAddress"`
	Nameserver         *snapshotNameserverJSON `json:"nameserver,omitempty"`
}

type snapshotRulesJSON struct {
	Backend string `json:"backend"`
	Family  string `json:"family"`
	Text    []byte `json:"text"` // in base64: a comment of others is any bytes
}

type snapshotNameserverJSON struct {
	Split   int        `json:"split"`
	Path    string     `json:"path"`
	Address netip.Addr `json:"address"`
	Shared  bool       `json:"shared"`
}

// MarshalJSON writes a Snapshot for UnmarshalJSON, of this version or a later one.
func (s Snapshot) MarshalJSON() ([]byte, error) {
	out := snapshotJSON{Version: snapshotVersion, Rules: []snapshotRulesJSON{}, PassthroughAddress: s.PassthroughAddress}
	for _, r := range s.Rules {
		out.Rules = append(out.Rules, snapshotRulesJSON{r.Backend.String(), r.Family.String(), r.Text})
	}
	if n := s.Nameserver; n != nil {
		out.Nameserver = &snapshotNameserverJSON{int(n.Split), n.Path, n.Address, n.Shared}
	}
	return json.Marshal(out)
}

// UnmarshalJSON reads what MarshalJSON wrote. The form of a version that it does not
// know is an error: half of a former state would be worse than none.
func (s *Snapshot) UnmarshalJSON(text []byte) error {
	var in snapshotJSON
	if err := json.Unmarshal(text, &in); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if in.Version != snapshotVersion {
		return fmt.Errorf("snapshot: version %d: accepted is %d", in.Version, snapshotVersion)
	}
	out := Snapshot{PassthroughAddress: in.PassthroughAddress}
	for _, r := range in.Rules {
		b, err := tproxy.ParseBackend(r.Backend)
		if err != nil || b == tproxy.Auto {
			return fmt.Errorf("snapshot: backend %q: accepted is nftables, iptables-nft or iptables-legacy", r.Backend)
		}
		if b == tproxy.NFTables {
			if n, err := rules.ParseNative(r.Text); err != nil || n.Table != tproxy.NFTable {
				return fmt.Errorf("snapshot: table %q of nftables: %w", n.Table, cmp.Or(err, fmt.Errorf("accepted is %s", tproxy.NFTable)))
			}
			out.Rules = append(out.Rules, SnapshotRules{Backend: b, Text: r.Text})
			continue
		}
		i := slices.IndexFunc(rules.Families(), func(f rules.Family) bool { return f.String() == r.Family })
		if i < 0 {
			return fmt.Errorf("snapshot: family %q: accepted is IPv4 or IPv6", r.Family)
		}
		f := rules.Families()[i]
		if _, err := rules.ParseSave(f, r.Text); err != nil {
			return fmt.Errorf("snapshot: %s rules of %s: %w", f, b, err)
		}
		out.Rules = append(out.Rules, SnapshotRules{b, f, r.Text})
	}
	if n := in.Nameserver; n != nil {
		by := tproxy.Split(n.Split)
		if by != tproxy.NoSplit && by != tproxy.SplitDelegate && by != tproxy.SplitLink || !n.Address.IsValid() || by == tproxy.NoSplit && n.Path == "" {
			return fmt.Errorf("snapshot: nameserver %+v: accepted is a split of 0 to 2, with an address and a path", *n)
		}
		out.Nameserver = &SnapshotNameserver{by, n.Path, n.Address, n.Shared}
	}
	*s = out
	return nil
}

// Snapshot reads what is ours in this network namespace. It writes nothing, and needs
// root: without, the error is ErrNotRoot.
func (r *Runner) Snapshot(ctx context.Context) (*Snapshot, error) {
	t, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	return t.snapshot(ctx)
}

// snapshot is what stands there, as the jobs have read it.
func (t *transaction) snapshot(ctx context.Context) (*Snapshot, error) {
	out := &Snapshot{}
	address := false
	for _, j := range t.jobs {
		if len(j.before.Ours.Bases)+len(j.before.Ours.Chains) == 0 {
			continue
		}
		text := j.before.text
		if j.before.table != nil {
			text = j.before.table.Known().Text()
			if _, err := rules.ParseNative(text); err != nil { // what cannot be read back is no way back
				return nil, fmt.Errorf("table inet %s has what no snapshot holds: %w", tproxy.NFTable, err)
			}
		}
		out.Rules = append(out.Rules, SnapshotRules{j.variant.Backend, j.family, text})
		address = address || j.addressOurs()
	}
	if address {
		_, v6 := tproxy.PassthroughAddresses()
		var err error
		if out.PassthroughAddress, err = t.m.hasAddress(v6); err != nil {
			return nil, fmt.Errorf("addresses of lo: %w", err)
		}
	}
	var err error
	out.Nameserver, err = t.nameserverOfOurs(ctx)
	return out, err
}

// nameserverOfOurs looks where an install puts a control plane. What stands there
// counts, not what the record says: somebody may have taken it out since.
func (t *transaction) nameserverOfOurs(ctx context.Context) (*SnapshotNameserver, error) {
	if t.elsewhere {
		return nil, nil
	}
	paths, shared := t.namesPaths()
	for _, p := range paths {
		r, err := t.m.resolvConf(p, shared).InspectRemoval()
		if err != nil {
			return nil, fmt.Errorf("nameserver of ours in %s: %w", p, err)
		}
		if r.How != dns.Unchanged && r.Address.IsValid() {
			return &SnapshotNameserver{tproxy.NoSplit, p, r.Address, shared}, nil
		}
	}
	if c, err := t.m.delegate().Inspect(netip.Addr{}); err == nil && c.Before().IsValid() && t.delegateHere() {
		return &SnapshotNameserver{Split: tproxy.SplitDelegate, Address: c.Before()}, nil
	}
	l, there, err := t.m.meshLink()
	if err != nil {
		return nil, fmt.Errorf("the interface %s: %w", tproxy.MeshLink, err)
	}
	if there && l.Ours {
		if m := t.meshState(ctx, l); m.server.IsValid() {
			return &SnapshotNameserver{Split: tproxy.SplitLink, Address: m.server}, nil
		}
	}
	return nil, nil
}

// RestoreOptions say how to restore.
type RestoreOptions struct {
	// LeaveNames restores the rules and ::6 alone, and leaves resolv.conf and
	// systemd-resolved as they are: for when these cannot be changed, and a way in to
	// the host hangs on the rules.
	LeaveNames bool
	// Wait, WaitInterval, MaxRetries and SleepBetweenRetries are those of
	// tproxy.Config.
	Wait, WaitInterval  time.Duration
	MaxRetries          int
	SleepBetweenRetries time.Duration
}

// Restore makes what is ours what it was when the Snapshot was taken, or, if the error
// is not nil, leaves the host as it is, unless ApplyError.Left says otherwise. It is the
// transaction of Apply and Remove: one commit a table, rules that come back in another
// variant of iptables before others go, and what others changed since stays as they have
// it. An empty Snapshot takes everything out, as Remove does. Where all is as it was,
// nothing is written.
func (r *Runner) Restore(ctx context.Context, before *Snapshot, o RestoreOptions) (*Report, error) {
	s, err := r.session()
	if err != nil {
		return nil, err
	}
	if err := s.m.privileged(); err != nil {
		return nil, err
	}
	s.patient(tproxy.Config{Wait: cmp.Or(o.Wait, tproxy.DefaultWait), WaitInterval: o.WaitInterval, MaxRetries: o.MaxRetries, SleepBetweenRetries: o.SleepBetweenRetries})
	unlock, err := s.locked(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return s.goBack(ctx, before, o)
}

// goBack is Restore for who has the lock.
func (s *session) goBack(ctx context.Context, before *Snapshot, o RestoreOptions) (*Report, error) {
	t := &transaction{session: s, report: &Report{}, leaveNames: o.LeaveNames, leaveStored: true, removes: len(before.Rules) == 0, resolvConf: tproxy.DefaultResolvConf}
	if n := before.Nameserver; n != nil {
		t.put, t.split = &tproxy.PutNameserver{Path: n.Path, Address: n.Address, Shared: n.Shared}, n.Split
	}
	defer func() { s.former = nil }()
	err := t.underLock(ctx, before.PassthroughAddress, func() ([]job, error) { return t.restoreJobs(ctx, before) })
	if err != nil {
		return nil, err
	}
	t.report.Retries, t.report.Processes = t.retries, t.processes
	return t.report, nil
}

// restoreJobs are the rules as they were, and behind them the removal of what is ours
// elsewhere.
func (t *transaction) restoreJobs(ctx context.Context, before *Snapshot) ([]job, error) {
	variants := t.variants(ctx)
	t.former = map[place]rules.Set{}
	var jobs []job
	for _, r := range before.Rules {
		step := fmt.Sprintf("the former %s rules by %s", r.Family, r.Backend)
		i := slices.IndexFunc(variants, func(v tproxy.Variant) bool { return v.Backend == r.Backend && v.Installed(r.Family) })
		if r.Backend == tproxy.NFTables {
			step = tproxy.ReplaceRules{Backend: r.Backend}.Undo()
			n, err := rules.ParseNative(r.Text)
			if err == nil && i < 0 {
				err = fmt.Errorf("%w: %s", ErrUnsupported, t.m.noNFTables())
			}
			if err != nil {
				return nil, &ApplyError{Step: step, Err: err}
			}
			jobs = append(jobs, job{step: step, variant: variants[i], want: nothing, table: &n})
			continue
		}
		if i < 0 {
			return nil, &ApplyError{Step: step, Family: r.Family,
				Err:    fmt.Errorf("the programs of %s for %s are not here any more: %w", r.Backend, r.Family, ErrUnsupported),
				Remedy: "install the package iptables"}
		}
		all, err := rules.ParseSave(r.Family, r.Text)
		if err != nil {
			return nil, &ApplyError{Step: step, Family: r.Family, Err: err}
		}
		was := tproxy.Find(r.Family, all).Ours
		t.former[place{r.Backend, r.Family}] = was
		jobs = append(jobs, job{step: step, variant: variants[i], family: r.Family, want: func(tproxy.Record) rules.Set { return was }})
	}
	gone, err := t.removals(variants, func(b tproxy.Backend, f rules.Family) bool {
		return !slices.ContainsFunc(before.Rules, func(r SnapshotRules) bool { return r.Backend == b && r.Family == f })
	})
	return append(jobs, gone...), err
}
