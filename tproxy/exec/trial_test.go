package exec

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// try installs on trial, with a watch that is said to be there. The number is that of
// the trial, "" where none began.
func (m *fakeMachine) try(t *testing.T, c tproxy.Config, within time.Duration) (id string, r *Report, err error) {
	t.Helper()
	r, err = (&Runner{machine: m}).Try(context.Background(), m.plan(t, c), TrialOptions{Within: within, Watch: func(_ context.Context, tr Trial) (string, error) {
		id = tr.ID
		return "a test", nil
	}})
	return id, r, err
}

func (m *fakeMachine) watchOver(id string) (*TrialOutcome, error) {
	return (&Runner{machine: m}).WatchTrial(context.Background(), id, func() error { return nil })
}

var (
	standing  = tproxy.Config{Backend: tproxy.IPTablesLegacy, Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("9100")}}
	candidate = tproxy.Config{Backend: tproxy.IPTablesNFT, Outbound: tproxy.Outbound{Port: 16001}, DNS: tproxy.DNS{CaptureAll: true}}
)

func isPending(err error) bool {
	_, ok := errors.AsType[*PendingError](err)
	return ok
}

// The time is that of the clock that counts from the boot: what others set does not
// matter. While it is not over, nobody else installs, whoever confirms has the install,
// and afterwards the former state is there.
func TestTrial(t *testing.T) {
	for _, former := range []*tproxy.Config{nil, &standing} {
		m := newFakeMachine(t)
		m.populate(t)
		if former != nil {
			m.install(t, *former)
		}
		before := m.state()
		m.clock = 100 * time.Hour
		id, r, err := m.try(t, candidate, time.Minute)
		if err != nil || r.Trial == nil || r.Trial.ID != id || r.Trial.Left != time.Minute || r.Trial.By != "a test" || !r.Trial.Watched {
			t.Fatalf("%+v, %v", r.Trial, err)
		}
		tried := m.state()
		_, err = (&Runner{machine: m}).Apply(context.Background(), m.plan(t, standing))
		_, _, err2 := m.try(t, standing, time.Minute)
		if !isPending(err) || !isPending(err2) || !strings.Contains(err.Error(), "1m0s are left") {
			t.Errorf("second installs: %v, %v", err, err2)
		}
		m.unchanged(t, tried)
		// A watch looks again and again, and the 20th time it is over.
		looks := 0
		m.onUptime = func() {
			if looks++; looks > 20 {
				m.clock = 100*time.Hour + time.Minute
			} else {
				m.clock = 100*time.Hour + time.Minute - time.Nanosecond
			}
		}
		o, err := m.watchOver(id)
		if err != nil || o == nil || !o.PutBack || len(o.Steps) == 0 || looks <= 20 {
			t.Fatalf("%+v, %v, after %d looks", o, err, looks)
		}
		m.unchanged(t, before)
		m.onUptime = nil
		_, err = (&Runner{machine: m}).Confirm(context.Background(), ConfirmOptions{})
		if e, ok := errors.AsType[*NoTrialError](err); !ok || !e.Last.PutBack || !strings.Contains(err.Error(), "too late") {
			t.Errorf("confirmed afterwards: %v", err)
		}
		r = m.install(t, candidate)
		if !strings.Contains(strings.Join(r.Notes, "\n"), "was not confirmed in time") {
			t.Errorf("the next install says %q", r.Notes)
		}
		if r = m.install(t, candidate); strings.Contains(strings.Join(r.Notes, "\n"), "confirmed") {
			t.Errorf("and the one after it %q", r.Notes)
		}
	}
}

func TestTrialConfirmed(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, standing)
	id, _, err := m.try(t, candidate, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	tried := m.state()
	m.clock = time.Minute - 1
	tr, err := (&Runner{machine: m}).Confirm(context.Background(), ConfirmOptions{})
	if err != nil || tr.ID != id || tr.Left != 1 {
		t.Errorf("%+v, %v", tr, err)
	}
	m.clock = time.Hour
	if _, err := m.watchOver(id); err == nil || !strings.Contains(err.Error(), "no install with the number") {
		t.Errorf("a watch that begins behind it: %v", err)
	}
	m.unchanged(t, tried)
	if now, last, err := (&Runner{machine: m}).Trial(context.Background()); now != nil || last == nil || !last.Confirmed || err != nil {
		t.Errorf("%+v, %+v, %v", now, last, err)
	}
	_, err = (&Runner{machine: m}).Confirm(context.Background(), ConfirmOptions{})
	if err == nil || !strings.Contains(err.Error(), "nothing to confirm: the last install on trial was confirmed") {
		t.Errorf("twice: %v", err)
	}
	if r := m.install(t, candidate); r.Changed {
		t.Errorf("%+v", r)
	}
}

// A watch sees that it is not needed any more: a confirmation, an uninstall, and a trial
// that came after it.
func TestWatchEnds(t *testing.T) {
	for name, end := range map[string]func(m *fakeMachine){
		"confirmed":   func(m *fakeMachine) { _, _ = (&Runner{machine: m}).Confirm(context.Background(), ConfirmOptions{}) },
		"uninstalled": func(m *fakeMachine) { m.uninstall(t) },
		"another": func(m *fakeMachine) {
			_, _ = (&Runner{machine: m}).Confirm(context.Background(), ConfirmOptions{})
			if _, _, err := m.try(t, standing, time.Minute); err != nil {
				t.Error(err)
			}
		},
	} {
		// At the last moment too: while it waits for the lock.
		for _, late := range []bool{false, true} {
			m := newFakeMachine(t)
			id, _, err := m.try(t, candidate, time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			var after []string
			act := func() {
				m.onUptime, m.onLock = nil, nil
				end(m)
				after = m.state()
			}
			if m.onUptime = act; late {
				m.onUptime, m.clock, m.onLock = nil, time.Hour, act
			}
			if o, err := m.watchOver(id); o != nil || err != nil {
				t.Errorf("%s, late %v: %+v, %v", name, late, o, err)
			}
			m.unchanged(t, after)
		}
	}
}

// A watch that is told to end puts back at once.
func TestWatchInterrupted(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	id, _, err := m.try(t, candidate, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	o, err := (&Runner{machine: m}).WatchTrial(ctx, id, func() error { cancel(); return nil })
	if err != nil || o == nil || !o.PutBack {
		t.Errorf("%+v, %v", o, err)
	}
	m.unchanged(t, before)
}

// With everything in place there is nothing to confirm.
func TestTrialOfTheSameAgain(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, candidate)
	id, r, err := m.try(t, candidate, time.Minute)
	if err != nil || id != "" || r.Changed || r.Trial != nil || len(m.kept) > 0 {
		t.Errorf("%q, %+v, %v, %v", id, r, err, m.kept)
	}
}

// Without a way back, nothing is changed.
func TestTrialThatCannotBegin(t *testing.T) {
	no := errors.New("no")
	for name, prepare := range map[string]func(m *fakeMachine) error{
		"not writable": func(m *fakeMachine) error { m.stateErr = no; return nil },
		"no watch":     func(*fakeMachine) error { return no },
	} {
		m := newFakeMachine(t)
		m.install(t, standing)
		before := m.state()
		failed := prepare(m)
		_, err := (&Runner{machine: m}).Try(context.Background(), m.plan(t, candidate), TrialOptions{Within: time.Minute, Watch: func(context.Context, Trial) (string, error) { return "", failed }})
		if e, ok := errors.AsType[*ApplyError](err); !ok || !errors.Is(err, no) || !strings.Contains(e.Step, "the way back") {
			t.Errorf("%s: %v", name, err)
		}
		m.unchanged(t, before)
		if len(m.kept) > 0 {
			t.Errorf("%s: left %v", name, m.kept)
		}
	}
	for _, within := range []time.Duration{-1, 0, MinTrial - 1, MaxTrial + 1} {
		_, _, err := newFakeMachine(t).try(t, candidate, within)
		if err == nil || !strings.Contains(err.Error(), "accepted is 5s to 24h0m0s") {
			t.Errorf("%s: %v", within, err)
		}
	}
}

// An install that fails and is undone is no trial any more; one that could not be undone
// still is, and the watch does what the undo could not.
func TestTrialOfAFailure(t *testing.T) {
	for _, undone := range []bool{true, false} {
		m := newFakeMachine(t)
		m.populate(t)
		m.install(t, standing)
		before := m.state()
		n := 2
		m.stop = func(rules.Table) bool { n--; return n == 0 || n < 0 && !undone }
		id, _, err := m.try(t, candidate, time.Minute)
		m.stop = nil
		e, ok := errors.AsType[*ApplyError](err)
		if !ok || (len(e.Left) == 0) != undone {
			t.Fatalf("%v", err)
		}
		if now, _, err := (&Runner{machine: m}).Trial(context.Background()); (now == nil) != undone || err != nil {
			t.Errorf("undone %v: %+v, %v", undone, now, err)
		}
		if !undone {
			m.clock = time.Hour
			if o, err := m.watchOver(id); err != nil || !o.PutBack {
				t.Errorf("%+v, %v", o, err)
			}
		}
		m.unchanged(t, before)
	}
}

// Killed at each moment of the install, the former state comes back; killed at each
// moment of the way back, the next one finishes it.
func TestTrialKilled(t *testing.T) {
	proc := fakeProc(t)
	kills := 0
	for n := 0; ; n++ {
		m := newFakeMachineAt(proc)
		m.populate(t)
		m.install(t, standing)
		before := m.state()
		left := n
		m.stop = func(rules.Table) bool { left--; m.dead = left < 0; return m.dead }
		id, _, err := m.try(t, candidate, time.Minute)
		killed := m.dead
		if m.stop, m.dead = nil, false; err == nil && killed {
			t.Fatal("killed, and no error")
		}
		m.clock = time.Hour
		for back := 0; ; back++ {
			left = back
			m.stop = func(rules.Table) bool { left--; m.dead = left < 0; return m.dead }
			s, _ := (&Runner{machine: m}).session()
			f, err := s.trial()
			if f == nil || err != nil {
				t.Fatalf("%v, %v", f, err)
			}
			_, err = s.overdue(context.Background(), f, false)
			again := m.dead
			if m.stop, m.dead = nil, false; !again && err != nil {
				t.Fatal(err)
			}
			if kills++; !again {
				break
			}
		}
		if m.unchanged(t, before); id == "" {
			t.Error("no trial began")
		}
		if !killed {
			break
		}
	}
	if kills < 20 {
		t.Errorf("killed only %d times", kills)
	}
}

// Whose watch was killed too gets what was promised from the next install; before its
// time is over, that is refused.
func TestTrialThatNobodyWatches(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	m.install(t, standing)
	before := m.state()
	if _, _, err := m.try(t, candidate, time.Minute); err != nil {
		t.Fatal(err)
	}
	m.unwatched = true
	_, err := (&Runner{machine: m}).Apply(context.Background(), m.plan(t, candidate))
	if !isPending(err) || !strings.Contains(err.Error(), "nobody watches any more") {
		t.Errorf("%v", err)
	}
	m.clock = time.Hour
	r := m.install(t, standing)
	if r.Changed || !strings.Contains(strings.Join(r.Notes, "\n"), "that was done now") {
		t.Errorf("the former Config again: %+v", r)
	}
	m.unchanged(t, before)

	// And one that somebody confirms after all has it.
	if _, _, err = m.try(t, candidate, time.Minute); err != nil {
		t.Fatal(err)
	}
	m.clock += time.Hour
	tried := m.state()
	if tr, err := (&Runner{machine: m}).Confirm(context.Background(), ConfirmOptions{}); err != nil || tr.Left > 0 {
		t.Errorf("%+v, %v", tr, err)
	}
	m.unchanged(t, tried)
}

// Killed between the state and the watch, nothing was changed, and nothing waits.
func TestTrialThatWasNeverArmed(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	id := ""
	try := func() error {
		_, err := (&Runner{machine: m}).Try(context.Background(), m.plan(t, candidate), TrialOptions{Within: MaxTrial, Watch: func(_ context.Context, tr Trial) (string, error) {
			id, m.dead = tr.ID, true
			return "a test", nil
		}})
		m.dead = false
		return err
	}
	if err := try(); !errors.Is(err, errKilled) || len(m.kept) != 3 {
		t.Fatalf("%v, %v", err, m.kept)
	}
	m.unchanged(t, before)
	if tr, _, err := (&Runner{machine: m}).Trial(context.Background()); tr != nil || err != nil {
		t.Errorf("%+v, %v", tr, err)
	}
	if _, err := (&Runner{machine: m}).Confirm(context.Background(), ConfirmOptions{}); err == nil {
		t.Error("it was confirmed")
	}
	m.clock = MaxTrial + 1
	if o, err := m.watchOver(id); o != nil || err != nil || len(m.kept) > 0 {
		t.Errorf("%+v, %v, %v", o, err, m.kept)
	}
	if err := try(); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	if r := m.install(t, standing); !r.Changed || len(m.kept) > 0 {
		t.Errorf("%+v, %v", r, m.kept)
	}
}

// A reboot takes the rules: what is left of a trial then is nothing.
func TestTrialOfAnotherBoot(t *testing.T) {
	m := newFakeMachine(t)
	if _, _, err := m.try(t, candidate, time.Minute); err != nil {
		t.Fatal(err)
	}
	now := newFakeMachine(t)
	now.kept, now.booted = m.kept, "again"
	if tr, _, err := (&Runner{machine: now}).Trial(context.Background()); tr != nil || err != nil {
		t.Errorf("%+v, %v", tr, err)
	}
	if id, r, err := now.try(t, candidate, time.Minute); err != nil || id == "" || !r.Changed {
		t.Errorf("%q, %+v, %v", id, r, err)
	}
}

func TestUninstallEndsATrial(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	empty := m.state()
	m.install(t, standing)
	if _, _, err := m.try(t, candidate, time.Minute); err != nil {
		t.Fatal(err)
	}
	dry, err := (&Runner{machine: m}).Remove(context.Background(), RemoveOptions{DryRun: true})
	if err != nil || !strings.Contains(strings.Join(dry.Notes, "\n"), "an uninstall ends that") || len(m.kept) == 0 {
		t.Errorf("%+v, %v", dry, err)
	}
	if r := m.uninstall(t); !strings.Contains(strings.Join(r.Notes, "\n"), "that is over") || len(m.kept) > 0 {
		t.Errorf("%q, %v", r.Notes, m.kept)
	}
	m.unchanged(t, empty)
}

// What is wrong with the state is said, and an uninstall is the way out.
func TestTrialStateThatCannotBeRead(t *testing.T) {
	for text, want := range map[string]string{
		"{":                            "state of the install on trial",
		`{"version":9,"boot":"boot "}`: "has the form 9: accepted is 1",
	} {
		m := newFakeMachine(t)
		p := m.plan(t, candidate)
		m.kept = map[string]string{"trial-net-1.json": text}
		r := Runner{machine: m}
		_, err := r.Apply(context.Background(), p)
		_, err2 := r.Confirm(context.Background(), ConfirmOptions{})
		_, _, err3 := r.Trial(context.Background())
		for _, err := range []error{err, err2, err3} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", text, err)
			}
		}
		if m.uninstall(t); len(m.kept) > 0 {
			t.Errorf("left %v", m.kept)
		}
		m.install(t, candidate)
	}
}

// What cannot be put back keeps the rules from nothing: a way in may hang on them.
func TestPutBackLeavesNamesThatCannotBeChanged(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	m.conf(t, confText)
	p, err := m.probed(t, withNames)
	if err != nil {
		t.Fatal(err)
	}
	var id string
	if _, err = (&Runner{machine: m}).Try(context.Background(), p, TrialOptions{Within: time.Minute, Watch: func(_ context.Context, tr Trial) (string, error) { id = tr.ID; return "", nil }}); err != nil {
		t.Fatal(err)
	}
	// The file is gone with its folder, and something else is in its place.
	m.etc += "/resolv.conf"
	m.clock = time.Hour
	s, _ := (&Runner{machine: m}).session()
	f, _ := s.trial()
	o, err := s.overdue(context.Background(), f, false)
	if err == nil {
		t.Skipf("it could be put back here: %+v", o)
	}
	if o, err = s.overdue(context.Background(), f, true); err != nil || !o.PutBack || o.Err == "" || o.ID != id {
		t.Errorf("%+v, %v", o, err)
	}
	m.unchanged(t, before)
}

func TestPendingErrorSaysWhoPutsBack(t *testing.T) {
	text := (&PendingError{Trial{Within: time.Minute, Left: -time.Second}}).Error()
	if !strings.Contains(text, "nobody watches") || strings.Contains(text, "is being put back") {
		t.Error(text)
	}
	text = (&PendingError{Trial{Within: time.Minute, Left: -time.Second, Watched: true}}).Error()
	if strings.Contains(text, "nobody watches") {
		t.Error(text)
	}
}

// How an older trial ended is no answer to what became of one that was uninstalled.
func TestUninstallForgetsAnOlderTrial(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	id, _, err := m.try(t, candidate, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	m.clock += time.Hour
	if o, err := m.watchOver(id); err != nil || o == nil || !o.PutBack {
		t.Fatalf("%+v, %v", o, err)
	}
	if _, _, err := m.try(t, candidate, time.Minute); err != nil {
		t.Fatal(err)
	}
	m.uninstall(t)
	if _, last, err := (&Runner{machine: m}).Trial(context.Background()); last != nil || err != nil {
		t.Errorf("%+v, %v", last, err)
	}
}

// A table in which others have what its text cannot say is no way back: nothing is begun.
func TestTrialOverATableThatNoSnapshotHolds(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	m.install(t, native)
	n := *m.table
	n.Chains = append(n.Chains[:len(n.Chains):len(n.Chains)], rules.NativeChain{Name: "theirs", Rules: []rules.NativeRule{{Action: rules.Accept{}, Comment: "für uns"}}})
	m.table = &n
	other := native
	other.Inbound.ExcludePorts = rules.Port(8080)
	before := m.state()
	_, err := (&Runner{machine: m}).Try(context.Background(), m.plan(t, other), TrialOptions{Within: MaxTrial, Watch: func(context.Context, Trial) (string, error) {
		t.Error("a watch was begun")
		return "", nil
	}})
	if err == nil || !strings.Contains(err.Error(), "has what no snapshot holds: line ") {
		t.Errorf("%v", err)
	}
	m.unchanged(t, before)
	if len(m.kept) != 0 {
		t.Errorf("kept: %v", m.kept)
	}
}
