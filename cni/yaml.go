package cni

import (
	"encoding/json"
	"fmt"

	"go.yaml.in/yaml/v3"
)

// maxYAML bounds a document with its aliases followed, in bytes and values: a reference of
// three bytes can stand for as much as an annotation holds, and yaml.v3 bounds the number
// of values alone.
const maxYAML = 4 * MaxAnnotations

// jsonOf makes JSON of YAML, in which Kuma's injector writes a configuration. JSON is
// taken as it is.
func jsonOf(text []byte) ([]byte, error) {
	if json.Valid(text) {
		return text, nil
	}
	var node yaml.Node
	if err := yaml.Unmarshal(text, &node); err != nil {
		return nil, err
	}
	if left := maxYAML; !within(&node, &left) {
		return nil, fmt.Errorf("yaml: more than %d bytes with its aliases followed", maxYAML)
	}
	var v any
	if err := node.Decode(&v); err != nil {
		return nil, err
	}
	out, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("yaml: a key that is no text: %w", err)
	}
	return out, nil
}

// within reports whether a node and what it refers to stay within left, which it takes
// from; one that refers to itself does not.
func within(n *yaml.Node, left *int) bool {
	if *left -= 1 + len(n.Value); *left < 0 {
		return false
	}
	if n.Alias != nil {
		return within(n.Alias, left)
	}
	for _, c := range n.Content {
		if !within(c, left) {
			return false
		}
	}
	return true
}
