package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// printMetrics writes a status in Prometheus' text format, version 0.0.4
// (prometheus.io/docs/instrumenting/exposition_formats), as the node exporter's
// textfile collector reads it. Counters begin anew with each install that changes the
// rules, as counters may.
func printMetrics(w io.Writer, s *exec.Status) error {
	var p page
	head := func(name, kind, help string) {
		p.linef("# HELP %s %s\n# TYPE %s %s", name, help, name, kind)
	}
	head("kuma_tproxy_state", "gauge", "Whether transparent proxying is in that state: 1 for one of them, 0 for the others.")
	for _, state := range []exec.State{exec.StateInstalled, exec.StateDrifted, exec.StateAbsent, exec.StateUnknown} {
		is := 0
		if s.State == state {
			is = 1
		}
		p.linef("kuma_tproxy_state{state=%s} %d", label(string(state)), is)
	}
	if s.Backend != tproxy.Auto {
		head("kuma_tproxy_info", "gauge", "What is installed, 1.")
		p.linef("kuma_tproxy_info{version=%s,backend=%s} 1", label(s.Version), label(s.Backend.String()))
	}
	head("kuma_tproxy_drift", "gauge", "How many departures from what was installed there are, by kind.")
	for _, kind := range driftKinds {
		n := 0
		for _, d := range s.Drift {
			if d.Kind == kind {
				n++
			}
		}
		p.linef("kuma_tproxy_drift{kind=%s} %d", label(string(kind)), n)
	}
	if s.Backend == tproxy.Auto {
		return write(w, p.Bytes())
	}
	head("kuma_tproxy_connections_total", "counter", "Connections by what the rules did to them: in and out went to the proxy.")
	p.counters("kuma_tproxy_connections_total", s, "in", "out", "excluded", "refused")
	head("kuma_tproxy_dns_queries_total", "counter", "DNS queries that went to the proxy; with a source port that is used again, one for many.")
	p.counters("kuma_tproxy_dns_queries_total", s, "dns")
	return write(w, p.Bytes())
}

var driftKinds = []tproxy.DriftKind{tproxy.DriftMissing, tproxy.DriftChanged, tproxy.DriftExtra, tproxy.DriftDoubled, tproxy.DriftReordered,
	tproxy.DriftElsewhere, tproxy.DriftShadowed, tproxy.DriftEntered, tproxy.DriftFiltered, tproxy.DriftAddress, tproxy.DriftNames, tproxy.DriftStored}

// counters sums what the rules of those verdicts counted, for each family; those of
// nftables that are for both have a sum of their own.
func (p *page) counters(name string, s *exec.Status, verdicts ...string) {
	for _, f := range append(rules.Families(), 0) {
		both := slices.ContainsFunc(s.Counters, func(c exec.Counter) bool { return c.Family == 0 })
		if f != 0 && !slices.Contains(s.Families, f) || f == 0 && !both {
			continue
		}
		for _, v := range verdicts {
			var n uint64
			for _, c := range s.Counters {
				if c.Family == f && c.Verdict == v {
					n += c.Packets
				}
			}
			labels := "family=" + label(f.String())
			if len(verdicts) > 1 {
				labels += ",verdict=" + label(v)
			}
			p.linef("%s{%s} %d", name, labels, n)
		}
	}
}

// label quotes a label's value: backslash, quote and line feed are escaped.
func label(s string) string {
	return fmt.Sprintf(`"%s"`, strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s))
}
