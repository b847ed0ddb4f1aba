package dns

import (
	"bytes"
	"fmt"
	"net/netip"
	"path"
)

// Undo takes an install back: the file, the backup and the record are as they were
// before. Where somebody has changed the file since, only our part is.
func (m Manager) Undo(i Installed) error {
	if i.How == Unchanged {
		return nil
	}
	return m.retry(func() error {
		s, err := m.look()
		if err != nil {
			return err
		}
		if mended, err := m.mend(s); err != nil {
			return err
		} else if mended {
			return ErrChanged
		}
		was := i.before
		want, how := s.text, Unchanged
		switch {
		case s.info.Kind == Missing:
		case bytes.Equal(s.text, i.Text) && was.info.Kind == Missing:
			how = Delete
		case bytes.Equal(s.text, i.Text):
			want = was.source
		default:
			want = RemoveNameserver(s.source)
			if i.record != nil && was.ours {
				if e, err := AddNameserver(want, i.record.Address); err == nil {
					want = e.Text
				}
			}
		}
		if was.info.Kind == Missing && s.info.Kind != Missing && len(want) == 0 {
			how = Delete
		}
		if how, err = m.change(s, how, want); err != nil {
			return &FileError{Path: s.target, What: "cannot be written", Remedy: m.byHand(s), Err: err}
		}
		switch {
		case i.fresh:
			err = m.forget(s.kept)
		case i.record != nil && s.record != nil && i.record.Address != s.record.Address:
			err = m.replace(tempName(s.path, s.mount), s.recordName(), i.record.text(), Info{Mode: 0o644})
		}
		return err
	})
}

// Removal is what an uninstall would do, or did.
type Removal struct {
	Path   string
	Target string
	How    How
	// Restored is whether the file is the one of before the install, byte for
	// byte; else somebody changed it since, and only our lines go.
	Restored bool
	// Text is what the file has afterwards.
	Text []byte
	// Backup is the backup of ours that is removed; empty where there is none.
	Backup string
	// Address is the nameserver that the install put in, as far as its record says.
	Address netip.Addr
	// Left is what is not ours, or not to be taken out from here.
	Left []string

	state state
}

// Nothing reports whether there is nothing of ours.
func (r Removal) Nothing() bool { return r.How == Unchanged && r.state.record == nil }

// String says what the uninstall does.
func (r Removal) String() string {
	what := r.Path
	if r.Target != r.Path {
		what += ", which is " + r.Target + ","
	}
	switch {
	case r.How == Delete:
		what += " removed: there was none before"
	case r.How != Unchanged && r.Restored:
		what += " as it was before the install (" + r.How.String() + ")"
	case r.How != Unchanged:
		what += fmt.Sprintf(" without our line (%s): somebody changed it since the install, and that stays", r.How)
	case r.Nothing():
		return what + ": nothing of ours"
	default:
		what += " left as it is: our line is gone already"
	}
	if r.Backup != "" {
		what += "; " + r.Backup + " removed"
	}
	return what
}

// InspectRemoval says what Remove would do. It writes nothing.
func (m Manager) InspectRemoval() (Removal, error) {
	r := Removal{Path: m.Env.Path, Target: m.Env.Path}
	s, err := m.look()
	switch {
	case err != nil && s.record == nil && path.IsAbs(m.Env.Path):
		// Nothing says that there was an install; what is in the way is not to keep
		// the rules from being removed.
		r.Left = append(r.Left, err.Error())
		return r, nil
	case err != nil:
		return r, err
	}
	r.Target = s.target
	for _, f := range s.foreign {
		r.Left = append(r.Left, f+" is not a backup of ours, and never restored")
	}
	if err := MayWrite(s.target, m.Env.Mounts, m.Namespaces); err != nil {
		// The rules of this network namespace go; the host's file is the host's.
		if s.ours {
			r.Left = append(r.Left, err.Error())
		}
		return r, nil
	}
	r.state, r.Text = s, s.text
	if s.trusted {
		r.Backup = s.backup
	}
	if s.record != nil {
		r.Address = s.record.Address
		for _, l := range Unmarked(s.source, s.record.Address) {
			r.Left = append(r.Left, fmt.Sprintf("%s line %d names %s without our mark", s.target, l.Number, s.record.Address))
		}
	}
	if !s.ours {
		return r, nil
	}
	if len(s.text) > MaxSize {
		return r, &FileError{Path: s.target, What: fmt.Sprintf("has more than %d bytes by now", MaxSize), Remedy: "take out the line that begins with " + fmt.Sprintf("%q", markHead) + " and the nameserver below it"}
	}
	r.Text, r.How = RemoveNameserver(s.source), Replace
	r.Restored = s.trusted && bytes.Equal(r.Text, s.kept.text)
	switch {
	case s.mount != "":
		r.How = InPlace
	case s.record != nil && s.record.Missing && len(r.Text) == 0:
		r.How, r.Restored = Delete, true
	}
	return r, m.writable(s)
}

// Remove takes out what Install put in: the file as it was, byte for byte, if
// nobody has changed it since, and otherwise without our lines and with all that is
// theirs. The backup goes. Killed in between, it is to be run again.
func (m Manager) Remove() (Removal, error) {
	var done Removal
	err := m.retry(func() error {
		r, err := m.InspectRemoval()
		done = r
		if err != nil || r.state.path == "" {
			return err
		}
		if mended, err := m.mend(r.state); err != nil {
			return err
		} else if mended {
			return ErrChanged
		}
		if done.How, err = m.change(r.state, r.How, r.Text); err != nil {
			return &FileError{Path: r.Target, What: "cannot be written", Remedy: m.byHand(r.state), Err: err}
		}
		return m.forget(r.state.kept)
	})
	return done, err
}
