//go:build !linux

package cni

const nonblock = 0
