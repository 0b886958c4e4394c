//go:build linux

package worker

import (
	"context"
	"errors"
	"os"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// BenchExecutor is one slot without a queue.
type BenchExecutor struct {
	e    *Executor
	lock *os.File
}

// NewBenchExecutor makes one.
func NewBenchExecutor(ctx context.Context, o Options) (*BenchExecutor, error) {
	o.Slots = 1
	o, err := o.withExecutorDefaults()
	if err != nil {
		return nil, err
	}
	if err := o.settleIsolation(); err != nil {
		return nil, err
	}
	lock, err := prepareDir(o.Dir)
	if err != nil {
		return nil, err
	}
	execs, err := newExecutors(ctx, o)
	if err != nil {
		return nil, err
	}
	return &BenchExecutor{e: execs[0], lock: lock}, nil
}

// Execute runs a job and cleans up after it.
func (b *BenchExecutor) Execute(ctx context.Context, job *queuepb.Job) (*repb.ExecuteResponse, error) {
	r, err := b.e.load(ctx, job, 1)
	if err != nil {
		return nil, err
	}
	resp, err := b.e.execute(ctx, r)
	return resp, errors.Join(err, b.e.clean())
}

// Close ends it.
func (b *BenchExecutor) Close() error { return errors.Join(b.e.close(), b.lock.Close()) }
