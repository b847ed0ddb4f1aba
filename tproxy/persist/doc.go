// Package persist puts the rules of a plan where they outlive a restart, as functions
// from bytes to bytes: [MergeDirect] and [RemoveDirect] edit a direct.xml of firewalld
// (firewalld.direct(5)), [ReadDirect] reads one; [Unit], [NamesUnit] and [DropIn] are for
// /etc/systemd/system (systemd.unit(5)). Nothing here touches a file.
//
// Upstream the direct interface is deprecated (firewalld.direct(5)), in favour of
// policies, which cannot redirect what a process of the host sends (firewalld issue 1226).
// It works in the releases there are. What else can be done is a table of nftables of
// one's own, which firewalld leaves alone, or a systemd unit behind firewalld.service that
// installs again.
//
// Others write the file too: firewall-cmd --permanent --direct and firewall-cmd
// --runtime-to-permanent write it anew, without comments. What is ours is known by its
// elements then. After a removal firewalld has to reload before its own direct rules find
// their places by number again.
package persist
