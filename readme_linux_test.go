package kumatproxy_test

import (
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
)

func TestMain(m *testing.M) { netlab.Main(m) }

// TestReadmeCommands runs the commands of README.md that are marked "sh test", in
// order, on the host of a lab that plays the VM. The block of text that follows
// one holds lines of what it prints.
func TestReadmeCommands(t *testing.T) {
	netlab.Require(t, "ip", "nft", "iptables-save", "ip6tables-save", "useradd")
	playVM(t)
	lab, err := netlab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lab.Close()
	rules := func() string {
		t.Helper()
		return run(t, lab, "iptables-save; ip6tables-save; nft list ruleset inet; ip -o address show dev lo")
	}
	before := rules()
	ran, out := 0, ""
	for _, b := range blocks(t) {
		switch b.info {
		case "sh test":
			out = run(t, lab, b.text)
			ran++
		case "text":
			lines := strings.Split(out, "\n")
			for want := range strings.Lines(b.text) {
				if !slices.Contains(lines, strings.TrimSuffix(want, "\n")) {
					t.Errorf("%q is not in what was printed:\n%s", want, out)
				}
			}
		}
	}
	if ran != 10 {
		t.Errorf("%d blocks of commands were run, want 10", ran)
	}
	if after := rules(); tables(after) != tables(before) {
		t.Errorf("after the uninstall:\n%s\nbefore the install:\n%s", after, before)
	}
}

// tables leaves out what an install may leave: tables that are empty, the time.
func tables(save string) string {
	var b strings.Builder
	for line := range strings.Lines(save) {
		if !strings.ContainsAny(line[:1], "#*:") && line != "COMMIT\n" {
			b.WriteString(line)
		}
	}
	return b.String()
}

func run(t *testing.T, lab *netlab.Lab, script string) string {
	t.Helper()
	out, err := lab.Run(t.Context(), lab.Host, "", "bash", "-euo", "pipefail", "-c", script)
	if err != nil {
		t.Fatalf("%s\n%v\n%s", script, err, out)
	}
	return out
}

// playVM gives this process, in its own mount namespace, an /etc and a
// /usr/local/bin to write to, and an scp that only copies.
func playVM(t *testing.T) {
	t.Helper()
	goProgram, err := osexec.LookPath("go")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	scp := "#!/bin/sh\nexec cp \"$1\" \"${2#*:}\"\n"
	if err := os.WriteFile(filepath.Join(bin, "scp"), []byte(scp), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(goProgram, filepath.Join(bin, "go")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":/usr/local/bin:/usr/sbin:/sbin:"+os.Getenv("PATH"))
	t.Setenv("SSH_CONNECTION", "") // the machine's, not the VM's
	// kumactl is written beside README.md.
	if _, err := os.Stat("kumactl"); err != nil {
		t.Cleanup(func() { _ = os.Remove("kumactl") })
	}
	for _, dir := range []string{"/run/etc", "/run/work"} { // /run is our own
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mount("overlay", "/etc", "overlay", 0, "lowerdir=/etc,upperdir=/run/etc,workdir=/run/work"); err != nil {
		t.Skipf("no overlay over /etc: %v", err)
	}
	// useradd(8) writes lastlog and faillog too.
	for _, dir := range []string{"/usr/local/bin", "/var/log", "/var/mail"} {
		if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			t.Skipf("nothing over %s: %v", dir, err)
		}
	}
	passwd := read(t, "/etc/passwd")
	if regexp.MustCompile(`(?m)^kuma-dp:|^[^:]*:[^:]*:5678:`).MatchString(passwd) {
		t.Skip("there is a user kuma-dp, or one with the UID 5678, already")
	}
}

var flagLine = regexp.MustCompile("(?m)^(?:\\| `| +)(?:-h, )?(--[a-z][a-z-]+)")

// The table of flags names exactly those that the command has.
func TestReadmeFlags(t *testing.T) {
	kumactl := filepath.Join(t.TempDir(), "kumactl")
	if out, err := osexec.CommandContext(t.Context(), "go", "build", "-o", kumactl, "./cli/cmd/kumactl").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	help, err := osexec.CommandContext(t.Context(), kumactl, "install", "transparent-proxy", "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(read(t, "README.md"), "\n## Flags\n")
	table, _, _ = strings.Cut(table, "\n## ")
	named := func(text string) (out []string) {
		for _, m := range flagLine.FindAllStringSubmatch(text, -1) {
			out = append(out, m[1])
		}
		return out
	}
	got := append(named(table), "--help")
	if want := named(string(help)); !slices.Equal(got, want) {
		t.Errorf("README.md has the flags\n%v\nand the command\n%v", got, want)
	}
}
