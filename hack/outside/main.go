// Command outside uses the modules of this checkout as others will: it packs
// them into a module proxy made of files, and from there builds a program that
// imports the core, and installs kumactl and kuma-cni by their path and version.
//
// It prints nothing when all is well.
package main

import (
	"archive/zip"
	"errors"
	"fmt"
	"io/fs"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const (
	root    = "github.com/kumahq/kuma-tproxy"
	program = root + "/cli/cmd/kumactl"
	plugin  = root + "/cni/cmd/kuma-cni"
)

// allowed is every module that an importer of the core gets with it.
var allowed = []string{root, "github.com/coreos/go-iptables", "github.com/google/go-cmp", "pgregory.net/rapid"}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "outside:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	temp, err := os.MkdirTemp("", "outside")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	version, err := requiredVersion()
	if err != nil {
		return err
	}
	proxy := filepath.Join(temp, "proxy")
	for module, dir := range map[string]string{root: ".", root + "/cli": "cli", root + "/cni": "cni"} {
		if err := pack(proxy, module, version, dir); err != nil {
			return fmt.Errorf("pack %s: %w", module, err)
		}
	}
	e := &environment{dir: filepath.Join(temp, "importer")}
	outer, err := e.run("go", "env", "GOMODCACHE", "GOPROXY")
	if err != nil {
		return err
	}
	lines := strings.Split(outer, "\n")
	// What was downloaded once need not be again.
	e.env = append(os.Environ(),
		"GOWORK=off", "GOFLAGS=-modcacherw", "GONOSUMDB=*", "GONOSUMCHECK=1", "GOTOOLCHAIN=local",
		"GOPROXY=file://"+proxy+",file://"+filepath.Join(lines[0], "cache", "download")+","+lines[1],
		"GOMODCACHE="+filepath.Join(temp, "cache"), "GOBIN="+filepath.Join(temp, "bin"))
	bin := filepath.Join(temp, "bin")
	return errors.Join(importCore(e, version), installProgram(e, version, bin), installPlugin(e, version, bin))
}

// requiredVersion is the one of the root that the modules cli and cni ask for.
func requiredVersion() (version string, err error) {
	for _, module := range []string{"cli", "cni"} {
		text, err := os.ReadFile(filepath.Join(module, "go.mod"))
		if err != nil {
			return "", err
		}
		m := regexp.MustCompile(`(?m)^\s*(?:require )?` + regexp.QuoteMeta(root) + ` (v\S+)`).FindSubmatch(text)
		if m == nil {
			return "", fmt.Errorf("%s/go.mod does not require %s: go install of its program would fail", module, root)
		}
		if v := string(m[1]); version != "" && v != version {
			return "", fmt.Errorf("%s/go.mod requires %s %s, and cli/go.mod %s", module, root, v, version)
		}
		version = string(m[1])
	}
	return version, nil
}

// pack writes the files of a module as a proxy serves them (go.dev/ref/mod,
// sections "GOPROXY protocol" and "Module zip files").
func pack(proxy, module, version, dir string) error {
	at := filepath.Join(proxy, filepath.FromSlash(module), "@v")
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if err != nil {
		return err
	}
	for name, text := range map[string]string{
		"list":            version + "\n",
		version + ".info": fmt.Sprintf("{\"Version\":%q}\n", version),
		version + ".mod":  string(mod),
	} {
		if err := os.WriteFile(filepath.Join(at, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	f, err := os.Create(filepath.Join(at, version+".zip"))
	if err != nil {
		return err
	}
	z := zip.NewWriter(f)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			_, err := os.Stat(filepath.Join(path, "go.mod"))
			if path != dir && (err == nil || strings.HasPrefix(d.Name(), ".")) {
				return filepath.SkipDir // another module, or .git
			}
			return nil
		}
		info, err := d.Info()
		if err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 != 0 && info.Size() > 1<<20 {
			return err // a program that was built here
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		w, err := z.Create(module + "@" + version + "/" + filepath.ToSlash(name))
		if err == nil {
			_, err = w.Write(text)
		}
		return err
	})
	return errors.Join(err, z.Close(), f.Close())
}

// importer is a program that uses every package of the core.
const importer = `package main

import (
	"fmt"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

func main() {
	plan, err := tproxy.Build(tproxy.Config{}, tproxy.Host{Nameservers: dns.Parse([]byte("nameserver 10.0.0.53\n")).Nameservers})
	if err != nil {
		panic(err)
	}
	var _ exec.Runner
	fmt.Print(len(plan.Rules.IPTables(rules.IPv4)) > 0, sim.Walk(plan.Rules, sim.Env{}, sim.MustPacket("in tcp 10.0.0.9:4000 > 10.0.0.7:22")).Kind)
}
`

const importerTest = `package main

import (
	"testing"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

func TestConfig(t *testing.T) { tproxytest.Check(t, tproxy.Config{}) }
`

func importCore(e *environment, version string) error {
	if err := os.MkdirAll(e.dir, 0o755); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"main.go":      importer,
		"main_test.go": importerTest,
		"go.mod":       "module example.com/importer\n\ngo 1.26\n\nrequire " + root + " " + version + "\n",
	} {
		if err := os.WriteFile(filepath.Join(e.dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if _, err := e.run("go", "mod", "tidy"); err != nil {
		return err
	}
	out, err := e.run("go", "run", ".")
	if err != nil {
		return err
	}
	if out != "true untouched" {
		return fmt.Errorf("the importer printed %q", out)
	}
	if _, err := e.run("go", "test", "."); err != nil {
		return err
	}
	modules, err := e.run("go", "list", "-f", "{{with .Module}}{{.Path}}{{end}}", "-deps", "-test", "./...")
	if err != nil {
		return err
	}
	for m := range strings.Lines(modules) {
		if m = strings.TrimSpace(m); m != "" && m != "example.com/importer" && !slices.Contains(allowed, m) {
			return fmt.Errorf("an importer of the core needs the module %s", m)
		}
	}
	return nil
}

func installProgram(e *environment, version, bin string) error {
	if _, err := e.run("go", "install", program+"@"+version); err != nil {
		return err
	}
	out, err := e.run(filepath.Join(bin, "kumactl"), "install", "transparent-proxy", "--kuma-dp-user", "5678", "--dry-run")
	if err != nil {
		return err
	}
	for _, want := range []string{"\n### ", "KUMA_MESH_OUTBOUND"} { // in nftables, or for each family
		if !strings.Contains(out, want) {
			return fmt.Errorf("the installed kumactl does not print %q:\n%s", want, out)
		}
	}
	version, err = e.run(filepath.Join(bin, "kumactl"), "--version")
	if err != nil {
		return err
	}
	if strings.TrimSpace(version) == "" {
		return errors.New("the installed kumactl has no version")
	}
	return nil
}

// heavy is what no importer of the plugin is to get: the tests of a real containerd have
// it, in a module of their own.
var heavy = []string{"google.golang.org/grpc", "google.golang.org/protobuf", "k8s.io/"}

func installPlugin(e *environment, version, bin string) error {
	if _, err := e.run("go", "install", plugin+"@"+version); err != nil {
		return err
	}
	e.env = append(e.env, "CNI_COMMAND=VERSION")
	out, err := e.run(filepath.Join(bin, "kuma-cni"))
	if err != nil {
		return err
	}
	if !strings.Contains(out, `"supportedVersions":["0.3.1"`) {
		return fmt.Errorf("the installed kuma-cni prints %q", out)
	}
	modules, err := e.run("go", "version", "-m", filepath.Join(bin, "kuma-cni"))
	if err != nil {
		return err
	}
	for _, h := range heavy {
		if strings.Contains(modules, h) {
			return fmt.Errorf("kuma-cni is built with %s", h)
		}
	}
	return nil
}

// environment is where the commands of an importer run.
type environment struct {
	dir string
	env []string
}

func (e *environment) run(name string, args ...string) (string, error) {
	cmd := osexec.Command(name, args...)
	if e.env != nil {
		cmd.Dir, cmd.Env = e.dir, e.env
	}
	var errOut strings.Builder
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s%s", filepath.Base(name), strings.Join(args, " "), err, out, errOut.String())
	}
	return strings.TrimSpace(string(out)), nil
}
