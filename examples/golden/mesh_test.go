package golden

import (
	"flag"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

// Golden writes its sections when this is set: go test -args -update.
var _ = flag.Bool("update", false, "write the golden files")

const file = "testdata/mesh.txtar"

// The golden file holds the scripts, the steps, and where some packets go. A
// change of Mesh shows there as a diff to be read.
func TestGolden(t *testing.T) {
	plan, err := tproxy.Build(Mesh(), Host())
	if err != nil {
		t.Fatal(err)
	}
	var steps strings.Builder
	for _, s := range plan.Steps {
		fmt.Fprintf(&steps, "%s; undo: %s\n", s, s.Undo())
	}
	walks, _ := tproxytest.ReadArchive(t, file).Section("walks")
	here := sim.EnvOf(netip.MustParseAddr("10.0.0.7"))
	tproxytest.Golden(t, file,
		tproxytest.Section{Name: "walks", Text: tproxytest.Walks(t, plan, here, walks)},
		tproxytest.Section{Name: "steps", Text: steps.String()},
		tproxytest.Section{Name: "v4", Text: string(plan.Rules.IPTables(rules.IPv4))},
		tproxytest.Section{Name: "v6", Text: string(plan.Rules.IPTables(rules.IPv6))},
	)
}

// The properties hold for Mesh on any host: excluded ports are never redirected,
// SSH is not, the proxy never loops, every packet goes where it should.
func TestProperties(t *testing.T) {
	tproxytest.Check(t, Mesh())
}
