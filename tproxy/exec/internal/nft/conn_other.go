//go:build !linux

package nft

import (
	"errors"

	"github.com/kumahq/kuma-tproxy/tproxy/rules"
)

// Conn is for Linux.
type Conn struct{}

// Open is for Linux.
func Open() (*Conn, error) { return nil, errors.ErrUnsupported }

// Close is for Linux.
func (c *Conn) Close() {}

// Supported is for Linux.
func (c *Conn) Supported() error { return errors.ErrUnsupported }

// Send is for Linux.
func (c *Conn) Send(*Batch, uint32) error { return errors.ErrUnsupported }

// List is for Linux.
func (c *Conn) List(table string) (*rules.Native, uint32, error) {
	return nil, 0, errors.ErrUnsupported
}

// ListForeign is for Linux.
func (c *Conn) ListForeign(family, table string) (*rules.Native, error) {
	return nil, errors.ErrUnsupported
}
