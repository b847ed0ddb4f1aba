package cli

import (
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

const inspectLong = `Say whether transparent proxying is installed in this network namespace, by which
version and with which configuration, what its rules have counted, and how what
stands departs from what was installed: rules that are missing, changed, doubled or
in another order, in the other variant of iptables, rules of others that decide
first, the host's packet filter, ::6 on lo, and what resolves names of the mesh.

Nothing is changed. It takes root: without, it says what it could not see.

Exit codes: 0 as installed, 1 drifted, 2 could not tell, or bad flags, 3 not
installed. To put right what drifted, install again with --reuse-config. With --watch
it is the last state, when it is interrupted.`

const inspectExample = `  kumactl inspect transparent-proxy
  kumactl inspect transparent-proxy --output json | jq .state
  kumactl inspect transparent-proxy --watch`

// InspectTransparentProxy returns the command transparent-proxy that says how an
// install stands, for mounting under an inspect command.
func InspectTransparentProxy(o Options) *cobra.Command {
	cmd := &cobra.Command{
		Use:          "transparent-proxy",
		Short:        "Say whether transparent proxying stands as it was installed",
		Long:         inspectLong,
		Example:      inspectExample,
		Args:         cobra.ArbitraryArgs, // faults of the command line like others
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return inspect(cmd, args, o)
		},
	}
	addFlags(cmd, []flagGroup{{"This run", []flag{
		{"watch", "false", "go on, and print again whenever something but the counters changes"},
		{"output", "text", "`format`: text, json, yaml, or prometheus for the node exporter's textfile collector"},
		{"verbose", "false", "log every step to standard error"},
	}}})
	return cmd
}

// StateError is the error of an inspect that found another state than installed: it
// was printed, so the command prints no more.
type StateError struct{ State exec.State }

func (e *StateError) Error() string { return "transparent proxying is " + string(e.State) }

func (e *StateError) code() int {
	switch e.State {
	case exec.StateInstalled:
		return 0
	case exec.StateDrifted:
		return 1
	case exec.StateAbsent:
		return 3
	}
	return 2
}

func inspect(cmd *cobra.Command, args []string, o Options) error {
	p := newParser(cmd, args)
	print := map[string]func(io.Writer, *exec.Status) error{
		"text": printStatus, "prometheus": printMetrics,
		"json": func(w io.Writer, s *exec.Status) error { return run{format: asJSON}.writeDocument(w, statusOf(s)) },
		"yaml": func(w io.Writer, s *exec.Status) error { return run{format: asYAML}.writeDocument(w, statusOf(s)) },
	}[[]string{"text", "json", "yaml", "prometheus"}[p.oneOf("output", "text", "json", "yaml", "prometheus")]]
	verbose, watch := p.bool("verbose"), p.bool("watch")
	if err := p.err(); err != nil {
		return err
	}
	runner := o.runner(logger(cmd, verbose))
	var status *exec.Status
	var err error
	if watch {
		err = runner.Watch(cmd.Context(), exec.WatchOptions{}, func(s *exec.Status) error {
			status = s
			if p.text("output") == "text" {
				if err := write(cmd.OutOrStdout(), []byte("--- "+time.Now().Format(time.RFC3339)+"\n")); err != nil {
					return err
				}
			}
			return print(cmd.OutOrStdout(), s)
		})
	} else if status, err = runner.Status(cmd.Context()); err == nil {
		err = print(cmd.OutOrStdout(), status)
	}
	if err != nil {
		return explain(cmd, err)
	}
	if status == nil {
		return cmd.Context().Err()
	}
	if status.State != exec.StateInstalled {
		cmd.SilenceErrors = true
		return &StateError{status.State}
	}
	return nil
}

// statusJSON is what inspect --output json prints.
type statusJSON struct {
	State    string         `json:"state"` // installed, drifted, absent or unknown
	Backend  string         `json:"backend,omitempty"`
	Families []string       `json:"families"`
	Version  string         `json:"version,omitempty"`
	Config   *tproxy.Config `json:"config,omitempty"`
	persistJSON
	Drift    []driftJSON  `json:"drift"`
	Reasons  []string     `json:"reasons"` // why something cannot be told
	Counters countersJSON `json:"counters"`
	Notes    []string     `json:"notes"`
}

type driftJSON struct {
	Kind   string `json:"kind"`
	Family string `json:"family,omitempty"`
	Table  string `json:"table,omitempty"`
	Chain  string `json:"chain,omitempty"`
	Index  int    `json:"index,omitempty"` // in its chain, from 1
	Was    string `json:"was,omitempty"`
	Is     string `json:"is,omitempty"`
	Why    string `json:"why,omitempty"`
}

// countersJSON are sums, of connections and queries, and what each rule counted.
type countersJSON struct {
	In       uint64        `json:"in"`
	Out      uint64        `json:"out"`
	DNS      uint64        `json:"dns"`
	Refused  uint64        `json:"refused"`
	Excluded uint64        `json:"excluded"`
	Rules    []counterJSON `json:"rules"`
}

type counterJSON struct {
	Family  string `json:"family"`
	Table   string `json:"table"`
	Chain   string `json:"chain"`
	Index   int    `json:"index"`
	Verdict string `json:"verdict,omitempty"`
	Why     string `json:"why,omitempty"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

func statusOf(s *exec.Status) statusJSON {
	out := statusJSON{State: string(s.State), Families: []string{}, Version: s.Version, Config: s.Config,
		Drift: driftsOf(s.Drift), Reasons: distinct(s.Reasons), Notes: distinct(s.Notes)}
	if s.Backend != tproxy.Auto {
		out.Backend = s.Backend.String()
	}
	if s.Persist != tproxy.PersistAuto {
		out.persistJSON = persistJSON{s.Persist.String(), s.PersistWhy}
	}
	for _, f := range s.Families {
		out.Families = append(out.Families, f.String())
	}
	out.Counters = sums(s)
	return out
}

func sums(s *exec.Status) countersJSON {
	out := countersJSON{Rules: []counterJSON{}}
	for _, c := range s.Counters {
		out.Rules = append(out.Rules, counterJSON{c.Family.String(), string(c.Table), c.Chain, c.Index, c.Verdict, c.Why, c.Packets, c.Bytes})
		switch c.Verdict {
		case "in":
			out.In += c.Packets
		case "out":
			out.Out += c.Packets
		case "dns":
			out.DNS += c.Packets
		case "refused":
			out.Refused += c.Packets
		case "excluded":
			out.Excluded += c.Packets
		}
	}
	return out
}

var stateTexts = map[exec.State]string{
	exec.StateInstalled: "installed, as it was made",
	exec.StateDrifted:   "drifted: what stands departs from what was installed",
	exec.StateAbsent:    "not installed",
	exec.StateUnknown:   "could not tell",
}

func printStatus(w io.Writer, s *exec.Status) error {
	var p page
	p.linef("State: %s", stateTexts[s.State])
	for _, r := range distinct(s.Reasons) {
		p.linef("Cannot tell: %s", r)
	}
	if s.Backend != tproxy.Auto {
		by := "an unknown version"
		if s.Version != "" {
			by = "version " + s.Version
		}
		p.linef("By: %s, in %s, %s", by, s.Backend, strings.Join(texts(s.Families), " and "))
	}
	if s.Config != nil {
		p.settings(*s.Config)
	}
	if s.Persist == tproxy.PersistSystemd || s.Persist == tproxy.PersistFirewalld {
		p.linef("After a restart: comes back by %s (%s)", s.Persist, s.PersistWhy)
	}
	for _, d := range s.Drift {
		p.linef("%s", d)
	}
	if len(s.Counters) > 0 {
		c := sums(s)
		p.linef("Connections: %d in, %d out, %d excluded, %d refused; queries: %d", c.In, c.Out, c.Excluded, c.Refused, c.DNS)
		for _, r := range s.Counters {
			if r.Verdict != "" && r.Packets > 0 {
				p.linef("  %8d %s %s #%d: %s", r.Packets, r.Family, r.Chain, r.Index, r.Why)
			}
		}
	}
	p.notes(s.Notes)
	return write(w, p.Bytes())
}

// settings writes what of a configuration is not at its default, a key a line.
func (p *page) settings(c tproxy.Config) {
	plain, err := tproxy.Build(tproxy.Config{}, tproxy.Host{})
	if err != nil {
		return // the zero Config can be built
	}
	for _, d := range tproxy.ConfigChanges(plain.Config, c) {
		p.linef("  %s: %s", d.Path, d.Is)
	}
}
