package rules

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// matches of a rule, for tables: a %T without the package and the rule's text.
func words(r Rule) string {
	var b strings.Builder
	for _, m := range r.Matches {
		name := strings.TrimPrefix(fmt.Sprintf("%T", m), "rules.")
		if o, ok := m.(Opaque); ok {
			name += fmt.Sprintf("(%s)", o.Text())
		}
		b.WriteString(name + " ")
	}
	name := strings.TrimPrefix(fmt.Sprintf("%T", r.Action), "rules.")
	if o, ok := r.Action.(Opaque); ok {
		name += fmt.Sprintf("(%s)", o.Text())
	}
	return b.String() + "=> " + name
}

func TestParseRule(t *testing.T) {
	for _, test := range []struct{ in, kinds, text string }{
		{"", "=> Nothing", ""},
		{"-s 10.0.0.0/8 -d 192.0.2.1/32 -i eth0 -o lo -p tcp -j RETURN", "Source Destination InInterface OutInterface Protocol => Return", "-s 10.0.0.0/8 -d 192.0.2.1/32 -i eth0 -o lo -p tcp -j RETURN"},
		{"! -s 10.0.0.0/8 ! -d 10.1.0.0/16 ! -i a+ ! -o lo -j DROP", "Source Destination InInterface OutInterface => Drop", "! -s 10.0.0.0/8 ! -d 10.1.0.0/16 ! -i a+ ! -o lo -j DROP"},
		{"-s 10.1.2.3 -d 10.1.2.3/8 -j ACCEPT", "Source Destination => Accept", "-s 10.1.2.3/32 -d 10.0.0.0/8 -j ACCEPT"},
		{"-s 0.0.0.0/0 -i + -p all -p 0 -p tcp -m tcp --sport 0:65535 --dport :", "Protocol => Nothing", "-p tcp"},
		{"! -s 0.0.0.0/0 ! -o +", "Opaque(! -s 0.0.0.0/0) Opaque(! -o +) => Nothing", ""},
		{"-s 10.0.0.1/255.0.255.0", "Opaque(-s 10.0.0.1/255.0.255.0) => Nothing", ""},
		{"-d example.org", "Opaque(-d example.org) => Nothing", ""},
		{"-p icmp", "Protocol => Nothing", "-p 1"},
		{"-p ipv6-icmp", "Protocol => Nothing", "-p 58"},
		{"-p sctp", "Protocol => Nothing", "-p 132"},
		{"-p 253", "Protocol => Nothing", "-p 253"},
		{"-p newproto", "Opaque(-p newproto) => Nothing", ""},
		{"! -p tcp -j DROP", "Opaque(! -p tcp) => Drop", ""},
		{"-f -j DROP", "Opaque(-f) => Drop", ""},
		{"! -f -j DROP", "Opaque(! -f) => Drop", ""},
		{"-p tcp -m tcp -j DROP", "Protocol => Drop", "-p tcp -j DROP"},
		{"-p tcp -m tcp --syn", "Protocol SYN => Nothing", "-p tcp -m tcp --syn"},
		{"-p tcp -m tcp --dport 80 --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN", "Protocol SYN DestinationPorts => Return", "-p tcp -m tcp --syn --dport 80 -j RETURN"},
		{"-p tcp -m tcp --tcp-flags SYN,RST,ACK,FIN SYN", "Protocol SYN => Nothing", "-p tcp -m tcp --syn"},
		{"-p tcp -m tcp ! --syn", "Protocol SYN => Nothing", "-p tcp -m tcp ! --syn"},
		{"-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack --ctstate NEW -j DROP", "Protocol SYN CTState => Drop", "-p tcp -m tcp ! --syn -m conntrack --ctstate NEW -j DROP"},
		{"-p tcp -m tcp --dport 80 --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu", "Protocol Opaque(-m tcp --dport 80 --tcp-flags SYN,RST SYN) => Opaque(-j TCPMSS --clamp-mss-to-pmtu)", ""},
		{"-p tcp -m tcp --dport 80 --tcp-option 3", "Protocol Opaque(-m tcp --dport 80 --tcp-option 3) => Nothing", ""},
		{"-p tcp -m tcp --dport 80:90 -p tcp --sport 1", "Protocol Protocol SourcePorts DestinationPorts => Nothing", ""},
		{"-p tcp -m tcp ! --dport 80", "Protocol DestinationPorts => Nothing", "-p tcp -m tcp ! --dport 80"},
		{"-p tcp -m tcp ! --sport 80", "Protocol SourcePorts => Nothing", "-p tcp -m tcp ! --sport 80"},
		{"-p tcp -m tcp --dport 0:80", "Protocol Opaque(-m tcp --dport 0:80) => Nothing", ""},
		{"-p tcp -m tcp --dport 0", "Protocol Opaque(-m tcp --dport 0) => Nothing", ""},
		{"-p tcp -m tcp ! --dport 0:65535", "Protocol Opaque(-m tcp ! --dport 0:65535) => Nothing", ""},
		{"-p tcp -m tcp --dport 10:10", "Protocol DestinationPorts => Nothing", "-p tcp -m tcp --dport 10"},
		{"-p tcp -m tcp --dport http", "Protocol Opaque(-m tcp --dport http) => Nothing", ""},
		{"-m tcp --dport 80", "Opaque(-m tcp --dport 80) => Nothing", ""},
		{"-p sctp -m sctp --dport 80", "Protocol Opaque(-m sctp --dport 80) => Nothing", ""},
		{"-p sctp -m multiport --dports 80,90", "Protocol Opaque(-m multiport --dports 80,90) => Nothing", ""},
		{"-p udp -m udp --dport 53 -m udp --sport 1:", "Protocol SourcePorts DestinationPorts => Nothing", "-p udp -m udp --sport 1:65535 --dport 53"},
		{"-p tcp -m multiport --dports 80,443,8000:8010", "Protocol DestinationPorts => Nothing", "-p tcp -m multiport --dports 80,443,8000:8010"},
		{"-p tcp -m multiport ! --dports 53,15008", "Protocol DestinationPorts => Nothing", "-p tcp -m multiport ! --dports 53,15008"},
		{"-p tcp -m multiport ! --sports 53,15008", "Protocol SourcePorts => Nothing", "-p tcp -m multiport ! --sports 53,15008"},
		{"-p tcp -m multiport --ports 53,15008", "Protocol Opaque(-m multiport --ports 53,15008) => Nothing", ""},
		{"-p tcp -m tcp --syn -m multiport --sports 3,1 --dport 80", "Protocol SYN SourcePorts DestinationPorts => Nothing", ""},
		{"-m addrtype --dst-type LOCAL", "DestinationLocal => Nothing", "-m addrtype --dst-type LOCAL"},
		{"-m addrtype ! --dst-type LOCAL", "DestinationLocal => Nothing", "-m addrtype ! --dst-type LOCAL"},
		{"-m addrtype --src-type LOCAL -m addrtype --dst-type LOCAL --limit-iface-in -j DROP", "SourceLocal Opaque(-m addrtype --dst-type LOCAL --limit-iface-in) => Drop", ""},
		{"-m owner --uid-owner 5678", "OwnerUID => Nothing", "-m owner --uid-owner 5678"},
		{"-m owner ! --uid-owner 0-4294967294 --gid-owner 5", "OwnerUID OwnerGID => Nothing", "-m owner ! --uid-owner 0-4294967294 -m owner --gid-owner 5"},
		{"-m owner --socket-exists --uid-owner 5", "Opaque(-m owner --socket-exists --uid-owner 5) => Nothing", ""},
		{"-m owner --uid-owner root", "Opaque(-m owner --uid-owner root) => Nothing", ""},
		{"-m conntrack --ctstate RELATED,ESTABLISHED", "CTState => Nothing", "-m conntrack --ctstate ESTABLISHED,RELATED"},
		{"-m state ! --state NEW,INVALID", "CTState => Nothing", "-m conntrack ! --ctstate INVALID,NEW"},
		{"-m conntrack --ctstate NEW --ctproto 6", "Opaque(-m conntrack --ctstate NEW --ctproto 6) => Nothing", ""},
		{"-m conntrack --ctstate ODD", "Opaque(-m conntrack --ctstate ODD) => Nothing", ""},
		{"-m owner -m multiport", "Opaque(-m owner) Opaque(-m multiport) => Nothing", ""},
		{"-m mark --mark 0x1/0x1 -m set ! --match-set x src -o lo", "OutInterface Mark Opaque(-m set ! --match-set x src) => Nothing", ""},
		{"-m set --match-set x src ! -o lo", "OutInterface Opaque(-m set --match-set x src) => Nothing", ""},
		{"-m policy --dir in --pol ipsec --proto esp -j ACCEPT", "Opaque(-m policy --dir in --pol ipsec --proto esp) => Accept", ""},
		{`-m string --string "-j DROP" --algo bm -j ACCEPT`, `Opaque(-m string --string "-j DROP" --algo bm) => Accept`, ""},
		{"-m comment --comment -j -j RETURN", "=> Return", `-m comment --comment "-j" -j RETURN`},
		{`-m comment --comment "it\'s \"x\" \\ back" -j RETURN`, "=> Return", `-m comment --comment "it's \"x\" \\ back" -j RETURN`},
		{`-m comment --comment one -p tcp -m comment --comment "" -m comment --comment last`, "Protocol => Nothing", `-p tcp -m comment --comment "last"`},
		{"-m comment --comments x -j DROP", "Opaque(-m comment --comments x) => Drop", ""},
		{"-j REJECT", "=> Reject", "-j REJECT"},
		{"-j REJECT --reject-with tcp-reset", "=> Reject", "-j REJECT --reject-with tcp-reset"},
		{"-j REJECT --other x", "=> Opaque(-j REJECT --other x)", ""},
		{"-p tcp -j REDIRECT --to-ports 15006", "Protocol => Redirect", "-p tcp -j REDIRECT --to-ports 15006"},
		{"-p tcp -j REDIRECT --to-ports 0", "Protocol => Redirect", "-p tcp -j REDIRECT --to-ports 0"},
		{"-p tcp -j REDIRECT --to-ports 1-2", "Protocol => Opaque(-j REDIRECT --to-ports 1-2)", ""},
		{"-p tcp -j REDIRECT --to-ports 1 --random", "Protocol => Opaque(-j REDIRECT --to-ports 1 --random)", ""},
		{"-p tcp -j REDIRECT", "Protocol => Opaque(-j REDIRECT)", ""},
		{"-j CT --zone 2", "=> CTZone", "-j CT --zone 2"},
		{"-j CT --zone 2 --helper ftp", "=> Opaque(-j CT --zone 2 --helper ftp)", ""},
		{"-j CT --notrack", "=> NoTrack", "-j CT --notrack"},
		{"-j NOTRACK", "=> NoTrack", "-j CT --notrack"},
		{"-j CT --notrack --zone 2", "=> Opaque(-j CT --notrack --zone 2)", ""},
		{"-m addrtype --src-type LOCAL", "SourceLocal => Nothing", "-m addrtype --src-type LOCAL"},
		{"-m addrtype ! --src-type LOCAL --dst-type LOCAL", "SourceLocal DestinationLocal => Nothing", "-m addrtype ! --src-type LOCAL -m addrtype --dst-type LOCAL"},
		{"-m addrtype --dst-type LOCAL --limit-iface-in -j DROP", "Opaque(-m addrtype --dst-type LOCAL --limit-iface-in) => Drop", ""},
		{"-m addrtype --dst-type BROADCAST -j DROP", "Opaque(-m addrtype --dst-type BROADCAST) => Drop", ""},
		{"-p tcp -m multiport ! --sports 1,2", "Protocol SourcePorts => Nothing", "-p tcp -m tcp ! --sport 1:2"},
		{"-m mark ! --mark 0x4000/0x4000 -j RETURN", "Mark => Return", "-m mark ! --mark 0x4000/0x4000 -j RETURN"},
		{"-m mark --mark 7 -j RETURN", "Mark => Return", "-m mark --mark 0x7 -j RETURN"},
		{"-m mark --mark x -j RETURN", "Opaque(-m mark --mark x) => Return", ""},
		{"-j MARK --set-xmark 0x4000/0x0", "=> SetMark", "-j MARK --set-xmark 0x4000/0x0"},
		{"-j MARK --set-mark 0x1/0x2", "=> SetMark", "-j MARK --set-xmark 0x1/0x3"},
		{"-j MARK --set-mark 1", "=> SetMark", "-j MARK --set-xmark 0x1/0xffffffff"},
		{"-j MARK --or-mark 6", "=> SetMark", "-j MARK --set-xmark 0x6/0x6"},
		{"-j MARK --and-mark 6", "=> SetMark", "-j MARK --set-xmark 0x0/0xfffffff9"},
		{"-j MARK --xor-mark 6", "=> SetMark", "-j MARK --set-xmark 0x6/0x0"},
		{"-j MARK --odd 6", "=> Opaque(-j MARK --odd 6)", ""},
		{"-j MARK", "=> Opaque(-j MARK)", ""},
		{"-j CT", "=> Opaque(-j CT)", ""},
		{"-j ANY_CHAIN", "=> Jump", "-j ANY_CHAIN"},
		{"-g ANY_CHAIN", "=> Goto", "-g ANY_CHAIN"},
		{"-j MASQUERADE", "=> Translate", "-j MASQUERADE"},
		{"-j MASQUERADE --random-fully", "=> Translate", "-j MASQUERADE --random-fully"},
		{"-p tcp -j MASQUERADE --to-ports 1024-2048", "Protocol => Translate", "-p tcp -j MASQUERADE --to-ports 1024-2048"},
		{"-j SNAT --to-source 192.0.2.1-192.0.2.9 --persistent --random", "=> Translate", "-j SNAT --to-source 192.0.2.1-192.0.2.9 --random --persistent"},
		{"-j DNAT --to-destination 1.2.3.4 --odd", "=> Opaque(-j DNAT --to-destination 1.2.3.4 --odd)", ""},
		{"-j DNAT --to-source 1.2.3.4", "=> Opaque(-j DNAT --to-source 1.2.3.4)", ""},
		{"-j DNAT", "=> Opaque(-j DNAT)", ""},
		{"-j DNAT --to-destination 1.2.3.4:80", "=> Translate", "-j DNAT --to-destination 1.2.3.4:80"},
		{`-j LOG --log-prefix "a \"b\" -m" --log-level 7`, `=> Opaque(-j LOG --log-prefix "a \"b\" -m" --log-level 7)`, ""},
		{"-j RETURN -m comment --comment behind", "=> Return", `-m comment --comment "behind" -j RETURN`},
		{"--protocol tcp --match tcp --destination-port 80 --jump RETURN", "Protocol DestinationPorts => Return", "-p tcp -m tcp --dport 80 -j RETURN"},
		{"-p tcp --dport 80 -j RETURN", "Protocol DestinationPorts => Return", "-p tcp -m tcp --dport 80 -j RETURN"},
		{"-p tcp --odd 80 -j RETURN", "Protocol Opaque(--odd 80) => Return", ""},
		{"-m mystery [unsupported revision] -j DROP", "Opaque(-m mystery [unsupported revision]) => Drop", ""},
	} {
		chain, r, err := ParseRule(IPv4, "[3:180] -A CHAIN "+test.in)
		if err != nil || chain != "CHAIN" || r.Counter != (Counter{3, 180}) {
			t.Errorf("%s: %q, %v, %v", test.in, chain, r.Counter, err)
			continue
		}
		if got := words(r); got != test.kinds {
			t.Errorf("%s:\ngot  %s\nwant %s", test.in, got, test.kinds)
		}
		if got := r.String(); test.text != "" && got != test.text {
			t.Errorf("%s:\ngot  %s\nwant %s", test.in, got, test.text)
		}
	}
}

func TestParseErrors(t *testing.T) {
	nat := func(lines string) string { return "# a save\n\n*nat\n:OUTPUT ACCEPT [0:0]\n:A - [0:0]\n" + lines }
	for _, test := range []struct {
		text string
		line int
		what string
	}{
		{nat("-A A\n"), 6, "without the COMMIT of table nat"},
		{"*nat", 1, "without the COMMIT"},
		{nat("*filter\nCOMMIT\n"), 6, "before the COMMIT of table nat"},
		{"-A OUTPUT\n", 1, "before a table"},
		{"\n:A - [0:0]\n", 2, "before a table"},
		{"COMMIT\n", 1, "outside of a table"},
		{nat("-A B -j RETURN\nCOMMIT\n"), 6, `chain "B", which was not declared`},
		{nat("-A FORWARD -j RETURN\nCOMMIT\n"), 6, `chain "FORWARD", which was not declared`},
		{nat("-A A -j MISSING_CHAIN\nCOMMIT\n"), 6, `"MISSING_CHAIN", which is not there`},
		{nat("-A A -g MISSING\nCOMMIT\n"), 6, `"MISSING", which is not there`},
		{nat("-A A -j \"\"\nCOMMIT\n"), 6, "without a name"},
		{nat("-A A -s ::1/128\nCOMMIT\n"), 6, "save file of the other family"},
		{nat("-A A -s 10.0.0.0/33\nCOMMIT\n"), 6, "wrong number of bits"},
		{nat("-X A\nCOMMIT\n"), 6, "unknown kind of line"},
		{nat("hello\nCOMMIT\n"), 6, "unknown kind of line"},
		{nat("\"-A\" A\nCOMMIT\n"), 6, "unknown kind of line"},
		{nat("COMMIT now\n"), 6, "unknown kind of line"},
		{nat("[1:2]\nCOMMIT\n"), 6, "unknown kind of line"},
		{nat("-A A -m comment --comment \"open\nCOMMIT\n"), 6, "bad quoting"},
		{nat("-A A -m comment --comment \"a\"b\nCOMMIT\n"), 6, "bad quoting"},
		{nat("-A A -m comment --comment a\"b\"\nCOMMIT\n"), 6, "bad quoting"},
		{nat("-A A -p tcp -m tcp --dport 65536\nCOMMIT\n"), 6, "wrong number, of a port"},
		{nat("-A A -p tcp -m tcp --dport 9:8\nCOMMIT\n"), 6, "wrong number, of a port"},
		{nat("-A A -p tcp -m multiport --dports 1,70000\nCOMMIT\n"), 6, "wrong number, of a port"},
		{nat("-A A -p 256\nCOMMIT\n"), 6, "wrong number, of a protocol"},
		{nat("-A A -m owner --uid-owner 4294967295\nCOMMIT\n"), 6, "wrong number, of a user"},
		{nat("-A A -m owner --uid-owner 6-5\nCOMMIT\n"), 6, "wrong number, of a user"},
		{nat("-A A -p tcp -j REDIRECT --to-ports 65536\nCOMMIT\n"), 6, "wrong number, of a port"},
		{nat("-A A -j CT --zone 65536\nCOMMIT\n"), 6, "wrong number, of a zone"},
		{nat("[a:b] -A A\nCOMMIT\n"), 6, "wrong numbers: counters"},
		{nat("[1:18446744073709551616] -A A\nCOMMIT\n"), 6, "wrong numbers: counters"},
		{nat(":B - [0:]\nCOMMIT\n"), 6, "wrong numbers: counters"},
		{nat(":B ODD [0:0]\nCOMMIT\n"), 6, "a policy is"},
		{nat(":B\nCOMMIT\n"), 6, "a chain is"},
		{nat("-I A 2 -j RETURN\nCOMMIT\n"), 6, "no such place"},
		{nat("-I A 0 -j RETURN\nCOMMIT\n"), 6, "wrong number, of the place"},
		{nat("-A A -s\nCOMMIT\n"), 6, "without its value"},
		{nat("-A A !\nCOMMIT\n"), 6, "behind the last !"},
		{nat("-A A word\nCOMMIT\n"), 6, "belongs to no option"},
		{nat("-A A -j RETURN -j DROP\nCOMMIT\n"), 6, "one target"},
		{nat("-A A\r\nCOMMIT\n"), 6, "carriage return"},
		{"*nat\r\nCOMMIT\r\n", 1, "carriage return"},
		{"* nat\nCOMMIT\n", 1, "a table is"},
		{nat("-A A -m comment --comment \"two\nlines\"\n-A A word\nCOMMIT\n"), 8, "belongs to no option"},
	} {
		s, err := ParseSave(IPv4, []byte(test.text))
		var e *ParseError
		if !errors.As(err, &e) {
			t.Errorf("%q: got %v, %v", test.text, s, err)
			continue
		}
		if e.Line != test.line || !strings.Contains(e.What, test.what) {
			t.Errorf("%q:\ngot  %v\nwant line %d: %s", test.text, err, test.line, test.what)
		}
		if lines := strings.Split(test.text, "\n"); !strings.HasPrefix(e.Text, strings.TrimSpace(lines[test.line-1])) {
			t.Errorf("%q: the text of line %d is %q", test.text, e.Line, e.Text)
		}
	}
	for _, line := range []string{"", "-A", "-I A 1 -j RETURN", "-A A\n-A B", "[1] -A A", "# -A A", ":A - [0:0]", "-A A -j \"\""} {
		if chain, r, err := ParseRule(IPv4, line); err == nil {
			t.Errorf("%q: got %q, %v", line, chain, r)
		}
	}
}

// A comment with a line break is printed as it is: what follows the break must
// not pass for lines of the save.
func TestParseCommentOverLines(t *testing.T) {
	s, err := ParseSave(IPv4, []byte("*filter\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -m comment --comment \"a\nCOMMIT\n-A OUTPUT -j DROP\nb\" -j ACCEPT\nCOMMIT\n"))
	if err != nil {
		t.Fatal(err)
	}
	if r := s.Bases[0].Rules; len(r) != 1 || r[0].Action != (Accept{}) || r[0].Why != "a\nCOMMIT\n-A OUTPUT -j DROP\nb" {
		t.Errorf("%q", r)
	}
	if s.Validate() == nil {
		t.Error("such a comment must not be rendered")
	}
}

func TestParseTablesAgain(t *testing.T) {
	const one = "*nat\n:OUTPUT ACCEPT [0:0]\n:A - [0:0]\n:OLD - [0:0]\n-A OUTPUT -j A\n-A A -j RETURN\nCOMMIT\n"
	names := func(text string) string {
		s, err := ParseSave(IPv4, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for _, c := range s.Bases {
			fmt.Fprintf(&b, "%s/%s:%s:%v ", c.Table, c.Hook, c.Policy, c.Rules)
		}
		for _, c := range s.Chains {
			fmt.Fprintf(&b, "%s/%s:%v ", c.Table, c.Name, c.Rules)
		}
		return b.String()
	}
	for _, test := range []struct{ text, want string }{
		{one, "nat/OUTPUT:ACCEPT:[-j A] nat/A:[-j RETURN] nat/OLD:[] "},
		{one + "*raw\n:OUTPUT DROP [0:0]\nCOMMIT\n" + one, "raw/OUTPUT:DROP:[] nat/OUTPUT:ACCEPT:[-j A] nat/A:[-j RETURN] nat/OLD:[] "},
		{one + "*nat\n:OUTPUT DROP [0:0]\nCOMMIT\n", "nat/OUTPUT:DROP:[] "},
		{one + "*nat\n:A - [0:0]\n-A A -j ACCEPT\n-I OUTPUT 1 -j OLD\nCOMMIT\n", "nat/OUTPUT:ACCEPT:[-j OLD -j A] nat/A:[-j ACCEPT] nat/OLD:[] "},
		{"*nat\n:A - [0:0]\n-I A -j DROP\n-I A 1 -j RETURN\n-I A 3 -j ACCEPT\n-I PREROUTING 1 -j A\nCOMMIT", "nat/PREROUTING::[-j A] nat/A:[-j RETURN -j DROP -j ACCEPT] "},
	} {
		if got := names(test.text); got != test.want {
			t.Errorf("%q:\ngot  %s\nwant %s", test.text, got, test.want)
		}
	}
}

func TestParseTargetsOfTables(t *testing.T) {
	s, err := ParseSave(IPv4, []byte("*nat\n:DOCKER - [0:0]\n:NEW - [0:0]\n-A NEW -j DOCKER\n-A NEW -j FULLCONENAT\n-A NEW -j my-ext --option x\nCOMMIT\n"))
	if err != nil {
		t.Fatal(err)
	}
	r := s.Chains[1].Rules
	want := []Action{Jump{"DOCKER"}, Opaque{"-j FULLCONENAT"}, Opaque{"-j my-ext --option x"}}
	for i := range want {
		if r[i].Action != want[i] {
			t.Errorf("got %#v, want %#v", r[i].Action, want[i])
		}
	}
}

func TestParseFile(t *testing.T) {
	const good = "*nat\n:OUTPUT ACCEPT [0:0]\n:A - [0:0]\n-A OUTPUT -j A\n-A A -j TCPMSS --clamp-mss-to-pmtu\n-A A -j QUEUE\nCOMMIT\n"
	if _, err := ParseFile(IPv4, []byte(good)); err != nil {
		t.Error(err)
	}
	for text, want := range map[string]string{
		"":                                  "line 1: there is no table",
		"# Generated by hand\n# and more\n": "line 1: there is no table",
		"*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j MISSING\nCOMMIT\n":                                    `line 3: jumps to chain "MISSING", which is not there`,
		"\n# Generated by ip6tables-nft-save v1.8.9 (nf_tables) on Mon\n" + good:                        "line 2: this is a save file of the other family",
		"*nat\n:A - [0:0]\n-A A -p tcp -j RETURN\n-A A -g A\n-A A -j RETURN\nCOMMIT\n":                  `line 4: chain "A" jumps to itself: "-A A -g A"`,
		"*nat\n:A - [0:0]\n:B - [0:0]\n:OUTPUT - [0:0]\n-A B -j A\n-A A -j B\n-A OUTPUT -j A\nCOMMIT\n": `line 5: chain "B" jumps back to "A", which leads to it`,
		good[:len(good)-7]: "line 6: the text ends without the COMMIT",
	} {
		if _, err := ParseFile(IPv4, []byte(text)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v; want %s", text, err, want)
		}
	}
	if _, err := ParseSave(IPv4, []byte("*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j NEWTARGET\nCOMMIT\n")); err != nil {
		t.Errorf("a target that is not known: %v", err)
	}
	if _, err := ParseSave(IPv4, []byte("*nat\n:A - [0:0]\n-A A -j A\nCOMMIT\n")); err != nil {
		t.Errorf("a circle that no packet meets, which kernels list: %v", err)
	}
}

func TestGenerator(t *testing.T) {
	for _, test := range []struct{ text, variant, version string }{
		{"# Generated by iptables-nft-save v1.8.9 (nf_tables) on Mon Nov 23 22:42:10 2026\n*raw", "nf_tables", "1.8.9"},
		{"# Generated by ip6tables-nft-save v1.8.9 (nf_tables) on Mon Nov 23 22:42:10 2026\n", "nf_tables", "1.8.9"},
		{"# Generated by iptables-save v1.8.9 (nf_tables) on Mon Nov 23 22:42:10 2026\n", "nf_tables", "1.8.9"},
		{"# Generated by iptables-save v1.8.9 on Mon Nov 23 22:42:10 2026\n", "legacy", "1.8.9"},
		{"# Generated by ip6tables-save v1.8.11 (legacy) on Mon Nov 23 22:42:10 2026", "legacy", "1.8.11"},
		{"*nat\n# Generated by iptables-save v1.8.9 on Mon\n", "", ""}, {"", "", ""}, {"# Generated by", "", ""}, {"# Generated by hand v1 on", "", ""},
	} {
		if variant, version := Generator([]byte(test.text)); variant != test.variant || version != test.version {
			t.Errorf("%q: got %q, %q", test.text, variant, version)
		}
	}
}

func saves(tb testing.TB) map[string][]byte {
	files, err := filepath.Glob("testdata/saves/*.txt")
	if err != nil || len(files) == 0 {
		tb.Fatal("no saves", err)
	}
	m := make(map[string][]byte)
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			tb.Fatal(err)
		}
		m[strings.TrimSuffix(filepath.Base(name), ".txt")] = text
	}
	return m
}

// opaque lists the opaque parts of the Set.
func opaque(s Set) (out []string) {
	rules := func(list []Rule) {
		for _, r := range list {
			for _, m := range r.Matches {
				if o, ok := m.(Opaque); ok {
					out = append(out, o.Text())
				}
			}
			if o, ok := r.Action.(Opaque); ok {
				out = append(out, o.Text())
			}
		}
	}
	for _, c := range s.Bases {
		rules(c.Rules)
	}
	for _, c := range s.Chains {
		rules(c.Rules)
	}
	return out
}

func TestParseRealSaves(t *testing.T) {
	want := map[string][]string{
		"docker":     nil,
		"istio":      nil,
		"linkerd":    nil,
		"kuma":       nil,
		"consul":     nil,
		"appmesh":    nil,
		"kuma-all":   {`-j LOG --log-prefix "PREROUTING:" --log-level 7`, `-j LOG --log-prefix "OUTPUT:" --log-level 7`},
		"firewalld":  {`-j LOG --log-prefix "STATE_INVALID_DROP: "`, "-j CT --helper netbios-ns", "-m limit --limit 5/min"},
		"k3s":        nil,
		"kube-proxy": {"-m nfacct --nfacct-name  ct_state_invalid_dropped_pkts", "-m statistic --mode random --probability 0.50000000000"},
	}
	for name, text := range saves(t) {
		t.Run(name, func(t *testing.T) {
			s, err := ParseSave(IPv4, text)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want[name], opaque(s)); d != "" {
				t.Error(d)
			}
			rules, words := 0, 0
			for _, c := range s.Bases {
				rules += len(c.Rules)
			}
			for _, c := range s.Chains {
				rules += len(c.Rules)
			}
			if words = bytes.Count(text, []byte("-A ")); rules != words {
				t.Errorf("%d rules of %d", rules, words)
			}
			if d := cmp.Diff(s.Lower(IPv4), s, cmpSets); d != "" {
				t.Errorf("it is not lowered:\n%s", d)
			}
			if variant, version := Generator(text); variant == "" || version != "1.8.9" {
				t.Errorf("generated by %q %q", variant, version)
			}
		})
	}
	s, _ := ParseSave(IPv4, saves(t)["docker"])
	b, _ := s.Base(NAT, Postrouting)
	if b.Policy != "ACCEPT" || b.Rules[0].Counter != (Counter{7, 420}) {
		t.Errorf("%+v", b)
	}
	if f, _ := s.Base(Filter, Forward); f.Policy != "DROP" {
		t.Errorf("%+v", f)
	}
}

// What a Set renders parses back to the same Set, lowered.
func TestRenderedParsesBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := genSet(false).Draw(t, "set")
		for _, f := range Families() {
			script := s.IPTables(f)
			got, err := ParseSave(f, script)
			if err != nil {
				t.Fatalf("%v in\n%s", err, script)
			}
			want := listed(f, s)
			if !s.Has(f) {
				want = Set{Only: f}
			}
			if d := cmp.Diff(want, canonical(got), cmpSets); d != "" {
				t.Fatalf("%s (- want, + got): %s\n%s", f, d, script)
			}
		}
	})
}

func FuzzParseSave(f *testing.F) {
	for _, text := range saves(f) {
		f.Add(true, string(text))
	}
	for _, s := range []string{"", "*nat\nCOMMIT", "*nat\n:A - [0:0]\n-I A 1 -s ::6/128 -m comment --comment \"a\\\"b\\\\\n\" -g A\nCOMMIT\n",
		"*raw\n-A OUTPUT ! -o lo -p tcp -m multiport ! --dports 1,2:3 -m owner ! --uid-owner 1-2 -c 1 2 -j CT --zone 1\nCOMMIT\n"} {
		f.Add(false, s)
	}
	f.Fuzz(func(t *testing.T, v4 bool, text string) {
		family := IPv6
		if v4 {
			family = IPv4
		}
		s, err := ParseSave(family, []byte(text))
		if strict, strictErr := ParseFile(family, []byte(text)); strictErr == nil && (err != nil || cmp.Diff(s, strict, cmpSets) != "") {
			t.Fatalf("ParseFile takes what ParseSave does not: %v", err)
		}
		if err != nil {
			if e := (*ParseError)(nil); !errors.As(err, &e) || e.Line < 1 || e.Line > strings.Count(text, "\n")+1 {
				t.Fatalf("%v", err)
			}
			return
		}
		if len(opaque(s)) > 0 || s.Validate() != nil {
			return
		}
		again, err := ParseSave(family, s.IPTables(family))
		if err != nil {
			t.Fatalf("%v\n%s", err, s.IPTables(family))
		}
		if d := cmp.Diff(listed(family, s), canonical(again), cmpSets); d != "" {
			t.Fatalf("%s\n%s", d, s.IPTables(family))
		}
	})
}

// kubeSave is the save of a host with many services.
func kubeSave(n int) []byte {
	var b bytes.Buffer
	b.WriteString("*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-SERVICES - [0:0]\n")
	for i := range n / 5 {
		fmt.Fprintf(&b, ":KUBE-SVC-%016d - [0:0]\n:KUBE-SEP-%016d - [0:0]\n", i, i)
	}
	for i := range n / 5 {
		fmt.Fprintf(&b, "[0:0] -A KUBE-SERVICES -d 10.%d.%d.%d/32 -p tcp -m comment --comment \"ns/service-%d:http cluster IP\" -m tcp --dport 80 -j KUBE-SVC-%016d\n", i>>16, i>>8&255, i&255, i, i)
		fmt.Fprintf(&b, "[0:0] -A KUBE-SVC-%016d ! -s 10.244.0.0/16 -d 10.96.0.10/32 -p tcp -m comment --comment \"ns/service-%d:http cluster IP\" -m tcp --dport 80 -j KUBE-MARK-MASQ\n", i, i)
		fmt.Fprintf(&b, "[0:0] -A KUBE-SVC-%016d -m comment --comment \"ns/service-%d:http -> 10.244.0.3:80\" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-%016d\n", i, i, i)
		fmt.Fprintf(&b, "[0:0] -A KUBE-SEP-%016d -s 10.244.0.3/32 -m comment --comment \"ns/service-%d:http\" -j KUBE-MARK-MASQ\n", i, i)
		fmt.Fprintf(&b, "[0:0] -A KUBE-SEP-%016d -p tcp -m comment --comment \"ns/service-%d:http\" -m tcp -j DNAT --to-destination 10.244.0.3:80\n", i, i)
	}
	b.WriteString("COMMIT\n")
	return b.Bytes()
}

func BenchmarkParseSave20000(b *testing.B) {
	text := kubeSave(20000)
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseSave(IPv4, text); err != nil {
			b.Fatal(err)
		}
	}
}
