package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

// fakeRunner is a pod's namespace.
type fakeRunner struct {
	seen                             tproxy.Host
	stands                           exec.Status
	probeErr, applyErr, removeErr    error
	applied                          []*tproxy.Plan
	probes, applies, removes, checks int
	inside                           bool
	lockFile                         string
}

func (r *fakeRunner) look(n *int) error {
	*n++
	if !r.inside {
		return errors.New("not in the pod's namespace")
	}
	return nil
}

func (r *fakeRunner) Probe(_ context.Context, n tproxy.Needs) (tproxy.Host, error) {
	r.probes++
	return r.seen, r.probeErr
}

func (r *fakeRunner) Apply(_ context.Context, p *tproxy.Plan) (*exec.Report, error) {
	if err := errors.Join(r.look(&r.applies), r.applyErr); err != nil {
		return nil, err
	}
	r.applied = append(r.applied, p)
	return &exec.Report{Changed: true, Backend: p.Backend}, nil
}

func (r *fakeRunner) Remove(context.Context, exec.RemoveOptions) (*exec.Report, error) {
	if err := errors.Join(r.look(&r.removes), r.removeErr); err != nil {
		return nil, err
	}
	return &exec.Report{Changed: true}, nil
}

func (r *fakeRunner) Status(context.Context) (*exec.Status, error) {
	return &r.stands, r.look(&r.checks)
}

func (r *fakeRunner) work() int { return r.probes + r.applies + r.removes + r.checks }

// world is a plugin over a fake namespace.
type world struct {
	*testing.T
	*fakeRunner
	Plugin
	out, log bytes.Buffer
	entered  []string
	enterErr error
	own      bool
}

func newWorld(t testing.TB) *world {
	w := &world{fakeRunner: &fakeRunner{seen: tproxy.Host{Variants: []tproxy.Variant{{Backend: tproxy.IPTablesNFT,
		IPv4: tproxy.Programs{Save: "/s4", Restore: "/r4"}, IPv6: tproxy.Programs{Save: "/s6", Restore: "/r6"}}}}}}
	w.T, _ = t.(*testing.T)
	w.Plugin = Plugin{
		Runner: func(_ *slog.Logger, lockFile string) Runner { w.lockFile = lockFile; return w.fakeRunner },
		Stdout: &w.out, Stderr: &w.log,
		enter: func(path string, f func() error) (bool, error) {
			w.entered = append(w.entered, path)
			if w.own || w.enterErr != nil {
				return w.own, w.enterErr
			}
			w.inside = true
			defer func() { w.inside = false }()
			return false, f()
		},
	}
	return w
}

// previous has what this library does not know, in an order that is not ours.
const previous = `{ "cniVersion":"1.0.0", "zebra": [1, 2],"interfaces":[{"name":"eth0","sandbox":"/x"}], "ips":[{"address":"10.0.0.2/24"}]}`

// entry is the plugin's entry as a runtime hands it over: more is put in, a value of nil
// takes out.
func entry(more map[string]any) []byte {
	e := map[string]any{"cniVersion": "1.0.0", "name": "n1", "type": "kuma-cni", "prevResult": json.RawMessage(previous),
		"capabilities":  map[string]bool{AnnotationsCapability: true},
		"runtimeConfig": map[string]any{AnnotationsCapability: injected()}}
	for k, v := range more {
		if e[k] = v; v == nil {
			delete(e, k)
		}
	}
	text, err := json.Marshal(e)
	if err != nil {
		panic(err)
	}
	// Marshal makes a raw message compact: it is to stay as it came.
	var compact bytes.Buffer
	if json.Compact(&compact, []byte(previous)) == nil {
		text = bytes.Replace(text, compact.Bytes(), []byte(previous), 1)
	}
	return text
}

// injected are the annotations of a pod with a sidecar, and more: key, value, ...
func injected(more ...string) map[string]string {
	a := map[string]string{"kuma.io/sidecar-injected": "true"}
	for i := 0; i < len(more); i += 2 {
		a[more[i]] = more[i+1]
	}
	return a
}

func runtimeConfig(annotations any) map[string]any {
	return map[string]any{"runtimeConfig": map[string]any{AnnotationsCapability: annotations}}
}

func args(stdin []byte) *skel.CmdArgs {
	return &skel.CmdArgs{ContainerID: "c1", Netns: "/run/netns/pod", IfName: "eth0", StdinData: stdin,
		Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME=web;K8S_POD_UID=u1;K8S_POD_INFRA_CONTAINER_ID=c1"}
}

// source is an embedder's.
type source struct {
	d     *Description
	err   error
	asked []Pod
}

func (s *source) Name() string { return "the test's source" }
func (s *source) Describe(_ context.Context, p Pod) (*Description, error) {
	s.asked = append(s.asked, p)
	return s.d, s.err
}

// cniError is the error as a runtime gets it.
func cniError(t *testing.T, err error) *types.Error {
	t.Helper()
	e, ok := errors.AsType[*types.Error](err)
	if !ok {
		t.Fatalf("%v is no *types.Error", err)
	}
	return e
}

func drift(what string) []tproxy.Drift {
	return []tproxy.Drift{{Kind: tproxy.DriftChanged, Is: what, Why: fmt.Sprintf("test of %s", what)}}
}
