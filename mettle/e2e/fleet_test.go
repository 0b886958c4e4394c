package e2e_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
)

// A fleet is one process of each kind. None has been started.
type fleet struct {
	t                      *testing.T
	broker, elan, api      *server
	queueFlag, storageFlag string
	dirs                   map[int]string // of the workers
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{t: t, broker: newNATS(t), dirs: map[int]string{}}
	f.elan = newServer(t, "elan", []string{"--storage=file://" + storeDir(t), "--isolate_instances"})
	f.elan.args = append(f.elan.args, "--port="+strconv.Itoa(f.elan.Port))
	f.queueFlag = "--queue=nats://" + f.broker.Addr() + "/e2e"
	f.storageFlag = "--storage=" + f.elan.Addr()
	f.api = newServer(t, "mettle", []string{"api", f.queueFlag, f.storageFlag})
	f.api.args = append(f.api.args, "--port="+strconv.Itoa(f.api.Port))
	return f
}

// worker is one that has yet to be started. Each has users of its own for its
// slots, as those on one machine must.
func (f *fleet) worker(n int) *server {
	f.t.Helper()
	s := newServer(f.t, "mettle", []string{
		"worker", f.queueFlag, f.storageFlag, "--slots=2", "--dir=" + f.workerDir(n), "--uid_base=" + strconv.Itoa(64000+10*n),
	})
	s.says = "Metrics, health"
	return s
}

// workerDir is the directory of worker n, which the first call makes.
func (f *fleet) workerDir(n int) string {
	f.t.Helper()
	if f.dirs[n] == "" {
		f.dirs[n] = storeDir(f.t)
	}
	return f.dirs[n]
}

// readyz is what a server's page says of its readiness.
func readyz(ctx context.Context, s *server) (int, string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/readyz", s.HTTPPort), nil)
	if err != nil {
		return 0, err.Error()
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(body)
}

// awaitReady waits until a server is ready.
func awaitReady(t *testing.T, s *server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		code, said := readyz(ctx, s)
		if code == http.StatusOK {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s %s is not ready: %d %s", s.program, s.args[0], code, said)
		}
	}
}

// publicDir is a directory that actions can write to.
func publicDir(t *testing.T) string {
	t.Helper()
	dir := storeDir(t)
	if err := os.Chmod(dir, 0o777); err != nil { //nolint:gosec // actions run as other users
		t.Fatal(err)
	}
	return dir
}

// waitForRoot waits until an action of the dual or worker that keeps everything in
// dir has made a file of that name, and returns the input root that it is in.
func waitForRoot(t *testing.T, dir, name string) string {
	t.Helper()
	var found []string
	poll(t, "an action to run", func() bool {
		found, _ = filepath.Glob(filepath.Join(dir, "work", "slot*", "root", name))
		return len(found) > 0
	})
	return filepath.Dir(found[0])
}

// TestFleet follows a small fleet over NATS through its life: processes that
// start before what they need, a build, a broker that is killed under running
// and new actions, a worker that drains, and one that is hurried.
func TestFleet(t *testing.T) {
	f := newFleet(t)
	first := f.worker(0)
	f.api.Start()
	first.Start()
	for _, s := range []*server{f.api, first} {
		code, said := readyz(t.Context(), s)
		if code != http.StatusServiceUnavailable || !strings.Contains(said, "queue nats://"+f.broker.Addr()) || !strings.Contains(said, "storage "+f.elan.Addr()) {
			t.Errorf("%s, with nothing there, says %d %q; want 503 and what is away", s.args[0], code, said)
		}
	}
	f.broker.Start()
	f.elan.Start()
	awaitReady(t, f.api)
	awaitReady(t, first)
	if t.Failed() {
		return
	}
	t.Run("a build", func(t *testing.T) {
		b := newBazel(t)
		b.Write("small/BUILD", `[genrule(name = "n%d" % i, srcs = ["in.txt"], outs = ["n%d.txt" % i],
    cmd = "cat $(SRCS) > $@; echo %d >> $@" % i) for i in range(8)]`)
		b.Write("small/in.txt", "input")
		checkOnly(t, b.MustRun("build", append(b.remote(f.api), "//small:all")...), "remote")
	})
	conn, err := client.Dial(t.Context(), f.api.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Run("what failed is kept", func(t *testing.T) {
		a, err := client.New(client.Options{Conn: conn, Instance: "a"})
		if err != nil {
			t.Fatal(err)
		}
		checkKept(t, f.api, conn, a)
	})
	t.Run("the broker is killed", func(t *testing.T) { f.brokerKilled(t, conn) })
	t.Run("a worker drains", func(t *testing.T) { f.drains(t, conn, first) })
	t.Run("a worker is hurried", func(t *testing.T) { f.hurried(t, conn) })
}

// ownInstance is that of the actions which Bazel does not ask for.
const ownInstance = "own/instance"

// startAction has a fleet run a script, and returns where the response will be.
func startAction(t *testing.T, conn *grpc.ClientConn, script string) <-chan string {
	t.Helper()
	c, err := client.New(client.Options{Conn: conn, Instance: ownInstance})
	if err != nil {
		t.Fatal(err)
	}
	d := putAction(t, c, script)
	ended := make(chan string, 1) // one value, and the goroutine never waits
	go func() { ended <- outcome(t.Context(), conn, d) }()
	return ended
}

// outcome runs an action and says how it ended: "ok", or why not.
func outcome(ctx context.Context, conn *grpc.ClientConn, d digest.Digest) string {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	stream, err := repb.NewExecutionClient(conn).Execute(ctx, &repb.ExecuteRequest{InstanceName: ownInstance, ActionDigest: d.Proto()})
	for err == nil {
		var op *longrunningpb.Operation
		if op, err = stream.Recv(); err != nil || !op.GetDone() {
			continue
		}
		resp := &repb.ExecuteResponse{}
		if err = op.GetResponse().UnmarshalTo(resp); err == nil {
			if resp.GetStatus().GetCode() == 0 && resp.GetResult().GetExitCode() == 0 {
				return "ok"
			}
			return resp.String()
		}
	}
	return err.Error()
}

func wantOK(t *testing.T, what string, ended <-chan string) {
	t.Helper()
	if said := <-ended; said != "ok" {
		t.Errorf("%s: %s", what, said)
	}
}

// brokerKilled: what runs while the broker is away ends, and what is asked for
// meanwhile begins when it is back.
func (f *fleet) brokerKilled(t *testing.T, conn *grpc.ClientConn) {
	runs := startAction(t, conn, "touch runs; sleep 1.5; echo 1 > out")
	waitForRoot(t, f.workerDir(0), "runs")
	f.broker.Kill()
	asked := startAction(t, conn, "echo 2 > out")
	time.Sleep(2 * time.Second) // the outage
	f.broker.Start()
	wantOK(t, "what ran", runs)
	wantOK(t, "what was asked for", asked)
	awaitReady(t, f.api)
}

// drains: what runs at SIGTERM ends, and so does the worker, with status 0.
func (f *fleet) drains(t *testing.T, conn *grpc.ClientConn, worker *server) {
	runs := startAction(t, conn, "touch runs; sleep 1; echo 3 > out")
	waitForRoot(t, f.workerDir(0), "runs")
	if err := worker.Terminate(t.Context()); err != nil {
		t.Errorf("the worker ended with %v after SIGTERM", err)
	}
	wantOK(t, "what ran", runs)
}

// hurried: at the second signal a worker hands back what runs, and another has it
// at once, not when the lease lapses.
func (f *fleet) hurried(t *testing.T, conn *grpc.ClientConn) {
	hurried := f.worker(1)
	hurried.Start()
	runs := startAction(t, conn, "touch runs; until [ -e go ]; do sleep 0.05; done; echo 4 > out")
	waitForRoot(t, f.workerDir(1), "runs")
	other := f.worker(2)
	other.Start()
	awaitReady(t, other)
	_ = hurried.cmd.Process.Signal(syscall.SIGTERM)
	// Two signals at once may be taken for one.
	awaitNews(t, func() bool { return strings.Contains(hurried.log.String(), "shutting down") }, "the worker does not shut down")
	time.Sleep(500 * time.Millisecond) // nor is one that comes with the first
	if err := hurried.Terminate(t.Context()); err != nil {
		t.Errorf("the worker ended with %v after the second signal", err)
	}
	root := waitForRoot(t, f.workerDir(2), "runs")
	if err := os.WriteFile(filepath.Join(root, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wantOK(t, "what was handed back", runs)
}
