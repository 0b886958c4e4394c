//go:build linux

package worker_test

import (
	"context"
	"slices"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"go.opentelemetry.io/otel/codes"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// ended passes on the spans that have ended.
type ended chan sdk.ReadOnlySpan

func (ended) OnStart(context.Context, sdk.ReadWriteSpan) {}
func (c ended) OnEnd(s sdk.ReadOnlySpan)                 { c <- s }
func (ended) Shutdown(context.Context) error             { return nil }
func (ended) ForceFlush(context.Context) error           { return nil }

// attempt reads the spans of one attempt, whose own ends last: the names of those
// within it, in the order of their ends.
func (c ended) attempt(t *testing.T) (parts []string, attempt sdk.ReadOnlySpan, attributes map[string]string) {
	t.Helper()
	late := time.After(time.Minute)
	for {
		select {
		case s := <-c:
			if s.Name() != "attempt" {
				parts = append(parts, s.Name())
				continue
			}
			attributes = map[string]string{}
			for _, a := range s.Attributes() {
				attributes[string(a.Key)] = a.Value.String()
			}
			return parts, s, attributes
		case <-late:
			t.Fatal("no attempt has ended after a minute")
		}
	}
}

func TestWorker_spans(t *testing.T) {
	spans := make(ended, 100)
	provider := sdk.NewTracerProvider(sdk.WithSpanProcessor(spans))
	f := newFixture(t, oneSlot, func(o *worker.Options, _ *mem.Options) {
		o.Trace = func(ctx context.Context, _ *queuepb.Job, _ uint32) (context.Context, trace.Span) {
			return provider.Tracer("test").Start(ctx, "attempt")
		}
	}).start(t)
	for _, tc := range []struct {
		name    string
		request request
		parts   []string
		outcome string
		exit    string
		status  codes.Code
	}{
		{"success", request{script: "echo hi"}, []string{"fetch inputs", "run", "collect outputs", "store result", "report"}, "success", "0", codes.Unset},
		{"a command that fails", request{script: "exit 3"}, []string{"fetch inputs", "run", "collect outputs", "report"}, "nonzero_exit", "3", codes.Unset},
		{
			"a timeout",
			request{script: "sleep 100", job: &queuepb.Job{Timeout: durationpb.New(50 * time.Millisecond)}},
			[]string{"fetch inputs", "run", "collect outputs", "report"},
			"timeout", "", codes.Error,
		},
		{
			"inputs that are missing",
			request{script: "true", action: &repb.Action{InputRootDigest: &repb.Digest{Hash: string(make64('a')), SizeBytes: 1}}},
			[]string{"fetch inputs", "report"},
			"refused", "0", codes.Error,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f.execute(t, tc.request)
			parts, attempt, got := spans.attempt(t)
			// A job that had to wait looks for a result first.
			parts = slices.DeleteFunc(parts, func(name string) bool { return name == "cache lookup" })
			if diff := cmp.Diff(tc.parts, parts); diff != "" {
				t.Errorf("spans (-want +got):\n%s", diff)
			}
			if got["mettle.outcome"] != tc.outcome || tc.exit != "" && got["mettle.exit_code"] != tc.exit || got["reapi.action_digest"] == "" || got["reapi.operation"] == "" {
				t.Errorf("attributes %v, want outcome %s", got, tc.outcome)
			}
			if s := attempt.Status(); s.Code != tc.status {
				t.Errorf("status %v, want %v", s, tc.status)
			}
		})
	}
}

// make64 is a hash of one digit.
func make64(c byte) []byte { return slices.Repeat([]byte{c}, 64) }
