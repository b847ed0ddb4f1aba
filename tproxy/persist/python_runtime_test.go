package persist

import (
	"encoding/json"
	"os"
	osexec "os/exec"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// python prints what firewalld's own functions make of each text: the arguments, or null
// where it cannot split them, and the text that it would write.
const python = `
import json, sys
from firewall.functions import splitArgs, joinArgs
out = []
for text in json.load(sys.stdin):
    try:
        args = splitArgs(text)
        out.append([args, joinArgs(args)])
    except ValueError:
        out.append([None, ""])
json.dump(out, sys.stdout)
`

// Arguments are split and joined as the Python of the firewalld that is installed does.
func TestArgsAreFirewallds(t *testing.T) {
	if !strings.Contains(os.Getenv("TPROXY_SUITE"), "runtime") {
		t.Skip("TPROXY_SUITE does not name runtime")
	}
	var texts []string
	for _, c := range split {
		texts = append(texts, c.text)
	}
	texts = append(texts, unsplit...)
	for seed := range 5000 {
		texts = append(texts, rapid.StringOfN(rapid.SampledFrom([]rune("ab-%#é;!$&<> \t\r\v'\"\\'\"\\ ")), 0, 12, -1).Example(seed))
	}
	in, err := json.Marshal(texts)
	if err != nil {
		t.Fatal(err)
	}
	cmd := osexec.Command("/usr/bin/python3", "-c", python)
	cmd.Stdin = strings.NewReader(string(in))
	out, err := cmd.Output()
	if err != nil {
		if strings.Contains(os.Getenv("TPROXY_REQUIRE"), "runtime") {
			t.Fatalf("TPROXY_REQUIRE names runtime: no firewalld for python3: %v", err)
		}
		t.Skipf("no firewalld for python3: %v", err)
	}
	var answers [][2]any
	if err := json.Unmarshal(out, &answers); err != nil {
		t.Fatal(err)
	}
	refused := 0
	for i, text := range texts {
		got, err := splitArgs(text)
		if answers[i][0] == nil {
			refused++
			if err == nil {
				t.Errorf("%q: %q, and firewalld refuses it", text, got)
			}
			continue
		}
		var want []string
		for _, a := range answers[i][0].([]any) {
			want = append(want, a.(string))
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v, want %q", text, got, err, want)
		} else if joined := joinArgs(got); joined != answers[i][1] {
			t.Errorf("%q: joined %q, want %q", text, joined, answers[i][1])
		}
	}
	t.Logf("%d texts, %d refused", len(texts), refused)
}
