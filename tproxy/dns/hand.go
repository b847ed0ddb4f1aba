package dns

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// OwnedError says that another program manages the file, and what to do by hand.
// A line of ours would be gone at its next write, or it would have to be written
// through it, which we do for none that we have not run against.
type OwnedError struct {
	Path    string
	Mode    Mode
	Address netip.Addr // that was to be the nameserver
	Systemd int        // the version of systemd, where known
	Clues   []Clue
	// Why is the reason for which it is not told to ask the control plane either;
	// empty where there is none but that.
	Why string
}

func (e *OwnedError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q is managed by %s and is left alone", e.Path, e.Mode)
	for _, c := range e.Clues {
		fmt.Fprintf(&b, "\n  %s", c)
	}
	if e.Why != "" {
		fmt.Fprintf(&b, "\n%s", e.Why)
	}
	fmt.Fprintf(&b, "\nby hand: %s\nor install with --modify-resolv-conf=false, and names are resolved as before", e.Remedy())
	return b.String()
}

// Remedy says what to do by hand.
func (e *OwnedError) Remedy() string {
	a := e.Address.String()
	switch e.Mode {
	case HostMount:
		return "install on the host, or mount a copy of the file here and not the host's own"
	case ResolvedStub, ResolvedStatic, ResolvedUplink:
		return e.resolved(a)
	case NetworkManager:
		return "with dns=dnsmasq in NetworkManager.conf(5), a file /etc/NetworkManager/dnsmasq.d/kuma.conf with the line server=/" + Mesh + "/" + a +
			" sends the names of the mesh alone to the control plane (dnsmasq(8)); or nmcli connection modify NAME ipv4.dns '" + a + " OTHERS', ipv6.dns for an IPv6 address, in the order in which they are to be asked (nmcli(1)); or set dns=none in its section [main], reload it, and install again: then the file is yours"
	case Openresolv:
		return "set name_servers=" + strconv.Quote(a) + " in /etc/resolvconf.conf (resolvconf.conf(5)), and run resolvconf -u"
	case DebianResolvconf:
		return "put the line nameserver " + a + " into /etc/resolvconf/resolv.conf.d/head (resolvconf(8)), and run resolvconf -u"
	case Dhclient:
		return "put the line prepend domain-name-servers " + a + "; into /etc/dhcp/dhclient.conf (dhclient.conf(5)), and renew the lease; or keep it from writing the file with an enter hook that defines make_resolv_conf (dhclient-script(8)), and install again"
	case Dhcpcd:
		return "put the line nameserver " + a + " into /etc/resolv.conf.head, and run dhcpcd -n; or put nohook resolv.conf into /etc/dhcpcd.conf (dhcpcd.conf(5)), and install again"
	case Udhcpc:
		return `put RESOLV_CONF="no" into /etc/udhcpc/udhcpc.conf, and install again: then the file is yours`
	case Netconfig:
		return "set NETCONFIG_DNS_STATIC_SERVERS=" + strconv.Quote(a) + " in /etc/sysconfig/network/config (netconfig(8)), and run netconfig update -f"
	case ConnMan:
		return "connmanctl config SERVICE --nameservers " + a + " (connmanctl(1)), followed by those that it has"
	case Tailscale:
		return "tailscale set --accept-dns=false, and install again; or add " + a + " in the DNS settings of the tailnet, for the domain " + Mesh
	case WSL:
		return "set generateResolvConf=false in the section [network] of /etc/wsl.conf, replace the link by a file, and install again"
	}
	return "have that program put the line nameserver " + a + " in front of the others, or keep it from writing the file and install again"
}

// resolved says what is left to do where systemd-resolved cannot be told by us to
// send the names of the mesh alone to the control plane.
func (e *OwnedError) resolved(a string) string {
	stub := "ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf, so that programs ask systemd-resolved, and install again: then the names of the mesh alone go to the control plane"
	delegate := fmt.Sprintf("a file in /etc/systemd/dns-delegate.d with the lines [Delegate], DNS=%s and Domains=~%s (systemd.dns-delegate(5)), and systemctl reload systemd-resolved", a, Mesh)
	drop := fmt.Sprintf("DNS=%s and Domains=~%s in resolved.conf(5) is no way: its servers are asked for every name that no other routing domain matches, not for %s alone (systemd-resolved.service(8))", a, Mesh, Mesh)
	switch {
	case e.Mode == ResolvedUplink && e.Path == DefaultPath:
		return stub
	case e.own():
		return "give the address at which the DNS server of the control plane answers, which is not " + a
	case e.Systemd >= delegateVersion:
		return delegate + "; " + drop
	}
	return fmt.Sprintf("with systemd %d and later, %s; before, take an IPv4 address of the control plane that is not loopback, on the host itself; %s", delegateVersion, delegate, drop)
}

// SystemdVersion returns the version of systemd, 0 where it is not known. Its
// private library bears the version in its name, so no program is started.
func SystemdVersion(v View) int {
	best := 0
	for _, dir := range []string{"/usr/lib/systemd", "/lib/systemd", "/usr/lib/*/systemd", "/usr/lib64/systemd"} {
		for _, f := range v.Glob(dir + "/libsystemd-shared-*.so") {
			_, f, _ = strings.Cut(f, "libsystemd-shared-")
			end := strings.IndexFunc(f, func(r rune) bool { return r < '0' || r > '9' })
			if n, err := strconv.Atoi(f[:max(end, 0)]); err == nil {
				best = max(best, n)
			}
		}
	}
	return best
}
