package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/metrics"
	"github.com/mettle-build/mettle/mettle/api"
	"github.com/mettle-build/mettle/mettle/noop"
	"github.com/mettle-build/mettle/mettle/platform"
	"github.com/mettle-build/mettle/mettle/queue"
	memqueue "github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/queue/open"
)

// noopCmd is a process of `mettle bench fleet`: an API server, as mettle api is
// one, over a storage in memory; or workers that run nothing; or both. It ends
// when its input does.
type noopCmd struct {
	Serve   bool   `help:"Serve an API server."`
	Workers int    `help:"How many workers there are."`
	Queue   string `help:"The broker; none: the queue is in this process."`
}

// Run says where it serves, and goes on until its input or ctx ends.
func (c *noopCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with the process, which is of no use without its input
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	q, err := c.open(ctx, log)
	if err != nil {
		return err
	}
	g, groupCtx := errgroup.WithContext(ctx)
	ready := "nowhere"
	if c.Serve {
		listener, err := flags.Listen(ctx, "127.0.0.1", 0, "--port")
		if err != nil {
			return errors.Join(err, q.Close())
		}
		ready = listener.Addr().String()
		if err := c.serve(groupCtx, g, listener, q); err != nil {
			return errors.Join(err, listener.Close(), q.Close())
		}
	}
	if c.Workers > 0 {
		g.Go(func() error { return noop.Run(groupCtx, q, c.Workers) })
	}
	fmt.Fprintln(out, readyPrefix+ready)
	return errors.Join(g.Wait(), q.Close())
}

func (c *noopCmd) open(ctx context.Context, log *slog.Logger) (queue.Broker, error) {
	if c.Queue == "" {
		return memqueue.New(memqueue.Options{Logger: log})
	}
	u, err := open.ParseURL(c.Queue)
	if err != nil {
		return nil, fmt.Errorf("--queue: %w", err)
	}
	q, err := u.Open(ctx, open.Options{Name: uniqueName(), Logger: log})
	if err != nil {
		return nil, err
	}
	for q.Ready(ctx) != nil {
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), q.Close())
		case <-time.After(50 * time.Millisecond):
		}
	}
	return q, nil
}

// serve wires an API server as dual does, and has g run it until ctx is done.
func (c *noopCmd) serve(ctx context.Context, g *errgroup.Group, listener net.Listener, q queue.Broker) error {
	registry := metrics.NewRegistry()
	store, err := mem.New(mem.Options{Registerer: registry})
	if err != nil {
		return err
	}
	actions, err := action.New(action.Options{Store: store, Entries: store, Registerer: registry})
	if err != nil {
		return err
	}
	platforms, err := platform.New(platform.Options{})
	if err != nil {
		return err
	}
	execution, err := api.New(api.Options{
		ID: uniqueName(), Store: store, Actions: actions, Jobs: noop.Stamped{Publisher: q}, Updates: q,
		Platforms: platforms, Registerer: registry,
	})
	if err != nil {
		return err
	}
	observed, err := metrics.NewRPC(metrics.RPCOptions{Prefix: "mettle", Registerer: registry})
	if err != nil {
		return err
	}
	server, health := rpc.NewServer(observed.ServerOptions()...)
	if err := rpc.Register(server, rpc.Options{Store: store, Actions: actions, Execution: execution.Capabilities(), Registerer: registry}); err != nil {
		return err
	}
	execution.Register(server)
	g.Go(func() error { return execution.Run(ctx) })
	g.Go(func() error {
		return rpc.Serve(ctx, server, rpc.ServeOptions{Listener: listener, Health: health, Drain: execution.Shutdown, Grace: time.Second})
	})
	return nil
}
