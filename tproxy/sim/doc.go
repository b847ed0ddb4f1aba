// Package sim walks packets through a [rules.Set] as the kernel would: the base
// chains of a packet's path in the order of their priorities
// (linux/netfilter_ipv4.h), jumps, gotos, returns and policies included. [Walk]
// says what becomes of the packet and which rules it met, [Decide] the first
// alone, and [Follow] goes on through the proxy until the connection ends.
//
// A DNAT rule of others ends the walk: the packet goes elsewhere. [WalkAll] walks
// through the rules of both variants of iptables at once.
//
// What a walk cannot know, such as a match that the parser left opaque, makes
// the verdict [Unknown]; it is never guessed and never skipped. Source NAT does
// not change where a packet goes, so nat INPUT is not walked, and nat POSTROUTING
// for packets that come in again through lo alone: then their source may be
// another.
//
// The package is pure: it reads no file, starts no process and never logs.
package sim
