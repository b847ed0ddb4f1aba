package cni

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// Source says what a pod is where the runtime does not: one that asks the API server,
// for example. It is asked only if neither the runtime, CNI_ARGS nor the network
// configuration has annotations.
type Source interface {
	// Name is for messages.
	Name() string
	// Describe describes a pod; nil if it does not know. The context ends when the
	// plugin is told to.
	Describe(context.Context, Pod) (*Description, error)
}

// Description is what a Source knows of a pod.
type Description struct {
	Annotations map[string]string
	// InitContainers are the names of the pod's init containers: with kuma-init among
	// them the plugin leaves the pod alone.
	InitContainers []string
	// HostNetwork is whether the pod has no network namespace of its own.
	HostNetwork bool
}

// InitContainer is the container of Kuma's injector that installs the rules where no
// plugin does.
const InitContainer = "kuma-init"

// AnnotationsArg is the key of CNI_ARGS that holds annotations: an object of JSON, or one
// in base64 without padding, which passes other plugins of the list and may hold ; and =.
const AnnotationsArg = "KUMA_POD_ANNOTATIONS"

// MaxAnnotations is how many bytes the annotations under kuma.io/ of a pod may have, keys
// and values together: that of all annotations in Kubernetes
// (TotalAnnotationSizeLimitB, apimachinery/pkg/api/validation/objectmeta.go).
const MaxAnnotations = 256 << 10

// Pod is whom a command is about, as far as the runtime says.
type Pod struct {
	Namespace, Name, UID string // of Kubernetes; empty elsewhere
	ContainerID          string
	NetNS                string // the path of the network namespace
	IfName               string
}

// String is namespace/name where the runtime says it.
func (p Pod) String() string {
	if p.Name == "" {
		return "container " + p.ContainerID
	}
	return "pod " + p.Namespace + "/" + p.Name
}

// arguments takes CNI_ARGS apart: pairs of key=value with ; between them (SPEC.md,
// section "Parameters").
func arguments(text string) map[string]string {
	out := map[string]string{}
	for pair := range strings.SplitSeq(text, ";") {
		if k, v, ok := strings.Cut(pair, "="); ok {
			out[k] = v
		}
	}
	return out
}

// described is a Description, and who says so.
type described struct {
	Description
	by string
}

// sources are those that say something, in their order, but for the embedder's.
func (c *conf) sources(args map[string]string) (out []described, err error) {
	if raw, ok := c.RuntimeConfig[AnnotationsCapability]; ok {
		d := described{by: "runtimeConfig"}
		if err := json.Unmarshal(raw, &d.Annotations); err != nil {
			return nil, failed(types.ErrDecodingFailure, "runtimeConfig "+AnnotationsCapability+" cannot be read", err)
		}
		out = append(out, d)
	}
	if text := args[AnnotationsArg]; text != "" {
		d := described{by: "CNI_ARGS"}
		raw := []byte(text)
		if !strings.HasPrefix(text, "{") {
			if raw, err = base64.RawStdEncoding.DecodeString(text); err != nil {
				raw, err = base64.RawURLEncoding.DecodeString(text)
			}
		}
		if err == nil {
			err = json.Unmarshal(raw, &d.Annotations)
		}
		if err != nil {
			return nil, failed(types.ErrInvalidEnvironmentVariables, AnnotationsArg+" in CNI_ARGS cannot be read",
				fmt.Errorf("%w: accepted is an object of JSON, or one in base64 without padding", err))
		}
		out = append(out, d)
	}
	if c.Annotations != nil {
		out = append(out, described{by: "annotations in the network configuration", Description: Description{Annotations: c.Annotations}})
	}
	return out, nil
}

// describe says what the pod is: as the first source does, which no other one may
// contradict. It is nil where nobody says.
func (p *Plugin) describe(ctx context.Context, c *conf, pod Pod, args map[string]string) (*described, error) {
	all, err := c.sources(args)
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		if p.Source == nil {
			return nil, nil
		}
		d, err := p.Source.Describe(ctx, pod)
		if err != nil {
			return nil, failed(ErrNoAnnotations, p.Source.Name()+" does not say what the pod's annotations are", err)
		}
		if d == nil {
			return nil, nil
		}
		all = append(all, described{*d, p.Source.Name()})
	}
	if err := contradictions(all); err != nil {
		return nil, err
	}
	return &all[0], bounded(all[0])
}

// steers reports whether an annotation is one of Kuma's.
func steers(key string) bool {
	domain, _, _ := strings.Cut(key, "/")
	return domain == "kuma.io" || strings.HasSuffix(domain, ".kuma.io")
}

// contradictions names the annotations of which two sources say different things.
func contradictions(all []described) error {
	var faults []string
	for i, a := range all {
		for _, b := range all[i+1:] {
			for _, k := range slices.Sorted(maps.Keys(b.Annotations)) {
				if v, ok := a.Annotations[k]; ok && steers(k) && v != b.Annotations[k] {
					faults = append(faults, fmt.Sprintf("annotation %s is %q by %s and %q by %s: accepted is one of them", k, short(v), a.by, short(b.Annotations[k]), b.by))
				}
			}
		}
	}
	if faults == nil {
		return nil
	}
	return failed(ErrContradiction, "two sources contradict each other", fmt.Errorf("%s", strings.Join(faults, "\n")))
}

// bounded refuses more than Kubernetes itself takes.
func bounded(d described) error {
	total, most := 0, ""
	for k, v := range d.Annotations {
		if !steers(k) {
			continue
		}
		total += len(k) + len(v)
		if m, ok := d.Annotations[most]; !ok || len(v) > len(m) || len(v) == len(m) && k < most {
			most = k
		}
	}
	if total <= MaxAnnotations {
		return nil
	}
	return failed(ErrAnnotations, "the annotations are too large",
		fmt.Errorf("annotation %s has %d bytes, and all under kuma.io/ have %d: accepted are %d", most, len(d.Annotations[most]), total, MaxAnnotations))
}

// short is a value as it stands in an error.
func short(s string) string {
	const most = 120
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}
