// Package tracingtest is a collector of traces for tests: an OTLP server over gRPC
// that keeps what it is sent, and can be told to hang or to refuse. The tests of the
// tracer and of whole servers use it, and no program does.
package tracingtest

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A Span is one that was received. Ids are hexadecimal; Parent is "" for a root.
type Span struct {
	Service, Name, Kind string
	Trace, ID, Parent   string
	Links               []string // span ids
	Attributes          map[string]string
	Error               string // of its status, where that says so
	Start, End          time.Time
}

// A Collector is a server that runs until its test has ended. It is safe for
// concurrent use.
type Collector struct {
	collectorpb.UnimplementedTraceServiceServer
	addr string

	mu      sync.Mutex // guards what follows
	spans   []Span
	refuse  bool
	hang    chan struct{} // nil: it does not
	changed chan struct{} // closed and made anew with each batch
	calls   int
}

// New starts a Collector on a port of loopback.
func New(t testing.TB) *Collector {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &Collector{addr: l.Addr().String(), changed: make(chan struct{})}
	s := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(s, c)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Stop()
		<-served
	})
	return c
}

// URL is for --trace_otlp.
func (c *Collector) URL() string { return "grpc://" + c.addr }

// Refuse has batches refused from now on, or no longer.
func (c *Collector) Refuse(so bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refuse = so
}

// Hang has batches answered only when the function that it returns is called.
func (c *Collector) Hang() (release func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	hang := make(chan struct{})
	c.hang = hang
	return func() {
		c.mu.Lock()
		c.hang = nil
		c.mu.Unlock()
		close(hang)
	}
}

// Export implements the collector's service.
func (c *Collector) Export(ctx context.Context, req *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	hang, refuse := c.hang, c.refuse
	c.calls++
	c.tell()
	c.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	if refuse {
		return nil, status.Error(codes.PermissionDenied, "not today")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rs := range req.GetResourceSpans() {
		service := attributes(rs.GetResource().GetAttributes())["service.name"]
		for _, ss := range rs.GetScopeSpans() {
			for _, s := range ss.GetSpans() {
				c.spans = append(c.spans, spanOf(service, s))
			}
		}
	}
	c.tell()
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

// tell wakes those who wait. The mutex is held.
func (c *Collector) tell() {
	close(c.changed)
	c.changed = make(chan struct{})
}

func spanOf(service string, s *tracepb.Span) Span {
	span := Span{
		Service: service, Name: s.GetName(), Kind: strings.ToLower(strings.TrimPrefix(s.GetKind().String(), "SPAN_KIND_")),
		Trace: hex.EncodeToString(s.GetTraceId()), ID: hex.EncodeToString(s.GetSpanId()), Parent: hex.EncodeToString(s.GetParentSpanId()),
		Attributes: attributes(s.GetAttributes()),
		Start:      time.Unix(0, int64(s.GetStartTimeUnixNano())), End: time.Unix(0, int64(s.GetEndTimeUnixNano())), //nolint:gosec // times of ours
	}
	for _, l := range s.GetLinks() {
		span.Links = append(span.Links, hex.EncodeToString(l.GetSpanId()))
	}
	if s.GetStatus().GetCode() == tracepb.Status_STATUS_CODE_ERROR {
		span.Error = s.GetStatus().GetMessage()
	}
	return span
}

func attributes(list []*commonpb.KeyValue) map[string]string {
	all := map[string]string{}
	for _, kv := range list {
		switch v := kv.GetValue().GetValue().(type) {
		case *commonpb.AnyValue_StringValue:
			all[kv.GetKey()] = v.StringValue
		case *commonpb.AnyValue_IntValue:
			all[kv.GetKey()] = fmt.Sprint(v.IntValue)
		case *commonpb.AnyValue_BoolValue:
			all[kv.GetKey()] = fmt.Sprint(v.BoolValue)
		default:
			all[kv.GetKey()] = fmt.Sprint(kv.GetValue())
		}
	}
	return all
}

// Spans are those that have come so far.
func (c *Collector) Spans() []Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.spans)
}

// Called waits until batches have been sent to the Collector n times, whatever it
// answered.
func (c *Collector) Called(t *testing.T, n int) {
	t.Helper()
	c.await(t, fmt.Sprintf("%d batches", n), func() bool { return c.calls >= n })
}

// Await waits until the spans that have come are as they should be.
func (c *Collector) Await(t *testing.T, what string, ok func([]Span) bool) {
	t.Helper()
	c.await(t, what, func() bool { return ok(c.spans) })
}

// await waits until ok, which is called with the mutex held.
func (c *Collector) await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	late := time.NewTimer(time.Minute) // far beyond what it takes
	defer late.Stop()
	for {
		c.mu.Lock()
		done, changed := ok(), c.changed
		c.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-late.C:
			t.Fatalf("%s: not after a minute", what)
		}
	}
}

// Tree prints spans as they are within each other, each level by its begin: a line
// for each, as kind, service and name. Spans whose parent is not among them are
// roots.
func Tree(spans []Span) string {
	known := map[string]bool{}
	for _, s := range spans {
		known[s.ID] = true
	}
	children := map[string][]Span{}
	for _, s := range spans {
		parent := s.Parent
		if !known[parent] {
			parent = ""
		}
		children[parent] = append(children[parent], s)
	}
	var b strings.Builder
	var write func(parent, indent string)
	write = func(parent, indent string) {
		slices.SortStableFunc(children[parent], func(a, b Span) int { return a.Start.Compare(b.Start) })
		for _, s := range children[parent] {
			fmt.Fprintf(&b, "%s%s %s: %s\n", indent, s.Service, s.Kind, s.Name)
			write(s.ID, indent+"  ")
		}
	}
	write("", "")
	return b.String()
}
