package cni

import "errors"

// errNotNamespace says that a path leads to something else than a network namespace.
var errNotNamespace = errors.New("no network namespace")
