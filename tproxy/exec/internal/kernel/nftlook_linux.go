package kernel

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"syscall"
)

// Of include/uapi/linux/netfilter/nf_tables.h.
const (
	nftaChainHook   = 4
	nftaChainPolicy = 5
	nftaChainType   = 7
	nftaHookNumber  = 1
	nftaHookPrio    = 2

	nftaRuleChain       = 2
	nftaRuleExpressions = 4
	nftaExprName        = 1
	nftaExprData        = 2

	nftaMetaKey       = 2
	nftaPayloadBase   = 2
	nftaPayloadOffset = 3
)

// The hooks of nf_tables by their number: NF_INET_* of
// include/uapi/linux/netfilter.h, and NF_NETDEV_*.
var (
	inetHooks   = []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "INGRESS"}
	netdevHooks = []string{"INGRESS", "EGRESS"}
)

// NFTBases returns the base chains of nf_tables in the calling thread's network
// namespace that see packets of IP: those of the families ip, ip6, inet and
// netdev. Errors are those of NFTTables.
func NFTBases() ([]NFTBase, error) {
	families := make(map[uint8]string, len(nftFamilies))
	for name, number := range nftFamilies {
		families[number] = name
	}
	bases, err := dump(syscall.NETLINK_NETFILTER, nftGetChain, nfgen(syscall.AF_UNSPEC), 0, func(body []byte) (NFTBase, bool) {
		b := NFTBase{Table: NFTTable{Family: families[body[0]]}}
		hooks := inetHooks
		switch b.Table.Family {
		case "ip", "ip6", "inet":
		case "netdev":
			hooks = netdevHooks
		default:
			return b, false
		}
		for typ, value := range attrs(body, nfgenHeader) {
			switch typ {
			case nftaTable:
				b.Table.Name = CString(value)
			case nftaChainName:
				b.Chain = CString(value)
			case nftaChainType:
				b.Type = CString(value)
			case nftaChainPolicy:
				n, ok := number(value)
				b.Drops = ok && n == 0 // NF_DROP
			case nftaChainHook:
				b.Hook = "?"
				for typ, value := range attrs(value, 0) {
					switch n, ok := number(value); {
					case ok && typ == nftaHookNumber && int(n) < len(hooks):
						b.Hook = hooks[n]
					case ok && typ == nftaHookPrio:
						b.Priority = int32(n)
					}
				}
			}
		}
		return b, b.Hook != ""
	})
	return bases, NFTError("chains", err)
}

func number(value []byte) (uint32, bool) {
	if len(value) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(value), true
}

// NFTNative returns what stands in rules of a table of nf_tables that iptables-nft
// does not make and its save does not show, such as "chain PREROUTING: lookup",
// each once: a rule with it means something else than what iptables-save prints.
// Errors are those of NFTTables.
func NFTNative(family, table string) ([]string, error) {
	family8, ok := nftFamilies[family]
	if !ok {
		return nil, fmt.Errorf("nf_tables family %q: want ip, ip6, inet, arp, bridge or netdev", family)
	}
	request := AppendAttr(nfgen(family8), nftaTable, append([]byte(table), 0))
	found, err := dump(syscall.NETLINK_NETFILTER, nftGetRule, request, 0, func(body []byte) (string, bool) {
		var chain, native string
		if in, ok := nftString(body, nftaTable); !ok || in != table || body[0] != family8 {
			return "", false
		}
		for typ, value := range attrs(body, nfgenHeader) {
			switch typ {
			case nftaRuleChain:
				chain = CString(value)
			case nftaRuleExpressions:
				native = nativeExpression(family, value)
			}
		}
		return "chain " + chain + ": " + native, native != ""
	})
	slices.Sort(found)
	return slices.Compact(found), NFTError(fmt.Sprintf("rules of table %s %q", family, table), err)
}

// NFTTracks reports whether a rule of nf_tables needs conntrack in the calling thread's
// network namespace, of a table that counts: as long as one does, conntrack stays there
// (nf_ct_netns_get, called in net/netfilter/nft_ct.c, nft_nat.c, nft_masq.c, nft_redir.c
// and others). It knows no rule of iptables-nft. Errors are those of NFTTables.
func NFTTracks(counts func(NFTTable) bool) (bool, error) {
	families := make(map[uint8]string, len(nftFamilies))
	for name, number := range nftFamilies {
		families[number] = name
	}
	found, err := dump(syscall.NETLINK_NETFILTER, nftGetRule, nfgen(syscall.AF_UNSPEC), 1, func(body []byte) (struct{}, bool) {
		name, _ := nftString(body, nftaTable)
		if !counts(NFTTable{Family: families[body[0]], Name: name}) {
			return struct{}{}, false
		}
		for typ, value := range attrs(body, nfgenHeader) {
			if typ != nftaRuleExpressions {
				continue
			}
			for _, element := range attrs(value, 0) {
				for typ, value := range attrs(element, 0) {
					if typ == nftaExprName && slices.Contains(tracking, CString(value)) {
						return struct{}{}, true
					}
				}
			}
		}
		return struct{}{}, false
	})
	return len(found) > 0, NFTError("rules", err)
}

// tracking are the expressions that need conntrack.
var tracking = []string{"ct", "nat", "masq", "redir", "connlimit", "flow_offload", "synproxy"}

// nativeExpression returns the first expression of a rule that is none of those
// which iptables-nft makes (nft_is_expr_compatible and nft_parse_payload and
// nft_parse_meta in iptables/nft.c and nft-shared.c, 1.8.9), or "".
func nativeExpression(family string, list []byte) string {
	for _, element := range attrs(list, 0) {
		var name string
		var data []byte
		for typ, value := range attrs(element, 0) {
			switch typ {
			case nftaExprName:
				name = CString(value)
			case nftaExprData:
				data = value
			}
		}
		switch name {
		case "match", "target", "cmp", "bitwise", "counter", "immediate", "range", "limit", "log":
		case "meta":
			switch key := attrNumber(data, nftaMetaKey); key {
			case 3, 4, 5, 6, 7, 14, 16, 17: // mark, iif, oif, iifname, oifname, nftrace, l4proto, pkttype
			default:
				return fmt.Sprintf("meta key %d", key)
			}
		case "payload":
			base, offset := attrNumber(data, nftaPayloadBase), attrNumber(data, nftaPayloadOffset)
			known := []string{"1/6", "1/9", "1/12", "1/16", "2/0", "2/2", "2/13"} // fragment, protocol, addresses; ports, TCP flags
			if family == "ip6" {
				known = []string{"1/6", "1/8", "1/24", "2/0", "2/2", "2/13"}
			}
			if place := fmt.Sprintf("%d/%d", base, offset); !slices.Contains(known, place) {
				return "payload " + strings.Replace(place, "/", " at ", 1)
			}
		default:
			return name
		}
	}
	return ""
}

// attrNumber is an attribute that is a number, or one that none is.
func attrNumber(body []byte, attr uint16) uint32 {
	for typ, value := range attrs(body, 0) {
		if n, ok := number(value); ok && typ == attr {
			return n
		}
	}
	return 1<<32 - 1
}
