package main

import (
	"errors"
	"strings"
	"testing"
)

// Where there can be no namespace the flows are walked, and it is said so first.
func TestPaper(t *testing.T) {
	var b strings.Builder
	if code := paper(&page{w: &b}, errors.New("forbidden")); code != 0 {
		t.Errorf("exit code %d", code)
	}
	inOrder(t, b.String(), "forbidden", "== The script", "== No packet was sent", "ON PAPER", "15 flows, 0 wrong")
	if strings.Contains(b.String(), "SEEN") || strings.Contains(b.String(), "\x1b") {
		t.Errorf("says SEEN, or has colours:\n%s", &b)
	}
}

// inOrder looks for each text behind the one before.
func inOrder(t *testing.T, text string, wanted ...string) {
	t.Helper()
	rest := text
	for _, w := range wanted {
		_, behind, found := strings.Cut(rest, w)
		if !found {
			t.Fatalf("%q is not there, or not in its place:\n%s", w, text)
		}
		rest = behind
	}
}
