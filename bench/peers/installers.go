//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	istio "istio.io/istio/tools/common/config"
	"istio.io/istio/tools/istio-iptables/pkg/cmd"
	"istio.io/istio/tools/istio-nftables/pkg/nft"

	"istio.io/istio/pkg/log"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// backends are ours that are measured: a third one is one more line here.
var backends = []tproxy.Backend{tproxy.IPTablesNFT, tproxy.IPTablesLegacy}

// installer is one that is measured, ours or a peer's.
type installer struct {
	name string
	// against is the one of ours that a peer's is compared with: the same kind of
	// rules, or the nearest there is. An installer of ours has none.
	against string
	// lists is the program that lists the rules, of each family.
	lists [][]string
	// slow is an installer that starts a program for each rule: a thousand of them
	// take a minute.
	slow      bool
	install   func(context.Context, ports) (processes int, err error)
	uninstall func(context.Context, ports) (processes int, err error)
}

func (i installer) ours() bool { return i.against == "" }

// unknown is what a peer says of the processes that it started.
const unknown = -1

// ports are those that are excluded.
type ports struct{ in, out rules.Ports }

func installers() []installer {
	var all []installer
	for _, b := range backends {
		all = append(all, our(b))
	}
	return append(all, istioIPTables("nft", tproxy.IPTablesNFT), istioIPTables("legacy", tproxy.IPTablesLegacy), istioNative())
}

func find(name string) (installer, error) {
	for _, i := range installers() {
		if i.name == name {
			return i, nil
		}
	}
	return installer{}, fmt.Errorf("no installer %q", name)
}

// listed is how a backend's rules are listed.
func listed(b tproxy.Backend) [][]string {
	if variant, is := strings.CutPrefix(b.String(), "iptables"); is {
		return [][]string{{"iptables" + variant + "-save"}, {"ip6tables" + variant + "-save"}}
	}
	return [][]string{{"nft", "list", "ruleset"}}
}

func ourName(b tproxy.Backend) string { return "this module, " + b.String() }

// our is what an importer of this module does.
func our(b tproxy.Backend) installer {
	runner := &exec.Runner{}
	return installer{
		name:  ourName(b),
		lists: listed(b),
		install: func(ctx context.Context, p ports) (int, error) {
			c := tproxy.Config{
				ProxyUIDs: []tproxy.UID{tproxy.DefaultProxyUID},
				Backend:   b,
				Inbound:   tproxy.Inbound{ExcludePorts: p.in},
				Outbound:  tproxy.Outbound{ExcludePorts: p.out},
			}
			host, err := runner.Probe(ctx, c.Needs())
			if err != nil {
				return 0, err
			}
			plan, err := tproxy.Build(c, host)
			if err != nil {
				return 0, err
			}
			report, err := runner.Apply(ctx, plan)
			if err != nil {
				return 0, err
			}
			return report.Processes, nil
		},
		uninstall: func(ctx context.Context, _ ports) (int, error) {
			report, err := runner.Remove(ctx, exec.RemoveOptions{})
			if err != nil {
				return 0, err
			}
			return report.Processes, nil
		},
	}
}

// istioConfig is the configuration that does the same as ours: both directions,
// both families, ports 15006 and 15001, the proxy's user, no DNS. Its names and
// defaults are those of istio-iptables's flags.
func istioConfig(p ports) *istio.Config {
	c := istio.DefaultConfig()
	c.ProxyUID = fmt.Sprint(tproxy.DefaultProxyUID)
	c.ProxyGID = c.ProxyUID
	c.InboundInterceptionMode = "REDIRECT"
	c.InboundPortsInclude = "*"
	c.OutboundIPRangesInclude = "*"
	c.InboundPortsExclude = p.in.String()
	c.OutboundPortsExclude = p.out.String()
	c.EnableIPv6 = true
	c.Reconcile = true // without it a re-install with another config leaves the old rules
	return c
}

// istioIPTables is istio-iptables, told which variant to use.
func istioIPTables(variant string, b tproxy.Backend) installer {
	with := func(p ports) *istio.Config {
		c := istioConfig(p)
		c.ForceIptablesBinary = variant
		return c
	}
	return installer{
		name:    "Istio, " + b.String(),
		against: ourName(b),
		lists:   listed(b),
		slow:    true,
		install: func(_ context.Context, p ports) (int, error) {
			return unknown, cmd.ProgramIptables(with(p))
		},
		uninstall: func(_ context.Context, p ports) (int, error) {
			c := with(p)
			c.CleanupOnly = true
			return unknown, cmd.ProgramIptables(c)
		},
	}
}

// istioNative is istio-iptables --native-nftables.
func istioNative() installer {
	return installer{
		name: "Istio, nft",
		// The last of ours: the native one, where there is one.
		against: ourName(nearestNative()),
		lists:   [][]string{{"nft", "list", "ruleset"}},
		install: func(_ context.Context, p ports) (int, error) {
			return unknown, nft.ProgramNftables(istioConfig(p))
		},
		uninstall: func(_ context.Context, p ports) (int, error) {
			c := istioConfig(p)
			c.CleanupOnly = true
			return unknown, nft.ProgramNftables(c)
		},
	}
}

// nearestNative is our backend that writes through nftables itself, or else
// iptables-nft, which does so by a program.
func nearestNative() tproxy.Backend {
	for _, b := range backends {
		if !strings.HasPrefix(b.String(), "iptables") {
			return b
		}
	}
	return tproxy.IPTablesNFT
}

// silence has Istio's log written where nobody reads it: it is made all the same, as
// in its own program.
func silence() error {
	o := log.DefaultOptions()
	o.OutputPaths, o.ErrorOutputPaths = []string{os.DevNull}, []string{os.DevNull}
	return log.Configure(o)
}
