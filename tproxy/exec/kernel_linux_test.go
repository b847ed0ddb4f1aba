package exec_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

const (
	appUID   = 1000
	proxyUID = tproxy.DefaultProxyUID
)

// world is a lab, a variant of iptables and a Runner, for one test.
type world struct {
	*testing.T
	*netlab.Lab
	backend tproxy.Backend
	runner  exec.Runner
	// operated lets a plan see the ways into the host: most tests have servers of
	// their own on port 22.
	operated bool
}

// variants are those of iptables, for tests of its programs.
var variants = []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy}

// eachVariant runs the test in a fresh lab with each variant of iptables.
func eachVariant(t *testing.T, f func(w *world)) {
	t.Helper()
	for _, b := range variants {
		t.Run(b.String(), func(t *testing.T) { f(newWorld(t, b)) })
	}
}

// eachBackend runs the test in a fresh lab with each backend.
func eachBackend(t *testing.T, f func(w *world)) {
	t.Helper()
	for _, b := range tproxy.Backends() {
		t.Run(b.String(), func(t *testing.T) { f(newWorld(t, b)) })
	}
}

func newWorld(t *testing.T, b tproxy.Backend) *world {
	t.Helper()
	l, err := netlab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	w := &world{T: t, Lab: l, backend: b}
	netlab.Require(t, "ip", "nft", w.program(rules.IPv4, "restore"), w.program(rules.IPv6, "restore"))
	return w
}

// plan observes the lab's host and builds for it.
func (w *world) plan(c tproxy.Config) (*tproxy.Plan, error) {
	if c.Backend == tproxy.Auto {
		c.Backend = w.backend
	}
	return tproxy.Build(c, w.observe(c))
}

func (w *world) observe(c tproxy.Config) (h tproxy.Host) {
	w.Helper()
	err := w.In(w.Host, func() (err error) { h, err = w.runner.Probe(w.Context(), c.Needs()); return err })
	if err != nil {
		w.Fatal(err)
	}
	if !w.operated {
		h.RemoteShells = nil
	}
	return h
}

func (w *world) apply(p *tproxy.Plan) (r *exec.Report, err error) {
	err = w.In(w.Host, func() error {
		r, err = w.runner.Apply(w.Context(), p)
		return err
	})
	return r, err
}

func (w *world) install(c tproxy.Config) *exec.Report {
	w.Helper()
	p, err := w.plan(c)
	if err != nil {
		w.Fatalf("plan: %v", err)
	}
	r, err := w.apply(p)
	if err != nil {
		w.Fatalf("install: %v", err)
	}
	return r
}

func (w *world) remove(o exec.RemoveOptions) (r *exec.Report, err error) {
	err = w.In(w.Host, func() error {
		r, err = w.runner.Remove(w.Context(), o)
		return err
	})
	return r, err
}

func (w *world) uninstall() *exec.Report {
	w.Helper()
	r, err := w.remove(exec.RemoveOptions{})
	if err != nil {
		w.Fatalf("uninstall: %v", err)
	}
	return r
}

// on runs a program on the lab's host and returns what it prints.
func (w *world) on(stdin, name string, args ...string) string {
	w.Helper()
	out, err := w.Lab.Run(w.Context(), w.Host, stdin, name, args...)
	if err != nil {
		w.Fatal(err)
	}
	return out
}

// variant is where the rules of others stand: in the backend, or, where that is a
// table of our own, in the tables of iptables beside it.
func (w *world) variant() tproxy.Backend {
	if w.backend == tproxy.NFTables {
		return tproxy.IPTablesNFT
	}
	return w.backend
}

// program is the variant's program: save, restore or "" for iptables itself.
func (w *world) program(f rules.Family, verb string) string {
	name := w.variant().String()
	if f == rules.IPv6 {
		name = "ip6" + strings.TrimPrefix(name, "ip")
	}
	if verb != "" {
		name += "-" + verb
	}
	return name
}

// iptables runs iptables and ip6tables, one line an argument list, quotes apart.
func (w *world) iptables(lines ...string) {
	w.Helper()
	for _, f := range rules.Families() {
		for _, line := range lines {
			w.on("", w.program(f, ""), strings.Fields(line)...)
		}
	}
}

var times = regexp.MustCompile(`(?m)^# (Generated|Completed).*\n`)

var policyCounters = regexp.MustCompile(`(?m)^(:[A-Z]+ [A-Z]+) \[\d+:\d+\]`)

// save is iptables-save -c without the time of day; with iptables-legacy without
// the counters of the policies: whatever it changes in a table (1.8.9, a plain -A
// of another chain too), it sets them to zero.
func (w *world) save(f rules.Family) string {
	w.Helper()
	text := times.ReplaceAllString(w.on("", w.program(f, "save"), "-c"), "")
	if w.backend == tproxy.IPTablesLegacy {
		text = policyCounters.ReplaceAllString(text, "$1")
	}
	return text
}

// tables is what the kernel holds, counters and all, as each program shows it that
// can do so without changing anything.
func (w *world) tables() string {
	w.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "nft list ruleset\n%s", w.on("", "nft", "list", "ruleset"))
	for _, f := range rules.Families() {
		file := "/proc/thread-self/net/ip_tables_names"
		if f == rules.IPv6 {
			file = "/proc/thread-self/net/ip6_tables_names"
		}
		var names []byte
		if err := w.In(w.Host, func() (err error) { names, err = os.ReadFile(file); return err }); err != nil && !os.IsNotExist(err) {
			w.Fatal(err)
		}
		fmt.Fprintf(&b, "%s\n%s", file, names)
		if w.backend == tproxy.IPTablesLegacy && len(names) > 0 || w.variant() == tproxy.IPTablesNFT && strings.Contains(b.String(), "table ip") {
			fmt.Fprintf(&b, "%s\n%s", w.program(f, "save"), w.save(f))
		}
	}
	fmt.Fprintf(&b, "ip address\n%s", w.on("", "ip", "-o", "address"))
	return b.String()
}

// ours is what parses out of the variant's own list, or what stands in our table.
func (w *world) ours(f rules.Family) (ours rules.Set) {
	w.Helper()
	if w.backend == tproxy.NFTables {
		if err := w.In(w.Host, func() error {
			l, err := w.runner.Live(w.Context())
			for _, r := range l.Rules {
				if r.Backend == tproxy.NFTables && r.Family == f {
					ours = r.Set
				}
			}
			return err
		}); err != nil {
			w.Fatal(err)
		}
		return ours
	}
	all, err := rules.ParseSave(f, []byte(w.on("", w.program(f, "save"))))
	if err != nil {
		w.Fatal(err)
	}
	ours, references := all.Ours(f, tproxy.Known())
	if len(references) > 0 {
		w.Errorf("rules of others refer to ours: %v", references)
	}
	return ours
}

// same fails with what differs.
func (w *world) same(what, before, after string) {
	w.Helper()
	if before != after {
		w.Errorf("%s (-before +after):\n%s", what, cmp.Diff(strings.Split(before, "\n"), strings.Split(after, "\n")))
	}
}

// resolvConf writes a resolv.conf with these nameservers.
func (w *world) resolvConf(servers ...netip.Addr) string {
	w.Helper()
	path := filepath.Join(w.TempDir(), "resolv.conf")
	var b strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
		w.Fatal(err)
	}
	return path
}

func everywhere(ports ...uint16) (out []netip.AddrPort) {
	for _, p := range ports {
		out = append(out, netip.AddrPortFrom(netip.IPv4Unspecified(), p), netip.AddrPortFrom(netip.IPv6Unspecified(), p))
	}
	return out
}

// serve starts what is not the proxy: applications on the host, and servers and
// resolvers on the internet.
func (w *world) serve() {
	w.Helper()
	must := func(_ *netlab.Counter, err error) {
		w.Helper()
		if err != nil {
			w.Fatal(err)
		}
	}
	must(w.ListenTCP(w.Host, appUID, "app", everywhere(22, 80, 443, 8080, 9005)...))
	must(w.ListenTCP(w.Client, 0, "remote", everywhere(22, 53, 80, 443, 2525, 8443, 15006)...))
	var dns []netip.AddrPort
	for _, a := range []netip.Addr{netlab.Resolver4, netlab.Resolver6, netlab.Internet4, netlab.Internet6, netlab.Client4, netlab.Client6} {
		dns = append(dns, netip.AddrPortFrom(a, 53), netip.AddrPortFrom(a, 5353))
	}
	must(w.ListenUDP(w.Client, 0, "resolver", dns...))
}

func (w *world) proxy(mode netlab.Mode) *netlab.Proxy {
	w.Helper()
	p := &netlab.Proxy{UID: proxyUID, In: 15006, Out: 15001, DNS: 15053, Mode: mode}
	if err := p.Start(w.Lab); err != nil {
		w.Fatal(err)
	}
	return p
}

// places are the words for addresses, of both families.
var places = map[string][2]netip.Addr{
	"host":        {netlab.Host4, netlab.Host6},
	"client":      {netlab.Client4, netlab.Client6},
	"internet":    {netlab.Internet4, netlab.Internet6},
	"resolver":    {netlab.Resolver4, netlab.Resolver6},
	"resolver4":   {netlab.Resolver4, netlab.Resolver4},
	"container":   {netlab.Container4, netlab.Container6},
	"loopback":    {netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()},
	"loopback2":   {netip.MustParseAddr("127.0.0.53"), netip.IPv6Loopback()},
	"service":     {netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd96::1")},
	"passthrough": {netip.MustParseAddr("127.0.0.6"), netip.MustParseAddr("::6")},
}

// uid is the user, or, without root, one that the user namespace has.
func (w *world) uid(u uint32) uint32 {
	if netlab.HasUID(u) {
		return u
	}
	return 50000 + u%1000
}

// prefixes are the addresses of the places as lists for a Config.
func prefixes(names ...string) (out []netip.Prefix) {
	for _, n := range names {
		for _, a := range places[n] {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out
}

// flow is one flow and what must become of it in both families: "outside host:80
// => in", "1000 tcp internet:443 => out", "5678/passthrough host:80 => app". Who
// sends it is outside, container, or a UID of the host; behind a slash stands the
// source address. udp stands in front of the destination.
type flow struct{ row, text string }

var flowText = regexp.MustCompile(`^(\w+)(?:/(\w+))? (udp )?(\w+):(\d+) => (\w+)(?: for (\w+):(\d+))?$`)

func (w *world) check(flows ...flow) {
	w.Helper()
	w.checkFamilies([]int{0, 1}, flows...)
}

func (w *world) checkFamilies(families []int, flows ...flow) {
	w.Helper()
	for _, f := range flows {
		m := flowText.FindStringSubmatch(f.text)
		if m == nil {
			w.Fatalf("not a flow: %q", f.text)
		}
		var both sync.WaitGroup
		for _, i := range families {
			family := rules.Families()[i]
			n, uid := w.Host, uint32(0)
			switch m[1] {
			case "outside":
				n = w.Client
			case "container":
				n = w.Container
			default:
				if _, err := fmt.Sscan(m[1], &uid); err != nil {
					w.Fatalf("not a flow: %q", f.text)
				}
				uid = w.uid(uid)
			}
			place := func(name, port string) netip.AddrPort {
				a, ok := places[name]
				if !ok {
					w.Fatalf("no place %q: %q", name, f.text)
				}
				n, err := strconv.ParseUint(port, 10, 16)
				if err != nil {
					w.Fatalf("%q: %v", f.text, err)
				}
				return netip.AddrPortFrom(a[i], uint16(n))
			}
			var src netip.AddrPort
			if m[2] != "" {
				src = place(m[2], "0")
			}
			network, dst := "tcp", place(m[4], m[5])
			if m[3] != "" {
				network = "udp"
			}
			meant := dst
			if m[7] != "" {
				meant = place(m[7], m[8])
			}
			both.Go(func() {
				seen, err := w.Dial(n, uid, network, src, dst)
				if err != nil {
					w.Errorf("%s %s, %s: %v", f.row, family, f.text, err)
				} else if seen.Who != m[6] || seen.Original.IsValid() && network == "tcp" && seen.Original != meant {
					w.Errorf("%s %s, %s: answered by %s", f.row, family, f.text, seen)
				}
			})
		}
		both.Wait()
	}
}

// Each row of contract.md section 2, with real packets: judged by who answered,
// and by the original destination that it saw.
func TestEachRowOfTheContract(t *testing.T) {
	scenarios := []struct {
		name   string
		config func(w *world) tproxy.Config
		flows  []flow
		only4  []flow
		only6  []flow
	}{
		{"defaults", func(*world) tproxy.Config { return tproxy.Config{} }, []flow{
			{"A3", "outside host:22 => app"},
			{"A5", "outside host:80 => in"},
			{"A5", "outside host:81 => in"},
			{"A5", "outside/internet host:80 => in"},
			{"A5", "outside host:15006 => in"},
			{"A5", "outside host:15001 => in"},
			{"B0", "5678 loopback:15006 => refused"},
			{"B0", "5678 loopback:15001 => refused"},
			{"B0", "5678 host:15006 => refused"},
			{"B0", "5678 host:15001 => refused"},
			{"B0", "5678/loopback passthrough:15006 => refused"},
			{"B0", "5678/passthrough host:15006 => refused"},
			{"B1", "5678/passthrough host:80 => app"},
			{"B1", "5678/passthrough loopback:80 => app"},
			{"B2", "5678 host:80 => in"},
			{"B2", "5678 host:81 => in"},
			{"B2 as A3", "5678 host:22 => app"},
			{"B2", "5678/loopback passthrough:80 => in"},
			{"B3", "5678 internet:80 => remote"},
			{"B3", "5678 internet:53 => remote"},
			{"B3", "5678 internet:15006 => remote"},
			{"B3", "5678 loopback:80 => app"},
			{"B4", "1000 loopback:80 => app"},
			{"B4", "1000 host:80 => app"},
			{"B4", "0 host:22 => app"},
			{"B4", "1000 passthrough:80 => app"},
			{"B4", "1000 loopback:15006 => in"},
			{"B11", "1000 internet:80 => out"},
			{"B11", "1000 internet:22 => out"},
			{"B11", "1000 internet:81 => out"},
			{"B11", "1000 internet:15006 => out"},
			{"B11", "0 internet:443 => out"},
			{"B11", "4294967294 internet:443 => out"},
			{"B11", "1000 internet:53 => out"}, // DNS redirection is off
			{"C1", "1000 udp resolver:53 => resolver"},
			{"C1", "5678 udp resolver:53 => resolver"},
			{"C", "1000 udp resolver:5353 => resolver"},
		}, nil, nil},
		{"exclusions", func(w *world) tproxy.Config {
			return tproxy.Config{
				Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("8080,9000-9010"), ExcludeIPs: prefixes("internet")},
				Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("8443"), ExcludeIPs: prefixes("client"),
					ExcludePortsForUIDs: []tproxy.UIDExclusion{
						{Protocol: rules.TCP, Ports: rules.MustPorts("2525"), UIDs: rules.MustUIDs("1001")},
						{Protocol: rules.UDP, UIDs: rules.MustUIDs("1002")},
						{Ports: rules.MustPorts("53,443"), UIDs: rules.MustUIDs("1003-1005")},
					}},
				DNS: tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(netlab.Resolver4, netlab.Resolver6, netlab.Client4, netlab.Client6)},
			}
		}, []flow{
			{"A2", "outside/internet host:80 => app"},
			{"A3", "outside host:22 => app"},
			{"A3", "outside host:8080 => app"},
			{"A3", "outside host:9005 => app"},
			{"A5", "outside host:80 => in"},
			{"B2 as A3", "5678 host:8080 => app"},
			{"B2 as A3", "5678 host:9005 => app"},
			{"B2 as A5", "5678 host:80 => in"},
			{"B6", "1000 client:80 => remote"},
			{"B7", "1001 internet:2525 => remote"},
			{"B7", "1004 internet:443 => remote"},
			{"B11", "1002 internet:443 => out"}, // udp alone is excluded
			{"B11", "1000 internet:2525 => out"},
			{"B11", "1001 internet:443 => out"},
			{"B8", "1000 internet:8443 => remote"},
			{"B9", "1000 internet:53 => remote"},
			{"B9", "1000 resolver:53 => remote"},
			{"B11", "1000 internet:443 => out"},
			{"C1", "5678 udp resolver:53 => resolver"},
			{"C2", "1002 udp resolver:53 => resolver"},
			{"C2", "1003 udp resolver:53 => resolver"},
			{"C2", "1000 udp client:53 => resolver"},
			{"C3", "1000 udp resolver:53 => dns"},
			{"C3", "1001 udp resolver:53 => dns"},
			{"C4", "1000 udp internet:53 => resolver"},
			{"C", "1000 udp resolver:5353 => resolver"},
		}, nil, nil},
		{"inbound off", func(*world) tproxy.Config { return tproxy.Config{Inbound: tproxy.Inbound{Off: true}} }, []flow{
			{"A1", "outside host:80 => app"},
			{"A1", "outside host:22 => app"},
			{"B2 as A1", "5678 host:80 => app"},
			{"B0", "5678 loopback:15001 => refused"},
			{"B0", "5678 host:15001 => refused"},
			{"B11", "1000 internet:80 => out"},
		}, nil, nil},
		{"outbound off, all DNS", func(*world) tproxy.Config {
			return tproxy.Config{Outbound: tproxy.Outbound{Off: true}, DNS: tproxy.DNS{CaptureAll: true}}
		}, []flow{
			{"A5", "outside host:80 => in"},
			{"B0", "5678 loopback:15006 => refused"},
			{"B1", "5678/passthrough host:80 => app"},
			{"B2", "5678 host:80 => in"},
			{"B5", "1000 internet:80 => remote"},
			{"C1", "5678 udp internet:53 => resolver"},
			{"C3", "1000 udp internet:53 => dns"},
			{"C3", "0 udp resolver:53 => dns"},
			{"C3", "1000 udp loopback:53 => dns"},
			{"C", "1000 udp resolver:5353 => resolver"},
		}, nil, nil},
		{"all DNS in the one zone", func(*world) tproxy.Config {
			return tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, SkipConntrackZoneSplit: true}}
		}, []flow{
			{"B9", "1000 internet:53 => remote"},
			{"C1", "5678 udp internet:53 => resolver"},
			{"C3", "1000 udp internet:53 => dns"},
		}, nil, nil},
		{"DNS over TCP", func(w *world) tproxy.Config {
			return tproxy.Config{
				Outbound: tproxy.Outbound{ExcludeIPs: prefixes("client"), ExcludePortsForUIDs: []tproxy.UIDExclusion{
					{Protocol: rules.TCP, Ports: rules.MustPorts("53"), UIDs: rules.MustUIDs("1001")},
					{Protocol: rules.UDP, UIDs: rules.MustUIDs("1002")},
				}},
				DNS: tproxy.DNS{Redirect: true, RedirectTCP: true, ResolvConf: w.resolvConf(netlab.Resolver4, netlab.Resolver6, netlab.Client4, netlab.Client6)},
			}
		}, []flow{
			{"B0", "5678 loopback:15053 => dns"}, // it is about in and out
			{"B3", "5678 resolver:53 => remote"},
			{"B6", "1000 client:53 => remote"},
			{"B7", "1001 resolver:53 => remote"},
			{"B9", "1000 resolver:53 => dns"},
			{"B9", "0 resolver:53 => dns"},
			{"B9", "1002 resolver:53 => dns"}, // udp alone is excluded
			{"B9", "1000 internet:53 => remote"},
			{"B11", "1000 resolver:443 => out"},
			{"C2", "1002 udp resolver:53 => resolver"},
			{"C3", "1000 udp resolver:53 => dns"},
		}, nil, nil},
		{"all DNS over TCP", func(*world) tproxy.Config {
			return tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true, SkipConntrackZoneSplit: true}}
		}, []flow{
			{"B3", "5678 internet:53 => remote"},
			{"B9", "1000 internet:53 => dns"},
			{"C3", "1000 udp internet:53 => dns"},
		}, nil, nil},
		{"all DNS over TCP, outbound off", func(*world) tproxy.Config {
			return tproxy.Config{Outbound: tproxy.Outbound{Off: true}, DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}}
		}, []flow{
			{"B5", "1000 internet:53 => remote"},
			{"C3", "1000 udp internet:53 => dns"},
		}, nil, nil},
		{"all DNS over TCP, port 53 excluded", func(*world) tproxy.Config {
			return tproxy.Config{Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("50-60")}, DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}}
		}, []flow{
			{"B8", "1000 internet:53 => remote"},
			{"C3", "1000 udp internet:53 => dns"},
		}, nil, nil},
		{"a nameserver of IPv6 alone", func(w *world) tproxy.Config {
			return tproxy.Config{DNS: tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(netlab.Resolver6)}}
		}, []flow{
			{"B9", "1000 resolver:53 => remote"},
			{"C4", "1000 udp internet:53 => resolver"},
		}, []flow{
			{"C4", "1000 udp resolver:53 => resolver"},
		}, []flow{
			{"C3", "1000 udp resolver:53 => dns"},
		}},
		{"own address excluded", func(*world) tproxy.Config {
			return tproxy.Config{Inbound: tproxy.Inbound{ExcludeIPs: prefixes("host")}}
		}, []flow{
			{"B2 as A2", "5678 host:80 => app"},
			{"A5", "outside host:80 => in"},
		}, nil, nil},
		{"SSH asked for", func(*world) tproxy.Config { return tproxy.Config{Inbound: tproxy.Inbound{CaptureSSH: true}} }, []flow{
			{"A5", "outside host:22 => in"},
			{"B2 as A5", "5678 host:22 => in"},
		}, nil, nil},
		{"a pod", func(*world) tproxy.Config { return tproxy.Config{Pod: true} }, []flow{
			{"A3", "outside host:22 => in"},
		}, nil, nil},
		{"other ports and users", func(w *world) tproxy.Config {
			return tproxy.Config{ProxyUIDs: []tproxy.UID{w.uid(1000680000), 5678, 0}, Inbound: tproxy.Inbound{Port: 15001}, Outbound: tproxy.Outbound{Port: 15006}}
		}, []flow{
			{"A5", "outside host:80 => out for host:80"}, // the listener's name is its port's
			{"B3", "1000680000 internet:80 => remote"},
			{"B3", "5678 internet:80 => remote"},
			{"B3", "0 internet:80 => remote"},
			{"B0", "1000680000 loopback:15001 => refused"},
			{"B11", "1000 internet:80 => in"},
		}, nil, nil},
		{"IPv4 alone", func(w *world) tproxy.Config {
			return tproxy.Config{IPFamilyMode: tproxy.IPv4Only, DNS: tproxy.DNS{CaptureAll: true}}
		}, nil, []flow{
			{"A5", "outside host:80 => in"},
			{"B2", "5678/loopback passthrough:80 => in"},
			{"B11", "1000 internet:80 => out"},
			{"C3", "1000 udp internet:53 => dns"},
		}, []flow{
			{"untouched", "outside host:80 => app"},
			{"untouched", "5678 host:80 => app"},
			{"untouched", "1000 internet:80 => remote"},
			{"untouched", "1000 udp internet:53 => resolver"},
		}},
	}
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		for _, s := range scenarios {
			w.T.Run(s.name, func(t *testing.T) {
				w := &world{T: t, Lab: w.Lab, backend: w.backend, runner: w.runner}
				w.install(s.config(w))
				w.check(s.flows...)
				w.checkFamilies([]int{0}, s.only4...)
				w.checkFamilies([]int{1}, s.only6...)
			})
		}
		w.uninstall()
		w.check(flow{"uninstalled", "outside host:80 => app"}, flow{"uninstalled", "1000 internet:80 => remote"},
			flow{"uninstalled", "1000 udp resolver:53 => resolver"}, flow{"uninstalled", "5678 host:80 => app"})
	})
}

// A connection through a proxy that passes it on arrives, from the passthrough
// address where it came from outside, and never comes back to the proxy.
func TestProxyPassesOnWithoutALoop(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		p := &netlab.Proxy{UID: proxyUID, In: 15006, Out: 15001, DNS: 15053, Mode: netlab.Pass, Upstream: netip.AddrPortFrom(netlab.Resolver4, 53)}
		if err := p.Start(w.Lab); err != nil {
			w.Fatal(err)
		}
		w.install(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}})
		w.check(
			flow{"A5", "outside host:80 => app"},
			flow{"B11", "1000 internet:80 => remote"},
			flow{"C3", "1000 udp internet:53 => resolver"},
			flow{"B9", "1000 internet:53 => remote for resolver4:53"},
		)
		if in, out, dns, tcp := p.Ins.Count(), p.Outs.Count(), p.Queries.Count(), p.Streams.Count(); in != 2 || out != 2 || dns != 2 || tcp != 2 {
			w.Errorf("the proxy was sent %d, %d, %d and %d; want 2 of each", in, out, dns, tcp)
		}
		for i, who := range []string{"127.0.0.6", "::6"} {
			seen, err := w.Dial(w.Client, 0, "tcp", netip.AddrPort{}, netip.AddrPortFrom(places["host"][i], 80))
			if err != nil || seen.From.Addr().String() != who {
				w.Errorf("the application sees the connection come %s, %v; want from %s", seen, err, who)
			}
		}
		// Aimed at the redirect ports themselves, from outside and from here: the
		// proxy is its own destination, and is refused.
		w.check(
			flow{"B0", "outside host:15006 => closed"},
			flow{"B0", "outside host:15001 => closed"},
			flow{"B0", "1000 loopback:15006 => closed"},
			flow{"B0", "1000 loopback:15001 => closed"},
			flow{"B0", "1000 host:15001 => closed"},
		)
		if in, out := p.Ins.Count(), p.Outs.Count(); in > 20 || out > 20 {
			w.Errorf("the proxy was sent %d and %d connections: a loop", in, out)
		}
	})
}

// Kuma's own validator (pkg/transparentproxy/validate): a server on the inbound
// port and a client of the same user, which connects to the passthrough address
// at another port and must arrive at the server.
func TestKumasValidatorArrives(t *testing.T) {
	eachBackend(t, func(w *world) {
		for i, l := range []string{"127.0.0.1:15006", "[::1]:15006"} {
			if _, err := w.ListenTCP(w.Host, proxyUID, "in", netip.MustParseAddrPort(l)); err != nil {
				w.Fatalf("family %d: %v", i, err)
			}
		}
		w.install(tproxy.Config{})
		// From ::1, as its client does: the kernel's own choice of a source for ::6
		// is ::6, which row B1 leaves alone.
		w.check(flow{"B2", "5678/loopback passthrough:1 => in"}, flow{"B2", "5678/loopback passthrough:20000 => in"},
			flow{"B2", "5678/loopback passthrough:65535 => in"}, flow{"B0", "5678/loopback passthrough:15006 => refused"})
		w.checkFamilies([]int{0}, flow{"B2", "5678 passthrough:20000 => in"})
	})
}

// K19: what the proxy's user sends to the local resolver's address over TCP goes
// there.
func TestProxyReachesTheLocalResolverOverTCP(t *testing.T) {
	eachBackend(t, func(w *world) {
		if _, err := w.ListenTCP(w.Host, 0, "stub", netip.MustParseAddrPort("127.0.0.53:53"), netip.MustParseAddrPort("[::1]:53")); err != nil {
			w.Fatal(err)
		}
		w.proxy(netlab.Answer)
		stubs := tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(places["loopback2"][0], places["loopback2"][1])}
		for _, c := range []tproxy.Config{{}, {DNS: tproxy.DNS{CaptureAll: true}}, {DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}}, {DNS: stubs}} {
			w.install(c)
			w.check(flow{"B3", "5678 loopback2:53 => stub"}, flow{"B4", "1000 loopback2:53 => stub"})
		}
	})
}

// K9, K11: more ports than a multiport match takes, for a user beyond 65535.
func TestUserExcludedFromTwentyPorts(t *testing.T) {
	eachBackend(t, func(w *world) {
		var ports []string
		var flows []flow
		for p := 1080; p < 1120; p += 2 {
			ports = append(ports, fmt.Sprint(p))
			if _, err := w.ListenTCP(w.Client, 0, "remote", everywhere(uint16(p))...); err != nil {
				w.Fatal(err)
			}
			flows = append(flows, flow{"B7", fmt.Sprintf("1000680000 internet:%d => remote", p)}, flow{"B11", fmt.Sprintf("1000 internet:%d => out", p)},
				flow{"B11", fmt.Sprintf("1000680000 internet:%d => out", p+1)})
		}
		w.proxy(netlab.Answer)
		w.install(tproxy.Config{Outbound: tproxy.Outbound{ExcludePortsForUIDs: []tproxy.UIDExclusion{
			{Protocol: rules.TCP, Ports: rules.MustPorts(strings.Join(ports, ",")), UIDs: rules.UIDsOf(w.uid(1000680000))}}}})
		w.check(flows...)
	})
}

// A0: what is forwarded keeps its way: a container's connections out, and its
// published port.
func TestContainersKeepTheirNetwork(t *testing.T) {
	eachBackend(t, func(w *world) {
		if err := w.AddContainer(w.Context()); err != nil {
			w.Fatal(err)
		}
		w.serve()
		if _, err := w.ListenTCP(w.Container, 0, "container", everywhere(80)...); err != nil {
			w.Fatal(err)
		}
		w.iptables(
			"-t nat -N DOCKER",
			"-t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
			"-t nat -A DOCKER -i br0 -j RETURN",
			"-t nat -A POSTROUTING ! -o br0 -j MASQUERADE",
			"-P FORWARD DROP",
			"-A FORWARD -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
			"-A FORWARD -i br0 ! -o br0 -j ACCEPT",
			"-A FORWARD ! -i br0 -o br0 -p tcp --dport 80 -j ACCEPT")
		w.on("", w.program(rules.IPv4, ""), strings.Fields("-t nat -A DOCKER ! -i br0 -p tcp --dport 8088 -j DNAT --to-destination 172.17.0.2:80")...)
		w.on("", w.program(rules.IPv6, ""), strings.Fields("-t nat -A DOCKER ! -i br0 -p tcp --dport 8088 -j DNAT --to-destination [fd01::2]:80")...)
		w.proxy(netlab.Answer)
		network := []flow{
			{"A0", "container internet:80 => remote"},
			{"A0", "container internet:443 => remote"},
			{"A0", "container udp resolver:53 => resolver"},
			{"A0", "outside host:8088 => container for container:80"},
		}
		// The container sees its own address as the destination: it has no
		// conntrack entry of the host's.
		before := w.forwarded(network)
		w.same("forwarded flows, against what they should be", strings.Join(wanted(network), "\n"), strings.Join(before, "\n"))
		w.install(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
		w.same("forwarded flows after the install", strings.Join(before, "\n"), strings.Join(w.forwarded(network), "\n"))
		w.check(flow{"A5", "outside host:80 => in"}, flow{"B11", "1000 internet:80 => out"})
		w.uninstall()
		w.same("forwarded flows after the uninstall", strings.Join(before, "\n"), strings.Join(w.forwarded(network), "\n"))
	})
}

func wanted(flows []flow) (out []string) {
	for _, f := range flows {
		m := flowText.FindStringSubmatch(f.text)
		out = append(out, f.text+": "+m[6]+" "+m[6])
	}
	return out
}

// forwarded tells who answers each flow, over IPv4 and over IPv6.
func (w *world) forwarded(flows []flow) (out []string) {
	w.Helper()
	for _, f := range flows {
		m := flowText.FindStringSubmatch(f.text)
		var line strings.Builder
		line.WriteString(f.text + ":")
		for i := range 2 {
			n, network := w.Client, "tcp"
			if m[1] == "container" {
				n = w.Container
			}
			if m[3] != "" {
				network = "udp"
			}
			var port uint16
			fmt.Sscan(m[5], &port)
			seen, err := w.Dial(n, 0, network, netip.AddrPort{}, netip.AddrPortFrom(places[m[4]][i], port))
			if err != nil {
				w.Fatal(err)
			}
			line.WriteString(" " + seen.Who)
		}
		out = append(out, line.String())
	}
	return out
}
