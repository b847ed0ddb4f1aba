package tproxy

import (
	"fmt"
	"net/netip"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Host is what was observed of a machine: exec.Runner.Probe fills it in. The
// zero Host is a plain Linux with both families, of which nothing more is
// known; it does for goldens and dry runs anywhere.
type Host struct {
	// IPv6Off is the reason for which there is no IPv6 here; empty means there
	// is.
	IPv6Off string
	// IPv6Uncaptured is the reason for which there is IPv6 here that cannot be
	// redirected; empty means there is none.
	IPv6Uncaptured string
	// PassthroughAddress is whether ::6 is on lo already.
	PassthroughAddress bool
	// Pod is the reason for which this is a pod, in which SSH is captured like
	// the rest; empty means it is a host.
	Pod string

	// Users are the users that were looked up.
	Users []User
	// Nameservers are those of resolv.conf.
	Nameservers []netip.Addr
	// LocalResolvers are the processes that listen at a nameserver of
	// resolv.conf that is loopback or an own address.
	LocalResolvers []LocalResolver
	// RemoteShells are the ports by which this machine is operated.
	RemoteShells []RemoteShell
	// Variants are the variants of iptables that were found, in the order of
	// preference.
	Variants []Variant
	// NoNFTables is the reason for which NFTables is none of the Variants, where that is
	// known.
	NoNFTables string
	// Nameserver is what is known of the resolv.conf that is to be changed, or of
	// systemd-resolved, which answers for it.
	Nameserver NameserverFile
	// Persistence is what the host has for an install to come back after a restart.
	Persistence Persistence
	// Notes is what the observer has to say and no rule shows.
	Notes []string
}

// NameserverFile is a resolv.conf into which a nameserver is to go.
type NameserverFile struct {
	// Do and Undo say what an install does to it, and how that is taken back.
	Do, Undo string
	// Refused is the reason for which it must not be changed: somebody else manages
	// it, or it is not this network namespace's.
	Refused string
	// Split is how systemd-resolved, where it answers for the file, sends the names of
	// the mesh alone to the control plane; the file stays as it is.
	Split Split
}

// Split is how systemd-resolved is told to ask the control plane for the names of the
// mesh, and for no other.
type Split uint8

// The ways.
const (
	// NoSplit is for a nameserver in the file.
	NoSplit Split = iota
	// SplitDelegate is a file of systemd.dns-delegate(5), of systemd 258 and later.
	SplitDelegate
	// SplitLink is the interface MeshLink, with the control plane as its server. It
	// takes a rule: what leaves by it is routed anew.
	SplitLink
)

// MeshLink is the interface of ours by which an older systemd-resolved asks the
// control plane.
const MeshLink = "kuma-mesh"

// User is a user of the machine's name service.
type User struct {
	Name string
	UID  UID
}

// LocalResolver is a process that answers DNS on this host.
type LocalResolver struct {
	Address netip.Addr
	UID     UID
	PID     int
	Program string
	// Untold is the reason for which no user tells its own queries from those of
	// others: UID is then not left alone, and is 0 where it cannot be seen, as is PID.
	// Empty means that UID tells them.
	Untold string
	// Behind is what holds rules of others that translate queries to it: the name of a
	// Backend, or a table of nftables. Empty means that it gets them as they are sent.
	Behind string
}

func (r LocalResolver) String() string {
	if r.PID == 0 {
		return fmt.Sprintf("%s at %s", r.Program, r.Address)
	}
	return fmt.Sprintf("%s at %s (process %d, UID %d)", r.Program, r.Address, r.PID, r.UID)
}

// RemoteShell is a port by which somebody operates the machine from afar.
type RemoteShell struct {
	Port uint16
	Why  string // how it is known
}

// Variant is what can hold the rules on a host: a variant of iptables, or nftables.
type Variant struct {
	Backend Backend
	Version string // such as 1.8.9, where known
	// Programs are the paths of the programs of each family; an empty path
	// means there is none. NFTables has none.
	IPv4, IPv6 Programs
	// Default is whether the plain names, iptables-save and so on, are this
	// variant: what other programs on this host use unasked.
	Default bool
	// Rules is whether the kernel holds rules of this variant.
	Rules bool
	// Ours are the families in which some of those rules are ours, or were left by
	// Kuma's own installer. Of NFTables it is 0, which is both, if there is a table of ours.
	Ours []rules.Family
	// Unknown is the reason for which Rules and Ours could not be told.
	Unknown string
}

// Programs are the programs of a variant for one family.
type Programs struct{ Save, Restore string }

// For returns the programs of a family.
func (v Variant) For(f rules.Family) Programs {
	if f == rules.IPv6 {
		return v.IPv6
	}
	return v.IPv4
}

// Installed reports whether the variant has the programs for a family, or needs none.
func (v Variant) Installed(f rules.Family) bool {
	if v.Backend == NFTables {
		return true
	}
	p := v.For(f)
	return p.Save != "" && p.Restore != ""
}

// Variant returns the host's variant of that backend.
func (h Host) Variant(b Backend) (Variant, bool) {
	for _, v := range h.Variants {
		if v.Backend == b {
			return v, true
		}
	}
	return Variant{}, false
}

// Needs is what has to be observed of a machine before a Config can be built
// for it.
type Needs struct {
	// User is the name or number of the proxy's user; empty when the Config has
	// numbers.
	User string
	// DefaultUser is whether nobody named the proxy's user: UID 5678 is meant,
	// or, when no user has it, the user kuma-dp.
	DefaultUser bool
	// ResolvConf is the path of resolv.conf; empty when DNS is not redirected.
	ResolvConf string
	// Nameserver is what is to become the first nameserver of a resolv.conf; nil when
	// nothing is.
	Nameserver *PutNameserver
	// IPv6 is whether the Config wants IPv6 redirected.
	IPv6 bool
	// Persist is what the install is to come back by; nil is not to be looked at, as in
	// a pod.
	Persist *Persist
	// RemoteShells is whether inbound connections are to be redirected.
	RemoteShells bool
}

// Needs returns what Build has to know of the machine for this Config.
func (c Config) Needs() Needs {
	n := Needs{IPv6: c.IPFamilyMode != IPv4Only, RemoteShells: !c.Inbound.Off && !c.Pod}
	if len(c.ProxyUIDs) == 0 {
		n.User, n.DefaultUser = c.ProxyUser, c.ProxyUser == ""
	}
	if !c.Pod {
		n.Persist = &c.Persist
	}
	if c.DNS.On() {
		n.ResolvConf = or(c.DNS.ResolvConf, DefaultResolvConf)
	}
	if a := c.DNS.ControlPlane; a.IsValid() {
		n.Nameserver = &PutNameserver{Path: or(c.DNS.ResolvConf, DefaultResolvConf), Address: a, Shared: c.DNS.ModifyShared}
	}
	return n
}
