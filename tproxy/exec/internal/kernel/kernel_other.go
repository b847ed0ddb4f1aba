//go:build !linux

package kernel

import (
	"errors"
	"net/netip"
	"os"
	"time"

	"github.com/kumahq/kuma-tproxy/tproxy/exec/internal/procfs"
)

// LockHandle is a lock that is held.
type LockHandle struct{}

// LegacyTables is for Linux.
func LegacyTables(Family) ([]string, error) { return nil, errors.ErrUnsupported }

// LegacyRules is for Linux.
func LegacyRules(Family, string) (bool, error) { return false, errors.ErrUnsupported }

// NFTTables is for Linux.
func NFTTables() ([]NFTTable, error) { return nil, errors.ErrUnsupported }

// NFTChains is for Linux.
func NFTChains(family, table string) ([]string, error) { return nil, errors.ErrUnsupported }

// NFTBases is for Linux.
func NFTBases() ([]NFTBase, error) { return nil, errors.ErrUnsupported }

// NFTTracks is for Linux.
func NFTTracks(func(NFTTable) bool) (bool, error) { return false, errors.ErrUnsupported }

// NFTNative is for Linux.
func NFTNative(family, table string) ([]string, error) { return nil, errors.ErrUnsupported }

// Redirected is for Linux.
func Redirected(Family, ...uint16) (int, error) { return 0, errors.ErrUnsupported }

// Send is for Linux.
func Send(uint32, netip.AddrPort) (netip.AddrPort, error) {
	return netip.AddrPort{}, errors.ErrUnsupported
}

// RouteTo is for Linux.
func RouteTo(netip.Addr) (Route, error) { return Route{}, errors.ErrUnsupported }

// NFTRules is for Linux.
func NFTRules(family, table string) (bool, error) { return false, errors.ErrUnsupported }

// AddLoopbackAddress is for Linux.
func AddLoopbackAddress(netip.Prefix) (added bool, err error) { return false, errors.ErrUnsupported }

// DelLoopbackAddress is for Linux.
func DelLoopbackAddress(netip.Prefix) (removed bool, err error) { return false, errors.ErrUnsupported }

// HasLoopbackAddress is for Linux.
func HasLoopbackAddress(netip.Addr) (bool, error) { return false, errors.ErrUnsupported }

// Monitor is for Linux.
type Monitor struct{}

// OpenMonitor is for Linux.
func OpenMonitor() (*Monitor, error) { return nil, errors.ErrUnsupported }

// Watch is for Linux.
func (m *Monitor) Watch(func()) {}

// Close is for Linux.
func (m *Monitor) Close() {}

// FindLink is for Linux.
func FindLink(name string) (Link, bool, error) { return Link{}, false, errors.ErrUnsupported }

// AddLink is for Linux.
func AddLink(name, alias string, address netip.Prefix) (Link, error) {
	return Link{}, errors.ErrUnsupported
}

// DelLink is for Linux.
func DelLink(Link) (removed bool, err error) { return false, errors.ErrUnsupported }

// LocalAddresses is for Linux.
func LocalAddresses() ([]netip.Prefix, error) { return nil, errors.ErrUnsupported }

// IPv6Off is for Linux.
func IPv6Off() (off bool, why string, err error) { return false, "", errors.ErrUnsupported }

// Unlock is for Linux.
func (h *LockHandle) Unlock() error { return errors.ErrUnsupported }

// File is for Linux.
func (h *LockHandle) File() (*os.File, error) { return nil, errors.ErrUnsupported }

// XtablesLockHolder is for Linux.
func XtablesLockHolder(string) (pid int, comm string, ok bool) { return 0, "", false }

func tryLock(string) (*LockHandle, error) { return nil, errors.ErrUnsupported }

func lockHolder(name string) *HeldError { return &HeldError{Name: name} }

func holder(name string) (*HeldError, bool) { return &HeldError{Name: name}, false }

// NetworkCookie is for Linux.
func NetworkCookie() (uint64, error) { return 0, errors.ErrUnsupported }

// BootTime is for Linux.
func BootTime() (time.Duration, error) { return 0, errors.ErrUnsupported }

// LegacyChains is for Linux.
func LegacyChains(Family, string) ([]string, error) { return nil, errors.ErrUnsupported }

// ListeningTCP is for Linux.
func ListeningTCP() ([]procfs.Socket, error) { return nil, errors.ErrUnsupported }

// Release is for Linux.
func Release() (major, minor int) { return 0, 0 }
