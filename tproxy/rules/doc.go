// Package rules holds firewall rules as data: a [Set] of chains, each a list of
// [Rule] values made of sealed [Match] and [Action] types. It renders a Set to
// iptables-restore scripts ([Set.IPTables]), reads back what iptables-save
// prints ([ParseSave]), compares two Sets as data ([Compare]) and writes the one
// script that leads from what is there to what should be ([Transition]).
//
// The same Set is one table of nftables ([Set.Native], [Set.NFTables]), in which any
// number of ports or addresses is one look-up; [NativeTransition] are the commands that
// lead from one table to another, and [Native.Set] is the way back.
//
// The package is pure: it reads no file, starts no process and never logs.
package rules
