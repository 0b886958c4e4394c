//go:build linux

package worker_test

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/metrics/logtest"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// broker is a queue of one job whose lease does what a test wants, and that
// writes down what happens to it.
type broker struct {
	job       *queuepb.Job
	attempt   uint32
	extend    error // what Extend returns
	send      error // what SendUpdate returns for COMPLETED
	cancelled chan struct{}

	once   sync.Once
	mu     sync.Mutex // guards events
	events []string
	ended  chan struct{} // closed by Ack, Release and Reject
}

func newBroker() *broker {
	return &broker{attempt: 1, cancelled: make(chan struct{}), ended: make(chan struct{})}
}

func (b *broker) note(event string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.events = append(b.events, event)
}

func (b *broker) seen() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.events, " ")
}

func (b *broker) Lease(ctx context.Context, _ []string) (l queue.Lease, err error) {
	b.once.Do(func() { l = b })
	if l == nil {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return l, nil
}

func (b *broker) Job() *queuepb.Job          { return b.job }
func (b *broker) Attempt() uint32            { return b.attempt }
func (b *broker) Cancelled() <-chan struct{} { return b.cancelled }

func (b *broker) Extend(context.Context) error {
	if !strings.HasSuffix(b.seen(), "extend") {
		b.note("extend")
	}
	return b.extend
}

func (b *broker) Ack(context.Context) error {
	b.note("ack")
	close(b.ended)
	return nil
}

func (b *broker) Reject(_ context.Context, reason string) error {
	b.note("reject(" + reason + ")")
	close(b.ended)
	return nil
}

func (b *broker) Release(context.Context) error {
	b.note("release")
	close(b.ended)
	return nil
}

func (b *broker) SendUpdate(_ context.Context, _ string, u *queuepb.Update) error {
	event := u.Stage.String()
	if u.Stage == queuepb.Update_COMPLETED {
		if b.send != nil {
			return b.send
		}
		resp := &repb.ExecuteResponse{}
		if err := proto.Unmarshal(u.ExecuteResponse, resp); err != nil {
			return err
		}
		if c := codes.Code(resp.Status.GetCode()); c != codes.OK {
			event += "(" + c.String() + ")"
		} else if resp.CachedResult {
			event += "(cached)"
		}
	}
	b.note(event)
	return nil
}

// withBroker is a fixture whose worker is to run the request from b.
func withBroker(t *testing.T, b *broker, r request, changes ...change) *fixture {
	t.Helper()
	f := newFixture(t, append(changes, func(o *worker.Options, _ *mem.Options) { o.Jobs, o.Updates, o.Slots = b, b, 1 })...)
	b.job = f.makeJob(t, r)
	return f
}

func TestWorker_leaseLost(t *testing.T) {
	b := newBroker()
	b.extend = queue.ErrLeaseLost
	f := withBroker(t, b, request{script: "touch up; (setsid sleep 1000 &); sleep 1000"}, func(o *worker.Options, _ *mem.Options) {
		o.LeaseExtendEvery = 200 * time.Millisecond
	})
	f.start(t)
	f.waitRunning(t)
	waitFor(t, func() bool { return f.marker() == "" && b.seen() != "EXECUTING" })
	f.wantNoProcesses(t)
	if got := b.seen(); got != "EXECUTING extend" {
		t.Errorf("events %q, want no report of a lost job", got)
	}
}

func TestWorker_extendsLeases(t *testing.T) {
	b := newBroker()
	b.extend = queue.ErrUnavailable // which is no reason to stop
	f := withBroker(t, b, request{script: "until [ -e go ]; do touch up; sleep 0.01; done"}, func(o *worker.Options, _ *mem.Options) {
		o.LeaseExtendEvery = 10 * time.Millisecond
	})
	f.start(t)
	f.waitRunning(t)
	waitFor(t, func() bool { return strings.Contains(b.seen(), "extend") })
	if err := os.WriteFile(strings.TrimSuffix(f.marker(), "up")+"go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	<-b.ended
	if got := strings.ReplaceAll(b.seen(), " extend", ""); got != "EXECUTING COMPLETED ack" {
		t.Errorf("events %q", got)
	}
}

func TestWorker_cancelledIsReported(t *testing.T) {
	b := newBroker()
	f := withBroker(t, b, request{script: "touch up; sleep 1000"})
	f.start(t)
	f.waitRunning(t)
	close(b.cancelled)
	<-b.ended
	if got := b.seen(); got != "EXECUTING COMPLETED(Canceled) ack" {
		t.Errorf("events %q", got)
	}
}

// Of an action that is over soon, nobody hears that it runs.
func TestWorker_announcesWhatTakesLong(t *testing.T) {
	for name, tc := range map[string]struct {
		after time.Duration
		want  string
	}{
		"over sooner": {time.Hour, "COMPLETED ack"},
		"not yet":     {10 * time.Millisecond, "EXECUTING COMPLETED ack"},
		"at once":     {-1, "EXECUTING COMPLETED ack"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBroker()
			f := withBroker(t, b, request{script: "touch up; until [ -e go ]; do sleep 0.01; done"}, func(o *worker.Options, _ *mem.Options) {
				o.AnnounceAfter = tc.after
			})
			f.start(t)
			f.waitRunning(t)
			if strings.HasPrefix(tc.want, "EXECUTING") {
				waitFor(t, func() bool { return b.seen() == "EXECUTING" })
			}
			if err := os.WriteFile(strings.TrimSuffix(f.marker(), "up")+"go", nil, 0o600); err != nil {
				t.Fatal(err)
			}
			<-b.ended
			if got := b.seen(); got != tc.want {
				t.Errorf("events %q, want %q", got, tc.want)
			}
		})
	}
}

func TestWorker_reportFails(t *testing.T) {
	b := newBroker()
	b.send = queue.ErrUnavailable
	f := withBroker(t, b, request{script: "true"})
	f.start(t)
	<-b.ended
	if got := b.seen(); got != "EXECUTING release" {
		t.Errorf("events %q, want the job back in the queue", got)
	}
	if _, err := f.actions.Get(t.Context(), keyOf(t, b.job)); err != nil {
		t.Errorf("the result for the next worker: %v", err)
	}
}

func TestWorker_redelivered(t *testing.T) {
	for name, tc := range map[string]struct {
		attempt uint32
		waited  time.Duration // hours, so that the test may be slow
		skip    bool
		own     bool // the result is from an earlier attempt of this very job
		want    string
	}{
		"first attempt looks nowhere": {1, -time.Hour, false, false, "EXECUTING COMPLETED ack"}, // also by a clock that runs ahead
		"someone's result":            {2, -time.Hour, false, false, "COMPLETED(cached) ack"},
		"own result":                  {2, -time.Hour, false, true, "COMPLETED ack"},
		"skip_cache_lookup":           {2, -time.Hour, true, false, "EXECUTING COMPLETED ack"},
		"skip_cache_lookup, but own":  {2, -time.Hour, true, true, "COMPLETED ack"},
		"third attempt, own result":   {3, -time.Hour, false, true, "COMPLETED ack"},
		"first, after a wait":         {1, time.Hour, false, false, "COMPLETED(cached) ack"},
		"first, after a wait, skip":   {1, time.Hour, true, false, "EXECUTING COMPLETED ack"},
		"published twice, skip":       {1, time.Hour, true, true, "COMPLETED ack"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBroker()
			b.attempt = tc.attempt
			f := withBroker(t, b, request{script: "true", job: &queuepb.Job{SkipCacheLookup: tc.skip}})
			b.job.Queued = timestamppb.New(time.Now().Add(-tc.waited))
			result := &repb.ActionResult{ExecutionMetadata: &repb.ExecutedActionMetadata{Worker: "other"}}
			if tc.own {
				result.ExecutionMetadata.QueuedTimestamp = b.job.Queued
			}
			if err := f.actions.Put(t.Context(), keyOf(t, b.job), result); err != nil {
				t.Fatal(err)
			}
			f.start(t)
			<-b.ended
			if got := b.seen(); got != tc.want {
				t.Errorf("events %q, want %q", got, tc.want)
			}
		})
	}
}

// panicking is a store with a bug that shows once.
type panicking struct {
	blob.Store
	once *sync.Once
}

func (p panicking) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	p.once.Do(func() { panic("bug") })
	return p.Store.FindMissing(ctx, ds)
}

func TestWorker_panicIsOneActionsEnd(t *testing.T) {
	b := newBroker()
	f := withBroker(t, b, request{script: "echo something to store"})
	f.opts.Store = panicking{f.opts.Store, &sync.Once{}}
	f.start(t)
	<-b.ended
	if got := b.seen(); got != "EXECUTING reject(panic in the worker: bug)" {
		t.Errorf("events %q", got)
	}
	waitFor(t, func() bool { return f.worker.Ready() == nil })
}

func TestWorker_Run_leaseErrors(t *testing.T) {
	f := newFixture(t).start(t)
	if err := f.queue.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-f.ended; err != nil {
		t.Errorf("Run: %v, want an end without error when the queue is closed", err)
	}
	f.ended <- nil
}

func TestNew_options(t *testing.T) {
	if _, err := worker.New(worker.Options{}); err == nil {
		t.Error("New without options succeeded")
	}
	for _, n := range []int{-1, 513, 100_000_000} {
		f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.Slots = n })
		if _, err := worker.New(f.opts); err == nil {
			t.Errorf("New with %d slots succeeded", n)
		}
	}
}

// TestWorker_withoutIsolation: root in a directory that nobody else can enter.
func TestWorker_withoutIsolation(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	var log logtest.Buffer
	f := newFixture(t, isBare) // a sandbox is entered from within
	f.opts.Logger = slog.New(slog.NewTextHandler(&log, nil))
	if err := os.Chmod(strings.TrimSuffix(f.dir, "/work"), 0o700); err != nil { //nolint:gosec // it is 0700
		t.Fatal(err)
	}
	f.start(t)
	in := f.put(t, "good")
	req := request{root: &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: in}}}, script: "id -u; echo evil > in"}
	if r := f.run(t, req, 0); string(r.StdoutRaw) != "0\n" {
		t.Errorf("stdout %q, want root", r.StdoutRaw)
	}
	if got := f.read(t, in); got != "good" {
		t.Errorf("the store has %q", got)
	}
	if n := strings.Count(log.String(), "actions run as root"); n != 1 {
		t.Errorf("%d warnings: %s", n, log.String())
	}
}

const nonRootEnv = "WORKER_TEST_NON_ROOT"

// TestUnprivileged runs those tests in which the user matters as one who may do
// nothing.
func TestUnprivileged(t *testing.T) {
	if os.Getuid() != 0 || os.Getenv(nonRootEnv) != "" {
		t.Skip("needs root to become another user")
	}
	const uid = testUIDBase + 50
	dir, err := os.MkdirTemp("", "worker-test-") //nolint:usetesting // t.TempDir is below a directory that the user can't enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chown(dir, uid, uid); err != nil {
		t.Fatal(err)
	}
	args := []string{"-test.count=1", "-test.run=inputs|Inputs|output|Files|timeout|Twins|cleansUp|slotsAre|drains"}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), nonRootEnv+"=1", "TMPDIR="+dir)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("as user %d: %v\n%s", uid, err, out)
	}
}
