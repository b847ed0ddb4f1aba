package main

import (
	"io"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

func TestMain(m *testing.M) { netlab.Main(m) }

func TestInstallAndUninstall(t *testing.T) {
	netlab.Require(t, "ip", "iptables-save", "ip6tables-save")
	t.Setenv("SSH_CONNECTION", "") // the machine's, not the lab's
	lab, err := netlab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lab.Close()
	for _, step := range []struct{ args, want string }{
		{"install -user 5678 -dry-run", "### IPv6 ###"},
		{"install -user 5678", "changed: true"},
		{"install -user 5678", "changed: false"},
		{"uninstall", "changed: true"},
		{"uninstall", "changed: false"},
	} {
		var out strings.Builder
		err := lab.In(lab.Host, func() error {
			return run(t.Context(), &out, &exec.Runner{}, strings.Fields(step.args))
		})
		if err != nil || !strings.Contains(out.String(), step.want) {
			t.Errorf("%s: %v, want %q:\n%s", step.args, err, step.want, &out)
		}
	}
}

func TestUnknownUser(t *testing.T) {
	err := run(t.Context(), io.Discard, &exec.Runner{}, []string{"install", "-user", "nobody-has-this-name"})
	if err == nil || !strings.Contains(err.Error(), "useradd") {
		t.Errorf("got %v, want the line that creates the user", err)
	}
}
