package queuetest

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Bench measures the queues that newQueue makes.
func Bench(b *testing.B, newQueue func(b *testing.B) Queue) {
	b.Run("publish, lease, ack", func(b *testing.B) {
		q := newQueue(b)
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			must(b, q.Publish(b.Context(), job(operation(i))))
			l, err := q.Lease(b.Context(), []string{"p"})
			must(b, err)
			must(b, l.Ack(b.Context()))
		}
	})
	b.Run("hand-off to a waiting worker", func(b *testing.B) { benchHandOff(b, newQueue(b)) })
	b.Run("update", func(b *testing.B) {
		q := newQueue(b)
		must(b, q.Publish(b.Context(), job("a")))
		got := make(chan struct{}, 1)
		go q.ReceiveUpdates(b.Context(), "api", func(*queuepb.Update) { got <- struct{}{} }) //nolint:errcheck // ends with the benchmark
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ { // each its own: nothing comes after COMPLETED
			must(b, q.SendUpdate(b.Context(), "api", &queuepb.Update{Operation: operation(i), Attempt: 1, Stage: queuepb.Update_COMPLETED}))
			<-got
		}
	})
}

// benchHandOff measures from Publish to the worker's return from Lease.
func benchHandOff(b *testing.B, q Queue) {
	ctx, cancel := context.WithCancel(b.Context())
	leased := make(chan queue.Lease)
	times := make(chan time.Time, 1)
	go func() {
		defer close(leased)
		for {
			l, err := q.Lease(ctx, []string{"p"})
			if err != nil {
				return
			}
			times <- time.Now()
			leased <- l
		}
	}()
	var took []time.Duration
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		time.Sleep(20 * time.Microsecond) // so that the worker waits already
		start := time.Now()
		must(b, q.Publish(ctx, job(operation(i))))
		took = append(took, (<-times).Sub(start))
		must(b, (<-leased).Ack(ctx))
	}
	cancel()
	<-leased
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds()), "p50-ns")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds()), "p99-ns")
}

func must(b *testing.B, err error) {
	if err != nil {
		b.Helper()
		b.Fatal(err)
	}
}
