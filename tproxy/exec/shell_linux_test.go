package exec_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// probeMarker makes the test binary print the ways into the host, as it finds them
// where it was started.
const probeMarker = "TPROXY_EXEC_PROBE_SHELLS"

func probeShells() int {
	h, err := new(exec.Runner).Probe(context.Background(), tproxy.Needs{RemoteShells: true})
	if err != nil {
		fmt.Println("error:", err)
		return 1
	}
	for _, s := range h.RemoteShells {
		fmt.Println("way in:", s.Port, s.Why)
	}
	return 0
}

// sshServer is a real sshd on the lab's host, with keys and a configuration of its
// own.
type sshServer struct {
	w   *world
	dir string
}

func (w *world) sshd(ports ...int) *sshServer {
	w.Helper()
	netlab.Require(w.T, "ssh", "ssh-keygen", "/usr/sbin/sshd")
	if !netlab.HasUID(rules.MaxUID) {
		w.Skip("sshd reads /etc/shadow, which takes root and not a user namespace")
	}
	s := &sshServer{w: w, dir: w.TempDir()}
	s.unlockRoot()
	for _, name := range []string{"host", "user"} {
		if out, err := osexec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(s.dir, name)).CombinedOutput(); err != nil {
			w.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	var conf strings.Builder
	for _, p := range ports {
		fmt.Fprintf(&conf, "Port %d\n", p)
	}
	fmt.Fprintf(&conf, "HostKey %[1]s/host\nAuthorizedKeysFile %[1]s/user.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nPrintMotd no\n", s.dir)
	if err := os.WriteFile(filepath.Join(s.dir, "conf"), []byte(conf.String()), 0o600); err != nil {
		w.Fatal(err)
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // the lab's own /run
		w.Fatal(err)
	}
	cmd := osexec.Command("/usr/sbin/sshd", "-D", "-e", "-f", filepath.Join(s.dir, "conf"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := os.Create(filepath.Join(s.dir, "log"))
	if err != nil {
		w.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	// Its parent is a thread that lives on: Pdeathsig is about the thread.
	if err := w.In(w.Host, cmd.Start); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		// The sessions end with the lab.
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if w.Failed() {
			text, _ := os.ReadFile(log.Name())
			w.Logf("sshd said: %s", text)
		}
	})
	for _, p := range ports {
		w.until(func() bool {
			seen, err := w.Dial(w.Host, 0, "tcp", netip.AddrPort{}, netip.AddrPortFrom(netlab.Host4, uint16(p)))
			return err != nil || seen.Who != netlab.Refused // it does not speak the lab's language
		})
	}
	return s
}

// unlockRoot covers /etc/shadow, in the lab's mount namespace, where root's account
// is locked by a '!' (sshd(8), LOGIN PROCESS), as on Ubuntu.
func (s *sshServer) unlockRoot() {
	s.w.Helper()
	text, err := os.ReadFile("/etc/shadow")
	if err != nil || !strings.Contains("\n"+string(text), "\nroot:!") {
		return
	}
	unlocked := strings.Replace("\n"+string(text), "\nroot:!", "\nroot:*", 1)[1:]
	path := filepath.Join(s.dir, "shadow")
	if err := os.WriteFile(path, []byte(unlocked), 0o600); err != nil {
		s.w.Fatal(err)
	}
	if err := syscall.Mount(path, "/etc/shadow", "", syscall.MS_BIND, ""); err != nil {
		s.w.Fatal(err)
	}
	s.w.Cleanup(func() { _ = syscall.Unmount("/etc/shadow", syscall.MNT_DETACH) })
}

func (w *world) until(done func() bool) {
	w.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.Fatal("it does not happen within 10 s")
		}
	}
}

// session is a command that runs on the host, seen from the client.
type session struct {
	w     *world
	cmd   *osexec.Cmd
	stdin io.Writer
	lines chan string // closed when the session has ended
	fifo  string
}

// login opens a session from the client. Its shell says what is written to the
// session's fifo, or to its standard input, and runs nothing else.
func (s *sshServer) login(host netip.Addr, port int) *session {
	s.w.Helper()
	c := s.open(host, port, "")
	c.fifo = filepath.Join(c.w.TempDir(), "fifo")
	if err := syscall.Mkfifo(c.fifo, 0o600); err != nil {
		s.w.Fatal(err)
	}
	fmt.Fprintf(c.stdin, "(while :; do cat %s; done) & echo ready\n", c.fifo)
	c.expect("ready")
	return c
}

// open runs a command, or a shell.
func (s *sshServer) open(host netip.Addr, port int, command string) *session {
	w := s.w
	w.Helper()
	args := []string{"-F", "/dev/null", "-i", filepath.Join(s.dir, "user"), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
		"-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-T", "-p", fmt.Sprint(port), "root@" + host.String()}
	if command == "" {
		command = "exec sh"
	}
	c := &session{w: w, cmd: osexec.Command("ssh", append(args, command)...), lines: make(chan string, 100)}
	in, err := c.cmd.StdinPipe()
	if err != nil {
		w.Fatal(err)
	}
	c.stdin = in
	read, write := io.Pipe()
	c.cmd.Stdout, c.cmd.Stderr = write, write
	if err := w.In(w.Client, c.cmd.Start); err != nil {
		w.Fatal(err)
	}
	go func() { _ = c.cmd.Wait(); _ = write.Close() }()
	go func() {
		defer close(c.lines)
		for scan := bufio.NewScanner(read); scan.Scan(); {
			c.lines <- scan.Text()
		}
	}()
	w.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		for range c.lines { // until it has ended
		}
	})
	return c
}

// says reports whether the session says so within the time.
func (c *session) says(text string, within time.Duration) bool {
	late := time.After(within)
	for {
		select {
		case line, open := <-c.lines:
			if line == text || !open {
				return open
			}
		case <-late:
			return false
		}
	}
}

func (c *session) expect(text string) {
	c.w.Helper()
	if !c.says(text, 10*time.Second) {
		c.w.Fatalf("the session does not say %q", text)
	}
}

// serverSpeaks makes the server be the first to send.
func (c *session) serverSpeaks(text string) {
	c.w.Helper()
	// A writer that finds no reader goes away again: the shell may be gone.
	f, err := os.OpenFile(c.fifo, os.O_RDWR, 0)
	if err != nil {
		c.w.Fatal(err)
	}
	c.w.Cleanup(func() { _ = f.Close() }) // not before it was read
	if _, err := f.WriteString(text + "\n"); err != nil {
		c.w.Fatal(err)
	}
}

// alive fails unless the session works in both directions, the server first.
func (c *session) alive(when string) {
	c.w.Helper()
	c.serverSpeaks("server " + when)
	c.expect("server " + when)
	fmt.Fprintf(c.stdin, "echo client %s\n", when)
	c.expect("client " + when)
}

// connection is a plain one, whose server echoes.
type connection struct {
	net.Conn
	peer net.Conn
}

// connect opens one from a user of one namespace to a server in the other.
func (w *world) connect(from, to *netlab.Namespace, uid uint32, dst netip.AddrPort) connection {
	w.Helper()
	var l net.Listener
	var c connection
	var err error
	if err = w.In(to, func() error { l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(dst)); return err }); err != nil {
		w.Fatal(err)
	}
	defer l.Close()
	err = w.In(from, func() error {
		return netlab.As(uid, uid, func() error { c.Conn, err = net.DialTimeout("tcp", dst.String(), 5*time.Second); return err })
	})
	if err == nil {
		c.peer, err = l.Accept()
	}
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = c.Close(); _ = c.peer.Close() })
	return c
}

// says reports what keeps a word from getting from a to b.
func says(a, b net.Conn) error {
	_ = a.SetDeadline(time.Now().Add(time.Second))
	_ = b.SetDeadline(time.Now().Add(time.Second))
	if _, err := io.WriteString(a, "word"); err != nil {
		return err
	}
	_, err := io.ReadFull(b, make([]byte, 4))
	return err
}

func (c connection) alive(w *world, when string) {
	w.Helper()
	// The server first, then the client.
	if err := errors.Join(says(c.peer, c.Conn), says(c.Conn, c.peer)); err != nil {
		w.Errorf("%s > %s, %s: %v", c.LocalAddr(), c.RemoteAddr(), when, err)
	}
}

// handWritten are rules as a tutorial has them: no --syn, and 22 is not excluded.
var handWritten = []string{
	"-t nat -A PREROUTING -p tcp -j REDIRECT --to-ports 15006",
	"-t nat -A OUTPUT -p tcp -m owner ! --uid-owner 5678 ! -o lo -j REDIRECT --to-ports 15001",
}

// K1: connections from before the install, the SSH session of who installs first
// of all, live through install, re-install and uninstall, on a host that had no
// conntrack (with the rules that one writes by hand they die: the test below).
// Redirected ones live through another install.
func TestConnectionsLiveThroughInstallAndUninstall(t *testing.T) {
	eachBackend(t, func(w *world) {
		server := w.sshd(22, 2222)
		p := w.proxy(netlab.Pass)
		var sessions []*session
		var plain []connection
		open := func() {
			w.Helper()
			for i := range 2 {
				plain = append(plain,
					w.connect(w.Client, w.Host, 0, netip.AddrPortFrom(places["host"][i], 80)),
					w.connect(w.Host, w.Client, appUID, netip.AddrPortFrom(places["internet"][i], 443)))
			}
		}
		alive := func(when string) {
			w.Helper()
			for _, s := range sessions {
				s.alive(when)
			}
			for _, c := range plain {
				c.alive(w, when)
			}
		}
		for i := range 2 {
			sessions = append(sessions, server.login(places["host"][i], 22), server.login(places["host"][i], 2222))
		}
		open()
		alive("before")
		w.install(tproxy.Config{})
		alive("after the install")
		old := plain
		open()
		if p.Ins.Count() != 2 || p.Outs.Count() != 2 {
			w.Errorf("the proxy was sent %d and %d connections; want 2 and 2", p.Ins.Count(), p.Outs.Count())
		}
		w.install(tproxy.Config{Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("81")}, DNS: tproxy.DNS{CaptureAll: true}})
		alive("after another install")
		// What it redirects now, it redirected before, and what is excluded from now
		// on goes on by the way that it took.
		w.install(tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("80")}, Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("443")}})
		alive("after an install that excludes them")
		w.uninstall()
		plain = old
		alive("after the uninstall")
	})
}

func TestHandWrittenRulesKillTheSession(t *testing.T) {
	eachVariant(t, func(w *world) {
		server := w.sshd(22)
		w.proxy(netlab.Answer)
		s := server.login(netlab.Host4, 22)
		c := w.connect(w.Client, w.Host, 0, netip.AddrPortFrom(netlab.Host4, 80))
		s.alive("before")
		w.iptables(handWritten...)
		s.serverSpeaks("after")
		if s.says("after", time.Second) {
			w.Error("the session lives on: the tests that one does under our rules show nothing")
		}
		if err := says(c.peer, c.Conn); err == nil {
			w.Error("the connection lives on")
		}
	})
}

// A session through another port than 22 would be captured: the install is refused
// and changes nothing, unless the port is excluded.
func TestInstallRefusesToCaptureTheWayIn(t *testing.T) {
	eachBackend(t, func(w *world) {
		w.operated = true
		server := w.sshd(22, 2222)
		w.proxy(netlab.Answer)
		s := server.login(netlab.Host4, 2222)
		before := w.tables()
		_, err := w.plan(tproxy.Config{})
		refused, ok := errors.AsType[*tproxy.RefusedError](err)
		if !ok || len(refused.Reasons) != 1 || !strings.Contains(refused.Reasons[0].What, "port 2222 ") || !strings.Contains(refused.Reasons[0].Remedy, "--exclude-inbound-ports 2222") {
			w.Errorf("%v; want a refusal that names 2222 and no other", err)
		}
		w.same("the tables", before, w.tables())
		w.install(tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("2222")}})
		s.alive("after the install")
		// A new one, too.
		server.login(netlab.Host4, 2222).alive("new")
		_, err = w.plan(tproxy.Config{Inbound: tproxy.Inbound{CaptureSSH: true, ExcludePorts: rules.MustPorts("2222")}})
		if !strings.Contains(fmt.Sprint(err), "port 22 ") {
			w.Errorf("--capture-ssh with somebody on 22: %v", err)
		}
	})
}

// sudo takes SSH_CONNECTION out of the environment: the session is found in an
// ancestor's.
func TestSessionIsFoundBehindSudo(t *testing.T) {
	netlab.Require(t, "sudo")
	w := newWorld(t, tproxy.IPTablesNFT)
	self, err := os.Executable()
	if err != nil {
		w.Fatal(err)
	}
	server := w.sshd(22, 2222)
	for _, prefix := range []string{"", "sudo -n env -i "} {
		command := fmt.Sprintf("read go; %senv %s=1 %s; :", prefix, probeMarker, self)
		c := server.open(netlab.Host4, 2222, "echo ready; "+command)
		c.expect("ready")
		fmt.Fprintln(c.stdin, "go")
		var out []string
		found := false
		for line := range c.lines {
			out = append(out, line)
			found = found || strings.HasPrefix(line, "way in: 2222 SSH_CONNECTION of ")
		}
		if !found {
			w.Errorf("%q: %q", command, out)
		}
	}
}
