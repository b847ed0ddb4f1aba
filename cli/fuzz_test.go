package cli_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/cli"
	"github.com/kumahq/kuma-tproxy/tproxy"
)

// FuzzLoad gives the loader any text, as a file and as the value of a variable. It
// must end soon, say of each fault where it is and what is accepted, and read back
// what is written of what it loaded.
func FuzzLoad(f *testing.F) {
	f.Add(helmYAML, "REDIRECT_INBOUND_PORT", "15006")
	for _, test := range badTexts {
		if len(test.text) < 4096 {
			f.Add(test.text, "WAIT", "x")
		}
	}
	for path, v := range values {
		f.Add(document(path, v.a), strings.TrimPrefix(envOf[path], prefix), strings.Trim(v.b, `"[]`))
	}
	for _, text := range []string{
		"redirect:\n  inbound: &d {port: 1, excludePorts: [80]}\n  outbound:\n    <<: [{port: 2}, *d]\n",
		"cniMode: yes", "%YAML 1.1\n---\nwait: 7\n...\n", "wait: >-\n  7\n", "? {a: 1}\n: 2\n", "!!map {wait: !!int 7}", "\ufeff{}", "a: &a\n- *a\n",
	} {
		f.Add(text, "REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS", "22:1000,1001")
	}
	f.Fuzz(func(t *testing.T, text, name, v string) {
		start := time.Now()
		l, err := cli.Loader{Environ: []string{prefix + name + "=" + v}, AllowUnknown: len(text)%2 == 0}.
			LoadSources(cli.Source{Name: "c", Text: []byte(text)})
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("took %s", took)
		}
		if err != nil {
			e, ok := errors.AsType[*tproxy.ConfigError](err)
			if !ok || l != nil || len(e.Faults) == 0 {
				t.Fatalf("%v, %+v", err, l)
			}
			sayAll(t, e.Faults)
			return
		}
		sayAll(t, l.Warnings)
		again, err := json.Marshal(l.Config)
		if err != nil {
			// Only what holds between several keys is left to Validate.
			if !strings.Contains(err.Error(), "a port of the proxy for each") {
				t.Fatal(err)
			}
			return
		}
		for _, text := range [][]byte{again, yamlText(t, again)} {
			m, err := cli.Loader{}.LoadSources(cli.Source{Name: "again", Text: text})
			if err != nil || canonicalIfKnown(m.Config) != canonicalIfKnown(l.Config) {
				t.Fatalf("%s: %v\n%#v\n%#v", text, err, l.Config, m)
			}
		}
	})
}

func sayAll(t *testing.T, faults []tproxy.ConfigFault) {
	t.Helper()
	for _, f := range faults {
		if f.Source == "" || f.What == "" || f.Accepted == "" || strings.Contains(f.String(), "\n") || len(f.String()) > 2000 {
			t.Fatalf("%+v", f)
		}
	}
}

// canonicalIfKnown does not ask who the user is.
func canonicalIfKnown(c tproxy.Config) string {
	user := c.ProxyUser
	c.ProxyUser = ""
	p, err := tproxy.Build(c, tproxy.Host{})
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s %#v", user, p.Config)
}
