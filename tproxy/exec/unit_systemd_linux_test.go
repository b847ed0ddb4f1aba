package exec_test

import (
	"context"
	"path/filepath"
	"regexp"
	"strconv"
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

// labUp brings rules of both variants and families, ::6 and an interface, as root in
// the sandbox of a unit; looks at what an install looks at; and fails where it can do
// more.
const labUp = `set -e
for v in nft legacy; do for f in iptables ip6tables; do
	$f-$v -w 5 -t nat -D OUTPUT -p tcp -m comment --comment lab -j KUMA_LAB 2>/dev/null || true
	$f-$v-restore --noflush --wait=5 </var/lib/kuma-lab/rules
done; done
ip -6 address replace ::6/128 dev lo
ip link add lab0 type veth peer name lab1 2>/dev/null || ip link show lab0 >/dev/null
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("\0kuma-lab")'
mkdir -p /run/kuma-tproxy
cat /proc/1/status /proc/1/cgroup /proc/1/mountinfo /proc/self/net/unix /proc/self/net/ip_tables_names /proc/sys/net/ipv6/conf/lo/disable_ipv6 >/dev/null
for more in 'touch /etc/lab' 'touch /usr/bin/lab' 'touch /var/lib/lab' 'touch /tmp/lab' 'ls /home/lab' 'ls /root/lab' 'unshare --uts true' \
	'sh -c "echo 1 >/proc/sys/net/ipv4/ip_forward"' 'chown 1 /run/kuma-tproxy' 'mknod /run/lab c 1 3' 'ls /lib/modules/.' 'dmesg'; do
	if eval "$more" 2>/dev/null; then echo "the sandbox lets: $more" >&2; exit 1; fi
done
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

// settled is a script that ends when no job waits, and firewalld, where it runs, has done
// what it was told to.
const settled = `while [ -n "$(systemctl list-jobs --no-legend)" ]; do sleep .05; done
busctl --auto-start=no get-property org.fedoraproject.FirewallD1 /org/fedoraproject/FirewallD1 org.fedoraproject.FirewallD1 state >/dev/null 2>&1 || true
while [ -n "$(systemctl list-jobs --no-legend)" ]; do sleep .05; done`

// backWithin is how long it may take until all rules are there again. On two cores with
// eighteen that want to run, 7.8 s was the longest.
const backWithin = 30 * time.Second

// comesBack runs a script, and says when rules are there again.
func (h *unitHost) comesBack(script string) {
	h.Helper()
	start := time.Now()
	h.sh(script)
	returned := time.Since(start)
	ctx, cancel := context.WithTimeout(h.Context(), backWithin)
	defer cancel()
	if _, err := h.Machine.Run(ctx, "sh", "-c", settled); err != nil {
		h.Fatalf("%s: it is not over after %s: %v\n%s", script, backWithin, err, h.sh("systemctl list-jobs --no-pager"))
	}
	quiet := time.Since(start)
	lacks := h.lacks()
	there := time.Since(start)
	if lacks == "" {
		time.Sleep(500 * time.Millisecond) // nobody flushes later
		lacks = h.lacks()
	}
	if lacks != "" {
		h.Errorf("%s: there is no\n%s%s", script, lacks, h.sh("systemctl status --no-pager "+persist.UnitName+"; journalctl --no-pager -n 60 || true"))
		return
	}
	h.Logf("%s: returned after %s, quiet after %s, rules seen after %s", script, returned.Round(time.Millisecond), quiet.Round(time.Millisecond), there.Round(time.Millisecond))
}

func labService() persist.Service {
	return persist.Service{Description: "the lab's 100%", Commands: [][]string{{"/bin/sh", "/var/lib/kuma-lab/up"}}, Files: []string{"/var/lib/kuma-lab/up"}, Modules: []string{"ip_tables", "ip6_tables"}, Writable: []string{"/run", "/not/there"}}
}

// lab puts the unit and what it runs in place.
func (h *unitHost) lab() {
	h.Helper()
	h.put("/var/lib/kuma-lab/up", labUp)
	h.put("/var/lib/kuma-lab/rules", labRules)
	h.sh("mkdir -p /home/lab /root/lab /lib/modules")
	h.enable(labService())
}

// TestSystemdUnit: rules are there before the network after every boot, also after a
// power cut; both variants of iptables work in the sandbox; and a unit that fails says so.
func TestSystemdUnit(t *testing.T) {
	h := bootUnit(t)
	h.lab()
	h.verifies()
	h.arguments()
	h.names()
	h.split()
	for _, boot := range []func() error{
		func() error { return h.Reboot(t.Context(), "") },
		func() error { return h.PowerCut(t.Context(), "") },
		func() error { return h.Reboot(t.Context(), "") },
	} {
		if err := boot(); err != nil {
			t.Fatal(err)
		}
		h.comesBack("true")
		h.split()
		const monotonic = "systemctl show --value -p ActiveEnterTimestampMonotonic "
		ours, pre := h.number(monotonic+persist.UnitName), h.number(monotonic+"network-pre.target")
		if ours == 0 || pre < ours {
			t.Errorf("ours was there at %d, network-pre.target at %d", ours, pre)
		}
	}

	h.put("/var/lib/kuma-lab/up", "echo the lab is out of order >&2; exit 3")
	if err := h.Reboot(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	if state := h.sh("systemctl is-failed " + persist.UnitName + "; systemctl is-system-running || true"); state != "failed\ndegraded\n" {
		t.Errorf("a command failed, and the states are %q", state)
	}
	for _, said := range []string{"the lab is out of order", "Failed to start"} {
		if !strings.Contains(h.Console(), said) {
			t.Errorf("the console does not say %q:\n%s", said, h.Console())
		}
	}
}

// number is what a script prints.
func (h *unitHost) number(script string) (n int) {
	h.Helper()
	out := strings.TrimSpace(h.sh(script))
	n, err := strconv.Atoi(out)
	if err != nil {
		h.Fatal(err)
	}
	return n
}

var exposure = regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`)

// verifies: systemd says nothing about the units, and states how exposed they are.
func (h *unitHost) verifies() {
	h.Helper()
	names, err := persist.NamesUnit(nil, labService())
	if err != nil {
		h.Fatal(err)
	}
	h.put("/etc/systemd/system/"+persist.NamesUnitName, string(names))
	h.sh("systemctl daemon-reload")
	for _, unit := range []string{persist.UnitName, persist.NamesUnitName, "firewalld.service", "nftables.service"} {
		if out := h.sh("systemd-analyze verify --man=no " + unit + " 2>&1"); out != "" {
			h.Errorf("systemd-analyze verify %s says\n%s", unit, out)
		}
	}
	if out := h.sh("systemctl start " + persist.UnitName + "; journalctl --no-pager -q -o cat _SYSTEMD_UNIT=" + persist.UnitName); out != "" {
		h.Errorf("where all is well, and firewalld is not there, the unit says\n%s", out)
	}
	for _, unit := range []string{persist.UnitName, persist.NamesUnitName} {
		m := exposure.FindStringSubmatch(h.sh("systemd-analyze security --no-pager " + unit))
		if m == nil {
			h.Fatal("systemd-analyze security says nothing")
		}
		h.Logf("exposure of %s: %s", unit, m[1])
		if e, _ := strconv.ParseFloat(m[1], 64); e > 2.5 {
			h.Errorf("exposure of %s: %s", unit, m[1])
		}
	}
}

// names has systemd-resolved told over D-Bus, from the sandbox of the unit for names, at
// every boot.
func (h *unitHost) names() {
	h.Helper()
	h.put("/var/lib/kuma-lab/names", `set -e
ip link add lab2 type veth peer name lab3 2>/dev/null || ip link show lab2 >/dev/null
i=$(cat /sys/class/net/lab2/ifindex)
for try in 1 2 3 4 5 6 7 8 9; do busctl call org.freedesktop.resolve1 /org/freedesktop/resolve1 org.freedesktop.resolve1.Manager SetLinkDefaultRoute ib $i false && break; sleep .2; done
busctl call org.freedesktop.resolve1 /org/freedesktop/resolve1 org.freedesktop.resolve1.Manager SetLinkDomains 'ia(sb)' $i 1 mesh true
`)
	s := labService()
	s.Commands = [][]string{{"/bin/sh", "/var/lib/kuma-lab/names"}}
	unit, err := persist.NamesUnit(nil, s)
	if err != nil {
		h.Fatal(err)
	}
	h.put("/etc/systemd/system/"+persist.NamesUnitName, string(unit))
	h.sh("systemctl daemon-reload; systemctl enable -q " + persist.NamesUnitName + "; systemctl restart " + persist.NamesUnitName)
}

// split reports an error where systemd-resolved does not know of the mesh.
func (h *unitHost) split() {
	h.Helper()
	if out := h.sh("resolvectl domain lab2"); !strings.Contains(out, "~mesh") {
		h.Errorf("systemd-resolved knows %s%s", out, h.sh("systemctl status --no-pager "+persist.NamesUnitName+" || true"))
	}
}

// arguments: what a unit runs is what was meant, by systemd's own reading.
func (h *unitHost) arguments() {
	h.Helper()
	const program, file = "/opt/a b%n;#é/show", "/opt/a b%n'\"\\;#$$/file"
	args := []string{"", ";", `\`, "%n", "$HOME", "${HOME}", "$$", "%%", `\x41\n`, "\u2028\u00a0", " ", "#", "a=b", `"'`, "- @+!:|", "~x", "{}[]*?", "é"}
	if err := h.Put(h.Context(), program, "755", []byte("#!/bin/sh\nfor a in \"$0\" \"$@\"; do printf '%s\\0' \"$a\"; done >/run/lab-shown\n")); err != nil {
		h.Fatal(err)
	}
	unit, err := persist.Unit(nil, persist.Service{Description: `100% \x41 "`, Commands: [][]string{append([]string{program}, args...)}, Files: []string{file}, Writable: []string{"/run"}})
	if err != nil {
		h.Fatal(err)
	}
	h.put("/etc/systemd/system/lab-arguments.service", string(unit))
	if out := h.sh("systemctl daemon-reload; systemd-analyze verify lab-arguments.service 2>&1"); out != "" {
		h.Errorf("systemd-analyze verify says %s", out)
	}
	h.sh("systemctl start lab-arguments")
	shown := `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`).Replace(file) + `"`
	if got := h.sh("systemctl show --value -p RequiresMountsFor lab-arguments"); !strings.Contains(got, shown) {
		h.Errorf("the file %s arrived in %s", file, got)
	}
	want := strings.Join(append([]string{program}, args...), "\x00") + "\x00"
	if got := h.sh("cat /run/lab-shown"); got != want {
		h.Errorf("the arguments %q\narrived as %q", want, got)
	}
	if got := h.sh("systemctl show --value -p Description lab-arguments"); got != "100% \\x41 \"\n" {
		h.Errorf("the description arrived as %q", got)
	}
	h.sh("rm /etc/systemd/system/lab-arguments.service; systemctl daemon-reload")
}

// TestSystemdUnitFirewalld: whatever is done with a firewall that flushes rules, they are
// there afterwards, in an order that systemd sees to.
func TestSystemdUnitFirewalld(t *testing.T) {
	h := bootUnit(t)
	h.lab()
	h.comesBack("systemctl start " + persist.UnitName)
	for _, verb := range []string{"start", "restart", "stop", "start", "reload", "kill --signal=KILL", "reset-failed", "start"} {
		h.comesBack("systemctl " + verb + " firewalld")
	}
	h.comesBack("systemctl start nftables") // which stops firewalld
	for _, verb := range []string{"restart", "reload", "stop"} {
		h.comesBack("systemctl " + verb + " nftables")
	}
	h.sh("sed -i s/^FirewallBackend=.*/FirewallBackend=iptables/ /etc/firewalld/firewalld.conf; grep -q ^FirewallBackend=iptables /etc/firewalld/firewalld.conf")
	for _, verb := range []string{"start", "restart", "stop"} {
		h.comesBack("systemctl " + verb + " firewalld")
	}
	h.sh("systemctl enable firewalld")
	if err := h.Reboot(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	h.comesBack("true")
}
