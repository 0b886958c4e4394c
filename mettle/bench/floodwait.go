package bench

import (
	"context"
	"fmt"
	"io"

	longrunningpb "cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
)

// Floods of Executes, none of which the workers get done: what waits is the
// server's.

const (
	// slowCommand is longer than a measurement, and ends by itself where the server
	// leaves it running.
	slowCommand = "sleep 300"
	// slowBatch is how many Actions are uploaded at once.
	slowBatch = 500
)

// holdExecute has each op execute an action that is unlike the others', and slow,
// and follow it.
func holdExecute(actions int) func(context.Context, *client) (op, error) {
	return func(ctx context.Context, c *client) (op, error) {
		all, err := c.slowActions(ctx, actions)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, n uint64) error {
			_, err := c.operation(ctx, all[n%uint64(len(all))])
			return err
		}, nil
	}
}

// holdWaitExecution is holdExecute of a client that hangs up once it knows the
// operation's name, and then waits for that.
func holdWaitExecution(actions int) func(context.Context, *client) (op, error) {
	return func(ctx context.Context, c *client) (op, error) {
		all, err := c.slowActions(ctx, actions)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, n uint64) error {
			name, err := c.begin(ctx, all[n%uint64(len(all))])
			if err != nil {
				return err
			}
			s, err := c.exec.WaitExecution(ctx, &repb.WaitExecutionRequest{Name: name})
			if err != nil {
				return fmt.Errorf("WaitExecution: %w", err)
			}
			return toEnd(s)
		}, nil
	}
}

// begin executes an action, and returns the operation's name. Nobody waits for it
// any more then.
func (c *client) begin(ctx context.Context, action digest.Digest) (name string, err error) {
	ctx, hangUp := context.WithCancel(ctx)
	defer hangUp()
	s, err := c.exec.Execute(ctx, &repb.ExecuteRequest{InstanceName: c.instance, DigestFunction: c.fn.Proto(), ActionDigest: action.Proto()})
	if err != nil {
		return "", fmt.Errorf("execute: %w", err)
	}
	first, err := s.Recv()
	if err != nil {
		return "", fmt.Errorf("execute: %w", err)
	}
	return first.GetName(), nil
}

// toEnd receives until the operation is done.
func toEnd(s interface {
	Recv() (*longrunningpb.Operation, error)
},
) error {
	for {
		switch o, err := s.Recv(); {
		case err == io.EOF: //nolint:errorlint // gRPC's own, as it is
			return answerError("WaitExecution: the stream ended before the operation was done")
		case err != nil:
			return fmt.Errorf("WaitExecution: %w", err)
		case o.GetDone():
			return nil
		}
	}
}

// slowActions uploads n different Actions that take long.
func (c *client) slowActions(ctx context.Context, n int) ([]digest.Digest, error) {
	if err := c.needExecution(); err != nil {
		return nil, err
	}
	root, err := c.message(&repb.Directory{})
	if err != nil {
		return nil, err
	}
	all := make([]digest.Digest, 0, n)
	batch := []content{root}
	salt := newSalt()
	for i := range uint64(n) { //nolint:gosec // not negative
		a, cmd, err := c.action(&repb.Command{
			Arguments:            []string{"/bin/sh", "-c", slowCommand},
			EnvironmentVariables: append(saltEnv(salt, i), &repb.Command_EnvironmentVariable{Name: "PATH", Value: "/usr/bin:/bin"}),
		}, root.digest)
		if err != nil {
			return nil, err
		}
		all = append(all, a.digest)
		if batch = append(batch, a, cmd); len(batch) >= slowBatch || len(all) == n {
			if err := c.upload(ctx, batch...); err != nil {
				return nil, err
			}
			batch = batch[:0]
		}
	}
	return all, nil
}

// prepareGoodExecute is prepareGood of a client that also executes an action whose
// result is there already.
func prepareGoodExecute(ctx context.Context, c *client) (op, error) {
	blobs, err := prepareGood(ctx, c)
	if err != nil {
		return nil, err
	}
	cached, err := prepareCached(ctx, c)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, n uint64) error {
		if err := blobs(ctx, n); err != nil {
			return err
		}
		return cached(ctx, n)
	}, nil
}
