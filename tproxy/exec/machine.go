package exec

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	osexec "os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/files"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/nft"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/procfs"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// command is a process to start.
type command struct {
	Path  string
	Args  []string
	Stdin []byte
	// Lock, if not nil, is held open by the process too: should we be killed,
	// nobody takes the lock while it still writes.
	Lock *os.File
	// LockFile is the process's lock of iptables-legacy; "" is the environment's.
	LockFile string
}

func (c command) String() string { return strings.Join(append([]string{c.Path}, c.Args...), " ") }

// result is what a process left.
type result struct {
	Stdout, Stderr []byte
	Exit           int
}

// machine is everything that this package asks of the system, and all by which
// it changes it: the seam at which tests put a fake one.
type machine interface {
	// run starts a process and waits for it. The error is for a process that
	// could not be started; one that ran has an exit code.
	run(ctx context.Context, c command) (result, error)
	// find returns the path of a program, "" when there is none, and what the
	// path leads to.
	find(name string) (path, target string)

	// tables, chains and hasRules read the kernel without starting a process
	// and without making a table. tables lists what exists for a variant; those
	// of iptables-legacy may be empty.
	tables(nft bool, f rules.Family) ([]rules.Table, error)
	chains(nft bool, f rules.Family, t rules.Table) ([]string, error)
	hasRules(nft bool, f rules.Family, t rules.Table) (bool, error)
	// ownTable reads the table of ours in nftables; nil where there is none, which
	// hasOwnTable tells without reading it. commitTable carries out commands on it in one
	// transaction; of a failure it tells which of them the kernel refused, from 0, or -1
	// where that is none. noNFTables is the reason for which this kernel cannot hold such
	// a table, or "".
	hasOwnTable() (bool, error)
	ownTable() (*rules.Native, error)
	commitTable(commands []rules.NativeCommand) (failed int, err error)
	noNFTables() string
	// foreignTable reads a table of others, of the family inet, ip or ip6; nil where
	// there is none.
	foreignTable(family, name string) (*rules.Native, error)
	// foreignTables lists the tables of nftables that iptables does not show and that
	// are not ours.
	foreignTables() ([]string, error)
	// tracked reports whether a rule in one of these needs conntrack.
	tracked() (bool, error)
	// bases lists the base chains of nftables, empty tables of others left out,
	// and native what iptables-nft-save does not show in a table of iptables.
	bases() ([]kernel.NFTBase, error)
	native(f rules.Family, t rules.Table) ([]string, error)

	ipv6Off() (off bool, why string, err error)
	hasAddress(netip.Addr) (bool, error)
	addAddress(netip.Prefix) (bool, error)
	delAddress(netip.Prefix) (bool, error)
	localAddresses() ([]netip.Prefix, error)
	routeTo(netip.Addr) (kernel.Route, error)
	// redirected counts the live TCP connections that were redirected to one of the
	// ports.
	redirected(f rules.Family, ports []uint16) (int, error)

	// send sends an empty datagram as the user, and tells where rules have sent it.
	send(uid uint32, to netip.AddrPort) (netip.AddrPort, error)

	// lock keeps two runs in one network namespace apart.
	lock(ctx context.Context, wait time.Duration) (lock, error)
	// lockHolder is who holds the lock of iptables-legacy; file is as in command.
	lockHolder(file string) (pid int, comm string, ok bool)

	// readState, writeState and removeState are about small files that only root can
	// read, and that go with a reboot. One that is not there is fs.ErrNotExist to read,
	// and nothing to remove. writeState writes all of it or nothing.
	readState(name string) ([]byte, error)
	writeState(name string, text []byte) error
	removeState(name string) error
	// network and boot identify the network namespace and the time since the kernel
	// started; network can stand in a file's name.
	network() (string, error)
	boot() (string, error)
	// uptime is CLOCK_BOOTTIME (clock_gettime(2)): nobody can set it, and it goes on
	// while the machine is suspended.
	uptime() (time.Duration, error)
	// watch says to watched that somebody watches over a trial in this network
	// namespace, until release or the end of the process.
	watch(ctx context.Context) (release func(), err error)
	watched() (pid int, ok bool)

	userByName(name string) (uid uint32, ok bool)
	userByID(uid uint32) (name string, ok bool)
	readFile(path string) ([]byte, error)
	// glob lists the files that match one of the patterns (filepath.Match).
	glob(patterns ...string) []string
	// resolvConf manages the nameserver of ours in a file; shared is whether it may be
	// that of another network namespace.
	resolvConf(path string, shared bool) dns.Manager
	// delegate manages the file of ours that systemd-resolved reads.
	delegate() dns.DelegateManager
	// disk is where an install is kept.
	disk() disk
	// systemd returns the reason for which systemd cannot bring anything back into this
	// network namespace, and the one for which the files of the host are not its own;
	// empty where there is none.
	systemd() (no, elsewhere string)
	// locked reports whether somebody holds the lock of lock. pid is this process, and
	// started tells when one was, so that another of its number is told from it; empty
	// where there is none.
	locked() bool
	pid() int
	started(pid int) string
	// meshLink looks for the interface tproxy.MeshLink; addMeshLink makes it.
	meshLink() (kernel.Link, bool, error)
	addMeshLink(alias string, address netip.Prefix) (kernel.Link, error)
	delMeshLink(kernel.Link) (bool, error)
	// ask sends a DNS query to a server and waits a moment for any answer.
	ask(server netip.Addr) error
	// monitor calls changed when rules, interfaces or addresses change, until stop. It
	// hears nothing of iptables-legacy.
	monitor(changed func()) (stop func(), err error)
	environ(key string) string
	privileged() error
	procs() procfs.FS
}

// lock is held until unlock; file, which may be nil, is what a child inherits.
type lock struct {
	unlock func()
	file   *os.File
}

// system is the machine that we run on.
type system struct{}

func (system) run(ctx context.Context, c command) (result, error) {
	cmd := osexec.CommandContext(ctx, c.Path, c.Args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if c.Stdin != nil {
		cmd.Stdin = bytes.NewReader(c.Stdin)
	}
	// iptables says what it says in English and writes numbers as C does.
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if c.LockFile != "" {
		cmd.Env = append(cmd.Env, kernel.LockFileVariable+"="+c.LockFile)
	}
	// An interrupt at the terminal is for us, who look at it between steps: the
	// child writes what it writes whole.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Second
	if c.Lock != nil {
		cmd.ExtraFiles = []*os.File{c.Lock}
	}
	err := cmd.Run()
	r := result{out.Bytes(), bytes.TrimSpace(errOut.Bytes()), cmd.ProcessState.ExitCode()}
	if _, exited := errors.AsType[*osexec.ExitError](err); exited {
		return r, nil
	}
	return r, err
}

// programDirs are searched after PATH: sudo and cron leave sbin out of it.
var programDirs = []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"}

func (system) find(name string) (path, target string) {
	path, err := osexec.LookPath(name)
	if err != nil || !filepath.IsAbs(path) {
		path = ""
		for _, dir := range programDirs {
			p := filepath.Join(dir, name)
			if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				path = p
				break
			}
		}
	}
	if path == "" {
		return "", ""
	}
	target, err = filepath.EvalSymlinks(path)
	if err != nil {
		target = path
	}
	return path, target
}

func nftFamily(f rules.Family) string {
	if f == rules.IPv6 {
		return "ip6"
	}
	return "ip"
}

// The tables that iptables has; nft's of the same names are iptables-nft's.
var iptablesTables = []rules.Table{rules.NAT, rules.Raw, rules.Mangle, rules.Filter, "security"}

func (system) tables(nft bool, f rules.Family) ([]rules.Table, error) {
	var out []rules.Table
	if nft {
		all, err := nftTables()
		for _, t := range all {
			if t.Family == nftFamily(f) && isIPTables(t.Name) {
				out = append(out, rules.Table(t.Name))
			}
		}
		return out, err
	}
	names, err := kernel.LegacyTables(kernel.Family(f))
	for _, n := range names {
		out = append(out, rules.Table(n))
	}
	return out, err
}

func isIPTables(name string) bool {
	for _, t := range iptablesTables {
		if string(t) == name {
			return true
		}
	}
	return false
}

func (system) chains(nft bool, f rules.Family, t rules.Table) ([]string, error) {
	if nft {
		return kernel.NFTChains(nftFamily(f), string(t))
	}
	return kernel.LegacyChains(kernel.Family(f), string(t))
}

func (system) hasRules(nft bool, f rules.Family, t rules.Table) (bool, error) {
	if nft {
		return kernel.NFTRules(nftFamily(f), string(t))
	}
	return kernel.LegacyRules(kernel.Family(f), string(t))
}

// nftTables is empty where the kernel has no nf_tables.
func nftTables() ([]kernel.NFTTable, error) {
	all, err := kernel.NFTTables()
	if errors.Is(err, errors.ErrUnsupported) {
		return nil, nil
	}
	return all, err
}

func (system) foreignTables() ([]string, error) {
	all, err := nftTables()
	var out []string
	for _, t := range all {
		if foreign(t) {
			out = append(out, t.Family+" "+t.Name)
		}
	}
	return out, err
}

// foreign reports whether a table is neither of iptables-nft nor our own.
func foreign(t kernel.NFTTable) bool {
	return t != ownTable && ((t.Family != "ip" && t.Family != "ip6") || !isIPTables(t.Name))
}

func (system) tracked() (bool, error) {
	yes, err := kernel.NFTTracks(foreign)
	if errors.Is(err, errors.ErrUnsupported) {
		return false, nil
	}
	return yes, err
}

func (system) bases() ([]kernel.NFTBase, error) {
	all, err := kernel.NFTBases()
	if errors.Is(err, errors.ErrUnsupported) {
		return nil, nil
	}
	var out []kernel.NFTBase
	for _, b := range all {
		// A chain that accepts, of a table without rules, as Debian's nftables.conf
		// brings it, does nothing.
		holds := b.Drops
		if err == nil && !holds {
			holds, err = kernel.NFTRules(b.Table.Family, b.Table.Name)
		}
		if holds {
			out = append(out, b)
		}
	}
	return out, err
}

func (system) native(f rules.Family, t rules.Table) ([]string, error) {
	return kernel.NFTNative(nftFamily(f), string(t))
}

// withTable opens a connection to nf_tables and closes it behind our back: after a
// commit that deletes, close(2) waits for milliseconds, and nobody needs to wait for it.
func withTable(do func(*nft.Conn) error) error {
	c, err := nft.Open()
	if err != nil {
		return err
	}
	defer func() { go c.Close() }()
	return do(c)
}

func (system) hasOwnTable() (bool, error) {
	all, err := nftTables()
	return slices.Contains(all, ownTable), err
}

func (system) ownTable() (n *rules.Native, err error) {
	err = withTable(func(c *nft.Conn) error {
		n, _, err = c.List(tproxy.NFTable)
		return err
	})
	return n, err
}

func (system) foreignTable(family, name string) (n *rules.Native, err error) {
	err = withTable(func(c *nft.Conn) error {
		n, err = c.ListForeign(family, name)
		return err
	})
	return n, err
}

func (system) commitTable(commands []rules.NativeCommand) (failed int, err error) {
	err = withTable(func(c *nft.Conn) error { return c.Send(nft.Encode(commands, binary.NativeEndian), 0) })
	if e, ok := errors.AsType[*nft.Error](err); ok {
		return e.Command, err
	}
	return -1, err
}

func (system) noNFTables() string {
	// Since 5.2 a chain of nat can be of the family inet (nft_chain_nat.c).
	if major, minor := kernel.Release(); major < 5 || major == 5 && minor < 2 {
		return fmt.Sprintf("the kernel is Linux %d.%d, and nat in the family inet takes 5.2", major, minor)
	}
	err := withTable((*nft.Conn).Supported)
	if errors.Is(err, errors.ErrUnsupported) { // what else fails may pass, and is no answer
		return err.Error()
	}
	return ""
}

// conntrackCount is how many connections conntrack knows in the network namespace of
// the thread that reads it (Documentation/networking/nf_conntrack-sysctl.rst).
const conntrackCount = "/proc/sys/net/netfilter/nf_conntrack_count"

func (m system) redirected(f rules.Family, ports []uint16) (int, error) {
	// To list none, the kernel walks the table of all namespaces: milliseconds.
	if n, err := m.readFile(conntrackCount); err == nil && string(bytes.TrimSpace(n)) == "0" {
		return 0, nil
	}
	return kernel.Redirected(kernel.Family(f), ports...)
}

func (system) send(uid uint32, to netip.AddrPort) (netip.AddrPort, error) {
	return kernel.Send(uid, to)
}

func (system) routeTo(a netip.Addr) (kernel.Route, error) { return kernel.RouteTo(a) }

func (system) ipv6Off() (bool, string, error)          { return kernel.IPv6Off() }
func (system) hasAddress(a netip.Addr) (bool, error)   { return kernel.HasLoopbackAddress(a) }
func (system) addAddress(p netip.Prefix) (bool, error) { return kernel.AddLoopbackAddress(p) }
func (system) delAddress(p netip.Prefix) (bool, error) { return kernel.DelLoopbackAddress(p) }
func (system) localAddresses() ([]netip.Prefix, error) { return kernel.LocalAddresses() }
func (system) lockHolder(file string) (pid int, comm string, _ bool) {
	return kernel.XtablesLockHolder(file)
}

// lockName is the abstract socket that keeps two runs apart.
const lockName = "kuma-tproxy"

func (system) lock(ctx context.Context, wait time.Duration) (lock, error) {
	h, err := kernel.LockWait(ctx, lockName, 0)
	held, taken := errors.AsType[*kernel.HeldError](err)
	if taken {
		if !privilegedHolder(held.PID) {
			// Anybody may bind an abstract socket: somebody without our rights
			// must not be able to keep us from working.
			return lock{unlock: func() {}}, nil
		}
		if h, err = kernel.LockWait(ctx, lockName, max(wait, 0)); err != nil {
			if held, ok := errors.AsType[*kernel.HeldError](err); ok {
				return lock{}, fmt.Errorf("%w: %w; wait for it, or wait longer with --wait", ErrLocked, held)
			}
		}
	}
	if err != nil {
		return lock{}, err
	}
	file, err := h.File()
	if err != nil {
		h.Unlock()
		return lock{}, err
	}
	return lock{file: file, unlock: func() { file.Close(); h.Unlock() }}, nil
}

// ownerOf returns the effective UID of a process.
func ownerOf(pid int) (uint32, bool) {
	if pid == 0 {
		return 0, false
	}
	for line := range strings.Lines(readProc(strconv.Itoa(pid), "status")) {
		if rest, ok := strings.CutPrefix(line, "Uid:"); ok {
			if ids := strings.Fields(rest); len(ids) > 1 {
				uid, err := strconv.ParseUint(ids[1], 10, 32)
				return uint32(uid), err == nil
			}
		}
	}
	return 0, false
}

func readProc(elem ...string) string {
	text, err := os.ReadFile(filepath.Join(append([]string{"/proc"}, elem...)...))
	if err != nil {
		return "" // gone, or not ours to read: nothing is known
	}
	return string(text)
}

func (system) userByName(name string) (uint32, bool) {
	u, err := user.Lookup(name)
	if err != nil {
		return 0, false
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	return uint32(uid), err == nil
}

func (system) userByID(uid uint32) (string, bool) {
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return "", false
	}
	return u.Username, true
}

// maxFile is more than any resolv.conf needs, in bytes.
const maxFile = 64 << 10

// readFile reads a regular file; a FIFO would keep us waiting for ever.
func (system) readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no regular file", path)
	case info.Size() > maxFile:
		return nil, fmt.Errorf("%s has %d bytes: at most %d are read", path, info.Size(), maxFile)
	}
	return os.ReadFile(path)
}

func (system) glob(patterns ...string) (out []string) {
	for _, p := range patterns {
		found, _ := filepath.Glob(p) // the error is for a malformed pattern
		out = append(out, found...)
	}
	return out
}

func (m system) resolvConf(path string, shared bool) dns.Manager {
	out := files.Manager(path, func(name string) string { _, target := m.find(name); return target })
	out.Namespaces.Meant = shared
	return out
}

func (system) delegate() dns.DelegateManager {
	return dns.DelegateManager{Path: dns.DelegatePath, FS: files.FS{}}
}

func (system) disk() disk { return files.FS{} }
func (system) pid() int   { return os.Getpid() }

func (system) locked() bool {
	_, held := kernel.Holder(lockName)
	return held
}

func (system) started(pid int) string {
	// Behind the name, in parentheses, which may hold anything, it is the 20th field
	// (proc_pid_stat(5), starttime).
	stat := readProc(strconv.Itoa(pid), "stat")
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}

// unitFolder is where units of the host's own stand (systemd.unit(5)).
const unitFolder = "/etc/systemd/system"

func (m system) systemd() (no, elsewhere string) {
	if self, first := files.Networks(); self == "" || self != first {
		elsewhere = "this network namespace is not that of process 1"
		return elsewhere, elsewhere
	}
	// sd_booted(3), and that it is process 1 which we see: a container may have the
	// host's folder.
	if _, err := os.Stat("/run/systemd/system"); err != nil || strings.TrimSpace(readProc("1", "comm")) != "systemd" {
		no = "systemd is not process 1 here"
	} else if !files.SameFolder(unitFolder, "/proc/1/root"+unitFolder) {
		no = "process 1 has another " + unitFolder + " than this process"
		elsewhere = no + ": this is a container"
	} else if err := (files.FS{}).Writable(unitFolder); err != nil {
		no = fmt.Sprintf("%s cannot be written to: %v", unitFolder, err)
	} else if path, _ := m.find("systemctl"); path == "" {
		no = "systemctl is not here"
	}
	if is, why := m.procs().Container(); is && no != "" && elsewhere == "" {
		elsewhere = "this is a container (" + why + ")"
	}
	return no, elsewhere
}

func (system) meshLink() (kernel.Link, bool, error) { return kernel.FindLink(tproxy.MeshLink) }
func (system) addMeshLink(alias string, address netip.Prefix) (kernel.Link, error) {
	return kernel.AddLink(tproxy.MeshLink, alias, address)
}
func (system) delMeshLink(l kernel.Link) (bool, error) { return kernel.DelLink(l) }

// answerTime is how long ask waits for an answer.
const answerTime = time.Second

func (system) ask(server netip.Addr) error {
	// By this goroutine, whose thread is in the network namespace.
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(server, 53)))
	if err != nil {
		return err
	}
	defer conn.Close()
	query, err := dns.Query(uint16(rand.Uint32()), "control-plane.mesh")
	if err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	if _, err := conn.Write(query); err != nil {
		return err
	}
	for answer := make([]byte, 1<<16); ; {
		n, err := conn.Read(answer)
		if err != nil {
			return err
		}
		if _, err := dns.Answer(query, answer[:n]); err == nil {
			return nil
		}
	}
}

func (system) monitor(changed func()) (stop func(), err error) {
	m, err := kernel.OpenMonitor()
	if err != nil {
		return nil, err
	}
	m.Watch(changed)
	return m.Close, nil
}

func (system) environ(key string) string { return os.Getenv(key) }
func (system) procs() procfs.FS          { return procfs.FS{Listening: kernel.ListeningTCP} }

// The capabilities that iptables needs, by their bit (capabilities(7),
// linux/capability.h).
const (
	capNetAdmin = 12
	capNetRaw   = 13
)

// privileged returns ErrNotRoot unless the thread has what iptables needs.
func (system) privileged() error {
	for line := range strings.Lines(readProc("thread-self", "status")) {
		if rest, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(rest), 16, 64)
			if err == nil && set>>capNetAdmin&1 == 1 && set>>capNetRaw&1 == 1 {
				return nil
			}
			return ErrNotRoot
		}
	}
	return fmt.Errorf("capabilities of this thread: %w", fs.ErrNotExist)
}
