package api

import (
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/mettle-build/mettle/mettle/operation"
)

// drainGrace is how long a stream waits, when the server shuts down, for a
// result that a worker has sent and that is still on its way.
const drainGrace = 250 * time.Millisecond

// follow sends the client the states of op until it has ended. The client has
// joined op already.
func (c *call) follow(op *operation.Operation) error {
	defer c.s.ops.Leave(op)
	done := c.stream.Context().Done()
	draining := c.s.draining
	timer := time.NewTimer(c.s.opts.KeepAlive)
	defer timer.Stop()
	var grace <-chan time.Time
	for {
		snap, changed := op.Watch()
		if snap.Stage == operation.Failed {
			return toStatus(snap.Err)
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
		case <-done:
			return status.FromContextError(c.stream.Context().Err()).Err()
		case <-draining:
			draining, grace = nil, time.After(drainGrace)
		case <-grace:
			return toStatus(errDraining)
		}
	}
}

// send sends one state of the operation under the client's own name for it.
func (c *call) send(snap *operation.Snapshot) error {
	msg := &longrunningpb.Operation{
		Name:     c.text,
		Metadata: &anypb.Any{TypeUrl: metadataType, Value: c.metadataOf(snap)},
	}
	if snap.Stage == operation.Completed {
		msg.Done = true
		response := snap.Response
		if c.outcome == outcomeNone {
			c.outcome = outcomeOf(response)
			if c.ours {
				c.s.learn(c, response)
			}
			response = c.s.inlineInto(c.stream.Context(), c, response)
		}
		msg.Result = &longrunningpb.Operation_Response{Response: &anypb.Any{TypeUrl: responseType, Value: response}}
	}
	c.sent = true
	return c.stream.Send(msg)
}
