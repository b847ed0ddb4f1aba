package dns_test

import (
	"fmt"
	"net/netip"

	"github.com/kumahq/kuma-tproxy/tproxy/dns"
)

func ExampleParse() {
	conf := dns.Parse([]byte("# by hand\nnameserver 10.0.0.53\nnameserver fd00::53\nnameserver resolver.example\n"))
	fmt.Println(conf.Nameservers)
	for _, l := range conf.Ignored {
		fmt.Printf("line %d: %s: %s\n", l.Number, l.Text, l.Why)
	}
	// Output:
	// [10.0.0.53 fd00::53]
	// line 4: nameserver resolver.example: "resolver.example" is no IPv4 or IPv6 address
}

func ExampleAddNameserver() {
	file := []byte("# by hand\nnameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n")
	edit, err := dns.AddNameserver(file, netip.MustParseAddr("10.9.9.9"))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%sout of reach: %s\n", edit.Text, edit.OutOfReach)
	fmt.Println("undone:", string(dns.RemoveNameserver(edit.Text)) == string(file))
	// Output:
	// # by hand
	// # kuma-tproxy 2ae4105f: added by "kumactl install transparent-proxy", taken out by uninstall
	// nameserver 10.9.9.9
	// nameserver 10.0.0.1
	// nameserver 10.0.0.2
	// nameserver 10.0.0.3
	// out of reach: [10.0.0.3]
	// undone: true
}

func ExampleParseAddress() {
	_, err := dns.ParseAddress("kuma-cp.example")
	fmt.Println(err)
	// Output:
	// nameserver address "kuma-cp.example" is no IP address: accepted is an IPv4 or IPv6 address of one machine, such as 10.0.0.53 or fd00::53
}

func ExampleConfig_Limits() {
	for _, l := range dns.Parse([]byte("nameserver ::1\nnameserver ::2\nnameserver ::3\nnameserver ::4\n")).Limits() {
		fmt.Println(l)
	}
	// Output:
	// line 4: 4 nameservers, and the C library reads 3
}
