package metrics_test

import (
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/mettle-build/mettle/metrics"
)

func TestClient_countsCalls(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	bspb.RegisterByteStreamServer(s, &fakeStreams{})
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	reg := prometheus.NewPedanticRegistry()
	calls, err := metrics.NewClient(metrics.ClientOptions{Prefix: "mettle_storage", Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithStatsHandler(calls))
	if err != nil {
		t.Fatal(err)
	}
	c := bspb.NewByteStreamClient(conn)
	for _, name := range []string{"fine", "fine", "missing"} {
		_, _ = c.QueryWriteStatus(t.Context(), &bspb.QueryWriteStatusRequest{ResourceName: name})
	}
	stream, err := c.Read(t.Context(), &bspb.ReadRequest{ResourceName: "missing"})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = stream.Recv()
	if err := conn.Close(); err != nil { // by when all calls have ended
		t.Error(err)
	}
	s.Stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	want := map[string]float64{
		`mettle_storage_calls_total code="OK" method="QueryWriteStatus"`:       2,
		`mettle_storage_calls_total code="NotFound" method="QueryWriteStatus"`: 1,
		`mettle_storage_calls_total code="NotFound" method="Read"`:             1,
		`mettle_storage_calls_total code="OK" method="Read"`:                   0,
		`mettle_storage_call_seconds method="QueryWriteStatus"`:                3,
		`mettle_storage_call_seconds method="Read"`:                            1,
	}
	got := values(t, reg)
	for _, direction := range []string{"sent", "received"} {
		key := `mettle_storage_bytes_total direction="` + direction + `"`
		if got[key] <= 0 {
			t.Errorf("%v bytes were %s", got[key], direction)
		}
		delete(got, key)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("metrics (-want +got):\n%s", d)
	}
	if _, err := metrics.NewClient(metrics.ClientOptions{Prefix: "mettle_storage", Registerer: reg}); err == nil {
		t.Error("the metrics were registered twice")
	}
}
