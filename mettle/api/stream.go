package api

import (
	"errors"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/mettle-build/mettle/mettle/operation"
)

// drainGrace is how long a stream waits, when the server shuts down, for a
// result that a worker has sent and that is still on its way.
const drainGrace = 250 * time.Millisecond

// clientLimit is the largest message, in bytes, that gRPC's clients take unless they
// are told otherwise, in all languages.
const clientLimit = 4 << 20

// follow sends the client the states of what it waits for until that has ended.
// The client is one of those that w counts. The error is operation.ErrWithdrawn
// as it is where the call is to begin anew.
func (c *call) follow(w *operation.Wait) error {
	defer c.s.ops.Leave(w)
	c.link(w)
	done := c.stream.Context().Done()
	draining := c.s.draining
	timer := time.NewTimer(c.s.opts.KeepAlive)
	defer timer.Stop()
	var grace <-chan time.Time
	for {
		snap, changed := w.Watch()
		if snap.Stage == operation.Failed {
			return c.failed(snap.Err)
		}
		if err := c.send(snap); err != nil {
			return err
		}
		if snap.Ended() {
			return nil
		}
		timer.Reset(c.s.opts.KeepAlive)
		select {
		case <-changed:
		case <-timer.C: // the newest state, once more
			c.insist(w)
		case <-done:
			return status.FromContextError(c.stream.Context().Err()).Err()
		case <-draining:
			draining, grace = nil, time.After(drainGrace)
		case <-grace:
			return toStatus(errDraining)
		}
	}
}

// failed ends the call for an operation that has Failed.
func (c *call) failed(err error) error {
	switch {
	case errors.Is(err, operation.ErrWithdrawn):
		return err
	case errors.Is(err, operation.ErrCancelled):
		c.outcome = outcomeCancelled
		return c.send(cancelled())
	default:
		return toStatus(err)
	}
}

// cancelled is the end that was asked for, as clients see it.
func cancelled() *operation.Snapshot {
	return &operation.Snapshot{Stage: operation.Completed, Response: failure(operation.ErrCancelled)}
}

// send sends one state of the operation under the client's own name for it.
func (c *call) send(snap *operation.Snapshot) error {
	if snap.Stage == operation.Completed && c.outcome == outcomeNone {
		c.outcome, c.response = outcomeOf(snap.Response), snap.Response
		if c.ours {
			c.s.learn(c, snap.Response)
		}
		c.describeEnd(snap.Response)
		with := *snap
		with.Response = c.s.inlineInto(c.stream.Context(), c, snap.Response)
		snap = &with
	}
	c.sent = true
	msg := c.message(snap)
	if len(snap.Response) > maxResultBytes {
		c.tellLarge(msg)
	}
	return c.stream.Send(msg)
}

// tellLarge notes a message that most clients refuse: gRPC's own limit is 4 MiB, and
// a client tells its user no more than that something was too large. It is sent all
// the same, since some take more.
func (c *call) tellLarge(msg *longrunningpb.Operation) {
	if size := proto.Size(msg); size > clientLimit {
		c.s.log.WarnContext(c.stream.Context(), "a result is larger than clients take by default, so that they fail with RESOURCE_EXHAUSTED: let the action have fewer outputs, or a directory as its output",
			"operation", c.text, "size_bytes", size, "limit_bytes", clientLimit)
	}
}

// message is a state as clients see it.
func (c *call) message(snap *operation.Snapshot) *longrunningpb.Operation {
	msg := &longrunningpb.Operation{
		Name:     c.text,
		Metadata: &anypb.Any{TypeUrl: metadataType, Value: c.metadataOf(snap)},
	}
	if snap.Stage == operation.Completed {
		msg.Done = true
		msg.Result = &longrunningpb.Operation_Response{Response: &anypb.Any{TypeUrl: responseType, Value: snap.Response}}
	}
	return msg
}
