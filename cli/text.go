package cli

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/exec"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// The last lines of a run that succeeded: Kuma's own, for which others look.
const (
	installed   = "transparent proxy setup completed successfully"
	uninstalled = "transparent proxy cleanup completed successfully"
)

// page is text that is made line by line.
type page struct{ bytes.Buffer }

func (p *page) linef(format string, args ...any) { fmt.Fprintf(p, format+"\n", args...) }

// notes writes each note once.
func (p *page) notes(lists ...[]string) {
	for _, n := range distinct(lists...) {
		p.linef("Note: %s", n)
	}
}

func distinct(lists ...[]string) []string {
	out := []string{}
	for _, s := range slices.Concat(lists...) {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// commented writes every line of text as a comment, so that nothing in it can be
// taken for a line of a script.
func (p *page) commented(text []byte) {
	for line := range strings.Lines(string(text)) {
		p.linef("# %s", strings.TrimRight(line, "\r\n"))
	}
}

func (p *page) script(of string, script []byte) {
	p.linef("### %s ###", of)
	p.Write(script)
}

// nothing is the outcome where the rules are not to be touched, and there is
// nothing else yet.
func (r request) nothing(cmd *cobra.Command) error {
	note := "nothing to do: --modify-iptables=false leaves iptables alone, and there is nothing else to modify"
	if r.within > 0 {
		note += ", or to confirm"
	}
	if r.format != asText {
		return r.writeDocument(cmd.OutOrStdout(), installJSON{DryRun: r.DryRun, Families: []familyJSON{}, Config: r.config, Steps: []string{}, Notes: []string{note}})
	}
	var p page
	if r.DryRun {
		p.commented([]byte("dry run: " + note))
	} else {
		p.linef("%s\n%s", note, installed)
	}
	return write(cmd.OutOrStdout(), p.Bytes())
}

// printPlan prints what an install would do to what is there, with the scripts ready for
// iptables-restore --noflush: from "### IPv4 ###", or "### IPv6 ###", up to the
// next such line or the end; or with one for nft -f, from "### nftables ###" on.
func (r request) printPlan(w io.Writer, plan *tproxy.Plan, before *exec.Installation, found *exec.Preflight) error {
	if r.format != asText {
		out := planJSON(plan, before)
		out.Preflight = preflightOf(found)
		return r.writeDocument(w, out)
	}
	var head, p page
	head.linef("dry run: nothing was changed")
	head.linef("backend: %s (%s)", plan.Backend, plan.BackendWhy)
	for i, s := range plan.Steps {
		head.linef("step %d: %s\n  undo: %s", i+1, s, s.Undo())
	}
	head.former(before, plan.Config, r.version)
	head.decisions(plan)
	head.notes(plan.Notes)
	head.preflight(found)
	if n := tableOf(plan); n != nil {
		head.linef("the script is that of a fresh install, for nft -f; the record of the install comes with it")
		p.commented(head.Bytes())
		p.script("nftables", n.Text())
		return write(w, p.Bytes())
	}
	head.linef("the scripts are those of a fresh install, for iptables-restore --noflush")
	p.commented(head.Bytes())
	for _, f := range plan.Families {
		if script := plan.Rules.IPTables(f); len(script) > 0 {
			p.script(f.String(), script)
		}
	}
	return write(w, p.Bytes())
}

// printInstalled prints what an install did and what is left to do.
func (r request) printInstalled(w io.Writer, plan *tproxy.Plan, report *exec.Report) error {
	if r.format != asText {
		return r.writeDocument(w, r.installJSON(plan, report))
	}
	var p page
	for _, f := range report.Families {
		p.family(plan, report, f)
	}
	p.otherSteps(report)
	if report.Retries > 0 {
		p.linef("Tried again, as other programs held the lock or changed their rules meanwhile: %d", report.Retries)
	}
	p.former(report.Before, plan.Config, r.version)
	p.decisions(plan)
	p.notes(plan.Notes, report.Notes)
	p.dataplane(r.dataplane(plan))
	p.kumaDP(plan)
	p.trial(report.Trial, r.path)
	p.linef("%s", installed)
	return write(w, p.Bytes())
}

// unsaid warns that the host was changed as asked, and the report of it was
// lost: that is no failure, which would mean a host that is as before.
func unsaid(cmd *cobra.Command, err error) {
	if err != nil {
		cmd.PrintErrf("Warning: done, but the report of it could not be written: %v\n", err)
	}
}

func (p *page) family(plan *tproxy.Plan, report *exec.Report, f exec.FamilyReport) {
	by := f.Backend.String()
	if f.Backend == tproxy.NFTables {
		by = "nftables, in the table inet " + tproxy.NFTable
	}
	families := plan.Families
	who := f.Family.String()
	if f.Family == 0 && len(families) == 1 { // the table is of one alone
		who = families[0].String()
	}
	switch {
	case f.Backend != report.Backend, f.Family != 0 && !slices.Contains(families, f.Family):
		p.linef("%s: former rules of ours taken out of %s: %s", f.Family, f.Backend, counted(f.Changes))
	case len(f.Changes) == 0 && f.Script == nil:
		p.linef("%s: nothing to do: already installed, %d rules by %s (%s)", who, countFor(plan, f), by, report.Why)
	default:
		p.linef("%s: %d rules by %s (%s)", who, countFor(plan, f), by, report.Why)
	}
}

// tableOf is the table of nftables that a plan makes; nil where it makes none.
func tableOf(plan *tproxy.Plan) *rules.Native {
	if plan.Backend != tproxy.NFTables {
		return nil
	}
	n, err := plan.Rules.Native(tproxy.NFTable)
	if err != nil {
		return nil // no plan has such rules
	}
	return &n
}

// countFor counts the rules that stand in a family, or in the table for both.
func countFor(plan *tproxy.Plan, f exec.FamilyReport) int {
	if n := tableOf(plan); n != nil && f.Family == 0 {
		return n.Count()
	}
	return countRules(plan.Rules, f.Family)
}

// scriptOf heads a script.
func scriptOf(f exec.FamilyReport) string {
	if f.Backend == tproxy.NFTables {
		return "nftables"
	}
	return f.Family.String()
}

// otherSteps says what was done beside the rules, of which the families tell.
func (p *page) otherSteps(report *exec.Report) {
	var told []string
	for _, f := range report.Families {
		told = append(told,
			tproxy.ReplaceRules{Family: f.Family, Backend: f.Backend}.String(),
			tproxy.RemoveRules{Family: f.Family, Backend: f.Backend}.String())
	}
	for _, s := range report.Steps {
		if !slices.Contains(told, s) {
			p.linef("Done: %s", s)
		}
	}
}

// countRules counts the rules of a family as the kernel has them.
func countRules(s rules.Set, f rules.Family) (n int) {
	for line := range bytes.Lines(s.IPTables(f)) {
		if line[0] == '-' {
			n++
		}
	}
	return n
}

// counted says how many rules and chains changes are about.
func counted(changes []rules.Change) string {
	chains := 0
	for _, c := range changes {
		if c.Kind == rules.ExtraChain || c.Kind == rules.MissingChain {
			chains++
		}
	}
	return fmt.Sprintf("%d rules, %d chains", len(changes)-chains, chains)
}

// decisions says what goes where and what is left alone.
func (p *page) decisions(plan *tproxy.Plan) {
	c := plan.Config
	if c.Inbound.Off {
		p.linef("Inbound: not redirected")
	} else {
		p.linef("Inbound: to port %d, except %s", c.Inbound.Port, listed(inboundExcluded(plan)))
	}
	if c.Outbound.Off {
		p.linef("Outbound: not redirected")
	} else {
		p.linef("Outbound: to port %d, except %s", c.Outbound.Port, listed(outboundExcluded(plan)))
	}
	overTCP := ""
	if plan.DNSOverTCP() {
		overTCP = ", also over TCP where outbound does not leave it alone"
	}
	switch {
	case c.DNS.CaptureAll:
		p.linef("DNS: every query to port %d, except the proxy's%s", c.DNS.Port, overTCP)
	case c.DNS.Redirect:
		p.linef("DNS: queries to %s to port %d, except the proxy's%s", listed(texts(plan.Nameservers)), c.DNS.Port, overTCP)
	}
	if !c.Inbound.Off && !sshProtected(c) {
		p.linef("SSH: port %d is redirected like any other (%s)", tproxy.SSHPort, sshWhy(plan))
	}
	if plan.Persist != tproxy.PersistNone { // which is asked for, or a note
		p.linef("After a restart: comes back by %s (%s)", plan.Persist, plan.PersistWhy)
	}
}

func sshProtected(c tproxy.Config) bool {
	return !c.Pod && !c.Inbound.CaptureSSH || c.Inbound.ExcludePorts.Contains(tproxy.SSHPort)
}

func sshWhy(plan *tproxy.Plan) string {
	switch {
	case plan.Host.Pod != "":
		return "a pod: " + plan.Host.Pod
	case plan.Config.Pod:
		return "a pod"
	}
	return "--capture-ssh"
}

func inboundExcluded(plan *tproxy.Plan) (out []string) {
	in := plan.Config.Inbound
	if sshProtected(plan.Config) {
		out = append(out, fmt.Sprintf("SSH (port %d)", tproxy.SSHPort))
	}
	if !in.ExcludePorts.IsEmpty() {
		out = append(out, "ports "+in.ExcludePorts.String())
	}
	if len(in.ExcludeIPs) > 0 {
		out = append(out, "sources "+strings.Join(texts(in.ExcludeIPs), ","))
	}
	return out
}

func outboundExcluded(plan *tproxy.Plan) []string {
	o := plan.Config.Outbound
	out := []string{"the proxy's own (UID " + plan.ProxyUIDs.String() + ")"}
	if !o.ExcludePorts.IsEmpty() {
		out = append(out, "ports "+o.ExcludePorts.String())
	}
	for _, e := range o.ExcludePortsForUIDs {
		out = append(out, "proto:ports:uids "+e.String())
	}
	if len(o.ExcludeIPs) > 0 {
		out = append(out, "destinations "+strings.Join(texts(o.ExcludeIPs), ","))
	}
	return out
}

func texts[T fmt.Stringer](in []T) []string {
	out := make([]string, len(in))
	for i, v := range in {
		out[i] = v.String()
	}
	return out
}

func listed(items []string) string {
	if len(items) == 0 {
		return "nothing"
	}
	return strings.Join(items, "; ")
}

// dataplane is the section transparentProxying of Kuma's Dataplane resource.
type dataplane struct {
	RedirectPortInbound  uint16 `json:"redirectPortInbound"`
	RedirectPortOutbound uint16 `json:"redirectPortOutbound"`
	IPFamilyMode         string `json:"ipFamilyMode,omitempty"`
}

// dataplane returns what the Dataplane must say for a plan: 0 for a direction
// that is off, the mode only where somebody chose one.
func (r request) dataplane(plan *tproxy.Plan) (d dataplane) {
	if !plan.Config.Inbound.Off {
		d.RedirectPortInbound = plan.Config.Inbound.Port
	}
	if !plan.Config.Outbound.Off {
		d.RedirectPortOutbound = plan.Config.Outbound.Port
	}
	switch {
	case !r.modeChosen:
	case plan.Config.IPFamilyMode == tproxy.IPv4Only:
		d.IPFamilyMode = "IPv4"
	default:
		d.IPFamilyMode = "DualStack"
	}
	return d
}

func (p *page) dataplane(d dataplane) {
	p.linef("\nThe Dataplane resource must carry:\n")
	p.linef("networking:\n  transparentProxying:")
	p.linef("    redirectPortInbound: %d\n    redirectPortOutbound: %d", d.RedirectPortInbound, d.RedirectPortOutbound)
	if d.IPFamilyMode != "" {
		p.linef("    ipFamilyMode: %s", d.IPFamilyMode)
	}
}

// kumaDP says how to run the proxy as the user whose connections are not
// redirected.
func (p *page) kumaDP(plan *tproxy.Plan) {
	user := proxyUser(plan)
	p.linef("\nRun kuma-dp as user %s: with systemd, User=%s in the [Service] section; from a shell:\n", user, user)
	if isNumber(user) { // runuser(1) wants a name
		p.linef("setpriv --reuid=%s --clear-groups -- kuma-dp run ...\n", user)
	} else {
		p.linef("runuser -u %s -- kuma-dp run ...\n", user)
	}
}

// proxyUser is the proxy's user by name where it has one, else by number.
func proxyUser(plan *tproxy.Plan) string {
	for _, u := range plan.Host.Users {
		if plan.ProxyUIDs.Contains(u.UID) {
			return u.Name
		}
	}
	for _, r := range plan.ProxyUIDs.Ranges() {
		return strconv.FormatUint(uint64(r.First), 10)
	}
	return ""
}

// printRemoval prints what an uninstall would do; known is false where the
// machine could not be looked at.
func (r run) printRemoval(w io.Writer, report *exec.Report, known bool) error {
	if r.format != asText {
		return r.writeDocument(w, removalJSON(r, report))
	}
	var head, p page
	head.linef("dry run: nothing was changed")
	if known && len(report.Steps) == 0 && !anyChange(report) {
		head.linef("nothing to do: nothing of ours is installed")
	}
	for i, s := range report.Steps {
		head.linef("step %d: %s", i+1, s)
	}
	head.notes(report.Notes)
	p.commented(head.Bytes())
	for _, f := range report.Families {
		if len(f.Script) > 0 {
			p.script(scriptOf(f), f.Script)
		}
	}
	return write(w, p.Bytes())
}

func anyChange(report *exec.Report) bool {
	return report.Changed || slices.ContainsFunc(report.Families, func(f exec.FamilyReport) bool { return len(f.Changes) > 0 })
}

// printUninstalled prints what an uninstall did.
func (r run) printUninstalled(w io.Writer, report *exec.Report) error {
	if r.format != asText {
		return r.writeDocument(w, removalJSON(r, report))
	}
	var p page
	if !anyChange(report) {
		p.linef("nothing to do: nothing of ours was installed")
	}
	for _, f := range report.Families {
		if len(f.Changes) > 0 {
			p.linef("%s: taken out of %s: %s", f.Family, f.Backend, counted(f.Changes))
		}
	}
	p.otherSteps(report)
	p.notes(report.Notes)
	p.linef("%s", uninstalled)
	return write(w, p.Bytes())
}
