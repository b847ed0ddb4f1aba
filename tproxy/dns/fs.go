package dns

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Kind is what stands at a path. The zero Kind is nothing.
type Kind int

// The kinds that make a difference here.
const (
	Missing Kind = iota
	Regular
	Directory
	Symlink
	Other // a device, a socket, a pipe
)

// Info is what there is to know of a file beside its bytes.
type Info struct {
	Kind     Kind
	Mode     uint32 // the permission bits
	UID, GID uint32
	Size     int64
	// ID tells one file from another at the same path: device and inode.
	ID string
	// Immutable is whether chattr(1) has made it immutable or append-only.
	Immutable bool
	// Xattrs are the extended attributes (xattr(7)), access lists and labels of
	// security modules among them, but for those that are sums of the bytes.
	Xattrs []Xattr
}

// Xattr is an extended attribute.
type Xattr struct {
	Name  string
	Value string
}

// equal reports whether nothing of a file was changed but its bytes.
func (i Info) equal(o Info) bool {
	return i.Kind == o.Kind && i.Mode == o.Mode && i.UID == o.UID && i.GID == o.GID && i.ID == o.ID && slices.Equal(i.Xattrs, o.Xattrs)
}

// View is what is read of the file system. Errors for what does not exist are
// fs.ErrNotExist.
type View interface {
	// Lstat does not follow a symbolic link.
	Lstat(name string) (Info, error)
	// ReadFile returns at most limit bytes of a regular file. It never waits, as a
	// pipe would make it.
	ReadFile(name string, limit int) ([]byte, error)
	Readlink(name string) (string, error)
	// Glob lists what matches a pattern of path.Match, sorted.
	Glob(pattern string) []string
}

// FS is what Manager writes with. What it has written is on the disk when it
// returns, so that a loss of power comes before or after.
type FS interface {
	View
	// Create makes a file that does not exist yet, with the bytes, and the owner,
	// the mode and the extended attributes of like. A like of Kind Missing has
	// only a mode. On an error the file is not there.
	Create(name string, text []byte, like Info) error
	// Overwrite changes a file in place. It compares the file with old, and
	// returns ErrChanged if it differs; else it writes text at its start, in one
	// write, and then cuts it to size.
	Overwrite(name string, old, text []byte, size int) error
	// Rename replaces a file by another. The error is ErrBusy where to is a mount
	// point (rename(2), EBUSY).
	Rename(from, to string) error
	// RenameNew is a Rename that fails with fs.ErrExist where to exists.
	RenameNew(from, to string) error
	Remove(name string) error
	// MakeFolder makes a folder that everybody may read; fs.ErrExist where something
	// stands there. RemoveFolder removes one that is empty.
	MakeFolder(name string) error
	RemoveFolder(name string) error
}

// ErrBusy is for a rename onto a mount point.
var ErrBusy = errors.New("the path is a mount point")

// ErrChanged is for a file that somebody else changed while we were at it.
var ErrChanged = errors.New("somebody else changed the file meanwhile")

// FileError says what of a file is in the way.
type FileError struct {
	Path   string
	What   string // what is wrong
	Remedy string // what to do; may be empty
	Err    error  // the system's reason; may be nil
}

func (e *FileError) Error() string {
	s := fmt.Sprintf("%q %s", e.Path, e.What)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	if e.Remedy != "" {
		s += "; " + e.Remedy
	}
	return s
}

func (e *FileError) Unwrap() error { return e.Err }

// maxLinks is how many symbolic links the kernel follows (path_resolution(7)).
const maxLinks = 40

// place is where a path leads.
type place struct {
	path   string
	target string   // without symbolic links; what does not exist is the last part at most
	links  []string // each link of the file's own chain, as "from -> to"
	info   Info     // of the target; Kind Missing where it does not exist
}

// find follows a path as the kernel does (path_resolution(7)). The chain of links
// from the file itself is kept, for it says who made them.
func find(v View, name string) (place, error) {
	p := place{path: name, target: path.Clean(name)}
	if !path.IsAbs(name) {
		return p, &FileError{Path: name, What: "is no absolute path"}
	}
	todo := strings.Split(p.target[1:], "/")
	cur, links := "/", 0
	for len(todo) > 0 {
		next := todo[0]
		todo = todo[1:]
		switch next {
		case "", ".":
			continue
		case "..":
			cur = path.Dir(cur)
			continue
		}
		at := path.Join(cur, next)
		info, err := v.Lstat(at)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			p.target, p.info = path.Join(append([]string{at}, todo...)...), Info{}
			return p, nil
		case err != nil:
			return p, &FileError{Path: at, What: "cannot be looked at", Err: err}
		case info.Kind != Symlink:
			cur, p.info = at, info
			continue
		}
		to, err := v.Readlink(at)
		if err != nil {
			return p, &FileError{Path: at, What: "cannot be read as a symbolic link", Err: err}
		}
		if links++; links > maxLinks {
			return p, &FileError{Path: name, What: fmt.Sprintf("is behind more than %d symbolic links", maxLinks)}
		}
		if len(todo) == 0 {
			p.links = append(p.links, at+" -> "+to)
		}
		if path.IsAbs(to) {
			cur = "/"
		}
		todo = append(strings.Split(to, "/"), todo...)
	}
	p.target = cur
	return p, nil
}

// read returns the bytes of the file that a place leads to. The error is a
// *FileError for what is no regular file, and a *TextError in one for what is no
// text to edit.
func (p place) read(v View) ([]byte, error) {
	switch p.info.Kind {
	case Missing:
		return nil, nil
	case Directory:
		return nil, &FileError{Path: p.target, What: "is a directory", Remedy: "a resolv.conf is a regular file"}
	case Regular:
	default:
		return nil, &FileError{Path: p.target, What: "is no regular file"}
	}
	text, err := v.ReadFile(p.target, MaxSize+1)
	if err != nil {
		return nil, &FileError{Path: p.target, What: "cannot be read", Err: err}
	}
	return text, nil
}
