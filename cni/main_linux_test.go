package cni

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
)

// TestMain is the plugin where the test binary is called so, as a runtime calls it; the
// kernel tests need network namespaces, and the others do not mind.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "kuma-cni" {
		os.Exit(Main(&Plugin{Version: "v0.0.0-test"}))
	}
	if filepath.Base(os.Args[0]) == "first" {
		first()
	}
	netlab.Main(m)
}

// first is the plugin that stands first in a list: it says that there is an interface.
func first() {
	done := func(*skel.CmdArgs) error { return nil }
	skel.PluginMainFuncs(skel.CNIFuncs{Del: done, Check: done, GC: done, Status: done, Add: func(a *skel.CmdArgs) error {
		result := types100.Result{CNIVersion: types100.ImplementedSpecVersion, Interfaces: []*types100.Interface{{Name: a.IfName, Sandbox: a.Netns, Mtu: 1400}}}
		return result.Print()
	}}, version.PluginSupports(types100.ImplementedSpecVersion), "")
	os.Exit(0)
}

// cannotRun skips a test of a suite, or fails it where TPROXY_REQUIRE names that.
func cannotRun(t *testing.T, suite, format string, args ...any) {
	t.Helper()
	if strings.Contains(os.Getenv("TPROXY_REQUIRE"), suite) {
		t.Fatalf("TPROXY_REQUIRE names "+suite+": "+format, args...)
	}
	t.Skipf(format, args...)
}
