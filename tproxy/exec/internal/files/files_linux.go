package files

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"github.com/kumahq/kuma-tproxy/tproxy/dns"
)

func isBusy(err error) bool   { return errors.Is(err, syscall.EBUSY) }
func rmdir(name string) error { return syscall.Rmdir(name) }
func isInvalid(err error) bool {
	return errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOTSUP)
}

// inode identifies a file on its file system.
func inode(info os.FileInfo) string {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return fmt.Sprintf("inode %d of device %d", st.Ino, st.Dev)
	}
	return ""
}

// Mine reports whether a file belongs to the user that this process runs as.
func Mine(info os.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

// openRegular opens a regular file without waiting, as for a pipe.
func openRegular(name string, flag int) (*os.File, error) {
	f, err := os.OpenFile(name, flag|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Lstat looks at a file, and at the extended attributes of a regular one.
func (FS) Lstat(name string) (dns.Info, error) {
	var st syscall.Stat_t
	if err := syscall.Lstat(name, &st); err != nil {
		return dns.Info{}, &os.PathError{Op: "lstat", Path: name, Err: err}
	}
	info := dns.Info{
		Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, Size: st.Size,
		ID: fmt.Sprintf("%d:%d", st.Dev, st.Ino),
	}
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFDIR:
		info.Kind = dns.Directory
	case syscall.S_IFLNK:
		info.Kind = dns.Symlink
	case syscall.S_IFREG:
		info.Kind = dns.Regular
		info.Immutable = immutable(name)
		var err error
		if info.Xattrs, err = xattrs(name); err != nil {
			return info, err
		}
	default:
		info.Kind = dns.Other
	}
	return info, nil
}

// The flags of chattr(1) and the request for them (ioctl_iflags(2)).
const (
	immutableFlag  = 0x10
	appendOnlyFlag = 0x20
)

// getFlags is FS_IOC_GETFLAGS, _IOR('f', 1, long): the size of a long stands in
// it, and the bit for reading differs (asm-generic/ioctl.h, and those of mips and
// powerpc).
func getFlags() uintptr {
	read := uintptr(2) << 30
	if strings.HasPrefix(runtime.GOARCH, "mips") || strings.HasPrefix(runtime.GOARCH, "ppc") {
		read = 2 << 29
	}
	return read | unsafe.Sizeof(uintptr(0))<<16 | 'f'<<8 | 1
}

// immutable is false where it cannot be told: then the write says so.
func immutable(name string) bool {
	f, err := openRegular(name, os.O_RDONLY)
	if err != nil {
		return false
	}
	defer f.Close()
	var flags uintptr // the kernel writes an int
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), getFlags(), uintptr(unsafe.Pointer(&flags)))
	value := *(*uint32)(unsafe.Pointer(&flags))
	return errno == 0 && value&(immutableFlag|appendOnlyFlag) != 0
}

// sums are attributes that the kernel derives from the bytes of a file: those of
// one file are wrong on another (evm, ima: Documentation/ABI/testing/ima_policy).
var sums = []string{"security.ima", "security.evm"}

// xattrs returns the extended attributes of a regular file, sorted by name.
func xattrs(name string) ([]dns.Xattr, error) {
	list, err := grow(func(b []byte) (int, error) { return syscall.Listxattr(name, b) })
	if err != nil {
		if isInvalid(err) {
			return nil, nil
		}
		return nil, &os.PathError{Op: "listxattr", Path: name, Err: err}
	}
	var out []dns.Xattr
	for key := range strings.SplitSeq(string(list), "\x00") {
		if key == "" || slices.Contains(sums, key) {
			continue
		}
		value, err := grow(func(b []byte) (int, error) { return syscall.Getxattr(name, key, b) })
		switch {
		case errors.Is(err, syscall.ENODATA):
			continue // gone meanwhile
		case err != nil:
			return nil, &os.PathError{Op: "getxattr " + key, Path: name, Err: err}
		}
		out = append(out, dns.Xattr{Name: key, Value: string(value)})
	}
	slices.SortFunc(out, func(a, b dns.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// grow asks for a size and then for as many bytes, again where they became more.
func grow(read func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := read(nil)
		if err != nil || n == 0 {
			return nil, err
		}
		buf := make([]byte, n)
		n, err = read(buf)
		if errors.Is(err, syscall.ERANGE) {
			continue
		}
		return buf[:max(n, 0)], err
	}
}

// setxattr sets an attribute unless it is there already, as a label is that a
// security module gives every new file, and that not everybody may set.
func setxattr(name string, x dns.Xattr) error {
	now, err := grow(func(b []byte) (int, error) { return syscall.Getxattr(name, x.Name, b) })
	if err == nil && string(now) == x.Value {
		return nil
	}
	return syscall.Setxattr(name, x.Name, []byte(x.Value), 0)
}

// chown gives a file its owner, unless it has it already: only root may.
func chown(f *os.File, like dns.Info) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid == like.UID && st.Gid == like.GID {
		return nil
	}
	return f.Chown(int(like.UID), int(like.GID))
}

// writable asks as access(2) does, which answers for a file system that is read-only as
// well.
func writable(folder string) error {
	const wOK = 2 // W_OK (unistd.h)
	if err := syscall.Access(folder, wOK); err != nil {
		return &os.PathError{Op: "access", Path: folder, Err: err}
	}
	return nil
}
