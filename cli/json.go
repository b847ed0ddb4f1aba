package cli

import (
	"encoding/json"
	"io"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// dryRunJSON is what install --dry-run --output json prints.
type dryRunJSON struct {
	DryRun  bool   `json:"dryRun"`
	Backend string `json:"backend"`
	Why     string `json:"why"`
	persistJSON
	Families []familyJSON  `json:"families"`
	Config   tproxy.Config `json:"config"`
	Former   *formerJSON   `json:"former,omitempty"`  // what is installed already
	Differs  []changeJSON  `json:"differs,omitempty"` // from that, in config
	Steps    []stepJSON    `json:"steps"`
	Scripts  scriptsJSON   `json:"scripts"`
	Notes    []string      `json:"notes"`

	// Preflight is null where this machine cannot be looked at.
	Preflight *preflightJSON `json:"preflight"`
}

type stepJSON struct {
	Do   string `json:"do"`
	Undo string `json:"undo"`
}

// scriptsJSON is a script for each family that has rules, or one for nft -f, for both.
type scriptsJSON struct {
	IPv4     string `json:"ipv4,omitempty"`
	IPv6     string `json:"ipv6,omitempty"`
	NFTables string `json:"nftables,omitempty"`
}

func (s *scriptsJSON) add(f rules.Family, script []byte) {
	if f == rules.IPv6 {
		s.IPv6 += string(script)
	} else {
		s.IPv4 += string(script)
	}
}

// familyJSON is what was done, or would be, to the rules of a family.
type familyJSON struct {
	Family  string   `json:"family"`
	Backend string   `json:"backend"`
	Rules   int      `json:"rules"`             // of ours that are there afterwards
	Changes []string `json:"changes,omitempty"` // how what was there departed from the plan
	Script  string   `json:"script,omitempty"`  // of an uninstall's dry run
}

// installJSON is what install --output json prints.
type installJSON struct {
	DryRun  bool   `json:"dryRun"`
	Changed bool   `json:"changed"`
	Backend string `json:"backend,omitempty"`
	Why     string `json:"why,omitempty"`
	persistJSON
	Families  []familyJSON  `json:"families"`
	Config    tproxy.Config `json:"config"`
	Former    *formerJSON   `json:"former,omitempty"`  // what was installed before
	Differs   []changeJSON  `json:"differs,omitempty"` // from that, in config
	Steps     []string      `json:"steps"`             // those that did something
	Dataplane *dataplane    `json:"transparentProxying,omitempty"`
	User      string        `json:"user,omitempty"` // that kuma-dp must run as
	Trial     *trialJSON    `json:"trial,omitempty"`
	Retries   int           `json:"retries"`
	Notes     []string      `json:"notes"`
}

// uninstallJSON is what uninstall --output json prints.
type uninstallJSON struct {
	DryRun   bool         `json:"dryRun"`
	Changed  bool         `json:"changed"`
	Families []familyJSON `json:"families"`
	Former   *formerJSON  `json:"former,omitempty"` // what was installed
	Cut      int          `json:"cut"`              // connections that were redirected and are not drained
	Steps    []string     `json:"steps"`
	Retries  int          `json:"retries"`
	Notes    []string     `json:"notes"`
}

// persistJSON is by what an install comes back after a restart.
type persistJSON struct {
	Persist    string `json:"persist,omitempty"`
	PersistWhy string `json:"persistWhy,omitempty"`
}

func persistOf(plan *tproxy.Plan) persistJSON {
	return persistJSON{plan.Persist.String(), plan.PersistWhy}
}

func planJSON(plan *tproxy.Plan, before *exec.Installation) dryRunJSON {
	out := dryRunJSON{
		DryRun:  true,
		Backend: plan.Backend.String(), Why: plan.BackendWhy, persistJSON: persistOf(plan),
		Families: []familyJSON{},
		Config:   plan.Config,
		Former:   formerOf(before), Differs: changesOf(before, plan.Config),
		Steps: []stepJSON{},
		Notes: distinct(plan.Notes),
	}
	for _, s := range plan.Steps {
		out.Steps = append(out.Steps, stepJSON{s.String(), s.Undo()})
	}
	if n := tableOf(plan); n != nil {
		out.Families = append(out.Families, familyJSON{Family: rules.Family(0).String(), Backend: plan.Backend.String(), Rules: n.Count()})
		out.Scripts.NFTables = string(n.Text())
		return out
	}
	for _, f := range plan.Families {
		out.Families = append(out.Families, familyJSON{Family: f.String(), Backend: plan.Backend.String(), Rules: countRules(plan.Rules, f)})
		out.Scripts.add(f, plan.Rules.IPTables(f))
	}
	return out
}

func (r request) installJSON(plan *tproxy.Plan, report *exec.Report) installJSON {
	d := r.dataplane(plan)
	out := installJSON{
		Changed: report.Changed,
		Backend: report.Backend.String(), Why: report.Why, persistJSON: persistOf(plan),
		Families: familiesJSON(report.Families),
		Config:   plan.Config,
		Former:   formerOf(report.Before), Differs: changesOf(report.Before, plan.Config),
		Steps:     distinct(report.Steps),
		Dataplane: &d,
		User:      proxyUser(plan),
		Trial:     trialOf(report.Trial),
		Retries:   report.Retries,
		Notes:     distinct(plan.Notes, report.Notes),
	}
	for i, f := range report.Families {
		if f.Backend == report.Backend {
			out.Families[i].Rules = countFor(plan, f)
		}
	}
	return out
}

func removalJSON(r run, report *exec.Report) uninstallJSON {
	out := uninstallJSON{
		DryRun:   r.DryRun,
		Changed:  report.Changed,
		Families: familiesJSON(report.Families),
		Former:   formerOf(report.Before), Cut: report.Cut,
		Steps:   distinct(report.Steps),
		Retries: report.Retries,
		Notes:   distinct(report.Notes),
	}
	if r.DryRun {
		for i, f := range report.Families {
			out.Families[i].Script = string(f.Script)
		}
	}
	return out
}

func familiesJSON(in []exec.FamilyReport) []familyJSON {
	out := []familyJSON{}
	for _, f := range in {
		j := familyJSON{Family: f.Family.String(), Backend: f.Backend.String()}
		for _, c := range f.Changes {
			j.Changes = append(j.Changes, c.String())
		}
		out = append(out, j)
	}
	return out
}

// format is how a command says what it has to say.
type format uint8

const (
	asText format = iota
	asJSON
	asYAML
)

// writeDocument writes v as JSON, or the same as YAML.
func (r run) writeDocument(w io.Writer, v any) error {
	b, err := marshal(v)
	if err == nil && r.format == asYAML {
		b, err = yamlOf(b)
	}
	if err != nil {
		return err
	}
	return write(w, b)
}

// marshal leaves <, > and & as they are: nobody reads this in a web page.
func marshal(v any) ([]byte, error) {
	var p page
	e := json.NewEncoder(&p)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	err := e.Encode(v)
	return p.Bytes(), err
}
