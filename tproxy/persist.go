package tproxy

import (
	"fmt"
	"slices"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Persist says what brings an install back after a restart of the host, or of its
// firewall. The kernel forgets rules, addresses and interfaces when it restarts.
type Persist uint8

const (
	// PersistAuto lets Build choose: for rules in iptables firewalld where it rules this
	// network namespace, else systemd where it is process 1, else nothing.
	PersistAuto Persist = iota
	// PersistSystemd is a unit that installs again at boot, before the network is up,
	// and when a firewall is restarted that takes the rules out.
	PersistSystemd
	// PersistFirewalld is firewalld's direct.xml, out of which it loads the rules, which are
	// then those of iptables, whenever it starts or reloads; and where systemd is process 1
	// the unit too, for what firewalld has no place for, and for when it is stopped.
	PersistFirewalld
	// PersistNone is nothing.
	PersistNone
)

// String writes the way as Config's JSON has it.
func (p Persist) String() string {
	switch p {
	case PersistAuto:
		return "auto"
	case PersistSystemd:
		return "systemd"
	case PersistFirewalld:
		return "firewalld"
	case PersistNone:
		return "none"
	}
	return fmt.Sprintf("Persist(%d)", uint8(p))
}

const acceptedPersist = "auto, systemd, firewalld or none"

// ParsePersist reads what String writes; empty is auto.
func ParsePersist(s string) (Persist, error) {
	for p := PersistAuto; p <= PersistNone; p++ {
		if s == p.String() {
			return p, nil
		}
	}
	if s == "" {
		return PersistAuto, nil
	}
	return 0, fmt.Errorf("%q: accepted is %s", s, acceptedPersist)
}

// MarshalText is String.
func (p Persist) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText is ParsePersist.
func (p *Persist) UnmarshalText(text []byte) (err error) {
	*p, err = ParsePersist(string(text))
	return err
}

// Persistence is what a host has for an install to come back.
type Persistence struct {
	// Observed is whether the rest was looked at.
	Observed bool
	// NoSystemd is the reason for which systemd cannot bring anything back into this
	// network namespace; empty where it can.
	NoSystemd string
	// NoTable is the reason for which systemd, where it can bring rules back, cannot do so
	// with a table of nftables; empty where it can.
	NoTable string
	// NoFirewalld is the reason for which nothing can be put into firewalld's direct.xml;
	// empty where it can.
	NoFirewalld string
	// Firewalld is whether firewalld runs in this network namespace, and Failed the
	// reason for which what it loads cannot be relied on; empty where there is none.
	Firewalld bool
	Failed    string
	// Elsewhere is the reason for which the files of the host are not those of this
	// network namespace, so that only who names firewalld means them.
	Elsewhere string
	// Stored are the ways by which an install comes back already, in part at least.
	Stored []Persist
}

// StoreRules has an install come back after a restart.
type StoreRules struct {
	By Persist // PersistSystemd or PersistFirewalld
}

// DropStored takes out what would bring back an install that is replaced.
type DropStored struct{ By Persist }

func (StoreRules) step() {}
func (DropStored) step() {}

func (s StoreRules) String() string {
	if s.By == PersistFirewalld {
		return "the rules in direct.xml of firewalld"
	}
	return "a unit of systemd that installs again at boot"
}

// Undo puts back what was there.
func (s StoreRules) Undo() string {
	if s.By == PersistFirewalld {
		return "direct.xml of firewalld without the rules"
	}
	return "no unit of ours"
}

func (s DropStored) String() string {
	if s.By == PersistFirewalld {
		return "no rules of ours in direct.xml of firewalld"
	}
	return "no unit of ours"
}

// Undo puts back what was there.
func (s DropStored) Undo() string {
	if s.By == PersistFirewalld {
		return "the former rules in direct.xml of firewalld"
	}
	return "the former unit"
}

// choosePersist decides by what the install comes back.
func (p *Plan) choosePersist() *Refusal {
	h, asked := p.Host.Persistence, p.Config.Persist
	p.Persist, p.PersistWhy = asked, "asked for"
	switch {
	case p.Config.Pod && asked <= PersistFirewalld:
		p.Persist, p.PersistWhy = PersistNone, "a pod is made anew by its runtime"
		if asked != PersistAuto {
			return &Refusal{fmt.Sprintf("--persist %s: a pod has no %[1]s that would bring the rules back", asked), "leave it out: the runtime makes a pod anew"}
		}
	case asked == PersistAuto:
		if r := p.autoPersist(); r != nil {
			return r
		}
	case !h.Observed || asked == PersistNone:
	case asked == PersistSystemd && h.NoSystemd != "":
		return &Refusal{"--persist systemd: " + h.NoSystemd, "install after each restart, and say so with --persist none"}
	case asked == PersistSystemd && h.Firewalld && !p.survivesFirewalld():
		p.note("firewall-cmd --reload takes the rules out, and systemd does not learn of that: --persist firewalld has firewalld load them itself")
	case asked == PersistFirewalld && h.NoFirewalld != "":
		return &Refusal{"--persist firewalld: " + h.NoFirewalld, "mend that, or choose --persist systemd or none"}
	case asked == PersistFirewalld && h.Failed != "":
		return &Refusal{"--persist firewalld: " + h.Failed, "mend that first, or choose --persist systemd or none"}
	case asked == PersistFirewalld && !h.Firewalld:
		p.note("firewalld does not run here: what is in its direct.xml is loaded when it starts")
	}
	if p.Persist == PersistFirewalld && h.Observed && h.NoSystemd != "" && p.beside() {
		p.note("after a restart firewalld loads the rules, and ::6 on lo and what systemd-resolved was told are missing until install is run again: %s", h.NoSystemd)
	}
	return nil
}

// autoPersist is for who did not choose.
func (p *Plan) autoPersist() *Refusal {
	h := p.Host.Persistence
	none := func(why string) {
		p.Persist, p.PersistWhy = PersistNone, why
		if h.Observed {
			p.note("the rules do not outlive a restart of this host: %s", why)
		}
	}
	switch {
	case !h.Observed:
		none("nothing is known of the host")
	case h.Elsewhere != "":
		none(h.Elsewhere)
	case h.Firewalld && p.survivesFirewalld() && h.NoSystemd != "":
		none(h.NoSystemd)
	case h.Firewalld && p.survivesFirewalld():
		p.Persist, p.PersistWhy = PersistSystemd, "systemd is process 1, and firewalld leaves a table of nftables alone"
	case h.Firewalld && h.Failed+h.NoFirewalld != "":
		return &Refusal{"firewalld rules this host and takes rules out that it does not know, and it cannot be told of ours: " + or(h.Failed, h.NoFirewalld),
			"mend that first, or choose --persist systemd or none"}
	case h.Firewalld:
		p.Persist, p.PersistWhy = PersistFirewalld, "firewalld runs here, and takes out at each reload what it does not know"
	case h.NoSystemd == "":
		p.Persist, p.PersistWhy = PersistSystemd, "systemd is process 1"
	default:
		none(h.NoSystemd)
	}
	return nil
}

// survivesFirewalld reports whether the rules will stand in a table of our own, which
// firewalld leaves alone when it starts, reloads and stops. What does not come back after
// a restart of the host is only for where nothing else can be.
func (p *Plan) survivesFirewalld() bool {
	v, ok := p.Host.Variant(NFTables)
	switch h := p.Host.Persistence; {
	case !ok || p.Config.Backend != NFTables && p.Config.Backend != Auto:
		return false
	case p.Config.Backend == NFTables:
		return true
	case h.NoSystemd+h.NoTable != "" && len(p.iptables()) > 0:
		return false
	}
	return p.ownTable(v)
}

// beside reports whether the install has more than rules.
func (p *Plan) beside() bool {
	return slices.Contains(p.Families, rules.IPv6) || p.Config.DNS.ControlPlane.IsValid() && p.Host.Nameserver.Split == SplitLink
}

// Stores lists by what the install comes back, in the order in which that is put in
// place: the unit first, as it has all of the install.
func (p *Plan) Stores() (out []Persist) {
	h := p.Host.Persistence
	if p.Persist == PersistSystemd || p.Persist == PersistFirewalld && h.Observed && h.NoSystemd == "" && h.Elsewhere == "" {
		out = append(out, PersistSystemd)
	}
	if p.Persist == PersistFirewalld {
		out = append(out, PersistFirewalld)
	}
	return out
}

// storage are the steps by which the install comes back.
func (p *Plan) storage() (out []Step) {
	stores := p.Stores()
	for _, by := range stores {
		out = append(out, StoreRules{by})
	}
	for _, by := range p.Host.Persistence.Stored {
		if !slices.Contains(stores, by) {
			out = append(out, DropStored{by})
		}
	}
	return out
}
