package dns

import (
	"errors"
	"strings"
	"testing"
)

// dockerMounts are those of a container (elastic/apm-agent-java pull request 2352
// has the form), shortened.
const dockerMounts = `473 387 0:143 / / rw,relatime master:181 - overlay overlay rw,lowerdir=/var/lib/docker/overlay2/l/HOY5
474 473 0:146 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
492 473 254:1 /docker/volumes/my\040volume/_data /data rw,relatime - ext4 /dev/vda1 rw
493 473 254:1 /docker/containers/6dabc/resolv.conf /etc/resolv.conf rw,relatime - ext4 /dev/vda1 rw
494 473 254:1 /docker/containers/6dabc/hostname /etc/hostname ro,relatime - ext4 /dev/vda1 rw
`

// hostMounts are those of a plain host.
const hostMounts = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw,nosuid shared:2 - proc proc rw
24 22 0:22 / /run rw,nosuid,nodev shared:3 - tmpfs tmpfs rw,size=1000k
`

// netnsMounts are those of ip-netns(8) exec with /etc/netns/X/resolv.conf.
const netnsMounts = hostMounts + `40 22 0:23 / /sys rw,relatime - sysfs X rw
41 22 254:0 /etc/netns/X/resolv.conf /etc/resolv.conf rw,relatime - ext4 /dev/vda rw
`

func TestParseMounts(t *testing.T) {
	all := ParseMounts([]byte(dockerMounts + "nonsense\n1 2 3\na b 0:1 / / rw - ext4 x rw\n"))
	if len(all) != 5 {
		t.Fatalf("%d mounts", len(all))
	}
	want := Mount{ID: 493, Parent: 473, Device: "254:1", Root: "/docker/containers/6dabc/resolv.conf", Point: "/etc/resolv.conf", Type: "ext4"}
	if all[3] != want {
		t.Errorf("%+v", all[3])
	}
	if all[2].Root != "/docker/volumes/my volume/_data" || !all[4].ReadOnly || all[0].Type != "overlay" {
		t.Errorf("%+v", all)
	}
	if got := want.String(); got != "/docker/containers/6dabc/resolv.conf of 254:1 (ext4)" {
		t.Error(got)
	}
}

func TestMountOf(t *testing.T) {
	for _, test := range []struct {
		name, mounts, path, point string
		id                        int
	}{
		{"root", hostMounts, "/etc/resolv.conf", "/", 22},
		{"a folder above", hostMounts, "/run/systemd/resolve/resolv.conf", "/run", 24},
		{"the file", dockerMounts, "/etc/resolv.conf", "/etc/resolv.conf", 493},
		{"beside the file", dockerMounts, "/etc/resolv.conf.kuma-backup", "/", 473},
		{"one name in another", dockerMounts, "/etc/hostname2", "/", 473},
		{"on top of each other", netnsMounts + "42 41 254:0 /b /etc/resolv.conf rw - ext4 /dev/vda rw\n", "/etc/resolv.conf", "/etc/resolv.conf", 42},
		{"hidden by a folder", netnsMounts + "42 22 0:99 / /etc rw - tmpfs tmpfs rw\n", "/etc/resolv.conf", "/etc", 42},
		{"in that folder", netnsMounts + "42 22 0:99 / /etc rw - tmpfs tmpfs rw\n43 42 0:98 /r /etc/resolv.conf rw - tmpfs tmpfs rw\n", "/etc/resolv.conf", "/etc/resolv.conf", 43},
		{"a root on the root", "1 0 0:1 / / rw - rootfs rootfs rw\n" + hostMounts, "/etc/resolv.conf", "/", 22},
		{"none", "", "/etc/resolv.conf", "", 0},
	} {
		m, ok := mountOf(ParseMounts([]byte(test.mounts)), test.path)
		if m.Point != test.point || m.ID != test.id || ok != (test.id != 0) {
			t.Errorf("%s: %+v %v", test.name, m, ok)
		}
	}
}

// Contract 4.8.
func TestMayWrite(t *testing.T) {
	host := ParseMounts([]byte(hostMounts))
	const etc = "50 22 0:30 / /etc rw - tmpfs tmpfs rw\n"
	for _, test := range []struct {
		name   string
		mounts string
		ns     Namespaces
		may    bool
	}{
		{"the host", hostMounts, Namespaces{Self: "net:[1]", Init: "net:[1]"}, true},
		{"a container, where process 1 is its own", dockerMounts, Namespaces{Self: "net:[7]", Init: "net:[7]"}, true},
		{"ip netns exec without a file", hostMounts, Namespaces{Self: "net:[7]", Init: "net:[1]", InitMounts: host}, false},
		{"ip netns exec with a file", netnsMounts, Namespaces{Self: "net:[7]", Init: "net:[1]", InitMounts: host}, true},
		{"the same, meant", hostMounts, Namespaces{Self: "net:[7]", Init: "net:[1]", InitMounts: host, Meant: true}, true},
		{"an own folder", hostMounts + etc, Namespaces{Self: "net:[7]", Init: "net:[1]", InitMounts: host}, true},
		{"the host's own folder", hostMounts + etc, Namespaces{Self: "net:[7]", Init: "net:[1]", InitMounts: ParseMounts([]byte(hostMounts + etc))}, false},
		{"nothing known of process 1", hostMounts, Namespaces{Self: "net:[7]"}, false},
		{"nothing known of us", hostMounts, Namespaces{}, false},
		{"nothing known, an own file", dockerMounts, Namespaces{}, true},
		{"no mounts", "", Namespaces{Self: "net:[7]", Init: "net:[1]"}, false},
	} {
		err := MayWrite("/etc/resolv.conf", ParseMounts([]byte(test.mounts)), test.ns)
		if _, ok := errors.AsType[*NamespaceError](err); (err == nil) != test.may || err != nil && !ok {
			t.Errorf("%s: %v", test.name, err)
		}
		if err != nil && !strings.Contains(err.Error(), "--resolv-conf") {
			t.Error(err)
		}
	}
}

func FuzzMounts(f *testing.F) {
	f.Add([]byte(dockerMounts), "/etc/resolv.conf")
	f.Add([]byte(netnsMounts+"42 41 0:1 / /etc/resolv.conf ro - tmpfs x rw\n"), "/etc/resolv.conf")
	f.Add([]byte("1 1 0:1 \\057 / rw - x y rw"), "/")
	f.Fuzz(func(t *testing.T, text []byte, path string) {
		mounts := ParseMounts(text)
		if m, ok := mountOf(mounts, path); ok && m.Point != "/" && !strings.HasPrefix(path, m.Point) {
			t.Fatalf("%q is not on %+v", path, m)
		}
	})
}
