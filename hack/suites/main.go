// Command suites runs the tests of all modules once and says, in one line each,
// which suites ran, which were skipped and why:
//
//	pure     no process, no network, no kernel: rules, plans, walks, properties
//	fakes    the executor on a fake machine, programs that a test put on PATH
//	kernel   real packets and the real iptables, in network namespaces
//	cli      the module cli, its own kernel tests included
//	cni      the module cni, its own kernel tests included
//	mutate   every rule and match of many plans changed in turn (make test-all)
//	differential  random configs, random real flows (make test-all)
//	stress   every fault and kill, long beside other writers (make test-all)
//	runtime  firewalld, container runtimes, other meshes' installers (make test-all)
//	systemd  systemd as the first process (make test-all)
//
// A test is told by the file that it stands in: see suiteOf. The exit code is 1
// if a test failed, or if TPROXY_REQUIRE, a comma list, names a suite that has
// tests and ran none.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	osexec "os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

const module = "github.com/kumahq/kuma-tproxy"

func main() {
	all := flag.Bool("all", false, "the suites mutate, differential, stress, runtime and systemd too")
	verbose := flag.Bool("v", false, "print each test that was skipped")
	flag.Parse()
	names := []string{"pure", "fakes", "kernel", "cli", "cni"}
	if *all {
		names = append(names, "mutate", "differential", "stress", "runtime", "systemd")
	}
	ok, err := run(names, *verbose, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "suites:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// test is a test function of a package.
type test struct{ pkg, name string }

// suite is what became of the tests of one kind.
type suite struct {
	passed, skipped, failed int
	reasons                 []string
}

func run(names []string, verbose bool, args []string) (ok bool, err error) {
	tests, err := find(".")
	if err != nil {
		return false, err
	}
	start := time.Now()
	flags := []string{"test", "-json", "-count=1", "-timeout=40m"}
	if left := notIn(names, tests); left != "" {
		flags = append(flags, "-skip="+left)
	}
	suites := map[string]suite{}
	ok, err = goTest(osexec.Command("go", slices.Concat(flags, args, []string{"./...", "./cli/...", "./cni/...", "./examples/kubernetes/..."})...), tests, suites, verbose)
	if err != nil {
		return false, err
	}
	if slices.Contains(names, "runtime") {
		// Not in the workspace, so that nobody else has their gRPC and Istio to fetch.
		for _, m := range []struct{ dir, work string }{{"cni/internal/critest", "off"}, {"bench/peers", ""}} {
			cmd := osexec.Command("go", slices.Concat(flags, args, []string{"./..."})...)
			cmd.Dir, cmd.Env = m.dir, append(os.Environ(), "GOWORK="+m.work)
			there, err := goTest(cmd, tests, suites, verbose)
			if ok = ok && there; err != nil {
				return false, err
			}
		}
	}
	fmt.Printf("\nin %s\n", time.Since(start).Round(time.Second))
	required := strings.Split(os.Getenv("TPROXY_REQUIRE"), ",")
	for _, name := range names {
		s := suites[name]
		if s.passed+s.skipped+s.failed == 0 {
			continue // there is no test in it yet
		}
		fmt.Printf("suite %s: %s\n", name, s)
		switch {
		case s.failed > 0:
			ok = false
		case s.passed == 0 && s.skipped > 0 && slices.Contains(required, name):
			fmt.Printf("suite %s is required, and did not run\n", name)
			ok = false
		}
	}
	return ok, nil
}

// goTest runs a go test, and counts its tests.
func goTest(cmd *osexec.Cmd, tests map[test]string, suites map[string]suite, verbose bool) (ok bool, err error) {
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		err = read(out, tests, suites, verbose)
	}
	return err == nil && cmd.Wait() == nil, err
}

func (s suite) String() string {
	var more strings.Builder
	for _, r := range s.reasons {
		more.WriteString("; " + r)
	}
	switch {
	case s.failed > 0:
		return fmt.Sprintf("FAILED (%d of %d tests)", s.failed, s.failed+s.passed)
	case s.passed == 0:
		return "skipped" + strings.Replace(more.String(), "; ", ": ", 1)
	case s.skipped > 0:
		return fmt.Sprintf("ran (%d tests), %d skipped%s", s.passed, s.skipped, strings.Replace(more.String(), "; ", ": ", 1))
	}
	return fmt.Sprintf("ran (%d tests)", s.passed)
}

// notIn is a pattern of the tests that belong to no suite of those names: they
// are not selected, rather than skipped.
func notIn(names []string, tests map[test]string) string {
	var left []string
	for t, suite := range tests {
		if !slices.Contains(names, suite) {
			left = append(left, t.name)
		}
	}
	if left == nil {
		return ""
	}
	slices.Sort(left)
	return "^(" + strings.Join(slices.Compact(left), "|") + ")$"
}

var function = regexp.MustCompile(`(?m)^func ((?:Test|Example|Fuzz)\w*)\(`)

// find maps every test function to its suite.
func find(root string) (map[test]string, error) {
	tests := map[test]string{}
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (file != root && strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata"):
			return filepath.SkipDir
		case d.IsDir() || !strings.HasSuffix(file, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		file = filepath.ToSlash(file)
		for _, m := range function.FindAllSubmatch(text, -1) {
			tests[test{path.Join(module, path.Dir(file)), string(m[1])}] = suiteOf(file, string(m[1]), string(text))
		}
		return nil
	})
	return tests, err
}

// suiteOf tells a test's suite by its module, its own name, its file's name, and
// whether the file uses the lab of network namespaces.
func suiteOf(file, name, text string) string {
	base := strings.ToLower(path.Base(file) + " " + name)
	has := func(words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(base, w) })
	}
	switch {
	case has("mutate"):
		return "mutate"
	case has("differential"):
		return "differential"
	case strings.HasPrefix(name, "TestStress"):
		return "stress"
	case has("systemd"):
		return "systemd"
	case has("firewalld", "runtime", "podman", "containerd"), strings.HasPrefix(file, "bench/peers/"):
		return "runtime"
	case strings.HasPrefix(file, "cli/"):
		return "cli"
	case strings.HasPrefix(file, "cni/"):
		return "cni"
	case has("kernel", "_linux_test.go") || strings.Contains(text, module+"/internal/netlab"):
		return "kernel"
	case strings.HasPrefix(file, "tproxy/exec/") || has("fake"):
		return "fakes"
	}
	return "pure"
}

// event is what go test -json prints (go doc test2json).
type event struct{ Action, Package, Test, Output string }

// read follows the tests. It prints the closing line of each package, and
// everything that a failed test said.
func read(in io.Reader, tests map[test]string, suites map[string]suite, verbose bool) error {
	said := map[test][]string{}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			fmt.Println(lines.Text()) // of the compiler
			continue
		}
		top, _, isSub := strings.Cut(e.Test, "/")
		t := test{e.Package, top}
		s := suites[tests[t]]
		switch {
		case e.Action == "build-output", e.Action == "output" && e.Test == "" && closing(e.Output):
			fmt.Print(e.Output)
		case e.Action == "output":
			said[t] = append(said[t], e.Output)
		case e.Test == "" && e.Action == "fail":
			fmt.Print(strings.Join(said[t], "")) // a panic, or TestMain
		case e.Test == "" || isSub:
		case e.Action == "pass":
			s.passed++
			delete(said, t)
		case e.Action == "skip":
			why := reason(said[t])
			if verbose {
				fmt.Printf("skipped %s %s: %s\n", e.Package, e.Test, why)
			}
			// A test that another one runs is not left out.
			if !strings.HasPrefix(why, "run by ") {
				s.skipped++
				if !slices.Contains(s.reasons, why) {
					s.reasons = append(s.reasons, why)
				}
			}
			delete(said, t)
		case e.Action == "fail":
			s.failed++
			fmt.Print(strings.Join(said[t], ""))
		}
		if e.Test != "" {
			suites[tests[t]] = s
		}
	}
	return lines.Err()
}

// closing reports whether go test prints the line at the end of a package.
func closing(line string) bool {
	return strings.HasPrefix(line, "ok ") || strings.HasPrefix(line, "ok\t") || strings.HasPrefix(line, "FAIL\t")
}

var location = regexp.MustCompile(`^\s*\S+\.go:\d+: `)

// reason is what a skipped test said.
func reason(said []string) string {
	for _, line := range said {
		if at := location.FindString(line); at != "" {
			return strings.TrimSpace(line[len(at):])
		}
	}
	return "no reason given"
}
