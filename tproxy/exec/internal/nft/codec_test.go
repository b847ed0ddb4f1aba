package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

var update = flag.Bool("update", false, "write the golden files anew")

var orders = map[string]binary.ByteOrder{"little": binary.LittleEndian, "big": binary.BigEndian}

// message is one of a batch.
type message struct {
	typ, flags uint16
	seq        uint32
	body       []byte
}

func messages(t interface{ Fatalf(string, ...any) }, order binary.ByteOrder, b []byte) (out []message) {
	for len(b) > 0 {
		if len(b) < netlinkHeader || int(order.Uint32(b)) > len(b) || order.Uint32(b)%4 != 0 {
			t.Fatalf("no message: % x", b)
		}
		length := order.Uint32(b)
		out = append(out, message{order.Uint16(b[4:]), order.Uint16(b[6:]), order.Uint32(b[8:]), b[netlinkHeader:length]})
		b = b[length:]
	}
	return out
}

// dump shows the messages and their attributes, a line for each; what is nested is
// indented.
func dump(t *testing.T, order binary.ByteOrder, b []byte) string {
	var out strings.Builder
	var attrs func(indent string, b []byte)
	attrs = func(indent string, b []byte) {
		for len(b) > 0 {
			length := order.Uint16(b)
			typ := order.Uint16(b[2:])
			v := b[attrHeader:length]
			if typ&nested != 0 {
				fmt.Fprintf(&out, "%s%d\n", indent, typ&^nested)
				attrs(indent+"  ", v)
			} else if text := kernel.CString(v); len(v) > 2 && text != "" && len(text) >= len(v)-1 && all32(text) {
				fmt.Fprintf(&out, "%s%d %q\n", indent, typ, v)
			} else {
				fmt.Fprintf(&out, "%s%d %x\n", indent, typ, v)
			}
			b = b[(length+3)&^3:]
		}
	}
	for _, m := range messages(t, order, b) {
		fmt.Fprintf(&out, "message %#x flags %#x seq %d of %x\n", m.typ, m.flags, m.seq, m.body[:nfgenHeader])
		attrs("  ", m.body[nfgenHeader:])
	}
	return out.String()
}

func all32(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < 32 || r > 126 })
}

// transition is a batch with every verb.
func transition() []rules.NativeCommand {
	other := everything()
	other.Table = "mine"
	other.Sets = other.Sets[:1]
	other.Sets[0].Name = "old"
	other.Chains = append(other.Chains[:1], rules.NativeChain{Name: "gone", Rules: []rules.NativeRule{{Action: rules.Return{}}}})
	other.Chains[0].Rules = other.Chains[0].Rules[:1]
	return append([]rules.NativeCommand{{Verb: rules.DeleteTable, Table: "before"}},
		append(rules.NativeTransition(nil, everything()), rules.NativeTransition(other, everything())...)...)
}

// The golden files show values as bytes, and headers as they are read in the byte order:
// so the two files differ in what the kernel has in the order of the machine, and in
// nothing else.
func TestEncodeGolden(t *testing.T) {
	lines := map[string][]string{}
	for name, order := range orders {
		got := dump(t, order, Encode(transition(), order).Bytes())
		lines[name] = strings.Split(got, "\n")
		file := "testdata/" + name + ".txt"
		if *update {
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), got); d != "" {
			t.Errorf("%s: (-want +got, -update writes it anew)\n%s", file, d)
		}
	}
	if len(lines["little"]) != len(lines["big"]) {
		t.Fatal("one has more lines")
	}
	var got []string
	for i, little := range lines["little"] {
		if big := lines["big"][i]; little != big {
			got = append(got, strings.TrimSpace(little)+" / "+strings.TrimSpace(big))
		}
	}
	slices.Sort(got)
	got = slices.Compact(got)
	if d := cmp.Diff(strings.Split(strings.TrimSpace(hostOrder), "\n"), got); d != "" {
		t.Errorf("what the byte orders differ in: (-want +got)\n%s", d)
	}
}

// The values of everything that the kernel, or nft(8) in its userdata, has in the order of
// the machine: marks and their masks, owners, connection states, the zone, the type of an
// address.
const hostOrder = `
1 00010000 / 1 00000100
1 000f0000 / 1 00000f00
1 01000000 / 1 00000001
1 02000000 / 1 00000002
1 03020100 / 1 00010203
1 04030201 / 1 01020304
1 05000000 / 1 00000005
1 08000000 / 1 00000008
1 0a000000 / 1 0000000a
1 15000000 / 1 00000015
1 2e160000 / 1 0000162e
1 3412 / 1 1234
1 4a000000 / 1 0000004a
1 f0f0f000 / 1 00f0f0f0
13 000401000000 / 13 000400000001
13 000402000000 / 13 000400000002
6 010401000000 / 6 010400000001
`

// What the encoder writes is what the decoder reads, in both byte orders.
func TestDecodeIsWhatWasEncoded(t *testing.T) {
	for name, order := range orders {
		t.Run(name, func(t *testing.T) {
			check := func(t interface{ Fatalf(string, ...any) }, n *rules.Native) {
				got := decoded(t, order, n)
				if !got.Equal(n) || len(got.Strange) > 0 {
					t.Fatalf("%s\nwant\n%s\nstrange %q", got.Text(), n.Text(), got.Strange)
				}
			}
			check(t, everything())
			rapid.Check(t, func(t *rapid.T) { check(t, natives().Draw(t, "table")) })
		})
	}
}

// decoded reads what Encode writes, as a kernel that repeats all of it would answer.
func decoded(t interface{ Fatalf(string, ...any) }, order binary.ByteOrder, n *rules.Native) *rules.Native {
	d := decoder{order: order, family: familyInet, Native: rules.Native{Table: n.Table}}
	for _, m := range messages(t, order, Encode(rules.NativeTransition(nil, n), order).Bytes()) {
		d.take(m)
	}
	d.ranges()
	return &d.Native
}

func (d *decoder) take(m message) {
	switch m.typ {
	case newTable:
		d.table(m.body)
	case newChain:
		d.chain(m.body)
	case newSet:
		d.set(m.body)
	case newSetElem:
		d.elements(m.body)
	case newRule:
		d.addRule(m.body)
	}
}

// Whatever the bytes are, reading them does not panic.
func TestDecodeOfAnything(t *testing.T) {
	rapid.Check(t, anything)
}

func FuzzDecode(f *testing.F) { f.Fuzz(rapid.MakeFuzz(anything)) }

func anything(t *rapid.T) {
	order := binary.ByteOrder(binary.LittleEndian)
	all := messages(t, order, Encode(rules.NativeTransition(nil, everything()), order).Bytes())
	d := decoder{order: order, family: familyInet, Native: rules.Native{Table: "mine"}}
	for _, m := range all {
		m.body = bytes.Clone(m.body)
		for range rapid.IntRange(0, 3).Draw(t, "changes") {
			m.body[rapid.IntRange(0, len(m.body)-1).Draw(t, "at")] = rapid.Byte().Draw(t, "byte")
		}
		if rapid.IntRange(0, 9).Draw(t, "cut") == 0 {
			m.body = m.body[:rapid.IntRange(0, len(m.body)).Draw(t, "to")]
		}
		d.take(m)
		d.other("object", m.body)
	}
	d.ranges()
	d.Native.Equal(everything())
}

// Each message belongs to its command, and the last alone is acknowledged.
func TestBatchKnowsItsCommands(t *testing.T) {
	big := rules.NativeSet{Name: "big", Type: "inet_service"}
	for i := range 10000 {
		big.Elements = append(big.Elements, rules.NativeRange{First: be16(uint16(3 * i)), Last: be16(uint16(3 * i))})
	}
	commands := append([]rules.NativeCommand{{Verb: rules.AddTable, Table: "mine"}, {Verb: rules.AddSet, Table: "mine", Set: big}}, transition()...)
	b := Encode(commands, binary.LittleEndian)
	all := messages(t, binary.LittleEndian, b.Bytes())
	if b.command(0) != -1 || b.command(uint32(len(all)-1)) != -1 || b.command(1<<32-1) != -1 || all[0].typ != batchBegin || all[len(all)-1].typ != batchEnd {
		t.Error("the first and the last are the batch's")
	}
	parts, at := 0, 0
	for i, m := range all[1 : len(all)-1] {
		if int(m.seq) != i+1 || m.flags&flagRequest == 0 || (m.flags&flagAck != 0) != (i == len(all)-3) {
			t.Fatalf("message %d: sequence %d, flags %#x", i+1, m.seq, m.flags)
		}
		c := b.command(m.seq)
		if c != at && c != at+1 {
			t.Fatalf("message %d is of command %d, behind %d", i+1, c, at)
		}
		at = c
		if c == 1 && m.typ == newSetElem {
			parts++
		}
	}
	if at != len(commands)-1 || parts < 5 {
		t.Errorf("the last is of command %d of %d; 10000 elements in %d parts", at, len(commands), parts)
	}
	if empty := Encode(nil, binary.LittleEndian); empty.last() != 0 {
		t.Error("of nothing")
	}
}

// What a kernel here may not have: a flowtable.
func TestOtherThings(t *testing.T) {
	d := decoder{order: binary.LittleEndian, family: familyInet, Native: rules.Native{Table: "mine"}}
	e := &encoder{little: true}
	for _, table := range []string{"mine", "theirs"} {
		at := len(e.b)
		e.b = append(e.b, familyInet, 0, 0, 0)
		e.text(attrTable, table)
		e.text(setName, "fast")
		d.other("flowtable", e.b[at:])
	}
	if want := []string{"flowtable fast"}; !slices.Equal(d.Strange, want) {
		t.Errorf("%q, want %q", d.Strange, want)
	}
}

func TestEncodePanics(t *testing.T) {
	for name, c := range map[string]rules.NativeCommand{
		"verb":    {},
		"hook":    {Verb: rules.AddChain, Chain: rules.NativeChain{Hook: "INGRESS", Type: "filter"}},
		"type":    {Verb: rules.AddSet, Set: rules.NativeSet{Type: "mark"}},
		"key":     {Verb: rules.AddRule, Rule: rules.NativeRule{Matches: []rules.NativeMatch{{}}, Action: rules.Nothing{}}},
		"action":  {Verb: rules.AddRule, Rule: rules.NativeRule{Action: rules.Reject{}}},
		"unknown": {Verb: rules.AddRule, Rule: rules.NativeRule{Unknown: "expression socket", Action: rules.Nothing{}}},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: taken", name)
				}
			}()
			Encode([]rules.NativeCommand{c}, binary.LittleEndian)
		}()
	}
}

func TestErrorText(t *testing.T) {
	for want, e := range map[string]*Error{
		"nf_tables command 7: file exists":                             {Command: 7, Errno: syscall.EEXIST},
		"nf_tables batch: operation not permitted":                     {Command: -1, Errno: syscall.EPERM},
		"nf_tables command 0: invalid argument: bad thing":             {Errno: syscall.EINVAL, Message: "bad thing"},
		"nf_tables batch: the rules have changed since they were read": {Command: -1, Errno: 85, changed: true},
	} {
		if e.Error() != want {
			t.Errorf("%q, want %q", e, want)
		}
	}
	if err := error(&Error{Errno: syscall.EPERM}); !errors.Is(err, fs.ErrPermission) || errors.Is(err, ErrChanged) {
		t.Error("not permitted")
	}
	if err := error(&Error{Errno: 85, changed: true}); !errors.Is(err, ErrChanged) {
		t.Error("changed")
	}
}

func BenchmarkEncode(b *testing.B) {
	big := everything()
	ports := &big.Sets[1]
	ports.Elements = nil
	for i := range 10000 {
		ports.Elements = append(ports.Elements, rules.NativeRange{First: be16(uint16(3 * i)), Last: be16(uint16(3*i + 1))})
	}
	for name, n := range map[string]*rules.Native{"everything": everything(), "10000": big} {
		b.Run(name, func(b *testing.B) {
			commands := rules.NativeTransition(nil, n)
			b.ReportAllocs()
			for b.Loop() {
				Encode(commands, binary.NativeEndian)
			}
		})
	}
}
