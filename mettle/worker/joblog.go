//go:build linux

package worker

import (
	"context"
	"log/slog"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

type jobKey struct{}

// withJob is a context for what is done for a job.
func withJob(ctx context.Context, job *queuepb.Job) context.Context {
	return context.WithValue(ctx, jobKey{}, job)
}

// JobOf is the job for which something is done with ctx, as a store does that is
// asked for its inputs, or nil. It must not be changed.
func JobOf(ctx context.Context) *queuepb.Job {
	job, _ := ctx.Value(jobKey{}).(*queuepb.Job)
	return job
}

// jobLog is made when there is something to say: most jobs give no cause for it.
func (s *slot) jobLog(lease queue.Lease) *slog.Logger {
	job := lease.Job()
	return s.log.With("operation", job.GetOperation(), "digest", job.GetActionDigest(), "instance", job.GetInstanceName(), "attempt", lease.Attempt())
}

// logEnd says how a job has ended, to who wants to know of each.
func (s *slot) logEnd(ctx context.Context, lease queue.Lease, resp *repb.ExecuteResponse, begun time.Time) {
	if !s.log.Enabled(ctx, slog.LevelDebug) {
		return
	}
	s.jobLog(lease).DebugContext(ctx, "job ended", "outcome", outcome(resp), "exit_code", resp.GetResult().GetExitCode(), "duration", time.Since(begun))
}
