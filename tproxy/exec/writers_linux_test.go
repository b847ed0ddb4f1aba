package exec_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/oldkuma"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// writer is a program that changes its own rules as fast as it can, and knows what it
// has there.
type writer struct {
	name string
	step func(n int) error
	// want is what it has in the tables now, as lines of iptables-save.
	want []string
}

// writers are those of one family: with iptables, with iptables-restore --noflush, and
// for iptables-nft with nft, in a table of its own and in one of iptables'.
func (w *world) writers(f rules.Family) []*writer {
	run := func(stdin, program string, args ...string) error {
		_, err := w.Lab.Run(w.Context(), w.Host, stdin, program, args...)
		return err
	}
	iptables, restore := w.program(f, ""), w.program(f, "restore")
	one := &writer{name: iptables}
	one.step = func(n int) error {
		rule := fmt.Sprintf("-A OUTPUT -p tcp -m tcp --dport %d -m comment --comment \"w1 KUMA_MESH %d\" -j ACCEPT", 1000+n%60000, n)
		args := words(rule)
		if err := run("", iptables, append([]string{"-w", "-t", "nat"}, args...)...); err != nil {
			return err
		}
		one.want = append(one.want, rule)
		if len(one.want) > 5 { // and delete the oldest one
			old := words(one.want[0])
			old[0] = "-D"
			if err := run("", iptables, append([]string{"-w", "-t", "nat"}, old...)...); err != nil {
				return err
			}
			one.want = one.want[1:]
		}
		return nil
	}
	two := &writer{name: restore}
	two.step = func(n int) error {
		var b strings.Builder
		b.WriteString("*nat\n:WRITER - [0:0]\n")
		var want []string
		for i := range 1 + n%7 {
			rule := fmt.Sprintf("-A WRITER -p udp -m udp --dport %d -j RETURN", 1+(n+i)%60000)
			want = append(want, rule)
			b.WriteString(rule + "\n")
		}
		err := run(b.String()+"COMMIT\n*raw\n:WRITER - [0:0]\n-A WRITER -j RETURN\nCOMMIT\n", restore, "--noflush", "--wait=5")
		if err == nil {
			two.want = append(want, "-A WRITER -j RETURN")
		}
		return err
	}
	out := []*writer{one, two}
	if w.variant() != tproxy.IPTablesNFT {
		return out
	}
	family := "ip"
	if f == rules.IPv6 {
		family = "ip6"
	}
	three := &writer{name: "nft"}
	three.step = func(n int) error {
		var want []string
		var b strings.Builder
		fmt.Fprintf(&b, "add chain %s nat NFT\nflush chain %[1]s nat NFT\nadd table %[1]s mine\ndelete table %[1]s mine\nadd table %[1]s mine\n", family)
		for i := range 1 + n%7 {
			port := 1 + (n+i)%60000
			fmt.Fprintf(&b, "add rule %s nat NFT udp sport %d counter accept\n", family, port)
			want = append(want, fmt.Sprintf("-A NFT -p udp -m udp --sport %d -j ACCEPT", port))
		}
		err := run(b.String(), "nft", "-f", "-")
		if err == nil {
			three.want = want
		}
		return err
	}
	return append(out, three)
}

// quiet are rules of others that nobody changes, with counters.
const quiet = `*nat
:QUIET - [0:0]
[7:420] -A QUIET -p tcp -m tcp --dport 9 -m comment --comment "redirects to KUMA_MESH_INBOUND" -j RETURN
[18446744073709551615:18446744073709551615] -A QUIET -p udp -m udp --dport 9 -j RETURN
-A POSTROUTING -j QUIET
COMMIT
*raw
:QUIET - [0:0]
[5:55] -A QUIET -p udp -m udp --dport 53 -j RETURN
COMMIT
`

// While others change their rules in the same tables as fast as they can, installs,
// upgrades and uninstalls lose none of theirs, bring none back, and keep counters.
func TestOtherWriters(t *testing.T) { beside(t, 3) }

func TestStressOtherWriters(t *testing.T) {
	onlyIn(t, "stress")
	beside(t, 60)
}

func beside(t *testing.T, rounds int) {
	eachBackend(t, func(w *world) {
		w.on("", "ip", "link", "set", "eth0", "down")
		for _, f := range rules.Families() {
			w.on(quiet, w.program(f, "restore"), "--counters", "--noflush")
		}
		counted := map[rules.Family]string{}
		for _, f := range rules.Families() {
			counted[f] = onlyLines(w.save(f), "QUIET")
		}
		all := map[rules.Family][]*writer{}
		done := make(chan struct{})
		var group sync.WaitGroup
		var steps, retries int
		var mu sync.Mutex
		for _, f := range rules.Families() {
			all[f] = w.writers(f)
			for _, wr := range all[f] {
				group.Go(func() {
					for n := 0; ; n++ {
						select {
						case <-done:
							return
						default:
						}
						if err := wr.step(n); err != nil {
							w.Errorf("%s, step %d: %v", wr.name, n, err)
							return
						}
						mu.Lock()
						steps++
						mu.Unlock()
					}
				})
			}
		}
		c := tproxy.Config{DNS: tproxy.DNS{CaptureAll: true}}
		other := tproxy.Config{Inbound: tproxy.Inbound{ExcludePorts: rules.MustPorts("80")}}
		start := time.Now()
		for n := range rounds {
			if n%3 == 0 {
				w.kumaUnlocked()
			}
			for _, c := range []tproxy.Config{c, other} {
				retries += w.install(c).Retries
			}
			retries += w.uninstall().Retries
		}
		close(done)
		group.Wait()
		w.Logf("%d installs, upgrades and uninstalls in %s beside %d changes of others; tried again %d times", 3*rounds, time.Since(start).Round(time.Millisecond), steps, retries)
		if left := w.nftable(); left != "" {
			w.Errorf("left\n%s", left)
		}
		for _, f := range rules.Families() {
			text := w.save(f)
			if strings.Contains(onlyLines(text, "-j KUMA_MESH")+onlyLines(text, ":KUMA_MESH"), "KUMA") {
				w.Errorf("%s: left\n%s", f, text)
			}
			if got := onlyLines(text, "QUIET"); got != counted[f] {
				w.Errorf("%s: counters of others:\n%s\nbefore\n%s", f, got, counted[f])
			}
			for _, wr := range all[f] {
				for _, rule := range wr.want {
					if n := countLines(text, rule); n != 1 {
						w.Errorf("%s of %s: %q stands there %d times", wr.name, f, rule, n)
					}
				}
			}
			if n, want := countLines(text, "-A OUTPUT -p tcp"), len(all[f][0].want); n != want {
				w.Errorf("%s: %d rules of %s, want %d: one came back, or was lost", f, n, all[f][0].name, want)
			}
		}
	})
}

// kumaUnlocked puts Kuma's rules in, beside writers.
func (w *world) kumaUnlocked() {
	w.Helper()
	for _, f := range rules.Families() {
		var err error
		for range 10 { // others change the chain in which it counts places
			_, err = w.Lab.Run(w.Context(), w.Host, oldkuma.Script(oldkuma.Second, f, oldkuma.Options{DNS: true}), w.program(f, "restore"), "--noflush", "--wait=5")
			if err == nil {
				break
			}
		}
		if err != nil {
			w.Fatal(err)
		}
	}
}

func onlyLines(text, words string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if strings.Contains(line, words) {
			b.WriteString(line)
		}
	}
	return b.String()
}

// countLines counts the lines that begin with a rule, counters apart.
func countLines(text, rule string) (n int) {
	for line := range strings.Lines(text) {
		if _, spec, ok := strings.Cut(line, "] "); ok && strings.HasPrefix(line, "[") {
			line = spec
		}
		if strings.HasPrefix(strings.TrimSuffix(line, "\n")+" ", rule+" ") || strings.HasPrefix(line, rule+"\n") {
			n++
		}
	}
	return n
}
