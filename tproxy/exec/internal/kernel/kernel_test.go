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
