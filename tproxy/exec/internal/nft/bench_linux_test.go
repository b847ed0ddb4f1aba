package nft

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// installed is the table of a plan with that many ports excluded in each direction.
func installed(tb testing.TB, ports int) *rules.Native {
	tb.Helper()
	list := make([]string, ports)
	for i := range list {
		list[i] = strconv.Itoa(20000 + 2*i)
	}
	excluded := rules.MustPorts(strings.Join(list, ","))
	plan, err := tproxy.Build(tproxy.Config{
		Inbound:  tproxy.Inbound{ExcludePorts: excluded},
		Outbound: tproxy.Outbound{ExcludePorts: excluded},
	}, tproxy.Host{})
	if err != nil {
		tb.Fatal(err)
	}
	n, err := plan.Rules.Native("kuma-tproxy")
	if err != nil {
		tb.Fatal(err)
	}
	return &n
}

func median(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2].Microseconds())
}

// onThread runs f on a thread of its own in a new network namespace, or, if it is to be
// free, on a goroutine whose thread is not its own; the namespace is the process's then.
func onThread(b *testing.B, where string, f func(c *Conn)) {
	netlab.Require(b)
	if where == "locked" {
		fresh(b, f)
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := Open()
		if err != nil {
			b.Error(err)
			return
		}
		defer c.Close()
		f(c)
	}()
	<-done
}

// BenchmarkInstall is of a fresh install with the connection open, from the table to the
// kernel's answer, and of reading it back.
func BenchmarkInstall(b *testing.B) {
	for _, where := range []string{"free", "locked"} {
		for _, ports := range []int{0, 1000, 10000} {
			b.Run(fmt.Sprintf("%s/%d", where, ports), func(b *testing.B) {
				n := installed(b, ports)
				onThread(b, where, func(c *Conn) {
					var encoded, sent, read []time.Duration
					for b.Loop() {
						start := time.Now()
						batch := Encode(rules.NativeTransition(nil, n), binary.NativeEndian)
						middle := time.Now()
						if err := c.Send(batch, 0); err != nil {
							b.Error(err)
							return
						}
						end := time.Now()
						encoded, sent = append(encoded, middle.Sub(start)), append(sent, end.Sub(middle))
						if got, _, err := c.List(n.Table); err != nil || !got.Equal(n) {
							b.Error(err)
							return
						}
						read = append(read, time.Since(end))
						send(b, c, 0, rules.NativeCommand{Verb: rules.DeleteTable, Table: n.Table})
					}
					b.ReportMetric(median(encoded), "encode-µs")
					b.ReportMetric(median(sent), "send-µs")
					b.ReportMetric(median(read), "list-µs")
				})
			})
		}
	}
}

// BenchmarkClose is of what close(2) waits behind a commit that deletes: at once, after a
// while, of another socket, and of one of which nothing was asked.
func BenchmarkClose(b *testing.B) {
	n := installed(b, 0)
	for _, c := range []struct {
		name          string
		deletes, uses bool
		pause         time.Duration
		other         bool
	}{
		{"after adding", false, true, 0, false},
		{"after deleting", true, true, 0, false},
		{"20 ms after deleting", true, true, 20 * time.Millisecond, false},
		{"another that was used", true, true, 0, true},
		{"another that was not", true, false, 0, true},
	} {
		b.Run(c.name, func(b *testing.B) {
			fresh(b, func(kept *Conn) {
				var waited, again []time.Duration
				for b.Loop() {
					conn, err := Open()
					if err != nil {
						b.Error(err)
						return
					}
					send(b, kept, 0, rules.NativeTransition(nil, n)...)
					writer := conn
					if c.other {
						writer = kept
						if c.uses {
							_ = conn.Supported()
						}
					}
					if c.deletes {
						send(b, writer, 0, rules.NativeTransition(n, nil)...)
					} else {
						_ = writer.Supported()
					}
					time.Sleep(c.pause)
					start := time.Now()
					conn.Close()
					waited = append(waited, time.Since(start))
					if !c.deletes {
						send(b, kept, 0, rules.NativeTransition(n, nil)...)
					}
					start = time.Now()
					_ = kept.Supported()
					again = append(again, time.Since(start))
				}
				b.ReportMetric(median(waited), "close-µs")
				b.ReportMetric(median(again), "next-µs")
			})
		})
	}
}
