package procfs

import (
	"errors"
	"net/netip"
	"testing"
)

// TestListening: what FS.Listening answers is taken, and its error is no
// answer.
func TestListening(t *testing.T) {
	f := newFake(t, 50)
	f.sockets("tcp", "00000000:0016 00000000:0000 0A 100", "0100007F:0017 0100007F:0050 01 101")
	fails := errors.New("no sock_diag")
	for _, c := range []struct {
		name   string
		answer func() ([]Socket, error)
		on     []uint16
		notOn  []uint16
	}{
		{name: "nil", on: []uint16{22}, notOn: []uint16{23, 2222}},
		{name: "error", answer: func() ([]Socket, error) { return nil, fails }, on: []uint16{22}, notOn: []uint16{23, 2222}},
		{name: "answer", on: []uint16{2222}, notOn: []uint16{22, 23}, answer: func() ([]Socket, error) {
			return []Socket{{Local: netip.MustParseAddrPort("0.0.0.0:2222"), Inode: 7, Listening: true}}, nil
		}},
	} {
		f.Listening = c.answer
		for _, port := range c.on {
			if is, err := f.ListensOn(port); !is || err != nil {
				t.Errorf("%s: ListensOn(%d) = %t, %v", c.name, port, is, err)
			}
		}
		for _, port := range c.notOn {
			if is, err := f.ListensOn(port); is || err != nil {
				t.Errorf("%s: ListensOn(%d) = %t, %v", c.name, port, is, err)
			}
		}
	}
}
