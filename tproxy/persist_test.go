package tproxy_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// By what an install comes back, on the hosts that there are.
func TestBuildPersists(t *testing.T) {
	const (
		auto, systemd, firewalld, none = tproxy.PersistAuto, tproxy.PersistSystemd, tproxy.PersistFirewalld, tproxy.PersistNone
	)
	here := tproxy.Persistence{Observed: true, NoFirewalld: "firewalld is not installed"}
	rules := tproxy.Persistence{Observed: true, Firewalld: true}
	plain := tproxy.Persistence{Observed: true, NoSystemd: "systemd is not process 1 here", NoFirewalld: "firewalld is not installed"}
	elsewhere := tproxy.Persistence{Observed: true, NoSystemd: "another", Elsewhere: "another", NoFirewalld: "another's"}
	for _, test := range []struct {
		name  string
		asked tproxy.Persist
		host  tproxy.Persistence
		pod   bool
		want  string // the way and what is stored, or the refusal
		note  string
	}{
		{"nothing is known", auto, tproxy.Persistence{}, false, "none []", ""},
		{"nothing is known, asked", systemd, tproxy.Persistence{}, false, "systemd [systemd]", ""},
		{"nothing is known, firewalld asked", firewalld, tproxy.Persistence{}, false, "firewalld [firewalld]", ""},
		{"systemd", auto, here, false, "systemd [systemd]", ""},
		{"firewalld too", auto, rules, false, "firewalld [systemd firewalld]", ""},
		{"firewalld without systemd", auto, tproxy.Persistence{Observed: true, Firewalld: true, NoSystemd: "not here"}, false, "firewalld [firewalld]", "::6 on lo"},
		{"neither", auto, plain, false, "none []", "do not outlive a restart of this host: systemd is not process 1"},
		{"neither, said", none, plain, false, "none []", ""},
		{"both, none asked", none, rules, false, "none []", ""},
		{"another network namespace", auto, elsewhere, false, "none []", "do not outlive a restart of this host: another"},
		{"another network namespace, systemd asked", systemd, elsewhere, false, "refused: --persist systemd: another", ""},
		{"another network namespace, firewalld asked", firewalld, tproxy.Persistence{Observed: true, NoSystemd: "another", Elsewhere: "another"}, false, "firewalld [firewalld]", "does not run here"},
		{"systemd asked, which is not there", systemd, plain, false, "refused: --persist systemd: systemd is not process 1", ""},
		{"systemd asked, beside firewalld", systemd, rules, false, "systemd [systemd]", "firewall-cmd --reload takes the rules out"},
		{"firewalld asked, which is not there", firewalld, here, false, "refused: --persist firewalld: firewalld is not installed", ""},
		{"firewalld asked, which does not run", firewalld, tproxy.Persistence{Observed: true}, false, "firewalld [systemd firewalld]", "does not run here"},
		{"firewalld failed", auto, tproxy.Persistence{Observed: true, Firewalld: true, Failed: "state failed"}, false, "refused: firewalld rules this host", ""},
		{"firewalld failed, asked", firewalld, tproxy.Persistence{Observed: true, Firewalld: true, Failed: "state failed"}, false, "refused: --persist firewalld: state failed", ""},
		{"firewalld failed, none asked", none, tproxy.Persistence{Observed: true, Firewalld: true, Failed: "state failed"}, false, "none []", ""},
		{"direct.xml is broken", auto, tproxy.Persistence{Observed: true, Firewalld: true, NoFirewalld: "not XML"}, false, "refused: firewalld rules this host", ""},
		{"a pod", auto, rules, true, "none []", ""},
		{"a pod, firewalld asked", firewalld, tproxy.Persistence{}, true, "refused: --persist firewalld: a pod", ""},
		{"a pod, systemd asked", systemd, rules, true, "refused: --persist systemd: a pod", ""},
	} {
		p, err := tproxy.Build(tproxy.Config{Persist: test.asked, Pod: test.pod}, tproxy.Host{Persistence: test.host})
		if refused, ok := errors.AsType[*tproxy.RefusedError](err); ok {
			if got := "refused: " + refused.Reasons[0].What; !strings.HasPrefix(got, test.want) || refused.Reasons[0].Remedy == "" {
				t.Errorf("%s: %s, not %s", test.name, got, test.want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		if got := fmt.Sprintf("%s %v", p.Persist, p.Stores()); got != test.want || p.PersistWhy == "" {
			t.Errorf("%s: %s (%s), not %s", test.name, got, p.PersistWhy, test.want)
		}
		if said := strings.Join(p.Notes, "\n"); test.note == "" && said != "" || !strings.Contains(said, test.note) {
			t.Errorf("%s: notes %q", test.name, said)
		}
	}
}

// Each way is a step with its undo, behind the rest, the unit first; what a former
// install has beside them goes.
func TestPlanStores(t *testing.T) {
	text := func(c tproxy.Config, h tproxy.Persistence) (out []string) {
		t.Helper()
		p, err := tproxy.Build(c, tproxy.Host{Persistence: h})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range p.Steps[3:] {
			out = append(out, fmt.Sprintf("%s / %s", s, s.Undo()))
		}
		return out
	}
	for _, test := range []struct {
		c    tproxy.Config
		h    tproxy.Persistence
		want []string
	}{
		{tproxy.Config{}, tproxy.Persistence{Observed: true, Firewalld: true}, []string{
			"a unit of systemd that installs again at boot / no unit of ours",
			"the rules in direct.xml of firewalld / direct.xml of firewalld without the rules"}},
		{tproxy.Config{Persist: tproxy.PersistSystemd}, tproxy.Persistence{Observed: true, Stored: []tproxy.Persist{tproxy.PersistSystemd, tproxy.PersistFirewalld}}, []string{
			"a unit of systemd that installs again at boot / no unit of ours",
			"no rules of ours in direct.xml of firewalld / the former rules in direct.xml of firewalld"}},
		{tproxy.Config{Persist: tproxy.PersistNone}, tproxy.Persistence{Observed: true, Stored: []tproxy.Persist{tproxy.PersistSystemd}}, []string{
			"no unit of ours / the former unit"}},
	} {
		if got := text(test.c, test.h); !slices.Equal(got, test.want) {
			t.Errorf("%+v: %q", test.h, got)
		}
	}
}

// firewalld loads its direct rules with what iptables means: ours stand there.
func TestFirewalldsBackend(t *testing.T) {
	programs := tproxy.Programs{Save: "/s", Restore: "/r"}
	variants := []tproxy.Variant{
		{Backend: tproxy.IPTablesNFT, IPv4: programs, IPv6: programs},
		{Backend: tproxy.IPTablesLegacy, IPv4: programs, IPv6: programs, Default: true},
	}
	build := func(b tproxy.Backend, firewalld bool) (*tproxy.Plan, error) {
		return tproxy.Build(tproxy.Config{Backend: b}, tproxy.Host{Variants: variants, Persistence: tproxy.Persistence{Observed: true, Firewalld: firewalld}})
	}
	if p, err := build(tproxy.Auto, true); err != nil || p.Backend != tproxy.IPTablesLegacy || !strings.Contains(p.BackendWhy, "firewalld") {
		t.Errorf("%v, %v", p, err)
	}
	variants[0].Ours = nil
	variants[0].Rules = true
	if p, err := build(tproxy.Auto, true); err != nil || p.Backend != tproxy.IPTablesLegacy {
		t.Errorf("%v, %v", p, err)
	}
	if p, err := build(tproxy.Auto, false); err != nil || p.Backend != tproxy.IPTablesNFT {
		t.Errorf("%v, %v", p, err)
	}
	if _, err := build(tproxy.IPTablesNFT, true); err == nil || !strings.Contains(err.Error(), "--backend iptables-nft: firewalld loads") {
		t.Errorf("%v", err)
	}
	if _, err := build(tproxy.IPTablesLegacy, true); err != nil {
		t.Error(err)
	}
}

// The rules do not hang on how they come back, but for the record of it.
func TestRulesDoNotHangOnPersist(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := tproxy.Config{Persist: rapid.SampledFrom([]tproxy.Persist{tproxy.PersistAuto, tproxy.PersistNone, tproxy.PersistFirewalld}).Draw(t, "persist")}
		h := tproxy.Persistence{Observed: true, Firewalld: rapid.Bool().Draw(t, "firewalld")}
		p, err := tproxy.Build(c, tproxy.Host{Persistence: h})
		if err != nil {
			t.Fatal(err)
		}
		none, err := tproxy.Build(tproxy.Config{}, tproxy.Host{})
		if err != nil {
			t.Fatal(err)
		}
		for i, chain := range p.Rules.Chains {
			if tproxy.IsRecord(chain.Table, chain.Name) {
				continue
			}
			for j, r := range chain.Rules {
				if !r.Equal(none.Rules.Chains[i].Rules[j]) {
					t.Fatalf("%s: %s", chain.Name, r)
				}
			}
		}
	})
}

func TestParsePersist(t *testing.T) {
	for p := tproxy.PersistAuto; p <= tproxy.PersistNone; p++ {
		text, err := p.MarshalText()
		var back tproxy.Persist
		if err != nil || back.UnmarshalText(text) != nil || back != p {
			t.Errorf("%s: %s, %v", p, back, err)
		}
	}
	if p, err := tproxy.ParsePersist(""); err != nil || p != tproxy.PersistAuto {
		t.Error(p, err)
	}
	if _, err := tproxy.ParsePersist("disk"); err == nil || err.Error() != `"disk": accepted is auto, systemd, firewalld or none` {
		t.Error(err)
	}
	if _, err := tproxy.Build(tproxy.Config{Persist: 9}, tproxy.Host{}); err == nil || !strings.Contains(err.Error(), `persist: "Persist(9)" is no way`) {
		t.Error(err)
	}
}

// A table of nftables is what firewalld leaves alone and cannot load: by what it comes
// back, and where something else is chosen because it would not.
func TestTableComesBack(t *testing.T) {
	programs := tproxy.Programs{Save: "/s", Restore: "/r"}
	table := tproxy.Variant{Backend: tproxy.NFTables}
	filled := tproxy.Variant{Backend: tproxy.NFTables, Rules: true, Ours: []rules.Family{0}}
	nft := tproxy.Variant{Backend: tproxy.IPTablesNFT, IPv4: programs, IPv6: programs, Default: true}
	with := nft
	with.Rules, with.Ours = true, []rules.Family{rules.IPv4}
	bare := tproxy.Variant{Backend: tproxy.IPTablesLegacy, Rules: true} // no programs
	const auto, systemd, firewalld = tproxy.PersistAuto, tproxy.PersistSystemd, tproxy.PersistFirewalld
	running := tproxy.Persistence{Observed: true, Firewalld: true}
	noBoot := tproxy.Persistence{Observed: true, Firewalld: true, NoSystemd: "no systemd"}
	noTable := tproxy.Persistence{Observed: true, NoTable: "no nft"}
	noTableFirewalld := tproxy.Persistence{Observed: true, Firewalld: true, NoTable: "no nft"}
	failed := tproxy.Persistence{Observed: true, Firewalld: true, Failed: "state failed"}
	for _, test := range []struct {
		name    string
		backend tproxy.Backend
		persist tproxy.Persist
		host    tproxy.Persistence
		have    []tproxy.Variant
		want    string
		note    string
	}{
		{"firewalld runs", tproxy.Auto, auto, running, []tproxy.Variant{table, nft}, "nftables, systemd [systemd]", ""},
		{"firewalld has failed", tproxy.Auto, auto, failed, []tproxy.Variant{table, nft}, "nftables, systemd [systemd]", ""},
		{"ours are in iptables", tproxy.Auto, auto, running, []tproxy.Variant{table, with}, "iptables-nft, firewalld [systemd firewalld]", ""},
		{"systemd asked", tproxy.Auto, systemd, running, []tproxy.Variant{table, nft}, "nftables, systemd [systemd]", ""},
		{"systemd asked, ours in iptables", tproxy.Auto, systemd, running, []tproxy.Variant{table, with}, "iptables-nft, systemd [systemd]", "firewall-cmd --reload takes the rules out"},
		{"firewalld asked", tproxy.Auto, firewalld, running, []tproxy.Variant{table, nft}, "iptables-nft, firewalld [systemd firewalld]", ""},
		{"firewalld asked, ours in a table", tproxy.Auto, firewalld, running, []tproxy.Variant{filled, nft}, "iptables-nft, firewalld [systemd firewalld]", ""},
		{"firewalld asked, no iptables", tproxy.Auto, firewalld, running, []tproxy.Variant{table}, "refused: iptables-nft (firewalld loads", ""},
		{"firewalld and nftables asked", tproxy.NFTables, firewalld, running, []tproxy.Variant{table, nft}, "refused: --backend nftables: firewalld's direct rules", ""},
		{"the same of a host unknown", tproxy.NFTables, firewalld, tproxy.Persistence{}, nil, "refused: --backend nftables: firewalld's direct rules", ""},
		{"firewalld without systemd", tproxy.Auto, auto, noBoot, []tproxy.Variant{table, nft}, "iptables-nft, firewalld [firewalld]", "::6 on lo"},
		{"the same without iptables", tproxy.Auto, auto, noBoot, []tproxy.Variant{table, bare}, "nftables, none []", "do not outlive a restart of this host: no systemd"},
		{"the same, nftables asked", tproxy.NFTables, auto, noBoot, []tproxy.Variant{table, nft}, "nftables, none []", "do not outlive a restart of this host: no systemd"},
		{"nothing for a unit to run", tproxy.Auto, auto, noTable, []tproxy.Variant{table, nft}, "iptables-nft, systemd [systemd]", "not in a table of nftables, which would not come back after a restart: no nft"},
		{"the same, ours in a table", tproxy.Auto, auto, noTable, []tproxy.Variant{filled, nft}, "iptables-nft, systemd [systemd]", "would not come back"},
		{"the same, with firewalld", tproxy.Auto, auto, noTableFirewalld, []tproxy.Variant{table, nft}, "iptables-nft, firewalld [systemd firewalld]", ""},
		{"the same, without iptables", tproxy.Auto, auto, noTable, []tproxy.Variant{table}, "refused: a table of nftables would not come back after a restart: no nft", ""},
		{"the same, nftables asked", tproxy.NFTables, auto, noTable, []tproxy.Variant{table, nft}, "refused: a table of nftables would not come back after a restart: no nft", ""},
		{"the same, and it need not come back", tproxy.Auto, tproxy.PersistNone, noTable, []tproxy.Variant{table, nft}, "nftables, none []", ""},
	} {
		p, err := tproxy.Build(tproxy.Config{Backend: test.backend, Persist: test.persist}, tproxy.Host{Variants: test.have, Persistence: test.host})
		got, notes := "", ""
		if refused, ok := errors.AsType[*tproxy.RefusedError](err); ok {
			got = "refused: " + refused.Reasons[0].What
			if refused.Reasons[0].Remedy == "" {
				t.Errorf("%s: no remedy", test.name)
			}
		} else if err != nil {
			got = err.Error()
		} else {
			got, notes = fmt.Sprintf("%s, %s %v", p.Backend, p.Persist, p.Stores()), strings.Join(p.Notes, "\n")
		}
		if !strings.HasPrefix(got, test.want) {
			t.Errorf("%s: %s, not %s", test.name, got, test.want)
		}
		if test.note == "" && notes != "" || !strings.Contains(notes, test.note) || strings.Count(notes, "would not come back") > 1 {
			t.Errorf("%s: notes %q", test.name, notes)
		}
	}
}
