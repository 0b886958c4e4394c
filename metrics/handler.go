package metrics

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"
)

const (
	// maxRepeats is how often a message is logged in repeatsWindow, at info and
	// above: enough for what happens once to each of some dozens of jobs, and too
	// little to fill a disk where something is away that every call needs.
	maxRepeats    = 100
	repeatsWindow = 10 * time.Second
	// maxMessages bounds the messages that are counted: ours are constants, some
	// hundreds.
	maxMessages = 1024
)

// traceAttrs are the trace that something is part of, if somebody records it.
func traceAttrs(ctx context.Context) []slog.Attr {
	if sc := trace.SpanContextFromContext(ctx); sc.IsSampled() {
		return []slog.Attr{slog.String("trace_id", sc.TraceID().String())}
	}
	return nil
}

// handler adds to log lines what they are about, by their context, and drops those
// that are repeated too often.
type handler struct {
	slog.Handler
	fields  []func(context.Context) []slog.Attr
	repeats *repeats
	with    []string // the keys of WithAttrs
}

// Handle implements slog.Handler.
func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	dropped, ok := h.repeats.take(r.Level, r.Message, r.Time)
	if !ok {
		return nil
	}
	if dropped > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("suppressed", dropped))
	}
	var attrs []slog.Attr
	for _, f := range h.fields {
		attrs = append(attrs, f(ctx)...)
	}
	if len(attrs) == 0 {
		return h.Handler.Handle(ctx, r)
	}
	said := map[string]bool{}
	for _, key := range h.with {
		said[key] = true
	}
	r.Attrs(func(a slog.Attr) bool {
		said[a.Key] = true
		return true
	})
	r = r.Clone()
	for _, a := range attrs {
		if !said[a.Key] {
			said[a.Key] = true
			r.AddAttrs(a)
		}
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := *h
	n.Handler, n.with = h.Handler.WithAttrs(attrs), slices.Clone(h.with)
	for _, a := range attrs {
		n.with = append(n.with, a.Key)
	}
	return &n
}

// WithGroup implements slog.Handler.
func (h *handler) WithGroup(name string) slog.Handler {
	n := *h
	n.Handler = h.Handler.WithGroup(name)
	return &n
}

// repeats counts messages.
type repeats struct {
	mu   sync.Mutex
	seen map[string]*repeated
}

type repeated struct {
	since   time.Time
	n       int
	dropped int
}

// take reports whether a message is to be logged, and how many of its kind were not
// since the last that was. At debug all are.
func (r *repeats) take(level slog.Level, message string, now time.Time) (dropped int, ok bool) {
	if level < slog.LevelInfo {
		return 0, true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.seen[message]
	if m == nil {
		if len(r.seen) >= maxMessages {
			clear(r.seen)
		}
		m = &repeated{since: now}
		r.seen[message] = m
	}
	if now.Sub(m.since) >= repeatsWindow {
		m.since, m.n = now, 0
	}
	if m.n++; m.n > maxRepeats {
		m.dropped++
		return 0, false
	}
	dropped, m.dropped = m.dropped, 0
	return dropped, true
}
