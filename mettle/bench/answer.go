package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	longrunningpb "cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
)

// executed is what the bench asks of an ExecuteResponse. It is read field by
// field: of an action that does nothing, the generated code for all of it would
// be a good part of what the client costs.
type executed struct {
	cached      bool
	failed      bool // has a status, or an exit code other than 0
	outputFiles int
	at          [maxStamp + 1]time.Duration // since the epoch, by field of ExecutedActionMetadata; 0: not there
}

// Fields of ExecutedActionMetadata.
const (
	queuedAt          = 2
	workerStart       = 3
	workerCompleted   = 4
	executionStart    = 7
	executionComplete = 8
	maxStamp          = executionComplete
)

// overhead is the worker's time without the command's; 0 where it is not known.
func (e *executed) overhead() time.Duration {
	for _, field := range []int{workerStart, workerCompleted, executionStart, executionComplete} {
		if e.at[field] == 0 {
			return 0
		}
	}
	return (e.at[workerCompleted] - e.at[workerStart]) - (e.at[executionComplete] - e.at[executionStart])
}

// response reads an encoded ExecuteResponse.
func (e *executed) response(b []byte) error {
	const result, cached, responseStatus = 1, 2, 3
	return everyField(b, func(num protowire.Number, value []byte, varint uint64) error {
		switch num {
		case result:
			return e.result(value)
		case cached:
			e.cached = varint != 0
		case responseStatus:
			e.failed = e.failed || len(value) > 0
		}
		return nil
	})
}

func (e *executed) result(b []byte) error {
	const outputFile, exitCode, metadata = 2, 4, 9
	return everyField(b, func(num protowire.Number, value []byte, varint uint64) error {
		switch num {
		case outputFile:
			e.outputFiles++
		case exitCode:
			e.failed = e.failed || varint != 0
		case metadata:
			return eachField(value, e.stamp)
		}
		return nil
	})
}

// stamp takes a field of ExecutedActionMetadata, if it is one of those times.
func (e *executed) stamp(num protowire.Number, value []byte) error {
	switch num {
	case queuedAt, workerStart, workerCompleted, executionStart, executionComplete:
	default:
		return nil
	}
	const seconds, nanos = 1, 2
	var at time.Duration
	err := everyField(value, func(num protowire.Number, _ []byte, varint uint64) error {
		switch num {
		case seconds:
			at += time.Duration(varint) * time.Second //nolint:gosec // a server that lies gets a wrong figure
		case nanos:
			at += time.Duration(varint) //nolint:gosec // as above
		}
		return nil
	})
	e.at[num] = at
	return err
}

// lastOperation takes the Operations of a stream, and keeps the one that is done.
type lastOperation struct{ data []byte }

func (o *lastOperation) take(data mem.BufferSlice) error {
	const done = 3
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return everyField(buf.ReadOnlyData(), func(num protowire.Number, _ []byte, varint uint64) error {
		if num == done && varint != 0 {
			o.data = append([]byte(nil), buf.ReadOnlyData()...)
		}
		return nil
	})
}

// read finds the ExecuteResponse.
func (o *lastOperation) read() (e executed, err error) {
	const response, anyValue = 5, 2
	found := false
	err = eachField(o.data, func(num protowire.Number, value []byte) error {
		if num != response {
			return nil
		}
		return eachField(value, func(num protowire.Number, value []byte) error {
			if num != anyValue {
				return nil
			}
			found = true
			return e.response(value)
		})
	})
	e.failed = e.failed || !found
	return e, err
}

// decode is the whole response, and an error where it is no success.
func (o *lastOperation) decode() (*repb.ExecuteResponse, error) {
	op := &longrunningpb.Operation{}
	if err := proto.Unmarshal(o.data, op); err != nil {
		return nil, answerError("execute: %w", err)
	}
	if err := status.ErrorProto(op.GetError()); err != nil {
		return nil, fmt.Errorf("execute: operation: %w", err)
	}
	resp := &repb.ExecuteResponse{}
	if err := op.GetResponse().UnmarshalTo(resp); err != nil {
		return nil, answerError("execute: %w", err)
	}
	if err := status.ErrorProto(resp.GetStatus()); err != nil {
		return nil, fmt.Errorf("execute: %w (%s)", err, resp.GetMessage())
	}
	if code := resp.GetResult().GetExitCode(); resp.GetResult() == nil || code != 0 {
		return nil, answerError("execute: exit code %d: %.200s %s", code, resp.GetResult().GetStderrRaw(), resp.GetMessage())
	}
	return resp, nil
}

// execute runs an Action to its end, and takes for success nothing but exit
// code 0.
func (c *client) execute(ctx context.Context, action digest.Digest) (executed, error) {
	last, err := c.operation(ctx, action)
	if err != nil {
		return executed{}, err
	}
	got, err := last.read()
	if err != nil {
		return executed{}, answerError("execute: %w", err)
	}
	if got.failed {
		if _, err := last.decode(); err != nil {
			return executed{}, err
		}
	}
	return got, nil
}

// operation is the last of a call of Execute.
func (c *client) operation(ctx context.Context, action digest.Digest) (*lastOperation, error) {
	s, err := c.open(ctx, execute)
	if err != nil {
		return nil, fmt.Errorf("execute: %w", err)
	}
	err = s.SendMsg(&repb.ExecuteRequest{
		InstanceName: c.instance, DigestFunction: c.fn.Proto(), ActionDigest: action.Proto(),
	})
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("execute: %w", err)
	}
	if err := s.CloseSend(); err != nil {
		return nil, fmt.Errorf("execute: %w", err)
	}
	last := &lastOperation{}
	for {
		err := s.RecvMsg(last)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("execute: %w", err)
		}
	}
	if last.data == nil {
		return nil, answerError("execute: the stream ended before the operation was done")
	}
	return last, nil
}
