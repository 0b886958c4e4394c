package gate_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding/gzip"

	"github.com/mettle-build/mettle/elan/gate"
)

// dialFrom connects from an address of this machine, and reports whether the
// server keeps the connection: it sends its settings then.
func dialFrom(t *testing.T, to net.Addr, from string) (net.Conn, bool) {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.DialContext(t.Context(), "tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetReadDeadline(time.Now().Add(deadline)); err != nil {
		t.Fatal(err)
	}
	_, err = c.Read(make([]byte, 9))
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatal("the server neither takes the connection nor closes it")
	}
	return c, err == nil
}

func TestListener_limits(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	s := serve(t, gate.Options{MaxConnections: 5, MaxConnectionsPerAddress: 3, Registerer: reg}, handlers{unary: func(context.Context) error { return nil }}, l, nil)
	want := func(what, from string, want bool) net.Conn {
		t.Helper()
		c, got := dialFrom(t, l.Addr(), from)
		if got != want {
			t.Errorf("%s from %s: taken is %v, want %v", what, from, got, want)
		}
		return c
	}
	first := want("the first", "127.0.0.2", true)
	want("the second", "127.0.0.2", true)
	want("the third", "127.0.0.2", true)
	want("one too many of the address", "127.0.0.2", false)
	want("another's first", "127.0.0.3", true)
	want("another's second", "127.0.0.3", true)
	want("one too many in all", "127.0.0.4", false)
	if n := testutil.ToFloat64(collector(t, reg)); n != 5 {
		t.Errorf("%v connections, want 5", n)
	}
	// One that ends makes room.
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	for s.gate.Connections() == 5 {
		time.Sleep(time.Millisecond)
	}
	want("one after another has ended", "127.0.0.4", true)
}

// collector is what the registry says of connections.
func collector(t *testing.T, reg *prometheus.Registry) prometheus.Collector {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "connections", Help: "What is exported."})
	for _, f := range families {
		if f.GetName() == "test_grpc_connections" {
			g.Set(f.GetMetric()[0].GetGauge().GetValue())
		}
	}
	return g
}

// What is sent in one go and in pieces, with pauses, comes in as it was sent.
func TestListener_passesBytes(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, gate.Options{}, handlers{stream: echo}, l, nil)
	for name, opts := range map[string][]grpc.CallOption{"plain": nil, "gzip": {grpc.UseCompressor(gzip.Name)}} {
		t.Run(name, func(t *testing.T) { passesBytes(t, s.connect(t, l.Addr().String(), ""), opts) })
	}
}

func passesBytes(t *testing.T, conn *grpc.ClientConn, opts []grpc.CallOption) {
	t.Helper()
	cs, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, streamMethod, opts...)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{0, 1, 70_000, 3 << 20, 5} {
		sent := &message{Value: make([]byte, size)}
		for i := range sent.Value {
			sent.Value[i] = byte(i * 7)
		}
		if err := cs.SendMsg(sent); err != nil {
			t.Fatal(err)
		}
		got := &message{}
		if err := cs.RecvMsg(got); err != nil {
			t.Fatal(err)
		}
		if string(got.Value) != string(sent.Value) {
			t.Errorf("%d bytes came back changed", size)
		}
	}
	if err := cs.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := cs.RecvMsg(&message{}); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// Two connections may have the same address and port of the client at once: where the
// server has several addresses, and where a client resets a connection and has the
// next one from the same port before the server has closed the first.
func TestListener_twoOfOnePort(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, gate.Options{MaxConnectionsPerAddress: 2}, handlers{unary: func(context.Context) error { return nil }}, l, nil)
	port := 0
	dial := func(to string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 9), Port: port}, Control: reuseAddress}
		c, err := d.DialContext(t.Context(), "tcp4", net.JoinHostPort(to, strconv.Itoa(l.Addr().(*net.TCPAddr).Port)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if err := c.SetReadDeadline(time.Now().Add(deadline)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 9)); err != nil { // the server's settings
			t.Fatal(err)
		}
		port = c.LocalAddr().(*net.TCPAddr).Port
		return c
	}
	first, second := dial("127.0.0.1"), dial("127.0.0.2")
	if n := s.gate.Connections(); n != 2 {
		t.Errorf("%d connections, want 2", n)
	}
	for i, c := range []net.Conn{first, second} {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		for from := time.Now(); s.gate.Connections() != 1-i; time.Sleep(time.Millisecond) {
			if time.Since(from) > deadline {
				t.Fatalf("%d connections, want %d", s.gate.Connections(), 1-i)
			}
		}
	}
	port = 0
	dial("127.0.0.1")
	port = 0
	dial("127.0.0.1") // as many as the address may have: none is counted that has ended
}

// reuseAddress lets several sockets have one port.
func reuseAddress(_, _ string, raw syscall.RawConn) error {
	var failed error
	if err := raw.Control(func(fd uintptr) {
		failed = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
	}); err != nil {
		return err
	}
	return failed
}
