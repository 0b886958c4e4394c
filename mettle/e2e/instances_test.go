package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
)

// TestDual_instances: with --isolate_instances an action that one instance has run
// can't be run, nor its output be read, in another; with --ac_update=nobody a
// client sets no result and executing still caches; and a failed run is kept.
func TestDual_instances(t *testing.T) {
	s := startDual(t, storeDir(t), "--isolate_instances", "--ac_update=nobody", "--max_blob_size=1MiB")
	conn, err := client.Dial(t.Context(), s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	in := func(instance string) *client.Client {
		c, err := client.New(client.Options{Conn: conn, Instance: instance})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	a, b := in("a"), in("b/c")
	d := putAction(t, a, "echo output > out")

	resp := execute(t, conn, "a", d)
	if resp.Status.GetCode() != 0 || len(resp.Result.GetOutputFiles()) != 1 {
		t.Fatalf("in a: %v", resp)
	}
	out, err := digest.FromProto(digest.SHA256, resp.Result.OutputFiles[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if data, err := blob.ReadAll(t.Context(), a, out, 100); err != nil || string(data) != "output\n" {
		t.Errorf("the output in a: %q, %v", data, err)
	}
	if again := execute(t, conn, "a", d); !again.CachedResult {
		t.Errorf("in a again: %v, want it from the cache", again)
	}
	if _, err := b.Open(t.Context(), out, 0); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("the output in b/c: %v, want ErrNotFound", err)
	}
	if resp := execute(t, conn, "b/c", d); codes.Code(resp.Status.GetCode()) != codes.FailedPrecondition {
		t.Errorf("in b/c: %v, want FAILED_PRECONDITION", resp)
	}
	if err := a.Put(t.Context(), blob.EntryKey{Instance: "a", Action: d}, &repb.ActionResult{}); err == nil || !strings.Contains(err.Error(), "may only read") {
		t.Errorf("update: %v, want to be told that nobody may", err)
	}
	if _, err := blob.PutBytes(t.Context(), a, digest.SHA256, make([]byte, 1<<20+1)); err == nil || !strings.Contains(err.Error(), "at most 1048576 bytes") {
		t.Errorf("a blob over the limit: %v, want to be told the limit", err)
	}
	checkKept(t, s, conn, a)
}

// checkKept runs an action that fails, and looks at what was kept of it as the
// message says.
func checkKept(t *testing.T, s *server, conn *grpc.ClientConn, a *client.Client) {
	t.Helper()
	d := putAction(t, a, "echo printed; echo why >&2; exit 7")
	resp := execute(t, conn, "a", d)
	if resp.Status.GetCode() != 0 || resp.Result.GetExitCode() != 7 {
		t.Fatalf("the action that fails: %v", resp)
	}
	_, hint, ok := strings.Cut(resp.Message, "kept: mettle ")
	if !ok {
		t.Fatalf("the message %q names no way to look at it", resp.Message)
	}
	cmd := exec.CommandContext(t.Context(), binary(t, "mettle"), strings.Fields(hint)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	exit, isExit := errors.AsType[*exec.ExitError](cmd.Run())
	if !isExit || exit.ExitCode() != 7 || stdout.String() != "printed\n" || !strings.Contains(stderr.String(), "why\n") {
		t.Errorf("mettle %s: %v, stdout %q, stderr %q", hint, exit, &stdout, &stderr)
	}
	if _, err := a.Get(t.Context(), blob.EntryKey{Instance: "a", Action: d}); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("its result: %v, want ErrNotFound", err)
	}
	if r, err := a.Get(t.Context(), blob.EntryKey{Instance: action.FailedInstance("a"), Action: d}); err != nil || r.ExitCode != 7 {
		t.Errorf("its failure: %v, %v", r, err)
	}
	if again := execute(t, conn, "a", d); again.CachedResult {
		t.Errorf("it was served from the cache: %v", again)
	}
}

// TestDual_digestFunctions: an action runs with each function, and its outputs are
// named by the same.
func TestDual_digestFunctions(t *testing.T) {
	s := startDual(t, storeDir(t))
	conn, err := client.Dial(t.Context(), s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	for _, fn := range digest.Functions() {
		t.Run(fn.String(), func(t *testing.T) {
			d := putActionOf(t, c, fn, "seq 1000 > out; seq 10000")
			resp := execute(t, conn, "", d)
			if resp.Status.GetCode() != 0 || len(resp.Result.GetOutputFiles()) != 1 {
				t.Fatalf("%v", resp)
			}
			for _, m := range []*repb.Digest{resp.Result.OutputFiles[0].Digest, resp.Result.StdoutDigest} {
				out, err := digest.FromProto(fn, m)
				if err != nil {
					t.Fatal(err)
				}
				if data, err := blob.ReadAll(t.Context(), c, out, 1<<20); err != nil || digest.Of(fn, data) != out {
					t.Errorf("output %s: %d bytes, %v", out, len(data), err)
				}
			}
			if again := execute(t, conn, "", d); !again.CachedResult {
				t.Errorf("again: %v, want it from the cache", again)
			}
		})
	}
}

// putAction uploads an action that runs a script.
func putAction(t *testing.T, s blob.Store, script string) digest.Digest {
	t.Helper()
	return putActionOf(t, s, digest.SHA256, script)
}

func putActionOf(t *testing.T, s blob.Store, fn digest.Function, script string) digest.Digest {
	t.Helper()
	put := func(d digest.Digest, err error) *repb.Digest {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return d.Proto()
	}
	command := put(blob.PutMessage(t.Context(), s, fn, &repb.Command{Arguments: []string{"/bin/sh", "-c", script}, OutputPaths: []string{"out"}}))
	root := put(blob.PutMessage(t.Context(), s, fn, &repb.Directory{}))
	d, err := blob.PutMessage(t.Context(), s, fn, &repb.Action{CommandDigest: command, InputRootDigest: root})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// execute runs an action, and returns the response at the end of its stream.
func execute(t *testing.T, conn *grpc.ClientConn, instance string, d digest.Digest) *repb.ExecuteResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	stream, err := repb.NewExecutionClient(conn).Execute(ctx, &repb.ExecuteRequest{InstanceName: instance, ActionDigest: d.Proto(), DigestFunction: d.Function().Proto()})
	if err != nil {
		t.Fatal(err)
	}
	var last *longrunningpb.Operation
	for {
		op, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if s, ok := gstatus.FromError(err); err != nil && ok {
			return &repb.ExecuteResponse{Status: s.Proto()}
		}
		last = op
	}
	resp := &repb.ExecuteResponse{}
	if err := last.GetResponse().UnmarshalTo(resp); err != nil {
		t.Fatalf("the last operation is %v: %v", last, err)
	}
	return resp
}
