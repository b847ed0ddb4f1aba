package exec

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// scriptName is the script of a family, for iptables-restore.
func scriptName(f rules.Family) string { return fmt.Sprintf("%s/rules.v%d", storeDir, f) }

// tableScript is our table of nftables, for nft.
const tableScript = storeDir + "/rules.nft"

// namesScript is a script of sh.
const namesScript = storeDir + "/names.sh"

// scripts are what a unit loads where there is no program of ours, and the commands that
// do it.
func (s *session) scripts(p *tproxy.Plan, rec tproxy.Record, service, names *persist.Service) (out []storedFile, err error) {
	need := func(name string) (path string) {
		path, target := s.m.find(name)
		switch {
		case err != nil:
		case path == "":
			err = fmt.Errorf("%s is not on PATH, %s: %w", name, strings.Join(programDirs, ", "), ErrUnsupported)
		default:
			err = s.mayRun(path, target)
		}
		return path
	}
	sh := need("sh")
	v, _ := p.Host.Variant(p.Backend)
	_, record := tproxy.RecordChain()
	wait := max(1, (p.Config.Wait+time.Second-1)/time.Second)
	_, v6 := tproxy.PassthroughAddresses()
	if slices.Contains(p.Families, rules.IPv6) {
		// Before the rules: there is no record yet that could be wrong.
		service.Commands = append(service.Commands, []string{need("ip"), "-6", "address", "replace", hostPrefix(v6).String(), "dev", "lo"})
	}
	families := p.Families
	if p.Backend == tproxy.NFTables {
		families = nil // the table is both
		nft := need("nft")
		out = append(out, newFile(tableScript, p.WithRecord(rec).NFTables(tproxy.NFTable)))
		service.Commands = append(service.Commands, []string{sh, "-c",
			fmt.Sprintf("%[1]s list table inet %[2]s >/dev/null 2>&1 || exec %[1]s -f %[3]s", quoted(nft), tproxy.NFTable, tableScript)})
		service.Files = append(service.Files, tableScript)
	}
	for _, f := range families {
		name, programs := scriptName(f), v.For(f)
		for _, p := range []string{programs.Save, programs.Restore} {
			_, target := s.m.find(p)
			if err == nil {
				err = s.mayRun(p, target)
			}
		}
		out = append(out, newFile(name, p.WithRecord(rec).IPTables(f)))
		// What stands already is not loaded twice: the jumps would be there twice.
		service.Commands = append(service.Commands, []string{sh, "-c",
			fmt.Sprintf("%s -t nat | grep -q '^:%s ' || exec %s --noflush --wait=%d <%s", quoted(programs.Save), record, quoted(programs.Restore), wait, name)})
		service.Files = append(service.Files, name)
	}
	if p.Config.DNS.ControlPlane.IsValid() && p.Host.Nameserver.Split == tproxy.SplitLink {
		out = append(out, newFile(namesScript, []byte(namesText(need("ip"), need("resolvectl"), p.Config.DNS.ControlPlane))))
		names.Commands = [][]string{{sh, "-e", namesScript}}
	}
	return out, err
}

// noTable is the reason for which a unit could not bring a table of nftables back: it
// would run neither a program of ours nor nft(8).
func (s *session) noTable() string {
	why := s.unstable()
	if why == "" {
		return ""
	}
	nft, target := s.m.find("nft")
	if nft == "" {
		return fmt.Sprintf("a unit cannot run the program that installs (%s), and nft is not on PATH, %s", why, strings.Join(programDirs, ", "))
	}
	if err := s.mayRun(nft, target); err != nil {
		return fmt.Sprintf("a unit cannot run the program that installs (%s), nor %v", why, err)
	}
	return ""
}

// mayRun is an error for a program that a unit must not run: PATH may be that of somebody
// who became root.
func (s *session) mayRun(path, target string) error {
	if why := cmp.Or(s.changeable(path), s.changeable(cmp.Or(target, path))); why != "" {
		return fmt.Errorf("%s, which root would run at boot: %s: accepted is a program of root's; leave others out of PATH", path, why)
	}
	return nil
}

// namesText does what setMesh does. One that fails takes its interface away again: the
// next start would take that for done.
func namesText(ip, resolvectl string, server netip.Addr) string {
	link := tproxy.MeshLink
	return fmt.Sprintf(`# Made by kuma-tproxy: names in .%[1]s are asked of the control plane.
%[4]s link show %[2]s >/dev/null 2>&1 && exit 0
from=$(%[4]s -o route get %[3]s | sed -n 's/.* src \([^ ]*\).*/\1/p')
trap 'exit 1' HUP INT TERM # as dash runs no trap of EXIT then
gone() { test $? = 0 || %[4]s link delete %[2]s 2>/dev/null; }
trap gone EXIT
%[4]s link add %[2]s group %[6]d type dummy 2>/dev/null || {
	%[4]s link add %[2]s group %[6]d type veth peer name %[2]s-p
	%[4]s link set %[2]s-p addrgenmode none up
}
%[4]s link set %[2]s addrgenmode none up
%[4]s address add "$from/%[7]d" dev %[2]s
until %[5]s default-route %[2]s no; do sleep 0.1; done # until it hears of the interface
for off in llmnr mdns dnssec dnsovertls; do %[5]s $off %[2]s no; done
%[5]s domain %[2]s '~%[1]s'
%[5]s dns %[2]s %[3]s
`, dns.Mesh, link, server, quoted(ip), quoted(resolvectl), kernel.LinkGroup, hostPrefix(server).Bits())
}

// quoted is one word of sh.
func quoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
