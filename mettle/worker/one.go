//go:build linux

package worker

import (
	"context"
	"errors"
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/mettle/worker/image"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// One runs one job here, without a queue and without the ActionCache, for
// somebody who wants to see what an action does. Of o it needs Store and Dir. It
// leaves what the action left behind: the path of its input root is returned,
// also with an error where it got as far as that. Beside the root are stdout and
// stderr. The next One in the same Dir removes them.
func One(ctx context.Context, o Options, job *queuepb.Job) (resp *repb.ExecuteResponse, root string, err error) {
	if o.Store == nil || o.Dir == "" {
		return nil, "", errors.New("worker: Options need Store and Dir")
	}
	o.Slots = 1
	if o, err = o.withExecutorDefaults(); err != nil {
		return nil, "", err
	}
	if err := o.settleIsolation(); err != nil {
		return nil, "", err
	}
	if err := o.settleLimits(); err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, o.closeLimits()) }()
	lock, err := prepareDir(o.Dir)
	if err != nil {
		return nil, "", fmt.Errorf("worker directory %s: %w", o.Dir, err)
	}
	defer lock.Close() //nolint:errcheck // nothing was written
	execs, err := newExecutors(ctx, o)
	for _, e := range execs {
		defer func() { err = errors.Join(err, e.close()) }()
	}
	if err != nil {
		return nil, "", err
	}
	e := execs[0]
	r, err := e.load(ctx, job, 1)
	if err != nil {
		return nil, "", err
	}
	if asked, _ := askedImage(platformOf(r.action, r.command)); asked != "" && r.image == (image.Reference{}) {
		o.Logger.Warn("the action asks for a container image, and runs on this machine's own file system", "image", asked)
	}
	resp, err = e.execute(ctx, r)
	return resp, e.root(), err
}
