package tproxy_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	. "github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

var _ = flag.Bool("update", false, "write the golden files")

// TestGolden builds the config of each scenario for its host, and compares the
// scripts, the steps and the walks, or the error.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) < 15 {
		t.Fatalf("%d scenarios, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			a := ReadArchive(t, file)
			if strings.TrimSpace(a.Comment) == "" {
				t.Error("the scenario does not say what it is")
			}
			var cfg tproxy.Config
			text, _ := a.Section("config")
			err := json.Unmarshal([]byte(text), &cfg)
			var plan *tproxy.Plan
			if err == nil {
				plan, err = tproxy.Build(cfg, host(t, a))
			}
			if err != nil {
				Golden(t, file, section("error", err.Error()), section("v4", ""), section("v6", ""), section("nft", ""), section("steps", ""), section("walks", ""))
				return
			}
			walks, ok := a.Section("walks")
			if !ok {
				t.Error("the scenario has no walks")
			}
			Golden(t, file,
				section("error", ""),
				section("v4", string(plan.Rules.IPTables(rules.IPv4))),
				section("v6", string(plan.Rules.IPTables(rules.IPv6))),
				section("nft", string(plan.Rules.NFTables(tproxy.NFTable))),
				section("steps", steps(plan)),
				section("walks", Walks(t, plan, Env(), walks)))
			walkEveryForm(t, plan, walks)
		})
	}
}

// walkEveryForm walks the packets of a section of walks through the rules in each
// form that they are rendered to, and asks the contract: the table is one for all.
func walkEveryForm(t *testing.T, plan *tproxy.Plan, walks string) {
	forms := forms(t, plan.Rules)
	for line := range strings.Lines(walks) {
		packet, want, _ := strings.Cut(strings.TrimSpace(line), " => ")
		if packet == "" || packet[0] == '#' || want == "" {
			continue
		}
		p, err := sim.ParsePacket(packet)
		if err != nil {
			t.Error(err)
			continue
		}
		word, _, _ := strings.Cut(want, " # ")
		if row, v := Expect(plan.Config, plan.Host, Env(), p); Word(plan.Config, v) != word {
			t.Errorf("%s: row %s of the contract says %s", line, row, Word(plan.Config, v))
		}
		for name, sets := range forms {
			trace := sim.Walk(sets[p.Family()], Env(), p)
			got := Word(plan.Config, trace.Verdict)
			if plan.Config.DisableComments {
				want = word // the kernel has no reasons
			} else {
				got += " # " + trace.Reason
			}
			if got != want {
				t.Errorf("%s: %s => %s, wanted %s", name, packet, got, want)
			}
		}
	}
}

// host reads a scenario's section host, where a backend stands by its name.
func host(t *testing.T, a Archive) (h tproxy.Host) {
	text, ok := a.Section("host")
	if !ok {
		return h
	}
	for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		text = strings.ReplaceAll(text, fmt.Sprintf(`"Backend": %q`, b), fmt.Sprintf(`"Backend": %d`, b))
	}
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&h); err != nil {
		t.Fatalf("section host: %v", err)
	}
	return h
}

func section(name, text string) Section { return Section{Name: name, Text: text} }

func steps(p *tproxy.Plan) string {
	var b strings.Builder
	fmt.Fprintf(&b, "backend %s: %s\n", p.Backend, p.BackendWhy)
	for _, s := range p.Steps {
		fmt.Fprintf(&b, "%s; undo: %s\n", s, s.Undo())
	}
	for _, n := range p.Notes {
		fmt.Fprintf(&b, "note: %s\n", n)
	}
	return b.String()
}
