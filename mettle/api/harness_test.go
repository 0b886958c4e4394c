package api_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// storage is a CAS to read from and an ActionCache, in memory. What is slow or
// broken in it is set before it is used.
type storage struct {
	delay   time.Duration
	err     error
	explode bool

	mu      sync.Mutex
	blobs   map[digest.Digest][]byte
	results map[blob.EntryKey]*repb.ActionResult
	reads   int
}

func newStorage() *storage {
	return &storage{blobs: make(map[digest.Digest][]byte), results: make(map[blob.EntryKey]*repb.ActionResult)}
}

func (s *storage) wait(ctx context.Context) error {
	if s.explode {
		panic("the store is broken")
	}
	if s.delay == 0 {
		return s.err
	}
	select {
	case <-time.After(s.delay):
		return s.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *storage) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads++
	data, ok := s.blobs[d]
	if !ok {
		return nil, fmt.Errorf("open %s: %w", d, blob.ErrNotFound)
	}
	return io.NopCloser(bytes.NewReader(data[offset:])), nil
}

func (s *storage) Get(ctx context.Context, k blob.EntryKey) (*repb.ActionResult, error) {
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.results[k]
	if !ok {
		return nil, fmt.Errorf("get %v: %w", k, blob.ErrNotFound)
	}
	return proto.CloneOf(r), nil
}

// put stores a message and returns its digest.
func (s *storage) put(m proto.Message) *repb.Digest {
	d, data, err := digest.OfMessage(digest.SHA256, m)
	if err != nil {
		panic(err)
	}
	return s.putBytes(d, data)
}

func (s *storage) putBytes(d digest.Digest, data []byte) *repb.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[d] = data
	return d.Proto()
}

func (s *storage) cache(d *repb.Digest, r *repb.ActionResult) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.results[blob.EntryKey{Action: parse(d)}] = r
}

func parse(d *repb.Digest) digest.Digest {
	out, err := digest.New(digest.SHA256, d.GetHash(), d.GetSizeBytes())
	if err != nil {
		panic(err)
	}
	return out
}

// action stores an Action, whose Command is `true` and a word to tell it apart,
// with some changes.
func (s *storage) action(word string, change ...func(*repb.Action, *repb.Command)) *repb.Digest {
	cmd := &repb.Command{Arguments: []string{"true", word}}
	act := &repb.Action{InputRootDigest: digest.Empty(digest.SHA256).Proto()}
	for _, f := range change {
		f(act, cmd)
	}
	if act.CommandDigest == nil {
		act.CommandDigest = s.put(cmd)
	}
	return s.put(act)
}

func doNotCache(a *repb.Action, _ *repb.Command) { a.DoNotCache = true }

func timeoutOf(d time.Duration) func(*repb.Action, *repb.Command) {
	return func(a *repb.Action, _ *repb.Command) { a.Timeout = durationpb.New(d) }
}

// bench is a server with all that it needs, and a client.
type bench struct {
	t      testing.TB
	store  *storage
	jobs   *jobs
	server *api.Server
	client repb.ExecutionClient
	ops    longrunningpb.OperationsClient
	stop   func() // ends the server, once
}

// inBubble runs f in a synctest bubble with a bench.
func inBubble(t *testing.T, f func(t *testing.T, b *bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f(t, newBench(t, nil))
	})
}

func newBench(t testing.TB, change func(*api.Options)) *bench {
	t.Helper()
	q, err := mem.New(mem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, store: newStorage(), jobs: &jobs{Queue: q}}
	t.Cleanup(func() {
		b.stop()
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	})
	b.start(change)
	return b
}

// start starts a server over the storage and the queue that are there.
func (b *bench) start(change func(*api.Options)) {
	b.t.Helper()
	platforms, err := platform.New(platform.Options{})
	if err != nil {
		b.t.Fatal(err)
	}
	o := api.Options{ID: "api", Store: b.store, Actions: b.store, Jobs: b.jobs, Updates: b.jobs, Notices: b.jobs, Platforms: platforms, List: true}
	if change != nil {
		change(&o)
	}
	if b.server, err = api.New(o); err != nil {
		b.t.Fatal(err)
	}
	l := bufconn.Listen(1 << 16)
	g := grpc.NewServer()
	b.server.Register(g)
	served, ran := make(chan error, 1), make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	ctx, cancel := context.WithCancel(b.t.Context())
	go func() { ran <- b.server.Run(ctx) }()
	conn, err := grpc.NewClient("passthrough:///bench",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.t.Fatal(err)
	}
	b.client = repb.NewExecutionClient(conn)
	b.ops = longrunningpb.NewOperationsClient(conn)
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ran; err != nil && !errors.Is(err, queue.ErrClosed) {
			b.t.Error("Run:", err)
		}
		g.GracefulStop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // which it was before it began
			b.t.Error("Serve:", err)
		}
		if err := conn.Close(); err != nil {
			b.t.Error(err)
		}
	})
}

// A waiting is a client's end of a stream.
type waiting struct {
	t      testing.TB
	stream grpc.ServerStreamingClient[longrunningpb.Operation]
	name   string
	leave  context.CancelFunc
}

func (b *bench) execute(req *repb.ExecuteRequest) *waiting {
	b.t.Helper()
	ctx, cancel := context.WithCancel(b.t.Context())
	st, err := b.client.Execute(ctx, req)
	if err != nil {
		b.t.Fatal(err)
	}
	return &waiting{t: b.t, stream: st, leave: cancel}
}

func (b *bench) executeAction(d *repb.Digest) *waiting {
	b.t.Helper()
	return b.execute(&repb.ExecuteRequest{ActionDigest: d})
}

func (b *bench) resume(name string) *waiting {
	b.t.Helper()
	ctx, cancel := context.WithCancel(b.t.Context())
	st, err := b.client.WaitExecution(ctx, &repb.WaitExecutionRequest{Name: name})
	if err != nil {
		b.t.Fatal(err)
	}
	return &waiting{t: b.t, stream: st, leave: cancel}
}

// next is the next message, checked for what is true of all.
func (w *waiting) next() (*longrunningpb.Operation, *repb.ExecuteOperationMetadata) {
	w.t.Helper()
	op, err := w.stream.Recv()
	if err != nil {
		w.t.Fatalf("receive: %v", err)
	}
	if w.name == "" {
		w.name = op.GetName()
	}
	if op.GetName() != w.name || w.name == "" {
		w.t.Errorf("the operation's name is %q, was %q", op.GetName(), w.name)
	}
	md := &repb.ExecuteOperationMetadata{}
	if err := op.GetMetadata().UnmarshalTo(md); err != nil {
		w.t.Fatalf("metadata: %v", err)
	}
	if done := md.GetStage() == repb.ExecutionStage_COMPLETED; op.GetDone() != done {
		w.t.Errorf("done is %v in stage %v", op.GetDone(), md.GetStage())
	}
	if op.GetError() != nil {
		w.t.Errorf("error is set: %v", op.GetError())
	}
	return op, md
}

// want reads messages until one is of the given stage.
func (w *waiting) want(stage repb.ExecutionStage_Value) *repb.ExecuteOperationMetadata {
	w.t.Helper()
	for {
		op, md := w.next()
		if md.GetStage() == stage {
			return md
		}
		if op.GetDone() {
			w.t.Fatalf("it ended before stage %v: %v", stage, op)
		}
	}
}

// response reads to the end, which must be regular.
func (w *waiting) response() *repb.ExecuteResponse {
	w.t.Helper()
	for {
		op, _ := w.next()
		if !op.GetDone() {
			continue
		}
		res := &repb.ExecuteResponse{}
		if err := op.GetResponse().UnmarshalTo(res); err != nil {
			w.t.Fatalf("response: %v", err)
		}
		if _, err := w.stream.Recv(); !errors.Is(err, io.EOF) {
			w.t.Errorf("after the last message: %v, want the end", err)
		}
		return res
	}
}

// err reads to the end, which must be of the given code.
func (w *waiting) err(code codes.Code) *status.Status {
	w.t.Helper()
	for {
		op, err := w.stream.Recv()
		if err == nil && !op.GetDone() {
			continue
		}
		s := status.Convert(err)
		if err == nil || s.Code() != code {
			w.t.Fatalf("the stream ended with %v, %v, want code %v", op, err, code)
		}
		return s
	}
}

// lease takes the next job, as a worker.
func (b *bench) lease() queue.Lease {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 10*time.Minute)
	defer cancel()
	l, err := b.jobs.Lease(ctx, []string{queue.DefaultPool})
	if err != nil {
		b.t.Fatalf("no job came: %v", err)
	}
	return l
}

// noLease checks that no job waits.
func (b *bench) noLease() {
	b.t.Helper()
	if waiting, _ := b.jobs.Len(); waiting != 0 {
		b.t.Errorf("%d jobs wait, want none", waiting)
	}
}

func (b *bench) executing(l queue.Lease, worker string) {
	b.t.Helper()
	b.report(l, &queuepb.Update{Stage: queuepb.Update_EXECUTING, Worker: worker})
}

// complete reports a result and acknowledges the job.
func (b *bench) complete(l queue.Lease, res *repb.ExecuteResponse) {
	b.t.Helper()
	b.result(l, res)
	if err := l.Ack(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) result(l queue.Lease, res *repb.ExecuteResponse) {
	b.t.Helper()
	data, err := proto.Marshal(res)
	if err != nil {
		b.t.Fatal(err)
	}
	b.report(l, &queuepb.Update{Stage: queuepb.Update_COMPLETED, Worker: "w", ExecuteResponse: data})
}

func (b *bench) report(l queue.Lease, u *queuepb.Update) {
	b.t.Helper()
	u.Operation, u.Attempt, u.Sent = l.Job().GetOperation(), l.Attempt(), timestamppb.Now()
	if err := b.jobs.SendUpdate(b.t.Context(), l.Job().GetReplyTo(), u); err != nil {
		b.t.Fatal(err)
	}
}

// exit is a response with an exit code.
func exit(code int32) *repb.ExecuteResponse {
	return &repb.ExecuteResponse{Result: &repb.ActionResult{ExitCode: code, StdoutRaw: []byte("hello")}}
}

// forget removes an Action and its Command.
func (s *storage) forget(d *repb.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	act := &repb.Action{}
	if err := proto.Unmarshal(s.blobs[parse(d)], act); err != nil {
		panic(err)
	}
	delete(s.blobs, parse(act.GetCommandDigest()))
	delete(s.blobs, parse(d))
}
