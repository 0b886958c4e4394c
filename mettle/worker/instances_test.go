//go:build linux

package worker_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/instances"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	queuepb "github.com/mettle-build/mettle/proto/queue"
)

// putIn stores bytes in one instance.
func putIn(t *testing.T, s blob.Store, data string) *repb.Digest {
	t.Helper()
	d, err := blob.PutBytes(t.Context(), s, digest.SHA256, []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	return d.Proto()
}

// TestWorker_instancesApart: a job takes its inputs from its own instance, also
// when another one's job has just had the same, and its outputs are there alone.
func TestWorker_instancesApart(t *testing.T) {
	f := newFixture(t)
	stores, err := instances.New(t.Context(), f.store)
	if err != nil {
		t.Fatal(err)
	}
	f.opts.Stores = stores.Of
	if f.opts.Actions, err = action.New(action.Options{Store: f.store, Stores: stores.Of, Entries: f.store}); err != nil {
		t.Fatal(err)
	}
	f.start(t)
	a := stores.Of("a")
	in := putIn(t, a, "input")
	messages := func(s blob.Store) (action string) {
		command := &repb.Command{Arguments: []string{"/bin/sh", "-c", "cat d/in > out; cat d/in"}, OutputPaths: []string{"out"}}
		sub := &repb.Directory{Files: []*repb.FileNode{{Name: "in", Digest: in}}}
		cd, err := blob.PutMessage(t.Context(), s, digest.SHA256, command)
		if err != nil {
			t.Fatal(err)
		}
		sd, _, err := digest.OfMessage(digest.SHA256, sub)
		if err != nil {
			t.Fatal(err)
		}
		if s == a {
			if _, err := blob.PutMessage(t.Context(), s, digest.SHA256, sub); err != nil {
				t.Fatal(err)
			}
		}
		rd, err := blob.PutMessage(t.Context(), s, digest.SHA256, &repb.Directory{Directories: []*repb.DirectoryNode{{Name: "d", Digest: sd.Proto()}}})
		if err != nil {
			t.Fatal(err)
		}
		act := &repb.Action{CommandDigest: cd.Proto(), InputRootDigest: rd.Proto()}
		ad, err := blob.PutMessage(t.Context(), s, digest.SHA256, act)
		if err != nil {
			t.Fatal(err)
		}
		return ad.String()
	}
	execute := func(instance string) *repb.ExecuteResponse {
		t.Helper()
		name := messages(stores.Of(instance))
		f.n++
		job := &queuepb.Job{Operation: fmt.Sprint("operation ", f.n), ReplyTo: "api", Pool: queue.DefaultPool, ActionDigest: name, InstanceName: instance}
		if err := f.queue.Publish(t.Context(), job); err != nil {
			t.Fatal(err)
		}
		return f.wait(t, job)
	}
	resp := execute("a")
	if resp.Status.GetCode() != 0 || resp.Result.ExitCode != 0 || len(resp.Result.OutputFiles) != 1 {
		t.Fatalf("in a: %v", resp)
	}
	out, err := digest.FromProto(digest.SHA256, resp.Result.OutputFiles[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := blob.ReadAll(t.Context(), a, out, 100); err != nil || string(data) != "input" {
		t.Errorf("the output in a: %q, %v", data, err)
	}
	for _, instance := range []string{"b", ""} {
		if _, err := stores.Of(instance).Open(t.Context(), out, 0); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("the output in %q: %v, want ErrNotFound", instance, err)
		}
		// Everything but the Directory that is not the root, and the file, is in b.
		if resp := execute(instance); codes.Code(resp.Status.GetCode()) != codes.FailedPrecondition {
			t.Errorf("in %q: %v, want FAILED_PRECONDITION", instance, resp)
		}
	}
	if resp := execute("a"); resp.Status.GetCode() != 0 {
		t.Errorf("in a again: %v", resp)
	}
}

// TestWorker_keepsFailures: what failed is kept for people to look at, and the
// client is told how; what did not run, or may not be cached, is not.
func TestWorker_keepsFailures(t *testing.T) {
	f := newFixture(t)
	failures, err := action.NewFailures(action.FailuresOptions{Entries: f.store})
	if err != nil {
		t.Fatal(err)
	}
	f.opts.Failures = failures
	f.start(t)
	for _, c := range []struct {
		name string
		r    request
		kept bool
	}{
		{"fails", request{script: "echo why >&2; exit 3", job: &queuepb.Job{InstanceName: "main"}}, true},
		{"times_out", request{script: "echo why >&2; exec sleep 100", action: &repb.Action{Timeout: durationpb.New(100 * time.Millisecond)}}, true},
		{"succeeds", request{script: "true"}, false},
		{"do_not_cache", request{script: "exit 3", action: &repb.Action{DoNotCache: true}}, false},
		{"input_is_missing", request{script: "exit 3", root: &repb.Directory{
			Files: []*repb.FileNode{{Name: "f", Digest: digest.Of(digest.SHA256, []byte("gone")).Proto()}},
		}}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			job := f.publish(t, c.r)
			resp := f.wait(t, job)
			got, err := failures.Get(t.Context(), keyOf(t, job))
			if kept := err == nil; kept != c.kept || !kept && !errors.Is(err, blob.ErrNotFound) {
				t.Fatalf("%v, want kept: %v; the response is %v", err, c.kept, resp)
			}
			hint := "mettle one --kept " + job.ActionDigest + " --remote=server:1"
			if strings.Contains(resp.Message, hint) != c.kept {
				t.Errorf("message %q, want it to have %q: %v", resp.Message, hint, c.kept)
			}
			if !c.kept {
				return
			}
			if got.ExitCode != resp.Result.ExitCode || got.Response.Status.GetCode() != resp.Status.GetCode() {
				t.Errorf("kept %v, the client has %v", got.Response, resp)
			}
			if stderr := f.read(t, got.Response.Result.StderrDigest); stderr != "why\n" {
				t.Errorf("stderr is %q", stderr)
			}
			if _, err := f.actions.Get(t.Context(), keyOf(t, job)); !errors.Is(err, blob.ErrNotFound) {
				t.Errorf("the ActionCache: %v, want ErrNotFound", err)
			}
		})
	}
}

// noFailures takes none.
type noFailures struct{}

func (noFailures) Put(context.Context, blob.EntryKey, *repb.ExecuteResponse) error {
	return blob.ErrUnavailable
}

// TestWorker_failuresInTrouble: an action fails in the same way where its failure
// can't be kept.
func TestWorker_failuresInTrouble(t *testing.T) {
	f := newFixture(t, func(o *worker.Options, _ *mem.Options) { o.Failures = noFailures{} }).start(t)
	resp := f.execute(t, request{script: "exit 3"})
	if resp.Status.GetCode() != 0 || resp.Result.ExitCode != 3 || strings.Contains(resp.Message, "--kept") {
		t.Errorf("%v", resp)
	}
}
