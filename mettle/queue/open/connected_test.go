package open_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/mettle/queue/open"
)

// connected is what the metric says; -1: there is none.
func connected(t *testing.T, reg prometheus.Gatherer) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "mettle_broker_connected" {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	return -1
}

func awaitConnected(t *testing.T, reg prometheus.Gatherer, want float64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for connected(t, reg) != want {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("mettle_broker_connected is %v, want %v", connected(t, reg), want)
		}
	}
}

// A broker that is away can be told from one that is there also where nobody
// calls it: before it was ever reached, and after it has gone.
func TestURL_Open_connected(t *testing.T) {
	port := freePort(t)
	reg := prometheus.NewRegistry()
	q, err := parse(t, fmt.Sprintf("nats://127.0.0.1:%d/p", port)).Open(t.Context(), open.Options{Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	if got := connected(t, reg); got != 0 {
		t.Errorf("mettle_broker_connected is %v before the broker was reached", got)
	}
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: port, JetStream: true, StoreDir: t.TempDir(), NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(s.WaitForShutdown)
	t.Cleanup(s.Shutdown)
	awaitConnected(t, reg, 1)
	s.Shutdown()
	awaitConnected(t, reg, 0)
	if err := q.Close(); err != nil {
		t.Error(err)
	}
	if got := connected(t, reg); got != -1 {
		t.Errorf("mettle_broker_connected is %v after Close", got)
	}
}
