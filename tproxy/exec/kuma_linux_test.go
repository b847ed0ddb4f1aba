package exec_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// kuma installs as Kuma's own installer does, over whatever is there.
func (w *world) kuma(i oldkuma.Installer, o oldkuma.Options) {
	w.Helper()
	for _, f := range rules.Families() {
		w.on(oldkuma.Script(i, f, o), w.program(f, "restore"), "--noflush")
	}
	if !w.passthroughOnLo() {
		w.on("", "ip", "-6", "address", "add", "::6/128", "dev", "lo")
	}
}

// kumaUninstall does what Kuma's own uninstall does, and its install before it
// installs.
func (w *world) kumaUninstall() error {
	w.Helper()
	for _, f := range rules.Families() {
		script, err := oldkuma.Uninstalled(w.on("", w.program(f, "save")))
		if err != nil {
			return err
		}
		w.on(script, w.program(f, "restore"))
	}
	return nil
}

// eachInstaller runs the test with each variant of iptables for each installer of
// Kuma's.
func eachInstaller(t *testing.T, run func(w *world, i oldkuma.Installer)) {
	for _, i := range oldkuma.Installers() {
		t.Run(i.String(), func(t *testing.T) { eachVariant(t, func(w *world) { run(w, i) }) })
	}
}

// What Kuma's own installer left, with everything that it can write, is replaced by
// an install in whatever variant it stands, the rules then are those of a fresh host,
// and an uninstall leaves what was there before Kuma's, counters included.
func TestMovingOverFromKuma(t *testing.T) {
	eachInstaller(t, func(w *world, i oldkuma.Installer) {
		w.strangers()
		before := w.tables()
		o := oldkuma.Everything()
		o.Servers = nil
		w.kuma(i, o)
		c := tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}, Backend: tproxy.Auto}
		p, err := w.plan(c)
		if err != nil {
			w.Fatal(err)
		}
		r, err := w.apply(p)
		if err != nil {
			w.Fatal(err)
		}
		if !strings.HasPrefix(r.Notes[0], "rules of Kuma's own installer, replaced: "+w.backend.String()+" IPv4 (") {
			w.Errorf("notes %q", r.Notes)
		}
		for _, f := range p.Families {
			if d := rules.Compare(f, w.ours(f), p.WithRecord(tproxy.Record{PassthroughAddressOurs: true})); len(d) > 0 {
				w.Errorf("%s is not as planned: %v", f, d)
			}
			if text := w.save(f); strings.Contains(text, "_REDIRECT") && strings.Contains(text, "KUMA_MESH_INBOUND_REDIRECT") || strings.Contains(text, "MESH_OUTPUT") {
				w.Errorf("%s: left of Kuma's:\n%s", f, text)
			}
		}
		if again, err := w.apply(p); err != nil || again.Changed {
			w.Errorf("the same again: %v, %+v", err, again)
		}
		w.uninstall()
		after := w.tables()
		if i == oldkuma.Second || i == oldkuma.ThirdBare { // it could be anybody's
			after = dropLine(after, "-m conntrack --ctstate INVALID -j DROP")
			before, after = nftOut(before), nftOut(after)
		}
		w.same("the tables", before, after)
	})
}

// dropLine leaves out the lines that hold the words.
func dropLine(text, words string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.Contains(line, words) {
			b.WriteString(line)
		}
	}
	return b.String()
}

// nftOut leaves out what nft lists, and keeps what iptables does.
func nftOut(text string) string {
	_, rest, _ := strings.Cut(text, "/proc/thread-self/net/ip_tables_names")
	return rest
}

// An uninstall of ours without an install in between takes Kuma's rules out as well.
func TestUninstallTakesKumasRulesOut(t *testing.T) {
	eachInstaller(t, func(w *world, i oldkuma.Installer) {
		w.strangers()
		before := w.tables()
		w.kuma(i, oldkuma.Options{DNS: true, UID: 1234, DropInvalid: i == oldkuma.Third, Log: true})
		if r := w.uninstall(); !r.Changed {
			w.Errorf("%+v", r)
		}
		w.same("the tables", before, w.tables())
	})
}

// Flows go where the new Config says, also with rules of others between Kuma's.
func TestFlowsAfterMovingOver(t *testing.T) {
	eachInstaller(t, func(w *world, i oldkuma.Installer) {
		w.serve()
		w.proxy(netlab.Answer)
		w.kuma(i, oldkuma.Options{DNS: true, ExcludeIn: []uint16{80}, ExcludeOut: []uint16{443}})
		w.check(flow{"Kuma's", "outside host:80 => app"}, flow{"Kuma's", "1000 internet:443 => remote"},
			flow{"Kuma's", "outside host:8080 => in"}, flow{"Kuma's", "1000 internet:80 => out"})
		w.install(tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("8080")}, Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("8443")}})
		w.check(
			flow{"A5", "outside host:80 => in"}, flow{"A3", "outside host:8080 => app"}, flow{"A3", "outside host:22 => app"},
			flow{"B8", "1000 internet:8443 => remote"}, flow{"B11", "1000 internet:443 => out"}, flow{"B3", "5678 internet:443 => remote"},
			flow{"B2", "5678 host:80 => in"}, flow{"B1", "5678/passthrough host:80 => app"},
			flow{"C1", "1000 udp resolver:53 => resolver"})
		w.uninstall()
		w.check(flow{"gone", "outside host:80 => app"}, flow{"gone", "1000 internet:443 => remote"})
	})
}

// And back: Kuma's own install and uninstall, run over ours, succeed and leave
// nothing, with and without comments (K7).
func TestKumaOverOurs(t *testing.T) {
	for _, bare := range []bool{false, true} {
		t.Run(fmt.Sprintf("comments=%v", !bare), func(t *testing.T) {
			eachVariant(t, func(w *world) {
				w.serve()
				w.proxy(netlab.Answer)
				c := tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}, DisableComments: bare}
				nothing := func(when string) {
					w.Helper()
					for _, f := range rules.Families() {
						if text := w.save(f); strings.Contains(text, "KUMA_MESH") {
							w.Errorf("%s, %s: left\n%s", when, f, text)
						}
					}
					w.check(flow{when, "outside host:80 => app"}, flow{when, "1000 internet:443 => remote"}, flow{when, "1000 udp resolver:53 => resolver"})
				}
				w.install(c)
				if err := w.kumaUninstall(); err != nil {
					w.Fatalf("Kuma's uninstall: %v", err)
				}
				nothing("after Kuma's uninstall")
				if r := w.uninstall(); r.Changed {
					w.Errorf("there is something left for ours: %+v", r)
				}
				w.install(c)
				if err := w.kumaUninstall(); err != nil {
					w.Fatalf("Kuma's install: %v", err)
				}
				w.kuma(oldkuma.Third, oldkuma.Options{DNS: true})
				w.check(flow{"Kuma's", "outside host:80 => in"}, flow{"Kuma's", "1000 internet:443 => out"}, flow{"Kuma's", "1000 udp resolver:53 => dns"})
				if err := w.kumaUninstall(); err != nil {
					w.Fatalf("Kuma's uninstall: %v", err)
				}
				nothing("after Kuma's install and uninstall")
			})
		})
	}
}

// Under load, no connection escapes while Kuma's rules go and ours come, none that
// both exclude is caught, and those from before live on. bench/moveover does it for
// every installer, and longer.
func TestMovingOverUnderLoad(t *testing.T) {
	for _, i := range []oldkuma.Installer{oldkuma.First, oldkuma.Third} {
		t.Run(i.String(), func(t *testing.T) {
			eachVariant(t, func(w *world) {
				w.serve()
				w.proxy(netlab.Answer)
				w.kuma(i, oldkuma.Options{DNS: true, ExcludeIn: []uint16{8080}})
				c := tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("8080")}, DNS: tproxy.DNS{CaptureAll: true}}
				load, err := w.Load(
					netlab.Stream{Name: "in", From: w.Client, To: netip.AddrPortFrom(netlab.Host6, 80), Want: "in", Else: "app", Held: 10},
					netlab.Stream{Name: "out", From: w.Host, UID: appUID, To: netip.AddrPortFrom(netlab.Internet4, 443), Want: "out", Else: "remote", Held: 10},
					netlab.Stream{Name: "excluded", From: w.Client, To: netip.AddrPortFrom(netlab.Host4, 8080), Want: "app", Else: "in"})
				if err != nil {
					w.Fatal(err)
				}
				for range 5 {
					before := make(map[rules.Family]rules.Set)
					for _, f := range rules.Families() {
						before[f] = w.found(f).Ours
					}
					if r := w.install(c); !r.Changed {
						w.Error("nothing changed")
					}
					for _, f := range rules.Families() { // and back, in one transaction
						w.on(string(rules.Transition(f, w.found(f).Ours, before[f])), w.program(f, "restore"), "--noflush")
					}
				}
				unharmed(w, load)
			})
		})
	}
}

// A re-install under load, with another configuration and back, lets no connection
// escape and resets none of those from before (K21). bench/upgrade does it longer, and
// shows what an uninstall and an install cost instead.
func TestReinstallUnderLoad(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		configs := []tproxy.Config{
			{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("8080")}},
			{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("8080,9000-9010")}, DNS: tproxy.DNS{CaptureAll: true}},
		}
		w.install(configs[0])
		load, err := w.Load(
			netlab.Stream{Name: "in", From: w.Client, To: netip.AddrPortFrom(netlab.Host6, 80), Want: "in", Else: "app", Held: 10},
			netlab.Stream{Name: "out", From: w.Host, UID: appUID, To: netip.AddrPortFrom(netlab.Internet4, 443), Want: "out", Else: "remote", Held: 10},
			netlab.Stream{Name: "excluded", From: w.Client, To: netip.AddrPortFrom(netlab.Host4, 8080), Want: "app", Else: "in"})
		if err != nil {
			w.Fatal(err)
		}
		for i := range 10 {
			if r := w.install(configs[(i+1)%2]); !r.Changed {
				w.Error("nothing changed")
			}
		}
		unharmed(w, load)
	})
}

// unharmed ends the load: every connection went where it should.
func unharmed(w *world, load *netlab.Load) {
	w.Helper()
	tallies, alive, held := load.Stop()
	for _, s := range tallies {
		if s.Right == 0 || s.Wrong > 0 || s.Broken > 0 {
			w.Errorf("%s: %d right, %d wrong, %d broken", s.Name, s.Right, s.Wrong, s.Broken)
		}
	}
	if alive != held {
		w.Errorf("%d of %d long-lived connections live on", alive, held)
	}
}

// found is what Find finds in the variant's own list.
func (w *world) found(f rules.Family) tproxy.Found {
	w.Helper()
	if w.backend == tproxy.NFTables {
		return tproxy.Found{Ours: w.ours(f)}
	}
	all, err := rules.ParseSave(f, []byte(w.on("", w.program(f, "save"))))
	if err != nil {
		w.Fatal(err)
	}
	return tproxy.Find(f, all)
}
