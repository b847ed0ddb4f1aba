package kernel

import (
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
)

// An interface of ours comes whole, is known by its group, and goes with its peer.
func TestLink(t *testing.T) {
	requireNamespace(t)
	const name = "kuma-test"
	address := netip.MustParsePrefix("192.0.2.7/32")
	if _, there, err := FindLink(name); there || err != nil {
		t.Fatalf("before: %v, %v", there, err)
	}
	before, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	made, err := AddLink(name, "for a test", address)
	if err != nil {
		t.Fatal(err)
	}
	l, there, err := FindLink(name)
	if err != nil || !there || l.Index != made.Index || !l.Ours || !l.Up || len(l.Addresses) != 1 || l.Addresses[0] != address {
		t.Errorf("%+v, %v, %v", l, there, err)
	}
	out, err := exec.Command("ip", "-d", "address", "show", "dev", name).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "alias for a test") || !strings.Contains(string(out), "LOWER_UP") || strings.Contains(string(out), "fe80") {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err := AddLink(name, "", address); !errors.Is(err, fs.ErrExist) {
		t.Errorf("again: %v", err)
	}
	if removed, err := DelLink(l); !removed || err != nil {
		t.Errorf("removed %v, %v", removed, err)
	}
	if removed, err := DelLink(l); removed || err != nil {
		t.Errorf("again: removed %v, %v", removed, err)
	}
	if after, err := net.Interfaces(); err != nil || len(after) != len(before) {
		t.Errorf("interfaces before %v, after %v, %v", before, after, err)
	}
}

// One of somebody else is not ours, and one that fails half-way is taken back.
func TestLinkOfOthers(t *testing.T) {
	requireNamespace(t)
	const name = "kuma-test"
	if out, err := exec.Command("ip", "link", "add", name, "type", "veth", "peer", "name", "other").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l, there, err := FindLink(name)
	if err != nil || !there || l.Ours || l.Up {
		t.Errorf("%+v, %v, %v", l, there, err)
	}
	if _, err := DelLink(l); err != nil {
		t.Error(err)
	}
	if _, err := AddLink(name, "", netip.Prefix{}); err == nil {
		t.Error("an interface without an address")
	}
	if _, there, err := FindLink(name); there || err != nil {
		t.Errorf("left: %v, %v", there, err)
	}
	if _, err := AddLink("a-name-too-long", "", netip.MustParsePrefix("192.0.2.7/32")); err == nil {
		t.Error("a name that is too long")
	}
}

// What is in the way of a peer is named, where the interface takes one.
func TestLinkWithoutAPeer(t *testing.T) {
	requireNamespace(t)
	if out, err := exec.Command("ip", "link", "add", "kuma-test-p", "type", "veth", "peer", "name", "other").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { _ = delLink("other") })
	l, err := AddLink("kuma-test", "", netip.MustParsePrefix("192.0.2.7/32"))
	if err == nil {
		_, _ = DelLink(l)
		t.Skip("it is a dummy here, which has no peer")
	}
	if !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "kuma-test-p") {
		t.Error(err)
	}
}
