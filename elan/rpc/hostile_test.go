package rpc_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/mettle-build/mettle/elan/rpc"
)

// hostileTimeout is far beyond what a step takes, also on a busy machine.
const hostileTimeout = time.Minute

// peer is a client that speaks HTTP/2 frame by frame.
type peer struct {
	net.Conn
	*http2.Framer
	headers []byte // a call of Health, encoded
}

// hostile serves health, and connects a peer and a client that is none.
func hostile(t *testing.T) (*peer, healthpb.HealthClient) {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server, _ := rpc.NewServer()
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	good, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close() // the server may have done so
		if err := good.Close(); err != nil {
			t.Error(err)
		}
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	if err := conn.SetDeadline(time.Now().Add(hostileTimeout)); err != nil {
		t.Fatal(err)
	}
	p := &peer{Conn: conn, Framer: http2.NewFramer(conn, conn)}
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := p.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	p.headers = encode(t, nil)
	return p, healthpb.NewHealthClient(good)
}

// encode encodes the headers of a call, with more of them.
func encode(t *testing.T, more []hpack.HeaderField) []byte {
	t.Helper()
	var buf bytes.Buffer
	e := hpack.NewEncoder(&buf)
	e.SetMaxDynamicTableSize(0) // each block stands for itself
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		{Name: ":authority", Value: "x"},
		{Name: ":path", Value: healthpb.Health_Check_FullMethodName},
		{Name: "content-type", Value: "application/grpc"},
	}, more...) {
		if err := e.WriteField(f); err != nil {
			t.Fatal(err)
		}
	}
	return buf.Bytes()
}

// closed reads what the server says until it closes the connection, and returns
// the debug data of its GOAWAY. What does not come within the deadline fails.
func (p *peer) closed(t *testing.T) string {
	t.Helper()
	said := ""
	for {
		f, err := p.ReadFrame()
		if err != nil {
			var n net.Error
			if errors.As(err, &n) && n.Timeout() {
				t.Fatal("the server keeps the connection")
			}
			return said
		}
		if g, ok := f.(*http2.GoAwayFrame); ok {
			said = string(g.DebugData())
		}
	}
}

func serves(t *testing.T, good healthpb.HealthClient) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), hostileTimeout)
	defer cancel()
	if _, err := good.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("a call of another client: %v", err)
	}
}

func TestNewServer_pingFlood(t *testing.T) {
	p, good := hostile(t)
	go func() {
		for p.WritePing(false, [8]byte{}) == nil {
			// Until it is closed.
		}
	}()
	if said := p.closed(t); said != "too_many_pings" && said != "" { // the reset may overtake it
		t.Errorf("the server said %q", said)
	}
	serves(t, good)
}

// Calls that are reset as soon as they have begun do not pile up.
func TestNewServer_rapidReset(t *testing.T) {
	p, good := hostile(t)
	go func() { _, _ = io.Copy(io.Discard, p.Conn) }()
	for id := uint32(1); id < 40_000; id += 2 {
		if err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.headers, EndHeaders: true}); err != nil {
			break // which is as good
		}
		if err := p.WriteRSTStream(id, http2.ErrCodeCancel); err != nil {
			break
		}
	}
	serves(t, good)
}

// A call's headers that do not end are given up where they are too many.
func TestNewServer_continuationFlood(t *testing.T) {
	p, good := hostile(t)
	if err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.headers}); err != nil {
		t.Fatal(err)
	}
	more := encode(t, []hpack.HeaderField{{Name: "x-more", Value: strings.Repeat("a", 1000)}})[len(p.headers):]
	const most = 64 << 20 // bytes that a server could take whole
	sent := 0
	for ; sent < most; sent += len(more) {
		if err := p.WriteContinuation(1, false, more); err != nil {
			break
		}
	}
	if sent >= most {
		t.Errorf("the server took %d MiB of one call's headers", most>>20)
	}
	serves(t, good)
}

// Metadata above the limit end the call, and not the connection.
func TestNewServer_largeMetadata(t *testing.T) {
	_, good := hostile(t)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x-large", strings.Repeat("a", 128<<10))
	if _, err := good.Check(ctx, &healthpb.HealthCheckRequest{}); err == nil {
		t.Error("128 KiB of metadata are taken")
	}
	ctx = metadata.AppendToOutgoingContext(t.Context(), "x-token", strings.Repeat("a", 32<<10))
	if _, err := good.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("32 KiB of metadata: %v", err)
	}
}
