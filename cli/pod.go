package cli

import (
	"bytes"
	"errors"
	"os"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/kube"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// podAnnotations is the flag that makes a pod of this run.
const podAnnotations = "pod-annotations"

// pod reads the pod's annotations over c, which files and the environment have given,
// over the control plane's settings. It returns the inbound ports that a flag of the
// injector's must not redirect again: it is read after them.
func (p *parser) pod(c *tproxy.Config) (excluded rules.Ports) {
	if !p.given(podAnnotations) || p.notLoaded {
		return rules.Ports{}
	}
	file := p.text(podAnnotations)
	annotations := p.annotations(file)
	settings, err := kube.ReadSettings(environment(os.Environ()))
	if p.podFaults("", err); annotations == nil || err != nil {
		return rules.Ports{}
	}
	p.injectors(c)
	if settings, err = settings.WithConfig(*c, p.from); p.podFaults("", err) {
		return rules.Ports{}
	}
	if p.given("exclude-inbound-ports") {
		settings.Always = p.ports("exclude-inbound-ports")
	}
	settings.Decode = jsonOf
	if p.given("config") { // which the injector mounts, the pod's own ConfigMap too
		delete(annotations, kube.KeyConfig)
		delete(annotations, kube.KeyConfigMap)
	}
	result, err := kube.Configure(annotations, settings)
	if p.podFaults(file, err) {
		return rules.Ports{}
	}
	for _, x := range result.Conflicts {
		p.note(x.String())
	}
	for _, w := range result.Warnings {
		p.note(w.String())
	}
	if result.Ignored != nil {
		p.note("annotations that do not steer traffic: " + strings.Join(result.Ignored, ", "))
	}
	for path, src := range result.Sources {
		p.from[path] = src.Name
	}
	*c = result.Config
	return c.Inbound.ExcludePorts
}

// injectors reads who the proxy is from the flags: the command line is the injector's,
// and an annotation that says another is a conflict with it.
func (p *parser) injectors(c *tproxy.Config) {
	set(p, "kuma-dp-user", c, func(name string) tproxy.Config {
		named := *c
		named.ProxyUIDs, named.ProxyUser = nil, p.text(name)
		return named
	})
	set(p, "redirect-inbound-port", &c.Inbound.Port, p.port)
	set(p, "redirect-outbound-port", &c.Outbound.Port, p.port)
	set(p, "redirect-dns-port", &c.DNS.Port, p.port)
	for path, flag := range flagNames() {
		switch flag {
		case "kuma-dp-user", "redirect-inbound-port", "redirect-outbound-port", "redirect-dns-port":
			if p.given(flag) {
				p.from[path] = "--" + flag
			}
		}
	}
}

// podModes adds the keys of which a pod says itself whether it wants what is not
// supported yet: what files say of them does not count then.
func (p *parser) podModes(to map[string]leaf) {
	if !p.given(podAnnotations) {
		return
	}
	annotations := p.annotations(p.text(podAnnotations))
	for name, path := range map[string]string{kube.KeyDropInvalid: "dropInvalidPackets", kube.KeyLogs: "log.enabled"} {
		if _, ok := annotations[name]; ok {
			to[path] = leaf{}
		}
	}
}

// annotations reads the file of the downward API; nil where it cannot be.
func (p *parser) annotations(file string) map[string]string {
	r := &sourceReader{}
	r.file(file)
	for _, f := range r.faults {
		f.Path, f.Accepted = "--"+podAnnotations, "a file of the downward API, with the pod's annotations"
		p.fault(f.String())
	}
	if r.faults != nil {
		return nil
	}
	out, err := kube.ParseDownwardAPI(file, r.sources[0].Text)
	p.podFaults("", err)
	return out
}

// podFaults notes the faults of an error, with the file that annotations stand in, and
// reports whether there are any.
func (p *parser) podFaults(file string, err error) bool {
	e, ok := errors.AsType[*tproxy.ConfigError](err)
	if !ok && err != nil {
		p.fault(err.Error())
	}
	if ok {
		for _, f := range e.Faults {
			if file != "" && strings.Contains(f.Source, "kuma.io/") {
				f.Source = file + ": " + f.Source
			}
			p.fault(f.String())
		}
	}
	return err != nil
}

// environment makes a map of what os.Environ returns.
func environment(environ []string) map[string]string {
	out := map[string]string{}
	for _, e := range environ {
		name, v, _ := strings.Cut(e, "=")
		out[name] = v
	}
	return out
}

// jsonOf makes JSON of a document of YAML or JSON.
func jsonOf(text []byte) ([]byte, error) {
	v, faults := document("line", text)
	if faults != nil {
		return nil, errors.New(faults[0].String())
	}
	if v == nil {
		return nil, nil
	}
	var b bytes.Buffer
	v.encode(&b, "", booleans)
	return b.Bytes(), nil
}
