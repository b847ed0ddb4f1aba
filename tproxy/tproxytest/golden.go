package tproxytest

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

// Archive is a file of named sections in the txtar format: a comment, then each
// section behind a line "-- name --" (golang.org/x/tools/txtar, which would be
// one more requirement).
type Archive struct {
	Comment  string
	Sections []Section
}

// Section is a named part of an Archive.
type Section struct{ Name, Text string }

// ParseArchive reads an archive.
func ParseArchive(text string) Archive {
	var a Archive
	into := &a.Comment
	for line := range strings.Lines(text) {
		name, is := strings.CutPrefix(strings.TrimRight(line, "\r\n"), "-- ")
		if name, tail := strings.CutSuffix(name, " --"); is && tail {
			a.Sections = append(a.Sections, Section{Name: strings.TrimSpace(name)})
			into = &a.Sections[len(a.Sections)-1].Text
			continue
		}
		*into += line
	}
	return a
}

// String writes the archive as ParseArchive reads it; a section that does not
// end in a line's end gets one.
func (a Archive) String() string {
	var b strings.Builder
	b.WriteString(lined(a.Comment))
	for _, s := range a.Sections {
		fmt.Fprintf(&b, "-- %s --\n%s", s.Name, lined(s.Text))
	}
	return b.String()
}

func lined(s string) string {
	if s == "" || strings.HasSuffix(s, "\n") {
		return s
	}
	return s + "\n"
}

// Section returns the text of the section of that name.
func (a Archive) Section(name string) (text string, ok bool) {
	i := slices.IndexFunc(a.Sections, func(s Section) bool { return s.Name == name })
	if i < 0 {
		return "", false
	}
	return a.Sections[i].Text, true
}

// ReadArchive reads the archive in a file.
func ReadArchive(t testing.TB, file string) Archive {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return ParseArchive(string(text))
}

// Golden compares sections with those of the archive in a file, whose other
// sections are input and stay as they are. A section of got without a text must
// not be there.
//
// A test that declares a flag named update and is run with it writes the
// sections instead: this package declares no flag, which could be the
// importer's. `var _ = flag.Bool("update", false, "write the golden files")`
// does.
func Golden(t testing.TB, file string, got ...Section) {
	t.Helper()
	a := ReadArchive(t, file)
	was := a.String()
	for _, s := range got {
		s.Text = lined(s.Text)
		i := slices.IndexFunc(a.Sections, func(o Section) bool { return o.Name == s.Name })
		want, there := a.Section(s.Name)
		if want == s.Text && there == (s.Text != "") {
			continue
		}
		switch {
		case !updating():
			t.Errorf("%s: section %s, wanted -, got +; go test -run %s -args -update accepts it\n%s", file, s.Name, t.Name(), cmp.Diff(want, s.Text))
		case s.Text == "":
			a.Sections = slices.Delete(a.Sections, i, i+1)
		case i < 0:
			a.Sections = append(a.Sections, s)
		default:
			a.Sections[i] = s
		}
	}
	if now := a.String(); updating() && now != was {
		if err := os.WriteFile(file, []byte(now), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func updating() bool {
	f := flag.Lookup("update")
	return f != nil && f.Value.String() == "true"
}

// Word writes the verdict in the contract's words: in, out and dns for the
// proxy's ports.
func Word(cfg tproxy.Config, v sim.Verdict) string {
	word := v.Kind.String()
	if v.Kind == sim.Redirected {
		switch v.Port {
		case orPort(cfg.Inbound.Port, 15006):
			word = "in"
		case orPort(cfg.Outbound.Port, 15001):
			word = "out"
		case orPort(cfg.DNS.Port, 15053):
			word = "dns"
		default:
			word = fmt.Sprintf("port %d", v.Port)
		}
	}
	if v.Zone != 0 {
		word += fmt.Sprintf(", zone %d", v.Zone)
	}
	return word
}

// Walks walks each packet of a golden file's section of walks through the plan's
// rules, and writes the lines as they should be: the packet, "=>", the verdict
// in the contract's words, "#", the reason. What stands behind "=>" in the text
// is not read, so a new walk needs a packet only.
func Walks(t testing.TB, plan *tproxy.Plan, env sim.Env, text string) string {
	t.Helper()
	var b bytes.Buffer
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "=>")
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			b.WriteString(line + "\n")
			continue
		}
		p, err := sim.ParsePacket(line)
		if err != nil {
			t.Error(err)
			continue
		}
		trace := sim.Walk(plan.Rules, env, p)
		fmt.Fprintf(&b, "%s => %s # %s\n", p, Word(plan.Config, trace.Verdict), trace.Reason)
	}
	return b.String()
}
