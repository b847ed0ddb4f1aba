package exec

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// session is one call of a Runner.
type session struct {
	m   machine
	log *slog.Logger

	recorded           string   // the version in a record
	comeBack           []string // Runner.ComeBack
	lock               *os.File // what children inherit, while it is held
	lockFile           string   // of iptables-legacy; "" is the environment's
	elsewhere          bool     // whether the files are another network namespace's
	wait, waitInterval time.Duration
	processes, retries int
	beforeProgram      func()           // Runner.BeforeProgram
	counters           bool             // whether rules are read with what they have counted
	known              []tproxy.Variant // what variants has found, for a session that changes nothing

	former map[place]rules.Set // to which the way back leads

	// How often a failure that passes is tried again, and after how long.
	maxRetries int
	sleep      time.Duration
}

// patient takes over how long to wait and how often to try again.
func (s *session) patient(c tproxy.Config) {
	s.wait, s.waitInterval = c.Wait, c.WaitInterval
	s.maxRetries, s.sleep = c.Retries()
}

func (r *Runner) session() (*session, error) {
	s := &session{m: r.machine, log: r.Log, recorded: r.Version, comeBack: r.ComeBack, wait: tproxy.DefaultWait, lockFile: r.LockFile, elsewhere: r.FilesElsewhere, beforeProgram: r.BeforeProgram}
	if s.m == nil {
		if runtime.GOOS != "linux" {
			return nil, fmt.Errorf("netfilter on %s: %w", runtime.GOOS, ErrUnsupported)
		}
		s.m = system{}
	}
	if s.recorded == "" {
		s.recorded = buildVersion()
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s, nil
}

// patience is how long a process may take beyond its wait for the lock. A
// restore of 10,000 rules takes less than a second; this is for a machine that
// has come to a halt.
const patience = time.Minute

// run starts a process. It is not killed when ctx ends: what it writes, it
// writes whole.
func (s *session) run(ctx context.Context, c command) (result, error) {
	s.processes++
	if s.beforeProgram != nil {
		s.beforeProgram()
	}
	c.Lock, c.LockFile = s.lock, s.lockFile
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), max(s.wait, 0)+patience)
	defer cancel()
	start := time.Now()
	r, err := s.m.run(ctx, c)
	s.log.Debug("ran", "command", c.String(), "exit", r.Exit, "took", time.Since(start), "stderr", string(r.Stderr))
	if err == nil && r.Exit < 0 && ctx.Err() != nil {
		err = fmt.Errorf("killed: it did not end within %s", time.Since(start).Round(time.Second))
	}
	if err != nil {
		return r, fmt.Errorf("%s: %w", c.Path, err)
	}
	return r, nil
}

// buildVersion is this module's version in the program that runs, or "" where it was
// built from its sources. It is read once: the list of modules can be long.
var buildVersion = sync.OnceValue(func() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, m := range append([]*debug.Module{&info.Main}, info.Deps...) {
		if m.Path == modulePath && m.Replace == nil && m.Version != "(devel)" {
			return m.Version
		}
	}
	return ""
})

const modulePath = "github.com/kumahq/kuma-tproxy"
