package cni

import (
	"errors"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// The codes of the plugin's own errors, beside those of the specification (SPEC.md,
// section "Error").
const (
	ErrAnnotations   uint = 100 // an annotation is not accepted, or there are too many
	ErrNoAnnotations uint = 101 // nobody says what the pod's annotations are
	ErrContradiction uint = 102 // two sources say different things
	ErrRules         uint = 103 // the rules could not be installed, and none are left
	ErrLeft          uint = 104 // nor could what had been done be undone
	ErrDiffers       uint = 105 // CHECK: the live rules are not those of the pod
	ErrUntold        uint = 106 // CHECK: what there is cannot be told

	// ErrUnavailable is STATUS's, of the specification since 1.1.0.
	ErrUnavailable uint = 50
)

// maxDetails is how much an error says, in bytes: it ends in an event of the pod.
const maxDetails = 8 << 10

// failed makes an error of the specification.
func failed(code uint, msg string, err error) *types.Error {
	details := strings.TrimSpace(err.Error())
	if len(details) > maxDetails {
		details = strings.ToValidUTF8(details[:maxDetails], "") + " ..."
	}
	return types.NewError(code, "kuma-cni: "+msg, details)
}

// of is an error about a pod.
func (p Pod) of(err error) error {
	e, ok := errors.AsType[*types.Error](err)
	if !ok {
		e = failed(types.ErrInternal, "failed", err)
	}
	if named := "kuma-cni: " + p.String() + ": "; !strings.HasPrefix(e.Msg, named) {
		e = types.NewError(e.Code, named+strings.TrimPrefix(e.Msg, "kuma-cni: "), e.Details)
	}
	return e
}
