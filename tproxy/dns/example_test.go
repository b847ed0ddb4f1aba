package dns_test

import (
	"fmt"

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
