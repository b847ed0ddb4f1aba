// Package cni is a chained CNI plugin that installs a pod's transparent proxying before
// any of its containers starts: the program kuma-cni of this module is [Main] and
// nothing else.
//
// It needs no API server. The runtime hands it the pod's annotations (containerd and
// CRI-O do, for a plugin whose entry in the network configuration has the capability
// io.kubernetes.cri.pod-annotations), and the control plane's settings stand in that
// entry: see [Conf]. Where a runtime hands none, they may stand in CNI_ARGS or in the
// entry, or come from a [Source] of an embedder's.
//
// A pod without a sidecar passes untouched. For another one the plugin enters the pod's
// network namespace with one thread, and runs the host's iptables there. It keeps no
// state: what was installed stands in the rules (tproxy.Record) and goes with the
// namespace, and the lock of iptables-legacy is the file of the namespace.
package cni
