//go:build linux

package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	codepb "google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/metrics/spans"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/worker/inputroot"
	"github.com/mettle-build/mettle/mettle/worker/livelog"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// slot is one action at a time, in one goroutine.
type slot struct {
	w     *Worker
	index int
	exec  *Executor
	log   *slog.Logger
	// faults counts the jobs in a row that failed by this worker's own fault.
	faults int
	// ran is the last job that got as far as its input root, until its overhead
	// has been observed.
	ran *run
	// broken says that the slot is to show that it works before the worker takes
	// another job.
	broken bool
}

// The causes of an early end of a job, beside errCancelled.
var (
	errLeaseLost = fmt.Errorf("the command was killed: %w", queue.ErrLeaseLost)
	errAborted   = errors.New("the worker was told to end at once")
)

// reportTimeout bounds the calls that must be made even when nobody waits any
// longer: reports, acknowledgements.
const reportTimeout = 30 * time.Second

// run leases and runs jobs until ctx is done.
func (s *slot) run(ctx context.Context) error {
	if s.broken {
		s.recover(ctx)
	}
	for {
		taking, ok := s.w.gate.pass(ctx, s.w.abort, s.dropRoots)
		if !ok {
			return nil
		}
		free := time.Now()
		lease, err := s.lease(taking)
		switch {
		case err != nil && ctx.Err() != nil:
			return nil
		case errors.Is(err, queue.ErrClosed):
			return nil
		case err != nil && taking.Err() != nil: // the gate has been shut
		case err != nil:
			s.log.Warn("no job could be leased", "error", err)
			s.faults++
			s.backOff(ctx)
		case taking.Err() != nil && ctx.Err() == nil:
			s.release(context.WithoutCancel(ctx), lease)
		default:
			// What runs when ctx is done runs to its end.
			begun := time.Now()
			s.w.metrics.idle.Observe(begun.Sub(free).Seconds())
			s.handle(context.WithoutCancel(ctx), lease)
			s.clean(ctx)
			s.observeOverhead(begun)
			s.recover(ctx)
		}
	}
}

// lease waits for a job. A slot that has waited for long, or must wait because the
// disk is full, say, gives up the input roots that it kept.
func (s *slot) lease(taking context.Context) (queue.Lease, error) {
	if !s.exec.shelf.HasRoots() {
		return s.w.o.Jobs.Lease(taking, s.w.o.Pools)
	}
	ctx, stop := context.WithTimeout(taking, inputroot.KeepFor)
	lease, err := s.w.o.Jobs.Lease(ctx, s.w.o.Pools)
	idle := err != nil && ctx.Err() != nil && taking.Err() == nil
	stop()
	if !idle {
		return lease, err
	}
	s.dropRoots()
	return s.w.o.Jobs.Lease(taking, s.w.o.Pools)
}

func (s *slot) dropRoots() {
	if err := s.exec.shelf.Drop(); err != nil {
		s.log.Warn("could not remove an input root that was kept", "error", err)
	}
}

// handle runs the job of a lease to its report, and ends the lease.
func (s *slot) handle(ctx context.Context, lease queue.Lease) {
	s.w.running(1)
	defer s.w.running(-1)
	begun := time.Now()
	ctx, span := s.beginSpan(withJob(ctx, lease.Job()), lease)
	defer span.End()
	jobCtx, cancel := context.WithCancelCause(ctx)
	done, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		s.watch(jobCtx, lease, cancel, done)
	}()
	defer func() {
		close(done)
		<-watched
		cancel(nil)
	}()
	resp, err := s.execute(jobCtx, lease)
	switch {
	case errors.Is(err, errLeaseLost):
		s.w.metrics.actions.WithLabelValues("lost").Inc()
		endWithout(span, "lost", err)
		s.jobLog(lease).Warn("the lease of a running job was lost, it was killed")
		return
	case err != nil: // aborted
		s.w.metrics.actions.WithLabelValues("released").Inc()
		endWithout(span, "released", err)
		s.release(ctx, lease)
		return
	}
	describeEnd(span, resp)
	if s.exec.imageAway {
		s.exec.imageAway = false
		// Another worker may have the image, or a way to the registry; nothing is
		// wrong with this one for all other jobs.
		s.w.metrics.actions.WithLabelValues("rejected").Inc()
		s.reject(ctx, lease, short(resp.Status.GetMessage()))
		return
	}
	if isOurFault(resp.Status) {
		s.fault(ctx, lease, resp.Status.GetMessage())
		return
	}
	if err := s.failedByDisk(resp); err != nil {
		s.fault(ctx, lease, err.Error())
		return
	}
	if codepb.Code(resp.Status.GetCode()) == codepb.Code_RESOURCE_EXHAUSTED {
		s.faults++ // a full store is left alone for a while
	} else {
		s.faults = 0
		s.w.faults.Store(0)
	}
	s.w.metrics.actions.WithLabelValues(outcome(resp)).Inc()
	s.w.metrics.observe(ctx, s.ran, resp.GetResult())
	if peak := usageIn(resp).GetPeakMemoryBytes(); peak > 0 {
		s.w.metrics.peak.Observe(float64(peak))
	}
	s.conclude(ctx, lease, resp)
	s.logEnd(ctx, lease, resp, begun)
}

// watch extends the lease, and cancels the job when it is not to go on. It hears
// of that also while the broker does not answer.
func (s *slot) watch(ctx context.Context, lease queue.Lease, cancel context.CancelCauseFunc, done <-chan struct{}) {
	extend := time.NewTicker(s.w.o.LeaseExtendEvery)
	defer extend.Stop()
	callCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	extended := make(chan error, 1)
	pending := false
	defer func() {
		stop()
		if pending {
			<-extended //nolint:errcheck // nobody needs it any more
		}
	}()
	cancelled, abort := lease.Cancelled(), s.w.abort
	for {
		select {
		case <-done:
			return
		case <-cancelled:
			cancel(errCancelled)
			cancelled = nil // the report is still to come
		case <-abort:
			cancel(errAborted)
			abort = nil
		case <-extend.C:
			if !pending {
				pending = true
				go func() { extended <- s.extend(callCtx, lease) }()
			}
		case err := <-extended:
			pending = false
			if errors.Is(err, queue.ErrLeaseLost) {
				cancel(errLeaseLost)
				return
			}
			if err != nil {
				s.jobLog(lease).Warn("a lease could not be extended", "error", err)
			}
		}
	}
}

// minExtendTimeout is how long a broker may take to extend a lease at least.
const minExtendTimeout = 5 * time.Second

// extend extends a lease. A call that is lost leaves time for another one before
// the lease lapses.
func (s *slot) extend(ctx context.Context, lease queue.Lease) error {
	ctx, stop := context.WithTimeout(ctx, max(s.w.o.LeaseExtendEvery, minExtendTimeout))
	defer stop()
	start := time.Now()
	err := lease.Extend(ctx)
	s.w.metrics.extend.Observe(time.Since(start).Seconds())
	return err
}

// execute is the way from a job to a response. An error says that there is to be
// no response from here.
func (s *slot) execute(ctx context.Context, lease queue.Lease) (resp *repb.ExecuteResponse, err error) {
	var r *run
	defer func() {
		if p := recover(); p != nil {
			s.jobLog(lease).Error("panic while running an action", "panic", p, "stack", string(debug.Stack()))
			resp, err = s.fail(r, lease, fmt.Errorf("%w: %v", errPanic, p)), nil
		}
	}()
	r, err = s.exec.load(ctx, lease.Job(), lease.Attempt())
	s.w.metrics.leased(r)
	if err != nil {
		return s.endEarly(ctx, r, lease, err)
	}
	if resp := s.earlierResult(ctx, r); resp != nil {
		return resp, nil
	}
	defer s.announce(ctx, r)()
	s.ran = r
	resp, err = s.exec.execute(ctx, r)
	if err != nil {
		return s.endEarly(ctx, r, lease, err)
	}
	return resp, s.store(ctx, r, resp)
}

// endEarly is the response for err, unless there is to be none.
func (s *slot) endEarly(ctx context.Context, r *run, lease queue.Lease, err error) (*repb.ExecuteResponse, error) {
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if errors.Is(err, errLeaseLost) || errors.Is(err, errAborted) {
		return nil, err
	}
	return s.fail(r, lease, err), nil
}

// fail is the response for an error. The run may be nil.
func (s *slot) fail(r *run, lease queue.Lease, err error) *repb.ExecuteResponse {
	if r == nil {
		r = &run{job: lease.Job(), attempt: lease.Attempt(), metadata: &repb.ExecutedActionMetadata{Worker: s.w.o.Name}}
		r.start()
	}
	resp := &repb.ExecuteResponse{}
	r.finish(resp, err)
	s.exec.explain(r, resp)
	return resp
}

// longWait is how long a job has been in the queue that looks for a result before
// its first attempt, too. In less time than that, hardly anything has ended that
// runs longer than the look takes.
const longWait = 200 * time.Millisecond

// earlierResult looks whether an earlier attempt got as far as storing its
// result, or, where the job had to wait, another job for the same action: one
// that another API server published. A job that must not use the cache may use
// what it has put there itself, which is told by the time at which it was queued.
func (s *slot) earlierResult(ctx context.Context, r *run) *repb.ExecuteResponse {
	if r.action.DoNotCache || r.attempt <= 1 && r.waited() < longWait {
		return nil
	}
	inside, span := spans.Start(ctx, "cache lookup")
	result, err := s.w.o.Actions.Get(inside, r.key())
	span.End()
	if err != nil {
		return nil // it runs, then
	}
	own := proto.Equal(result.GetExecutionMetadata().GetQueuedTimestamp(), r.job.GetQueued())
	if r.job.GetSkipCacheLookup() && !own {
		return nil
	}
	return &repb.ExecuteResponse{Result: result, CachedResult: !own}
}

// announce tells the API server that the job runs, if it still does after
// Options.AnnounceAfter. It is no more than news: if it does not arrive, the next
// does. The function that it returns ends that, so that it is never said after the
// job's end.
func (s *slot) announce(ctx context.Context, r *run) (end func()) {
	// By other goroutines, while r changes.
	so := &repb.ExecutedActionMetadata{
		Worker: r.metadata.Worker, QueuedTimestamp: r.metadata.QueuedTimestamp, WorkerStartTimestamp: r.metadata.WorkerStartTimestamp,
	}
	r.announce = func(ctx context.Context, n livelog.Names) { s.tell(ctx, r, so, n) }
	if s.w.o.AnnounceAfter < 0 {
		s.tell(ctx, r, so, livelog.Names{})
		return func() {}
	}
	told := make(chan struct{})
	timer := time.AfterFunc(s.w.o.AnnounceAfter, func() {
		defer close(told)
		s.tell(ctx, r, so, livelog.Names{})
	})
	return func() {
		if !timer.Stop() {
			<-told
		}
	}
}

// tell reports how a job goes.
func (s *slot) tell(ctx context.Context, r *run, so *repb.ExecutedActionMetadata, n livelog.Names) {
	ctx, stop := context.WithTimeout(ctx, reportTimeout)
	defer stop()
	partial, err := proto.Marshal(so)
	if err == nil {
		err = s.w.o.Updates.SendUpdate(ctx, r.job.GetReplyTo(), &queuepb.Update{
			Operation: r.job.GetOperation(), Attempt: r.attempt, Worker: s.w.o.Name,
			Stage: queuepb.Update_EXECUTING, PartialMetadata: partial, Sent: timestamppb.Now(),
			StdoutStreamName: n.Stdout, StderrStreamName: n.Stderr,
		})
	}
	if err != nil {
		s.log.WarnContext(ctx, "could not report that a job runs", "operation", r.job.GetOperation(), "error", err)
	}
}

// store puts the result into the ActionCache, if it may be there, or to the
// failures where the command failed. Where blobs of
// it are gone already, nobody could use it, and the response says so; with any
// other trouble of the cache the client has its result all the same.
func (s *slot) store(ctx context.Context, r *run, resp *repb.ExecuteResponse) error {
	if r.action.DoNotCache {
		return nil
	}
	if resp.Status.GetCode() != 0 || resp.Result.ExitCode != 0 {
		s.keepFailure(ctx, r, resp)
		return nil
	}
	inside, span := spans.Start(ctx, "store result")
	err := s.w.o.Actions.Put(inside, r.key(), withoutInline(resp.Result))
	spans.End(span, err)
	var missing *blob.MissingError
	switch {
	case errors.As(err, &missing):
		err = fmt.Errorf("%w: outputs were evicted as soon as they were stored: %s", blob.ErrUnavailable, missing.Error())
		resp.Result = nil
		r.finish(resp, err)
		s.exec.explain(r, resp)
	case err != nil:
		s.log.WarnContext(ctx, "a result could not be cached", "digest", r.digest, "error", err)
	}
	if cause := context.Cause(ctx); errors.Is(cause, errLeaseLost) {
		return cause
	}
	return nil
}

// keepFailure keeps resp for people to look at, where the command ran and failed,
// and tells them how. What failed by the fault of something else is no result.
func (s *slot) keepFailure(ctx context.Context, r *run, resp *repb.ExecuteResponse) {
	code := codepb.Code(resp.Status.GetCode())
	if s.w.o.Failures == nil || code != codepb.Code_OK && code != codepb.Code_DEADLINE_EXCEEDED || r.metadata.ExecutionStartTimestamp == nil {
		return
	}
	callCtx, stop := context.WithTimeout(ctx, reportTimeout)
	defer stop()
	if err := s.w.o.Failures.Put(callCtx, r.key(), resp); err != nil {
		s.log.WarnContext(ctx, "a failed result could not be kept for a look", "digest", r.digest, "error", err)
		return
	}
	resp.Message += fmt.Sprintf("\nWhat it printed and made is kept: mettle one --kept %s", s.exec.locate(r))
}

// withoutInline is a result as the cache keeps it. It shares everything with r.
func withoutInline(r *repb.ActionResult) *repb.ActionResult {
	if len(r.StdoutRaw) == 0 && len(r.StderrRaw) == 0 {
		return r
	}
	return &repb.ActionResult{
		OutputFiles:             r.OutputFiles,
		OutputFileSymlinks:      r.OutputFileSymlinks,
		OutputSymlinks:          r.OutputSymlinks,
		OutputDirectories:       r.OutputDirectories,
		OutputDirectorySymlinks: r.OutputDirectorySymlinks,
		ExitCode:                r.ExitCode,
		StdoutDigest:            r.StdoutDigest,
		StderrDigest:            r.StderrDigest,
		ExecutionMetadata:       r.ExecutionMetadata,
	}
}
