package exec_test

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/bootlab"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
)

// bookworm is the Debian of the tests of units; its firewalls are installed, and do not
// start at boot.
var bookworm = bootlab.Image{
	Suite:    "bookworm",
	Packages: []string{"systemd", "systemd-sysv", "systemd-resolved", "libnss-resolve", "dbus", "iptables", "iproute2", "nftables", "procps"},
	Later:    []string{"firewalld"},
}

// unitHost is a booted Debian with a network of its own, which has lo alone.
type unitHost struct {
	*testing.T
	*bootlab.Machine
}

func bootUnit(t *testing.T) *unitHost {
	t.Helper()
	systemdSuite(t)
	root := filepath.Join(t.TempDir(), "root")
	remove, err := bookworm.Copy(t.Context(), root, netlab.Outside())
	if err != nil {
		cannotRun(t, "systemd", "no Debian to be had: %v", err)
	}
	t.Cleanup(remove)
	m, err := bootlab.Boot(t.Context(), root, "kuma-tproxy-unit", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return &unitHost{t, m}
}

// sh runs a script in the machine, which must succeed.
func (h *unitHost) sh(script string) string {
	h.Helper()
	out, err := h.Machine.Run(h.Context(), "sh", "-c", script)
	if err != nil {
		h.Fatalf("%v\n%s\n%s", err, out, h.Console())
	}
	return out
}

func (h *unitHost) put(name, text string) {
	h.Helper()
	if err := h.Put(h.Context(), name, "644", []byte(text)); err != nil {
		h.Fatal(err)
	}
}

const labRules = `*nat
:KUMA_LAB - [0:0]
-I OUTPUT 1 -p tcp -m comment --comment lab -j KUMA_LAB
-A KUMA_LAB -p tcp -m tcp --dport 8888 -j REDIRECT --to-ports 15001
COMMIT
`

// labCommands brings rules of both variants and families, and ::6, as a restore of saved
// scripts does, and looks at what an install looks at.
var labCommands = [][]string{
	{"/bin/sh", "/var/lib/kuma-lab/up"},
}

const labUp = `set -ex
for v in nft legacy; do for f in iptables ip6tables; do
	$f-$v -w 5 -t nat -D OUTPUT -p tcp -m comment --comment lab -j KUMA_LAB 2>/dev/null || true
	$f-$v-restore --noflush --wait=5 </var/lib/kuma-lab/rules
done; done
ip -6 address replace ::6/128 dev lo
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("\0kuma-lab")'
mkdir -p /run/kuma-tproxy
date +%s.%N >/run/kuma-tproxy/up
cat /proc/1/status >/dev/null
`

// enable puts the unit and the drop-ins in place.
func (h *unitHost) enable(s persist.Service) {
	h.Helper()
	unit, err := persist.Unit(nil, s)
	if err != nil {
		h.Fatal(err)
	}
	h.put("/etc/systemd/system/"+persist.UnitName, string(unit))
	drop, err := persist.DropIn(nil)
	if err != nil {
		h.Fatal(err)
	}
	for _, l := range persist.Loaders() {
		h.put("/etc/systemd/system/"+l+".d/"+persist.DropInName, string(drop))
	}
	h.sh("systemctl daemon-reload; systemctl enable -q " + persist.UnitName)
}

// lacks is what of the rules of the lab is not there.
func (h *unitHost) lacks() string {
	return h.sh(`for v in nft legacy; do for f in iptables ip6tables; do
	[ "$($f-$v-save -t nat 2>/dev/null | grep -c KUMA_LAB)" = 3 ] || echo "$f-$v: $($f-$v-save -t nat 2>/dev/null | grep KUMA_LAB)"
done; done
ip address show dev lo | grep -q 'inet6 ::6/128' || echo ::6`)
}

// comesBack waits for the rules.
func (h *unitHost) comesBack(when string, atMost time.Duration) {
	h.Helper()
	start := time.Now()
	lacks := h.lacks()
	for ; lacks != "" && time.Since(start) < atMost; lacks = h.lacks() {
		time.Sleep(20 * time.Millisecond)
	}
	if lacks != "" {
		h.Errorf("%s: after %s there is no\n%s%s", when, atMost, lacks, h.sh("systemctl status --no-pager "+persist.UnitName+"; journalctl --no-pager -n 60 || true"))
		return
	}
	time.Sleep(time.Second) // nobody flushes afterwards
	if lacks := h.lacks(); lacks != "" {
		h.Errorf("%s: they came, and went: %s", when, lacks)
	}
	h.Logf("%s: there within %s", when, time.Since(start)-time.Second)
}

func labService() persist.Service {
	return persist.Service{Description: "lab", Commands: labCommands, Files: []string{"/var/lib/kuma-lab/up"}, Modules: []string{"ip_tables", "ip6_tables"}, Writable: []string{"/run"}}
}

func TestSystemdUnit(t *testing.T) {
	h := bootUnit(t)
	h.put("/var/lib/kuma-lab/up", labUp)
	h.put("/var/lib/kuma-lab/rules", labRules)
	h.enable(labService())
	if out := h.sh("systemd-analyze verify " + persist.UnitName + " 2>&1"); out != "" {
		t.Errorf("systemd-analyze verify says\n%s", out)
	}
	t.Log(h.sh("systemd-analyze security --no-pager " + persist.UnitName))
	for range 2 {
		if err := h.Reboot(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
		t.Log(h.sh("systemctl status --no-pager " + persist.UnitName + " || true"))
		h.comesBack("reboot", 0)
	}
	t.Log(strings.TrimSpace(h.sh("systemctl show -p ActiveEnterTimestampMonotonic,InactiveExitTimestampMonotonic kuma-transparent-proxy network-pre.target; systemctl is-system-running || true")))
}

func TestSystemdUnitFirewalld(t *testing.T) {
	h := bootUnit(t)
	h.put("/var/lib/kuma-lab/up", labUp)
	h.put("/var/lib/kuma-lab/rules", labRules)
	h.enable(labService())
	h.sh("systemctl start " + persist.UnitName)
	h.comesBack("started", 0)
	for _, verb := range []string{"start", "restart", "stop", "start", "reload", "stop"} {
		h.sh("systemctl " + verb + " firewalld")
		h.comesBack("systemctl "+verb+" firewalld", 10*time.Second)
	}
	for _, verb := range []string{"start", "restart", "reload", "stop"} {
		h.sh("systemctl " + verb + " nftables")
		h.comesBack("systemctl "+verb+" nftables", 10*time.Second)
	}
}
