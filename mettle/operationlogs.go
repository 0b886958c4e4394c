package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/mettle/operation"
)

type operationLogsCmd struct {
	Name string `arg:"" help:"The name of the operation, as list prints it and clients log it."`
}

// Help is shown by --help.
func (c *operationLogsCmd) Help() string {
	return "Prints what the action prints, as it comes, until it has ended: its stdout to stdout, its stderr to stderr. What an action prints in its first second comes when that is over. Of one that has ended, it prints what the result has. It begins no work, and ends none."
}

const (
	// askEvery is how often the operation is asked for.
	askEvery = 300 * time.Millisecond
	// streamGrace is how long after the operation's end its streams may go on.
	streamGrace = 5 * time.Second
)

// Run follows an operation.
func (c *operationLogsCmd) Run(ctx context.Context, out io.Writer, parent *operationsCmd) error {
	name, err := operation.ParseName(c.Name)
	if err != nil {
		return err
	}
	conn, err := parent.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing was written
	storage, err := client.New(client.Options{Conn: conn, Instance: name.Instance})
	if err != nil {
		return err
	}
	w := &watcher{ops: longrunningpb.NewOperationsClient(conn), storage: storage, fn: name.Action.Function()}
	w.stdout = &followed{logs: storage.LogStreams(), to: out}
	w.stderr = &followed{logs: storage.LogStreams(), to: os.Stderr}
	return said(w.watch(ctx, c.Name))
}

// watcher follows one operation.
type watcher struct {
	ops            longrunningpb.OperationsClient
	storage        *client.Client
	fn             digest.Function
	stdout, stderr *followed
}

func (w *watcher) watch(ctx context.Context, name string) error {
	defer w.stdout.stop()
	defer w.stderr.stop()
	for {
		op, err := w.ops.GetOperation(ctx, &longrunningpb.GetOperationRequest{Name: name})
		if err != nil {
			return err
		}
		md := &repb.ExecuteOperationMetadata{}
		if err := op.GetMetadata().UnmarshalTo(md); err != nil {
			return fmt.Errorf("the operation's metadata: %w", err)
		}
		if md.GetStage() == repb.ExecutionStage_UNKNOWN {
			return errors.New("this server does not have the operation, and knows no result of it")
		}
		w.stdout.follow(ctx, md.GetStdoutStreamName())
		w.stderr.follow(ctx, md.GetStderrStreamName())
		if op.GetDone() {
			return w.end(ctx, op)
		}
		select {
		case <-time.After(askEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// end prints what the streams did not have, and says how it has ended.
func (w *watcher) end(ctx context.Context, op *longrunningpb.Operation) error {
	res := &repb.ExecuteResponse{}
	if err := op.GetResponse().UnmarshalTo(res); err != nil {
		return fmt.Errorf("the response: %w", err)
	}
	r := res.GetResult()
	for _, s := range []struct {
		name string
		f    *followed
		raw  []byte
		blob *repb.Digest
	}{{"stdout", w.stdout, r.GetStdoutRaw(), r.GetStdoutDigest()}, {"stderr", w.stderr, r.GetStderrRaw(), r.GetStderrDigest()}} {
		printed := s.f.wait(streamGrace)
		if err := w.rest(ctx, keptStream{name: s.name, to: s.f.to, raw: s.raw, blob: s.blob}, printed); err != nil {
			fmt.Fprintf(os.Stderr, "mettle: %s can't be shown to its end: %v\n", s.name, err)
		}
	}
	if st := res.GetStatus(); st.GetCode() != 0 {
		fmt.Fprintf(os.Stderr, "mettle: it ended with %s: %s\n", codes.Code(st.GetCode()), flags.Plain(st.GetMessage())) //nolint:gosec // a status code
		return nil
	}
	fmt.Fprintf(os.Stderr, "mettle: the command ended with %d\n", r.GetExitCode())
	return nil
}

// rest prints what a stream of the result has from an offset on.
func (w *watcher) rest(ctx context.Context, s keptStream, offset int64) error {
	if len(s.raw) > 0 || s.blob == nil {
		_, err := s.to.Write(s.raw[min(offset, int64(len(s.raw))):])
		return err
	}
	d, err := digest.FromProto(w.fn, s.blob)
	if err != nil || offset >= d.Size() {
		return err
	}
	r, err := w.storage.Open(ctx, d, offset)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // opened for reading
	_, err = io.Copy(s.to, r)
	return err
}

// followed is stdout or stderr of an operation.
type followed struct {
	logs client.LogStreams
	to   io.Writer

	name    string // of the stream
	cancel  context.CancelFunc
	done    chan struct{} // closed when nothing more is printed
	printed int64         // valid when done is closed
}

// follow follows the stream of that name, if it does not yet; another attempt of the
// action has another one.
func (f *followed) follow(ctx context.Context, name string) {
	if name == "" || name == f.name {
		return
	}
	f.stop()
	if f.name != "" {
		fmt.Fprintln(os.Stderr, "mettle: what follows is from the beginning: the action runs again, or the storage has lost what it had of it")
	}
	f.name, f.printed, f.done = name, 0, make(chan struct{})
	ctx, f.cancel = context.WithCancel(ctx)
	go func() {
		defer close(f.done)
		f.print(ctx, name)
	}()
}

// print prints a stream, and goes on where the server comes back. Where it fails in
// another way, the result has the rest.
func (f *followed) print(ctx context.Context, name string) {
	for {
		err := f.logs.Follow(ctx, name, f.printed, func(p []byte) error {
			n, err := f.to.Write(p)
			f.printed += int64(n)
			return err
		})
		if !errors.Is(err, blob.ErrUnavailable) {
			return
		}
		select {
		case <-time.After(askEvery):
		case <-ctx.Done():
			return
		}
	}
}

// stop ends what follow has begun.
func (f *followed) stop() {
	if f.done != nil {
		f.cancel()
		<-f.done
	}
}

// wait waits for the stream's end, but not for long, and returns how much of it was
// printed.
func (f *followed) wait(grace time.Duration) int64 {
	if f.done == nil {
		return 0
	}
	late := time.NewTimer(grace)
	defer late.Stop()
	select {
	case <-f.done:
	case <-late.C:
	}
	f.stop()
	return f.printed
}
