package kernel

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Of include/uapi/linux/netlink.h, nfnetlink.h and rtnetlink.h, missing in package
// syscall.
const (
	solNetlink           = 270
	netlinkAddMembership = 1
	nfnlgrpNFTables      = 7
	rtnlgrpLink          = 1
	rtnlgrpIPv4IfAddr    = 5
	rtnlgrpIPv6IfAddr    = 9
)

// Monitor hears of changes in the network namespace of the thread that opened it.
type Monitor struct{ files []*os.File }

// OpenMonitor opens a Monitor for changes of the rules of nf_tables, of interfaces and
// of their addresses. ip_tables tells nobody of changes. It takes CAP_NET_ADMIN.
func OpenMonitor() (*Monitor, error) {
	m := &Monitor{}
	for _, g := range []struct {
		proto  int
		groups []int
	}{
		{syscall.NETLINK_NETFILTER, []int{nfnlgrpNFTables}},
		{syscall.NETLINK_ROUTE, []int{rtnlgrpLink, rtnlgrpIPv4IfAddr, rtnlgrpIPv6IfAddr}},
	} {
		fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, g.proto)
		if g.proto == syscall.NETLINK_NETFILTER && errors.Is(err, syscall.EPROTONOSUPPORT) {
			continue // a kernel without nfnetlink has no nf_tables
		}
		if err != nil {
			m.Close()
			return nil, fmt.Errorf("netlink socket for changes: %w", err)
		}
		// The runtime waits for it, and Close wakes whom it keeps waiting.
		m.files = append(m.files, os.NewFile(uintptr(fd), "netlink"))
		if err := syscall.Bind(fd, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil {
			m.Close()
			return nil, fmt.Errorf("netlink socket for changes: %w", err)
		}
		for _, group := range g.groups {
			if err := syscall.SetsockoptInt(fd, solNetlink, netlinkAddMembership, group); err != nil {
				m.Close()
				return nil, fmt.Errorf("join netlink group %d: %w", group, err)
			}
		}
	}
	return m, nil
}

// Watch calls changed for each change, from goroutines of its own, until Close. What
// changed is not said; several changes may be one call, and what came too fast to be
// kept is one too.
func (m *Monitor) Watch(changed func()) {
	for _, f := range m.files {
		go func() {
			buf := make([]byte, receiveBuffer)
			for {
				// ENOBUFS is a change that was lost (netlink(7)).
				if _, err := f.Read(buf); err != nil && !errors.Is(err, syscall.ENOBUFS) {
					return
				}
				changed()
			}
		}()
	}
}

// Close ends it.
func (m *Monitor) Close() {
	for _, f := range m.files {
		_ = f.Close()
	}
}
