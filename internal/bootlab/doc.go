// Package bootlab boots a Debian with systemd as its first process, for tests, in
// namespaces that go away: systemd-nspawn(1) over a root that debootstrap(8) makes.
package bootlab
