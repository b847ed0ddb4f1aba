package dns

import (
	"errors"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strings"
	"testing"
)

const unread = "[Delegate]\nDNS=192.0.2.1\nDomains=~lan\n"

func delegates(d *disk) DelegateManager { return DelegateManager{Path: DelegatePath, FS: d} }

// set has the control plane asked at an address, or not at all.
func set(t *testing.T, m DelegateManager, a netip.Addr) DelegateChange {
	t.Helper()
	c, err := m.Inspect(a)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Do(c); err != nil {
		t.Fatal(err)
	}
	return c
}

// Install, the same again, another address, uninstall: the disk is what it was.
func TestDelegate(t *testing.T) {
	for _, folder := range []bool{false, true} {
		d := newDisk(t).folder("/etc/systemd")
		if folder {
			d.folder(path.Dir(DelegatePath))
		}
		before, m := d.files(), delegates(d)
		c := set(t, m, cp)
		if got := d.text(DelegatePath); !strings.HasSuffix(got, "\n[Delegate]\nDNS="+cp.String()+"\nDomains=~mesh\nDefaultRoute=no\n") {
			t.Errorf("%q", got)
		}
		if s := c.String(); !strings.Contains(s, cp.String()) || !strings.Contains(s, DelegatePath) || c.Undo() != "no file "+DelegatePath {
			t.Errorf("%s; undo: %s", s, c.Undo())
		}
		writes := d.writes
		if c := set(t, m, cp); !c.Nothing() || d.writes != writes {
			t.Errorf("the same again: %s, %d writes", c, d.writes-writes)
		}
		six := netip.MustParseAddr("fd00::9")
		if c := set(t, m, six); c.Before() != cp || !strings.Contains(d.text(DelegatePath), "DNS=fd00::9\n") {
			t.Errorf("another address: %s, %q", c, d.text(DelegatePath))
		}
		if c := set(t, m, netip.Addr{}); c.Nothing() || !strings.Contains(c.String(), "any more") || c.Before() != six {
			t.Errorf("uninstall: %s, before %s", c, c.Before())
		}
		if after := d.files(); !slices.Equal(after, before) {
			t.Errorf("folder %v: %q before, %q after", folder, before, after)
		}
		if c := set(t, m, netip.Addr{}); !c.Nothing() {
			t.Errorf("uninstall again: %s", c)
		}
	}
}

// What somebody else made is in the way of an install, and never removed; what
// somebody made of ours is kept.
func TestDelegateOfOthers(t *testing.T) {
	d := newDisk(t).put(DelegatePath, unread)
	if _, err := delegates(d).Inspect(cp); err == nil || !strings.Contains(err.Error(), "is not ours") || !strings.Contains(err.Error(), DelegatePath) {
		t.Error(err)
	}
	if c := set(t, delegates(d), netip.Addr{}); !c.Nothing() || d.text(DelegatePath) != unread {
		t.Errorf("%s", c)
	}
	d = newDisk(t).symlink(DelegatePath, "/dev/null")
	if _, err := delegates(d).Inspect(cp); err == nil || !strings.Contains(err.Error(), "is no regular file") {
		t.Error(err)
	}
	for _, a := range []netip.Addr{{}, cp} {
		d = newDisk(t).folder("/etc/systemd")
		set(t, delegates(d), cp)
		edited := d.text(DelegatePath) + "FirewallMark=7\n"
		d.put(DelegatePath, edited)
		c := set(t, delegates(d), a)
		aside := DelegatePath + ".edited-1"
		if c.Aside != aside || d.text(aside) != edited || !strings.Contains(c.String(), aside) {
			t.Errorf("%q: %s", a, c)
		}
		if _, err := d.Lstat(DelegatePath); (err == nil) != a.IsValid() {
			t.Errorf("%q: %v", a, err)
		}
		if err := delegates(d).Undo(c); err != nil || d.text(DelegatePath) != edited {
			t.Errorf("undone: %v, %q", err, d.text(DelegatePath))
		}
	}
	for i := range 9 {
		d.put(DelegatePath+".edited-"+string(rune('1'+i)), "")
	}
	if _, err := delegates(d).Inspect(cp); err == nil || !strings.Contains(err.Error(), "all names to keep it under are taken") {
		t.Error(err)
	}
}

// Each way of changing the file, failed and killed in front of each step: after a
// failure the disk is as it was, after a kill the file is the old or the new one, and
// the next run finishes.
func TestDelegateFailsAnywhere(t *testing.T) {
	six := netip.MustParseAddr("fd00::9")
	bare := newDisk(t).folder("/etc/systemd")
	there := bare.clone()
	set(t, delegates(there), six)
	edited := there.clone()
	edited.put(DelegatePath, there.text(DelegatePath)+"# mine\n")
	for name, test := range map[string]struct {
		from *disk
		to   netip.Addr
	}{
		"fresh": {bare, cp}, "another address": {there, cp}, "removal": {there, netip.Addr{}},
		"over an edited one": {edited, cp}, "removal of an edited one": {edited, netip.Addr{}},
	} {
		whole := test.from.clone()
		set(t, delegates(whole), test.to)
		texts := func(d *disk) map[string]string {
			out := map[string]string{}
			for n, f := range d.nodes {
				out[n] = f.text
			}
			return out
		}
		for n := 0; ; n++ {
			d := test.from.clone()
			left := n
			d.step = func(string, string) error {
				if left--; left == -1 {
					return errors.New("disk full")
				}
				return nil
			}
			c, err := delegates(d).Inspect(test.to)
			if err != nil {
				t.Fatal(err)
			}
			if err = delegates(d).Do(c); left >= 0 {
				if n == 0 {
					t.Errorf("%s: nothing was written", name)
				}
				break
			}
			if err != nil && !maps.Equal(texts(d), texts(test.from)) {
				t.Errorf("%s: failed at step %d (%v): %q", name, n, err, texts(d))
			}
			if err == nil && d.nodes[DelegatePath].text != whole.nodes[DelegatePath].text {
				t.Errorf("%s: failed at step %d without an error", name, n)
			}

			d = test.from.clone()
			if !d.killAt(n, func() { _ = delegates(d).Do(c) }) {
				t.Fatalf("%s: not killed at step %d", name, n)
			}
			if now, is := d.nodes[DelegatePath]; is && now.text != test.from.nodes[DelegatePath].text && now.text != whole.nodes[DelegatePath].text {
				t.Errorf("%s: killed at step %d: %q", name, n, now.text)
			}
			set(t, delegates(d), test.to)
			if d.nodes[DelegatePath].text != strings.Replace(whole.nodes[DelegatePath].text, delegateFolderMark, firstLine(d.nodes[DelegatePath].text), 1) {
				t.Errorf("%s: finished after a kill at step %d: %q", name, n, d.nodes[DelegatePath].text)
			}
			for f := range d.nodes {
				if strings.Contains(f, ".kuma-tmp") {
					t.Errorf("%s: killed at step %d, %s is left", name, n, f)
				}
			}
		}
	}
}

// An uninstall takes what a killed install left beside the file, with the folder that
// was made for it.
func TestDelegateOfAKilledInstall(t *testing.T) {
	for _, again := range []bool{false, true} {
		d := newDisk(t).folder("/etc/systemd")
		before := d.files()
		d.folder(path.Dir(DelegatePath)).put(tempName(DelegatePath, ""), string(delegateText(cp, true)))
		if again {
			set(t, delegates(d), cp)
		}
		if c := set(t, delegates(d), netip.Addr{}); c.Nothing() {
			t.Errorf("install again %v: %s", again, c)
		}
		if after := d.files(); !slices.Equal(after, before) {
			t.Errorf("install again %v: %q before, %q after", again, before, after)
		}
	}
}

// firstLine is the mark of a file: who was killed when it had made the folder does
// not know any more that it did.
func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}

// Which owner can be told to split, and how; the rest says why not.
func TestSplit(t *testing.T) {
	four, six := netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fd00::9")
	for _, test := range []struct {
		e    OwnedError
		want Split
		why  string
	}{
		{OwnedError{Path: DefaultPath, Mode: ResolvedStub, Address: four, Systemd: 258}, Delegate, ""},
		{OwnedError{Path: DefaultPath, Mode: ResolvedStatic, Address: six, Systemd: 262}, Delegate, ""},
		{OwnedError{Path: DefaultPath, Mode: ResolvedStub, Address: netip.MustParseAddr("127.0.0.1"), Systemd: 258}, Delegate, ""},
		{OwnedError{Path: DefaultPath, Mode: ResolvedStub, Address: four, Systemd: 257}, Link, ""},
		{OwnedError{Path: DefaultPath, Mode: ResolvedStatic, Address: four}, Link, ""},
		{OwnedError{Path: DefaultPath, Mode: ResolvedStub, Address: six, Systemd: 257}, NoSplit, "version 257: before 258"},
		{OwnedError{Path: DefaultPath, Mode: ResolvedStub, Address: six}, NoSplit, "version not known"},
		{OwnedError{Path: DefaultPath, Mode: ResolvedStub, Address: netip.MustParseAddr("127.0.0.1"), Systemd: 252}, NoSplit, "loopback"},
		{OwnedError{Path: DefaultPath, Mode: ResolvedUplink, Address: four, Systemd: 262}, NoSplit, "past systemd-resolved"},
		{OwnedError{Path: DefaultPath, Mode: ResolvedStub, Address: netip.MustParseAddr("127.0.0.53"), Systemd: 258}, NoSplit, "itself answers there"},
		{OwnedError{Path: DefaultPath, Mode: ResolvedStub, Address: netip.MustParseAddr("127.0.0.54"), Systemd: 262}, NoSplit, "itself answers there"},
		{OwnedError{Path: "/other", Mode: ResolvedStub, Address: four, Systemd: 262}, NoSplit, ""},
		{OwnedError{Path: DefaultPath, Mode: NetworkManager, Address: four, Systemd: 262}, NoSplit, ""},
	} {
		if got, why := test.e.Split(); got != test.want || !strings.Contains(why, test.why) || test.why == "" && why != "" {
			t.Errorf("%s, %s, systemd %d: %d, %q", test.e.Mode, test.e.Address, test.e.Systemd, got, why)
		}
	}
}
