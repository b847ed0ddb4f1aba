package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// Loader reads configurations as Kuma's users have them: files of YAML or JSON, and
// the environment. The zero Loader is strict and has no environment.
//
// For each key the environment wins over all files, and a later file over an earlier
// one; a list takes the place of the list before it.
type Loader struct {
	// AllowUnknown makes a warning of a key that is not known, where a
	// configuration can be newer than its reader.
	AllowUnknown bool
	// Environ is the environment, as os.Environ returns it. Of it, the variables
	// are read whose names begin with KUMA_TRANSPARENT_PROXY_; an empty one counts
	// as not set.
	Environ []string
	// Stdin is what "-" stands for.
	Stdin io.Reader

	base map[string]leaf // below all files
}

// Source is a text of YAML or JSON.
type Source struct {
	Name string // for messages: a file's, or that of a ConfigMap and its key
	Text []byte
}

// Loaded is what a Loader has read.
type Loaded struct {
	Config   tproxy.Config
	Settings tproxy.Settings
	// From says where each key that was given came from: a file with its line, such
	// as config.yaml:12, or the name of a variable.
	From map[string]string
	// Warnings are what has no effect: keys that are not known, with AllowUnknown;
	// variables that are not; redirect.dns.captureAll without redirect.dns.enabled.
	Warnings []tproxy.ConfigFault
}

// Load reads what the values name, each a value of --config: a path, several with
// commas between them, "-" for Stdin, or a text that begins with { or holds ": " or
// several lines. A file whose very name holds a comma is taken whole.
//
// The error is a *tproxy.ConfigError with every fault, each with its source; with an
// error nothing is loaded. What holds between several keys, Config.Validate says.
func (l Loader) Load(values ...string) (*Loaded, error) {
	s, faults := l.sources(values)
	return l.load(s, faults, nil)
}

// LoadSources is Load for texts that were read already.
func (l Loader) LoadSources(sources ...Source) (*Loaded, error) {
	return l.load(sources, nil, nil)
}

// leaf is the value of a key, and where it came from.
type leaf struct {
	json  json.RawMessage
	from  string
	layer int
}

// loading is one Load. Layers are the sources, and behind them the environment.
type loading struct {
	unknown  bool // whether keys may be
	layer    int
	leaves   map[string]leaf
	faults   []layered
	warnings []tproxy.ConfigFault
}

// layered is a fault of a value of a layer. One of a value whose feature is not
// built yet is none where a later layer has another value.
type layered struct {
	tproxy.ConfigFault
	key   string
	layer int
}

// load reads the sources and the environment. Keys in over have a value elsewhere,
// which wins; one without is at its default.
func (l Loader) load(sources []Source, faults []tproxy.ConfigFault, over map[string]leaf) (*Loaded, error) {
	g := &loading{unknown: l.AllowUnknown, leaves: map[string]leaf{}}
	maps.Copy(g.leaves, l.base)
	for _, s := range sources {
		g.layer++
		g.source(s)
	}
	g.layer++
	g.environment(l.Environ)
	g.layer++
	for path, v := range over {
		v.layer = g.layer
		g.leaves[path] = v
	}
	for _, f := range g.faults {
		if !f.NotYet || g.leaves[f.key].layer <= f.layer {
			faults = append(faults, f.ConfigFault)
		}
	}
	if faults != nil {
		return nil, &tproxy.ConfigError{Faults: faults}
	}
	g.persistence()
	out := &Loaded{From: map[string]string{}}
	for path, v := range g.leaves {
		if v.json == nil {
			delete(g.leaves, path)
			continue
		}
		out.From[path] = v.from
	}
	d, err := tproxy.Decoder{}.Decode(nested(g.leaves), &out.Config)
	if e, ok := errors.AsType[*tproxy.ConfigError](err); ok { // each was accepted, and they contradict
		return nil, &tproxy.ConfigError{Faults: located(e.Faults, out.From)}
	} else if err != nil {
		return nil, err
	}
	out.Settings = d.Settings
	out.Warnings = append(g.warnings, located(d.Warnings, out.From)...)
	return out, nil
}

// persistence leaves one of two keys for one setting, where they are of two layers: what
// a file says takes the place of what is installed, whichever word it has for it. A false
// storeFirewalld says nothing.
func (g *loading) persistence() {
	ours, kumas := g.leaves["persist"], g.leaves["storeFirewalld"]
	switch {
	case ours.json == nil || string(kumas.json) != "true":
	case ours.layer > kumas.layer:
		delete(g.leaves, "storeFirewalld")
	case ours.layer < kumas.layer:
		delete(g.leaves, "persist")
	}
}

// located gives faults their sources.
func located(faults []tproxy.ConfigFault, from map[string]string) []tproxy.ConfigFault {
	for i := range faults {
		faults[i].Source = from[faults[i].Path]
	}
	return faults
}

func (g *loading) fault(f tproxy.ConfigFault, key string) {
	g.faults = append(g.faults, layered{f, key, g.layer})
}

// source reads a text.
func (g *loading) source(s Source) {
	v, faults := document(s.Name, s.Text)
	for _, f := range faults {
		g.fault(f, f.Path)
	}
	if v == nil {
		return
	}
	places := map[string]member{}
	v.lines("", places)
	at := func(path, value string) string {
		m, ok := places[path]
		switch {
		case ok:
			return fmt.Sprintf("%s:%d", s.Name, m.lineOf(value))
		case path == "" || path == ".":
			return fmt.Sprintf("%s:%d", s.Name, v.line)
		}
		return s.Name
	}
	var b bytes.Buffer
	v.encode(&b, "", booleans)
	var scratch tproxy.Config
	d, err := tproxy.Decoder{AllowUnknown: g.unknown}.Decode(b.Bytes(), &scratch)
	if e, ok := errors.AsType[*tproxy.ConfigError](err); ok {
		for _, f := range e.Faults {
			key := f.Path
			if f.Source = at(key, f.Value); key == "." {
				f.Path = ""
			}
			g.fault(f, key)
		}
	} else if err != nil {
		g.fault(tproxy.ConfigFault{Source: s.Name, Value: short(b.String()), What: "is no JSON (" + err.Error() + ")", Accepted: "YAML or JSON"}, "")
	}
	for _, w := range d.Warnings {
		if _, known := keyKinds[w.Path]; !known { // others are about all layers
			w.Source = at(w.Path, w.Value)
			g.warnings = append(g.warnings, w)
		}
	}
	for path, m := range places {
		if _, known := keyKinds[path]; known && string(m.value.json) != "null" {
			var b bytes.Buffer
			m.value.encode(&b, path, booleans)
			g.leaves[path] = leaf{b.Bytes(), fmt.Sprintf("%s:%d", s.Name, m.lineOf("")), g.layer}
		}
	}
}

// keyKinds are the kinds of the values by the paths of the keys, booleans the
// paths of those that are true or false.
var keyKinds, booleans = func() (map[string]tproxy.Kind, map[string]bool) {
	kinds, switches := map[string]tproxy.Kind{}, map[string]bool{}
	for _, k := range tproxy.Keys() {
		kinds[k.Path] = k.Kind
		switches[k.Path] = k.Kind == tproxy.Boolean
	}
	return kinds, switches
}()

// nested makes one text of values of keys.
func nested(leaves map[string]leaf) []byte {
	root := map[string]any{}
	for path, v := range leaves {
		object := root
		names := strings.Split(path, ".")
		for _, name := range names[:len(names)-1] {
			inner, ok := object[name].(map[string]any)
			if !ok {
				inner = map[string]any{}
				object[name] = inner
			}
			object = inner
		}
		object[names[len(names)-1]] = v.json
	}
	text, _ := json.Marshal(root) // it came from JSON
	return text
}
