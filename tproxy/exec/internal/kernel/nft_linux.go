package kernel

import (
	"errors"
	"fmt"
	"syscall"
)

// Of include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h.
const (
	nftSubsystem = 10 << 8 // NFNL_SUBSYS_NFTABLES
	nftGetTable  = nftSubsystem | 1
	nftGetChain  = nftSubsystem | 4
	nftGetRule   = nftSubsystem | 7

	nfgenHeader = 4 // struct nfgenmsg: family, version, res_id

	// Attribute 1 is the table's name of a table, a chain and a rule alike.
	nftaTable     = 1 // NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE
	nftaChainName = 3
)

// The NFPROTO_* of include/uapi/linux/netfilter.h.
var nftFamilies = map[string]uint8{"inet": 1, "ip": 2, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}

// NFTTables returns the tables of nf_tables in the calling thread's network
// namespace. It makes none, but asking may load the kernel's module. Without
// CAP_NET_ADMIN the error is fs.ErrPermission; where the kernel has no
// nf_tables, errors.ErrUnsupported.
func NFTTables() ([]NFTTable, error) {
	names := make(map[uint8]string, len(nftFamilies))
	for name, number := range nftFamilies {
		names[number] = name
	}
	tables, err := dump(syscall.NETLINK_NETFILTER, nftGetTable, nfgen(syscall.AF_UNSPEC), 0, func(body []byte) (NFTTable, bool) {
		name, ok := nftString(body, nftaTable)
		if !ok {
			return NFTTable{}, false
		}
		return NFTTable{Family: names[body[0]], Name: name}, true
	})
	return tables, NFTError("tables", err)
}

// NFTChains returns the names of the chains of a table of nf_tables, none if
// there is no such table. Errors are those of NFTTables.
func NFTChains(family, table string) ([]string, error) {
	number, ok := nftFamilies[family]
	if !ok {
		return nil, fmt.Errorf("nf_tables family %q: want ip, ip6, inet, arp, bridge or netdev", family)
	}
	// The kernel dumps the chains of all the family's tables
	// (nf_tables_dump_chains, net/netfilter/nf_tables_api.c).
	chains, err := dump(syscall.NETLINK_NETFILTER, nftGetChain, nfgen(number), 0, func(body []byte) (string, bool) {
		if in, ok := nftString(body, nftaTable); !ok || in != table || body[0] != number {
			return "", false
		}
		return nftString(body, nftaChainName)
	})
	return chains, NFTError(fmt.Sprintf("chains of table %s %q", family, table), err)
}

// NFTRules says whether a table of nf_tables holds a rule; it does not if there
// is no such table. Errors are those of NFTTables.
func NFTRules(family, table string) (bool, error) {
	number, ok := nftFamilies[family]
	if !ok {
		return false, fmt.Errorf("nf_tables family %q: want ip, ip6, inet, arp, bridge or netdev", family)
	}
	request := AppendAttr(nfgen(number), nftaTable, append([]byte(table), 0))
	rules, err := dump(syscall.NETLINK_NETFILTER, nftGetRule, request, 1, func(body []byte) (struct{}, bool) {
		in, ok := nftString(body, nftaTable)
		return struct{}{}, ok && in == table && body[0] == number
	})
	return len(rules) > 0, NFTError(fmt.Sprintf("rules of table %s %q", family, table), err)
}

func nfgen(family uint8) []byte {
	return []byte{family, 0, 0, 0} // NFNETLINK_V0, res_id 0
}

func nftString(body []byte, attr uint16) (string, bool) {
	for typ, value := range attrs(body, nfgenHeader) {
		if typ == attr {
			return CString(value), true
		}
	}
	return "", false
}

// NFTError knows the ways in which a kernel without nf_tables says so: no
// nfnetlink at all, or nobody for the subsystem (EINVAL: nfnetlink_rcv_msg,
// net/netfilter/nfnetlink.c).
func NFTError(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.EOPNOTSUPP),
		errors.Is(err, syscall.EPROTONOSUPPORT), errors.Is(err, syscall.ESOCKTNOSUPPORT), errors.Is(err, syscall.EAFNOSUPPORT):
		return fmt.Errorf("nf_tables %s: %w: %w", what, errors.ErrUnsupported, err)
	}
	return fmt.Errorf("nf_tables %s: %w", what, err)
}
