package main

import (
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }

// The demo, with rules of others where there is iptables, and on a machine that has neither
// that nor nft.
func TestDemo(t *testing.T) {
	t.Run("beside iptables", func(t *testing.T) {
		netlab.Require(t, "ip", "iptables-save", "ip6tables-save")
		demonstrated(t, "IPv4 filter", "IPv6 raw", "equal")
	})
	t.Run("without iptables and nft", func(t *testing.T) {
		netlab.Require(t, "ip")
		hide(t)
		demonstrated(t, "addresses of lo", "equal", "what is installed", "equal")
	})
}

// hide takes every program of netfilter out of this process's sight.
func hide(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/run/hidden", nil, 0o644); err != nil { // of this process's own
		t.Fatal(err)
	}
	for _, folder := range []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		programs, _ := filepath.Glob(folder + "/*tables*")
		for _, p := range append(programs, folder+"/nft") {
			if target, err := filepath.EvalSymlinks(p); err == nil && syscall.Mount("/run/hidden", target, "", syscall.MS_BIND, "") == nil {
				t.Cleanup(func() { _ = syscall.Unmount(target, syscall.MNT_DETACH) })
			}
		}
	}
	for _, p := range []string{"nft", "iptables", "iptables-save", "iptables-nft-restore", "ip6tables-legacy-restore"} {
		if at, err := osexec.LookPath(p); err == nil {
			t.Fatalf("%s is not hidden", at)
		}
	}
}

func demonstrated(t *testing.T, uninstalled ...string) {
	for _, key := range []string{"SSH_CONNECTION", "KUBERNETES_SERVICE_HOST"} {
		t.Setenv(key, "") // the demo unsets them
	}
	var b strings.Builder
	code, err := demo(t.Context(), &page{w: &b})
	t.Log(b.String())
	if err != nil || code != 0 {
		t.Fatalf("exit code %d, %v", code, err)
	}
	inOrder(t, b.String(), append([]string{
		"== The script", "# SSH is protected",
		"== Flows", "SEEN", "15 flows, 0 wrong",
		"== Control", "RED", "2 lines red, as they should be", "missing rule",
		"== Re-install under load", "which started 0 processes", "escaped",
		"== Uninstalled"}, uninstalled...)...)
}

// A plain user gets the same, in a user namespace with more UIDs than one.
func TestDemoWithoutRoot(t *testing.T) {
	netlab.Require(t, "ip", "unshare")
	if _, err := osexec.LookPath("newuidmap"); err != nil {
		t.Skip("no package uidmap: ", err)
	}
	// /run and the mounts are this process's own.
	const program = "/run/quickstart"
	if out, err := osexec.CommandContext(t.Context(), "go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const nobody = 65534
	for _, file := range []string{"/etc/subuid", "/etc/subgid"} {
		if err := os.WriteFile("/run/subids", []byte("65534:100000:65536\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("/run/subids", file, "", syscall.MS_BIND, ""); err != nil {
			t.Skipf("no %s of our own: %v", file, err)
		}
	}
	cmd := osexec.CommandContext(t.Context(), program)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	text := string(out)
	if why, _, _ := strings.Cut(text, "\n"); err == nil && strings.Contains(text, "No packet was sent") {
		t.Skip(why)
	}
	if err != nil || !strings.Contains(text, "everything went as it should") {
		t.Errorf("%v\n%s", err, text)
	}
}
