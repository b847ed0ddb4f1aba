package kumatproxy_test

import (
	"context"
	"fmt"
	"log"
	"log/slog"
	"net/netip"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// The body is that in README.md: a test compares them.
func Example_plan() {
	cfg := tproxy.Config{
		ProxyUIDs: []tproxy.UID{5678},
		Inbound:   tproxy.Inbound{ExcludePorts: rules.MustPorts("9100")},
	}
	plan, err := tproxy.Build(cfg, tproxy.Host{}) // for a plain Linux with both families
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(plan.Rules.IPTables(rules.IPv4)) > 0)

	host := sim.EnvOf(netip.MustParseAddr("10.0.0.7"))
	for _, packet := range []string{
		"in tcp 10.0.0.9:4000 > 10.0.0.7:80",
		"in tcp 10.0.0.9:4000 > 10.0.0.7:22",
		"out tcp uid=1000 10.0.0.7:4000 > 93.184.216.34:443",
	} {
		trace := sim.Walk(plan.Rules, host, sim.MustPacket(packet))
		fmt.Printf("%s: %s\n", trace.Verdict, trace.Reason)
	}
	// Output:
	// true
	// redirected to port 15006: inbound goes to the proxy's port 15006
	// untouched: SSH is protected unless --capture-ssh is given
	// redirected to port 15001: outbound goes to the proxy's port 15001
}

// This one changes the machine, so it is compiled and never run; examples/kumactl
// is the same, and is.
func Example_install() {
	install := func(ctx context.Context, cfg tproxy.Config) error {
		runner := exec.Runner{Log: slog.Default()}
		host, err := runner.Probe(ctx, cfg.Needs()) // the only read of the machine
		if err != nil {
			return err
		}
		plan, err := tproxy.Build(cfg, host) // refuses what would lock you out
		if err != nil {
			return err
		}
		report, err := runner.Apply(ctx, plan) // all of it, or none and an error
		if err != nil {
			return err
		}
		fmt.Println(report.Changed, report.Backend, report.Why)
		return nil
	}
	_ = install
}
