package exec_test

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

// talking opens redirected connections, in and out of both families, that talk until
// Stop.
func (w *world) talking(each int) *netlab.Load {
	w.Helper()
	var streams []netlab.Stream
	for _, a := range []netip.Addr{netlab.Host4, netlab.Host6} {
		streams = append(streams, netlab.Stream{Name: "in", From: w.Client, To: netip.AddrPortFrom(a, 80), Want: "in", Else: "app", Held: each})
	}
	for _, a := range []netip.Addr{netlab.Internet4, netlab.Internet6} {
		streams = append(streams, netlab.Stream{Name: "out", From: w.Host, UID: appUID, To: netip.AddrPortFrom(a, 443), Want: "out", Else: "remote", Held: each})
	}
	load, err := w.Load(streams...)
	if err != nil {
		w.Fatal(err)
	}
	return load
}

// An uninstall that drains lets the connections that are redirected end by themselves,
// while new ones go direct; one that does not, cuts them, and says how many.
func TestUninstallDrains(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		w.install(tproxy.Config{})
		load := w.talking(10)
		done := make(chan *exec.Report, 1)
		go func() {
			r, err := w.remove(exec.RemoveOptions{Drain: 20 * time.Second})
			if err != nil {
				w.Error(err)
			}
			done <- r
		}()
		time.Sleep(time.Second) // more than the rules need to change
		w.check(flow{"new", "outside host:80 => app"}, flow{"new", "1000 internet:443 => remote"})
		_, alive, held := load.Stop()
		if alive != held {
			w.Errorf("%d of %d connections lived through it", alive, held)
		}
		select {
		case r := <-done:
			if r != nil && (r.Cut != 0 || !r.Changed) {
				w.Errorf("%+v", r)
			}
		case <-time.After(10 * time.Second):
			w.Error("the connections have ended, and the uninstall goes on to wait")
		}
		for f, o := range map[string]tproxy.Found{"IPv4": w.found(4), "IPv6": w.found(6)} {
			if len(o.Ours.Chains)+len(o.Ours.Bases) > 0 {
				w.Errorf("%s: left %v", f, o.Ours)
			}
		}
	})
}

func TestUninstallCountsWhatItCuts(t *testing.T) {
	for _, others := range []bool{false, true} {
		eachBackend(t, func(w *world) {
			w.serve()
			w.proxy(netlab.Answer)
			if others { // they hold conntrack
				w.iptables("-t nat -A POSTROUTING -o eth9 -j MASQUERADE")
			}
			w.install(tproxy.Config{})
			load := w.talking(10)
			time.Sleep(100 * time.Millisecond)
			r, err := w.remove(exec.RemoveOptions{Drain: 100 * time.Millisecond})
			if err != nil {
				w.Fatal(err)
			}
			time.Sleep(200 * time.Millisecond)
			_, alive, held := load.Stop()
			switch {
			case others && (r.Cut != 0 || alive != held):
				w.Errorf("with rules of others: %d cut, %d of %d live", r.Cut, alive, held)
			case !others && (r.Cut < held || r.Cut > held+8 || alive > 0): // and those of the moment
				w.Errorf("%d cut, %d of %d live", r.Cut, alive, held)
			case !others && !strings.Contains(strings.Join(r.Notes, "\n"), "and were cut"):
				w.Errorf("notes %q", r.Notes)
			}
		})
	}
}

// Queries over TCP that are redirected are among those that are counted.
func TestUninstallCountsQueriesOverTCP(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		w.install(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}})
		for _, a := range places["resolver"] {
			h, err := w.Hold(w.Host, appUID, netip.AddrPortFrom(a, 53))
			if err != nil || h.Who != "dns" {
				w.Fatalf("to %s: %v, %v", a, h, err)
			}
			w.Cleanup(h.Close)
		}
		if r := w.uninstall(); r.Cut != 2 {
			w.Errorf("%d cut, want 2", r.Cut)
		}
	})
}

// A drain that is interrupted leaves everything as it was.
func TestInterruptedDrainPutsTheRulesBack(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		w.install(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
		load := w.talking(5)
		ctx, cancel := context.WithTimeout(w.Context(), 500*time.Millisecond)
		defer cancel()
		err := w.In(w.Host, func() error {
			_, err := w.runner.Remove(ctx, exec.RemoveOptions{Drain: time.Minute})
			return err
		})
		if err == nil || !strings.Contains(err.Error(), "undone") {
			w.Errorf("error %v", err)
		}
		w.check(flow{"back", "outside host:80 => in"}, flow{"back", "1000 internet:443 => out"}, flow{"back", "1000 udp resolver:53 => dns"})
		if _, alive, held := load.Stop(); alive != held {
			w.Errorf("%d of %d connections lived through it", alive, held)
		}
	})
}
