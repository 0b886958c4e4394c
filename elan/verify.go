package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/inventory"
)

// logEvery is how often a long verification tells how far it is.
const logEvery = 30 * time.Second

// verifyCmd compares blobs with their digests.
type verifyCmd struct {
	target          `embed:""`
	optionalDigests `embed:""`
	Rate            flags.Size `help:"How many bytes a second are read at most." default:"50MiB" env:"-"`
}

// optionalDigests are digestArgs that may be none.
type optionalDigests struct {
	Digests []string `arg:"" optional:"" name:"digest" help:"The digests to verify; '-' reads them from the standard input. None: all of the store."`
}

// Help is shown by --help.
func (c *verifyCmd) Help() string {
	return "Prints a line for each finding: corrupt, missing or unreadable, the digest, and why, with tabs between. A local store sets aside what is corrupt, so that it is missing from then on. Ends with 1 if there were findings."
}

// Run verifies.
func (c *verifyCmd) Run(ctx context.Context, in io.Reader, out io.Writer, log *slog.Logger) error {
	args := digestArgs{Digests: c.Digests}
	ds, err := args.parse(in)
	if err != nil {
		return err
	}
	if len(ds) == 0 && len(args.Digests) > 0 {
		return nil // an empty list on the standard input is not all
	}
	return c.with(ctx, log, func(o *opened) error {
		if len(ds) > 0 {
			if ds, err = c.locate(ctx, o.inv, ds); err != nil {
				return err
			}
		}
		return c.verify(ctx, o.inv, ds, printFindings(out, log))
	})
}

// verify reports to found, and returns an Exit where there are findings.
func (c *verifyCmd) verify(ctx context.Context, inv inventory.Inventory, ds []digest.Digest, found func(inventory.Progress) error) error {
	findings := 0
	for p, err := range inv.Verify(ctx, inventory.VerifyOptions{Digests: ds, BytesPerSecond: int64(c.Rate)}) {
		if err == nil {
			err = found(p)
		}
		if err != nil {
			return err
		}
		if p.Finding != nil {
			findings++
		}
	}
	if findings > 0 {
		return flags.Exit(flags.ExitFailed)
	}
	return nil
}

// printFindings prints findings to out and, now and then, progress to the log.
func printFindings(out io.Writer, log *slog.Logger) func(inventory.Progress) error {
	told := time.Now()
	return func(p inventory.Progress) error {
		if p.Finding != nil {
			_, err := fmt.Fprintf(out, "%s\t%s\t%v\n", findingName(p.Finding.Err), p.Finding.Digest, p.Finding.Err)
			return err
		}
		if time.Since(told) >= logEvery {
			told = time.Now()
			log.Info("verifying", "blobs", p.Blobs, "bytes", flags.Bytes(p.Bytes))
		}
		return nil
	}
}

func findingName(err error) string {
	switch {
	case errors.Is(err, blob.ErrCorrupt):
		return "corrupt"
	case errors.Is(err, blob.ErrNotFound):
		return "missing"
	}
	return "unreadable"
}
