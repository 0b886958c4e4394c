package gate_test

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/gate"
)

// echo answers each message, until the client has sent all.
func echo(ss grpc.ServerStream) error {
	for {
		m := &message{}
		if err := ss.RecvMsg(m); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := ss.SendMsg(m); err != nil {
			return err
		}
	}
}

func TestGate_endsStalledCalls(t *testing.T) {
	flood := func(ss grpc.ServerStream) error {
		for {
			if err := ss.SendMsg(&message{Value: make([]byte, 16<<10)}); err != nil {
				return err
			}
		}
	}
	for _, tc := range []struct {
		name   string
		stream func(grpc.ServerStream) error
		ends   bool // the client does nothing for an hour: whether that ends the call
	}{
		{"a client that sends nothing", echo, true},
		{"a client that takes nothing", flood, true},
		{"a client that may be silent", func(ss grpc.ServerStream) error {
			gate.Patient(ss.Context())
			return echo(ss)
		}, false},
		{"a server that has nothing to say", func(ss grpc.ServerStream) error {
			select {
			case <-ss.Context().Done():
			case <-time.After(2 * time.Hour):
			}
			return ss.SendMsg(&message{})
		}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ended := make(chan error, 1)
				s := serve(t, gate.Options{Stall: 3 * time.Minute}, handlers{stream: func(ss grpc.ServerStream) error {
					err := tc.stream(ss)
					ended <- err
					return err
				}}, nil, nil)
				cs := open(t, s.connect(t, "server", ""))
				time.Sleep(3*time.Minute - time.Second)
				select {
				case err := <-ended:
					t.Fatalf("the call ended before its time: %v", err)
				default:
				}
				time.Sleep(time.Hour)
				select {
				case err := <-ended:
					if !tc.ends {
						t.Errorf("the call ended: %v", err)
					}
					wantCode(t, "the handler's error", err, codes.DeadlineExceeded)
				default:
					if tc.ends {
						t.Error("the call goes on")
					}
					if err := cs.CloseSend(); err != nil {
						t.Error(err)
					}
					return
				}
				for {
					if err := cs.RecvMsg(&message{}); err != nil {
						wantCode(t, "the client's error", err, codes.DeadlineExceeded)
						return
					}
				}
			})
		})
	}
}

// A call that goes on slowly is not stalled.
func TestGate_bearsSlowCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serve(t, gate.Options{Stall: 3 * time.Minute}, handlers{stream: echo}, nil, nil)
		cs := open(t, s.connect(t, "server", ""))
		for range 20 {
			time.Sleep(2 * time.Minute)
			if err := cs.SendMsg(&message{}); err != nil {
				t.Fatal(err)
			}
			if err := cs.RecvMsg(&message{}); err != nil {
				t.Fatal(err)
			}
		}
		if err := cs.CloseSend(); err != nil {
			t.Fatal(err)
		}
	})
}

// Of one connection so many calls work on batches at once; the others wait, and
// those of other kinds and connections do not.
func TestGate_batchesOfAConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running atomic.Int64
		release := make(chan struct{})
		s := serve(t, gate.Options{Stall: time.Minute, MaxMemoryBytes: 1 << 40}, handlers{
			batch: func(context.Context) error {
				running.Add(1)
				<-release
				return nil
			},
			unary: func(context.Context) error { return nil },
		}, nil, nil)
		conn := s.connect(t, "server", "")
		var calls sync.WaitGroup
		for range gate.Batches() + 10 {
			calls.Go(func() {
				if err := conn.Invoke(t.Context(), batchMethod, &message{}, &message{}); err != nil {
					t.Error(err)
				}
			})
		}
		time.Sleep(time.Hour) // those that wait for their turn are not stalled
		if n := running.Load(); n != int64(gate.Batches()) {
			t.Errorf("%d batches at once, want %d", n, gate.Batches())
		}
		if err := conn.Invoke(t.Context(), unaryMethod, &message{}, &message{}); err != nil {
			t.Error(err)
		}
		close(release)
		calls.Wait()
		if n := running.Load(); n != int64(gate.Batches())+10 {
			t.Errorf("%d batches in all, want %d", n, gate.Batches()+10)
		}
	})
}

func TestNew_refusesOptions(t *testing.T) {
	for name, o := range map[string]gate.Options{
		"no prefix":              {},
		"a prefix of no metric":  {Prefix: "A b"},
		"negative connections":   {Prefix: "elan", MaxConnections: -1},
		"negative of an address": {Prefix: "elan", MaxConnectionsPerAddress: -1},
		"a negative time":        {Prefix: "elan", Stall: -1},
		"a negative age":         {Prefix: "elan", MaxAge: -1},
		"negative memory":        {Prefix: "elan", MaxMemoryBytes: -1},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := gate.New(o); err == nil {
				t.Error("New takes them")
			}
		})
	}
}

// TestGate_admits: a call that may not come in ends before its client has sent a
// message, and no handler sees it.
func TestGate_admits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		may := atomic.Bool{}
		handled := atomic.Int32{}
		s := serve(t, gate.Options{Admit: func(_ context.Context, method string) error {
			if may.Load() && method == streamMethod {
				return nil
			}
			return status.Error(codes.Unauthenticated, "who are you?")
		}}, handlers{stream: func(ss grpc.ServerStream) error {
			handled.Add(1)
			return echo(ss)
		}}, nil, nil)
		conn := s.connect(t, "server", "")
		err := open(t, conn).RecvMsg(&message{})
		if status.Code(err) != codes.Unauthenticated || handled.Load() != 0 {
			t.Errorf("got %v, and %d calls were handled", err, handled.Load())
		}
		may.Store(true)
		cs := open(t, conn)
		if err := errors.Join(cs.SendMsg(&message{}), cs.RecvMsg(&message{})); err != nil {
			t.Errorf("one that may come in: %v", err)
		}
	})
}
