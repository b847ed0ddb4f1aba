package exec

import (
	"os"
	"path/filepath"

	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/files"
)

// rooted is the machine's file system, below a folder. Once m is dead nothing is written,
// and before each write onWrite is asked whether the program dies there.
type rooted struct{ m *fakeMachine }

func (d rooted) at(name string) string {
	if d.m.root == "" {
		return filepath.Join("/nonexistent", name)
	}
	return filepath.Join(d.m.root, name)
}

func (d rooted) write() error {
	if d.m.dead || d.m.onWrite != nil && d.m.onWrite() {
		d.m.dead = true
		return errKilled
	}
	d.m.writes++
	return nil
}

// Lstat takes whoever runs the tests for root.
func (d rooted) Lstat(name string) (dns.Info, error) {
	info, err := files.FS{}.Lstat(d.at(name))
	if err == nil && info.UID == uint32(os.Geteuid()) {
		info.UID = 0
	}
	return info, err
}

func (d rooted) ReadFile(name string, limit int) ([]byte, error) {
	return files.FS{}.ReadFile(d.at(name), limit)
}
func (d rooted) Readlink(name string) (string, error) { return os.Readlink(d.at(name)) }
func (d rooted) Glob(pattern string) []string         { return files.FS{}.Glob(d.at(pattern)) }
func (d rooted) Writable(folder string) error         { return files.FS{}.Writable(d.at(folder)) }

func (d rooted) Create(name string, text []byte, like dns.Info) error {
	if err := d.write(); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		like.UID, like.GID = uint32(os.Geteuid()), uint32(os.Getegid())
	}
	return files.FS{}.Create(d.at(name), text, like)
}

func (d rooted) Overwrite(name string, old, text []byte, size int) error {
	if err := d.write(); err != nil {
		return err
	}
	return files.FS{}.Overwrite(d.at(name), old, text, size)
}

func (d rooted) Rename(from, to string) error {
	if err := d.write(); err != nil {
		return err
	}
	if d.m.mounted != "" && to == d.m.mounted {
		return dns.ErrBusy
	}
	return files.FS{}.Rename(d.at(from), d.at(to))
}

func (d rooted) RenameNew(from, to string) error {
	if err := d.write(); err != nil {
		return err
	}
	return files.FS{}.RenameNew(d.at(from), d.at(to))
}

func (d rooted) Remove(name string) error {
	if _, err := d.Lstat(name); err != nil {
		return err
	}
	if err := d.write(); err != nil {
		return err
	}
	return files.FS{}.Remove(d.at(name))
}

func (d rooted) Symlink(to, name string) error {
	if err := d.write(); err != nil {
		return err
	}
	return files.FS{}.Symlink(to, d.at(name))
}

func (d rooted) MakeFolder(name string) error {
	if err := d.write(); err != nil {
		return err
	}
	return files.FS{}.MakeFolder(d.at(name))
}

func (d rooted) RemoveFolder(name string) error {
	if err := d.write(); err != nil {
		return err
	}
	return files.FS{}.RemoveFolder(d.at(name))
}

func (m *fakeMachine) disk() disk { return rooted{m} }

func (m *fakeMachine) systemd() (no, elsewhere string) {
	if m.root == "" {
		return "a fake has no systemd", "a fake has no files"
	}
	return m.noSystemd, m.elsewhere
}

func (m *fakeMachine) locked() bool           { return m.held }
func (m *fakeMachine) pid() int               { return 4711 }
func (m *fakeMachine) started(pid int) string { return map[int]string{4711: "815"}[pid] }
