package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/tool"
)

// errNeedsDir says that a tree can't be printed.
var errNeedsDir = errors.New("--tree makes a directory: name one, as in elan get --tree DIGEST DIR")

// putCmd puts files in.
type putCmd struct {
	target   `embed:""`
	Function string   `help:"The digest function: sha256, blake3, sha1, ..." default:"sha256" env:"-"`
	Paths    []string `arg:"" name:"path" help:"Files, directories, or '-' for the standard input."`
}

// Help is shown by --help.
func (c *putCmd) Help() string {
	return "Prints a line for each path: its digest, a tab, and the path. A directory becomes Directories, as the input root of an action, and its digest is that of the root; times and modes but for the executable bit are not kept."
}

// Run puts.
func (c *putCmd) Run(ctx context.Context, in io.Reader, out io.Writer, log *slog.Logger) error {
	fn, err := functionNamed(c.Function)
	if err != nil {
		return err
	}
	return c.with(ctx, log, func(o *opened) error {
		for _, path := range c.Paths {
			var d digest.Digest
			var err error
			if path == "-" {
				d, err = tool.PutStream(ctx, o.store, fn, in)
			} else {
				d, err = tool.Put(ctx, o.store, fn, path)
			}
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(out, "%s\t%s\n", d, path); err != nil {
				return err
			}
		}
		return nil
	})
}
