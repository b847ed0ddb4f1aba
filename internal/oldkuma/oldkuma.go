// Package oldkuma has the scripts that Kuma's own installers feed to iptables-restore
// and what its uninstall leaves of a save, for the tests of moving over from Kuma and
// back. Both are written after what those programs were seen to do and after their
// published source, kumahq/kuma: pkg/transparentproxy/istio (1.x),
// pkg/transparentproxy/iptables (2.x, 3.x).
package oldkuma

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Installer is a generation of Kuma's installer.
type Installer uint8

const (
	// First is Kuma 1.x's, which came from Istio's.
	First Installer = iota
	// Second is kuma-net's and Kuma 2.x's up to 2.8: no comments.
	Second
	// Third is that of 2.9 and later: a comment with every rule.
	Third
	// ThirdBare is Third with --disable-comments.
	ThirdBare
)

func (i Installer) String() string {
	return [...]string{"first", "second", "third", "third-bare"}[i]
}

// Installers lists them all.
func Installers() []Installer { return []Installer{First, Second, Third, ThirdBare} }

// Options are what is installed. The zero Options redirect both directions, for UID
// 5678.
type Options struct {
	UID uint32 // 0 means 5678
	// DNS redirects queries: every one, or with Servers those to them.
	DNS     bool
	Servers []netip.Addr
	// Docker sends the proxy's own queries to Docker's chain DOCKER_OUTPUT.
	Docker       bool
	ExcludeIn    []uint16
	ExcludeOut   []uint16
	ExcludeInIPs []netip.Prefix
	// ExcludeOutIPs and ExcludeForUIDs stand in OUTPUT itself; not with First.
	ExcludeOutIPs  []netip.Prefix
	ExcludeForUIDs []string // as "tcp 1:1000,3306 1001-1005"
	// Networks are interfaces with their networks, as "docker0 172.17.0.0/16"; not
	// with First.
	Networks    []string
	Log         bool
	DropInvalid bool
}

// Everything is an install with all that Kuma can write.
func Everything() Options {
	return Options{
		UID: 5678, DNS: true,
		ExcludeIn: []uint16{22, 9100}, ExcludeOut: []uint16{443},
		ExcludeInIPs:   []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("fd09::/64")},
		ExcludeOutIPs:  []netip.Prefix{netip.MustParsePrefix("10.8.0.1/32"), netip.MustParsePrefix("fd08::1/128")},
		ExcludeForUIDs: []string{"tcp 1:1000,3306 1001", "tcp 53 1000-1005", "udp 53 1000-1005"},
		Networks:       []string{"docker0 172.17.0.0/16", "docker0 fd17::/64"},
		Log:            true, DropInvalid: true,
	}
}

const (
	in, out, dns = 15006, 15001, 15053
	// Comment begins every comment of Kuma's.
	Comment = "kuma/mesh/transparent/proxy/"
)

// script gathers the lines of a table. Base chains' rules stand in front of those of
// chains; rules to insert count from 1, as Kuma's do.
type script struct {
	Installer
	Options
	family rules.Family

	lines, chains []string
	inserted      map[string]int
}

// Script is what the installer feeds to iptables-restore --noflush, or
// ip6tables-restore.
func Script(i Installer, f rules.Family, o Options) string {
	if o.UID == 0 {
		o.UID = 5678
	}
	var b strings.Builder
	for _, t := range []struct {
		name  string
		rules func(*script)
	}{{"nat", nat}, {"raw", raw}, {"mangle", mangle}} {
		s := &script{Installer: i, Options: o, family: f, inserted: map[string]int{}}
		if t.rules(s); len(s.lines) == 0 {
			continue
		}
		fmt.Fprintf(&b, "*%s\n", t.name)
		for _, c := range s.chains {
			fmt.Fprintf(&b, "-N %s\n", c)
		}
		fmt.Fprintf(&b, "%s\nCOMMIT\n", strings.Join(s.lines, "\n"))
	}
	return b.String()
}

func (s *script) add(chain, format string, args ...any) { s.line("-A "+chain, format, args...) }
func (s *script) insert(chain, format string, args ...any) {
	s.inserted[chain]++
	s.line(fmt.Sprintf("-I %s %d", chain, s.inserted[chain]), format, args...)
}

// line writes Kuma's comment as the first match extension, which is where its rules
// have it; a bar stands in front of the extensions.
func (s *script) line(head, format string, args ...any) {
	addresses, extensions, _ := strings.Cut(fmt.Sprintf(format, args...), "| ")
	comment := ""
	if s.Installer == Third {
		comment = fmt.Sprintf("-m comment --comment %q ", Comment+"what this rule is for")
	}
	s.lines = append(s.lines, head+" "+addresses+comment+extensions)
}

// here reports whether the address is of the family.
func (s *script) here(p netip.Prefix) bool { return p.Addr().Is4() == (s.family == rules.IPv4) }

func (s *script) addresses() (loopback, passthrough string) {
	if s.family == rules.IPv6 {
		return "::1/128", "::6/128"
	}
	return "127.0.0.1/32", "127.0.0.6/32"
}

// to is who is asked, for each server; a word for all of them.
func (s *script) to() (out []string) {
	for _, a := range s.Servers {
		if s.here(netip.PrefixFrom(a, a.BitLen())) {
			out = append(out, "-d "+a.String()+" ")
		}
	}
	if len(s.Servers) == 0 {
		out = []string{""}
	}
	return out
}

func nat(s *script) {
	if s.Installer == First {
		firstNAT(s)
		return
	}
	loopback, passthrough := s.addresses()
	s.chains = []string{"KUMA_MESH_INBOUND", "KUMA_MESH_OUTBOUND", "KUMA_MESH_INBOUND_REDIRECT", "KUMA_MESH_OUTBOUND_REDIRECT"}
	if s.Log {
		s.insert("OUTPUT", "| -j LOG --log-prefix OUTPUT: --log-level 7")
		s.add("PREROUTING", "| -j LOG --log-prefix PREROUTING: --log-level 7")
	}
	for _, e := range s.ExcludeForUIDs {
		w := strings.Fields(e)
		s.insert("OUTPUT", "-p %s | -m multiport --dports %s -m owner --uid-owner %s -j RETURN", w[0], w[1], w[2])
	}
	for _, p := range s.ExcludeOutIPs {
		if s.here(p) {
			s.insert("OUTPUT", "-d %s | -j RETURN", p)
		}
	}
	but53 := ""
	if s.DNS {
		target := "RETURN"
		if s.Docker {
			target = "DOCKER_OUTPUT"
		}
		s.insert("OUTPUT", "-p udp | --dport 53 -m owner --uid-owner %d -j %s", s.UID, target)
		for _, to := range s.to() {
			s.insert("OUTPUT", "%s-p udp | --dport 53 -j REDIRECT --to-ports %d", to, dns)
		}
		s.add("OUTPUT", "-p tcp | --dport 53 -m owner ! --uid-owner %d -j RETURN", s.UID)
		but53 = "! --dport 53 "
	}
	s.add("OUTPUT", "-p tcp | -j KUMA_MESH_OUTBOUND")
	jump := s.add
	for _, n := range s.Networks {
		w := strings.Fields(n)
		if s.here(netip.MustParsePrefix(w[1])) {
			s.insert("PREROUTING", "-i %s -p udp | -m udp --dport 53 -j REDIRECT --to-ports %d", w[0], dns)
			s.insert("PREROUTING", "! -d %s -i %s -p tcp | -j REDIRECT --to-ports %d", w[1], w[0], out)
		}
		jump = s.insert
	}
	jump("PREROUTING", "-p tcp | -j KUMA_MESH_INBOUND")
	for _, p := range s.ExcludeInIPs {
		if s.here(p) {
			s.add("KUMA_MESH_INBOUND", "-s %s | -j RETURN", p)
		}
	}
	for _, p := range s.ExcludeIn {
		s.add("KUMA_MESH_INBOUND", "-p tcp | --dport %d -j RETURN", p)
	}
	s.add("KUMA_MESH_INBOUND", "-p tcp | -j KUMA_MESH_INBOUND_REDIRECT")
	for _, p := range s.ExcludeOut {
		s.add("KUMA_MESH_OUTBOUND", "-p tcp | --dport %d -j RETURN", p)
	}
	s.add("KUMA_MESH_OUTBOUND", "-s %s -o lo | -j RETURN", passthrough)
	s.add("KUMA_MESH_OUTBOUND", "-o lo ! -d %s -p tcp | %s-m owner --uid-owner %d -j KUMA_MESH_INBOUND_REDIRECT", loopback, but53, s.UID)
	s.add("KUMA_MESH_OUTBOUND", "-o lo -p tcp | %s-m owner ! --uid-owner %d -j RETURN", but53, s.UID)
	s.add("KUMA_MESH_OUTBOUND", "| -m owner --uid-owner %d -j RETURN", s.UID)
	s.add("KUMA_MESH_OUTBOUND", "-d %s | -j RETURN", loopback)
	s.add("KUMA_MESH_OUTBOUND", "| -j KUMA_MESH_OUTBOUND_REDIRECT")
	s.add("KUMA_MESH_INBOUND_REDIRECT", "-p tcp | -j REDIRECT --to-ports %d", in)
	s.add("KUMA_MESH_OUTBOUND_REDIRECT", "-p tcp | -j REDIRECT --to-ports %d", out)
}

func firstNAT(s *script) {
	loopback, passthrough := s.addresses()
	s.chains = []string{"MESH_INBOUND", "MESH_REDIRECT", "MESH_IN_REDIRECT", "MESH_OUTPUT"}
	s.add("MESH_INBOUND", "-p tcp --dport 15008 -j RETURN")
	s.add("MESH_REDIRECT", "-p tcp | -j REDIRECT --to-ports %d", out)
	s.add("MESH_IN_REDIRECT", "-p tcp | -j REDIRECT --to-ports %d", in)
	s.add("PREROUTING", "-p tcp -j MESH_INBOUND")
	s.add("MESH_INBOUND", "-p tcp --dport 22 -j RETURN")
	for _, p := range s.ExcludeIn {
		s.add("MESH_INBOUND", "-p tcp | --dport %d -j RETURN", p)
	}
	s.add("MESH_INBOUND", "-p tcp -j MESH_IN_REDIRECT")
	s.add("OUTPUT", "-p tcp -j MESH_OUTPUT")
	for _, p := range s.ExcludeOut {
		s.add("MESH_OUTPUT", "-p tcp | --dport %d -j RETURN", p)
	}
	s.add("MESH_OUTPUT", "-s %s -o lo | -j RETURN", passthrough)
	for _, owner := range []string{"--uid-owner", "--gid-owner"} {
		s.add("MESH_OUTPUT", "-o lo ! -d %s -m owner %s %d -j MESH_IN_REDIRECT", loopback, owner, s.UID)
		s.add("MESH_OUTPUT", "-o lo -m owner ! %s %d -j RETURN", owner, s.UID)
		s.add("MESH_OUTPUT", "-m owner %s %d -j RETURN", owner, s.UID)
	}
	if s.DNS {
		for _, to := range s.to() {
			s.add("MESH_OUTPUT", "%s-p tcp --dport 53 -j REDIRECT --to-ports %d", to, dns)
		}
	}
	s.add("MESH_OUTPUT", "-d %s | -j RETURN", loopback)
	s.add("MESH_OUTPUT", "-j MESH_REDIRECT")
	if !s.DNS {
		return
	}
	target := "RETURN"
	if s.Docker && s.family == rules.IPv4 {
		target = "DOCKER_OUTPUT"
	}
	for _, owner := range []string{"--uid-owner", "--gid-owner"} {
		s.insert("OUTPUT", "-p udp --dport 53 -m owner %s %d -j %s", owner, s.UID, target)
	}
	for _, to := range s.to() {
		s.insert("OUTPUT", "%s-p udp | --dport 53 -j REDIRECT --to-ports %d", to, dns)
	}
}

func raw(s *script) {
	if !s.DNS || s.Installer == First && s.family == rules.IPv6 {
		return
	}
	owners := []string{"--uid-owner"}
	if s.Installer == First {
		owners = append(owners, "--gid-owner")
	}
	for _, owner := range owners {
		s.add("OUTPUT", "-p udp | --dport 53 -m owner %s %d -j CT --zone 1", owner, s.UID)
		s.add("OUTPUT", "-p udp | --sport %d -m owner %s %d -j CT --zone 2", dns, owner, s.UID)
	}
	for _, to := range s.to() {
		s.add("OUTPUT", "%s-p udp | --dport 53 -j CT --zone 2", to)
		s.add("PREROUTING", "%s-p udp | --sport 53 -j CT --zone 1", to)
	}
}

func mangle(s *script) {
	if s.DropInvalid && s.Installer != First {
		s.add("PREROUTING", "| -m conntrack --ctstate INVALID -j DROP")
	}
}

// Uninstalled is what Kuma's uninstall, and its install before it installs, feeds to
// iptables-restore, with flush, after a save: the lines without those that begin with
// a # or hold its comment's prefix or its chains' prefix, wherever they do. It
// refuses where there are such chains and no such comment.
func Uninstalled(save string) (string, error) {
	const prefix, chains = "kuma/mesh/transparent/proxy", "KUMA_MESH"
	if strings.Contains(save, chains) && !strings.Contains(save, prefix) {
		return "", errors.New("rules of the transparent proxy, and no comments")
	}
	var b strings.Builder
	for line := range strings.Lines(save) {
		if !strings.HasPrefix(line, "#") && !strings.Contains(line, prefix) && !strings.Contains(line, chains) {
			b.WriteString(line)
		}
	}
	return b.String(), nil
}
