package kumatproxy_test

import (
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
)

// What writes, in a line of strace(1): a file that is opened to be written, or made, or
// goes; a rule of nftables or of iptables-legacy; an address, a link or a route. Where
// strace does not know the protocol it prints the number of the type: a request that
// wants to be acknowledged, or makes something, changes something.
var writes = regexp.MustCompile(`\b(?:open|openat|openat2|creat)\(.*\bO_(?:WRONLY|RDWR|CREAT|TRUNC|APPEND|TMPFILE)\b` +
	`|\b(?:unlink|unlinkat|rename|renameat|renameat2|link|linkat|symlink|symlinkat|mkdir|mkdirat|rmdir|mknod|mknodat|truncate|ftruncate|fallocate|chmod|fchmod|fchmodat|fchmodat2|chown|fchown|lchown|fchownat|setxattr|lsetxattr|fsetxattr|removexattr|lremovexattr|fremovexattr|utimensat|mount|umount2|move_mount|fsopen|init_module|finit_module|delete_module|pivot_root|swapon|sethostname|bpf)\(` +
	`|\bsend(?:to|msg|mmsg)\(.*\b(?:NFNL_MSG_BATCH_\w+|NFT_MSG_(?:NEW|DEL|DESTROY)\w+|(?:RTM|IPCTNL_MSG_CT|IPCTNL_MSG_EXP|IPSET_CMD)_(?:NEW|DEL|SET|CREATE|DESTROY|FLUSH|ADD)\w*)\b` +
	`|\bsend(?:to|msg)\(.*\bnlmsg_type=0x\w+ .*?\bnlmsg_flags=[^,]*(?:NLM_F_ACK|NLM_F_CREATE|\|0x[46]00)` +
	`|\bsetsockopt\(.*\bIP6?T_SO_SET_\w+`)

// getGeneration is NFT_MSG_GETGEN, which strace does not name.
const getGeneration = "nlmsg_type=0xa10 "

// Nothing that only looks writes anything, where ours are installed and where they are
// not (contract 4.7): no file, no rule, no address, and no table of iptables-legacy
// comes into being.
func TestLookingWritesNothing(t *testing.T) {
	netlab.Require(t, "ip", "strace", "iptables-nft-save", "iptables-legacy-save")
	kumactl := filepath.Join(t.TempDir(), "kumactl")
	if out, err := osexec.CommandContext(t.Context(), "go", "build", "-o", kumactl, "./cli/cmd/kumactl").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Setenv("SSH_CONNECTION", "")
	looks := map[string]string{
		"inspect":       "inspect transparent-proxy",
		"inspect json":  "inspect transparent-proxy --output json",
		"explain":       "explain transparent-proxy --from app --to 93.184.216.34:443",
		"explain flags": "explain transparent-proxy --from host:10.0.0.1 --to 10.0.0.2:80 --exclude-inbound-ports 9100",
		"dry run":       "install transparent-proxy --kuma-dp-user 5678 --dry-run --redirect-all-dns-traffic",
		"reuse":         "install transparent-proxy --kuma-dp-user 5678 --dry-run --exclude-inbound-ports 9100",
		"uninstall":     "uninstall transparent-proxy --dry-run",
	}
	for _, backend := range []string{"nftables", "iptables-nft", "iptables-legacy"} {
		for _, installed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/installed=%v", backend, installed), func(t *testing.T) {
				lab, err := netlab.New(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer lab.Close()
				if installed {
					run(t, lab, kumactl+" install transparent-proxy --kuma-dp-user 5678 --backend "+backend)
				}
				held := func() string {
					t.Helper()
					return run(t, lab, `nft list ruleset; cat /proc/net/ip_tables_names /proc/net/ip6_tables_names 2>/dev/null || true; ip -o address; ip route show table all`)
				}
				before := held()
				for name, args := range looks {
					log := filepath.Join(t.TempDir(), "strace")
					script := fmt.Sprintf("strace -f -qq -s 512 -e trace='!read,write,mmap,futex' -o %s %s %s || true", log, kumactl, args)
					run(t, lab, script)
					text, err := os.ReadFile(log)
					if err != nil {
						t.Fatal(err)
					}
					calls := strings.Split(string(text), "\n")
					if !slices.ContainsFunc(calls, func(l string) bool { return strings.Contains(l, "openat(") }) || strings.HasPrefix(name, "inspect") && installed && backend != "nftables" && !strings.Contains(string(text), "execve(\"/usr/sbin/") {
						t.Errorf("%s: strace saw too little", name)
					}
					for _, l := range calls {
						if writes.MatchString(l) && !strings.Contains(l, `"/dev/null"`) && !strings.Contains(l, getGeneration) && !failsForWant(l) {
							t.Errorf("%s: %s", name, l)
						}
					}
				}
				if after := held(); after != before {
					t.Errorf("looking changed something:\n%s\nwas\n%s", after, before)
				}
			})
		}
	}
}

// failsForWant reports whether a call came to nothing, as one for a file that is not there.
func failsForWant(line string) bool { return strings.Contains(line, "= -1 E") }

// The pattern sees what writes: an install does all of it.
func TestWritesAreSeen(t *testing.T) {
	netlab.Require(t, "ip", "strace", "iptables-nft-save", "iptables-legacy-save")
	kumactl := filepath.Join(t.TempDir(), "kumactl")
	if out, err := osexec.CommandContext(t.Context(), "go", "build", "-o", kumactl, "./cli/cmd/kumactl").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Setenv("SSH_CONNECTION", "")
	lab, err := netlab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lab.Close()
	log := filepath.Join(t.TempDir(), "strace")
	var all strings.Builder
	for _, backend := range []string{"nftables", "iptables-nft", "iptables-legacy"} {
		run(t, lab, fmt.Sprintf("strace -f -qq -s 512 -e trace='!read,write,mmap,futex' -o %s %s install transparent-proxy --kuma-dp-user 5678 --backend %s", log, kumactl, backend))
		text, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(text)
	}
	var seen []string
	for l := range strings.Lines(all.String()) {
		if writes.MatchString(l) {
			seen = append(seen, l)
		}
	}
	for _, want := range []string{"NFNL_MSG_BATCH_BEGIN", "nlmsg_type=0x14 ", "_SO_SET_", "O_CREAT"} {
		if !slices.ContainsFunc(seen, func(l string) bool { return strings.Contains(l, want) }) {
			t.Errorf("%s is not seen in\n%s", want, strings.Join(seen[:min(40, len(seen))], ""))
		}
	}
}
