package gate_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/gate"
)

// What one client of a connection does, be it that of a proxy or of an API server,
// holds up no other.

// begin begins a call of batchMethod, and sends its message only if all is set.
func begin(t *testing.T, conn *grpc.ClientConn, all bool) grpc.ClientStream {
	t.Helper()
	cs, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, batchMethod)
	if err != nil {
		t.Fatal(err)
	}
	if !all {
		return cs
	}
	if err := cs.SendMsg(&message{}); err != nil {
		t.Fatal(err)
	}
	if err := cs.CloseSend(); err != nil {
		t.Fatal(err)
	}
	return cs
}

// Streams that nobody reads have more on their way than answers may, and batches
// begin all the same.
func TestGate_streamsThatAreNotTaken(t *testing.T) {
	const part = 3 << 20
	synctest.Test(t, func(t *testing.T) {
		s := serve(t, gate.Options{Stall: 5 * time.Minute, MaxMemoryBytes: 1 << 40}, handlers{
			batch:  func(context.Context) error { return nil },
			stream: func(ss grpc.ServerStream) error { return ss.SendMsg(&message{Value: make([]byte, part)}) },
		}, nil, nil)
		conn := s.connect(t, "server", "")
		for range gate.MaxUnsent/part + 1 {
			open(t, conn)
		}
		time.Sleep(time.Second)
		from := time.Now()
		if err := begin(t, conn, true).RecvMsg(&message{}); err != nil {
			t.Error(err)
		}
		if took := time.Since(from); took != 0 {
			t.Errorf("the batch took %v", took)
		}
	})
}

// Calls whose client sends nothing have all places of the connection for some seconds
// and no longer.
func TestGate_lendsPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve(t, gate.Options{Stall: 5 * time.Minute, MaxMemoryBytes: 1 << 40}, handlers{
			batch: func(context.Context) error { return nil },
		}, nil, nil)
		conn := s.connect(t, "server", "")
		slow := make([]grpc.ClientStream, gate.Batches())
		for i := range slow {
			slow[i] = begin(t, conn, false)
		}
		time.Sleep(time.Second)
		from := time.Now()
		if err := begin(t, conn, true).RecvMsg(&message{}); err != nil {
			t.Error(err)
		}
		if took := time.Since(from); took > 10*time.Second {
			t.Errorf("the batch took %v", took)
		}
		// Those that are slow are served too, and have nobody else's place to give back.
		for _, cs := range slow {
			if err := cs.SendMsg(&message{}); err != nil {
				t.Fatal(err)
			}
			if err := cs.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if err := cs.RecvMsg(&message{}); err != nil {
				t.Error(err)
			}
		}
	})
}

// A connection on which one client takes nothing goes on for the others.
func TestGate_keepsSharedConnections(t *testing.T) {
	const stall = 3 * time.Second
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	left := make(chan struct{}, 1)
	s := serve(t, gate.Options{Stall: stall}, handlers{
		answer: 3 << 20,
		batch:  func(context.Context) error { return nil },
		stream: func(ss grpc.ServerStream) error {
			if err := ss.SendMsg(&message{}); err != nil {
				return err
			}
			<-left
			return nil
		},
	}, l, nil)
	conn := s.connect(t, l.Addr().String(), "")
	other := open(t, conn)
	if err := other.RecvMsg(&message{}); err != nil {
		t.Fatal(err)
	}
	stuck := begin(t, conn, true)
	for s.gate.Ticks() < 8 { // the stall and what it takes to be seen
		time.Sleep(10 * time.Millisecond)
	}
	if n := s.gate.Connections(); n != 1 {
		t.Errorf("%d connections, want the one", n)
	}
	if err := stuck.RecvMsg(&message{}); err != nil {
		t.Errorf("what was not taken before: %v", err)
	}
	left <- struct{}{}
}

// While memory is short, a client that waits for many actions is served all the same:
// those are not its share.
func TestGate_memoryIsShortForWhoWaits(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const limit = 1 << 40
	var heap atomic.Int64
	looked := make(chan struct{})
	left := make(chan struct{})
	begun := make(chan struct{})
	s := serve(t, gate.Options{MaxMemoryBytes: limit, Kinds: map[string]gate.Kind{streamMethod: gate.Long}}, handlers{
		unary: func(context.Context) error { return nil },
		batch: func(context.Context) error {
			begun <- struct{}{}
			<-left
			return nil
		},
		stream: func(ss grpc.ServerStream) error {
			if err := ss.SendMsg(&message{}); err != nil {
				return err
			}
			<-left
			return nil
		},
	}, l, func() int64 {
		select {
		case looked <- struct{}{}:
		default:
		}
		return heap.Load()
	})
	good, greedy := s.connect(t, l.Addr().String(), "127.0.0.2"), s.connect(t, l.Addr().String(), "127.0.0.3")
	for range 2 * gate.MinShare {
		if err := open(t, good).RecvMsg(&message{}); err != nil {
			t.Fatal(err)
		}
	}
	for range 4 * gate.MinShare {
		begin(t, greedy, true)
		<-begun
	}
	heap.Store(limit / 100 * 80)
	<-looked
	for s.gate.Share() > gate.MinShare {
		<-looked
	}
	heap.Store(limit / 100 * 70)
	<-looked
	<-looked
	if err := good.Invoke(t.Context(), unaryMethod, &message{}, &message{}); err != nil {
		t.Errorf("a call of the client that waits for actions: %v", err)
	}
	close(left)
}
