package kernel

import "testing"

func TestHeldErrorNamesTheHolder(t *testing.T) {
	for _, c := range []struct {
		err  HeldError
		want string
	}{
		{HeldError{Name: "kuma", PID: 12, Comm: "kumactl"}, `lock "kuma" is held by kumactl (pid 12)`},
		{HeldError{Name: "kuma"}, `lock "kuma" is held by another process`},
	} {
		if got := c.err.Error(); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestFamilyString(t *testing.T) {
	if got := IPv4.String() + " " + IPv6.String(); got != "IPv4 IPv6" {
		t.Errorf("got %q", got)
	}
}

func TestParseRelease(t *testing.T) {
	for text, want := range map[string][2]int{
		"6.18.5\x00\x00": {6, 18}, "5.2": {5, 2}, "4.18.0-553.el8_10.x86_64": {4, 18}, "6.1-rc1": {6, 1}, "": {}, "x": {}, "6": {6, 0},
		"99999999999999999999.1": {9999, 0},
	} {
		if major, minor := parseRelease([]byte(text)); major != want[0] || minor != want[1] {
			t.Errorf("%q: %d.%d, want %v", text, major, minor, want)
		}
	}
}
