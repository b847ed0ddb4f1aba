// Package rules holds firewall rules as data: a [Set] of chains, each a list of
// [Rule] values made of sealed [Match] and [Action] types. It renders a Set to
// iptables-restore scripts ([Set.IPTables]), reads back what iptables-save
// prints ([ParseSave]), compares two Sets as data ([Compare]) and writes the one
// script that leads from what is there to what should be ([Transition]).
//
// The package is pure: it reads no file, starts no process and never logs.
package rules
