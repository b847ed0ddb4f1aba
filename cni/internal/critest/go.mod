module github.com/kumahq/kuma-tproxy/cni/internal/critest

go 1.26

require (
	github.com/kumahq/kuma-tproxy v0.1.0
	github.com/kumahq/kuma-tproxy/cni v0.1.0
	google.golang.org/grpc v1.75.1
	k8s.io/cri-api v0.34.2
)

require (
	github.com/containernetworking/cni v1.3.0 // indirect
	github.com/coreos/go-iptables v0.8.0 // indirect
	github.com/vishvananda/netns v0.0.4 // indirect
	go.yaml.in/yaml/v3 v3.0.6 // indirect
	golang.org/x/net v0.41.0 // indirect
	golang.org/x/sys v0.33.0 // indirect
	golang.org/x/text v0.26.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20250707201910-8d1bb00bc6a7 // indirect
	google.golang.org/protobuf v1.36.6 // indirect
)

// Nobody imports or installs this module, and it is in no workspace: gRPC is nobody's to
// fetch who builds kumactl or kuma-cni. GOWORK=off.
replace (
	github.com/kumahq/kuma-tproxy => ../../..
	github.com/kumahq/kuma-tproxy/cni => ../..
)
