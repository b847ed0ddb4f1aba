package cli

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
	"github.com/kumahq/kuma-tproxy/tproxy/sim"
)

const explainLong = `Walk the packet that opens a connection through netfilter's rules, on paper, and
say where it goes and which rules decide.

Without flags of install it is the live rules of this host, ours and others', which
takes root. With any of them but --kuma-dp-user it is the rules that install would
put in place: nothing needs to be installed, and no root is needed. With --rules it
is what iptables-save, or ip6tables-save, printed somewhere else.

The verdict is untouched, in, out or dns (a port of the proxy), refused, dropped or
unknown. Untouched is what no rule of ours redirects: a rule of others that answers
first is named. Nothing is sent, and nothing is changed.

Exit codes: 0 for a verdict, 1 for unknown, 2 for bad input.`

const explainExample = `  kumactl explain transparent-proxy --from host:10.0.0.9 --to 10.0.0.7:8080
  kumactl explain transparent-proxy --from app --to 93.184.216.34:443 --exclude-outbound-ports 443
  kumactl explain transparent-proxy --from uid:1000 --to [fd00::53]:53 --protocol udp --rules saved`

// ExplainTransparentProxy returns the command transparent-proxy that says what
// becomes of a connection and why, for mounting under an explain command.
func ExplainTransparentProxy(o Options) *cobra.Command {
	cmd := &cobra.Command{
		Use:          "transparent-proxy",
		Short:        "Say where a connection goes, and which rules decide",
		Long:         explainLong,
		Example:      explainExample,
		Args:         cobra.ArbitraryArgs, // faults of the command line like others
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return explainPacket(cmd, args, o)
		},
	}
	addFlags(cmd, append(explainFlags(), installFlags()...))
	addHidden(cmd, hiddenFlags())
	return cmd
}

func explainFlags() []flagGroup {
	return []flagGroup{{"The connection", []flag{
		{"from", "", "`who` opens it: app, proxy, uid:N, or host:ADDRESS for another host"},
		{"to", "", "`address` and port that it is opened to, as 10.0.0.7:80 or [fd00::7]:80"},
		{"protocol", "tcp", "tcp or udp, by `name`"},
		{"source-port", "40000", "`port` that it is opened from"},
		{"interface", "", "`name` of the interface by which it comes from, or leaves for, another host"},
		{"rules", "", "`file` with what iptables-save printed, or ip6tables-save for an IPv6 address"},
		{"local", "", "`addresses` of the host that the rules are for, where it is not this one; repeatable"},
	}}}
}

// UnknownError is the error of an explain whose verdict is unknown: it was
// printed, with its reason, so the command prints no more.
type UnknownError struct{ Reason string }

func (e *UnknownError) Error() string { return "the verdict is unknown: " + e.Reason }

// question is what an explain was asked.
type question struct {
	sender     string // app, proxy, uid or host
	uid        uint32
	host       netip.Addr
	to         netip.AddrPort
	protocol   rules.Protocol
	sourcePort uint16
	iface      string
	file       string
	local      []netip.Addr
	planned    bool // whether it is about rules that are not installed
}

// notOfConfig are the flags of install that say nothing of the rules, and the
// user, who is also asked for with live rules.
var notOfConfig = []string{"kuma-dp-user", "kuma-dp-uid", "wait", "wait-interval", "max-retries", "sleep-between-retries", "dry-run", "require-proxy", "output", "verbose"}

func (p *parser) question() (q question) {
	q.protocol = []rules.Protocol{rules.TCP, rules.UDP}[p.oneOf("protocol", "tcp", "udp")]
	q.to = p.destination()
	p.sender(&q)
	q.sourcePort = p.port("source-port")
	if q.iface = p.text("interface"); q.iface != "" || p.given("interface") {
		if err := rules.CheckInterface(q.iface); err != nil || strings.HasSuffix(q.iface, "+") {
			p.refuse("interface", q.iface, "the name of an interface")
		}
	}
	for _, list := range p.each("local") {
		for s := range strings.SplitSeq(list, ",") {
			a, err := netip.ParseAddr(strings.TrimSpace(s))
			if err != nil || a.Zone() != "" {
				p.refuse("local", s, "addresses, separated by commas")
			}
			q.local = append(q.local, a)
		}
	}
	var config []string
	for _, g := range append(installFlags(), flagGroup{flags: hiddenFlags()}) {
		for _, f := range g.flags {
			if p.given(f.name) && !slices.Contains(notOfConfig, f.name) {
				config = append(config, "--"+f.name)
			}
		}
	}
	q.planned = config != nil
	switch q.file = p.text("rules"); {
	case !p.given("rules"):
	case q.file == "": // an empty variable of a shell must not mean the live rules
		p.refuse("rules", q.file, "a file that iptables-save or ip6tables-save printed")
	case q.planned:
		p.refuse("rules", q.file, "either a file or the flags of an install ("+strings.Join(config, ", ")+")")
	}
	return q
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

func (p *parser) destination() netip.AddrPort {
	s := p.text("to")
	to, err := netip.ParseAddrPort(s)
	switch {
	case err != nil, to.Addr().Zone() != "", to.Addr().Is4In6(), to.Addr().IsUnspecified(), to.Addr().IsMulticast(), to.Addr() == broadcast:
		p.refuse("to", s, "an address and a port from 1 to 65535, such as 10.0.0.7:80 or [fd00::7]:80")
		return netip.AddrPort{}
	case to.Port() == 0:
		p.refuse("to", s, "a port from 1 to 65535: port 0 does not exist")
	}
	return to
}

const acceptedSenders = "app, proxy, uid:N, or host:ADDRESS"

func (p *parser) sender(q *question) {
	s := p.text("from")
	kind, value, _ := strings.Cut(s, ":")
	q.sender = kind
	switch {
	case s == "app", s == "proxy":
	case kind == "uid":
		uid, err := rules.ParseUIDs(value)
		r := uid.Ranges()
		if err != nil || len(r) != 1 || r[0].First != r[0].Last {
			p.refuse("from", s, fmt.Sprintf("uid: and a number from 0 to %d", uint32(rules.MaxUID)))
			return
		}
		q.uid = r[0].First
	case kind == "host":
		value = strings.TrimSuffix(strings.TrimPrefix(value, "["), "]")
		a, err := netip.ParseAddr(value)
		switch {
		case err != nil, a.Zone() != "", a.Is4In6(), a.IsUnspecified(), a.IsLoopback(), a.IsMulticast():
			p.refuse("from", s, "host: and the address of another host")
		case q.to.IsValid() && a.Is4() != q.to.Addr().Is4():
			p.refuse("from", s, "an address of the family of --to "+q.to.String())
		}
		q.host = a
	default:
		p.refuse("from", s, acceptedSenders)
	}
}

func (q question) family() rules.Family {
	if q.to.Addr().Is4() {
		return rules.IPv4
	}
	return rules.IPv6
}

func explainPacket(cmd *cobra.Command, args []string, o Options) error {
	p := newParser(cmd, args)
	q := p.question()
	r, err := p.request(cmd, o)
	if err != nil {
		return err
	}
	log := logger(cmd, r.Verbose)
	p.logSources(log, r.config)
	runner := o.runner(log)
	var g ground
	if q.file != "" {
		g = p.savedGround(q)
	}
	if err := p.err(); err != nil {
		return err
	}
	switch {
	case q.file != "":
	case q.planned:
		g, err = p.plannedGround(cmd, r, runner, q)
	default:
		g, err = liveGround(cmd, runner, q)
	}
	if err != nil {
		return err
	}
	packet := p.packet(cmd, runner, r, q, &g)
	if err := p.err(); err != nil {
		return err
	}
	a := g.answer(packet)
	if r.format != asText {
		err = r.writeDocument(cmd.OutOrStdout(), a)
	} else {
		err = a.print(cmd.OutOrStdout())
	}
	if err == nil && a.Verdict == "unknown" {
		cmd.SilenceErrors = true
		return &UnknownError{a.Reason}
	}
	return err
}

// ground is the rules that the packet walks through, and what is known of their
// host.
type ground struct {
	what   string // names the rules
	names  []string
	sets   []rules.Set
	tables []*rules.Native // of sets, where they are of nftables, else nil
	proxy  rules.UIDs      // the proxy's users, if known
	local  []netip.Prefix
	hidden []exec.Hidden
	routes map[netip.Addr]exec.Route
	known  bool // whether local is all there is
	notes  []string
}

func hosts(list []netip.Addr) (out []netip.Prefix) {
	for _, a := range list {
		out = append(out, netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()))
	}
	return out
}

// savedGround reads the file of --rules.
func (p *parser) savedGround(q question) ground {
	g := ground{what: "the rules in " + q.file, local: hosts(q.local), known: q.local != nil}
	text, err := os.ReadFile(q.file)
	if err != nil {
		p.fault(fmt.Sprintf("--rules: %v", err))
		return g
	}
	if !q.to.IsValid() {
		return g
	}
	set, err := rules.ParseFile(q.family(), text)
	if err != nil {
		p.fault(fmt.Sprintf("--rules: %q, read as %s rules: %v", q.file, q.family(), err))
	}
	g.add(set, nil, q.file)
	return g
}

// tableName is the name of a table of nftables with its family: those of others are
// called so.
func tableName(name string, n *rules.Native) string {
	if _, table, ok := strings.Cut(name, " "); ok && table == n.Table {
		return name
	}
	return "inet " + n.Table
}

// add puts rules to the others; table is what they are made of, if that is one of
// nftables.
func (g *ground) add(set rules.Set, table *rules.Native, name string) {
	g.sets, g.tables, g.names = append(g.sets, set), append(g.tables, table), append(g.names, name)
	if table != nil && slices.Contains(table.Strange, rules.NativeDormant) {
		g.note("the table %s is dormant: no packet meets it", tableName(name, table))
	}
}

// plannedGround makes the rules of an install.
func (p *parser) plannedGround(cmd *cobra.Command, r request, runner Runner, q question) (ground, error) {
	g := ground{what: "the rules that an install with these flags makes; they are not installed", known: q.local != nil}
	r.DryRun = true
	host, err := runner.Probe(cmd.Context(), r.config.Needs())
	if host.Notes = nil; err != nil { // the notes are for an install
		host, err = r.probe(cmd, runner)
	}
	if err != nil {
		return g, explain(cmd, err)
	}
	// Where the rules go, and who would be locked out, is not asked.
	host.RemoteShells, host.Variants, host.NoNFTables = nil, nil, ""
	plan, err := tproxy.Build(r.config, host)
	if err != nil {
		if p.configError(err) {
			return g, p.err()
		}
		return g, err
	}
	g.notes, g.proxy = plan.Notes, plan.ProxyUIDs
	switch {
	case !r.modifyIPTables:
	case plan.Backend == tproxy.NFTables:
		n, err := plan.Rules.Native(tproxy.NFTable)
		if err != nil {
			return g, err
		}
		g.add(n.For(q.family()), &n, "install")
	default:
		g.add(plan.Rules.Lower(q.family()), nil, "install")
	}
	if g.local = hosts(q.local); q.local == nil {
		g.local = interfaceAddresses()
	}
	return g, nil
}

// interfaceAddresses are this machine's, as far as they can be seen.
func interfaceAddresses() (out []netip.Prefix) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p)
		}
	}
	return out
}

// liveGround reads the rules of this host.
func liveGround(cmd *cobra.Command, runner Runner, q question) (ground, error) {
	g := ground{what: "the live rules of this host", known: true}
	towards := []netip.Addr{q.to.Addr()}
	if q.sender == "host" {
		towards = append(towards, q.host)
	}
	live, err := runner.Live(cmd.Context(), towards...)
	if err != nil {
		if unseen(err) {
			if !errors.Is(err, exec.ErrUnsupported) {
				err = explain(cmd, err)
			}
			err = fmt.Errorf("%w\n  it takes no root, nor Linux, to explain rules that are not installed (give flags of install) or saved ones (--rules)", err)
		}
		return g, err
	}
	for _, l := range live.Rules {
		if l.Family == q.family() {
			g.add(l.Set, l.Table, l.Backend.String())
		}
	}
	g.hidden = slices.Clone(live.Hidden)
	for _, l := range live.Foreign {
		if l.Family == q.family() {
			g.add(l.Set, l.Table, strings.TrimPrefix(l.What, "table "))
		}
		g.hidden = slices.DeleteFunc(g.hidden, func(h exec.Hidden) bool { return h.What == l.What })
	}
	if len(g.names) > 0 {
		g.what += ", of " + strings.Join(g.names, " and ")
	}
	g.local, g.routes = live.Local, live.Routes
	for _, a := range towards {
		if live.Routes[a].Local {
			g.local = append(g.local, hosts([]netip.Addr{a})...)
		}
	}
	if q.local != nil {
		g.local = hosts(q.local)
	}
	return g, nil
}

func (g *ground) note(format string, args ...any) {
	g.notes = append(g.notes, fmt.Sprintf(format, args...))
}

// env is the host of the rules.
func (g *ground) env() (e sim.Env) {
	for _, p := range g.local {
		e.Local = append(e.Local, netip.PrefixFrom(p.Addr(), p.Addr().BitLen()))
	}
	return e
}

// packet is the one that opens the connection.
func (p *parser) packet(cmd *cobra.Command, runner Runner, r request, q question, g *ground) sim.Packet {
	k := sim.Packet{Protocol: q.protocol, Destination: q.to}
	if q.sender == "host" {
		g.incoming(p, q, &k)
		return k
	}
	k.Path = sim.Out
	switch q.sender {
	case "uid":
		k.UID, k.GID = q.uid, q.uid
		if _, groups := g.owners(); !groups.IsEmpty() {
			g.note("the group of UID %d is taken to be %[1]d", q.uid)
		}
	case "app":
		users, groups := g.owners()
		k.UID, k.GID = free(users.Union(g.proxy)), free(groups)
		g.note("app is taken to be UID %d, which no rule names", k.UID)
	case "proxy":
		if !p.proxyUser(cmd, runner, r, g) {
			return k
		}
		k.UID = g.proxy.Ranges()[0].First
		k.GID = k.UID
		g.note("the proxy is UID %d", k.UID)
	}
	g.outgoing(q, &k)
	return k
}

// incoming is for a connection from another host.
func (g *ground) incoming(p *parser, q question, k *sim.Packet) {
	k.Source = netip.AddrPortFrom(q.host, q.sourcePort)
	if g.env().IsLocal(q.host) {
		p.refuse("from", "host:"+q.host.String(), "the address of another host: this is one of the host's own; a process of it is app or uid:N")
	}
	if k.InInterface = q.iface; q.iface == "" {
		if k.InInterface = g.routes[q.host].Interface; k.InInterface != "" {
			g.note("%s comes in through %s, as the way back to it goes", q.host, k.InInterface)
		}
	}
	switch {
	case g.env().IsLocal(q.to.Addr()):
	case g.known:
		k.Path, k.OutInterface = sim.Forwarded, g.routes[q.to.Addr()].Interface
		g.note("%s is no address of the host, which forwards the packet", q.to.Addr())
	default:
		g.local = append(g.local, hosts([]netip.Addr{q.to.Addr()})...)
		g.note("%s is taken for an address of the host; --local says which are", q.to.Addr())
	}
}

// outgoing is for a connection of a process of the host.
func (g *ground) outgoing(q question, k *sim.Packet) {
	to := q.to.Addr()
	route := g.routes[to]
	source := route.Source
	switch {
	case to.IsLoopback() && to.Is4():
		source = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case g.env().IsLocal(to):
		source = to
	default:
		if k.OutInterface = q.iface; q.iface == "" {
			k.OutInterface = route.Interface
		}
		for _, p := range g.local {
			if a := p.Addr(); !source.IsValid() && a.Is4() == to.Is4() && !a.IsLoopback() && !a.IsLinkLocalUnicast() {
				source = a
			}
		}
		if !source.IsValid() {
			// Documentation addresses (RFC 5737, RFC 3849).
			source = netip.MustParseAddr("192.0.2.1")
			if to.Is6() {
				source = netip.MustParseAddr("2001:db8::1")
			}
			g.note("the host's own address is taken to be %s; --local says it", source)
			g.local = append(g.local, hosts([]netip.Addr{source})...)
		}
	}
	k.Source = netip.AddrPortFrom(source, q.sourcePort)
}

// proxyUser finds the proxy's user: that of --kuma-dp-user, else the one whom
// the rules leave alone; ok is false where neither is there, which is a fault.
func (p *parser) proxyUser(cmd *cobra.Command, runner Runner, r request, g *ground) (ok bool) {
	if name := r.config.ProxyUser; name != "" && g.proxy.IsEmpty() {
		host, err := runner.Probe(cmd.Context(), justUser(r.config))
		if err != nil && !isNumber(name) {
			p.fault(fmt.Sprintf("--kuma-dp-user: %q cannot be looked up here (%v): give the UID", name, err))
			return false
		}
		plan, err := tproxy.Build(tproxy.Config{ProxyUser: name}, tproxy.Host{Users: host.Users})
		if err != nil {
			if !p.configError(err) {
				p.fault(err.Error())
			}
			return false
		}
		g.proxy = plan.ProxyUIDs
	}
	for _, s := range g.sets {
		if g.proxy.IsEmpty() {
			g.proxy = proxyOf(s)
		}
	}
	if g.proxy.IsEmpty() {
		p.refuse("from", "proxy", "uid:N, or proxy with --kuma-dp-user: no rule says who runs the proxy")
	}
	return !g.proxy.IsEmpty()
}
