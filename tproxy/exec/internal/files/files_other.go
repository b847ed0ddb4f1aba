//go:build !linux

package files

import (
	"errors"
	"os"

	"github.com/kumahq/kuma-tproxy/tproxy/dns"
)

func isBusy(error) bool     { return false }
func rmdir(string) error    { return errors.ErrUnsupported }
func writable(string) error { return errors.ErrUnsupported }
func isInvalid(error) bool  { return false }

func inode(os.FileInfo) string { return "" }

// Mine is for Linux.
func Mine(os.FileInfo) bool { return false }

func openRegular(string, int) (*os.File, error) { return nil, errors.ErrUnsupported }

// Lstat is for Linux.
func (FS) Lstat(string) (dns.Info, error) { return dns.Info{}, errors.ErrUnsupported }

func setxattr(string, dns.Xattr) error { return errors.ErrUnsupported }

func chown(*os.File, dns.Info) error { return errors.ErrUnsupported }
