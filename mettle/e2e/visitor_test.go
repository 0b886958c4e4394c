package e2e_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
)

// A visitor is a client of a city that takes no call of the storage twice, so that it
// sees each one that fails, and resumes executions whose streams are cut.
type visitor struct {
	city   *city
	conn   *grpc.ClientConn
	client *client.Client
	end    context.CancelFunc
	ended  chan struct{} // then what follows is its caller's

	visits, resumed int
	failures        []error
}

// startVisitor begins to visit the city until stop.
func startVisitor(c *city) *visitor {
	c.t.Helper()
	conn, err := client.Dial(c.t.Context(), c.front.Addr())
	if err != nil {
		c.t.Fatal(err)
	}
	v := &visitor{city: c, conn: conn, ended: make(chan struct{})}
	if v.client, err = client.New(client.Options{Conn: conn, Instance: ownInstance}); err != nil {
		c.t.Fatal(err)
	}
	ctx, end := context.WithCancel(c.t.Context())
	v.end = end
	go func() {
		defer close(v.ended)
		for ctx.Err() == nil && len(v.failures) < 10 {
			v.visits++
			// What has begun is ended.
			if err := v.visit(context.WithoutCancel(ctx)); err != nil {
				v.failures = append(v.failures, fmt.Errorf("visit %d: %w", v.visits, err))
			}
		}
	}()
	return v
}

// stop ends the last visit, and fails the test where any call has failed.
func (v *visitor) stop(t *testing.T) {
	t.Helper()
	v.end()
	<-v.ended
	for _, err := range v.failures {
		t.Error(err)
	}
	if err := v.conn.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("%d visits of a client that takes no call of the storage twice, %d of its executions were resumed", v.visits, v.resumed)
}

// visit puts a blob, finds it, reads it, and runs an action that leaves a mark.
func (v *visitor) visit(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	text := fmt.Sprintf("visit %d of %x", v.visits, rand.Uint64()) //nolint:gosec // no secret
	d, err := blob.PutBytes(ctx, v.client, digest.SHA256, []byte(text))
	if err != nil {
		return err
	}
	if missing, err := v.client.FindMissing(ctx, []digest.Digest{d}); err != nil || len(missing) > 0 {
		return fmt.Errorf("missing %v: %w", missing, err)
	}
	if got, err := blob.ReadAll(ctx, v.client, d, 1<<10); err != nil || string(got) != text {
		return fmt.Errorf("read %q: %w", got, err)
	}
	script := fmt.Sprintf("mktemp -p %s visit%d.XXXXXXXX > /dev/null; echo %s > out", v.city.marks, v.visits, text)
	action, err := v.put(ctx, script)
	if err != nil {
		return err
	}
	return v.run(ctx, action)
}

// put stores an action of a script.
func (v *visitor) put(ctx context.Context, script string) (digest.Digest, error) {
	command, err := blob.PutMessage(ctx, v.client, digest.SHA256, &repb.Command{Arguments: []string{"/bin/sh", "-c", script}, OutputPaths: []string{"out"}})
	if err != nil {
		return digest.Digest{}, err
	}
	root, err := blob.PutMessage(ctx, v.client, digest.SHA256, &repb.Directory{})
	if err != nil {
		return digest.Digest{}, err
	}
	return blob.PutMessage(ctx, v.client, digest.SHA256, &repb.Action{CommandDigest: command.Proto(), InputRootDigest: root.Proto()})
}

// run executes an action, as often as its stream is cut.
func (v *visitor) run(ctx context.Context, action digest.Digest) error {
	execution, name := repb.NewExecutionClient(v.conn), ""
	for {
		stream, err := grpc.ServerStreamingClient[longrunningpb.Operation](nil), error(nil)
		if name == "" {
			stream, err = execution.Execute(ctx, &repb.ExecuteRequest{InstanceName: ownInstance, ActionDigest: action.Proto()})
		} else {
			v.resumed++
			stream, err = execution.WaitExecution(ctx, &repb.WaitExecutionRequest{Name: name})
		}
		for err == nil {
			var op *longrunningpb.Operation
			if op, err = stream.Recv(); err != nil {
				break
			}
			if name = op.GetName(); !op.GetDone() {
				continue
			}
			resp := &repb.ExecuteResponse{}
			if err := op.GetResponse().UnmarshalTo(resp); err != nil || resp.GetStatus().GetCode() != 0 || resp.GetResult().GetExitCode() != 0 {
				return fmt.Errorf("it ended with %v: %w", resp, err)
			}
			return nil
		}
		if status.Code(err) != codes.Unavailable {
			return fmt.Errorf("execution %q: %w", name, err)
		}
		time.Sleep(50 * time.Millisecond) // as clients do before they try again
	}
}
