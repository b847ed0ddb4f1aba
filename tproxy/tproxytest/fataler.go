package tproxytest

// Fataler is what *testing.T, *testing.B and *rapid.T share.
type Fataler interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}
