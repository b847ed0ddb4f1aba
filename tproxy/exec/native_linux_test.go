package exec_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/nft"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// nftable is our table as nft(8) prints it, without counters, or "". The order of chains
// and sets says nothing.
func (w *world) nftable() string {
	w.Helper()
	text, err := w.Lab.Run(w.Context(), w.Host, "", "nft", "-s", "list", "table", "inet", tproxy.NFTable)
	if err != nil {
		return ""
	}
	parts := strings.Split(strings.TrimSuffix(strings.SplitN(text, "\n", 2)[1], "}\n"), "\n\n")
	for i, p := range parts {
		parts[i] = strings.TrimSuffix(p, "\n")
	}
	slices.Sort(parts)
	return strings.Join(parts, "\n")
}

// generation is the number of the last transaction of nf_tables.
func (w *world) generation() (n uint32) {
	w.Helper()
	if err := w.In(w.Host, func() error {
		c, err := nft.Open()
		if err != nil {
			return err
		}
		defer c.Close()
		_, n, err = c.List(tproxy.NFTable)
		return err
	}); err != nil {
		w.Fatal(err)
	}
	return n
}

// From each backend to each other one, in one install, no connection escapes, none that
// both exclude is caught, and those from before live on. bench/upgrade does it longer.
func TestMovesBetweenBackendsUnderLoad(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		c := tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("8080")}, DNS: tproxy.DNS{CaptureAll: true}}
		w.install(c)
		load, err := w.Load(
			netlab.Stream{Name: "in", From: w.Client, To: netip.AddrPortFrom(netlab.Host6, 80), Want: "in", Else: "app", Held: 10},
			netlab.Stream{Name: "out", From: w.Host, UID: appUID, To: netip.AddrPortFrom(netlab.Internet4, 443), Want: "out", Else: "remote", Held: 10},
			netlab.Stream{Name: "excluded", From: w.Client, To: netip.AddrPortFrom(netlab.Host4, 8080), Want: "app", Else: "in"})
		if err != nil {
			w.Fatal(err)
		}
		for range 2 {
			for _, b := range tproxy.Backends() {
				if b == w.backend {
					continue
				}
				for _, to := range []tproxy.Backend{b, w.backend} {
					c.Backend = to
					if r := w.install(c); !r.Changed || r.Backend != to {
						w.Errorf("to %s: %+v", to, r)
					}
				}
			}
		}
		unharmed(w, load)
	})
}

// kubeProxy is the table that kube-proxy has in its mode nftables, with one service of
// one endpoint (pkg/proxy/nftables in kubernetes).
const kubeProxy = `table %[1]s kube-proxy {
	map service-ips {
		type %[2]s . inet_proto . inet_service : verdict
		elements = { %[3]s . tcp . 443 : goto service-one }
	}
	chain nat-prerouting { type nat hook prerouting priority -100; policy accept; jump services; }
	chain nat-output { type nat hook output priority -100; policy accept; jump services; }
	chain nat-postrouting { type nat hook postrouting priority 100; policy accept; jump masquerading; }
	chain services { %[1]s daddr . meta l4proto . th dport vmap @service-ips; }
	chain service-one { meta l4proto tcp counter dnat to %[4]s; }
	chain masquerading { meta mark and 0x4000 != 0 masquerade; }
}
`

// firewalldTable is of the kind that firewalld has: hooks of its own at its own
// priorities, and a port that it forwards.
const firewalldTable = `table inet firewalld {
	chain mangle_PREROUTING { type filter hook prerouting priority mangle + 10; policy accept; }
	chain nat_PREROUTING { type nat hook prerouting priority -90; policy accept; tcp dport 9090 counter redirect to :80; }
	chain nat_OUTPUT { type nat hook output priority -90; policy accept; }
	chain nat_POSTROUTING { type nat hook postrouting priority 110; policy accept; oifname "eth9" masquerade; }
	chain filter_INPUT { type filter hook input priority filter + 10; policy accept; ct state established,related accept; ct status dnat accept; iifname "lo" accept; }
}
`

// Beside the tables of kube-proxy and firewalld, and rules of both variants of iptables,
// flows go where the contract says: what others translate on its way in they translate,
// what a process sends is ours first, and what we leave alone is theirs.
func TestBesideTablesOfOthers(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		for i, a := range []string{"10.96.0.1", "fd96::1"} {
			f, family, kind, to := rules.Families()[i], "ip", "ipv4_addr", netlab.Internet4.String()+":443"
			if i == 1 {
				family, kind, to = "ip6", "ipv6_addr", "["+netlab.Internet6.String()+"]:443"
			}
			w.on(fmt.Sprintf(kubeProxy, family, kind, a, to), "nft", "-f", "-")
			for _, v := range variants {
				program := v.String()
				if f == rules.IPv6 {
					program = "ip6" + strings.TrimPrefix(program, "ip")
				}
				w.on("", program, strings.Fields("-t nat -A PREROUTING -p tcp --dport 9091 -j REDIRECT --to-ports 443")...)
			}
		}
		w.on(firewalldTable, "nft", "-f", "-")
		before := w.on("", "nft", "-s", "list", "ruleset")
		w.proxy(netlab.Answer)
		c := tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}, Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("8080")}}
		for range 2 { // the second is the same again
			w.install(c)
			w.check(
				flow{"A5", "outside host:80 => in"}, flow{"A3", "outside host:8080 => app"}, flow{"A3", "outside host:22 => app"},
				flow{"theirs", "outside host:9091 => app"},
				flow{"B11", "1000 service:443 => out"}, flow{"B11", "1000 internet:443 => out"},
				flow{"B3", "5678 service:443 => remote for internet:443"}, flow{"B3", "5678 internet:80 => remote"},
				flow{"B2", "5678 host:80 => in"}, flow{"C3", "1000 udp resolver:53 => dns"}, flow{"C1", "5678 udp resolver:53 => resolver"})
		}
		w.uninstall()
		if w.backend == tproxy.NFTables {
			w.same("the rules of others", before, w.on("", "nft", "-s", "list", "ruleset"))
		}
		w.check(flow{"gone", "outside host:80 => app"}, flow{"gone", "1000 service:443 => remote for internet:443"})
	})
}

// Sets of ten thousand elements: in, the same again, another list in their place, out.
func TestTenThousandExclusions(t *testing.T) {
	w := newWorld(t, tproxy.NFTables)
	w.serve()
	w.proxy(netlab.Answer)
	config := func(from int) (c tproxy.Config) {
		var ports strings.Builder
		for i := range 10000 {
			fmt.Fprintf(&ports, "%d,", from+2*i)
			n := uint32(from + 2*i)
			c.Outbound.ExcludeIPs = append(c.Outbound.ExcludeIPs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 32))
		}
		c.Inbound.ExcludePorts = rules.MustPorts(ports.String() + "65000")
		c.Outbound.ExcludePorts = c.Inbound.ExcludePorts
		return c
	}
	flows := func(odd bool) {
		w.Helper()
		in, out := "app", "remote"
		if odd {
			in, out = "in", "out"
		}
		// 80 and 8080 are even, 443 is not; 65000 is in both lists.
		w.check(flow{"A3", "outside host:80 => " + in}, flow{"A3", "outside host:8080 => " + in}, flow{"B8", "1000 internet:80 => " + out})
	}
	even, odd := config(2), config(1)
	if r := w.install(even); !r.Changed {
		w.Errorf("%+v", r)
	}
	flows(false)
	generation := w.generation()
	if r := w.install(even); r.Changed || w.generation() != generation {
		w.Errorf("the same again: %+v", r)
	}
	if r := w.install(odd); !r.Changed {
		w.Errorf("%+v", r)
	}
	flows(true)
	if r := w.uninstall(); !r.Changed || w.nftable() != "" {
		w.Errorf("%+v", r)
	}
}

// What somebody has put into our table goes with the next install, and where that fails
// behind it, the error says that it is gone. One that changes nothing leaves it.
func TestRulesOfOthersInOurTable(t *testing.T) {
	w := newWorld(t, tproxy.NFTables)
	w.install(faultOther)
	const theirs = "add rule inet kuma-tproxy nat.KUMA_MESH_INBOUND tcp option maxseg size 1-1000 accept\n"
	w.on(theirs, "nft", "-f", "-")
	before := w.nftable()
	if r, err := w.remove(exec.RemoveOptions{DryRun: true}); err != nil || len(r.Steps) == 0 {
		w.Errorf("%+v, %v", r, err)
	}
	w.same("after a dry run", before, w.nftable())
	p, err := w.plan(faultConfig)
	if err != nil {
		w.Fatal(err)
	}
	// ::6 goes, and cannot come back: IPv6 is off on lo when the rules are there.
	w.on("", "ip", "address", "del", "::6/128", "dev", "lo")
	if err := w.Sysctl(w.Host, "net/ipv6/conf/lo/disable_ipv6", "1"); err != nil {
		w.Fatal(err)
	}
	_, err = w.apply(p)
	e, ok := errors.AsType[*exec.ApplyError](err)
	if !ok || len(e.Left) != 1 || !strings.Contains(e.Left[0], "what others had in the table inet kuma-tproxy is gone: a rule of chain nat.KUMA_MESH_INBOUND") {
		w.Errorf("%#v", err)
	}
	w.same("put back, but for that", onlyLines(before, "KUMA_MESH_RECORD"), onlyLines(w.nftable(), "KUMA_MESH_RECORD"))
	if strings.Contains(w.nftable(), "maxseg") {
		w.Error("it is there: the test shows nothing")
	}
}

// tracedCalls counts the calls in strace's output.
var tracedCalls = regexp.MustCompile(`(?m)^(?:\d+ +)?(sendto|recvfrom)\(`)

// A system call of an install by netlink fails, or the process is killed in it: then all
// is as before or as after, and as before where it lived and failed; and the same without
// flags finishes the job.
func TestFaultsOfNetlink(t *testing.T) { netlinkFaults(t, 4) }

func netlinkFaults(t *testing.T, times int) {
	netlab.Require(t, "strace")
	kinds := []string{"error=ENOBUFS", "error=EPERM", "error=EINTR", "error=ENOMEM", "signal=SIGKILL"}
	for _, c := range changes {
		if c.name == "from Kuma" {
			continue // the faults would be iptables-nft-save's too, which prints less then, and says nothing
		}
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, tproxy.NFTables)
			c.start(w)
			before := w.perTable()
			if err := c.run(w); err != nil {
				w.Fatal(err)
			}
			after := w.perTable()
			log := filepath.Join(w.TempDir(), "log")
			reset := func() { w.uninstall(); c.start(w) }
			reset()
			if err := w.traced(c.name, log, "trace=sendto,recvfrom"); err != nil {
				w.Fatal(err)
			}
			text, err := os.ReadFile(log)
			if err != nil {
				w.Fatal(err)
			}
			calls := map[string]int{}
			for _, m := range tracedCalls.FindAllSubmatch(text, -1) {
				calls[string(m[1])]++
			}
			tried := 0
			for i := range times {
				call, kind := []string{"sendto", "recvfrom"}[i%2], kinds[rand.IntN(len(kinds))]
				// The last ones of a thread are the commit and its answer.
				n := max(1, calls[call]-rand.IntN(1+min(calls[call], 2+i*2)))
				reset()
				what := fmt.Sprintf("%s of %s number %d", kind, call, n)
				failed := w.traced(c.name, log, fmt.Sprintf("trace=%s", call), fmt.Sprintf("inject=%s:%s:when=%d", call, kind, n))
				text, _ := os.ReadFile(log)
				if struck.Match(text) {
					tried++
				}
				now := w.perTable()
				for table, text := range now {
					if text != before[table] && text != after[table] {
						w.Errorf("%s: %s is neither as before nor as after:\n%s", what, table, text)
					}
				}
				switch {
				case strings.Contains(kind, "KILL"):
				case failed == nil:
					w.sameTables(what+", without an error", now, after)
				default:
					w.sameTables(fmt.Sprintf("%s, undone after %v", what, failed), now, before)
				}
				if err := c.run(w); err != nil {
					w.Errorf("%s: the next run fails: %v", what, err)
				}
				w.sameTables(what+", and the next run", w.perTable(), after)
			}
			w.Logf("%d faults of %d tries; %v calls", tried, times, calls)
		})
	}
}

// traced makes a change in a process of its own under strace.
func (w *world) traced(name, log string, expressions ...string) error {
	w.Helper()
	_ = os.Remove(log)
	child := w.child(name)
	args := []string{"-f", "-o", log}
	for _, e := range expressions {
		args = append(args, "-e", e)
	}
	cmd := osexec.CommandContext(w.Context(), "strace", append(args, "/proc/"+strconv.Itoa(os.Getpid())+"/exe")...)
	// One thread runs Go code at a time, so that most calls are of one.
	cmd.Env, cmd.SysProcAttr = append(child.Env, "GOMAXPROCS=1"), &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var says strings.Builder
	cmd.Stderr = &says
	if err := w.In(w.Host, cmd.Start); err != nil {
		w.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, says.String())
	}
	return nil
}

// Beside a client of nf_tables that commits again and again, in a table of its own, installs
// and uninstalls come through, and lose nothing of its.
func TestBesideABusyNetlinkClient(t *testing.T) {
	w := newWorld(t, tproxy.NFTables)
	const table = "busy"
	chain := rules.NativeChain{Name: "filter.BUSY"}
	send := func(c *nft.Conn, commands ...rules.NativeCommand) error {
		return c.Send(nft.Encode(commands, binary.NativeEndian), 0)
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	commits := 0
	go func() {
		done <- w.In(w.Host, func() error {
			c, err := nft.Open()
			if err != nil {
				return err
			}
			defer c.Close()
			err = send(c, rules.NativeCommand{Verb: rules.AddTable, Table: table}, rules.NativeCommand{Verb: rules.AddChain, Table: table, Chain: chain})
			for ; err == nil; commits++ {
				select {
				case <-stop:
					return nil
				case <-time.After(100 * time.Microsecond): // without a pause the kernel gives nobody a list in one piece
					err = send(c, rules.NativeCommand{Verb: rules.AddRule, Table: table, Chain: chain, Rule: rules.NativeRule{Action: rules.Return{}}})
				}
			}
			return err
		})
	}()
	retries := 0
	for range 20 {
		retries += w.install(faultConfig).Retries + w.install(faultOther).Retries + w.uninstall().Retries
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(w.on("", "nft", "list", "table", "inet", table), "return"); n != commits {
		t.Errorf("%d of %d rules are there", n, commits)
	}
	t.Logf("60 installs, upgrades and uninstalls beside %d commits; tried again %d times", commits, retries)
}
