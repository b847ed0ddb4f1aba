//go:build !linux

package cli

import (
	"context"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/kumahq/kuma-tproxy/tproxy/exec"
)

const readyWord = "ready\n"

func watcher(*cobra.Command, *slog.Logger) func(context.Context, exec.Trial) (string, error) {
	return func(context.Context, exec.Trial) (string, error) { return "", exec.ErrUnsupported }
}

func watchKind() string { return "a process in a session of its own" }

func notifySystemd() error { return exec.ErrUnsupported }
