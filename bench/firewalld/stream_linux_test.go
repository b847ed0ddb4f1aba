package main

import (
	"strings"
	"testing"
	"time"
)

// A gap is from the first answer of who is not the proxy to the proxy's next one, in the
// order of the answers.
func TestGap(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"":                                 0,
		"0 out 5 out":                      0,
		"0 out 5 remote 10 out":            5 * time.Millisecond,
		"10 out 0 out 5 remote":            5 * time.Millisecond,
		"0 remote 5 remote 10 out":         10 * time.Millisecond,
		"0 remote 5 failed 10 out":         10 * time.Millisecond,
		"0 remote 2 out 4 remote 7 remote": 5 * time.Millisecond, // two, the second to the end
		"0 out 1 remote 9 remote":          8 * time.Millisecond,
	} {
		var tries []try
		words := strings.Fields(text)
		for i := 0; i < len(words); i += 2 {
			at, err := time.ParseDuration(words[i] + "ms")
			if err != nil {
				t.Fatal(err)
			}
			tries = append(tries, try{ended: time.Unix(0, 0).Add(at), who: words[i+1]})
		}
		if got := gap(tries); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}
