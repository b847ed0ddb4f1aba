package dns

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
)

// A backup is ours when a record beside it says so, and its sum is that of the
// record. Without one it is somebody else's: of Kuma's own installer, which
// restores it over whatever is newer, or of a run of ours that another program has
// meddled with. The record stands beside the backup and not in the rules, because
// the file outlives a reboot and the rules do not.

// record is what an install remembers of a file.
type record struct {
	By      string     `json:"by"`
	Version int        `json:"version"`
	Path    string     `json:"path"`
	Mount   string     `json:"mount,omitempty"`   // root of the mount over the file; empty where there is none
	Missing bool       `json:"missing,omitempty"` // there was no file
	Address netip.Addr `json:"address"`           // the nameserver that was added
	SHA256  string     `json:"sha256,omitempty"`  // of the backup
}

const (
	recordBy      = "kumactl install transparent-proxy"
	recordVersion = 1
	recordSuffix  = ".record"
	recordSize    = 4096 // more than any record has
)

func (r record) text() []byte {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		panic(err) // strings and an address
	}
	return append(b, '\n')
}

func readRecord(text []byte) (record, bool) {
	var r record
	err := json.Unmarshal(text, &r)
	return r, err == nil && r.By == recordBy && r.Version == recordVersion
}

func digest(text []byte) string {
	s := sha256.Sum256(text)
	return hex.EncodeToString(s[:])
}

// backupNames are where a backup may be: the name that Kuma has given it, and
// others for when it is taken.
func backupNames(path string) []string {
	out := []string{path + ".kuma-backup", path + ".kuma-tproxy-backup"}
	for i := 2; i < 10; i++ {
		out = append(out, fmt.Sprintf("%s.kuma-tproxy-backup.%d", path, i))
	}
	return out
}

// kept is what stands beside a file.
type kept struct {
	backup  string // its name; the first that is free where there is no record
	record  *record
	text    []byte // of the backup, where it is ours
	trusted bool   // the backup is there and ours
	foreign []string
}

func (k kept) recordName() string { return k.backup + recordSuffix }

// look finds the record of a file and its backup. mount is the root of what is
// mounted over it: with ip-netns(8) several files stand at one path, and their
// backups beside each other.
func look(v View, path, mount string) (kept, error) {
	var k kept
	free := ""
	for _, name := range backupNames(path) {
		info, err := v.Lstat(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return k, &FileError{Path: name, What: "cannot be looked at", Err: err}
		}
		var r record
		known := false
		text, err := v.ReadFile(name+recordSuffix, recordSize)
		switch {
		case err == nil:
			r, known = readRecord(text)
		case !errors.Is(err, fs.ErrNotExist):
			return k, &FileError{Path: name + recordSuffix, What: "cannot be read", Err: err}
		case info.Kind == Missing && free == "":
			free = name
		}
		switch {
		case known && r.Path == path && r.Mount == mount && k.record == nil:
			k.record, k.backup = &r, name
			if info.Kind == Regular {
				if k.text, err = v.ReadFile(name, MaxSize+1); err != nil {
					return k, &FileError{Path: name, What: "cannot be read", Err: err}
				}
				k.trusted = digest(k.text) == r.SHA256
			}
			if info.Kind != Missing && !k.trusted {
				k.foreign = append(k.foreign, name)
			}
		case info.Kind != Missing && !known:
			k.foreign = append(k.foreign, name)
		}
	}
	if k.record == nil {
		if k.backup = free; free == "" {
			return k, &FileError{Path: path + ".kuma-backup", What: "and all other names for a backup are taken", Remedy: "look at what they hold, and remove what nobody needs"}
		}
	}
	return k, nil
}

// journal is what a file was and what it is to be, while it is written in place.
type journal struct {
	By   string `json:"by"`
	From []byte `json:"from"`
	To   []byte `json:"to"`
}

// journalSize is more than any journal has: two texts in base64.
const journalSize = 4 * MaxSize

func (j journal) text() []byte {
	j.By = recordBy
	b, err := json.Marshal(j)
	if err != nil {
		panic(err) // bytes
	}
	return append(b, '\n')
}

func readJournal(text []byte) (journal, bool) {
	var j journal
	err := json.Unmarshal(text, &j)
	return j, err == nil && j.By == recordBy
}

// pad returns text with line feeds behind it up to a size: a write in place of
// fewer bytes than there were is cut to size only afterwards, and should it stop in
// between, what is left of the former text must not be read.
func pad(text []byte, size int) []byte {
	return append(bytes.Clone(text), bytes.Repeat([]byte{'\n'}, max(size-len(text), 0))...)
}

// torn reports whether a write in place of to over from was stopped in between.
// Finishing it and being stopped again leaves the same, so it can be finished as
// often as it takes.
func torn(now, from, to []byte) bool {
	if bytes.Equal(now, from) || bytes.Equal(now, to) {
		return false
	}
	to = pad(to, len(from))
	n := 0
	for n < len(now) && n < len(to) && now[n] == to[n] {
		n++
	}
	if len(now) > len(from) {
		return n == len(now)
	}
	return len(now) == len(from) && bytes.Equal(now[n:], from[n:])
}
