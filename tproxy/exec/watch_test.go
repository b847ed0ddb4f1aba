package exec

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// seenBy runs Watch on the machine; what it saw is asked for when everything waits.
func (m *fakeMachine) seenBy(t *testing.T, o WatchOptions) (seen func() []string, end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var states []string
	done := make(chan error)
	go func() {
		done <- (&Runner{machine: m}).Watch(ctx, o, func(s *Status) error {
			states = append(states, string(s.State))
			return nil
		})
	}()
	seen = func() []string { synctest.Wait(); return slices.Clone(states) }
	return seen, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if m.changed != nil {
			t.Error("it still listens")
		}
	}
}

// It says what is, looks when the kernel tells of a change, and says it where something
// changed; in between it does nothing for minutes.
func TestWatch(t *testing.T) {
	m := newFakeMachine(t)
	m.install(t, tproxy.Config{})
	synctest.Test(t, func(t *testing.T) {
		seen, end := m.seenBy(t, WatchOptions{})
		defer end()
		want := []string{"installed"}
		same(t, "at first", seen(), want)
		commands := len(m.commands)
		time.Sleep(9 * time.Minute)
		if same(t, "after nine minutes", seen(), want); len(m.commands) != commands {
			t.Errorf("%d processes while nothing changed", len(m.commands)-commands)
		}
		m.changed()
		time.Sleep(time.Second)
		same(t, "a change of others", seen(), want)

		v6 := passthrough6
		delete(m.addresses, v6)
		for range 5 {
			m.changed() // many messages of one change
		}
		time.Sleep(time.Second)
		want = append(want, "drifted")
		same(t, "drifted", seen(), want)
		m.addresses[v6] = true
		m.changed()
		time.Sleep(time.Second)
		want = append(want, "installed")
		same(t, "put right", seen(), want)

		// What nobody tells of is seen at last.
		delete(m.addresses, v6)
		time.Sleep(11 * time.Minute)
		want = append(want, "drifted")
		same(t, "looked anyway", seen(), want)
	})
}

// Of iptables-legacy the kernel tells nothing, and where it tells nothing at all, or
// where names are in a file, it looks now and then.
func TestWatchPolls(t *testing.T) {
	for name, test := range map[string]struct {
		config tproxy.Config
		deaf   error
	}{
		"legacy": {tproxy.Config{Backend: tproxy.IPTablesLegacy}, nil},
		"deaf":   {tproxy.Config{}, errors.New("not permitted")},
		"names":  {withNames, nil},
	} {
		t.Run(name, func(t *testing.T) {
			m := newFakeMachine(t)
			m.conf(t, confText)
			m.deaf = test.deaf
			m.installNames(t, test.config)
			synctest.Test(t, func(t *testing.T) {
				seen, end := m.seenBy(t, WatchOptions{Poll: time.Minute})
				same(t, "at first", seen(), []string{"installed"})
				delete(m.addresses, passthrough6)
				time.Sleep(61 * time.Second)
				same(t, "a minute later", seen(), []string{"installed", "drifted"})
				m.changed = nil // nobody was told to
				end()
			})
		})
	}
}

// An error of who is told ends it.
func TestWatchStatusEnds(t *testing.T) {
	m := newFakeMachine(t)
	enough := errors.New("enough")
	if err := (&Runner{machine: m}).Watch(context.Background(), WatchOptions{}, func(*Status) error { return enough }); !errors.Is(err, enough) {
		t.Error(err)
	}
}
