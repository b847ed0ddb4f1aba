package kernel

import "syscall"

// Release returns the first two numbers of the kernel's release (uname(2)), 0 where it
// says none.
func Release() (major, minor int) {
	var u syscall.Utsname
	if syscall.Uname(&u) != nil {
		return 0, 0
	}
	text := make([]byte, 0, len(u.Release))
	for _, c := range u.Release {
		text = append(text, byte(c)) // of int8 or uint8, by the architecture
	}
	return parseRelease(text)
}
