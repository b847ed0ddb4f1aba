// Package kernel asks the kernel about the network namespace of the calling
// thread, and makes the small changes there that are no rules: an address on
// lo, a lock.
//
// The calling thread, because a caller that works for another namespace locks
// its goroutine to its thread and calls setns(2). So everything is asked on
// that thread: no goroutine is started, netlink sockets are opened for each
// call and closed again (a socket belongs for ever to the namespace it was
// opened in), and files are read below /proc/thread-self/net, never /proc/net,
// which is the main thread's (proc_net(5)).
//
// Everything but Linux answers errors.ErrUnsupported.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"
)

// Family is the version of IP.
type Family uint8

// The families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

func (f Family) String() string {
	return "IPv" + strconv.Itoa(int(f))
}

// ErrNoUser is for a user that this user namespace does not have.
var ErrNoUser = errors.New("no such user in this user namespace")

// LockFileVariable names the file that iptables-legacy locks (iptables(8)).
const LockFileVariable = "XTABLES_LOCKFILE"

// NFTTable names a table of nf_tables.
type NFTTable struct {
	Family string // ip, ip6, inet, arp, bridge, netdev
	Name   string
}

// NFTBase is a base chain of nf_tables.
type NFTBase struct {
	Table NFTTable
	Chain string
	Hook  string // PREROUTING, INPUT, ..., INGRESS, EGRESS; "?" for one not known here
	Type  string // filter, nat or route
	// Priority is its place among the chains of the hook, lowest first.
	Priority int32
	Drops    bool // whether its policy is drop
}

// Route is a way out of this host.
type Route struct {
	Interface string
	Source    netip.Addr
	// Local is whether the address is this host's: a local route can say so, of an
	// address that no interface has.
	Local bool
}

// LinkGroup is the group of an interface of ours: "KUMA" (ip-link(8), GROUP).
const LinkGroup = 0x4b554d41

// Link is an interface of ours.
type Link struct {
	Index uint32
	// Ours is whether it has the group that AddLink gives to those it makes.
	Ours bool
	Up   bool
	// Addresses are its own, without link-local ones.
	Addresses []netip.Prefix
}

// HeldError says that somebody else has a lock.
type HeldError struct {
	Name string
	// PID and Comm are the holder's; 0 and "" if it cannot be told: it is in
	// another PID namespace, or another user's, or has just let go.
	PID  int
	Comm string
}

func (e *HeldError) Error() string {
	if e.PID == 0 {
		return fmt.Sprintf("lock %q is held by another process", e.Name)
	}
	return fmt.Sprintf("lock %q is held by %s (pid %d)", e.Name, e.Comm, e.PID)
}

// Lock takes the lock of that name in the calling thread's network namespace,
// or returns *HeldError. It is a bound abstract unix socket: those names are
// per network namespace (unix(7)), leave no file behind, and the kernel lets go
// of them when the process dies, however it does. A name has 1 to 107 bytes.
//
// Any user of the namespace can take it; a lock keeps our own runs apart and
// guards against nobody.
func Lock(name string) (*LockHandle, error) {
	h, err := tryLock(name)
	if errors.Is(err, errHeld) {
		return nil, lockHolder(name)
	}
	return h, err
}

// LockWait is Lock for somebody who can wait: while the lock is held it tries
// again, every 10 ms first and every 100 ms later, until wait is over and
// *HeldError is returned, or until ctx is done. With a wait of 0 it tries once.
func LockWait(ctx context.Context, name string, wait time.Duration) (*LockHandle, error) {
	deadline := time.Now().Add(wait)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("lock %q: %w", name, err)
		}
		h, err := tryLock(name)
		if !errors.Is(err, errHeld) {
			return h, err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return nil, lockHolder(name)
		}
		timer := time.NewTimer(min(pause, left))
		select {
		case <-ctx.Done():
			timer.Stop()
		case <-timer.C:
		}
	}
}

// Holder says who holds a lock, without taking it. It is false where nobody does.
func Holder(name string) (*HeldError, bool) { return holder(name) }

// errHeld is tryLock's, before anybody looks for the holder: that walks /proc.
var errHeld = errors.New("held")

// parseRelease reads "6.18.5-x": the numbers before and behind the first dot.
func parseRelease(text []byte) (major, minor int) {
	numbers := [2]int{}
	at := 0
	for _, c := range text {
		switch {
		case c >= '0' && c <= '9' && numbers[at] < 1000:
			numbers[at] = numbers[at]*10 + int(c-'0')
		case c == '.' && at == 0:
			at = 1
		default:
			return numbers[0], numbers[1]
		}
	}
	return numbers[0], numbers[1]
}
