package rules

import (
	"encoding/json"
	"fmt"
	"math/rand"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// genPorts draws sets that are empty, small, longer than one multiport match,
// and at the ends.
var genPorts = rapid.Custom(func(t *rapid.T) Ports {
	var in []PortRange
	for range rapid.IntRange(0, rapid.SampledFrom([]int{1, 3, 40}).Draw(t, "most")).Draw(t, "ranges") {
		a := rapid.OneOf(rapid.Uint16Range(1, MaxPort), rapid.Uint16Range(1, 40)).Draw(t, "first")
		b := a
		if rapid.Bool().Draw(t, "range") {
			b = rapid.Uint16Range(a, uint16(min(MaxPort, int(a)+rapid.SampledFrom([]int{1, 5, MaxPort}).Draw(t, "span")))).Draw(t, "last")
		}
		in = append(in, PortRange{a, b})
	}
	p, err := PortsOf(in...)
	if err != nil {
		t.Fatal(err)
	}
	return p
})

var genUIDs = rapid.Custom(func(t *rapid.T) UIDs {
	var u UIDs
	for range rapid.IntRange(1, 3).Draw(t, "ranges") {
		a := rapid.OneOf(rapid.Uint32Range(0, MaxUID), rapid.Uint32Range(0, 20), rapid.Uint32Range(MaxUID-20, MaxUID)).Draw(t, "first")
		b := rapid.Uint32Range(a, uint32(min(MaxUID, uint64(a)+10))).Draw(t, "last")
		u = u.Union(UIDs{spans[uint32]{{a, b}}})
	}
	return u
})

// model is the naive set.
func model(p Ports) map[uint16]bool {
	m := make(map[uint16]bool)
	for _, r := range p.Ranges() {
		for i := int(r.First); i <= int(r.Last); i++ {
			m[uint16(i)] = true
		}
	}
	return m
}

func TestPortsRoundTrips(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := genPorts.Draw(t, "ports")
		if q, err := ParsePorts(p.String()); err != nil || !q.Equal(p) {
			t.Fatalf("text: %v, %v", q, err)
		}
		var q Ports
		if b, err := json.Marshal(p); err != nil || json.Unmarshal(b, &q) != nil || !q.Equal(p) {
			t.Fatalf("JSON %s: %v, %v", b, q, err)
		}
		if b, _ := p.MarshalText(); q.UnmarshalText(b) != nil || !q.Equal(p) {
			t.Fatalf("text %s: %v", b, q)
		}
		u := genUIDs.Draw(t, "uids")
		if v, err := ParseUIDs(u.String()); err != nil || !v.Equal(u) {
			t.Fatalf("UIDs: %v, %v", v, err)
		}
	})
}

func TestPortsAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, q := genPorts.Draw(t, "p"), genPorts.Draw(t, "q")
		mp, mq := model(p), model(q)
		union, both := p.Union(q), p.Intersect(q)
		if p.Len() != len(mp) {
			t.Fatalf("Len %d, want %d", p.Len(), len(mp))
		}
		for i := range MaxPort + 1 {
			port := uint16(i)
			if p.Contains(port) != mp[port] || union.Contains(port) != (mp[port] || mq[port]) || both.Contains(port) != (mp[port] && mq[port]) {
				t.Fatalf("port %d: in p %v %v, in q %v, union %v, intersection %v", i, p.Contains(port), mp[port], mq[port], union.Contains(port), both.Contains(port))
			}
		}
		for _, s := range []Ports{union, both} { // in normal form: Equal compares ranges
			if c, err := PortsOf(s.Ranges()...); err != nil || !c.Equal(s) {
				t.Fatalf("%v is not in normal form", s)
			}
		}
	})
}

func TestPortsOrderNeverMatters(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := genPorts.Filter(nonEmpty).Draw(t, "ports")
		entries := strings.Split(p.String(), ",")
		entries = append(entries, rapid.SliceOf(rapid.SampledFrom(entries)).Draw(t, "again")...)
		rand.New(rand.NewSource(rapid.Int64().Draw(t, "seed"))).Shuffle(len(entries), func(i, j int) {
			entries[i], entries[j] = entries[j], entries[i]
		})
		list := strings.Join(entries, " , ")
		if q, err := ParsePorts(list); err != nil || q.String() != p.String() {
			t.Fatalf("%q reads as %v, %v", list, q, err)
		}
	})
}

func TestPacks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := genPorts.Draw(t, "ports")
		var sum Ports
		var all []PortRange
		for pack := range p.packs() {
			slots := 0
			for _, r := range pack.Ranges() {
				slots++
				if r.First != r.Last {
					slots++
				}
			}
			if slots == 0 || slots > 15 {
				t.Fatalf("%v takes %d slots", pack, slots)
			}
			sum = sum.Union(pack)
			all = append(all, pack.Ranges()...)
		}
		if !sum.Equal(p) || !slices.Equal(all, p.Ranges()) {
			t.Fatalf("packs make %v", all)
		}
	})
}

func TestParsePorts(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"", ""}, {" ", ""}, {"22", "22"}, {"80-90", "80-90"}, {"10-10", "10"}, {"3,1,2", "1-3"}, {" 5 , 7 ", "5,7"},
		{"1-65535", "1-65535"}, {"65535,65534", "65534-65535"}, {"1-10,5-20,30", "1-20,30"}, {"007", "7"},
	} {
		if p, err := ParsePorts(test.in); err != nil || p.String() != test.want {
			t.Errorf("%q: got %v, %v, want %s", test.in, p, err, test.want)
		}
	}
}

// Every bad entry of a list is reported, beside the others.
func TestParsePortsReportsEveryFault(t *testing.T) {
	faults := map[string]string{
		"0": `"0" is out of range`, "70000": `"70000" is out of range`, "65536": `"65536" is out of range`,
		"99999999999999999999": `"99999999999999999999"`, "0-5": `"0-5" is out of range`, "5-70000": `"5-70000" is out of range`,
		"90-80": `"90-80" is reversed: write 80-90`, "": "empty entry", "+5": `"+5"`, "5-+6": `"5-+6"`, "1-": `"1-"`, "-5": `"-5"`,
		"-": `"-"`, "http": `"http"`, "8 0": `"8 0"`, "1 - 2": `"1 - 2"`, "1-2-3": `"1-2-3"`, "1:2": `"1:2"`, "0x10": `"0x10"`, "1_0": `"1_0"`, "٣": `"٣"`,
	}
	var list, wants []string
	for entry, want := range faults {
		list, wants = append(list, entry), append(wants, want)
		in := entry + ",22"
		if p, err := ParsePorts(in); err == nil || !p.IsEmpty() || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, %v, want %s", in, p, err, want)
		}
		if _, err := ParseUIDs(in); err == nil && entry != "0" && entry != "0-5" && !strings.Contains(want, "range") {
			t.Errorf("%q is no list of UIDs", in)
		}
	}
	_, err := ParsePorts("22," + strings.Join(list, ","))
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range wants {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nlacks %s", err, want)
		}
	}
	if got := len(strings.Split(err.Error(), "\n")); got != len(faults) {
		t.Errorf("%d faults in %d lines:\n%v", len(faults), got, err)
	}
}

func TestPortsJSON(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{`22`, `[22]`}, {`"22"`, `[22]`}, {`"1,80-90"`, `[1,"80-90"]`}, {`[1,"80-90","7,8"]`, `[1,"7-8","80-90"]`}, {`null`, `[]`},
		{`[]`, `[]`}, {`""`, `[]`}, {`[10,"10-10"]`, `[10]`},
	} {
		var p Ports
		if err := json.Unmarshal([]byte(test.in), &p); err != nil {
			t.Errorf("%s: %v", test.in, err)
		} else if b, _ := json.Marshal(p); string(b) != test.want {
			t.Errorf("%s: got %s, want %s", test.in, b, test.want)
		}
	}
	for in, wants := range map[string][]string{
		`[0,70000,"90-80",true,""]`: {`"0"`, `"70000"`, `"90-80"`, "true", "empty entry"},
		`1.5`:                       {`"1.5"`}, `1e3`: {`"1e3"`}, `-5`: {`"-5"`}, `{}`: {"map[]"}, `[[1]]`: {"[1]"}, `[null]`: {"nil"}, `["1,,2"]`: {"empty entry"},
	} {
		p := MustPorts("7")
		err := json.Unmarshal([]byte(in), &p)
		if err == nil {
			t.Errorf("%s reads as %v", in, p)
			continue
		}
		for _, want := range wants {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v lacks %s", in, err, want)
			}
		}
		if p.String() != "7" {
			t.Errorf("%s: a failed read left %v", in, p)
		}
	}
}

func TestUIDs(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"0", "0"}, {"4294967294", "4294967294"}, {"4294967293,4294967294", "4294967293-4294967294"}, {"1,3,2", "1-3"}, {"", ""},
	} {
		if u, err := ParseUIDs(test.in); err != nil || u.String() != test.want {
			t.Errorf("%q: got %v, %v", test.in, u, err)
		}
	}
	for _, in := range []string{"4294967295", "5-4294967295", "6-5", "-1", "root", "1,,2"} {
		if u, err := ParseUIDs(in); err == nil {
			t.Errorf("%q reads as %v", in, u)
		}
	}
	if !UIDsOf(5, 4, 9).Equal(MustUIDs("4-5,9")) || UIDsOf(5).Contains(4) || !MustUIDs("4-9").Contains(7) {
		t.Error("UIDsOf or Contains")
	}
}

func TestPortsOf(t *testing.T) {
	for _, r := range []PortRange{{0, 5}, {0, 0}, {9, 8}} {
		if p, err := PortsOf(PortRange{1, 2}, r); err == nil {
			t.Errorf("%v is in %v", r, p)
		}
	}
	if got := fmt.Sprintf("%#v", MustPorts("1,5-6")); got != `rules.MustPorts("1,5-6")` {
		t.Error(got)
	}
}

func FuzzParsePorts(f *testing.F) {
	for _, s := range []string{"", "22", "80-90", "1,2,3", "0", "70000", "90-80", "1,,2", "+5", "1-", "-5", "http", " 1 , 2 ", "1-65535"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePorts(s)
		if err != nil {
			if !p.IsEmpty() {
				t.Fatalf("%v beside error %v", p, err)
			}
			return
		}
		if p.Contains(0) {
			t.Fatalf("%q holds port 0", s)
		}
		if q, err := ParsePorts(p.String()); err != nil || !q.Equal(p) {
			t.Fatalf("%q: %v, %v", s, q, err)
		}
		if b, err := json.Marshal(p); err != nil || !json.Valid(b) {
			t.Fatalf("%s, %v", b, err)
		}
	})
}
