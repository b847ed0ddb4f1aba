package dns

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestQueryAndAnswer(t *testing.T) {
	q, err := Query(0x1234, "backend.mesh")
	want := []byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07backend\x04mesh\x00\x00\x01\x00\x01")
	if err != nil || !bytes.Equal(q, want) {
		t.Fatalf("%q %v", q, err)
	}
	for name, ok := range map[string]bool{
		"mesh": true, "backend.mesh.": true, strings.Repeat("a", 63) + ".mesh": true, strings.Repeat("a.", 126) + "a": true,
		"": false, ".": false, "a..mesh": false, strings.Repeat("a", 64): false, strings.Repeat("a.", 127) + "a": false,
	} {
		if _, err := Query(1, name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
	with := func(change func(b []byte) []byte) []byte {
		b := bytes.Clone(q)
		b[2] |= 0x80
		return change(b)
	}
	keep := func(b []byte) []byte { return b }
	for name, test := range map[string]struct {
		answer []byte
		code   string // empty: no answer
	}{
		"NOERROR":            {with(keep), "NOERROR"},
		"NXDOMAIN":           {with(func(b []byte) []byte { b[3] |= 3; return b }), "NXDOMAIN"},
		"another case":       {with(func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("backend"), []byte("BackEnd")) }), "NOERROR"},
		"with more behind":   {with(func(b []byte) []byte { return append(b, "\xc0\x0c..."...) }), "NOERROR"},
		"refused, short":     {with(func(b []byte) []byte { b[3], b[5] = 5, 0; return b[:12] }), "REFUSED"},
		"an unknown code":    {with(func(b []byte) []byte { b[3] = 11; return b }), "RCODE 11"},
		"another id":         {with(func(b []byte) []byte { b[0]++; return b }), ""},
		"another name":       {with(func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("backend"), []byte("frontnd")) }), ""},
		"our own query":      {q, ""},
		"another opcode":     {with(func(b []byte) []byte { b[2] |= 0x28; return b }), ""},
		"cut short":          {with(func(b []byte) []byte { return b[:20] }), ""},
		"NOERROR, no header": {[]byte{0x12, 0x34, 0x80}, ""},
		"no question":        {with(func(b []byte) []byte { b[5] = 0; return b[:12] }), ""},
	} {
		code, err := Answer(q, test.answer)
		if test.code == "" && !errors.Is(err, ErrNoAnswer) || test.code != "" && (err != nil || code.String() != test.code) {
			t.Errorf("%s: %v %v", name, code, err)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	q, _ := Query(1, "a.mesh")
	f.Add(q)
	f.Add(append([]byte{0, 1, 0x80}, q[3:]...))
	f.Fuzz(func(t *testing.T, answer []byte) {
		if _, err := Answer(q, answer); err == nil && !bytes.Equal(q[:2], answer[:2]) {
			t.Fatal("an answer to something else")
		}
	})
}
