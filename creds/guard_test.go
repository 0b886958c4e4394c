package creds_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
)

const (
	ciToken   = "ci-0123456789abcdef"
	evesToken = "eve-0123456789abcdef"
	rootToken = "root-0123456789abcdef"
)

func hashOf(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

// usual is a policy with something of everything.
func usual() string {
	return fmt.Sprintf(`
anonymous:
  rights: [cas:read]
  instances: [public]
identities:
  - name: ci
    token_sha256: [%s]
    rights: [cas:read, cas:write, ac:read, ac:write, execute]
    instances: [main, "team/*"]
  - name: eve
    token_sha256: [%s]
    grants:
      - rights: [ac:read]
      - rights: [cas:write]
        instances: [""]
  - name: root
    token_sha256: [%s]
    rights: [admin, cas:read]
`, hashOf(ciToken), hashOf(evesToken), hashOf(rootToken))
}

func find(instance string) func(context.Context, *caller) error {
	return func(ctx context.Context, c *caller) error {
		_, err := c.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{InstanceName: instance})
		return err
	}
}

func batch(instance string) func(context.Context, *caller) error {
	return func(ctx context.Context, c *caller) error {
		_, err := c.cas.BatchUpdateBlobs(ctx, &repb.BatchUpdateBlobsRequest{InstanceName: instance})
		return err
	}
}

func result(instance string) func(context.Context, *caller) error {
	return func(ctx context.Context, c *caller) error {
		_, err := c.ac.GetActionResult(ctx, &repb.GetActionResultRequest{InstanceName: instance})
		return err
	}
}

func update(instance string) func(context.Context, *caller) error {
	return func(ctx context.Context, c *caller) error {
		_, err := c.ac.UpdateActionResult(ctx, &repb.UpdateActionResultRequest{InstanceName: instance, ActionResult: &repb.ActionResult{}})
		return err
	}
}

const aBlob = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855/1"

func upload(name string) func(context.Context, *caller) error {
	return func(ctx context.Context, c *caller) error {
		s, err := c.streams.Write(ctx)
		if err != nil {
			return err
		}
		if err := s.Send(&bytestream.WriteRequest{ResourceName: name, Data: []byte("x"), FinishWrite: true}); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		_, err = s.CloseAndRecv()
		return err
	}
}

func execute(instance string) func(context.Context, *caller) error {
	return func(ctx context.Context, c *caller) error {
		s, err := c.exec.Execute(ctx, &repb.ExecuteRequest{InstanceName: instance})
		if err != nil {
			return err
		}
		_, err = s.Recv()
		return err
	}
}

func TestGuard(t *testing.T) {
	all := &repb.ServerCapabilities{
		CacheCapabilities:     &repb.CacheCapabilities{ActionCacheUpdateCapabilities: &repb.ActionCacheUpdateCapabilities{UpdateEnabled: true}},
		ExecutionCapabilities: &repb.ExecutionCapabilities{ExecEnabled: true},
	}
	s := serve(t, creds.Options{Policy: credstest.Write(t, t.TempDir(), "policy.yaml", usual())}, creds.ServerTLS{}, &service{caps: all})
	callers := map[string]*caller{
		"nobody": s.dialWith(t),
		"ci":     s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+ciToken))),
		"eve":    s.dialWith(t, grpc.WithPerRPCCredentials(header("bearer  "+evesToken))),
		"root":   s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+rootToken))),
		"a liar": s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer nothing-of-that-kind"))),
		"a bore": s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+strings.Repeat("x", 32<<10+1)))),
		"basic":  s.dialWith(t, grpc.WithPerRPCCredentials(header("Basic dXNlcjpwYXNz"))),
	}
	for _, tc := range []struct {
		who, what string
		do        func(context.Context, *caller) error
		want      codes.Code
		says      string
	}{
		{"nobody", "find in public", find("public"), codes.OK, ""},
		{"nobody", "find in main", find("main"), codes.PermissionDenied, `anonymous lacks the right cas:read or cas:write at instance "main"`},
		{"nobody", "write in public", batch("public"), codes.PermissionDenied, "anonymous lacks the right cas:write"},
		{"nobody", "upload to public", upload("public/uploads/1/blobs/" + aBlob), codes.PermissionDenied, "cas:write"},
		{"a bore", "find in public", find("public"), codes.Unauthenticated, "the token has 32769 bytes, want 32768 at most"},
		{"ci", "find in main", find("main"), codes.OK, ""},
		{"ci", "write below team", batch("team/a/b"), codes.OK, ""},
		{"ci", "write in team", batch("team"), codes.PermissionDenied, `at instance "team"`},
		{"ci", "upload to main", upload("main/uploads/1/blobs/" + aBlob), codes.OK, ""},
		{"ci", "upload to another", upload("other/uploads/1/blobs/" + aBlob), codes.PermissionDenied, `at instance "other"`},
		{"ci", "upload to nowhere", upload("main"), codes.InvalidArgument, "resource name"},
		{"ci", "execute in main", execute("main"), codes.Unimplemented, ""}, // which the service says
		{"ci", "execute in another", execute("main2"), codes.PermissionDenied, "execute"},
		{"eve", "results anywhere", result("x/y"), codes.OK, ""},
		{"eve", "set results", update("x/y"), codes.PermissionDenied, "ac:write"},
		{"eve", "write to no instance", batch(""), codes.OK, ""},
		{"eve", "write in main", batch("main"), codes.PermissionDenied, "cas:write"},
		{"root", "execute", execute("main"), codes.PermissionDenied, "execute"},
		{"a liar", "find in public", find("public"), codes.Unauthenticated, "not known"},
		{"basic", "find in public", find("public"), codes.Unauthenticated, "Bearer TOKEN"},
	} {
		t.Run(tc.who+": "+tc.what, func(t *testing.T) {
			err := tc.do(t.Context(), callers[tc.who])
			if status.Code(err) != tc.want || err != nil && !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v, want %v with %q", err, tc.want, tc.says)
			}
		})
	}
	t.Run("health is for everyone", func(t *testing.T) {
		if _, err := callers["a liar"].health.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
			t.Error(err)
		}
	})
	t.Run("capabilities are for all that are known", func(t *testing.T) {
		for _, tc := range []struct {
			who, instance string
			all           bool
		}{{"ci", "main", true}, {"ci", "other", false}, {"root", "main", false}, {"ci", "main", true}} {
			c, err := callers[tc.who].caps.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{InstanceName: tc.instance})
			update, exec := c.GetCacheCapabilities().GetActionCacheUpdateCapabilities().GetUpdateEnabled(), c.GetExecutionCapabilities().GetExecEnabled()
			if err != nil || update != tc.all || exec != tc.all {
				t.Errorf("%s at %s: update_enabled %v, exec_enabled %v, %v; want both %v", tc.who, tc.instance, update, exec, err, tc.all)
			}
		}
		_, err := callers["a liar"].caps.GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{})
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("of a liar: %v", err)
		}
	})
	t.Run("handlers know who calls", func(t *testing.T) {
		r, err := callers["ci"].ac.GetActionResult(t.Context(), &repb.GetActionResultRequest{InstanceName: "main"})
		if err != nil || string(r.StdoutRaw) != "ci" {
			t.Errorf("%q, %v", r.GetStdoutRaw(), err)
		}
	})
}

func TestGuard_without_anonymous(t *testing.T) {
	policy := "identities: [{name: ci, token_sha256: [" + hashOf(ciToken) + "], rights: [cas:read]}]"
	s := serve(t, creds.Options{Policy: credstest.Write(t, t.TempDir(), "policy.yaml", policy)}, creds.ServerTLS{}, &service{})
	err := find("")(t.Context(), s.dialWith(t))
	if status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "authorization: Bearer") {
		t.Errorf("nobody: %v", err)
	}
}

// TestGuard_plaintext: a token that came over a network without TLS is not taken,
// even if it is good.
func TestGuard_plaintext(t *testing.T) {
	addr := firstAddress(t)
	path := credstest.Write(t, t.TempDir(), "policy.yaml", usual())
	for _, taken := range []bool{false, true} {
		g, err := creds.New(creds.Options{Policy: path, PlaintextTokens: taken})
		if err != nil {
			t.Fatal(err)
		}
		srv := grpc.NewServer(g.ServerOptions()...)
		repb.RegisterContentAddressableStorageServer(srv, &service{})
		l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort(addr, "0"))
		if err != nil {
			t.Skipf("no port of this machine's address: %v", err)
		}
		done := make(chan error, 1)
		go func() { done <- srv.Serve(l) }()
		c := (&site{addr: l.Addr().String()}).dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+ciToken)))
		err = find("main")(t.Context(), c)
		if taken && err != nil || !taken && (status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "TLS")) {
			t.Errorf("taken %v: %v", taken, err)
		}
		srv.Stop()
		<-done //nolint:errcheck // it was stopped
	}
}

// firstAddress is one of this machine's that is not loopback.
func firstAddress(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && !n.IP.IsLoopback() && n.IP.To4() != nil {
			return n.IP.String()
		}
	}
	t.Skip("this machine has no address but loopback")
	return ""
}

func TestGuard_reload(t *testing.T) {
	dir := t.TempDir()
	log := &lines{}
	tokens := credstest.Write(t, dir, "tokens", ciToken+"\n")
	policy := func(rights string) string {
		return "identities: [{name: ci, token_file: tokens, rights: [" + rights + "]}]"
	}
	path := credstest.Write(t, dir, "policy.yaml", policy("cas:read"))
	if g, err := creds.New(creds.Options{Policy: path}); err != nil {
		t.Fatal(err)
	} else if diff := cmp.Diff([]string{tokens}, g.Files()); diff != "" {
		t.Errorf("files: %s", diff)
	}
	s := serve(t, creds.Options{Policy: path, ReloadEvery: 5 * time.Millisecond, Logger: slog.New(slog.NewTextHandler(log, nil))}, creds.ServerTLS{}, &service{})
	c := s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+ciToken)))
	becomes := func(what string, do func(context.Context, *caller) error, want codes.Code) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		for {
			err := do(ctx, c)
			if status.Code(err) == want {
				return
			}
			if ctx.Err() != nil {
				t.Fatalf("%s: %v, want %v", what, err, want)
			}
		}
	}
	becomes("as it was", batch(""), codes.PermissionDenied)
	credstest.Write(t, dir, "policy.yaml", policy("cas:read, cas:write"))
	becomes("more rights", batch(""), codes.OK)
	credstest.Write(t, dir, "policy.yaml", "identities: [{name: ci")
	for !strings.Contains(log.String(), "the last good one stays") && t.Context().Err() == nil {
		log.wait(t)
	}
	becomes("with a mistake", batch(""), codes.OK)
	credstest.Write(t, dir, "policy.yaml", "") // as one who writes it in place has it for a moment
	for !strings.Contains(log.String(), "nobody could call") && t.Context().Err() == nil {
		log.wait(t)
	}
	becomes("empty", batch(""), codes.OK)
	credstest.Write(t, dir, "policy.yaml", policy("cas:read"))
	becomes("mended", batch(""), codes.PermissionDenied)
	credstest.Write(t, dir, "tokens", evesToken+"\n")
	becomes("the token has gone", find(""), codes.Unauthenticated)
	if n := strings.Count(log.String(), "the last good one stays"); n != 2 {
		t.Errorf("two mistakes were logged %d times\n%s", n, log.String())
	}
}

func TestGuard_limits(t *testing.T) {
	policy := fmt.Sprintf(`
limits: {calls_per_second: 1000000, concurrent_calls: 2}
identities:
  - {name: ci, token_sha256: [%s], rights: [ac:read, cas:read]}
  - {name: eve, token_sha256: [%s], rights: [cas:read], limits: {calls_per_second: 2}}
`, hashOf(ciToken), hashOf(evesToken))
	svc := &service{hold: make(chan struct{}), in: make(chan struct{})}
	s := serve(t, creds.Options{Policy: credstest.Write(t, t.TempDir(), "policy.yaml", policy)}, creds.ServerTLS{}, svc)
	ci := s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+ciToken)))
	eve := s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+evesToken)))
	done := make(chan error, 2)
	for range 2 {
		go func() { done <- result("")(t.Context(), ci) }()
		<-svc.in
	}
	err := find("")(t.Context(), ci)
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "concurrent_calls") {
		t.Errorf("the third call at once: %v", err)
	}
	var retry bool
	for _, d := range status.Convert(err).Details() {
		_, is := d.(*errdetails.RetryInfo)
		retry = retry || is
	}
	if !retry {
		t.Errorf("nobody says when to try again: %v", status.Convert(err).Details())
	}
	if err := find("")(t.Context(), eve); err != nil {
		t.Errorf("another identity: %v", err)
	}
	close(svc.hold)
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	over := 0
	for range 10 {
		if err := find("")(t.Context(), eve); status.Code(err) == codes.ResourceExhausted {
			over++
		}
	}
	if over < 5 {
		t.Errorf("%d of 10 calls were over a limit of 2 a second", over)
	}
}

func TestGuard_audit(t *testing.T) {
	log := &lines{}
	s := serve(t, creds.Options{
		Policy: credstest.Write(t, t.TempDir(), "policy.yaml", usual()), Audit: slog.New(slog.NewJSONHandler(log, nil)),
	}, creds.ServerTLS{}, &service{})
	ci := s.dialWith(t, grpc.WithPerRPCCredentials(header("Bearer "+ciToken)))
	for _, do := range []func(context.Context, *caller) error{find("main"), update("main"), update("other")} {
		_ = do(t.Context(), ci)
	}
	_ = update("main")(t.Context(), s.dialWith(t))
	type record struct {
		Identity, By, Instance, Code, Method string
	}
	var got []record
	for line := range strings.Lines(log.String()) {
		var r record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		got = append(got, r)
	}
	const method = "/build.bazel.remote.execution.v2.ActionCache/UpdateActionResult"
	want := []record{
		{"ci", "token", "main", "OK", method},
		{"ci", "token", "other", "PermissionDenied", method},
		{"anonymous", "anonymous", "", "PermissionDenied", method},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the audit log (-want +got):\n%s", diff)
	}
	if strings.Contains(log.String(), ciToken) {
		t.Error("a token is in the log")
	}
}

// lines is a log that can be waited for.
type lines struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{}
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// wait waits for another line, or a moment: it may have come already.
func (l *lines) wait(t *testing.T) {
	l.mu.Lock()
	if l.more == nil {
		l.more = make(chan struct{})
	}
	more := l.more
	l.mu.Unlock()
	select {
	case <-more:
	case <-time.After(10 * time.Millisecond):
	case <-t.Context().Done():
	}
}
