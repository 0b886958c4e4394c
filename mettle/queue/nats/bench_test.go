//go:build unix

package nats_test

import (
	"context"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mettle-build/mettle/mettle/queue/nats"
	"github.com/mettle-build/mettle/mettle/queue/queuetest"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// cpuTime is what this process has used so far: all that is measured here is in it,
// the broker too.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkQueue(b *testing.B) {
	srv := newBroker(b, nil)
	queuetest.Bench(b, func(b *testing.B) queuetest.Queue {
		return newQueue(b, srv, func(o *nats.Options) { o.LeaseTime = 30 * time.Second })
	})
}

// BenchmarkQueue_fleet is no-op jobs through one API server, with 64 slots in 8
// workers' processes, from Publish to the update that ends each.
func BenchmarkQueue_fleet(b *testing.B) {
	srv := newBroker(b, nil)
	open := func() *nats.Queue {
		return newQueue(b, srv, func(o *nats.Options) {
			o.Prefix, o.Name, o.LeaseTime, o.Logger = "bench", "worker", 30*time.Second, nil
		})
	}
	api := open()
	ctx, cancel := context.WithCancel(b.Context())
	var slots sync.WaitGroup
	for range 8 {
		worker := open()
		for range 8 {
			slots.Go(func() { _ = work(ctx, worker) }) // it ends with ctx
		}
	}
	var left sync.WaitGroup
	slots.Go(func() {
		_ = api.ReceiveUpdates(ctx, "api", func(*queuepb.Update) { left.Done() })
	})
	room := make(chan struct{}, 64) // calls of Publish at a time
	start, cpu, n := time.Now(), cpuTime(b), 0
	for b.Loop() {
		name := fmt.Sprint("operations/", n)
		n++
		left.Add(1)
		room <- struct{}{}
		go func() {
			defer func() { <-room }()
			if err := api.Publish(ctx, job(name)); err != nil {
				b.Error(err)
				left.Done()
			}
		}()
	}
	left.Wait()
	b.ReportMetric(float64(n)/time.Since(start).Seconds(), "jobs/s")
	b.ReportMetric(float64((cpuTime(b)-cpu).Microseconds())/float64(n), "cpu-us/job")
	cancel()
	slots.Wait()
}

// BenchmarkQueue_idle is a second of a worker's process that waits with 64 slots,
// and of its broker.
func BenchmarkQueue_idle(b *testing.B) {
	srv := newBroker(b, nil)
	worker := newQueue(b, srv, func(o *nats.Options) { o.Logger = nil })
	ctx, cancel := context.WithCancel(b.Context())
	var slots sync.WaitGroup
	for range 64 {
		slots.Go(func() { _ = work(ctx, worker) }) // it ends with ctx
	}
	time.Sleep(time.Second) // until all wait
	messages := func() float64 {
		s, err := srv.srv.Varz(nil)
		if err != nil {
			b.Fatal(err)
		}
		return float64(s.InMsgs + s.OutMsgs)
	}
	cpu, before, n := cpuTime(b), messages(), 0
	for b.Loop() {
		time.Sleep(time.Second)
		n++
	}
	b.ReportMetric(float64((cpuTime(b)-cpu).Microseconds())/float64(n), "cpu-us/s")
	b.ReportMetric((messages()-before)/float64(n), "messages/s")
	cancel()
	slots.Wait()
}
