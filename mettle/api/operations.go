package api

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/mettle-build/mettle/mettle/operation"
)

// GetOperation implements google.longrunning.Operations for every name that any
// API server gave. The metadata is an ExecuteOperationMetadata. It begins no work:
// of an operation that this server does not have, and whose result is not in the
// ActionCache, it knows no more than that it is not done here, and says so by the
// stage UNKNOWN. WaitExecution and WaitOperation take such a one up. Who asks for
// an operation counts as a client that waits for it, for --abandon_after.
func (s *Server) GetOperation(ctx context.Context, req *longrunningpb.GetOperationRequest) (*longrunningpb.Operation, error) {
	n, err := operationName(req.GetName())
	if err != nil {
		return nil, toStatus(err)
	}
	c := &call{s: s, resumed: true}
	c.setName(n)
	msg, err := s.present(ctx, c)
	if err != nil {
		return nil, toStatus(err)
	}
	return msg, nil
}

// present is the present state of an operation.
func (s *Server) present(ctx context.Context, c *call) (*longrunningpb.Operation, error) {
	if w, ok := s.ops.Find(c.name); ok {
		snap, _ := w.Watch()
		s.ops.Leave(w)
		if errors.Is(snap.Err, operation.ErrCancelled) {
			return c.message(cancelled()), nil
		}
		if snap.Stage != operation.Failed {
			return c.message(snap), nil
		}
	}
	res, err := s.cached(ctx, c)
	if err != nil {
		return nil, err
	}
	if res == nil {
		return c.message(&operation.Snapshot{Stage: operation.Unknown}), nil
	}
	data, err := cachedResponse(res)
	if err != nil {
		return nil, err
	}
	return c.message(&operation.Snapshot{Stage: operation.Completed, Response: data}), nil
}

// maxWait is how long WaitOperation waits at most: longer than that, proxies and
// balancers take a call without an answer for dead.
const maxWait = 30 * time.Second

// WaitOperation implements google.longrunning.Operations: it is a WaitExecution
// of which only the last message before the timeout is seen, and so it takes up
// an operation that nobody has any more. It waits for half a minute at most,
// whatever the timeout; the caller asks again.
func (s *Server) WaitOperation(ctx context.Context, req *longrunningpb.WaitOperationRequest) (*longrunningpb.Operation, error) {
	n, err := operationName(req.GetName())
	if err != nil {
		return nil, toStatus(err)
	}
	wait, err := waitTime(ctx, req)
	if err != nil {
		return nil, toStatus(err)
	}
	waitCtx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	st := &lastMessage{ctx: waitCtx}
	if wait > 0 {
		err = s.WaitExecution(&repb.WaitExecutionRequest{Name: req.GetName()}, st) //nolint:contextcheck // it is the stream's
	}
	switch {
	case st.last != nil && (err == nil || waitCtx.Err() != nil):
		return st.last, nil
	case err != nil && waitCtx.Err() == nil:
		return nil, err
	}
	c := &call{s: s, resumed: true}
	c.setName(n)
	msg, err := s.present(ctx, c)
	if err != nil {
		return nil, toStatus(err)
	}
	return msg, nil
}

// waitTime is how long to wait, so that the answer comes before the deadline of
// the call.
func waitTime(ctx context.Context, req *longrunningpb.WaitOperationRequest) (time.Duration, error) {
	wait := maxWait
	if t := req.GetTimeout(); t != nil {
		if err := t.CheckValid(); err != nil || t.AsDuration() < 0 {
			return 0, fmt.Errorf("%w: the timeout %v is no time to wait", errInvalid, t)
		}
		wait = min(wait, t.AsDuration())
	}
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline)
		wait = min(wait, left-left/16)
	}
	return wait, nil
}

// lastMessage is the stream of a WaitExecution that only its end counts of.
type lastMessage struct {
	grpc.ServerStream                 // nil: a call uses no more than what is here
	ctx               context.Context //nolint:containedctx // as gRPC's own streams
	last              *longrunningpb.Operation
}

// Context implements grpc.ServerStream.
func (l *lastMessage) Context() context.Context { return l.ctx }

// Send implements grpc.ServerStreamingServer.
func (l *lastMessage) Send(op *longrunningpb.Operation) error {
	l.last = op
	return nil
}

// DeleteOperation implements google.longrunning.Operations: not at all, which is
// allowed. Any API server takes up any name, and so none can forget one.
func (s *Server) DeleteOperation(context.Context, *longrunningpb.DeleteOperationRequest) (*emptypb.Empty, error) {
	return nil, status.Error(codes.Unimplemented, "operations are not deleted: they are forgotten some minutes after they have ended")
}

const (
	// defaultPage and maxPage bound the operations in a reply of ListOperations.
	// All names of one execution are in one reply, so there may be some more.
	defaultPage, maxPage = 100, 1000
	// maxPageBytes bounds what all but the last of them take, far below the
	// 4 MiB that clients take.
	maxPageBytes = 512 << 10
)

// ListOperations implements google.longrunning.Operations, of what this one API
// server has: what its clients wait for, and for some minutes what has ended. The
// name is "operations", for those of all instances, or "INSTANCE/operations". The
// filter is empty, or stage=queued, stage=executing or stage=completed. An
// execution that several clients wait for is listed by each of their names.
func (s *Server) ListOperations(_ context.Context, req *longrunningpb.ListOperationsRequest) (*longrunningpb.ListOperationsResponse, error) {
	if !s.opts.List {
		return nil, toStatus(errNotListed)
	}
	if req.GetReturnPartialSuccess() {
		return nil, status.Error(codes.Unimplemented, "return_partial_success is not served: there is one collection")
	}
	l, err := s.listing(req)
	if err != nil {
		return nil, toStatus(err)
	}
	s.ops.List(l.after, l.visit)
	return l.page, nil
}

// A listing is one ListOperations on its way.
type listing struct {
	s        *Server
	instance string // of "INSTANCE/operations"
	all      bool   // of all instances
	stage    operation.Stage
	after    uint64
	size     int
	bytes    int
	page     *longrunningpb.ListOperationsResponse
}

func (s *Server) listing(req *longrunningpb.ListOperationsRequest) (*listing, error) {
	l := &listing{s: s, size: defaultPage, page: &longrunningpb.ListOperationsResponse{}}
	name := req.GetName()
	if l.all = name == "" || name == "operations"; !l.all {
		var ok bool
		if l.instance, ok = strings.CutSuffix(name, "/operations"); !ok {
			return nil, fmt.Errorf("%w: the name %.200q is neither operations nor INSTANCE/operations", errInvalid, name)
		}
	}
	switch req.GetFilter() {
	case "":
	case "stage=queued":
		l.stage = operation.Queued
	case "stage=executing":
		l.stage = operation.Executing
	case "stage=completed":
		l.stage = operation.Completed
	default:
		return nil, fmt.Errorf("%w: the filter %.200q is not stage=queued, stage=executing or stage=completed", errInvalid, req.GetFilter())
	}
	switch n := req.GetPageSize(); {
	case n < 0:
		return nil, fmt.Errorf("%w: the page size %d is negative", errInvalid, n)
	case n > 0:
		l.size = min(int(n), maxPage)
	}
	var err error
	l.after, err = s.parseToken(req.GetPageToken())
	return l, err
}

// visit puts an operation on the page, and reports whether there is room for more.
func (l *listing) visit(o operation.Listed) bool {
	if len(l.page.Operations) >= l.size || l.bytes >= maxPageBytes {
		l.page.NextPageToken = l.s.token(l.after)
		return false
	}
	l.after = o.Place
	if l.stage != operation.Unknown && o.Snapshot.Stage != l.stage {
		return true
	}
	for _, text := range o.Names {
		n, err := operation.ParseName(text)
		if err != nil || !l.all && n.Instance != l.instance {
			continue
		}
		c := &call{s: l.s}
		c.setName(n)
		msg := c.message(&o.Snapshot)
		l.bytes += proto.Size(msg)
		l.page.Operations = append(l.page.Operations, msg)
	}
	return true
}

// token is what tells this server where a page ends.
func (s *Server) token(after uint64) string {
	return base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatUint(after, 36) + "@" + s.opts.ID))
}

func (s *Server) parseToken(token string) (uint64, error) {
	if token == "" {
		return 0, nil
	}
	data, err := base64.RawURLEncoding.DecodeString(token)
	if err == nil {
		place, id, _ := strings.Cut(string(data), "@")
		after, parseErr := strconv.ParseUint(place, 36, 64)
		if parseErr == nil && id == s.opts.ID {
			return after, nil
		}
	}
	return 0, fmt.Errorf("%w: the page token is not one of this server, %s", errInvalid, s.opts.ID)
}
