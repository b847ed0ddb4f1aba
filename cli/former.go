package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

// reused is where the values of --reuse-config come from, as messages say it.
const reused = "the installed configuration"

// reuse returns the configuration of what is installed, for --reuse-config: the
// lowest layer, so that files, variables and flags of this run win over it.
func (p *parser) reuse(cmd *cobra.Command, o Options) (map[string]leaf, error) {
	const name = "reuse-config"
	if !p.bool(name) || p.refused[name] {
		return nil, nil
	}
	runner := o.runner(logger(cmd, p.bool("verbose")))
	found, err := runner.Installed(cmd.Context())
	switch {
	case err != nil:
		return nil, err
	case found == nil:
		p.fault("--" + name + ": nothing is installed here: accepted is an install without it")
		return nil, nil
	case found.Unknown != nil:
		p.fault(fmt.Sprintf("--%s: what is installed here is not known (%v): accepted is an install without it, with all flags", name, found.Unknown))
		return nil, nil
	}
	base := map[string]leaf{}
	for _, c := range tproxy.ConfigChanges(tproxy.Config{}, found.Config) {
		base[c.Path] = leaf{json: []byte(c.Is), from: reused}
	}
	return base, nil
}

// standing reads for a dry run what an install would replace; nil where nothing is
// there, or where it could not be seen.
func standing(ctx context.Context, runner Runner) (*exec.Installation, error) {
	found, err := runner.Installed(ctx)
	if err != nil && unseen(err) {
		return nil, nil
	}
	return found, err
}

// formerJSON is what was installed before.
type formerJSON struct {
	Backend  string         `json:"backend"`
	Families []string       `json:"families"`
	Kuma     bool           `json:"kuma"` // whether Kuma's own installer made it, or some of it
	Version  string         `json:"version,omitempty"`
	Config   *tproxy.Config `json:"config,omitempty"`
	Unknown  string         `json:"unknown,omitempty"` // why there is no config
}

// changeJSON is a key that has another value than it had in what was installed.
type changeJSON struct {
	Key  string          `json:"key"`
	Flag string          `json:"flag,omitempty"`
	Was  json.RawMessage `json:"was"`
	Is   json.RawMessage `json:"is"`
}

func formerOf(i *exec.Installation) *formerJSON {
	if i == nil {
		return nil
	}
	out := &formerJSON{Backend: i.Backend.String(), Families: texts(i.Families), Kuma: i.Kuma, Version: i.Record.Version}
	if i.Unknown != nil {
		out.Unknown = i.Unknown.Error()
	} else {
		out.Config = &i.Config
	}
	return out
}

// changesOf lists what differs in the configuration from what was installed.
func changesOf(i *exec.Installation, now tproxy.Config) (out []changeJSON) {
	if i == nil || i.Unknown != nil {
		return nil
	}
	for _, c := range tproxy.ConfigChanges(i.Config, now) {
		j := changeJSON{Key: c.Path, Was: json.RawMessage(c.Was), Is: json.RawMessage(c.Is)}
		if name, ok := flagNames()[c.Path]; ok {
			j.Flag = "--" + name
		}
		out = append(out, j)
	}
	return out
}

// former says what was installed before, where it was not the same.
func (p *page) former(i *exec.Installation, now tproxy.Config, version string) {
	if i == nil {
		return
	}
	if i.Unknown != nil {
		what := i.Unknown.Error()
		if i.Kuma && errors.Is(i.Unknown, tproxy.ErrNoRecord) {
			what = "Kuma's own installer made it, and keeps no record"
		}
		p.linef("Before: a configuration that is not known (%s)", what)
		return
	}
	changes := changesOf(i, now)
	if len(changes) > 0 || version != "" && i.Record.Version != version {
		p.linef("Before: installed by %s", i.Record)
	}
	for _, c := range changes {
		name := c.Flag
		if name == "" {
			name = c.Key
		}
		p.linef("  %s was %s, is %s", name, plain(c.Was), plain(c.Is))
	}
}

// plain writes a value of a key as a flag would have it.
func plain(value json.RawMessage) string {
	var s string
	var list []json.RawMessage
	switch {
	case json.Unmarshal(value, &s) == nil && s != "":
		return s
	case json.Unmarshal(value, &list) == nil && len(list) > 0:
		items := make([]string, len(list))
		for i, v := range list {
			items[i] = plain(v)
		}
		return strings.Join(items, ",")
	case string(value) == "[]" || string(value) == `""`:
		return "nothing"
	}
	return string(value)
}
