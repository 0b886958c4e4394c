package creds

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
)

// TestGuard_audit_panic: of a call whose handler panicked nobody is told that it went well.
func TestGuard_audit_panic(t *testing.T) {
	var log bytes.Buffer
	g := &Guard{audits: newAudits(), o: Options{Audit: slog.New(slog.NewJSONHandler(&log, nil)), Canonical: func(s string) string { return s }}}
	var err error
	if g.metrics, err = newMetrics(nil); err != nil {
		t.Fatal(err)
	}
	g.policy.Store(&policy{anonymous: &Identity{Name: anonymousName, Kind: anonymousName, grants: []grant{{Rights(), []string{anything}}}}})
	defer func() {
		if recover() == nil {
			t.Error("a panic is kept from those who look for it")
		}
		if got := log.String(); !strings.Contains(got, `"code":"Internal"`) {
			t.Errorf("the audit log: %s", got)
		}
	}()
	info := &grpc.UnaryServerInfo{FullMethod: repb.ActionCache_UpdateActionResult_FullMethodName}
	_, _ = g.unary(t.Context(), &repb.UpdateActionResultRequest{}, info, func(context.Context, any) (any, error) { panic("x") })
}
