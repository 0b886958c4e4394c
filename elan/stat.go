package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/inventory"
	"github.com/mettle-build/mettle/elan/tool"
)

// statCmd tells of single blobs.
type statCmd struct {
	target     `embed:""`
	digestArgs `embed:""`
	Actions    bool   `help:"The digests are of actions: tell of their entries in the ActionCache, in the instance of --instance." env:"-"`
	As         string `help:"Say what the blobs mean: action, command, directory or tree; or result, that of the action with the digest, or failure, the last failed one." enum:",action,command,directory,tree,result,failure" default:"" env:"-"`
	JSON       bool   `name:"json" help:"Print JSON, as ls does." env:"-"`
}

// Help is shown by --help.
func (c *statCmd) Help() string {
	return "Prints a line for each that is there, as ls does, and ends with 1 if one is not. Of a server without administration only the digest and the size are known. Looking is no use: lifetimes stay as they are, but for --as, which reads, and for such servers."
}

// Run looks.
func (c *statCmd) Run(ctx context.Context, in io.Reader, out io.Writer, log *slog.Logger) error {
	ds, err := c.parse(in)
	if err != nil {
		return err
	}
	buffered := bufio.NewWriter(out)
	return c.with(ctx, log, func(o *opened) (err error) {
		defer func() { err = errors.Join(err, buffered.Flush()) }()
		if c.As != "" {
			return c.describe(ctx, o, ds, buffered)
		}
		p := &listPrinter{w: buffered, json: c.JSON}
		gone, err := c.stat(ctx, o, ds, p)
		if err != nil {
			return err
		}
		return absent(gone)
	})
}

// describe prints what ds mean, with an empty line between.
func (c *statCmd) describe(ctx context.Context, o *opened, ds []digest.Digest, w io.Writer) error {
	what := tool.Description{Kind: c.As, Instance: c.Instance}
	if c.As == "failure" {
		what.Kind, what.Instance = "result", action.FailedInstance(c.Instance)
	}
	for i, d := range ds {
		if i > 0 {
			fmt.Fprintln(w)
		}
		what.Digest = d
		if err := tool.Describe(ctx, w, o.store, o.results, what); err != nil {
			return err
		}
	}
	return nil
}

// stat prints what is there, and returns what is not.
func (c *statCmd) stat(ctx context.Context, o *opened, ds []digest.Digest, p *listPrinter) ([]digest.Digest, error) {
	there := map[digest.Digest]bool{}
	if c.Actions {
		infos, err := o.inv.StatEntries(ctx, c.keys(ds))
		if err != nil {
			return nil, err
		}
		for _, i := range infos {
			there[i.Key.Action] = true
			if err := p.entry(i); err != nil {
				return nil, err
			}
		}
		return absentOf(ds, there), nil
	}
	var infos []blob.Info
	ds, err := c.locate(ctx, o.inv, ds)
	if err == nil {
		infos, err = o.inv.Stat(ctx, ds)
	}
	if errors.Is(err, inventory.ErrUnsupported) {
		infos, err = findOnly(ctx, o.store, ds)
	}
	if err != nil {
		return nil, err
	}
	for _, i := range infos {
		there[i.Digest] = true
		if err := p.blob(i); err != nil {
			return nil, err
		}
	}
	return absentOf(ds, there), nil
}

// findOnly is Stat of a server that knows the Remote Execution API alone.
func findOnly(ctx context.Context, s blob.Finder, ds []digest.Digest) ([]blob.Info, error) {
	missing, err := s.FindMissing(ctx, ds)
	if err != nil {
		return nil, err
	}
	gone := make(map[digest.Digest]bool, len(missing))
	for _, d := range missing {
		gone[d] = true
	}
	var infos []blob.Info
	for _, d := range ds {
		if !gone[d] {
			infos = append(infos, blob.Info{Digest: d})
		}
	}
	return infos, nil
}

func absentOf(ds []digest.Digest, there map[digest.Digest]bool) (gone []digest.Digest) {
	for _, d := range ds {
		if !there[d] {
			gone = append(gone, d)
		}
	}
	return gone
}
