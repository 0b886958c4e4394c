package main

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/mettle-build/mettle/creds"
	"github.com/mettle-build/mettle/creds/credstest"
	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/elan/wire"
	"github.com/mettle-build/mettle/metrics"
	storepb "github.com/mettle-build/mettle/proto/store"
)

const apiToken, ciToken = "api-0123456789abcdef", "ci-0123456789abcdef"

// TestAPI_onBehalf: a result that a client sets through an API server with a token of
// its own says who both are, whatever the client says.
func TestAPI_onBehalf(t *testing.T) {
	t.Setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
	dir := t.TempDir()
	credstest.Write(t, dir, "api.token", apiToken)
	credstest.Write(t, dir, "ci.token", ciToken)
	policy := credstest.Write(t, dir, "api.yaml", "identities: [{name: ci, token_file: ci.token, rights: [ac:read, ac:write]}]")
	audit := &records{}
	storage := storageFor(t, dir, audit)

	c := parsed(t, "api", "--http_port=-1", "--pools=default/1", "--queue=gcppubsub://project/x", "--policy="+policy,
		"--storage="+storage, "--storage_token_file="+dir+"/api.token")
	log := slog.New(slog.DiscardHandler)
	s := &apiServer{cmd: &c.API, listener: listen(t), log: log, registry: metrics.NewRegistry()}
	s.admin = adminPage{name: "mettle api", storesOnly: true, registry: s.registry, log: log}
	if err := s.wire(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer closed(t, s.closers.close)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1) // one value, so that the goroutine never waits for its reader
	go func() { served <- s.serve(ctx) }()
	defer func() {
		cancel()
		closed(t, func() error { return <-served })
	}()
	conn, err := grpc.NewClient(s.listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	call := metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+ciToken, wire.ActsForHeader, "root")
	key := &repb.Digest{Hash: strings.Repeat("a", 64), SizeBytes: 1}
	r, err := repb.NewActionCacheClient(conn).UpdateActionResult(call, &repb.UpdateActionResultRequest{
		ActionDigest: key, ActionResult: &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "w"}},
	}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	p := &storepb.Producer{}
	if aux := r.ExecutionMetadata.AuxiliaryMetadata; len(aux) != 1 || aux[0].UnmarshalTo(p) != nil || p.Identity != "ci" || p.Via != "api" {
		t.Errorf("the producers are %v, want ci via api", aux)
	}
	if got := audit.String(); !strings.Contains(got, `"identity":"api","by":"token","for":"ci"`) {
		t.Errorf("the audit log of the storage: %s", got)
	}
}

// records is a log that is read while it is written.
type records struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (r *records) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.buf.Write(p)
}

func (r *records) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.buf.String()
}

// storageFor is a storage at which the token in dir may act for others.
func storageFor(t *testing.T, dir string, audit *records) (addr string) {
	t.Helper()
	l := listen(t)
	g, err := creds.New(creds.Options{
		Policy: credstest.Write(t, dir, "storage.yaml", "identities: [{name: api, token_file: api.token, rights: [cas:read, ac:read, ac:write], acts_for: true}]"),
		Audit:  slog.New(slog.NewJSONHandler(audit, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	store, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	actions, err := action.New(action.Options{Store: store, Entries: store})
	if err != nil {
		t.Fatal(err)
	}
	srv, _ := rpc.NewServer(g.ServerOptions()...)
	if err := rpc.Register(srv, rpc.Options{Store: store, Actions: actions, Caller: (&flags.Guarded{}).Caller}); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1) // one value, so that the goroutine never waits for its reader
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		closed(t, func() error { return <-served })
	})
	return l.Addr().String()
}
