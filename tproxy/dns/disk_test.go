package dns

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"
)

// disk is a file system that fails as it is told. Folders need not be made.
type disk struct {
	t     testing.TB
	nodes map[string]node
	inode int
	// step is called before each step of an operation by which the disk changes;
	// the steps of one operation are those between which a process can be killed.
	step func(op, name string) error
	busy map[string]bool // rename says EBUSY
	// read is called before the n-th reading of a file.
	read func(name string)
	// writes is how many steps there were.
	writes int
}

type node struct {
	info Info
	text string
	link string
}

func newDisk(t testing.TB) *disk {
	return &disk{t: t, nodes: map[string]node{}, busy: map[string]bool{}}
}

func (d *disk) id() string { d.inode++; return fmt.Sprint(d.inode) }

// put makes a regular file, in place of another.
func (d *disk) put(name, text string) *disk {
	d.nodes[name] = node{info: Info{Kind: Regular, Mode: 0o644, ID: d.id()}, text: text}
	return d
}

func (d *disk) symlink(name, to string) *disk {
	d.nodes[name] = node{info: Info{Kind: Symlink, Mode: 0o777, ID: d.id()}, link: to}
	return d
}

func (d *disk) folder(name string) *disk {
	d.nodes[name] = node{info: Info{Kind: Directory, Mode: 0o755, ID: d.id()}}
	return d
}

func (d *disk) change(name string, f func(*node)) {
	n := d.nodes[name]
	f(&n)
	d.nodes[name] = n
}

func notExist(op, name string) error { return &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist} }

func (d *disk) Lstat(name string) (Info, error) {
	if n, ok := d.nodes[name]; ok {
		n.info.Size = int64(len(n.text))
		return n.info, nil
	}
	for other := range d.nodes {
		if strings.HasPrefix(other, name+"/") {
			return Info{Kind: Directory, Mode: 0o755, ID: "folder " + name}, nil
		}
	}
	return Info{}, notExist("lstat", name)
}

func (d *disk) ReadFile(name string, limit int) ([]byte, error) {
	if d.read != nil {
		d.read(name)
	}
	n, ok := d.nodes[name]
	switch {
	case !ok:
		return nil, notExist("open", name)
	case n.info.Kind != Regular:
		return nil, fmt.Errorf("%s is no regular file", name)
	case n.info.Mode&0o444 == 0:
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
	}
	return []byte(n.text[:min(len(n.text), limit)]), nil
}

func (d *disk) Readlink(name string) (string, error) {
	if n, ok := d.nodes[name]; ok && n.info.Kind == Symlink {
		return n.link, nil
	}
	return "", notExist("readlink", name)
}

func (d *disk) Glob(pattern string) []string {
	var out []string
	for name := range d.nodes {
		if ok, _ := path.Match(pattern, name); ok {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func (d *disk) before(op, name string) error {
	d.writes++
	if d.step == nil {
		return nil
	}
	return d.step(op, name)
}

func (d *disk) Create(name string, text []byte, like Info) error {
	if err := d.before("create", name); err != nil {
		return err
	}
	if _, ok := d.nodes[name]; ok {
		return &fs.PathError{Op: "open", Path: name, Err: fs.ErrExist}
	}
	d.put(name, "")
	d.change(name, func(n *node) { n.info.Mode = 0o600 })
	for _, part := range []int{len(text) / 2, len(text)} {
		if err := d.before("write", name); err != nil {
			delete(d.nodes, name)
			return err
		}
		d.change(name, func(n *node) { n.text = string(text[:part]) })
	}
	d.change(name, func(n *node) {
		n.info.Mode, n.info.UID, n.info.GID, n.info.Xattrs = like.Mode, like.UID, like.GID, slices.Clone(like.Xattrs)
	})
	return nil
}

func (d *disk) Overwrite(name string, old, text []byte, size int) error {
	if err := d.before("open", name); err != nil {
		return err
	}
	n, ok := d.nodes[name]
	if !ok || n.text != string(old) {
		return ErrChanged
	}
	for _, part := range []int{len(text) / 3, len(text)} {
		if err := d.before("overwrite", name); err != nil {
			return err
		}
		d.change(name, func(n *node) { n.text = string(text[:part]) + n.text[min(part, len(n.text)):] })
	}
	if size < len(text) {
		if err := d.before("truncate", name); err != nil {
			return err
		}
		d.change(name, func(n *node) { n.text = n.text[:size] })
	}
	return nil
}

func (d *disk) Rename(from, to string) error {
	if err := d.before("rename", to); err != nil {
		return err
	}
	if d.busy[to] {
		return fmt.Errorf("%w: rename %s", ErrBusy, to)
	}
	n, ok := d.nodes[from]
	if !ok {
		return notExist("rename", from)
	}
	d.nodes[to] = n
	delete(d.nodes, from)
	return nil
}

func (d *disk) RenameNew(from, to string) error {
	if err := d.before("link", to); err != nil {
		return err
	}
	if _, ok := d.nodes[to]; ok {
		return &fs.PathError{Op: "link", Path: to, Err: fs.ErrExist}
	}
	d.nodes[to] = d.nodes[from]
	if err := d.before("unlink", from); err != nil {
		delete(d.nodes, to)
		return err
	}
	delete(d.nodes, from)
	return nil
}

func (d *disk) Remove(name string) error {
	if err := d.before("remove", name); err != nil {
		return err
	}
	if _, ok := d.nodes[name]; !ok {
		return notExist("remove", name)
	}
	delete(d.nodes, name)
	return nil
}

func (d *disk) MakeFolder(name string) error {
	if err := d.before("mkdir", name); err != nil {
		return err
	}
	if _, err := d.Lstat(name); err == nil {
		return &fs.PathError{Op: "mkdir", Path: name, Err: fs.ErrExist}
	}
	d.folder(name)
	return nil
}

func (d *disk) RemoveFolder(name string) error {
	if err := d.before("rmdir", name); err != nil {
		return err
	}
	for other := range d.nodes {
		if strings.HasPrefix(other, name+"/") {
			return &fs.PathError{Op: "rmdir", Path: name, Err: errors.New("directory not empty")}
		}
	}
	return d.Remove(name)
}

// killed is what a step panics with when the process is killed in front of it.
var killed = errors.New("killed")

// killAt runs something that is killed in front of the n-th step, from 0, and
// reports whether it was.
func (d *disk) killAt(n int, run func()) (was bool) {
	step := d.step
	defer func() { d.step = step }()
	d.step = func(string, string) error {
		if n == 0 {
			panic(killed)
		}
		n--
		return nil
	}
	defer func() {
		if r := recover(); r != nil {
			if r != any(killed) {
				panic(r)
			}
			was = true
		}
	}()
	run()
	return false
}

func (d *disk) text(name string) string {
	d.t.Helper()
	n, ok := d.nodes[name]
	if !ok {
		d.t.Errorf("%s is not there", name)
	}
	return n.text
}

// files lists what is there.
func (d *disk) files() []string { return slices.Sorted(maps.Keys(d.nodes)) }

// clone is a disk with the same files.
func (d *disk) clone() *disk {
	return &disk{t: d.t, nodes: maps.Clone(d.nodes), inode: d.inode, busy: maps.Clone(d.busy)}
}
