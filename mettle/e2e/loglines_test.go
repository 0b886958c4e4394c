package e2e_test

import (
	"encoding/json"
	"errors"
	"regexp"
	"slices"
	"strings"
	"testing"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
)

// logKeys are the keys that lines of our logs have. A new one is added here on
// purpose: it is a word that operators look for, and is to be the same everywhere.
//
//nolint:gochecknoglobals // an immutable table
var logKeys = []string{
	"time", "level", "msg", "error", "suppressed", // of every line
	"request", "caller", "operation", "digest", "instance", "invocation", "action_id", "trace_id", // of what it is about
	"service", "method", "code", "duration", "peer", "tool", "correlated_invocations", "target", "mnemonic", "resource", // of calls
	"store", "call", "digests", "tier", "blobs", "bytes", "root", // of stores
	"files", "size_bytes", "wanted_bytes", "used_bytes", "path", "objects", "corrupt",
	"worker", "slot", "pool", "attempt", "outcome", "exit_code", "reason", "drain_timeout", "user", // of workers
	"queue", "server", "subject", "stage", "api", "jobs", "listener", "consumer", "status", "description", "name", // of the broker
	"policy", "since", "for", "wait", "why", "group",
	// Of what goes wrong on some machines alone, or with other stores and brokers.
	"panic", "stack", "dir", "file", "mode", "offset", "failures", "issuer", "object", "segment", "segments", "records",
	"limit", "address", "heap_bytes", "limit_bytes", "operations", "history", "attempts", "body", "stream", "subscription", "topic", "message",
	"refused", "left_out",
}

var snakeCase = regexp.MustCompile(`^[a-z][a-z0-9]*(_[a-z0-9]+)*$`)

// logLines are the lines of a server's log, held to the keys. What it prints for
// people to its standard output is left out.
func logLines(t *testing.T, s *server) (all []map[string]any) {
	t.Helper()
	for line := range strings.Lines(s.log.String()) {
		if !strings.HasPrefix(line, "{") {
			continue
		}
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Errorf("%v: %s", err, line)
			continue
		}
		for key := range m {
			if !snakeCase.MatchString(key) || !slices.Contains(logKeys, key) {
				t.Errorf("the key %q is in no list: %s", key, line)
			}
		}
		all = append(all, m)
	}
	return all
}

// about are the lines in which key has the value.
func about(lines []map[string]any, key, value string) (found []map[string]any) {
	for _, l := range lines {
		if l[key] == value {
			found = append(found, l)
		}
	}
	return found
}

func says(lines []map[string]any, message string) bool {
	return slices.ContainsFunc(lines, func(l map[string]any) bool { return l["msg"] == message })
}

// secretWord is in the command and in the environment of an action, and no log has it.
const secretWord = "a-word-that-no-log-has"

// loggedRun has an action run, one refused, and a call fail. It returns the action's
// operation.
func loggedRun(t *testing.T, conn *grpc.ClientConn) (operation string) {
	t.Helper()
	store, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	md, err := proto.Marshal(&repb.RequestMetadata{ToolInvocationId: "build-1", ActionId: "act-1", TargetId: "//some:target"})
	if err != nil {
		t.Fatal(err)
	}
	ctx := metadata.AppendToOutgoingContext(t.Context(), "build.bazel.remote.execution.v2.requestmetadata-bin", string(md))
	d := putAction(t, store, "echo out; : "+secretWord)
	stream, err := repb.NewExecutionClient(conn).Execute(ctx, &repb.ExecuteRequest{ActionDigest: d.Proto()})
	if err != nil {
		t.Fatal(err)
	}
	for {
		op, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		operation = op.GetName()
		if op.GetDone() {
			break
		}
	}
	stream, err = repb.NewExecutionClient(conn).Execute(ctx, &repb.ExecuteRequest{ActionDigest: digest.Of(digest.SHA256, []byte("nowhere")).Proto()})
	if err != nil {
		t.Fatal(err)
	}
	// Where that takes a while, it is told first that it waits, and then that it has ended.
	for op := (*longrunningpb.Operation)(nil); err == nil && !op.GetDone(); {
		if op, err = stream.Recv(); op.GetDone() {
			resp := &repb.ExecuteResponse{}
			err = errors.Join(op.GetResponse().UnmarshalTo(resp), status.ErrorProto(resp.GetStatus()))
		}
	}
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("an action that is not there: %v", err)
	}
	var trailer metadata.MD
	_, err = longrunningpb.NewOperationsClient(conn).GetOperation(ctx, &longrunningpb.GetOperationRequest{}, grpc.Trailer(&trailer))
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("the operation without a name: %v", err)
	}
	if got := trailer.Get("mettle-request"); len(got) != 1 || got[0] == "" {
		t.Errorf("the client of a failed call is told that it was request %q", got)
	}
	return operation
}

// checkLog looks for an operation in the log of a server that has ended.
func checkLog(t *testing.T, s *server, operation string, messages ...string) {
	t.Helper()
	if err := s.Terminate(t.Context()); err != nil {
		t.Errorf("%s ended with %v", s.program, err)
	}
	lines := about(logLines(t, s), "operation", operation)
	for _, m := range messages {
		if !says(lines, m) {
			t.Errorf("of the operation %s the log of %s %s says no %q", operation, s.program, s.args[0], m)
		}
	}
	if len(about(lines, "invocation", "build-1")) == 0 || len(about(lines, "action_id", "act-1")) == 0 {
		t.Errorf("of the operation %s the log of %s %s does not say whose it is", operation, s.program, s.args[0])
	}
	if strings.Contains(s.log.String(), secretWord) {
		t.Errorf("the log of %s %s has commands of clients", s.program, s.args[0])
	}
}

var debugLog = []string{"--log_format=json", "--log_level=debug"} //nolint:gochecknoglobals // flags

// An operator who has the name of an operation finds in the log what became of it.
func TestDual_logLines(t *testing.T) {
	s := startDual(t, storeDir(t), debugLog...)
	conn, err := client.Dial(t.Context(), s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	operation := loggedRun(t, conn)
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	checkLog(t, s, operation, "execute ended", "job ended")
	refused := about(logLines(t, s), "msg", "an action was refused")
	if len(refused) != 1 || refused[0]["level"] != "INFO" || refused[0]["invocation"] != "build-1" || refused[0]["request"] == nil {
		t.Errorf("of an action that was refused the log says %v", refused)
	}
}

// And so in those of the API server, the worker and the storage of a fleet.
func TestFleet_logLines(t *testing.T) {
	f := newFleet(t)
	w := f.worker(0)
	for _, s := range []*server{f.elan, f.api, w} {
		s.args = append(s.args, debugLog...)
	}
	f.broker.Start()
	f.elan.Start()
	f.api.Start()
	w.Start()
	awaitReady(t, f.api)
	awaitReady(t, w)
	conn, err := client.Dial(t.Context(), f.api.Addr())
	if err != nil {
		t.Fatal(err)
	}
	operation := loggedRun(t, conn)
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	checkLog(t, w, operation, "job ended")
	checkLog(t, f.api, operation, "execute ended")
	checkLog(t, f.elan, operation, "rpc")
	// What the API server asks of the storage goes by the name of the client's call.
	front, behind := logLines(t, f.api), logLines(t, f.elan)
	for _, l := range about(front, "operation", operation) {
		if request, ok := l["request"].(string); ok && l["msg"] == "execute ended" && len(about(behind, "request", request)) == 0 {
			t.Errorf("the storage knows nothing of request %s", request)
		}
	}
}
