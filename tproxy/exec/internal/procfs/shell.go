package procfs

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// RemoteShell is a port that somebody may be logged in through.
type RemoteShell struct {
	Port uint16
	// Why holds all the reasons, joined by "; ".
	Why string
}

// sshServers are the programs that a login comes through. OpenSSH 9.8 split
// sshd-session off sshd, and 10.0 sshd-auth; a session listens too, for what
// is forwarded to it.
var sshServers = []string{"sshd", "sshd-session", "sshd-auth", "dropbear", "tinysshd"}

// socketUnits start an SSH server on demand: Debian's name and Fedora's.
var socketUnits = []string{"ssh.socket", "sshd.socket"}

// RemoteShells returns the ports of the calling thread's network namespace
// through which somebody is, or could log, in by SSH, by rising port:
//
//   - the server's port in SSH_CONNECTION (ssh(1)) of this process, or of an
//     ancestor in the same network namespace, because sudo drops it from ours
//     (env_reset, sudoers(5)); only the nearest process that has it is named;
//   - where an SSH server listens;
//   - the ports of ssh.socket and sshd.socket that somebody listens on: with
//     socket activation (systemd.socket(5)) there need be no server yet.
//
// partial says that some process could not be looked at. With an error, what
// was found before is still returned.
func (f FS) RemoteShells() (shells []RemoteShell, partial bool, err error) {
	if err := f.supported(); err != nil {
		return nil, false, err
	}
	whys := map[uint16][]string{}
	add := func(port uint16, why string) {
		if !slices.Contains(whys[port], why) {
			whys[port] = append(whys[port], why)
		}
	}
	partial = f.shellsOfSessions(whys, add)
	hidden, err := f.shellsOfListeners(add)
	partial = partial || hidden

	for port, why := range whys {
		shells = append(shells, RemoteShell{Port: port, Why: strings.Join(why, "; ")})
	}
	slices.SortFunc(shells, func(a, b RemoteShell) int { return cmp.Compare(a.Port, b.Port) })
	return shells, partial, err
}

func (f FS) shellsOfSessions(known map[uint16][]string, add func(uint16, string)) (partial bool) {
	if port, ok := sshServerPort(os.Getenv("SSH_CONNECTION")); ok {
		add(port, "SSH_CONNECTION of this process")
	}
	self := f.self()
	for _, pid := range f.Ancestors(self) {
		if pid == self {
			continue
		}
		same, err := f.sameNetNS(pid)
		value := ""
		if same {
			value, _, err = f.environ(pid, "SSH_CONNECTION")
		}
		if errors.Is(err, fs.ErrPermission) {
			partial = true
		}
		if port, ok := sshServerPort(value); ok && len(known[port]) == 0 {
			add(port, fmt.Sprintf("SSH_CONNECTION of process %d (%s)", pid, f.comm(pid)))
		}
	}
	return partial
}

// sshServerPort takes the last of SSH_CONNECTION's four words: client address
// and port, server address and port. sshd writes UNKNOWN for the addresses of
// what is no TCP connection; its ports mean nothing.
func sshServerPort(value string) (uint16, bool) {
	words := strings.Fields(value)
	if len(words) != 4 {
		return 0, false
	}
	for _, i := range []int{0, 2} {
		if a, err := netip.ParseAddr(words[i]); err != nil || a.Unmap().IsLoopback() {
			return 0, false // over loopback nothing is captured inbound
		}
		if _, ok := parsePort(words[i+1]); !ok {
			return 0, false
		}
	}
	return parsePort(words[3])
}

func parsePort(s string) (uint16, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil && n > 0
}

func (f FS) shellsOfListeners(add func(uint16, string)) (partial bool, err error) {
	sockets, err := f.listeningTCP()
	if err != nil {
		return false, err
	}
	// Nothing from another host reaches a socket on loopback, such as that of a
	// forwarded port.
	sockets = slices.DeleteFunc(sockets, func(s Socket) bool { return s.Local.Addr().Unmap().IsLoopback() })
	// The kernel lists by hash bucket: sorted, the reasons do not change places.
	slices.SortFunc(sockets, func(a, b Socket) int {
		return cmp.Or(a.Local.Addr().Compare(b.Local.Addr()), cmp.Compare(a.Local.Port(), b.Local.Port()), cmp.Compare(a.Inode, b.Inode))
	})
	inodes := map[uint64]bool{}
	ports := map[uint16]bool{}
	for _, s := range sockets {
		inodes[s.Inode] = true
		ports[s.Local.Port()] = true
	}
	// Only servers' sockets are looked at: there are many others.
	isServer := func(p Process) bool {
		_, ok := sshServer(p)
		return ok
	}
	owners, partial, err := f.ownersAmong(inodes, isServer)
	for _, s := range sockets {
		for _, p := range owners[s.Inode] {
			name, _ := sshServer(p)
			add(s.Local.Port(), fmt.Sprintf("%s (pid %d) listens on %s", name, p.PID, s.Local))
		}
	}
	for _, unit := range socketUnits {
		for _, l := range f.listenStreams(unit) {
			// A unit that is not started, or is another namespace's, listens on
			// nothing here.
			if ports[l.port] {
				add(l.port, fmt.Sprintf("%s has ListenStream=%s", unit, l.text))
			}
		}
	}
	return partial, err
}

// sshServer knows a server by its program, or by its name where the program is
// one of many names (dropbearmulti).
func sshServer(p Process) (name string, ok bool) {
	for _, name := range []string{filepath.Base(p.Exe), p.Comm} {
		if slices.Contains(sshServers, name) {
			return name, true
		}
	}
	return "", false
}

type listenStream struct {
	text string
	port uint16
}

// listenStreams returns the TCP ports that a socket unit is to listen on, as
// systemd.unit(5) has it: the first folder's file, then the drop-ins of all
// folders by file name, of equal names the first folder's.
func (f FS) listenStreams(unit string) []listenStream {
	dirs := f.UnitDirs
	if dirs == nil {
		dirs = DefaultUnitDirs()
	}
	var main []byte
	for _, dir := range dirs {
		path := filepath.Join(dir, unit)
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if to, err := os.Readlink(path); err == nil && filepath.Base(to) != unit && slices.Contains(socketUnits, filepath.Base(to)) {
			return nil // an alias: read under its own name, with its own drop-ins
		}
		main = text
		break
	}
	if len(main) == 0 {
		return nil // there is none, or it is masked (empty or /dev/null)
	}
	dropins := map[string]string{}
	for _, dir := range dirs {
		paths, _ := filepath.Glob(filepath.Join(dir, unit+".d", "*.conf"))
		for _, path := range paths {
			if _, ok := dropins[filepath.Base(path)]; !ok {
				dropins[filepath.Base(path)] = path
			}
		}
	}
	names := make([]string, 0, len(dropins))
	for name := range dropins {
		names = append(names, name)
	}
	slices.Sort(names)
	list := parseListenStreams(nil, string(main))
	for _, name := range names {
		if text, err := os.ReadFile(dropins[name]); err == nil {
			list = parseListenStreams(list, string(text))
		}
	}
	return list
}

// parseListenStreams appends what one file says to the list (systemd.syntax(7)).
func parseListenStreams(list []listenStream, text string) []listenStream {
	text = strings.ReplaceAll(text, "\\\n", " ")
	section := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			section = line
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !ok || section != "[Socket]" || !strings.HasPrefix(key, "Listen") {
			continue
		}
		if value == "" {
			// systemd.socket(5): an empty one of any Listen* resets them all.
			list = nil
			continue
		}
		if port, ok := streamPort(value); key == "ListenStream" && ok {
			list = append(list, listenStream{value, port})
		}
	}
	return list
}

// streamPort reads the forms of ListenStream= that are TCP: 22, 0.0.0.0:22,
// [::]:22, [fe80::1]:22%eth0. A path, an abstract name or a vsock has no port.
func streamPort(value string) (uint16, bool) {
	value, _, _ = strings.Cut(value, "%")
	if port, ok := parsePort(value); ok {
		return port, true
	}
	ap, err := netip.ParseAddrPort(value)
	return ap.Port(), err == nil && ap.Port() > 0
}

// Container says whether this process runs in an application container, which
// has no SSH of its own to protect, and how that is known. Docker's
// /.dockerenv is not asked: images of whole hosts have it too.
func (f FS) Container() (is bool, why string) {
	if os.Getenv("KUBERNETES_SERVICE_HOST") != "" {
		return true, "KUBERNETES_SERVICE_HOST is set"
	}
	root := f.FileRoot
	if root == "" {
		root = "/"
	}
	// podman-run(1) makes it in every container.
	if _, err := os.Stat(filepath.Join(root, "run", ".containerenv")); err == nil {
		return true, "/run/.containerenv exists"
	}
	// systemd's container interface; systemd-nspawn and lxc, which run whole
	// hosts, set it to their own names.
	if name := os.Getenv("container"); name == "docker" || name == "podman" || name == "oci" {
		return true, "container=" + name
	}
	return false, ""
}
