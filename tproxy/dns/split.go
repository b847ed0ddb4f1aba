package dns

import (
	"fmt"
	"net/netip"
)

// Split is how systemd-resolved is told to ask the control plane for the names of
// the mesh, and for no other.
//
// DNS= with Domains=~mesh in resolved.conf(5) is none of the ways: the servers there
// get every name that matches no routing domain as well (systemd-resolved.service(8),
// PROTOCOLS AND ROUTING).
type Split int

const (
	// NoSplit is for a file that systemd-resolved does not answer for, and for what
	// it cannot split here.
	NoSplit Split = iota
	// Delegate is a file of systemd.dns-delegate(5), for which it takes systemd 258.
	Delegate
	// Link is an interface of our own that has the control plane as its server, ~mesh
	// as its domain and no default route (org.freedesktop.resolve1(5), SetLinkDNS).
	// Because systemd-resolved asks a server of an interface through that interface
	// (dns_scope_socket, src/resolve/resolved-dns-scope.c), what leaves by ours has to
	// be routed anew: it takes a rule that gives it a mark (ip_route_me_harder,
	// net/ipv4/netfilter.c), and an address of ours that the answer comes back to.
	Link
)

// Split says in which way the owner of the file can send the names of the mesh
// alone to a control plane, or why it cannot.
func (e *OwnedError) Split() (s Split, why string) {
	switch {
	case e.Path != DefaultPath:
		return NoSplit, "" // nothing here says that programs of this system read it
	case e.Mode == ResolvedUplink:
		return NoSplit, "programs read systemd-resolved's own servers in it and ask them past systemd-resolved, for every name"
	case e.Mode != ResolvedStub && e.Mode != ResolvedStatic:
		return NoSplit, ""
	case e.own():
		return NoSplit, "systemd-resolved itself answers there, and takes no server at an address of its own"
	case e.Systemd >= delegateVersion:
		return Delegate, ""
	case e.Address.Is6():
		return NoSplit, fmt.Sprintf("systemd is version %s: before %d it asks a server of an interface through that interface alone, and for IPv6 the kernel has no way around that", e.systemd(), delegateVersion)
	case e.Address.IsLoopback():
		return NoSplit, fmt.Sprintf("systemd is version %s: before %d it takes an interface of our own, which cannot have a loopback address", e.systemd(), delegateVersion)
	}
	return Link, ""
}

// own reports whether the address is one at which systemd-resolved itself answers; it
// leaves them out of its servers (dns_server_address_valid, src/shared/resolve-util.c).
func (e *OwnedError) own() bool {
	return e.Address == netip.AddrFrom4([4]byte{127, 0, 0, 53}) || e.Address == netip.AddrFrom4([4]byte{127, 0, 0, 54})
}

func (e *OwnedError) systemd() string {
	if e.Systemd == 0 {
		return "not known"
	}
	return fmt.Sprint(e.Systemd)
}

// Mesh is the domain that the control plane answers for.
const Mesh = "mesh"

// delegateVersion is the systemd that brought dns-delegate files.
const delegateVersion = 258

// delegateText is the file of systemd.dns-delegate(5). Its first line is the mark by
// which it is known; it says who made the folder too, so that it goes with the file.
func delegateText(a netip.Addr, folder bool) []byte {
	first := delegateMark
	if folder {
		first = delegateFolderMark
	}
	return fmt.Appendf(nil, "%s\n[Delegate]\nDNS=%s\nDomains=~%s\nDefaultRoute=no\n", first, a, Mesh)
}

const (
	delegateMark       = `# kuma-tproxy: made by "kumactl install transparent-proxy", removed by uninstall`
	delegateFolderMark = delegateMark + `, with the folder`
)
