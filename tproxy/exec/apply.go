package exec

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// maxTries is how often the rules of a family are written when somebody else
// changes them at the same time.
const maxTries = 10

// Apply carries out a plan: afterwards everything of it is in place, or, if the
// error is not nil, the host is as it was before, unless ApplyError.Left says
// otherwise. What is in place already is left alone; with all of it in place
// nothing is written and the report says so.
//
// A step that failed is tried again where the failure passes, as the plan's Config
// says: somebody held the xtables lock, or the kernel was busy. With all of its
// patience, a lock that is held for good takes a restore (MaxRetries+1) * Wait +
// MaxRetries * SleepBetweenRetries, 33 s by default, and an undo as long.
//
// While an install waits for its confirmation (see Try), the error is a *PendingError.
//
// Where the plan's Config leaves the backend open and this kernel turns out not to hold
// the table of nftables that Build chose, the install goes into iptables, if it can, and
// the report says so.
//
// The context is looked at between steps only: a cancelled Apply is undone,
// never left half.
func (r *Runner) Apply(ctx context.Context, p *tproxy.Plan) (*Report, error) {
	return r.apply(ctx, p, nil)
}

// apply is Apply, or with a trial Try.
func (r *Runner) apply(ctx context.Context, p *tproxy.Plan, try *TrialOptions) (*Report, error) {
	report, err := r.applyTo(ctx, p, try)
	if q := withoutTable(p, err); q != nil {
		why := err
		if report, err = r.applyTo(ctx, q, try); err == nil {
			report.Notes = append(report.Notes, fmt.Sprintf("nftables was tried first, and this kernel cannot: %v", why))
		}
	}
	return report, err
}

// withoutTable is the plan by iptables where this kernel refused what nobody asked for by
// name, a table of nftables; nil where that is not so. Of what the kernel lacks, short of
// trying, only its release tells.
func withoutTable(p *tproxy.Plan, err error) *tproxy.Plan {
	e, failed := errors.AsType[*ApplyError](err)
	if !failed || len(e.Left) > 0 || p.Backend != tproxy.NFTables || p.Config.Backend != tproxy.Auto || !errors.Is(err, ErrNoModule) && !errors.Is(err, ErrUnsupported) {
		return nil
	}
	host := p.Host
	host.Variants = slices.DeleteFunc(slices.Clone(host.Variants), func(v tproxy.Variant) bool { return v.Backend == tproxy.NFTables })
	host.NoNFTables = e.Err.Error()
	if len(host.Variants) == 0 {
		return nil
	}
	q, err := tproxy.Build(p.Config, host)
	if err != nil {
		return nil // what the kernel said is nearer
	}
	return q
}

// applyTo is apply, of the plan as it is.
func (r *Runner) applyTo(ctx context.Context, p *tproxy.Plan, try *TrialOptions) (*Report, error) {
	s, err := r.session()
	if err != nil {
		return nil, err
	}
	s.patient(p.Config)
	if err := s.m.privileged(); err != nil {
		return nil, err
	}
	t := &transaction{session: s, report: &Report{Backend: p.Backend, Why: p.BackendWhy}, bare: p.Config.DisableComments,
		plan: p, put: p.Config.Needs().Nameserver, split: p.Host.Nameserver.Split, resolvConf: tproxy.DefaultResolvConf}
	t.tryOut = func() error { return t.tryQueries(p) }
	unlock, err := s.locked(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	notes, err := s.settle(ctx)
	if err != nil {
		return nil, err
	}
	run := func() error {
		return t.underLock(ctx, slices.Contains(p.Families, rules.IPv6), func() ([]job, error) { return t.applyJobs(p) })
	}
	if try == nil {
		err = run()
	} else {
		err = t.try(ctx, *try, run)
	}
	if err != nil {
		return nil, err
	}
	s.told()
	t.report.Notes = append(t.report.Notes, notes...)
	t.report.Notes = append(t.report.Notes, t.kuma("replaced")...)
	t.report.Notes = append(t.report.Notes, t.listening(p)...)
	t.report.Notes = append(t.report.Notes, t.filters(p)...)
	t.report.Notes = append(t.report.Notes, t.others(p)...)
	t.report.Notes = append(t.report.Notes, t.answers(p)...)
	t.report.Retries, t.report.Processes = s.retries, s.processes
	return t.report, nil
}

// Remove takes out everything of ours, whoever installed it, for whichever
// user, variant, and with or without comments, and what Kuma's own installers left
// (tproxy.Find): chains by their names, jumps by their exact rule, the address ::6
// if the record says that we made it, or Kuma's installer did. What is not ours
// stays as it is. With nothing of ours there, nothing is written.
//
// An install that waits for its confirmation (see Try) goes like any other, and with it
// its former state: nothing is put back any more.
//
// Connections that are redirected live on only where o.Drain lets them, or where
// rules of others hold conntrack; Report.Cut counts those that do not. A context that
// is cancelled during a drain puts the rules back.
func (r *Runner) Remove(ctx context.Context, o RemoveOptions) (*Report, error) {
	s, err := r.session()
	if err != nil {
		return nil, err
	}
	s.patient(tproxy.Config{Wait: o.Wait, WaitInterval: o.WaitInterval, MaxRetries: o.MaxRetries, SleepBetweenRetries: o.SleepBetweenRetries})
	if s.wait == 0 {
		s.wait = tproxy.DefaultWait
	}
	if err := s.m.privileged(); err != nil {
		return nil, err
	}
	t := &transaction{session: s, report: &Report{}, dryRun: o.DryRun, removes: true, drainFor: o.Drain,
		resolvConf: cmp.Or(o.ResolvConf, tproxy.DefaultResolvConf)}
	if !o.DryRun {
		unlock, err := s.locked(ctx)
		if err != nil {
			return nil, err
		}
		defer unlock()
	}
	err = t.underLock(ctx, false, func() ([]job, error) {
		return t.removals(s.variants(ctx), everywhere)
	})
	if err != nil {
		return nil, err
	}
	if err := t.endTrial(o.DryRun); err != nil {
		return nil, err
	}
	if t.drained != nil {
		t.report.Families = t.drained
	}
	done := "taken out"
	if o.DryRun {
		done = "to be taken out"
	}
	t.report.Notes = append(t.report.Notes, t.kuma(done)...)
	t.report.Retries, t.report.Processes = s.retries, s.processes
	return t.report, nil
}

// job is what is to be done to the rules of one family of one backend; to those of
// nftables, which are of both, with family 0.
type job struct {
	step    string
	variant tproxy.Variant
	family  rules.Family
	want    func(tproxy.Record) rules.Set
	// table, if not nil, is wanted of nftables in the place of want: as it was read, it may
	// hold what no Set of ours does.
	table *rules.Native

	before live // read before anything was written, or after a drain
}

func nothing(tproxy.Record) rules.Set { return rules.Set{} }

// addressOurs reports whether what stood there says that ::6 is ours, or Kuma's.
func (j *job) addressOurs() bool {
	was, _ := tproxy.ReadRecord(j.before.Ours) // of one that cannot be read, what could be
	// Kuma's installer adds ::6 wherever it has rules for IPv6, and leaves it.
	return was.PassthroughAddressOurs || len(j.before.Kuma) > 0 && j.family == rules.IPv6
}

// applyJobs are a plan's rules, and behind them the removal of what is ours
// elsewhere. What that is, is read again under the lock: another run may have
// come in between since the host was observed.
func (t *transaction) applyJobs(p *tproxy.Plan) ([]job, error) {
	if len(p.Host.Variants) == 0 {
		return nil, &ApplyError{Step: "finding iptables",
			Err:    fmt.Errorf("no iptables-save and iptables-restore on PATH, %s: %w", strings.Join(programDirs, ", ")+t.orNFTables(), ErrUnsupported),
			Remedy: "install the package iptables"}
	}
	var jobs []job
	for _, f := range p.Commits() {
		step := tproxy.ReplaceRules{Family: f, Backend: p.Backend}.String()
		v, ok := p.Host.Variant(p.Backend)
		switch {
		case ok && v.Installed(f):
		case p.Backend == tproxy.NFTables:
			return nil, &ApplyError{Step: step,
				Err:    fmt.Errorf("the plan was made for a kernel without nftables: %w", ErrUnsupported),
				Remedy: "build the plan from what Runner.Probe observes"}
		default:
			return nil, &ApplyError{Step: step, Family: f,
				Err:    fmt.Errorf("the plan was made for a host without the programs of %s for %s: %w", p.Backend, f, ErrUnsupported),
				Remedy: "install the package iptables, and build the plan from what Runner.Probe observes then"}
		}
		jobs = append(jobs, job{step: step, variant: v, family: f, want: p.WithRecord})
	}
	now := slices.Clone(p.Host.Variants)
	for i := range now {
		now[i].Rules, now[i].Ours, now[i].Unknown = false, nil, ""
		t.inKernel(&now[i])
	}
	gone, err := t.removals(now, p.Goes)
	return append(jobs, gone...), err
}

// removals are the jobs that take out what is ours in the variants, where goes
// says so.
func (t *transaction) removals(variants []tproxy.Variant, goes func(tproxy.Backend, rules.Family) bool) ([]job, error) {
	var jobs []job
	for _, v := range variants {
		if v.Unknown != "" {
			return nil, &ApplyError{Step: "reading what is installed",
				Err: fmt.Errorf("whether rules of ours stand in %s cannot be told: %s", v.Backend, v.Unknown)}
		}
		for _, f := range v.Ours {
			if !goes(v.Backend, f) {
				continue
			}
			step := tproxy.RemoveRules{Family: f, Backend: v.Backend}
			if !v.Installed(f) {
				return nil, &ApplyError{Step: step.String(), Family: f,
					Err:    fmt.Errorf("rules of ours are there, and the programs of %s for %s are not", v.Backend, f),
					Remedy: "install the package iptables"}
			}
			jobs = append(jobs, job{step: step.String(), variant: v, family: f, want: nothing})
		}
	}
	return jobs, nil
}

// transaction is what was done so far, and how to take it back.
type transaction struct {
	*session
	report *Report
	dryRun bool
	bare   bool // whether the record may do without comments
	undo   []undo
	jobs   []job

	put        *tproxy.PutNameserver // nil puts none in
	into       dns.Manager           // of the file into which it goes
	resolvConf string                // that may hold a nameserver of ours
	drop       []removal
	split      tproxy.Split // by which names of the mesh go to the address of put, not by its file
	names      []hostChange

	tryOut func() error // what was written, before it counts; nil is not to

	removes    bool // everything goes
	leaveNames bool

	// plan is what comes back after a restart; nil is nothing. leaveStored is not to look at
	// what does, and later only to look.
	plan               *tproxy.Plan
	leaveStored, later bool
	store              []hostChange
	tried              bool          // by iptables-restore --test
	rec                tproxy.Record // that is in the rules now
	lookOnly           bool          // what is not so is an error

	// begin, if set, is called once, before the first change, with what was there.
	begin func(*Snapshot) error
	begun bool

	drainFor time.Duration
	drained  []FamilyReport // what a drain took out
}

// undo takes back one step; did is whether there was anything to take back.
type undo struct {
	what string
	run  func(context.Context) (did bool, err error)
}

// locked takes the lock, for the children too.
func (s *session) locked(ctx context.Context) (unlock func(), err error) {
	l, err := s.m.lock(ctx, s.wait)
	if err != nil {
		return nil, err
	}
	s.lock = l.file
	return func() { s.lock = nil; l.unlock() }, nil
}

// underLock finds the jobs and does them, for who has the lock: what is there is read
// when nobody else of us can change it any more, and all of it before anything
// is written. A dry run needs no lock.
func (t *transaction) underLock(ctx context.Context, ipv6 bool, find func() ([]job, error)) error {
	jobs, err := find()
	if err != nil {
		return err
	}
	rec := tproxy.Record{Version: t.recorded, PassthroughAddressOurs: t.rec.PassthroughAddressOurs}
	if !t.leaveStored {
		if i, err := t.savedHere(); err == nil && i != nil {
			rec.PassthroughAddressOurs = i.PassthroughAddressOurs
		}
	}
	for i := range jobs {
		if err := ctx.Err(); err != nil {
			return err
		}
		l, err := t.save(ctx, jobs[i].variant, jobs[i].family)
		if err != nil {
			return err
		}
		jobs[i].before = l
		was, _ := tproxy.ReadRecord(l.Ours)
		rec.Bare = rec.Bare || t.bare && was.Bare // there were no comments then either
		rec.PassthroughAddressOurs = rec.PassthroughAddressOurs || jobs[i].addressOurs()
	}
	t.jobs, t.report.Before = jobs, installation(jobs)
	t.leaveNames = t.leaveNames || t.elsewhere
	if !t.leaveNames {
		if err := t.lookAtNames(ctx); err != nil {
			return err
		}
	}
	if !t.leaveStored {
		if err := t.lookAtStored(ctx, rec); err != nil {
			return err
		}
	}
	if err = t.drain(ctx, jobs, rec); err != nil {
		return t.rollback(ctx, err)
	}
	if t.removes {
		t.cut(ctx, jobs)
	}
	err = t.write(ctx, jobs, rec, ipv6)
	if err != nil && t.bare && lacksComments(err) {
		// Comments are off, but for the record.
		if err = t.again(ctx, err, jobs); err == nil {
			rec.Bare = true
			t.report.Notes = append(t.report.Notes, "the kernel has no comments (xt_comment): the rules hold no record of the version and the configuration")
			err = t.write(ctx, jobs, rec, ipv6)
		}
	}
	if err == nil && t.tryOut != nil {
		err = t.tryOut()
	}
	if err == nil && !t.leaveNames {
		err = t.writeNames(ctx)
	}
	if err == nil && !t.leaveStored && !t.later {
		err = t.keep(ctx)
	}
	if err != nil {
		return t.rollback(ctx, err)
	}
	return nil
}

// again takes back what was done and reads the rules anew, for another try. The error
// is that of the first one, if that is impossible.
func (t *transaction) again(ctx context.Context, failed error, jobs []job) error {
	e, ok := errors.AsType[*ApplyError](t.rollback(ctx, failed))
	if !ok || len(e.Left) > 0 {
		t.undo = nil
		return failed
	}
	t.undo, t.report.Steps, t.report.Families, t.report.Changed = nil, nil, nil, false
	for i := range jobs {
		l, err := t.save(ctx, jobs[i].variant, jobs[i].family)
		if err != nil {
			return failed
		}
		jobs[i].before = l
	}
	return nil
}

// write does all that changes the host, in an order that a kill at any point
// leaves for the next run to finish: the address is there only while a record
// in the rules says whose it is, and new rules are in place before old ones go
// in another backend.
func (t *transaction) write(ctx context.Context, jobs []job, rec tproxy.Record, ipv6 bool) error {
	_, v6 := tproxy.PassthroughAddresses()
	address := tproxy.AddAddress{Prefix: hostPrefix(v6)}
	there := false
	if ipv6 {
		var err error
		if there, err = t.m.hasAddress(v6); err != nil {
			return &ApplyError{Step: address.String(), Family: rules.IPv6, Err: err}
		}
		rec.PassthroughAddressOurs = rec.PassthroughAddressOurs || !there
	}
	drop := !ipv6 && rec.PassthroughAddressOurs
	if drop {
		rec.PassthroughAddressOurs = false
	}
	t.rec = rec
	for i := range jobs {
		// Before anything is written: to take the last NAT rule out and put it
		// back would cost the redirected connections.
		j := &jobs[i]
		if len(j.before.References) == 0 || len(j.compare(j.before, j.want(rec))) == 0 {
			continue
		}
		if err := blocked(j, j.before); err != nil {
			return err
		}
	}
	if drop {
		if err := t.removeAddress(ctx, address); err != nil {
			return err
		}
	}
	for i := range jobs {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := t.replace(ctx, &jobs[i], jobs[i].want(rec)); err != nil {
			return err
		}
	}
	if ipv6 && !there {
		return t.addAddress(ctx, address)
	}
	return nil
}

// first is called before each change, and tells whoever waits for the first one.
func (t *transaction) first(ctx context.Context) error {
	if t.begin == nil || t.begun {
		return nil
	}
	before, err := t.snapshot(ctx)
	if err != nil {
		return err
	}
	t.begun = true
	return t.begin(before)
}

func (t *transaction) addAddress(ctx context.Context, a tproxy.AddAddress) error {
	if t.lookOnly {
		return &ApplyError{Step: a.String(), Family: rules.IPv6, Err: errors.New("it is not there")}
	}
	if err := t.first(ctx); err != nil {
		return err
	}
	added, err := t.m.addAddress(a.Prefix)
	if err != nil {
		// The kernel may have added it all the same, and its answer was lost: it was not
		// there before.
		t.undo = append(t.undo, undo{a.Undo(), func(context.Context) (bool, error) { return t.m.delAddress(a.Prefix) }})
		return &ApplyError{Step: a.String(), Family: rules.IPv6, Err: err,
			Remedy: "leave IPv6 untouched with --ip-family-mode=ipv4"}
	}
	if added {
		t.did(a.String(), a.Undo(), func(context.Context) (bool, error) { return t.m.delAddress(a.Prefix) })
	}
	return nil
}

func (t *transaction) removeAddress(ctx context.Context, a tproxy.AddAddress) error {
	if t.dryRun {
		there, err := t.m.hasAddress(a.Prefix.Addr())
		if err != nil {
			return &ApplyError{Step: a.Undo(), Family: rules.IPv6, Err: err}
		}
		if there {
			t.report.Steps = append(t.report.Steps, a.Undo())
		}
		return nil
	}
	if err := t.first(ctx); err != nil {
		return err
	}
	removed, err := t.m.delAddress(a.Prefix)
	if err != nil {
		return &ApplyError{Step: a.Undo(), Family: rules.IPv6, Err: err}
	}
	if removed {
		t.did(a.Undo(), a.String(), func(context.Context) (bool, error) { return t.m.addAddress(a.Prefix) })
	}
	return nil
}

func (t *transaction) did(step, what string, back func(context.Context) (bool, error)) {
	t.report.Changed = true
	t.report.Steps = append(t.report.Steps, step)
	t.undo = append(t.undo, undo{what, back})
}

// replace turns what is ours in one family of one backend into want.
func (t *transaction) replace(ctx context.Context, j *job, want rules.Set) error {
	now := j.before
	fr := FamilyReport{Family: j.family, Backend: j.variant.Backend}
	done := func() error {
		t.report.Changed = true
		t.report.Steps = append(t.report.Steps, j.step)
		t.report.Families = append(t.report.Families, fr)
		return nil
	}
	passed, changes := 0, 0 // why it was tried again
	for try := 1; ; try++ {
		c, err := j.change(now, want)
		if err != nil {
			return err
		}
		if c.nothing() {
			if try > 1 {
				return done() // a try that reported a failure had done it
			}
			t.report.Families = append(t.report.Families, fr)
			return nil
		}
		if try == 1 {
			fr.Changes = j.compare(now, want)
		}
		if err := blocked(j, now); err != nil {
			return err
		}
		if t.lookOnly {
			return &ApplyError{Step: j.step, Family: j.family, Err: fmt.Errorf("they are not so: %s", c.first(fr.Changes))}
		}
		fr.Script = c.script
		if t.dryRun {
			t.report.Steps = append(t.report.Steps, j.step)
			t.report.Families = append(t.report.Families, fr)
			return nil
		}
		if err := t.first(ctx); err != nil {
			return err
		}
		if try == 1 {
			// Also for a try that fails: of two tables it may have changed one.
			t.undo = append(t.undo, undo{putBackText(j), func(ctx context.Context) (bool, error) { return t.putBack(ctx, j) }})
		}
		if err = t.commit(ctx, j, j.step, c); err == nil {
			return done()
		}
		again, moved := t.movedUnder(ctx, j, now, err)
		switch {
		case moved && changes+1 < maxTries && ctx.Err() == nil:
			t.log.Warn("the rules changed under us; trying again", "family", j.family, "try", try, "error", err)
			changes++
			t.retries++
		case moved && changes+1 >= maxTries:
			e, _ := errors.AsType[*ApplyError](err)
			e.Err = fmt.Errorf("other programs changed the rules each of %d times (%w)", maxTries, e.Err)
			e.Remedy = "find out what changes them all the time, or try again later"
			return e
		case t.pass(ctx, j.step, err, &passed):
			var readErr error
			if again, readErr = t.save(ctx, j.variant, j.family); readErr != nil {
				return err
			}
		default:
			return err
		}
		now = again
	}
}

func putBackText(j *job) string {
	return tproxy.ReplaceRules{Family: j.family, Backend: j.variant.Backend}.Undo()
}

// commit carries out the one transaction of a change.
func (t *transaction) commit(ctx context.Context, j *job, step string, c change) error {
	if j.variant.Backend == tproxy.NFTables {
		return t.commitTable(step, c.commands)
	}
	return t.restore(ctx, j.variant, j.family, step, c.script)
}

// movedUnder reads the rules again after a restore that failed, and reports whether
// that is so because somebody changed them since now was read.
func (t *transaction) movedUnder(ctx context.Context, j *job, now live, failed error) (again live, moved bool) {
	if !retryable(failed) {
		return live{}, false
	}
	again, err := t.save(ctx, j.variant, j.family)
	if j.variant.Backend == tproxy.NFTables {
		return again, err == nil && !sameTable(now.table, again.table)
	}
	return again, err == nil && changed(j.family, tableOf(failed), now, again)
}

// changed reports whether somebody changed the rules of the table that failed
// between two readings: without that, trying again would fail again. The tables
// in front of it we have changed ourselves. Where the table is not known, all
// count.
func changed(f rules.Family, failed rules.Table, a, b live) bool {
	return len(rules.Compare(f, only(failed, a.all), only(failed, b.all))) > 0
}

func only(t rules.Table, s rules.Set) rules.Set {
	if t != "" {
		s.Bases = slices.DeleteFunc(slices.Clone(s.Bases), func(c rules.BaseChain) bool { return c.Table != t })
		s.Chains = slices.DeleteFunc(slices.Clone(s.Chains), func(c rules.Chain) bool { return c.Table != t })
	}
	return s
}

func tableOf(err error) rules.Table {
	if e, ok := errors.AsType[*ApplyError](err); ok {
		return e.Table
	}
	return ""
}

// putBack makes what is ours in a family what it was before. Where others change the
// rules meanwhile it is tried again, as the change itself is.
func (t *transaction) putBack(ctx context.Context, j *job) (bool, error) {
	for passed, changes := 0, 0; ; {
		now, err := t.save(ctx, j.variant, j.family)
		if err != nil {
			return false, err
		}
		c := j.changeBack(now)
		if c.nothing() {
			return passed+changes > 0, j.goneForGood(now)
		}
		if err = t.commit(ctx, j, putBackText(j), c); err == nil {
			return true, j.goneForGood(live{})
		}
		if _, moved := t.movedUnder(ctx, j, now, err); moved && changes+1 < maxTries {
			changes++
			t.retries++
		} else if !t.pass(ctx, putBackText(j), err, &passed) {
			return true, err
		}
	}
}

// blocked names the foreign rule that jumps to a chain of ours. The chain could
// not be removed as long as it stands (the kernel refuses), nor could it be
// filled: other packets than those of our own jump would meet our rules. The
// rule is not ours to take out.
func blocked(j *job, now live) error {
	if len(now.References) == 0 {
		return nil
	}
	ref := now.References[0]
	return &ApplyError{Step: j.step, Family: j.family, Table: ref.Table,
		Err:    fmt.Errorf("a rule that is not ours jumps to our chain %s: %s", ref.Rule.Target(), ref),
		Remedy: "take that rule out first"}
}

// rollback takes back what was done, the last first, and says so in the error.
func (t *transaction) rollback(ctx context.Context, err error) error {
	ctx = context.WithoutCancel(ctx)
	e, ok := errors.AsType[*ApplyError](err)
	if !ok {
		if len(t.undo) == 0 {
			return err
		}
		e = &ApplyError{Step: "interrupted", Err: err}
	}
	for _, u := range slices.Backward(t.undo) {
		did, err := u.run(ctx)
		switch {
		case err != nil:
			e.Left = append(e.Left, fmt.Sprintf("%s: %v", u.what, err))
		case did:
			e.Undone = append(e.Undone, u.what)
		}
	}
	return e
}
