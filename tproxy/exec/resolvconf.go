package exec

import (
	"github.com/kumahq/kuma-tproxy/tproxy/dns"
	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/files"
)

// ResolvConf returns the dns.Manager of a resolv.conf of this machine, which makes the
// control plane's DNS server the first nameserver of the file and takes it out again.
// It observes mounts, network namespaces and processes; the file is read and written by
// the Manager's methods alone. Elsewhere than on Linux these return an error that is
// ErrUnsupported.
//
// A file of the host that shows in another network namespace than the host's is refused
// unless meant is true: somebody named it for this very purpose.
//
// Apply and Remove of a Runner do not touch resolv.conf.
func ResolvConf(path string, meant bool) dns.Manager {
	m := files.Manager(path, func(name string) string {
		_, target := system{}.find(name)
		return target
	})
	m.Namespaces.Meant = meant
	return m
}
