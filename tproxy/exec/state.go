package exec

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/files"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/kernel"
)

// stateDir holds what a trial has to know. /run is empty after a boot (hier(7)), and so
// are the tables.
const stateDir = "/run/kuma-tproxy"

// maxState is more than two saves of a family have, in bytes.
const maxState = 256 << 20

func (system) readState(name string) ([]byte, error) {
	text, err := files.FS{}.ReadFile(filepath.Join(stateDir, name), maxState)
	if errors.Is(err, fs.ErrPermission) {
		// A folder of root's, seen from a user namespace: none of ours.
		return nil, fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return text, err
}

func (system) writeState(name string, text []byte) error {
	if err := os.Mkdir(stateDir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(stateDir)
	if err != nil {
		return err
	}
	if !info.IsDir() || info.Mode().Perm()&0o022 != 0 || !files.Mine(info) {
		return fmt.Errorf("%s: %s: others could write to it: accepted is a folder of root's with mode 0700", stateDir, info.Mode())
	}
	path, side := filepath.Join(stateDir, name), filepath.Join(stateDir, "."+name)
	if err := os.Remove(side); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a run that was killed
		return err
	}
	if err := (files.FS{}).Create(side, text, dns.Info{Mode: 0o600}); err != nil {
		return err
	}
	return files.FS{}.Rename(side, path)
}

func (system) removeState(name string) error {
	err := os.Remove(filepath.Join(stateDir, name))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}

func (system) network() (string, error) {
	if cookie, err := kernel.NetworkCookie(); err == nil {
		return fmt.Sprintf("net-%d", cookie), nil
	}
	self := files.Namespaces().Self
	if self == "" {
		return "", errors.New("the network namespace cannot be told from others: /proc is not to be read")
	}
	return strings.ReplaceAll(self, " ", "-"), nil
}

func (system) boot() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id") // random(4)
	return strings.TrimSpace(string(id)), err
}

func (system) uptime() (time.Duration, error) { return kernel.BootTime() }

// watchName is the abstract socket of who watches over a trial: it is per network
// namespace, and goes with its process, however that ends.
const watchName = "kuma-tproxy-watch"

// watchWait is how long a new watch waits for the one before it, which looks every
// watchPause whether it is still needed.
const watchWait = 10 * watchPause

func (m system) watch(ctx context.Context) (func(), error) {
	h, err := kernel.LockWait(ctx, watchName, watchWait)
	if held, taken := errors.AsType[*kernel.HeldError](err); taken && !privilegedHolder(held.PID) {
		return func() {}, nil // as for the lock: somebody without our rights must not keep us from it
	}
	if err != nil {
		return nil, err
	}
	return func() { h.Unlock() }, nil
}

func (system) watched() (int, bool) {
	held, ok := kernel.Holder(watchName)
	return held.PID, ok && privilegedHolder(held.PID)
}

// privilegedHolder reports whether a process has our rights, as far as can be seen.
func privilegedHolder(pid int) bool {
	uid, known := ownerOf(pid)
	return !known || uid == 0 || uid == uint32(os.Geteuid())
}
