package persist_test

import (
	"fmt"
	"log"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// The rules of a plan go into a file of others, are read from it, and go again.
func Example() {
	plan, err := tproxy.Build(tproxy.Config{}, tproxy.Host{})
	if err != nil {
		log.Fatal(err)
	}
	file := []byte("<direct>\n  <!-- ours is the rack's -->\n</direct>\n")
	merged, err := persist.MergeDirect(file, plan.WithRecord(tproxy.Record{Version: "v1.2.3"}))
	if err != nil {
		log.Fatal(err)
	}
	for line := range strings.Lines(string(merged)) {
		if strings.Contains(line, `"PREROUTING"`) {
			fmt.Print(line)
		}
	}
	d, err := persist.ReadDirect(merged)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(rules.Compare(rules.IPv4, d.Rules(rules.IPv4), plan.WithRecord(tproxy.Record{Version: "v1.2.3"}))), "differences")
	rest, removal, err := persist.RemoveDirect(merged)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(rest) == string(file), removal.Rewritten)
	// Output:
	//   <rule ipv="ipv4" table="nat" chain="PREROUTING" priority="10000">-p tcp -m tcp --syn -m addrtype --dst-type LOCAL -m comment --comment 'kuma/mesh/transparent/proxy/a new TCP connection to an address of this host' -j KUMA_MESH_INBOUND</rule>
	//   <rule ipv="ipv6" table="nat" chain="PREROUTING" priority="10000">-p tcp -m tcp --syn -m addrtype --dst-type LOCAL -m comment --comment 'kuma/mesh/transparent/proxy/a new TCP connection to an address of this host' -j KUMA_MESH_INBOUND</rule>
	// 0 differences
	// true false
}

// The unit that brings an install back at boot. What stands there already is replaced
// where it is ours, and is an error where it is not.
func ExampleUnit() {
	unit, err := persist.Unit(nil, persist.Service{
		Description: "Transparent proxying of the mesh",
		Commands:    [][]string{{"/usr/local/bin/kumactl", "install", "transparent-proxy", "--exclude-inbound-ports", "9100"}},
		Writable:    []string{"/run"},
	})
	if err != nil {
		log.Fatal(err)
	}
	for line := range strings.Lines(string(unit)) {
		if strings.HasPrefix(line, "Before=") || strings.HasPrefix(line, "ExecStart=") {
			fmt.Print(line)
		}
	}
	fmt.Println(persist.UnitName, persist.OurUnit(unit))
	_, err = persist.Unit([]byte("[Service]\n"), persist.Service{Description: "x", Commands: [][]string{{"/bin/true"}}})
	fmt.Println(err)
	// Output:
	// Before=network-pre.target shutdown.target
	// ExecStart=/usr/local/bin/kumactl install transparent-proxy --exclude-inbound-ports 9100
	// kuma-transparent-proxy.service true
	// kuma-transparent-proxy.service, not ours, "[Service]": accepted is no such file, or one with the line "# Made by kuma-tproxy: \"kumactl uninstall transparent-proxy\" takes it away, and an install writes it anew."
}
