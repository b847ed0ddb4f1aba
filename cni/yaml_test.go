package cni

import (
	"strings"
	"testing"
)

func TestYAMLAliases(t *testing.T) {
	long := "x: &a \"" + strings.Repeat("b", 60_000) + "\"\ny: [" + strings.Repeat("*a,", 3000) + "]\n"
	var lists strings.Builder
	lists.WriteString("a: &a [1,1,1,1,1,1,1,1,1,1]\n")
	for i := range 7 {
		lists.WriteString(string(rune('b'+i)) + ": &" + string(rune('b'+i)) + " [" + strings.Repeat("*"+string(rune('a'+i))+",", 10) + "]\n")
	}
	for name, text := range map[string]string{"a long text": long, "lists of lists": lists.String(), "itself": "a: &a [*a]\n"} {
		if out, err := jsonOf([]byte(text)); err == nil || !strings.Contains(err.Error(), "aliases") {
			t.Errorf("%s: %d bytes of JSON, %v", name, len(out), err)
		}
	}
	out, err := jsonOf([]byte("a: &a [80]\nb: *a\n"))
	if err != nil || string(out) != `{"a":[80],"b":[80]}` {
		t.Errorf("%s, %v", out, err)
	}
	if out, err := jsonOf(nil); err != nil || string(out) != "null" {
		t.Errorf("nothing: %q, %v", out, err)
	}
}
