package nats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// The states of a record.
const (
	stateWaiting = "waiting" // for a worker, after a delivery or a cancellation
	stateLeased  = "leased"
	stateEnded   = "ended"
)

// A record is what the broker keeps of a job that has been delivered, or
// withdrawn. Unknown fields of a later version are lost when an earlier one
// writes it, so new fields must do without.
type record struct {
	Operation string `json:"operation"`
	// Job is the sequence number of the job's message: which of several jobs of
	// that name, one after another, this is about. 0: whichever comes next.
	Job   uint64 `json:"job,omitempty"`
	State string `json:"state"`
	// Attempt is the number of the last delivery, and Fence that of the last one
	// of an earlier, withdrawn job of the same name.
	Attempt uint32 `json:"attempt,omitempty"`
	Fence   uint32 `json:"fence,omitempty"`
	// Released is how many deliveries since then were handed back through no
	// fault of the job's.
	Released uint32 `json:"released,omitempty"`
	// Lease is the last delivery's own name, Holder the connection that has or
	// had it, and Worker who that is, as far as is known.
	Lease  string `json:"lease,omitempty"`
	Holder string `json:"holder,omitempty"`
	Worker string `json:"worker,omitempty"`
	// Cancelled: jobs up to this sequence number have been withdrawn.
	Cancelled uint64 `json:"cancelled,omitempty"`
	// Replies are the API servers that want to know.
	Replies []string `json:"replies,omitempty"`
	// History is who failed at the job and how, by attempt.
	History []string `json:"history,omitempty"`
}

// maxReplies bounds record.Replies. More than that ask for one operation only
// where the first of them are gone.
const maxReplies = 4

func (r record) clone() record {
	r.Replies, r.History = slices.Clone(r.Replies), slices.Clone(r.History)
	return r
}

// cancelled reports whether the job that the record is about has been withdrawn.
func (r record) cancelled() bool { return r.Cancelled != 0 && r.Job <= r.Cancelled }

// usedUp reports whether there is to be no further attempt.
func (r record) usedUp(maxAttempts int) bool {
	return int64(r.Attempt)-int64(r.Fence)-int64(r.Released) >= int64(maxAttempts)
}

// addReply adds an API server, and reports whether it was not there yet.
func (r *record) addReply(api string) bool {
	if api == "" || slices.Contains(r.Replies, api) {
		return false
	}
	if len(r.Replies) >= maxReplies {
		r.Replies = slices.Delete(r.Replies, 0, len(r.Replies)-maxReplies+1)
	}
	r.Replies = append(r.Replies, api)
	return true
}

// maxHistory bounds record.History, for brokers with more attempts than are told of.
const maxHistory = 16

// maxWorkerName bounds what a record has of a worker's name, in bytes.
const maxWorkerName = 256

// endAttempt ends the delivery that the record is about, as one that failed.
func (r *record) endAttempt(how string) {
	who := r.Worker
	if who == "" {
		who = "a worker that had not reported"
	}
	if len(r.History) >= maxHistory {
		r.History = slices.Delete(r.History, 0, len(r.History)-maxHistory+1)
	}
	r.History = append(r.History, fmt.Sprintf("attempt %d: %s %s", r.Attempt-r.Fence, who, how))
	r.State = stateWaiting
}

// A stored record is one that was read from the broker, or written there.
type stored struct {
	record
	revision uint64    // 0: there is none
	written  time.Time // by the broker's clock
}

// maxRecord bounds what is taken for a record, in bytes.
const maxRecord = 64 << 10

// parseRecord reads a record. What can't be one is an error.
func parseRecord(data []byte) (record, error) {
	if len(data) > maxRecord {
		return record{}, fmt.Errorf("a lease's record of %d bytes", len(data))
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, fmt.Errorf("a lease's record: %w", err)
	}
	if r.State != stateWaiting && r.State != stateLeased && r.State != stateEnded {
		return record{}, fmt.Errorf("a lease's record in the state %q", r.State)
	}
	if r.Fence > r.Attempt || r.Released > r.Attempt-r.Fence {
		return record{}, fmt.Errorf("a lease's record of attempt %d has the fence %d and %d released", r.Attempt, r.Fence, r.Released)
	}
	return r, nil
}

// load reads the record of an operation; where there is none, it returns one
// with revision 0. The stream's leader answers, not a follower that is behind.
func (q *Queue) load(ctx context.Context, operation string) (stored, error) {
	var s stored
	err := q.try(ctx, callReadLease, func(ctx context.Context) error {
		m, err := q.leases.GetLastMsgForSubject(ctx, q.leaseSubject(operation))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			s = stored{record: record{Operation: operation, State: stateWaiting}}
			return nil
		} else if err != nil {
			return err
		}
		r, err := parseRecord(m.Data)
		if err != nil {
			// Whatever it is, the job must not wait for it to go away.
			q.log.Error("a lease's record can't be read, taking it for none", "operation", operation, "error", err)
			r = record{State: stateWaiting}
		}
		r.Operation = operation
		s = stored{record: r, revision: m.Sequence, written: m.Time}
		return nil
	})
	if err != nil {
		return stored{}, fmt.Errorf("read the lease of %s: %w", operation, err)
	}
	return s, nil
}

// store writes the successor of a record, and returns its revision. Where the
// record is no longer at revision, the error wraps errConflict; that may also be
// because the first of two tries did succeed.
func (q *Queue) store(ctx context.Context, r record, revision uint64) (uint64, error) {
	data, err := json.Marshal(r)
	if err != nil {
		return 0, err
	}
	opts := []jetstream.PublishOpt{jetstream.WithExpectLastSequencePerSubject(revision), jetstream.WithRetryAttempts(0)}
	if r.State != stateLeased {
		opts = append(opts, jetstream.WithMsgTTL(q.keepFor(r)))
	}
	var ack *jetstream.PubAck
	err = q.try(ctx, callWriteLease, func(ctx context.Context) (err error) {
		ack, err = q.js.PublishMsg(ctx, &natsgo.Msg{Subject: q.leaseSubject(r.Operation), Data: data}, opts...)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("write the lease of %s: %w", r.Operation, err)
	}
	return ack.Sequence, nil
}

// keepFor is how long a record is of use that no worker renews. That of an ended
// job tells those who come across it again, because the acknowledgement was lost,
// or with a last redelivery under way. Another's attempts must not begin anew
// while a worker that was cut off can report.
func (q *Queue) keepFor(r record) time.Duration {
	d := 4 * q.opts.LeaseTime
	if r.State != stateEnded {
		d = recordAge / 2
	}
	return max(d, 2*time.Second).Round(time.Second) // the broker counts whole seconds
}
