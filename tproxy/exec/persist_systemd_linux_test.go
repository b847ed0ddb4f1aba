package exec_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/bootlab"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
)

// rebooting is a booted Debian whose network is the lab's host: a new lab at each boot, as
// the kernel's rules stay with a network namespace.
type rebooting struct {
	*testing.T
	*world
	*bootlab.Machine
	backend tproxy.Backend
}

func bootRebooting(t *testing.T, b tproxy.Backend) *rebooting {
	t.Helper()
	systemdSuite(t)
	path, err := tool()
	if err != nil {
		t.Fatal(err)
	}
	root := rootWith(t, bookworm, path)
	h := &rebooting{T: t, backend: b}
	h.lab()
	if h.Machine, err = bootlab.Boot(t.Context(), root, "kuma-tproxy-back", h.Host.Path()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Machine.Close)
	h.sh("useradd --uid " + fmt.Sprint(proxyUID) + " kuma-dp")
	h.sh("resolvectl dns eth0 " + netlab.Resolver4.String())
	return h
}

// d is the machine to the tests of names.
func (h *rebooting) d() *debian { return &debian{world: h.world, Machine: h.Machine} }

// lab makes a new lab, with who serves and the proxy.
func (h *rebooting) lab() {
	h.Helper()
	b := h.backend
	if b == tproxy.NFTables { // what the world does with rules of others
		b = tproxy.IPTablesNFT
	}
	h.world = newWorld(h.T, b)
	for _, l := range []struct {
		n    *netlab.Namespace
		uid  uint32
		name string
	}{{h.Host, appUID, "app"}, {h.Client, 0, "remote"}} {
		if _, err := h.ListenTCP(l.n, l.uid, l.name, everywhere(22, 8080, 9005)...); err != nil {
			h.T.Fatal(err)
		}
	}
	h.proxy(netlab.Answer)
	h.d().startControl()
}

func (h *rebooting) reboot() {
	h.Helper()
	h.lab()
	if err := h.Machine.Reboot(h.T.Context(), h.Host.Path()); err != nil {
		h.T.Fatal(err)
	}
}

func (h *rebooting) sh(script string) string {
	h.T.Helper()
	out, err := h.Machine.Run(h.T.Context(), "sh", "-c", script)
	if err != nil {
		h.T.Fatalf("%v\n%s\n%s", err, out, h.Console())
	}
	return out
}

func (h *rebooting) kumactl(args string) string {
	h.T.Helper()
	verb, rest, _ := strings.Cut(args, " ")
	return h.sh("kumactl " + verb + " transparent-proxy " + rest)
}

// flows says whether everything goes where it should.
func (h *rebooting) flows(installed bool) {
	h.T.Helper()
	want := []flow{{"A5", "outside host:8080 => in"}, {"A3", "outside host:22 => app"}, {"A3", "outside host:9005 => app"}, {"B11", "1000 internet:8080 => out"}}
	if !installed {
		want = []flow{{"A5", "outside host:8080 => app"}, {"A3", "outside host:22 => app"}, {"B11", "1000 internet:8080 => remote"}}
	}
	h.check(want...)
}

// left is what of an install is on the disk and in the kernel.
func (h *rebooting) left() string {
	return h.sh(`find /etc/systemd/system /etc/kuma-tproxy /etc/firewalld 2>/dev/null | sort | grep -i kuma
for v in nft legacy; do for f in iptables ip6tables; do $f-$v-save | grep -i kuma; done; done
nft list tables | grep kuma
ip address show dev lo | grep ::6; systemctl list-units --all --plain --no-legend 'kuma*'; true`)
}

// resolves waits until names of the mesh come from the control plane.
func (h *rebooting) resolves(when string) {
	h.T.Helper()
	for deadline := time.Now().Add(10 * time.Second); !h.d().resolves("backend.mesh"); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.T.Errorf("%s: no names\n%s", when, h.sh("ip -br address; resolvectl; systemctl status --no-pager "+persist.NamesUnitName+"; getent ahostsv4 backend.mesh; cat /etc/resolv.conf; true"))
			return
		}
	}
}

// holds checks that the install stands as it was made, and that the same again changes
// nothing.
func (h *rebooting) holds(when, install string) {
	h.T.Helper()
	h.flows(true)
	out, err := h.Machine.Run(h.T.Context(), "kumactl", "inspect", "transparent-proxy")
	if err != nil || !strings.HasPrefix(out, "State: installed") {
		h.T.Errorf("%s: inspect: %v\n%s\n%s", when, err, out, h.left())
	}
	if out := h.kumactl(install); strings.Contains(out, "Done:") {
		h.T.Errorf("%s: the same again: %s", when, out)
	}
}

// gone checks that nothing of the install is left.
func (h *rebooting) gone(when, before string) {
	h.T.Helper()
	h.flows(false)
	if left := h.left(); left != before {
		h.T.Errorf("%s: left: %s", when, left)
	}
}

// An install comes back at each boot, with the rules, ::6 and the names of the mesh, and
// does not once it is uninstalled.
func TestSystemdComesBack(t *testing.T) {
	for _, test := range []struct {
		backend tproxy.Backend
		scripts bool
	}{{tproxy.NFTables, false}, {tproxy.IPTablesNFT, false}, {tproxy.IPTablesLegacy, false}, {tproxy.NFTables, true}, {tproxy.IPTablesNFT, true}} {
		name := test.backend.String()
		if test.scripts {
			name += " by scripts"
		}
		t.Run(name, func(t *testing.T) {
			h := bootRebooting(t, test.backend)
			before := h.left()
			install := "install --exclude-inbound-ports 9005 --backend " + test.backend.String() + " --kuma-cp-ip " + plane4.String()
			by := "runs /usr/local/bin/kumactl at boot"
			if test.scripts { // root must not run what others can write
				h.sh("chmod 777 /usr/local/bin")
				if by = "runs iptables-restore with saved scripts at boot"; test.backend == tproxy.NFTables {
					by = "runs nft with a saved script at boot"
				}
			}
			if out := h.kumactl(install); !strings.Contains(out, "Done: the unit "+persist.UnitName+", which "+by) {
				t.Errorf("%s", out)
			}
			if test.backend == tproxy.NFTables {
				h.flushed(install)
			}
			if out := h.sh("systemd-analyze verify " + persist.UnitName + " " + persist.NamesUnitName + " 2>&1"); out != "" {
				t.Errorf("%s", out)
			}
			h.resolves("installed")
			h.holds("installed", install)
			for i := range 2 {
				h.reboot()
				when := fmt.Sprintf("boot %d", i+1)
				h.resolves(when)
				h.holds(when, install)
				if state := h.sh("systemctl is-active " + persist.UnitName + " " + persist.NamesUnitName); state != "active\nactive\n" {
					t.Errorf("%s: %s", when, state)
				}
			}
			h.kumactl("uninstall")
			h.gone("uninstalled", before)
			h.reboot()
			h.gone("uninstalled, and booted", before)
		})
	}
}

// flushed has nftables.service take every table out, as it does when it starts, reloads and
// stops (Debian's nftables.conf begins with flush ruleset).
func (h *rebooting) flushed(install string) {
	h.T.Helper()
	h.sh("grep -q '^flush ruleset' /etc/nftables.conf")
	for _, verb := range []string{"start", "reload", "restart", "stop"} {
		h.sh("systemctl " + verb + " nftables")
		h.comesBack(verb + " of nftables")
		h.sh(settled)
		h.holds(verb+" of nftables", install)
	}
}

// Where firewalld rules the host, a table of nftables comes back by systemd, and firewalld
// leaves it alone in all that it does.
func TestSystemdTableBesideFirewalld(t *testing.T) {
	for _, backend := range []string{"nftables", "iptables"} {
		t.Run(backend, func(t *testing.T) {
			h := bootRebooting(t, tproxy.NFTables)
			h.sh("sed -i 's/^FirewallBackend=.*/FirewallBackend=" + backend + "/; s/^RFC3964_IPv4=.*/RFC3964_IPv4=no/' /etc/firewalld/firewalld.conf; firewall-offline-cmd -q --set-default-zone=trusted; systemctl enable -q --now firewalld")
			before := h.left()
			const install = "install --exclude-inbound-ports 9005"
			out := h.kumactl(install)
			for _, want := range []string{"Done: the unit " + persist.UnitName, "After a restart: comes back by systemd (systemd is process 1, and firewalld leaves a table of nftables alone"} {
				if !strings.Contains(out, want) {
					t.Errorf("%q is not in %s", want, out)
				}
			}
			h.holds("installed", install)
			handle := func() string { return h.sh("nft -a list tables inet | grep kuma") }
			table := handle()
			for _, do := range []string{"firewall-cmd -q --reload", "firewall-cmd -q --complete-reload", "systemctl restart firewalld", "systemctl stop firewalld", "systemctl start firewalld"} {
				h.sh(do + "; " + settled)
				h.holds(do, install)
			}
			if now := handle(); now != table {
				t.Errorf("firewalld's doings have made another table of it: %s, not %s", now, table)
			}
			h.sh("test ! -e /etc/firewalld/direct.xml")
			h.reboot()
			h.holds("booted", install)
			if out := h.kumactl("install --store-firewalld --exclude-inbound-ports 9005"); !strings.Contains(out, "Done: the rules in /etc/firewalld/direct.xml") || h.sh("nft list tables | grep kuma; true") != "" {
				t.Errorf("moved to firewalld: %s", out)
			}
			h.sh("firewall-cmd -q --reload")
			h.comesBack("firewalld loads them")
			h.kumactl("uninstall")
			h.gone("uninstalled", before)
		})
	}
}

// Where firewalld rules the host, an install comes back by it and by systemd: through its
// reloads, restarts, stop and start, and boots, with both of its backends, and with rules
// of others in direct.xml, which an uninstall leaves byte for byte.
func TestSystemdComesBackWithFirewalld(t *testing.T) {
	const (
		direct = "/etc/firewalld/direct.xml"
		others = "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n<direct>\n  <!-- of others -->\n  <rule ipv=\"ipv4\" table=\"nat\" chain=\"OUTPUT\" priority=\"0\">-p tcp --dport 9 -j ACCEPT</rule>\n</direct>\n"
	)
	for _, backend := range []string{"nftables", "iptables"} {
		t.Run(backend, func(t *testing.T) {
			h := bootRebooting(t, tproxy.IPTablesNFT)
			h.sh("sed -i 's/^FirewallBackend=.*/FirewallBackend=" + backend + "/; s/^RFC3964_IPv4=.*/RFC3964_IPv4=no/' /etc/firewalld/firewalld.conf; firewall-offline-cmd -q --set-default-zone=trusted")
			h.Put(t.Context(), direct, "640", []byte(others))
			h.sh("systemctl enable -q --now firewalld")
			before := h.left()
			const install = "install --exclude-inbound-ports 9005 --store-firewalld"
			out := h.kumactl(install)
			for _, want := range []string{"Done: the unit " + persist.UnitName, "Done: the rules in " + direct, "After a restart: comes back by firewalld (asked for"} {
				if !strings.Contains(out, want) {
					t.Errorf("%q is not in %s", want, out)
				}
			}
			h.holds("installed", install)
			for _, do := range []string{"firewall-cmd -q --reload", "firewall-cmd -q --complete-reload", "systemctl reload firewalld", "systemctl restart firewalld", "systemctl stop firewalld", "systemctl start firewalld"} {
				h.sh(do)
				h.comesBack(do)
				h.sh("sleep 1; systemctl is-active -q firewalld && firewall-cmd -q --state; true") // a reload by a signal has only begun
				h.comesBack(do + ", and a second later")
				if do != "systemctl stop firewalld" { // without it, another way would be chosen
					h.holds(do, install)
				}
			}
			h.reboot()
			h.comesBack("booted")
			h.holds("booted", install)
			h.kumactl("uninstall")
			h.gone("uninstalled", before)
			if now := h.sh("cat " + direct); now != others {
				t.Errorf("direct.xml is\n%s", now)
			}
			if mode := h.sh("stat -c %a " + direct); mode != "640\n" {
				t.Errorf("its mode is %s", mode)
			}
			h.sh("firewall-cmd -q --reload")
			h.gone("uninstalled, and reloaded", before)
			h.reboot()
			h.gone("uninstalled, and booted", before)
		})
	}
}

// comesBack waits for the rules: a restart of firewalld returns before they are back.
func (h *rebooting) comesBack(when string) {
	h.T.Helper()
	const atMost = 20 * time.Second
	start := time.Now()
	for time.Since(start) < atMost {
		if seen, err := h.Dial(h.Client, 0, "tcp", netip.AddrPort{}, netip.AddrPortFrom(places["host"][0], 8080)); err == nil && seen.Who == "in" {
			h.T.Logf("%s: back within %s", when, time.Since(start).Round(time.Millisecond))
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	h.T.Errorf("%s: nothing comes back within %s\n%s", when, atMost, h.sh("systemctl status --no-pager "+persist.UnitName+" firewalld; journalctl --no-pager -n 50 || true"))
}

// The power fails somewhere in an install, or in an uninstall: after the boot all of it is
// there or nothing, and the next uninstall leaves nothing.
func TestSystemdPowerCut(t *testing.T) {
	h := bootRebooting(t, tproxy.IPTablesNFT)
	before := h.left()
	const install = "install --exclude-inbound-ports 9005"
	start := time.Now()
	h.kumactl(install)
	installs := time.Since(start)
	start = time.Now()
	h.kumactl("uninstall")
	uninstalls := time.Since(start)
	const cuts = 5
	ends := map[string]int{}
	for i := range 2 * cuts {
		verb, takes := "install transparent-proxy --exclude-inbound-ports 9005", installs
		if i%2 == 1 {
			h.kumactl(install)
			verb, takes = "uninstall transparent-proxy", uninstalls
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = h.Machine.Run(t.Context(), "sh", "-c", "kumactl "+verb)
		}()
		time.Sleep(takes * time.Duration(2*(i/2)+1) / (2 * cuts))
		h.lab()
		if err := h.Machine.PowerCut(t.Context(), h.Host.Path()); err != nil {
			t.Fatal(err)
		}
		<-done
		seen, err := h.Dial(h.Client, 0, "tcp", netip.AddrPort{}, netip.AddrPortFrom(places["host"][0], 8080))
		if err != nil {
			t.Fatal(err)
		}
		ends[strings.Fields(verb)[0]+": "+seen.Who]++
		if seen.Who == "in" {
			h.holds(verb, install)
		} else {
			h.flows(false)
		}
		h.kumactl("uninstall")
		h.gone(verb, before)
	}
	t.Logf("%v", ends)
}
