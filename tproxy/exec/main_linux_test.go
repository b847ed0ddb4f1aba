package exec_test

import (
	"os"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
)

// TestMain is that of the internal test files too. The kernel tests need network
// namespaces; the others do not mind.
func TestMain(m *testing.M) {
	if os.Getenv(probeMarker) != "" {
		os.Exit(probeShells())
	}
	if needs := os.Getenv(hostMarker); needs != "" {
		os.Exit(printHost(needs))
	}
	if order := os.Getenv(childMarker); order != "" {
		os.Exit(child(order))
	}
	// Whoever runs the tests may do so through SSH, or in a pod: that is not the
	// lab's host.
	for _, key := range []string{"SSH_CONNECTION", "KUBERNETES_SERVICE_HOST"} {
		os.Unsetenv(key)
	}
	netlab.Main(m)
}

// onlyIn skips a test of a suite that TPROXY_SUITE does not name.
func onlyIn(t *testing.T, suite string) {
	t.Helper()
	if !strings.Contains(os.Getenv("TPROXY_SUITE"), suite) {
		t.Skipf("TPROXY_SUITE does not name %s", suite)
	}
}

// cannotRun skips a test of a suite, or fails it where TPROXY_REQUIRE names that.
func cannotRun(t *testing.T, suite, format string, args ...any) {
	t.Helper()
	if strings.Contains(os.Getenv("TPROXY_REQUIRE"), suite) {
		t.Fatalf("TPROXY_REQUIRE names "+suite+": "+format, args...)
	}
	t.Skipf(format, args...)
}
