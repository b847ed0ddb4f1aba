// Package kube says what the annotations of a Kubernetes pod mean: with the
// [Settings] of the control plane, [Configure] makes a tproxy.Config of them that
// kuma-init and a CNI plugin can install, and says where each value came from.
// [Annotations] is the way back. [Injected] says, before anything else is looked at,
// whether a pod is any of the mesh's business.
//
// For exclusions, the IP family, logging and dropping of invalid packets, a pod's
// annotation wins over the control plane's setting, and an empty one clears it. Whom
// the control plane started the proxy as, and at which ports, is not a pod's to say:
// an annotation that differs is a [Conflict], and is not used.
//
// The package is pure: maps of strings go in, nothing is read, and nothing of
// Kubernetes is imported.
package kube
