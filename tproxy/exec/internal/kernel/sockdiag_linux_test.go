package kernel

import (
	"fmt"
	"net"
	"slices"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/procfs"
)

// TestListeningTCP compares sock_diag's answer with that of /proc/net.
func TestListeningTCP(t *testing.T) {
	inFreshNamespace(t, func(t *testing.T) {
		run(t, "", "ip", "link", "set", "lo", "up")
		if got, err := ListeningTCP(); len(got) != 0 || err != nil {
			t.Fatalf("in an empty namespace: %v, %v", got, err)
		}
		for _, address := range []string{"127.0.0.1:2222", "0.0.0.0:22", "[::]:2223", "[::1]:22"} {
			network := "tcp4"
			if address[0] == '[' {
				network = "tcp6"
			}
			l, err := net.Listen(network, address)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		// What does not listen is not returned.
		c, err := net.Dial("tcp", "127.0.0.1:2222")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		got, err := ListeningTCP()
		if err != nil {
			t.Fatal(err)
		}
		all, err := procfs.FS{}.TCP()
		if err != nil {
			t.Fatal(err)
		}
		want := slices.DeleteFunc(all, func(s procfs.Socket) bool { return !s.Listening })
		byText := func(a, b procfs.Socket) int { return slices.Compare(fmt.Append(nil, a), fmt.Append(nil, b)) }
		slices.SortFunc(got, byText)
		slices.SortFunc(want, byText)
		if !slices.Equal(got, want) || len(got) != 4 {
			t.Errorf("sock_diag says\n%v\nproc says\n%v", got, want)
		}
	})
}
