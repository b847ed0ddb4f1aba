package exec_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// runtimeSuite skips a test with a real daemon unless TPROXY_SUITE names runtime.
func runtimeSuite(t *testing.T, programs ...string) {
	t.Helper()
	if !strings.Contains(os.Getenv("TPROXY_SUITE"), "runtime") {
		t.Skip("TPROXY_SUITE does not name runtime")
	}
	netlab.Require(t, programs...)
}

// start starts a daemon on the lab's host, which ends with the lab.
func (w *world) start(name string, args ...string) {
	w.Helper()
	var said bytes.Buffer
	cmd := osexec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := w.In(w.Host, cmd.Start); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if w.Failed() {
			w.Logf("%s said: %s", name, &said)
		}
	})
}

// Contract 4.9: firewalld accepts whatever was translated. A port that its zone
// closes reaches the proxy, which the notes say; an excluded one stays closed.
func TestFirewalldAcceptsWhatWasTranslated(t *testing.T) {
	runtimeSuite(t, "firewalld", "firewall-cmd", "dbus-daemon", "ip")
	w := newWorld(t, tproxy.IPTablesNFT)
	// A copy of its configuration, in the lab's own mount namespace.
	etc := filepath.Join(w.TempDir(), "firewalld")
	if out, err := osexec.Command("cp", "-a", "/etc/firewalld", etc).CombinedOutput(); err != nil {
		w.Fatalf("cp: %v: %s", err, out)
	}
	if err := syscall.Mount(etc, "/etc/firewalld", "", syscall.MS_BIND, ""); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = syscall.Unmount("/etc/firewalld", syscall.MNT_DETACH) })
	if err := os.MkdirAll("/run/dbus", 0o755); err != nil {
		w.Fatal(err)
	}
	w.start("dbus-daemon", "--system", "--nofork", "--nopidfile", "--nosyslog")
	w.until(func() bool { _, err := os.Stat("/run/dbus/system_bus_socket"); return err == nil })
	w.Cleanup(func() { _ = os.RemoveAll("/run/dbus") })
	w.start("firewalld", "--nofork", "--nopid", "--log-target=console")
	w.until(func() bool {
		out, _ := w.Lab.Run(w.Context(), w.Host, "", "firewall-cmd", "--state")
		return strings.Contains(out, "running")
	})
	w.serve()
	w.proxy(netlab.Answer)
	closed := func(row string, port uint16) {
		w.Helper()
		w.checkFamilies([]int{0}, flow{row, fmt.Sprintf("outside host:%d => rejected", port)})
		// TCP over IPv6 takes "prohibited" for something that may pass, and the
		// kernel sends only so many of them.
		seen, err := w.Dial(w.Client, 0, "tcp", netip.AddrPort{}, netip.AddrPortFrom(places["host"][1], port))
		if err != nil || seen.Who != netlab.Timeout && seen.Who != netlab.Rejected {
			w.Errorf("%s IPv6, port %d: answered by %s, %v", row, port, seen, err)
		}
	}
	closed("closed by its zone", 8080)
	w.check(flow{"open", "outside host:22 => app"})
	r := w.install(tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("9005")}})
	w.check(flow{"A5", "outside host:8080 => in"}, flow{"A3", "outside host:22 => app"})
	closed("A3, closed", 9005)
	if !slices.ContainsFunc(r.Notes, func(n string) bool { return strings.Contains(n, "firewalld") && strings.Contains(n, "reach the proxy") }) {
		w.Errorf("notes %q", r.Notes)
	}
	// A table of firewalld's own is untouched by what we do.
	w.uninstall()
	closed("closed by its zone", 8080)
}
