package exec_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// runtimeSuite skips a test with a real daemon unless TPROXY_SUITE names runtime.
func runtimeSuite(t *testing.T, programs ...string) {
	t.Helper()
	onlyIn(t, "runtime")
	netlab.Require(t, programs...)
}

// start starts a daemon on the lab's host, which ends with the lab.
func (w *world) start(name string, args ...string) {
	w.Helper()
	var said bytes.Buffer
	cmd := osexec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := w.In(w.Host, cmd.Start); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if w.Failed() {
			w.Logf("%s said: %s", name, &said)
		}
	})
}

// firewalld starts the real one on the lab's host, with settings of firewalld.conf such
// as "FirewallBackend=iptables", and returns the folder of its configuration: a copy, in
// the lab's own mount namespace.
func (w *world) firewalld(settings ...string) (etc string) {
	w.Helper()
	etc = filepath.Join(w.TempDir(), "firewalld")
	if out, err := osexec.Command("cp", "-a", "/etc/firewalld", etc).CombinedOutput(); err != nil {
		w.Fatalf("cp: %v: %s", err, out)
	}
	file := filepath.Join(etc, "firewalld.conf")
	text, err := os.ReadFile(file)
	lines := strings.Split(string(text), "\n")
	for _, s := range settings {
		key, _, _ := strings.Cut(s, "=")
		lines = append(slices.DeleteFunc(lines, func(l string) bool { return strings.HasPrefix(l, key+"=") }), s)
	}
	if err == nil {
		err = os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o644)
	}
	if err == nil {
		err = syscall.Mount(etc, "/etc/firewalld", "", syscall.MS_BIND, "")
	}
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = syscall.Unmount("/etc/firewalld", syscall.MNT_DETACH) })
	if err := os.MkdirAll("/run/dbus", 0o755); err != nil {
		w.Fatal(err)
	}
	w.start("dbus-daemon", "--system", "--nofork", "--nopidfile", "--nosyslog")
	w.until(func() bool { _, err := os.Stat("/run/dbus/system_bus_socket"); return err == nil })
	w.Cleanup(func() { _ = os.RemoveAll("/run/dbus") })
	w.start("firewalld", "--nofork", "--nopid", "--log-target=console")
	w.until(func() bool {
		out, _ := w.Lab.Run(w.Context(), w.Host, "", "firewall-cmd", "--state")
		return strings.Contains(out, "running")
	})
	return etc
}

// When firewalld starts it wipes what came by iptables-nft: a look says so, and what
// its filter makes of an install that is made again.
func TestFirewalldsWipeIsSeen(t *testing.T) {
	runtimeSuite(t, "firewalld", "firewall-cmd", "dbus-daemon", "ip")
	for _, c := range []struct {
		line  string
		state exec.State
		says  string
	}{
		// Its default: what is redirected over IPv6 goes to ::1, which is in ::/96.
		{"RFC3964_IPv4=yes", exec.StateDrifted, "~ filtered: IPv6 table inet firewalld"},
		{"RFC3964_IPv4=no", exec.StateInstalled, "table inet firewalld may filter"},
	} {
		t.Run(c.line, func(t *testing.T) {
			w := newWorld(t, tproxy.IPTablesNFT)
			w.serve()
			w.proxy(netlab.Answer)
			w.install(tproxy.Config{})
			w.check(flow{"B11", "1000 internet:80 => out"})
			if s := w.status(); s.State != exec.StateInstalled {
				w.Fatalf("before firewalld: %s", said(s))
			}
			w.firewalld(c.line)
			if s := w.status(); s.State != exec.StateAbsent || !strings.Contains(said(s), "::6/128 is on lo") {
				w.Errorf("after firewalld's start: %s", said(s))
			}
			w.checkFamilies([]int{0}, flow{"wiped", "1000 internet:80 => remote"})
			w.install(tproxy.Config{})
			if s := w.status(); s.State != c.state || !strings.Contains(said(s), c.says) {
				w.Errorf("installed again, with firewalld: %s", said(s))
			}
			w.check(flow{"A5", "outside host:8080 => in"})
			w.checkFamilies([]int{0}, flow{"B11", "1000 internet:80 => out"})
			over6 := "out"
			if c.state == exec.StateDrifted {
				over6 = netlab.Timeout
			}
			w.checkFamilies([]int{1}, flow{"B11", "1000 internet:80 => " + over6})
		})
	}
}

// Contract 4.9: firewalld accepts whatever was translated. A port that its zone
// closes reaches the proxy, which the notes say; an excluded one stays closed.
func TestFirewalldAcceptsWhatWasTranslated(t *testing.T) {
	runtimeSuite(t, "firewalld", "firewall-cmd", "dbus-daemon", "ip")
	w := newWorld(t, tproxy.IPTablesNFT)
	w.firewalld()
	w.serve()
	w.proxy(netlab.Answer)
	closed := func(row string, port uint16) {
		w.Helper()
		w.checkFamilies([]int{0}, flow{row, fmt.Sprintf("outside host:%d => rejected", port)})
		// TCP over IPv6 takes "prohibited" for something that may pass, and the
		// kernel sends only so many of them.
		seen, err := w.Dial(w.Client, 0, "tcp", netip.AddrPort{}, netip.AddrPortFrom(places["host"][1], port))
		if err != nil || seen.Who != netlab.Timeout && seen.Who != netlab.Rejected {
			w.Errorf("%s IPv6, port %d: answered by %s, %v", row, port, seen, err)
		}
	}
	closed("closed by its zone", 8080)
	w.check(flow{"open", "outside host:22 => app"})
	r := w.install(tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("9005")}})
	w.check(flow{"A5", "outside host:8080 => in"}, flow{"A3", "outside host:22 => app"})
	closed("A3, closed", 9005)
	if !slices.ContainsFunc(r.Notes, func(n string) bool { return strings.Contains(n, "firewalld") && strings.Contains(n, "reach the proxy") }) {
		w.Errorf("notes %q", r.Notes)
	}
	// A table of firewalld's own is untouched by what we do.
	w.uninstall()
	closed("closed by its zone", 8080)
}

// A container of the real dockerd, with either variant of iptables.
func TestDockersResolverOfDockerd(t *testing.T) {
	runtimeSuite(t, "dnsmasq", "ip", "docker", "dockerd", "containerd", "runc")
	eachVariant(t, func(w *world) {
		// Control groups are the machine's, whatever the namespaces: these are ours.
		parent := fmt.Sprintf("/kuma-tproxy-%d", os.Getpid())
		w.Cleanup(func() {
			groups, _ := filepath.Glob("/sys/fs/cgroup/*" + parent)
			for _, g := range append(groups, "/sys/fs/cgroup"+parent) {
				_ = syscall.Rmdir(g)
			}
		})
		bin, dir := w.TempDir(), w.TempDir()
		w.Cleanup(func() { _ = syscall.Unmount(filepath.Join(dir, "docker"), syscall.MNT_DETACH) }) // dockerd mounts it over itself
		for _, f := range rules.Families() {
			path, err := osexec.LookPath(w.program(f, ""))
			if err == nil {
				err = os.Symlink(path, filepath.Join(bin, strings.Replace(w.program(f, ""), "-"+strings.TrimPrefix(w.backend.String(), "iptables-"), "", 1)))
			}
			if err != nil {
				w.Fatal(err)
			}
		}
		w.Setenv("PATH", bin+":"+os.Getenv("PATH"))
		w.Setenv("DOCKER_HOST", "unix://"+filepath.Join(dir, "docker.sock"))
		socket := filepath.Join(dir, "containerd.sock")
		w.start("containerd", "--root", filepath.Join(dir, "containerd"), "--state", filepath.Join(dir, "state"), "--address", socket)
		w.until(func() bool { _, err := os.Stat(socket); return err == nil })
		w.start("dockerd", "--containerd", socket, "--data-root", filepath.Join(dir, "docker"), "--exec-root", filepath.Join(dir, "exec"),
			"--pidfile", filepath.Join(dir, "pid"), "-H", os.Getenv("DOCKER_HOST"), "--storage-driver", "vfs", "--cgroup-parent", parent)
		w.until(func() bool { return osexec.Command("docker", "version").Run() == nil })
		// The programs are the machine's.
		w.on("", "sh", "-c", "mkdir "+dir+"/image && cd "+dir+"/image && mkdir etc && ln -s usr/bin usr/lib usr/lib64 . && tar c . | docker import - image")
		w.on("", "docker", "network", "create", "made")
		run := func(name string) {
			w.on("", "docker", "run", "-d", "--name", name, "--network", "made", "--dns", upstream.Addr().String(), "-v", "/usr:/usr:ro", "image", "sleep", "1000")
			w.Cleanup(func() { _ = osexec.Command("docker", "rm", "-f", name).Run() })
		}
		run("kuma.io") // for which query asks
		run("app")
		network := "{{.NetworkSettings.Networks.made.IPAddress}}"
		kuma := netip.MustParseAddr(strings.TrimSpace(w.on("", "docker", "inspect", "-f", network, "kuma.io")))
		var pid int
		if _, err := fmt.Sscan(w.on("", "docker", "inspect", "-f", "{{.State.Pid}}", "app"), &pid); err != nil {
			w.Fatal(err)
		}
		n, err := w.Of("app", pid)
		if err != nil {
			w.Fatal(err)
		}
		w.Host = n
		before := w.save(rules.IPv4)
		p := &netlab.Proxy{UID: proxyUID, In: 15006, Out: 15001, DNS: 15053, Mode: netlab.Pass, Upstream: dockers, IPv4Only: true}
		if err := p.Start(w.Lab); err != nil {
			w.Fatal(err)
		}
		c := tproxy.Config{DNS: tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(dockers.Addr())}}
		w.installTried(p, c)
		for uid, want := range map[uint32]int{appUID: 1, 0: 1, proxyUID: 0} {
			seen := p.Queries.Count()
			answer, err := w.query(w.Host, uid, "udp", dockers)
			if got := p.Queries.Count() - seen; err != nil || !bytes.HasSuffix(answer, kuma.AsSlice()) || got != want {
				w.Errorf("query of %d: %q, %v, %d queries to the proxy; want %d", uid, answer, err, got, want)
			}
		}
		w.uninstall()
		w.same("Docker's rules", uncounted(nat(before)), uncounted(nat(w.save(rules.IPv4))))
		h := w.observe(c)
		if len(h.LocalResolvers) != 1 || h.LocalResolvers[0].Program != "Docker's resolver (dockerd)" || h.LocalResolvers[0].Behind != w.backend.String() {
			w.Errorf("local resolvers %+v", h.LocalResolvers)
		}
		c.DNS = tproxy.DNS{CaptureAll: true, ResolvConf: c.DNS.ResolvConf}
		if _, err := tproxy.Build(c, h); !errors.As(err, new(*tproxy.RefusedError)) {
			w.Errorf("%v", err)
		}
	})
}
