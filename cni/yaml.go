package cni

import (
	"encoding/json"
	"fmt"

	"go.yaml.in/yaml/v3"
)

// jsonOf makes JSON of YAML, in which Kuma's injector writes a configuration. JSON is
// taken as it is.
func jsonOf(text []byte) ([]byte, error) {
	if json.Valid(text) {
		return text, nil
	}
	var v any
	if err := yaml.Unmarshal(text, &v); err != nil {
		return nil, err
	}
	out, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("yaml: a key that is no text: %w", err)
	}
	return out, nil
}
