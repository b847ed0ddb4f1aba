package tproxy_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/kumahq/kuma-tproxy"

// imports says what each package of ours may import of ours, and whether it is
// pure. What stands here and is not built yet is skipped; a package that is
// built and does not stand here is an error.
var imports = map[string]struct {
	pure bool
	ours []string
}{
	".":              {true, nil},
	"tproxy/rules":   {true, nil},
	"tproxy/sim":     {true, []string{"tproxy/rules"}},
	"tproxy":         {true, []string{"tproxy/rules"}},
	"tproxy/dns":     {true, nil},
	"tproxy/persist": {true, []string{"tproxy", "tproxy/rules"}},
	"tproxy/kube":    {true, []string{"tproxy", "tproxy/rules"}},
	// exec walks the host's own filter to say what it does to in (contract 4.9).
	"tproxy/exec":              {false, []string{"tproxy", "tproxy/rules", "tproxy/sim", "tproxy/dns", "tproxy/persist", "tproxy/exec/internal/..."}},
	"tproxy/exec/internal/...": {false, []string{"tproxy", "tproxy/rules", "tproxy/dns", "tproxy/exec/internal/..."}},
	"tproxy/tproxytest":        {false, []string{"tproxy", "tproxy/rules", "tproxy/sim"}},
	// netlab is the namespaces of tests, demo and benchmarks.
	"internal/netlab": {false, []string{"internal/netlab"}},
	// bootlab boots a systemd, for tests.
	"internal/bootlab": {false, nil},
	// oldkuma is what Kuma's own installers write, for tests and benchmarks.
	"internal/oldkuma": {true, []string{"tproxy/rules"}},
}

// impure are the packages that touch the machine, or print.
var impure = []string{"os", "os/exec", "os/signal", "os/user", "net", "net/http", "syscall", "log", "log/slog", "unsafe"}

// TestImports lists direct imports, as tailscale's deptest does.
func TestImports(t *testing.T) {
	root := ".."
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, file)
		if d.IsDir() {
			_, noModule := os.Stat(filepath.Join(file, "go.mod"))
			switch {
			case rel == ".":
			case noModule == nil, strings.HasPrefix(d.Name(), "."), d.Name() == "testdata", rel == "examples", rel == "bench", rel == "hack":
				return fs.SkipDir // modules of their own, and users of ours
			}
			return nil
		}
		if !strings.HasSuffix(rel, ".go") || strings.HasSuffix(rel, "_test.go") {
			return nil
		}
		pkg := path.Dir(filepath.ToSlash(rel))
		may, known := imports[pkg]
		if strings.HasPrefix(pkg, "tproxy/exec/internal/") {
			may, known = imports["tproxy/exec/internal/..."], true
		}
		if !known {
			t.Errorf("%s: package %s is not in the table of this test", rel, pkg)
			return nil
		}
		checkImports(t, file, rel, pkg, may.pure, may.ours)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func checkImports(t *testing.T, file, rel, pkg string, pure bool, ours []string) {
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Error(err)
		return
	}
	for _, i := range f.Imports {
		name, _ := strconv.Unquote(i.Path.Value)
		mine, isOurs := strings.CutPrefix(name, module+"/")
		std := !strings.Contains(strings.Split(name, "/")[0], ".")
		switch {
		case isOurs:
			if !slices.ContainsFunc(ours, func(o string) bool {
				prefix, tree := strings.CutSuffix(o, "...")
				return mine == o || tree && strings.HasPrefix(mine, prefix)
			}) {
				t.Errorf("%s imports %s", rel, mine)
			}
		case pure && slices.Contains(impure, name):
			t.Errorf("%s imports %s, and its package is pure", rel, name)
		case std:
		case pure,
			strings.HasPrefix(name, "github.com/coreos/go-iptables") && pkg != "tproxy/exec",
			pkg != "tproxy/tproxytest" && !strings.HasPrefix(name, "github.com/coreos/go-iptables"):
			t.Errorf("%s imports %s", rel, name)
		}
	}
	if !pure {
		return
	}
	ast.Inspect(f, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			if x, ok := s.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "Tick", "NewTimer", "NewTicker", "AfterFunc", "Local"}, s.Sel.Name) {
				t.Errorf("%s uses time.%s, and its package is pure", rel, s.Sel.Name)
			}
		}
		return true
	})
}

// TestExpectIsIndependent: what judges the rules calls nothing that makes them
// or walks them; of rules.Ports and rules.UIDs it may read the ranges.
func TestExpectIsIndependent(t *testing.T) {
	const file = "tproxytest/expect.go"
	if _, err := os.Stat(file); err != nil {
		t.Fatal(err)
	}
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]bool{}
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok {
			own[fn.Name.Name] = true
		}
	}
	// Methods of net/netip, and Ranges.
	methods := []string{"Addr", "Port", "Bits", "Is4", "Is6", "As4", "AsSlice", "Unmap", "WithZone", "Ranges"}
	ast.Inspect(f, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		switch fn := call.Fun.(type) {
		case *ast.Ident:
			if !own[fn.Name] && !slices.Contains([]string{"len", "byte", "uint8", "uint16", "uint32"}, fn.Name) {
				t.Errorf("Expect calls %s", fn.Name)
			}
		case *ast.SelectorExpr:
			x, pkg := fn.X.(*ast.Ident)
			if pkg && (x.Name == "netip" || x.Name == "slices" || x.Name == "strconv") {
				return true
			}
			if pkg && slices.Contains([]string{"tproxy", "rules", "sim"}, x.Name) || !slices.Contains(methods, fn.Sel.Name) {
				t.Errorf("Expect calls %s", fn.Sel.Name)
			}
		}
		return true
	})
}
