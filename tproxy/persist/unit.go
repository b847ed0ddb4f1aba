package persist

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// The units of ours, as files in /etc/systemd/system.
const (
	UnitName      = "kuma-transparent-proxy.service"
	NamesUnitName = "kuma-transparent-proxy-names.service"
	// DropInName is a file in the folder NAME.d of each of Loaders that is there.
	DropInName = "kuma-transparent-proxy.conf"
)

// Loaders are the services that load rules of others and flush the kernel's where they
// do: at start, at stop, or both. Ours comes after each of them and follows it. None of
// them comes after the network, as those of shorewall do, after which nothing can be
// before the network.
func Loaders() []string {
	return []string{"firewalld.service", "nftables.service", "iptables.service", "ip6tables.service", "netfilter-persistent.service", "ufw.service"}
}

// Service is what a unit of ours runs.
type Service struct {
	// Description is one line of text.
	Description string
	// Commands run one after the other until one fails: each is a program by its
	// absolute path, symbolic links resolved, and its arguments.
	Commands [][]string
	// Files are absolute paths, beside the programs, that have to be mounted.
	Files []string
	// Modules are modules of the kernel that are loaded before, such as ip_tables: the
	// program may load none.
	Modules []string
	// Writable are absolute paths that the program may write to, or below of. One that is
	// not there is left out.
	Writable []string
	// Capabilities are those that the program has beside CAP_NET_ADMIN and CAP_NET_RAW:
	// see capabilities(7).
	Capabilities []string
}

// UnitError says what cannot be a unit of ours, all of it.
type UnitError struct{ Faults []UnitFault }

// UnitFault is a value that cannot stand in a unit.
type UnitFault struct {
	Part     string // such as "command 1, argument 2"
	Value    string
	Accepted string
}

func (e *UnitError) Error() string {
	var b strings.Builder
	for i, f := range e.Faults {
		if i > 0 {
			b.WriteString("; ")
		}
		fmt.Fprintf(&b, "%s %q: accepted is %s", f.Part, f.Value, f.Accepted)
	}
	return b.String()
}

// unitMark is the line by which a unit, or a drop-in, is known as ours.
const unitMark = `# Made by kuma-tproxy: "kumactl uninstall transparent-proxy" takes it away, and an install writes it anew.`

// OurUnit reports whether a unit, or a drop-in, bears the mark of ours: an uninstall may
// delete it.
func OurUnit(file []byte) bool {
	for line := range strings.Lines(string(file)) {
		if strings.TrimRight(line, " \t\r\n") == unitMark {
			return true
		}
	}
	return false
}

// Unit returns the unit, of the name UnitName, that brings the rules back at boot, before
// the network is up, and after any of Loaders has flushed them. Its stop takes no rule
// away. file is what stands there, nil for none; what Unit returned before is replaced,
// and the same again gives the same bytes. The error is a *[UnitError]: a file that is
// not ours, or values that cannot be written.
//
// The programs run as root with few capabilities, on a file system that is read-only but
// for s.Writable, and in the host's network namespace (systemd.exec(5)).
func Unit(file []byte, s Service) ([]byte, error) {
	loaders := strings.Join(Loaders(), " ")
	w, err := newUnit(UnitName, file, s)
	if err != nil {
		return nil, err
	}
	// With the dependencies that a service has by itself it would come after
	// sysinit.target, and where cloud-init is, that comes after the network.
	w.section("Unit", s.Description)
	w.line("DefaultDependencies=no")
	w.line("Conflicts=shutdown.target")
	w.line("Wants=network-pre.target")
	w.line("Before=network-pre.target shutdown.target")
	// IPv6 may be switched off by sysctl.d(5). And what empties /tmp at a boot would take
	// away the folder there in which systemd makes the /dev of PrivateDevices= (mount_private_dev
	// in its core/namespace.c), while it does: "Failed to set up mount namespacing".
	w.line("After=local-fs.target systemd-sysctl.service systemd-tmpfiles-setup.service")
	w.line("# These flush rules when they start, stop or reload. PartOf= would not do: firewalld conflicts")
	w.line("# with others of them, and its start would stop us. A drop-in of theirs restarts ours.")
	w.line("After=" + loaders)
	w.line("ReloadPropagatedFrom=" + loaders)
	w.line("# A firewall that is restarted often must not use our starts up.")
	w.line("StartLimitIntervalSec=0")
	w.needs(s)
	w.section("Service", "")
	w.line("Type=oneshot")
	w.line("RemainAfterExit=yes")
	w.line("# firewalld flushes when systemd takes it for started already, and answers when it is done.")
	w.line("ExecStartPre=" + waitForFirewalld)
	w.commands("ExecStart", s)
	w.line("ExecReload=" + waitForFirewalld)
	w.commands("ExecReload", s)
	w.sandbox(s)
	w.section("Install", "")
	w.line("WantedBy=multi-user.target")
	return w.bytes(), nil
}

// waitForFirewalld returns when firewalld has loaded its rules, and at once, without a
// word, where it does not run. Its service is Type=dbus, and it takes its name on the bus
// before it flushes.
const waitForFirewalld = `-sh -c "exec busctl --auto-start=no --timeout=60 get-property org.fedoraproject.FirewallD1 /org/fedoraproject/FirewallD1 org.fedoraproject.FirewallD1 state >/dev/null 2>&1"`

// NamesUnit is Unit for the unit, of the name NamesUnitName, that tells systemd-resolved
// again who knows the names of the mesh: over D-Bus, and with the network up, as it takes
// a way to the control plane.
func NamesUnit(file []byte, s Service) ([]byte, error) {
	w, err := newUnit(NamesUnitName, file, s)
	if err != nil {
		return nil, err
	}
	w.section("Unit", s.Description)
	w.line("Wants=network-online.target")
	w.line("After=network-online.target dbus.service systemd-resolved.service " + UnitName)
	w.line("StartLimitIntervalSec=0")
	w.needs(s)
	w.section("Service", "")
	w.line("Type=oneshot")
	w.line("RemainAfterExit=yes")
	w.commands("ExecStart", s)
	w.sandbox(s)
	w.section("Install", "")
	w.line("WantedBy=multi-user.target")
	return w.bytes(), nil
}

// DropIn returns the drop-in, of the name DropInName, for any of Loaders: one that is
// stopped has flushed our rules, and brings them back. file and the error are those of
// Unit.
func DropIn(file []byte) ([]byte, error) {
	if err := replaceable(DropInName, file); err != nil {
		return nil, err
	}
	var w unitWriter
	w.line(unitMark)
	w.section("Service", "")
	// Our start waits until this start or stop is over, as we come after. While the
	// machine goes down it is refused.
	w.line("ExecStartPost=-systemctl --no-block restart " + UnitName)
	w.line("ExecStopPost=-systemctl --no-block restart " + UnitName)
	return w.bytes(), nil
}

// replaceable is an error for a file that is not ours.
func replaceable(name string, file []byte) error {
	if file == nil || OurUnit(file) {
		return nil
	}
	first, _, _ := strings.Cut(string(file[:min(len(file), 200)]), "\n")
	return &UnitError{[]UnitFault{{name + ", not ours,", first, fmt.Sprintf("no such file, or one with the line %q", unitMark)}}}
}

// unitWriter writes lines of systemd.syntax(7).
type unitWriter struct{ text strings.Builder }

func newUnit(name string, file []byte, s Service) (*unitWriter, error) {
	if err := replaceable(name, file); err != nil {
		return nil, err
	}
	if faults := s.faults(); len(faults) > 0 {
		return nil, &UnitError{faults}
	}
	w := new(unitWriter)
	w.line(unitMark)
	return w, nil
}

func (w *unitWriter) bytes() []byte { return []byte(w.text.String()) }

func (w *unitWriter) line(s string) { w.text.WriteString(s + "\n") }

func (w *unitWriter) section(name, description string) {
	if w.text.Len() > len(unitMark)+1 {
		w.line("")
	}
	w.line("[" + name + "]")
	if description != "" {
		w.line("Description=" + strings.ReplaceAll(description, "%", "%%"))
	}
}

// needs are what has to be there before.
func (w *unitWriter) needs(s Service) {
	var mounts []string
	for _, c := range s.Commands {
		mounts = append(mounts, unitWord(c[0]))
	}
	for _, f := range s.Files {
		mounts = append(mounts, unitWord(f))
	}
	slices.Sort(mounts)
	w.line("RequiresMountsFor=" + strings.Join(slices.Compact(mounts), " "))
	for _, m := range s.Modules {
		// The kernel takes both for the same, and systemd takes a - for a /
		// (systemd.unit(5), STRING ESCAPING).
		m = "modprobe@" + strings.ReplaceAll(m, "-", "_") + ".service"
		w.line("Wants=" + m)
		w.line("After=" + m)
	}
}

func (w *unitWriter) commands(key string, s Service) {
	for _, c := range s.Commands {
		words := []string{unitWord(c[0])} // in which there is no $
		for _, arg := range c[1:] {
			words = append(words, unitWord(strings.ReplaceAll(arg, "$", "$$")))
		}
		w.line(key + "=" + strings.Join(words, " "))
	}
}

// sandbox is how the programs run.
func (w *unitWriter) sandbox(s Service) {
	// A program of its own kind may hang; a oneshot has no limit otherwise.
	w.line("TimeoutStartSec=90")
	w.line("StandardError=journal+console")
	w.line("UMask=0077")
	capabilities := slices.Concat([]string{"CAP_NET_ADMIN", "CAP_NET_RAW"}, s.Capabilities)
	slices.Sort(capabilities)
	w.line("CapabilityBoundingSet=" + strings.Join(slices.Compact(capabilities), " "))
	w.line("ProtectSystem=strict")
	if len(s.Writable) > 0 {
		var words []string
		for _, f := range s.Writable {
			words = append(words, unitWord("-"+f))
		}
		w.line("ReadWritePaths=" + strings.Join(words, " "))
	}
	w.line("ProtectHome=" + s.home())
	for _, l := range hardening {
		w.line(l)
	}
}

// hardening is the rest of it. Not PrivateNetwork=, ProtectProc= and ProcSubset=: it is
// about the host's network, and reads who listens where. Not PrivateTmp=: that waits for
// what /var/tmp is on, which may come with the network; nobody writes to /tmp.
var hardening = []string{
	"NoNewPrivileges=yes",
	"PrivateDevices=yes",
	"ProtectClock=yes",
	"ProtectControlGroups=yes",
	"ProtectHostname=yes",
	"ProtectKernelLogs=yes",
	"ProtectKernelModules=yes",
	"ProtectKernelTunables=yes",
	"LockPersonality=yes",
	"MemoryDenyWriteExecute=yes",
	"RestrictAddressFamilies=AF_NETLINK AF_INET AF_INET6 AF_UNIX",
	"RestrictNamespaces=yes",
	"RestrictRealtime=yes",
	"RestrictSUIDSGID=yes",
	"SystemCallArchitectures=native",
	"SystemCallFilter=@system-service",
	"SystemCallFilter=~@resources",
	"KeyringMode=private",
}

// home is for ProtectHome=: a program may well be in somebody's home.
func (s Service) home() string {
	paths := slices.Concat(s.Files, s.Writable)
	for _, c := range s.Commands {
		paths = append(paths, c[0])
	}
	for _, p := range paths {
		for _, h := range []string{"/home", "/root", "/run/user"} {
			if p = path.Clean(p); p == h || strings.HasPrefix(p, h+"/") {
				return "read-only"
			}
		}
	}
	return "yes"
}

var (
	moduleName     = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)
	capabilityName = regexp.MustCompile(`^CAP_[A-Z_]+$`)
)

// faults are the values that cannot be written.
func (s Service) faults() (out []UnitFault) {
	fault := func(part, value, accepted string) { out = append(out, UnitFault{part, value, accepted}) }
	const oneLine = "text without control characters, in UTF-8"
	if !oneLiner(s.Description) || s.Description == "" || strings.HasSuffix(strings.TrimSpace(s.Description), `\`) {
		fault("description", s.Description, oneLine+", that does not end with a backslash")
	}
	if len(s.Commands) == 0 {
		fault("commands", "", "at least one")
	}
	file := func(part, value string) {
		if !oneLiner(value) || !path.IsAbs(value) {
			fault(part, value, "an absolute path, "+oneLine)
		}
	}
	for i, c := range s.Commands {
		part := fmt.Sprintf("command %d", i+1)
		if len(c) == 0 {
			fault(part, "", "a program and its arguments")
			continue
		}
		// systemd replaces variables in the first argument, and not in the path; and takes no
		// path with what quotes (string_is_safe in its basic/string-util.c).
		if !oneLiner(c[0]) || !path.IsAbs(c[0]) || strings.HasSuffix(c[0], "/") || strings.ContainsAny(c[0], "$\\\"'") {
			fault(part+", program", c[0], "the absolute path of a file, without quotes, backslash and $, "+oneLine)
		}
		for j, a := range c[1:] {
			if !oneLiner(a) {
				fault(fmt.Sprintf("%s, argument %d", part, j+1), a, oneLine)
			}
		}
	}
	for i, f := range s.Files {
		file(fmt.Sprintf("file %d", i+1), f)
	}
	for i, f := range s.Writable {
		file(fmt.Sprintf("writable path %d", i+1), f)
	}
	for i, m := range s.Modules {
		if !moduleName.MatchString(m) {
			fault(fmt.Sprintf("module %d", i+1), m, "letters, digits, _ and -")
		}
	}
	for i, c := range s.Capabilities {
		if !capabilityName.MatchString(c) {
			fault(fmt.Sprintf("capability %d", i+1), c, "a name as in capabilities(7), such as CAP_SYS_PTRACE")
		}
	}
	return out
}

// oneLiner reports whether a text can stand in a line of a unit: systemd ends a line at a
// newline, a carriage return and a NUL, and leaves out one that is not UTF-8.
func oneLiner(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// unitWord writes one word of a line, for systemd's quoting and specifiers
// (systemd.syntax(7), QUOTING; systemd.unit(5), SPECIFIERS).
func unitWord(s string) string {
	s = strings.ReplaceAll(s, "%", "%%")
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return r >= utf8.RuneSelf || !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("%$_@+=:,./-", r)
	}) {
		return s
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}
