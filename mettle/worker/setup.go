//go:build linux

package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/mettle/worker/inputroot"
	"github.com/mettle-build/mettle/mettle/worker/livelog"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
)

const slotPrefix = "slot"

// emptyDir removes the slots in a worker's directory, and nothing else.
func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var all error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), slotPrefix) {
			all = errors.Join(all, inputroot.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return all
}

// newExecutors makes one for each slot, each of which has run a command that does
// nothing. With an error, the executors that are returned are to be closed too.
func newExecutors(ctx context.Context, o Options) ([]*Executor, error) {
	execs := make([]*Executor, o.Slots)
	policy := inputroot.LinkAndAudit
	if os.Geteuid() == 0 && o.Runner == nil {
		var err error
		if execs[0], err = tryIsolation(ctx, &o); err != nil {
			return nil, err
		}
		if policy = inputroot.Copy; execs[0] != nil {
			policy = inputroot.Link
		}
	}
	isolated := execs[0] != nil
	group, groupCtx := errgroup.WithContext(ctx)
	for i := range execs {
		if execs[i] != nil {
			continue
		}
		group.Go(func() (err error) {
			if execs[i], err = newExecutor(groupCtx, &o, i, isolated); err != nil {
				return fmt.Errorf("slot %d: %w", i, err)
			}
			return nil
		})
	}
	err := group.Wait()
	execs = slices.DeleteFunc(execs, func(e *Executor) bool { return e == nil })
	stations, stationsErr := newStations(&o, policy)
	logs, logsErr := newLogs(&o)
	for _, e := range execs {
		e.stations, e.logs = stations, logs
	}
	return execs, errors.Join(err, stationsErr, logsErr)
}

// newLogs makes what follows the commands' output; nil where there is nowhere to.
func newLogs(o *Options) (*livelog.Logs, error) {
	if o.LogStreams == nil {
		return nil, nil //nolint:nilnil // it says so
	}
	return livelog.New(livelog.Options{Streams: o.LogStreams, Logger: o.Logger})
}

// tryIsolation makes the first slot with a user of its own, and so finds out
// whether commands can run that way. If not, it says so, and returns none.
func tryIsolation(ctx context.Context, o *Options) (*Executor, error) {
	if o.nobody {
		return nil, nil //nolint:nilnil // settleIsolation has said so
	}
	if o.UIDBase < 0 {
		o.Logger.Warn("actions run as root, because they are told to: inputs are copied, not linked, and actions can change anything on this machine")
		return nil, nil //nolint:nilnil // said above
	}
	e, err := newExecutor(ctx, o, 0, true)
	if err == nil {
		return e, nil
	}
	if ctx.Err() != nil {
		return nil, err
	}
	o.Logger.Warn("actions run as root, because they can't run as users of their own: inputs are copied, not linked, and actions can change anything on this machine; "+
		"choose a --dir whose parents every user can enter (/var/cache/mettle, not below /root), and allow the worker to change its user",
		"dir", o.Dir, "user", o.UIDBase, "error", err)
	return nil, inputroot.Remove(slotDir(o, 0))
}

func slotDir(o *Options, i int) string {
	return filepath.Join(o.Dir, fmt.Sprintf("%s%d", slotPrefix, i))
}

// newExecutor makes the directory and the runner of slot i, and runs a command
// there that does nothing.
func newExecutor(ctx context.Context, o *Options, i int, isolated bool) (e *Executor, err error) {
	e = &Executor{o: o, dir: slotDir(o, i)}
	var user helper.User
	if isolated {
		id := o.UIDBase + i
		e.owner = inputroot.Owner{Set: true, UID: id, GID: id}
		user = helper.User{Set: true, UID: id, GID: id}
	}
	if err := e.makeDir(); err != nil {
		return nil, err
	}
	if e.runners, err = newRunners(o, i, user); err != nil {
		return nil, errors.Join(err, e.shelf.Close())
	}
	if o.Runner != nil {
		return e, nil
	}
	if err := e.makePersistent(user); err != nil {
		return nil, errors.Join(err, e.close())
	}
	made := e
	defer func() {
		if err != nil {
			e, err = nil, errors.Join(err, made.close())
		}
	}()
	if err := e.probe(ctx); err != nil {
		return nil, fmt.Errorf("preflight: %w", err)
	}
	return e, nil
}

// makeDir makes the slot's directory, with the shelf.
//
// The directory belongs to root where there is a user for the slot, so that no
// command can replace what is in it; its group, which is the slot's own, may pass,
// so that no other slot's command can.
func (e *Executor) makeDir() error {
	if err := os.Mkdir(e.dir, 0o700); err != nil {
		return err
	}
	if e.owner.Set {
		if err := os.Chown(e.dir, 0, e.owner.GID); err != nil {
			return err
		}
		if err := os.Chmod(e.dir, 0o710); err != nil {
			return err
		}
	}
	made, err := os.Lstat(e.dir)
	if err != nil {
		return err
	}
	shelf, err := inputroot.NewShelf(filepath.Join(e.dir, shelfName), e.owner)
	if err != nil {
		return err
	}
	e.made, e.shelf = made, shelf
	return nil
}
