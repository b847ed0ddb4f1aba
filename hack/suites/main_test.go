package main

import "testing"

func TestSuiteOf(t *testing.T) {
	for _, c := range []struct{ file, name, text, want string }{
		{"tproxy/theorems_test.go", "TestTotality", "", "pure"},
		{"tproxy/exec/apply_test.go", "TestApply", "", "fakes"},
		{"tproxy/exec/state_linux_test.go", "TestApply", "", "kernel"},
		{"tproxy/rules/parse_kernel_test.go", "TestParse", "", "kernel"},
		{"examples/x/main_test.go", "TestX", `import "` + module + `/internal/netlab"`, "kernel"},
		{"cli/kernel_linux_test.go", "TestKernel", "", "cli"},
		{"cni/kernel_linux_test.go", "TestPod", "", "cni"},
		{"cni/internal/critest/containerd_linux_test.go", "TestContainerdPods", "", "runtime"},
		{"bench/peers/peers_linux_test.go", "TestPeersRedirect", `import "` + module + `/internal/netlab"`, "runtime"},
		{"tproxy/exec/runtime_linux_test.go", "TestPodman", "", "runtime"},
		{"tproxy/exec/kernel_linux_test.go", "TestFirewalldReload", "", "runtime"},
		{"tproxy/exec/systemd_linux_test.go", "TestBoot", "", "systemd"},
	} {
		if got := suiteOf(c.file, c.name, c.text); got != c.want {
			t.Errorf("%s %s: %s, want %s", c.file, c.name, got, c.want)
		}
	}
}

func TestReason(t *testing.T) {
	if got := reason([]string{"=== RUN   TestX\n", "    x_test.go:12: no lab: errno 1\n", "--- SKIP: TestX\n"}); got != "no lab: errno 1" {
		t.Errorf("got %q", got)
	}
}
