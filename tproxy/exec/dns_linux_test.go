package exec_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	osexec "os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// dnsmasq starts a resolver, which ends with the lab.
func (w *world) dnsmasq(n *netlab.Namespace, user string, at netip.AddrPort, args ...string) {
	w.Helper()
	cmd := osexec.Command("dnsmasq", append([]string{"--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file=", "--bind-interfaces",
		"--cache-size=0", "--user=" + user, "--listen-address=" + at.Addr().String()}, args...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := w.In(n, cmd.Start); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if w.Failed() {
			w.Logf("dnsmasq at %s said: %s", at, &said)
		}
	})
	w.until(func() bool { _, err := w.query(n, 0, "udp", at); return err == nil })
}

// query asks for the address of a name, over "udp" or "tcp", and returns the answer.
func (w *world) query(n *netlab.Namespace, uid uint32, network string, server netip.AddrPort) (answer []byte, err error) {
	var c net.Conn
	err = w.In(n, func() error {
		return netlab.As(uid, uid, func() (err error) {
			c, err = net.DialTimeout(network, server.String(), netlab.Patience)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	// RFC 1035, section 4: one question, recursion desired, kuma.io A IN.
	question := "\x13\x37\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04kuma\x02io\x00\x00\x01\x00\x01"
	_ = c.SetDeadline(time.Now().Add(netlab.Patience))
	answer = make([]byte, 1500)
	if network == "tcp" { // behind its length (RFC 1035, section 4.2.2)
		if _, err = c.Write(append([]byte{0, byte(len(question))}, question...)); err != nil {
			return nil, err
		}
		if _, err = io.ReadFull(c, answer[:2]); err != nil {
			return nil, err
		}
		answer = answer[:min(binary.BigEndian.Uint16(answer), 1500)]
		_, err = io.ReadFull(c, answer)
		return answer, err
	}
	if _, err = c.Write([]byte(question)); err != nil {
		return nil, err
	}
	k, err := c.Read(answer)
	return answer[:k], err
}

var (
	stub     = netip.MustParseAddrPort("127.0.0.53:53")
	upstream = netip.AddrPortFrom(netlab.Resolver4, 53)
	answered = netip.MustParseAddr("192.0.2.7")
)

// Row C2a: with a resolver on this host that the proxy forwards to, every query
// ends: the resolver, known by its process, asks upstream past the proxy. Without
// that row the query comes back to the resolver, which waits for itself.
func TestLocalResolverIsNoLoop(t *testing.T) {
	netlab.Require(t, "dnsmasq")
	eachBackend(t, func(w *world) {
		w.dnsmasq(w.Client, "root", upstream, "--address=/#/"+answered.String())
		w.dnsmasq(w.Host, "nobody", stub, "--server="+upstream.Addr().String())
		p := &netlab.Proxy{UID: proxyUID, In: 15006, Out: 15001, DNS: 15053, Mode: netlab.Pass, Upstream: stub}
		if err := p.Start(w.Lab); err != nil {
			w.Fatal(err)
		}
		ask := func(server netip.AddrPort, want int) {
			w.Helper()
			before := p.Queries.Count()
			answer, err := w.query(w.Host, appUID, "udp", server)
			if err != nil || !bytes.HasSuffix(answer, answered.AsSlice()) || p.Queries.Count()-before != want {
				w.Errorf("query to %s: %q, %v, %d queries to the proxy; want %d", server, answer, err, p.Queries.Count()-before, want)
			}
		}
		all := tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, ResolvConf: w.resolvConf(stub.Addr())}}
		w.install(all)
		ask(upstream, 1)
		ask(stub, 1)
		some := tproxy.Config{DNS: tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(stub.Addr(), upstream.Addr())}}
		w.install(some)
		ask(upstream, 1)
		ask(stub, 1)

		plan, err := w.plan(all)
		if err != nil {
			w.Fatal(err)
		}
		h := plan.Host
		if len(h.LocalResolvers) != 1 || h.LocalResolvers[0].Program != "dnsmasq" || h.LocalResolvers[0].UID == 0 {
			w.Errorf("local resolvers %v", h.LocalResolvers)
		}
		h.LocalResolvers = nil
		looping, err := tproxy.Build(all, h)
		if err != nil {
			w.Fatal(err)
		}
		if _, err := w.apply(looping); err != nil {
			w.Fatal(err)
		}
		before := p.Queries.Count()
		if answer, err := w.query(w.Host, appUID, "udp", stub); err == nil || p.Queries.Count()-before < 2 {
			w.Errorf("without C2a: answer %q after %d queries to the proxy: the test shows nothing", answer, p.Queries.Count()-before)
		}
	})
}

// B9 with real servers: an application's query over TCP reaches the proxy's DNS port
// where that is asked for, and the server where it is not; what the proxy and a local
// resolver ask goes upstream, and what stays on this host, over TCP, is left alone. So
// every query ends, though the proxy forwards to the local resolver.
func TestDNSOverTCP(t *testing.T) {
	netlab.Require(t, "dnsmasq")
	at := func(addrs ...netip.Addr) (out []netip.AddrPort) {
		for _, a := range addrs {
			out = append(out, netip.AddrPortFrom(a, 53))
		}
		return out
	}
	servers, others := at(netlab.Resolver4, netlab.Resolver6), at(netlab.Internet4, netlab.Internet6)
	const nobody = 65534
	eachBackend(t, func(w *world) {
		for _, server := range append(servers, others...) {
			w.dnsmasq(w.Client, "root", server, "--address=/#/"+answered.String())
		}
		w.dnsmasq(w.Host, "nobody", stub, "--server="+upstream.Addr().String())
		p := &netlab.Proxy{UID: proxyUID, In: 15006, Out: 15001, DNS: 15053, Mode: netlab.Pass, Upstream: stub}
		if err := p.Start(w.Lab); err != nil {
			w.Fatal(err)
		}
		file := w.resolvConf(stub.Addr(), netlab.Resolver4, netlab.Resolver6)
		for _, c := range []struct {
			dns           tproxy.DNS
			server, other int // how often the proxy is asked
		}{
			{tproxy.DNS{CaptureAll: true}, 0, 0},
			{tproxy.DNS{CaptureAll: true, RedirectTCP: true}, 1, 1},
			{tproxy.DNS{Redirect: true}, 0, 0},
			{tproxy.DNS{Redirect: true, RedirectTCP: true}, 1, 0},
		} {
			c.dns.ResolvConf = file
			r := w.install(tproxy.Config{DNS: c.dns})
			if notes := strings.Join(r.Notes, "\n"); strings.Contains(notes, "no effect") || strings.Contains(notes, "nothing listens") {
				w.Errorf("%+v: notes\n%s", c.dns, notes)
			}
			ask := func(uid uint32, server netip.AddrPort, want int) {
				w.Helper()
				in, out, before := p.Ins.Count(), p.Outs.Count(), p.Streams.Count()
				answer, err := w.query(w.Host, uid, "tcp", server)
				if err != nil || !bytes.HasSuffix(answer, answered.AsSlice()) || p.Streams.Count()-before != want || p.Ins.Count() != in || p.Outs.Count() != out {
					w.Errorf("%+v: UID %d to %s: %q, %v, %d queries to the proxy (in %d, out %d); want %d", c.dns, uid, server, answer, err,
						p.Streams.Count()-before, p.Ins.Count()-in, p.Outs.Count()-out, want)
				}
			}
			for i := range servers {
				ask(appUID, servers[i], c.server)
				ask(appUID, others[i], c.other)
				ask(proxyUID, servers[i], 0)
				ask(nobody, servers[i], 0)
			}
			ask(appUID, stub, 0) // the local resolver asks upstream over TCP
			ask(proxyUID, stub, 0)
			for _, f := range rules.Families() {
				saved := w.ours(f)
				if tcp := slices.ContainsFunc(saved.Chains, func(c rules.Chain) bool { return c.Name == "KUMA_MESH_DNS_TCP" }); tcp != c.dns.RedirectTCP {
					w.Errorf("%+v: %s rules\n%v", c.dns, f, saved)
				}
			}
		}
		w.uninstall()
		if saved := w.ruled(); strings.Contains(saved, "KUMA_MESH") {
			w.Errorf("after the uninstall, rules\n%s", saved)
		}
	})
}

// DNS over TCP needs no conntrack zone: the proxy may ask from the source port that an
// application's query had just now, and is not taken for it.
func TestSourcePortOfDNSOverTCPIsUsedAgain(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.serve()
		w.proxy(netlab.Answer)
		w.install(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true, RedirectTCP: true}})
		for i, from := range places["host"] {
			src := netip.AddrPortFrom(from, 40053)
			for _, who := range []struct {
				uid  uint32
				want string
			}{{appUID, "dns"}, {proxyUID, "remote"}, {appUID, "dns"}, {proxyUID, "remote"}} {
				seen, err := w.Dial(w.Host, who.uid, "tcp", src, netip.AddrPortFrom(places["resolver"][i], 53))
				if err != nil || seen.Who != who.want {
					w.Errorf("UID %d from %s: %s, %v; want %s", who.uid, src, seen, err, who.want)
				}
			}
		}
	})
}

// A resolver that runs as root cannot be told apart from the rest.
func TestLocalResolverOfRootIsRefused(t *testing.T) {
	netlab.Require(t, "dnsmasq")
	w := newWorld(t, tproxy.IPTablesNFT)
	w.dnsmasq(w.Host, "root", stub, "--address=/#/"+answered.String())
	for _, c := range []tproxy.DNS{
		{CaptureAll: true, ResolvConf: w.resolvConf(stub.Addr())},
		{Redirect: true, ResolvConf: w.resolvConf(stub.Addr(), upstream.Addr())},
	} {
		_, err := w.plan(tproxy.Config{DNS: c})
		if _, ok := errors.AsType[*tproxy.RefusedError](err); !ok || !strings.Contains(err.Error(), "dnsmasq") || !strings.Contains(err.Error(), "127.0.0.53") {
			w.Errorf("%+v: %v", c, err)
		}
	}
	p, err := w.plan(tproxy.Config{DNS: tproxy.DNS{Redirect: true, ResolvConf: w.resolvConf(stub.Addr())}})
	if err != nil || !slices.ContainsFunc(p.Notes, func(n string) bool { return strings.Contains(n, "root") }) {
		w.Errorf("the only nameserver: %v, %v", p, err)
	}
	if w.Failed() {
		w.Log(fmt.Sprint(p))
	}
}

// With the control plane's DNS server first in resolv.conf a name in .mesh resolves
// for a client of the C library; after the uninstall the file is as it was, and the
// name does not. Where nothing answers at that address, install says so.
func TestMeshNamesResolve(t *testing.T) {
	netlab.Require(t, "dnsmasq", "getent", "unshare")
	eachBackend(t, func(w *world) {
		w.dnsmasq(w.Client, "root", upstream, "--address=/mesh/"+answered.String())
		path := w.resolvConf(netlab.Client4) // where nothing answers
		was, err := os.ReadFile(path)
		if err != nil {
			w.Fatal(err)
		}
		resolve := func() (string, error) {
			return w.Lab.Run(w.Context(), w.Host, "", "unshare", "--mount", "sh", "-c",
				"mount --bind "+path+" /etc/resolv.conf && exec timeout 2 getent ahostsv4 backend.mesh")
		}
		c := tproxy.Config{DNS: tproxy.DNS{ControlPlane: upstream.Addr(), ResolvConf: path, ModifyShared: true}}
		r := w.install(c)
		if notes := strings.Join(r.Notes, "\n"); strings.Contains(notes, "no DNS server answers") {
			w.Errorf("notes\n%s", notes)
		}
		if got, err := resolve(); err != nil || !strings.Contains(got, answered.String()) {
			w.Errorf("backend.mesh is %q, %v", got, err)
		}
		w.uninstall()
		if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, was) {
			w.Errorf("after the uninstall: %q, %v", now, err)
		}
		if got, err := resolve(); err == nil {
			w.Errorf("after the uninstall, backend.mesh is %q", got)
		}
		c.DNS.ControlPlane = netlab.Client4
		c.DNS.ResolvConf = w.resolvConf(upstream.Addr())
		if notes := strings.Join(w.install(c).Notes, "\n"); !strings.Contains(notes, "no DNS server answers at "+netlab.Client4.String()) {
			w.Errorf("notes\n%s", notes)
		}
		w.uninstall()
	})
}

// The resolv.conf of the host, seen from another network namespace, is not written
// unless that is asked for.
func TestHostsResolvConfIsLeft(t *testing.T) {
	eachBackend(t, func(w *world) {
		path := w.resolvConf(upstream.Addr())
		_, err := w.plan(tproxy.Config{DNS: tproxy.DNS{ControlPlane: netlab.Client4, ResolvConf: path}})
		if _, ok := errors.AsType[*tproxy.RefusedError](err); !ok || !strings.Contains(err.Error(), "namespace") {
			w.Errorf("%v", err)
		}
	})
}
