//go:build linux

package sim_test

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/operation"
)

// A world is one run of a plan.
type world struct {
	t        *testing.T
	plan     *plan
	dice     *dice
	mutation mutation
	dir      string // for the workers
	start    time.Time
	ctx      context.Context //nolint:containedctx // of everything in the world
	broker   *broker
	storage  *storage
	apis     []*apiNode
	workers  []*workerNode
	ongoing  sync.WaitGroup // what was spawned
	digests  []digest.Digest
	recorder recorder
	checks

	mu     sync.Mutex // guards what follows, and the services
	cuts   map[cut]int
	labels map[string]string
	named  map[string]int // how many labels begin so
}

// A result is what came of a run.
type result struct {
	violations []string
	trace      string
	stats      stats
}

// stats say how much has happened, so that one can see that something has.
type stats struct {
	executions, lapses, crashes, withdrawn, ends, errors, resumed int
	took                                                          time.Duration // virtual
}

func (s *stats) add(o stats) {
	s.executions += o.executions
	s.lapses += o.lapses
	s.crashes += o.crashes
	s.withdrawn += o.withdrawn
	s.ends += o.ends
	s.errors += o.errors
	s.resumed += o.resumed
	s.took += o.took
}

// simulate runs the plan of a seed in a bubble.
func simulate(t *testing.T, seed uint64, m mutation, dir string, record bool) (r result) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		d := newDice(seed)
		w := &world{
			t: t, plan: newPlan(d), dice: d, mutation: m, dir: filepath.Join(dir, fmt.Sprint(seed)), start: time.Now(),
			cuts: map[cut]int{}, labels: map[string]string{}, named: map[string]int{},
		}
		w.recorder.on = record
		w.init()
		w.run()
		r = result{violations: w.violations, trace: w.recorder.String(), stats: w.stats}
	})
	return r
}

func (w *world) run() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	w.ctx = ctx
	if err := w.build(); err != nil {
		w.violate("the world could not be made: %v", err)
		return
	}
	w.schedule()
	var clients sync.WaitGroup
	for i, v := range w.plan.clients {
		clients.Go(func() { (&client{w: w, number: i, visit: v, action: w.plan.actions[v.action]}).run() })
	}
	w.await("the clients have their answers", &clients)
	w.await("what was to go wrong has done so", &w.ongoing)
	w.checkQuiet()
	w.stop()
	w.stats.took = w.now()
}

// await waits for wg, but not past the deadline: who waits then, waits for ever.
func (w *world) await(what string, wg *sync.WaitGroup) {
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(time.Until(w.start.Add(deadline))):
		w.violate("it never happened that %s: %s", what, w.state())
		w.giveUp()
		<-done
	}
}

// now is the time since the beginning of the world.
func (w *world) now() time.Duration { return time.Since(w.start) }

// spawn runs f in a goroutine that the world waits for.
func (w *world) spawn(f func()) { w.ongoing.Go(f) }

// at runs f at a time.
func (w *world) at(t time.Duration, f func()) {
	w.spawn(func() {
		time.Sleep(time.Until(w.start.Add(t)))
		f()
	})
}

// build makes the storage with the inputs, the broker and the processes.
func (w *world) build() (err error) {
	if w.storage, err = newStorage(); err != nil {
		return err
	}
	w.broker = newBroker(w)
	for _, a := range w.plan.actions {
		d, err := w.upload(a)
		if err != nil {
			return err
		}
		w.digests = append(w.digests, d)
	}
	for i := range w.plan.apis {
		w.apis = append(w.apis, &apiNode{w: w, node: fmt.Sprint("api", i), changing: newDoor()})
	}
	for i := range w.plan.workers {
		w.workers = append(w.workers, &workerNode{w: w, node: fmt.Sprint("worker", i), changing: newDoor()})
	}
	for _, n := range w.nodes() {
		if err := n.start(); err != nil {
			return err
		}
	}
	return nil
}

// upload stores an action with its inputs, as a client does beforehand.
func (w *world) upload(a *act) (digest.Digest, error) {
	ctx, s := w.ctx, w.storage.blobs
	content := []byte(fmt.Sprintf("input of action %d", a.index))
	input := digest.Of(digest.SHA256, content)
	if a.kind != lacks {
		if _, err := blob.PutBytes(ctx, s, digest.SHA256, content); err != nil {
			return digest.Digest{}, err
		}
	}
	root, err := blob.PutMessage(ctx, s, digest.SHA256, &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: input.Proto()}}})
	if err != nil {
		return digest.Digest{}, err
	}
	cmd, err := blob.PutMessage(ctx, s, digest.SHA256, &repb.Command{
		Arguments: []string{"sim", fmt.Sprint(a.index)}, OutputPaths: []string{"out"},
	})
	if err != nil {
		return digest.Digest{}, err
	}
	var wants *repb.Platform
	if a.big {
		wants = &repb.Platform{Properties: []*repb.Platform_Property{{Name: "size", Value: "big"}}}
	}
	return blob.PutMessage(ctx, s, digest.SHA256, &repb.Action{
		Platform:      wants,
		CommandDigest: cmd.Proto(), InputRootDigest: root.Proto(), DoNotCache: a.kind == uncached, Timeout: durationpb.New(a.timeout),
	})
}

// actOf finds the action of a digest.
func (w *world) actOf(s string) *act {
	d, err := digest.Parse(s)
	if err != nil {
		panic(err) // the API server has made it
	}
	return w.plan.actions[slices.Index(w.digests, d)]
}

// label is a name for an operation that is the same in each run of a seed.
func (w *world) label(name string) string {
	n, err := operation.ParseName(name)
	if err != nil {
		return name
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.labels[name] == "" {
		a := fmt.Sprintf("a%d", slices.Index(w.digests, n.Action))
		w.labels[name] = fmt.Sprintf("%s#%d", a, w.named[a])
		w.named[a]++
	}
	return w.labels[name]
}

// A node is a place for processes.
type node interface {
	start() error
	crash()
	end()
	name() string
}

func (w *world) nodes() []node {
	var all []node
	for _, a := range w.apis {
		all = append(all, a)
	}
	for _, k := range w.workers {
		all = append(all, k)
	}
	return all
}

// stop ends everything in good order. What does not end, is a leak, which the
// bubble tells of.
func (w *world) stop() {
	var ends sync.WaitGroup
	for _, k := range w.workers {
		ends.Go(k.end)
	}
	ends.Wait()
	for _, a := range w.apis {
		ends.Go(a.end)
	}
	ends.Wait()
}

// giveUp ends all at once, so that a run that hangs can be told of.
func (w *world) giveUp() {
	w.mu.Lock()
	w.givenUp = true
	w.mu.Unlock()
	for _, n := range w.nodes() {
		n.crash()
	}
}

// state tells who is where, for a run that hangs.
func (w *world) state() string {
	var b strings.Builder
	w.broker.mu.Lock()
	defer w.broker.mu.Unlock()
	fmt.Fprintf(&b, "%d wait for jobs;", len(w.broker.waiters))
	for _, j := range w.broker.jobs {
		fmt.Fprintf(&b, " job %s attempt %d for %v leased %v withdrawn %v;", j.label, j.attempt, j.replies, j.lease != nil, j.cancelled)
	}
	return b.String()
}

// A recorder keeps what has happened. What happened at the same moment has no
// order, so it is sorted.
type recorder struct {
	on bool

	mu      sync.Mutex // guards entries
	entries []entry
}

type entry struct {
	at   time.Duration
	text string
}

func (w *world) trace(who, format string, args ...any) {
	if !w.recorder.on {
		return
	}
	e := entry{w.now(), who + ": " + fmt.Sprintf(format, args...)}
	w.recorder.mu.Lock()
	defer w.recorder.mu.Unlock()
	w.recorder.entries = append(w.recorder.entries, e)
}

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	slices.SortStableFunc(r.entries, func(a, b entry) int {
		if a.at != b.at {
			return int(a.at - b.at)
		}
		return strings.Compare(a.text, b.text)
	})
	var b strings.Builder
	for _, e := range r.entries {
		fmt.Fprintf(&b, "%12.6f %s\n", e.at.Seconds(), e.text)
	}
	return b.String()
}
