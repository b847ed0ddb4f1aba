package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

const (
	proxyUID    = 5678
	appUID      = 1000
	excludedUID = 1001
)

// lab is a pod, which is the lab's host, and the plugin as a runtime calls it, in this
// process.
type lab struct {
	*testing.T
	*netlab.Lab
	plugin   Plugin
	out, log bytes.Buffer
}

func newLab(t *testing.T) *lab {
	t.Helper()
	netlab.Require(t, "ip", "nft", "iptables-nft-save", "iptables-legacy-save")
	l, err := netlab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	w := &lab{T: t, Lab: l}
	w.plugin.Stdout, w.plugin.Stderr = &w.out, &w.log
	return w
}

// args are those of the pod, with annotations and with more in the plugin's entry.
func (w *lab) args(more map[string]any, annotations ...string) *skel.CmdArgs {
	all := runtimeConfig(injected(annotations...))
	maps.Copy(all, more)
	a := args(entry(all))
	a.Netns = w.Host.Path()
	return a
}

func (w *lab) add(a *skel.CmdArgs) {
	w.Helper()
	if err := w.plugin.add(w.Context(), a); err != nil {
		w.Fatal(err)
	}
}

// save is everything that iptables has in the pod, and our table of nftables, without
// counters.
func (w *lab) save(n *netlab.Namespace) (all string) {
	w.Helper()
	for _, p := range []string{"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"} {
		out, err := w.Lab.Run(w.Context(), n, "", p)
		if err != nil {
			w.Fatal(err)
		}
		for line := range strings.Lines(out) {
			if strings.HasPrefix(line, "-A") {
				all += p + " " + line
			}
		}
	}
	return all + w.table(n)
}

// table is our table of nftables as nft lists it, without counters; empty where there is
// none.
func (w *lab) table(n *netlab.Namespace) string {
	w.Helper()
	tables, err := w.Lab.Run(w.Context(), n, "", "nft", "list", "tables", "inet")
	if err != nil {
		w.Fatal(err)
	}
	if !strings.Contains(tables, tproxy.NFTable) {
		return ""
	}
	text, err := w.Lab.Run(w.Context(), n, "", "nft", "--stateless", "list", "table", "inet", tproxy.NFTable)
	if err != nil {
		w.Fatal(err)
	}
	return text
}

// iptables is the entry's config for a variant of iptables.
var iptables = map[string]any{"config": map[string]string{"backend": "iptables-nft"}}

// proxy starts a proxy in the pod, and servers around.
func (w *lab) proxy() {
	w.Helper()
	p := &netlab.Proxy{UID: proxyUID, In: 15006, Out: 15001, DNS: 15053}
	any4, any6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	_, err1 := w.ListenTCP(w.Host, appUID, "app", netip.AddrPortFrom(any4, 8080), netip.AddrPortFrom(any6, 8080), netip.AddrPortFrom(any4, 1234), netip.AddrPortFrom(any6, 1234), netip.AddrPortFrom(any4, 22))
	_, err2 := w.ListenTCP(w.Client, 0, "remote", netip.AddrPortFrom(any4, 80), netip.AddrPortFrom(any6, 80), netip.AddrPortFrom(any4, 443))
	_, err3 := w.ListenUDP(w.Client, 0, "resolver", netip.AddrPortFrom(netlab.Resolver4, 53), netip.AddrPortFrom(netlab.Resolver6, 53))
	if err := errors.Join(p.Start(w.Lab), err1, err2, err3); err != nil {
		w.Fatal(err)
	}
}

// flow is who is to answer.
func (w *lab) flow(what string, from *netlab.Namespace, uid uint32, network string, to netip.Addr, port uint16, want string) {
	w.Helper()
	seen, err := w.Dial(from, uid, network, netip.AddrPort{}, netip.AddrPortFrom(to, port))
	if err != nil || seen.Who != want {
		w.Errorf("%s: %s %s:%d by UID %d is answered by %s, %v; want %s", what, network, to, port, uid, seen, err, want)
	}
}

// Rules for a pod with one port, and one user, excluded: contract.md section 2.
func (w *lab) meshed() {
	w.Helper()
	for i, host := range []netip.Addr{netlab.Host4, netlab.Host6} {
		internet, resolver := []netip.Addr{netlab.Internet4, netlab.Internet6}[i], []netip.Addr{netlab.Resolver4, netlab.Resolver6}[i]
		w.flow("A5", w.Client, 0, "tcp", host, 8080, "in")
		w.flow("A3", w.Client, 0, "tcp", host, 1234, "app")
		w.flow("A5, SSH", w.Client, 0, "tcp", host, 22, "in")
		w.flow("B11", w.Host, appUID, "tcp", internet, 80, "out")
		w.flow("B3", w.Host, proxyUID, "tcp", internet, 80, "remote")
		w.flow("B7", w.Host, excludedUID, "tcp", internet, 80, "remote")
		w.flow("C3", w.Host, appUID, "udp", resolver, 53, "dns")
		w.flow("C1", w.Host, proxyUID, "udp", resolver, 53, "resolver")
	}
}

// direct is a pod without rules.
func (w *lab) direct() {
	w.Helper()
	w.flow("no rules", w.Client, 0, "tcp", netlab.Host4, 8080, "app")
	w.flow("no rules", w.Host, appUID, "tcp", netlab.Internet4, 80, "remote")
	w.flow("no rules", w.Host, appUID, "udp", netlab.Resolver4, 53, "resolver")
}

var excluded = []string{"traffic.kuma.io/exclude-inbound-ports", "1234", "traffic.kuma.io/exclude-outbound-ports-for-uids", "tcp:*:1001;"}

func TestPod(t *testing.T) {
	for _, backend := range []tproxy.Backend{tproxy.Auto, tproxy.NFTables, tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
		t.Run(backend.String(), func(t *testing.T) {
			w := newLab(t)
			outside := w.save(w.Client)
			w.proxy()
			w.direct()
			more := map[string]any{"config": map[string]string{"backend": backend.String()}}
			a := w.args(more, excluded...)
			w.add(a)
			if w.out.String() != previous+"\n" {
				t.Errorf("printed %q", &w.out)
			}
			w.meshed()
			installed := w.save(w.Host)
			native := backend == tproxy.Auto || backend == tproxy.NFTables
			if native != (w.table(w.Host) == installed) || native != strings.Contains(w.log.String(), `"backend":"nftables"`) || native != strings.Contains(w.log.String(), `"processes":0`) {
				t.Errorf("installed: %s\n%s", installed, &w.log)
			}
			w.add(a) // the same again
			if again := w.save(w.Host); again != installed || !strings.Contains(w.log.String(), `"changed":false`) {
				t.Errorf("changed by the same again: %s", again)
			}
			for _, a := range []*skel.CmdArgs{a, w.args(map[string]any{"runtimeConfig": nil})} {
				if err := w.plugin.check(t.Context(), a); err != nil {
					t.Errorf("CHECK: %v", err)
				}
			}
			e := cniError(t, w.plugin.check(t.Context(), w.args(more, "traffic.kuma.io/exclude-inbound-ports", "9")))
			if e.Code != ErrDiffers || !strings.Contains(e.Details, "redirect.inbound.excludePorts") {
				t.Errorf("CHECK of other annotations: %v", e)
			}
			w.add(w.args(more, "traffic.kuma.io/exclude-inbound-ports", "8080")) // another in one step
			w.flow("A3", w.Client, 0, "tcp", netlab.Host4, 8080, "app")
			w.flow("A5", w.Client, 0, "tcp", netlab.Host4, 1234, "in")
			for range 2 {
				if err := w.plugin.del(t.Context(), a); err != nil {
					t.Error(err)
				}
				w.direct()
			}
			if left := w.save(w.Host); strings.Contains(left, "KUMA") {
				t.Errorf("left: %s", left)
			}
			if now := w.save(w.Client); now != outside {
				t.Errorf("another namespace has now %s", now)
			}
		})
	}
}

// CHECK sees what is taken out of the rules, or put in, and that all are gone.
func TestCheckSeesDrift(t *testing.T) {
	for backend, edits := range map[tproxy.Backend]struct {
		drift []string
		gone  string
	}{
		tproxy.IPTablesNFT: {[]string{
			"iptables-nft -t nat -D KUMA_MESH_INBOUND 1",
			"ip6tables-nft -t nat -I KUMA_MESH_OUTBOUND 1 -p tcp --dport 9 -j RETURN",
			"ip -6 address delete ::6/128 dev lo",
			"iptables-nft -t nat -F && ip6tables-nft -t nat -F",
		}, "for f in iptables-nft ip6tables-nft; do for t in nat raw; do $f -t $t -F; $f -t $t -X; done; done"},
		tproxy.NFTables: {[]string{
			"nft flush chain inet kuma-tproxy nat.KUMA_MESH_INBOUND",
			"nft insert rule inet kuma-tproxy nat.KUMA_MESH_OUTBOUND tcp dport 9 return",
			"ip -6 address delete ::6/128 dev lo",
			"nft flush table inet kuma-tproxy",
		}, "nft delete table inet kuma-tproxy"},
	} {
		t.Run(backend.String(), func(t *testing.T) {
			newLab(t).checks(backend, edits.drift, edits.gone)
		})
	}
}

func (w *lab) checks(backend tproxy.Backend, drift []string, gone string) {
	w.Helper()
	ctx, p := w.Context(), &w.plugin
	more := map[string]any{"config": map[string]string{"backend": backend.String()}}
	a, nobody := w.args(more, excluded...), w.args(map[string]any{"runtimeConfig": nil})
	if err := p.check(ctx, nobody); err != nil {
		w.Errorf("a pod that never had rules: %v", err)
	}
	w.add(a)
	for _, do := range drift {
		if _, err := w.Lab.Run(ctx, w.Host, "", "sh", "-c", do); err != nil {
			w.Fatal(err)
		}
		for _, a := range []*skel.CmdArgs{a, nobody} {
			if e := cniError(w.T, p.check(ctx, a)); e.Code != ErrDiffers && e.Code != ErrUntold {
				w.Errorf("%s: %v", do, e)
			}
		}
		w.add(a)
		if err := p.check(ctx, a); err != nil {
			w.Errorf("ADD does not mend %s: %v", do, err)
		}
	}
	if _, err := w.Lab.Run(ctx, w.Host, "", "sh", "-c", gone); err != nil {
		w.Fatal(err)
	}
	for _, a := range []*skel.CmdArgs{a, nobody} {
		if e := cniError(w.T, p.check(ctx, a)); e.Code != ErrDiffers || !strings.Contains(e.Msg, "nothing is installed") {
			w.Errorf("all gone: %v", e)
		}
	}
}

// Paths that lead to no network namespace: ADD says so and touches nothing, DEL is done.
func TestNoNamespace(t *testing.T) {
	w := newLab(t)
	dir := t.TempDir()
	file, fifo, gone := filepath.Join(dir, "file"), filepath.Join(dir, "fifo"), filepath.Join(dir, "gone")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), syscall.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	before := w.save(w.Host)
	for _, path := range []string{file, fifo, gone, dir, filepath.Join(file, "x"), "/dev/null", "/proc/self/ns/mnt", "/proc/self/ns/user", "/proc/self/status", "/proc/999999999/ns/net"} {
		a := w.args(nil)
		a.Netns = path
		e := cniError(t, w.plugin.add(t.Context(), a))
		if e.Code != types.ErrInvalidNetNS || !strings.Contains(e.Error(), path) || !strings.Contains(e.Error(), "demo/web") {
			t.Errorf("ADD %s: code %d: %v", path, e.Code, e)
		}
		if err := w.plugin.del(t.Context(), a); err != nil {
			t.Errorf("DEL %s: %v", path, err)
		}
	}
	if after := w.save(w.Host); after != before || w.out.Len() > 0 {
		t.Errorf("changed: %s, printed %q", after, &w.out)
	}
	// The runtime's own is the host's network: left alone.
	a := w.args(nil)
	a.Netns = "/proc/self/ns/net"
	w.add(a)
	out, err := osexec.Command("nft", "list", "ruleset").Output()
	if err != nil || bytes.Contains(out, []byte("KUMA")) {
		t.Errorf("%v: %s", err, out)
	}
}

// An ADD that fails half-way leaves nothing, of either family, nor an address.
func TestFailedAddLeavesNothing(t *testing.T) {
	w := newLab(t)
	bin := t.TempDir()
	real, err := osexec.LookPath("ip6tables-legacy-restore")
	if err == nil {
		err = os.WriteFile(filepath.Join(bin, "ip6tables-legacy-restore"),
			fmt.Appendf(nil, "#!/bin/sh\n[ \"$1\" = --version ] && exec %s --version\necho no such luck >&2; exit 1\n", real), 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	path := os.Getenv("PATH")
	before := w.save(w.Host)
	for _, policy := range []string{Refuse, Pass} {
		t.Setenv("PATH", bin+":"+path)
		err := w.plugin.add(t.Context(), w.args(map[string]any{"config": map[string]string{"backend": "iptables-legacy"}, "onFailure": policy}))
		t.Setenv("PATH", path)
		if policy == Refuse {
			if e := cniError(t, err); e.Code != ErrRules || !strings.Contains(e.Details, "no such luck") || w.out.Len() > 0 {
				t.Errorf("%v, printed %q", e, &w.out)
			}
		} else if err != nil || w.out.String() != previous+"\n" {
			t.Errorf("%v, printed %q", err, &w.out)
		}
		if after := w.save(w.Host); after != before {
			t.Errorf("left: %s", after)
		}
		if out, err := w.Lab.Run(t.Context(), w.Host, "", "ip", "-6", "address", "show", "lo"); err != nil || strings.Contains(out, "::6/") {
			t.Errorf("%v: %s", err, out)
		}
	}
}

// Each pod has a lock of its own: somebody who holds the host's, or another pod's,
// keeps nobody waiting.
func TestLockIsThePods(t *testing.T) {
	w := newLab(t)
	legacy := map[string]any{"config": map[string]any{"backend": "iptables-legacy", "wait": 1, "retry": map[string]any{"maxRetries": 0}}}
	hold := func(path string) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o600)
		if err == nil {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
	}
	hold("/run/xtables.lock") // in the lab's own /run
	hold(w.Client.Path())
	start := time.Now()
	w.add(w.args(legacy))
	if took := time.Since(start); took > 900*time.Millisecond {
		t.Errorf("ADD took %s", took)
	}
	if err := w.plugin.del(t.Context(), w.args(legacy)); err != nil || strings.Contains(w.save(w.Host), "KUMA") {
		t.Errorf("DEL: %v", err)
	}
	hold(w.Host.Path())
	e := cniError(t, w.plugin.add(t.Context(), w.args(legacy)))
	if e.Code != types.ErrTryAgainLater || !strings.Contains(e.Details, fmt.Sprintf("process %d ", os.Getpid())) {
		t.Errorf("code %d: %v", e.Code, e)
	}
}

// Several pods at once, by one process even: what one thread does stays in its pod.
func TestPodsAtOnce(t *testing.T) {
	netlab.Require(t, "ip", "iptables-nft-save")
	const n = 8
	labs := make([]*lab, n)
	for i := range labs {
		labs[i] = newLab(t)
	}
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i, w := range labs {
		wg.Go(func() {
			errs[i] = w.plugin.add(t.Context(), w.args(nil, "traffic.kuma.io/exclude-inbound-ports", fmt.Sprint(100+i)))
		})
	}
	wg.Wait()
	for i, w := range labs {
		if errs[i] != nil {
			t.Error(errs[i])
		}
		if saved := w.save(w.Host); strings.Count(saved, fmt.Sprintf("elements = { %d, 9001 }", 100+i)) != 1 {
			t.Errorf("pod %d has %s", i, saved)
		}
	}
	if here, err := osexec.Command("nft", "list", "ruleset").Output(); err != nil || bytes.Contains(here, []byte("KUMA")) {
		t.Errorf("%v: %s", err, here)
	}
}

// Nothing of the host's files counts for a pod: not even a resolv.conf that cannot be read.
func TestHostsFilesDoNotCount(t *testing.T) {
	w := newLab(t)
	fifo := filepath.Join(t.TempDir(), "resolv.conf")
	err := syscall.Mkfifo(fifo, 0o600)
	if err == nil {
		err = syscall.Mount(fifo, "/etc/resolv.conf", "", syscall.MS_BIND, "")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Unmount("/etc/resolv.conf", syscall.MNT_DETACH)
	w.proxy()
	w.add(w.args(nil, excluded...))
	w.meshed()
	if err := errors.Join(w.plugin.check(t.Context(), w.args(nil, excluded...)), w.plugin.del(t.Context(), w.args(nil))); err != nil {
		t.Error(err)
	}
	if strings.Contains(w.save(w.Host), "KUMA") {
		t.Errorf("DEL did not take the rules out: %s", &w.log)
	}
}

// What an ADD reads and starts, told by strace: no name service is asked, neither by the
// plugin nor by iptables, which has but empty files to look into. With nftables nothing is
// started, and no mount namespace made.
func TestAddReadsNothingOfTheHosts(t *testing.T) {
	for backend, programs := range map[tproxy.Backend]int{
		tproxy.Auto: 1, tproxy.IPTablesNFT: 3, // the plugin itself, and a restore for each family
	} {
		t.Run(backend.String(), func(t *testing.T) { newLab(t).reads(backend, programs) })
	}
}

func (w *lab) reads(backend tproxy.Backend, want int) {
	t := w.T
	netlab.Require(t, "strace")
	self, err := os.Executable()
	plugin, trace := filepath.Join(t.TempDir(), "kuma-cni"), filepath.Join(t.TempDir(), "trace")
	if err == nil {
		err = os.Symlink(self, plugin)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := osexec.Command("strace", "-f", "-qq", "-e", "trace=open,openat,execve,connect,unshare", "-o", trace, plugin)
	a := w.args(map[string]any{"config": map[string]string{"backend": backend.String()}})
	cmd.Stdin = bytes.NewReader(a.StdinData)
	cmd.Env = append(os.Environ(), "CNI_COMMAND=ADD", "CNI_CONTAINERID=c1", "CNI_NETNS="+a.Netns, "CNI_IFNAME=eth0", "CNI_PATH=/nowhere", "CNI_ARGS="+a.Args)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	programs, unshared := 0, false
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "execve(") && !strings.Contains(line, "ENOENT") {
			programs++
		}
		unshared = unshared || strings.Contains(line, "unshare(")
		for _, bad := range []string{"resolv.conf", "/etc/group", "nscd", "libnss", "userdb", "systemd", `"/proc/net`, `"/proc/self/net`, "/etc/hosts"} {
			if strings.Contains(line, bad) && !strings.Contains(line, "ENOENT") && !strings.Contains(line, "ECONNREFUSED") {
				t.Errorf("%s", line)
			}
		}
	}
	if programs != want || unshared != (want > 1) {
		t.Errorf("%d programs were started, not %d; a mount namespace was made: %t\n%s", programs, want, unshared, text)
	}
}

// The same pod gets the same rules as from kuma-init: from the Config alone, that is.
func TestRulesAreThoseOfTheConfig(t *testing.T) {
	w := newLab(t)
	w.add(w.args(iptables, excluded...))
	var c struct{ Config tproxy.Config }
	if err := json.Unmarshal([]byte(`{"config":{"kumaDPUser":"5678","backend":"iptables-nft","cniMode":true,"redirect":{"inbound":{"excludePorts":[1234,9001]},"outbound":{"excludePortsForUIDs":["tcp::1001"]},"dns":{"enabled":true,"captureAll":true}}}}`), &c); err != nil {
		t.Fatal(err)
	}
	plan, err := tproxy.Build(c.Config, tproxy.Host{})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range rules.Families() {
		out, err := w.Lab.Run(context.Background(), w.Host, "", map[rules.Family]string{rules.IPv4: "iptables-nft-save", rules.IPv6: "ip6tables-nft-save"}[f])
		if err != nil {
			t.Fatal(err)
		}
		all, err := rules.ParseSave(f, []byte(out))
		if err != nil {
			t.Fatal(err)
		}
		want := plan.WithRecord(tproxy.Record{Version: buildVersionOfTests(all), PassthroughAddressOurs: true})
		if d := rules.Compare(f, tproxy.Find(f, all).Ours, want); len(d) > 0 {
			t.Errorf("%s: %v", f, d)
		}
	}
}

// buildVersionOfTests is what the record says: it depends on how the test was built.
func buildVersionOfTests(all rules.Set) string {
	i := slices.IndexFunc(all.Chains, func(c rules.Chain) bool { _, name := tproxy.RecordChain(); return c.Name == name })
	if i < 0 {
		return ""
	}
	rec, _ := tproxy.ReadRecord(rules.Set{Chains: all.Chains[i : i+1]})
	return rec.Version
}
