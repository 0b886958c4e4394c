package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/elan/inventory"
)

// duCmd adds up what is in a store.
type duCmd struct {
	target `embed:""`
	JSON   bool `name:"json" help:"Print a JSON object a line for each combination of entries, digest_function, from_bytes and from_age_seconds (-1: not known), with count, bytes and stored_bytes." env:"-"`
}

// Help is shown by --help.
func (c *duCmd) Help() string {
	return "Adds up blobs and entries of the ActionCache, by digest function, by size, and by the time since the last use."
}

// Run adds up.
func (c *duCmd) Run(ctx context.Context, out io.Writer, log *slog.Logger) error {
	return c.with(ctx, log, func(o *opened) error {
		u, err := o.inv.Usage(ctx)
		if err != nil {
			return err
		}
		if c.JSON {
			return usageJSON(out, u)
		}
		return usageTables(out, u)
	})
}

// usageClass is a line of JSON. Fields may come to it, and none changes.
type usageClass struct {
	Entries        bool   `json:"entries" env:"-"`
	DigestFunction string `json:"digest_function" env:"-"`
	FromBytes      int64  `json:"from_bytes"`
	FromAgeSeconds int64  `json:"from_age_seconds"`
	Count          int64  `json:"count"`
	Bytes          int64  `json:"bytes"`
	StoredBytes    int64  `json:"stored_bytes"`
}

func usageJSON(out io.Writer, u inventory.Usage) error {
	buffered := bufio.NewWriter(out)
	e := json.NewEncoder(buffered)
	for _, r := range u.By(func(c inventory.Class) inventory.Class { return c }) {
		age := int64(r.FromAge / time.Second)
		if r.FromAge == inventory.AgeUnknown {
			age = -1
		}
		if err := e.Encode(usageClass{
			Entries: r.Entries, DigestFunction: r.Function.String(), FromBytes: r.FromBytes, FromAgeSeconds: age,
			Count: r.Count, Bytes: r.Bytes, StoredBytes: r.StoredBytes,
		}); err != nil {
			return err
		}
	}
	return buffered.Flush()
}

// usageTables prints one table for each way of adding up.
func usageTables(out io.Writer, u inventory.Usage) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	for i, t := range []struct {
		title string
		key   func(inventory.Class) inventory.Class
		name  func(inventory.Class) string
	}{
		{"ALL", func(c inventory.Class) inventory.Class { return inventory.Class{Entries: c.Entries} }, kindName},
		{"FUNCTION", func(c inventory.Class) inventory.Class {
			return inventory.Class{Entries: c.Entries, Function: c.Function}
		}, func(c inventory.Class) string { return kindName(c) + " " + c.Function.String() }},
		{"SIZE", func(c inventory.Class) inventory.Class {
			return inventory.Class{Entries: c.Entries, FromBytes: c.FromBytes}
		}, func(c inventory.Class) string { return kindName(c) + " from " + flags.Bytes(c.FromBytes) }},
		{"LAST USE", func(c inventory.Class) inventory.Class {
			return inventory.Class{Entries: c.Entries, FromAge: c.FromAge}
		}, func(c inventory.Class) string { return kindName(c) + " " + ageName(c.FromAge) }},
	} {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "COUNT\tBYTES\tSTORED\t%s%s\n", "  ", t.title)
		for _, r := range u.By(t.key) {
			fmt.Fprintf(w, "%d\t%s\t%s\t  %s\n", r.Count, flags.Bytes(r.Bytes), flags.Bytes(r.StoredBytes), t.name(r.Class))
		}
	}
	return w.Flush()
}

func kindName(c inventory.Class) string {
	if c.Entries {
		return "entries"
	}
	return "blobs"
}

func ageName(age time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case age == inventory.AgeUnknown:
		return "not known"
	case age == 0:
		return "within the hour"
	case age >= day:
		return fmt.Sprintf("%d days ago or more", age/day)
	}
	return strings.TrimSuffix(strings.TrimSuffix(age.String(), "0s"), "0m") + " ago or more"
}
