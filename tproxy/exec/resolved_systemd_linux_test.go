package exec_test

import (
	"fmt"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/bootlab"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
)

// systemdSuite skips a test with a booted systemd unless TPROXY_SUITE names systemd.
func systemdSuite(t *testing.T) {
	t.Helper()
	onlyIn(t, "systemd")
	err := error(nil)
	for _, p := range bootlab.Programs {
		if _, e := osexec.LookPath(p); err == nil {
			err = e
		}
	}
	if err == nil && os.Geteuid() != 0 {
		err = os.ErrPermission
	}
	if err != nil {
		cannotRun(t, "systemd", "nothing to boot: %v", err)
	}
	netlab.Require(t)
}

// The control plane's DNS server, by either family.
var plane4, plane6 = netlab.Internet4, netlab.Internet6

// debian is what a test has of a booted Debian: its network is that of the lab's
// host, its uplink's server is the lab's resolver.
type debian struct {
	*world
	*bootlab.Machine
	root            string
	uplink, control server
}

// server is a DNS server outside, and its log.
type server struct {
	log string
	end func()
}

// logged starts a server that logs each query; what it answers is args' to say.
func (w *world) logged(name string, args ...string) server {
	w.Helper()
	s := server{log: filepath.Join(w.TempDir(), name+".log")}
	cmd := osexec.Command("dnsmasq", append([]string{"--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file=", "--bind-interfaces",
		"--cache-size=0", "--user=root", "--log-queries", "--log-facility=" + s.log}, args...)...)
	if err := w.In(w.Client, cmd.Start); err != nil {
		w.Fatal(err)
	}
	s.end = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	w.Cleanup(s.end)
	w.until(func() bool { text, _ := os.ReadFile(s.log); return strings.Contains(string(text), "started") })
	return s
}

var asked = regexp.MustCompile(`query\[\w+\] (\S+) from`)

// names are those that a server was asked for since the last call.
func (s *server) names(t *testing.T) (out []string) {
	t.Helper()
	text, err := os.ReadFile(s.log)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range asked.FindAllStringSubmatch(string(text), -1) {
		out = append(out, m[1])
	}
	if err := os.Truncate(s.log, 0); err != nil {
		t.Fatal(err)
	}
	return out
}

// do runs a program in the machine, which must succeed.
func (d *debian) do(name string, args ...string) string {
	d.Helper()
	out, err := d.Machine.Run(d.Context(), name, args...)
	if err != nil {
		d.Fatalf("%v\n%s", err, out)
	}
	return out
}

// restart restarts systemd-resolved, however often.
func (d *debian) restart() {
	d.Helper()
	d.do("systemctl", "reset-failed", "systemd-resolved") // of starts in a row (systemd.unit(5), StartLimitBurst=)
	d.do("systemctl", "restart", "systemd-resolved")
}

// kumactl runs the command in the machine.
func (d *debian) kumactl(verb string, args ...string) (string, error) {
	return d.Machine.Run(d.Context(), "kumactl", append([]string{verb, "transparent-proxy"}, args...)...)
}

func (d *debian) must(verb string, args ...string) string {
	d.Helper()
	out, err := d.kumactl(verb, args...)
	if err != nil {
		d.Fatalf("%v\n%s", err, out)
	}
	return out
}

// state is everything that an install changes, as text.
func (d *debian) state() string {
	return d.do("sh", "-c", "for f in iptables ip6tables; do for v in nft legacy; do $f-$v-save | grep '^-A'; done; done; nft --stateless list ruleset inet; ip -br link | cut -d' ' -f1; ip -br address show dev lo; "+
		"find /etc/systemd /etc/resolv.conf /run/systemd/resolve/netif -printf '%M %p %l\n'; resolvectl domain; resolvectl dns")
}

// resolves reports whether a program of the C library finds the name at the address
// that the control plane gives it.
func (d *debian) resolves(name string) bool {
	out, err := d.Machine.Run(d.Context(), "getent", "ahostsv4", name)
	return err == nil && strings.Contains(out, answered.String())
}

const (
	outsideNames = 100
	// askOthers asks for names outside of the mesh, of which every other one exists,
	// through systemd-resolved's own cache, from which none comes.
	askOthers = `for i in $(seq 1 100); do [ $((i % 2)) = 0 ] && d=here.example || d=gone.example; resolvectl query --cache=no --legend=no n$i.$1.$d >/dev/null 2>&1; done; true`
)

// others asks for outsideNames names outside of the mesh, and returns how long that
// took.
func (d *debian) others(tag string) time.Duration {
	d.Helper()
	start := time.Now()
	d.do("sh", "-c", askOthers, "sh", tag)
	return time.Since(start)
}

// TestSystemdResolvedAsksForTheMeshAlone: names of the mesh are asked of the control
// plane, and no other name is, with the control plane alive or dead, before and after
// systemd-resolved restarts; and the uninstall leaves the host as it was. The logs of
// both servers are the evidence.
func TestSystemdResolvedAsksForTheMeshAlone(t *testing.T) {
	systemdSuite(t)
	netlab.Require(t, "dnsmasq")
	tool, err := tool()
	if err != nil {
		t.Fatal(err)
	}
	for _, suite := range []struct {
		name string
		by   tproxy.Split
	}{{"bookworm", tproxy.SplitLink}, {"forky", tproxy.SplitDelegate}} {
		t.Run(suite.name, func(t *testing.T) {
			t.Parallel() // most of it is downloading
			d := bootDebian(t, suite.name, tool)
			planes := []netip.Addr{plane4}
			if suite.by == tproxy.SplitDelegate {
				planes = append(planes, plane6)
			}
			for _, b := range []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy} {
				for _, p := range planes {
					d.asksForTheMeshAlone(b, p)
				}
			}
			d.seesALeak()
			d.changesAndRefusals(suite.by)
			d.redirectsWithoutALoop()
			if suite.by == tproxy.SplitLink {
				d.fails()
			}
		})
	}
}

// bootDebian makes a Debian and boots it on the lab's host.
func bootDebian(t *testing.T, suite, tool string) *debian {
	t.Helper()
	w := newWorld(t, tproxy.IPTablesNFT)
	image := bookworm
	if suite != image.Suite {
		image = bootlab.Image{Suite: suite, Packages: []string{"systemd", "systemd-sysv", "systemd-resolved", "libnss-resolve", "dbus", "iptables", "iproute2"}}
	}
	root := rootWith(t, image, tool)
	d := &debian{world: w, root: root}
	d.uplink = w.logged("uplink", "--listen-address="+netlab.Resolver4.String(), "--address=/here.example/"+answered.String(), "--address=/gone.example/")
	d.startControl()
	var err error
	if d.Machine, err = bootlab.Boot(t.Context(), root, "kuma-tproxy-"+suite, w.Host.Path()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Machine.Close)
	d.do("useradd", "--uid", fmt.Sprint(proxyUID), "kuma-dp")
	d.do("resolvectl", "dns", "eth0", netlab.Resolver4.String())
	t.Logf("%s", d.do("systemctl", "--version"))
	return d
}

// rootWith is a copy of a Debian with kumactl in it.
func rootWith(t *testing.T, image bootlab.Image, tool string) (root string) {
	t.Helper()
	root = filepath.Join(t.TempDir(), image.Suite)
	remove, err := image.Copy(t.Context(), root, netlab.Outside())
	if err != nil {
		cannotRun(t, "systemd", "no %s to be had: %v", image.Suite, err)
	}
	t.Cleanup(remove)
	text, err := os.ReadFile(tool)
	if err == nil {
		err = os.WriteFile(filepath.Join(root, "usr/local/bin/kumactl"), text, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// startControl starts the control plane's server. It knows every name of the mesh.
func (d *debian) startControl() {
	d.Helper()
	d.control = d.logged("control", "--listen-address="+plane4.String(), "--listen-address="+plane6.String(), "--address=/mesh/"+answered.String())
}

// asksForTheMeshAlone is the test for one variant of iptables and one family of the
// control plane's address.
func (d *debian) asksForTheMeshAlone(b tproxy.Backend, plane netip.Addr) {
	d.Helper()
	where := fmt.Sprintf("%s, %s", b, plane)
	before := d.state()
	install := []string{"--kuma-dp-user", "kuma-dp", "--backend", b.String(), "--kuma-cp-ip", plane.String()}
	fast := d.others("before")
	d.uplink.names(d.T)

	if out := d.must("install", append(install, "--dry-run")...); !strings.Contains(out, "names in .mesh to "+plane.String()) {
		d.Errorf("%s: dry run\n%s", where, out)
	}
	if now := d.state(); now != before {
		d.Errorf("%s: after a dry run\n%s\nbefore\n%s", where, now, before)
	}
	if out := d.must("install", install...); !strings.Contains(out, "Done: names in .mesh to "+plane.String()) || strings.Contains(out, "no DNS server answers") {
		d.Errorf("%s: install\n%s", where, out)
	}
	d.control.names(d.T) // those of the install's own question
	if out := d.must("install", install...); strings.Contains(out, "Done:") || !strings.Contains(out, "nothing to do") {
		d.Errorf("%s: the same again\n%s", where, out)
	}
	d.control.names(d.T)

	splits := func(when string) {
		d.Helper()
		if !d.resolves("backend.mesh") {
			d.Errorf("%s, %s: backend.mesh does not resolve", where, when)
		}
		d.others(strings.ReplaceAll(when, " ", "-"))
		mesh, seen := d.control.names(d.T), d.uplink.names(d.T)
		if !allIn(mesh, ".mesh") || len(mesh) == 0 {
			d.Errorf("%s, %s: the control plane was asked for %q", where, when, mesh)
		}
		if n := distinct(seen); n != outsideNames || anyIn(seen, ".mesh") {
			d.Errorf("%s, %s: the uplink's server was asked for %d names: %q", where, when, n, seen)
		}
	}
	splits("installed")
	d.restart()
	splits("systemd-resolved restarted")

	// With the control plane dead, others answer as before.
	d.control.end()
	d.uplink.names(d.T)
	dead := d.others("dead")
	if n := distinct(d.uplink.names(d.T)); n != outsideNames {
		d.Errorf("%s: with the control plane dead the uplink's server was asked for %d names", where, n)
	}
	d.Logf("%s: %d names outside of the mesh, control plane dead: %.2f times as long as without an install", where, outsideNames, float64(dead)/float64(fast))
	d.startControl()

	d.must("uninstall")
	if now := d.state(); now != before {
		d.Errorf("%s: after the uninstall\n%s\nbefore\n%s", where, now, before)
	}
	if d.resolves("backend.mesh") {
		d.Errorf("%s: after the uninstall backend.mesh resolves", where)
	}
	d.control.names(d.T)
}

// seesALeak is the control: with the drop-in that others recommend, the control plane
// is asked for names outside of the mesh, and the logs show it.
func (d *debian) seesALeak() {
	d.Helper()
	d.do("sh", "-c", "mkdir /etc/systemd/resolved.conf.d && printf '[Resolve]\nDNS="+plane4.String()+"\nDomains=~mesh\n' > /etc/systemd/resolved.conf.d/mesh.conf")
	d.restart()
	d.others("leak")
	if seen := d.control.names(d.T); len(seen) == 0 {
		d.Error("with DNS= and Domains=~mesh in resolved.conf the control plane is asked for nothing: the test shows nothing")
	} else {
		d.Logf("control: with DNS= and Domains=~mesh in resolved.conf the control plane is asked for %d of %d names outside of the mesh", distinct(seen), outsideNames)
	}
	d.do("rm", "-r", "/etc/systemd/resolved.conf.d")
	d.restart()
	d.uplink.names(d.T)
}

func allIn(names []string, domain string) bool {
	for _, n := range names {
		if !strings.HasSuffix(n, domain) {
			return false
		}
	}
	return true
}

func anyIn(names []string, domain string) bool {
	for _, n := range names {
		if strings.HasSuffix(n, domain) {
			return true
		}
	}
	return false
}

func distinct(names []string) int {
	all := map[string]bool{}
	for _, n := range names {
		all[n] = true
	}
	return len(all)
}

// changesAndRefusals: another address takes the place of the first; an install
// without one takes it out; what somebody else has made, or systemd-resolved cannot
// split, is refused, and nothing is changed.
func (d *debian) changesAndRefusals(by tproxy.Split) {
	d.Helper()
	before := d.state()
	d.must("install", "--kuma-cp-ip", plane4.String())
	own := netlab.Host4.String()
	if out := d.must("install", "--kuma-cp-ip", own); !strings.Contains(out, "Done: names in .mesh to "+own) {
		d.Errorf("another address\n%s", out)
	}
	if d.resolves("backend.mesh") {
		d.Error("the former control plane is still asked")
	}
	d.must("install")
	if out := d.state(); strings.Contains(out, "mesh") && strings.Contains(out, "KUMA_MESH_NAMES") || strings.Contains(out, "kuma-mesh") {
		d.Errorf("after an install without an address\n%s", out)
	}
	d.must("uninstall")

	refused := func(what string, args ...string) {
		d.Helper()
		was := d.state()
		if out, err := d.kumactl("install", args...); err == nil || !strings.Contains(err.Error(), what) {
			d.Errorf("%v: %v\n%s", args, err, out)
		}
		if now := d.state(); now != was {
			d.Errorf("%v was refused, and changed\n%s\nto\n%s", args, was, now)
		}
	}
	if by == tproxy.SplitLink {
		refused("for IPv6 the kernel has no way", "--kuma-cp-ip", plane6.String())
		d.do("ip", "link", "add", tproxy.MeshLink, "type", "veth", "peer", "name", "other")
		refused("is not ours", "--kuma-cp-ip", plane4.String())
		d.do("ip", "link", "del", tproxy.MeshLink)
	} else {
		d.do("sh", "-c", "mkdir /etc/systemd/dns-delegate.d && echo '[Delegate]' > /etc/systemd/dns-delegate.d/kuma-mesh.dns-delegate")
		refused("is not ours", "--kuma-cp-ip", plane4.String())
		d.do("rm", "-r", "/etc/systemd/dns-delegate.d")
	}
	d.do("ln", "-sf", "../run/systemd/resolve/resolv.conf", "/etc/resolv.conf")
	refused("stub-resolv.conf", "--kuma-cp-ip", plane4.String())
	d.do("ln", "-sf", "../run/systemd/resolve/stub-resolv.conf", "/etc/resolv.conf")
	if now := d.state(); now != before {
		d.Errorf("afterwards\n%s\nbefore\n%s", now, before)
	}
}

// redirectsWithoutALoop: row C2a with the real systemd-resolved in front. The proxy
// forwards to it, and its own question upstream is not redirected.
func (d *debian) redirectsWithoutALoop() {
	d.Helper()
	p := &netlab.Proxy{UID: proxyUID, In: 15006, Out: 15001, DNS: 15053, Mode: netlab.Pass, Upstream: stub}
	if err := p.Start(d.Lab); err != nil {
		d.Fatal(err)
	}
	for _, how := range []string{"--redirect-all-dns-traffic", "--redirect-dns"} {
		d.must("install", how)
		d.uplink.names(d.T)
		before := p.Queries.Count()
		if answer, err := d.query(d.Host, appUID, "udp", stub); err != nil || len(answer) == 0 {
			d.Errorf("%s: %v", how, err)
		}
		if got, seen := p.Queries.Count()-before, d.uplink.names(d.T); got != 1 || len(seen) != 1 {
			d.Errorf("%s: one query came to the proxy %d times, and to the uplink's server as %q", how, got, seen)
		}
		d.must("uninstall")
	}
}

// fails: what systemd-resolved does not take is undone, with the rules.
func (d *debian) fails() {
	d.Helper()
	d.do("systemctl", "mask", "--runtime", "--now", "systemd-resolved")
	const look = "iptables-save | grep '^-A'; ip -br address"
	before := d.do("sh", "-c", look)
	out, err := d.kumactl("install", "--kuma-cp-ip", plane4.String())
	if err == nil || !strings.Contains(err.Error(), "busctl") || !strings.Contains(err.Error(), "undone: ") {
		d.Errorf("with systemd-resolved masked: %v\n%s", err, out)
	}
	if now := d.do("sh", "-c", look); now != before {
		d.Errorf("afterwards\n%s\nbefore\n%s", now, before)
	}
}
