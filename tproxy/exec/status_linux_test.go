package exec_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

func (w *world) status() (s *exec.Status) {
	w.Helper()
	err := w.In(w.Host, func() (err error) { s, err = w.runner.Status(w.Context()); return err })
	if err != nil {
		w.Fatalf("status: %v", err)
	}
	return s
}

// said is a status in a few lines, for a failed test.
func said(s *exec.Status) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", s.State)
	for _, d := range s.Drift {
		fmt.Fprintf(&b, "  %s\n", d)
	}
	for _, r := range s.Reasons {
		fmt.Fprintf(&b, "  cannot tell: %s\n", r)
	}
	for _, n := range s.Notes {
		fmt.Fprintf(&b, "  note: %s\n", n)
	}
	return b.String()
}

// watched is a lab with an install, and the flows by which it is judged.
type watched struct {
	*world
	plan  *tproxy.Plan
	host  tproxy.Host
	flows []judged
	clean [2]string // what each family's save program prints, nothing but ours
	ports atomic.Uint32
}

// judged is a flow and who has to answer it.
type judged struct {
	packet sim.Packet
	row    string
	want   string
}

// The ports and users that edits and flows are about.
var (
	watchedPorts = []uint16{22, 53, 80, 443, 2525, 8080, 8443, 9005}
	watchedUIDs  = []uint32{0, appUID, 1001, proxyUID}
)

func newWatched(w *world) *watched {
	w.Helper()
	must := func(_ *netlab.Counter, err error) {
		w.Helper()
		if err != nil {
			w.Fatal(err)
		}
	}
	must(w.ListenTCP(w.Host, appUID, "app", everywhere(watchedPorts...)...))
	must(w.ListenTCP(w.Client, 0, "remote", everywhere(watchedPorts...)...))
	var dns []netip.AddrPort
	for _, a := range []netip.Addr{netlab.Resolver4, netlab.Resolver6, netlab.Internet4, netlab.Internet6} {
		dns = append(dns, netip.AddrPortFrom(a, 53))
	}
	must(w.ListenUDP(w.Client, 0, "remote", dns...))
	w.proxy(netlab.Answer)
	c := tproxy.Config{
		Backend: w.backend,
		Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("9005")},
		Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("8443"), ExcludePortsForUIDs: []tproxy.UIDExclusion{
			{Protocol: rules.TCP, Ports: rules.MustPorts("2525"), UIDs: rules.MustUIDs("1001")}}},
		DNS: tproxy.DNS{CaptureAll: true},
	}
	x := &watched{world: w}
	var err error
	if x.plan, err = w.plan(c); err != nil {
		w.Fatal(err)
	}
	x.host = w.observe(c)
	x.put()
	for i, f := range rules.Families() {
		x.clean[i] = w.on("", w.program(f, "save"))
	}
	x.draw(c)
	return x
}

// put installs, over whatever stands.
func (x *watched) put() {
	x.Helper()
	if _, err := x.apply(x.plan); err != nil {
		x.Fatalf("install: %v", err)
	}
}

// draw makes the flows: everything that the ports, users and addresses allow.
func (x *watched) draw(c tproxy.Config) {
	env := sim.EnvOf(netlab.Host4, netlab.Host6)
	add := func(p sim.Packet) {
		row, v := tproxytest.Expect(c, x.host, env, p)
		j := judged{p, row, ""}
		switch {
		case v.Kind == sim.Redirected:
			j.want = map[uint16]string{15006: "in", 15001: "out", 15053: "dns"}[v.Port]
		case v.Kind == sim.Refused:
			j.want = netlab.Refused
		case env.IsLocal(p.Destination.Addr()):
			j.want = "app"
		default:
			j.want = "remote"
		}
		x.flows = append(x.flows, j)
	}
	for i := range 2 {
		near, far := places["host"][i], places["client"][i]
		for _, port := range append([]uint16{15001, 15006}, watchedPorts...) {
			for _, from := range []netip.Addr{far, places["internet"][i]} {
				p := sim.Packet{Path: sim.In, Protocol: rules.TCP, Source: netip.AddrPortFrom(from, 0), Destination: netip.AddrPortFrom(near, port), InInterface: "eth0"}
				if _, v := tproxytest.Expect(c, x.host, env, p); port < 15000 || v.Kind != sim.Untouched {
					add(p)
				}
			}
		}
		for _, port := range watchedPorts {
			for _, uid := range watchedUIDs {
				for _, to := range []netip.Addr{far, places["internet"][i], places["resolver"][i]} {
					add(sim.Packet{Path: sim.Out, Protocol: rules.TCP, Source: netip.AddrPortFrom(near, 0), Destination: netip.AddrPortFrom(to, port), UID: uid, OutInterface: "eth0"})
				}
			}
			for _, uid := range []uint32{appUID, proxyUID} {
				add(sim.Packet{Path: sim.Out, Protocol: rules.TCP, Source: netip.AddrPortFrom(near, 0), Destination: netip.AddrPortFrom(near, port), UID: uid, OutInterface: "lo"})
			}
		}
		for _, port := range []uint16{15001, 15006} {
			add(sim.Packet{Path: sim.Out, Protocol: rules.TCP, Source: netip.AddrPortFrom(near, 0), Destination: netip.AddrPortFrom(near, port), UID: proxyUID, OutInterface: "lo"})
		}
		for _, uid := range watchedUIDs {
			for _, to := range []netip.Addr{places["internet"][i], places["resolver"][i]} {
				add(sim.Packet{Path: sim.Out, Protocol: rules.UDP, Source: netip.AddrPortFrom(near, 0), Destination: netip.AddrPortFrom(to, 53), UID: uid, OutInterface: "eth0"})
			}
		}
	}
}

// wrong sends the flows until one goes wrong, or, with all, each of them, and
// returns those that then did so twice.
//
// What ours leave alone is others' to decide, and a filter of theirs may drop it: with
// foreign, of such a flow only that it reaches the proxy is wrong.
func (x *watched) wrong(all, foreign bool) (out []string) {
	x.Helper()
	proxys := []string{"in", "out", "dns"}
	right := func(j judged, who string) bool {
		left := j.want == "app" || j.want == "remote"
		return who == j.want || foreign && left && !slices.Contains(proxys, who)
	}
	var mu sync.Mutex
	var senders sync.WaitGroup
	next := make(chan judged)
	for range 256 { // most of what goes wrong waits for a timeout
		senders.Go(func() {
			for j := range next {
				p := j.packet
				n, uid, network := x.Host, x.uid(p.UID), "tcp"
				if p.Path == sim.In {
					n, uid = x.Client, 0
				}
				if p.Protocol == rules.UDP {
					network = "udp"
				}
				who := ""
				for try := 0; try < 1 || try < 2 && all; try++ { // a machine under load: what is wrong is wrong again
					// A port of its own: conntrack knows for a while what somebody else's
					// connection from the same one was redirected to.
					src := netip.AddrPortFrom(p.Source.Addr(), uint16(20000+x.ports.Add(1)%45000))
					seen, err := x.Dial(n, uid, network, src, p.Destination)
					if who = seen.Who; err != nil {
						who = err.Error()
					}
					if right(j, who) {
						break
					}
				}
				if !right(j, who) {
					mu.Lock()
					out = append(out, fmt.Sprintf("%s %s: %s, want %s", j.row, p, who, j.want))
					mu.Unlock()
				}
			}
		})
	}
	for _, j := range x.flows {
		mu.Lock()
		enough := !all && len(out) > 0
		mu.Unlock()
		if enough {
			break
		}
		next <- j
	}
	close(next)
	senders.Wait()
	return out
}

// wipe puts the kernel back to nothing but the install.
func (x *watched) wipe() {
	x.Helper()
	for _, f := range rules.Families() {
		var b strings.Builder
		for _, t := range []string{"raw", "mangle", "nat", "filter"} {
			chains := map[string]string{"raw": "PREROUTING OUTPUT", "mangle": "PREROUTING INPUT FORWARD OUTPUT POSTROUTING",
				"nat": "PREROUTING INPUT OUTPUT POSTROUTING", "filter": "INPUT FORWARD OUTPUT"}[t]
			fmt.Fprintf(&b, "*%s\n", t)
			for c := range strings.FieldsSeq(chains) {
				fmt.Fprintf(&b, ":%s ACCEPT [0:0]\n", c)
			}
			b.WriteString("COMMIT\n")
		}
		x.on(b.String(), x.program(f, "restore"))
		x.on(x.clean[nth(f)], x.program(f, "restore"))
	}
}

// vandal draws edits.
type vandal struct {
	*rand.Rand
	x *watched
	f rules.Family
}

func (v vandal) of(list ...string) string { return list[v.IntN(len(list))] }
func (v vandal) port() string             { return fmt.Sprint(watchedPorts[v.IntN(len(watchedPorts))]) }

// matches are of a rule in PREROUTING or OUTPUT.
func (v vandal) matches(hook string) string {
	var out []string
	addr := func() string {
		p := places[v.of("host", "client", "internet", "resolver")][nth(v.f)]
		return v.of(p.String(), netip.PrefixFrom(p, p.BitLen()/2).Masked().String())
	}
	if v.IntN(3) == 0 {
		out = append(out, v.of("-s ", "-d ", "! -s ", "! -d ")+addr())
	}
	if v.IntN(4) == 0 {
		if hook == "PREROUTING" {
			out = append(out, v.of("-i eth0", "-i e+", "! -i lo", "-i lo", "! -i eth0"))
		} else {
			out = append(out, v.of("-o eth0", "-o e+", "! -o lo", "-o lo"))
		}
	}
	switch v.IntN(5) {
	case 0, 1:
		out = append(out, "-p tcp -m tcp "+v.of("", "! ")+"--dport "+v.port())
	case 2:
		out = append(out, "-p tcp -m multiport --dports "+v.port()+","+v.port())
	case 3:
		out = append(out, v.of("-p udp -m udp --dport 53", "-p tcp -m tcp --dport 1:1024", "-p tcp --syn"))
	case 4:
		out = append(out, "-p "+v.of("tcp", "udp"))
	}
	if hook == "OUTPUT" && v.IntN(3) == 0 {
		out = append(out, "-m owner "+v.of("", "! ")+fmt.Sprintf("--uid-owner %d", v.x.uid(watchedUIDs[v.IntN(len(watchedUIDs))])))
	}
	switch v.IntN(10) {
	case 0:
		out = append(out, "-m addrtype --dst-type LOCAL")
	case 1:
		out = append(out, "-m conntrack --ctstate NEW")
	case 2:
		out = append(out, "-m mark ! --mark 0x1")
	case 3:
		out = append(out, "-m statistic --mode random --probability 0.99999")
	}
	return strings.Join(out, " ")
}

// translate is a target of nat, in front.
func (v vandal) translate() string {
	to := places["client"][nth(v.f)]
	return v.of("ACCEPT", "ACCEPT", "RETURN", "REDIRECT --to-ports "+v.of("15001", "15006", "9005", "22"), "DNAT --to-destination "+netip.AddrPortFrom(to, 8443).String())
}

// nth is the family's place in lists of both.
func nth(f rules.Family) int { return slices.Index(rules.Families(), f) }

// ours picks a rule of ours, with its chain and number.
func (v vandal) ours() (table, chain string, index int, rule string) {
	set := v.x.ours(v.f)
	type at struct {
		table, chain string
		index        int
		rule         string
	}
	var list []at
	for _, c := range set.Chains {
		for i, r := range c.Rules {
			list = append(list, at{string(c.Table), c.Name, i + 1, r.Listed()})
		}
	}
	for _, c := range set.Bases {
		for _, r := range c.Rules {
			list = append(list, at{string(c.Table), string(c.Hook), r.At, r.Listed()})
		}
	}
	if len(list) == 0 {
		v.x.Fatal("nothing of ours is there")
	}
	a := list[v.IntN(len(list))]
	return a.table, a.chain, a.index, a.rule
}

// edit is one thing that somebody does, as arguments of iptables, or otherwise.
type edit struct {
	kind string
	args string
	do   func() error
}

// foreign reports whether no rule of ours was touched.
func (e edit) foreign() bool {
	return slices.Contains([]string{"front", "behind", "policy", "early raw", "early mangle", "late", "filter", "chain"}, e.kind)
}

func (v vandal) edit() edit {
	hook := v.of("PREROUTING", "OUTPUT")
	table, chain, index, rule := v.ours()
	switch k := v.of("delete", "double", "swap", "front", "front", "front", "front", "behind", "inside", "inside", "changed", "flush chain", "flush table",
		"policy", "early", "early", "late", "filter", "chain", "all tables"); k {
	case "delete":
		return edit{kind: k, args: fmt.Sprintf("-t %s -D %s %d", table, chain, index)}
	case "double":
		return edit{kind: k, args: fmt.Sprintf("-t %s %s %s %s", table, v.of("-A", "-I"), chain, rule)}
	case "swap":
		return edit{kind: k, do: func() error {
			v.x.iptable(v.f, fmt.Sprintf("-t %s -D %s %d", table, chain, index))
			v.x.iptable(v.f, fmt.Sprintf("-t %s -I %s 1 %s", table, chain, rule))
			return nil
		}}
	case "front":
		return edit{kind: k, args: fmt.Sprintf("-t nat -I %s %s -j %s", hook, v.matches(hook), v.translate())}
	case "behind":
		return edit{kind: k, args: fmt.Sprintf("-t nat -A %s %s -j %s", hook, v.matches(hook), v.translate())}
	case "inside":
		in := map[string]string{"PREROUTING": "KUMA_MESH_INBOUND", "OUTPUT": "KUMA_MESH_OUTBOUND"}[hook]
		return edit{kind: k, args: fmt.Sprintf("-t nat %s %s %s -j %s", v.of("-A", "-I"), in, v.matches(hook), v.translate())}
	case "changed":
		changed := strings.NewReplacer("15006", "15001", "15001", "15006", "5678", "5679", "--dport 22", "--dport 23", "9005", "80", "8443", "443", "--zone 2", "--zone 3").Replace(rule)
		return edit{kind: k, args: fmt.Sprintf("-t %s -R %s %d %s", table, chain, index, changed)}
	case "flush chain":
		return edit{kind: k, args: fmt.Sprintf("-t %s -F %s", table, chain)}
	case "flush table":
		return edit{kind: k, args: "-t " + v.of("nat", "raw", "mangle", "filter") + " -F"}
	case "policy":
		return edit{kind: k, args: v.of("-P INPUT DROP", "-P OUTPUT DROP", "-P FORWARD DROP", "-t mangle -P PREROUTING DROP", "-t mangle -P INPUT DROP", "-t raw -P OUTPUT DROP", "-t mangle -P POSTROUTING DROP")}
	case "early":
		t := v.of("raw", "mangle")
		target := v.of("DROP", "ACCEPT", "RETURN")
		if t == "raw" {
			target = v.of("DROP", "CT --notrack", "CT --notrack", "CT --zone 7", "ACCEPT")
		}
		return edit{kind: k + " " + t, args: fmt.Sprintf("-t %s %s %s %s -j %s", t, v.of("-I", "-A"), hook, v.matches(hook), target)}
	case "late":
		late := v.of("INPUT", "POSTROUTING")
		return edit{kind: k, args: fmt.Sprintf("-t mangle -I %s %s -j DROP", late, v.matches(map[string]string{"INPUT": "PREROUTING", "POSTROUTING": "OUTPUT"}[late]))}
	case "filter":
		in := v.of("INPUT", "OUTPUT")
		return edit{kind: k, args: fmt.Sprintf("%s %s %s -j %s", v.of("-I", "-A"), in, v.of("", "-p tcp", "-p tcp --dport 15006", "-p tcp --dport 15001", "-p udp --dport 15053", "-p tcp --syn", "-p tcp --dport 80", "-m conntrack --ctstate DNAT"), v.of("DROP", "REJECT", "ACCEPT"))}
	case "chain":
		return edit{kind: k, do: func() error {
			m := v.matches(hook)
			v.x.iptable(v.f, "-t nat -N VANDAL")
			v.x.iptable(v.f, fmt.Sprintf("-t nat -A VANDAL %s -j %s", v.matches(hook), v.of("RETURN", "KUMA_MESH_OUTBOUND")))
			v.x.iptable(v.f, fmt.Sprintf("-t nat -A VANDAL %s -j %s", v.matches(hook), v.translate()))
			v.x.iptable(v.f, fmt.Sprintf("-t nat -I %s %s %s VANDAL", hook, m, v.of("-j", "-g")))
			return nil
		}}
	default:
		return edit{kind: k, do: func() error {
			if v.x.backend == tproxy.IPTablesNFT { // as firewalld does when it begins
				for _, t := range []string{"raw", "mangle", "nat", "filter"} {
					_, _ = v.x.Lab.Run(v.x.Context(), v.x.Host, "", "nft", "flush", "table", map[rules.Family]string{rules.IPv4: "ip", rules.IPv6: "ip6"}[v.f], t)
				}
				return nil
			}
			for _, t := range []string{"raw", "mangle", "nat", "filter"} {
				v.x.iptable(v.f, "-t "+t+" -F")
				_, _ = v.x.Lab.Run(v.x.Context(), v.x.Host, "", v.x.program(v.f, ""), "-t", t, "-X")
			}
			return nil
		}}
	}
}

// iptable runs one line of the variant's program; quotes are the shell's.
func (x *watched) iptable(f rules.Family, line string) error {
	_, err := x.Lab.Run(x.Context(), x.Host, "", x.program(f, ""), append([]string{"-w"}, words(line)...)...)
	return err
}

// Each kind of drift, made by hand, is named; and the same install again repairs it.
func TestStatusNamesEachDrift(t *testing.T) {
	eachVariant(t, func(w *world) {
		c := tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}
		v4, v6 := w.program(rules.IPv4, ""), w.program(rules.IPv6, "")
		other := "iptables-legacy"
		if w.backend == tproxy.IPTablesLegacy {
			other = "iptables-nft"
		}
		if s := w.status(); s.State != exec.StateAbsent {
			w.Fatalf("nothing is installed: %s", said(s))
		}
		w.install(c)
		if s := w.status(); s.State != exec.StateInstalled || s.Backend != w.backend || len(s.Families) != 2 {
			w.Fatalf("nothing was done: %s", said(s))
		}
		for _, d := range []struct {
			name, script, undo string
			want               []string
		}{
			{"missing", v4 + " -t nat -D KUMA_MESH_INBOUND 1", "", []string{"- missing: IPv4 nat KUMA_MESH_INBOUND #1 -p tcp -m tcp --dport 22 -j RETURN"}},
			{"missing jump", v6 + " -t nat -D PREROUTING 1", "", []string{"- missing: IPv6 nat PREROUTING #1"}},
			{"missing chain", v4 + " -t nat -D OUTPUT 1; " + v4 + " -t nat -F KUMA_MESH_DNS; " + v4 + " -t nat -X KUMA_MESH_DNS", "", []string{"- missing: IPv4 nat KUMA_MESH_DNS [the chain is not there]", "- missing: IPv4 nat OUTPUT #1"}},
			{"changed", v4 + " -t nat -R KUMA_MESH_INBOUND 1 -p tcp --dport 23 -j RETURN", "", []string{"~ changed: IPv4 nat KUMA_MESH_INBOUND #1 -p tcp -m tcp --dport 23 -j RETURN, was -p tcp -m tcp --dport 22 -j RETURN"}},
			{"extra", v4 + " -t nat -A KUMA_MESH_INBOUND -j ACCEPT", "", []string{"+ extra: IPv4 nat KUMA_MESH_INBOUND #3 -j ACCEPT"}},
			{"reordered", v6 + ` -t nat -D KUMA_MESH_INBOUND 2; ` + v6 + ` -t nat -I KUMA_MESH_INBOUND 1 -p tcp -m comment --comment "inbound goes to the proxy's port 15006" -j REDIRECT --to-ports 15006`, "", []string{"~ reordered: IPv6 nat KUMA_MESH_INBOUND"}},
			{"doubled", v4 + ` -t nat -A KUMA_MESH_INBOUND -p tcp -m comment --comment "inbound goes to the proxy's port 15006" -j REDIRECT --to-ports 15006`, "", []string{"+ doubled: IPv4 nat KUMA_MESH_INBOUND #3"}},
			{"flushed", v4 + " -t nat -F", "", []string{"- missing: IPv4 nat PREROUTING #1", "- missing: IPv4 nat KUMA_MESH_OUTBOUND"}},
			{"elsewhere", other + " -t nat -N KUMA_MESH_INBOUND", other + " -t nat -X KUMA_MESH_INBOUND", []string{"+ elsewhere: IPv4 rules of ours in " + other}},
			{"entered", v4 + " -t nat -N MINE; " + v4 + " -t nat -A MINE -j KUMA_MESH_OUTBOUND", v4 + " -t nat -F MINE; " + v4 + " -t nat -X MINE", []string{"~ entered: IPv4 nat MINE #1"}},
			{"shadowed", v6 + " -t nat -I PREROUTING -p tcp --dport 443 -j ACCEPT", v6 + " -t nat -D PREROUTING 1", []string{"~ shadowed: IPv6 nat PREROUTING #1 -p tcp -m tcp --dport 443 -j ACCEPT"}},
			{"untracked", v4 + " -t raw -I OUTPUT -p tcp -j CT --notrack", v4 + " -t raw -D OUTPUT 1", []string{"~ shadowed: IPv4 raw OUTPUT #1 -p tcp -j CT --notrack"}},
			{"filtered", v4 + " -P INPUT DROP", v4 + " -P INPUT ACCEPT", []string{"~ filtered: IPv4 filter INPUT policy DROP"}},
			{"address", "ip address del ::6/128 dev lo", "", []string{"~ address: IPv6 ::6/128 on lo"}},
		} {
			w.on("", "sh", "-ec", d.script)
			s := w.status()
			for _, want := range d.want {
				if text := said(s); s.State != exec.StateDrifted || !strings.Contains(text, want) {
					w.Errorf("%s: %q is not in %s", d.name, want, text)
				}
			}
			if d.undo != "" { // what is others' no install repairs
				w.on("", "sh", "-ec", d.undo)
			}
			w.install(c)
			if s := w.status(); s.State != exec.StateInstalled {
				w.Errorf("%s, repaired: %s", d.name, said(s))
			}
		}
		w.uninstall()
		if s := w.status(); s.State != exec.StateAbsent {
			w.Errorf("uninstalled: %s", said(s))
		}
	})
}

// What each rule of ours has counted is there.
func TestStatusCounts(t *testing.T) {
	eachVariant(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		w.install(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}})
		w.check(flow{"A5", "outside host:80 => in"}, flow{"A3", "outside host:22 => app"}, flow{"B11", "1000 internet:80 => out"},
			flow{"C3", "1000 udp internet:53 => dns"}, flow{"B0", "5678 loopback:15006 => refused"})
		sum := map[string]uint64{}
		for _, c := range w.status().Counters {
			sum[c.Verdict] += c.Packets
		}
		for verdict, want := range map[string]uint64{"in": 2, "out": 2, "dns": 2, "refused": 2} {
			if sum[verdict] != want {
				w.Errorf("%d %s, want %d", sum[verdict], verdict, want)
			}
		}
		if sum["excluded"] < 2 {
			w.Errorf("%d excluded", sum["excluded"])
		}
	})
}

// Whatever somebody does to the rules, Status never says installed where a flow goes
// wrong, and after a repair it says installed again.
func TestStatusSeesRandomEdits(t *testing.T) { vandals(t, 12, 1) }

func TestStressStatusSeesRandomEdits(t *testing.T) {
	onlyIn(t, "stress")
	vandals(t, 200, 3)
}

func vandals(t *testing.T, edits int, seed uint64) {
	eachVariant(t, func(w *world) {
		x := newWatched(w)
		if s := x.status(); s.State != exec.StateInstalled {
			w.Fatalf("nothing was done, and the state is %s", said(s))
		}
		if wrong := x.wrong(true, false); len(wrong) > 0 {
			w.Fatalf("nothing was done:\n%s", strings.Join(wrong, "\n"))
		}
		v := vandal{rand.New(rand.NewPCG(seed, uint64(len(w.backend.String())))), x, 0}
		states := map[string]int{}
		var took time.Duration
		for n := range edits {
			v.f = rules.Families()[v.IntN(2)]
			e := v.edit()
			what := fmt.Sprintf("%d: %s, %s %s", n, e.kind, x.program(v.f, ""), e.args)
			var err error
			if e.do != nil {
				err = e.do()
			} else {
				err = x.iptable(v.f, e.args)
			}
			if err != nil {
				w.Logf("%s: %v", what, err)
			}
			begin := time.Now()
			s := x.status()
			took += time.Since(begin)
			wrong := x.wrong(s.State == exec.StateInstalled, e.foreign())
			key := string(s.State) + ", flows right"
			if len(wrong) > 0 {
				key = string(s.State) + ", flows wrong"
			}
			states[key]++
			if len(wrong) > 0 && s.State == exec.StateInstalled {
				w.Errorf("FALSE %s\n%s%s", what, said(s), strings.Join(wrong[:min(6, len(wrong))], "\n"))
			}
			if testing.Verbose() {
				w.Logf("%s => %s%d wrong", what, said(s), len(wrong))
			}
			x.wipe()
			x.put()
			if s := x.status(); s.State != exec.StateInstalled {
				w.Fatalf("after %s and a repair: %s", what, said(s))
			}
		}
		for _, k := range slices.Sorted(maps.Keys(states)) {
			w.Logf("%d times %s", states[k], k)
		}
		w.Logf("a look took %s", took/time.Duration(edits))
	})
}
