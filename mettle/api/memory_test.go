package api_test

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/queue/mem"
)

// once is a client that leaves as soon as its operation is queued.
type once struct {
	grpc.ServerStream
	ctx   context.Context //nolint:containedctx // a stream has one
	leave context.CancelFunc
}

func (o once) Context() context.Context { return o.ctx }

func (o once) Send(op *longrunningpb.Operation) error {
	md := &repb.ExecuteOperationMetadata{}
	err := op.GetMetadata().UnmarshalTo(md)
	if md.GetStage() != repb.ExecutionStage_CACHE_CHECK {
		o.leave()
	}
	return err
}

// heap is what is in use after a collection, in bytes.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc) //nolint:gosec // far from its end
}

// crowd is a server on which many operations are queued.
type crowd struct {
	*bench
	queue *mem.Queue
	md    string // the RequestMetadata of a Bazel
	n     int
}

func newCrowd(tb testing.TB) *crowd {
	tb.Helper()
	q, err := mem.New(mem.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	c := &crowd{bench: &bench{t: tb, store: newStorage(), jobs: &jobs{Queue: q}}, queue: q}
	c.start(func(o *api.Options) { o.AbandonAfter = time.Hour })
	tb.Cleanup(func() {
		c.stop()
		if err := q.Close(); err != nil {
			tb.Error(err)
		}
	})
	md, err := proto.Marshal(&repb.RequestMetadata{
		ToolDetails: &repb.ToolDetails{ToolName: "bazel", ToolVersion: "9.0.0"}, ActionId: strings.Repeat("a", 64),
		ToolInvocationId: "6a9a1de6-2a0c-4c6b-9e54-0d2a4a2a8d6e", CorrelatedInvocationsId: "0e3b2f02-7a1a-4d1b-8a3e-1c2b3d4e5f60",
		ActionMnemonic: "CppCompile", TargetId: "//some/package/of/a/repository:target", ConfigurationId: strings.Repeat("c", 64),
	})
	if err != nil {
		tb.Fatal(err)
	}
	c.md = string(md)
	return c
}

// more queues n operations more, each with a Command of 2 KiB, whose clients go
// away at once, and tells what each takes, in bytes.
func (c *crowd) more(n int) (each int64) {
	c.t.Helper()
	before := heap()
	next := make(chan int)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range next {
				d := c.store.action(strconv.Itoa(i), func(_ *repb.Action, cmd *repb.Command) {
					for len(cmd.Arguments) < 26 {
						cmd.Arguments = append(cmd.Arguments, strings.Repeat("x", 78))
					}
				})
				ctx, leave := context.WithCancel(metadata.NewIncomingContext(c.t.Context(), metadata.Pairs(
					"build.bazel.remote.execution.v2.requestmetadata-bin", c.md)))
				err := c.server.Execute(&repb.ExecuteRequest{ActionDigest: d}, once{ctx: ctx, leave: leave})
				if status.Code(err) != codes.Canceled {
					c.t.Errorf("execute: %v", err)
				}
				c.store.forget(d)
			}
		})
	}
	for i := range n {
		next <- c.n + i
	}
	close(next)
	wg.Wait()
	c.n += n
	each = (heap() - before) / int64(n)
	if waiting, leased := c.queue.Len(); waiting != c.n || leased != 0 {
		c.t.Errorf("%d wait, %d are leased, want %d and 0", waiting, leased, c.n)
	}
	return each
}

// An operation that waits takes little, and where many do, less: 200,000 of them
// stay under half a gibibyte, so that with what the collector leaves lying about
// the server stays under one.
func TestMemory_ofQueuedOperations(t *testing.T) {
	if testing.Short() || race {
		t.Skip("takes 200 MB, and under the race detector long")
	}
	c := newCrowd(t)
	few, many := c.more(4<<10), c.more(24<<10)
	t.Logf("%d bytes an operation where few wait, %d where many do", few, many)
	if few > 5<<10 || many > 1<<29/200_000 {
		t.Errorf("an operation takes %d bytes where few wait, %d where many do, want at most %d and %d", few, many, 5<<10, 1<<29/200_000)
	}
	l := c.lease()
	if len(l.Job().GetCommand()) == 0 {
		t.Error("the first job has no Command")
	}
}

// BenchmarkQueued200000 tells what a server takes on which 200,000 operations
// wait: run it with -benchtime 1x.
func BenchmarkQueued200000(b *testing.B) {
	for b.Loop() {
		c := newCrowd(b)
		each := c.more(200_000)
		statm, err := os.ReadFile("/proc/self/statm")
		if err != nil {
			b.Skip(err)
		}
		var size, resident int
		if _, err := fmt.Sscan(string(statm), &size, &resident); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(each), "heap-B/operation")
		b.ReportMetric(float64(resident*os.Getpagesize())/(1<<20), "RSS-MiB")
	}
}
