package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/mettle-build/mettle/mettle/bench"
)

// benchCmd measures a server, or with the subject fleet, API servers that it
// starts itself; see package bench for what the figures mean.
type benchCmd struct {
	bench.Options `embed:""`

	Queue   string `help:"Of the subject fleet: the broker at which API servers and workers meet, as nats://HOST:4222/PREFIX; nothing of the prefix may be in use. Default: one API server with the queue in its memory." placeholder:"URL"`
	Servers []int  `name:"servers" default:"1" help:"Of the subject fleet: how many API servers there are, one measurement each."`
	Workers int    `name:"workers" help:"Of the subject fleet: how many simulated workers there are. Default: 20000, or 64 at a broker."`
}

// Help is what kong shows below the flags' own help.
func (c *benchCmd) Help() string {
	return "The subject fleet, alone, starts API servers of its own with workers that run nothing, and measures what is left: idle workers, jobs a second, and the hand-off from a job's publication to its lease."
}

const fleetSubject = "fleet"

// Validate is called by kong, before Run.
func (c *benchCmd) Validate() error {
	switch {
	case !slices.Contains(c.Subjects, fleetSubject):
		if c.Queue != "" || c.Workers != 0 {
			return errors.New("--queue and --workers belong to the subject fleet")
		}
		return nil
	case len(c.Subjects) > 1:
		return errors.New("the subject fleet starts servers of its own and is measured alone")
	case c.Queue == "" && !slices.Equal(c.Servers, []int{1}):
		return errors.New("--servers: several API servers need a --queue at which they meet")
	case c.Workers < 0 || c.Workers > 100_000:
		return fmt.Errorf("--workers: %d is not between 1 and 100000", c.Workers)
	}
	for _, n := range c.Servers {
		if n < 1 || n > 64 {
			return fmt.Errorf("--servers: %d is not between 1 and 64", n)
		}
	}
	return nil
}

// Run measures until done or until ctx is.
func (c *benchCmd) Run(ctx context.Context, out io.Writer) error {
	defer ballast()()
	c.Out, c.Progress = out, os.Stderr
	if !slices.Contains(c.Subjects, fleetSubject) {
		return bench.Run(ctx, c.Options)
	}
	f := benchFleet{queue: c.Queue, workers: c.Workers}
	if f.workers == 0 {
		f.workers = 20_000
		if c.Queue != "" {
			f.workers = 64
		}
	}
	c.Subjects = nil
	return bench.Fleet(ctx, bench.FleetOptions{Options: c.Options, Servers: c.Servers, Start: f.start})
}
