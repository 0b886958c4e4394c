//go:build linux

package sim_test

import (
	"context"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A mutation is a bug that is put in, at the edge between the parts, to see that
// it is found.
type mutation int

const (
	none         mutation = iota
	ackFirst              // a worker acknowledges a job before it has reported
	noFencing             // an API server takes every report for one of the newest attempt
	dropRequeued          // nobody tells that a job was handed back
	neverExtend           // a worker does not extend its leases
	losePublish           // Publish says yes, and has not published
	silentCancel          // nobody is told of a job that was withdrawn, by notices neither
	numMutations
)

func (m mutation) String() string {
	return [...]string{"none", "ack-first", "no-fencing", "drop-requeued", "never-extend", "lose-publish", "silent-cancel"}[m]
}

// ackEarly acknowledges the job that u is about to report.
func (o *port) ackEarly(ctx context.Context, u *queuepb.Update) {
	o.b.mu.Lock()
	var l *lease
	for _, j := range o.b.jobs {
		if j.msg.GetOperation() == u.GetOperation() && j.lease != nil && j.lease.attempt == u.GetAttempt() && j.lease.holder == o.p {
			l = j.lease
		}
	}
	o.b.mu.Unlock()
	if l != nil {
		_ = l.handle.Ack(ctx) // a mutant does not look
	}
}

// unfenced is u as if it were of the newest attempt that was heard of.
func (w *world) unfenced(p *process, u *queuepb.Update) *queuepb.Update {
	w.cmu.Lock()
	newest := w.heard[p.name+" "+u.GetOperation()]
	w.cmu.Unlock()
	if u.GetAttempt() >= newest {
		return u
	}
	return &queuepb.Update{
		Operation: u.GetOperation(), Attempt: newest, Worker: u.GetWorker(), Stage: u.GetStage(), ExecuteResponse: u.GetExecuteResponse(),
		PartialMetadata: u.GetPartialMetadata(),
	}
}
