package kernel

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

func TestLegacyChains(t *testing.T) {
	requireNamespace(t)
	for f, program := range map[Family]string{IPv4: "iptables-legacy-restore", IPv6: "ip6tables-legacy-restore"} {
		cmd := exec.Command(program, "--noflush")
		cmd.Stdin = strings.NewReader("*nat\n:KUMA_MESH_INBOUND - [0:0]\n:OTHER - [0:0]\n-A KUMA_MESH_INBOUND -p tcp -m tcp --dport 22 -m comment --comment \"NOT_A_CHAIN\" -j RETURN\n-A PREROUTING -j OTHER\nCOMMIT\n")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", program, err, out)
		}
		got, err := LegacyChains(f, "nat")
		slices.Sort(got)
		if want := []string{"KUMA_MESH_INBOUND", "OTHER"}; err != nil || !slices.Equal(got, want) {
			t.Errorf("LegacyChains(%s, nat) = %q, %v; want %q", f, got, err, want)
		}
		before, _ := LegacyTables(f)
		if got, err := LegacyChains(f, "security"); got != nil || err != nil {
			t.Errorf("LegacyChains(%s, security), which is not there, = %q, %v", f, got, err)
		}
		if after, _ := LegacyTables(f); !slices.Equal(before, after) {
			t.Errorf("asking changed the %s tables from %q to %q", f, before, after)
		}
	}
}
