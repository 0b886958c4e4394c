package pubsub_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/mettle/queue/pubsub/pubsubtest"
	"github.com/mettle-build/mettle/mettle/queue/queuetest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func BenchmarkQueue(b *testing.B) {
	queuetest.Bench(b, func(b *testing.B) queuetest.Queue {
		s := newServer(b)
		o := options(s)
		o.LeaseTime = 60 * time.Second
		return newFleet(b, s, o)
	})
}

// A load is operations that go through one API server to a process of some slots
// and back, and the times that they took from Publish to Lease.
type load struct {
	f        *fleet
	s        *pubsubtest.Server
	mu       sync.Mutex
	began    map[string]time.Time
	handOffs []time.Duration
	ends     map[string]chan struct{}
}

func newLoad(b *testing.B, oneBand bool) *load {
	s := newServer(b)
	o := options(s)
	o.LeaseTime, o.OneBand = 60*time.Second, oneBand
	l := &load{f: newFleet(b, s, o), s: s, began: make(map[string]time.Time), ends: make(map[string]chan struct{})}
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- l.f.ReceiveUpdates(ctx, "api", func(u *queuepb.Update) {
			if u.GetStage() == queuepb.Update_COMPLETED {
				l.mu.Lock()
				defer l.mu.Unlock()
				close(l.ends[u.GetOperation()])
			}
		})
	}()
	b.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			b.Error(err)
		}
	})
	return l
}

// slot is a worker's slot that runs nothing, until ctx is done.
func (l *load) slot(ctx context.Context) error {
	for {
		lease, err := l.f.Lease(ctx, []string{"p"})
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		ending := context.WithoutCancel(ctx) // it ends what it has
		name := lease.Job().GetOperation()
		l.mu.Lock()
		l.handOffs = append(l.handOffs, time.Since(l.began[name]))
		l.mu.Unlock()
		for _, stage := range []queuepb.Update_Stage{queuepb.Update_EXECUTING, queuepb.Update_COMPLETED} {
			u := &queuepb.Update{Operation: name, Attempt: lease.Attempt(), Worker: "w", Stage: stage, ExecuteResponse: make([]byte, 300)}
			if err := l.f.SendUpdate(ending, "api", u); err != nil {
				return err
			}
		}
		if err := lease.Ack(ending); err != nil {
			return err
		}
	}
}

// run runs one operation, and waits for its end.
func (l *load) run(ctx context.Context, name string) error {
	ended := make(chan struct{})
	l.mu.Lock()
	l.began[name], l.ends[name] = time.Now(), ended
	l.mu.Unlock()
	j := job(name)
	j.Command = make([]byte, 500)
	if err := l.f.Publish(ctx, j); err != nil {
		return err
	}
	<-ended
	return nil
}

// BenchmarkLoad has some clients run operations one after the other, over one
// API server and a process of 64 slots.
func BenchmarkLoad(b *testing.B) {
	for _, clients := range []int{1, 16, 64, 256} {
		for _, bands := range []int{1, 3} {
			b.Run(fmt.Sprintf("clients=%d/bands=%d", clients, bands), func(b *testing.B) {
				l := newLoad(b, bands == 1)
				ctx, cancel := context.WithCancel(b.Context())
				var slots, all errgroup.Group
				for range 64 {
					slots.Go(func() error { return l.slot(ctx) })
				}
				if err := l.run(ctx, "first"); err != nil {
					b.Fatal(err)
				}
				l.handOffs = nil
				b.ReportAllocs()
				before, cpu := l.s.Calls(), cpuTime(b)
				b.ResetTimer()
				for c := range clients {
					all.Go(func() error {
						for i := c; i < b.N; i += clients {
							if err := l.run(ctx, fmt.Sprint(i)); err != nil {
								return err
							}
						}
						return nil
					})
				}
				if err := all.Wait(); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				cancel()
				if err := slots.Wait(); err != nil {
					b.Error(err)
				}
				after := l.s.Calls()
				for _, method := range []string{"Publish", "Pull", "Acknowledge"} {
					b.ReportMetric(float64(after[method]-before[method])/float64(b.N), strings.ToLower(method)+"/job")
				}
				b.ReportMetric(float64((cpuTime(b)-cpu).Microseconds())/float64(b.N), "cpu-µs/job")
				slices.Sort(l.handOffs)
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "jobs/s")
				b.ReportMetric(float64(l.handOffs[len(l.handOffs)/2].Microseconds()), "p50-µs")
				b.ReportMetric(float64(l.handOffs[len(l.handOffs)*99/100].Microseconds()), "p99-µs")
			})
		}
	}
}

// cpuTime is what this process has used, the fake included.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
