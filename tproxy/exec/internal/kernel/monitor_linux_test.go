package kernel

import (
	"os/exec"
	"testing"
	"time"
)

// A monitor hears of a rule of nftables, of an interface and of an address, and of
// nothing while nothing changes.
func TestMonitor(t *testing.T) {
	requireNamespace(t)
	m, err := OpenMonitor()
	if err != nil {
		t.Fatal(err)
	}
	heard := make(chan struct{}, 100)
	m.Watch(func() { heard <- struct{}{} })
	for _, c := range []string{
		"nft add table inet monitored", "nft delete table inet monitored",
		"ip link add monitored type veth peer name monitored-p", "ip address add 192.0.2.9/32 dev monitored", "ip link del monitored",
	} {
		for len(heard) > 0 {
			<-heard
		}
		if out, err := exec.Command("sh", "-c", c).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", c, err, out)
		}
		select {
		case <-heard:
		case <-time.After(10 * time.Second):
			t.Errorf("%s: nothing was heard", c)
		}
		time.Sleep(50 * time.Millisecond) // what of it comes later
	}
	m.Close()
	for len(heard) > 0 {
		<-heard
	}
	if out, err := exec.Command("ip", "link", "add", "monitored", "type", "veth", "peer", "name", "monitored-p").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	time.Sleep(50 * time.Millisecond)
	if len(heard) > 0 {
		t.Error("heard after it was closed")
	}
	if out, err := exec.Command("ip", "link", "del", "monitored").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
