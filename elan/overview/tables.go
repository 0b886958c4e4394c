package overview

import (
	"context"
	"fmt"
	"time"

	"github.com/mettle-build/mettle/elan/flags"
	"github.com/mettle-build/mettle/metrics"
)

// Pages are what the HTTP port serves: /storage.json.
func (o *Overview) Pages() []metrics.Page {
	return []metrics.Page{{Path: "/storage.json", Note: "these figures for programs", Handler: o}}
}

// Tables is a Storage for people, for the index page of the HTTP port.
func (o *Overview) Tables(context.Context) ([]metrics.Table, error) {
	s, err := o.Storage()
	if err != nil {
		return nil, err
	}
	asked := metrics.Table{Title: "What is asked for", Rows: []metrics.Row{
		{Name: "Blobs read", Value: s.CASReads.text()},
		{Name: "Action results looked up", Value: s.ActionCache.text()},
	}}
	if n := s.DroppedResultsTotal; n > 0 {
		asked.Rows = append(asked.Rows, metrics.Row{Name: "Results dropped", Value: count(n), Note: "blobs of theirs were gone"})
	}
	var tables []metrics.Table
	if !o.storesOnly {
		tables = append(tables, asked)
	}
	for _, store := range s.Stores {
		tables = append(tables, store.table())
	}
	return tables, nil
}

func (h Hits) text() string {
	text := "none yet"
	if h.Ratio != nil {
		text = fmt.Sprintf("%.1f %% there, of %s", 100**h.Ratio, count(h.Hits+h.Misses))
	}
	if h.Errors > 0 {
		text += fmt.Sprintf("; %s failed", count(h.Errors))
	}
	return text
}

func (s Store) table() metrics.Table {
	t := metrics.Table{Title: "Store " + s.Name}
	row := func(name, value, note string) {
		t.Rows = append(t.Rows, metrics.Row{Name: name, Value: value, Note: note})
	}
	if s.UsedBytes != nil {
		text, note := flags.Bytes(*s.UsedBytes), ""
		if s.MaxBytes != nil && *s.MaxBytes > 0 {
			text += " of " + flags.Bytes(*s.MaxBytes)
			note = fmt.Sprintf("%.0f %%", 100*float64(*s.UsedBytes)/float64(*s.MaxBytes))
		}
		row("Used", text, note)
	}
	if s.FreeDiskBytes != nil {
		row("Free on its disk", flags.Bytes(*s.FreeDiskBytes), "")
	}
	if s.Objects != nil {
		row("Blobs and results", "about "+count(*s.Objects), "")
	}
	if s.Reads != nil {
		row("Blobs read", s.Reads.text(), "")
	}
	if s.BucketRequestsTotal != nil {
		row("Requests to the bucket", count(*s.BucketRequestsTotal), "")
	}
	if s.EvictedTotal != nil && s.EvictedBytesTotal != nil {
		row("Evicted", fmt.Sprintf("%s, %s", count(*s.EvictedTotal), flags.Bytes(*s.EvictedBytesTotal)), "")
	}
	s.lifetime(row)
	if s.RefusedWritesTotal != nil {
		row("Writes refused", count(*s.RefusedWritesTotal), "for want of room")
	}
	if s.CorruptTotal != nil {
		row("Found corrupt", count(*s.CorruptTotal), "set aside, and missing since")
	}
	if s.LastScrubAt != nil {
		row("All verified", s.LastScrubAt.Format(time.RFC3339), "")
	}
	return t
}

// lifetime tells of the lifetime contract.
func (s Store) lifetime(row func(name, value, note string)) {
	if s.MinLifetimeSeconds == nil {
		return
	}
	row("Lifetime promised", duration(*s.MinLifetimeSeconds), "after each use")
	youngest := s.YoungestEvictedAgeSeconds
	switch {
	case youngest == nil:
		row("Youngest evicted", "nothing was", "")
	case *youngest < *s.MinLifetimeSeconds:
		row("Youngest evicted", duration(*youngest)+" unused", "the contract is BROKEN")
	default:
		row("Youngest evicted", duration(*youngest)+" unused", "the contract is kept")
	}
	if s.EvictionAgeSeconds != nil {
		row("Evicted last", duration(*s.EvictionAgeSeconds)+" unused", "what the store's size is good for")
	}
}

func duration(seconds float64) string {
	return time.Duration(seconds * float64(time.Second)).Round(time.Second).String()
}

// count is n with its thousands apart.
func count(n int64) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
