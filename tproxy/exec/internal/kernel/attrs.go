package kernel

import (
	"encoding/binary"
	"iter"
)

const (
	attrHeader  = 4
	nlaTypeMask = 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
)

// Attrs walks the attributes of a netlink message of that byte order. It ends where one
// has no room for what it says that it is.
func Attrs(order binary.ByteOrder, b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= attrHeader {
			length := int(order.Uint16(b))
			if length < attrHeader || length > len(b) {
				return
			}
			if !yield(order.Uint16(b[2:])&nlaTypeMask, b[attrHeader:length]) {
				return
			}
			b = b[min(align(length), len(b)):]
		}
	}
}

func align(n int) int { return (n + 3) &^ 3 }

// CString is a netlink string, which ends in a NUL.
func CString(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}
