package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
)

// Of include/uapi/linux/if_link.h and veth.h, missing in package syscall.
const (
	iflaLinkInfo      = 18
	iflaIfAlias       = 20
	iflaAFSpec        = 26
	iflaGroup         = 27
	iflaInfoKind      = 1
	iflaInfoData      = 2
	vethInfoPeer      = 1
	inet6AddrGenMode  = 8
	addrGenModeNone   = 1
	ifinfoHeader      = syscall.SizeofIfInfomsg
	ifinfoIndex       = 4 // of struct ifinfomsg (rtnetlink(7))
	ifinfoFlags       = 8
	maxInterfaceName  = syscall.IFNAMSIZ - 1
	peerSuffix        = "-p"
	maxInterfaceAlias = 255 // IFALIASZ less its NUL
)

// AddLink makes an interface that leads nowhere, in the calling thread's network
// namespace, with one address and without a link-local one, and brings it up. It is a
// dummy, or, where the kernel has none, a pair of veth; its name has at most 13
// bytes. What fails is taken back. The error is fs.ErrExist where the name is taken.
//
// Its group tells it from others' of that name: the kernel sets it when it makes the
// interface (rtnl_create_link, net/core/rtnetlink.c), so that there is no moment
// without.
func AddLink(name, alias string, address netip.Prefix) (Link, error) {
	if len(name)+len(peerSuffix) > maxInterfaceName || len(alias) > maxInterfaceAlias {
		return Link{}, fmt.Errorf("interface %q: its name or its alias is too long", name)
	}
	err := newLink(name, "dummy", nil)
	if errors.Is(err, syscall.EOPNOTSUPP) { // no such kind (rtnl_newlink)
		peer := name + peerSuffix
		err = newLink(name, "veth", AppendAttr(nil, vethInfoPeer, linkHeader(0, peer)))
		if errors.Is(err, syscall.EEXIST) {
			err = fmt.Errorf("it takes %s as well, and one of the two is there already: %w", peer, err)
		}
		if err == nil {
			if err = setLink(peer, alias); err != nil {
				err = errors.Join(err, delLink(name))
			}
		}
	}
	if err != nil {
		return Link{}, fmt.Errorf("add the interface %s: %w", name, err)
	}
	l, err := fillLink(name, alias, address)
	if err != nil {
		return Link{}, errors.Join(fmt.Errorf("set up the interface %s: %w", name, err), delLink(name))
	}
	return l, nil
}

func fillLink(name, alias string, address netip.Prefix) (Link, error) {
	l, _, err := FindLink(name)
	if err != nil {
		return l, err
	}
	body, err := interfaceAddress(address, l.Index)
	if err != nil {
		return l, err
	}
	if err := change(syscall.NETLINK_ROUTE, syscall.RTM_NEWADDR, syscall.NLM_F_CREATE|syscall.NLM_F_EXCL, body); err != nil {
		return l, fmt.Errorf("address %s: %w", address, err)
	}
	return l, setLink(name, alias)
}

// linkHeader is a struct ifinfomsg and the interface's name.
func linkHeader(flags uint32, name string) []byte {
	body := make([]byte, ifinfoHeader)
	binary.NativeEndian.PutUint32(body[ifinfoFlags:], flags)
	binary.NativeEndian.PutUint32(body[ifinfoFlags+4:], flags) // those that change
	body = AppendAttr(body, syscall.IFLA_IFNAME, append([]byte(name), 0))
	return AppendAttr(body, iflaGroup, binary.NativeEndian.AppendUint32(nil, LinkGroup))
}

func newLink(name, kind string, data []byte) error {
	info := AppendAttr(nil, iflaInfoKind, []byte(kind))
	if data != nil {
		info = AppendAttr(info, iflaInfoData, data)
	}
	return change(syscall.NETLINK_ROUTE, syscall.RTM_NEWLINK, syscall.NLM_F_CREATE|syscall.NLM_F_EXCL,
		AppendAttr(linkHeader(0, name), iflaLinkInfo, info))
}

// setLink brings an interface up. A link-local address would have services speak
// there that speak on every link.
func setLink(name, alias string) error {
	// As RTM_NEWLINK without NLM_F_CREATE, which finds the interface by its name.
	body := AppendAttr(linkHeader(syscall.IFF_UP, name), iflaIfAlias, append([]byte(alias), 0))
	spec := AppendAttr(nil, syscall.AF_INET6, AppendAttr(nil, inet6AddrGenMode, []byte{addrGenModeNone}))
	err := change(syscall.NETLINK_ROUTE, syscall.RTM_NEWLINK, 0, AppendAttr(body, iflaAFSpec, spec))
	if errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EOPNOTSUPP) {
		err = change(syscall.NETLINK_ROUTE, syscall.RTM_NEWLINK, 0, body) // without IPv6
	}
	return err
}

// FindLink looks for an interface by its name in the calling thread's network
// namespace.
func FindLink(name string) (Link, bool, error) {
	n, err := OpenNetlink(syscall.NETLINK_ROUTE)
	if err != nil {
		return Link{}, false, fmt.Errorf("interface %s: %w", name, err)
	}
	defer n.Close()
	request := AppendAttr(make([]byte, ifinfoHeader), syscall.IFLA_IFNAME, append([]byte(name), 0))
	if err := n.Send(syscall.RTM_GETLINK, 0, request); err != nil {
		return Link{}, false, fmt.Errorf("interface %s: %w", name, err)
	}
	var l Link
	_, err = n.Receive(func(body []byte) bool {
		if len(body) < ifinfoHeader {
			return false
		}
		l.Index = binary.NativeEndian.Uint32(body[ifinfoIndex:])
		l.Up = binary.NativeEndian.Uint32(body[ifinfoFlags:])&syscall.IFF_UP != 0
		for typ, value := range attrs(body, ifinfoHeader) {
			if typ == iflaGroup && len(value) == 4 {
				l.Ours = binary.NativeEndian.Uint32(value) == LinkGroup
			}
		}
		return false
	})
	switch {
	case errors.Is(err, syscall.ENODEV):
		return Link{}, false, nil
	case err == nil && l.Index == 0:
		err = syscall.EBADMSG
		fallthrough
	case err != nil:
		return Link{}, false, fmt.Errorf("interface %s: %w", name, err)
	}
	l.Addresses, err = addresses(func(index uint32, p netip.Prefix) bool {
		return index == l.Index && !p.Addr().IsLinkLocalUnicast()
	})
	return l, err == nil, err
}

// DelLink removes an interface, a pair of veth with its peer; removed is false if it
// is gone already.
func DelLink(l Link) (removed bool, err error) {
	body := make([]byte, ifinfoHeader)
	binary.NativeEndian.PutUint32(body[ifinfoIndex:], l.Index)
	err = change(syscall.NETLINK_ROUTE, syscall.RTM_DELLINK, 0, body)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, syscall.ENODEV):
		return false, nil
	}
	return false, fmt.Errorf("remove the interface with the index %d: %w", l.Index, err)
}

// delLink is DelLink by name.
func delLink(name string) error {
	return change(syscall.NETLINK_ROUTE, syscall.RTM_DELLINK, 0, linkHeader(0, name))
}
