package api

import (
	"cmp"
	"context"
	"net"
	"strings"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/mettle/history"
	"github.com/mettle-build/mettle/mettle/operation"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

const (
	// maxInvocationBytes bounds the name of an invocation: UUIDs have 36.
	maxInvocationBytes = 128
	// maxTookSeconds is more than any action may take: 30 days.
	maxTookSeconds = 30 * 24 * 3600
	// codeTimeout is google.rpc.Code.DEADLINE_EXCEEDED.
	codeTimeout = 4
)

// schedule puts into the job what a queue goes by to choose among jobs: whose it
// is, and how long it is expected to take.
func (s *Server) schedule(ctx context.Context, c *call, job *queuepb.Job, cmd *repb.Command) {
	var md repb.RequestMetadata
	if err := proto.Unmarshal(job.GetRequestMetadata(), &md); err != nil {
		md.Reset() // a header that is no message says nothing
	}
	job.Invocation = invocationOf(ctx, &md)
	a := history.Action{Instance: c.name.Instance, Target: md.GetTargetId(), Mnemonic: md.GetActionMnemonic(), Output: firstOutput(cmd)}
	if args := cmd.GetArguments(); len(args) > 0 {
		a.Program = args[0]
	}
	c.kind = s.history.Key(a)
	if d, ok := s.history.Expected(c.kind); ok {
		job.Expected = durationpb.New(d)
	}
}

// invocationOf is who shares the workers with others: the client's invocation,
// or where it does not say, the machine that it calls from.
func invocationOf(ctx context.Context, md *repb.RequestMetadata) string {
	id := cmp.Or(md.GetToolInvocationId(), md.GetCorrelatedInvocationsId())
	if id == "" {
		p, ok := peer.FromContext(ctx)
		if !ok || p.Addr == nil {
			return ""
		}
		if id = p.Addr.String(); id != "" {
			if host, _, err := net.SplitHostPort(id); err == nil {
				id = host
			}
		}
	}
	return strings.ToValidUTF8(id[:min(len(id), maxInvocationBytes)], "") // it may be cut within a character
}

func firstOutput(cmd *repb.Command) string {
	for _, paths := range [][]string{cmd.GetOutputPaths(), cmd.GetOutputFiles(), cmd.GetOutputDirectories()} {
		if len(paths) > 0 {
			return paths[0]
		}
	}
	return ""
}

func urgencyOf(job *queuepb.Job) operation.Urgency {
	return operation.Urgency{Priority: job.GetPriority(), Invocation: job.GetInvocation()}
}

// raise has the queue know that one more client waits for w's operation, which is
// more urgent for it than for those before.
func (s *Server) raise(ctx context.Context, w *operation.Wait, u operation.Urgency) {
	if s.raiser == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), publishTimeout)
	defer cancel()
	if err := s.raiser.Raise(ctx, w.Job(), u.Priority, u.Invocation); err != nil {
		s.log.WarnContext(ctx, "job not raised", "operation", w.Job(), "error", err)
	}
}

// learn has the history know how long the action of c took, if a worker ran it
// to its end or to its timeout. One that has failed has ended early.
func (s *Server) learn(c *call, response []byte) {
	if took, ok := tookOf(response); ok {
		s.history.Observe(c.kind, took)
	}
}

// Field numbers of remote_execution.proto and google/protobuf/duration.proto.
const (
	responseResult  = 1 // ExecuteResponse
	responseCached  = 2
	resultExitCode  = 4 // ActionResult
	resultMetadata  = 9
	executedVirtual = 12 // ExecutedActionMetadata
	durationSeconds = 1  // Duration
	durationNanos   = 2
)

// tookOf reads from a marshalled ExecuteResponse how long the command ran,
// without the rest, which may be large; false: that is not what it says.
func tookOf(response []byte) (took time.Duration, ok bool) {
	var cached, failed uint64
	var virtual []byte
	eachField(response, func(field protowire.Number, _ protowire.Type, value []byte) {
		switch field {
		case responseCached:
			cached, _ = protowire.ConsumeVarint(value)
		case responseResult:
			eachField(bytesOf(value), func(field protowire.Number, _ protowire.Type, value []byte) {
				switch field {
				case resultExitCode:
					failed, _ = protowire.ConsumeVarint(value)
				case resultMetadata:
					eachField(bytesOf(value), func(field protowire.Number, _ protowire.Type, value []byte) {
						if field == executedVirtual {
							virtual = bytesOf(value)
						}
					})
				}
			})
		}
	})
	code := codeOf(response)
	if cached != 0 || virtual == nil || code != 0 && code != codeTimeout || code == 0 && failed != 0 {
		return 0, false
	}
	var secs, nanos uint64
	eachField(virtual, func(field protowire.Number, _ protowire.Type, value []byte) {
		n, _ := protowire.ConsumeVarint(value)
		switch field {
		case durationSeconds:
			secs = n
		case durationNanos:
			nanos = n
		}
	})
	if secs > maxTookSeconds || nanos >= uint64(time.Second) { // also what is negative
		return 0, false
	}
	return time.Duration(secs)*time.Second + time.Duration(nanos), true //nolint:gosec // bounded
}

// bytesOf is the content of a field that has a length; nil of any other.
func bytesOf(value []byte) []byte {
	b, n := protowire.ConsumeBytes(value)
	if n < 0 {
		return nil
	}
	return b
}
