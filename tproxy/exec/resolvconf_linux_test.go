package exec_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

// The Manager of this machine's files: in, the same again, and out, byte for byte.
func TestResolvConf(t *testing.T) {
	const was = "# mine\r\nsearch example.org\nnameserver 10.0.0.1 \n\n"
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte(was), 0o640); err != nil {
		t.Fatal(err)
	}
	a := netip.MustParseAddr("10.9.9.9")
	for _, want := range []dns.How{dns.Replace, dns.Unchanged} {
		done, err := exec.ResolvConf(path, true).Install(a)
		if err != nil || done.How != want {
			t.Fatalf("Install: %s, %v; want %s", done.How, err, want)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := dns.Parse(text).Nameservers; len(got) != 2 || got[0] != a {
			t.Errorf("nameservers %v", got)
		}
	}
	gone, err := exec.ResolvConf(path, true).Remove()
	if err != nil || !gone.Restored {
		t.Errorf("Remove: %s, %v", gone, err)
	}
	text, err := os.ReadFile(path)
	if err != nil || string(text) != was {
		t.Errorf("%q, %v; want %q", text, err, was)
	}
	files, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*"))
	if err != nil || len(files) != 1 {
		t.Errorf("left: %v, %v", files, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}
