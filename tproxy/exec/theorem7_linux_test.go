package exec_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// TestKernelListsWhatAConfigRenders is theorem 7 of docs/contract.md: what a
// random Config renders, the real iptables-restore --test and ip6tables-restore
// --test accept, and what the kernel lists then parses back to the same rules.
func TestKernelListsWhatAConfigRenders(t *testing.T) {
	n := 60
	switch {
	case testing.Short():
		n = 10
	case strings.Contains(os.Getenv("TPROXY_SUITE"), "differential"):
		n = 300
	}
	var plans []*tproxy.Plan
	for seed := 0; len(plans) < n; seed++ {
		cfg := tproxytest.Configs().Example(seed)
		p, err := tproxy.Build(cfg, tproxytest.Hosts(cfg).Example(seed))
		if errors.As(err, new(*tproxy.RefusedError)) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		plans = append(plans, p)
	}
	// No random Config has a control plane, which an install would put somewhere.
	p, err := tproxy.Build(tproxy.Config{DNS: tproxy.DNS{ControlPlane: plane4}}, tproxy.Host{Nameserver: tproxy.NameserverFile{Split: tproxy.SplitLink}})
	if err != nil {
		t.Fatal(err)
	}
	plans = append(plans, p)
	t.Run("nft", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, tproxy.IPTablesNFT)
		for i, p := range plans {
			text := p.Rules.NFTables(tproxy.NFTable)
			if _, err := w.Lab.Run(w.Context(), w.Host, string(text), "nft", "-c", "-f", "-"); err != nil {
				t.Errorf("config %d: nft -c: %v\n%#v\n%s", i, err, p.Config, text)
			}
		}
	})
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		t.Run(b.String(), func(t *testing.T) {
			t.Parallel() // each in a network namespace of its own
			w, lines := newWorld(t, b), 0
			for i, p := range plans {
				for _, f := range p.Families {
					lines += w.listsWhat(fmt.Sprintf("config %d", i), f, p)
				}
			}
			t.Logf("%d configs, %d lines of rules", n, lines)
		})
	}
}

// listsWhat tests and loads the script of a plan into empty tables and compares
// what is listed then. It returns how many rules that was.
func (w *world) listsWhat(name string, f rules.Family, p *tproxy.Plan) (lines int) {
	w.Helper()
	script := p.Rules.IPTables(f)
	fail := func(format string, args ...any) {
		w.Helper()
		w.Errorf("%s, %s: %s\n%#v\n%s", name, w.program(f, ""), fmt.Sprintf(format, args...), p.Config, script)
	}
	if _, err := w.Lab.Run(w.Context(), w.Host, string(script), w.program(f, "restore"), "--noflush", "--wait=5", "--test"); err != nil {
		fail("--test: %v", err)
		return 0
	}
	// Without --noflush a table begins empty; raw is not in every script.
	loaded := string(script)
	if !bytes.Contains(script, []byte("*raw\n")) {
		loaded += "*raw\nCOMMIT\n"
	}
	if _, err := w.Lab.Run(w.Context(), w.Host, loaded, w.program(f, "restore"), "--wait=5"); err != nil {
		fail("%v", err)
		return 0
	}
	ours := w.ours(f)
	if changes := rules.Compare(f, ours, p.Rules); len(changes) > 0 {
		fail("listed otherwise: %v", changes)
	}
	for _, c := range ours.Chains {
		lines += len(c.Rules)
	}
	return lines
}

// Theorem 7 can fail: a script that lacks a chain, or has a port too many for a
// multiport match, is refused, and a rule that is not loaded is missed.
func TestKernelRefusesWhatIsNoRule(t *testing.T) {
	eachVariant(t, func(w *world) {
		p, err := tproxy.Build(tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("1,3,5,7,9,11,13,15,17,19,21,23,25,27,29")}}, tproxy.Host{})
		if err != nil {
			w.Fatal(err)
		}
		for _, f := range rules.Families() {
			script := string(p.Rules.IPTables(f))
			for what, bad := range map[string]string{
				"no chain":        strings.Replace(script, ":KUMA_MESH_INBOUND - [0:0]\n", "", 1),
				"16 ports":        strings.Replace(script, "--dports 1,3", "--dports 1,2,3", 1),
				"a port too high": strings.Replace(script, "--to-ports 15001", "--to-ports 65536", 1),
			} {
				if bad == script {
					w.Fatalf("%s: the script has no such line:\n%s", what, script)
				}
				_, err := w.Lab.Run(w.Context(), w.Host, bad, w.program(f, "restore"), "--noflush", "--wait=5", "--test")
				if err == nil && what == "no chain" && w.backend == tproxy.IPTablesNFT {
					// Its --test does not ask the kernel for chains (1.8.9): that is why
					// each script is loaded, too.
					_, err = w.Lab.Run(w.Context(), w.Host, bad, w.program(f, "restore"), "--noflush", "--wait=5")
				}
				if err == nil {
					w.Errorf("%s: %s accepts it", what, w.program(f, "restore"))
				}
			}
			var less []string
			for line := range strings.Lines(script) {
				if !strings.Contains(line, "SSH is protected") {
					less = append(less, line)
				}
			}
			w.on(strings.Join(less, ""), w.program(f, "restore"), "--noflush", "--wait=5")
			if changes := rules.Compare(f, w.ours(f), p.Rules); len(changes) != 1 {
				w.Errorf("without a rule: %v", changes)
			}
		}
	})
}
