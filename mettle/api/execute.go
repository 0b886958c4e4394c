package api

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
	"github.com/mettle-build/mettle/metrics/spans"
	"github.com/mettle-build/mettle/mettle/history"
	"github.com/mettle-build/mettle/mettle/operation"
)

// firstMessageAfter is how long a client waits for its first message, whatever
// the storage and the broker do. Most calls have something better to say by then.
const firstMessageAfter = 10 * time.Millisecond

type stream = grpc.ServerStreamingServer[longrunningpb.Operation]

// A call is one Execute or WaitExecution.
type call struct {
	s      *Server
	stream stream
	name   operation.Name
	text   string // name, as the client sees it
	hints  hints
	// metadata is the part of the operations' metadata that never changes.
	metadata []byte
	kind     history.Key     // of its action
	resumed  bool            // it is a WaitExecution, or begins anew
	ours     bool            // it is the one that began the operation
	joined   *operation.Wait // for what begin has joined last
	sent     bool            // the client has had a message
	outcome  outcome
	response []byte      // with which it was completed
	quit     atomic.Bool // it was cancelled before it was begun
	tookOver time.Time   // when it last said so to the other API servers
}

// Execute implements the Execution service.
func (s *Server) Execute(req *repb.ExecuteRequest, st stream) error {
	start := time.Now()
	c := &call{s: s, stream: st, hints: hintsOf(req)}
	err := s.execute(c, req)
	s.ended(c, err, start)
	return err
}

func (s *Server) execute(c *call, req *repb.ExecuteRequest) error {
	defer s.metrics.begun()()
	if s.isDraining() {
		s.metrics.refuse(errDraining)
		return toStatus(errDraining)
	}
	n, err := nameOf(req)
	if err != nil {
		s.metrics.refuse(err)
		return toStatus(err)
	}
	c.setName(operation.NewName(n))
	c.describe()
	return c.run()
}

// nameOf checks an ExecuteRequest and makes of it all of a name but what is new.
func nameOf(req *repb.ExecuteRequest) (operation.Name, error) {
	if req.GetActionDigest() == nil {
		return operation.Name{}, fmt.Errorf("%w: the action_digest is absent", errInvalid)
	}
	fn, err := digest.FunctionFromProto(req.GetDigestFunction(), len(req.GetActionDigest().GetHash()))
	if err != nil {
		return operation.Name{}, fmt.Errorf("action_digest: %w", err)
	}
	d, err := digest.FromProto(fn, req.GetActionDigest())
	if err != nil {
		return operation.Name{}, fmt.Errorf("action_digest: %w", err)
	}
	if err := resource.CheckInstance(req.GetInstanceName()); err != nil {
		return operation.Name{}, err
	}
	return operation.Name{
		Instance:        req.GetInstanceName(),
		Action:          d,
		SkipCacheLookup: req.GetSkipCacheLookup(),
		Priority:        req.GetExecutionPolicy().GetPriority(),
	}, nil
}

// WaitExecution implements the Execution service. A name that was given by this
// or another server, now or before a restart, is resumed; of any other one the
// status is NOT_FOUND, upon which clients call Execute.
func (s *Server) WaitExecution(req *repb.WaitExecutionRequest, st stream) error {
	start := time.Now()
	c := &call{s: s, stream: st, resumed: true}
	err := s.wait(c, req)
	s.ended(c, err, start)
	return err
}

func (s *Server) wait(c *call, req *repb.WaitExecutionRequest) error {
	defer s.metrics.begun()()
	if s.isDraining() {
		return toStatus(errDraining)
	}
	n, err := parseName(req.GetName())
	if err != nil {
		return toStatus(err)
	}
	c.setName(n)
	c.describe()
	if w, ok := s.ops.Find(n); ok {
		err := c.follow(w)
		if !errors.Is(err, operation.ErrWithdrawn) {
			return err
		}
	}
	return c.run()
}

// parseName takes the name of an operation apart. The errors are those of a name
// that no server of this kind gave.
func parseName(name string) (operation.Name, error) {
	n, err := operation.ParseName(name)
	if err == nil && resource.CheckInstance(n.Instance) != nil {
		err = fmt.Errorf("%w: no operation has its instance name", operation.ErrBadName)
	}
	return n, err
}

func (s *Server) isDraining() bool {
	select {
	case <-s.draining:
		return true
	default:
		return false
	}
}

func (c *call) setName(n operation.Name) {
	c.name, c.text = n, n.String()
	c.metadata = constantMetadata(n)
}

// store has the blobs of the call's instance.
func (c *call) store() blob.Opener { return c.s.store(c.name.Instance) }

// An answer is what begin has found: a response, or an operation to follow.
type answer struct {
	response []byte // a marshalled ExecuteResponse
	wait     *operation.Wait
	err      error
}

// maxBegins is how often a call begins anew whose job somebody else withdraws.
const maxBegins = 5

// run finds or begins what the client waits for, and stays with it to the end.
func (c *call) run() error {
	for range maxBegins {
		err := c.runOnce()
		if !errors.Is(err, operation.ErrWithdrawn) {
			return err
		}
		c.resumed = true
	}
	return toStatus(operation.ErrWithdrawn)
}

// runOnce sees to it that the client hears something before there is an answer.
// What begins the operation runs in the call's own goroutine, whose stack has
// grown already: another one's would have to, which takes a tenth of a call.
func (c *call) runOnce() error {
	f := fillIn{c: c}
	begun := time.Now()
	f.start()
	a := c.s.beginSafely(c.stream.Context(), c)
	c.s.metrics.accepted(c, &a, begun)
	if ended, err := f.stop(); ended {
		return c.leave(a, err)
	}
	return c.answer(a)
}

// A fillIn tells the client of a call that it waits, while its operation is being
// found or begun.
type fillIn struct {
	c *call

	// mu guards what follows, and sending to the client.
	mu      sync.Mutex
	timer   *time.Timer
	stopped bool
	ended   bool  // the client has gone, or cancelled it
	err     error // with which the call ends then
}

func (f *fillIn) start() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.timer = time.AfterFunc(firstMessageAfter, f.tick)
}

// tick is called by the timer.
func (f *fillIn) tick() {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.stopped:
	case f.c.s.ops.Cancelled(f.c.name):
		f.c.quit.Store(true)
		f.ended, f.err = true, f.c.failed(operation.ErrCancelled)
	default:
		f.err = f.c.send(&operation.Snapshot{Stage: operation.CacheCheck})
		if f.ended = f.err != nil; !f.ended {
			f.timer.Reset(f.c.s.opts.KeepAlive)
		}
	}
}

// stop has it tell nothing more. It reports whether the call has ended in the
// meantime, and how.
func (f *fillIn) stop() (ended bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stopped = true
	f.timer.Stop()
	return f.ended, f.err
}

// leave ends a call whose client has gone, or has cancelled it, before it was
// begun.
func (c *call) leave(a answer, err error) error {
	if a.wait != nil {
		c.s.ops.Leave(a.wait)
	}
	return err
}

// answer gives the client what was found. Once it knows of its operation, what
// is wrong with the action is told as the operation's end; only what may go
// away by itself ends the stream with an error.
func (c *call) answer(a answer) error {
	switch {
	case a.err != nil && c.sent && !transient(a.err):
		return c.send(&operation.Snapshot{Stage: operation.Completed, Response: failure(a.err)})
	case a.err != nil:
		return toStatus(a.err)
	case a.wait != nil:
		return c.follow(a.wait)
	}
	c.outcome = outcomeCached
	return c.send(&operation.Snapshot{Stage: operation.Completed, Response: a.response})
}

// errPanic is the end of a call in which something was broken.
var errPanic = errors.New("internal error")

// beginSafely is begin. A panic there ends this call, and those that wait for the
// operation that it was to begin, and nothing else.
func (s *Server) beginSafely(ctx context.Context, c *call) (a answer) {
	c.joined = nil
	defer func() {
		if r := recover(); r != nil {
			s.log.ErrorContext(ctx, "panic in a call", "operation", c.text, "panic", r, "stack", string(debug.Stack()))
			if w := c.joined; w != nil {
				if c.ours {
					s.ops.Published(w, errPanic)
				}
				s.ops.Leave(w)
			}
			a = answer{err: errPanic}
		}
	}()
	return s.begin(ctx, c)
}

// begin asks the ActionCache, and otherwise joins or creates the operation.
func (s *Server) begin(ctx context.Context, c *call) answer {
	res, err := s.cached(ctx, c)
	if err != nil {
		return answer{err: err}
	}
	if res != nil {
		s.inline(ctx, c, res)
		data, err := cachedResponse(res)
		return answer{response: data, err: err}
	}
	job, merge, err := s.prepare(ctx, c)
	if err != nil {
		return answer{err: err}
	}
	if c.quit.Load() {
		return answer{err: operation.ErrCancelled}
	}
	w, created := s.ops.Join(c.name, merge)
	c.joined, c.ours = w, created
	if created {
		if sc := trace.SpanContextFromContext(ctx); sc.IsSampled() {
			w.SetOrigin(sc)
		}
		job.Operation = w.Job() // the same words, which thus are in memory once
		s.ops.Assign(w, job.GetPool())
		s.publish(ctx, w, job)
		c.insist(w)
	} else if u := urgencyOf(job); s.ops.Raise(w, u) {
		s.raise(ctx, w, u)
	}
	return answer{wait: w}
}

// cached is lookUp in a span.
func (s *Server) cached(ctx context.Context, c *call) (*repb.ActionResult, error) {
	if c.name.SkipCacheLookup && !c.resumed {
		return nil, nil //nolint:nilnil // no result is no error
	}
	ctx, span := spans.Start(ctx, "cache lookup")
	res, err := s.lookUp(ctx, c)
	if span.IsRecording() {
		span.SetAttributes(attribute.Bool("mettle.cache_hit", res != nil))
	}
	spans.End(span, err)
	return res, err
}

// lookUp is the result that the ActionCache has and that may answer the call;
// nil where there is none.
func (s *Server) lookUp(ctx context.Context, c *call) (*repb.ActionResult, error) {
	n := c.name
	res, err := s.opts.Actions.Get(ctx, blob.EntryKey{Instance: n.Instance, Action: n.Action})
	switch {
	case errors.Is(err, blob.ErrNotFound):
		return nil, nil //nolint:nilnil // no result is no error
	case err != nil:
		return nil, fmt.Errorf("look in the action cache: %w", err)
	case n.SkipCacheLookup && res.GetExecutionMetadata().GetQueuedTimestamp().AsTime().Before(n.Created):
		// It may be from before the client first asked, and wanted none of those.
		return nil, nil //nolint:nilnil // as above
	}
	ok, err := s.mayCache(ctx, c)
	if err != nil || !ok {
		return nil, err
	}
	return res, nil
}
