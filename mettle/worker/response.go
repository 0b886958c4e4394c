//go:build linux

package worker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	codepb "google.golang.org/genproto/googleapis/rpc/code"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/status"
	"github.com/mettle-build/mettle/mettle/command"
	"github.com/mettle-build/mettle/mettle/worker/image"
	"github.com/mettle-build/mettle/mettle/worker/output"
	"github.com/mettle-build/mettle/mettle/worker/runner"
	workerpb "github.com/mettle-build/mettle/proto/worker"
)

var (
	// errTampered: the command changed an input that is also the store's.
	errTampered = errors.New("an input was changed while the command ran, and the store has dropped it; inputs are read-only, so let the action change a copy")
	// errNoRoom: an output is larger than the store can ever hold. The action is
	// sound; it is a resource that is lacking.
	errNoRoom = errors.New("the storage has no room for an output")
	// errCancelled: nobody wants the job any more.
	errCancelled = errors.New("cancelled")
	// errPanic: a fault in this program.
	errPanic = errors.New("panic in the worker")
)

// statusOf is the status of an ExecuteResponse. What elan/status knows it knows
// for a server; here, trouble without a class is the machine's, and another
// attempt may succeed.
func statusOf(err error) *spb.Status {
	code := codepb.Code_OK
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errTimeout):
		code = codepb.Code_DEADLINE_EXCEEDED
	case errors.Is(err, errCancelled):
		code = codepb.Code_CANCELLED
	case errors.Is(err, errPanic):
		code = codepb.Code_INTERNAL
	case errors.Is(err, errTampered), errors.Is(err, command.ErrInvalid), errors.Is(err, runner.ErrOutputTooLarge),
		errors.Is(err, image.ErrRefused):
		code = codepb.Code_INVALID_ARGUMENT
	case errors.Is(err, errNoRoom), errors.Is(err, image.ErrFull):
		code = codepb.Code_RESOURCE_EXHAUSTED
	case errors.Is(err, output.ErrUnusable), errors.Is(err, image.ErrUnusable):
		code = codepb.Code_FAILED_PRECONDITION
	case errors.Is(err, blob.ErrCorrupt), errors.Is(err, image.ErrUnavailable):
		code = codepb.Code_UNAVAILABLE // the store's bytes, not the client's
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		code = codepb.Code_UNAVAILABLE // a call of ours; the action's own time is errTimeout
	}
	s := status.Proto(err)
	if code != codepb.Code_OK {
		s.Code, s.Details = int32(code), nil
	} else if s.Code == int32(codepb.Code_INTERNAL) || s.Code == int32(codepb.Code_NOT_FOUND) {
		s.Code = int32(codepb.Code_UNAVAILABLE)
	}
	return s
}

// isOurFault reports whether an error says something about this worker rather
// than about the action, so that another worker may do better. A store that is
// full is so for all of them.
func isOurFault(s *spb.Status) bool {
	switch codepb.Code(s.GetCode()) { //nolint:exhaustive // the others are not
	case codepb.Code_UNAVAILABLE, codepb.Code_INTERNAL, codepb.Code_UNKNOWN:
		return true
	}
	return false
}

// outcome is the label of a metric.
func outcome(resp *repb.ExecuteResponse) string {
	switch code := codepb.Code(resp.Status.GetCode()); code { //nolint:exhaustive // the others are errors
	case codepb.Code_OK:
		switch usageIn(resp).GetEnded() {
		case workerpb.ResourceUsage_OUT_OF_MEMORY:
			return "oom"
		case workerpb.ResourceUsage_DISK_QUOTA:
			return "disk_quota"
		case workerpb.ResourceUsage_BY_ITSELF:
		}
		if resp.Result.GetExitCode() != 0 {
			return "nonzero_exit"
		}
		return "success"
	case codepb.Code_DEADLINE_EXCEEDED:
		return "timeout"
	case codepb.Code_CANCELLED:
		return "cancelled"
	case codepb.Code_INVALID_ARGUMENT, codepb.Code_FAILED_PRECONDITION:
		return "refused"
	default:
		return "error"
	}
}

// start starts the run's clock.
func (r *run) start() {
	now := time.Now()
	r.clock = clock{base: now, started: now}
	if q := r.job.GetQueued(); q.IsValid() {
		r.metadata.QueuedTimestamp = q
		if t := q.AsTime(); t.After(now) {
			r.clock.base = t // the API server's clock is ahead of ours
		}
	}
	r.clock.last = r.clock.base
	r.metadata.WorkerStartTimestamp = r.clock.stamp()
}

// timedOut is the status of a command that its timeout ended, word for word as siso
// wants it: any other DEADLINE_EXCEEDED it takes for that of its own call, and executes
// again at once. Words for people stand in the response's message.
const timedOut = "execution timeout exceeded"

// finish completes the metadata and puts them and err into resp.
func (r *run) finish(resp *repb.ExecuteResponse, err error) {
	r.metadata.WorkerCompletedTimestamp = r.clock.stamp()
	r.describeOverhead()
	resp.Status = statusOf(err)
	if errors.Is(err, errTimeout) {
		r.notes = append(r.notes, err.Error())
		resp.Status.Message = timedOut
	}
	if resp.Result == nil && err != nil {
		// Even where there is nothing else to tell, when and where it was.
		resp.Result = &repb.ActionResult{}
	}
	resp.Result.ExecutionMetadata = r.metadata
}

// explain writes the message for the user of an action that failed.
func (e *Executor) explain(r *run, resp *repb.ExecuteResponse) {
	var b strings.Builder
	for _, n := range r.notes {
		b.WriteString(n + "\n")
	}
	if resp.Status.GetCode() != 0 || resp.Result.GetExitCode() != 0 {
		fmt.Fprintf(&b, "Ran on worker %s%s", e.o.Name, r.where)
		if r.attempt > 1 {
			fmt.Fprintf(&b, " (attempt %d)", r.attempt)
		}
		fmt.Fprintf(&b, ". To run it again by hand: mettle one %s", e.locate(r))
	}
	resp.Message = strings.TrimSuffix(b.String(), "\n")
}

// locate is the arguments by which mettle one finds the action.
func (e *Executor) locate(r *run) string {
	s := digestOf(r)
	if e.o.Addr != "" {
		s += " --remote=" + e.o.Addr
	}
	if i := r.job.GetInstanceName(); i != "" {
		s += " --instance=" + i
	}
	return s
}

func digestOf(r *run) string {
	if r.digest == (digest.Digest{}) {
		return r.job.GetActionDigest()
	}
	return r.digest.String()
}

// clock makes timestamps that never go back, whatever is done to the system's
// clock.
type clock struct {
	base    time.Time // what the first timestamp says
	started time.Time // when that was
	last    time.Time
}

func (c *clock) stamp() *timestamppb.Timestamp {
	return c.stampAt(c.started.Add(time.Since(c.started)))
}

// stampAt is the time t of the system's clock, or the last timestamp if that is
// later.
func (c *clock) stampAt(t time.Time) *timestamppb.Timestamp {
	if t = c.base.Add(t.Sub(c.started)); t.After(c.last) {
		c.last = t
	}
	return timestamppb.New(c.last)
}
