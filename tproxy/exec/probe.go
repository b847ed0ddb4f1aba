package exec

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/procfs"
)

// Probe observes what Build has to know of the machine. It changes nothing: no
// table comes into being, no address, no file. It starts a process only where a
// file does not answer: to tell the variant of an iptables that is no
// multi-call binary, or to find a user that the machine's name service alone
// knows.
//
// Without root some of it cannot be seen; Host.Notes says what.
func (r *Runner) Probe(ctx context.Context, n tproxy.Needs) (tproxy.Host, error) {
	s, err := r.session()
	if err != nil {
		return tproxy.Host{}, err
	}
	return s.probe(ctx, n)
}

func (s *session) probe(ctx context.Context, n tproxy.Needs) (h tproxy.Host, err error) {
	if n.IPv6 {
		off, why, err := s.m.ipv6Off()
		if err != nil {
			return h, fmt.Errorf("IPv6 of this host: %w", err)
		}
		if off {
			h.IPv6Off = why
			if h.IPv6Uncaptured, err = s.beyondLo(why); err != nil {
				return h, err
			}
		} else {
			_, v6 := tproxy.PassthroughAddresses()
			if h.PassthroughAddress, err = s.m.hasAddress(v6); err != nil {
				return h, fmt.Errorf("addresses of lo: %w", err)
			}
		}
	}
	s.users(ctx, n, &h)
	if err := s.inboundPorts(n, &h); err != nil {
		return h, err
	}
	if s.elsewhere {
		s.notOurFiles(n, &h)
		n.ResolvConf, n.Nameserver = "", nil
	}
	if n.ResolvConf != "" || n.Nameserver != nil {
		s.byResolved(&h)
	}
	if n.Nameserver != nil {
		s.nameserver(ctx, *n.Nameserver, &h)
	}
	if n.ResolvConf != "" {
		if err := s.resolvers(n, &h); err != nil {
			return h, err
		}
	}
	h.Variants = s.variants(ctx)
	if _, ok := h.Variant(tproxy.NFTables); !ok {
		h.NoNFTables = s.m.noNFTables()
	}
	if n.Persist != nil {
		s.persistence(ctx, *n.Persist, &h)
	}
	return h, nil
}

// beyondLo returns the reason for which IPv6 is in use although it is off on
// lo, where the proxy needs an address: its connections would pass the proxy by.
func (s *session) beyondLo(why string) (string, error) {
	addrs, err := s.m.localAddresses()
	if err != nil {
		return "", fmt.Errorf("addresses of this host: %w", err)
	}
	for _, p := range addrs {
		if a := p.Addr(); a.Is6() && !a.IsLoopback() && !a.IsLinkLocalUnicast() {
			return fmt.Sprintf("%s, and this host has the address %s", why, a), nil
		}
	}
	return "", nil
}

// users looks up the proxy's user, where the Config names one or leaves it
// open.
func (s *session) users(ctx context.Context, n tproxy.Needs, h *tproxy.Host) {
	switch {
	case n.DefaultUser:
		if name, ok := s.m.userByID(tproxy.DefaultProxyUID); ok {
			h.Users = append(h.Users, tproxy.User{Name: name, UID: tproxy.DefaultProxyUID})
		} else if uid, ok := s.m.userByName(tproxy.DefaultProxyUser); ok {
			h.Users = append(h.Users, tproxy.User{Name: tproxy.DefaultProxyUser, UID: uid})
		} else {
			h.Notes = append(h.Notes, fmt.Sprintf("no user has the UID %d yet; to create it: useradd -u %[1]d -U %s", tproxy.DefaultProxyUID, tproxy.DefaultProxyUser))
		}
	case n.User == "":
	default:
		if _, err := strconv.ParseUint(n.User, 10, 32); err == nil {
			return // a number is taken as it is, with or without an entry
		}
		uid, ok := s.m.userByName(n.User)
		if !ok {
			uid, ok = s.getent(ctx, n.User)
		}
		if ok {
			h.Users = append(h.Users, tproxy.User{Name: n.User, UID: uid})
		}
	}
}

// getent asks the machine's name service, of which a static binary reads
// /etc/passwd alone (os/user).
func (s *session) getent(ctx context.Context, name string) (uint32, bool) {
	path, _ := s.m.find("getent")
	if path == "" {
		return 0, false
	}
	r, err := s.run(ctx, command{Path: path, Args: []string{"passwd", "--", name}})
	if err != nil || r.Exit != 0 {
		return 0, false
	}
	fields := strings.Split(string(r.Stdout), ":")
	if len(fields) < 3 || fields[0] != name {
		return 0, false
	}
	uid, err := strconv.ParseUint(fields[2], 10, 32)
	return uint32(uid), err == nil
}

// inboundPorts finds the ports by which the machine is operated.
func (s *session) inboundPorts(n tproxy.Needs, h *tproxy.Host) error {
	if !n.RemoteShells {
		return nil
	}
	ssh, err := s.m.procs().ListensOn(tproxy.SSHPort)
	if err != nil {
		return fmt.Errorf("listening sockets: %w", err)
	}
	if s.m.environ("KUBERNETES_SERVICE_HOST") != "" && !ssh {
		h.Pod = "KUBERNETES_SERVICE_HOST is set and nothing listens on port 22"
		return nil
	}
	if is, why := s.m.procs().Container(); is && !ssh {
		s.log.Debug("a container without SSH has no way in to protect", "why", why)
		return nil
	}
	shells, partial, err := s.m.procs().RemoteShells()
	if err != nil {
		return fmt.Errorf("ports of remote shells: %w", err)
	}
	for _, sh := range shells {
		h.RemoteShells = append(h.RemoteShells, tproxy.RemoteShell{Port: sh.Port, Why: sh.Why})
	}
	if partial {
		h.Notes = append(h.Notes, "not all processes can be seen (it takes root with CAP_SYS_PTRACE): a server of remote shells may have been overlooked")
	}
	return nil
}

// nameservers reads the servers of resolv.conf as the file is to be: with the one that
// an install puts in, and without one that an earlier install did.
func (s *session) nameservers(n tproxy.Needs, h *tproxy.Host) error {
	path := n.ResolvConf
	text, err := s.m.readFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if n.Nameserver == nil {
			h.Notes = append(h.Notes, path+" does not exist: it names no nameserver")
		}
	case err != nil:
		return fmt.Errorf("nameservers: %w", err)
	}
	conf := dns.Parse(dns.RemoveNameserver(text))
	h.Nameservers = conf.Nameservers
	if n.Nameserver != nil && h.Nameserver.Split == tproxy.NoSplit && !slices.Contains(h.Nameservers, n.Nameserver.Address) {
		h.Nameservers = append([]netip.Addr{n.Nameserver.Address}, h.Nameservers...)
	}
	for _, l := range conf.Ignored {
		h.Notes = append(h.Notes, fmt.Sprintf("%s line %d names no nameserver for us (%s): %q", path, l.Number, l.Why, l.Text))
	}
	return nil
}

// resolvers finds who answers at those nameservers of resolv.conf that are this host.
func (s *session) resolvers(n tproxy.Needs, h *tproxy.Host) error {
	if err := s.nameservers(n, h); err != nil || len(h.Nameservers) == 0 {
		return err
	}
	local, err := s.m.localAddresses()
	if err != nil {
		return fmt.Errorf("addresses of this host: %w", err)
	}
	var found []listener
	for i, a := range h.Nameservers {
		if slices.Contains(h.Nameservers[:i], a) {
			continue
		}
		if !a.IsLoopback() && !slices.ContainsFunc(local, func(p netip.Prefix) bool { return p.Addr() == a.Unmap().WithZone("") }) {
			continue
		}
		l := listener{addr: a}
		if a == dockersResolver {
			if l, err = s.docker(); err != nil {
				return err
			}
		}
		if l.program == "" {
			if l.sockets, err = s.m.procs().ListensUDP(a.WithZone(""), 53); err != nil {
				return fmt.Errorf("sockets at nameserver %s: %w", a, err)
			}
			if len(l.sockets) == 0 {
				h.Notes = append(h.Notes, fmt.Sprintf("nothing listens at nameserver %s, which is this host", a))
				continue
			}
		}
		found = append(found, l)
	}
	return s.owners(found, h)
}

// listener is what listens at a nameserver that is this host.
type listener struct {
	addr    netip.Addr
	sockets []procfs.Socket
	// program is whose it is, where another thing than its process tells.
	program string
	behind  string // LocalResolver.Behind
}

// owners finds the processes of the listeners.
func (s *session) owners(found []listener, h *tproxy.Host) error {
	inodes := make(map[uint64]bool)
	for _, l := range found {
		for _, so := range l.sockets {
			inodes[so.Inode] = true
		}
	}
	if len(found) == 0 {
		return nil
	}
	owners, partial, err := s.m.procs().Owners(inodes)
	if err != nil {
		return fmt.Errorf("processes at local nameservers: %w", err)
	}
	add := func(r tproxy.LocalResolver) {
		if !slices.Contains(h.LocalResolvers, r) { // a socket for each thread
			h.LocalResolvers = append(h.LocalResolvers, r)
		}
	}
	// The socket's user is the one who bound it, often root, who may have become
	// another since: it is no answer.
	why := "its process is in another PID namespace"
	if partial {
		why = "only root with CAP_SYS_PTRACE can see its process"
	}
	for _, l := range found {
		seen := false
		for _, so := range l.sockets {
			for _, p := range owners[so.Inode] {
				seen = true
				r := tproxy.LocalResolver{Address: l.addr, UID: p.UID, PID: p.PID, Program: p.Comm, Behind: l.behind}
				if l.program != "" {
					r.Program = fmt.Sprintf("%s (%s)", l.program, p.Comm)
					if r.UID == 0 {
						r.Untold = "runs as root, as what runs in the container may"
					}
				}
				add(r)
			}
		}
		switch {
		case seen:
		case l.program != "":
			add(tproxy.LocalResolver{Address: l.addr, Program: l.program, Behind: l.behind, Untold: "runs outside of this container (" + why + ")"})
		default:
			h.Notes = append(h.Notes, fmt.Sprintf("the user of the resolver at %s is not known (%s): its own queries would come back to it if it asks a redirected server", l.addr, why))
			if s.m.privileged() == nil {
				add(tproxy.LocalResolver{Address: l.addr, Program: "a program", Untold: "runs as a user that is not known (" + why + ")"})
			}
		}
	}
	return nil
}
