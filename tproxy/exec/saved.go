package exec

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/kumahq/kuma-tproxy/tproxy"
)

// storeDir holds what an install comes back from. It is read before the network is up,
// when /var may not be there yet.
const storeDir = "/etc/kuma-tproxy"

// savedName is the install, as a Config and what was observed for it.
const savedName = storeDir + "/install.json"

// savedVersion is that of the form of the file.
const savedVersion = 1

// savedInstall is what the rules of a plan hang on. At boot, before the network, resolv.conf
// may be empty and no resolver listens: what was observed then would be another install.
type savedInstall struct {
	Version     int             `json:"version"`
	Config      tproxy.Config   `json:"config"`
	Backend     string          `json:"backend"`
	Pod         string          `json:"pod,omitempty"`
	Nameservers []netip.Addr    `json:"nameservers,omitempty"`
	Resolvers   []savedResolver `json:"resolvers,omitempty"`
	Split       tproxy.Split    `json:"split,omitempty"`
	// PassthroughAddressOurs is whether we put ::6 on lo. A firewall that flushes takes the
	// record of that away, and not the address.
	PassthroughAddressOurs bool `json:"passthroughAddressOurs,omitempty"`
	// Stores are by what it comes back.
	Stores []tproxy.Persist `json:"stores"`
}

type savedResolver struct {
	Address netip.Addr `json:"address"`
	UID     tproxy.UID `json:"uid"`
	Program string     `json:"program"`
	Untold  string     `json:"untold,omitempty"`
}

// savedOf is a plan as it is kept.
func savedOf(p *tproxy.Plan, rec tproxy.Record) savedInstall {
	s := savedInstall{Version: savedVersion, Config: p.Config, Backend: p.Backend.String(), Pod: p.Host.Pod,
		Nameservers: p.Host.Nameservers, Split: p.Host.Nameserver.Split, Stores: p.Stores(), PassthroughAddressOurs: rec.PassthroughAddressOurs}
	for _, r := range p.Host.LocalResolvers {
		s.Resolvers = append(s.Resolvers, savedResolver{r.Address, r.UID, r.Program, r.Untold})
	}
	return s
}

func (i savedInstall) text() ([]byte, error) {
	text, err := json.MarshalIndent(i, "", "  ")
	return append(text, '\n'), err
}

// readSaved reads what text wrote.
func readSaved(text []byte) (i savedInstall, err error) {
	if err := json.Unmarshal(text, &i); err != nil {
		return i, err
	}
	if i.Version != savedVersion {
		return i, fmt.Errorf("version %d of the form: accepted is %d; install again with this version, or uninstall", i.Version, savedVersion)
	}
	return i, nil
}

// savedHere reads what is saved for this network namespace; nil where nothing is.
func (s *session) savedHere() (*savedInstall, error) {
	i, err := s.saved()
	if i == nil && err == nil || !s.storeHere(tproxy.PersistSystemd, false) {
		return nil, nil
	}
	return i, err
}

// saved reads what is saved; nil where nothing is.
func (s *session) saved() (*savedInstall, error) {
	text, err := s.m.disk().ReadFile(savedName, maxStored)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var i savedInstall
	if err == nil {
		i, err = readSaved(text)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", savedName, err)
	}
	return &i, nil
}

// planOf makes the plan again, on the host as it is now.
func (s *session) planOf(ctx context.Context, i savedInstall) (*tproxy.Plan, error) {
	backend, err := tproxy.ParseBackend(i.Backend)
	if err != nil {
		return nil, err
	}
	h, err := s.probe(ctx, tproxy.Needs{IPv6: i.Config.IPFamilyMode != tproxy.IPv4Only})
	if err != nil {
		return nil, err
	}
	// The variant was chosen then; one with rules of ours has to be known as well.
	h.Variants = slices.DeleteFunc(slices.Clone(h.Variants), func(v tproxy.Variant) bool { return v.Backend != backend && len(v.Ours) == 0 })
	h.Persistence = tproxy.Persistence{Observed: true, Firewalld: slices.Contains(i.Stores, tproxy.PersistFirewalld)}
	if !slices.Contains(i.Stores, tproxy.PersistSystemd) {
		h.Persistence.NoSystemd = "systemd was not to bring it back"
	}
	h.Pod, h.Nameservers, h.Nameserver.Split = i.Pod, i.Nameservers, i.Split
	for _, r := range i.Resolvers {
		h.LocalResolvers = append(h.LocalResolvers, tproxy.LocalResolver{Address: r.Address, UID: r.UID, Program: r.Program, Untold: r.Untold})
	}
	if _, ok := h.Variant(backend); !ok {
		return nil, fmt.Errorf("the install is in %s, whose programs are not here: %w", backend, ErrUnsupported)
	}
	p, err := tproxy.Build(i.Config, h)
	if err != nil {
		return nil, err
	}
	if p.Backend != backend {
		return nil, fmt.Errorf("the install is in %s, and %s would be chosen now, %s", backend, p.Backend, p.BackendWhy)
	}
	return p, nil
}
