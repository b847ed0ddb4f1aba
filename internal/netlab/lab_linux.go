package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The addresses of the lab.
var (
	Client4    = netip.MustParseAddr("10.0.0.1")
	Client6    = netip.MustParseAddr("fd00::1")
	Host4      = netip.MustParseAddr("10.0.0.2")
	Host6      = netip.MustParseAddr("fd00::2")
	Internet4  = netip.MustParseAddr("93.184.216.34")
	Internet6  = netip.MustParseAddr("2606:2800:220:1::1")
	Resolver4  = netip.MustParseAddr("8.8.8.8")
	Resolver6  = netip.MustParseAddr("2001:4860:4860::8888")
	Bridge4    = netip.MustParseAddr("172.17.0.1")
	Bridge6    = netip.MustParseAddr("fd01::1")
	Container4 = netip.MustParseAddr("172.17.0.2")
	Container6 = netip.MustParseAddr("fd01::2")
)

// Namespace is a network namespace, held open by a file descriptor.
type Namespace struct {
	name string
	file *os.File
}

func (n *Namespace) String() string { return n.name }

// Path is the namespace as a file, while the lab is open: for ip(8) and nsenter(1).
func (n *Namespace) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

// Lab is a host, another host and perhaps a container.
type Lab struct {
	Host, Client *Namespace
	Container    *Namespace // nil before AddContainer

	mu      sync.Mutex
	closers []func()
}

// New makes a lab, empty of rules and of conntrack. Close it.
func New(ctx context.Context) (*Lab, error) {
	if absent != nil {
		return nil, absent
	}
	l := &Lab{}
	var err error
	if l.Host, err = l.namespace("host"); err == nil {
		l.Client, err = l.namespace("client")
	}
	if err == nil {
		// Ends with one index each: the kernel takes its time, up to a second, with
		// the carrier of a link that seems to be its own peer (linkwatch_urgent_event,
		// net/core/link_watch.c), and IPv6 waits for it.
		err = l.ip(ctx, l.Host,
			"link add eth0 index 10 type veth peer name eth0 index 20 netns "+l.Client.Path(),
			"address add 10.0.0.2/24 dev eth0",
			"address add fd00::2/64 dev eth0 nodad",
			"link set eth0 up")
	}
	if err == nil {
		err = l.ip(ctx, l.Client,
			"address add 10.0.0.1/24 dev eth0",
			"address add fd00::1/64 dev eth0 nodad",
			"address add 93.184.216.34/32 dev lo",
			"address add 8.8.8.8/32 dev lo",
			"address add 2606:2800:220:1::1/128 dev lo nodad",
			"address add 2001:4860:4860::8888/128 dev lo nodad",
			"link set eth0 up")
	}
	if err == nil {
		err = l.ip(ctx, l.Host, "route add default via 10.0.0.1", "route add default via fd00::1")
	}
	if err == nil {
		err = errors.Join(l.Settle(l.Host), l.Settle(l.Client))
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Settle waits for what the kernel does a little later than it says: the address
// of the link, and the routes to IPv6 addresses (addrconf_dad_start,
// net/ipv6/addrconf.c).
func (l *Lab) Settle(n *Namespace) error {
	return l.In(n, func() error {
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			addresses, err := os.ReadFile("/proc/thread-self/net/if_inet6")
			if errors.Is(err, fs.ErrNotExist) {
				return nil // there is no IPv6
			}
			routes, err2 := os.ReadFile("/proc/thread-self/net/ipv6_route")
			if err = errors.Join(err, err2); err != nil {
				return err
			}
			local := 0
			for line := range bytes.Lines(routes) {
				// RTF_LOCAL (linux/ipv6_route.h) is the highest bit of the flags.
				if f := bytes.Fields(line); len(f) > 8 && f[8][0] >= '8' {
					local++
				}
			}
			if bytes.Contains(addresses, []byte("fe80")) && local >= bytes.Count(addresses, []byte("\n")) {
				return nil
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("IPv6 of %s does not settle:\n%s%s", n, addresses, routes)
			}
		}
	})
}

// AddContainer puts a container behind a bridge of the host, as Docker does, and
// lets the host forward. Rules are the caller's.
func (l *Lab) AddContainer(ctx context.Context) (err error) {
	if l.Container, err = l.namespace("container"); err != nil {
		return err
	}
	if err := l.ip(ctx, l.Host,
		"link add br0 type bridge",
		"link add veth0 index 30 type veth peer name eth0 index 40 netns "+l.Container.Path(),
		"link set veth0 master br0",
		"address add 172.17.0.1/16 dev br0",
		"address add fd01::1/64 dev br0 nodad",
		"link set veth0 up",
		"link set br0 up"); err != nil {
		return err
	}
	if err := l.ip(ctx, l.Container,
		"address add 172.17.0.2/16 dev eth0",
		"address add fd01::2/64 dev eth0 nodad",
		"link set eth0 up",
		"route add default via 172.17.0.1",
		"route add default via fd01::1"); err != nil {
		return err
	}
	for _, key := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if err := l.Sysctl(l.Host, key, "1"); err != nil {
			return err
		}
	}
	return errors.Join(l.Settle(l.Host), l.Settle(l.Container))
}

// Close ends every server of the lab and every process that was started in its
// namespaces, and lets go of them.
func (l *Lab) Close() {
	for _, n := range []*Namespace{l.Host, l.Client, l.Container} {
		if n != nil {
			l.end(n)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := len(l.closers) - 1; i >= 0; i-- {
		l.closers[i]()
	}
	l.closers = nil
}

// end kills the processes in the namespace, other than this one. What they start
// meanwhile is there at the next look.
func (l *Lab) end(n *Namespace) {
	var here string
	if l.In(n, func() (err error) { here, err = os.Readlink("/proc/thread-self/ns/net"); return err }) != nil {
		return // closed already
	}
	for range 10 {
		found := false
		links, _ := filepath.Glob("/proc/[0-9]*/ns/net")
		for _, link := range links {
			pid, err := strconv.Atoi(strings.Split(link, "/")[2])
			if there, _ := os.Readlink(link); there != here || err != nil || pid == os.Getpid() {
				continue
			}
			found = syscall.Kill(pid, syscall.SIGKILL) == nil || found
		}
		if !found {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func (l *Lab) onClose(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closers = append(l.closers, f)
}

func (l *Lab) namespace(name string) (*Namespace, error) {
	n := &Namespace{name: name}
	err := elsewhere(func() error { return syscall.Unshare(syscall.CLONE_NEWNET) }, func() (err error) {
		if n.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		// No duplicate address detection: an address works at once.
		return errors.Join(write("net/ipv6/conf/default/accept_dad", "0"), write("net/ipv6/conf/all/accept_dad", "0"))
	})
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", name, err)
	}
	l.onClose(func() { _ = n.file.Close() })
	return n, l.ip(context.Background(), n, "link set lo up")
}

// Of is the namespace that a process is in.
func (l *Lab) Of(name string, pid int) (*Namespace, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, err
	}
	l.onClose(func() { _ = file.Close() })
	return &Namespace{name: name, file: file}, nil
}

// In runs f in the namespace, on the calling goroutine.
func (l *Lab) In(n *Namespace, f func() error) error {
	return elsewhere(func() error { return setns(n.file) }, f)
}

// elsewhere runs f between a change of the calling thread's network namespace and
// the way back.
func elsewhere(enter, f func() error) error {
	runtime.LockOSThread()
	back, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer back.Close()
	defer func() {
		// A thread that cannot go back stays locked, and ends with its goroutine.
		if setns(back) == nil {
			runtime.UnlockOSThread()
		}
	}()
	if err := enter(); err != nil {
		return err
	}
	return f()
}

// setns changes the calling thread's network namespace. The file answers with an
// error once it is closed: its number may be another file's by then.
func setns(file *os.File) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var errno syscall.Errno
	err = raw.Control(func(fd uintptr) {
		_, _, errno = syscall.RawSyscall(sysSetns, fd, syscall.CLONE_NEWNET, 0)
	})
	if err == nil && errno != 0 {
		err = errno
	}
	if err != nil {
		return fmt.Errorf("setns: %w", err)
	}
	return nil
}

// As runs f, on the calling goroutine, so that the sockets it opens belong to the
// user and the group: iptables' owner match looks at the filesystem UID that a
// socket was opened with (owner_mt, net/netfilter/xt_owner.c). All capabilities
// but those on files stay, so that f may bind port 53 for anybody.
//
// A process of the user's is another thing: see syscall.Credential.
func As(uid, gid uint32, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer setfsid(0, 0)
	if !setfsid(uid, gid) {
		return fmt.Errorf("UID %d or GID %d: not mapped in this user namespace", uid, gid)
	}
	return f()
}

// HasUID reports whether the user exists in this user namespace, so that rules can
// name it and sockets be its own.
func HasUID(uid uint32) bool { return As(uid, 0, func() error { return nil }) == nil }

// setfsid is setfsuid(2), which tells of failure only when it is asked what it did.
func setfsid(uid, gid uint32) bool {
	const ask = ^uintptr(0)
	syscall.RawSyscall(syscall.SYS_SETFSGID, uintptr(gid), 0, 0)
	syscall.RawSyscall(syscall.SYS_SETFSUID, uintptr(uid), 0, 0)
	g, _, _ := syscall.RawSyscall(syscall.SYS_SETFSGID, ask, 0, 0)
	u, _, _ := syscall.RawSyscall(syscall.SYS_SETFSUID, ask, 0, 0)
	return uint32(u) == uid && uint32(g) == gid
}

// Run runs a program in the namespace and returns what it printed; the error holds
// what it printed to stderr.
func (l *Lab) Run(ctx context.Context, n *Namespace, stdin, name string, args ...string) (string, error) {
	var out, errOut bytes.Buffer
	cmd := osexec.CommandContext(ctx, name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errOut
	if err := l.In(n, cmd.Start); err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(errOut.Bytes()))
	}
	return out.String(), nil
}

func (l *Lab) ip(ctx context.Context, n *Namespace, lines ...string) error {
	_, err := l.Run(ctx, n, strings.Join(lines, "\n")+"\n", "ip", "-batch", "-")
	return err
}

// Sysctl writes a key, such as net/ipv4/ip_forward, of the namespace.
func (l *Lab) Sysctl(n *Namespace, key, value string) error {
	return l.In(n, func() error { return write(key, value) })
}

// write writes below /proc/sys, where net is the calling thread's namespace
// (net_ctl_root, net/sysctl_net.c).
func write(key, value string) error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0) }
