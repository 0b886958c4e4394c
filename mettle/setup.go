package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/mettle-build/mettle/mettle/queue"
	"github.com/mettle-build/mettle/mettle/queue/open"
)

// setupCmd makes at a broker what a fleet needs there.
type setupCmd struct {
	queueFlags
	Pools []string `help:"The pools of workers, by commas, beside those that the URL names. Default: default." env:"-"`
}

// Validate is called by kong, before Run.
func (c *setupCmd) Validate() error { return c.check() }

// Run sets the broker up.
func (c *setupCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) error {
	pools := c.Pools
	if len(pools) == 0 {
		pools = []string{queue.DefaultPool}
	}
	if err := c.url.Setup(ctx, open.Options{Logger: log}, pools); err != nil {
		return fmt.Errorf("queue %s: %w", c.url, err)
	}
	fmt.Fprintf(out, "The queue %s is set up, with pools %s.\n", c.url, strings.Join(pools, ", "))
	return nil
}
