package tproxy_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

var compareJSON = cmp.Options{cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})}

// jsonPorts draws sets that are empty, of one port, or of ranges.
func jsonPorts() *rapid.Generator[rules.Ports] {
	return rapid.Custom(func(t *rapid.T) rules.Ports {
		var out rules.Ports
		for range rapid.IntRange(0, 4).Draw(t, "ranges") {
			first := rapid.Uint16Range(1, rules.MaxPort).Draw(t, "first")
			last := first
			if rapid.Bool().Draw(t, "range") {
				last = rapid.Uint16Range(first, rules.MaxPort).Draw(t, "last")
			}
			out = out.Union(rules.MustPorts(fmt.Sprintf("%d-%d", first, last)))
		}
		return out
	})
}

func jsonPrefixes() *rapid.Generator[[]netip.Prefix] {
	one := rapid.Custom(func(t *rapid.T) netip.Prefix {
		n := rapid.SampledFrom([]int{4, 16}).Draw(t, "length")
		a, _ := netip.AddrFromSlice(rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, "address"))
		return netip.PrefixFrom(a, rapid.IntRange(0, a.BitLen()).Draw(t, "bits")).Masked()
	})
	return rapid.Map(rapid.SliceOfN(one, 0, 3), emptyIsNil[netip.Prefix])
}

func emptyIsNil[T any](s []T) []T {
	if len(s) == 0 {
		return nil
	}
	return s
}

// jsonConfigs draws valid Configs of which JSON keeps everything.
func jsonConfigs() *rapid.Generator[tproxy.Config] {
	uid := rapid.Uint32Range(0, rules.MaxUID)
	exclusion := rapid.Custom(func(t *rapid.T) tproxy.UIDExclusion {
		return tproxy.UIDExclusion{
			Protocol: rapid.SampledFrom([]rules.Protocol{0, rules.TCP, rules.UDP}).Draw(t, "protocol"),
			Ports:    jsonPorts().Draw(t, "ports"),
			UIDs:     rules.UIDsOf(rapid.SliceOfN(uid, 1, 4).Draw(t, "UIDs")...),
		}
	})
	port := rapid.OneOf(rapid.Just(uint16(0)), rapid.Uint16())
	return rapid.Custom(func(t *rapid.T) tproxy.Config {
		c := tproxy.Config{
			ProxyUIDs:    emptyIsNil(rapid.SliceOfN(uid, 0, 3).Draw(t, "UIDs")),
			IPFamilyMode: rapid.SampledFrom([]tproxy.IPFamilyMode{tproxy.DualStack, tproxy.IPv4Only}).Draw(t, "mode"),
			Inbound: tproxy.Inbound{
				Off:          rapid.Bool().Draw(t, "inbound off"),
				Port:         port.Draw(t, "inbound port"),
				ExcludePorts: jsonPorts().Draw(t, "inbound ports"),
				ExcludeIPs:   jsonPrefixes().Draw(t, "inbound IPs"),
				CaptureSSH:   rapid.Bool().Draw(t, "SSH"),
			},
			Outbound: tproxy.Outbound{
				Off:                 rapid.Bool().Draw(t, "outbound off"),
				Port:                port.Draw(t, "outbound port"),
				ExcludePorts:        jsonPorts().Draw(t, "outbound ports"),
				ExcludePortsForUIDs: emptyIsNil(rapid.SliceOfN(exclusion, 0, 3).Draw(t, "exclusions")),
				ExcludeIPs:          jsonPrefixes().Draw(t, "outbound IPs"),
			},
			DNS: tproxy.DNS{
				Redirect:               rapid.Bool().Draw(t, "DNS"),
				CaptureAll:             rapid.Bool().Draw(t, "all DNS"),
				Port:                   port.Draw(t, "DNS port"),
				SkipConntrackZoneSplit: rapid.Bool().Draw(t, "no zones"),
				ResolvConf:             rapid.String().Draw(t, "path"),
				ControlPlane:           rapid.SampledFrom([]netip.Addr{{}, netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fe80::1%eth0")}).Draw(t, "control plane"),
				ModifyShared:           rapid.Bool().Draw(t, "shared"),
				RedirectTCP:            rapid.Bool().Draw(t, "DNS over TCP"),
			},
			Pod:             rapid.Bool().Draw(t, "pod"),
			DisableComments: rapid.Bool().Draw(t, "no comments"),
			Backend:         rapid.SampledFrom([]tproxy.Backend{tproxy.Auto, tproxy.IPTablesNFT, tproxy.IPTablesLegacy}).Draw(t, "backend"),
			Persist:         rapid.SampledFrom([]tproxy.Persist{tproxy.PersistAuto, tproxy.PersistSystemd, tproxy.PersistFirewalld, tproxy.PersistNone}).Draw(t, "persist"),
			Wait:            time.Duration(rapid.Int64Range(-1, 1<<31-1).Draw(t, "wait")) * time.Second,
			WaitInterval:    time.Duration(rapid.IntRange(0, 999999).Draw(t, "interval")) * time.Microsecond,
			MaxRetries:      rapid.IntRange(-1, 1000).Draw(t, "retries"),

			SleepBetweenRetries: time.Duration(rapid.Int64Range(-1, int64(time.Hour)).Draw(t, "sleep")),
		}
		// What means the same is read back as this.
		c.DNS.Redirect = c.DNS.On()
		if c.ProxyUIDs == nil && rapid.Bool().Draw(t, "named") {
			c.ProxyUser = rapid.StringMatching(`[a-z_][a-z0-9_-]{0,10}\$?`).Draw(t, "user")
		}
		return c
	}).Filter(func(c tproxy.Config) bool { return c.Validate() == nil }) // two ports can be the same
}

func TestJSONRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := jsonConfigs().Draw(t, "config")
		text, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		var got tproxy.Config
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatalf("%s\n%v", text, err)
		}
		if d := cmp.Diff(want, got, compareJSON); d != "" {
			t.Fatalf("%s\n%s", text, d)
		}
		again, err := json.Marshal(got)
		if err != nil || string(again) != string(text) {
			t.Fatalf("%s\n%s\n%v", text, again, err)
		}
	})
}

const zeroConfigJSON = `{"kumaDPUser":"","ipFamilyMode":"dualstack",` +
	`"redirect":{"inbound":{"enabled":true,"excludePorts":[],"excludePortsForIPs":[]},` +
	`"outbound":{"enabled":true,"excludePorts":[],"excludePortsForUIDs":[],"excludePortsForIPs":[]},` +
	`"dns":{"enabled":false,"captureAll":false,"skipConntrackZoneSplit":false}},` +
	`"waitInterval":0,"comments":{"disabled":false},"cniMode":false}`

func TestMarshalJSON(t *testing.T) {
	for _, test := range []struct {
		name   string
		config tproxy.Config
		want   string
	}{
		{"zero", tproxy.Config{}, zeroConfigJSON},
		{"full", tproxy.Config{
			ProxyUIDs:    []tproxy.UID{5678},
			IPFamilyMode: tproxy.IPv4Only,
			Inbound: tproxy.Inbound{Off: true, Port: 1, ExcludePorts: rules.MustPorts("80-90,22"),
				ExcludeIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, CaptureSSH: true},
			Outbound: tproxy.Outbound{Off: true, Port: 2, ExcludePorts: rules.MustPorts("443"),
				ExcludePortsForUIDs: []tproxy.UIDExclusion{{Protocol: rules.TCP, Ports: rules.MustPorts("22,80-90"), UIDs: rules.MustUIDs("1000-1005")}},
				ExcludeIPs:          []netip.Prefix{netip.MustParsePrefix("fd00::1/128")}},
			DNS:             tproxy.DNS{Redirect: true, CaptureAll: true, Port: 3, SkipConntrackZoneSplit: true, ResolvConf: "/x", ControlPlane: netip.MustParseAddr("fd00::9"), ModifyShared: true, RedirectTCP: true},
			Pod:             true,
			DisableComments: true,
			Backend:         tproxy.IPTablesLegacy,
			Wait:            7 * time.Second,
			WaitInterval:    8 * time.Microsecond,
			MaxRetries:      9,

			SleepBetweenRetries: 10 * time.Millisecond,
		}, `{"kumaDPUser":"5678","ipFamilyMode":"ipv4",` +
			`"redirect":{"inbound":{"enabled":false,"port":1,"excludePorts":[22,"80-90"],"excludePortsForIPs":["10.0.0.0/8"],"captureSSH":true},` +
			`"outbound":{"enabled":false,"port":2,"excludePorts":[443],"excludePortsForUIDs":["tcp:22,80-90:1000-1005"],"excludePortsForIPs":["fd00::1/128"]},` +
			`"dns":{"enabled":true,"captureAll":true,"port":3,"skipConntrackZoneSplit":true,"resolvConfigPath":"/x","controlPlaneIP":"fd00::9","modifySharedResolvConfig":true,"redirectTCP":true}},` +
			`"wait":7,"waitInterval":8,"retry":{"maxRetries":9,"sleepBetweenRetries":"10ms"},"comments":{"disabled":true},"cniMode":true,"backend":"iptables-legacy"}`},
		{"several UIDs keep their order", tproxy.Config{ProxyUIDs: []tproxy.UID{2, 1}},
			strings.Replace(zeroConfigJSON, `"kumaDPUser":""`, `"kumaDPUser":"2,1"`, 1)},
		{"no wait", tproxy.Config{Wait: -3}, strings.Replace(zeroConfigJSON, `"waitInterval"`, `"wait":0,"waitInterval"`, 1)},
		{"no retries", tproxy.Config{MaxRetries: -3, SleepBetweenRetries: -3},
			strings.Replace(zeroConfigJSON, `"comments"`, `"retry":{"maxRetries":0,"sleepBetweenRetries":"0s"},"comments"`, 1)},
		{"all DNS", tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}},
			strings.Replace(zeroConfigJSON, `"enabled":false,"captureAll":false`, `"enabled":true,"captureAll":true`, 1)},
		{"what is ignored is not written", tproxy.Config{ProxyUIDs: []tproxy.UID{1}, ProxyUser: "x"},
			strings.Replace(zeroConfigJSON, `"kumaDPUser":""`, `"kumaDPUser":"1"`, 1)},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := test.config.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(test.want, string(got)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestMarshalJSONOfInvalid(t *testing.T) {
	for _, c := range []tproxy.Config{
		{IPFamilyMode: 7},
		{Wait: time.Millisecond},
		{MaxRetries: 1001},
		{SleepBetweenRetries: time.Hour + 1},
		{DNS: tproxy.DNS{ResolvConf: "/\xff"}},
		{ProxyUser: "\xff"},
	} {
		_, err := json.Marshal(c)
		if e, ok := errors.AsType[*tproxy.ConfigError](err); !ok || len(e.Faults) != 1 {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// helmJSON is the ConfigMap kuma-transparent-proxy-config as Kuma's Helm chart
// writes it by default, from the chart's goldens in
// app/kumactl/cmd/install/testdata.
const helmJSON = `{
	"comments": {"disabled": false},
	"dropInvalidPackets": false,
	"ipFamilyMode": "dualstack",
	"iptablesExecutables": {"ip6tables": "", "ip6tables-restore": "", "ip6tables-save": "",
		"iptables": "", "iptables-restore": "", "iptables-save": ""},
	"kumaDPUser": "5678",
	"log": {"enabled": false},
	"redirect": {
		"dns": {"captureAll": true, "enabled": true, "port": 15053,
			"resolvConfigPath": "/etc/resolv.conf", "skipConntrackZoneSplit": false},
		"inbound": {"enabled": true, "excludePorts": [], "excludePortsForIPs": [], "excludePortsForUIDs": [],
			"includePorts": [], "insertRedirectInsteadOfAppend": false, "port": 15006},
		"outbound": {"enabled": true, "excludePorts": [], "excludePortsForIPs": [], "excludePortsForUIDs": [],
			"includePorts": [], "insertRedirectInsteadOfAppend": false, "port": 15001},
		"vnet": {"networks": []}},
	"retry": {"maxRetries": 4, "sleepBetweenRetries": "2s"},
	"storeFirewalld": false, "verbose": false, "wait": 5, "waitInterval": 0}`

func TestUnmarshalJSON(t *testing.T) {
	prefixes := func(list string) []netip.Prefix {
		p, err := tproxy.ParsePrefixes(list)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	inbound := func(i tproxy.Inbound) tproxy.Config { return tproxy.Config{Inbound: i} }
	outbound := func(o tproxy.Outbound) tproxy.Config { return tproxy.Config{Outbound: o} }
	exclusions := []tproxy.UIDExclusion{
		{Protocol: rules.TCP, Ports: rules.MustPorts("22,80-90"), UIDs: rules.MustUIDs("1000-1005")},
		{UIDs: rules.MustUIDs("1001")},
	}
	for _, test := range []struct {
		text string
		want tproxy.Config
	}{
		{`{}`, tproxy.Config{}},
		{`null`, tproxy.Config{}},
		{"\n{ \"redirect\" : null , \"wait\":null, \"log\": {\"level\" : 7} }\n", tproxy.Config{}},
		{helmJSON, tproxy.Config{
			ProxyUIDs: []tproxy.UID{5678},
			Inbound:   tproxy.Inbound{Port: 15006},
			Outbound:  tproxy.Outbound{Port: 15001},
			DNS:       tproxy.DNS{Redirect: true, CaptureAll: true, Port: 15053, ResolvConf: "/etc/resolv.conf"},
			Wait:      5 * time.Second,

			MaxRetries: 4, SleepBetweenRetries: 2 * time.Second,
		}},
		{`{"iptablesExecutables":"","verbose":false,"dryRun":false}`, tproxy.Config{}},
		{`{"kumaDPUser":"5678"}`, tproxy.Config{ProxyUIDs: []tproxy.UID{5678}}},
		{`{"kumaDPUser":5678}`, tproxy.Config{ProxyUIDs: []tproxy.UID{5678}}}, // as Kuma, whose YAML makes text of it
		{`{"kumaDPUser":"2, 1"}`, tproxy.Config{ProxyUIDs: []tproxy.UID{2, 1}}},
		{`{"kumaDPUser":"kuma-dp"}`, tproxy.Config{ProxyUser: "kuma-dp"}},
		{`{"kumaDPUser":""}`, tproxy.Config{}},
		{`{"redirect":{"inbound":{"excludePorts":22}}}`, inbound(tproxy.Inbound{ExcludePorts: rules.MustPorts("22")})},
		{`{"redirect":{"inbound":{"excludePorts":"1, 80-90"}}}`, inbound(tproxy.Inbound{ExcludePorts: rules.MustPorts("1,80-90")})},
		{`{"redirect":{"inbound":{"excludePorts":[ 1 , "80-90","3,4"]}}}`, inbound(tproxy.Inbound{ExcludePorts: rules.MustPorts("1,3,4,80-90")})},
		{`{"redirect":{"inbound":{"excludePorts":"","includePorts":"","excludePortsForUIDs":"","excludePortsForIPs":""}}}`, tproxy.Config{}},
		{`{"redirect":{"inbound":{"excludePortsForIPs":["10.0.0.1","fd00::/8"],"captureSSH":true}}}`,
			inbound(tproxy.Inbound{ExcludeIPs: prefixes("10.0.0.1/32,fd00::/8"), CaptureSSH: true})},
		{`{"redirect":{"outbound":{"excludePortsForIPs":"10.0.0.1, fd00::/8"}}}`, outbound(tproxy.Outbound{ExcludeIPs: prefixes("10.0.0.1/32,fd00::/8")})},
		{`{"redirect":{"outbound":{"enabled":false,"excludePortsForUIDs":["tcp:22,80-90:1000-1005","1001"]}}}`,
			outbound(tproxy.Outbound{Off: true, ExcludePortsForUIDs: exclusions})},
		{`{"redirect":{"outbound":{"excludePortsForUIDs":"tcp:22,80-90:1000-1005; *:*:1001"}}}`, outbound(tproxy.Outbound{ExcludePortsForUIDs: exclusions})},
		{`{"redirect":{"outbound":{"excludePortsForUIDs":[1001,"tcp:22,80-90:1000-1005"]}}}`,
			outbound(tproxy.Outbound{ExcludePortsForUIDs: []tproxy.UIDExclusion{exclusions[1], exclusions[0]}})},
		{`{"wait":0}`, tproxy.Config{Wait: -time.Second}},
		{`{"retry":{"maxRetries":0,"sleepBetweenRetries":"0s"}}`, tproxy.Config{MaxRetries: -1, SleepBetweenRetries: -1}},
		{`{"retry":{"maxRetries":1000,"sleepBetweenRetries":"1h"}}`, tproxy.Config{MaxRetries: 1000, SleepBetweenRetries: time.Hour}},
		// What Kuma 2.9 to 2.12 wrote, whether enabled or not.
		{`{"ebpf":{"enabled":false,"instanceIP":"","instanceIPEnvVarName":"INSTANCE_IP","bpffsPath":"/sys/fs/bpf","cgroupPath":"/sys/fs/cgroup",
			"programsSourcePath":"/tmp/kuma-ebpf","tcAttachIface":""}}`, tproxy.Config{}},
		{`{"ebpf":{"bpffsPath":"/x"}}`, tproxy.Config{}},
		{`{"ebpf":null}`, tproxy.Config{}},
		{`{"backend":"iptables-nft","cniMode":true}`, tproxy.Config{Backend: tproxy.IPTablesNFT, Pod: true}},
		{`{"storeFirewalld":true}`, tproxy.Config{Persist: tproxy.PersistFirewalld}},
		{`{"storeFirewalld":true,"persist":"firewalld"}`, tproxy.Config{Persist: tproxy.PersistFirewalld}},
		{`{"persist":"firewalld","storeFirewalld":false}`, tproxy.Config{Persist: tproxy.PersistFirewalld}},
		{`{"storeFirewalld":false,"persist":"systemd"}`, tproxy.Config{Persist: tproxy.PersistSystemd}},
		{`{"storeFirewalld":false}`, tproxy.Config{}},
	} {
		var got tproxy.Config
		if err := json.Unmarshal([]byte(test.text), &got); err != nil {
			t.Errorf("%s: %v", test.text, err)
		} else if d := cmp.Diff(test.want, got, compareJSON); d != "" {
			t.Errorf("%s:\n%s", test.text, d)
		}
	}
}

func TestUnmarshalJSONOverlays(t *testing.T) {
	got := tproxy.Config{
		ProxyUIDs: []tproxy.UID{1, 2},
		Inbound:   tproxy.Inbound{Off: true, Port: 7, ExcludePorts: rules.MustPorts("80")},
	}
	want := tproxy.Config{ProxyUser: "x", Inbound: tproxy.Inbound{Off: true, Port: 7, ExcludePorts: rules.MustPorts("90")}}
	if err := json.Unmarshal([]byte(`{"kumaDPUser":"x","redirect":{"inbound":{"excludePorts":[90],"port":null}}}`), &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, compareJSON); d != "" {
		t.Error(d)
	}
}

func TestUnmarshalJSONFaults(t *testing.T) {
	const deepPort = `{"redirect":{"inbound":{"port":%s}}}`
	for _, test := range []struct {
		text string
		want []string
	}{
		{`[]`, []string{`.: "[]" is no object: accepted is an object with the keys kumaDPUser, ipFamilyMode, redirect, `}},
		{`{"redirect":5}`, []string{`redirect: "5" is no object: accepted is an object with the keys inbound, outbound, dns, vnet`}},
		{`{"kumaDpUser":"x"}`, []string{`kumaDpUser: "kumaDpUser" is no key of the configuration: accepted is kumaDPUser, the nearest one`}},
		{`{"redirect":{"inbond":{}}}`, []string{`redirect.inbond: "inbond" is no key of the configuration: accepted is redirect.inbound, the nearest one`}},
		{`{"redirect":{"outbound":{"exludePorts":[1]}}}`, []string{`redirect.outbound.exludePorts: "exludePorts" is no key of the configuration: accepted is redirect.outbound.excludePorts, the nearest one`}},
		{`{"resolvConfigPath":"x"}`, []string{`resolvConfigPath: "resolvConfigPath" is no key of the configuration: accepted is redirect.dns.resolvConfigPath, the nearest one`}},
		{`{"redirect.inbound":{}}`, []string{`redirect.inbound: "redirect.inbound" is no key of the configuration: accepted is redirect.inbound, `}},
		{`{"":{"wait":1}}`, []string{`.: "" is no key of the configuration`}},
		{`{"wait":1,"wait":1}`, []string{`wait: "1" is given twice: accepted is a key once`}},
		{fmt.Sprintf(deepPort, `0`), []string{`redirect.inbound.port: "0" is not accepted: accepted is a port from 1 to 65535`}},
		{fmt.Sprintf(deepPort, `65536`), []string{`"65536" is not accepted`}},
		{fmt.Sprintf(deepPort, `1e3`), []string{`"1e3" is not accepted`}},
		{fmt.Sprintf(deepPort, `"15006"`), []string{`"15006" is not accepted`}}, // nor by Kuma
		{fmt.Sprintf(deepPort, `{}`), []string{`"{}" is not accepted`}},
		{`{"wait":-1}`, []string{`wait: "-1" is not accepted: accepted is whole seconds from 0 to 2147483647`}},
		{`{"waitInterval":1000000}`, []string{`waitInterval: "1000000" is not accepted`}},
		{`{"cniMode":"true"}`, []string{`cniMode: "true" is no boolean: accepted is true or false`}},
		{`{"ipFamilyMode":"ipv6"}`, []string{`ipFamilyMode: "ipv6" is not accepted: accepted is dualstack or ipv4`}},
		{`{"backend":7}`, []string{`backend: "7" is no text`}},
		{`{"kumaDPUser":1.5}`, []string{`kumaDPUser: "1.5" is no user`}},
		{`{"kumaDPUser":true}`, []string{`kumaDPUser: "true" is no text: accepted is a user's name`}},
		{`{"retry":{"maxRetries":-1,"sleepBetweenRetries":2}}`, []string{
			`retry.maxRetries: "-1" is not accepted: accepted is a number from 0 to 1000`,
			`retry.sleepBetweenRetries: "2" is no duration: accepted is a duration from 0s to 1h with its unit, such as 2s or 500ms`}},
		{`{"retry":{"maxRetries":1001,"sleepBetweenRetries":"2"}}`, []string{`"1001" is not accepted`, `sleepBetweenRetries: "2" is not accepted`}},
		{`{"retry":{"maxRetries":1.5,"sleepBetweenRetries":"-1s"}}`, []string{`"1.5" is not accepted`, `"-1s" is not accepted`}},
		{`{"retry":{"maxRetries":"4","sleepBetweenRetries":"61m"}}`, []string{`"4" is not accepted`, `"61m" is not accepted`}},
		{`{"ebpf":{"enabled":true,"bpffsPath":7,"chain":"x"}}`, []string{
			`ebpf.enabled: "true" is not supported: there are iptables rules alone, as in Kuma by now: accepted is the default, false`,
			`ebpf.bpffsPath: "7" is no text`,
			`ebpf.chain: "chain" is no key of the configuration`}},
		{`{"kumaDPUser":"1,x"}`, []string{`kumaDPUser: "1,x" is no user`}},
		{`{"kumaDPUser":"4294967295"}`, []string{`kumaDPUser: "4294967295" is no user`}},
		{`{"redirect":{"inbound":{"excludePorts":[1,"x",0,"90-80",{},""]}}}`, []string{
			`excludePorts: "x" cannot be read: accepted is a port`,
			`excludePorts: "0" cannot be read (is out of range: accepted is a port`,
			`excludePorts: "90-80" cannot be read (is reversed: write 80-90)`,
			`excludePorts: "{}" is not accepted`,
			`excludePorts: "" has an empty entry`,
		}},
		{`{"redirect":{"outbound":{"excludePortsForIPs":["10.0.0.1/8",5,"::1,x"]}}}`, []string{
			`excludePortsForIPs: "10.0.0.1/8" cannot be read (has host bits set: write 10.0.0.0/8 for the network or 10.0.0.1 for the one address)`,
			`excludePortsForIPs: "5" is not accepted`,
			`excludePortsForIPs: "x" cannot be read: accepted is an IPv4`,
		}},
		{`{"redirect":{"outbound":{"excludePortsForUIDs":["tcp:0:1;1001","icmp:1:1",-7,true]}}}`, []string{
			`excludePortsForUIDs: "tcp:0:1" cannot be read ("0" is out of range: `,
			`excludePortsForUIDs: "icmp:1:1" cannot be read (protocol "icmp": accepted is tcp, udp or *)`,
			`excludePortsForUIDs: "-7" cannot be read`,
			`excludePortsForUIDs: "true" is not accepted: accepted is proto:ports:uids`,
		}},
		{`{"dropInvalidPackets":true,"log":{"level":4},"verbose":true,"dryRun":true,
			"iptablesExecutables":{"iptables":"/x"},
			"redirect":{"vnet":{"networks":["a:10.0.0.0/8"]},
				"inbound":{"includePorts":[ 1 ],"insertRedirectInsteadOfAppend":true,"excludePortsForUIDs":["1"]},
				"outbound":{"includePorts":"1","insertRedirectInsteadOfAppend":true}}}`, []string{
			`dropInvalidPackets: "true" is known, not supported yet: accepted is the default, false`,
			`log.level: "4" is known, not supported yet: accepted is the default, 7`,
			`verbose: "true" is about a run, for which a Config has no place`, `dryRun: "true" is about a run`,
			`iptablesExecutables.iptables: "/x" is known`,
			`redirect.vnet.networks: "[\"a:10.0.0.0/8\"]" is known`,
			`redirect.inbound.includePorts: "[ 1 ]" is known`,
			`redirect.inbound.insertRedirectInsteadOfAppend: "true" is known`,
			`redirect.inbound.excludePortsForUIDs: "[\"1\"]" has no meaning`,
			`redirect.outbound.includePorts: "1" is known`,
			`redirect.outbound.insertRedirectInsteadOfAppend: "true" is known`,
		}},
		{`{"iptablesExecutables":"iptables:/x"}`, []string{`iptablesExecutables: "iptables:/x" is known, not supported yet`}},
		{`{"persist":"systemd","storeFirewalld":true}`, []string{`storeFirewalld: "true" contradicts persist, systemd: accepted is only one of the two, or persist: firewalld`}},
		{`{"persist":"disk","storeFirewalld":1}`, []string{`persist: "disk" is not accepted: accepted is auto, systemd, firewalld or none`, `storeFirewalld: "1" is `}},
	} {
		before := tproxy.Config{ProxyUser: "before", Wait: time.Second}
		got := before
		err := json.Unmarshal([]byte(test.text), &got)
		e, ok := errors.AsType[*tproxy.ConfigError](err)
		if !ok {
			t.Errorf("%s: %v", test.text, err)
			continue
		}
		if len(e.Faults) != len(test.want) {
			t.Errorf("%s: %d faults:\n%v", test.text, len(e.Faults), err)
			continue
		}
		for i, w := range test.want {
			if s := e.Faults[i].String(); !strings.Contains(s, w) {
				t.Errorf("%s:\ngot  %s\nwant %s", test.text, s, w)
			}
		}
		if d := cmp.Diff(before, got, compareJSON); d != "" {
			t.Errorf("%s: half loaded:\n%s", test.text, d)
		}
	}
}

func TestUnmarshalJSONBoundsItsWork(t *testing.T) {
	var b strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&b, `,"k%d%s":1`, i, strings.Repeat("x", 100))
	}
	var c tproxy.Config
	e, ok := errors.AsType[*tproxy.ConfigError](c.UnmarshalJSON([]byte("{" + b.String()[1:] + "}")))
	if !ok || len(e.Faults) > 2000 {
		t.Fatal(len(e.Faults))
	}
}

func FuzzUnmarshalJSON(f *testing.F) {
	for _, seed := range []string{helmJSON, zeroConfigJSON, `{"kumaDPUser":"1,2"}`, `{"redirect":{"outbound":{"excludePortsForUIDs":"1;2"}}}`, `{"":1,"":2}`, `[`, `{"redirect":{"inbound":{"excludePorts":[1,"2-3"]}}}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var c tproxy.Config
		if err := c.UnmarshalJSON(text); err != nil {
			if e, ok := errors.AsType[*tproxy.ConfigError](err); ok && slices.ContainsFunc(e.Faults, func(f tproxy.ConfigFault) bool {
				return f.Path == "" || f.What == "" || f.Accepted == ""
			}) {
				t.Fatalf("%+v", e.Faults)
			}
			return
		}
		again, err := c.MarshalJSON()
		if err != nil {
			// Only what holds between several keys is left to Validate.
			if !strings.Contains(err.Error(), "a port of the proxy for each") {
				t.Fatal(err)
			}
			return
		}
		var d tproxy.Config
		if err := d.UnmarshalJSON(again); err != nil {
			t.Fatalf("%s: %v", again, err)
		}
		if diff := cmp.Diff(c, d, compareJSON, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("%s\n%s", again, diff)
		}
	})
}
