package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"
)

// Flow is what the first packet of a connection bears.
type Flow struct {
	Protocol uint8 // its number, such as 17 for UDP
	From, To netip.AddrPort
}

// Tracked is a connection as conntrack knows it.
type Tracked struct {
	Flow
	// Server is who answers it: To, unless the destination was translated. Client is
	// whom it answers: From, unless the source was.
	Server, Client netip.AddrPort
	Zone           uint16
}

func (t Tracked) String() string {
	return fmt.Sprintf("protocol %d, %s > %s, answered by %s to %s, zone %d", t.Protocol, t.From, t.To, t.Server, t.Client, t.Zone)
}

// Conntrack lists the connections with ports that conntrack knows in the namespace. It
// reads /proc/net/nf_conntrack, which a kernel may lack (CONFIG_NF_CONNTRACK_PROCFS): ok
// is false there. A line holds "udp 17", the addresses and ports of both directions, and
// "zone=2" (not where it is 0).
func (l *Lab) Conntrack(n *Namespace) (out []Tracked, ok bool, err error) {
	var text []byte
	err = l.In(n, func() (err error) { text, err = os.ReadFile("/proc/thread-self/net/nf_conntrack"); return err })
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) < 4 {
			continue
		}
		var addrs []netip.Addr
		var ports []uint16
		var t Tracked
		fmt.Sscan(words[3], &t.Protocol)
		for _, w := range words {
			key, value, _ := strings.Cut(w, "=")
			switch key {
			case "src", "dst":
				a, _ := netip.ParseAddr(value)
				addrs = append(addrs, a)
			case "sport", "dport":
				var p uint16
				fmt.Sscan(value, &p)
				ports = append(ports, p)
			case "zone":
				fmt.Sscan(value, &t.Zone)
			}
		}
		if len(addrs) == 4 && len(ports) == 4 {
			t.From, t.To = netip.AddrPortFrom(addrs[0], ports[0]), netip.AddrPortFrom(addrs[1], ports[1])
			t.Server, t.Client = netip.AddrPortFrom(addrs[2], ports[2]), netip.AddrPortFrom(addrs[3], ports[3])
			out = append(out, t)
		}
	}
	return out, true, err
}
