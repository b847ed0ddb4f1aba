package exec

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// How long an install can wait for its confirmation. Less than MinTrial is over before
// anybody has typed the command.
const (
	MinTrial = 5 * time.Second
	MaxTrial = 24 * time.Hour
)

// Trial is an install that waits for its confirmation.
type Trial struct {
	ID string
	// Within is how long it waits in all, and Left how long still: below 0, its time is
	// over. It is counted by CLOCK_BOOTTIME: setting the clock changes nothing, and the
	// time in suspend counts.
	Within, Left time.Duration
	Began        time.Time // by the clock of the host, for people to read
	// By is what puts the former state back, in the words of who started it.
	By string
	// Watched is whether it is there now; PID is its process, 0 where that cannot be
	// seen.
	Watched bool
	PID     int
}

// TrialOptions say how to try an install.
type TrialOptions struct {
	// Within is the time in which Confirm has to be called, from MinTrial to MaxTrial.
	Within time.Duration
	// Watch starts a process that outlives this one, in this network namespace and with
	// the same files of /run, and that calls Runner.WatchTrial there. It returns when the
	// ready of that Watch was called, with words for who it is. It is called before
	// anything is changed; with an error, nothing is.
	Watch func(ctx context.Context, t Trial) (by string, err error)
}

// TrialOutcome is how the last trial ended.
type TrialOutcome struct {
	ID        string
	At        time.Time // by the clock of the host
	Confirmed bool
	// PutBack is whether the former state was put back, and Steps by which steps. With
	// neither this nor Confirmed, it could not be up to now, for the reason Err, and is
	// tried again.
	PutBack bool
	Steps   []string
	Err     string
}

func (o TrialOutcome) String() string {
	at := o.At.Format(time.RFC3339)
	switch {
	case o.Confirmed:
		return "the last install on trial was confirmed at " + at
	case o.PutBack && o.Err != "":
		return fmt.Sprintf("the last install on trial was not confirmed: the rules were put back at %s, and what resolves names was left as it was (%s)", at, o.Err)
	case o.PutBack:
		return "the last install on trial was not confirmed in time: the former state was put back at " + at
	}
	return fmt.Sprintf("the former state could not be put back at %s, and is tried again: %s", at, o.Err)
}

// PendingError says that an install waits for its confirmation, so that no other one can
// be made.
type PendingError struct{ Trial Trial }

func (e *PendingError) Error() string {
	t := e.Trial
	text := fmt.Sprintf("an install, made at %s, waits to be confirmed within %s: ", t.Began.Format(time.RFC3339), t.Within)
	switch {
	case t.Left <= 0 && !t.Watched:
		return text + "its time is over, but nobody watches any more: the next install puts the former state back first"
	case t.Left <= 0:
		return text + "its time is over, and the former state is being put back"
	case !t.Watched:
		return text + fmt.Sprintf("%s are left, but nobody watches any more: the next install behind that time puts the former state back first", t.Left.Round(time.Second))
	}
	return text + fmt.Sprintf("%s are left, then the former state is put back", t.Left.Round(time.Second))
}

// NoTrialError says that there is nothing to confirm.
type NoTrialError struct {
	Last *TrialOutcome // how the last one ended; nil where that is not known
}

func (e *NoTrialError) Error() string {
	if e.Last == nil {
		return "nothing to confirm: no install waits"
	}
	if e.Last.PutBack {
		return "too late: " + e.Last.String()
	}
	return "nothing to confirm: " + e.Last.String()
}

// The files of a trial: what the watch reads again and again is small.
const (
	trialKind  = "trial"
	beforeKind = "before"
	lastKind   = "last"
	formerKind = "former" // what came back before a confirm began to write
	keepKind   = "keep"   // what comes back after a restart, once it is confirmed
)

// trialVersion is that of the form of these files.
const trialVersion = 1

type trialFile struct {
	Version  int           `json:"version"`
	ID       string        `json:"id"`
	Boot     string        `json:"boot"`
	Within   time.Duration `json:"within"`   // nanoseconds, as the next
	Deadline time.Duration `json:"deadline"` // of CLOCK_BOOTTIME
	Began    time.Time     `json:"began"`
	By       string        `json:"by,omitempty"`
	// Armed is whether the watch is there. It is written before the first change.
	Armed bool `json:"armed"`
}

type lastFile struct {
	Version   int       `json:"version"`
	ID        string    `json:"id"`
	At        time.Time `json:"at"`
	Confirmed bool      `json:"confirmed"`
	PutBack   bool      `json:"putBack"`
	Steps     []string  `json:"steps,omitempty"`
	Err       string    `json:"error,omitempty"`
	Told      bool      `json:"told,omitempty"` // by an install
}

func (s *session) stateName(kind string) (string, error) {
	n, err := s.m.network()
	return kind + "-" + n + ".json", err
}

// readState reads a file of a trial into v, and reports whether it is there.
func (s *session) readState(kind string, v any) (bool, error) {
	name, err := s.stateName(kind)
	if err != nil {
		return false, err
	}
	text, err := s.m.readState(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err == nil:
		err = json.Unmarshal(text, v)
	}
	if err != nil {
		return false, fmt.Errorf("state of the install on trial, %s/%s: %w", stateDir, name, err)
	}
	return true, nil
}

func (s *session) writeState(kind string, v any) error {
	name, err := s.stateName(kind)
	if err != nil {
		return err
	}
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := s.m.writeState(name, append(text, '\n')); err != nil {
		return fmt.Errorf("state of the install on trial: %w", err)
	}
	return nil
}

func (s *session) removeState(kinds ...string) error {
	for _, k := range kinds {
		name, err := s.stateName(k)
		if err == nil {
			err = s.m.removeState(name)
		}
		if err != nil {
			return fmt.Errorf("state of the install on trial: %w", err)
		}
	}
	return nil
}

// trial reads what waits for its confirmation; nil where nothing does. What is left of
// another boot is nothing: the rules went with it.
func (s *session) trial() (*trialFile, error) {
	var f trialFile
	there, err := s.readState(trialKind, &f)
	if !there || err != nil {
		return nil, err
	}
	boot, err := s.m.boot()
	switch {
	case err != nil:
		return nil, err
	case f.Boot != boot:
		return nil, nil
	case f.Version != trialVersion:
		return nil, fmt.Errorf("an install of another version waits to be confirmed, whose state has the form %d: accepted is %d; confirm it with that version, or uninstall", f.Version, trialVersion)
	}
	return &f, nil
}

// left is how long a trial still waits.
func (s *session) left(f *trialFile) (time.Duration, error) {
	up, err := s.m.uptime()
	return f.Deadline - up, err
}

func (s *session) describe(f *trialFile) (Trial, error) {
	left, err := s.left(f)
	t := Trial{ID: f.ID, Within: f.Within, Left: left, Began: f.Began, By: f.By}
	t.PID, t.Watched = s.m.watched()
	return t, err
}

func (s *session) last() (*lastFile, error) {
	var f lastFile
	there, err := s.readState(lastKind, &f)
	if !there || err != nil || f.Version != trialVersion {
		return nil, err
	}
	return &f, nil
}

func (f *lastFile) outcome() *TrialOutcome {
	if f == nil {
		return nil
	}
	return &TrialOutcome{ID: f.ID, At: f.At, Confirmed: f.Confirmed, PutBack: f.PutBack, Steps: f.Steps, Err: f.Err}
}

// settle is for an install, under the lock: none is built upon one that waits. Where the
// time of that is over and nobody is there to put the former state back, it does so, as
// was promised, and says so.
func (s *session) settle(ctx context.Context) (notes []string, err error) {
	f, err := s.trial()
	if err != nil {
		return nil, err
	}
	if f == nil {
		last, err := s.last()
		if err != nil || last == nil || last.Told || last.Confirmed {
			return nil, err
		}
		return []string{last.outcome().String()}, nil
	}
	if !f.Armed { // by a run that was killed before it had changed anything
		return nil, s.removeState(trialKind, beforeKind, keepKind)
	}
	t, err := s.describe(f)
	if err != nil {
		return nil, err
	}
	if t.Left > 0 || t.Watched {
		return nil, &PendingError{t}
	}
	o, err := s.giveUp(ctx, f, false)
	if err != nil {
		return nil, fmt.Errorf("an install was never confirmed, its watch has gone, and the former state could not be put back: %w", err)
	}
	return []string{"an install was never confirmed, and what was to put the former state back has gone: that was done now, at " + o.At.Format(time.RFC3339) + ", before this install"}, nil
}

// told notes that an install has said how the last trial ended.
func (s *session) told() {
	if f, err := s.last(); err == nil && f != nil && !f.Told {
		f.Told = true
		if err := s.writeState(lastKind, f); err != nil {
			s.log.Warn("the outcome of the last install on trial is said again", "error", err)
		}
	}
}

// Try is Apply for a while: unless Confirm is called within that time, the former state
// is put back, by the process that o.Watch starts, whatever becomes of this one. A plan
// of which everything is in place starts nothing, and Report.Trial is nil.
//
// While a trial waits, Apply and Try return a *PendingError, and Remove ends it.
func (r *Runner) Try(ctx context.Context, p *tproxy.Plan, o TrialOptions) (*Report, error) {
	if o.Within < MinTrial || o.Within > MaxTrial {
		return nil, fmt.Errorf("a trial of %s: accepted is %s to %s", o.Within, MinTrial, MaxTrial)
	}
	if o.Watch == nil {
		return nil, errors.New("a trial that nobody watches: TrialOptions.Watch is nil")
	}
	return r.apply(ctx, p, &o)
}

// try runs an install, under the lock, with a watch that is there before the first
// change.
func (t *transaction) try(ctx context.Context, o TrialOptions, run func() error) error {
	var f *trialFile
	t.later = true
	t.begin = func(before *Snapshot) error {
		var err error
		if f, err = t.startTrial(ctx, before, o); err != nil {
			return &ApplyError{Step: fmt.Sprintf("the way back, if nobody confirms within %s", o.Within), Err: err}
		}
		return nil
	}
	err := run()
	if f == nil && err == nil {
		// The rules are the same, so that there is nothing to be tried; how they come back
		// may be another.
		t.begin = nil
		if err = t.keep(ctx); err != nil {
			err = t.rollback(ctx, err)
		}
	}
	if f == nil {
		return err
	}
	if err != nil {
		if e, ok := errors.AsType[*ApplyError](err); ok && len(e.Left) > 0 {
			// The watch tries what the undo could not.
			e.Remedy = cmp.Or(e.Remedy, "the former state is put back once more in "+o.Within.String())
			return err
		}
		return errors.Join(err, t.removeState(trialKind, beforeKind, keepKind))
	}
	// The time counts from now on: to wait for a lock may have taken some of it.
	up, err := t.m.uptime()
	if err == nil {
		f.Deadline = up + o.Within
		err = t.writeState(trialKind, f)
	}
	trial, err2 := t.describe(f)
	if err = errors.Join(err, err2); err != nil { // no reason to say that nothing was installed
		t.log.Warn("the time of the trial counts from before the install", "error", err)
	}
	t.report.Trial = &trial
	return nil
}

func (t *transaction) startTrial(ctx context.Context, before *Snapshot, o TrialOptions) (f *trialFile, err error) {
	id := make([]byte, 4)
	rand.Read(id) // never fails (crypto/rand)
	boot, err := t.m.boot()
	if err != nil {
		return nil, err
	}
	up, err := t.m.uptime()
	if err != nil {
		return nil, err
	}
	f = &trialFile{Version: trialVersion, ID: hex.EncodeToString(id), Boot: boot, Within: o.Within, Deadline: up + o.Within, Began: time.Now()}
	if err := t.writeState(beforeKind, before); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.removeState(trialKind, beforeKind, keepKind))
		}
	}()
	if err := t.writeState(keepKind, savedOf(t.plan, tproxy.Record{})); err != nil {
		return nil, err
	}
	if err := t.writeState(trialKind, f); err != nil {
		return nil, err
	}
	trial, err := t.describe(f)
	if err != nil {
		return nil, err
	}
	if f.By, err = o.Watch(ctx, trial); err != nil {
		return nil, err
	}
	f.Armed = true
	return f, t.writeState(trialKind, f)
}

// ConfirmOptions say how to confirm.
type ConfirmOptions struct {
	Wait time.Duration // for another run in this network namespace; 0 is tproxy.DefaultWait
}

// Confirm makes an install that waits final, and returns it. The error is a
// *NoTrialError where none waits: there was none, or the former state has been put back.
// Either Confirm or the watch has its way, never both.
func (r *Runner) Confirm(ctx context.Context, o ConfirmOptions) (Trial, error) {
	s, err := r.session()
	if err != nil {
		return Trial{}, err
	}
	if err := s.m.privileged(); err != nil {
		return Trial{}, err
	}
	s.wait = cmp.Or(o.Wait, tproxy.DefaultWait)
	unlock, err := s.locked(ctx)
	if err != nil {
		return Trial{}, err
	}
	defer unlock()
	f, err := s.trial()
	if err != nil {
		return Trial{}, err
	}
	if f == nil || !f.Armed {
		last, err := s.last()
		if err != nil {
			return Trial{}, err
		}
		return Trial{}, &NoTrialError{last.outcome()}
	}
	t, err := s.describe(f)
	if err != nil {
		return Trial{}, err
	}
	if err := s.keepConfirmed(ctx); err != nil {
		return t, err
	}
	if err := s.removeState(trialKind); err != nil { // from here on there is no way back
		return t, err
	}
	err = errors.Join(s.removeState(beforeKind, keepKind, formerKind), s.writeState(lastKind, &lastFile{Version: trialVersion, ID: f.ID, At: time.Now(), Confirmed: true}))
	if err != nil {
		s.log.Warn("confirmed, but that could not be noted", "error", err)
	}
	return t, nil
}

// keepConfirmed has an install come back after a restart that was on trial up to now. What
// fails is undone, and the trial goes on.
func (s *session) keepConfirmed(ctx context.Context) error {
	var i savedInstall
	there, err := s.readState(keepKind, &i)
	if err != nil || !there { // an earlier version has made the trial
		return err
	}
	s.patient(i.Config)
	p, err := s.planOf(ctx, i)
	if err != nil {
		return err
	}
	var former formerFile
	there, err = s.readState(formerKind, &former)
	if err == nil && !there { // else it is of a confirm that was killed
		if former.Install, err = s.savedHere(); err == nil {
			err = s.writeState(formerKind, former)
		}
	}
	if err != nil {
		return err
	}
	t := &transaction{session: s, report: &Report{}, plan: p}
	if t.rec, err = s.recordOf(ctx, p); err != nil {
		return err
	}
	if err := t.keep(ctx); err != nil {
		return t.rollback(ctx, err)
	}
	return nil
}

// recordOf is the record in the rules of a plan's install, as they stand.
func (s *session) recordOf(ctx context.Context, p *tproxy.Plan) (tproxy.Record, error) {
	for _, f := range p.Families {
		v, _ := p.Host.Variant(p.Backend)
		l, err := s.save(ctx, v, f)
		if err != nil {
			return tproxy.Record{}, err
		}
		if rec, err := tproxy.ReadRecord(l.Ours); err == nil {
			return rec, nil
		}
	}
	return tproxy.Record{Version: s.recorded}, nil
}

// formerFile is what came back after a restart before a confirm began to write; nil is
// nothing.
type formerFile struct {
	Install *savedInstall `json:"install"`
}

// storeFormer has the install come back again that did before a confirm was killed while
// it wrote. Where none was, there is nothing to do.
func (s *session) storeFormer(ctx context.Context) error {
	var former formerFile
	there, err := s.readState(formerKind, &former)
	if err != nil || !there {
		return err
	}
	t := &transaction{session: s, report: &Report{}, removes: former.Install == nil}
	s.sameProgram()
	if i := former.Install; i != nil {
		if t.plan, err = s.planOf(ctx, *i); err != nil {
			return err
		}
		if t.rec, err = s.recordOf(ctx, t.plan); err != nil {
			return err
		}
	}
	if err := t.keep(ctx); err != nil {
		return t.rollback(ctx, err)
	}
	return s.removeState(formerKind)
}

// Trial returns the install that waits for its confirmation, nil where none does, and
// how the last one ended, nil where that is not known. It writes nothing, and needs root.
func (r *Runner) Trial(context.Context) (*Trial, *TrialOutcome, error) {
	s, err := r.session()
	if err != nil {
		return nil, nil, err
	}
	if err := s.m.privileged(); err != nil {
		return nil, nil, err
	}
	f, err := s.trial()
	if err != nil {
		return nil, nil, err
	}
	last, err := s.last()
	if f == nil || !f.Armed || err != nil {
		return nil, last.outcome(), err
	}
	t, err := s.describe(f)
	return &t, last.outcome(), err
}

// endTrial is for an uninstall: there is nothing to confirm, and nothing to put back.
func (t *transaction) endTrial(dryRun bool) error {
	f, err := t.trial()
	switch {
	case err == nil && f == nil:
		return nil
	case dryRun && f != nil:
		t.report.Notes = append(t.report.Notes, "an install waits to be confirmed: an uninstall ends that, and nothing is put back")
		return nil
	case dryRun:
		return nil
	}
	// One that cannot be read too; and how the one before it ended is no answer any more
	// to who asks what became of this one.
	if err := t.removeState(trialKind, beforeKind, keepKind, formerKind, lastKind); err != nil {
		return err
	}
	t.report.Notes = append(t.report.Notes, "an install waited to be confirmed: that is over, and nothing is put back any more")
	return nil
}

// watchPause is how often a watch looks whether it is still needed.
const watchPause = 500 * time.Millisecond

// leaveNamesAfter is how many tries to put everything back are made before what resolves
// names is left as it is: a way in to the host may hang on the rules.
const leaveNamesAfter = 2

// WatchTrial waits until a trial is confirmed, and returns nil, or until its time is over, and
// puts the former state back. What fails is tried again until it works, or until somebody
// confirms or uninstalls. A ctx that is done, as when the system shuts down, puts back at
// once: a trial that nobody watches is none. ready is called when the watch is there.
//
// It is for a process of its own, which no other one takes along: see TrialOptions.Watch.
func (r *Runner) WatchTrial(ctx context.Context, id string, ready func() error) (*TrialOutcome, error) {
	s, err := r.session()
	if err != nil {
		return nil, err
	}
	if err := s.m.privileged(); err != nil {
		return nil, err
	}
	release, err := s.m.watch(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	f, err := s.trial()
	if err == nil && (f == nil || f.ID != id) {
		err = fmt.Errorf("no install with the number %q waits to be confirmed", id)
	}
	if err != nil {
		return nil, err
	}
	if err := ready(); err != nil {
		return nil, err
	}
	for tries := 0; ; {
		// What cannot be read now is as it was.
		if now, err := s.trial(); err != nil {
			s.log.Warn("trying to read again what waits", "error", err)
		} else if f = now; f == nil || f.ID != id {
			return nil, nil
		}
		left, err := s.left(f)
		if err == nil && left > 0 && ctx.Err() == nil {
			select {
			case <-ctx.Done():
			case <-time.After(min(left, watchPause)):
			}
			continue
		}
		o, err := s.overdue(ctx, f, tries >= leaveNamesAfter)
		switch {
		case err == nil && o != nil:
			return o, nil
		case err == nil || errors.Is(err, ErrLocked): // waits longer after all, or another run goes on
			continue
		}
		tries++
		pause := min(time.Duration(tries)*time.Second, 30*time.Second)
		s.log.Error("the former state could not be put back; trying again", "try", tries, "in", pause, "error", err)
		time.Sleep(pause)
	}
}

// overdue puts the former state back, under the lock, unless the trial was confirmed or
// got more time: then both results are nil.
func (s *session) overdue(ctx context.Context, f *trialFile, leaveNames bool) (*TrialOutcome, error) {
	unlock, err := s.locked(context.WithoutCancel(ctx))
	if err != nil {
		return nil, err
	}
	defer unlock()
	now, err := s.trial()
	if err != nil || now == nil || now.ID != f.ID {
		return nil, err
	}
	left, err := s.left(now)
	if err != nil || left > 0 && ctx.Err() == nil {
		return nil, err
	}
	if !now.Armed {
		return nil, s.removeState(trialKind, beforeKind, keepKind)
	}
	return s.giveUp(context.WithoutCancel(ctx), now, leaveNames)
}

// giveUp puts the former state back, under the lock, and then ends the trial. How that
// went is noted for whoever looks later.
func (s *session) giveUp(ctx context.Context, f *trialFile, leaveNames bool) (*TrialOutcome, error) {
	var before Snapshot
	there, err := s.readState(beforeKind, &before)
	if err == nil && !there {
		err = fmt.Errorf("state of the install on trial: what was there before is missing from %s: %w", stateDir, fs.ErrNotExist)
	}
	last := lastFile{Version: trialVersion, ID: f.ID}
	if err == nil {
		var report *Report
		if report, err = s.goBack(ctx, &before, RestoreOptions{LeaveNames: leaveNames}); err == nil {
			last.PutBack, last.Steps = true, slices.Clone(report.Steps)
			err = s.storeFormer(ctx)
		}
	}
	last.At = time.Now()
	if err != nil {
		last.Err = err.Error()
	} else if was, _ := s.last(); leaveNames && was != nil && was.ID == f.ID {
		last.Err = was.Err
	}
	if e := s.writeState(lastKind, &last); e != nil {
		s.log.Warn("how the trial ended could not be noted", "error", e)
	}
	if err != nil {
		return nil, err
	}
	if err := s.removeState(trialKind, beforeKind, keepKind); err != nil {
		return nil, err
	}
	return last.outcome(), nil
}
