package exec

import (
	"context"
	"errors"
	"slices"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Installation is an install that stands, as its rules and their record say.
type Installation struct {
	Backend  tproxy.Backend
	Families []rules.Family // that have rules of it
	// Kuma is whether it, or some of it, was made by Kuma's own installer.
	Kuma   bool
	Record tproxy.Record
	// Config is what was installed, as tproxy.Plan.Config has it; where Unknown is
	// not nil, it is not known for that reason: there is no record (tproxy.ErrNoRecord)
	// or one that does not fit (*tproxy.RecordError).
	Config  tproxy.Config
	Unknown error
}

// Installed reads what is installed in this network namespace: nil where nothing of
// ours or of Kuma's is. It writes nothing, and needs root: without, the error is
// ErrNotRoot.
func (r *Runner) Installed(ctx context.Context) (*Installation, error) {
	t, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	return t.report.Before, nil
}

// look is a transaction that has read whatever is ours, and is to write nothing.
func (r *Runner) look(ctx context.Context) (*transaction, error) {
	s, err := r.session()
	if err != nil {
		return nil, err
	}
	if err := s.m.privileged(); err != nil {
		return nil, err
	}
	t := &transaction{session: s, report: &Report{}, dryRun: true, resolvConf: tproxy.DefaultResolvConf}
	if t.jobs, err = t.removals(s.variants(ctx), everywhere); err != nil {
		return nil, err
	}
	for i := range t.jobs {
		if t.jobs[i].before, err = t.save(ctx, t.jobs[i].variant, t.jobs[i].family); err != nil {
			return nil, err
		}
	}
	t.report.Before = installation(t.jobs)
	return t, nil
}

// everywhere is where an uninstall takes rules out.
func everywhere(tproxy.Backend, rules.Family) bool { return true }

// installation is what was read of an install; of two, in both variants, the one that
// has a record.
func installation(jobs []job) (found *Installation) {
	for _, b := range tproxy.Backends() {
		i := Installation{Backend: b}
		sets := make(map[rules.Family]rules.Set)
		for _, j := range jobs {
			ours := j.before.Ours
			if j.variant.Backend != b || len(ours.Bases)+len(ours.Chains) == 0 {
				continue
			}
			i.Kuma = i.Kuma || len(j.before.Kuma) > 0
			for _, f := range rules.Families() {
				if !j.of(f) || !ours.Has(f) {
					continue
				}
				sets[f] = ours
				if b == tproxy.NFTables { // as iptables would list it
					sets[f] = ours.Lower(f)
				}
				if !slices.Contains(i.Families, f) {
					i.Families = append(i.Families, f)
				}
			}
		}
		if len(sets) == 0 {
			continue
		}
		i.Config, i.Record, i.Unknown = tproxy.Installed(sets[rules.IPv4], sets[rules.IPv6])
		if found == nil || errors.Is(found.Unknown, tproxy.ErrNoRecord) && !errors.Is(i.Unknown, tproxy.ErrNoRecord) {
			found = &i
		}
	}
	return found
}
