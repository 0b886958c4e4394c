//go:build linux

package worker

import (
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/mettle/command"
	"github.com/mettle-build/mettle/mettle/platform"
)

// place is what an action may choose of where it runs. The zero place is the usual
// one.
type place struct {
	network bool   // that of the worker
	image   string // the digest of a container image; "": the machine's own file system
}

// platformOf is the action's platform, and that of older clients' commands.
func platformOf(a *repb.Action, c *repb.Command) *repb.Platform {
	if p := a.GetPlatform(); p != nil {
		return p
	}
	return c.GetPlatform() // clients of API 2.1 and before
}

// placeOf is what the action's platform asks for: it is the action's, and of older
// clients the command's.
func (o *Options) placeOf(a *repb.Action, c *repb.Command) (place, error) {
	var p place
	for _, pr := range platformOf(a, c).GetProperties() {
		if pr.GetName() == platform.Network && pr.GetValue() == platform.ExternalNetwork {
			p.network = true
		}
	}
	if p.network && o.sandboxed && !o.AllowNetwork {
		return place{}, fmt.Errorf("%w: the action asks for %s=%s, which this worker does not give to actions (--allow_network does)", command.ErrInvalid, platform.Network, platform.ExternalNetwork)
	}
	if !o.sandboxed {
		p.network = false // there is one place
	}
	return p, nil
}
