package dns

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Mount is a line of /proc/PID/mountinfo (proc_pid_mountinfo(5)).
type Mount struct {
	ID, Parent int
	Device     string // major:minor
	Root       string // the path in the file system that is seen here
	Point      string // the path at which it is seen
	Type       string // of the file system
	ReadOnly   bool   // the mount, or the file system itself
}

func (m Mount) String() string { return fmt.Sprintf("%s of %s (%s)", m.Root, m.Device, m.Type) }

// ParseMounts reads mountinfo. What has not the form of proc_pid_mountinfo(5) is
// passed over.
func ParseMounts(text []byte) []Mount {
	var out []Mount
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 10 {
			continue
		}
		id, err := strconv.Atoi(f[0])
		parent, err2 := strconv.Atoi(f[1])
		if err != nil || err2 != nil {
			continue
		}
		m := Mount{ID: id, Parent: parent, Device: f[2], Root: unescape(f[3]), Point: unescape(f[4]), ReadOnly: readOnly(f[5])}
		// Optional fields end with a hyphen.
		if i := slices.Index(f[6:], "-"); i >= 0 && 6+i+1 < len(f) {
			m.Type = f[6+i+1]
			m.ReadOnly = m.ReadOnly || readOnly(f[len(f)-1])
		}
		out = append(out, m)
	}
	return out
}

func readOnly(options string) bool { return slices.Contains(strings.Split(options, ","), "ro") }

// unescape undoes what mountinfo does to blanks, line feeds and backslashes.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountOf returns the mount on which a path lies. It walks as the kernel does: a
// mount counts where it stands on the mount that the walk is on, so one that a
// later mount of a folder above hides does not.
func mountOf(mounts []Mount, name string) (Mount, bool) {
	on := func(point string, parent func(Mount) bool) (Mount, bool) {
		for i := len(mounts) - 1; i >= 0; i-- {
			if m := mounts[i]; m.Point == point && parent(m) {
				return m, true
			}
		}
		return Mount{}, false
	}
	known := make(map[int]bool, len(mounts))
	for _, m := range mounts {
		known[m.ID] = true
	}
	cur, ok := on("/", func(m Mount) bool { return m.Parent == m.ID || !known[m.Parent] })
	if !ok {
		return Mount{}, false
	}
	// climb goes to what is mounted on top, once and again.
	climb := func(point string) {
		for range mounts {
			m, ok := on(point, func(m Mount) bool { return m.Parent == cur.ID && m.ID != cur.ID })
			if !ok {
				return
			}
			cur = m
		}
	}
	climb("/")
	for i := 1; i <= len(name); i++ {
		if i == len(name) || name[i] == '/' {
			climb(name[:i])
		}
	}
	return cur, true
}

// Namespaces are the identities of network namespaces, ours and that of process 1:
// any text that is the same for the same one, and empty where it cannot be told.
type Namespaces struct {
	Self, Init string
	// InitMounts are the mounts of process 1. A mount that is among them is the
	// host's and no one's own; nil where they cannot be read.
	InitMounts []Mount
	// Meant is whether the operator said that this file is meant, wherever it is.
	Meant bool
}

// NamespaceError says that the file is the host's and we are in a network
// namespace that is not.
type NamespaceError struct {
	Path       string
	Self, Init string
}

func (e *NamespaceError) Error() string {
	which := "is not that of process 1"
	if e.Self == "" || e.Init == "" {
		which = "cannot be told from that of process 1"
	}
	return fmt.Sprintf("%q is the host's and serves every network namespace without a file of its own, and this network namespace %s; give it a file of its own (ip netns exec binds /etc/netns/NAME/resolv.conf), or name the file with --resolv-conf, or leave it alone with --modify-resolv-conf=false", e.Path, which)
}

// MayWrite returns a *NamespaceError where a program must not write a file,
// because its network namespace is not that of process 1, and neither the file nor
// a folder above it is a mount of its own: the file is the host's, and what is
// right here would be wrong there.
func MayWrite(name string, mounts []Mount, ns Namespaces) error {
	if ns.Meant || ns.Self != "" && ns.Self == ns.Init {
		return nil
	}
	if m, ok := mountOf(mounts, path.Clean(name)); ok && m.Point != "/" {
		own := true
		for _, i := range ns.InitMounts {
			if i.Device == m.Device && i.Root == m.Root && i.Point == m.Point {
				own = false
			}
		}
		if own {
			return nil
		}
	}
	return &NamespaceError{name, ns.Self, ns.Init}
}
