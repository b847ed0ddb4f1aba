//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kumahq/kuma-tproxy/bench/internal/crowd"
	"github.com/kumahq/kuma-tproxy/tproxy"
)

// netlinkTime is what github.com/google/nftables takes to put a table of our shape in
// place, medians: 11 rules in 5 chains, 2 of them base chains of nat, and, with ports,
// two interval sets and the two rules that look them up. The messages are made anew each
// time and go as one batch; the socket is there before.
type netlinkTime struct {
	Free   time.Duration // on a goroutine that may run on any thread
	Locked time.Duration // on one locked to its thread, as it is after setns(2)
	Ratio  float64       // of Locked to Free, round by round
}

// googleNFTables measures it, with so many ports in each set, in a fresh network
// namespace each time.
func googleNFTables(ports, rounds int) (netlinkTime, error) {
	var free, locked []time.Duration
	for round := range rounds + 1 {
		for k := range 2 {
			times := &locked
			if (round+k)%2 == 0 {
				times = &free
			}
			took, err := netlinkOnce(ports, times == &free)
			if err != nil {
				return netlinkTime{}, fmt.Errorf("google/nftables, %d ports: %w", ports, err)
			}
			if round > 0 { // the first loads modules and pages
				*times = append(*times, took)
			}
		}
	}
	return netlinkTime{crowd.Median(free), crowd.Median(locked), crowd.Median(crowd.Ratios(locked, free))}, nil
}

// netlinkOnce is one install in a namespace of its own.
func netlinkOnce(ports int, free bool) (took time.Duration, err error) {
	err = elsewhere(func() error {
		c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(room))
		if err != nil {
			return err
		}
		timed := func() error {
			start := time.Now()
			err := putTable(c, ports)
			took = time.Since(start)
			return err
		}
		if free {
			done := make(chan error)
			go func() { done <- timed() }()
			err = <-done
		} else {
			err = timed()
		}
		return errors.Join(err, c.CloseLasting())
	})
	time.Sleep(15 * time.Millisecond) // the namespace goes in the background
	return took, err
}

// room is a buffer for a batch of 10,000 ports each way (socket(7), SO_SNDBUFFORCE).
func room(c *netlink.Conn) error { return c.SetWriteBuffer(4 << 20) }

const (
	tableName     = "kuma_mesh"
	chainInbound  = "inbound"
	chainOutbound = "outbound"
	chainRecord   = "record"
	// beforeDNAT has the chains come before those of priority dstnat, whichever was
	// registered first.
	beforeDNAT = -101
)

// putTable makes the messages of the table and sends them.
func putTable(c *nftables.Conn, ports int) error {
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: tableName})
	base := func(name string, hook *nftables.ChainHook) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Name: name, Table: t, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: nftables.ChainPriorityRef(beforeDNAT)})
	}
	prerouting, output := base("prerouting", nftables.ChainHookPrerouting), base("output", nftables.ChainHookOutput)
	for _, name := range []string{chainInbound, chainOutbound, chainRecord} {
		c.AddChain(&nftables.Chain{Name: name, Table: t})
	}
	excluded := map[string][]expr.Any{}
	for i, chain := range []string{chainInbound, chainOutbound} {
		if ports == 0 {
			break
		}
		set := &nftables.Set{Table: t, Name: chain + "_ports", KeyType: nftables.TypeInetService, Interval: true}
		if err := putSet(c, set, ports, 30001-i); err != nil {
			return err
		}
		excluded[chain] = inSet(set)
	}
	put := func(chain, why string, action []expr.Any, matches ...[]expr.Any) {
		exprs := append(slices.Concat(matches...), &expr.Counter{})
		c.AddRule(&nftables.Rule{
			Table: t, Chain: &nftables.Chain{Name: chain, Table: t}, Exprs: append(exprs, action...),
			UserData: userdata.AppendString(nil, userdata.TypeComment, why),
		})
	}
	put(prerouting.Name, "opens a connection to this host", jump(chainInbound), toThisHost(), opens())
	put(output.Name, "opens a connection from this host", jump(chainOutbound), opens())
	if match, is := excluded[chainInbound]; is {
		put(chainInbound, "excluded inbound port", back(), match)
	}
	put(chainInbound, "port 22 is SSH", back(), port(22))
	put(chainInbound, "all else", redirect(tproxy.DefaultInboundPort))
	lo := meta(expr.MetaKeyOIFNAME, append([]byte("lo"), make([]byte, unix.IFNAMSIZ-2)...))
	proxy := meta(expr.MetaKeySKUID, binaryutil.NativeEndian.PutUint32(uint32(tproxy.DefaultProxyUID)))
	put(chainOutbound, "from the passthrough address", back(), lo, ip4(12, 0xffffffff, expr.CmpOpEq, 127, 0, 0, 6))
	put(chainOutbound, "the proxy to its own port", redirect(0), proxy, port(tproxy.DefaultInboundPort))
	put(chainOutbound, "the proxy to its own host", jump(chainInbound), proxy, lo, ip4(16, 0xff000000, expr.CmpOpNeq, 127, 0, 0, 0))
	put(chainOutbound, "the proxy", back(), proxy)
	put(chainOutbound, "through lo", back(), lo)
	if match, is := excluded[chainOutbound]; is {
		put(chainOutbound, "excluded outbound port", back(), match)
	}
	put(chainOutbound, "all else", redirect(tproxy.DefaultOutboundPort))
	put(chainRecord, `v1 {"redirect":{"inbound":{"port":15006},"outbound":{"port":15001}}}`, back())
	return c.Flush()
}

// message is how many ports go into one message: an attribute's length has 16 bits
// (struct nlattr), and two elements of an interval take 40 bytes.
const message = 1000

// putSet makes a set of every second port.
func putSet(c *nftables.Conn, s *nftables.Set, ports, from int) error {
	if err := c.AddSet(s, nil); err != nil {
		return err
	}
	for first := 0; first < ports; first += message {
		n := min(message, ports-first)
		elements := make([]nftables.SetElement, 0, 2*n)
		for i := range n {
			p := uint16(from + 2*(first+i))
			elements = append(elements,
				nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(p)},
				nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(p + 1), IntervalEnd: true})
		}
		if err := c.SetAddElements(s, elements); err != nil {
			return err
		}
	}
	return nil
}

func meta(key expr.MetaKey, value []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value}}
}

// toThisHost is fib daddr type local.
func toThisHost() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, ResultADDRTYPE: true, FlagDADDR: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// opens is a TCP packet with SYN and without ACK, RST and FIN: --syn.
func opens() []expr.Any {
	return append(meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_TCP}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x17}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0x02}})
}

var destinationPort = expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}

func port(p uint16) []expr.Any {
	load := destinationPort
	return []expr.Any{&load, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(p)}}
}

func inSet(s *nftables.Set) []expr.Any {
	load := destinationPort
	return []expr.Any{&load, &expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID}}
}

// ip4 compares a masked address of the IPv4 header, at an offset.
func ip4(offset, mask uint32, op expr.CmpOp, address ...byte) []expr.Any {
	return append(meta(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV4}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.BigEndian.AppendUint32(nil, mask), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: address})
}

func jump(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

func back() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}} }

func redirect(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Redir{RegisterProtoMin: 1, RegisterProtoMax: 1, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED},
	}
}

// netlinkPage measures and prints it.
func netlinkPage(p *crowd.Page, sizes []int, rounds int) error {
	p.Linef("github.com/google/nftables %s itself, in process, socket kept, one batch into a fresh namespace: 11 rules in 5", version("github.com/google/nftables"))
	p.Linef("chains, and with N ports each in two interval sets 13. Medians of %d, ms; locked is a goroutine locked to its thread.", rounds)
	p.Linef("%-30s %8s %8s %15s", "N", "free", "locked", "locked to free")
	for _, n := range sizes {
		t, err := googleNFTables(n, rounds)
		if err != nil {
			return err
		}
		p.Linef("%-30d %8.2f %8.2f %15.2f", n, ms(t.Free), ms(t.Locked), t.Ratio)
	}
	p.Linef("")
	return nil
}
