package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"text/tabwriter"
	"time"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/mettle/operation"
)

// operationsCmd looks at the operations of an API server, and cancels some.
type operationsCmd struct {
	Remote string `aliases:"api" env:"METTLE_REMOTE,METTLE_API" help:"The API server, HOST:PORT, with grpcs:// before it for TLS. --api is an older name of it." default:"localhost:7778" placeholder:"HOST:PORT"`
	flags.Caller

	List   listOperationsCmd   `cmd:"" default:"withargs" help:"List what the server's clients wait for, and what has ended in the last minutes."`
	Get    getOperationCmd     `cmd:"" help:"Show one operation, and its end if it has ended."`
	Logs   operationLogsCmd    `cmd:"" help:"Print what an action prints, as it comes."`
	Cancel cancelOperationsCmd `cmd:"" help:"Cancel operations, on whichever API server their clients wait. An action that others wait for too goes on."`
}

// with calls f with a client of the server.
func (c *operationsCmd) with(ctx context.Context, f func(longrunningpb.OperationsClient) error) error {
	conn, err := c.dial(ctx)
	if err != nil {
		return err
	}
	err = f(longrunningpb.NewOperationsClient(conn))
	return errors.Join(said(err), conn.Close())
}

// dial connects to the server.
func (c *operationsCmd) dial(ctx context.Context) (*grpc.ClientConn, error) {
	addr, opts, err := c.Dial(c.Remote, nil)
	if err != nil {
		return nil, fmt.Errorf("--remote: %w", err)
	}
	conn, err := client.Dial(ctx, addr, opts...)
	if err != nil {
		return nil, fmt.Errorf("%w (is an API server running there? --remote names another)", err)
	}
	return conn, nil
}

// said is what the server said where err is its status.
func said(err error) error {
	if s, ok := status.FromError(err); ok && s.Code() != codes.OK {
		return fmt.Errorf("%s (%s)", s.Message(), s.Code())
	}
	return err
}

type listOperationsCmd struct {
	Stage    string  `help:"List those of this stage only." enum:",queued,executing,completed" default:"" env:"-"`
	Instance *string `help:"List those of this instance name only; that may be empty." env:"-"`
}

// Help is shown by --help.
func (c *listOperationsCmd) Help() string {
	return "Prints a line an operation, the oldest first: its stage, how long ago the client asked, the worker that runs it ('-': none), and its name, which has the digest of the action and the instance name in it."
}

// Run lists.
func (c *listOperationsCmd) Run(ctx context.Context, out io.Writer, parent *operationsCmd) error {
	req := &longrunningpb.ListOperationsRequest{Name: "operations", PageSize: 1000}
	if c.Stage != "" {
		req.Filter = "stage=" + c.Stage
	}
	if c.Instance != nil {
		req.Name = *c.Instance + "/operations"
	}
	return parent.with(ctx, func(ops longrunningpb.OperationsClient) error {
		w := tabwriter.NewWriter(flags.PlainWriter(out), 0, 0, 2, ' ', 0) // clients choose their instances
		for op, err := range pages(ctx, ops, req) {
			if err != nil {
				return errors.Join(err, w.Flush())
			}
			s := summaryOf(op)
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", s.stage, s.age, s.worker, op.GetName())
		}
		return w.Flush()
	})
}

// pages are the operations of all pages, or the error after which there are none.
func pages(ctx context.Context, ops longrunningpb.OperationsClient, req *longrunningpb.ListOperationsRequest) iter.Seq2[*longrunningpb.Operation, error] {
	return func(yield func(*longrunningpb.Operation, error) bool) {
		for {
			page, err := ops.ListOperations(ctx, req)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, op := range page.GetOperations() {
				if !yield(op, nil) {
					return
				}
			}
			if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
				return
			}
		}
	}
}

// summary is what an operation tells, for people.
type summary struct{ stage, age, worker string }

func summaryOf(op *longrunningpb.Operation) summary {
	s := summary{stage: "unknown", age: "-", worker: "-"}
	md := &repb.ExecuteOperationMetadata{}
	if op.GetMetadata().UnmarshalTo(md) == nil {
		s.stage = strings.ToLower(md.GetStage().String())
		if w := md.GetPartialExecutionMetadata().GetWorker(); w != "" {
			s.worker = w
		}
	}
	if n, err := operation.ParseName(op.GetName()); err == nil {
		s.age = time.Since(n.Created).Round(time.Second).String()
	}
	return s
}

type getOperationCmd struct {
	Name string `arg:"" help:"The name of the operation, as list prints it and clients log it."`
}

// Run shows an operation.
func (c *getOperationCmd) Run(ctx context.Context, out io.Writer, parent *operationsCmd) error {
	return parent.with(ctx, func(ops longrunningpb.OperationsClient) error {
		op, err := ops.GetOperation(ctx, &longrunningpb.GetOperationRequest{Name: c.Name})
		if err != nil {
			return err
		}
		out = flags.PlainWriter(out)
		s := summaryOf(op)
		fmt.Fprintf(out, "stage   %s\nage     %s\nworker  %s\n", s.stage, s.age, s.worker)
		if n, err := operation.ParseName(op.GetName()); err == nil {
			fmt.Fprintf(out, "action  %s\ninstance_name  %q\n", n.Action, n.Instance)
		}
		if !op.GetDone() {
			return nil
		}
		res := &repb.ExecuteResponse{}
		if err := op.GetResponse().UnmarshalTo(res); err != nil {
			return fmt.Errorf("the response: %w", err)
		}
		if st := res.GetStatus(); st.GetCode() != 0 {
			fmt.Fprintf(out, "status  %s: %s\n", codes.Code(st.GetCode()), why(res)) //nolint:gosec // a status code
		}
		if r := res.GetResult(); r != nil {
			fmt.Fprintf(out, "exit_code  %d\ncached_result  %v\n", r.GetExitCode(), res.GetCachedResult())
		}
		return nil
	})
}

type cancelOperationsCmd struct {
	Names []string `arg:"" help:"The names of the operations."`
}

// Run cancels operations: all of them, also where one can't be.
func (c *cancelOperationsCmd) Run(ctx context.Context, parent *operationsCmd) error {
	return parent.with(ctx, func(ops longrunningpb.OperationsClient) error {
		var errs []error
		for _, name := range c.Names {
			if _, err := ops.CancelOperation(ctx, &longrunningpb.CancelOperationRequest{Name: name}); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", name, said(err)))
			}
		}
		return errors.Join(errs...)
	})
}
