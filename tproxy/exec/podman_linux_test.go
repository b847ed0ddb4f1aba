package exec_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// podman is the real one, with pods in the test's own network namespace behind a bridge
// of the real CNI plugins, and everything that it keeps in a folder of the test's.
type podman struct {
	*testing.T
	dir     string
	backend tproxy.Backend
	bin     string // a folder of programs
}

const (
	podmanBridge = "kuma-tproxy0"
	podmanConf   = `[containers]
# The machine's root may have no CAP_SYS_RESOURCE.
default_ulimits=["nofile=1024:4096","nproc=4096:4096"]
apparmor_profile="unconfined"
log_driver="k8s-file"
[network]
network_backend="cni"
cni_plugin_dirs=["/usr/lib/cni"]
network_config_dir="%[1]s/net.d"
default_network="lab"
[engine]
cgroup_manager="cgroupfs"
events_logger="none"
runtime="runc"
lock_type="file"
tmp_dir="/run/libpod"
`
	podmanNetwork = `{"cniVersion":"0.4.0","name":"lab","plugins":[{"type":"bridge","bridge":"` + podmanBridge + `","isGateway":true,
"ipam":{"type":"host-local","ranges":[[{"subnet":"10.203.0.0/24"}],[{"subnet":"fd03::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}],"dataDir":"%[1]s/ipam"}}]}`
)

// gateways are the host's addresses on the bridge.
var gateways = []string{"10.203.0.1", "fd03::1"}

func newPodman(t *testing.T, b tproxy.Backend, bin string) *podman {
	t.Helper()
	p := &podman{T: t, dir: t.TempDir(), backend: b, bin: bin}
	for name, text := range map[string]string{"containers.conf": podmanConf, "net.d/lab.conflist": podmanNetwork} {
		file := filepath.Join(p.dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, fmt.Appendf(nil, text, p.dir), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("CONTAINERS_CONF", filepath.Join(p.dir, "containers.conf"))
	t.Cleanup(func() {
		_ = osexec.Command("ip", "link", "del", podmanBridge).Run()
		// Control groups are the machine's, whatever the namespaces: these are ours.
		groups, _ := filepath.Glob("/sys/fs/cgroup/*" + p.group())
		for _, g := range append(groups, "/sys/fs/cgroup"+p.group()) {
			var all []string
			_ = filepath.WalkDir(g, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					all = append(all, path)
				}
				return nil
			})
			for _, path := range slices.Backward(all) {
				_ = syscall.Rmdir(path)
			}
		}
	})
	return p
}

func (p *podman) group() string { return fmt.Sprintf("/kuma-tproxy-podman-%d", os.Getpid()) }

// command is podman with its folders, of which the second is of the lab's /run: podman
// takes no long name for it.
func (p *podman) command(ctx context.Context, args ...string) *osexec.Cmd {
	root := []string{"--root", p.dir + "/root", "--runroot", "/run/" + p.backend.String(), "--storage-driver", "vfs"}
	return osexec.CommandContext(ctx, "podman", append(root, args...)...)
}

// try runs podman.
func (p *podman) try(args ...string) (string, error) {
	cmd := p.command(p.Context(), args...)
	cmd.WaitDelay = 5 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return strings.TrimSpace(out.String()), err
}

func (p *podman) on(args ...string) string {
	p.Helper()
	out, err := p.try(args...)
	if err != nil {
		p.Fatalf("podman %q: %v\n%s", args, err, out)
	}
	return out
}

// staticBuild compiles a program that needs no library.
func staticBuild(t *testing.T, binary, pkg string) {
	t.Helper()
	cmd := osexec.Command("go", "build", "-o", binary, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, out)
	}
}

// image loads an image of files, by their place in it; a value that begins with "->" is
// a symbolic link. It is a docker archive of one layer: no registry is asked.
func (p *podman) image(name string, files map[string]string) {
	p.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	add := func(h *tar.Header, content []byte) {
		if err := w.WriteHeader(h); err == nil {
			_, err = w.Write(content)
			if err == nil {
				return
			}
			p.Fatal(err)
		}
	}
	for _, dir := range []string{"tmp", "run", "etc", "proc", "sys", "dev"} {
		add(&tar.Header{Name: dir, Mode: 0o755, Typeflag: tar.TypeDir}, nil)
	}
	for _, at := range slices.Sorted(maps.Keys(files)) {
		if to, ok := strings.CutPrefix(files[at], "->"); ok {
			add(&tar.Header{Name: at, Linkname: to, Typeflag: tar.TypeSymlink}, nil)
			continue
		}
		content, err := os.ReadFile(files[at])
		if err != nil {
			p.Fatal(err)
		}
		add(&tar.Header{Name: at, Mode: 0o755, Size: int64(len(content)), Typeflag: tar.TypeReg}, content)
	}
	if err := w.Close(); err != nil {
		p.Fatal(err)
	}
	config := fmt.Sprintf(`{"architecture":"%s","os":"linux","config":{"Env":["PATH=/usr/sbin:/usr/bin"]},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`,
		runtime.GOARCH, sha256.Sum256(layer.Bytes()))
	manifest := fmt.Sprintf(`[{"Config":"config.json","RepoTags":[%q],"Layers":["layer.tar"]}]`, name)
	var archive bytes.Buffer
	w = tar.NewWriter(&archive)
	for _, f := range []struct {
		name    string
		content []byte
	}{{"manifest.json", []byte(manifest)}, {"config.json", []byte(config)}, {"layer.tar", layer.Bytes()}} {
		add(&tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.content)), Typeflag: tar.TypeReg}, f.content)
	}
	if err := w.Close(); err != nil {
		p.Fatal(err)
	}
	file := filepath.Join(p.dir, "image.tar")
	if err := os.WriteFile(file, archive.Bytes(), 0o600); err != nil {
		p.Fatal(err)
	}
	p.on("load", "-q", "-i", file)
}

var library = regexp.MustCompile(`/\S+\.so\S*`)

// initImage loads the image of kuma-init: kumactl, and the machine's own iptables of the
// variant under test, with its libraries and extensions, under their plain names too. With
// nftables it is kumactl alone.
func (p *podman) initImage(name string) {
	p.Helper()
	files := map[string]string{"usr/bin/kumactl": p.bin + "/kumactl"}
	if p.backend == tproxy.NFTables {
		p.image(name, files)
		return
	}
	variant := strings.TrimPrefix(p.backend.String(), "iptables-")
	multi, err := osexec.LookPath("xtables-" + variant + "-multi")
	if err != nil {
		p.Skip(err)
	}
	files["usr/sbin/multi"] = multi
	for _, program := range []string{"iptables", "ip6tables"} {
		for _, does := range []string{"", "-save", "-restore"} {
			files["usr/sbin/"+program+"-"+variant+does] = "->multi"
			files["usr/sbin/"+program+does] = "->multi"
		}
	}
	out, err := osexec.Command("ldd", multi).Output()
	if err != nil {
		p.Fatal(err)
	}
	libraries := library.FindAllString(string(out), -1)
	extensions, _ := filepath.Glob("/usr/lib/*/xtables/*.so")
	for _, l := range append(libraries, extensions...) {
		files[strings.TrimPrefix(l, "/")] = l
	}
	p.image(name, files)
}

const (
	podmanInit = "lab.local/kuma-init:1"
	podmanPeer = "lab.local/peer:1"
)

// pod makes a pod as Kuma's injector would have it: kuma-init with two capabilities, a
// read-only root and nothing to write to but /tmp, then the proxy and the application,
// which answer. It returns what kuma-init said, and the error of the start.
func (p *podman) pod(name string, mounts, args []string) (said string, err error) {
	p.Helper()
	p.on("pod", "create", "--name", name, "--network", "lab", "--share", "net", "--cgroup-parent", p.group(),
		"--infra-image", podmanPeer, "--infra-command", "/usr/bin/peer wait")
	p.Cleanup(func() {
		// The test's context is over.
		if out, err := p.command(context.Background(), "pod", "rm", "-f", "-t", "0", name).CombinedOutput(); err != nil {
			p.Errorf("podman pod rm: %v: %s", err, out)
		}
	})
	tmp := p.TempDir()
	create := []string{"create", "--pod", name, "--init-ctr", "always", "--name", name + "-init", "--user", "0:0",
		"--cap-drop", "ALL", "--cap-add", "NET_ADMIN,NET_RAW", "--read-only", "--read-only-tmpfs=false",
		"-e", "XTABLES_LOCKFILE=/tmp/xtables.lock", "-e", "KUBERNETES_SERVICE_HOST=10.96.0.1", "-v", tmp + ":/tmp"}
	for _, m := range mounts {
		create = append(create, "-v", m+":ro")
	}
	p.on(slices.Concat(create, []string{podmanInit, "/usr/bin/kumactl", "install", "transparent-proxy"}, args)...)
	p.on("create", "--pod", name, "--name", name+"-proxy", "--user", "5678", "--cap-drop", "ALL", "--read-only", podmanPeer,
		"/usr/bin/peer", "serve", "tcp:in:15006", "tcp:out:15001", "udp:dns:15053")
	p.on("create", "--pod", name, "--name", name+"-app", "--user", "1000", "--cap-drop", "ALL", "--read-only", podmanPeer,
		"/usr/bin/peer", "serve", "tcp:app:8080", "tcp:app:9001", "tcp:app:2222")
	out, err := p.try("pod", "start", name)
	said = p.on("logs", name+"-init")
	if err != nil {
		return said, fmt.Errorf("%w: %s", err, out)
	}
	for _, c := range []string{"-proxy", "-app"} {
		for start := time.Now(); ; time.Sleep(50 * time.Millisecond) {
			if out := p.on("logs", name+c); strings.Contains(out, "serving") {
				break
			} else if time.Since(start) > 20*time.Second {
				p.Fatalf("%s does not serve: %s", name+c, out)
			}
		}
	}
	return said, nil
}

// ask asks from a container of the pod who answers at addresses, each behind its
// network.
func (p *podman) ask(container string, what ...string) []string {
	p.Helper()
	return strings.Split(p.on(append([]string{"exec", container, "/usr/bin/peer", "ask"}, what...)...), "\n")
}

// addresses are those of the pod, one a family.
func (p *podman) addresses(pod string) []string {
	p.Helper()
	var found []struct {
		NetworkSettings struct {
			Networks map[string]struct{ IPAddress, GlobalIPv6Address string }
		}
	}
	infra := p.on("pod", "inspect", "-f", "{{.InfraContainerID}}", pod)
	if err := json.Unmarshal([]byte(p.on("inspect", infra)), &found); err != nil {
		p.Fatal(err)
	}
	n := found[0].NetworkSettings.Networks["lab"]
	return []string{n.IPAddress, n.GlobalIPv6Address}
}

// remote answers on the host's addresses at the bridge, as another host would.
func (p *podman) remote(ports ...string) {
	p.Helper()
	for _, gateway := range gateways {
		for _, port := range ports {
			l, err := net.Listen("tcp", net.JoinHostPort(gateway, port))
			// The bridge's address of IPv6 is tentative while the kernel looks for another
			// host that has it (RFC 4862, section 5.4).
			for end := time.Now().Add(10 * time.Second); errors.Is(err, syscall.EADDRNOTAVAIL) && time.Now().Before(end); {
				time.Sleep(50 * time.Millisecond)
				l, err = net.Listen("tcp", net.JoinHostPort(gateway, port))
			}
			if err != nil {
				p.Fatal(err)
			}
			p.Cleanup(func() { _ = l.Close() })
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					_, _ = c.Write([]byte("remote"))
					_ = c.Close()
				}
			}()
		}
	}
}

// dial asks from the host who answers in the pod.
func dial(address string) string {
	c, err := net.DialTimeout("tcp", address, 3*time.Second)
	if err != nil {
		return "nobody: " + err.Error()
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	buf := make([]byte, 64)
	n, err := c.Read(buf)
	if err != nil {
		return "nobody: " + err.Error()
	}
	return string(buf[:n])
}

// flows checks where those of the pod go, in both families.
func (p *podman) flows(pod string) {
	p.Helper()
	inside := map[string][][3]string{} // what a container asks: row, answer, and how it is said
	asks := map[string][]string{}
	for f, own := range p.addresses(pod) {
		if own == "" {
			p.Fatalf("the pod has no address in family %d", f)
		}
		for _, c := range []struct{ row, port, want string }{
			{"A5", "8080", "in"},
			{"A5, SSH in a pod", "22", "in"},
			{"A3, the probe proxy's", "9001", "app"},
			{"A3, the pod's own", "2222", "app"},
		} {
			if got := dial(net.JoinHostPort(own, c.port)); got != c.want {
				p.Errorf("%s: port %s of %s answered by %s, want %s", c.row, c.port, own, got, c.want)
			}
		}
		for _, c := range []struct{ row, from, network, host, port, want string }{
			{"B11", "app", "tcp", gateways[f], "7001", "out"},
			{"B8", "app", "tcp", gateways[f], "7002", "remote"},
			{"B3", "proxy", "tcp", gateways[f], "7001", "remote"},
			{"B4", "app", "tcp", []string{"127.0.0.1", "::1"}[f], "8080", "app"},
			{"C3", "app", "udp", gateways[f], "53", "dns"},
		} {
			to := net.JoinHostPort(c.host, c.port)
			inside[c.from] = append(inside[c.from], [3]string{c.row, c.want, c.network + " of the " + c.from + " to " + to})
			asks[c.from] = append(asks[c.from], c.network, to)
		}
	}
	for from, list := range inside {
		answers := p.ask(pod+"-"+from, asks[from]...)
		for i, c := range list {
			if i >= len(answers) || answers[i] != c[1] {
				p.Errorf("%s: %s: answers %q, want %s in place %d", c[0], c[2], answers, c[1], i)
			}
		}
	}
}

// A pod of the real podman, with kuma-init as Kuma's injector has it, with each backend:
// what it may do, and where flows go. The same pod gets the same rules by
// its annotations.
func TestPodmanPod(t *testing.T) {
	runtimeSuite(t, "podman", "conmon", "runc", "go", "ldd", "ip")
	if _, err := os.Stat("/usr/lib/cni/bridge"); err != nil {
		cannotRun(t, "runtime", "%v", err)
	}
	bin := t.TempDir()
	staticBuild(t, bin+"/peer", "./testdata/peer")
	staticBuild(t, bin+"/kumactl", "github.com/kumahq/kuma-tproxy/cli/cmd/kumactl")
	for _, b := range tproxy.Backends() {
		t.Run(b.String(), func(t *testing.T) {
			backend := "--backend=" + b.String()
			if b == tproxy.NFTables {
				backend = "--backend=auto"
			}
			p := newPodman(t, b, bin)
			p.image(podmanPeer, map[string]string{"usr/bin/peer": bin + "/peer"})
			p.initImage(podmanInit)
			config, custom, annotations := p.file("config.yaml", podmanBase), p.file("custom/config.yaml", "redirect: {outbound: {excludePorts: [7002]}}\n"), p.file("annotations", podmanAnnotations)
			said, err := p.pod("injected", []string{config + ":/tmp/transparent-proxy/base/config.yaml", custom + ":/tmp/transparent-proxy/custom/config.yaml"},
				[]string{"--config-file=/tmp/.kumactl", "--config=/tmp/transparent-proxy/base/config.yaml", "--config=/tmp/transparent-proxy/custom/config.yaml", backend})
			if err != nil {
				t.Fatalf("%v\n%s", err, said)
			}
			p.remote("7001", "7002")
			p.confined("injected-init")
			p.flows("injected")
			if said, err = p.pod("annotated", []string{annotations + ":/etc/podinfo/annotations"}, []string{"--pod-annotations=/etc/podinfo/annotations", backend}); err != nil {
				t.Fatalf("%v\n%s", err, said)
			}
			if !strings.Contains(said, `kuma.io/sidecar-uid: "0" is not used: the control plane says 5678`) {
				t.Errorf("kuma-init said %s", said)
			}
			p.flows("annotated")
			if a, b := p.rules("injected"), p.rules("annotated"); a != b || a == "" {
				t.Errorf("rules by files:\n%s\nby annotations:\n%s", a, b)
			}
			// A pod that cannot have its rules does not run.
			bad := p.file("bad", "traffic.kuma.io/exclude-inbound-ports=\"http\"\n")
			said, err = p.pod("bad", []string{bad + ":/etc/podinfo/annotations"}, []string{"--pod-annotations=/etc/podinfo/annotations"})
			if err == nil || !strings.Contains(err.Error(), "exited with code 2") || !strings.Contains(said, `/etc/podinfo/annotations: traffic.kuma.io/exclude-inbound-ports: "http"`) {
				t.Errorf("%v, and kuma-init said %s", err, said)
			}
			if state := p.on("inspect", "-f", "{{.State.Status}}", "bad-app"); state != "created" {
				t.Errorf("the application is %s without its rules", state)
			}
		})
	}
}

const podmanBase = `kumaDPUser: "5678"
redirect:
  inbound: {port: 15006, excludePorts: [2222, 9001]}
  outbound: {port: 15001}
  dns: {enabled: true, captureAll: true, port: 15053}
cniMode: false
`

const podmanAnnotations = `kuma.io/mesh="default"
kuma.io/sidecar-injected="true"
kuma.io/sidecar-uid="0"
traffic.kuma.io/exclude-inbound-ports="2222"
traffic.kuma.io/exclude-outbound-ports="7002"
`

func (p *podman) file(name, text string) string {
	p.Helper()
	file := filepath.Join(p.dir, "mounts", name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		p.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		p.Fatal(err)
	}
	return file
}

// confined checks that a container could do no more than Kuma's injector allows.
func (p *podman) confined(container string) {
	p.Helper()
	var found []struct {
		EffectiveCaps []string
		HostConfig    struct {
			ReadonlyRootfs bool
			Tmpfs          map[string]string
		}
	}
	if err := json.Unmarshal([]byte(p.on("inspect", container)), &found); err != nil {
		p.Fatal(err)
	}
	if c := found[0]; !slices.Equal(c.EffectiveCaps, []string{"CAP_NET_ADMIN", "CAP_NET_RAW"}) || !c.HostConfig.ReadonlyRootfs || len(c.HostConfig.Tmpfs) > 0 {
		p.Errorf("%s: %+v", container, c)
	}
}

// rules are those of a pod, less counters and what the record says of the install.
func (p *podman) rules(name string) string {
	p.Helper()
	pid := p.on("inspect", "-f", "{{.State.Pid}}", name+"-app")
	var out strings.Builder
	variant := strings.TrimPrefix(p.backend.String(), "iptables-")
	lists, begins := []string{"iptables-" + variant + "-save", "ip6tables-" + variant + "-save"}, "-"
	if p.backend == tproxy.NFTables {
		lists, begins = []string{"nft --stateless list table inet " + tproxy.NFTable}, "\t"
	}
	for _, list := range lists {
		text, err := osexec.Command("nsenter", append([]string{"-t", pid, "-n"}, strings.Fields(list)...)...).CombinedOutput()
		if err != nil {
			p.Fatalf("%v: %s", err, text)
		}
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, begins) && !strings.Contains(line, "proxy/kuma-tproxy 1 ") {
				out.WriteString(line)
			}
		}
	}
	return out.String()
}
