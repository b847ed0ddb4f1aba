package dns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// RCode is the outcome in a DNS answer (RFC 1035, 4.1.1).
type RCode uint8

func (r RCode) String() string {
	names := [...]string{"NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED"}
	if int(r) < len(names) {
		return names[r]
	}
	return fmt.Sprintf("RCODE %d", r)
}

// headerSize is that of a DNS message, in bytes.
const headerSize = 12

// Query returns a DNS query for the IPv4 address of a name, with recursion
// desired. The id should be hard to guess: it is what tells an answer from a
// forged one.
func Query(id uint16, name string) ([]byte, error) {
	b := binary.BigEndian.AppendUint16(nil, id)
	b = append(b, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0) // RD; one question
	for label := range strings.SplitSeq(strings.TrimSuffix(name, "."), ".") {
		if len(label) == 0 || len(label) > 63 {
			return nil, fmt.Errorf("%q is no host name: accepted are labels of 1 to 63 bytes with dots in between", name)
		}
		b = append(append(b, byte(len(label))), label...)
	}
	b = append(b, 0)
	if n := len(b) - headerSize; n > 255 {
		return nil, fmt.Errorf("%q is no host name: it is longer than 253 bytes", name)
	}
	return append(b, 0, 1, 0, 1), nil // A, IN
}

// ErrNoAnswer is for a packet that does not answer the query.
var ErrNoAnswer = errors.New("the packet does not answer the query")

// Answer returns the outcome in an answer to a query that Query made. The error is
// ErrNoAnswer for a packet that answers something else; then wait for the next.
func Answer(query, answer []byte) (RCode, error) {
	if len(query) < headerSize || len(answer) < headerSize ||
		!bytes.Equal(query[:2], answer[:2]) || // the id
		answer[2]&0xf8 != 0x80 { // an answer, to a standard query
		return 0, ErrNoAnswer
	}
	code := RCode(answer[3] & 0x0f)
	question := query[headerSize:]
	switch n := binary.BigEndian.Uint16(answer[4:6]); {
	case n == 0 && code != 0:
		return code, nil // FORMERR and REFUSED may come without the question
	case n != 1 || len(answer) < len(query) || !bytes.EqualFold(question, answer[headerSize:len(query)]):
		return 0, ErrNoAnswer
	}
	return code, nil
}
