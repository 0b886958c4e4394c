package noop_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/noop"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newQueue(t *testing.T) *mem.Queue {
	t.Helper()
	q, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { q.Close() })
	return q
}

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 2)
		got := make(map[string]*repb.ExecuteResponse)
		go func() {
			ended <- q.ReceiveUpdates(ctx, "api", func(u *queuepb.Update) {
				if u.GetStage() != queuepb.Update_COMPLETED {
					return
				}
				res := &repb.ExecuteResponse{}
				if err := proto.Unmarshal(u.GetExecuteResponse(), res); err != nil {
					t.Error(err)
				}
				got[u.GetOperation()] = res
			})
		}()
		for i := range 100 { // these wait for a worker
			job := &queuepb.Job{Operation: fmt.Sprint(i), ReplyTo: "api", Pool: queue.DefaultPool}
			if err := (noop.Stamped{Publisher: q}).Publish(ctx, job); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Second)
		go func() { ended <- noop.Run(ctx, q, 10) }()
		synctest.Wait()
		if waiting, leased := q.Len(); waiting+leased > 0 {
			t.Errorf("%d jobs wait and %d are leased, want none", waiting, leased)
		}
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		if len(got) != 100 {
			t.Errorf("%d jobs have ended, want 100", len(got))
		}
		for name, res := range got {
			m := res.GetResult().GetExecutionMetadata()
			if d := m.GetWorkerStartTimestamp().AsTime().Sub(m.GetQueuedTimestamp().AsTime()); d != time.Second {
				t.Errorf("%s was leased %v after it was published, want 1s", name, d)
			}
		}
	})
}

func TestRun_queueClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(t)
		ended := make(chan error)
		go func() { ended <- noop.Run(t.Context(), q, 3) }()
		synctest.Wait()
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; !errors.Is(err, queue.ErrClosed) {
			t.Errorf("Run over a closed queue: %v, want %v", err, queue.ErrClosed)
		}
	})
}
