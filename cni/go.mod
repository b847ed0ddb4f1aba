module github.com/kumahq/kuma-tproxy/cni

go 1.26

require (
	github.com/containernetworking/cni v1.3.0
	github.com/google/go-cmp v0.7.0
	github.com/kumahq/kuma-tproxy v0.1.0
	go.yaml.in/yaml/v3 v3.0.6
	golang.org/x/sys v0.26.0
	pgregory.net/rapid v1.3.0
)

require (
	github.com/coreos/go-iptables v0.8.0 // indirect
	github.com/vishvananda/netns v0.0.4 // indirect
)

