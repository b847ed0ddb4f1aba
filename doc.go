// Package kumatproxy is the root of a module for transparent proxying: it
// redirects the TCP connections and the DNS queries of a Linux host, or of a
// pod, to the sidecar proxy of a Kuma mesh, with iptables rules, and takes the
// redirection out again. The package itself holds nothing.
//
// Where to look next:
//
//   - [github.com/kumahq/kuma-tproxy/tproxy]: a Config says what to redirect,
//     Build makes a Plan of it. Pure: it runs on any system and changes nothing.
//   - [github.com/kumahq/kuma-tproxy/tproxy/rules]: a plan's rules as data, and
//     as text for iptables-restore.
//   - [github.com/kumahq/kuma-tproxy/tproxy/sim]: what becomes of a packet under
//     these rules, and which of them decided it.
//   - [github.com/kumahq/kuma-tproxy/tproxy/exec]: observes a machine, applies a
//     plan and removes it. It is the only writer of rules.
//   - The folder examples: one program for each use of the library.
//
// # The one hazard
//
// You can lock yourself out. A rule that captures the port by which you operate
// a machine sends your next login to a proxy that may not be running, and the
// mend then takes a console. Hence port 22 is never captured on a host unless
// Inbound.CaptureSSH says so; Build refuses a plan that captures another port
// on which exec found a way into the host; and in front of the first Apply on a
// machine that is reached by other means than SSH, list their ports in
// Inbound.ExcludePorts and look at the plan: it is text before it is rules.
package kumatproxy
