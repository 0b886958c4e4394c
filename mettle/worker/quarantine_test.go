//go:build linux

package worker_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// moody is a store that can be out of order, wholly or where blobs are read.
type moody struct {
	blob.Store
	mu         sync.Mutex
	all, reads error
}

func (m *moody) be(all, reads error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all, m.reads = all, reads
}

func (m *moody) Open(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	m.mu.Lock()
	err := errors.Join(m.all, m.reads)
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return m.Store.Open(ctx, d, offset)
}

func (m *moody) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	m.mu.Lock()
	err := m.all
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return m.Store.FindMissing(ctx, ds)
}

// withMoody is a fixture whose store is that.
func withMoody(t *testing.T, changes ...change) (*fixture, *moody) {
	t.Helper()
	f := newFixture(t, changes...)
	m := &moody{Store: f.opts.Store}
	f.opts.Store = m
	return f, m
}

// A store that is away is no fault of the jobs': they wait until it is back.
func TestWorker_storeIsAway(t *testing.T) {
	f, store := withMoody(t)
	store.be(blob.ErrUnavailable, nil)
	f.start(t)
	jobs := make([]*queuepb.Job, 10)
	for i := range jobs {
		jobs[i] = f.publish(t, request{script: "true"})
	}
	waitFor(t, func() bool {
		err := f.worker.Ready()
		return err != nil && strings.Contains(err.Error(), "storage does not answer")
	})
	waitFor(t, func() bool {
		waiting, leased := f.queue.Len()
		return waiting == len(jobs) && leased == 0
	})
	store.be(nil, nil)
	done := map[string]bool{}
	for len(done) < len(jobs) {
		if u := <-f.updates; u.GetStage() == queuepb.Update_COMPLETED {
			done[u.GetOperation()] = true
		}
	}
	if err := f.worker.Ready(); err != nil {
		t.Errorf("Ready: %v", err)
	}
}

// What keeps failing in the same worker ends when the attempts are used up.
func TestWorker_rejects(t *testing.T) {
	f, store := withMoody(t, func(_ *worker.Options, o *mem.Options) { o.MaxAttempts = 2 })
	store.be(nil, fmt.Errorf("a bad disk: %w", blob.ErrUnavailable))
	f.start(t)
	resp := f.execute(t, request{script: "true"})
	if codes.Code(resp.GetStatus().GetCode()) == codes.OK || strings.Count(resp.GetStatus().GetMessage(), "a bad disk") != 2 {
		t.Errorf("status %v, want both attempts with their reason", resp.GetStatus())
	}
	store.be(nil, nil)
	f.run(t, request{script: "true"}, 0)
}

// One job after another that fails, whatever the preflight says, has the worker
// pause.
func TestWorker_faultsInRow(t *testing.T) {
	f, store := withMoody(t, func(o *worker.Options, _ *mem.Options) { o.Slots = 1 })
	store.be(nil, blob.ErrUnavailable)
	f.start(t)
	f.publish(t, request{script: "true"})
	f.publish(t, request{script: "true"})
	waitFor(t, func() bool {
		err := f.worker.Ready()
		return err != nil && strings.Contains(err.Error(), "though its preflight passes")
	})
	store.be(nil, nil)
	f.run(t, request{script: "true"}, 0)
	waitFor(t, func() bool { return f.worker.Ready() == nil })
}

func TestWorker_Preflight(t *testing.T) {
	ok := filepath.Join(t.TempDir(), "ok")
	f := newFixture(t, isBare, func(o *worker.Options, _ *mem.Options) { // which sees the test's directory
		o.Preflight = []string{"sh", "-c", "test -e " + ok + " || { echo no compiler >&2; exit 3; }"}
		o.UIDBase = -1 // who may look into the test's directory
	})
	f.start(t)
	f.publish(t, request{script: "true"})
	waitFor(t, func() bool {
		err := f.worker.Ready()
		return err != nil && strings.Contains(err.Error(), "exit code 3: no compiler")
	})
	if waiting, leased := f.queue.Len(); waiting != 1 || leased != 0 {
		t.Errorf("%d jobs wait, %d are leased, want it to wait", waiting, leased)
	}
	if err := os.WriteFile(ok, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.run(t, request{script: "true"}, 0)
	waitFor(t, func() bool { return f.worker.Ready() == nil })
}

func TestWorker_waitsForMemory(t *testing.T) {
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.MinFreeMemoryBytes = 1 << 60 }).start(t)
	f.publish(t, request{script: "true"})
	waitFor(t, func() bool {
		err := f.worker.Ready()
		return err != nil && strings.Contains(err.Error(), "memory is low")
	})
	if waiting, leased := f.queue.Len(); waiting != 1 || leased != 0 {
		t.Errorf("%d jobs wait, %d are leased, want it to wait", waiting, leased)
	}
}

// What a worker tells of itself in its life.
func TestWorker_Notices(t *testing.T) {
	f, store := withMoody(t, func(o *worker.Options, _ *mem.Options) {
		o.Properties = []platform.Property{{Name: "gpu", Value: "yes"}}
		o.Pools = []string{"gpu"}
	})
	f.opts.Notices = f.queue
	told := make(chan *queuepb.WorkerState, 1000)
	ctx, cancel := context.WithCancel(t.Context())
	listened := make(chan error, 1)
	go func() {
		listened <- f.queue.ListenNotices(ctx, "api", func(n *queuepb.Notice) {
			if n.GetWorker() != nil {
				told <- n.GetWorker()
			}
		})
	}()
	want := func(state queuepb.WorkerState_State, running int32) *queuepb.WorkerState {
		t.Helper()
		for patience := time.After(20 * time.Second); ; {
			select {
			case s := <-told:
				if s.GetState() == state && s.GetRunning() == running {
					return s
				}
			case <-patience:
				t.Fatalf("%v with %d running was not told", state, running)
			}
		}
	}
	w, err := worker.New(f.opts)
	if err != nil {
		t.Fatal(err)
	}
	working, drain := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(working) }()
	s := want(queuepb.WorkerState_TAKING, 0)
	if s.GetWorker() != "tester" || s.GetPool() != "gpu" || s.GetSlots() != 2 || len(s.GetProperties()) == 0 || s.GetProperties()[0].GetName() != "gpu" {
		t.Errorf("told %v", s)
	}
	job := f.makeJob(t, request{script: "until [ -e go ]; do touch up; sleep 0.01; done"})
	broken := f.makeJob(t, request{script: "true"})
	job.Pool, broken.Pool = "gpu", "gpu"
	if err := f.queue.Publish(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	want(queuepb.WorkerState_TAKING, 1)
	f.waitRunning(t)
	store.be(blob.ErrUnavailable, nil)
	if err := f.queue.Publish(t.Context(), broken); err != nil {
		t.Fatal(err)
	}
	if s := want(queuepb.WorkerState_PAUSED, 1); s.GetReason() == "" {
		t.Errorf("told %v without a reason", s)
	}
	drain()
	want(queuepb.WorkerState_DRAINING, 1)
	store.be(nil, nil)
	if err := os.WriteFile(strings.TrimSuffix(f.marker(), "up")+"go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
	want(queuepb.WorkerState_GONE, 0)
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-listened; err != nil {
		t.Error(err)
	}
}

// A command that fails on a full disk has not failed by what it does: its job
// goes to a worker that has room, until the attempts are used up.
func TestWorker_diskFills(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root makes a small disk")
	}
	f := newFixture(t, onSmallDisk(t)).start(t)
	resp := f.execute(t, request{script: "head -c 64M /dev/zero > big"})
	if said := resp.GetStatus().GetMessage(); codes.Code(resp.GetStatus().GetCode()) == codes.OK || !strings.Contains(said, "disk is full") {
		t.Errorf("an action on a full disk ends with %v, exit code %d; want the disk named", resp.GetStatus(), resp.GetResult().GetExitCode())
	}
	f.run(t, request{script: "true"}, 0)
}

// onSmallDisk has a worker on a disk of 16 MiB, of which 4 are to be free.
func onSmallDisk(t *testing.T) change {
	return func(o *worker.Options, _ *mem.Options) {
		disk := filepath.Join(filepath.Dir(o.Dir), "disk")
		if err := os.Mkdir(disk, 0o711); err != nil { //nolint:gosec // the slots' users pass
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=16m,mode=711"); err != nil {
			t.Skipf("no tmpfs here: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		o.Dir, o.MinFreeDiskBytes = filepath.Join(disk, "work"), 4<<20
	}
}

// Input roots that slots keep are not what a disk stays full of.
func TestWorker_diskFills_roots_go(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root makes a small disk")
	}
	f := newFixture(t, onSmallDisk(t)).start(t)
	root := &repb.Directory{}
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		root.Files = append(root.Files, &repb.FileNode{Name: name, Digest: f.put(t, name)})
	}
	f.run(t, request{script: "cat a b c d e", root: root}, 0)
	kept := func() []string {
		all, err := filepath.Glob(filepath.Join(f.opts.Dir, "slot*", "shelf", "*", "a"))
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	waitFor(t, func() bool { return len(kept()) == 1 }) // an input root is kept
	full := filepath.Join(filepath.Dir(f.opts.Dir), "full")
	if err := os.WriteFile(full, make([]byte, 13<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return len(kept()) == 0 }) // it goes when the disk is full
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	f.run(t, request{script: "cat a b c d e", root: root}, 0)
}
