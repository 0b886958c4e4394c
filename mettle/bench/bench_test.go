package bench_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/bench"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// quick are options for measurements that are too short to tell anything.
func quick(remote string, subjects ...string) bench.Options {
	return bench.Options{Remote: remote, Subjects: subjects, Concurrency: []int{2}, Duration: 60 * time.Millisecond, StreamBytes: 2 << 20, JSON: true}
}

// run runs the bench and reads its report.
func run(t *testing.T, o bench.Options) (bench.Report, error) {
	t.Helper()
	var out bytes.Buffer
	o.Out = &out
	err := bench.Run(t.Context(), o)
	var rep bench.Report
	if out.Len() > 0 {
		d := json.NewDecoder(&out)
		d.DisallowUnknownFields()
		if err := d.Decode(&rep); err != nil {
			t.Fatal(err)
		}
	}
	return rep, err
}

func TestRun_allSubjects(t *testing.T) {
	rep, err := run(t, quick(newFake().start(t)))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range rep.Results {
		if !slices.Contains(got, r.Subject) {
			got = append(got, r.Subject)
		}
		checkResult(t, &r)
	}
	want := slices.DeleteFunc(bench.Subjects(), func(s string) bool { return s == "memory" || s == "load" })
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("subjects (-want +got):\n%s", d)
	}
}

func TestRun_memory(t *testing.T) {
	o := quick(newFake().start(t), "memory")
	o.MemoryBytes, o.ServerPIDs = 2<<20, []int{os.Getpid()}
	rep, err := run(t, o)
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Results) != 2 {
		t.Fatalf("%d results, want 2", len(rep.Results))
	}
	for _, r := range rep.Results {
		if r.Floor == nil || r.Value <= 0 {
			t.Errorf("%s: %v, floor %+v", r.Case, r.Value, r.Floor)
		}
		if r.Ops != 16 || r.Clients != 16 || r.Server == nil || r.Server.PeakRSSBytes < 1<<20 {
			t.Errorf("%s: %d ops by %d clients, server %+v; want 16, 16, and its memory", r.Case, r.Ops, r.Clients, r.Server)
		}
	}
}

func TestRun_skipsZstd(t *testing.T) {
	f := newFake()
	f.caps.CacheCapabilities.SupportedCompressors = nil
	rep, err := run(t, quick(f.start(t), "zstd"))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rep.Results {
		if !strings.Contains(r.Skipped, "zstd") {
			t.Errorf("%s: skipped %q, want it to be for want of zstd", r.Case, r.Skipped)
		}
	}
}

func TestRun_passesOnWhatTheServerNeeds(t *testing.T) {
	f := newFake()
	f.instance, f.header, f.fn = "some/instance", "Bearer x", digest.BLAKE3
	o := quick(f.start(t), "latency", "findmissing")
	o.Instance, o.DigestFunction = f.instance, "BLAKE3"
	o.Headers = map[string]string{"authorization": f.header}
	o.Platform = map[string]string{"OSFamily": "Linux", "Arch": "any"}
	rep, err := run(t, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rep.Results {
		checkResult(t, &r)
	}
	if d := cmp.Diff("Arch=any OSFamily=Linux", f.platform.Load()); d != "" {
		t.Errorf("platform (-want +got):\n%s", d)
	}
}

// checkResult holds what is true of each result whatever its figures are.
func checkResult(t *testing.T, r *bench.Result) {
	t.Helper()
	if strings.Contains(r.Skipped, "no floor namespaces") && !hasNamespaces(t) {
		return
	}
	if r.Ops == 0 || r.Value <= 0 || r.Seconds <= 0 || r.Skipped != "" || r.Errors != 0 {
		t.Errorf("%s %s: %d ops, value %v, %v s, skipped %q, %d errors, want a full measurement",
			r.Subject, r.Case, r.Ops, r.Value, r.Seconds, r.Skipped, r.Errors)
		return
	}
	if l := r.LatencyMS; l.P50 <= 0 || l.P50 > l.P90 || l.P90 > l.P99 || l.P99 > l.Max {
		t.Errorf("%s %s: latencies %+v are not in order", r.Subject, r.Case, *l)
	}
	if r.Subject == "floor" {
		return
	}
	if r.Floor == nil || r.Floor.Value <= 0 || len(r.Floor.Samples) != 4 || r.Share <= 0 {
		t.Errorf("%s %s: floor %+v with share %v, want four samples", r.Subject, r.Case, r.Floor, r.Share)
	}
}

func TestRun_floorNeedsNoServer(t *testing.T) {
	var out bytes.Buffer
	o := quick("")
	o.Out = &out
	if err := bench.Floor(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	var rep bench.Report
	if err := json.Unmarshal(out.Bytes(), &rep); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range rep.Results {
		checkResult(t, &r)
		got = append(got, r.Case+" "+r.Unit)
	}
	want := []string{
		"spawn spawns/s", "spawn spawns/s", "namespaces spawns/s", "namespaces spawns/s", "unary calls/s", "unary calls/s",
		"link links/s", "read GiB/s", "write GiB/s",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("cases (-want +got):\n%s", d)
	}
}

func TestRun_table(t *testing.T) {
	var out, progress bytes.Buffer
	o := quick(newFake().start(t), "actions", "latency")
	o.JSON, o.Out, o.Progress = false, &out, &progress
	o.ServerPIDs = []int{os.Getpid()}
	if err := bench.Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(out.String(), "\n")
	if len(lines) < 4 || !strings.Contains(lines[0], "subject") || !strings.Contains(lines[0], "server cpu") {
		t.Fatalf("no table:\n%s", &out)
	}
	// Right-aligned cells: all lines of the table end in the same column.
	if len(lines[0]) != len(lines[1]) || len(lines[1]) != len(lines[2]) {
		t.Errorf("the lines are not aligned:\n%s", &out)
	}
	if !regexp.MustCompile(`latency unique /bin/true, clients: 1: p50 is [0-9.]+ ms, -?[0-9.]+ ms over the floor's`).MatchString(out.String()) {
		t.Errorf("no line on the latency:\n%s", &out)
	}
	if got := strings.Count(progress.String(), "\n"); got != 2 {
		t.Errorf("%d lines of progress, want 2: %s", got, &progress)
	}
}

func TestRun_uploadsWithoutBatches(t *testing.T) {
	for _, tc := range []struct {
		name    string
		change  func(*fakeServer)
		batches bool // are used for uploads
		// skipsBatch: batches of the subject's size are not to be had.
		skipsBatch bool
	}{
		{"unimplemented", func(f *fakeServer) { f.noBatch = true }, false, true},
		{"tiny limit", func(f *fakeServer) { f.caps.CacheCapabilities.MaxBatchTotalSizeBytes = 100 }, false, true},
		{"limit of one blob", func(f *fakeServer) { f.caps.CacheCapabilities.MaxBatchTotalSizeBytes = 400 }, true, true},
		{"no limit", func(f *fakeServer) { f.caps.CacheCapabilities.MaxBatchTotalSizeBytes = 0 }, true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFake()
			tc.change(f)
			subjects := []string{"actions"}
			if tc.skipsBatch {
				subjects = append(subjects, "batch")
			}
			rep, err := run(t, quick(f.start(t), subjects...))
			if err != nil {
				t.Fatal(err)
			}
			checkResult(t, &rep.Results[0])
			if got := f.batches.Load() > 0; got != tc.batches {
				t.Errorf("%d batches, want some: %v", f.batches.Load(), tc.batches)
			}
			for _, r := range rep.Results[1:] {
				if r.Skipped == "" {
					t.Errorf("subject batch, %s: %d ops, want it skipped", r.Case, r.Ops)
				}
			}
		})
	}
}

func TestRun_cacheOnlyServer(t *testing.T) {
	f := newFake()
	f.caps.ExecutionCapabilities = nil
	rep, err := run(t, quick(f.start(t), "actions", "actioncache"))
	if err != nil {
		t.Fatal(err)
	}
	if got := rep.Results[0]; !strings.Contains(got.Skipped, "does not execute") {
		t.Errorf("actions: skipped %q, want that the server does not execute", got.Skipped)
	}
	checkResult(t, &rep.Results[1])
}

func TestRun_countsErrors(t *testing.T) {
	for _, tc := range []struct {
		name, subject string
		change        func(*fakeServer)
		want          string
	}{
		{"execute fails", "latency", func(f *fakeServer) { f.failing.Store(true) }, "no worker today"},
		{"action fails", "latency", func(f *fakeServer) { f.exitCode = 7 }, "exit code 7: it broke"},
		{"preparation fails", "cached", func(f *fakeServer) { f.failing.Store(true) }, "prepare: execute: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFake()
			tc.change(f)
			rep, err := run(t, quick(f.start(t), tc.subject))
			if !errors.Is(err, bench.ErrCallsFailed) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one that wraps ErrCallsFailed and has %q", err, tc.want)
			}
			r := rep.Results[0]
			if r.Errors == 0 || r.Errors > 300 || r.Ops != 0 || r.Value != 0 || !strings.Contains(r.FirstError, tc.want) {
				t.Errorf("%d errors, %d ops, value %v, first %q, want a few errors like %q", r.Errors, r.Ops, r.Value, r.FirstError, tc.want)
			}
		})
	}
}

func TestRun_explains(t *testing.T) {
	closed, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	bare, ended := grpc.NewServer(), make(chan struct{})
	go func() {
		defer close(ended)
		_ = bare.Serve(l)
	}()
	t.Cleanup(func() {
		bare.Stop()
		<-ended
	})
	fake := newFake().start(t)
	for _, tc := range []struct {
		name   string
		change func(*bench.Options)
		want   string
	}{
		{"nobody there", func(o *bench.Options) { o.Remote = closed.Addr().String() }, "no server answers at " + closed.Addr().String()},
		{"not REAPI", func(o *bench.Options) { o.Remote = l.Addr().String() }, "not the Remote Execution API"},
		{"no remote", func(o *bench.Options) { o.Remote = "" }, "no remote given"},
		{"scheme", func(o *bench.Options) { o.Remote = "http://x" }, `scheme "http"`},
		{"instance", func(o *bench.Options) { o.Instance = "none" }, `no instance "none"`},
		{"digest function", func(o *bench.Options) { o.DigestFunction = "md5" }, `digest function "md5"`},
		{"digest function of the server", func(o *bench.Options) { o.DigestFunction = "sha1" }, "does not take digest function sha1"},
		{"subject", func(o *bench.Options) { o.Subjects = []string{"floor", "walls"} }, `subject "walls" is none of floor, `},
		{"concurrency", func(o *bench.Options) { o.Concurrency = []int{0} }, "concurrency 0"},
		{"stream size", func(o *bench.Options) { o.StreamBytes = 1 }, "stream_bytes 1 is not"},
		{"duration", func(o *bench.Options) { o.Duration = -1 }, "negative"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := quick(fake, "latency")
			tc.change(&o)
			if _, err := run(t, o); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}

func TestRun_interrupted(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	signal := errors.New("interrupt signal received")
	f := newFake()
	calls := make(chan struct{}, 1000000)
	f.onExec = func() {
		calls <- struct{}{}
		if len(calls) == 20 {
			cancel(signal)
		}
	}
	o := quick(f.start(t), "latency", "actions")
	o.Duration = time.Hour
	var out bytes.Buffer
	o.Out = &out
	if err := bench.Run(ctx, o); !errors.Is(err, signal) {
		t.Errorf("error %v, want the cause", err)
	}
	var rep bench.Report
	if err := json.Unmarshal(out.Bytes(), &rep); err != nil {
		t.Fatal(err)
	}
	if !rep.Interrupted || len(rep.Results) != 1 || rep.Results[0].Errors != 0 {
		t.Errorf("report %+v, want one of the subject that was interrupted, without errors", rep)
	}
}

func TestRun_serverMetrics(t *testing.T) {
	ok := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("# HELP go_goroutines x\ngo_goroutines 12\nprocess_open_fds 9\nother{a=\"b c\"} 1\nprocess_cpu_seconds_total 1.5\nprocess_resident_memory_bytes 1.048576e+06\n"))
	}))
	defer ok.Close()
	bad := httptest.NewServer(http.NotFoundHandler())
	defer bad.Close()
	for _, tc := range []struct {
		name string
		urls []string
		want bench.ServerUsage
	}{
		{"one", []string{ok.URL}, bench.ServerUsage{RSSBytes: 1 << 20, GoroutinesBefore: 12, GoroutinesAfter: 12, DescriptorsBefore: 9, DescriptorsAfter: 9}},
		{"two are summed", []string{ok.URL, ok.URL}, bench.ServerUsage{RSSBytes: 2 << 20, GoroutinesBefore: 24, GoroutinesAfter: 24, DescriptorsBefore: 18, DescriptorsAfter: 18}},
		{"none there", []string{bad.URL}, bench.ServerUsage{Error: "metrics at " + bad.URL + ": status 404 Not Found"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := quick(newFake().start(t), "latency")
			o.ServerMetrics = tc.urls
			rep, err := run(t, o)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(&tc.want, rep.Results[0].Server); d != "" {
				t.Errorf("server (-want +got):\n%s", d)
			}
		})
	}
}

// TestRun_jsonShape holds the names of the JSON, which others read.
func TestRun_jsonShape(t *testing.T) {
	o := quick(newFake().start(t), "latency")
	o.ServerPIDs = []int{os.Getpid()}
	var out bytes.Buffer
	o.Out = &out
	if err := bench.Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(out.Bytes(), &v); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/report.keys")
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(slices.Compact(keys("", v)), "\n") + "\n"
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("keys (-want +got):\n%s", d)
	}
}

// keys lists the paths of the keys in v, sorted. Of an optional key whose
// presence depends on the figures, none is told.
func keys(path string, v any) []string {
	switch v := v.(type) {
	case map[string]any:
		var all []string
		for k, e := range v {
			if k != "children_cpu_ms_per_op" && k != "over_floor_p50_ms" {
				all = append(all, keys(path+"."+k, e)...)
			}
		}
		slices.Sort(all)
		return all
	case []any:
		var all []string
		for _, e := range v {
			all = append(all, keys(path+"[]", e)...)
		}
		slices.Sort(all)
		return all
	}
	return []string{path}
}
