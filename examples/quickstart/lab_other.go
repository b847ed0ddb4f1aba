//go:build !linux

package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
)

func enter() (code int, inside bool, err error) {
	return 1, false, fmt.Errorf("network namespaces on %s: %w", runtime.GOOS, errors.ErrUnsupported)
}

func demo(context.Context, *page) (int, error) { return 1, errors.ErrUnsupported }
