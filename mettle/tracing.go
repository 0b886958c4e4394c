package main

import (
	"context"
	"fmt"
	"strings"

	"go.opentelemetry.io/otel/trace"

	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/metrics/tracing"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// tracer makes what --trace_otlp asks for, under the name of a command and of this
// process. Closing it is the last that a process does.
func (a *adminPage) tracer(ctx context.Context, f flags.Tracing, instance string) (*tracing.Tracer, func() error, error) {
	t, err := f.Tracer(ctx, flags.TracerOptions{
		Service: strings.ReplaceAll(a.name, " ", "-"), Version: version, Instance: instance,
		Prefix: "mettle", Registerer: a.registry, Logger: a.log,
	})
	if err != nil {
		return nil, nil, err
	}
	return t, func() error {
		// Also where the process has been told to end.
		if err := t.Close(context.WithoutCancel(ctx)); err != nil {
			return fmt.Errorf("the last traces: %w", err)
		}
		return nil
	}, nil
}

// traceAttempts is worker.Options.Trace; nil where nothing is recorded.
func traceAttempts(t *tracing.Tracer) func(context.Context, *queuepb.Job, uint32) (context.Context, trace.Span) {
	if !t.On() {
		return nil
	}
	return func(ctx context.Context, job *queuepb.Job, attempt uint32) (context.Context, trace.Span) {
		return t.Attempt(ctx, tracing.Job{Context: job.GetTraceContext(), RequestMetadata: job.GetRequestMetadata(), Attempt: attempt})
	}
}
