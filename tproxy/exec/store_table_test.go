package exec

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/persist"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// tabled is booted with a kernel that can hold a table of nftables.
func tabled(t *testing.T, running ...string) *fakeMachine {
	t.Helper()
	m := booted(t, running...)
	m.noTable = ""
	return m
}

// A table of nftables comes back by the unit alone, beside firewalld too; to name
// firewalld moves the rules to iptables in one install, and back again.
func TestStoreOfATable(t *testing.T) {
	for _, running := range [][]string{nil, {"firewalld"}} {
		m := tabled(t, running...)
		m.populate(t)
		before, host := m.tree(t), m.all()
		r := m.mustStore(t, tproxy.Config{})
		unit := m.text(t, "etc/systemd/system/"+persist.UnitName)
		if r.Backend != tproxy.NFTables || m.table == nil || !strings.Contains(unit, "come-back rules\n") || strings.Contains(unit, "ip_tables") {
			t.Errorf("%q: in %s\n%s", running, r.Backend, unit)
		}
		if len(running) > 0 && m.text(t, "etc/firewalld/direct.xml") != othersDirect {
			t.Error("direct.xml was changed")
		}
		if i := m.text(t, "etc/kuma-tproxy/install.json"); !strings.Contains(i, `"backend": "nftables"`) {
			t.Errorf("saved is\n%s", i)
		}
		stored := m.tree(t)
		m.writes = 0
		if r := m.mustStore(t, tproxy.Config{}); r.Changed || m.writes > 0 {
			t.Errorf("%q: the same again: %q", running, r.Steps)
		}

		if len(running) > 0 {
			c := tproxy.Config{Persist: tproxy.PersistFirewalld}
			if r := m.mustStore(t, c); r.Backend != tproxy.IPTablesNFT || m.table != nil || !strings.Contains(m.text(t, "etc/firewalld/direct.xml"), "KUMA_MESH_OUTBOUND") {
				t.Errorf("firewalld is to load them: in %s, a table is there: %t", r.Backend, m.table != nil)
			}
			c.Backend = tproxy.NFTables
			if _, err := m.store(t, c); err == nil || !strings.Contains(err.Error(), "it has no place for a table of nftables") {
				t.Errorf("nftables by firewalld: %v", err)
			}
			m.mustStore(t, tproxy.Config{Backend: tproxy.NFTables})
			if m.table == nil || m.text(t, "etc/firewalld/direct.xml") != othersDirect {
				t.Error("back in a table, direct.xml is not what it was")
			}
			m.mustStore(t, tproxy.Config{})
			sameText(t, "back in a table", stored, m.tree(t))
		}
		if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil || m.table != nil {
			t.Fatal(err)
		}
		sameText(t, "uninstalled", before, m.tree(t))
		sameText(t, "uninstalled", host, m.all())
	}
}

// What the unit runs puts a table back that a flush has taken, and leaves one that stands.
func TestBringBackATable(t *testing.T) {
	m := tabled(t)
	m.mustStore(t, tproxy.Config{Outbound: tproxy.Outbound{ExcludePorts: rules.MustPorts("9005,8000-8010")}})
	was := m.table
	if r, err := m.runner().BringBack(t.Context()); err != nil || r.Changed {
		t.Errorf("with all there: %+v, %v", r, err)
	}
	m.table = nil
	r, err := m.runner().BringBack(t.Context())
	if err != nil || !r.Changed || r.Backend != tproxy.NFTables || r.Processes > 0 || m.table == nil || !sameTable(m.table, was) {
		t.Errorf("flushed: %+v, %v", r, err)
	}
	m.noTable, m.table = "no nf_tables in this kernel", nil
	if _, err := m.runner().BringBack(t.Context()); err == nil || !strings.Contains(err.Error(), "the install is in nftables") {
		t.Errorf("a kernel without: %v", err)
	}
}

// Where root must not run our program, nft loads the table, or, where nft is not here
// either, the rules are in iptables.
func TestStoreScriptOfATable(t *testing.T) {
	for _, nft := range []bool{true, false} {
		m := tabled(t)
		m.missing["nft"] = !nft
		before := m.tree(t)
		if err := os.Chmod(filepath.Join(m.root, "usr/local/bin"), 0o777); err != nil {
			t.Fatal(err)
		}
		r := m.mustStore(t, tproxy.Config{})
		said := strings.Join(r.Notes, "\n")
		if !nft {
			if _, err := os.Stat(filepath.Join(m.root, "etc/kuma-tproxy/rules.v4")); r.Backend != tproxy.IPTablesNFT || err != nil {
				t.Errorf("without nft: in %s, %v", r.Backend, err)
			}
			_, err := m.store(t, tproxy.Config{Backend: tproxy.NFTables})
			if err == nil || !strings.Contains(err.Error(), "would not come back after a restart: a unit cannot run the program that installs (/usr/local/bin, with mode 0777") || !strings.Contains(err.Error(), "install the package nftables") {
				t.Errorf("without nft, asked for: %v", err)
			}
			continue
		}
		unit := m.text(t, "etc/systemd/system/"+persist.UnitName)
		for _, want := range []string{
			"ExecStart=/usr/sbin/ip -6 address replace ::6/128 dev lo\n",
			`"'/usr/sbin/nft' list table inet kuma-tproxy >/dev/null 2>&1 || exec '/usr/sbin/nft' -f /etc/kuma-tproxy/rules.nft"` + "\n", "RequiresMountsFor=",
		} {
			if !strings.Contains(unit, want) {
				t.Errorf("%q is not in\n%s", want, unit)
			}
		}
		if !strings.Contains(said, "can be changed by others") || !slices.ContainsFunc(r.Steps, func(s string) bool { return strings.Contains(s, "which runs nft with a saved script") }) {
			t.Errorf("%s\n%q", said, r.Steps)
		}
		loads, err := rules.ParseNative([]byte(m.text(t, "etc/kuma-tproxy/rules.nft")))
		if err != nil || !sameTable(m.table, &loads) {
			t.Errorf("what it loads is another table: %v", err)
		}
		if _, err := m.runner().Remove(t.Context(), RemoveOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(m.root, "usr/local/bin"), 0o755); err != nil {
			t.Fatal(err)
		}
		sameText(t, "uninstalled", before, m.tree(t))
	}
}

// An install in a table on trial: unless it is confirmed, what was there comes back, be
// it another table or rules of iptables, and so does what brings it back.
func TestTableOnTrial(t *testing.T) {
	exclude := tproxy.Inbound{ExcludePorts: rules.MustPorts("9005")}
	for _, former := range []tproxy.Backend{tproxy.NFTables, tproxy.IPTablesNFT} {
		for _, then := range []tproxy.Backend{tproxy.NFTables, tproxy.IPTablesLegacy} {
			m := tabled(t)
			m.populate(t)
			m.mustStore(t, tproxy.Config{Backend: former})
			tree, all, table := m.tree(t), m.all(), m.table
			c := tproxy.Config{Backend: then, Inbound: exclude}
			id := m.tryStored(t, c)
			sameText(t, "on trial", tree, m.tree(t))
			if (m.table != nil) != (then == tproxy.NFTables) || (former == tproxy.NFTables || then == tproxy.NFTables) && sameTable(m.table, table) {
				t.Errorf("%s to %s: on trial the table is there: %t", former, then, m.table != nil)
			}
			if r, err := m.runner().BringBack(t.Context()); err != nil || len(r.Steps) > 0 {
				t.Errorf("brought back in between: %+v, %v", r, err)
			}
			m.clock = time.Hour
			if _, err := m.watchOver(id); err != nil {
				t.Fatal(err)
			}
			m.clock = 0
			sameText(t, "put back", tree, m.tree(t))
			sameText(t, "put back", all, m.all())
			if !sameTable(m.table, table) {
				t.Errorf("%s to %s: another table is back", former, then)
			}
			if s, err := m.runner().Status(t.Context()); err != nil || s.State != StateInstalled || s.Backend != former {
				t.Errorf("%s to %s: put back: %+v, %v", former, then, s, err)
			}
			m.tryStored(t, c)
			if _, err := m.runner().Confirm(t.Context(), ConfirmOptions{}); err != nil {
				t.Fatal(err)
			}
			if i := m.text(t, "etc/kuma-tproxy/install.json"); !strings.Contains(i, `"backend": "`+then.String()+`"`) {
				t.Errorf("confirmed, and saved is\n%s", i)
			}
			if s, err := m.runner().Status(t.Context()); err != nil || s.State != StateInstalled || s.Backend != then {
				t.Errorf("%s to %s: confirmed: %+v, %v", former, then, s, err)
			}
		}
	}
}
