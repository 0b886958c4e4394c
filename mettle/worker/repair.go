//go:build linux

package worker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/mettle-build/mettle/mettle/worker/inputroot"
)

// repair undoes what a command can do to the slot's directory where it has no
// user of its own.
func (e *Executor) repair() error {
	if e.owner.Set {
		return nil
	}
	st, err := os.Lstat(e.dir)
	if err != nil || !os.SameFile(st, e.made) {
		return e.makeAgain()
	}
	if err := os.Chmod(e.dir, 0o700); err != nil { //nolint:gosec // a directory
		return err
	}
	entries, err := os.ReadDir(e.dir)
	for _, entry := range entries {
		switch entry.Name() {
		case rootName, stdoutName, stderrName, shelfName, persistentName:
		default:
			err = errors.Join(err, inputroot.Remove(filepath.Join(e.dir, entry.Name())))
		}
	}
	return err
}

// makeAgain makes the slot's directory where that is not the one that it was: a
// command has moved it away, or put a symlink in its place.
func (e *Executor) makeAgain() error {
	old := e.shelf
	// A runner may have the old one's files open.
	err := errors.Join(e.runners.renew(), inputroot.Remove(e.dir), removeStrays(e.o))
	if err == nil {
		err = e.makeDir()
	}
	if err != nil {
		return fmt.Errorf("make the slot's directory again: %w", err)
	}
	return old.Close()
}

// removeStrays removes what is called as if it were a slot's directory, and is none.
func removeStrays(o *Options) error {
	entries, err := os.ReadDir(o.Dir)
	if err != nil {
		return err
	}
	slots := make([]string, o.Slots)
	for i := range slots {
		slots[i] = filepath.Base(slotDir(o, i))
	}
	for _, entry := range entries {
		if name := entry.Name(); strings.HasPrefix(name, slotPrefix) && !slices.Contains(slots, name) {
			err = errors.Join(err, inputroot.Remove(filepath.Join(o.Dir, name)))
		}
	}
	return err
}
