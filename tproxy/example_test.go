package tproxy_test

import (
	"fmt"
	"os"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func ExampleBuild() {
	cfg := tproxy.Config{
		ProxyUIDs:       []tproxy.UID{5678},
		IPFamilyMode:    tproxy.IPv4Only,
		DisableComments: true,
		Inbound:         tproxy.Inbound{ExcludePorts: rules.MustPorts("9100")},
	}
	plan, err := tproxy.Build(cfg, tproxy.Host{})
	if err != nil {
		fmt.Println(err)
		return
	}
	os.Stdout.Write(plan.Rules.IPTables(rules.IPv4))
	for _, step := range plan.Steps {
		fmt.Println("#", step)
	}
	// Output:
	// *nat
	// :KUMA_MESH_INBOUND - [0:0]
	// :KUMA_MESH_OUTBOUND - [0:0]
	// :KUMA_MESH_OUTBOUND_LOOPBACK - [0:0]
	// :KUMA_MESH_RECORD - [0:0]
	// -A PREROUTING -p tcp -m tcp --syn -m addrtype --dst-type LOCAL -j KUMA_MESH_INBOUND
	// -I OUTPUT 1 -p tcp -m tcp --syn -j KUMA_MESH_OUTBOUND
	// -A KUMA_MESH_INBOUND -p tcp -m tcp --dport 22 -j RETURN
	// -A KUMA_MESH_INBOUND -p tcp -m tcp --dport 9100 -j RETURN
	// -A KUMA_MESH_INBOUND -p tcp -j REDIRECT --to-ports 15006
	// -A KUMA_MESH_OUTBOUND -o lo -g KUMA_MESH_OUTBOUND_LOOPBACK
	// -A KUMA_MESH_OUTBOUND -m owner --uid-owner 5678-5678 -j RETURN
	// -A KUMA_MESH_OUTBOUND -p tcp -j REDIRECT --to-ports 15001
	// -A KUMA_MESH_OUTBOUND_LOOPBACK -p tcp -m multiport --dports 15001,15006 -m owner --uid-owner 5678-5678 -j REDIRECT --to-ports 0
	// -A KUMA_MESH_OUTBOUND_LOOPBACK -s 127.0.0.6/32 -j RETURN
	// -A KUMA_MESH_OUTBOUND_LOOPBACK -d 127.0.0.6/32 -m owner --uid-owner 5678-5678 -j KUMA_MESH_INBOUND
	// -A KUMA_MESH_OUTBOUND_LOOPBACK ! -d 127.0.0.0/8 -m owner --uid-owner 5678-5678 -j KUMA_MESH_INBOUND
	// -A KUMA_MESH_OUTBOUND_LOOPBACK -j RETURN
	// -A KUMA_MESH_RECORD -m comment --comment "kuma/mesh/transparent/proxy/kuma-tproxy 1 1/2 sum=c32e67b4 config={\"kumaDPUser\":\"5678\",\"ipFamilyMode\":\"ipv4\",\"redirect\":{\"" -j RETURN
	// -A KUMA_MESH_RECORD -m comment --comment "kuma/mesh/transparent/proxy/kuma-tproxy 1 2/2 inbound\":{\"excludePorts\":[9100]}},\"comments\":{\"disabled\":true}}" -j RETURN
	// COMMIT
	// # IPv4 rules by iptables-nft-restore
}

// A Config with several faults is refused with all of them.
func ExampleBuild_faults() {
	_, err := tproxy.Build(tproxy.Config{
		ProxyUser: "envoy",
		Inbound:   tproxy.Inbound{Port: 15001},
		Outbound:  tproxy.Outbound{Port: 15001},
	}, tproxy.Host{})
	fmt.Println(err)
	// Output:
	// redirect.outbound.port: "15001" is redirect.inbound.port too: accepted is a port of the proxy for each of inbound, outbound and DNS
}
