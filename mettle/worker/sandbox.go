//go:build linux

package worker

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	"github.com/mettle-build/mettle/mettle/worker/runner/bare"
	"github.com/mettle-build/mettle/mettle/worker/runner/helper"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
	"github.com/mettle-build/mettle/mettle/worker/runner/seccomp"
)

// Isolation is what keeps actions from the machine that they run on.
type Isolation string

// What there is.
const (
	// Bare actions see the machine as users of their own see it, where the worker
	// is root, and otherwise as it does.
	Bare Isolation = "bare"
	// Namespaces are a sandbox for each slot: see runner/sandbox.
	Namespaces Isolation = "namespace"
	// Auto is Namespaces where the machine allows them, and otherwise Bare, of
	// which Notes tells.
	Auto Isolation = "auto"
)

// settleIsolation makes a sandbox, for a try, unless none is wanted.
func (o *Options) settleIsolation() error {
	switch o.Isolation {
	case "", Bare:
		return nil
	case Auto, Namespaces:
	default:
		return fmt.Errorf("worker: isolation %q", o.Isolation)
	}
	if o.Runner != nil {
		return fmt.Errorf("worker: isolation %q is up to the Runner that is given", o.Isolation)
	}
	if o.Syscalls == sandbox.UsualSyscalls && !seccomp.Supported() {
		o.Syscalls = sandbox.AllSyscalls
		o.note = seccomp.ErrUnsupported.Error()
		o.Logger.Warn("actions may make all system calls in their sandbox", "error", seccomp.ErrUnsupported)
	}
	var user helper.User
	if os.Geteuid() == 0 && o.UIDBase >= 0 {
		user = helper.User{Set: true, UID: o.UIDBase, GID: o.UIDBase}
	}
	err := o.trySandbox(user)
	if err == nil || errors.Is(err, sandbox.ErrOptions) {
		return err
	}
	if user.Set {
		o.nobody = true
		if o.trySandbox(helper.User{}) == nil {
			return o.settleForNobody(err)
		}
		o.nobody = false
	}
	if o.Isolation == Namespaces {
		return err
	}
	o.note = fmt.Sprintf("actions are not isolated from this machine: %v", err)
	o.Logger.Warn("actions are not isolated from this machine, which does not allow it: they can read its files, use its network, and see its processes", "error", err)
	return nil
}

// trySandbox makes a sandbox, for a try.
func (o *Options) trySandbox(user helper.User) error {
	r, err := sandbox.New(o.sandbox(user, place{}, nil))
	if err != nil {
		return fmt.Errorf("worker: actions can't be isolated: %w", err)
	}
	o.sandboxed = true
	return r.Close()
}

// settleForNobody is for a root that can be no other user, as in a container that has
// one user, or may not change it: err says so. Actions have the worker's rights then,
// as those of any other user's worker do, and no capabilities; only they don't take
// themselves for root.
func (o *Options) settleForNobody(err error) error {
	if o.Isolation == Namespaces {
		return fmt.Errorf("%w: the users from UIDBase %d on can't be had in a sandbox; choose others (/proc/self/uid_map lists those there are), "+
			"let the worker change its user (CAP_SETUID and CAP_SETGID), or run it as another user than root", err, o.UIDBase)
	}
	o.note = fmt.Sprintf("actions run as the worker's own user in their sandbox, not as users of their slots: %v", err)
	o.Logger.Warn("actions run as the worker's own user in their sandbox, not as users of their slots: inputs are copied, not linked", "user", o.UIDBase, "error", err)
	return nil
}

// offerNetwork adds to Properties that actions can have the worker's network, where
// that is so.
func (o *Options) offerNetwork() {
	network := platform.Property{Name: platform.Network, Value: platform.ExternalNetwork}
	bare := !o.sandboxed && o.Runner == nil // and can't withhold it
	if (o.AllowNetwork || bare) && !slices.Contains(o.Properties, network) {
		o.Properties = append(slices.Clone(o.Properties), network)
	}
}

// Properties are those of Options, and what New found that there is.
func (w *Worker) Properties() []platform.Property { return w.o.Properties }

func (o *Options) sandbox(user helper.User, p place, layers []string) sandbox.Options {
	s := sandbox.Options{User: user, Root: o.SandboxRoot, Layers: layers, Hide: append([]string{o.Dir}, o.Hide...), Show: o.Show, Syscalls: o.Syscalls, Logger: o.Logger}
	if p.network {
		s.Network = sandbox.HostNetwork
	}
	if o.nobody {
		s.Identity = sandbox.AsNobody
	}
	return s
}

// newRunner makes a runner of a slot, for the actions of one place, in the layers of
// its image if it has one.
func (o *Options) newRunner(user helper.User, p place, layers []string) (runner.Runner, error) {
	return o.makeRunner(user, o.sandbox(user, p, layers), nil)
}

func (o *Options) makeRunner(user helper.User, s sandbox.Options, streams *runner.Streams) (runner.Runner, error) {
	bounds, err := o.bounds(user)
	if err != nil {
		return nil, err
	}
	if o.sandboxed {
		s.Bounds, s.Streams = bounds, streams
		return sandbox.New(s)
	}
	return bare.New(bare.Options{User: user, Bounds: bounds, Streams: streams, Logger: o.Logger})
}

// Isolation is what keeps actions from this machine: Bare or Namespaces.
func (w *Worker) Isolation() Isolation { return w.o.isolation() }

func (o *Options) isolation() Isolation {
	if o.sandboxed {
		return Namespaces
	}
	return Bare
}

// Notes are what an operator should know of a worker that takes jobs.
func (w *Worker) Notes() []string {
	var notes []string
	for _, n := range []string{w.o.note, w.o.limitsNote} {
		if n != "" {
			notes = append(notes, n)
		}
	}
	return notes
}
