// Package differential asks the kernel: random configs are installed in
// namespaces, random real flows are sent, and who answered, the original
// destination that it saw and the conntrack zone are compared with what sim.Walk
// and tproxytest.Expect say. It judges by the contract, and by the host that the
// lab was made to be, not by what Probe found.
//
//	go test ./tproxy/exec/differential                                a sample of seconds
//	TPROXY_SUITE=differential go test ./tproxy/exec/differential      all of it (make test-all)
//	go test ./tproxy/exec/differential -run Agrees -args -seed 7      one config again, with all its flows
//	SOAK=1h make soak                                                 new configs, for as long as one likes
package differential

import (
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
)

var (
	seedFlag    = flag.Int("seed", 0, "the one `seed` to try")
	configsFlag = flag.Int("configs", 100, "how many `configs` the suite differential tries")
	outFlag     = flag.String("out", "", "the `file` for the results of the suite differential, from this folder")
)

// passwd is what this process and what it starts have as /etc/passwd.
const passwd = "/run/passwd"

func TestMain(m *testing.M) {
	if uid := os.Getenv(resolverEnv); uid != "" {
		os.Exit(resolve(uid))
	}
	if strings.Contains(os.Getenv("TPROXY_SUITE"), "soak") {
		signal.Ignore(os.Interrupt) // the soak itself listens to it
	}
	// What these say is about the machine, not about the lab's host.
	for _, key := range []string{"SSH_CONNECTION", "KUBERNETES_SERVICE_HOST"} {
		_ = os.Unsetenv(key)
	}
	netlab.Main(m)
}

// require skips the test where there is no lab, or not every user.
func require(t *testing.T) {
	t.Helper()
	netlab.Require(t, "ip", "iptables-nft-restore", "ip6tables-nft-restore", "iptables-legacy-restore", "ip6tables-legacy-restore")
	if !netlab.HasUID(1<<32 - 2) {
		t.Skip("UIDs up to 4294967294 take root")
	}
	if _, err := os.Stat(passwd); err == nil {
		return
	}
	if err := os.WriteFile(passwd, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	// In the mount namespace of this process.
	if err := syscall.Mount(passwd, "/etc/passwd", "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
}

// suite skips the test unless TPROXY_SUITE names it.
func suite(t *testing.T, name, otherwise string) {
	t.Helper()
	if !strings.Contains(os.Getenv("TPROXY_SUITE"), name) {
		t.Skip(otherwise)
	}
	require(t)
}

// resolverEnv makes the program a local resolver: it takes the socket that it
// was given and becomes the user, as dnsmasq and unbound do.
const resolverEnv = "TPROXY_DIFFERENTIAL_RESOLVER"

func resolve(user string) int {
	uid, err := strconv.ParseUint(user, 10, 32)
	if err == nil {
		err = syscall.Setresuid(int(uid), int(uid), int(uid))
	}
	var c net.PacketConn
	if err == nil {
		c, err = net.FilePacketConn(os.NewFile(3, "socket"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go answerUDP(c.(*net.UDPConn), "stub")
	fmt.Println("ready")
	_, _ = os.Stdin.Read(make([]byte, 1)) // until the parent goes
	return 0
}
