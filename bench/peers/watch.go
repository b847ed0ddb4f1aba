//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// watch hears of every program that is started from the mounts of PATH, in this mount
// namespace, which is our own (netlab.Reexec). A folder of wrappers as PATH would be no
// match for it: who looks what a program is, as our Probe does, sees another one.
type watch struct{ fd int }

// watchPrograms begins to listen, by fanotify(7).
func watchPrograms() (*watch, error) {
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_LARGEFILE)
	if err != nil {
		return nil, fmt.Errorf("fanotify_init: %w", err)
	}
	w := &watch{fd}
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_MOUNT, unix.FAN_OPEN_EXEC, unix.AT_FDCWD, dir)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			w.Close()
			return nil, fmt.Errorf("fanotify_mark %s: %w", dir, err)
		}
	}
	return w, nil
}

func (w *watch) Close() { _ = unix.Close(w.fd) }

// started is what was started since the last call. The kernel opens a program's dynamic
// loader as it opens the program (load_elf_binary, fs/binfmt_elf.c): that is not counted.
func (w *watch) started() (names []string, err error) {
	buf := make([]byte, 1<<16)
	for {
		n, err := unix.Read(w.fd, buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return names, nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, fmt.Errorf("fanotify: %w", err)
		}
		for events := buf[:n]; len(events) > 0; {
			var e unix.FanotifyEventMetadata
			if err := binary.Read(bytes.NewReader(events), binary.NativeEndian, &e); err != nil {
				return nil, err
			}
			if e.Vers != unix.FANOTIFY_METADATA_VERSION || e.Event_len == 0 || int(e.Event_len) > len(events) {
				return nil, fmt.Errorf("fanotify: an event of version %d and %d bytes", e.Vers, e.Event_len)
			}
			events = events[e.Event_len:]
			if e.Fd < 0 {
				return nil, errors.New("fanotify: events were lost")
			}
			name, err := os.Readlink(fmt.Sprintf("/proc/thread-self/fd/%d", e.Fd))
			if err = errors.Join(err, unix.Close(int(e.Fd))); err != nil {
				return nil, err
			}
			if !strings.HasPrefix(filepath.Base(name), "ld-") {
				names = append(names, filepath.Base(name))
			}
		}
	}
}
