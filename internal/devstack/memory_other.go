//go:build !linux

package devstack

func memoryFolder() []string { return nil }
