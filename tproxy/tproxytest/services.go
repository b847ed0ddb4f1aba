package tproxytest

import (
	"fmt"
	"strings"
)

// Services is what kube-proxy in its iptables mode makes of IPv4 for n services with
// two endpoints each: 8 n rules, as iptables-save prints them and iptables-restore
// reads them.
func Services(n int) []byte {
	var chains, list strings.Builder
	for i := range n {
		ip := fmt.Sprintf("10.96.%d.%d", i/250, i%250+1)
		fmt.Fprintf(&chains, ":KUBE-SVC-%06d - [0:0]\n:KUBE-SEP-%06dA - [0:0]\n:KUBE-SEP-%06dB - [0:0]\n", i, i, i)
		fmt.Fprintf(&list, `-A KUBE-SERVICES -d %s/32 -p tcp -m comment --comment "default/svc-%d cluster IP" -m tcp --dport 80 -j KUBE-SVC-%06d
-A KUBE-SVC-%06d ! -s 10.244.0.0/16 -d %s/32 -p tcp -m comment --comment "default/svc-%d cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-%06d -m comment --comment "default/svc-%d" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-%06dA
-A KUBE-SVC-%06d -m comment --comment "default/svc-%d" -j KUBE-SEP-%06dB
`, ip, i, i, i, ip, i, i, i, i, i, i, i)
		for _, e := range "AB" {
			fmt.Fprintf(&list, `-A KUBE-SEP-%06d%c -s 10.244.1.%d/32 -m comment --comment "default/svc-%d" -j KUBE-MARK-MASQ
-A KUBE-SEP-%06d%c -p tcp -m comment --comment "default/svc-%d" -m tcp -j DNAT --to-destination 10.244.1.%d:8080
`, i, e, i%250+1, i, i, e, i, i%250+1)
		}
	}
	return []byte("*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n" + chains.String() +
		"-A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n" + list.String() + "COMMIT\n")
}
