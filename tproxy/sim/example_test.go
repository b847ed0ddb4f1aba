package sim_test

import (
	"fmt"
	"net/netip"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

func ExampleWalk() {
	plan, err := tproxy.Build(tproxy.Config{}, tproxy.Host{})
	if err != nil {
		panic(err)
	}
	env := sim.EnvOf(netip.MustParseAddr("10.0.0.7"))
	for _, p := range []sim.Packet{
		sim.MustPacket("in tcp 10.0.0.9:4000 > 10.0.0.7:22"),
		sim.MustPacket("in tcp 10.0.0.9:4000 > 10.0.0.7:8080"),
		sim.MustPacket("out tcp uid=5678 127.0.0.1:4000 > 127.0.0.1:15001"),
	} {
		fmt.Println(sim.Walk(plan.Rules, env, p).Summary())
	}
	// Output:
	// nat PREROUTING #1, nat KUMA_MESH_INBOUND #1: SSH is protected unless --capture-ssh is given => untouched
	// nat PREROUTING #1, nat KUMA_MESH_INBOUND #2: inbound goes to the proxy's port 15006 => redirected to port 15006
	// nat OUTPUT #1, nat KUMA_MESH_OUTBOUND #1, nat KUMA_MESH_OUTBOUND_LOOPBACK #1: the proxy must not connect to itself: refused => refused
}

func ExampleFollow() {
	plan, err := tproxy.Build(tproxy.Config{}, tproxy.Host{})
	if err != nil {
		panic(err)
	}
	proxy := sim.Proxy{UID: 5678, InboundPort: 15006, OutboundPort: 15001, DNSPort: 15053}
	fmt.Print(sim.Follow(plan.Rules, sim.EnvOf(netip.MustParseAddr("10.0.0.7")), proxy, sim.MustPacket("in tcp 10.0.0.9:4000 > 10.0.0.7:8080")))
	// Output:
	// in tcp 10.0.0.9:4000 > 10.0.0.7:8080 => redirected to port 15006
	// out tcp uid=5678 127.0.0.6:40000 > 10.0.0.7:8080 => untouched
	// delivered
}
