package procfs

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// Lines of Linux 6.18, amd64; the big-endian ones are the same sockets as
// s390x prints them.
const (
	little4 = heading +
		"   0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 31245 1 0000000000000000 100 0 0 10 0                     \n" +
		"   1: 0700000A:3A98 0900000A:9C40 01 00000000:00000000 02:00000A5B 00000000     0        0 31246 2 0000000000000000 20 4 30 10 -1                    \n" +
		"   2: 0700000A:0050 0900000A:9C41 06 00000000:00000000 03:00001234 00000000     0        0 0 3 0000000000000000                                      \n"
	big4 = heading +
		"   0: 7F000001:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 31245 1 0000000000000000 100 0 0 10 0\n" +
		"   1: 0A000007:3A98 0A000009:9C40 01 00000000:00000000 02:00000A5B 00000000     0        0 31246 2 0000000000000000 20 4 30 10 -1\n" +
		"   2: 0A000007:0050 0A000009:9C41 06 00000000:00000000 03:00001234 00000000     0        0 0 3 0000000000000000\n"
	little6 = heading +
		"   0: 00000000000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 18446744073709551615 1 0000000000000000 100 0 0 10 0\n" +
		"   1: B80D0120000000000000000067452301:01BB 0000000000000000FFFF00000900000A:9C40 01 00000000:00000000 00:00000000 00000000 4294967294        0 5 1 0000000000000000 100 0 0 10 0\n"
	big6 = heading +
		"   0: 00000000000000000000000000000001:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 18446744073709551615 1 0000000000000000 100 0 0 10 0\n" +
		"   1: 20010DB8000000000000000001234567:01BB 00000000000000000000FFFF0A000009:9C40 01 00000000:00000000 00:00000000 00000000 4294967294        0 5 1 0000000000000000 100 0 0 10 0\n"
)

func TestParseSockets(t *testing.T) {
	ap := netip.MustParseAddrPort
	want4 := []Socket{
		{ap("127.0.0.1:22"), ap("0.0.0.0:0"), 31245, 1000, true},
		{ap("10.0.0.7:15000"), ap("10.0.0.9:40000"), 31246, 0, false},
		{ap("10.0.0.7:80"), ap("10.0.0.9:40001"), 0, 0, false},
	}
	want6 := []Socket{
		{ap("[::1]:22"), ap("[::]:0"), 1<<64 - 1, 0, true},
		{ap("[2001:db8::123:4567]:443"), ap("[::ffff:10.0.0.9]:40000"), 5, 4294967294, false},
	}
	for _, c := range []struct {
		name, text string
		little     bool
		want       []Socket
	}{
		{"little IPv4", little4, true, want4},
		{"big IPv4", big4, false, want4},
		{"little IPv6", little6, true, want6},
		{"big IPv6", big6, false, want6},
		{"heading alone", heading, true, nil},
		{"empty", "", true, nil},
		{"no newline at the end", strings.TrimRight(little4, " \n"), true, want4},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseSockets(nil, []byte(c.text), stateListen, c.little)
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("got %v, %v, want %v", got, err, c.want)
			}
		})
	}
	// One slice holds both families.
	both, err := parseSockets(slices.Clone(want4), []byte(little6), stateListen, true)
	if err != nil || !slices.Equal(both, slices.Concat(want4, want6)) {
		t.Errorf("both: got %v, %v", both, err)
	}
}

func TestParseSocketsRefuses(t *testing.T) {
	const good = "   0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 31245 1"
	if _, err := parseSockets(nil, []byte(heading+good), stateListen, true); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []struct{ old, new string }{
		{"0100007F:0016", "0100007F"},
		{"0100007F:0016", "0100007F0016:"},
		{"0100007F:0016", "0100007:0016"},
		{"0100007F:0016", "010000ZF:0016"},
		{"0100007F:0016", "0100007F:00Z6"},
		{"0100007F:0016", "0100007F0100007F:0016"},
		{" 0A ", " 0Z "},
		{" 1000 ", " 4294967296 "},
		{" 31245 1", " -1 1"},
		{" 31245 1", ""},
	} {
		line := strings.Replace(good, bad.old, bad.new, 1)
		got, err := parseSockets(nil, []byte(heading+line), stateListen, true)
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", line)) {
			t.Errorf("%q: got %v, %v, want an error that quotes it", line, got, err)
		}
	}
}

func requireLittleEndian(t *testing.T) {
	t.Helper()
	if !littleEndian {
		t.Skip("the fake proc is a little-endian machine's")
	}
}

func TestSocketsOfBothFamilies(t *testing.T) {
	requireLittleEndian(t)
	f := newFake(t, 1)
	f.sockets("tcp", "0100007F:0016 00000000:0000 0A 7")
	check := func(want ...string) {
		t.Helper()
		sockets, err := f.TCP()
		var got []string
		for _, s := range sockets {
			got = append(got, s.Local.String())
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("got %v, %v, want %v", got, err, want)
		}
	}
	check("127.0.0.1:22") // there is no tcp6: IPv6 is off
	f.sockets("tcp6", "00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 8")
	check("127.0.0.1:22", "[::]:80")

	f.write(heading+"nonsense\n", "thread-self", "net", "tcp6")
	if _, err := f.TCP(); err == nil || !strings.Contains(err.Error(), "tcp6") {
		t.Errorf("nonsense: got %v", err)
	}
	if _, err := (FS{Root: t.TempDir()}).TCP(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no proc: got %v", err)
	}
}

func TestListensOn(t *testing.T) {
	requireLittleEndian(t)
	f := newFake(t, 1)
	f.sockets("tcp", "0100007F:0016 00000000:0000 0A 7", "0100007F:0050 0100007F:9C40 01 8")
	f.sockets("tcp6", "00000000000000000000000000000000:01BB 00000000000000000000000000000000:0000 0A 9")
	for port, want := range map[uint16]bool{22: true, 443: true, 80: false, 40000: false, 0: false} {
		if got, err := f.ListensOn(port); got != want || err != nil {
			t.Errorf("%d: got %v, %v, want %v", port, got, err, want)
		}
	}
}

func TestListensUDP(t *testing.T) {
	requireLittleEndian(t)
	f := newFake(t, 1)
	f.sockets("udp",
		"3500007F:0035 00000000:0000 07 1", // 127.0.0.53
		"00000000:0035 00000000:0000 07 2",
		"3500007F:0035 0100007F:9C40 01 3", // connected
		"3500007F:0036 00000000:0000 07 4",
		"0100007F:0035 00000000:0000 07 5")
	f.sockets("udp6",
		any6+":0035 "+any6+":0000 07 6",
		"00000000000000000000000001000000:0035 "+any6+":0000 07 7",
		"0000000000000000FFFF00003500007F:0035 "+any6+":0000 07 8") // ::ffff:127.0.0.53
	for _, c := range []struct {
		addr string
		port uint16
		want []uint64
	}{
		{"127.0.0.53", 53, []uint64{1, 2, 6, 8}},
		{"::ffff:127.0.0.53", 53, []uint64{1, 2, 6, 8}},
		{"127.0.0.1", 53, []uint64{2, 5, 6}},
		{"10.0.0.1", 53, []uint64{2, 6}},
		{"::1", 53, []uint64{6, 7}},
		{"fe80::1%eth0", 53, []uint64{6}},
		{"127.0.0.53", 54, []uint64{4}},
		{"127.0.0.53", 55, nil},
	} {
		sockets, err := f.ListensUDP(netip.MustParseAddr(c.addr), c.port)
		var got []uint64
		for _, s := range sockets {
			got = append(got, s.Inode)
		}
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s port %d: got %v, %v, want %v", c.addr, c.port, got, err, c.want)
		}
	}
}

func manySockets(n int) []byte {
	var b strings.Builder
	b.WriteString(heading)
	for i := range n {
		fmt.Fprintf(&b, "%4d: %08X:%04X 0900000A:9C40 01 00000000:00000000 02:00000A5B 00000000  1000        0 %d 2 0000000000000000 20 4 30 10 -1                    \n", i, i, i%65535+1, 100000+i)
	}
	return []byte(b.String())
}

func TestManySockets(t *testing.T) {
	text := manySockets(50_000)
	start := time.Now()
	got, err := parseSockets(nil, text, stateListen, littleEndian)
	if err != nil || len(got) != 50_000 {
		t.Fatalf("got %d sockets, %v", len(got), err)
	}
	// Some 20 ms; what is quadratic takes minutes.
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	if allocs := testing.AllocsPerRun(1, func() { _, _ = parseSockets(nil, text, stateListen, littleEndian) }); allocs > 10 {
		t.Errorf("%v allocations", allocs)
	}
}

func BenchmarkParseSockets(b *testing.B) {
	text := manySockets(50_000)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseSockets(nil, text, stateListen, littleEndian); err != nil {
			b.Fatal(err)
		}
	}
}

func FuzzParseSockets(f *testing.F) {
	f.Add([]byte(little4))
	f.Add([]byte(little6))
	f.Fuzz(func(t *testing.T, text []byte) {
		sockets, err := parseSockets(nil, text, stateListen, true)
		for _, s := range sockets {
			if err == nil && (!s.Local.IsValid() || !s.Remote.IsValid()) {
				t.Errorf("%q: %v", text, s)
			}
		}
	})
}
