package exec_test

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/bootlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
)

var unitOfTrial = regexp.MustCompile(`kuma-tproxy-trial-[0-9a-f]{8}`)

// inLogin runs an install in a scope that stands for a login session, whose shell goes
// on, and returns when the install has said its last line, with all lines.
func (d *debian) inLogin(name, args string) string {
	d.Helper()
	d.do("rm", "-f", "/tmp/login.log")
	// A scope takes over who asks for it, and systemd can move only whom it has.
	d.do("systemd-run", "--quiet", "--collect", "--unit=terminal-"+name, "sh", "-c",
		"exec systemd-run --quiet --scope --collect --unit="+name+" sh -c 'kumactl install transparent-proxy "+args+" >/tmp/login.log 2>&1; echo ended $? >>/tmp/login.log; sleep 1000'")
	var out string
	d.until(func() bool {
		out, _ = d.Machine.Run(d.Context(), "cat", "/tmp/login.log")
		return strings.Contains(out, "ended ")
	})
	if !strings.Contains(out, "ended 0") {
		d.Fatalf("%s", out)
	}
	return out
}

// waits reports whether an install waits for its confirmation.
func (d *debian) waits() bool {
	_, err := d.kumactl("install", "confirm", "--status")
	return err == nil
}

// putBack waits until nothing waits any more.
func (d *debian) putBack(atMost time.Duration) {
	d.Helper()
	for deadline := time.Now().Add(atMost); d.waits(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			out, err := d.kumactl("install", "confirm", "--status")
			d.Fatalf("nothing is put back: %v\n%s", err, out)
		}
	}
}

// TestSystemdTrial: where systemd runs, a trial outlives the login session from which it
// was installed, with everything in it, and the killing of its watch; what becomes of it
// stands in the journal; and a machine that goes down in its window, in order or not,
// comes up without it.
func TestSystemdTrial(t *testing.T) {
	systemdSuite(t)
	path, err := tool()
	if err != nil {
		t.Fatal(err)
	}
	d := bootDebian(t, "bookworm", path)
	d.must("install", "--exclude-inbound-ports", "9100")
	before := d.state()
	trial := "--confirm-within " + within.String() + " --exclude-outbound-ports 8443 --kuma-cp-ip " + plane4.String()

	out := d.inLogin("killed", trial)
	unit := unitOfTrial.FindString(out)
	if unit == "" || !strings.Contains(out, "the transient unit "+unit+" of systemd (journalctl -u "+unit+")") || !d.waits() {
		t.Fatalf("%s", out)
	}
	if d.state() == before {
		t.Error("nothing was changed")
	}
	if group := d.do("systemctl", "show", "--property=ControlGroup", "--value", unit); !strings.Contains(group, unit) {
		t.Errorf("the watch is in %s", group)
	}
	d.do("systemctl", "kill", "--signal=KILL", "killed.scope")
	d.until(func() bool {
		out, _ := d.Machine.Run(d.Context(), "systemctl", "is-active", "killed.scope")
		return !strings.HasPrefix(out, "active")
	})
	if !d.waits() {
		t.Error("the trial went with the session")
	}
	d.putBack(within + 20*time.Second)
	d.same("after the session was killed", before, d.state())
	if log := d.do("journalctl", "--no-pager", "--unit="+unit); !strings.Contains(log, "was not confirmed in time: the former state was put back at") || !strings.Contains(log, "the former rules of IPv4 and IPv6 in table inet kuma-tproxy") {
		t.Errorf("the journal says\n%s", log)
	}

	// Its watch is killed: there is another one, with the same deadline.
	unit = unitOfTrial.FindString(d.inLogin("unwatched", trial))
	d.do("systemctl", "kill", "--signal=KILL", unit)
	d.putBack(within + 20*time.Second)
	d.same("after the watch was killed", before, d.state())

	// Told to stop, it puts back at once.
	unit = unitOfTrial.FindString(d.inLogin("stopped", strings.Replace(trial, within.String(), "1h", 1)))
	d.do("systemctl", "stop", unit)
	d.putBack(5 * time.Second)
	d.same("after the watch was stopped", before, d.state())

	// Confirmed, it goes, and has not failed.
	unit = unitOfTrial.FindString(d.inLogin("confirmed", trial))
	d.must("install", "confirm")
	d.until(func() bool {
		out, _ := d.Machine.Run(d.Context(), "systemctl", "show", "--property=LoadState", "--value", unit)
		return strings.TrimSpace(out) == "not-found"
	})
	if failed := d.do("systemctl", "list-units", "--all", "--plain", "--no-legend", "kuma-tproxy-trial-*"); failed != "" {
		t.Errorf("units are left: %s", failed)
	}
	time.Sleep(within)
	if d.state() == before || d.waits() {
		t.Error("a trial that was confirmed is not final")
	}

	// The machine goes down in the window.
	d.must("uninstall")
	empty := d.state()
	for _, hard := range []bool{false, true} {
		d.inLogin("down", "--confirm-within 1h --exclude-outbound-ports 8443")
		if d.state() == empty {
			t.Error("nothing was changed")
		}
		if hard {
			d.Machine.Kill()
		} else {
			d.Machine.Close()
			// Its network namespace is the lab's and still there.
			if left := d.on("", "sh", "-c", "iptables-save; ip6tables-save; nft list ruleset"); strings.Contains(left, "KUMA") {
				t.Errorf("shut down in order, it left\n%s", left)
			}
		}
		// It comes up with other tables, as after a boot.
		next := &debian{world: newWorld(t, tproxy.IPTablesNFT), root: d.root}
		if next.Machine, err = bootlab.Boot(t.Context(), d.root, "kuma-tproxy-again", next.Host.Path()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(next.Machine.Close)
		if left := next.do("sh", "-c", "iptables-save; ip6tables-save; nft list ruleset"); strings.Contains(left, "KUMA") {
			t.Errorf("hard %v: it comes up with\n%s", hard, left)
		}
		if out, err := next.kumactl("install", "confirm"); err == nil || !strings.Contains(err.Error(), "nothing to confirm: no install waits") {
			t.Errorf("hard %v: %v\n%s", hard, err, out)
		}
		d = next
	}
	d.must("install")
	d.Machine.Close()
}
