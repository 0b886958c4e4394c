package api

import (
	"context"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/metrics/spans"
	"github.com/mettle-build/mettle/mettle/command"
	"github.com/mettle-build/mettle/mettle/operation"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

const (
	// maxInlineBytes bounds the Action and Command that travel in the job, each,
	// so that a worker need not fetch them. Larger ones stay in the CAS: a queue
	// may have 200,000 jobs, and brokers' messages have limits of a few megabytes.
	maxInlineBytes = 256 << 10
	// deepQueue is the number of operations that wait from which on both stay in
	// the CAS: whoever waits behind so many does not notice two reads more, and
	// 200,000 of them take half a gigabyte less.
	deepQueue = 4 << 10
	// maxHeaderBytes bounds what a client's header adds to a job.
	maxHeaderBytes = 8 << 10
	// publishTimeout bounds one Publish.
	publishTimeout = 10 * time.Second
	// publishPatience is for how long Publish is tried again while the broker is
	// away: longer than a restart or an election takes, and than the retries of
	// clients bridge. The waits between the tries double.
	publishPatience                   = 2 * time.Minute
	firstPublishWait, lastPublishWait = 100 * time.Millisecond, 2 * time.Second
)

// metadataHeader carries RequestMetadata (remote_execution.proto).
const metadataHeader = "build.bazel.remote.execution.v2.requestmetadata-bin"

// prepare is makeJob in a span.
func (s *Server) prepare(ctx context.Context, c *call) (*queuepb.Job, operation.Merge, error) {
	inside, span := spans.Start(ctx, "accept")
	job, merge, err := s.makeJob(inside, c)
	spans.End(span, err)
	if h := spans.Headers(ctx); h != nil && err == nil {
		job.TraceContext = h // the job is a part of the call, as that is of the client's trace
	}
	return job, merge, err
}

// makeJob reads and checks the Action and the Command, and makes a job of them.
func (s *Server) makeJob(ctx context.Context, c *call) (*queuepb.Job, operation.Merge, error) {
	n := c.name
	act := &repb.Action{}
	actBytes, err := s.read(ctx, c.store(), n.Action, act)
	if err != nil {
		return nil, 0, fmt.Errorf("action: %w", err)
	}
	timeout, err := s.timeout(act)
	if err != nil {
		return nil, 0, err
	}
	fn := n.Action.Function()
	if _, err := digest.FromProto(fn, act.GetInputRootDigest()); err != nil {
		return nil, 0, fmt.Errorf("action: input_root_digest: %w", err)
	}
	cmdDigest, err := digest.FromProto(fn, act.GetCommandDigest())
	if err != nil {
		return nil, 0, fmt.Errorf("action: command_digest: %w", err)
	}
	cmd := &repb.Command{}
	cmdBytes, err := s.read(ctx, c.store(), cmdDigest, cmd)
	if err != nil {
		return nil, 0, fmt.Errorf("command: %w", err)
	}
	if err := command.Validate(cmd); err != nil {
		return nil, 0, err
	}
	pool, err := s.pool(ctx, platformOf(act, cmd))
	if err != nil {
		return nil, 0, err
	}
	job := &queuepb.Job{
		Operation:       c.text,
		ReplyTo:         s.opts.ID,
		InstanceName:    n.Instance,
		ActionDigest:    n.Action.String(),
		SkipCacheLookup: n.SkipCacheLookup,
		Priority:        n.Priority,
		Pool:            pool,
		Queued:          timestamppb.New(n.Created),
		Timeout:         durationpb.New(timeout),
	}
	limit := maxInlineBytes
	if queued, _ := s.ops.Counts(); queued >= deepQueue {
		limit = 0
	}
	if len(actBytes) <= limit {
		job.Action = actBytes
	}
	if len(cmdBytes) <= limit {
		job.Command = cmdBytes
	}
	addHeaders(ctx, job)
	s.schedule(ctx, c, job, cmd)
	if act.GetDoNotCache() {
		return job, operation.NotMergeable, nil
	}
	s.cacheable.add(n.Action)
	return job, operation.Mergeable, nil
}

// read reads the blob d into m. One that is not there is a *blob.MissingError.
func (s *Server) read(ctx context.Context, store blob.Opener, d digest.Digest, m proto.Message) ([]byte, error) {
	data, err := blob.ReadAll(ctx, store, d, s.opts.MaxActionBytes)
	if errors.Is(err, blob.ErrNotFound) {
		return nil, &blob.MissingError{Digests: []digest.Digest{d}}
	}
	if err != nil {
		return nil, err
	}
	if err := proto.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("blob %s: %w: %w", d, blob.ErrMalformed, err)
	}
	return data, nil
}

// mayCache reports whether an Action that has a cached result lets it be used.
// One that has gone from the CAS, while its result is still there, had none
// of the reasons not to.
func (s *Server) mayCache(ctx context.Context, c *call) (bool, error) {
	d := c.name.Action
	if s.cacheable.has(d) {
		return true, nil
	}
	act := &repb.Action{}
	_, err := s.read(ctx, c.store(), d, act)
	switch {
	case errors.Is(err, blob.ErrNotFound):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("action: %w", err)
	case act.GetDoNotCache():
		return false, nil
	}
	s.cacheable.add(d)
	return true, nil
}

// timeout is the limit of a run of act. An absent timeout means as long as the
// server lets it, and so does one of zero: nothing could run that long.
func (s *Server) timeout(act *repb.Action) (time.Duration, error) {
	t := act.GetTimeout()
	if t == nil {
		return s.opts.DefaultTimeout, nil
	}
	if err := t.CheckValid(); err != nil {
		return 0, fmt.Errorf("%w: action: timeout: %w", errInvalid, err)
	}
	switch d := t.AsDuration(); {
	case d < 0:
		return 0, fmt.Errorf("%w: action: the timeout %v is negative", errInvalid, d)
	case d == 0:
		return s.opts.DefaultTimeout, nil
	case d > s.opts.MaxTimeout:
		return 0, fmt.Errorf("%w: action: the timeout %v is longer than this server's maximum, %v", errInvalid, d, s.opts.MaxTimeout)
	default:
		return d, nil
	}
}

// pool finds the pool for an action. Where none fits, and the server may not have
// heard of all workers yet, it waits until it has.
func (s *Server) pool(ctx context.Context, want *repb.Platform) (string, error) {
	for {
		changed, left, unsettled := s.opts.Platforms.Unsettled()
		pool, err := s.opts.Platforms.Match(want)
		if err == nil || !unsettled || errors.Is(err, platform.ErrImpossible) {
			return pool, err
		}
		timer := time.NewTimer(left)
		select {
		case <-changed:
		case <-timer.C:
		case <-s.draining:
			err = errDraining
		case <-ctx.Done():
			err = ctx.Err()
		}
		timer.Stop()
		if errors.Is(err, errDraining) || ctx.Err() != nil {
			return "", err
		}
	}
}

// platformOf is the platform that counts: the Action's, or the Command's where
// a client of before 2.2 set only that one.
func platformOf(act *repb.Action, cmd *repb.Command) *repb.Platform {
	if p := act.GetPlatform(); len(p.GetProperties()) > 0 {
		return p
	}
	return cmd.GetPlatform()
}

// addHeaders puts into the job what the client says of itself and its trace.
func addHeaders(ctx context.Context, job *queuepb.Job) {
	header := func(name string) string {
		if vs := metadata.ValueFromIncomingContext(ctx, name); len(vs) > 0 && len(vs[0]) <= maxHeaderBytes {
			return vs[0]
		}
		return ""
	}
	job.RequestMetadata = []byte(header(metadataHeader))
	if parent := header("traceparent"); parent != "" && utf8.ValidString(parent) { // or the job could not be sent
		job.TraceContext = map[string]string{"traceparent": parent}
		if state := header("tracestate"); state != "" && utf8.ValidString(state) {
			job.TraceContext["tracestate"] = state
		}
	}
}

// publish gives the broker the job of w's operation, and tells the registry the outcome,
// which is for all clients that wait for it: so it does not end with the call
// of the first of them.
func (s *Server) publish(ctx context.Context, w *operation.Wait, job *queuepb.Job) {
	ctx, span := spans.Start(context.WithoutCancel(ctx), "publish")
	if span.IsRecording() {
		job.TraceContext[spans.KeyPublished] = time.Now().UTC().Format(time.RFC3339Nano)
	}
	err := s.publishPatiently(ctx, w, job)
	spans.End(span, err)
	if err != nil {
		err = fmt.Errorf("%w: %w", errPublish, err)
		s.metrics.refuse(err)
	}
	s.ops.Published(w, err)
	if u, ok := s.ops.Raised(w); ok && err == nil {
		s.raise(ctx, w, u)
	}
}

// publishPatiently tries again while the broker is away, so that a build waits
// for it and does not fail, until nobody waits for it or the server shuts down.
func (s *Server) publishPatiently(ctx context.Context, w *operation.Wait, job *queuepb.Job) error {
	away, err := s.tryPublish(ctx, job)
	if !away {
		return err
	}
	s.log.WarnContext(ctx, "a job waits for the broker", "operation", w.Job(), "error", err)
	patience := time.NewTimer(publishPatience)
	defer patience.Stop()
	for wait := firstPublishWait; away; wait = min(2*wait, lastPublishWait) {
		snap, changed := w.WatchJob()
		if snap.Ended() {
			return err
		}
		pause := time.NewTimer(wait)
		select {
		case <-pause.C:
		case <-changed:
		case <-patience.C:
			return err
		case <-s.draining:
			return err
		}
		pause.Stop()
		away, err = s.tryPublish(ctx, job)
	}
	return err
}

// tryPublish reports as well whether the broker is away, so that it may succeed
// later.
func (s *Server) tryPublish(ctx context.Context, job *queuepb.Job) (away bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	start := time.Now()
	err = s.opts.Jobs.Publish(ctx, job)
	s.metrics.publish.Observe(time.Since(start).Seconds())
	if err == nil {
		return false, nil
	}
	return errors.Is(err, queue.ErrUnavailable) && !errors.Is(err, queue.ErrRefused) || ctx.Err() != nil, err
}
