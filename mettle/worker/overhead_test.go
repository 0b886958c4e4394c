//go:build linux

package worker_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	queuepb "github.com/mettle-build/mettle/proto/queue"
	workerpb "github.com/mettle-build/mettle/proto/worker"
)

func oneSlot(o *worker.Options, _ *mem.Options) { o.Slots = 1 }

func TestWorker_overhead(t *testing.T) {
	f := newFixture(t).start(t)
	for name, r := range map[string]request{
		"success": {script: "sleep 0.05", command: &repb.Command{OutputPaths: []string{"none"}}},
		"failure": {script: "exit 3"},
		"timeout": {script: "sleep 100", job: &queuepb.Job{Timeout: durationpb.New(50 * time.Millisecond)}},
	} {
		t.Run(name, func(t *testing.T) {
			m := f.execute(t, r).Result.ExecutionMetadata
			checkMetadata(t, m)
			checkOverhead(t, m)
		})
	}
}

// checkOverhead holds that the overhead is there once, and says what the
// timestamps do.
func checkOverhead(t *testing.T, m *repb.ExecutedActionMetadata) {
	t.Helper()
	var all []*workerpb.ActionOverhead
	for _, a := range m.AuxiliaryMetadata {
		o := &workerpb.ActionOverhead{}
		if a.MessageIs(o) {
			if err := a.UnmarshalTo(o); err != nil {
				t.Fatal(err)
			}
			all = append(all, o)
		}
	}
	if len(all) != 1 {
		t.Fatalf("%d messages of the overhead, want one: %v", len(all), m.AuxiliaryMetadata)
	}
	o := all[0]
	var sum time.Duration
	for _, d := range []*durationpb.Duration{o.Load, o.Fetch, o.Setup, o.Finish, o.Collect, o.Conclude} {
		if !d.IsValid() || d.AsDuration() < 0 {
			t.Errorf("a part takes %v", d)
		}
		sum += d.AsDuration()
	}
	run := m.ExecutionCompletedTimestamp.AsTime().Sub(m.ExecutionStartTimestamp.AsTime())
	total := m.WorkerCompletedTimestamp.AsTime().Sub(m.WorkerStartTimestamp.AsTime()) - run
	if o.Total.AsDuration() != total || sum != total || o.Run.AsDuration() != run || total <= 0 {
		t.Errorf("overhead %v of parts with sum %v and a run of %v, want %v and %v", o.Total.AsDuration(), sum, o.Run.AsDuration(), total, run)
	}
	if want := m.WorkerStartTimestamp.AsTime().Sub(m.QueuedTimestamp.AsTime()); o.Queue.AsDuration() != want {
		t.Errorf("in the queue for %v, want %v", o.Queue.AsDuration(), want)
	}
}

// What did not run has no overhead.
func TestWorker_overheadOfNothing(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	f := newFixture(t, oneSlot, func(o *worker.Options, _ *mem.Options) { o.Registerer = registry }).start(t)
	resp := f.execute(t, request{command: &repb.Command{Arguments: []string{}}, action: &repb.Action{CommandDigest: f.putMessage(t, &repb.Command{})}})
	if resp.Status.GetCode() == 0 || len(resp.Result.GetExecutionMetadata().GetAuxiliaryMetadata()) != 0 {
		t.Errorf("response %v, want a refusal with no overhead", resp)
	}
	f.run(t, request{script: "sleep 1"}, 0)
	// The one slot has got ready after the last action when it takes the next.
	f.run(t, request{script: "touch up; sleep 0.1"}, 0)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "mettle_worker_overhead_seconds" {
			continue
		}
		h := family.Metric[0].GetHistogram()
		if n := h.GetSampleCount(); n < 1 || n > 2 {
			t.Errorf("%d observations, want those of the two that ran, or of one where the last is still cleaned up after", n)
		}
		if h.GetSampleSum() <= 0 {
			t.Errorf("overhead %v s", h.GetSampleSum())
		}
		return
	}
	t.Error("no mettle_worker_overhead_seconds")
}

// leavings is what there is of everything that could become more with each action.
type leavings struct {
	Goroutines, Children    int
	Descriptors, ChildrenFD int
	Files                   []string
}

func (f *fixture) leavings(t *testing.T) leavings {
	t.Helper()
	l := leavings{Goroutines: runtime.NumGoroutine(), Descriptors: countDir(t, "/proc/self/fd")}
	for _, pid := range children(t) {
		l.Children++
		l.ChildrenFD += countDir(t, filepath.Join("/proc", strconv.Itoa(pid), "fd"))
	}
	err := filepath.WalkDir(f.dir, func(path string, _ fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil // it is being cleaned up
		}
		name := strings.TrimPrefix(path, f.dir)
		if dir, base := filepath.Split(name); strings.Trim(base, "0123456789") == "" {
			name = dir + "N" // a spare directory has another name each time
		}
		l.Files = append(l.Files, name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func countDir(t *testing.T, dir string) int {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return len(entries)
}

// children are the processes that this one has started, and theirs.
func children(t *testing.T) (pids []int) {
	t.Helper()
	parents := map[int]int{}
	all, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range all {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		var pid, ppid int
		var state string
		s := string(data)
		_, _ = fmt.Sscanf(s, "%d", &pid)
		_, _ = fmt.Sscanf(s[strings.LastIndexByte(s, ')')+1:], "%s %d", &state, &ppid)
		parents[pid] = ppid
	}
	for pid := range parents {
		for p := parents[pid]; p > 1; p = parents[p] {
			if p == os.Getpid() {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

// A thousand actions leave no goroutine, no process, no descriptor and no file.
func TestWorker_leavesNothingPerAction(t *testing.T) {
	for _, isolation := range []worker.Isolation{worker.Bare, worker.Namespaces} {
		t.Run(string(isolation), func(t *testing.T) {
			changes := []change{oneSlot, isBare}
			if isolation == worker.Namespaces {
				changes = append(changes, isolated(t))
			}
			f := newFixture(t, changes...).start(t)
			root := &repb.Directory{
				Files:       []*repb.FileNode{{Name: "in", Digest: f.put(t, "in")}, {Name: "same", Digest: f.put(t, "in")}},
				Directories: []*repb.DirectoryNode{{Name: "d", Digest: f.putMessage(t, &repb.Directory{})}},
			}
			actions := func(n int) {
				for i := range n {
					if i%5 > 0 {
						f.run(t, request{command: &repb.Command{Arguments: []string{"/bin/true"}}}, 0)
						continue
					}
					f.run(t, request{
						root: root, command: &repb.Command{OutputPaths: []string{"out/made", "dir"}},
						script: "echo out; echo $$ > out/made; mkdir dir; cp in dir; sleep 1000 & exit 0",
					}, 0)
				}
			}
			actions(10)
			waitFor(t, func() bool { return f.isClean() })
			before := f.leavings(t)
			actions(500) // by each of the two ways of running
			var d string
			for start := time.Now(); time.Since(start) < 20*time.Second; time.Sleep(time.Millisecond) {
				after := f.leavings(t)
				// What had yet to end before is no leaving.
				after.Goroutines, after.Descriptors = max(after.Goroutines, before.Goroutines), max(after.Descriptors, before.Descriptors)
				if d = cmp.Diff(before, after); d == "" {
					return
				}
			}
			t.Errorf("after 500 actions (-before +after):\n%s", d)
		})
	}
}

// isClean reports whether no slot has anything of an action.
func (f *fixture) isClean() bool {
	left, _ := filepath.Glob(filepath.Join(f.dir, "slot*", "root", "*"))
	return len(left) == 0
}
