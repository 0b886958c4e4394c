//go:build linux

package worker

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A gate that is shut ends the waits of those who lease, and lets nobody pass.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lacks atomic.Value
		lacks.Store("")
		var told []string
		g := newGate(func() string { return lacks.Load().(string) }, func(reason string) { told = append(told, reason) })
		ctx, cancel := context.WithCancel(t.Context())
		g.begin(ctx)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			g.run(ctx)
		}()
		abort := make(chan struct{})
		first, ok := g.pass(ctx, abort, func() {})
		if !ok || first.Err() != nil {
			t.Fatal("the gate is shut")
		}
		g.fault(1, "one")
		g.fault(0, "zero")
		if first.Err() == nil {
			t.Error("who leases goes on")
		}
		passed := make(chan bool)
		go func() {
			taking, ok := g.pass(ctx, abort, func() {})
			passed <- ok && taking.Err() == nil
		}()
		g.mend(0)
		lacks.Store("no disk")
		time.Sleep(2 * patrol) // a machine that lacks something is found out though nobody passes
		g.mend(1)
		synctest.Wait()
		select {
		case <-passed:
			t.Error("passed without a disk")
		default:
		}
		lacks.Store("")
		time.Sleep(2 * repairPoll)
		if !<-passed {
			t.Error("not passed though all is well")
		}
		if got, want := strings.Join(told, ","), ",one,zero,one,no disk,"; got != want {
			t.Errorf("told %q, want %q", got, want)
		}
		g.fault(0, "again")
		go func() {
			_, ok := g.pass(ctx, abort, func() {})
			passed <- ok
		}()
		synctest.Wait()
		cancel()
		if <-passed {
			t.Error("passed after the end")
		}
		<-ended
		g.mend(0)
		if _, ok := g.pass(t.Context(), abort, func() {}); ok {
			t.Error("passed after the end")
		}
	})
}

func TestGate_pass_aborted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(func() string { return "no disk" }, func(string) {})
		g.begin(t.Context())
		abort := make(chan struct{})
		close(abort)
		if _, ok := g.pass(t.Context(), abort, func() {}); ok {
			t.Error("passed")
		}
	})
}

// writeTree writes files below a directory.
func writeTree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestMemory(t *testing.T) {
	const meminfo = "MemTotal:       16000000 kB\nMemFree:          100 kB\nMemAvailable:    8000000 kB\nHugePages_Total:       0\n"
	for name, tc := range map[string]struct {
		files     map[string]string
		minFree   int64
		available int64
		limit     int64
		low       bool
	}{
		"no control groups": {map[string]string{}, 0, 8000000 << 10, 512 << 20, false},
		"no limits": {map[string]string{
			"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": "5000\n",
		}, 0, 8000000 << 10, 512 << 20, false},
		"a limit": {map[string]string{
			"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "1000000\n", "sys/fs/cgroup/a/b/memory.current": "900000\n",
			"sys/fs/cgroup/a/b/memory.stat": "anon 1\nactive_file 200000\ninactive_file 300000\n",
		}, 0, 600000, 50000, false},
		"a limit that is reached": {map[string]string{
			"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "1000000\n", "sys/fs/cgroup/a/b/memory.current": "990000\n",
			"sys/fs/cgroup/a/b/memory.stat": "active_file 1000\n",
		}, 0, 11000, 50000, true},
		"a limit above": {map[string]string{
			"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": "900000\n",
			"sys/fs/cgroup/a/memory.max": "2000000\n", "sys/fs/cgroup/a/memory.current": "1000000\n",
		}, 0, 1000000, 100000, false},
		"in a container of its own": {map[string]string{
			"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "2000000\n", "sys/fs/cgroup/memory.current": "1500000\n",
		}, 600000, 500000, 600000, true},
		"version 1": {map[string]string{
			"proc/self/cgroup": "7:cpu:/x\n5:memory:/a\n0::/\nrubbish\n",
			"sys/fs/cgroup/memory/a/memory.limit_in_bytes":    "3000000\n",
			"sys/fs/cgroup/memory/a/memory.usage_in_bytes":    "2000000\n",
			"sys/fs/cgroup/memory/a/memory.stat":              "inactive_file 5\ntotal_inactive_file 200000\ntotal_active_file 100000\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes":      "9223372036854771712\n",
			"sys/fs/cgroup/memory/memory.usage_in_bytes":      "7000000\n",
			"sys/fs/cgroup/memory/memory.stat":                "rubbish\n\n",
			"sys/fs/cgroup/memory/unrelated/memory.something": "0\n",
		}, 0, 1300000, 150000, false},
		"low":     {map[string]string{}, 9000000 << 10, 8000000 << 10, 9000000 << 10, true},
		"no care": {map[string]string{}, -1, 8000000 << 10, -1, false},
	} {
		t.Run(name, func(t *testing.T) {
			tc.files["proc/meminfo"] = meminfo
			m, err := newMemory(writeTree(t, tc.files), tc.minFree)
			if err != nil {
				t.Fatal(err)
			}
			if m.limit != tc.limit {
				t.Errorf("the limit is %d, want %d", m.limit, tc.limit)
			}
			if got, err := m.available(); err != nil || tc.minFree >= 0 && got != tc.available {
				t.Errorf("available are %d, %v, want %d", got, err, tc.available)
			}
			if err := m.check(); (err != nil) != tc.low {
				t.Errorf("check: %v", err)
			}
		})
	}
	if _, err := newMemory(writeTree(t, nil), 0); err == nil {
		t.Error("no error without /proc/meminfo")
	}
}

// One that was low has to be well above the limit.
func TestMemory_doesNotWaver(t *testing.T) {
	root := writeTree(t, nil)
	m := &memory{root: root, limit: 1000 << 10}
	for _, step := range []struct {
		available string
		low       bool
	}{{"1001", false}, {"999", true}, {"1001", true}, {"1249", true}, {"1251", false}, {"1001", false}} {
		dir := filepath.Join(root, "proc")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "meminfo"), []byte("MemTotal: 5000 kB\nMemAvailable: "+step.available+" kB\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := m.check(); (err != nil) != step.low {
			t.Errorf("with %s kB: %v", step.available, err)
		}
	}
}

// What this machine says can be read.
func TestMemory_here(t *testing.T) {
	m, err := newMemory("/", 0)
	if err != nil {
		t.Fatal(err)
	}
	if free, err := m.available(); err != nil || free <= 0 || m.limit <= 0 || m.limit > maxDefaultFreeMemory {
		t.Errorf("available are %d, %v, the limit is %d", free, err, m.limit)
	}
}

func TestShort(t *testing.T) {
	long := strings.Repeat("ä", 400)
	for in, want := range map[string]string{
		"":               "",
		"a\n b\t\tc ":    "a b c",
		"a\xff":          "a?",
		long:             strings.Repeat("ä", maxReasonBytes/2) + "...",
		"x" + long:       "x" + strings.Repeat("ä", (maxReasonBytes-1)/2) + "...",
		"plain":          "plain",
		"\n\nonly lines": "only lines",
	} {
		if got := short(in); got != want {
			t.Errorf("short(%.20q) = %q, want %q", in, got, want)
		}
	}
}

func BenchmarkGate_pass(b *testing.B) {
	m, err := newMemory("/", 0)
	if err != nil {
		b.Fatal(err)
	}
	g := newGate(func() string {
		if err := m.check(); err != nil {
			return err.Error()
		}
		return ""
	}, func(string) {})
	g.begin(b.Context())
	abort := make(chan struct{})
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := g.pass(b.Context(), abort, func() {}); !ok {
			b.Fatal("it is shut")
		}
	}
}

func BenchmarkMemory_check(b *testing.B) {
	m, err := newMemory("/", 0)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := m.check(); err != nil {
			b.Fatal(err)
		}
	}
}

func TestPauseAfter(t *testing.T) {
	var all time.Duration
	for more := range 10 {
		all += pauseAfter(more)
	}
	if all < 2*time.Minute || pauseAfter(1<<20) != maxPause {
		t.Errorf("ten faults more are borne within %v, a million end in waits of %v", all, pauseAfter(1<<20))
	}
}

// The log says once that memory is low, however much there is by now, and says it
// again after it was not.
func TestWorker_told_logsOnce(t *testing.T) {
	var b bytes.Buffer
	m, err := newMetrics(&Options{})
	if err != nil {
		t.Fatal(err)
	}
	w := &Worker{metrics: m, o: Options{Logger: slog.New(slog.NewTextHandler(&b, nil))}}
	for _, reason := range []string{"memory is low: 10 bytes", "memory is low: 9 bytes", "the disk is full: 9 bytes", "", "memory is low: 8 bytes", "memory is low: 7 bytes"} {
		w.told(reason)
	}
	if got := strings.Count(b.String(), "no job is taken"); got != 3 {
		t.Errorf("%d lines, want 3: %s", got, &b)
	}
	if err := w.Ready(); err == nil || !strings.Contains(err.Error(), "7 bytes") {
		t.Errorf("Ready says %v, want the last figure", err)
	}
}
