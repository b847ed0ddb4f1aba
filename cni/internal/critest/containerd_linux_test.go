package critest

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
)

// injected are the annotations of a pod with a sidecar.
func injected(more ...string) map[string]string {
	a := map[string]string{"kuma.io/sidecar-injected": "true", "traffic.kuma.io/exclude-inbound-ports": "1234", "traffic.kuma.io/exclude-outbound-ports-for-uids": "tcp:*:1001;"}
	for i := 0; i < len(more); i += 2 {
		a[more[i]] = more[i+1]
	}
	return a
}

func everywhere(ports ...uint16) (out []netip.AddrPort) {
	for _, p := range ports {
		out = append(out, netip.AddrPortFrom(netip.IPv4Unspecified(), p), netip.AddrPortFrom(netip.IPv6Unspecified(), p))
	}
	return out
}

// serve starts who may answer in the pod: the application and the proxy.
func (n *node) serve(p *pod) {
	n.Helper()
	loopback := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15053"), netip.MustParseAddrPort("[::1]:15053")}
	_, err1 := n.ListenTCP(p.space, appUID, "app", everywhere(8080, 1234)...)
	_, err2 := n.ListenTCP(p.space, proxyUID, "in", everywhere(15006)...)
	_, err3 := n.ListenTCP(p.space, proxyUID, "out", everywhere(15001)...)
	_, err4 := n.ListenUDP(p.space, proxyUID, "dns", loopback...)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		n.Fatal(err)
	}
}

// outside starts who may answer on the node, once there is a bridge.
func (n *node) outside() {
	n.Helper()
	_, err1 := n.ListenTCP(n.Host, 0, "remote", everywhere(80)...)
	_, err2 := n.ListenUDP(n.Host, 0, "resolver", netip.AddrPortFrom(gateway4, 53))
	if err := errors.Join(err1, err2); err != nil {
		n.Fatal(err)
	}
}

func (n *node) flow(what string, from *netlab.Namespace, uid uint32, network string, to netip.Addr, port uint16, want string) {
	n.Helper()
	seen, err := n.Dial(from, uid, network, netip.AddrPort{}, netip.AddrPortFrom(to, port))
	if err != nil || seen.Who != want {
		n.Errorf("%s: %s %s:%d by UID %d is answered by %s, %v; want %s", what, network, to, port, uid, seen, err, want)
	}
}

func (n *node) meshed(p *pod) {
	n.Helper()
	for i, ip := range []netip.Addr{p.ip4, p.ip6} {
		away := []netip.Addr{gateway4, gateway6}[i]
		n.flow("A5", n.Host, 0, "tcp", ip, 8080, "in")
		n.flow("A3", n.Host, 0, "tcp", ip, 1234, "app")
		n.flow("B11", p.space, appUID, "tcp", away, 80, "out")
		n.flow("B3", p.space, proxyUID, "tcp", away, 80, "remote")
		n.flow("B7", p.space, excludedUID, "tcp", away, 80, "remote")
		n.flow("B4", p.space, appUID, "tcp", ip, 8080, "app")
	}
	n.flow("C3", p.space, appUID, "udp", gateway4, 53, "dns")
	n.flow("C1", p.space, proxyUID, "udp", gateway4, 53, "resolver")
}

func (n *node) direct(p *pod) {
	n.Helper()
	n.flow("no sidecar", n.Host, 0, "tcp", p.ip4, 8080, "app")
	n.flow("no sidecar", p.space, appUID, "tcp", gateway4, 80, "remote")
	if saved := n.save(p.space); strings.Contains(saved, "KUMA") {
		n.Errorf("rules in a pod without a sidecar: %s", saved)
	}
}

// answeredBy is who answers a container of the pod that runs as the user.
func (n *node) answeredBy(p *pod, uid int64) string {
	n.Helper()
	c, err := n.CreateContainer(n.Context(), &cri.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.config, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: fmt.Sprintf("app-%d", uid)}, Image: &cri.ImageSpec{Image: image}, LogPath: fmt.Sprintf("%d.log", uid),
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{RunAsUser: &cri.Int64Value{Value: uid}}}}})
	if err == nil {
		_, err = n.StartContainer(n.Context(), &cri.StartContainerRequest{ContainerId: c.ContainerId})
	}
	if err != nil {
		n.Fatal(err)
	}
	r, err := n.ExecSync(n.Context(), &cri.ExecSyncRequest{ContainerId: c.ContainerId, Timeout: 10,
		Cmd: []string{"/bin/busybox", "nc", "-w", "3", gateway4.String(), "80"}})
	if err != nil {
		n.Fatal(err)
	}
	who, _, _ := strings.Cut(string(r.Stdout), " ")
	return who
}

// Pods with and without annotations, and real containers of three users.
func TestContainerdPods(t *testing.T) {
	for _, backend := range []tproxy.Backend{tproxy.Auto, tproxy.IPTablesNFT} {
		t.Run(backend.String(), func(t *testing.T) { newNode(t, backend).pods(backend) })
	}
}

func (n *node) pods(backend tproxy.Backend) {
	meshed, plain := n.mustRun("meshed", injected()), n.mustRun("plain", map[string]string{"example.com/a": "b"})
	bare := n.mustRun("bare", nil)
	n.outside()
	for _, p := range []*pod{meshed, plain, bare} {
		n.serve(p)
	}
	n.meshed(meshed)
	if text, err := os.ReadFile(n.log); err != nil || strings.Contains(string(text), `"processes":0`) != (backend == tproxy.Auto) {
		n.Errorf("the log, %v: %s", err, text)
	}
	n.direct(plain)
	n.direct(bare)
	if saved := n.save(n.Host); strings.Contains(saved, "KUMA") {
		n.Errorf("rules on the node: %s", saved)
	}
	for uid, want := range map[int64]string{appUID: "out", proxyUID: "remote", excludedUID: "remote"} {
		if who := n.answeredBy(meshed, uid); who != want {
			n.Errorf("a container of UID %d is answered by %q, want %q", uid, who, want)
		}
	}
	for _, p := range []*pod{meshed, plain, bare} {
		n.remove(p)
	}
	if left, _ := filepath.Glob("/run/netns/*"); len(left) > 0 {
		n.Errorf("left: %q", left)
	}
}

// A pod whose annotations are not accepted does not start, and its event says why.
func TestContainerdRefuses(t *testing.T) {
	n := newNode(t, tproxy.Auto)
	_, err := n.run("bad", injected("traffic.kuma.io/exclude-outbound-ports", "http"))
	if err == nil {
		t.Fatal("the pod was started")
	}
	for _, want := range []string{"pod demo/bad", "traffic.kuma.io/exclude-outbound-ports", "http", "accepted is"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
	p := n.mustRun("bad", injected()) // the same pod, mended
	n.outside()
	n.serve(p)
	n.meshed(p)
	n.remove(p)
}

// containerd is restarted: pods stay as they are, can be stopped, and new ones started.
func TestContainerdRestarted(t *testing.T) {
	n := newNode(t, tproxy.Auto)
	p := n.mustRun("before", injected())
	n.outside()
	n.serve(p)
	n.stop()
	n.meshed(p)
	n.start()
	n.meshed(p)
	q := n.mustRun("after", injected())
	n.serve(q)
	n.meshed(q)
	n.remove(p)
	n.remove(q)
}

// Twenty pods at once, each with rules of its own.
func TestContainerdTwentyPods(t *testing.T) {
	const count = 20
	n := newNode(t, tproxy.Auto)
	pods, errs := make([]*pod, count), make([]error, count)
	var wg sync.WaitGroup
	start := time.Now()
	for i := range count {
		wg.Go(func() {
			pods[i], errs[i] = n.run(fmt.Sprintf("pod-%d", i), injected("traffic.kuma.io/exclude-outbound-ports", fmt.Sprint(2000+i)))
		})
	}
	wg.Wait()
	t.Logf("%d pods in %s", count, time.Since(start))
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	n.outside()
	for i, p := range pods {
		if saved := n.save(p.space); strings.Count(saved, fmt.Sprintf("tcp dport %d ", 2000+i)) != 1 {
			t.Errorf("pod %d has %s", i, saved)
		}
		n.serve(p)
		n.meshed(p)
	}
	for _, p := range pods {
		wg.Go(func() { n.remove(p) })
	}
	wg.Wait()
}

// The plugin is killed in the middle of an ADD: behind the rules of one family. The pod
// does not start, nothing keeps it from being removed, and another try is as a first.
func TestContainerdKilledPlugin(t *testing.T) {
	n := newNode(t, tproxy.IPTablesNFT) // in nftables there is no middle
	real, err := osexec.LookPath("ip6tables-nft-restore")
	if err != nil {
		t.Fatal(err)
	}
	armed, killed := filepath.Join(n.dir, "armed"), filepath.Join(n.dir, "killed")
	script := fmt.Sprintf("#!/bin/sh\n[ \"$1\" = --version ] || { [ -e %[1]s ] && rm %[1]s && iptables-nft-save >%[2]s && kill -9 $PPID; }\nexec %[3]s \"$@\"\n", armed, killed, real)
	if err := errors.Join(os.WriteFile(filepath.Join(n.bin, "ip6tables-nft-restore"), []byte(script), 0o755), os.WriteFile(armed, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := n.run("victim", injected()); err == nil {
		t.Fatal("the pod was started")
	} else {
		t.Log(err)
	}
	if half, err := os.ReadFile(killed); err != nil || !strings.Contains(string(half), "KUMA_MESH_INBOUND") {
		t.Errorf("the plugin was not killed in the middle: %v, %s", err, half)
	}
	if text, _ := os.ReadFile(n.log); !strings.Contains(string(text), `"verb":"DEL"`) {
		t.Errorf("no DEL followed: %s", text)
	}
	pods, err := n.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range pods.Items {
		n.remove(&pod{id: s.Id})
	}
	if left, _ := filepath.Glob("/run/netns/*"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	p := n.mustRun("victim", injected())
	n.outside()
	n.serve(p)
	n.meshed(p)
	n.remove(p)
}
