//go:build !linux

package bench

import (
	"errors"
	"syscall"
)

func namespaceAttr() (*syscall.SysProcAttr, error) { return nil, errors.ErrUnsupported }
