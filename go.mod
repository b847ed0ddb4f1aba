module github.com/kumahq/kuma-tproxy

go 1.26

require (
	github.com/coreos/go-iptables v0.8.0
	github.com/google/go-cmp v0.7.0
	pgregory.net/rapid v1.3.0
)
