package procfs

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const any6 = "00000000000000000000000000000000"

func (f *fake) shells(t *testing.T, want ...RemoteShell) {
	t.Helper()
	got, partial, err := f.RemoteShells()
	if err != nil || partial || !slices.Equal(got, want) {
		t.Errorf("got %+v, partial %v, %v, want %+v", got, partial, err, want)
	}
}

func TestRemoteShellsOfNobody(t *testing.T) {
	f := newFake(t, 40)
	f.shells(t)
	f.process(fakeProcess{pid: 40, comm: "kumactl"})
	f.sockets("tcp", "00000000:0016 00000000:0000 0A 7") // somebody's port 22
	f.shells(t)
}

func TestRemoteShellsOfSessions(t *testing.T) {
	f := newFake(t, 40)
	session := func(port string) []string { return []string{"SSH_CONNECTION=10.0.0.9 50000 10.0.0.7 " + port} }
	f.process(fakeProcess{pid: 1, comm: "init", environ: session("1")})
	f.process(fakeProcess{pid: 10, parent: 1, comm: "elsewhere", netns: otherNS, environ: session("2")})
	f.process(fakeProcess{pid: 20, parent: 10, comm: "tmux: server", environ: session("2222")})
	f.process(fakeProcess{pid: 30, parent: 20, comm: "bash", environ: session("2222")})
	f.process(fakeProcess{pid: 35, parent: 30, comm: "sudo"})
	// Our own file says what we were started with; what counts is getenv.
	f.process(fakeProcess{pid: 40, parent: 35, comm: "kumactl", environ: session("3")})
	f.process(fakeProcess{pid: 50, parent: 1, comm: "stranger", environ: session("4")})
	bash := RemoteShell{2222, "SSH_CONNECTION of process 30 (bash)"}
	initial := RemoteShell{1, "SSH_CONNECTION of process 1 (init)"}
	f.shells(t, initial, bash)

	t.Setenv("SSH_CONNECTION", "fe80::9%eth0 50000 fe80::7%eth0 22")
	f.shells(t, initial, RemoteShell{22, "SSH_CONNECTION of this process"}, bash)
	t.Setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.7 2222")
	f.shells(t, initial, RemoteShell{2222, "SSH_CONNECTION of this process"})
}

func TestSSHConnection(t *testing.T) {
	for value, want := range map[string]uint16{
		"10.0.0.9 50000 10.0.0.7 22":             22,
		"fd00::1 50000 fd00::2 65535":            65535,
		"::1 50000 ::1 22":                       0, // nothing on loopback is captured inbound
		"127.0.0.1 50000 127.0.0.1 22":           0,
		"fe80::1%eth0 50000 fe80::2%eth0 2222":   2222,
		"":                                       0,
		"22":                                     0,
		"10.0.0.9 50000 10.0.0.7":                0,
		"10.0.0.9 50000 10.0.0.7 22 23":          0,
		"10.0.0.9 50000 10.0.0.7 0":              0,
		"10.0.0.9 50000 10.0.0.7 65536":          0,
		"10.0.0.9 50000 10.0.0.7 ssh":            0,
		"10.0.0.9 50000 10.0.0.7 -22":            0,
		"10.0.0.9 0 10.0.0.7 22":                 0,
		"UNKNOWN 65535 UNKNOWN 65535":            0,
		"10.0.0.9 50000 host.example 22":         0,
		"10.0.0.9 50000 10.0.0.7 22; rm -rf foo": 0,
	} {
		if got, ok := sshServerPort(value); got != want || ok != (want != 0) {
			t.Errorf("%q: got %d, %v, want %d", value, got, ok, want)
		}
	}
}

func TestRemoteShellsOfListeners(t *testing.T) {
	requireLittleEndian(t)
	f := newFake(t, 40)
	f.process(fakeProcess{pid: 40, comm: "kumactl"})
	f.process(fakeProcess{pid: 31, comm: "sshd", exe: "/usr/sbin/sshd (deleted)", inodes: []uint64{100, 101, 102}})
	f.process(fakeProcess{pid: 32, comm: "dropbear", exe: "/usr/bin/dropbearmulti", inodes: []uint64{103}})
	f.process(fakeProcess{pid: 33, comm: "x", exe: "/opt/tinysshd", inodes: []uint64{104}})
	f.process(fakeProcess{pid: 34, comm: "nginx", exe: "/usr/sbin/nginx", inodes: []uint64{105}})
	f.process(fakeProcess{pid: 35, comm: "tailscaled", exe: "/usr/sbin/tailscaled", inodes: []uint64{106}})
	f.process(fakeProcess{pid: 36, comm: "in.telnetd", exe: "/usr/sbin/in.telnetd", inodes: []uint64{107}})
	f.process(fakeProcess{pid: 37, comm: "ssh", exe: "/usr/bin/ssh", inodes: []uint64{108}}) // a client's -L
	f.sockets("tcp",
		"0700000A:08AE 00000000:0000 0A 103",
		"00000000:08AE 00000000:0000 0A 100",
		"0700000A:9C41 0900000A:0016 01 102", // a connection, not a listener
		"00000000:0017 00000000:0000 0A 104",
		"00000000:0050 00000000:0000 0A 105",
		"00000000:0051 00000000:0000 0A 106",
		"00000000:0052 00000000:0000 0A 107",
		"00000000:0053 00000000:0000 0A 108")
	f.sockets("tcp6", any6+":08AE "+any6+":0000 0A 101")
	tiny := RemoteShell{23, "tinysshd (pid 33) listens on 0.0.0.0:23"}
	const all = "sshd (pid 31) listens on 0.0.0.0:2222; dropbear (pid 32) listens on 10.0.0.7:2222; sshd (pid 31) listens on [::]:2222"
	f.shells(t, tiny, RemoteShell{2222, all})
	t.Setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.7 2222")
	f.shells(t, tiny, RemoteShell{2222, "SSH_CONNECTION of this process; " + all})
}

func TestRemoteShellsKeepsWhatItFound(t *testing.T) {
	f := newFake(t, 40)
	t.Setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.7 2222")
	if err := os.Remove(f.path("thread-self", "net", "tcp")); err != nil {
		t.Fatal(err)
	}
	got, _, err := f.RemoteShells()
	if err == nil || len(got) != 1 || got[0].Port != 2222 {
		t.Errorf("got %v, %v, want port 2222 and an error", got, err)
	}
}

func TestRemoteShellsOfSocketUnits(t *testing.T) {
	requireLittleEndian(t)
	const unit = "[Unit]\nDescription=x\n[Socket]\nListenStream=22\nAccept=no\n"
	dir := func(f *fake, i int, name string) string { return filepath.Join(f.UnitDirs[i], name) }
	for _, c := range []struct {
		name string
		make func(t *testing.T, f *fake)
		want []RemoteShell
	}{
		{"none", func(*testing.T, *fake) {}, nil},
		{"Debian's, by systemd", func(t *testing.T, f *fake) {
			writeFile(t, dir(f, 2, "ssh.socket"), unit)
		}, []RemoteShell{{22, "ssh.socket has ListenStream=22"}}},
		{"Fedora's", func(t *testing.T, f *fake) {
			writeFile(t, dir(f, 2, "sshd.socket"), unit)
		}, []RemoteShell{{22, "sshd.socket has ListenStream=22"}}},
		{"nobody listens", func(t *testing.T, f *fake) {
			writeFile(t, dir(f, 2, "ssh.socket"), "[Socket]\nListenStream=2022\n")
		}, nil},
		{"a drop-in moves it", func(t *testing.T, f *fake) {
			writeFile(t, dir(f, 2, "ssh.socket"), unit)
			writeFile(t, dir(f, 0, "ssh.socket.d/port.conf"), "[Socket]\nListenStream=\nListenStream=[::]:2222\n")
		}, []RemoteShell{{2222, "ssh.socket has ListenStream=[::]:2222"}}},
		{"a drop-in adds one", func(t *testing.T, f *fake) {
			writeFile(t, dir(f, 2, "ssh.socket"), unit)
			writeFile(t, dir(f, 1, "ssh.socket.d/port.conf"), "[Socket]\nListenStream=0.0.0.0:2222\n")
		}, []RemoteShell{{22, "ssh.socket has ListenStream=22"}, {2222, "ssh.socket has ListenStream=0.0.0.0:2222"}}},
		{"drop-ins in the order of their names", func(t *testing.T, f *fake) {
			writeFile(t, dir(f, 2, "ssh.socket"), unit)
			writeFile(t, dir(f, 0, "ssh.socket.d/10.conf"), "[Socket]\nListenStream=2222\n")
			writeFile(t, dir(f, 2, "ssh.socket.d/20.conf"), "[Socket]\nListenStream=\nListenStream=22\n")
		}, []RemoteShell{{22, "ssh.socket has ListenStream=22"}}},
		{"of two drop-ins of a name the first folder's", func(t *testing.T, f *fake) {
			writeFile(t, dir(f, 2, "ssh.socket"), unit)
			writeFile(t, dir(f, 1, "ssh.socket.d/a.conf"), "[Socket]\nListenStream=2222\n")
			writeFile(t, dir(f, 0, "ssh.socket.d/a.conf"), "")
			writeFile(t, dir(f, 0, "ssh.socket.d/readme"), "[Socket]\nListenStream=2222\n")
		}, []RemoteShell{{22, "ssh.socket has ListenStream=22"}}},
		{"the first folder's file hides the others", func(t *testing.T, f *fake) {
			writeFile(t, dir(f, 0, "ssh.socket"), "[Socket]\nListenStream=2222\n")
			writeFile(t, dir(f, 2, "ssh.socket"), unit)
		}, []RemoteShell{{2222, "ssh.socket has ListenStream=2222"}}},
		{"masked", func(t *testing.T, f *fake) {
			writeFile(t, dir(f, 2, "ssh.socket"), unit)
			writeFile(t, dir(f, 1, "ssh.socket.d/a.conf"), unit)
			if err := os.MkdirAll(f.UnitDirs[0], 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("/dev/null", dir(f, 0, "ssh.socket")); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"a drop-in of no unit", func(t *testing.T, f *fake) {
			writeFile(t, dir(f, 1, "ssh.socket.d/a.conf"), unit)
		}, nil},
		{"an alias is the unit's", func(t *testing.T, f *fake) {
			writeFile(t, dir(f, 2, "ssh.socket"), unit)
			writeFile(t, dir(f, 0, "ssh.socket.d/a.conf"), "[Socket]\nListenStream=\nListenStream=2222\n")
			if err := os.Symlink(dir(f, 2, "ssh.socket"), dir(f, 0, "sshd.socket")); err != nil {
				t.Fatal(err)
			}
		}, []RemoteShell{{2222, "ssh.socket has ListenStream=2222"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t, 40)
			f.process(fakeProcess{pid: 40, comm: "kumactl"})
			f.process(fakeProcess{pid: 1, comm: "systemd", exe: "/usr/lib/systemd/systemd", inodes: []uint64{7, 8}})
			f.sockets("tcp", "00000000:0016 00000000:0000 0A 7")
			f.sockets("tcp6", any6+":08AE "+any6+":0000 0A 8")
			c.make(t, f)
			f.shells(t, c.want...)
		})
	}
}

func TestParseListenStreams(t *testing.T) {
	for _, c := range []struct {
		text string
		want []uint16
	}{
		{"[Socket]\nListenStream=22\nListenStream = 0.0.0.0:23 \nListenStream=[::]:24\nListenStream=[fe80::1]:25%eth0\n", []uint16{22, 23, 24, 25}},
		{"[Socket]\r\nListenStream=22\r\n", []uint16{22}},
		{"[Socket]\nListenStream=/run/ssh.sock\nListenStream=@ssh\nListenStream=vsock:2:22\nListenStream=vsock::22\nListenStream=0\nListenStream=65536\nListenStream=::\n", nil},
		{"ListenStream=1\n[Unit]\nListenStream=2\n[Install]\nListenStream=3\n", nil},
		{"[Socket]\n#ListenStream=22\n; ListenStream=23\nlistenstream=24\nListenDatagram=25\n", nil},
		{"[Socket]\nListenStream=22\nListenStream=\nListenStream=23\n", []uint16{23}},
		{"[Socket]\nListenStream=22\nListenDatagram=\n", nil},
		{"[Socket]\nListenStream=22\n[Install]\n[Socket]\nListenStream=23", []uint16{22, 23}},
		{"[Socket]\nListenStream=\\\n22\n", []uint16{22}},
		{"", nil},
	} {
		var got []uint16
		for _, l := range parseListenStreams(nil, c.text) {
			got = append(got, l.port)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%q: got %v, want %v", c.text, got, c.want)
		}
	}
}

func TestContainer(t *testing.T) {
	for _, c := range []struct {
		name, kubernetes, container string
		file                        string
		why                         string
	}{
		{name: "a host"},
		{name: "Kubernetes", kubernetes: "10.96.0.1", container: "docker", why: "KUBERNETES_SERVICE_HOST is set"},
		{name: "podman", file: "run/.containerenv", container: "podman", why: "/run/.containerenv exists"},
		{name: "docker", container: "docker", why: "container=docker"},
		{name: "podman's variable", container: "podman", why: "container=podman"},
		{name: "oci", container: "oci", why: "container=oci"},
		{name: "a whole host in nspawn", container: "systemd-nspawn"},
		{name: "a whole host in lxc", container: "lxc"},
		{name: "Docker's file", file: ".dockerenv"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t, 1)
			t.Setenv("KUBERNETES_SERVICE_HOST", c.kubernetes)
			t.Setenv("container", c.container)
			if c.file != "" {
				writeFile(t, filepath.Join(f.FileRoot, c.file), "")
			}
			if is, why := f.Container(); is != (c.why != "") || why != c.why {
				t.Errorf("got %v, %q, want %q", is, why, c.why)
			}
		})
	}
}

func TestDefaultUnitDirs(t *testing.T) {
	dirs := DefaultUnitDirs()
	if dirs[0] != "/etc/systemd/system" || !slices.Contains(dirs, "/usr/lib/systemd/system") {
		t.Errorf("got %s", strings.Join(dirs, " "))
	}
}
