package cni

import (
	"context"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The whole program, of a pod that is left alone or of which there is nothing to be
// entered: what stands at CNI_NETNS must neither fail it nor keep it waiting.
func TestProcessAnyNetNS(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	program, fifo := filepath.Join(dir, "kuma-cni"), filepath.Join(dir, "fifo")
	if err != nil || os.Symlink(self, program) != nil || unix.Mkfifo(fifo, 0o600) != nil {
		t.Fatal(err)
	}
	alone := entry(runtimeConfig(map[string]string{}))
	for _, c := range []struct {
		verb, netns string
		stdin       []byte
	}{
		{"ADD", "/proc/self/ns/net", alone}, {"ADD", fifo, alone}, {"ADD", "/proc/self/ns/net", entry(nil)},
		{"DEL", "/proc/self/ns/net", alone}, {"DEL", fifo, alone}, {"DEL", fifo, entry(nil)}, {"DEL", "/proc/self/ns/net", entry(nil)},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		cmd := osexec.CommandContext(ctx, program)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + c.verb, "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_PATH=" + dir, "CNI_NETNS=" + c.netns}
		cmd.Stdin = strings.NewReader(string(c.stdin))
		out, err := cmd.Output()
		cancel()
		want := ""
		if c.verb == "ADD" {
			want = previous + "\n"
		}
		if err != nil || string(out) != want {
			t.Errorf("%s of %s: %v, %s", c.verb, c.netns, err, out)
		}
	}
}
