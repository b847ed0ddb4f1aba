package main

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/kumahq/kuma-tproxy/internal/netlab"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

func TestMain(m *testing.M) { netlab.Main(m) }

func require(t *testing.T) {
	t.Helper()
	netlab.Require(t, "ip", "nft", "iptables-nft-restore", "ip6tables-nft-restore", "iptables-legacy-restore", "ip6tables-legacy-restore")
}

func start(t *testing.T, w way) *host {
	t.Helper()
	h, err := newHost(w, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// What is measured as redirected is, what is measured as excluded is not, queries
// included; and no host but those of iptables-legacy has its tables.
func TestFlowsGoWhereTheirNamesSay(t *testing.T) {
	require(t)
	for _, w := range ways([]int{10}) {
		t.Run(w.name, func(t *testing.T) {
			h := start(t, w)
			if err := h.check(); err != nil {
				t.Error(err)
			}
			var tables []byte
			err := h.In(h.Host, func() (err error) { tables, err = os.ReadFile("/proc/thread-self/net/ip_tables_names"); return err })
			if legacy := strings.Contains(w.name, "legacy"); err != nil || legacy != (len(tables) > 0) {
				t.Errorf("tables of iptables-legacy: %q, %v", tables, err)
			}
		})
	}
}

// The check of the flows sees when they go elsewhere: each error names one.
func TestCheckSeesWhatGoesElsewhere(t *testing.T) {
	require(t)
	for name, test := range map[string]struct {
		way  way
		want []string // the flows that are wrong, in each family
	}{
		"nothing redirects": {way{redirects: true, dns: true, put: func(*host) error { return nil }}, []string{flowOut, flowIn, flowQuery, flowQueryNew}},
		"no DNS":            {way{redirects: true, dns: true, put: func(h *host) error { return h.byHand("nft", false) }}, []string{flowQuery, flowQueryNew}},
		"no ports": {way{redirects: true, list: list{true, 10}, put: func(h *host) error { return h.byHand("iptables-nft", false) }},
			[]string{flowOutFirst, flowOutLast, flowInFirst, flowInLast}},
		"no CIDRs": {way{redirects: true, list: list{false, 10}, put: func(h *host) error { return h.byHand("iptables-legacy", false) }},
			[]string{flowOutFirst, flowOutLast, flowInFirst, flowInLast}},
		"9 of 10 ports": {way{redirects: true, list: list{true, 10}, put: func(h *host) error { return h.nft(list{true, 9}.table()) }}, []string{flowOutLast, flowInLast}},
		"9 of 10 CIDRs": {way{redirects: true, list: list{false, 10}, put: func(h *host) error { return h.nft(list{false, 9}.table()) }}, []string{flowOutLast, flowInLast}},
		"the proxy too": {way{redirects: true, put: func(h *host) error {
			return h.nft(strings.Replace(list{}.table(), "skuid != 5678", "skuid != 5679", 1))
		}}, []string{flowOwn}},
	} {
		t.Run(name, func(t *testing.T) {
			var want []string
			for _, f := range rules.Families() {
				for _, flow := range test.want {
					want = append(want, f.String()+", "+flow)
				}
			}
			var got []string
			if err := start(t, test.way).check(); err != nil {
				for line := range strings.Lines(err.Error()) {
					flow, _, _ := strings.Cut(line, ":")
					got = append(got, flow)
				}
			}
			slices.Sort(want)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("wrong are %q, want %q", got, want)
			}
		})
	}
}

// Every measure measures something, in a plausible time, and leaves nothing behind that
// stands in its way the next time.
func TestMeasures(t *testing.T) {
	require(t)
	h := start(t, way{redirects: true, dns: true, put: func(h *host) error { return h.byHand("nft", true) }})
	for range 2 {
		for _, m := range measures {
			for _, f := range rules.Families() {
				for _, name := range m.flows {
					fl, ok := h.flow(f, name)
					if !ok {
						continue
					}
					v, err := h.sample(m, fl)
					least, longest := 100.0, 1e7 // ns
					if m.name == streaming {
						least, longest = 0.001, 1000 // ns for a byte
					}
					if err != nil || v < least || v > longest {
						t.Errorf("%s, %s, %s: %f ns, %v", m.name, f, name, v, err)
					}
				}
			}
		}
	}
	if _, _, err := choose(h); err != nil {
		t.Error(err)
	}
}

// A refused connection leaves nothing in conntrack: there is no table that grows while
// the bench runs.
func TestRefusedConnectionsAreForgotten(t *testing.T) {
	require(t)
	h := start(t, way{redirects: true, put: func(h *host) error { return h.byHand("nft", false) }})
	for _, name := range lasting {
		fl, _ := h.flow(rules.IPv4, name)
		if _, err := h.sample(measures[0], fl); err != nil {
			t.Fatal(err)
		}
	}
	tracked, ok, err := h.Conntrack(h.Host)
	if err != nil {
		t.Fatal(err)
	}
	if !ok {
		t.Skip("no /proc/net/nf_conntrack")
	}
	if len(tracked) > 0 {
		t.Errorf("%d connections, such as %s", len(tracked), tracked[0])
	}
}

func TestPrefixesAndPortsStayApart(t *testing.T) {
	for _, f := range rules.Families() {
		before := netip.Prefix{}
		for i := range most {
			p := prefix(f, i)
			if p != p.Masked() || p.Addr().Is4() != (f == rules.IPv4) {
				t.Fatalf("%d: %s", i, p)
			}
			if i > 0 && (!before.Addr().Less(p.Addr()) || before.Overlaps(p) || twin(before).Overlaps(p)) {
				t.Fatalf("%s and %s are not apart", before, p)
			}
			before = p
		}
	}
	if p := port(most - 1); int(p) != int(port(0))+2*(most-1) {
		t.Errorf("the last port is %d", p)
	}
}

// twin is the prefix with which p makes a shorter one.
func twin(p netip.Prefix) netip.Prefix {
	a := p.Addr().As16()
	bit := p.Bits() - 1
	if p.Addr().Is4() {
		bit += 96
	}
	a[bit/8] ^= 0x80 >> (bit % 8)
	addr := netip.AddrFrom16(a)
	if p.Addr().Is4() {
		addr = addr.Unmap()
	}
	return netip.PrefixFrom(addr, p.Bits())
}
