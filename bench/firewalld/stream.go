//go:build linux

package main

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
)

// pause is the time between two connections to one address. Each has a goroutine of its
// own: one that hangs does not keep others from seeing a gap.
const pause = 5 * time.Millisecond

// slow is how long a connection takes that was held up.
const slow = 100 * time.Millisecond

// try is one connection.
type try struct {
	begun, ended time.Time
	who          string
}

// client connects again and again.
type client struct {
	mu      sync.Mutex
	tries   [][]try // by destination
	done    chan struct{}
	running sync.WaitGroup
}

// connect starts a client of an application on the host.
func (h *host) connect(to []netip.AddrPort) *client {
	c := &client{tries: make([][]try, len(to)), done: make(chan struct{})}
	for i, a := range to {
		one := func() {
			t := try{begun: time.Now()}
			seen, err := h.Dial(h.Lab.Host, crowd.AppUID, "tcp", netip.AddrPort{}, a)
			t.ended, t.who = time.Now(), seen.Who
			if err != nil {
				t.who = "failed"
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			c.tries[i] = append(c.tries[i], t)
		}
		c.running.Go(func() {
			for tick := time.Tick(pause); ; {
				select {
				case <-c.done:
					return
				case <-tick:
					c.running.Go(one)
				}
			}
		})
	}
	return c
}

// stream is what became of the connections of a client.
type stream struct {
	made, escaped, heldUp int
	// gap is for how long new connections escaped, of the family that it was longer for.
	gap  time.Duration
	back bool
}

// stop ends a client; what it did before a moment does not count.
func (c *client) stop(since time.Time) (s stream) {
	close(c.done)
	c.running.Wait()
	for _, tries := range c.tries {
		tries = slices.DeleteFunc(tries, func(t try) bool { return t.begun.Before(since) })
		for _, t := range tries {
			s.made++
			switch {
			case t.who == "remote":
				s.escaped++
			case t.who != "out" || t.ended.Sub(t.begun) > slow:
				s.heldUp++
			}
		}
		s.gap = max(s.gap, gap(tries))
	}
	return s
}

// gap sums up the times from a connection that escaped to the next one that did not, in
// the order in which they were answered: what was dropped first and came through at a
// second try counts when it did.
func gap(tries []try) (sum time.Duration) {
	tries = slices.SortedFunc(slices.Values(tries), func(a, b try) int { return a.ended.Compare(b.ended) })
	var from time.Time
	for _, t := range tries {
		switch {
		case t.who == "remote" && from.IsZero():
			from = t.ended
		case t.who == "out" && !from.IsZero():
			sum += t.ended.Sub(from)
			from = time.Time{}
		}
	}
	if !from.IsZero() {
		sum += tries[len(tries)-1].ended.Sub(from)
	}
	return sum
}
