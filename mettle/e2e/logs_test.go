package e2e_test

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/client"
)

// streamsOf waits until the client of an action is told where to read what it prints.
func (b *begun) streamsOf(t *testing.T) (stdout, stderr string) {
	t.Helper()
	for {
		op, err := b.stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		md := &repb.ExecuteOperationMetadata{}
		if err := op.GetMetadata().UnmarshalTo(md); err != nil {
			t.Fatal(err)
		}
		if op.GetDone() {
			t.Fatalf("it has ended, and there was nothing to follow: %v", op)
		}
		if md.GetStdoutStreamName() != "" && md.GetStderrStreamName() != "" {
			return md.GetStdoutStreamName(), md.GetStderrStreamName()
		}
	}
}

// checkLive runs an action that does not end before its client has read the first
// line that it prints: dir is that of the dual or worker where it runs.
func checkLive(t *testing.T, s *server, conn *grpc.ClientConn, dir string) {
	t.Helper()
	store, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	logs := store.LogStreams()
	a := begin(t, conn, &repb.ExecuteRequest{ActionDigest: putAction(t, store,
		"echo one; echo oh >&2; touch live; until [ -e read ]; do sleep 0.05; done; for i in 2 3 4; do echo line $i; sleep 0.2; done; echo ah >&2",
	).Proto()})
	stdout, stderr := a.streamsOf(t)
	// A person looks on.
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	person := exec.CommandContext(ctx, binary(t, "mettle"), "operations", "logs", a.name, "--api="+s.Addr())
	out, err := person.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := person.Start(); err != nil {
		t.Fatal(err)
	}
	sees := bufio.NewScanner(out)
	if !sees.Scan() || sees.Text() != "one" {
		t.Errorf("mettle operations logs prints %q, %v", sees.Text(), sees.Err())
	}
	const want = "one\nline 2\nline 3\nline 4\n"
	got := ""
	if err := logs.Follow(ctx, stdout, 0, func(p []byte) error {
		if got += string(p); got == "one\n" {
			root := waitForRoot(t, dir, "live")
			return os.WriteFile(filepath.Join(root, "read"), nil, 0o644) //nolint:gosec // for the action's user
		}
		return nil
	}); err != nil || got != want {
		t.Errorf("the client read %q, %v, want %q", got, err, want)
	}
	res := a.end(t)
	if string(res.GetResult().GetStdoutRaw()) != want || string(res.GetResult().GetStderrRaw()) != "oh\nah\n" {
		t.Errorf("the result is %v", res)
	}
	// It is there for those who come late, too.
	for name, want := range map[string]string{stdout: want[4:], stderr: "ah\n"} {
		got, from := "", int64(4)
		if name == stderr {
			from = 3
		}
		if err := logs.Follow(ctx, name, from, func(p []byte) error { got += string(p); return nil }); err != nil || got != want {
			t.Errorf("%s read afterwards: %q, %v, want %q", name, got, err, want)
		}
	}
	saw := "one\n"
	for sees.Scan() {
		saw += sees.Text() + "\n"
	}
	if err := person.Wait(); err != nil || saw != want {
		t.Errorf("mettle operations logs printed %q, %v", saw, err)
	}
	again := s.run(t, "operations", "logs", a.name)
	for _, part := range []string{want, "oh\nah\n", "ended with 0"} {
		if !strings.Contains(again, part) {
			t.Errorf("mettle operations logs, afterwards, without %q:\n%s", part, again)
		}
	}
}

// A client reads what an action prints before the action ends.
func TestDual_liveLogs(t *testing.T) {
	dir := storeDir(t)
	s := startDual(t, dir)
	conn, err := client.Dial(t.Context(), s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	checkLive(t, s, conn, dir)
}

// So it does in a fleet, through an API server.
func TestFleet_liveLogs(t *testing.T) {
	f := newFleet(t)
	f.broker.Start()
	f.elan.Start()
	f.api.Start()
	w := f.worker(0)
	w.Start()
	awaitReady(t, f.api)
	awaitReady(t, w)
	conn, err := client.Dial(t.Context(), f.api.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	checkLive(t, f.api, conn, f.workerDir(0))
	// Who only looks on does not keep a server from ending.
	store, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	a := begin(t, conn, &repb.ExecuteRequest{ActionDigest: putAction(t, store, "echo one; echo oh >&2; sleep 1000").Proto()})
	stdout, _ := a.streamsOf(t)
	read := make(chan struct{}, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- store.LogStreams().Follow(t.Context(), stdout, 0, func([]byte) error { read <- struct{}{}; return nil })
	}()
	<-read
	if err := f.api.Terminate(t.Context()); err != nil {
		t.Errorf("the API server ended with %v", err)
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "shuts down") {
		t.Errorf("who read the log was told %v", err)
	}
}

// A worker that is killed takes nobody for a ride: who reads what its action printed
// is not told that this was all, and what the action prints on the next worker is in
// streams of its own.
func TestFleet_liveLogs_workerKilled(t *testing.T) {
	f := newFleet(t)
	f.queueFlag += "?lease=5s"
	f.api.args[1] = f.queueFlag
	f.broker.Start()
	f.elan.Start()
	f.api.Start()
	killed, next := f.worker(0), f.worker(1)
	killed.Start()
	awaitReady(t, f.api)
	awaitReady(t, killed)
	conn, err := client.Dial(t.Context(), f.api.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	store, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	logs := store.LogStreams()
	a := begin(t, conn, &repb.ExecuteRequest{ActionDigest: putAction(t, store,
		"echo one; echo oh >&2; touch live; until [ -e go ]; do sleep 0.05; done; echo two",
	).Proto()})
	first, _ := a.streamsOf(t)
	read := make(chan struct{}, 1)
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		ended <- logs.Follow(ctx, first, 0, func([]byte) error { read <- struct{}{}; return nil })
	}()
	<-read
	killed.Kill()
	next.Start()
	second, _ := a.streamsOf(t)
	for second == first {
		second, _ = a.streamsOf(t)
	}
	got := ""
	if err := logs.Follow(t.Context(), second, 0, func(p []byte) error {
		if got += string(p); got == "one\n" {
			return os.WriteFile(filepath.Join(waitForRoot(t, f.workerDir(1), "live"), "go"), nil, 0o644) //nolint:gosec // for the action's user
		}
		return nil
	}); err != nil || got != "one\ntwo\n" {
		t.Errorf("on the next worker: %q, %v", got, err)
	}
	if res := a.end(t); string(res.GetResult().GetStdoutRaw()) != "one\ntwo\n" {
		t.Errorf("the result is %v", res)
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("the stream of the killed worker has ended as if it were complete")
	}
}
