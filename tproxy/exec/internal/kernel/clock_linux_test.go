package kernel

import (
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The time since boot is that which /proc/uptime has (ktime_get_boottime_ts64,
// fs/proc/uptime.c), in 1/100 s.
func TestBootTime(t *testing.T) {
	before, err := BootTime()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("/proc/uptime")
	if err != nil {
		t.Fatal(err)
	}
	after, err := BootTime()
	if err != nil {
		t.Fatal(err)
	}
	s, err := strconv.ParseFloat(strings.Fields(string(text))[0], 64)
	if err != nil {
		t.Fatal(err)
	}
	up := time.Duration(s * float64(time.Second))
	if up < before-20*time.Millisecond || up > after+20*time.Millisecond || after < before {
		t.Errorf("%s, %s, then %s", before, up, after)
	}
}

// A network namespace that comes after another, even at the same inode, has another
// cookie; seen from two threads, it has the same.
func TestNetworkCookie(t *testing.T) {
	here, err := NetworkCookie()
	if err != nil {
		t.Skip(err)
	}
	seen := map[uint64]bool{here: true}
	for range 5 {
		done := make(chan uint64)
		go func() {
			defer close(done)
			runtime.LockOSThread() // and never unlocked: the thread ends with its goroutine
			if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
				t.Logf("unshare: %v", err)
				return
			}
			c, err := NetworkCookie()
			if err != nil {
				t.Error(err)
			}
			done <- c
		}()
		c, ok := <-done
		if !ok {
			t.Skip("no other network namespace to be had")
		}
		if seen[c] {
			t.Errorf("cookie %d is there twice", c)
		}
		seen[c] = true
	}
	if again, err := NetworkCookie(); again != here || err != nil {
		t.Errorf("%d, then %d, %v", here, again, err)
	}
}
