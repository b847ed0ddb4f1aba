// Package nft writes and reads a table of nf_tables over netlink, in the network
// namespace of the thread that opened the connection.
//
// The encoding is its own: it writes what nft(8) 1.0.6 writes for the text of the same
// table, it knows for each message which command it belongs to, and in reading it
// drops nothing that it does not know.
//
// Everything but Linux answers errors.ErrUnsupported; encoding and decoding are pure.
package nft

import (
	"errors"
	"fmt"
	"syscall"
)

// ErrChanged is for a batch that was made for a generation of the rules that is not the
// last one any more: somebody else has committed since. Nothing was done. Read again.
var ErrChanged = errors.New("the rules have changed since they were read")

// ErrUnknown is for a batch whose outcome the kernel did not get to tell: all of it was
// done, or nothing. Read again.
var ErrUnknown = errors.New("the kernel's answer was lost")

// Error is the kernel's refusal of a batch, of which nothing was done.
type Error struct {
	// Command is the index of the first command that is refused, -1 where it is the
	// batch.
	Command int
	Errno   syscall.Errno
	// Message is what the kernel says beyond Errno (NLMSGERR_ATTR_MSG), mostly nothing.
	Message string
	// Offset is that of the attribute which the kernel complains of, in bytes from the
	// start of its message (NLMSGERR_ATTR_OFFS); 0 is none.
	Offset uint32
	// More is how many other messages the kernel refused too.
	More int

	changed bool
}

func (e *Error) Error() string {
	what := "batch"
	if e.Command >= 0 {
		what = fmt.Sprintf("command %d", e.Command)
	}
	why := e.Errno.Error()
	if e.changed {
		why = ErrChanged.Error()
	}
	if e.Message != "" {
		why += ": " + e.Message
	}
	return fmt.Sprintf("nf_tables %s: %s", what, why)
}

// Unwrap is Errno, and ErrChanged where that is what it means.
func (e *Error) Unwrap() []error {
	if e.changed {
		return []error{e.Errno, ErrChanged}
	}
	return []error{e.Errno}
}

// Of include/uapi/linux/netlink.h, nfnetlink.h and nf_tables.h. Package syscall has
// some of them, on Linux alone.
const (
	netlinkHeader = 16
	attrHeader    = 4
	nested        = 0x8000 // NLA_F_NESTED

	flagRequest = 0x1
	flagAck     = 0x4
	flagExcl    = 0x200
	flagCreate  = 0x400
	flagAppend  = 0x800

	batchBegin = 0x10 // NFNL_MSG_BATCH_BEGIN
	batchEnd   = 0x11
	batchGenID = 1 // NFNL_BATCH_GENID

	subsystem    = 10 << 8 // NFNL_SUBSYS_NFTABLES
	newTable     = subsystem | 0
	getTable     = subsystem | 1
	delTable     = subsystem | 2
	newChain     = subsystem | 3
	getChain     = subsystem | 4
	delChain     = subsystem | 5
	newRule      = subsystem | 6
	getRule      = subsystem | 7
	delRule      = subsystem | 8
	newSet       = subsystem | 9
	getSet       = subsystem | 10
	delSet       = subsystem | 11
	newSetElem   = subsystem | 12
	getSetElem   = subsystem | 13
	getGen       = subsystem | 16
	getObject    = subsystem | 19
	getFlowtable = subsystem | 23

	familyInet  = 1 // NFPROTO_INET
	familyIPv4  = 2 // NFPROTO_IPV4
	familyIPv6  = 10
	nfgenHeader = 4 // struct nfgenmsg
)

// The attributes of the objects.
const (
	attrTable = 1 // NFTA_TABLE_NAME, NFTA_CHAIN_TABLE and so on: of all of them

	tableFlags    = 2
	tableUse      = 3
	tableHandle   = 4
	tablePad      = 5
	tableUserdata = 6

	chainHandle   = 2
	chainName     = 3
	chainHook     = 4
	chainPolicy   = 5
	chainUse      = 6
	chainType     = 7
	chainFlags    = 10
	chainUserdata = 12
	hookNumber    = 1
	hookPriority  = 2

	ruleChain       = 2
	ruleHandle      = 3
	ruleExpressions = 4
	rulePosition    = 6
	ruleUserdata    = 7
	rulePad         = 8

	setName     = 2
	setFlags    = 3
	setKeyType  = 4
	setKeyLen   = 5
	setDesc     = 9
	setID       = 10
	setUserdata = 13
	setPad      = 14
	setHandle   = 16
	setBackend  = 19 // NFTA_SET_TYPE, what the kernel made of it
	setCount    = 20
	setInterval = 0x4 // NFT_SET_INTERVAL

	elemListSet      = 2
	elemListElements = 3
	elemKey          = 1
	elemFlags        = 3
	elemUserdata     = 6
	elemPad          = 8
	elemIntervalEnd  = 0x1 // NFT_SET_ELEM_INTERVAL_END

	listElem  = 1
	exprName  = 1
	exprData  = 2
	dataValue = 1 // NFTA_DATA_VALUE
	dataJudge = 2 // NFTA_DATA_VERDICT
	codeJudge = 1 // NFTA_VERDICT_CODE
	chainJump = 2 // NFTA_VERDICT_CHAIN

	genID = 1 // NFTA_GEN_ID
)

// The attributes of the expressions, and their values.
const (
	regVerdict = 0
	reg1       = 1

	metaDReg = 1
	metaKey  = 2
	metaSReg = 3

	payloadDReg   = 1
	payloadBase   = 2
	payloadOffset = 3
	payloadLen    = 4
	baseNetwork   = 1
	baseTransport = 2

	cmpSReg = 1
	cmpOp   = 2
	cmpData = 3
	opEq    = 0
	opNeq   = 1
	opLTE   = 3
	opGTE   = 5

	rangeSReg = 1
	rangeOp   = 2
	rangeFrom = 3
	rangeTo   = 4

	bitwiseSReg = 1
	bitwiseDReg = 2
	bitwiseLen  = 3
	bitwiseMask = 4
	bitwiseXor  = 5
	bitwiseOp   = 6

	byteorderSReg = 1
	byteorderDReg = 2
	byteorderOp   = 3
	byteorderLen  = 4
	byteorderSize = 5
	opHton        = 1

	lookupSet   = 1
	lookupSReg  = 2
	lookupFlags = 5
	lookupNot   = 1 // NFT_LOOKUP_F_INV

	fibDReg     = 1
	fibResult   = 2
	fibFlags    = 3
	fibAddrType = 3 // NFT_FIB_RESULT_ADDRTYPE
	fibSource   = 1 // NFTA_FIB_F_SADDR
	fibDest     = 2

	ctDReg  = 1
	ctKey   = 2
	ctSReg  = 4
	ctState = 0
	ctZone  = 17

	immediateDReg = 1
	immediateData = 2

	redirMin       = 1
	redirMax       = 2
	redirFlags     = 3
	protoSpecified = 2 // NF_NAT_RANGE_PROTO_SPECIFIED

	counterBytes   = 1
	counterPackets = 2
	counterPad     = 3
)

// Verdicts: of include/uapi/linux/netfilter.h, and enum nft_verdicts.
const (
	verdictDrop   = 0
	verdictAccept = 1
	verdictJump   = -3
	verdictGoto   = -4
	verdictReturn = -5
)

// The userdata that nft(8) keeps (libnftnl/udata.h).
const (
	udataRuleComment  = 0 // NFTNL_UDATA_RULE_COMMENT
	udataKeyByteOrder = 0 // NFTNL_UDATA_SET_KEYBYTEORDER
	udataElemFlags    = 1 // NFTNL_UDATA_SET_ELEM_FLAGS
	udataOpen         = 1 // NFTNL_SET_ELEM_F_INTERVAL_OPEN
	udataHost         = 1 // BYTEORDER_HOST_ENDIAN of nft's datatype.h
	udataBig          = 2 // BYTEORDER_BIG_ENDIAN
)
