// Package tproxy says what transparent proxying redirects on a host: a [Config],
// what was observed of the machine as a [Host], and [Build], which makes of both a
// [Plan]: the rules as data, each with its reason, the steps beside them with
// their undo, and the backend with the reason for its choice.
//
// The package is pure: it reads nothing, changes nothing and never logs. The same
// Config and Host give the same Plan on any system, which does for a dry run and
// for golden files; exec.Runner observes a machine and carries a Plan out.
package tproxy
