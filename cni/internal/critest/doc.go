// Package critest holds the tests of kuma-cni under a real containerd. It is a module of
// its own so that whoever imports cni does not get gRPC and Kubernetes's API with it.
package critest
