package main

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }

// The rules go into the other namespace, where connections meet them, and not
// into the one that the program runs in.
func TestInAnotherNamespace(t *testing.T) {
	netlab.Require(t, "ip", "iptables-save", "ip6tables-save")
	lab, err := netlab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lab.Close()
	proxy := netlab.Proxy{UID: 5678, In: 15006, Out: 15001}
	if err := proxy.Start(lab); err != nil {
		t.Fatal(err)
	}
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	web := netip.AddrPortFrom(netlab.Host4, 80)
	check := func(do func(context.Context) error, want string) {
		t.Helper()
		if err := inNamespace(lab.Host.Path(), func() error { return do(t.Context()) }); err != nil {
			t.Fatal(err)
		}
		seen, err := lab.Dial(lab.Client, 0, "tcp", netip.AddrPort{}, web)
		if err != nil || seen.Who != want {
			t.Errorf("connection to %s: %v, %v; want %s", web, seen, err, want)
		}
		if now, err := os.Readlink("/proc/self/ns/net"); err != nil || now != home {
			t.Errorf("the program is in %s now, %v", now, err)
		}
	}
	check(install, "in")
	rules, err := lab.Run(t.Context(), lab.Client, "", "iptables-save")
	if err != nil || strings.Contains(rules, "KUMA") {
		t.Errorf("rules in another namespace too: %v\n%s", err, rules)
	}
	check(uninstall, netlab.Refused)
}

func TestNoSuchNamespace(t *testing.T) {
	err := inNamespace("/proc/self/ns/no-such", func() error { t.Error("ran all the same"); return nil })
	if err == nil {
		t.Error("no error")
	}
}
