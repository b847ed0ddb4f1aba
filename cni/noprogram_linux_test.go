package cni

import (
	"encoding/json"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
)

// bare is a machine with nothing on it but the two static programs: a root to change into,
// whose network is the lab's host.
type bare struct {
	*lab
	root  string
	trace string
}

func newBare(t *testing.T) *bare {
	t.Helper()
	b := &bare{lab: newLab(t), root: t.TempDir()}
	netlab.Require(t, "strace", "chroot")
	b.trace = filepath.Join(t.TempDir(), "trace")
	for _, module := range []string{"cli/cmd/kumactl", "cni/cmd/kuma-cni"} {
		build := osexec.Command("go", "build", "-o", b.root, "github.com/kumahq/kuma-tproxy/"+module)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	for _, folder := range []string{"proc", "etc", "run", "tmp"} {
		if err := os.Mkdir(filepath.Join(b.root, folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(b.root, "etc/resolv.conf"), []byte("nameserver "+netlab.Resolver4.String()+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	proc := filepath.Join(b.root, "proc")
	if err := syscall.Mount("/proc", proc, "", syscall.MS_BIND|syscall.MS_REC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(proc, syscall.MNT_DETACH) })
	return b
}

// run runs one of the programs and fails if it, or anything that it starts, starts another.
func (b *bare) run(where *netlab.Namespace, stdin string, env []string, words ...string) (string, error) {
	b.Helper()
	cmd := osexec.Command("strace", append([]string{"-f", "-qq", "-e", "trace=execve,execveat", "-o", b.trace, "chroot", b.root}, words...)...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	cmd.Stdin = strings.NewReader(stdin)
	var out []byte
	do := func() (err error) { out, err = cmd.CombinedOutput(); return err }
	var err error
	if where == nil {
		err = do()
	} else {
		err = b.In(where, do)
	}
	trace, err2 := os.ReadFile(b.trace)
	if err2 != nil {
		b.Fatal(err2)
	}
	programs := 0
	for line := range strings.Lines(string(trace)) {
		if strings.Contains(line, "exec") && strings.HasSuffix(line, "= 0\n") {
			programs++
		}
	}
	if programs != 2 { // chroot, and the program itself
		b.Errorf("%q started %d programs:\n%s", words, programs-2, trace)
	}
	return string(out), err
}

func (b *bare) kumactl(words ...string) string {
	b.Helper()
	out, err := b.run(b.Host, "", nil, append([]string{"/kumactl", words[0], "transparent-proxy"}, words[1:]...)...)
	if err != nil {
		b.Fatalf("%q: %v\n%s", words, err, out)
	}
	return out
}

// On a machine with neither iptables nor nft, nor a shell, kumactl does all of its work
// by itself.
func TestNoProgramIsNeededByKumactl(t *testing.T) {
	b := newBare(t)
	b.proxy()
	install := []string{"install", "--kuma-dp-user", "5678", "--redirect-all-dns-traffic", "--exclude-inbound-ports", "1234", "--exclude-outbound-ports-for-uids", "tcp::1001"}
	b.direct()
	if out := b.kumactl(append(install, "--dry-run")...); !strings.Contains(out, "nftables") {
		t.Errorf("dry run: %s", out)
	}
	b.direct()
	if out := b.kumactl(install...); !strings.Contains(out, "completed successfully") {
		t.Errorf("install: %s", out)
	}
	b.flow("A5", b.Client, 0, "tcp", netlab.Host4, 8080, "in")
	b.flow("A3", b.Client, 0, "tcp", netlab.Host6, 1234, "app")
	b.flow("B11", b.Host, appUID, "tcp", netlab.Internet6, 80, "out")
	b.flow("B3", b.Host, proxyUID, "tcp", netlab.Internet4, 80, "remote")
	b.flow("B7", b.Host, excludedUID, "tcp", netlab.Internet4, 80, "remote")
	b.flow("C3", b.Host, appUID, "udp", netlab.Resolver4, 53, "dns")
	if out := b.kumactl(install...); strings.Contains(out, "Done:") {
		t.Errorf("the same again: %s", out)
	}
	if out := b.kumactl("inspect"); !strings.HasPrefix(out, "State: installed") {
		t.Errorf("inspect: %s", out)
	}
	if out := b.kumactl("explain", "--from", "app", "--to", netlab.Internet4.String()+":80"); !strings.Contains(out, "verdict: out") {
		t.Errorf("explain: %s", out)
	}
	if out := b.kumactl("install", "--reuse-config", "--exclude-outbound-ports", "80"); !strings.Contains(out, "80") {
		t.Errorf("another: %s", out)
	}
	b.flow("B8", b.Host, appUID, "tcp", netlab.Internet6, 80, "remote")
	b.kumactl("uninstall")
	b.direct()
	if left := b.table(b.Host); left != "" {
		t.Errorf("left: %s", left)
	}
}

// Nor does kuma-cni need any, in a pod's namespace, and on a node without them.
func TestNoProgramIsNeededByKumaCNI(t *testing.T) {
	b := newBare(t)
	b.proxy()
	a := b.args(map[string]any{"cniVersion": "1.1.0"}, excluded...)
	call := func(verb string) (string, error) {
		return b.run(nil, string(a.StdinData), []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=c1", "CNI_NETNS=" + a.Netns, "CNI_IFNAME=eth0", "CNI_PATH=/", "CNI_ARGS=" + a.Args}, "/kuma-cni")
	}
	for _, verb := range []string{"STATUS", "ADD", "CHECK", "GC"} {
		out, err := call(verb)
		if err != nil {
			t.Fatalf("%s: %v\n%s", verb, err, out)
		}
		if verb == "ADD" && (!strings.Contains(out, `"processes":0`) || !strings.Contains(out, `"backend":"nftables"`)) {
			t.Errorf("%s: %s", verb, out)
		}
	}
	b.meshed()
	if out, err := call("DEL"); err != nil || !strings.Contains(out, `"processes":0`) {
		t.Errorf("DEL: %v\n%s", err, out)
	}
	b.direct()
	// What needs iptables says so.
	var e map[string]any
	if err := json.Unmarshal(a.StdinData, &e); err != nil {
		t.Fatal(err)
	}
	e["config"] = iptables["config"]
	a.StdinData, _ = json.Marshal(e)
	if out, err := call("ADD"); err == nil || !strings.Contains(out, "iptables-nft-restore") || !strings.Contains(out, "not found") {
		t.Errorf("ADD with iptables-nft: %v\n%s", err, out)
	}
	b.direct()
}
