package tproxy_test

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// In Kuma's file DNS is redirected where it is enabled, and captureAll says how:
// Helm's values have captureAll true for whoever switches DNS off.
func TestDNSIsOnWhereItIsEnabled(t *testing.T) {
	var (
		off  tproxy.DNS
		some = tproxy.DNS{Redirect: true}
		all  = tproxy.DNS{Redirect: true, CaptureAll: true}
	)
	for _, test := range []struct {
		before tproxy.DNS
		text   string
		want   tproxy.DNS
		warns  bool
	}{
		{off, `{}`, off, false},
		{off, `{"enabled":true}`, some, false},
		{off, `{"captureAll":true}`, off, true},
		{off, `{"enabled":false,"captureAll":true}`, off, true},
		{off, `{"enabled":true,"captureAll":true}`, all, false},
		{some, `{"captureAll":true}`, all, false},
		{all, `{"captureAll":false}`, some, false},
		{all, `{"enabled":false}`, off, true},
		// What a program writes down, that both mean the same to.
		{tproxy.DNS{CaptureAll: true}, `{}`, tproxy.DNS{CaptureAll: true}, false},
		{tproxy.DNS{CaptureAll: true}, `{"enabled":true}`, tproxy.DNS{CaptureAll: true}, false},
		{tproxy.DNS{CaptureAll: true}, `{"captureAll":false}`, some, false},
		{tproxy.DNS{CaptureAll: true}, `{"enabled":false}`, off, true},
	} {
		c := tproxy.Config{DNS: test.before}
		d, err := tproxy.Decoder{}.Decode([]byte(`{"redirect":{"dns":`+test.text+`}}`), &c)
		if err != nil || c.DNS != test.want || (len(d.Warnings) > 0) != test.warns {
			t.Errorf("%s over %+v: %+v, %v, %v; want %+v", test.text, test.before, c.DNS, d.Warnings, err, test.want)
		}
		for _, w := range d.Warnings {
			if got, want := w.String(), `redirect.dns.captureAll: "true" has no effect, as in Kuma: DNS is not redirected: accepted is redirect.dns.enabled, true, beside it`; got != want {
				t.Errorf("%s", got)
			}
		}
	}
}

func TestDecoderReturnsSettings(t *testing.T) {
	const text = `{"dryRun":true,"verbose":true,"wait":7}`
	var c tproxy.Config
	d, err := tproxy.Decoder{}.Decode([]byte(text), &c)
	if want := (tproxy.Settings{DryRun: true, Verbose: true}); err != nil || d.Settings != want || d.Warnings != nil || c.Wait != 7*time.Second {
		t.Errorf("%+v, %+v, %v", d, c, err)
	}
	// A Config has no place for them: to pass over dryRun would be to write.
	c = tproxy.Config{}
	e, ok := errors.AsType[*tproxy.ConfigError](json.Unmarshal([]byte(text), &c))
	if !ok || len(e.Faults) != 2 || c.Wait != 0 {
		t.Errorf("%+v, %v", c, e)
	}
	if _, err := (tproxy.Decoder{}).Decode([]byte(`{"dryRun":"true","verbose":1}`), &c); err == nil || strings.Count(err.Error(), "is no boolean") != 2 {
		t.Error(err)
	}
}

func TestDecoderAllowUnknown(t *testing.T) {
	text := []byte(`{"redirect":{"inbound":{"exludePorts":[1],"excludePorts":[2]},"newer":{"wait":1}},"wait":7}`)
	var c tproxy.Config
	if _, err := (tproxy.Decoder{}).Decode(text, &c); err == nil || c.Wait != 0 {
		t.Errorf("%v, %+v", err, c)
	}
	d, err := tproxy.Decoder{AllowUnknown: true}.Decode(text, &c)
	if err != nil || c.Wait != 7*time.Second || c.Inbound.ExcludePorts.String() != "2" {
		t.Errorf("%v, %+v", err, c)
	}
	var got []string
	for _, w := range d.Warnings {
		got = append(got, w.String())
	}
	if want := []string{
		`redirect.inbound.exludePorts: "exludePorts" is no key of the configuration: accepted is redirect.inbound.excludePorts, the nearest one`,
		`redirect.newer: "newer" is no key of the configuration: accepted is redirect.vnet, the nearest one`,
	}; !slices.Equal(got, want) {
		t.Error(cmp.Diff(want, got))
	}
	// It is about keys alone.
	for _, text := range []string{`{"newer":1,"wait":"x"}`, `{"newer":1,"dropInvalidPackets":true}`, `{"newer":`, `{"wait":1,"wait":1}`} {
		before := c
		d, err := tproxy.Decoder{AllowUnknown: true}.Decode([]byte(text), &c)
		if err == nil || d.Warnings != nil || c.Wait != before.Wait {
			t.Errorf("%s: %+v, %v", text, d, err)
		}
	}
}

// A fault says whether its value only comes too early.
func TestFaultsNotYet(t *testing.T) {
	for text, want := range map[string]bool{
		`{"dropInvalidPackets":true}`:                                true,
		`{"storeFirewalld":true,"persist":"none"}`:                   false,
		`{"iptablesExecutables":"iptables:/x"}`:                      true,
		`{"redirect":{"inbound":{"excludePortsForUIDs":["1"]}}}`:     false,
		`{"ebpf":{"enabled":true}}`:                                  false,
		`{"wait":"5"}`:                                               false,
		`{"redirect":{"outbound":{"includePorts":"1,2"},"vnet":{}}}`: true,
	} {
		var c tproxy.Config
		e, ok := errors.AsType[*tproxy.ConfigError](json.Unmarshal([]byte(text), &c))
		if !ok || len(e.Faults) != 1 || e.Faults[0].NotYet != want {
			t.Errorf("%s: %+v", text, e)
		}
	}
}

func TestFaultNamesItsSource(t *testing.T) {
	for want, f := range map[string]tproxy.ConfigFault{
		`a.yaml:3: wait: "x" is no number: accepted is 5`: {Source: "a.yaml:3", Path: "wait", Value: "x", What: "is no number", Accepted: "5"},
		`a.yaml:3: "x" is no YAML: accepted is YAML`:      {Source: "a.yaml:3", Value: "x", What: "is no YAML", Accepted: "YAML"},
		`"a\nb:3": "k\t": "x" is no key: accepted is k`:   {Source: "a\nb:3", Path: "k\t", Value: "x", What: "is no key", Accepted: "k"},
		`wait: "x" is no number: accepted is 5`:           {Path: "wait", Value: "x", What: "is no number", Accepted: "5"},
	} {
		if got := f.String(); got != want {
			t.Errorf("%s\n%s", got, want)
		}
	}
}

// The default of each key is one: a text that gives it means what {} means.
func TestKeysDefaults(t *testing.T) {
	build := func(text string) string {
		var c tproxy.Config
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		p, err := tproxy.Build(c, tproxy.Host{})
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		out, err := json.Marshal(p.Config)
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	want := build(`{}`)
	if n := len(tproxy.Keys()); n < 40 {
		t.Errorf("%d keys", n)
	}
	for _, k := range tproxy.Keys() {
		text := k.Default
		for name := range strings.SplitSeq(reversed(k.Path), ".") {
			text = `{"` + name + `":` + text + `}`
		}
		if got := build(text); got != want {
			t.Errorf("%s:\n%s\n%s", text, got, want)
		}
		isList := strings.HasPrefix(k.Default, "[")
		isText := strings.HasPrefix(k.Default, `"`)
		isBoolean := k.Default == "true" || k.Default == "false"
		if isList != (k.Kind == tproxy.List) || isText != (k.Kind == tproxy.Text) || isBoolean != (k.Kind == tproxy.Boolean) {
			t.Errorf("%+v", k)
		}
	}
}

func reversed(path string) string {
	names := strings.Split(path, ".")
	slices.Reverse(names)
	return strings.Join(names, ".")
}

func TestParseUIDExclusions(t *testing.T) {
	const ambiguous = "can be read as one exclusion and as several: put ; between exclusions, and behind the only one"
	for _, test := range []struct {
		list string
		want string // the exclusions, with blanks between them, or the error
	}{
		{"", ""},
		{" ", ""},
		{"1001", "*:*:1001"},
		{"1001;", "*:*:1001"},
		{"1000-1100;udp:*:2000", "*:*:1000-1100 udp:*:2000"},
		{" tcp:22,80-90:1000-1005 ; *:*:1001,1002 ;", "tcp:22,80-90:1000-1005 *:*:1001-1002"},
		// One that holds commas; what stands between them is none.
		{"tcp:22,80-90:1000-1005", "tcp:22,80-90:1000-1005"},
		{"tcp,udp:53:1000", "*:53:1000"},
		// Several, which cannot be read as one.
		{"tcp:22:1000,udp:53:1001", "tcp:22:1000 udp:53:1001"},
		{"22:1000,23:1001", "*:22:1000 *:23:1001"},
		// Either, and it is the same.
		{"1001,1003", "*:*:1001,1003"},
		// Either, and it is not.
		{"80,443:1000", ambiguous},
		{"22:1000,1001", ambiguous},
		{"tcp:22:1000,1001", ambiguous},
		{"80,443:1000;", "*:80,443:1000"},
		{"80;443:1000", "*:*:80 *:443:1000"},
		{"x", `"x": "x": accepted is a number`},
		{";", `"": names no user`},
		{"1;;2", `"": names no user`},
		{"1;tcp:0:1;icmp:1:1", `"tcp:0:1": "0" is out of range`},
		{"1;tcp:0:1;icmp:1:1", `"icmp:1:1": protocol "icmp"`},
	} {
		list, err := tproxy.ParseUIDExclusions(test.list)
		var got []string
		for _, e := range list {
			got = append(got, e.String())
		}
		text := strings.Join(got, " ")
		if err != nil {
			text = err.Error()
		}
		if err == nil && text != test.want || err != nil && (test.want == "" || !strings.Contains(text, test.want) || list != nil) {
			t.Errorf("%q: %s; want %s", test.list, text, test.want)
		}
	}
}

func TestRetries(t *testing.T) {
	for _, test := range []struct {
		c     tproxy.Config
		most  int
		sleep time.Duration
	}{
		{tproxy.Config{}, 4, 2 * time.Second},
		{tproxy.Config{MaxRetries: 7, SleepBetweenRetries: time.Minute}, 7, time.Minute},
		{tproxy.Config{MaxRetries: -1, SleepBetweenRetries: -1}, 0, 0},
		// Who does not want to wait does not wait in between either, unless he says.
		{tproxy.Config{Wait: -1}, 0, 2 * time.Second},
		{tproxy.Config{Wait: -1, MaxRetries: 4}, 4, 2 * time.Second},
	} {
		most, sleep := test.c.Retries()
		if most != test.most || sleep != test.sleep {
			t.Errorf("%+v: %d, %s", test.c, most, sleep)
		}
		p, err := tproxy.Build(test.c, tproxy.Host{})
		if err != nil {
			t.Fatal(err)
		}
		if most, sleep := p.Config.Retries(); most != test.most || sleep != test.sleep {
			t.Errorf("%+v, of a plan: %d, %s", test.c, most, sleep)
		}
	}
}
