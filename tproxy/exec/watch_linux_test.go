package exec_test

import (
	"context"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

// Rules that vanish are seen at once by nft, whose kernel tells, and within the time
// between two looks by legacy, whose kernel does not; and so is the repair.
func TestWatchSeesRulesVanish(t *testing.T) {
	eachVariant(t, func(w *world) {
		w.watchVanish(tproxy.Config{}, 300*time.Millisecond, func() { w.on("", w.program(4, ""), "-t", "nat", "-F") })
	})
}

// Of a table of nftables the kernel tells, and nobody looks in between.
func TestWatchSeesATableMeddledWith(t *testing.T) {
	eachVariant(t, func(w *world) {
		if w.backend != tproxy.IPTablesNFT {
			return // the variant of iptables says nothing here
		}
		w.backend = tproxy.NFTables
		w.watchVanish(tproxy.Config{Backend: tproxy.NFTables}, time.Hour, func() {
			w.on("", "nft", "flush", "chain", "inet", tproxy.NFTable, "nat.KUMA_MESH_INBOUND")
		})
	})
}

func (w *world) watchVanish(c tproxy.Config, poll time.Duration, meddle func()) {
	w.install(c)
	ctx, cancel := context.WithTimeout(w.Context(), 20*time.Second)
	defer cancel()
	states := make(chan exec.State)
	done := make(chan error, 1)
	go func() {
		done <- w.In(w.Host, func() error {
			return w.runner.Watch(ctx, exec.WatchOptions{Settle: 20 * time.Millisecond, Poll: poll}, func(s *exec.Status) error {
				states <- s.State
				return nil
			})
		})
	}()
	next := func(want exec.State) {
		w.Helper()
		for {
			select {
			case got := <-states:
				if got == want {
					return
				}
				w.Logf("%s on the way to %s", got, want) // half of a flush
			case <-ctx.Done():
				w.Fatalf("never %s", want)
			}
		}
	}
	next(exec.StateInstalled)
	meddle()
	next(exec.StateDrifted)
	w.install(c)
	next(exec.StateInstalled)
	w.uninstall()
	next(exec.StateAbsent)
	cancel()
	for {
		select {
		case <-states:
		case err := <-done:
			if err != nil {
				w.Error(err)
			}
			return
		}
	}
}
