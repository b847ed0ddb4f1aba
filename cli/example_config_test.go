package cli_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/kumahq/kuma-tproxy/cli"
	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// setup is what a program like kuma-init or kuma-cni does with a configuration: it
// has its text, a logger, and a writer for what it has to say.
func setup(ctx context.Context, runner cli.Runner, log *slog.Logger, out io.Writer, sources ...cli.Source) error {
	// The configuration may come from a newer control plane: a key that is not known
	// is logged, and everything else that is wrong is an error.
	loaded, err := cli.Loader{AllowUnknown: true}.LoadSources(sources...)
	if err != nil {
		return fmt.Errorf("configuration of the transparent proxy: %w", err)
	}
	for _, w := range loaded.Warnings {
		log.Warn("configuration", "source", w.Source, "key", w.Path, "nearest", w.Accepted)
	}
	cfg := loaded.Config
	cfg.Pod = true
	host, err := runner.Probe(ctx, cfg.Needs())
	if err != nil {
		return err
	}
	plan, err := tproxy.Build(cfg, host)
	if err != nil {
		return err
	}
	if loaded.Settings.DryRun {
		_, err := out.Write(plan.Rules.IPTables(rules.IPv4))
		return err
	}
	report, err := runner.Apply(ctx, plan)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(out, "changed:", report.Changed)
	return err
}

// A program that is no command loads a ConfigMap, and another one over it, and
// installs what they say.
func ExampleLoader() {
	configMap := map[string]string{"config.yaml": `
redirect:
  dns: {enabled: true, captureAll: true}
  inbound: {port: 16006}
waitIntervals: 1
`}
	workload := map[string]string{"config.yaml": "redirect: {inbound: {excludePorts: [9901]}}\n"}

	var said bytes.Buffer
	log := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{ReplaceAttr: withoutTime}))
	runner := new(recorder) // &exec.Runner{Log: log} is this machine
	err := setup(context.Background(), runner, log, &said,
		cli.Source{Name: "kuma-transparent-proxy-config", Text: []byte(configMap["config.yaml"])},
		cli.Source{Name: "workload", Text: []byte(workload["config.yaml"])})
	fmt.Println(err, strings.TrimSpace(said.String()))
	fmt.Println(runner.plan.Config.Inbound.Port, runner.plan.Config.Inbound.ExcludePorts)

	err = setup(context.Background(), runner, log, &said, cli.Source{Name: "workload", Text: []byte("redirect:\n  inbound:\n    port: 0\n")})
	fmt.Println(err)
	fmt.Println("exit code", cli.ExitCode(err))
	// Output:
	// level=WARN msg=configuration source=kuma-transparent-proxy-config:5 key=waitIntervals nearest="waitInterval, the nearest one"
	// <nil> changed: true
	// 16006 9901
	// configuration of the transparent proxy: workload:3: redirect.inbound.port: "0" is not accepted: accepted is a port from 1 to 65535
	// exit code 2
}

func withoutTime(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}
