package exec_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// A dry run tells what an install would find: what would decide before ours, what
// would not let pass what ours redirect, who does not listen, and which connections of
// root's would go to the proxy when they are made anew. It changes nothing.
func TestPreflight(t *testing.T) {
	eachVariant(t, func(w *world) {
		server := netip.AddrPortFrom(netlab.Internet4, 6514)
		excluded := netip.AddrPortFrom(netlab.Internet4, 6515)
		if _, err := w.ListenTCP(w.Client, 0, "collector", server, excluded); err != nil {
			w.Fatal(err)
		}
		for _, uid := range []uint32{0, 0, appUID, proxyUID} {
			h, err := w.Hold(w.Host, uid, server)
			if err != nil {
				w.Fatal(err)
			}
			w.Cleanup(h.Close)
		}
		h, err := w.Hold(w.Host, 0, excluded)
		if err != nil {
			w.Fatal(err)
		}
		w.Cleanup(h.Close)
		w.on("", w.program(4, ""), "-t", "nat", "-I", "PREROUTING", "-p", "tcp", "--dport", "443", "-j", "ACCEPT")
		w.on("", w.program(4, ""), "-A", "INPUT", "-p", "tcp", "--dport", "15006", "-j", "DROP")
		before := w.saves()
		preflight := func(c tproxy.Config) *exec.Preflight {
			w.Helper()
			p, err := w.plan(c)
			if err != nil {
				w.Fatal(err)
			}
			var found *exec.Preflight
			err = w.In(w.Host, func() (err error) { found, err = w.runner.Preflight(w.Context(), p); return err })
			if err != nil {
				w.Fatal(err)
			}
			return found
		}
		cfg := tproxy.Config{Outbound: tproxy.Outbound{ExcludePorts: rules.Port(excluded.Port())}}
		found := preflight(cfg)
		var hindered []string
		for _, d := range found.Hindered {
			hindered = append(hindered, d.String())
		}
		text := strings.Join(hindered, "\n")
		if len(found.Hindered) != 2 || !strings.Contains(text, "shadowed: IPv4 nat PREROUTING #1 -p tcp -m tcp --dport 443 -j ACCEPT") || !strings.Contains(text, "filtered: IPv4 filter INPUT") {
			w.Errorf("hindered\n%s", text)
		}
		if found.Status.State != exec.StateAbsent || len(found.Silent) != 2 || len(found.Reasons) != 0 {
			w.Errorf("%+v, silent %q, reasons %q", found.Status, found.Silent, found.Reasons)
		}
		// One program's connections to one place are one; neither the proxy's nor an
		// excluded port is captured, and an application's is meant to be.
		if len(found.Captured) != 1 || found.Captured[0].Remote != server || found.Captured[0].UID != 0 || found.Captured[0].Program == "" {
			w.Errorf("captured %v", found.Captured)
		}
		if after := w.saves(); after != before {
			w.Errorf("it changed\n%s\nto\n%s", before, after)
		}
		// With the proxy there and the rules of others gone, nothing is left to say.
		w.on("", w.program(4, ""), "-t", "nat", "-D", "PREROUTING", "1")
		w.on("", w.program(4, ""), "-D", "INPUT", "1")
		w.proxy(netlab.Answer)
		w.install(cfg)
		found = preflight(cfg)
		if len(found.Hindered)+len(found.Silent)+len(found.Status.Drift)+len(found.Reasons) != 0 || found.Status.State != exec.StateInstalled {
			w.Errorf("installed: %+v, %+v", found, found.Status)
		}
	})
}

// saves is what both variants hold, without counters.
func (w *world) saves() string {
	w.Helper()
	return w.on("", "sh", "-c", "for f in iptables ip6tables; do for v in nft legacy; do $f-$v-save | grep -v '^[#:]'; done; done; ip address show dev lo")
}
