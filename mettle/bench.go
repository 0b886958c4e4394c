package main

import (
	"context"
	"io"
	"os"

	"github.com/mettle-build/mettle/mettle/bench"
)

// benchCmd measures a server; see package bench for what the figures mean.
type benchCmd struct {
	bench.Options `embed:""`
}

// Run measures until done or until ctx is.
func (c *benchCmd) Run(ctx context.Context, out io.Writer) error {
	c.Out, c.Progress = out, os.Stderr
	return bench.Run(ctx, c.Options)
}
