package kernel

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	inNamespace = "TPROXY_KERNEL_TEST_NETNS"
	asHolder    = "TPROXY_KERNEL_TEST_LOCK"
)

// noNamespace is why there is no network namespace to test in.
var noNamespace error

// Threads that a test spoils must not be the main one, which /proc/self and
// /proc/PID show: kept for the main goroutine, it never runs another.
func init() { runtime.LockOSThread() }

// TestMain runs the tests in a network namespace of their own, so that none can
// touch the machine's.
func TestMain(m *testing.M) {
	if name := os.Getenv(asHolder); name != "" {
		os.Exit(holdLock(name))
	}
	if os.Getenv(inNamespace) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), inNamespace+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if noNamespace = cmd.Start(); noNamespace == nil {
			_ = cmd.Wait()
			os.Exit(cmd.ProcessState.ExitCode())
		}
	}
	os.Exit(m.Run())
}

func requireNamespace(t *testing.T) {
	t.Helper()
	if noNamespace != nil {
		skip(t, "no network namespace: %v", noNamespace)
	}
}

func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if strings.Contains(os.Getenv("TPROXY_REQUIRE"), "kernel") {
		t.Fatalf("TPROXY_REQUIRE=kernel: "+format, args...)
	}
	t.Skipf(format, args...)
}

// inFreshNamespace runs f on a thread in a network namespace of its own, while
// the process stays where it is: as a CNI plugin does.
func inFreshNamespace(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	requireNamespace(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
			t.Errorf("unshare: %v", err)
			return
		}
		f(t)
	}()
	<-done
}

// run starts a program, which inherits the namespace of the calling thread.
func run(t *testing.T, stdin, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		skip(t, "%v", err)
	}
	cmd := exec.Command(path, args...)
	// The machine's lock is not ours to take.
	cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE="+filepath.Join(t.TempDir(), "xtables.lock"))
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// becomeNobody makes the calling thread, locked for good, the user nobody's.
func becomeNobody(t *testing.T) {
	t.Helper()
	// The system calls themselves: package syscall's change every thread.
	for _, trap := range []uintptr{syscall.SYS_SETGROUPS, syscall.SYS_SETRESGID, syscall.SYS_SETRESUID} {
		id := uintptr(65534)
		if trap == syscall.SYS_SETGROUPS {
			id = 0 // no groups
		}
		if _, _, errno := syscall.RawSyscall(trap, id, id, id); errno != 0 {
			t.Fatalf("become nobody: %v", errno)
		}
	}
}

func TestLegacyTables(t *testing.T) {
	requireNamespace(t)
	before, err := LegacyTables(IPv4)
	if err != nil {
		t.Fatal(err)
	}
	inFreshNamespace(t, func(t *testing.T) {
		check := func(f Family, want ...string) {
			t.Helper()
			got, err := LegacyTables(f)
			slices.Sort(got)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%s tables: got %q, %v, want %q", f, got, err, want)
			}
		}
		rules := func(f Family, table string, want bool) {
			t.Helper()
			got, err := LegacyRules(f, table)
			if err != nil || got != want {
				t.Errorf("%s rules in %s: got %v, %v, want %v", f, table, got, err, want)
			}
		}
		check(IPv4)
		check(IPv6)
		rules(IPv4, "nat", false)
		rules(IPv6, "nat", false)
		rules(IPv4, strings.Repeat("long", 20), false)
		check(IPv4) // asking made none
		check(IPv6)

		run(t, "", "iptables-legacy", "-t", "nat", "-L")
		check(IPv4, "nat")
		rules(IPv4, "nat", false) // registered and empty
		run(t, "", "iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", "RETURN")
		rules(IPv4, "nat", true)
		rules(IPv6, "nat", false)
		run(t, "", "iptables-legacy", "-t", "nat", "-F")
		rules(IPv4, "nat", false)
		run(t, "", "iptables-legacy", "-t", "nat", "-N", "MINE")
		rules(IPv4, "nat", true) // an empty chain of somebody's
		run(t, "", "iptables-legacy", "-t", "raw", "-L")
		check(IPv4, "nat", "raw")
		rules(IPv4, "raw", false) // two hooks only
		run(t, "", "iptables-legacy", "-t", "raw", "-P", "OUTPUT", "DROP")
		rules(IPv4, "raw", false) // a policy is no rule
		run(t, "", "iptables-legacy", "-t", "raw", "-A", "PREROUTING")
		rules(IPv4, "raw", true) // a rule that matches and does nothing

		check(IPv6)
		run(t, "", "ip6tables-legacy", "-t", "mangle", "-L")
		check(IPv6, "mangle")
		rules(IPv6, "mangle", false)
		run(t, "", "ip6tables-legacy", "-t", "mangle", "-A", "OUTPUT")
		rules(IPv6, "mangle", true)
	})
	// The rest of the process is elsewhere.
	if got, err := LegacyTables(IPv4); !slices.Equal(got, before) || err != nil {
		t.Errorf("in the other namespace: got %q, %v, want %q as before", got, err, before)
	}
}

func TestLegacyTablesOfNoFamily(t *testing.T) {
	if _, err := LegacyTables(0); err == nil {
		t.Error("got no error for family 0")
	}
	if _, err := LegacyRules(5, "nat"); err == nil {
		t.Error("got no error for family 5")
	}
}

func TestNFT(t *testing.T) {
	inFreshNamespace(t, func(t *testing.T) {
		tables := func(want ...NFTTable) {
			t.Helper()
			got, err := NFTTables()
			if err != nil || len(got) != len(want) {
				t.Fatalf("tables: got %v, %v, want %v", got, err, want)
			}
			for _, w := range want {
				if !slices.Contains(got, w) {
					t.Errorf("tables: %v lacks %v", got, w)
				}
			}
		}
		rules := func(family, table string, want bool) {
			t.Helper()
			got, err := NFTRules(family, table)
			if err != nil || got != want {
				t.Errorf("rules in %s %s: got %v, %v, want %v", family, table, got, err, want)
			}
		}
		chains := func(family, table string, want ...string) {
			t.Helper()
			got, err := NFTChains(family, table)
			slices.Sort(got)
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("chains in %s %s: got %q, %v, want %q", family, table, got, err, want)
			}
		}
		tables()
		chains("ip", "nat")
		rules("ip", "nat", false)
		tables() // asking made none

		run(t, `
			add table ip nat
			add table ip other
			add table ip6 nat
			add table inet f
			add table arp f
			add table bridge f
			add table netdev f
			add chain ip nat OUTPUT { type nat hook output priority -100; }
			add chain ip nat MINE
			add chain ip other ELSE
			add chain inet f c
			add rule inet f c tcp dport 22 accept
			add chain ip6 nat c
			add rule ip other ELSE accept
		`, "nft", "-f", "-")
		tables(NFTTable{"ip", "nat"}, NFTTable{"ip", "other"}, NFTTable{"ip6", "nat"}, NFTTable{"inet", "f"},
			NFTTable{"arp", "f"}, NFTTable{"bridge", "f"}, NFTTable{"netdev", "f"})
		chains("ip", "nat", "MINE", "OUTPUT")
		chains("ip", "other", "ELSE")
		chains("ip6", "nat", "c")
		chains("arp", "f")
		rules("ip", "nat", false) // the family's other table has one
		rules("ip", "other", true)
		rules("ip6", "nat", false)
		rules("inet", "f", true)
		rules("netdev", "f", false)
		rules("ip", "absent", false)
	})
}

// Long answers come in many messages, and one that is not read to its end must
// leave nothing behind for the next.
func TestNFTLongDumps(t *testing.T) {
	inFreshNamespace(t, func(t *testing.T) {
		var script strings.Builder
		script.WriteString("add table ip big\n")
		const n = 3000
		for i := range n {
			fmt.Fprintf(&script, "add chain ip big chain_with_a_long_name_%04d\n", i)
			fmt.Fprintf(&script, "add rule ip big chain_with_a_long_name_%04d tcp dport 1 accept comment \"long enough to fill a message\"\n", i)
		}
		run(t, script.String(), "nft", "-f", "-")
		for range 3 {
			if found, err := NFTRules("ip", "big"); !found || err != nil {
				t.Errorf("rules: got %v, %v", found, err)
			}
			chains, err := NFTChains("ip", "big")
			slices.Sort(chains)
			if got := len(slices.Compact(chains)); got != n || err != nil {
				t.Errorf("chains: got %d, %v, want %d", got, err, n)
			}
		}
	})
}

func TestNFTUnknownFamily(t *testing.T) {
	if _, err := NFTChains("ipv4", "nat"); err == nil || !strings.Contains(err.Error(), `"ipv4"`) {
		t.Errorf("chains: got %v", err)
	}
	if _, err := NFTRules("", "nat"); err == nil {
		t.Error("rules: got no error")
	}
}

func TestNFTErrors(t *testing.T) {
	for _, c := range []struct {
		in, is error
	}{
		{syscall.EINVAL, errors.ErrUnsupported},
		{syscall.EPROTONOSUPPORT, errors.ErrUnsupported},
		{syscall.EOPNOTSUPP, errors.ErrUnsupported},
		{syscall.ENOENT, errors.ErrUnsupported},
		{syscall.EPERM, fs.ErrPermission},
		{syscall.ENOBUFS, syscall.ENOBUFS},
	} {
		got := NFTError("tables", c.in)
		if !errors.Is(got, c.is) || !errors.Is(got, c.in) {
			t.Errorf("%v: got %v, which is not %v", c.in, got, c.is)
		}
		if c.is != errors.ErrUnsupported && errors.Is(got, errors.ErrUnsupported) {
			t.Errorf("%v: got %v", c.in, got)
		}
	}
	if err := NFTError("tables", nil); err != nil {
		t.Errorf("got %v", err)
	}
}

func TestUnprivileged(t *testing.T) {
	inFreshNamespace(t, func(t *testing.T) {
		// So that there is a file of table names to be refused.
		run(t, "", "ip6tables-legacy", "-t", "raw", "-L")
		becomeNobody(t)
		calls := map[string]func() error{
			"LegacyTables":       func() error { _, err := LegacyTables(IPv6); return err },
			"LegacyRules":        func() error { _, err := LegacyRules(IPv6, "raw"); return err },
			"NFTTables":          func() error { _, err := NFTTables(); return err },
			"NFTChains":          func() error { _, err := NFTChains("ip", "nat"); return err },
			"NFTRules":           func() error { _, err := NFTRules("ip", "nat"); return err },
			"AddLoopbackAddress": func() error { _, err := AddLoopbackAddress(netip.MustParsePrefix("::6/128")); return err },
		}
		for name, call := range calls {
			if err := call(); !errors.Is(err, fs.ErrPermission) {
				t.Errorf("%s: got %v, want %v", name, err, fs.ErrPermission)
			}
		}
		if _, err := LocalAddresses(); err != nil {
			t.Errorf("LocalAddresses: %v", err)
		}
		if _, _, err := IPv6Off(); err != nil {
			t.Errorf("IPv6Off: %v", err)
		}
	})
}

func TestLoopbackAddress(t *testing.T) {
	for _, prefix := range []string{"::6/128", "fd00::1/64", "127.0.0.6/8", "10.1.2.3/32"} {
		t.Run(prefix, func(t *testing.T) {
			p := netip.MustParsePrefix(prefix)
			has := func(want bool) {
				t.Helper()
				got, err := HasLoopbackAddress(p.Addr())
				if err != nil || got != want {
					t.Errorf("has: got %v, %v, want %v", got, err, want)
				}
				all, err := LocalAddresses()
				if err != nil || slices.Contains(all, p) != want {
					t.Errorf("local addresses: got %v, %v, want %s among them: %v", all, err, p, want)
				}
			}
			inFreshNamespace(t, func(t *testing.T) {
				run(t, "", "ip", "link", "set", "lo", "up")
				step := func(name string, f func(netip.Prefix) (bool, error), want bool) {
					t.Helper()
					got, err := f(p)
					if err != nil || got != want {
						t.Errorf("%s: got %v, %v, want %v", name, got, err, want)
					}
				}
				has(false)
				step("remove what is not there", DelLoopbackAddress, false)
				step("add", AddLoopbackAddress, true)
				has(true)
				step("add again", AddLoopbackAddress, false)
				has(true)
				bindTo(t, p.Addr())
				step("remove", DelLoopbackAddress, true)
				has(false)
				step("remove again", DelLoopbackAddress, false)
			})
			requireNamespace(t)
			has(false) // the process's own namespace saw nothing of it
		})
	}
}

// bindTo binds the address at once: it must not be tentative.
func bindTo(t *testing.T, addr netip.Addr) {
	t.Helper()
	domain, sa := syscall.AF_INET, syscall.Sockaddr(nil)
	if addr.Is4() {
		sa = &syscall.SockaddrInet4{Addr: addr.As4()}
	} else {
		domain, sa = syscall.AF_INET6, &syscall.SockaddrInet6{Addr: addr.As16()}
	}
	fd, err := syscall.Socket(domain, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, sa); err != nil {
		t.Errorf("bind %s: %v", addr, err)
	}
}

func TestAddressesOfOtherInterfaces(t *testing.T) {
	inFreshNamespace(t, func(t *testing.T) {
		run(t, "", "ip", "link", "add", "d0", "type", "bridge")
		run(t, "", "ip", "addr", "add", "192.0.2.1/24", "dev", "d0")
		run(t, "", "ip", "addr", "add", "192.0.2.65", "peer", "192.0.2.66/32", "dev", "d0")
		all, err := LocalAddresses()
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"192.0.2.1/24", "192.0.2.65/32"} {
			if !slices.Contains(all, netip.MustParsePrefix(want)) {
				t.Errorf("got %v, which lacks %s", all, want)
			}
		}
		if slices.Contains(all, netip.MustParsePrefix("192.0.2.66/32")) {
			t.Errorf("got %v, with the peer's address", all)
		}
		if has, err := HasLoopbackAddress(netip.MustParseAddr("192.0.2.1")); has || err != nil {
			t.Errorf("has 192.0.2.1 on lo: got %v, %v", has, err)
		}
	})
}

func TestBadAddresses(t *testing.T) {
	for _, p := range []netip.Prefix{{}, netip.MustParsePrefix("::ffff:10.0.0.1/128"), netip.PrefixFrom(netip.MustParseAddr("10.0.0.1"), 33)} {
		if _, err := AddLoopbackAddress(p); err == nil {
			t.Errorf("add %s: got no error", p)
		}
		if _, err := DelLoopbackAddress(p); err == nil {
			t.Errorf("remove %s: got no error", p)
		}
	}
}

func TestIPv6Off(t *testing.T) {
	six := netip.MustParsePrefix("::6/128")
	inFreshNamespace(t, func(t *testing.T) {
		if _, err := os.Stat(ifInet6); err != nil {
			t.Logf("this kernel has no IPv6: %v", err)
			if off, why, err := IPv6Off(); !off || !strings.Contains(why, "if_inet6") || err != nil {
				t.Errorf("got %v, %q, %v", off, why, err)
			}
			return
		}
		// A new namespace may inherit either (net.core.devconf_inherit_init_net).
		set := func(value string) {
			if err := os.WriteFile(disableIPv6, []byte(value), 0); err != nil {
				t.Fatal(err)
			}
		}
		set("0")
		if off, why, err := IPv6Off(); off || why != "" || err != nil {
			t.Errorf("on: got %v, %q, %v", off, why, err)
		}
		set("1")
		if off, why, err := IPv6Off(); !off || why != disableIPv6+" is 1" || err != nil {
			t.Errorf("off: got %v, %q, %v", off, why, err)
		}
		// What off means: an address cannot be added.
		if added, err := AddLoopbackAddress(six); added || !errors.Is(err, errors.ErrUnsupported) || errors.Is(err, fs.ErrPermission) {
			t.Errorf("add: got %v, %v, want %v", added, err, errors.ErrUnsupported)
		}
		if removed, err := DelLoopbackAddress(six); removed || err != nil {
			t.Errorf("remove: got %v, %v", removed, err)
		}
	})
}

func TestLock(t *testing.T) {
	requireNamespace(t)
	const name = "kuma test lock" // spaces: /proc/net/unix has them as they are
	h, err := Lock(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(name); !isHeldBy(err, name, os.Getpid()) {
		t.Errorf("second: got %v, want it held by %d", err, os.Getpid())
	}
	other, err := Lock("test lock")
	if err != nil {
		t.Errorf("another name: %v", err)
	} else if err := other.Unlock(); err != nil {
		t.Error(err)
	}
	inFreshNamespace(t, func(t *testing.T) {
		h, err := Lock(name)
		if err != nil {
			t.Errorf("in another namespace: %v", err)
			return
		}
		if err := h.Unlock(); err != nil {
			t.Error(err)
		}
	})
	for range 2 {
		if err := h.Unlock(); err != nil {
			t.Error(err)
		}
	}
	h, err = LockWait(context.Background(), name, time.Second)
	if err != nil {
		t.Fatalf("after unlock: %v", err)
	}
	if err := h.Unlock(); err != nil {
		t.Error(err)
	}
}

func isHeldBy(err error, name string, pid int) bool {
	held, ok := errors.AsType[*HeldError](err)
	return ok && held.Name == name && held.PID == pid && held.Comm != ""
}

// A child that inherits the lock holds it, also when its parent is gone.
func TestLockIsTheChildsToo(t *testing.T) {
	requireNamespace(t)
	const name = "inherited"
	h, err := Lock(name)
	if err != nil {
		t.Fatal(err)
	}
	file, err := h.File()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command("cat")
	child.ExtraFiles = []*os.File{file}
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	file.Close()
	if err := h.Unlock(); err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(name); !isHeldBy(err, name, child.Process.Pid) {
		t.Errorf("got %v, want it held by %d", err, child.Process.Pid)
	}
	in.Close()
	if err := child.Wait(); err != nil {
		t.Fatal(err)
	}
	if h, err := Lock(name); err != nil {
		t.Errorf("after the child: %v", err)
	} else if err := h.Unlock(); err != nil {
		t.Error(err)
	}
}

func TestLockNames(t *testing.T) {
	requireNamespace(t)
	for _, c := range []struct {
		name string
		ok   bool
	}{
		{"a", true}, {"@a", true}, {strings.Repeat("n", maxLockName), true},
		{"", false}, {strings.Repeat("n", maxLockName+1), false}, {"a\nb", false}, {"a\x00b", false},
	} {
		h, err := Lock(c.name)
		if (err == nil) != c.ok {
			t.Errorf("%q: got %v", c.name, err)
		}
		if err != nil {
			continue
		}
		if _, err := Lock(c.name); !isHeldBy(err, c.name, os.Getpid()) {
			t.Errorf("%q again: got %v", c.name, err)
		}
		if err := h.Unlock(); err != nil {
			t.Error(err)
		}
	}
}

// holdLock is what the test's child does: take the lock, say so, wait to be
// killed or told to end.
func holdLock(name string) int {
	if _, err := Lock(name); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("held")
	_, _ = bufio.NewReader(os.Stdin).ReadByte()
	return 0
}

func startHolder(t *testing.T, name string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asHolder+"="+name)
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
		t.Fatalf("holder said %q, %v", line, err)
	}
	return cmd
}

func TestLockDiesWithItsHolder(t *testing.T) {
	requireNamespace(t)
	const name = "kuma-test-killed"
	holder := startHolder(t, name)
	if _, err := Lock(name); !isHeldBy(err, name, holder.Process.Pid) {
		t.Errorf("got %v, want it held by %d", err, holder.Process.Pid)
	}
	start := time.Now()
	if _, err := LockWait(context.Background(), name, 50*time.Millisecond); !isHeldBy(err, name, holder.Process.Pid) {
		t.Errorf("after waiting: got %v, want it held by %d", err, holder.Process.Pid)
	}
	if waited := time.Since(start); waited < 50*time.Millisecond {
		t.Errorf("waited %v, want 50 ms", waited)
	}
	time.AfterFunc(30*time.Millisecond, func() { _ = holder.Process.Kill() })
	h, err := LockWait(context.Background(), name, 10*time.Second)
	if err != nil {
		t.Fatalf("after the kill: %v", err)
	}
	if err := h.Unlock(); err != nil {
		t.Error(err)
	}
}

func TestLockWaitIsCancelled(t *testing.T) {
	requireNamespace(t)
	h, err := Lock("kuma-test-cancel")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := LockWait(ctx, "kuma-test-cancel", time.Minute); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
	}
	if waited := time.Since(start); waited > 10*time.Second {
		t.Errorf("waited %v", waited)
	}
	if _, err := LockWait(ctx, "kuma-test-free", 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a free lock, cancelled before: got %v", err)
	}
}

func TestAbstractInode(t *testing.T) {
	const table = `Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00000000 0002 01   111 @kuma
0000000000000000: 00000002 00000000 00000000 0001 01 222
0000000000000000: 00000002 00000000 00000000 0001 01 333 /tmp/a @kuma
0000000000000000: 00000002 00000000 00000000 0001 01 444 @kuma x
0000000000000000: 00000002 00000000 00010000 0001 01    55 @kuma
`
	for name, want := range map[string]uint64{"kuma": 55, "kuma x": 444, "x": 0, "": 0} {
		if got, ok := abstractInode([]byte(table), name); got != want || ok != (want != 0) {
			t.Errorf("%q: got %d, %v, want %d", name, got, ok, want)
		}
	}
}

func TestXtablesLockHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "xtables.lock")
	t.Setenv("XTABLES_LOCKFILE", path)
	if pid, comm, ok := XtablesLockHolder(""); ok {
		t.Errorf("no file: got %d %s", pid, comm)
	}
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if pid, comm, ok := XtablesLockHolder(""); ok {
		t.Errorf("not locked: got %d %s", pid, comm)
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	pid, comm, ok := XtablesLockHolder("")
	if !ok || pid != os.Getpid() || comm != strings.TrimSpace(string(want)) {
		t.Errorf("locked: got %d %q %v, want %d %q", pid, comm, ok, os.Getpid(), want)
	}
}

func TestFlockHolder(t *testing.T) {
	const table = `1: POSIX  ADVISORY  WRITE 10 08:01:123 0 EOF
2: FLOCK  ADVISORY  WRITE 11 08:01:1234 0 EOF
3: FLOCK  ADVISORY  WRITE 12 00:1a:123 0 EOF
4: -> FLOCK  ADVISORY  WRITE 13 08:01:123 0 EOF
5: FLOCK  ADVISORY  WRITE 14 08:01:123 0 EOF
5: -> FLOCK  ADVISORY  WRITE 15 08:01:123 0 EOF
6: FLOCK  ADVISORY  WRITE -1 103:10:7 0 EOF
`
	for _, c := range []struct {
		major, minor, inode uint64
		pid                 int
	}{
		{8, 1, 123, 14}, {8, 1, 1234, 11}, {0, 0x1a, 123, 12}, {8, 2, 123, 0}, {0x103, 0x10, 7, 0},
	} {
		pid, ok := flockHolder([]byte(table), c.major, c.minor, c.inode)
		if ok != (c.pid != 0) || ok && pid != c.pid {
			t.Errorf("%d:%d:%d: got %d, %v, want %d", c.major, c.minor, c.inode, pid, ok, c.pid)
		}
	}
}

func TestDeviceNumbers(t *testing.T) {
	for _, c := range []struct{ dev, major, minor uint64 }{
		{0x0801, 8, 1}, {0x1a, 0, 0x1a}, {0x10300, 0x103, 0}, {0x100000 | 0x0105, 1, 0x105}, {0x1000_0000_0101, 0x1001, 1},
	} {
		if major, minor := deviceMajor(c.dev), deviceMinor(c.dev); major != c.major || minor != c.minor {
			t.Errorf("%#x: got %#x:%#x, want %#x:%#x", c.dev, major, minor, c.major, c.minor)
		}
	}
}

// Messages are walked without ever leaving them, whatever their lengths say.
func TestAttributesOfBrokenMessages(t *testing.T) {
	good := AppendAttr([]byte{1, 2, 3, 4}, 3, []byte("abcde\x00"))
	good = AppendAttr(good, 5, []byte("z"))
	for size := range len(good) + 1 {
		for typ, value := range attrs(good[:size], 4) {
			if typ == 3 && CString(value) != "abcde" || typ == 5 && CString(value) != "z" {
				t.Errorf("of %d bytes: %d=%q", size, typ, value)
			}
		}
	}
	for _, length := range []uint16{0, 3, 0xffff} {
		bad := slices.Clone(good)
		binary.NativeEndian.PutUint16(bad[4:], length)
		for typ, value := range attrs(bad, 4) {
			t.Errorf("length %d: %d=%q", length, typ, value)
		}
	}
	if _, _, ok := parseAddress([]byte{2, 33, 0, 0, 1, 0, 0, 0}); ok {
		t.Error("an address without an address")
	}
}

// The address works as soon as it is there: packets to it are delivered, and do
// not leave by the default route.
func TestAddressHasItsRouteAtOnce(t *testing.T) {
	inFreshNamespace(t, func(t *testing.T) {
		run(t, "", "ip", "link", "set", "lo", "up")
		p := netip.MustParsePrefix("::6/128")
		for range 200 {
			if added, err := AddLoopbackAddress(p); err != nil || !added {
				t.Errorf("AddLoopbackAddress: %v, %v", added, err)
				return
			}
			body := make([]byte, syscall.SizeofRtMsg)
			body[0], body[1] = syscall.AF_INET6, 128
			if local, err := isLocalRoute(AppendAttr(body, syscall.RTA_DST, p.Addr().AsSlice())); err != nil || !local {
				t.Errorf("local route %v, %v", local, err)
				return
			}
			if _, err := DelLoopbackAddress(p); err != nil {
				t.Errorf("DelLoopbackAddress: %v", err)
				return
			}
		}
	})
}
