//go:build linux

package worker

import (
	"slices"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	workerpb "github.com/mettle-build/mettle/proto/worker"
)

// overheadOf is what an action took that was not its command, by the timestamps
// of its metadata, which are all there once its outputs were collected.
func overheadOf(m *repb.ExecutedActionMetadata) *workerpb.ActionOverhead {
	between := func(from, to *timestamppb.Timestamp) *durationpb.Duration {
		return durationpb.New(max(0, to.AsTime().Sub(from.AsTime())))
	}
	o := &workerpb.ActionOverhead{
		Load:     between(m.WorkerStartTimestamp, m.InputFetchStartTimestamp),
		Fetch:    between(m.InputFetchStartTimestamp, m.InputFetchCompletedTimestamp),
		Setup:    between(m.InputFetchCompletedTimestamp, m.ExecutionStartTimestamp),
		Finish:   between(m.ExecutionCompletedTimestamp, m.OutputUploadStartTimestamp),
		Collect:  between(m.OutputUploadStartTimestamp, m.OutputUploadCompletedTimestamp),
		Conclude: between(m.OutputUploadCompletedTimestamp, m.WorkerCompletedTimestamp),
		Run:      between(m.ExecutionStartTimestamp, m.ExecutionCompletedTimestamp),
	}
	o.Total = durationpb.New(between(m.WorkerStartTimestamp, m.WorkerCompletedTimestamp).AsDuration() - o.Run.AsDuration())
	if m.QueuedTimestamp != nil {
		o.Queue = between(m.QueuedTimestamp, m.WorkerStartTimestamp)
	}
	return o
}

// describeOverhead puts the overhead into the metadata, where the command ran and
// its outputs were collected; anew where it is there already.
func (r *run) describeOverhead() {
	m := r.metadata
	if m.ExecutionCompletedTimestamp == nil || m.OutputUploadCompletedTimestamp == nil {
		return
	}
	m.AuxiliaryMetadata = slices.DeleteFunc(m.AuxiliaryMetadata, func(a *anypb.Any) bool {
		return a.MessageIs((*workerpb.ActionOverhead)(nil))
	})
	if a, err := anypb.New(overheadOf(m)); err == nil { // nothing in it cannot be encoded
		m.AuxiliaryMetadata = append(m.AuxiliaryMetadata, a)
	}
}

// observeOverhead takes the time since a lease began, now that the slot is ready for
// the next, without that of the command, if one was run.
func (s *slot) observeOverhead(begun time.Time) {
	r := s.ran
	s.ran = nil
	if r == nil || r.metadata.ExecutionCompletedTimestamp == nil {
		return
	}
	command := r.metadata.ExecutionCompletedTimestamp.AsTime().Sub(r.metadata.ExecutionStartTimestamp.AsTime())
	s.w.metrics.overhead.Observe(max(0, time.Since(begun)-command).Seconds())
}
