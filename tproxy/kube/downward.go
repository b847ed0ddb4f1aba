package kube

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// ParseDownwardAPI reads the annotations of a pod as a volume of the downward API has
// them (fieldRef metadata.annotations): a line key="value" each, with the value quoted
// as by Go (pkg/fieldpath of Kubernetes, FormatMap). The name of the file is for
// messages.
//
// The error is a *tproxy.ConfigError with every line that is none, or that says again
// what another one says, as name:line in Source.
func ParseDownwardAPI(name string, text []byte) (map[string]string, error) {
	const accepted = `lines of the downward API, key="value"`
	out := map[string]string{}
	var faults []tproxy.ConfigFault
	n := 0
	for line := range strings.SplitSeq(string(text), "\n") {
		n++
		if strings.TrimSpace(line) == "" {
			continue
		}
		fault := func(what string) {
			faults = append(faults, tproxy.ConfigFault{Source: fmt.Sprintf("%s:%d", name, n), Value: short(line), What: what, Accepted: accepted})
		}
		key, quoted, ok := strings.Cut(line, "=")
		value, err := strconv.Unquote(quoted)
		switch _, again := out[key]; {
		case !ok || key == "" || err != nil || quoted[0] != '"':
			fault("is no annotation")
		case again:
			fault("is there twice")
		default:
			out[key] = value
		}
		if len(faults) == mostFaults {
			break // a file of another kind
		}
	}
	if faults != nil {
		return nil, &tproxy.ConfigError{Faults: faults}
	}
	return out, nil
}
