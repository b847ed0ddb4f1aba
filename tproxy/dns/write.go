package dns

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strings"
)

// byHand says what is left to do when the file cannot be put right.
func (m Manager) byHand(s state) string {
	if s.trusted {
		return "it is as it was before the install in " + s.backup
	}
	return fmt.Sprintf("take out the line that begins with %q and the nameserver below it", markHead)
}

// retry does something again when somebody else changed the file meanwhile.
func (m Manager) retry(do func() error) (err error) {
	for range attempts {
		if err = do(); !errors.Is(err, ErrChanged) {
			return err
		}
	}
	return err
}

// forget removes a backup that is ours, and then its record.
func (m Manager) forget(k kept) error {
	if k.record == nil {
		return nil
	}
	if k.trusted {
		if err := m.FS.Remove(k.backup); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return &FileError{Path: k.backup, What: "cannot be removed", Err: err}
		}
	}
	if err := m.FS.Remove(k.recordName()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &FileError{Path: k.recordName(), What: "cannot be removed", Err: err}
	}
	return nil
}

// journalName is the file that holds both texts during a write in place.
func journalName(name, mount string) string {
	return strings.Replace(tempName(name, mount), ".kuma-tmp", ".kuma-journal", 1)
}

// tempName is the file that a new one is written to before it takes its place. The
// name is always the same, so that what a killed run left is found; with the
// mount in it, because runs in several network namespaces may share a folder.
func tempName(name, mount string) string {
	if mount == "" {
		return name + ".kuma-tmp"
	}
	return fmt.Sprintf("%s.kuma-tmp-%s", name, digest([]byte(mount))[:8])
}

// make makes a new file in one step; ErrChanged where there is one by now.
func (m Manager) make(temp, name string, text []byte, like Info) error {
	if err := m.FS.Create(temp, text, like); err != nil {
		return err
	}
	err := m.FS.RenameNew(temp, name)
	if err != nil {
		_ = m.FS.Remove(temp)
	}
	if errors.Is(err, fs.ErrExist) {
		return ErrChanged
	}
	return err
}

// replace puts a file in the place of another in one step.
func (m Manager) replace(temp, name string, text []byte, like Info) error {
	if err := m.FS.Create(temp, text, like); err != nil {
		return err
	}
	err := m.FS.Rename(temp, name)
	if err != nil {
		_ = m.FS.Remove(temp)
	}
	return err
}

// change gives the file another text, or removes it, if that is to be.
func (m Manager) change(s state, how How, text []byte) (How, error) {
	switch {
	case how == Delete:
		if err := m.unchanged(s); err != nil {
			return how, err
		}
		return how, m.FS.Remove(s.target)
	case s.info.Kind == Missing || bytes.Equal(text, s.text):
		return Unchanged, nil
	case s.mount != "":
		return m.write(s, InPlace, text)
	}
	return m.write(s, Replace, text)
}

// write gives the file another text, and says in which way.
func (m Manager) write(s state, how How, text []byte) (How, error) {
	temp := tempName(s.target, s.mount)
	switch how {
	case Create:
		return how, m.make(temp, s.target, text, Info{Mode: 0o644})
	case InPlace:
		return how, m.overwrite(s, text)
	}
	if err := m.FS.Create(temp, text, s.info); err != nil {
		return how, err
	}
	err := m.unchanged(s)
	if err == nil {
		err = m.FS.Rename(temp, s.target)
	}
	if err == nil {
		return how, nil
	}
	_ = m.FS.Remove(temp)
	if errors.Is(err, ErrBusy) {
		return InPlace, m.overwrite(s, text)
	}
	return how, err
}

// unchanged returns ErrChanged unless the file is still the one that was read.
func (m Manager) unchanged(s state) error {
	info, err := m.view().Lstat(s.target)
	if err != nil || !info.equal(s.info) {
		return ErrChanged
	}
	text, err := m.view().ReadFile(s.target, MaxSize+1)
	if err != nil || !bytes.Equal(text, s.text) {
		return ErrChanged
	}
	return nil
}

// overwrite writes in place. What was and what is to be stand in a journal for as
// long as that takes, so that the next run can finish. What a failure left half-way
// is put back, for that takes no more room than there was.
func (m Manager) overwrite(s state, text []byte) error {
	name := journalName(s.path, s.mount)
	if err := m.replace(tempName(s.path, s.mount), name, journal{From: s.text, To: text}.text(), Info{Mode: 0o600}); err != nil {
		return err
	}
	err := m.FS.Overwrite(s.target, s.text, pad(text, len(s.text)), len(text))
	if err != nil && !errors.Is(err, ErrChanged) {
		if now, e := m.view().ReadFile(s.target, 2*MaxSize); e == nil && torn(now, s.text, text) {
			if e := m.FS.Overwrite(s.target, now, pad(s.text, len(now)), len(s.text)); e != nil {
				return fmt.Errorf("%w, and it could not be put back: %w; %s", err, e, m.byHand(s))
			}
		}
	}
	_ = m.FS.Remove(name) // else the next run does
	return err
}
