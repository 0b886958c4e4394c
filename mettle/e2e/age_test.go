package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
)

// dials counts the connections that were made, and those that are open.
type dials struct{ made, open atomic.Int64 }

// dialed tells when it is closed, once.
type dialed struct {
	net.Conn
	closed func()
}

// Close implements net.Conn.
func (c *dialed) Close() error {
	c.closed()
	return c.Conn.Close()
}

// dial connects.
func (d *dials) dial(ctx context.Context, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	d.made.Add(1)
	d.open.Add(1)
	return &dialed{conn, sync.OnceFunc(func() { d.open.Add(-1) })}, nil
}

// An Execute, a WaitExecution and an upload that outlive --max_connection_age go on
// to their ends over the connection that they began on, while new calls go over
// another one.
func TestDual_connectionAge(t *testing.T) {
	s := startDual(t, storeDir(t), "--slots=1", "--max_connection_age=1s", "--max_connection_age_grace=1h")
	var d dials
	conn, err := grpc.NewClient("passthrough:///"+s.Addr(), grpc.WithContextDialer(d.dial), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	store, err := client.New(client.Options{Conn: conn})
	if err != nil {
		t.Fatal(err)
	}
	mark := fmt.Sprintf("86397.%d", os.Getpid())
	action := putAction(t, store, "sleep "+mark+"; echo ended")
	execution := begin(t, conn, &repb.ExecuteRequest{ActionDigest: action.Proto()})
	wait, err := repb.NewExecutionClient(conn).WaitExecution(t.Context(), &repb.WaitExecutionRequest{Name: execution.name})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := wait.Recv(); err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("it takes its time "), 10_000)
	sum := digest.Of(digest.SHA256, data)
	upload, err := bspb.NewByteStreamClient(conn).Write(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	half := len(data) / 2
	name := "uploads/8f9a2c1e-0000-4000-8000-000000000001/blobs/" + sum.String()
	if err := upload.Send(&bspb.WriteRequest{ResourceName: name, Data: data[:half]}); err != nil {
		t.Fatal(err)
	}
	first := d.made.Load()
	poll(t, "a new call to go over a new connection", func() bool {
		if _, err := repb.NewCapabilitiesClient(conn).GetCapabilities(t.Context(), &repb.GetCapabilitiesRequest{}); err != nil {
			t.Fatalf("a new call: %v", err)
		}
		return d.made.Load() > first
	})
	if err := upload.Send(&bspb.WriteRequest{WriteOffset: int64(half), Data: data[half:], FinishWrite: true}); err != nil {
		t.Fatal(err)
	}
	if r, err := upload.CloseAndRecv(); err != nil || r.GetCommittedSize() != int64(len(data)) {
		t.Errorf("the upload ended with %v, %v", r, err)
	}
	if got, err := blob.ReadAll(t.Context(), store, sum, int64(len(data))); err != nil || !bytes.Equal(got, data) {
		t.Errorf("what was uploaded: %d bytes, %v", len(got), err)
	}
	poll(t, "the action to run", func() bool { return len(running(t, mark)) > 0 })
	endProcesses(t, mark)
	for what, b := range map[string]*begun{"Execute": execution, "WaitExecution": {execution.name, wait}} {
		if res := b.end(t); res.GetStatus().GetCode() != 0 || string(res.GetResult().GetStdoutRaw()) != "ended\n" {
			t.Errorf("%s ended with %v", what, res)
		}
	}
	poll(t, "the first connection to be closed", func() bool { return d.open.Load() <= 1 })
}

// endProcesses ends those that have mark as their first argument.
func endProcesses(t *testing.T, mark string) {
	t.Helper()
	for _, path := range running(t, mark) {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			t.Errorf("kill %d: %v", pid, err)
		}
	}
}
