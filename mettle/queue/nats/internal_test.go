package nats

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// Where our clock is not the broker's, leases neither lapse while their workers live
// nor outlast them.
func TestQueue_clocksDiffer(t *testing.T) {
	t.Parallel()
	srv, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: t.TempDir(), NoSigs: true, NoLog: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	const lease = time.Second
	open := func(t *testing.T, prefix string, off time.Duration) *Queue {
		t.Helper()
		q, err := New(t.Context(), Options{Servers: []string{srv.ClientURL()}, Prefix: prefix, LeaseTime: lease, MaxAttempts: 1})
		if err != nil {
			t.Fatal(err)
		}
		q.clock.wall = func() time.Time { return time.Now().Add(off) }
		t.Cleanup(func() {
			if err := q.Close(); err != nil {
				t.Error(err)
			}
		})
		return q
	}
	for i, off := range []time.Duration{-time.Hour, time.Hour} {
		t.Run(off.String(), func(t *testing.T) {
			t.Parallel()
			prefix := fmt.Sprint("clock", i)
			api, worker := open(t, prefix, off), open(t, prefix, 0)
			ended := make(chan *queuepb.Update, 16)
			ctx, cancel := context.WithCancel(t.Context())
			received := make(chan error, 1)
			go func() {
				received <- api.ReceiveUpdates(ctx, "api", func(u *queuepb.Update) {
					if u.GetStage() == queuepb.Update_COMPLETED {
						ended <- u
					}
				})
			}()
			t.Cleanup(func() {
				cancel()
				if err := <-received; err != nil {
					t.Error(err)
				}
			})
			if err := api.Publish(t.Context(), &queuepb.Job{Operation: "a", ReplyTo: "api", Pool: "p"}); err != nil {
				t.Fatal(err)
			}
			l, err := worker.Lease(t.Context(), []string{"p"})
			if err != nil {
				t.Fatal(err)
			}
			// It is watched, and looked at several times, while it is extended.
			for i := range 3 * watchAfter * 4 {
				time.Sleep(lease / 4)
				if err := l.Extend(t.Context()); err != nil {
					t.Fatalf("after %d extensions: %v", i, err)
				}
			}
			// Its worker dies.
			if err := worker.Close(); err != nil {
				t.Fatal(err)
			}
			select {
			case <-ended:
			case <-time.After(30 * time.Second):
				t.Error("nobody has found out that the last worker is dead")
			}
		})
	}
}

// A broker that stays away, or refuses all, is asked less and less often, and never
// by all at once.
func TestQueue_reconnectDelay(t *testing.T) {
	t.Parallel()
	q := &Queue{opts: Options{}.withDefaults()}
	for _, tc := range []struct {
		n           int
		least, most time.Duration
	}{
		{1, firstReconnect / 2, firstReconnect},
		{2, firstReconnect, 2 * firstReconnect},
		{5, lastReconnect / 2, lastReconnect},
		{1 << 30, lastReconnect / 2, lastReconnect},
	} {
		seen := map[time.Duration]bool{}
		for range 100 {
			d := q.reconnectDelay(tc.n)
			seen[d] = true
			if d < tc.least || d > tc.most {
				t.Errorf("after %d tries it waits %v, want %v to %v", tc.n, d, tc.least, tc.most)
			}
		}
		if len(seen) < 10 {
			t.Errorf("after %d tries there are %d different waits in a hundred", tc.n, len(seen))
		}
	}
}
