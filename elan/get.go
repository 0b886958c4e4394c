package main

import (
	"context"
	"io"
	"log/slog"

	"github.com/mettle-build/mettle/elan/tool"
)

// getCmd fetches a blob, or a tree of files.
type getCmd struct {
	target `embed:""`
	Tree   bool   `help:"The digest is of a Directory, or of the Tree of an output directory: make the directory OUT of it, with all that is below." env:"-"`
	Digest string `arg:"" help:"The digest, HASH/SIZE."`
	Out    string `arg:"" optional:"" help:"The file, or the directory, to make. '-', or nothing: the blob goes to the standard output." type:"path"`
}

// Help is shown by --help.
func (c *getCmd) Help() string {
	return "The bytes are verified. A file or a directory is made whole or not at all; what went to the standard output was wrong if the exit status is not 0."
}

// Validate is called by kong, before Run.
func (c *getCmd) Validate() error {
	if c.Tree && (c.Out == "" || c.Out == "-") {
		return errNeedsDir
	}
	return nil
}

// Run fetches.
func (c *getCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) error {
	d, err := tool.ParseDigest(c.Digest)
	if err != nil {
		return err
	}
	return c.with(ctx, log, func(o *opened) error {
		switch {
		case c.Tree:
			return tool.FetchTree(ctx, o.store, d, c.Out)
		case c.Out == "" || c.Out == "-":
			return tool.Copy(ctx, o.store, d, out)
		default:
			return tool.Fetch(ctx, o.store, d, c.Out)
		}
	})
}
