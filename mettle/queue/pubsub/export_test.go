package pubsub

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// Listen begins to hear of cancellations, as the first Lease does.
func (q *Queue) Listen(ctx context.Context) error { return q.listen(ctx) }

// Withdrawn is what a worker's side has heard of the cancellations of an
// operation: it changes with each.
func (q *Queue) Withdrawn(operation string) (publications int, before time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	w, _ := q.withdrawn.get(operation)
	if w == nil {
		return 0, time.Time{}
	}
	return len(w.publications), w.before
}

func stamp(t time.Time) *timestamppb.Timestamp { return timestamppb.New(t) }
