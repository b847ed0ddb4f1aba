package exec_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
	root := filepath.Join(t.TempDir(), "root")
	remove, err := bookworm.Copy(t.Context(), root, netlab.Outside())
	if err != nil {
		cannotRun(t, "systemd", "no Debian to be had: %v", err)
	}
	t.Cleanup(remove)
	text, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(filepath.Join(root, "usr/local/bin/kumactl"), text, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	h := &rebooting{T: t, backend: b}
	h.lab()
	if h.Machine, err = bootlab.Boot(t.Context(), root, "kuma-tproxy-back", h.Host.Path()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Machine.Close)
	h.sh("useradd --uid " + fmt.Sprint(proxyUID) + " kuma-dp")
	return h
}

// lab makes a new lab, with who serves and the proxy.
func (h *rebooting) lab() {
	h.Helper()
	h.world = newWorld(h.T, h.backend)
	h.serve()
	h.proxy(netlab.Answer)
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
	want := []flow{{"A5", "outside host:8080 => in"}, {"A3", "outside host:22 => app"}, {"A3", "outside host:9005 => app"}}
	if !installed {
		want = []flow{{"A5", "outside host:8080 => app"}, {"A3", "outside host:22 => app"}}
	}
	h.check(want...)
}

// left is what of an install is on the disk and in the kernel.
func (h *rebooting) left() string {
	return h.sh(`find /etc/systemd/system /etc/kuma-tproxy /etc/firewalld 2>/dev/null | sort | grep -i kuma
for v in nft legacy; do for f in iptables ip6tables; do $f-$v-save | grep -i kuma; done; done
ip address show dev lo | grep ::6; systemctl list-units --all --plain --no-legend 'kuma*'; true`)
}

func TestSystemdComesBack(t *testing.T) {
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		t.Run(b.String(), func(t *testing.T) {
			h := bootRebooting(t, b)
			before := h.left()
			out := h.kumactl("install --exclude-inbound-ports 9005 --backend " + b.String())
			if !strings.Contains(out, "Done: the unit "+persist.UnitName) {
				t.Errorf("%s", out)
			}
			h.flows(true)
			t.Log(h.sh("systemctl status --no-pager " + persist.UnitName + "; find /etc/systemd/system /etc/kuma-tproxy | grep kuma; cat /etc/kuma-tproxy/*; cat /etc/systemd/system/kuma*"))
			if out := h.kumactl("install --exclude-inbound-ports 9005 --backend " + b.String()); strings.Contains(out, "Done:") {
				t.Errorf("the same again\n%s", out)
			}
			if out := h.kumactl("inspect"); !strings.Contains(out, "installed") {
				t.Errorf("%s", out)
			}
			for range 2 {
				h.reboot()
				h.flows(true)
				if out := h.kumactl("inspect"); !strings.Contains(out, "installed") {
					t.Errorf("%s\n%s", out, h.left())
				}
				if out := h.kumactl("install --exclude-inbound-ports 9005 --backend " + b.String()); strings.Contains(out, "Done:") {
					t.Errorf("the same again, after a reboot\n%s", out)
				}
			}
			h.kumactl("uninstall")
			h.flows(false)
			if left := h.left(); left != before {
				t.Errorf("left: %s", left)
			}
			h.reboot()
			h.flows(false)
			if left := h.left(); left != before {
				t.Errorf("after a reboot: %s", left)
			}
		})
	}
}
