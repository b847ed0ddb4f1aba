// Package golden is how an importer tests a configuration of its own: what it
// renders, as a golden file, and what it means, with random packets. The program
// is the tests.
package golden

import (
	"net/netip"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Mesh is the importer's configuration: a database stays outside the mesh, and
// the monitoring may ask every host.
func Mesh() tproxy.Config {
	return tproxy.Config{
		ProxyUser: "kuma-dp",
		Inbound: tproxy.Inbound{
			ExcludePorts: rules.MustPorts("9100"),
			ExcludeIPs:   []netip.Prefix{netip.MustParsePrefix("10.0.0.9/32")},
		},
		Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("5432,6379-6380")},
		DNS:      tproxy.DNS{Redirect: true},
	}
}

// Host is the one that the golden file is made for: no machine is asked, so the
// file is the same everywhere.
func Host() tproxy.Host {
	return tproxy.Host{
		Users:       []tproxy.User{{Name: "kuma-dp", UID: 5678}},
		Nameservers: []netip.Addr{netip.MustParseAddr("10.0.0.53")},
	}
}
