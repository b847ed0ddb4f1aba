package files

import (
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
)

// victim is set, to "install" or "remove", in the process that a test kills; the
// file is its argument.
const victim = "TPROXY_FILES_VICTIM"

var cp = netip.MustParseAddr("10.9.9.9")

// managed is a Manager for a file of a test.
func managed(path string) dns.Manager {
	return dns.Manager{
		Env:        dns.Env{Path: path, Mounts: Mounts("thread-self")},
		FS:         FS{},
		Namespaces: dns.Namespaces{Meant: true},
	}
}

func TestMain(m *testing.M) {
	if what := os.Getenv(victim); what != "" {
		var err error
		if mgr := managed(os.Args[1]); what == "install" {
			_, err = mgr.Install(cp)
		} else {
			_, err = mgr.Remove()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	netlab.Main(m)
}
