//go:build linux

package worker

import (
	"context"
	"errors"
	"fmt"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/metrics/spans"
	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// conclude sends the last report and then ends the lease. If the report can't be
// sent, the job goes back, and the next worker finds the result in the cache.
func (s *slot) conclude(ctx context.Context, lease queue.Lease, resp *repb.ExecuteResponse) {
	ctx, stop := context.WithTimeout(ctx, reportTimeout)
	defer stop()
	ctx, span := spans.Start(ctx, "report")
	defer span.End()
	data, err := proto.Marshal(resp)
	start := time.Now()
	if err == nil {
		err = s.w.o.Updates.SendUpdate(ctx, lease.Job().GetReplyTo(), &queuepb.Update{
			Operation: lease.Job().GetOperation(), Attempt: lease.Attempt(), Worker: s.w.o.Name,
			Stage: queuepb.Update_COMPLETED, ExecuteResponse: data, Sent: timestamppb.Now(),
		})
	}
	if err != nil {
		spans.Fail(span, err.Error())
		s.jobLog(lease).Error("could not report the end of a job", "error", err)
		s.release(context.WithoutCancel(ctx), lease)
		return
	}
	reported := time.Now()
	s.w.metrics.report.Observe(reported.Sub(start).Seconds())
	err = lease.Ack(ctx)
	s.w.metrics.ack.Observe(time.Since(reported).Seconds())
	if err != nil {
		s.jobLog(lease).Warn("could not acknowledge a job", "error", err)
	}
}

func (s *slot) release(ctx context.Context, lease queue.Lease) {
	ctx, stop := context.WithTimeout(ctx, reportTimeout)
	defer stop()
	if err := lease.Release(ctx); err != nil && !errors.Is(err, queue.ErrLeaseLost) {
		s.jobLog(lease).Warn("could not hand a job back", "error", err)
	}
}

func (s *slot) reject(ctx context.Context, lease queue.Lease, reason string) {
	ctx, stop := context.WithTimeout(ctx, reportTimeout)
	defer stop()
	if err := lease.Reject(ctx, reason); err != nil && !errors.Is(err, queue.ErrLeaseLost) {
		s.jobLog(lease).Warn("could not hand a job back", "error", err)
	}
}

// clean makes the slot ready for the next job. Until that succeeds, there is no
// next job.
func (s *slot) clean(ctx context.Context) {
	for {
		err := s.exec.clean()
		if err == nil || ctx.Err() != nil {
			return
		}
		s.log.Error("could not remove what an action left behind", "error", err)
		s.faults++
		s.backOff(ctx)
	}
}

// backOff waits after faults of this worker, for longer the more there were in a
// row: a broken worker that fails its jobs at once would draw all others to it.
// The shortest wait is that of a hiccup, the longest that of a repair.
func (s *slot) backOff(ctx context.Context) {
	if s.faults == 0 {
		return
	}
	s.sleep(ctx, min(100*time.Millisecond<<min(s.faults-1, 10), 30*time.Second))
}

func (s *slot) sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	case <-s.w.abort:
	}
}

// checkDisk returns an error that says so where there is no room for an action.
func (o *Options) checkDisk() error {
	if o.MinFreeDiskBytes < 0 {
		return nil
	}
	free, limit, err := o.freeDisk()
	if err == nil && free < limit {
		err = fmt.Errorf("the disk is full: %d bytes are free at %s, less than the limit of %d", free, o.Dir, limit)
	}
	return err
}

// maxDefaultFree is the most that must be free where Options do not say: room
// for what the slots' actions write while one is being leased. Of a disk the
// store leaves a twentieth free, at most 2 GiB; this is a quarter of that.
const maxDefaultFree = 512 << 20

// freeDisk is what is free on the file system of Dir, and what must be, in bytes.
func (o *Options) freeDisk() (free, limit int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(o.Dir, &st); err != nil {
		return 0, 0, err
	}
	if limit = o.MinFreeDiskBytes; limit == 0 {
		limit = min(maxDefaultFree, int64(st.Blocks)*st.Bsize/80) //nolint:gosec // no disk has 8 EiB
	}
	return int64(st.Bavail) * st.Bsize, limit, nil //nolint:gosec // as above
}
