// Command quickstart is the demo: it installs transparent proxying on a host
// made for the purpose, a network namespace, and shows with real connections
// where each of them goes.
//
// In this order: the script, each rule with its reason; some flows, with where
// the contract wants them, where they were seen to go, and the rule that decided;
// the same flows once more with one rule deleted, so that one sees that the table
// can turn red; a re-install under load; the hashes of every table before the
// install and after the uninstall.
//
// Nothing outside of its namespaces is touched. Without root it makes a user
// namespace; where that is forbidden it says so, sends nothing, and walks the
// flows on paper. It exits with 1 if a flow went wrong.
//
//	go run ./examples/quickstart
package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
	"github.com/kumahq/kuma-tproxy/tproxy/tproxytest"
)

const proxyUID = 5678

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	p := newPage(os.Stdout)
	code, inside, err := enter()
	switch {
	case err != nil:
		code = paper(p, err)
	case inside:
		if code, err = demo(ctx, p); err != nil {
			fmt.Fprintln(os.Stderr, "quickstart:", err)
			code = 1
		}
	}
	cancel()
	os.Exit(code)
}

// config is what the demo installs: Kuma's defaults, an excluded port each way,
// and DNS.
func config(resolvConf string) tproxy.Config {
	return tproxy.Config{
		ProxyUIDs: []tproxy.UID{proxyUID},
		Inbound:   tproxy.Inbound{ExcludePorts: rules.Port(9100)},
		Outbound:  tproxy.Outbound{ExcludePorts: rules.Port(5432)},
		DNS:       tproxy.DNS{Redirect: true, ResolvConf: resolvConf},
	}
}

// The nameservers and the addresses of the host, as internal/netlab has them.
var (
	nameservers = []netip.Addr{netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("2001:4860:4860::8888")}
	env         = sim.EnvOf(netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2"))
)

// flow is a line of the table.
type flow struct {
	from, to string
	packet   sim.Packet
	server   string // who listens where the flow is sent to
}

func flows() []flow {
	at := func(from, to, packet, server string) flow { return flow{from, to, sim.MustPacket(packet), server} }
	return []flow{
		at("another host", "web", "in tcp 10.0.0.1:40000 > 10.0.0.2:80", "web"),
		at("another host", "web", "in tcp [fd00::1]:40000 > [fd00::2]:80", "web"),
		at("another host", "SSH", "in tcp 10.0.0.1:40000 > 10.0.0.2:22", "sshd"),
		at("another host", "SSH", "in tcp [fd00::1]:40000 > [fd00::2]:22", "sshd"),
		at("another host", "metrics, excluded", "in tcp 10.0.0.1:40000 > 10.0.0.2:9100", "metrics"),
		at("application", "the internet", "out tcp uid=1000 10.0.0.2:40000 > 93.184.216.34:443", "site"),
		at("application", "the internet", "out tcp uid=1000 [fd00::2]:40000 > [2606:2800:220:1::1]:443", "site"),
		at("application", "database, excluded", "out tcp uid=1000 10.0.0.2:40000 > 93.184.216.34:5432", "database"),
		at("application", "the host itself", "out tcp uid=1000 127.0.0.1:40000 > 127.0.0.1:80", "web"),
		at("application", "DNS", "out udp uid=1000 10.0.0.2:40000 > 8.8.8.8:53", "resolver"),
		at("proxy", "DNS", "out udp uid=5678 10.0.0.2:40000 > 8.8.8.8:53", "resolver"),
		at("proxy", "the internet", "out tcp uid=5678 10.0.0.2:40000 > 93.184.216.34:443", "site"),
		at("proxy", "its own service", "out tcp uid=5678 10.0.0.2:40000 > 10.0.0.2:80", "web"),
		at("proxy as 127.0.0.6", "hands an inbound on", "out tcp uid=5678 127.0.0.6:40000 > 10.0.0.2:80", "web"),
		at("proxy", "itself", "out tcp uid=5678 127.0.0.1:40000 > 127.0.0.1:15001", "out"),
	}
}

// expected is where the contract wants a flow, in its words: in, out and dns are
// the proxy's ports. It is derived from the configuration alone.
func expected(cfg tproxy.Config, host tproxy.Host, p sim.Packet) string {
	_, v := tproxytest.Expect(cfg, host, env, p)
	return word(cfg, v)
}

func word(cfg tproxy.Config, v sim.Verdict) string {
	v.Zone = 0 // the flow's way, not its conntrack entry
	return tproxytest.Word(cfg, v)
}

// decidedBy walks the packet through rules and names the one that settled it.
func decidedBy(trace sim.Trace) string {
	step, ok := trace.Deciding()
	if !ok {
		return trace.Reason
	}
	return fmt.Sprintf("%s #%d  %s", step.Chain, step.Index, strings.TrimPrefix(trace.Reason, jumpComment))
}

// jumpComment begins the comment of a rule in a built-in chain.
const jumpComment = "kuma/mesh/transparent/proxy/"

// script prints the plan's script with the reason for each rule above it, and of
// IPv6 the rules that differ.
func script(p *page, plan *tproxy.Plan) {
	if plan.Backend == tproxy.NFTables {
		table(p, plan)
		return
	}
	written := map[string]bool{}
	for i, f := range plan.Families {
		var lines []string
		same := 0
		for line := range strings.Lines(string(plan.Rules.IPTables(f))) {
			line = strings.TrimSpace(line)
			head, rest, commented := strings.Cut(line, ` -m comment --comment `)
			quoted, err := strconv.QuotedPrefix(rest)
			why, _ := strconv.Unquote(quoted)
			tail := strings.TrimPrefix(rest, quoted)
			switch rule := head + tail; {
			case !commented || err != nil:
				lines = append(lines, "  "+line)
			case written[line]:
				same++
			default:
				written[line] = true
				lines = append(lines, p.paint("  # "+strings.TrimPrefix(why, jumpComment), dim), "  "+rule)
			}
		}
		if i == 0 {
			p.linef("%s:\n%s", f, strings.Join(lines, "\n"))
			continue
		}
		lines = slices.DeleteFunc(lines, func(l string) bool { return l[2] != '-' && !strings.Contains(l, "#") })
		p.linef("\n%s: %d of these rules are the same, and instead of the others:\n%s", f, same, strings.Join(lines, "\n"))
	}
}

// table is script for a table of nftables, which is of both families.
func table(p *page, plan *tproxy.Plan) {
	for line := range strings.Lines(string(plan.Rules.NFTables(tproxy.NFTable))) {
		line = strings.TrimRight(line, "\n")
		rule, why, commented := strings.Cut(line, ` comment "`)
		if commented {
			indent := line[:len(line)-len(strings.TrimLeft(line, "\t"))]
			p.linef("  %s", p.paint(indent+"# "+strings.TrimPrefix(strings.TrimSuffix(why, `"`), jumpComment), dim))
		}
		p.linef("  %s", rule)
	}
}

// paper walks the flows through the rules of the plan, and sends nothing.
func paper(p *page, why error) int {
	p.linef("There can be no network namespace here: %v", why)
	cfg, host := config(""), tproxy.Host{Nameservers: nameservers}
	plan, err := tproxy.Build(cfg, host)
	if err != nil {
		p.linef("%v", err)
		return 1
	}
	p.heading("The script, and why each rule is there")
	script(p, plan)
	p.heading("No packet was sent: what follows is the rules walked on paper")
	wrong := 0
	var rows [][]cell
	for _, f := range flows() {
		want := expected(cfg, host, f.packet)
		trace := sim.Walk(plan.Rules, env, f.packet)
		says := word(cfg, trace.Verdict)
		if says != want {
			wrong++
		}
		rows = append(rows, line(f, want, says, decidedBy(trace)))
	}
	p.table([]string{"", "from", "to", "expected", "ON PAPER", "decided by"}, rows)
	p.linef("\n%d flows, %d wrong", len(rows), wrong)
	return min(wrong, 1)
}

func destination(f flow) string { return fmt.Sprintf("%s %s", f.packet.Destination, f.to) }

// line is a line of the table.
func line(f flow, want, got, by string) []cell {
	mark := verdict("ok", "ok")
	if got != want {
		mark = cell{"RED", red}
	}
	return []cell{mark, plain(f.from), plain(destination(f)), plain(want), verdict(got, want), faint(by)}
}

// verdict is green where it is what was wanted, and red otherwise.
func verdict(got, want string) cell {
	if got == want {
		return cell{got, green}
	}
	return cell{got, red}
}

type colour string

const (
	none   colour = ""
	red    colour = "\x1b[1;31m"
	green  colour = "\x1b[32m"
	dim    colour = "\x1b[2m"
	strong colour = "\x1b[1m"
	reset         = "\x1b[0m"
)

// cell is a text of a table.
type cell struct {
	text   string
	colour colour
}

func plain(s string) cell { return cell{s, none} }
func faint(s string) cell { return cell{s, dim} }

// page is what people read.
type page struct {
	w       io.Writer
	colours bool
}

// newPage has colours on a terminal only, and not where NO_COLOR is set.
func newPage(f *os.File) *page {
	info, err := f.Stat()
	return &page{f, err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

func (p *page) linef(format string, args ...any) { fmt.Fprintf(p.w, format+"\n", args...) }

func (p *page) paint(s string, c colour) string {
	if !p.colours || c == none {
		return s
	}
	return string(c) + s + reset
}

func (p *page) heading(format string, args ...any) {
	p.linef("\n%s", p.paint("== "+fmt.Sprintf(format, args...), strong))
}

// table prints aligned columns.
func (p *page) table(head []string, rows [][]cell) {
	if head != nil {
		cells := make([]cell, len(head))
		for i, h := range head {
			cells[i] = cell{h, strong}
		}
		rows = append([][]cell{cells}, rows...)
	}
	var widths []int
	for _, r := range rows {
		for i, c := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], len(c.text))
		}
	}
	for _, r := range rows {
		var line strings.Builder
		line.WriteString(" ")
		for i, c := range r {
			line.WriteString(" " + p.paint(c.text, c.colour))
			if i < len(r)-1 {
				fmt.Fprintf(&line, "%*s", widths[i]-len(c.text)+1, "")
			}
		}
		p.linef("%s", line.String())
	}
}
