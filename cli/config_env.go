package cli

import (
	"encoding/json"
	"errors"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

const envPrefix = "KUMA_TRANSPARENT_PROXY_"

var (
	nextWord    = regexp.MustCompile(`([a-z0-9])([A-Z])`)
	nextAcronym = regexp.MustCompile(`([A-Z])([A-Z][a-z]{2,})`) // in DPUser, and not in UIDs
)

// envName is the variable of a key: its words in capitals, as in Kuma.
func envName(path string) string {
	s := nextWord.ReplaceAllString(path, "${1}_$2")
	s = nextAcronym.ReplaceAllString(s, "${1}_$2")
	return envPrefix + strings.ToUpper(strings.NewReplacer(".", "_", "-", "_").Replace(s))
}

// executables is an object in files, and one text in a variable.
const executables = "iptablesExecutables"

// envKeys are the keys by their variables.
var envKeys = func() map[string]tproxy.Key {
	out := map[string]tproxy.Key{envName(executables): {Path: executables, Kind: tproxy.Text, Default: `""`}}
	for _, k := range tproxy.Keys() {
		if !strings.HasPrefix(k.Path, executables) {
			out[envName(k.Path)] = k
		}
	}
	return out
}()

// envNames are the names that Kuma's variables give its chains. Ours have theirs.
var envNames = map[string]string{
	envPrefix + "REDIRECT_INBOUND_CHAIN_NAME":           "INBOUND",
	envPrefix + "REDIRECT_INBOUND_REDIRECT_CHAIN_NAME":  "INBOUND_REDIRECT",
	envPrefix + "REDIRECT_OUTBOUND_CHAIN_NAME":          "OUTBOUND",
	envPrefix + "REDIRECT_OUTBOUND_REDIRECT_CHAIN_NAME": "OUTBOUND_REDIRECT",
}

// environment reads the variables. One that is not known is a warning: others
// share the environment, and newer versions.
func (g *loading) environment(environ []string) {
	given := map[string]string{}
	for _, e := range environ {
		name, v, _ := strings.Cut(e, "=")
		if strings.HasPrefix(name, envPrefix) && strings.TrimSpace(v) != "" {
			given[name] = v // the last one, as for any program
		}
	}
	var names []string
	for name := range given {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		v := given[name]
		k, known := envKeys[name]
		standard, chain := envNames[name]
		switch {
		case known:
			g.variable(name, v, k)
		case chain && v != standard:
			g.fault(tproxy.ConfigFault{Source: name, Value: short(v), What: "is not supported: chains have fixed names", Accepted: "the default, " + standard}, "")
		case !chain:
			g.warnings = append(g.warnings, tproxy.ConfigFault{Source: cut(name, 100), Value: short(v), What: "has no effect: there is no such variable", Accepted: nearestEnv(name) + ", the nearest one"})
		}
	}
}

func (g *loading) variable(name, text string, k tproxy.Key) {
	if !utf8.ValidString(text) {
		g.fault(tproxy.ConfigFault{Source: name, Value: short(text), What: "is not UTF-8", Accepted: "text in UTF-8"}, k.Path)
		return
	}
	raw, err := envJSON(text, k)
	if err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			g.fault(tproxy.ConfigFault{Source: name, Value: short(text), What: "cannot be read (" + line + ")", Accepted: acceptedExclusions}, k.Path)
		}
		return
	}
	v := leaf{raw, name, g.layer}
	var scratch tproxy.Config
	_, err = tproxy.Decoder{}.Decode(nested(map[string]leaf{k.Path: v}), &scratch)
	if e, ok := errors.AsType[*tproxy.ConfigError](err); ok {
		for _, f := range e.Faults {
			f.Source, f.Path = name, ""
			g.fault(f, k.Path)
		}
	}
	if k.Path != executables { // which is text here, and empty if it is accepted
		g.leaves[k.Path] = v
	}
}

const acceptedExclusions = "proto:ports:uids, ports:uids or uids, such as tcp:22,80-90:1000-1005, with ; between several"

// envJSON is a variable's text as JSON. What is not accepted becomes text, which
// the decoder refuses in the words of the key.
func envJSON(text string, k tproxy.Key) (json.RawMessage, error) {
	trimmed := strings.TrimSpace(text)
	switch {
	case k.Kind == tproxy.Boolean:
		if b, err := strconv.ParseBool(trimmed); err == nil {
			return strconv.AppendBool(nil, b), nil
		}
	case k.Kind == tproxy.Number && decimal.MatchString(trimmed):
		return json.RawMessage(trimmed), nil
	case k.Path == "redirect.outbound.excludePortsForUIDs":
		list, err := tproxy.ParseUIDExclusions(text)
		if err != nil {
			return nil, err
		}
		entries := make([]string, len(list))
		for i, e := range list {
			entries[i] = e.String()
		}
		return json.Marshal(entries)
	}
	return json.Marshal(text)
}

// nearestEnv is the known variable that is most like an unknown one.
func nearestEnv(name string) string {
	best, least := "", -1
	for _, known := range sortedEnvNames() {
		if d := distance(name, known); least < 0 || d < least {
			best, least = known, d
		}
	}
	return best
}

func sortedEnvNames() []string {
	var out []string
	for name := range envKeys {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// distance is Levenshtein's: how many bytes to insert, delete or replace to make
// one string of the other. Only the first ones count: a name has any length.
func distance(a, b string) int {
	a = a[:min(len(a), 100)]
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
