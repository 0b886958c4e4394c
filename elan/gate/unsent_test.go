package gate_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/gate"
)

// A client that takes nothing of what it asks for has no more of its batches begun
// than fit in what may be on their way; that ends them in time.
func TestGate_answersThatAreNotTaken(t *testing.T) {
	const answer = 3 << 20
	synctest.Test(t, func(t *testing.T) {
		var begun atomic.Int64
		s := serve(t, gate.Options{Stall: 5 * time.Minute, MaxMemoryBytes: 1 << 40}, handlers{
			answer: answer,
			batch:  func(context.Context) error { begun.Add(1); return nil },
		}, nil, nil)
		conn := s.connect(t, "server", "")
		const calls = 200
		streams := make([]grpc.ClientStream, calls)
		for i := range streams {
			cs, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, batchMethod)
			if err != nil {
				t.Fatal(err)
			}
			if err := cs.SendMsg(&message{}); err != nil {
				t.Fatal(err)
			}
			if err := cs.CloseSend(); err != nil {
				t.Fatal(err)
			}
			streams[i] = cs
		}
		time.Sleep(time.Minute)
		// Those that were at work when it became too much are on their way too.
		if n, most := begun.Load(), int64(gate.MaxUnsent/answer+gate.Batches()); n > most {
			t.Errorf("%d answers of %d bytes, want %d at most", n, answer, most)
		}
		time.Sleep(10 * time.Minute)
		ended, answered := 0, 0
		for _, cs := range streams {
			if err := cs.RecvMsg(&message{}); err != nil {
				wantCode(t, "a call that waited", err, codes.DeadlineExceeded)
				ended++
			} else {
				answered++
			}
		}
		if ended == 0 || answered == 0 {
			t.Errorf("%d calls were ended that waited for the client to take something, and %d answered, want some of both", ended, answered)
		}
		// All was taken: there is room again.
		if err := conn.Invoke(t.Context(), batchMethod, &message{}, &message{}); err != nil {
			t.Error(err)
		}
	})
}

// A connection that takes nothing for too long is closed, which frees what it had.
func TestGate_closesStuckConnections(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, gate.Options{Stall: time.Second}, handlers{answer: 3 << 20, batch: func(context.Context) error { return nil }}, l, nil)
	conn := s.connect(t, l.Addr().String(), "")
	cs, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, batchMethod)
	if err != nil {
		t.Fatal(err)
	}
	if err := cs.SendMsg(&message{}); err != nil {
		t.Fatal(err)
	}
	if err := cs.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for from := time.Now(); s.gate.Connections() > 0 || s.gate.Calls() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Since(from) > deadline {
			t.Fatal("the connection stays open")
		}
	}
	wantCode(t, "the call", cs.RecvMsg(&message{}), codes.Unavailable)
}

// After its age a connection has its calls go on, and takes no new ones.
func TestGate_age(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dials atomic.Int64
		s := serve(t, gate.Options{MaxAge: 5 * time.Minute, AgeGrace: time.Hour, Stall: 2 * time.Hour}, handlers{stream: echo, unary: func(context.Context) error { return nil }}, nil, nil)
		dial := s.dial
		s.dial = func(ctx context.Context, addr string) (net.Conn, error) {
			dials.Add(1)
			return dial(ctx, addr)
		}
		conn := s.connect(t, "server", "")
		long := open(t, conn)
		for range 8 {
			time.Sleep(5 * time.Minute)
			if err := long.SendMsg(&message{}); err != nil {
				t.Fatal(err)
			}
			if err := long.RecvMsg(&message{}); err != nil {
				t.Fatal(err)
			}
			if err := conn.Invoke(t.Context(), unaryMethod, &message{}, &message{}); err != nil {
				t.Fatal(err)
			}
		}
		if err := long.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if n := dials.Load(); n < 4 {
			t.Errorf("%d connections in 40 minutes, want about one in five", n)
		}
		// What is there longer than the grace is cut off.
		late := open(t, conn)
		time.Sleep(70 * time.Minute)
		err := late.RecvMsg(&message{})
		wantCode(t, "a call of 70 minutes", err, codes.Unavailable)
	})
}
