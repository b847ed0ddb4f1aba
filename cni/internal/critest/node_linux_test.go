package critest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/kumahq/kuma-tproxy/cni"
	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
)

// TestMain is the plugin where the test binary is called so.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "kuma-cni" {
		os.Exit(cni.Main(&cni.Plugin{}))
	}
	netlab.Main(m)
}

const (
	proxyUID    = 5678
	appUID      = 1000
	excludedUID = 1001
)

// The node's addresses on the pods' bridge, where a server answers as "remote".
var (
	gateway4 = netip.MustParseAddr("10.202.0.1")
	gateway6 = netip.MustParseAddr("fd10::1")
)

// node is a node of Kubernetes without a kubelet: containerd on the lab's host.
type node struct {
	*testing.T
	*netlab.Lab
	cri.RuntimeServiceClient
	backend tproxy.Backend
	dir     string
	bin     string // in front of PATH, for containerd and its plugins
	log     string // of the plugin
	daemon  *osexec.Cmd
	said    bytes.Buffer
	cgroups string
}

const image = "lab.local/busybox:1"

func newNode(t *testing.T, backend tproxy.Backend) *node {
	t.Helper()
	if !strings.Contains(os.Getenv("TPROXY_SUITE"), "runtime") {
		t.Skip("TPROXY_SUITE does not name runtime")
	}
	programs := []string{"ip", "containerd", "ctr", "runc", "busybox", "nft", "iptables-nft-save"}
	if strings.Contains(os.Getenv("TPROXY_REQUIRE"), "runtime") {
		t.Setenv("TPROXY_REQUIRE", os.Getenv("TPROXY_REQUIRE")+",kernel") // which is what Require asks for
	}
	netlab.Require(t, programs...)
	l, err := netlab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := &node{T: t, Lab: l, backend: backend, dir: t.TempDir(), bin: t.TempDir(), cgroups: fmt.Sprintf("/kuma-tproxy-cri-%d", os.Getpid())}
	n.log = filepath.Join(n.dir, "kuma-cni.log")
	t.Cleanup(n.end)
	n.configure()
	n.start()
	n.importImage()
	return n
}

func (n *node) write(name, text string) {
	n.Helper()
	path := filepath.Join(n.dir, name)
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, []byte(text), 0o644)
	}
	if err != nil {
		n.Fatal(err)
	}
}

func (n *node) configure() {
	n.Helper()
	plugins := filepath.Join(n.dir, "plugins")
	found := ""
	for _, dir := range []string{"/usr/lib/cni", "/usr/libexec/cni", "/opt/cni/bin"} {
		if _, err := os.Stat(filepath.Join(dir, "bridge")); err == nil && found == "" {
			found = dir
		}
	}
	self, err := os.Executable()
	if err == nil {
		err = os.Mkdir(plugins, 0o755)
	}
	if err == nil {
		err = os.Symlink(self, filepath.Join(plugins, "kuma-cni"))
	}
	if err != nil || found == "" {
		n.Fatalf("%v; standard plugins in %q (Debian: containernetworking-plugins)", err, found)
	}
	for _, name := range []string{"bridge", "host-local", "loopback"} {
		if err := os.Symlink(filepath.Join(found, name), filepath.Join(plugins, name)); err != nil {
			n.Fatal(err)
		}
	}
	n.write("net/10.conflist", fmt.Sprintf(`{"cniVersion":"1.0.0","name":"pods","plugins":[
 {"type":"bridge","bridge":"br-cri","isGateway":true,"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.202.0.0/24"}],[{"subnet":"fd10::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
 {"type":"kuma-cni","capabilities":{"io.kubernetes.cri.pod-annotations":true},"logFile":%q,"logLevel":"debug","config":{"backend":%q},
  "settings":{"KUMA_RUNTIME_KUBERNETES_SIDECAR_TRAFFIC_EXCLUDE_INBOUND_PORTS":"4444"}}]}`, filepath.Join(n.dir, "ipam"), n.log, n.backend))
	n.write("containerd.toml", fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  disable_apparmor = true
  restrict_oom_score_adj = true # a root without CAP_SYS_RESOURCE
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
`, filepath.Join(n.dir, "root"), filepath.Join(n.dir, "state"), n.socket(), image, plugins, filepath.Join(n.dir, "net")))
}

func (n *node) socket() string { return filepath.Join(n.dir, "containerd.sock") }

// start starts containerd, and waits until it answers.
func (n *node) start() {
	n.Helper()
	n.daemon = osexec.Command("containerd", "-c", filepath.Join(n.dir, "containerd.toml"), "-l", "warn")
	n.daemon.Env = append(os.Environ(), "PATH="+n.bin+":"+os.Getenv("PATH"))
	n.daemon.Stdout, n.daemon.Stderr = &n.said, &n.said
	n.daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.In(n.Host, n.daemon.Start); err != nil {
		n.Fatal(err)
	}
	conn, err := grpc.NewClient("unix://"+n.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		n.Fatal(err)
	}
	n.Cleanup(func() { conn.Close() })
	n.RuntimeServiceClient = cri.NewRuntimeServiceClient(conn)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(n.Context(), time.Second)
		_, err := n.Version(ctx, &cri.VersionRequest{})
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			n.Fatalf("containerd does not answer: %v: %s", err, &n.said)
		}
	}
}

// stop ends containerd; the pods' shims go on.
func (n *node) stop() {
	_ = n.daemon.Process.Signal(syscall.SIGTERM)
	_ = n.daemon.Wait()
}

// end ends everything that was started here: what is in the pods, the shims, containerd.
func (n *node) end() {
	if n.RuntimeServiceClient != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if pods, err := n.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}); err == nil {
			for _, p := range pods.Items {
				_, _ = n.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.Id})
				_, _ = n.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.Id})
			}
		}
	}
	if n.daemon != nil {
		n.stop()
	}
	if n.Failed() {
		text, _ := os.ReadFile(n.log)
		n.Logf("kuma-cni's log:\n%s\ncontainerd said:\n%s", text, &n.said)
	}
	n.Lab.Close() // and the shims, which are in its namespaces
	groups, _ := filepath.Glob("/sys/fs/cgroup/*" + n.cgroups)
	for _, g := range append(groups, "/sys/fs/cgroup"+n.cgroups) {
		_ = syscall.Rmdir(g)
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && (strings.HasPrefix(f[4], n.dir) || strings.HasPrefix(f[4], "/run/netns/")) {
			_ = syscall.Unmount(f[4], syscall.MNT_DETACH)
		}
	}
}

// importImage makes an image of busybox, without a registry.
func (n *node) importImage() {
	n.Helper()
	busybox, err := osexec.LookPath("busybox")
	if err != nil {
		n.Fatal(err)
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		n.Fatal(err)
	}
	type file struct {
		name string
		text []byte
		mode int64
	}
	pack := func(files ...file) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range files {
			h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.text))}
			if err := w.WriteHeader(h); err != nil {
				n.Fatal(err)
			}
			if _, err := w.Write(f.text); err != nil {
				n.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			n.Fatal(err)
		}
		return b.Bytes()
	}
	dir := func(name string) file { return file{name, nil, 0o755} }
	layer := pack(dir("bin/"), file{"bin/busybox", program, 0o755}, dir("etc/"), file{"etc/passwd", []byte("root:x:0:0::/:/bin/sh\n"), 0o644}, dir("proc/"), dir("sys/"), dir("dev/"))
	config := fmt.Sprintf(`{"architecture":"amd64","os":"linux","config":{"Entrypoint":["/bin/busybox","sleep","1000000"],"Env":["PATH=/bin"]},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, sha256.Sum256(layer))
	archive := pack(file{"manifest.json", fmt.Appendf(nil, `[{"Config":"config.json","RepoTags":[%q],"Layers":["layer.tar"]}]`, image), 0o644},
		file{"config.json", []byte(config), 0o644}, file{"layer.tar", layer, 0o644})
	n.write("image.tar", string(archive))
	out, err := osexec.Command("ctr", "-a", n.socket(), "-n", "k8s.io", "image", "import", filepath.Join(n.dir, "image.tar")).CombinedOutput()
	if err != nil {
		n.Fatalf("ctr: %v: %s", err, out)
	}
}

// pod is a pod that runs.
type pod struct {
	id       string
	config   *cri.PodSandboxConfig
	space    *netlab.Namespace
	ip4, ip6 netip.Addr
}

func (n *node) config(name string, annotations map[string]string) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "demo", Uid: "uid-" + name},
		Hostname: name, LogDirectory: filepath.Join(n.dir, "logs", name), Annotations: annotations,
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: n.cgroups,
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}
}

func (n *node) run(name string, annotations map[string]string) (*pod, error) {
	p := &pod{config: n.config(name, annotations)}
	r, err := n.RunPodSandbox(n.Context(), &cri.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		return nil, err
	}
	p.id = r.PodSandboxId
	s, err := n.PodSandboxStatus(n.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil {
		return nil, err
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(s.Info["info"]), &info); err != nil {
		return nil, err
	}
	if p.space, err = n.Of(name, info.Pid); err != nil {
		return nil, err
	}
	addresses := s.Status.Network.AdditionalIps
	if len(addresses) != 1 {
		return nil, fmt.Errorf("pod %s has the addresses %v", name, s.Status.Network)
	}
	p.ip4, err = netip.ParseAddr(s.Status.Network.Ip)
	if err == nil {
		p.ip6, err = netip.ParseAddr(addresses[0].Ip)
	}
	return p, err
}

func (n *node) mustRun(name string, annotations map[string]string) *pod {
	n.Helper()
	p, err := n.run(name, annotations)
	if err != nil {
		n.Fatalf("pod %s: %v", name, err)
	}
	return p
}

// remove stops a pod twice, as a kubelet does that has forgotten, and removes it.
func (n *node) remove(p *pod) {
	n.Helper()
	for range 2 {
		if _, err := n.StopPodSandbox(n.Context(), &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
			n.Errorf("stop: %v", err)
		}
	}
	if _, err := n.RemovePodSandbox(n.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		n.Errorf("remove: %v", err)
	}
}

// save is what iptables and nftables have in a network namespace.
func (n *node) save(s *netlab.Namespace) (all string) {
	n.Helper()
	for _, program := range []string{"iptables-nft-save", "ip6tables-nft-save", "nft --stateless list ruleset inet"} {
		words := strings.Fields(program)
		out, err := n.Lab.Run(n.Context(), s, "", words[0], words[1:]...)
		if err != nil {
			n.Fatal(err)
		}
		all += out
	}
	return all
}
