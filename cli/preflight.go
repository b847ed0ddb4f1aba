package cli

import (
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

// preflightJSON is what a dry run finds on the machine.
type preflightJSON struct {
	State    string        `json:"state"`    // of what is installed now, as inspect has it
	Drift    []driftJSON   `json:"drift"`    // of that
	Hindered []driftJSON   `json:"hindered"` // what would keep connections from the proxy
	Silent   []string      `json:"silent"`   // ports of the proxy on which nobody listens
	Captured []captureJSON `json:"captured"` // root's connections that go to the proxy when made anew
	Ways     []wayJSON     `json:"ways"`     // into this host, left alone
	Reasons  []string      `json:"reasons"`  // why something cannot be told
	Notes    []string      `json:"notes"`
}

type captureJSON struct {
	Program string `json:"program,omitempty"`
	PID     int    `json:"pid,omitempty"`
	UID     uint32 `json:"uid"`
	Local   string `json:"local"`
	Remote  string `json:"remote"`
}

type wayJSON struct {
	Port uint16 `json:"port"`
	Why  string `json:"why"`
}

func preflightOf(f *exec.Preflight) *preflightJSON {
	if f == nil {
		return nil
	}
	out := &preflightJSON{
		State: string(f.Status.State),
		Drift: driftsOf(f.Status.Drift), Hindered: driftsOf(f.Hindered),
		Silent: distinct(f.Silent), Captured: []captureJSON{}, Ways: []wayJSON{},
		Reasons: distinct(f.Status.Reasons, f.Reasons), Notes: distinct(f.Status.Notes, f.Notes),
	}
	for _, c := range f.Captured {
		out.Captured = append(out.Captured, captureJSON{c.Program, c.PID, c.UID, c.Local.String(), c.Remote.String()})
	}
	for _, w := range f.Ways {
		out.Ways = append(out.Ways, wayJSON{w.Port, w.Why})
	}
	return out
}

func driftsOf(in []tproxy.Drift) []driftJSON {
	out := []driftJSON{}
	for _, d := range in {
		j := driftJSON{Kind: string(d.Kind), Table: string(d.Table), Chain: d.Chain, Index: d.Index, Was: d.Was, Is: d.Is, Why: d.Why}
		if d.Family != 0 {
			j.Family = d.Family.String()
		}
		out = append(out, j)
	}
	return out
}

// preflight writes what a dry run finds on the machine.
func (p *page) preflight(f *exec.Preflight) {
	if f == nil {
		return
	}
	for _, d := range f.Status.Drift {
		p.linef("Found, of what is installed: %s", d)
	}
	for _, d := range f.Hindered {
		p.linef("Found: %s", d)
	}
	for _, s := range distinct(f.Silent) {
		p.linef("Found: %s", s)
	}
	for _, c := range f.Captured {
		p.linef("Found: goes to the proxy when it is made anew: a connection of %s", c)
	}
	for _, w := range f.Ways {
		p.linef("Found: a way into this host, left alone: port %d (%s)", w.Port, w.Why)
	}
	for _, r := range distinct(f.Reasons) {
		p.linef("Cannot tell: %s", r)
	}
	p.notes(f.Notes)
}
