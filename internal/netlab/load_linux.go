package netlab

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Stream is a client that connects again and again, as fast as it can.
type Stream struct {
	Name string
	From *Namespace
	UID  uint32
	To   netip.AddrPort
	// Held is how many connections from before the load stay open.
	Held int
	// Want is the server that has to answer, and Else the one that answers where the
	// rules were not in place: a connection has escaped, or one that is excluded was
	// caught.
	Want, Else string
}

// Tally is what became of a stream's connections.
type Tally struct {
	Stream
	Right, Wrong, Broken int
}

// Load is streams that run, and connections from before them that stay open and
// talk: what is idle does not notice that conntrack was away.
type Load struct {
	held    []*Held
	dead    atomic.Int64
	tallies []Tally
	done    chan struct{}
	clients sync.WaitGroup
}

// pause is how long a client waits between two connections: there are 28,000 ports,
// and a few thousand connections a second are enough to hit a gap of a millisecond.
const pause = 200 * time.Microsecond

// chatter is how long a long-lived connection says nothing.
const chatter = 5 * time.Millisecond

// Load opens the long-lived connections and starts the streams. Call Stop.
func (l *Lab) Load(streams ...Stream) (*Load, error) {
	load := &Load{done: make(chan struct{})}
	for _, s := range streams {
		for range s.Held {
			h, err := l.Hold(s.From, s.UID, s.To)
			if err != nil {
				load.Stop()
				return nil, err
			}
			load.held = append(load.held, h)
		}
		load.tallies = append(load.tallies, Tally{Stream: s})
	}
	for _, h := range load.held {
		load.clients.Go(func() {
			for h.Alive() {
				select {
				case <-load.done:
					return
				case <-time.After(chatter):
				}
			}
			load.dead.Add(1)
		})
	}
	for i := range load.tallies {
		t := &load.tallies[i]
		load.clients.Go(func() {
			for {
				select {
				case <-load.done:
					return
				default:
				}
				seen, err := l.Dial(t.From, t.UID, "tcp", netip.AddrPort{}, t.To)
				switch {
				case err == nil && seen.Who == t.Want:
					t.Right++
				case err == nil && seen.Who == t.Else:
					t.Wrong++
				default:
					t.Broken++
				}
				time.Sleep(pause)
			}
		})
	}
	return load, nil
}

// Stop ends the streams and returns what became of their connections, and how many of
// the long-lived ones answered to the end.
func (l *Load) Stop() (tallies []Tally, alive, held int) {
	close(l.done)
	l.clients.Wait()
	for _, h := range l.held {
		h.Close()
	}
	return l.tallies, len(l.held) - int(l.dead.Load()), len(l.held)
}
