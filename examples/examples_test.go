package examples_test

import (
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/kumahq/kuma-tproxy/"

// The examples import the standard library and the core alone, and of the module's
// own lab nothing but the demo and tests do. The index names each of them.
func TestImportsAndIndex(t *testing.T) {
	index, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*/*.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, file := range files {
		dir := filepath.Dir(file)
		if !strings.Contains(string(index), "]("+dir+")") {
			t.Errorf("README.md does not name %s", dir)
		}
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			continue // a module of its own, for its tests
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range f.Imports {
			path, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			own, core := strings.CutPrefix(path, module)
			first, _, _ := strings.Cut(path, "/")
			switch {
			case !strings.Contains(first, "."), strings.HasPrefix(own, "tproxy") && core:
			case own == "internal/netlab" && (dir == "quickstart" || strings.HasSuffix(file, "_test.go")):
			default:
				t.Errorf("%s imports %s", file, path)
			}
		}
	}
}
