package rules

import (
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// For each family it is the Set, and each rule is at its place.
func TestNativeForAFamily(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := nativeSets().Draw(t, "set")
		n, err := s.Native("mine")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range Families() {
			if s.Only != 0 && s.Only != f {
				continue
			}
			got := n.For(f)
			if c := Compare(f, got, s); c != nil {
				t.Fatalf("%s: %v\n%s", f, c, n.Text())
			}
			at := func(chain string, list []Rule) {
				c, _ := n.chain(chain)
				last := 0
				for _, r := range list {
					if r.At <= last || r.At > len(c.Rules) || c.Rules[r.At-1].Comment != r.Why || !c.Rules[r.At-1].isFor(f) {
						t.Fatalf("%s: rule %v of %s is not at %d\n%s", f, r, chain, r.At, n.Text())
					}
					last = r.At
				}
			}
			for _, c := range got.Bases {
				at(nativeName(c.Table, string(c.Hook)), c.Rules)
			}
			for _, c := range got.Chains {
				at(nativeName(c.Table, c.Name), c.Rules)
			}
		}
	})
}

// Where the kernel calls a chain is in its Offset, and what somebody did to the table
// concerns no more than it does.
func TestNativeForMeddledWith(t *testing.T) {
	const table = `table inet mine {
	set ports {
		type inet_service
		flags interval
		elements = { 80, 443 }
	}

	chain nat.OUTPUT {
		type nat hook output priority -101; policy accept;
		meta l4proto tcp counter jump nat.OURS
		counter jump foo
	}

	chain nat.PREROUTING {
		type nat hook prerouting priority -99; policy accept;
		meta l4proto tcp tcp dport @ports counter redirect to :1
		meta nfproto ipv6 counter drop
	}

	chain nat.OURS {
		meta nfproto != ipv4 counter redirect to :6
		meta nfproto != ipv6 counter redirect to :4
		meta skuid != 5 counter return
	}

	chain other {
		type filter hook output priority 7; policy accept;
		counter jump nat.OURS
	}

	chain foo {
		counter drop
	}
}
`
	n, err := ParseNative([]byte(table))
	if err != nil {
		t.Fatal(err)
	}
	said := func(n Native, f Family) string {
		var b strings.Builder
		line := func(r Rule) { b.WriteString(" " + r.String() + ";") }
		s := n.For(f)
		for _, c := range s.Bases {
			b.WriteString(strings.TrimSpace(strings.Join([]string{string(c.Table), string(c.Hook), c.Name, c.Policy}, " ")))
			b.WriteString(map[bool]string{true: " before", false: ""}[c.Offset < 0])
			b.WriteString(map[bool]string{true: " behind", false: ""}[c.Offset > 0] + ":")
			slices.Values(c.Rules)(func(r Rule) bool { line(r); return true })
			b.WriteString("\n")
		}
		for _, name := range []string{"OURS", "foo"} {
			c, ok := s.Chain(NAT, name)
			if b.WriteString(name + ":"); !ok {
				b.WriteString(" none")
			}
			slices.Values(c.Rules)(func(r Rule) bool { line(r); return true })
			b.WriteString("\n")
		}
		return b.String()
	}
	strange := func(what ...string) Native {
		m := n
		m.Strange = what
		return m
	}
	const (
		output  = "nat OUTPUT before: -p tcp -j OURS; -j foo;\n"
		ports   = "nat PREROUTING behind: -p tcp -m multiport --dports 80,443 -j REDIRECT --to-ports 1;\n"
		chains4 = "filter OUTPUT other behind: jump nat.OURS;\nOURS: -j REDIRECT --to-ports 4; -m owner ! --uid-owner 5 meta skuid != 5 -j RETURN;\nfoo: -j DROP;\n"
	)
	for name, test := range map[string]struct {
		n    Native
		f    Family
		want string
	}{
		"IPv4":         {n, IPv4, output + ports + chains4},
		"IPv6":         {n, IPv6, output + strings.TrimSuffix(ports, "\n") + " -j DROP;\n" + strings.Replace(chains4, "ports 4", "ports 6", 1)},
		"dormant":      {strange(NativeDormant), IPv4, chains4[strings.Index(chains4, "OURS:"):]},
		"a policy":     {strange("chain nat.OUTPUT: policy drop"), IPv4, strings.Replace(output, "OUTPUT", "OUTPUT  DROP", 1) + ports + chains4},
		"a flag":       {strange("chain nat.OURS: flags 0x4"), IPv4, output + ports + strings.Replace(chains4, "OURS: ", "OURS: flags 0x4 flags 0x4; ", 1)},
		"a set":        {strange("set ports: flags 0x10"), IPv4, output + strings.Replace(ports, " -j", " th dport @ports -j", 1) + chains4},
		"an object":    {strange("object x", "flowtable y"), IPv4, output + ports + chains4},
		"who knows it": {strange("flags 0x8 of the table"), IPv4, "flags"},
	} {
		got := said(test.n, test.f)
		if test.want == "flags" {
			if strings.Count(got, "flags 0x8 of the table") != 10 {
				t.Errorf("%s:\n%s", name, got)
			}
			continue
		}
		if got != test.want {
			t.Errorf("%s:\n%swant\n%s", name, got, test.want)
		}
	}
}
