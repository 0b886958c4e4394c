package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/inventory"
)

// lsCmd lists what is in a store.
type lsCmd struct {
	target  `embed:""`
	Actions bool `help:"List the entries of the ActionCache: the action's digest, the bytes of its result, the last use, the instance name. --instance lists those of one instance." env:"-"`

	Function  string        `help:"List those of this digest function only, such as sha256." env:"-"`
	MinSize   flags.Size    `help:"List those of this size or more, as in 1MiB." env:"-"`
	MaxSize   flags.Size    `help:"List those of this size or less; 0: all." env:"-"`
	OlderThan time.Duration `help:"List those that were last used longer ago than this, as in 24h." env:"-"`
	NewerThan time.Duration `help:"List those that were last used since." env:"-"`

	JSON bool `name:"json" help:"Print a JSON object a line, with digest, size_bytes, stored_bytes, last_use and, of entries, instance_name." env:"-"`
}

// Help is shown by --help.
func (c *lsCmd) Help() string {
	return "Prints a line a blob, of fields with a tab between: the digest, the size, what it takes in the store, and when it was last used ('-' where that is not known). The order means nothing."
}

// Run lists.
func (c *lsCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) error {
	f, err := c.filter(time.Now())
	if err != nil {
		return err
	}
	buffered := bufio.NewWriter(out)
	p := &listPrinter{w: buffered, json: c.JSON}
	return c.with(ctx, log, func(o *opened) error {
		if c.Actions {
			for i, err := range o.inv.Entries(ctx, f) {
				if err == nil {
					err = p.entry(i)
				}
				if err != nil {
					return errors.Join(err, buffered.Flush())
				}
			}
			return buffered.Flush()
		}
		for i, err := range o.inv.Blobs(ctx, f) {
			if err == nil {
				err = p.blob(i)
			}
			if err != nil {
				return errors.Join(err, buffered.Flush())
			}
		}
		return buffered.Flush()
	})
}

func (c *lsCmd) filter(now time.Time) (inventory.Filter, error) {
	f := inventory.Filter{MinBytes: int64(c.MinSize), MaxBytes: int64(c.MaxSize)}
	if c.Function != "" {
		fn, err := functionNamed(c.Function)
		if err != nil {
			return f, err
		}
		f.Function = fn
	}
	if c.OlderThan > 0 {
		f.UsedBefore = now.Add(-c.OlderThan)
	}
	if c.NewerThan > 0 {
		f.UsedSince = now.Add(-c.NewerThan)
	}
	if c.Instance != "" {
		f.Instance = &c.Instance
	}
	return f, nil
}

// functionNamed is the digest function of a flag.
func functionNamed(name string) (digest.Function, error) {
	fn, ok := digest.FunctionNamed(name)
	if !ok {
		return fn, fmt.Errorf("--function=%s: want one of %v", name, digest.Functions())
	}
	return fn, nil
}

// listPrinter prints blobs and entries, one a line.
type listPrinter struct {
	w    io.Writer
	json bool
}

// listed is a line as JSON. Fields may come to it, and none changes.
type listed struct {
	Digest      string     `json:"digest"` // of the blob, or of the action
	SizeBytes   int64      `json:"size_bytes"`
	StoredBytes int64      `json:"stored_bytes"`
	LastUse     *time.Time `json:"last_use,omitempty"`
	Instance    *string    `json:"instance_name,omitempty"` // of entries alone
}

func (p *listPrinter) blob(i blob.Info) error {
	if p.json {
		return p.object(listed{Digest: i.Digest.String(), SizeBytes: i.Digest.Size(), StoredBytes: i.StoredBytes}, i.LastUse)
	}
	_, err := fmt.Fprintf(p.w, "%s\t%d\t%d\t%s\n", i.Digest, i.Digest.Size(), i.StoredBytes, timeText(i.LastUse))
	return err
}

func (p *listPrinter) entry(i blob.EntryInfo) error {
	if p.json {
		return p.object(listed{Digest: i.Key.Action.String(), SizeBytes: i.Bytes, StoredBytes: i.Bytes, Instance: &i.Key.Instance}, i.LastUse)
	}
	_, err := fmt.Fprintf(p.w, "%s\t%d\t%s\t%s\n", i.Key.Action, i.Bytes, timeText(i.LastUse), instanceText(i.Key.Instance))
	return err
}

func (p *listPrinter) object(l listed, lastUse time.Time) error {
	if !lastUse.IsZero() {
		utc := lastUse.UTC()
		l.LastUse = &utc
	}
	return json.NewEncoder(p.w).Encode(l)
}

// timeText is t for people and for sort.
func timeText(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

// instanceText is an instance name as one word.
func instanceText(name string) string {
	if q := strconv.Quote(name); name == "" || q != `"`+name+`"` {
		return q
	}
	return name
}
