package cli_test

import (
	"bytes"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestKernel runs each script of testdata/kernel in a network namespace of its
// own, with each variant of iptables: the machine's own rules are out of reach.
// Where that is impossible it is skipped, unless TPROXY_REQUIRE names kernel.
func TestKernel(t *testing.T) {
	if os.Getenv("CLI_KERNEL_SCRIPT") != "" {
		t.Skip("inside already")
	}
	files, err := filepath.Glob(filepath.Join("testdata", "kernel", "*.txtar"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, variant := range []string{"nft", "legacy"} {
		for _, file := range files {
			t.Run(variant+"/"+strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
				inNamespace(t, variant, file)
			})
		}
	}
}

func inNamespace(t *testing.T, variant, file string) {
	for _, program := range []string{"ip", "iptables-" + variant + "-restore", "ip6tables-" + variant + "-restore"} {
		if _, err := osexec.LookPath(program); err != nil {
			lacking(t, err)
		}
	}
	cmd := osexec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestKernelScript$", "-test.v="+verbosity())
	cmd.Env = append(os.Environ(), "CLI_KERNEL_SCRIPT="+file, "CLI_KERNEL_VARIANT="+variant)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		lacking(t, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, &out)
	}
	t.Logf("%s", &out)
}

func verbosity() string {
	if testing.Verbose() {
		return "true"
	}
	return "false"
}

// lacking skips the test, with the reason, unless it is required.
func lacking(t *testing.T, why error) {
	if strings.Contains(os.Getenv("TPROXY_REQUIRE"), "kernel") {
		t.Fatalf("TPROXY_REQUIRE names kernel: %v", why)
	}
	t.Skipf("no network namespace to test in: %v", why)
}

// TestKernelScript is what TestKernel starts in the namespace.
func TestKernelScript(t *testing.T) {
	file, variant := os.Getenv("CLI_KERNEL_SCRIPT"), os.Getenv("CLI_KERNEL_VARIANT")
	if file == "" {
		t.Skip("run by TestKernel")
	}
	if out, err := osexec.CommandContext(t.Context(), "ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatalf("ip link set lo up: %v: %s", err, out)
	}
	_, noIPv6 := os.Stat("/proc/sys/net/ipv6")
	testscript.Run(t, testscript.Params{
		Files:               []string{file},
		RequireExplicitExec: true,
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"code": exitCode, "scripts": scripts, "rules": listRules},
		Condition:           func(cond string) (bool, error) { return cond == "ipv6" && noIPv6 == nil, nil },
		Setup: func(e *testscript.Env) error {
			e.Setenv("V", variant)
			e.Setenv("BACKEND", "iptables-"+variant)
			return nil
		},
	})
}

// listRules is the script command "rules FILE": what both families hold, in the
// variant under test, less counters and the time of day.
func listRules(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: rules FILE")
	}
	var b strings.Builder
	for _, family := range []string{"iptables", "ip6tables"} {
		b.WriteString(family + "\n")
		ts.Check(ts.Exec(family + "-" + ts.Getenv("V") + "-save"))
		for line := range strings.Lines(ts.ReadFile("stdout")) {
			if strings.HasPrefix(line, "-") || strings.HasPrefix(line, "*") || strings.Contains(line, "KUMA") {
				b.WriteString(line)
			}
		}
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(b.String()), 0o600))
}
