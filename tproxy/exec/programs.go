package exec

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy"
	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// variants finds the programs of iptables, and what the kernel holds of each
// variant. No table comes into being by it.
func (s *session) variants(ctx context.Context) []tproxy.Variant {
	if s.known != nil {
		return s.known
	}
	nft := tproxy.Variant{Backend: tproxy.IPTablesNFT}
	legacy := tproxy.Variant{Backend: tproxy.IPTablesLegacy}
	for _, f := range rules.Families() {
		prefix := "iptables"
		if f == rules.IPv6 {
			prefix = "ip6tables"
		}
		// What is named after a variant first; the plain names, which are one of
		// the two, fill what is left and say which is the host's own.
		for _, name := range []string{prefix + "-nft", prefix + "-legacy", prefix} {
			for _, verb := range []string{"-save", "-restore"} {
				path, target := s.m.find(name + verb)
				if path == "" {
					continue
				}
				b, version := s.variantOf(ctx, path, target)
				v := &nft
				switch b {
				case tproxy.IPTablesLegacy:
					v = &legacy
				case tproxy.Auto:
					continue // neither: not iptables, or it does not start
				}
				p := &v.IPv4
				if f == rules.IPv6 {
					p = &v.IPv6
				}
				slot := &p.Save
				if verb == "-restore" {
					slot = &p.Restore
				}
				if *slot == "" {
					*slot = path
				}
				if v.Version == "" {
					v.Version = version
				}
				v.Default = v.Default || name == "iptables" && verb == "-restore"
			}
		}
	}
	s.inKernel(&nft)
	s.inKernel(&legacy)
	var out []tproxy.Variant
	if s.m.noNFTables() == "" {
		own := tproxy.Variant{Backend: tproxy.NFTables}
		s.inKernel(&own)
		out = append(out, own)
	}
	for _, v := range []tproxy.Variant{nft, legacy} {
		if v.IPv4 != (tproxy.Programs{}) || v.IPv6 != (tproxy.Programs{}) || v.Rules || len(v.Ours) > 0 {
			out = append(out, v)
		}
	}
	return out
}

// variantOf tells the variant of a program: from the binary that the name leads
// to, which is called after it wherever iptables is a multi-call binary, and
// else from what --version says. The name itself says nothing: iptables-save
// is either.
func (s *session) variantOf(ctx context.Context, path, target string) (tproxy.Backend, string) {
	switch filepath.Base(target) {
	case "xtables-nft-multi":
		return tproxy.IPTablesNFT, ""
	case "xtables-legacy-multi", "xtables-multi": // the latter before 1.8
		return tproxy.IPTablesLegacy, ""
	}
	r, err := s.run(ctx, command{Path: path, Args: []string{"--version"}})
	if err == nil && r.Exit != 0 {
		// Old ones of -save and -restore do not know --version: iptables does.
		base := strings.TrimSuffix(strings.TrimSuffix(path, "-restore"), "-save")
		r, err = s.run(ctx, command{Path: base, Args: []string{"--version"}})
	}
	if err != nil || r.Exit != 0 {
		s.log.Warn("cannot tell which iptables this is", "program", path, "exit", r.Exit, "stderr", string(r.Stderr), "error", err)
		return tproxy.Auto, ""
	}
	// "iptables-restore v1.8.9 (nf_tables)", "ip6tables-save v1.8.9 (legacy)";
	// before 1.8 there was no word, and only what is called legacy now.
	words := strings.Fields(string(r.Stdout))
	var version string
	for _, w := range words {
		if v, ok := strings.CutPrefix(w, "v"); ok && version == "" {
			version = v
		}
		if w == "(nf_tables)" {
			return tproxy.IPTablesNFT, version
		}
	}
	if version == "" {
		return tproxy.Auto, ""
	}
	return tproxy.IPTablesLegacy, version
}

// inKernel fills in what the kernel holds of the variant.
func (s *session) inKernel(v *tproxy.Variant) {
	if v.Backend == tproxy.NFTables {
		switch has, err := s.m.hasOwnTable(); {
		case err != nil:
			v.Unknown = err.Error()
		case has:
			v.Rules, v.Ours = true, []rules.Family{0}
		}
		return
	}
	nft := v.Backend == tproxy.IPTablesNFT
	for _, f := range rules.Families() {
		tables, err := s.m.tables(nft, f)
		for _, t := range tables {
			if err != nil {
				break
			}
			var has bool
			if has, err = s.m.hasRules(nft, f, t); err == nil && has {
				v.Rules = true
			}
		}
		var ours bool
		if err == nil {
			ours, err = s.hasOurs(nft, f, tables)
		}
		if ours {
			v.Ours = append(v.Ours, f)
		}
		if err != nil {
			v.Unknown = err.Error()
			s.log.Debug("cannot tell what the kernel holds", "backend", v.Backend, "family", f, "error", err)
		}
	}
}

// hasOurs reports whether one of our chains, or of those of Kuma's own installers,
// stands in one of the tables.
func (s *session) hasOurs(nft bool, f rules.Family, tables []rules.Table) (bool, error) {
	for _, t := range tables {
		if t != rules.NAT && t != rules.Raw && t != rules.Mangle {
			continue
		}
		names, err := s.m.chains(nft, f, t)
		if err != nil {
			return false, fmt.Errorf("%s table %s: %w", f, t, err)
		}
		for _, n := range names {
			if tproxy.KnownChain(t, n) {
				return true, nil
			}
		}
	}
	return false, nil
}
