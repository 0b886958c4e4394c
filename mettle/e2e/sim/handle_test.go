//go:build linux

package sim_test

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// A handle is a lease as its worker has it.
type handle struct {
	l         *lease
	o         *port // set by begin
	cancelled chan struct{}
	once      sync.Once
	// until is when it lapses by the worker's own clock, where jobs are apart. It
	// is guarded by port.mu.
	until time.Duration
}

var _ queue.Lease = (*handle)(nil)

func newHandle(l *lease) *handle { return &handle{l: l, cancelled: make(chan struct{})} }

// begin makes h a lease that its worker has.
func (o *port) begin(h *handle) *handle {
	h.o = o
	h.until = h.l.since + leaseTime
	return h
}

func (h *handle) cancel() { h.once.Do(func() { close(h.cancelled) }) }

// Job implements queue.Lease.
func (h *handle) Job() *queuepb.Job { return as(h.l.holder, h.l.job.msg) }

// Attempt implements queue.Lease.
func (h *handle) Attempt() uint32 { return h.l.attempt }

// Cancelled implements queue.Lease.
func (h *handle) Cancelled() <-chan struct{} { return h.cancelled }

// Extend implements queue.Lease.
func (h *handle) Extend(ctx context.Context) error {
	if h.o.b.w.mutation == neverExtend {
		return nil
	}
	start := h.o.b.w.now()
	if err := h.do(ctx, "extend", func() (bool, error) { return h.l.b.extend(h.l) }); err != nil {
		return err
	}
	h.o.mu.Lock()
	h.until = start + leaseTime
	h.o.mu.Unlock()
	return nil
}

// Ack implements queue.Lease.
func (h *handle) Ack(ctx context.Context) error {
	return h.do(ctx, "acknowledge", func() (bool, error) { return h.l.b.ack(h.l) })
}

// Release implements queue.Lease.
func (h *handle) Release(ctx context.Context) error {
	return h.do(ctx, "release", func() (bool, error) { return h.l.b.release(h.l) })
}

// Reject implements queue.Lease.
func (h *handle) Reject(ctx context.Context, reason string) error {
	return h.do(ctx, "reject", func() (bool, error) { return h.l.b.reject(h.l, reason) })
}

// do calls the broker. Where jobs are apart, the worker knows by its clock that
// a lease has lapsed; elsewhere the broker tells it. Its answers tell of a
// withdrawal that the worker has not heard of.
func (h *handle) do(ctx context.Context, verb string, f func() (bool, error)) error {
	w := h.o.b.w
	h.o.mu.Lock()
	lapsed := w.plan.kind == apartJobs && w.now() >= h.until
	h.o.mu.Unlock()
	what := fmt.Sprintf("%s %s, attempt %d", verb, h.l.job.label, h.l.attempt)
	if lapsed {
		return fmt.Errorf("%s: %w", what, queue.ErrLeaseLost)
	}
	cancelled, err := call(ctx, h.o.p, &h.o.b.service, what, f)
	if cancelled {
		h.cancel()
	}
	return h.o.explain(what, err)
}
