package kumatproxy_test

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// go test . -args -update writes the excerpts of result files anew.
var update = flag.Bool("update", false, "write README's excerpts of result files anew")

// block is a fenced block of README.md.
type block struct {
	info string // what stands behind the fence
	text string
}

var fenced = regexp.MustCompile("(?ms)^```([^\n]*)\n(.*?)^```$")

func blocks(t *testing.T) []block { return blocksOf(t, "README.md") }

func blocksOf(t *testing.T, file string) (out []block) {
	t.Helper()
	for _, m := range fenced.FindAllStringSubmatch(read(t, file), -1) {
		out = append(out, block{m[1], m[2]})
	}
	return out
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// The code in README.md is that of the examples, which compile and run.
func TestReadmeCodeIsExamples(t *testing.T) {
	source := read(t, "example_test.go")
	found := 0
	for _, b := range blocks(t) {
		name, is := strings.CutPrefix(b.info, "go ")
		if !is {
			continue
		}
		found++
		_, body, ok := strings.Cut(source, "func "+name+"() {\n")
		body, _, ended := strings.Cut(body, "\n}\n")
		if !ok || !ended || !strings.Contains(undented(body), undented(b.text)) {
			t.Errorf("%s in example_test.go is not what README.md has:\n%s", name, b.text)
		}
	}
	if found != 2 {
		t.Errorf("%d blocks of code, want 2", found)
	}
}

func undented(text string) string {
	return regexp.MustCompile(`(?m)^\t+`).ReplaceAllString(text, "")
}

// What README.md and the guides show of a result file stands there, line by line.
func TestReadmeExcerpts(t *testing.T) {
	for _, file := range append(guides(t), "README.md") {
		excerpts(t, file)
	}
}

func guides(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func excerpts(t *testing.T, guide string) {
	readme := read(t, guide)
	for _, b := range blocksOf(t, guide) {
		file, is := strings.CutPrefix(b.info, "text from ")
		if !is {
			continue
		}
		results := read(t, file)
		if strings.Contains(results, b.text) {
			continue
		}
		lines := strings.SplitAfter(b.text, "\n")
		start := strings.Index(results, lines[0])
		if !*update || start < 0 {
			t.Errorf("%s: not in %s; go test . -args -update takes it over:\n%s", guide, file, b.text)
			continue
		}
		now := strings.Join(strings.SplitAfter(results[start:], "\n")[:len(lines)-1], "")
		readme = strings.Replace(readme, b.text, now, 1)
		if err := os.WriteFile(guide, []byte(readme), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

var (
	marked = regexp.MustCompile(`(?ms)^<!-- figures: ([^\n]*) -->\n(.*?)(?:\n\n|\z)`)
	number = regexp.MustCompile(`\d+(?:\.\d+)?`)
	cells  = regexp.MustCompile(`^\| ([^|]+) \|`)
)

// Every figure of a table that is marked stands in one of its result files; where
// lines there begin as the table's row does, in one of those.
func TestReadmeFigures(t *testing.T) {
	found := 0
	for _, m := range marked.FindAllStringSubmatch(read(t, "README.md"), -1) {
		var results []string
		for file := range strings.FieldsSeq(m[1]) {
			text := read(t, file)
			for _, head := range []string{"Date:", "Kernel:", "Command"} {
				if !strings.Contains(text, "\n"+head) && !strings.HasPrefix(text, head) {
					t.Errorf("%s does not say its %s", file, head)
				}
			}
			results = append(results, strings.Split(text, "\n")...)
		}
		for i, row := range strings.Split(m[2], "\n") {
			if i < 2 {
				continue // the head
			}
			label := cells.FindStringSubmatch(row)
			if label == nil {
				t.Fatalf("not a row: %s", row)
			}
			lines := results
			if own := slices.DeleteFunc(slices.Clone(results), func(l string) bool { return !strings.HasPrefix(l, label[1]) }); len(own) > 0 {
				lines = own
			}
			for _, n := range number.FindAllString(strings.TrimPrefix(row, label[0]), -1) {
				found++
				if !slices.ContainsFunc(lines, func(l string) bool { return slices.Contains(number.FindAllString(l, -1), n) }) {
					t.Errorf("%s: %s is in none of %s", label[1], n, m[1])
				}
			}
		}
	}
	if found == 0 {
		t.Error("no figure is marked")
	}
}

var (
	testName = regexp.MustCompile("`(Test[A-Za-z0-9]+)`")
	testFunc = regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9]+)\(`)
)

// Every test that a guide names is there.
func TestGuidesNameTests(t *testing.T) {
	there := map[string]bool{}
	err := filepath.WalkDir(".", func(path string, _ os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		for _, m := range testFunc.FindAllStringSubmatch(read(t, path), -1) {
			there[m[1]] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for _, file := range guides(t) {
		for _, m := range testName.FindAllStringSubmatch(read(t, file), -1) {
			if named++; !there[m[1]] {
				t.Errorf("%s names %s, which is not there", file, m[1])
			}
		}
	}
	if named == 0 {
		t.Error("no guide names a test")
	}
}

var link = regexp.MustCompile(`\]\(([^)#:]+)\)`)

// Every link to a file of the repository leads somewhere.
func TestLinks(t *testing.T) {
	files, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range append(files, "docs/design.md", "examples/README.md") {
		for _, m := range link.FindAllStringSubmatch(read(t, file), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(file), m[1])); err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
	}
}
