package dns

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path"
	"strings"
)

// DelegatePath is the file of ours that systemd-resolved reads. In /etc it outlives
// a reboot, as a line in resolv.conf does.
const DelegatePath = "/etc/systemd/dns-delegate.d/kuma-mesh.dns-delegate"

// DelegateManager makes the file of ours by which systemd-resolved sends the names
// of the mesh to the control plane, and removes it again. To have it read is the
// caller's. It must not run twice at the same time.
type DelegateManager struct {
	Path string
	FS   FS
}

// DelegateChange is what is to be done to the file, or was.
type DelegateChange struct {
	Path string
	// Address is the control plane's; the zero Addr removes the file.
	Address netip.Addr
	// Aside is where a file of ours goes that somebody has edited since; empty where
	// nobody has.
	Aside string

	before, after []byte // nil is no file
	folder        bool   // whether it is made, or goes, too
	stale         bool   // whether a killed run left its file beside it, which goes
}

// Nothing reports whether the file is as it is to be.
func (c DelegateChange) Nothing() bool {
	return !c.stale && (c.before == nil) == (c.after == nil) && bytes.Equal(c.before, c.after)
}

// Before is the control plane that the file named; the zero Addr where it named
// none.
func (c DelegateChange) Before() netip.Addr {
	for line := range strings.Lines(string(c.before)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "DNS="); ok {
			a, _ := netip.ParseAddr(strings.TrimSpace(v)) // edited by somebody
			return a
		}
	}
	return netip.Addr{}
}

// String says what is done.
func (c DelegateChange) String() string {
	aside := ""
	if c.Aside != "" {
		aside = fmt.Sprintf("; somebody edited the one that was there, and it is kept as %s", c.Aside)
	}
	if c.after == nil {
		return "no file " + c.Path + " any more" + aside
	}
	return fmt.Sprintf("names in .%s to %s, by systemd-resolved's file %s%s", Mesh, c.Address, c.Path, aside)
}

// Undo says how it is taken back.
func (c DelegateChange) Undo() string {
	if c.before == nil {
		return "no file " + c.Path
	}
	return c.Path + " as it was"
}

// Inspect says what is to be done for the control plane to be asked at an address, or
// not at all (the zero Addr). It writes nothing. The error is a *FileError.
func (m DelegateManager) Inspect(a netip.Addr) (DelegateChange, error) {
	c := DelegateChange{Path: m.Path, Address: a}
	info, err := m.FS.Lstat(m.Path)
	if errors.Is(err, fs.ErrNotExist) {
		info, err = Info{}, nil
	}
	if err != nil && !a.IsValid() {
		if dir, e := m.FS.Lstat(path.Dir(m.Path)); e == nil && dir.Kind != Directory && dir.Kind != Symlink {
			return c, nil // nothing of ours is in what is no folder
		}
	}
	if err != nil {
		return c, &FileError{Path: m.Path, What: "cannot be looked at", Err: err}
	}
	switch info.Kind {
	case Missing:
	case Regular:
		if c.before, err = m.FS.ReadFile(m.Path, MaxSize+1); err != nil {
			return c, &FileError{Path: m.Path, What: "cannot be read", Err: err}
		}
	default:
		return m.foreign(c, "is no regular file")
	}
	if c.before != nil && !bytes.HasPrefix(c.before, []byte(delegateMark)) {
		return m.foreign(c, "is not ours")
	}
	if c.before != nil {
		c.folder = bytes.HasPrefix(c.before, []byte(delegateFolderMark+"\n"))
		if !bytes.Equal(c.before, delegateText(c.Before(), c.folder)) {
			if c.Aside, err = m.aside(); err != nil {
				return c, err
			}
		}
	}
	temp := tempName(m.Path, "")
	if left, err := m.FS.Lstat(temp); err == nil && left.Kind == Regular {
		c.stale = true
		if c.before == nil {
			text, err := m.FS.ReadFile(temp, MaxSize+1)
			c.folder = err == nil && bytes.HasPrefix(text, []byte(delegateFolderMark+"\n"))
		}
	}
	if !a.IsValid() {
		return c, nil
	}
	if c.before == nil && !c.folder {
		_, err := m.FS.Lstat(path.Dir(m.Path))
		if c.folder = errors.Is(err, fs.ErrNotExist); err != nil && !c.folder {
			return c, &FileError{Path: path.Dir(m.Path), What: "cannot be looked at", Err: err}
		}
	}
	c.after = delegateText(a, c.folder)
	return c, nil
}

// foreign is for a file that somebody else made: it is never removed, and in the way
// only where one of ours is to be.
func (m DelegateManager) foreign(c DelegateChange, what string) (DelegateChange, error) {
	c.before = nil
	if !c.Address.IsValid() {
		return c, nil
	}
	return c, &FileError{Path: m.Path, What: what, Remedy: "give it another name, and install again"}
}

// aside is a name for a file that somebody edited, which systemd-resolved does not
// read.
func (m DelegateManager) aside() (string, error) {
	for i := 1; i < 10; i++ {
		name := fmt.Sprintf("%s.edited-%d", m.Path, i)
		if _, err := m.FS.Lstat(name); errors.Is(err, fs.ErrNotExist) {
			return name, nil
		}
	}
	return "", &FileError{Path: m.Path, What: "was edited since, and all names to keep it under are taken", Remedy: "look at the files " + m.Path + ".edited-*, and remove those that nobody needs"}
}

// Do does what Inspect found. What fails is undone; the error is a *FileError.
func (m DelegateManager) Do(c DelegateChange) error {
	if c.Nothing() {
		return nil
	}
	err := m.do(c)
	if err != nil {
		err = &FileError{Path: m.Path, What: "cannot be changed", Err: err}
		if e := m.Undo(c); e != nil {
			err = fmt.Errorf("%w, and it could not be put back: %w", err, e)
		}
	}
	return err
}

func (m DelegateManager) do(c DelegateChange) error {
	folder := path.Dir(m.Path)
	if c.Aside != "" {
		if err := m.FS.RenameNew(m.Path, c.Aside); err != nil {
			return err
		}
	}
	if c.after == nil {
		if c.stale {
			if err := m.FS.Remove(tempName(m.Path, "")); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if c.Aside == "" {
			if err := m.FS.Remove(m.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if c.folder {
			_ = m.FS.RemoveFolder(folder) // it stays where somebody put something into it
		}
		return nil
	}
	if err := m.FS.MakeFolder(folder); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return m.write(c.after)
}

func (m DelegateManager) write(text []byte) error {
	temp := tempName(m.Path, "")
	if err := m.FS.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err // of a run that was killed
	}
	return Manager{FS: m.FS}.replace(temp, m.Path, text, Info{Mode: 0o644})
}

// Undo makes the file what it was before Do, however far that came.
func (m DelegateManager) Undo(c DelegateChange) error {
	folder := path.Dir(m.Path)
	if c.Aside != "" {
		switch err := m.FS.Rename(c.Aside, m.Path); {
		case err == nil:
			return nil
		case !errors.Is(err, fs.ErrNotExist): // Do did not come that far
			return err
		}
	}
	if c.before == nil {
		err := m.FS.Remove(m.Path)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		if c.folder && err == nil {
			_ = m.FS.RemoveFolder(folder)
		}
		return err
	}
	if now, err := m.FS.ReadFile(m.Path, MaxSize+1); err == nil && bytes.Equal(now, c.before) {
		return nil
	}
	if err := m.FS.MakeFolder(folder); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return m.write(c.before)
}
