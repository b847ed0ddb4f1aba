package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	osexec "os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func TestMain(m *testing.M) {
	if os.Getenv(roleEnv) != "" {
		main()
		return
	}
	netlab.Main(m)
}

func lab(t *testing.T) {
	t.Helper()
	netlab.Require(t, "ip", "nft", "iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save")
	if err := silence(); err != nil {
		t.Fatal(err)
	}
}

// Connections, in and out and of both families, go to the proxy after an install, but
// for those that are excluded, and none does after an uninstall.
func TestPeersRedirect(t *testing.T) {
	lab(t)
	for _, i := range installers() {
		t.Run(i.name, func(t *testing.T) {
			h, err := crowd.New(backendOf(i))
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			p := ports{in: rules.Port(crowd.ExcludedIn), out: rules.Port(crowd.ExcludedOut)}
			do := func(what func(context.Context, ports) (int, error)) {
				t.Helper()
				err := h.In(h.Lab.Host, func() error { _, err := what(t.Context(), p); return err })
				if err != nil {
					t.Fatal(err)
				}
			}
			want := func(in, out string) {
				t.Helper()
				for _, c := range []struct {
					from *netlab.Namespace
					uid  uint32
					to   netip.Addr
					port uint16
					who  string
				}{
					{h.Client, 0, netlab.Host4, crowd.RedirectedIn, in}, {h.Client, 0, netlab.Host6, crowd.RedirectedIn, in},
					{h.Client, 0, netlab.Host4, crowd.ExcludedIn, "app"}, {h.Client, 0, netlab.Host6, crowd.ExcludedIn, "app"},
					{h.Lab.Host, crowd.AppUID, netlab.Internet4, crowd.RedirectedOut, out}, {h.Lab.Host, crowd.AppUID, netlab.Internet6, crowd.RedirectedOut, out},
					{h.Lab.Host, crowd.AppUID, netlab.Internet4, crowd.ExcludedOut, "remote"}, {h.Lab.Host, crowd.AppUID, netlab.Internet6, crowd.ExcludedOut, "remote"},
				} {
					seen, err := h.Dial(c.from, c.uid, "tcp", netip.AddrPort{}, netip.AddrPortFrom(c.to, c.port))
					if err != nil || seen.Who != c.who {
						t.Errorf("%s to %s port %d: %s, %v; want %s", c.from, c.to, c.port, seen, err, c.who)
					}
				}
			}
			want("app", "remote")
			do(i.install)
			want("in", "out")
			do(i.uninstall)
			want("app", "remote")
		})
	}
}

// A child measures, counts what was started and sees the rules; ours starts no more
// than its report says.
func TestPeersChildMeasures(t *testing.T) {
	lab(t)
	for _, i := range installers() {
		t.Run(i.name, func(t *testing.T) {
			s, err := child(cell{Installer: i.name, N: 3})
			if err != nil {
				t.Fatal(err)
			}
			for op := range ops {
				if s.Times[op] <= 0 || s.Processes[op] < 1 {
					t.Errorf("%s: %s, %d programs", opNames[op], s.Times[op], s.Processes[op])
				}
			}
		})
	}
	if _, err := child(cell{Installer: "nobody's"}); err == nil {
		t.Error("an installer that there is not was measured")
	}
}

// What looks whether the rules are there sees that they are not, and the other way
// round, in either family alone.
func TestPeersCheck(t *testing.T) {
	lab(t)
	for _, i := range installers() {
		t.Run(i.name, func(t *testing.T) {
			err := elsewhere(func() error {
				if i.check(true) == nil {
					return fmt.Errorf("nothing was installed, and nothing is missing")
				}
				if err := i.check(false); err != nil {
					return err
				}
				if _, err := i.install(t.Context(), ports{}); err != nil {
					return err
				}
				if i.check(false) == nil {
					return fmt.Errorf("there are no rules after an install")
				}
				if err := i.check(true); err != nil || len(i.lists) == 1 {
					return err
				}
				flush := strings.TrimSuffix(i.lists[1][0], "-save")
				if out, err := osexec.Command(flush, "-t", "nat", "-F").CombinedOutput(); err != nil {
					return fmt.Errorf("%s: %w: %s", flush, err, out)
				}
				if i.check(true) == nil {
					return fmt.Errorf("IPv6 has no rules, and none is missing")
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPeersRedirectLines(t *testing.T) {
	for line, want := range map[string]bool{
		"-A X -p tcp -m comment --comment \"all else\" -j REDIRECT --to-ports 15006":     true,
		"\t\tmeta l4proto tcp counter packets 0 bytes 0 redirect to :15006 comment \"\"": true,
		"\t\tredirect to :15006":                       true,
		"-A X -j REDIRECT --to-ports 15001":            false,
		"-A X -j REDIRECT --to-ports 150061":           false,
		"\t\tredirect to :150061":                      false,
		"-A X -p tcp -m tcp --dport 15006 -j RETURN":   false,
		"-A X -j REDIRECT --to-ports 0 # not to 15006": false,
	} {
		if got := redirects("*nat\n"+line+"\nCOMMIT\n", "15006"); got != want {
			t.Errorf("%s: %t", line, got)
		}
	}
}

// The table of google/nftables is there, whole, with sets of more ports than one
// message holds.
func TestPeersNetlinkTable(t *testing.T) {
	lab(t)
	for _, c := range []struct{ ports, rules int }{{0, 11}, {1, 13}, {20, 13}, {2*message + 1, 13}} {
		err := elsewhere(func() error {
			conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(room))
			if err != nil {
				return err
			}
			defer func() { _ = conn.CloseLasting() }()
			if err := putTable(conn, c.ports); err != nil {
				return err
			}
			out, err := osexec.Command("nft", "list", "ruleset").CombinedOutput()
			if err != nil {
				return fmt.Errorf("nft: %w: %s", err, out)
			}
			list := string(out)
			for what, want := range map[string]int{
				"comment": c.rules, "chain ": 5, "type nat hook": 2, "flags interval": 2 * min(c.ports, 1),
				"redirect to :15006": 1, "redirect to :15001": 1, "fib daddr type local": 1,
			} {
				if got := strings.Count(list, what); got != want {
					t.Errorf("%d ports: %q stands there %d times, want %d:\n%.3000s", c.ports, what, got, want, list)
				}
			}
			for _, p := range []int{30000, 30001} {
				last := fmt.Sprint(p + 2*(c.ports-1))
				if is := strings.Contains(list, " "+last); c.ports > 0 && !is {
					t.Errorf("%d ports: the last one, %s, is not in a set", c.ports, last)
				}
			}
			return nil
		})
		if err != nil {
			t.Errorf("%d ports: %v", c.ports, err)
		}
	}
	took, err := googleNFTables(5, 2)
	if err != nil || took.Free <= 0 || took.Locked <= 0 || took.Ratio <= 0 {
		t.Errorf("%+v, %v", took, err)
	}
}

func TestPeersWatchCounts(t *testing.T) {
	lab(t)
	w, err := watchPrograms()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for range 3 {
		if err := osexec.Command("true").Run(); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"true", "true", "true"}
	if names, err := w.started(); err != nil || !slices.Equal(names, want) {
		t.Errorf("%q, %v; want %q", names, err, want)
	}
	if names, err := w.started(); err != nil || len(names) != 0 {
		t.Errorf("%q, %v; want nothing more", names, err)
	}
}

func TestPeersExcludedPorts(t *testing.T) {
	first, err := excluded(3, opInstall)
	if err != nil || first.in.String() != "30001,30003,30005" || first.out.String() != "30000,30002,30004" {
		t.Errorf("%s, %s, %v", first.in, first.out, err)
	}
	other, err := excluded(3, opAnother)
	if err != nil || !strings.Contains(","+other.in.String()+",", ",9100,") || other.out.String() != first.out.String() {
		t.Errorf("%s, %s, %v", other.in, other.out, err)
	}
	if last, err := excluded(maxPorts, opUninstall); err != nil || !strings.HasSuffix(last.in.String(), fmt.Sprint(30001+2*(maxPorts-1))) {
		t.Errorf("%v", err)
	}
	for _, list := range []string{"", "-1", "10001", "1,x"} {
		if sizes, err := parseSizes(list); err == nil {
			t.Errorf("%q: %v", list, sizes)
		}
	}
}
