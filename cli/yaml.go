package cli

import (
	"bytes"
	"encoding/json"
	"strings"

	"go.yaml.in/yaml/v3"
)

// yamlOf writes a document of JSON as YAML: the same keys in the same order, and
// a text of several lines as it is.
func yamlOf(text []byte) ([]byte, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	n, err := yamlNode(d)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(n); err != nil {
		return nil, err
	}
	return b.Bytes(), e.Close()
}

func yamlNode(d *json.Decoder) (*yaml.Node, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	n := &yaml.Node{Kind: yaml.MappingNode}
	switch t := token.(type) {
	case json.Delim:
		if t == '[' {
			n.Kind = yaml.SequenceNode
		}
		for d.More() {
			item, err := yamlNode(d)
			if err != nil {
				return nil, err
			}
			n.Content = append(n.Content, item)
		}
		if n.Content == nil {
			n.Style = yaml.FlowStyle // [] and {}
		}
		_, err = d.Token()
		return n, err
	case json.Number:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: t.String()}, nil
	case string:
		if strings.HasSuffix(t, "\n") && !strings.HasPrefix(t, " ") {
			return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: t, Style: yaml.LiteralStyle}, nil
		}
	}
	// Encode quotes what would be something else to a reader of YAML 1.1 or 1.2.
	scalar := new(yaml.Node)
	return scalar, scalar.Encode(token)
}
