package exec

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// What iptables says of failures that pass.
const (
	saysLocked = "Another app is currently holding the xtables lock. Stopped waiting after 5s."
	saysBusy   = "line 3: RULE_APPEND failed (Resource temporarily unavailable): rule in chain KUMA_MESH_INBOUND"
)

// failing makes the first n restores fail, and counts them all.
func (m *fakeMachine) failing(n int, stderr string) (restores *int) {
	restores = new(int)
	m.onRun = func(c command) (result, bool) {
		if !strings.HasSuffix(c.Path, "-restore") {
			return result{}, false
		}
		*restores++
		return result{Exit: 4, Stderr: []byte(stderr)}, *restores <= n
	}
	return restores
}

// Time passes at once in these tests: the clock is a fake one.
func TestFailuresThatPassAreTriedAgain(t *testing.T) {
	for _, test := range []struct {
		name    string
		c       tproxy.Config
		stderr  string
		fail    int
		retries int // -1: the install fails
		took    time.Duration
	}{
		{"locked", tproxy.Config{}, saysLocked, 1, 1, 2 * time.Second},
		{"busy", tproxy.Config{}, saysBusy, 1, 1, 2 * time.Second},
		{"device busy", tproxy.Config{}, "line 3: CHAIN_DEL failed (Device or resource busy)", 2, 2, 4 * time.Second},
		{"as often as is allowed", tproxy.Config{}, saysLocked, 4, 4, 8 * time.Second},
		{"once too often", tproxy.Config{}, saysLocked, 5, -1, 8 * time.Second},
		{"as asked for", tproxy.Config{MaxRetries: 6, SleepBetweenRetries: time.Minute}, saysBusy, 6, 6, 6 * time.Minute},
		{"without a sleep", tproxy.Config{MaxRetries: 2, SleepBetweenRetries: -1}, saysBusy, 2, 2, 0},
		{"not at all", tproxy.Config{MaxRetries: -1}, saysBusy, 1, -1, 0},
		{"what does not pass", tproxy.Config{}, "line 3: RULE_APPEND failed (Invalid argument)", 1, -1, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newFakeMachine(t)
				m.populate(t)
				before := m.state()
				test.c.IPFamilyMode = tproxy.IPv4Only
				p := m.plan(t, test.c)
				m.failing(test.fail, test.stderr)
				var log bytes.Buffer
				start := time.Now()
				r, err := (&Runner{machine: m, Log: slog.New(slog.NewTextHandler(&log, nil))}).Apply(context.Background(), p)
				if took := time.Since(start); took != test.took {
					t.Errorf("took %s, want %s", took, test.took)
				}
				if test.retries < 0 {
					if e := applyError(t, err); !strings.Contains(e.Stderr, test.stderr) || len(e.Left) > 0 {
						t.Errorf("%v", err)
					}
					m.unchanged(t, before)
					return
				}
				if err != nil || r.Retries != test.retries || !r.Changed || len(r.Steps) != 1 {
					t.Fatalf("%+v, %v", r, err)
				}
				if n := strings.Count(log.String(), "failed; trying again"); n != test.retries || !strings.Contains(log.String(), "IPv4 rules by iptables-nft-restore") {
					t.Errorf("the log:\n%s", log.String())
				}
			})
		})
	}
}

// An uninstall tries again as well, with options of its own.
func TestRemoveTriesAgain(t *testing.T) {
	for _, test := range []struct {
		o    RemoveOptions
		took time.Duration
	}{
		{RemoveOptions{}, 2 * time.Second},
		{RemoveOptions{MaxRetries: 1, SleepBetweenRetries: time.Second}, time.Second},
		{RemoveOptions{MaxRetries: -1}, -1},
		{RemoveOptions{Wait: -1}, -1},
	} {
		synctest.Test(t, func(t *testing.T) {
			m := newFakeMachine(t)
			m.install(t, tproxy.Config{IPFamilyMode: tproxy.IPv4Only})
			m.failing(1, saysBusy)
			start := time.Now()
			r, err := (&Runner{machine: m}).Remove(context.Background(), test.o)
			took := time.Since(start)
			if (err != nil) != (test.took < 0) || took != max(test.took, 0) || err == nil && r.Retries != 1 {
				t.Errorf("%+v: %+v, %v, took %s", test.o, r, err, took)
			}
		})
	}
}

// Who asked not to wait for the lock does not wait between tries either, unless
// he asked for that.
func TestNoWaitMeansNoSleep(t *testing.T) {
	for _, test := range []struct {
		c    tproxy.Config
		took time.Duration
	}{
		{tproxy.Config{Wait: -1}, 0},
		{tproxy.Config{Wait: -1, MaxRetries: 3}, 6 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			m := newFakeMachine(t)
			test.c.Backend = tproxy.IPTablesLegacy // whose lock is held, by 42
			start := time.Now()
			err := m.attempt(context.Background(), m.plan(t, test.c))
			if took := time.Since(start); !errors.Is(err, ErrLocked) || took != test.took {
				t.Errorf("%v, took %s, want %s", err, took, test.took)
			}
		})
	}
}

// A sleep ends with the context, and what was done is undone.
func TestSleepIsInterrupted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newFakeMachine(t)
		m.populate(t)
		before := m.state()
		p := m.plan(t, tproxy.Config{SleepBetweenRetries: time.Hour})
		m.onRun = func(c command) (result, bool) {
			return result{Exit: 4, Stderr: []byte(saysBusy)}, strings.HasSuffix(c.Path, "ip6tables-nft-restore")
		}
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		start := time.Now()
		e := applyError(t, m.attempt(ctx, p))
		if took := time.Since(start); took != 3*time.Second {
			t.Errorf("took %s", took)
		}
		m.unchanged(t, before)
		same(t, "undone", e.Undone, []string{"the former IPv4 rules by iptables-nft-restore"})
	})
}

// To leave a half because somebody held the lock for a moment would be worse
// than to fail: an undo tries again too.
func TestUndoTriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newFakeMachine(t)
		m.populate(t)
		before := m.state()
		p := m.plan(t, tproxy.Config{})
		undoing := 0
		m.onRun = func(c command) (result, bool) {
			switch {
			case strings.HasSuffix(c.Path, "ip6tables-nft-restore"):
				undoing = 1
				return result{Exit: 1, Stderr: []byte("line 3 failed")}, true
			case strings.HasSuffix(c.Path, "-restore") && undoing > 0:
				undoing++
				return result{Exit: 4, Stderr: []byte(saysLocked)}, undoing < 4
			}
			return result{}, false
		}
		start := time.Now()
		e := applyError(t, m.attempt(context.Background(), p))
		if took := time.Since(start); took != 4*time.Second || len(e.Left) > 0 || len(e.Undone) != 1 {
			t.Errorf("took %s: %v", took, e)
		}
		m.unchanged(t, before)
	})
}

// Rules that others changed are no matter of patience: no sleep, and no retry of
// those that the Config allows.
func TestChangedRulesAreTriedAgainAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newFakeMachine(t)
		m.populate(t)
		p := m.plan(t, tproxy.Config{IPFamilyMode: tproxy.IPv4Only, MaxRetries: 1})
		restores := 0
		m.onRun = func(c command) (result, bool) {
			if !strings.HasSuffix(c.Path, "-restore") {
				return result{}, false
			}
			if restores++; restores == 1 {
				m.edit(t, "iptables-nft", "*nat\n-A OUTPUT -p tcp -m tcp --dport 7 -j ACCEPT\nCOMMIT\n")
			}
			return result{Exit: 4, Stderr: []byte(saysBusy)}, restores < 3
		}
		start := time.Now()
		r, err := (&Runner{machine: m}).Apply(context.Background(), p)
		if took := time.Since(start); err != nil || r.Retries != 2 || took != 2*time.Second {
			t.Errorf("took %s: %+v, %v", took, r, err)
		}
	})
}

// Others may change the rules while a change is undone, too: the undo reads them again.
func TestUndoWhileOthersWrite(t *testing.T) {
	m := newFakeMachine(t)
	m.populate(t)
	before := m.state()
	p := m.plan(t, tproxy.Config{})
	undoing := false
	m.onRun = func(c command) (result, bool) {
		switch filepath.Base(c.Path) {
		case "ip6tables-nft-restore":
			undoing = true
			return result{Exit: 1, Stderr: []byte("line 3: RULE_APPEND failed (Operation not permitted)")}, true
		case "iptables-nft-restore":
			if undoing { // somebody has taken our jump out between the undo's two programs
				undoing = false
				nat, _ := m.netfilter["iptables-nft"].Set().Base(rules.NAT, rules.Output)
				for _, r := range nat.Rules {
					if r.Target() == "KUMA_MESH_OUTBOUND" {
						m.edit(t, "iptables-nft", "*nat\n-D OUTPUT "+r.Listed()+"\nCOMMIT\n")
					}
				}
			}
		}
		return result{}, false
	}
	if e := applyError(t, m.attempt(context.Background(), p)); len(e.Left) > 0 || len(e.Undone) != 1 {
		t.Errorf("left %q, undone %q", e.Left, e.Undone)
	}
	m.unchanged(t, before)
}
