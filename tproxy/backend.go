package tproxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// chooseBackend decides what holds the rules, from what was observed.
func (p *Plan) chooseBackend() *Refusal {
	h, asked := p.Host, p.Config.Backend
	if asked == NFTables && p.Persist == PersistFirewalld {
		return &Refusal{
			"--backend nftables: firewalld's direct rules are those of iptables, and it has no place for a table of nftables",
			"leave --store-firewalld or --persist firewalld out, as firewalld leaves a table of our own alone, or leave --backend out"}
	}
	if len(h.Variants) == 0 {
		if asked == NFTables && h.NoNFTables != "" {
			return p.missing(Variant{Backend: NFTables}, "asked for")
		}
		p.Backend, p.BackendWhy = or(asked, IPTablesNFT), "nothing is known of the host"
		if asked != Auto {
			p.BackendWhy = "asked for"
		}
		return nil
	}
	choose := func(v Variant, why string) *Refusal {
		p.Backend, p.BackendWhy = v.Backend, why
		if r := p.lostTable(); r != nil {
			return r
		}
		if r, ok := p.Translated(); ok && v.Backend != NFTables && r.Behind != v.Backend.String() {
			p.note("the rules for %s are in %s, ours in %s: whether queries reach the proxy is tried, and the install undone if they do not", r, r.Behind, v.Backend)
		}
		return p.others()
	}
	if asked != Auto {
		v, found := h.Variant(asked)
		if v.Backend = asked; !p.usable(v) || !found && asked == NFTables {
			return p.missing(v, "asked for")
		}
		if p.Persist == PersistFirewalld && !v.Default && slices.ContainsFunc(h.Variants, func(v Variant) bool { return v.Default }) {
			return &Refusal{
				fmt.Sprintf("--backend %s: firewalld loads its direct rules with what iptables means on this host, which is another one: they would come back there", asked),
				"leave --backend out, or choose --persist systemd or none"}
		}
		return choose(v, "asked for")
	}
	v, ok := h.Variant(NFTables)
	if ok && p.iptablesComesBack() {
		p.note("the rules are not in a table of nftables, which would not come back after a restart: %s", h.Persistence.NoTable)
	}
	if ok && p.ownTable(v) {
		why := ownTable
		if len(v.Ours) > 0 {
			why = "our rules are there already"
		}
		return choose(v, why)
	}
	can := p.iptables()
	switch len(can) {
	case 0:
		if ok && p.Persist != PersistFirewalld {
			return choose(v, "the only one that can be used here")
		}
		if v = h.Variants[0]; v.Backend == NFTables {
			return p.missing(Variant{Backend: IPTablesNFT}, loadsWith)
		}
		return p.missing(v, "the only one here")
	case 1:
		return choose(can[0], "the only one with all its programs here")
	}
	return choose(p.preferred(can))
}

// usable reports whether a variant has what each of the families takes.
func (p *Plan) usable(v Variant) bool {
	return !slices.ContainsFunc(p.Families, func(f rules.Family) bool { return !v.Installed(f) })
}

// iptables are the variants of it that can be used.
func (p *Plan) iptables() (out []Variant) {
	for _, v := range p.Host.Variants {
		if v.Backend != NFTables && p.usable(v) {
			out = append(out, v)
		}
	}
	return out
}

// lostTable refuses a table that systemd is to bring back and cannot.
func (p *Plan) lostTable() *Refusal {
	why := p.Host.Persistence.NoTable
	if p.Backend != NFTables || p.Persist != PersistSystemd || why == "" {
		return nil
	}
	return &Refusal{"a table of nftables would not come back after a restart: " + why,
		"install the package nftables, keep kumactl where root alone can change it, or choose --persist none"}
}

// preferred is one of several variants that can be used, and why.
func (p *Plan) preferred(can []Variant) (v Variant, why string) {
	only := func(is func(Variant) bool) bool {
		i := slices.IndexFunc(can, is)
		if i < 0 || slices.ContainsFunc(can[i+1:], is) {
			return false
		}
		v = can[i]
		return true
	}
	r, translated := p.Translated()
	switch {
	case p.Persist == PersistFirewalld && only(func(v Variant) bool { return v.Default }):
		return v, loadsWith
	case translated && only(func(v Variant) bool { return v.Backend.String() == r.Behind }):
		return v, fmt.Sprintf("the rules for %s at %s are there, and ours have to come before them", r.Program, r.Address)
	case only(func(v Variant) bool { return len(v.Ours) > 0 }):
		return v, "our rules are there already"
	case only(func(v Variant) bool { return v.Rules }):
		return v, "the other one holds no rules"
	case only(func(v Variant) bool { return v.Default }):
		return v, "it is what iptables means on this host"
	}
	return can[0], "both are here, and neither is in use"
}

const ownTable = "it takes a table of our own and one transaction, and no program"

// ownTable reports whether, unasked, the rules go into a table of nftables: where the
// kernel can, it can come back as the install is to, and no rules of ours are elsewhere.
// Its chains come before those of iptables, whichever was there first.
func (p *Plan) ownTable(v Variant) bool {
	switch {
	case p.Persist == PersistFirewalld:
		return false
	case p.iptablesComesBack():
		return false
	case len(v.Ours) > 0:
		return true
	}
	return !slices.ContainsFunc(p.Host.Variants, func(v Variant) bool { return len(v.Ours) > 0 })
}

// iptablesComesBack reports whether systemd could bring rules of iptables back, and no
// table of nftables.
func (p *Plan) iptablesComesBack() bool {
	return p.Persist == PersistSystemd && p.Host.Persistence.NoTable != "" && len(p.iptables()) > 0
}

const loadsWith = "firewalld loads its direct rules with what iptables means on this host"

// Translated returns a nameserver whose queries are to be redirected, and which rules
// of others translate too. Of the rules of two variants those that came last decide,
// and in one variant those that stand first.
func (p *Plan) Translated() (LocalResolver, bool) {
	i := slices.IndexFunc(p.Host.LocalResolvers, func(r LocalResolver) bool { return r.Behind != "" && p.Captures(r.Address) })
	if i < 0 {
		return LocalResolver{}, false
	}
	return p.Host.LocalResolvers[i], true
}

// Captures reports whether queries to a nameserver are redirected, if nothing excludes
// who sends them.
func (p *Plan) Captures(nameserver netip.Addr) bool {
	a := nameserver.Unmap().WithZone("")
	f := rules.IPv4
	if a.Is6() {
		f = rules.IPv6
	}
	return slices.Contains(p.Families, f) && (p.Config.DNS.CaptureAll || slices.Contains(p.Nameservers, a))
}

// missing says which programs of a variant are not installed.
func (p *Plan) missing(v Variant, why string) *Refusal {
	if v.Backend == NFTables {
		return &Refusal{
			fmt.Sprintf("nftables (%s) cannot be used: %s", why, or(p.Host.NoNFTables, "it was not looked for on this host")),
			"leave --backend out, or choose iptables-nft or iptables-legacy"}
	}
	var names []string
	for _, f := range p.Families {
		if !v.Installed(f) {
			name := program(v.Backend, f)
			names = append(names, strings.TrimSuffix(name, "restore")+"save", name)
		}
	}
	r := &Refusal{
		fmt.Sprintf("%s (%s) cannot be used: %s not found on PATH, /usr/sbin, /sbin, /usr/bin, /bin", v.Backend, why, strings.Join(names, ", ")),
		"install the package iptables",
	}
	if len(p.Families) == 2 && v.Installed(rules.IPv4) {
		r.Remedy += ", or leave IPv6 untouched with --ip-family-mode=ipv4"
	}
	return r
}

// others refuses when rules of ours in another backend, or in a family that is
// left out, could not be removed.
func (p *Plan) others() *Refusal {
	for _, v := range p.Host.Variants {
		for _, f := range v.Ours {
			switch {
			case v.Installed(f):
			case v.Backend != p.Backend:
				return &Refusal{
					fmt.Sprintf("%s rules of ours stand in %s, which would go on beside those in %s, and %s is not installed", f, v.Backend, p.Backend, program(v.Backend, f)),
					fmt.Sprintf("install %s, or keep to it with --backend %s", program(v.Backend, f), v.Backend),
				}
			case !slices.Contains(p.Families, f):
				return &Refusal{
					fmt.Sprintf("%s rules of ours stand in %s, which would go on, and %s is not installed", f, v.Backend, program(v.Backend, f)),
					"install " + program(v.Backend, f),
				}
			}
		}
	}
	return nil
}
