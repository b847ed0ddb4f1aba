package exec

import (
	"context"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func (m *fakeMachine) preflight(t *testing.T, c tproxy.Config) *Preflight {
	t.Helper()
	p, writes := m.plan(t, c), m.writes
	found, err := (&Runner{machine: m}).Preflight(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	if m.writes != writes {
		t.Error("looking wrote something")
	}
	return found
}

// What is installed and drifted is said, and so is what would be in the way of the
// plan, which need not be what is in the way now.
func TestPreflightOverAnInstall(t *testing.T) {
	m := newFakeMachine(t)
	if found := m.preflight(t, tproxy.Config{}); found.Status.State != StateAbsent || len(found.Hindered) > 0 || len(found.Silent) != 2 {
		t.Errorf("nothing there: %+v, %+v", found, found.Status)
	}
	m.install(t, tproxy.Config{})
	nft := m.netfilter["iptables-nft"]
	if err := nft.Restore([]byte("*nat\n-D KUMA_MESH_INBOUND -p tcp -m tcp --dport 22 -m comment --comment \"SSH is protected unless --capture-ssh is given\" -j RETURN\n-I PREROUTING 1 -p tcp -m tcp --dport 80 -j ACCEPT\nCOMMIT\n"), nil); err != nil {
		t.Fatal(err)
	}
	found := m.preflight(t, tproxy.Config{})
	if found.Status.State != StateDrifted || len(found.Status.Drift) != 2 {
		t.Errorf("drift of what is installed: %v", found.Status.Drift)
	}
	if len(found.Hindered) != 1 || !strings.Contains(found.Hindered[0].String(), "nat PREROUTING #1") {
		t.Errorf("hindered: %v", found.Hindered)
	}
	// With inbound off nothing is in the way of the plan.
	if found := m.preflight(t, tproxy.Config{Inbound: tproxy.Inbound{Off: true}}); len(found.Hindered) > 0 || len(found.Silent) != 1 {
		t.Errorf("inbound off: %v, %q", found.Hindered, found.Silent)
	}
}

// Without root it says so, and what it can.
func TestPreflightWithoutRoot(t *testing.T) {
	m := newFakeMachine(t)
	m.notRoot = true
	found := m.preflight(t, tproxy.Config{})
	if found.Status.State != StateUnknown || len(found.Reasons) != 1 || !strings.Contains(found.Reasons[0], "root") || len(found.Silent) != 2 {
		t.Errorf("%+v, %+v", found, found.Status)
	}
}

// Connections of root's that the plan would redirect, but for those that it leaves
// alone, to this host itself, to its own listeners, or of nobody any more.
func TestCapturedConnections(t *testing.T) {
	m := newFakeMachine(t)
	// From 10.0.0.2 to 10.0.0.9, little endian: sl local remote st queues timer retr uid timeout inode.
	line := func(local, remote, state, uid, inode string) string {
		return " 0: " + local + " " + remote + " " + state + " 00000000:00000000 00:00000000 00000000 " + uid + " 0 " + inode + " 1 0000000000000000 100 0 0 10 0\n"
	}
	writeProc(t, m.proc, "thread-self/net/tcp", "header\n"+
		line("0200000A:9C40", "0900000A:1972", "01", "0", "100")+ // captured
		line("0200000A:9C41", "0900000A:1972", "01", "1000", "101")+ // an application's is meant to be
		line("0200000A:9C42", "0900000A:23C4", "01", "0", "102")+ // 9156: excluded
		line("0100007F:9C43", "0100007F:1972", "01", "0", "103")+ // loopback
		line("00000000:0016", "00000000:0000", "0A", "0", "104")+ // listens
		line("0200000A:0016", "0900000A:9C44", "01", "0", "105")+ // and was connected to
		line("0200000A:9C45", "0900000A:1972", "06", "0", "0")) // TIME_WAIT
	found := m.preflight(t, tproxy.Config{Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("9156")}})
	if len(found.Captured) != 1 || found.Captured[0].Remote.String() != "10.0.0.9:6514" || !strings.Contains(found.Captured[0].String(), "cannot be seen") {
		t.Errorf("%v", found.Captured)
	}
}
