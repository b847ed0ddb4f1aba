package nft

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io/fs"
	osexec "os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

func TestMain(m *testing.M) { netlab.Main(m) }

// fresh runs f on a thread in a network namespace of its own, while the process stays
// where it is: as a CNI plugin does.
func fresh(t testing.TB, f func(c *Conn)) {
	t.Helper()
	netlab.Require(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
			t.Errorf("unshare: %v", err)
			return
		}
		c, err := Open()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		f(c)
	}()
	<-done
}

type failer interface {
	Helper()
	Fatalf(string, ...any)
}

func send(t failer, c *Conn, since uint32, commands ...rules.NativeCommand) {
	t.Helper()
	if err := c.Send(Encode(commands, binary.NativeEndian), since); err != nil {
		t.Fatalf("%v\n%s", err, rules.NativeScript(commands))
	}
}

func list(t failer, c *Conn, table string) (*rules.Native, uint32) {
	t.Helper()
	n, generation, err := c.List(table)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return n, generation
}

// nft runs nft(8) in the namespace of the calling thread.
func nft(t testing.TB, stdin string, args ...string) string {
	t.Helper()
	netlab.Require(t, "nft")
	cmd := osexec.Command("nft", args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, complaint strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		t.Fatalf("nft %s: %v\n%s\n%s", strings.Join(args, " "), err, complaint.String(), stdin)
	}
	return out.String()
}

func TestSupported(t *testing.T) {
	fresh(t, func(c *Conn) {
		if err := c.Supported(); err != nil {
			t.Error(err)
		}
	})
}

// What was sent is what is listed, and by the commands of a transition the kernel's table
// becomes the other.
func TestListIsWhatWasSent(t *testing.T) {
	fresh(t, func(c *Conn) {
		rapid.Check(t, func(t *rapid.T) {
			a, b := natives().Draw(t, "first"), natives().Draw(t, "then")
			if there, _ := list(t, c, "mine"); there != nil {
				send(t, c, 0, rules.NativeTransition(there, nil)...)
			}
			for _, want := range []*rules.Native{a, b} {
				live, generation := list(t, c, "mine")
				send(t, c, generation, rules.NativeTransition(live, want)...)
				got, _ := list(t, c, "mine")
				if got == nil || !got.Equal(want) {
					t.Fatalf("%s\nstrange %q, want\n%s", got.Text(), got.Strange, want.Text())
				}
			}
		})
	})
}

// The tables of real plans.
func TestPlans(t *testing.T) {
	fresh(t, func(c *Conn) {
		rapid.Check(t, func(t *rapid.T) {
			live, generation := list(t, c, "kuma-tproxy")
			want := plans().Draw(t, "table")
			send(t, c, generation, rules.NativeTransition(live, want)...)
			got, generation := list(t, c, "kuma-tproxy")
			if got == nil || !got.Equal(want) {
				t.Fatalf("%s\nwant\n%s", got.Text(), want.Text())
			}
			if more := rules.NativeTransition(got, want); len(more) > 0 {
				t.Fatalf("once more: %s", rules.NativeScript(more))
			}
			if _, again := list(t, c, "kuma-tproxy"); again != generation {
				t.Fatalf("reading made generation %d of %d", again, generation)
			}
		})
	})
}

// plans draws the tables of real plans.
func plans() *rapid.Generator[*rules.Native] {
	return rapid.Custom(func(t *rapid.T) *rules.Native {
		cfg := tproxytest.Configs().Draw(t, "config")
		plan, err := tproxy.Build(cfg, tproxytest.Hosts(cfg).Draw(t, "host"))
		if err != nil {
			return nil
		}
		n, err := plan.Rules.Native("kuma-tproxy")
		if err != nil {
			return nil
		}
		return &n
	}).Filter(func(n *rules.Native) bool { return n != nil })
}

// The text applied by nft(8) in one namespace and the bytes in another one list the same.
func TestTextAndNetlinkListTheSame(t *testing.T) {
	netlab.Require(t, "nft")
	both := func(n *rules.Native, apply func(c *Conn)) (text, data string) {
		fresh(t, func(c *Conn) {
			apply(c)
			text = nft(t, "", "list", "ruleset")
			data = withoutHandles(t, nft(t, "", "-j", "list", "ruleset"))
			if got, _ := list(t, c, n.Table); got == nil || !got.Equal(n) {
				t.Errorf("it is read as\n%s\nstrange %q, want\n%s", got.Text(), got.Strange, n.Text())
			}
		})
		return text, data
	}
	tables := []*rules.Native{everything()}
	for seed := range 12 {
		tables = append(tables, plans().Example(seed))
	}
	for i, n := range tables {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			text, data := both(n, func(*Conn) { nft(t, string(n.Text()), "-f", "-") })
			text2, data2 := both(n, func(c *Conn) { send(t, c, 0, rules.NativeTransition(nil, n)...) })
			if d := cmp.Diff(text, text2); d != "" {
				t.Errorf("nft list ruleset (-text +netlink)\n%s", d)
			}
			if d := cmp.Diff(data, data2); d != "" {
				t.Errorf("nft -j list ruleset (-text +netlink)\n%s", d)
			}
		})
	}
}

func withoutHandles(t testing.TB, text string) string {
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			delete(v, "handle")
			for _, w := range v {
				walk(w)
			}
		case []any:
			for _, w := range v {
				walk(w)
			}
		}
	}
	walk(v)
	out, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestRefusals(t *testing.T) {
	table := func(verb rules.NativeVerb) rules.NativeCommand { return rules.NativeCommand{Verb: verb, Table: "mine"} }
	chain := func(verb rules.NativeVerb, name string) rules.NativeCommand {
		return rules.NativeCommand{Verb: verb, Table: "mine", Chain: rules.NativeChain{Name: name}}
	}
	rule := func(in string, a rules.Action, ms ...rules.NativeMatch) rules.NativeCommand {
		return rules.NativeCommand{Verb: rules.AddRule, Table: "mine", Chain: rules.NativeChain{Name: in}, Rule: rules.NativeRule{Action: a, Matches: ms}}
	}
	set := func(ranges ...rules.NativeRange) rules.NativeCommand {
		return rules.NativeCommand{Verb: rules.AddSet, Table: "mine", Set: rules.NativeSet{Name: "s", Type: "inet_service", Elements: ranges}}
	}
	for name, c := range map[string]struct {
		commands []rules.NativeCommand
		at       int
		errno    syscall.Errno
		more     int
	}{
		"a jump to no chain":         {[]rules.NativeCommand{table(rules.AddTable), chain(rules.AddChain, "a"), rule("a", rules.Return{}), rule("a", rules.Jump{Chain: "b"})}, 3, syscall.ENOENT, 0},
		"a rule in no chain":         {[]rules.NativeCommand{table(rules.AddTable), rule("a", rules.Return{}), chain(rules.AddChain, "b")}, 1, syscall.ENOENT, 0},
		"two that are wrong":         {[]rules.NativeCommand{table(rules.AddTable), rule("a", rules.Return{}), rule("b", rules.Return{})}, 1, syscall.ENOENT, 1},
		"a look-up in no set":        {[]rules.NativeCommand{table(rules.AddTable), chain(rules.AddChain, "a"), rule("a", rules.Return{}, proto(6), rules.NativeMatch{Key: rules.KeySourcePort, Set: "s"})}, 2, syscall.ENOENT, 0},
		"a range in another one":     {[]rules.NativeCommand{table(rules.AddTable), set(rules.NativeRange{First: be16(1), Last: be16(9)}, rules.NativeRange{First: be16(3), Last: be16(4)}), chain(rules.AddChain, "a")}, 1, 0, 0}, // EEXIST or ENOTEMPTY,
		"a set that is there":        {[]rules.NativeCommand{table(rules.AddTable), set(), set()}, 2, syscall.EEXIST, 0},
		"a chain that is there":      {[]rules.NativeCommand{table(rules.AddTable), chain(rules.AddChain, "a"), chain(rules.AddChain, "a")}, 2, syscall.EEXIST, 0},
		"a table that vanished":      {[]rules.NativeCommand{chain(rules.AddChain, "a"), rule("a", rules.Return{})}, 0, syscall.ENOENT, 1},
		"no table to delete":         {[]rules.NativeCommand{table(rules.DeleteTable)}, 0, syscall.ENOENT, 0},
		"a chain that is in use":     {[]rules.NativeCommand{table(rules.AddTable), chain(rules.AddChain, "a"), chain(rules.AddChain, "b"), rule("a", rules.Jump{Chain: "b"}), chain(rules.DeleteChain, "b")}, 4, syscall.EBUSY, 0},
		"a redirection outside nat":  {[]rules.NativeCommand{table(rules.AddTable), {Verb: rules.AddChain, Table: "mine", Chain: rules.NativeChain{Name: "in", Hook: rules.Input, Type: "filter"}}, rule("in", rules.Redirect{Port: 1}, proto(6))}, 2, syscall.EOPNOTSUPP, 0},
		"a loop":                     {[]rules.NativeCommand{table(rules.AddTable), {Verb: rules.AddChain, Table: "mine", Chain: rules.NativeChain{Name: "in", Hook: rules.Input, Type: "filter"}}, chain(rules.AddChain, "a"), rule("in", rules.Jump{Chain: "a"}), rule("a", rules.Jump{Chain: "a"})}, 4, syscall.EMLINK, 0},
		"nat that is called outside": {[]rules.NativeCommand{table(rules.AddTable), {Verb: rules.AddChain, Table: "mine", Chain: rules.NativeChain{Name: "f", Hook: rules.Forward, Type: "nat"}}}, 1, syscall.EOPNOTSUPP, 0},
	} {
		t.Run(name, func(t *testing.T) {
			fresh(t, func(conn *Conn) {
				_, before := list(t, conn, "mine")
				err := conn.Send(Encode(c.commands, binary.NativeEndian), 0)
				var refusal *Error
				if !errors.As(err, &refusal) || refusal.Command != c.at || c.errno != 0 && refusal.Errno != c.errno || refusal.More != c.more {
					t.Errorf("%v, %+v; want command %d, %v and %d more", err, refusal, c.at, c.errno, c.more)
				}
				if got, after := list(t, conn, "mine"); got != nil || after != before {
					t.Errorf("something was done: %v, generation %d of %d", got, after, before)
				}
				send(t, conn, before, table(rules.AddTable)) // the connection is as good as before
			})
		})
	}
}

// More refusals than the socket has room for are a refusal too, and the next batch is not
// answered with what is left of them.
func TestManyRefusals(t *testing.T) {
	fresh(t, func(c *Conn) {
		if err := syscall.SetsockoptInt(c.n.FD(), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 1); err != nil {
			t.Error(err)
		}
		commands := []rules.NativeCommand{{Verb: rules.AddTable, Table: "mine"}}
		for range 3000 {
			commands = append(commands, rules.NativeCommand{Verb: rules.AddRule, Table: "mine", Chain: rules.NativeChain{Name: "none"}, Rule: rules.NativeRule{Action: rules.Return{}}})
		}
		for range 2 {
			var refusal *Error
			if err := c.Send(Encode(commands, binary.NativeEndian), 0); !errors.As(err, &refusal) || refusal.Command != 1 || refusal.Errno != syscall.ENOENT {
				t.Errorf("%v", err)
			}
			send(t, c, 0, commands[0], rules.NativeCommand{Verb: rules.DeleteTable, Table: "mine"})
			if n, _ := list(t, c, "mine"); n != nil {
				t.Errorf("%v", n)
			}
		}
	})
}

// Where the answers are lost, that is said: what was done has to be read.
func TestLostAnswer(t *testing.T) {
	fresh(t, func(c *Conn) {
		// A socket that is full already: answers to requests that nobody reads.
		if err := syscall.SetsockoptInt(c.n.FD(), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 1); err != nil {
			t.Error(err)
		}
		for range 50 {
			_ = c.n.Send(getGen, 0, []byte{0, 0, 0, 0})
		}
		add := Encode([]rules.NativeCommand{{Verb: rules.AddTable, Table: "mine"}}, binary.NativeEndian)
		if err := c.Send(add, 0); !errors.Is(err, ErrUnknown) {
			t.Errorf("%v", err)
		}
		if err := c.Send(add, 0); !errors.Is(err, syscall.EEXIST) {
			t.Errorf("%v", err)
		}
		if n, _ := list(t, c, "mine"); n == nil {
			t.Error("it was done, in truth")
		}
	})
}

func TestRefusedWithoutCapability(t *testing.T) {
	fresh(t, func(c *Conn) {
		// The system calls themselves: package syscall's change every thread.
		for _, trap := range []uintptr{syscall.SYS_SETRESGID, syscall.SYS_SETRESUID} {
			if _, _, errno := syscall.RawSyscall(trap, 65534, 65534, 65534); errno != 0 {
				t.Skipf("become nobody: %v", errno)
			}
		}
		// The kernel looks at who opened the socket too (netlink_net_capable).
		mine, err := Open()
		if err != nil {
			t.Error(err)
			return
		}
		defer mine.Close()
		err = mine.Send(Encode([]rules.NativeCommand{{Verb: rules.AddTable, Table: "mine"}}, binary.NativeEndian), 0)
		var refusal *Error
		if !errors.Is(err, fs.ErrPermission) || !errors.As(err, &refusal) || refusal.Command != -1 {
			t.Errorf("send: %v", err)
		}
		if err := mine.Supported(); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("supported: %v", err)
		}
		if _, _, err := mine.List("mine"); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("list: %v", err)
		}
	})
}

// A batch that was made for what is not there any more is told, and nothing is done.
func TestChanged(t *testing.T) {
	fresh(t, func(c *Conn) {
		_, generation := list(t, c, "mine")
		add := []rules.NativeCommand{{Verb: rules.AddTable, Table: "mine"}}
		send(t, c, generation, rules.NativeCommand{Verb: rules.AddTable, Table: "other"})
		b := Encode(add, binary.NativeEndian)
		if err := c.Send(b, generation); !errors.Is(err, ErrChanged) {
			t.Errorf("%v", err)
		}
		if n, _ := list(t, c, "mine"); n != nil {
			t.Error("it was done")
		}
		_, generation = list(t, c, "mine")
		if err := c.Send(b, generation); err != nil {
			t.Errorf("of the last one: %v", err)
		}
	})
}

func TestSets(t *testing.T) {
	for _, size := range []int{1, 2, 4000, 10000, 30000} {
		fresh(t, func(c *Conn) {
			n := &rules.Native{Table: "mine"}
			ports := rules.NativeSet{Name: "ports", Type: "inet_service"}
			for i := range min(size, 32768) {
				ports.Elements = append(ports.Elements, rules.NativeRange{First: be16(uint16(2 * i)), Last: be16(uint16(2 * i))})
			}
			long := rules.NativeSet{Name: "v6", Type: "ipv6_addr"}
			for i := range size {
				first := append(num(0xfd000000), append(num(uint32(i)), make([]byte, 8)...)...)
				last := append(num(0xfd000000), append(num(uint32(i)), append(num(0), num(7)...)...)...)
				long.Elements = append(long.Elements, rules.NativeRange{First: first, Last: last})
			}
			n.Sets = []rules.NativeSet{ports, long}
			err := c.Send(Encode(rules.NativeTransition(nil, n), binary.NativeEndian), 0)
			if errors.Is(err, syscall.EMSGSIZE) && syscall.SetsockoptInt(c.n.FD(), syscall.SOL_SOCKET, syscall.SO_SNDBUFFORCE, 1) != nil {
				t.Logf("%d elements as root of a user namespace: %v", size, err)
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			if got, _ := list(t, c, "mine"); !got.Equal(n) {
				t.Errorf("%d elements: %d and %d", size, len(got.Sets[0].Elements), len(got.Sets[1].Elements))
			}
		})
	}
}

// What nft(8) lists of a set of 10000 elements is what it lists of the text.
func TestSetsOfTheText(t *testing.T) {
	n := everything()
	n.Sets[1].Elements = nil
	for i := range 10000 {
		n.Sets[1].Elements = append(n.Sets[1].Elements, rules.NativeRange{First: be16(uint16(5 * i)), Last: be16(uint16(5*i + i%3))})
	}
	var texts []string
	for _, apply := range []func(c *Conn){
		func(*Conn) { nft(t, string(n.Text()), "-f", "-") },
		func(c *Conn) { send(t, c, 0, rules.NativeTransition(nil, n)...) },
	} {
		fresh(t, func(c *Conn) {
			apply(c)
			texts = append(texts, nft(t, "", "list", "ruleset"))
			if got, _ := list(t, c, "mine"); !got.Equal(n) {
				t.Error("it is read otherwise")
			}
		})
	}
	if texts[0] != texts[1] {
		t.Error(cmp.Diff(texts[0], texts[1]))
	}
}

// Whatever no table of ours has is told.
func TestStrange(t *testing.T) {
	for text, want := range map[string][]string{
		"chain c { }": nil,
		"chain c { type filter hook input priority 0; policy drop; }":                                       {"chain c: policy drop"},
		"chain c { type filter hook ingress device lo priority 0; }":                                        {"chain c: attribute 3 of the hook", "chain c: attribute 4 of the hook", "chain c: hook 5", `chain c: type "filter"`},
		"flags dormant; chain c { }":                                                                        {"the table is dormant"},
		"counter k { }":                                                                                     {"object k"},
		"quota q { over 5 bytes }":                                                                          {"object q"},
		"set s { type inet_service; }":                                                                      {"set s: flags 0x0"},
		"set s { type inet_service; flags interval,timeout; timeout 1h; }":                                  {"set s: attribute 11", "set s: flags 0x14"},
		"set s { type mark; flags interval; }":                                                              {"set s: keys of type 19 and 4 bytes"},
		"set s { type inet_service; flags interval; size 9; }":                                              {"set s: a size, or several fields"},
		"set s { type inet_service; flags interval; policy memory; }":                                       {"set s: attribute 8"},
		"set s { type inet_service . ipv4_addr; flags interval; }":                                          {"set s: a size, or several fields", "set s: flags 0x84", "set s: keys of type 839 and 8 bytes"},
		"set s { type inet_service; flags dynamic; }":                                                       {"set s: flags 0x20"},
		"set s { type inet_service; flags interval; counter; elements = { 1 counter packets 0 bytes 0 }; }": {"set s: attribute 17"},
		"map m { type inet_service : verdict; flags interval; }":                                            {"set m: attribute 6", "set m: attribute 7", "set m: flags 0xc"},
		"map m { type inet_service : mark; }":                                                               {"set m: attribute 6", "set m: attribute 7", "set m: flags 0x8"},
		"chain c { tcp dport { 1, 2 } accept; }":                                                            {"set __set0: a size, or several fields", "set __set0: flags 0x3"},
		"chain c { jump { accept; }; }":                                                                     {"chain __chain0: flags 0x4"},
	} {
		fresh(t, func(c *Conn) {
			nft(t, "table inet mine {\n"+text+"\n}", "-f", "-")
			got, _ := list(t, c, "mine")
			slices.Sort(got.Strange)
			for i, what := range got.Strange {
				got.Strange[i] = numbered.ReplaceAllString(what, "__chain0") // the kernel counts on
			}
			if d := cmp.Diff(want, got.Strange); d != "" {
				t.Errorf("%s: (-want +got)\n%s", text, d)
			}
			if len(want) > 0 && got.Equal(got) {
				t.Errorf("%s: it equals a table of ours", text)
			}
		})
	}
}

var numbered = regexp.MustCompile(`__chain[0-9]+`)

// Of each rule that is none of ours it is said what it has.
func TestUnknown(t *testing.T) {
	for text, want := range map[string]string{
		"meta l4proto tcp counter accept":                 "",
		"socket transparent 1 accept":                     "expression socket",
		"limit rate 5/second accept":                      "expression limit",
		`log prefix "x" accept`:                           "expression log",
		"quota over 5 bytes accept":                       "expression quota",
		"ip ttl 5 accept":                                 "payload 1 at 8",
		"ip6 hoplimit 5":                                  "payload 1 at 7",
		"meta iif lo accept":                              "meta key 4",
		"meta cpu 1":                                      "meta key 20",
		"ct mark 5":                                       "ct key 3",
		"ct zone 5":                                       "ct key 17",
		"ct original ip saddr 10.0.0.1":                   "ct key 19",
		"fib daddr . iif type local":                      "expression fib",
		"fib saddr oif lo":                                "expression fib",
		"tcp dport > 5 accept":                            "payload 2 at 2 and cmp",
		"tcp option maxseg size 5":                        "expression exthdr",
		"ip saddr & 0xff == 1":                            "payload 1 at 12 and bitwise",
		"@nh,96,32 0x7f000001":                            "payload 1 at 12",
		"@th,104,8 2":                                     "payload 2 at 13",
		"ct state == new":                                 "ct key 0 and cmp",
		"ct state != new,related":                         "ct key 0 and cmp",
		"tcp flags == syn":                                "payload 2 at 13 and cmp",
		"meta l4proto != tcp":                             "meta key 16 and cmp",
		"meta l4proto & 15 == 6":                          "meta key 16 and bitwise",
		"meta mark 1-2":                                   "meta key 3 and byteorder",
		"tcp dport & 1 == 1":                              "payload 2 at 2 and bitwise",
		"ip saddr & 255.0.255.0 == 10.0.1.0":              "payload 1 at 12 and bitwise",
		"icmp checksum 5":                                 "payload 2 at 2",
		"meta mark & 3 == 1 | 2":                          "",
		"ct state & 3 == 1":                               "ct key 0 and bitwise",
		"numgen random mod 2 0 accept":                    "expression numgen",
		"jhash ip saddr mod 2 seed 1 0":                   "payload 1 at 12",
		"counter meta l4proto tcp accept":                 "meta key 16 and cmp",
		"counter counter":                                 "expression counter",
		"reject":                                          "expression reject",
		"meta nftrace set 1":                              "expression immediate",
		"ct mark set 1":                                   "expression immediate",
		"meta mark set ct mark":                           "ct key 3",
		"meta priority set 1":                             "expression immediate",
		"ip saddr set 10.0.0.1":                           "expression immediate",
		"continue":                                        "expression immediate",
		"meta l4proto tcp tproxy to :5":                   "expression immediate",
		"tcp dport 1-2 ip saddr 10.0.0.0-10.0.0.9 accept": "",
		"meta skuid > 5":                                  "meta key 10 and byteorder",
		`iifname "a*" oifname "fifteen-bytes-x"`:          "",
	} {
		fresh(t, func(c *Conn) {
			nft(t, "table inet mine { chain c { "+text+"; }; }", "-f", "-")
			got, _ := list(t, c, "mine")
			if r := got.Chains[0].Rules; len(r) != 1 || r[0].Unknown != want {
				t.Errorf("%s: %+v, want %q", text, r, want)
			}
		})
	}
}

// Another table of the same name in another family, or of another name, is none of it.
func TestListIsOfTheTableAlone(t *testing.T) {
	fresh(t, func(c *Conn) {
		nft(t, "table ip mine { chain c { accept; }; set s { type inet_service; }; counter k { }; }\ntable inet mines { chain c { accept; }; set s { type inet_service; }; counter k { }; }", "-f", "-")
		if got, _ := list(t, c, "mine"); got != nil {
			t.Errorf("%s", got.Text())
		}
		n := everything()
		send(t, c, 0, rules.NativeTransition(nil, n)...)
		if got, _ := list(t, c, "mine"); !got.Equal(n) {
			t.Errorf("%s\nstrange %q", got.Text(), got.Strange)
		}
	})
}

func TestCounters(t *testing.T) {
	fresh(t, func(c *Conn) {
		nft(t, "table inet mine { chain c { counter packets 5 bytes 300 accept; counter packets 7 bytes 1 socket transparent 1; socket transparent 1 counter packets 8 bytes 2; }; }", "-f", "-")
		got, _ := list(t, c, "mine")
		want := []rules.Counter{{Packets: 5, Bytes: 300}, {Packets: 7, Bytes: 1}, {Packets: 8, Bytes: 2}}
		for i, r := range got.Chains[0].Rules {
			if r.Counter != want[i] {
				t.Errorf("rule %d: %+v, want %+v", i+1, r, want[i])
			}
		}
	})
}

// While others write, what is read is of one generation, or it is said that it could not be.
func TestListWhileOthersWrite(t *testing.T) {
	fresh(t, func(c *Conn) {
		a, b := everything(), everything()
		a.Chains[6].Rules, b.Sets[1].Name = a.Chains[6].Rules[:2], "ports2"
		for i, r := range b.Chains[6].Rules {
			for j := range r.Matches {
				if r.Matches[j].Set == "ports" {
					b.Chains[6].Rules[i].Matches[j].Set = "ports2"
				}
			}
		}
		other, err := Open()
		if err != nil {
			t.Error(err)
			return
		}
		defer other.Close()
		send(t, c, 0, rules.NativeTransition(nil, a)...)
		stop, done := make(chan struct{}), make(chan error, 1)
		go func() {
			there, back := Encode(rules.NativeTransition(a, b), binary.NativeEndian), Encode(rules.NativeTransition(b, a), binary.NativeEndian)
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				for _, batch := range []*Batch{there, back} {
					if err := other.Send(batch, 0); err != nil {
						done <- err
						return
					}
				}
			}
		}()
		read := 0
		for range 300 {
			got, _, err := c.List("mine")
			if err != nil {
				if !errors.Is(err, kernel.ErrChanging) {
					t.Error(err)
				}
				continue
			}
			read++
			if !got.Equal(a) && !got.Equal(b) {
				t.Errorf("neither\n%s\nstrange %q", got.Text(), got.Strange)
			}
		}
		close(stop)
		if err := <-done; err != nil {
			t.Error(err)
		}
		t.Logf("%d of 300 were read", read)
	})
}
