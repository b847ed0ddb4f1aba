package sim_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

func TestPacketText(t *testing.T) {
	for _, s := range []string{
		"in tcp 10.0.0.9:4000 > 10.0.0.7:22",
		"in tcp in=eth0 state=midstream [fd00::9]:4000 > [fd00::7]:22",
		"forwarded udp in=docker0 out=eth0 172.17.0.2:4000 > 8.8.8.8:53",
		"out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:443",
		"out udp uid=4294967294 gid=5678 out=lo state=established 127.0.0.1:4000 > 127.0.0.53:53",
		"in tcp mark=0x4000 10.0.0.9:4000 > 10.0.0.7:22",
		"in icmp 10.0.0.9 > 10.0.0.7",
		"in 47 10.0.0.9 > 10.0.0.7",
	} {
		p, err := sim.ParsePacket(s)
		if err != nil {
			t.Error(err)
		} else if p.String() != s {
			t.Errorf("%q is read as %q", s, p)
		}
	}
	if got := fmt.Sprintf("%#v", sim.MustPacket("in tcp 1.2.3.4:5 > 1.2.3.4:6")); got != `sim.MustPacket("in tcp 1.2.3.4:5 > 1.2.3.4:6")` {
		t.Error(got)
	}
}

func TestBadPackets(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"", "accepted is a path, a protocol"},
		{"in tcp 10.0.0.9:4000 10.0.0.7:22", "accepted is a path, a protocol"},
		{"through tcp 10.0.0.9:4000 > 10.0.0.7:22", "accepted is in, forwarded or out"},
		{"in carrier-pigeon 10.0.0.9:4000 > 10.0.0.7:22", "accepted is tcp, udp"},
		{"in 256 10.0.0.9 > 10.0.0.7", "accepted is tcp, udp"},
		{"in tcp 10.0.0.9:4000 > 10.0.0.7:0", "port 0 does not exist"},
		{"in tcp 10.0.0.9:4000 > 10.0.0.7", "accepted is address:port"},
		{"in tcp 10.0.0.9:4000 > 10.0.0.7:65536", "accepted is address:port"},
		{"in tcp 10.0.0.300:4000 > 10.0.0.7:22", "accepted is address:port"},
		{"in icmp 10.0.0.9:4000 > 10.0.0.7", "accepted is an address"},
		{"in tcp 10.0.0.9:4000 > [fd00::7]:22", "two families"},
		{"in tcp [fe80::1%eth0]:4000 > [fd00::7]:22", "without a zone"},
		{"in tcp [::ffff:1.2.3.4]:4000 > [fd00::7]:22", "IPv4 as such"},
		{"in tcp uid=5 10.0.0.9:4000 > 10.0.0.7:22", `"uid=5": accepted is`},
		{"out tcp uid=4294967295 10.0.0.9:4000 > 10.0.0.7:22", "accepted is a number from 0 to 4294967294"},
		{"out tcp uid=-1 10.0.0.9:4000 > 10.0.0.7:22", "accepted is a number"},
		{"out tcp in=eth0 10.0.0.9:4000 > 10.0.0.7:22", `"in=eth0": accepted is`},
		{"in tcp in=a/b 10.0.0.9:4000 > 10.0.0.7:22", "interface"},
		{"in udp state=midstream 10.0.0.9:4000 > 10.0.0.7:22", `"state=midstream": accepted is`},
		{"in tcp mark=x 10.0.0.9:4000 > 10.0.0.7:22", "accepted is a number of 32 bits"},
		{"in tcp state=old 10.0.0.9:4000 > 10.0.0.7:22", `"state=old": accepted is`},
	} {
		if _, err := sim.ParsePacket(test.text); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: %v; want %s", test.text, err, test.want)
		}
	}
}

func TestPacketRoundTrip(t *testing.T) {
	packets := tproxytest.Packets(tproxy.Config{}, tproxy.Host{}, tproxytest.Env())
	rapid.Check(t, func(t *rapid.T) {
		p := packets.Draw(t, "packet")
		q, err := sim.ParsePacket(p.String())
		if err != nil || p != q {
			t.Fatalf("%#v: %v", q, err)
		}
	})
}

func FuzzParsePacket(f *testing.F) {
	f.Add("out tcp uid=1000 gid=1 out=lo state=established 10.0.0.7:4000 > 93.184.216.34:443")
	f.Add("in icmp 10.0.0.9 > 10.0.0.7")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := sim.ParsePacket(s)
		if err != nil {
			return
		}
		if q, err := sim.ParsePacket(p.String()); err != nil || p != q {
			t.Errorf("%q is read as %q, and that as %q, %v", s, p, q, err)
		}
	})
}

func TestEnv(t *testing.T) {
	e := sim.EnvOf(netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fe80::1%eth0"))
	e.Local = append(e.Local, netip.MustParsePrefix("192.0.2.0/24"))
	for a, want := range map[string]bool{"10.0.0.7": true, "10.0.0.8": false, "192.0.2.99": true, "127.0.0.6": true, "127.255.0.1": true, "::1": true, "::6": true, "::7": false, "fe80::1": true, "::ffff:10.0.0.7": true} {
		if e.IsLocal(netip.MustParseAddr(a)) != want {
			t.Errorf("%s: want %t", a, want)
		}
	}
}
