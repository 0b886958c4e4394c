package main

import (
	"context"
	"errors"
	"io"
	"log/slog"

	"github.com/mettle-build/mettle/elan/digest"
)

// rmCmd takes out what a person wants to have gone.
type rmCmd struct {
	target     `embed:""`
	digestArgs `embed:""`
	Actions    bool `help:"The digests are of actions: remove their entries in the ActionCache, in the instance of --instance." env:"-"`
}

// Help is shown by --help.
func (c *rmCmd) Help() string {
	return "Removes at once and without asking, also what builds rely on; those may fail. Ends with 1 if one was not there."
}

// Run removes.
func (c *rmCmd) Run(ctx context.Context, in io.Reader, log *slog.Logger) error {
	ds, err := c.parse(in)
	if err != nil {
		return err
	}
	return c.with(ctx, log, func(o *opened) error {
		if !c.Actions {
			located, err := c.locate(ctx, o.inv, ds)
			if err != nil {
				return err
			}
			gone, err := o.inv.Remove(ctx, located)
			return errors.Join(err, absent(gone))
		}
		ks, err := o.inv.RemoveEntries(ctx, c.keys(ds))
		gone := make([]digest.Digest, len(ks))
		for i, k := range ks {
			gone[i] = k.Action
		}
		return errors.Join(err, absent(gone))
	})
}
