package exec

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// probed is a machine whose proc, addresses and name service are made up.
type probed struct {
	*fakeMachine
	t            *testing.T
	local        []netip.Prefix
	getent       map[string]result // by name
	unreads      error             // of resolv.conf
	sockets      map[string]int
	chainsUnread error
}

func (m *probed) chains(nft bool, f rules.Family, t rules.Table) ([]string, error) {
	if m.chainsUnread != nil {
		return nil, m.chainsUnread
	}
	return m.fakeMachine.chains(nft, f, t)
}

func (m *probed) tables(nft bool, f rules.Family) ([]rules.Table, error) {
	if m.chainsUnread != nil {
		return nil, m.chainsUnread
	}
	return m.fakeMachine.tables(nft, f)
}

func newProbed(t *testing.T) *probed {
	for _, key := range []string{"SSH_CONNECTION", "KUBERNETES_SERVICE_HOST", "container"} {
		t.Setenv(key, "")
	}
	m := &probed{fakeMachine: newFakeMachine(t), t: t, sockets: make(map[string]int)}
	m.link("net:[1]", "thread-self", "ns", "net")
	m.link("100", "self")
	return m
}

func (m *probed) link(to string, elem ...string) {
	m.t.Helper()
	path := filepath.Join(append([]string{m.proc}, elem...)...)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Symlink(to, path); err != nil {
		m.t.Fatal(err)
	}
}

// process has the sockets open and runs as the user.
func (m *probed) process(pid int, comm string, uid uint32, inodes ...int) {
	m.t.Helper()
	p := fmt.Sprint(pid)
	writeProc(m.t, m.proc, p+"/stat", fmt.Sprintf("%d (%s) S 0 %d %d 0 -1 4194560 1 2 3\n", pid, comm, pid, pid))
	writeProc(m.t, m.proc, p+"/comm", comm+"\n")
	writeProc(m.t, m.proc, p+"/status", fmt.Sprintf("Name:\t%s\nUid:\t0\t%d\t0\t0\n", comm, uid))
	m.link("/usr/sbin/"+comm, p, "exe")
	m.link("net:[1]", p, "ns", "net")
	m.link("/dev/null", p, "fd", "0")
	for i, inode := range inodes {
		m.link(fmt.Sprintf("socket:[%d]", inode), p, "fd", fmt.Sprint(i+3))
	}
}

// socket appends to a file of proc: local is as the kernel prints it.
func (m *probed) socket(file, local string, state string, uid, inode int) {
	m.t.Helper()
	path := filepath.Join(m.proc, "thread-self", "net", file)
	text, err := os.ReadFile(path)
	if err != nil {
		text = []byte("header\n")
	}
	text = fmt.Appendf(text, "%4d: %s 00000000:0000 %s 00000000:00000000 00:00000000 00000000 %d 0 %d 1 0000000000000000 100 0 0 10 0\n", m.sockets[file], local, state, uid, inode)
	m.sockets[file]++
	if err := os.WriteFile(path, text, 0o644); err != nil {
		m.t.Fatal(err)
	}
}

func (m *probed) localAddresses() ([]netip.Prefix, error) { return m.local, nil }

func (m *probed) find(name string) (string, string) {
	if name == "getent" && m.getent != nil {
		return "/usr/bin/getent", "/usr/bin/getent"
	}
	return m.fakeMachine.find(name)
}

func (m *probed) run(ctx context.Context, c command) (result, error) {
	if c.Path != "/usr/bin/getent" {
		return m.fakeMachine.run(ctx, c)
	}
	m.commands = append(m.commands, c)
	if r, ok := m.getent[c.Args[len(c.Args)-1]]; ok {
		return r, nil
	}
	return result{Exit: 2}, nil
}

func (m *probed) readFile(path string) ([]byte, error) {
	if m.unreads != nil {
		return nil, m.unreads
	}
	return m.fakeMachine.readFile(path)
}

func (m *probed) probe(n tproxy.Needs) tproxy.Host {
	m.t.Helper()
	h, err := (&Runner{machine: m}).Probe(context.Background(), n)
	if err != nil {
		m.t.Fatalf("Probe: %v", err)
	}
	if m.writes > 0 {
		m.t.Errorf("%d writes by looking", m.writes)
	}
	return h
}

// addresses as a little-endian kernel prints them; the fake proc is read by
// this machine's order.
const (
	at127_0_0_53 = "3500007F:0035"
	at127_0_0_1  = "0100007F:0035"
	at10_0_0_5   = "0500000A:0035"
	anywhere     = "00000000"
)

func TestProbeUsers(t *testing.T) {
	for _, c := range []struct {
		name   string
		config tproxy.Config
		users  map[string]uint32
		getent map[string]result
		want   []tproxy.User
		uid    tproxy.UID // after Build; 0 is an error
		note   string
	}{
		{name: "nobody named, 5678 is there", users: map[string]uint32{"mesh": 5678, "kuma-dp": 700}, want: []tproxy.User{{Name: "mesh", UID: 5678}}, uid: 5678},
		{name: "nobody named, kuma-dp is there", users: map[string]uint32{"kuma-dp": 700}, want: []tproxy.User{{Name: "kuma-dp", UID: 700}}, uid: 700},
		{name: "nobody named, neither is there", uid: 5678, note: "no user has the UID 5678 yet; to create it: useradd -u 5678 -U kuma-dp"},
		{name: "a number", config: tproxy.Config{ProxyUser: "4294967294"}, uid: 4294967294},
		{name: "a number list", config: tproxy.Config{ProxyUIDs: []tproxy.UID{42}, ProxyUser: "ignored"}, uid: 42},
		{name: "a name", config: tproxy.Config{ProxyUser: "envoy"}, users: map[string]uint32{"envoy": 991}, want: []tproxy.User{{Name: "envoy", UID: 991}}, uid: 991},
		{name: "a name of the name service", config: tproxy.Config{ProxyUser: "ldap.user"}, getent: map[string]result{"ldap.user": says("ldap.user:*:1000680000:100:LDAP:/home/l:/bin/sh")}, want: []tproxy.User{{Name: "ldap.user", UID: 1000680000}}, uid: 1000680000},
		{name: "a name that nobody knows", config: tproxy.Config{ProxyUser: "nobody-knows"}, getent: map[string]result{}},
		{name: "a name, without getent", config: tproxy.Config{ProxyUser: "nobody-knows"}},
		{name: "another name in the answer", config: tproxy.Config{ProxyUser: "x"}, getent: map[string]result{"x": says("y:*:0:0::/:/bin/sh")}},
		{name: "garbage in the answer", config: tproxy.Config{ProxyUser: "x"}, getent: map[string]result{"x": says("x:*")}},
		{name: "no number in the answer", config: tproxy.Config{ProxyUser: "x"}, getent: map[string]result{"x": says("x:*:-1:0::/:/bin/sh")}},
		{name: "a name with an option's look", config: tproxy.Config{ProxyUser: "--help"}, getent: map[string]result{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newProbed(t)
			m.users, m.getent = c.users, c.getent
			h := m.probe(c.config.Needs())
			if !slices.Equal(h.Users, c.want) {
				t.Errorf("users %v, want %v", h.Users, c.want)
			}
			if c.note != "" != slices.Contains(h.Notes, c.note) {
				t.Errorf("notes %q", h.Notes)
			}
			for _, cmd := range m.commands { // a name is an argument, whatever it looks like
				same(t, "getent", cmd.Args, []string{"passwd", "--", c.config.ProxyUser})
			}
			if len(c.config.ProxyUIDs) > 0 || c.config.ProxyUser == "" {
				same(t, "processes", m.programs(), nil)
			}
			p, err := tproxy.Build(c.config, h)
			if (c.uid == 0) != (err != nil) {
				t.Fatalf("Build: %v", err)
			}
			if err == nil && !p.ProxyUIDs.Contains(c.uid) {
				t.Errorf("UIDs %s", p.ProxyUIDs)
			}
		})
	}
}

func TestProbeWaysIn(t *testing.T) {
	const listen, ssh = "0A", "00000000:0016"
	needs := tproxy.Config{}.Needs()
	for _, c := range []struct {
		name  string
		needs tproxy.Needs
		setup func(*probed)
		pod   bool
		ports []uint16
	}{
		{name: "nobody listens", needs: needs, setup: func(*probed) {}},
		{name: "sshd on 22 and 2222", needs: needs, ports: []uint16{22, 2222}, setup: func(m *probed) {
			m.socket("tcp", ssh, listen, 0, 501)
			m.socket("tcp", "00000000:08AE", listen, 0, 502)
			m.socket("tcp", "00000000:0050", listen, 0, 503)
			m.process(200, "sshd", 0, 501, 502)
			m.process(201, "nginx", 0, 503)
		}},
		{name: "SSH_CONNECTION", needs: needs, ports: []uint16{2200}, setup: func(m *probed) {
			m.t.Setenv("SSH_CONNECTION", "10.0.0.9 40000 10.0.0.7 2200")
		}},
		{name: "SSH_CONNECTION that sudo stripped", needs: needs, ports: []uint16{2200}, setup: func(m *probed) {
			m.process(100, "kumactl", 0)
			m.process(90, "bash", 1000)
			writeProc(m.t, m.proc, "100/stat", "100 (kumactl) S 90 1 1 0 -1 4194560 1 2 3\n")
			writeProc(m.t, m.proc, "90/environ", "A=B\x00SSH_CONNECTION=10.0.0.9 40000 10.0.0.7 2200\x00")
		}},
		{name: "a pod", needs: needs, pod: true, setup: func(m *probed) {
			m.env["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
			m.socket("tcp", "00000000:08AE", listen, 0, 502)
			m.process(200, "sshd", 0, 502)
		}},
		{name: "a pod with the node's network", needs: needs, ports: []uint16{22}, setup: func(m *probed) {
			m.env["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
			m.socket("tcp", ssh, listen, 0, 501)
			m.process(200, "sshd", 0, 501)
		}},
		{name: "a container", needs: needs, setup: func(m *probed) {
			writeProc(m.t, m.proc, "run/.containerenv", "")
			m.socket("tcp", "00000000:08AE", listen, 0, 502)
			m.process(200, "sshd", 0, 502)
		}},
		{name: "a container with SSH", needs: needs, ports: []uint16{22}, setup: func(m *probed) {
			writeProc(m.t, m.proc, "run/.containerenv", "")
			m.socket("tcp", ssh, listen, 0, 501)
			m.process(200, "sshd", 0, 501)
		}},
		{name: "nothing inbound is redirected", needs: tproxy.Config{Inbound: tproxy.Inbound{Off: true}}.Needs(), setup: func(m *probed) {
			m.socket("tcp", ssh, listen, 0, 501)
			m.process(200, "sshd", 0, 501)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newProbed(t)
			c.setup(m)
			h := m.probe(c.needs)
			var ports []uint16
			for _, s := range h.RemoteShells {
				ports = append(ports, s.Port)
				if s.Why == "" {
					t.Errorf("port %d, why?", s.Port)
				}
			}
			if !slices.Equal(ports, c.ports) || (h.Pod != "") != c.pod {
				t.Errorf("ports %v, pod %q", ports, h.Pod)
			}
			// Build refuses what would lock us out, and names port and flag.
			_, err := tproxy.Build(tproxy.Config{}, h)
			for _, p := range c.ports {
				if p != 22 && (err == nil || !strings.Contains(err.Error(), fmt.Sprintf("--exclude-inbound-ports %d", p))) {
					t.Errorf("Build: %v", err)
				}
			}
		})
	}
}

func TestProbeIPv6(t *testing.T) {
	m := newProbed(t)
	m.noIPv6 = "disable_ipv6 is 1"
	if h := m.probe(tproxy.Needs{IPv6: true}); h.IPv6Off != m.noIPv6 {
		t.Errorf("%+v", h)
	}
	if h := m.probe(tproxy.Needs{}); h.IPv6Off != "" {
		t.Error("it was not asked for")
	}
	m.noIPv6 = ""
	m.addresses[passthrough6] = true
	if h := m.probe(tproxy.Needs{IPv6: true}); h.IPv6Off != "" || !h.PassthroughAddress {
		t.Errorf("%+v", h)
	}
}

func TestProbeResolvers(t *testing.T) {
	const unconnected, connected = "07", "01"
	for _, c := range []struct {
		name    string
		text    string
		local   string
		setup   func(*probed)
		servers []string
		want    []tproxy.LocalResolver
		note    string
	}{
		{name: "elsewhere", text: "nameserver 10.0.0.2\nnameserver fd00::2\n", servers: []string{"10.0.0.2", "fd00::2"}, setup: func(m *probed) {
			m.socket("udp", "00000000:0035", unconnected, 0, 601) // for others
			m.process(300, "named", 53, 601)
		}},
		{
			// dnsmasq binds as root and drops: the socket says 0, the process 53.
			name: "the process's user, not the socket's", text: "nameserver 127.0.0.53\n", servers: []string{"127.0.0.53"},
			setup: func(m *probed) {
				m.socket("udp", at127_0_0_53, unconnected, 0, 601)
				m.socket("udp", at127_0_0_1, unconnected, 0, 602)
				m.process(300, "systemd-resolve", 991, 601)
				m.process(301, "dnsmasq", 53, 602)
			},
			want: []tproxy.LocalResolver{{Address: netip.MustParseAddr("127.0.0.53"), UID: 991, PID: 300, Program: "systemd-resolve"}},
		},
		{
			name: "at every address", text: "nameserver 127.0.0.1\n", servers: []string{"127.0.0.1"},
			setup: func(m *probed) {
				m.socket("udp", anywhere+":0035", unconnected, 0, 601)
				m.process(300, "unbound", 110, 601)
			},
			want: []tproxy.LocalResolver{{Address: netip.MustParseAddr("127.0.0.1"), UID: 110, PID: 300, Program: "unbound"}},
		},
		{
			name: "at an own address, v4-mapped", text: "nameserver ::ffff:10.0.0.5\n", local: "10.0.0.5/24", servers: []string{"::ffff:10.0.0.5"},
			setup: func(m *probed) {
				m.socket("udp", at10_0_0_5, unconnected, 0, 601)
				m.process(300, "named", 110, 601)
			},
			want: []tproxy.LocalResolver{{Address: netip.MustParseAddr("::ffff:10.0.0.5"), UID: 110, PID: 300, Program: "named"}},
		},
		{
			name: "listed twice, a socket for each thread", text: "nameserver 127.0.0.1\nnameserver 127.0.0.1\n", servers: []string{"127.0.0.1", "127.0.0.1"},
			setup: func(m *probed) {
				m.socket("udp", at127_0_0_1, unconnected, 0, 601)
				m.socket("udp", at127_0_0_1, unconnected, 0, 602)
				m.process(300, "unbound", 110, 601, 602)
			},
			want: []tproxy.LocalResolver{{Address: netip.MustParseAddr("127.0.0.1"), UID: 110, PID: 300, Program: "unbound"}},
		},
		{
			name: "nothing listens", text: "nameserver 127.0.0.1\n", servers: []string{"127.0.0.1"},
			setup: func(m *probed) {
				m.socket("udp", at127_0_0_1, connected, 0, 601) // a client's
				m.socket("udp", at127_0_0_53, unconnected, 0, 602)
				m.process(300, "other", 110, 601, 602)
			},
			note: "nothing listens at nameserver 127.0.0.1, which is this host",
		},
		{
			name: "whose it is cannot be seen", text: "nameserver 127.0.0.1\n", servers: []string{"127.0.0.1"},
			setup: func(m *probed) { m.socket("udp", at127_0_0_1, unconnected, 101, 601) },
			note:  "the user of the resolver at 127.0.0.1 is not known (its process is in another PID namespace)",
			want:  []tproxy.LocalResolver{{Address: netip.MustParseAddr("127.0.0.1"), Program: "a program", Untold: "runs as a user that is not known (its process is in another PID namespace)"}},
		},
		{
			// Whoever cannot see it cannot install either.
			name: "whose it is only root can see", text: "nameserver 127.0.0.1\n", servers: []string{"127.0.0.1"},
			setup: func(m *probed) { m.notRoot = true; m.socket("udp", at127_0_0_1, unconnected, 101, 601) },
			note:  "the user of the resolver at 127.0.0.1 is not known",
		},
		{name: "a line that is none", text: "nameserver ten.0.0.2\nsearch example.org\nnameserver 10.0.0.3\n", servers: []string{"10.0.0.3"}, setup: func(*probed) {}, note: `/etc/resolv.conf line 1 names no nameserver for us`},
		{name: "empty", text: "", setup: func(*probed) {}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newProbed(t)
			m.files["/etc/resolv.conf"] = c.text
			if c.local != "" {
				m.local = []netip.Prefix{netip.MustParsePrefix(c.local)}
			}
			c.setup(m)
			cfg := tproxy.Config{DNS: tproxy.DNS{Redirect: true}}
			h := m.probe(cfg.Needs())
			var servers []string
			for _, a := range h.Nameservers {
				servers = append(servers, a.String())
			}
			same(t, "nameservers", servers, c.servers)
			if !slices.Equal(h.LocalResolvers, c.want) {
				t.Errorf("resolvers %v, want %v", h.LocalResolvers, c.want)
			}
			if !slices.ContainsFunc(append(h.Notes, ""), func(n string) bool { return strings.HasPrefix(n, c.note) }) {
				t.Errorf("notes %q, want %q", h.Notes, c.note)
			}
			if _, err := tproxy.Build(cfg, h); err != nil {
				t.Errorf("Build: %v", err)
			}
		})
	}
}

// dockersNAT is what Docker writes for its resolver, without what comes behind.
const dockersNAT = "*nat\n:DOCKER_OUTPUT - [0:0]\n-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT\nCOMMIT\n"

func TestProbeDockersResolver(t *testing.T) {
	const unconnected = "07"
	const at45345, at9999, at53, all53 = "0B00007F:B121", "0B00007F:270F", "0B00007F:0035", anywhere + ":0035"
	address := netip.MustParseAddr("127.0.0.11")
	in := func(program string) func(*probed) {
		return func(m *probed) {
			if err := m.netfilter[program].Restore([]byte(dockersNAT), nil); err != nil {
				m.t.Fatal(err)
			}
		}
	}
	table := func(m *probed) { m.foreign = []string{"inet other", "ip docker-dns"} }
	listens := func(at string) func(*probed) {
		return func(m *probed) { m.socket("udp", at, unconnected, 0, 601) }
	}
	as := func(comm string, uid uint32) func(*probed) {
		return func(m *probed) { m.process(300, comm, uid, 601) }
	}
	unread := func(m *probed) { m.notRoot, m.chainsUnread = true, fs.ErrPermission }
	outside := func(behind string) tproxy.LocalResolver {
		return tproxy.LocalResolver{Address: address, Program: "Docker's resolver", Behind: behind, Untold: "runs outside of this container (its process is in another PID namespace)"}
	}
	inTable := "table ip docker-dns of nftables"
	for _, c := range []struct {
		name  string
		setup []func(*probed)
		want  []tproxy.LocalResolver
		note  string
		loops bool // with all DNS captured
	}{
		{name: "rules of nft", setup: []func(*probed){in("iptables-nft"), listens(at45345)}, want: []tproxy.LocalResolver{outside("iptables-nft")}, loops: true},
		{name: "rules of legacy", setup: []func(*probed){in("iptables-legacy"), listens(at45345)}, want: []tproxy.LocalResolver{outside("iptables-legacy")}, loops: true},
		{name: "a table", setup: []func(*probed){table, listens(at45345)}, want: []tproxy.LocalResolver{outside(inTable)}, loops: true},
		{name: "seen, root", setup: []func(*probed){in("iptables-nft"), listens(at45345), as("dockerd", 0)}, loops: true,
			want: []tproxy.LocalResolver{{Address: address, PID: 300, Program: "Docker's resolver (dockerd)", Behind: "iptables-nft", Untold: "runs as root, as what runs in the container may"}}},
		{name: "seen, another user", setup: []func(*probed){table, listens(at45345), as("dockerd", 991)},
			want: []tproxy.LocalResolver{{Address: address, UID: 991, PID: 300, Program: "Docker's resolver (dockerd)", Behind: inTable}}},
		{name: "another server at all addresses", setup: []func(*probed){in("iptables-nft"), listens(all53), as("named", 53)}, want: []tproxy.LocalResolver{outside("iptables-nft")}, loops: true},
		{name: "dockerd is away", setup: []func(*probed){in("iptables-nft")}, want: []tproxy.LocalResolver{outside("iptables-nft")}, loops: true},
		{name: "without root", setup: []func(*probed){unread, listens(at45345)}, want: []tproxy.LocalResolver{outside("")}, loops: true},
		{name: "without root, another's", setup: []func(*probed){unread, listens(at53), as("dnsmasq", 101)},
			want: []tproxy.LocalResolver{{Address: address, UID: 101, PID: 300, Program: "dnsmasq"}}},
		{name: "no rules", setup: []func(*probed){listens(at9999), as("app", 1000)}, note: "nothing listens at nameserver 127.0.0.11, which is this host"},
		{name: "another's", setup: []func(*probed){listens(at53), as("dnsmasq", 101)},
			want: []tproxy.LocalResolver{{Address: address, UID: 101, PID: 300, Program: "dnsmasq"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newProbed(t)
			m.files["/etc/resolv.conf"] = "nameserver 127.0.0.11\n"
			for _, f := range c.setup {
				f(m)
			}
			cfg := tproxy.Config{DNS: tproxy.DNS{Redirect: true}}
			h := m.probe(cfg.Needs())
			if !slices.Equal(h.LocalResolvers, c.want) {
				t.Errorf("resolvers\n%+v, want\n%+v", h.LocalResolvers, c.want)
			}
			if !slices.ContainsFunc(append(h.Notes, ""), func(n string) bool { return strings.HasPrefix(n, c.note) }) {
				t.Errorf("notes %q, want %q", h.Notes, c.note)
			}
			same(t, "processes", m.programs(), nil)
			if _, err := tproxy.Build(cfg, h); err != nil {
				t.Errorf("Build: %v", err)
			}
			if _, err := tproxy.Build(tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}, h); errors.As(err, new(*tproxy.RefusedError)) != c.loops {
				t.Errorf("Build with all DNS: %v", err)
			}
		})
	}
}

// Install sees whether the rules of others decide about a query first.
func TestQueriesAreTried(t *testing.T) {
	docker := netip.MustParseAddrPort("127.0.0.11:53")
	own := netip.MustParseAddrPort("10.0.0.5:53")
	to := func(a string, err error) func(uint32, netip.AddrPort) (netip.AddrPort, error) {
		return func(uint32, netip.AddrPort) (netip.AddrPort, error) {
			at, _ := netip.ParseAddrPort(a)
			return at, err
		}
	}
	for _, c := range []struct {
		name     string
		server   netip.AddrPort
		sent     func(uint32, netip.AddrPort) (netip.AddrPort, error)
		proxy    []tproxy.UID
		excluded netip.Prefix
		err      string
		note     string
		tries    []uint32
	}{
		{name: "the proxy", server: docker, sent: to("127.0.0.1:15053", nil), tries: []uint32{0}},
		{name: "Docker's", server: docker, sent: to("127.0.0.11:45345", nil), err: "they go to 127.0.0.11:45345", tries: []uint32{0}},
		{name: "root is the proxy", server: docker, sent: to("127.0.0.1:15053", nil), proxy: []tproxy.UID{0}, tries: []uint32{65534}},
		{name: "not to be sent", server: docker, sent: to("", fs.ErrPermission), note: "cannot be told", tries: []uint32{0}},
		{name: "no user", server: docker, sent: to("", kernel.ErrNoUser), note: "none of the users", tries: []uint32{0, 65534, 1000, 1, 2}},
		{name: "an own address", server: own, sent: to("127.0.0.1:15053", nil), tries: []uint32{0}},
		{name: "an own address, untracked", server: own, sent: to("10.0.0.5:53", nil), note: "pass the proxy by", tries: []uint32{0}},
		{name: "excluded", server: docker, excluded: netip.MustParsePrefix("127.0.0.0/8")},
		{name: "loopback", server: netip.MustParseAddrPort("127.0.0.1:53")},
		{name: "elsewhere", server: netip.MustParseAddrPort("10.0.0.2:53")},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newProbed(t)
			m.local = []netip.Prefix{netip.MustParsePrefix("10.0.0.5/24")}
			m.files["/etc/resolv.conf"] = fmt.Sprintf("nameserver %s\n", c.server.Addr())
			if err := m.netfilter["iptables-nft"].Restore([]byte(dockersNAT), nil); err != nil {
				t.Fatal(err)
			}
			m.socket("udp", anywhere+":0035", "07", 101, 601)
			m.process(300, "dnsmasq", 101, 601)
			cfg := tproxy.Config{ProxyUIDs: c.proxy, DNS: tproxy.DNS{Redirect: true}}
			if c.excluded.IsValid() {
				cfg.Outbound.ExcludeIPs = []netip.Prefix{c.excluded}
			}
			var tries []uint32
			m.sent = func(uid uint32, to netip.AddrPort) (netip.AddrPort, error) {
				tries = append(tries, uid)
				if to != c.server {
					t.Errorf("sent to %s", to)
				}
				return c.sent(uid, to)
			}
			r := Runner{machine: m}
			p, err := tproxy.Build(cfg, m.probe(cfg.Needs()))
			if err != nil {
				t.Fatal(err)
			}
			report, err := r.Apply(context.Background(), p)
			if !slices.Equal(tries, c.tries) {
				t.Errorf("tried as %d, want %d", tries, c.tries)
			}
			if c.err != "" {
				if e, ok := errors.AsType[*ApplyError](err); !ok || !strings.Contains(e.Error(), c.err) || len(e.Undone) == 0 || len(e.Left) > 0 {
					t.Errorf("%v", err)
				}
				// Empty tables stay.
				if after := m.all(); strings.Contains(after, "KUMA_MESH") || !strings.Contains(after, "-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT") {
					t.Errorf("it was not taken back:\n%s", after)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			notes := strings.Join(report.Notes, "\n")
			if !strings.Contains(notes, c.note) || c.note == "" && strings.Contains(notes, "queries to") {
				t.Errorf("notes %q", report.Notes)
			}
		})
	}
}

func TestProbeResolverAsRootIsRefused(t *testing.T) {
	m := newProbed(t)
	m.files["/etc/resolv.conf"] = "nameserver 127.0.0.1\nnameserver 10.0.0.2\n"
	m.socket("udp", at127_0_0_1, "07", 0, 601)
	m.process(300, "dnsmasq", 0, 601)
	cfg := tproxy.Config{DNS: tproxy.DNS{Redirect: true}}
	_, err := tproxy.Build(cfg, m.probe(cfg.Needs()))
	if _, ok := errors.AsType[*tproxy.RefusedError](err); !ok || !strings.Contains(err.Error(), "dnsmasq at 127.0.0.1 (process 300, UID 0)") || !strings.Contains(err.Error(), "leave 127.0.0.1 the only nameserver") {
		t.Errorf("%v", err)
	}
}

func TestProbeResolvConf(t *testing.T) {
	cfg := tproxy.Config{DNS: tproxy.DNS{Redirect: true, ResolvConf: "/run/resolv.conf"}}
	m := newProbed(t)
	h := m.probe(cfg.Needs())
	if !slices.Contains(h.Notes, "/run/resolv.conf does not exist: it names no nameserver") {
		t.Errorf("notes %q", h.Notes)
	}
	m.unreads = &fs.PathError{Op: "open", Path: "/run/resolv.conf", Err: fs.ErrPermission}
	if _, err := (&Runner{machine: m}).Probe(context.Background(), cfg.Needs()); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "nameservers: open /run/resolv.conf") {
		t.Errorf("%v", err)
	}
	// Where DNS is not redirected nobody looks.
	m.probe(tproxy.Config{}.Needs())
}

func TestProbeWithoutProc(t *testing.T) {
	m := newProbed(t)
	if err := os.Remove(filepath.Join(m.proc, "thread-self", "net", "tcp")); err != nil {
		t.Fatal(err)
	}
	if _, err := (&Runner{machine: m}).Probe(context.Background(), tproxy.Config{}.Needs()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without knowing who listens nobody is safe: %v", err)
	}
}

// K4: a dry run of Kuma's adds ::6 to lo.
func TestK4LookingWritesNothing(t *testing.T) {
	m := newProbed(t)
	m.populate(t)
	before, writes := m.state(), m.writes
	for _, c := range configs {
		m.plan(t, c)
	}
	m.unchanged(t, before)
	if m.writes != writes || len(m.addresses) > 0 || len(m.commands) > 0 {
		t.Errorf("%d writes, %v, %v", m.writes-writes, m.addresses, m.commands)
	}
}
