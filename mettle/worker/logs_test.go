//go:build linux

package worker_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/logstream"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// withLogs has a worker write to log streams.
func withLogs(t *testing.T) (*logstream.Streams, change) {
	t.Helper()
	logs, err := logstream.New(logstream.Options{WriterTimeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(logs.Shutdown)
	return logs, func(o *worker.Options, _ *mem.Options) { o.LogStreams = logs }
}

// waitStreams waits until the job is reported to run with both streams.
func (f *fixture) waitStreams(t *testing.T, job *queuepb.Job) *queuepb.Update {
	t.Helper()
	for {
		select {
		case u := <-f.updates:
			if u.Operation == job.Operation && u.StdoutStreamName != "" && u.StderrStreamName != "" {
				return u
			}
		case <-time.After(30 * time.Second):
			t.Fatal("no streams within 30 s")
		}
	}
}

// What an action prints can be read while it runs; its result is as ever.
func TestWorker_liveLogs(t *testing.T) {
	logs, change := withLogs(t)
	f := newFixture(t, change).start(t)
	job := f.makeJob(t, request{script: "echo out1; echo err1 >&2; touch up; until [ -e go ]; do sleep 0.05; done; echo out2; echo err2 >&2"})
	job.InstanceName = "i"
	if err := f.queue.Publish(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	u := f.waitStreams(t, job)
	if u.Stage != queuepb.Update_EXECUTING || len(u.PartialMetadata) == 0 || !strings.HasPrefix(u.StdoutStreamName, "i/") {
		t.Errorf("the update is %v", u)
	}
	read := func(name, first, rest string, then func()) {
		t.Helper()
		r, err := logs.Open(name, 0)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		p := make([]byte, 100)
		for !errors.Is(err, io.EOF) {
			var n int
			if n, err = r.Read(t.Context(), p); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			if got += string(p[:n]); got == first && then != nil {
				then()
				then = nil
			}
		}
		if got != first+rest {
			t.Errorf("read %q, want %q", got, first+rest)
		}
	}
	read(u.StdoutStreamName, "out1\n", "out2\n", func() {
		if err := os.WriteFile(filepath.Join(filepath.Dir(f.marker()), "go"), nil, 0o644); err != nil { //nolint:gosec // for another user
			t.Fatal(err)
		}
	})
	read(u.StderrStreamName, "err1\n", "err2\n", nil)
	resp := f.wait(t, job)
	if string(resp.Result.StdoutRaw) != "out1\nout2\n" || string(resp.Result.StderrRaw) != "err1\nerr2\n" {
		t.Errorf("result %v", resp.Result)
	}
}

// The stream of an action that is to run again elsewhere does not end as if that were
// all.
func TestWorker_liveLogs_aborted(t *testing.T) {
	logs, change := withLogs(t)
	f := newFixture(t, change).start(t)
	job := f.publish(t, request{script: "echo out; echo err >&2; touch up; sleep 1000"})
	u := f.waitStreams(t, job)
	f.worker.Abort()
	r, err := logs.Open(u.StdoutStreamName, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 100)
	if n, err := r.Read(t.Context(), p); err != nil || string(p[:n]) != "out\n" {
		t.Errorf("read %q, %v", p[:n], err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := r.Read(ctx, p); !errors.Is(err, logstream.ErrAborted) {
		t.Errorf("the end: %v, want ErrAborted", err)
	}
}
