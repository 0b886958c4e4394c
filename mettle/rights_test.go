package main

import (
	"context"
	"log/slog"
	"testing"

	"github.com/mettle-build/mettle/creds/credstest"
	"github.com/mettle-build/mettle/metrics"
)

// TestRights: each method that api and dual register has a line in the table of
// rights, and says what is missing to those who lack it.
func TestRights(t *testing.T) {
	t.Setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
	policy := "--policy=" + credstest.Write(t, t.TempDir(), "policy.yaml", credstest.StrangerPolicy())
	log := slog.New(slog.DiscardHandler)
	check := func(t *testing.T, addr string, serve func(context.Context) error, end func() error) {
		t.Helper()
		defer closed(t, end)
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1) // one value, so that the goroutine never waits for its reader
		go func() { served <- serve(ctx) }()
		if n := credstest.Refused(t, addr, "../creds/README.md"); n < 25 {
			t.Errorf("%d methods were called", n)
		}
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
	t.Run("dual", func(t *testing.T) {
		c := parsed(t, "dual", "--http_port=-1", "--slots=1", "--sandbox=bare", "--assets=on", policy)
		d := &dual{cmd: &c.Dual, dir: t.TempDir(), listener: listen(t), log: log, registry: metrics.NewRegistry()}
		d.admin = adminPage{name: "mettle dual", registry: d.registry, log: log}
		if err := d.wire(t.Context()); err != nil {
			t.Fatal(err)
		}
		check(t, d.listener.Addr().String(), d.serve, d.close)
	})
	t.Run("api", func(t *testing.T) {
		c := parsed(t, "api", "--http_port=-1", "--storage=127.0.0.1:1", "--pools=default/1", "--queue=gcppubsub://project/x", policy)
		s := &apiServer{cmd: &c.API, listener: listen(t), log: log, registry: metrics.NewRegistry()}
		s.admin = adminPage{name: "mettle api", storesOnly: true, registry: s.registry, log: log}
		if err := s.wire(t.Context()); err != nil {
			t.Fatal(err)
		}
		check(t, s.listener.Addr().String(), s.serve, s.closers.close)
	})
}
