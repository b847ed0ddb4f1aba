package rules_test

import (
	"fmt"
	"os"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func ExampleParsePorts() {
	ports, err := rules.ParsePorts("8080,80-90,81")
	fmt.Println(ports, ports.Contains(85), err)
	_, err = rules.ParsePorts("0,90-80")
	fmt.Println(err)
	// Output:
	// 80-90,8080 true <nil>
	// "0" is out of range: accepted is a port from 1 to 65535 or a range such as 80-90
	// "90-80" is reversed: write 80-90
}

// A rule is one line of iptables for each family that it has addresses of, and
// for each 15 ports.
func ExampleSet_IPTables() {
	set := rules.Set{
		Bases: []rules.BaseChain{{
			Table: rules.NAT, Hook: rules.Prerouting,
			Rules: []rules.Rule{{Matches: []rules.Match{rules.TCP, rules.SYN{}}, Action: rules.Jump{Chain: "MINE"}}},
		}},
		Chains: []rules.Chain{{
			Table: rules.NAT, Name: "MINE",
			Rules: []rules.Rule{{
				Matches: []rules.Match{rules.TCP, rules.DestinationPorts{Ports: rules.MustPorts("22,80-90")}},
				Action:  rules.Return{},
				Why:     "left alone",
			}},
		}},
	}
	os.Stdout.Write(set.IPTables(rules.IPv4))
	// Output:
	// *nat
	// :MINE - [0:0]
	// -A PREROUTING -p tcp -m tcp --syn -j MINE
	// -A MINE -p tcp -m multiport --dports 22,80:90 -m comment --comment "left alone" -j RETURN
	// COMMIT
}

// The same rule in nftables: one for both families, and the ports are a set.
func ExampleSet_NFTables() {
	set := rules.Set{
		Bases: []rules.BaseChain{{
			Table: rules.NAT, Hook: rules.Prerouting,
			Rules: []rules.Rule{{Matches: []rules.Match{rules.TCP, rules.SYN{}}, Action: rules.Jump{Chain: "MINE"}}},
		}},
		Chains: []rules.Chain{{
			Table: rules.NAT, Name: "MINE",
			Rules: []rules.Rule{{
				Matches: []rules.Match{rules.TCP, rules.DestinationPorts{Ports: rules.MustPorts("22,80-90")}},
				Action:  rules.Return{},
				Why:     "left alone",
			}},
		}},
	}
	os.Stdout.Write(set.NFTables("mine"))
	// Output:
	// table inet mine {
	// 	set ports-d4a360a7264b6bc7 {
	// 		type inet_service
	// 		flags interval
	// 		elements = { 22, 80-90 }
	// 	}
	//
	// 	chain nat.PREROUTING {
	// 		type nat hook prerouting priority -99; policy accept;
	// 		meta l4proto tcp tcp flags & (fin | syn | rst | ack) == syn counter jump nat.MINE
	// 	}
	//
	// 	chain nat.MINE {
	// 		meta l4proto tcp tcp dport @ports-d4a360a7264b6bc7 counter return comment "left alone"
	// 	}
	// }
}

// What iptables-save printed, and what is wanted, are compared as data; the script
// leads from one to the other in one transaction.
func ExampleTransition() {
	live, err := rules.ParseSave(rules.IPv4, []byte(`*nat
:PREROUTING ACCEPT [0:0]
:MINE - [0:0]
-A PREROUTING -p udp -j OTHERS
-A MINE -p tcp -m tcp --dport 22 -j RETURN
:OTHERS - [0:0]
COMMIT
`))
	if err != nil {
		fmt.Println(err)
		return
	}
	want := rules.Set{Chains: []rules.Chain{{Table: rules.NAT, Name: "MINE", Rules: []rules.Rule{{
		Matches: []rules.Match{rules.TCP, rules.DestinationPorts{Ports: rules.MustPorts("2222")}},
		Action:  rules.Return{},
	}}}}}
	ours, _ := live.Ours(rules.IPv4, want)
	for _, change := range rules.Compare(rules.IPv4, ours, want) {
		fmt.Println(change)
	}
	os.Stdout.Write(rules.Transition(rules.IPv4, ours, want))
	// Output:
	// - IPv4 nat MINE #1 -p tcp -m tcp --dport 2222 -j RETURN (missing rule)
	// + IPv4 nat MINE #1 -p tcp -m tcp --dport 22 -j RETURN (extra rule)
	// *nat
	// :MINE - [0:0]
	// -A MINE -p tcp -m tcp --dport 2222 -j RETURN
	// COMMIT
}
