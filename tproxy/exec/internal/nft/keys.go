package nft

import (
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// loads says how a key gets into a register: with meta or ct the number of the key,
// with fib the flags, with payload base and offset.
var loads = [...]load{
	rules.KeyProtocol:        {expr: "meta", key: 16},
	rules.KeyFamily:          {expr: "meta", key: 15},
	rules.KeyUID:             {expr: "meta", key: 10},
	rules.KeyGID:             {expr: "meta", key: 11},
	rules.KeyInInterface:     {expr: "meta", key: 6},
	rules.KeyOutInterface:    {expr: "meta", key: 7},
	rules.KeyMark:            {expr: "meta", key: markKey},
	rules.KeyCTState:         {expr: "ct", key: ctState},
	rules.KeySourceType:      {expr: "fib", key: fibSource},
	rules.KeyDestinationType: {expr: "fib", key: fibDest},
	rules.KeySource4:         {expr: "payload", key: baseNetwork, offset: 12, length: 4},
	rules.KeyDestination4:    {expr: "payload", key: baseNetwork, offset: 16, length: 4},
	rules.KeySource6:         {expr: "payload", key: baseNetwork, offset: 8, length: 16},
	rules.KeyDestination6:    {expr: "payload", key: baseNetwork, offset: 24, length: 16},
	rules.KeySourcePort:      {expr: "payload", key: baseTransport, offset: 0, length: 2},
	rules.KeyDestinationPort: {expr: "payload", key: baseTransport, offset: 2, length: 2},
	rules.KeyTCPFlags:        {expr: "payload", key: baseTransport, offset: 13, length: 1},
}

type load struct {
	expr           string
	key            uint32
	offset, length uint32
}

const markKey = 3 // NFT_META_MARK

// setTypes are the types of sets: the number that nft(8) gives each (enum datatypes in
// nft's datatype.h) and how long a key is. The kernel looks at the length alone.
var setTypes = map[string]setType{
	"ipv4_addr":    {number: 7, size: 4, order: udataBig},
	"ipv6_addr":    {number: 8, size: 16, order: udataBig},
	"inet_service": {number: 13, size: 2, order: udataBig},
	"uid":          {number: 24, size: 4, order: udataHost},
	"gid":          {number: 25, size: 4, order: udataHost},
}

type setType struct {
	number uint32
	size   int
	order  uint32 // udataBig or udataHost
}

// shorter is the length of the prefix where the mask is whole bytes of ones and then
// none, 0 where it is not: nft(8) then loads that much and masks nothing.
func shorter(k rules.NativeKey, first, mask []byte) int {
	if !k.Address() {
		return 0
	}
	n := 0
	for n < len(mask) && mask[n] == 0xff {
		n++
	}
	for i := n; i < len(mask); i++ {
		if mask[i] != 0 || first[i] != 0 {
			return 0
		}
	}
	return n
}
