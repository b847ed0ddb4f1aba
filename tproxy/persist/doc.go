// Package persist puts the rules of a plan where they outlive a restart, as functions
// from bytes to bytes: [MergeDirect] and [RemoveDirect] edit a direct.xml of firewalld
// (firewalld.direct(5)), [ReadDirect] reads one; [Unit], [NamesUnit] and [DropIn] are for
// /etc/systemd/system (systemd.unit(5)). Nothing here touches a file.
//
// Upstream the direct interface is deprecated, in favour of policies, which cannot
// redirect what a process of the host sends (firewalld issue 1226).
package persist
