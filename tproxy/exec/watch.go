package exec

import (
	"cmp"
	"context"
	"fmt"
	"reflect"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// WatchOptions say how to watch. The zero value is the defaults.
type WatchOptions struct {
	// Settle is how long to wait after a change for others that belong to it; 0 means
	// 200 ms.
	Settle time.Duration
	// Poll is how often to look where the kernel does not say that something changed:
	// at rules of iptables-legacy and at resolv.conf. 0 means 10 s.
	Poll time.Duration
	// Recheck is how often to look anyway; 0 means 10 minutes.
	Recheck time.Duration
}

// The defaults of WatchOptions.
const (
	defaultSettle  = 200 * time.Millisecond
	defaultPoll    = 10 * time.Second
	defaultRecheck = 10 * time.Minute
)

// Watch calls each with the Status, and again whenever it is another than before, what
// rules have counted left aside. It returns when ctx is done, with nil, when a look
// fails, or with each's error. Between changes it sleeps: the kernel tells of those of
// nf_tables, of interfaces and of addresses; where rules stand in iptables-legacy, or a
// nameserver of ours in a file, it looks every Poll.
//
// It works on the network namespace of the calling thread, as everything here.
func (r *Runner) Watch(ctx context.Context, o WatchOptions, each func(*Status) error) error {
	s, err := r.session()
	if err != nil {
		return err
	}
	woken := make(chan struct{}, 1)
	stop, err := s.m.monitor(func() {
		select {
		case woken <- struct{}{}:
		default: // somebody is to look already
		}
	})
	hears := err == nil
	if hears {
		defer stop()
	} else {
		s.log.Debug("the kernel tells nothing of changes; looking now and then", "error", err)
	}
	var last *Status
	for {
		status, err := r.Status(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("looking again: %w", err)
		}
		if last == nil || !sameStatus(last, status) {
			if err := each(status); err != nil {
				return err
			}
			last = status
		}
		if !o.wait(ctx, woken, hears && !status.needsPolling()) {
			return nil
		}
	}
}

// wait waits for a change or for the time to look; it is false when ctx is done.
func (o WatchOptions) wait(ctx context.Context, woken <-chan struct{}, hears bool) bool {
	after := cmp.Or(o.Poll, defaultPoll)
	if hears {
		after = cmp.Or(o.Recheck, defaultRecheck)
	}
	timer := time.NewTimer(after)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	case <-woken:
	}
	// One change comes in many messages: a table of rules, a flush and a fill.
	settle := time.NewTimer(cmp.Or(o.Settle, defaultSettle))
	defer settle.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-settle.C:
	}
	select { // those of meanwhile
	case <-woken:
	default:
	}
	return true
}

// needsPolling reports whether part of what was looked at changes without a word of the
// kernel's.
func (s *Status) needsPolling() bool {
	return s.Backend == tproxy.IPTablesLegacy || s.Config != nil && s.Config.DNS.ControlPlane.IsValid()
}

// sameStatus compares all but the counters.
func sameStatus(a, b *Status) bool {
	x, y := *a, *b
	x.Counters, y.Counters = nil, nil
	return reflect.DeepEqual(x, y)
}
