package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/client"
)

// An operator sees what runs, and cancels one of two: its client hears of it, its
// processes die, and the other goes on.
func TestDual_operations(t *testing.T) {
	dir := storeDir(t)
	s := startDual(t, dir, "--slots=2")
	conn, err := client.Dial(t.Context(), s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	store, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	// The sleeper that is to die, grandchildren and all, is told by its argument.
	mark := fmt.Sprintf("86399.%d", os.Getpid())
	doomed := begin(t, conn, &repb.ExecuteRequest{ActionDigest: putAction(t, store, "(setsid sleep "+mark+" &); sleep "+mark).Proto()})
	kept := begin(t, conn, &repb.ExecuteRequest{ActionDigest: putAction(t, store, "touch kept; until [ -e leave ]; do sleep 0.05; done; echo kept").Proto()})
	poll(t, "both to run", func() bool {
		return strings.Count(s.run(t, "operations", "list", "--stage=executing"), "executing") == 2 && len(running(t, mark)) > 1
	})
	list := s.run(t, "operations", "list")
	if n := strings.Count(list, "operations/v1/"); n != 2 {
		t.Errorf("%d operations are listed:\n%s", n, list)
	}
	s.run(t, "operations", "cancel", doomed.name)
	if res := doomed.end(t); codes.Code(res.GetStatus().GetCode()) != codes.Canceled { //nolint:gosec // a status code
		t.Errorf("the client of the cancelled action got %v", res)
	}
	poll(t, "the processes to die", func() bool { return len(running(t, mark)) == 0 })
	if got := s.run(t, "operations", "get", doomed.name); !strings.Contains(got, "Canceled") {
		t.Errorf("get prints\n%s", got)
	}
	root := waitForRoot(t, dir, "kept")
	if err := os.WriteFile(filepath.Join(root, "leave"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if res := kept.end(t); res.GetStatus().GetCode() != 0 || string(res.GetResult().GetStdoutRaw()) != "kept\n" {
		t.Errorf("the other client got %v", res)
	}
}

// A client that is gone for --abandon_after takes its action with it.
func TestDual_abandons(t *testing.T) {
	s := startDual(t, storeDir(t), "--slots=1", "--abandon_after=1s")
	conn, err := client.Dial(t.Context(), s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	store, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	mark := fmt.Sprintf("86398.%d", os.Getpid())
	begin(t, conn, &repb.ExecuteRequest{ActionDigest: putAction(t, store, "(setsid sleep "+mark+" &); sleep "+mark).Proto()})
	poll(t, "the action to run", func() bool { return len(running(t, mark)) > 1 })
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	poll(t, "the processes to die", func() bool { return len(running(t, mark)) == 0 })
	if list := s.run(t, "operations", "list"); list != "" {
		t.Errorf("operations are listed after the last was abandoned:\n%s", list)
	}
}

// run runs a command of mettle's on the server, and returns what it prints.
func (s *server) run(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary(t, "mettle"), append(args, "--api="+s.Addr())...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return string(out)
}

// poll waits for something that only other processes can tell by its effect.
func poll(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	for !ok() {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// running are the processes with that argument.
func running(t *testing.T, arg string) []string {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, path := range all {
		line, _ := os.ReadFile(path) // it may have ended
		if args := strings.Split(string(line), "\x00"); len(args) > 1 && args[1] == arg {
			found = append(found, path)
		}
	}
	return found
}

// begun is an Execute that goes on.
type begun struct {
	name   string
	stream grpc.ServerStreamingClient[longrunningpb.Operation]
}

// begin executes, and waits for the first message.
func begin(t *testing.T, conn *grpc.ClientConn, req *repb.ExecuteRequest) *begun {
	t.Helper()
	stream, err := repb.NewExecutionClient(conn).Execute(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	op, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return &begun{op.GetName(), stream}
}

// end is the response.
func (b *begun) end(t *testing.T) *repb.ExecuteResponse {
	t.Helper()
	for {
		op, err := b.stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if !op.GetDone() {
			continue
		}
		res := &repb.ExecuteResponse{}
		if err := op.GetResponse().UnmarshalTo(res); err != nil {
			t.Fatal(err)
		}
		if _, err := b.stream.Recv(); !errors.Is(err, io.EOF) {
			t.Error(fmt.Errorf("after the end: %w", err))
		}
		return res
	}
}

// Two API servers over NATS: what one of them began, the other sees, takes up and
// cancels, also when both were killed at once; nothing is run twice.
func TestFleet_operations(t *testing.T) {
	f := newFleet(t)
	other := newServer(t, "mettle", []string{"api", f.queueFlag, f.storageFlag})
	other.args = append(other.args, "--port="+strconv.Itoa(other.Port))
	worker := f.worker(4)
	worker.args = append(worker.args, "--sandbox=bare") // how often the action starts, it tells outside
	for _, s := range []*server{f.broker, f.elan, f.api, other, worker} {
		s.Start()
	}
	for _, s := range []*server{f.api, other, worker} {
		awaitReady(t, s)
	}
	store := f.api.client(t)
	mark := fmt.Sprintf("86397.%d", os.Getpid())
	starts := publicDir(t) // gets a file with each start
	action := putAction(t, store.client, "mktemp "+starts+"/XXXXXX; (setsid sleep "+mark+" &); sleep "+mark).Proto()
	started := func() int {
		entries, err := os.ReadDir(starts)
		if err != nil {
			t.Error(err)
		}
		return len(entries)
	}
	first := begin(t, store.conn, &repb.ExecuteRequest{ActionDigest: action})
	poll(t, "the action to run", func() bool { return len(running(t, mark)) > 1 })
	other.run(t, "operations", "cancel", first.name)
	if res := first.end(t); codes.Code(res.GetStatus().GetCode()) != codes.Canceled { //nolint:gosec // a status code
		t.Errorf("the client got %v", res)
	}
	poll(t, "the processes to die", func() bool { return len(running(t, mark)) == 0 })

	second := begin(t, store.conn, &repb.ExecuteRequest{ActionDigest: action})
	poll(t, "the action to run again", func() bool { return len(running(t, mark)) > 1 })
	f.api.Kill()
	other.Kill()
	f.api.Start()
	other.Start()
	awaitReady(t, f.api)
	awaitReady(t, other)
	resumed := resume(t, other.client(t).conn, second.name)
	poll(t, "the other server to hear of the worker", func() bool {
		return strings.Contains(other.run(t, "operations", "get", second.name), "executing")
	})
	if n := started(); n != 2 {
		t.Errorf("the action was started %d times, want twice", n)
	}
	f.api.run(t, "operations", "cancel", second.name)
	if res := resumed.end(t); codes.Code(res.GetStatus().GetCode()) != codes.Canceled { //nolint:gosec // a status code
		t.Errorf("the client that came back got %v", res)
	}
	poll(t, "the processes to die", func() bool { return len(running(t, mark)) == 0 })
	if n := started(); n != 2 {
		t.Errorf("the action was started %d times in all, want twice", n)
	}
}

// connected is a client of a server.
type connected struct {
	conn   *grpc.ClientConn
	client *client.Client
}

func (s *server) client(t *testing.T) connected {
	t.Helper()
	conn, err := client.Dial(t.Context(), s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	return connected{conn, c}
}

// resume is WaitExecution.
func resume(t *testing.T, conn *grpc.ClientConn, name string) *begun {
	t.Helper()
	stream, err := repb.NewExecutionClient(conn).WaitExecution(t.Context(), &repb.WaitExecutionRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	return &begun{name, stream}
}
