package cni

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
)

// TestMain is the plugin where the test binary is called so, as a runtime calls it; the
// kernel tests need network namespaces, and the others do not mind.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "kuma-cni" {
		os.Exit(Main(&Plugin{Version: "v0.0.0-test"}))
	}
	netlab.Main(m)
}

// cannotRun skips a test of a suite, or fails it where TPROXY_REQUIRE names that.
func cannotRun(t *testing.T, suite, format string, args ...any) {
	t.Helper()
	if strings.Contains(os.Getenv("TPROXY_REQUIRE"), suite) {
		t.Fatalf("TPROXY_REQUIRE names "+suite+": "+format, args...)
	}
	t.Skipf(format, args...)
}
