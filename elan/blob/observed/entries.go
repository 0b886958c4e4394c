package observed

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mettle-build/mettle/elan/blob"
)

// Entries are entries that are observed. They are safe for concurrent use.
type Entries struct {
	inside                  blob.Entries
	entry, put, remove      call
	bytesRead, bytesWritten prometheus.Counter
}

var _ blob.Entries = (*Entries)(nil)

// Entries observes e under a name, which is that of its store.
func (ob *Observer) Entries(name string, e blob.Entries) *Entries {
	return &Entries{
		inside: e,
		entry:  ob.call(name, "entry"), put: ob.call(name, "put_entry"), remove: ob.call(name, "delete_entry"),
		bytesRead: ob.bytes.WithLabelValues(name, "read"), bytesWritten: ob.bytes.WithLabelValues(name, "written"),
	}
}

// Entry implements blob.Entries.
func (e *Entries) Entry(ctx context.Context, k blob.EntryKey) ([]byte, error) {
	start := time.Now()
	inside, span := e.entry.begin(ctx, k.Action)
	value, err := e.inside.Entry(inside, k)
	end(span, err)
	e.entry.done(ctx, k.Action, start, err)
	e.bytesRead.Add(float64(len(value)))
	return value, err //nolint:wrapcheck // the store's own
}

// PutEntry implements blob.Entries.
func (e *Entries) PutEntry(ctx context.Context, k blob.EntryKey, value []byte) error {
	start := time.Now()
	inside, span := e.put.begin(ctx, k.Action)
	err := e.inside.PutEntry(inside, k, value)
	end(span, err)
	e.put.done(ctx, k.Action, start, err)
	e.bytesWritten.Add(float64(len(value)))
	return err //nolint:wrapcheck // the store's own
}

// DeleteEntry implements blob.Entries.
func (e *Entries) DeleteEntry(ctx context.Context, k blob.EntryKey) error {
	start := time.Now()
	inside, span := e.remove.begin(ctx, k.Action)
	err := e.inside.DeleteEntry(inside, k)
	end(span, err)
	e.remove.done(ctx, k.Action, start, err)
	return err //nolint:wrapcheck // the store's own
}
