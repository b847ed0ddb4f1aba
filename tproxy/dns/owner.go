package dns

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
)

// Mode is who manages a resolv.conf.
type Mode int

// The owners. Nobody and BindMount leave the file to us.
const (
	// Nobody writes the file but people.
	Nobody Mode = iota
	// BindMount is a file that a container runtime, ip-netns(8) or somebody else
	// mounts over the path: it is this container's own.
	BindMount
	// HostMount is such a mount of the host's own file: what is written here is
	// written there.
	HostMount
	// ResolvedStub, ResolvedStatic and ResolvedUplink are the modes of
	// systemd-resolved.service(8) in which it provides the file: with its own
	// address and search list, with its own address alone, with its servers. In
	// its fourth, foreign, it reads the file like everybody else: then the owner is
	// another, and a clue says so.
	ResolvedStub
	ResolvedStatic
	ResolvedUplink
	// NetworkManager writes the file (NetworkManager.conf(5), rc-manager).
	NetworkManager
	// Openresolv and DebianResolvconf are the two programs named resolvconf(8).
	Openresolv
	DebianResolvconf
	// Dhclient, Dhcpcd and Udhcpc are clients of DHCP whose scripts write the file.
	Dhclient
	Dhcpcd
	Udhcpc
	// Netconfig is SUSE's netconfig(8).
	Netconfig
	ConnMan
	Tailscale
	// WSL is the Windows Subsystem for Linux.
	WSL
	// Somebody is a program that the file itself tells of, and we do not know.
	Somebody
)

var modeNames = [...]string{
	"nobody", "a bind mount", "a bind mount of the host's file",
	"systemd-resolved (stub)", "systemd-resolved (static stub)", "systemd-resolved (uplink)",
	"NetworkManager", "openresolv", "Debian's resolvconf", "dhclient", "dhcpcd", "udhcpc",
	"netconfig", "ConnMan", "Tailscale", "WSL", "a program that we do not know",
}

func (m Mode) String() string {
	if m < 0 || int(m) >= len(modeNames) {
		return fmt.Sprintf("mode %d", int(m))
	}
	return modeNames[m]
}

// Ours reports whether we may edit the file.
func (m Mode) Ours() bool { return m == Nobody || m == BindMount }

// Clue is a step on the way to an owner.
type Clue struct {
	Where string // a path, or a process
	What  string // what was seen there
}

func (c Clue) String() string { return c.Where + ": " + c.What }

// Env is what Owner looks at.
type Env struct {
	// Path is the absolute path of the file, such as /etc/resolv.conf.
	Path string
	View View
	// Mounts are those of this process.
	Mounts []Mount
	// Program returns the path of a program, "" where there is none. Running
	// reports whether a process has that name in /proc/PID/comm, of at most 15
	// bytes. Nil means that there is none.
	Program func(name string) string
	Running func(comm string) bool
}

// DefaultPath is the file that the C library reads. Daemons write to no other.
const DefaultPath = "/etc/resolv.conf"

// Owner says who manages a resolv.conf, and how that is known: where the path
// leads and what is mounted there, then what the head of the file says, then
// whom the nameservers belong to, then which daemons run. A header alone is no
// owner: it outlives the program that wrote it, so the program has to be there.
//
// The error is for a file that cannot be looked at, or is none.
func Owner(env Env) (Mode, []Clue, error) {
	t := trail{Env: env}
	mode, err := t.owner()
	return mode, t.clues, err
}

// trail collects clues.
type trail struct {
	Env
	place
	text  []byte
	clues []Clue
}

func (t *trail) note(where, format string, args ...any) {
	if c := (Clue{where, fmt.Sprintf(format, args...)}); !slices.Contains(t.clues, c) {
		t.clues = append(t.clues, c)
	}
}

func (t *trail) program(name string) string {
	if t.Program == nil {
		return ""
	}
	return t.Program(name)
}

func (t *trail) running(comm string) bool { return t.Running != nil && t.Running(comm) }

func (t *trail) owner() (Mode, error) {
	var err error
	if t.place, err = find(t.View, t.Path); err != nil {
		return Nobody, err
	}
	if t.text, err = t.place.read(t.View); err != nil {
		return Nobody, err
	}
	for _, l := range t.links {
		t.note(t.Path, "is a symbolic link: %s", l)
	}
	if m, ok := t.mounted(); ok {
		return m, nil
	}
	if m, ok := t.linked(); ok {
		return m, nil
	}
	if t.info.Kind == Missing {
		if len(t.links) > 0 {
			return Nobody, &FileError{Path: t.Path, What: "is a symbolic link to " + t.target + ", which does not exist", Remedy: "start what makes that file, or replace the link by a file"}
		}
		t.note(t.Path, "does not exist")
	}
	header := t.header()
	if m, ok := t.stub(); ok {
		return m, nil
	}
	if header != Nobody {
		if m, ok := t.here(header); ok {
			return m, nil
		}
	}
	if t.Path == DefaultPath {
		if m, ok := t.daemons(); ok {
			return m, nil
		}
	}
	t.note(t.Path, "no program manages it")
	return Nobody, nil
}

// mounted decides by a mount over the file itself.
func (t *trail) mounted() (Mode, bool) {
	m, ok := mountOf(t.Mounts, t.target)
	if !ok || m.Point != t.target || m.Point == "/" {
		return Nobody, false
	}
	t.note("mountinfo", "%s is mounted over %s", m, t.target)
	// The file that serves the host itself, in a place that is not the host:
	// podman run -v /etc/resolv.conf:/etc/resolv.conf, systemd-nspawn(1)
	// --resolv-conf=bind-stub.
	folder, _ := mountOf(t.Mounts, path.Dir(t.target))
	self := m.Device == folder.Device && m.Root == path.Join(folder.Root, strings.TrimPrefix(t.target, folder.Point))
	host := m.Root == DefaultPath || strings.Contains(m.Root+"/", "/systemd/resolve/") || strings.HasPrefix(m.Root, "/NetworkManager/") || strings.HasSuffix(m.Root, "/lib/systemd/resolv.conf")
	if host && !self {
		t.note("mountinfo", "%s is the path of a host's own file", m.Root)
		return HostMount, true
	}
	return BindMount, true
}

// linked decides by the folder that a symbolic link leads to.
func (t *trail) linked() (Mode, bool) {
	if len(t.links) == 0 {
		return Nobody, false
	}
	// /var/run is a link to /run, and /lib to /usr/lib, on all systems that have
	// these programs, even where the link dangles.
	target := t.target
	for _, from := range []string{"/var/run/", "/lib/"} {
		if rest, ok := strings.CutPrefix(target, from); ok {
			target = map[string]string{"/var/run/": "/run/", "/lib/": "/usr/lib/"}[from] + rest
		}
	}
	switch {
	case target == "/run/systemd/resolve/stub-resolv.conf":
		return ResolvedStub, true
	case target == "/run/systemd/resolve/resolv.conf":
		return ResolvedUplink, true
	case target == "/usr/lib/systemd/resolv.conf":
		return ResolvedStatic, true
	case strings.HasPrefix(target, "/run/NetworkManager/"):
		return NetworkManager, true
	case strings.HasPrefix(target, "/run/resolvconf/"), strings.HasPrefix(target, "/etc/resolvconf/run/"):
		if t.header() == WSL {
			return WSL, true
		}
		return t.resolvconf(), true
	case strings.HasPrefix(target, "/run/netconfig/"):
		return Netconfig, true
	case strings.HasPrefix(target, "/run/connman/"):
		return ConnMan, true
	}
	for _, made := range []string{"/run/", "/tmp/", "/dev/", "/etc/ppp/"} {
		if strings.HasPrefix(target, made) {
			t.note(t.target, "what stands in %s is made by a program", strings.TrimSuffix(made, "/"))
			return Somebody, true
		}
	}
	return Nobody, false
}

// resolvconf tells the two programs of that name apart. openresolv has one file
// of settings, Debian's a folder.
func (t *trail) resolvconf() Mode {
	if _, err := t.View.Lstat("/etc/resolvconf.conf"); err == nil {
		t.note("/etc/resolvconf.conf", "openresolv has its settings there")
		return Openresolv
	}
	return DebianResolvconf
}

// headers are what programs write at the head of the file, in lower case.
var headers = []struct {
	text string
	mode Mode
}{
	{"managed by man:systemd-resolved(8)", ResolvedUplink},
	{"generated by networkmanager", NetworkManager},
	{"generated by resolvconf(8)", DebianResolvconf},
	{"generated by resolvconf", Openresolv},
	{"# resolv.conf from ", Openresolv},
	{"dhclient-script", Dhclient},
	{"generated by dhcpcd", Dhcpcd},
	{"autogenerated by netconfig", Netconfig},
	{"generated by connection manager", ConnMan},
	{"generated by tailscale", Tailscale},
	{"automatically generated by wsl", WSL},
	// Docker leaves a file alone that somebody edited, and says so; cloud-init
	// writes once for each instance.
	{"generated by docker engine", Nobody},
	{"created by cloud-init", Nobody},
	{"--- begin pve ---", Somebody}, // Proxmox, at each start of a container
	{"do not edit", Somebody},
	{"be overwritten", Somebody},
	{"generated by", Somebody},
}

// header returns whom the head of the file names: the comments in front of the
// first line that is none. Below it people write, of programs too.
func (t *trail) header() Mode {
	c := Parse(t.text)
	drop := c.ours()
	found := Nobody
	for i, l := range c.Lines {
		text := strings.Trim(l.Text, white)
		switch {
		case drop[i] || text == "":
			continue
		case text[0] != '#' && text[0] != ';':
			return found
		}
		lower := strings.ToLower(text)
		for _, h := range headers {
			if !strings.Contains(lower, h.text) {
				continue
			}
			// A program that we know is more than one that we do not, and dhclient
			// writes below cloud-init.
			if found == Nobody || found == Somebody && h.mode != Nobody {
				if found != h.mode || h.mode == Nobody {
					t.note(t.target, "line %d: %q", l.Number, text)
				}
				found = h.mode
			}
			break
		}
	}
	return found
}

// stub decides by nameservers that are systemd-resolved's own addresses, whoever
// wrote them (tailscale issues 3026, 3304, 3531).
func (t *trail) stub() (Mode, bool) {
	servers := Parse(RemoveNameserver(t.text)).Nameservers
	for _, a := range servers {
		if a != netip.AddrFrom4([4]byte{127, 0, 0, 53}) && a != netip.AddrFrom4([4]byte{127, 0, 0, 54}) {
			return Nobody, false
		}
	}
	if len(servers) == 0 {
		return Nobody, false
	}
	t.note(t.target, "its nameserver %s is the address of systemd-resolved", servers[0])
	return ResolvedStatic, t.resolved()
}

// resolved reports whether systemd-resolved is on this system.
func (t *trail) resolved() bool {
	switch {
	case t.running("systemd-resolve"):
		t.note("systemd-resolved", "runs")
	case t.program("resolvectl") != "":
		t.note(t.program("resolvectl"), "systemd-resolved is installed")
	default:
		t.note("systemd-resolved", "is neither running nor installed")
		return false
	}
	return true
}

// here reports whether the program that a header names is on this system, and
// still writes the file.
func (t *trail) here(m Mode) (Mode, bool) {
	switch m {
	case ResolvedUplink:
		// It writes to files of its own in /run, never here: this is a copy
		// (tailscale issue 2136).
		t.note(t.target, "systemd-resolved never writes a file there: this is a copy")
		return Nobody, false
	case NetworkManager:
		return m, t.present("NetworkManager", "NetworkManager") && t.networkManagerWrites()
	case DebianResolvconf, Openresolv:
		return m, t.present("", "resolvconf")
	case Dhclient:
		return m, t.present("dhclient", "dhclient")
	case Dhcpcd:
		return m, t.present("dhcpcd", "dhcpcd")
	case Netconfig:
		return m, t.present("", "netconfig")
	case ConnMan:
		return m, t.present("connmand", "connmand")
	case Tailscale:
		return m, t.present("tailscaled", "tailscaled")
	case WSL:
		if v := t.setting("/etc/wsl.conf", "network", "generateresolvconf"); strings.EqualFold(v, "false") {
			t.note("/etc/wsl.conf", "generateResolvConf=false: WSL does not write it any more")
			return Nobody, false
		}
	}
	return m, m != Nobody
}

// present notes whether a program runs, or is there.
func (t *trail) present(comm, program string) bool {
	switch {
	case comm != "" && t.running(comm):
		t.note(comm, "runs")
	case t.program(program) != "":
		t.note(t.program(program), "is there")
	default:
		t.note(program, "is neither running nor installed: the header is a leftover")
		return false
	}
	return true
}

// daemons decides by what runs, for a file whose head names nobody that is here.
func (t *trail) daemons() (Mode, bool) {
	nm := t.running("NetworkManager")
	switch {
	case nm:
		t.note("NetworkManager", "runs")
		if t.networkManagerWrites() {
			return NetworkManager, true
		}
	case t.running("dhclient"):
		// A dhclient of NetworkManager runs a script of its own.
		t.note("dhclient", "runs")
		if hook := t.hook(); hook == "" {
			return Dhclient, true
		}
	}
	if !nm && t.running("dhcpcd") {
		t.note("dhcpcd", "runs")
		if text := t.file("/etc/dhcpcd.conf"); !slices.ContainsFunc(strings.Split(text, "\n"), func(l string) bool {
			return strings.HasPrefix(strings.TrimSpace(l), "nohook") && strings.Contains(l, "resolv.conf")
		}) {
			return Dhcpcd, true
		}
		t.note("/etc/dhcpcd.conf", "nohook resolv.conf: it does not write the file")
	}
	if t.running("udhcpc") {
		t.note("udhcpc", "runs")
		v := t.setting("/etc/udhcpc/udhcpc.conf", "", "resolv_conf")
		if !slices.Contains([]string{"no", "NO", "-"}, v) {
			return Udhcpc, true
		}
		t.note("/etc/udhcpc/udhcpc.conf", "RESOLV_CONF=%s: it does not write the file", v)
	}
	if t.running("connmand") {
		t.note("connmand", "runs")
		return ConnMan, true
	}
	if t.running("systemd-resolve") {
		t.note("systemd-resolved", "runs, and reads this file (its mode foreign)")
		if UsesResolve([]byte(t.file("/etc/nsswitch.conf"))) {
			t.note("/etc/nsswitch.conf", "programs ask systemd-resolved first, which asks the nameservers of this file")
		}
	}
	return Nobody, false
}

// hook returns the enter hook of dhclient-script(8) that keeps it from writing
// the file, by defining make_resolv_conf anew.
func (t *trail) hook() string {
	files := append(t.View.Glob("/etc/dhcp/dhclient-enter-hooks"), t.View.Glob("/etc/dhcp/dhclient-enter-hooks.d/*")...)
	for _, f := range append(files, t.View.Glob("/etc/dhclient-enter-hooks")...) {
		for line := range strings.Lines(t.file(f)) {
			if strings.HasPrefix(strings.TrimPrefix(strings.TrimSpace(line), "function "), "make_resolv_conf") {
				// resolvconf's own hook is there without it, and then does nothing.
				if path.Base(f) == "resolvconf" && t.program("resolvconf") == "" {
					continue
				}
				t.note(f, "keeps dhclient from writing the file (make_resolv_conf)")
				return f
			}
		}
	}
	return ""
}

// networkManagerWrites reports whether NetworkManager's settings have it write
// this file (NetworkManager.conf(5), dns and rc-manager).
func (t *trail) networkManagerWrites() bool {
	dns, from := t.networkManager("dns")
	rc, rcFrom := t.networkManager("rc-manager")
	switch {
	case dns == "none":
		t.note(from, "dns=none: NetworkManager does not write the file")
		return false
	case rc == "unmanaged":
		t.note(rcFrom, "rc-manager=unmanaged: NetworkManager does not write the file")
		return false
	case len(t.links) > 0 && slices.Contains([]string{"", "auto", "symlink"}, rc):
		t.note(t.Path, "NetworkManager leaves a symbolic link alone that is not its own (rc-manager=symlink)")
		return false
	}
	if dns != "" {
		t.note(from, "dns=%s", dns)
	}
	if rc != "" {
		t.note(rcFrom, "rc-manager=%s", rc)
	}
	return true
}

// networkManager returns a setting of NetworkManager's section main, and the file
// that has it: the last that is read. A file in /etc hides one of its name in
// /run, and that one in /usr/lib.
func (t *trail) networkManager(key string) (value, from string) {
	var names []string
	hidden := map[string]bool{}
	for _, dir := range []string{"/etc", "/run", "/usr/lib"} {
		var here []string
		for _, f := range t.View.Glob(dir + "/NetworkManager/conf.d/*.conf") {
			if !hidden[path.Base(f)] {
				hidden[path.Base(f)] = true
				here = append(here, f)
			}
		}
		if dir == "/etc" {
			here = append([]string{"/etc/NetworkManager/NetworkManager.conf"}, here...)
		}
		names = append(here, names...)
	}
	for _, f := range append(names, "/var/lib/NetworkManager/NetworkManager-intern.conf") {
		if v := t.setting(f, "main", key); v != "" {
			value, from = v, f
		}
	}
	return value, from
}

// setting returns the last value of a key in a section of a file of settings; the
// key in lower case.
func (t *trail) setting(file, section, key string) (value string) {
	in := ""
	for line := range strings.Lines(t.file(file)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			in = strings.ToLower(strings.Trim(line, "[] "))
			continue
		}
		k, v, ok := strings.Cut(line, "=")
		if ok && in == section && strings.ToLower(strings.TrimSpace(k)) == key {
			v, _, _ = strings.Cut(v, "#")
			value = strings.Trim(strings.TrimSpace(v), `"'`)
		}
	}
	return value
}

// file returns what a file of settings holds; nothing where it cannot be read.
func (t *trail) file(name string) string {
	text, err := t.View.ReadFile(name, MaxSize)
	if err != nil {
		return ""
	}
	return string(text)
}

// UsesResolve reports whether programs of the C library look up hosts through
// systemd-resolved (nss-resolve(8)) and send no packet to port 53 of their own:
// in the hosts line of nsswitch.conf(5) stands resolve, and not behind dns.
func UsesResolve(nsswitch []byte) bool {
	for line := range strings.Lines(string(nsswitch)) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "hosts:")
		if !ok {
			continue
		}
		for word := range strings.FieldsSeq(rest) {
			switch word {
			case "resolve":
				return true
			case "dns":
				return false
			}
		}
	}
	return false
}
