package exec

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
)

// split finds out for a plan how systemd-resolved, which manages resolv.conf, is told
// to ask the control plane for the names of the mesh alone. It reports whether it can
// be told; if not, the error says why.
func (s *session) split(ctx context.Context, owned *dns.OwnedError, h *tproxy.Host) bool {
	how, why := owned.Split()
	if how == dns.NoSplit {
		owned.Why = why
		return false
	}
	if n := s.m.resolvConf(owned.Path, false).Namespaces; n.Self == "" || n.Self != n.Init {
		owned.Why = "systemd-resolved is the host's, and this is another network namespace"
		return false
	}
	var c hostChange
	var err error
	if how == dns.Delegate {
		h.Nameserver.Split = tproxy.SplitDelegate
		c, err = s.delegate(owned.Address)
	} else {
		h.Nameserver.Split = tproxy.SplitLink
		c, err = s.meshLink(ctx, owned.Address)
	}
	if err != nil {
		h.Nameserver.Split, h.Nameserver.Refused = tproxy.NoSplit, err.Error()
		return true
	}
	h.Nameserver.Do, h.Nameserver.Undo = c.do, c.undo
	return true
}

// hostChange is what is to be done for systemd-resolved to ask the control plane, or
// not to ask it any more.
type hostChange struct {
	do, undo string
	nothing  bool // everything is as it is to be
	notes    []string
	run      func(context.Context) error
	back     func(context.Context) error // however far run came
}

// delegate is the change of the file by which systemd 258 and later is told. The zero
// Addr removes it.
func (s *session) delegate(a netip.Addr) (hostChange, error) {
	m := s.m.delegate()
	c, err := m.Inspect(a)
	if err != nil {
		return hostChange{}, err
	}
	return hostChange{
		do: c.String(), undo: c.Undo(), nothing: c.Nothing(),
		run: func(ctx context.Context) error {
			if err := m.Do(c); err != nil {
				return err
			}
			err := s.reloadResolved(ctx)
			if err != nil && !a.IsValid() {
				// The file is gone. Redirection must not stay because of that; and without
				// systemctl there is no systemd that would have read it.
				s.log.Warn("systemd-resolved was not told that a file is gone: until it reads its files again it asks the control plane", "file", m.Path, "error", err)
				return nil
			}
			return err
		},
		back: func(ctx context.Context) error {
			err := m.Undo(c)
			if e := s.reloadResolved(ctx); e != nil {
				s.log.Warn("systemd-resolved was not told that a file is as it was", "file", m.Path, "error", e)
			}
			return err
		},
	}, nil
}

// resolvedUnit is systemd-resolved to systemctl(1).
const resolvedUnit = "systemd-resolved.service"

// reloadResolved has systemd-resolved read its files again. One that does not run
// reads them when it starts.
func (s *session) reloadResolved(ctx context.Context) error {
	return s.tell(ctx, "systemctl", "try-reload-or-restart", resolvedUnit)
}

// tell runs a program of systemd's that says on stderr what is wrong.
func (s *session) tell(ctx context.Context, name string, args ...string) error {
	_, err := s.ask(ctx, name, args...)
	return err
}

// ask is tell, and returns what the program prints.
func (s *session) ask(ctx context.Context, name string, args ...string) (string, error) {
	path, _ := s.m.find(name)
	if path == "" {
		return "", fmt.Errorf("%s is not on PATH, %s: %w", name, strings.Join(programDirs, ", "), ErrUnsupported)
	}
	c := command{Path: path, Args: args}
	r, err := s.run(ctx, c)
	switch {
	case err != nil:
		return "", fmt.Errorf("%s: %w", c, err)
	case r.Exit != 0:
		return "", fmt.Errorf("%s: exit code %d: %s", c, r.Exit, r.Stderr)
	}
	return string(r.Stdout), nil
}

// meshAlias says in ip-link(8) what the interface is for.
const meshAlias = `kuma-tproxy: names of the mesh, made by "kumactl install transparent-proxy"`

// meshLink is the change of the interface by which systemd-resolved before version 258
// is told; the zero Addr removes it. What is told of an interface stays over a restart
// of systemd-resolved, and goes with the interface.
func (s *session) meshLink(ctx context.Context, a netip.Addr) (hostChange, error) {
	l, there, err := s.m.meshLink()
	if err != nil {
		return hostChange{}, err
	}
	if there && !l.Ours {
		if !a.IsValid() {
			return hostChange{nothing: true}, nil
		}
		return hostChange{}, fmt.Errorf("the interface %s is there already, and is not ours: give it another name, and install again", tproxy.MeshLink)
	}
	var was meshState
	if there {
		was = s.meshState(ctx, l)
	}
	var want meshState
	if a.IsValid() {
		way, err := s.m.routeTo(a)
		if err != nil {
			return hostChange{}, err
		}
		if !way.Source.IsValid() {
			return hostChange{}, fmt.Errorf("there is no way to the control plane at %s, and so no address from which systemd-resolved could ask it", a)
		}
		want = meshState{server: a, source: way.Source}
	}
	// The zero state is that of half an interface as well, such as a killed install or a
	// systemd-resolved that does not run leaves: that one goes too.
	c := hostChange{nothing: was == want && there == a.IsValid()}
	switch {
	case a.IsValid():
		c.do = fmt.Sprintf("names in .%s to %s, by systemd-resolved's settings of the interface %s", dns.Mesh, a, tproxy.MeshLink)
	default:
		c.do = fmt.Sprintf("no interface %s any more", tproxy.MeshLink)
	}
	c.undo = fmt.Sprintf("no interface %s", tproxy.MeshLink)
	if was.server.IsValid() {
		c.undo = fmt.Sprintf("the interface %s as it was", tproxy.MeshLink)
	}
	c.run = func(ctx context.Context) error { return s.setMesh(ctx, want) }
	c.back = func(ctx context.Context) error { return s.setMesh(ctx, was) }
	return c, nil
}

// meshState is what the interface of ours is set to; the zero state is no interface.
type meshState struct {
	server, source netip.Addr
}

// setMesh makes the interface anew, or removes it.
func (s *session) setMesh(ctx context.Context, want meshState) error {
	l, there, err := s.m.meshLink()
	if err != nil {
		return err
	}
	if there && l.Ours {
		if _, err := s.m.delMeshLink(l); err != nil {
			return err
		}
	}
	if !want.server.IsValid() || !want.source.IsValid() {
		return nil
	}
	if l, err = s.m.addMeshLink(meshAlias, hostPrefix(want.source)); err != nil {
		return err
	}
	for i, c := range settings(l.Index, want.server) {
		err := s.tell(ctx, "busctl", c...)
		// It hears of the interface from the kernel, a moment later than we do.
		for deadline := time.Now().Add(hearsOfLink); i == 0 && err != nil && strings.Contains(err.Error(), "not known") && time.Now().Before(deadline); {
			time.Sleep(10 * time.Millisecond)
			err = s.tell(ctx, "busctl", c...)
		}
		if err != nil {
			_, e := s.m.delMeshLink(l)
			return errors.Join(err, e)
		}
	}
	return nil
}

// hearsOfLink is how long systemd-resolved may take to know an interface.
const hearsOfLink = 5 * time.Second

// The interface of systemd-resolved (org.freedesktop.resolve1(5)), to busctl(1).
const (
	resolve1     = "org.freedesktop.resolve1"
	resolve1Path = "/org/freedesktop/resolve1"
)

// settings are the calls that set an interface up, the server last, when everything
// else says already for which names it is. Names of the mesh are signed by nobody and
// asked for in the clear, whatever holds for others.
func settings(index uint32, server netip.Addr) (out [][]string) {
	i := strconv.FormatUint(uint64(index), 10)
	call := func(method, signature string, args ...string) {
		out = append(out, append([]string{"--quiet", "call", resolve1, resolve1Path, resolve1 + ".Manager", method, signature, i}, args...))
	}
	call("SetLinkDefaultRoute", "ib", "false")
	for _, off := range []string{"LLMNR", "MulticastDNS", "DNSSEC", "DNSOverTLS"} {
		call("SetLink"+off, "is", "no")
	}
	call("SetLinkDomains", "ia(sb)", "1", dns.Mesh, "true")
	call("SetLinkDNS", "ia(iay)", strings.Fields(busAddresses(server))...)
	return out
}

// busAddresses writes a list of one address as busctl does: how many, the family, how
// many bytes, the bytes.
func busAddresses(a netip.Addr) string {
	const inet, inet6 = 2, 10 // AF_INET, AF_INET6 (linux/socket.h)
	family := inet
	if a.Is6() {
		family = inet6
	}
	var out strings.Builder
	fmt.Fprintf(&out, "1 %d %d", family, a.BitLen()/8)
	for _, b := range a.AsSlice() {
		out.WriteString(" " + strconv.Itoa(int(b)))
	}
	return out.String()
}

// properties are those that settings sets, with the values that it gives them, as
// busctl prints them; the first is the server.
var properties = []struct{ name, value string }{
	{"DNS", ""},
	{"Domains", `a(sb) 1 "` + dns.Mesh + `" true`},
	{"DefaultRoute", "b false"},
	{"LLMNR", `s "no"`}, {"MulticastDNS", `s "no"`}, {"DNSSEC", `s "no"`}, {"DNSOverTLS", `s "no"`},
}

// meshState reads what the interface is set to; the zero state, if anything of it is
// not as settings makes it: then it is to be made anew. It starts no service.
func (s *session) meshState(ctx context.Context, l kernel.Link) (m meshState) {
	if !l.Up || len(l.Addresses) != 1 || !l.Addresses[0].IsSingleIP() {
		return m
	}
	args := []string{"--auto-start=no", "get-property", resolve1, linkPath(l.Index), resolve1 + ".Link"}
	for _, p := range properties {
		args = append(args, p.name)
	}
	text, err := s.ask(ctx, "busctl", args...)
	if err != nil {
		s.log.Debug("systemd-resolved does not say what it knows of the interface of ours", "error", err)
		return m
	}
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if len(lines) != len(properties) {
		return m
	}
	for i, p := range properties[1:] {
		if strings.TrimSpace(lines[i+1]) != p.value {
			return m
		}
	}
	server, ok := readBusAddress(lines[0])
	if !ok {
		return m
	}
	return meshState{server: server, source: l.Addresses[0].Addr()}
}

// linkPath is the object of an interface: its index, of which the first digit is
// written as its byte, for a part of a path begins with no digit
// (sd_bus_path_encode(3)).
func linkPath(index uint32) string {
	i := strconv.FormatUint(uint64(index), 10)
	return fmt.Sprintf("%s/link/_%x%s", resolve1Path, i[0], i[1:])
}

// readBusAddress reads a list of one address as busctl prints it.
func readBusAddress(text string) (a netip.Addr, ok bool) {
	f := strings.Fields(text)
	if len(f) < 4 || f[0] != "a(iay)" || f[1] != "1" {
		return a, false
	}
	var b []byte
	for _, s := range f[4:] {
		n, err := strconv.ParseUint(s, 10, 8)
		if err != nil {
			return a, false
		}
		b = append(b, byte(n))
	}
	a, ok = netip.AddrFromSlice(b)
	return a, ok && slices.Equal(strings.Fields(busAddresses(a)), f[1:])
}
