package inventory

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/mettle-build/mettle/elan/digest"
)

// Class is what blobs, or entries, that are added up together have in common.
type Class struct {
	Entries  bool // of the ActionCache; else blobs
	Function digest.Function
	// FromBytes is the least size in the class, in bytes: 0, 1 KiB, or a power
	// of 4 more, up to 1 GiB.
	FromBytes int64
	// FromAge is the least time since the last use: 0, an hour, 3 hours, a day, a
	// week or 30 days. Negative where the last use is not known.
	FromAge time.Duration
}

// Sum is what a class has.
type Sum struct {
	Count       int64
	Bytes       int64 // of the blobs, or of the entries' values
	StoredBytes int64 // what these take in the store, as far as it tells
}

// Usage is what is in a store, by classes. None is empty.
type Usage map[Class]Sum

// AgeUnknown is the FromAge of what has no known last use.
const AgeUnknown time.Duration = -1

// ages are the bounds of the classes of ages. The second and the third are what
// clients count on: builds of an hour, and Bazel's default of 3 hours.
//
//nolint:gochecknoglobals // an immutable table
var ages = []time.Duration{0, time.Hour, 3 * time.Hour, 24 * time.Hour, 7 * 24 * time.Hour, 30 * 24 * time.Hour}

// sizeClass is the FromBytes of a size.
func sizeClass(size int64) int64 {
	class := int64(0)
	for next := int64(1 << 10); next <= 1<<30 && size >= next; next *= 4 {
		class = next
	}
	return class
}

// ageClass is the FromAge of what was last used then. A use in the future, by
// another machine's clock, is one now.
func ageClass(now, lastUse time.Time) time.Duration {
	if lastUse.IsZero() {
		return AgeUnknown
	}
	class := time.Duration(0)
	for _, a := range ages {
		if now.Sub(lastUse) >= a {
			class = a
		}
	}
	return class
}

func (u Usage) add(c Class, s Sum) {
	t := u[c]
	u[c] = Sum{Count: t.Count + s.Count, Bytes: t.Bytes + s.Bytes, StoredBytes: t.StoredBytes + s.StoredBytes}
}

// Row is a line of a table.
type Row struct {
	Class
	Sum
}

// By adds up the classes that become the same by key, which leaves of a class
// what it is to be told apart by, and sorts them.
func (u Usage) By(key func(Class) Class) []Row {
	sums := Usage{}
	for c, s := range u {
		sums.add(key(c), s)
	}
	rows := make([]Row, 0, len(sums))
	for c, s := range sums {
		rows = append(rows, Row{Class: c, Sum: s})
	}
	slices.SortFunc(rows, func(a, b Row) int {
		entries := 0
		if a.Entries != b.Entries {
			entries = 1
			if b.Entries {
				entries = -1
			}
		}
		return cmp.Or(entries, cmp.Compare(a.Function, b.Function), cmp.Compare(a.FromBytes, b.FromBytes), cmp.Compare(a.FromAge, b.FromAge))
	})
	return rows
}

// Usage implements Surveyor, by listing everything. Entries are left out where
// the store can't list them.
func (l *Local) Usage(ctx context.Context) (Usage, error) {
	u, now := Usage{}, time.Now()
	for i, err := range l.Blobs(ctx, Filter{}) {
		if err != nil {
			return nil, err
		}
		size := i.Digest.Size()
		u.add(
			Class{Function: i.Digest.Function(), FromBytes: sizeClass(size), FromAge: ageClass(now, i.LastUse)},
			Sum{Count: 1, Bytes: size, StoredBytes: i.StoredBytes},
		)
	}
	for i, err := range l.Entries(ctx, Filter{}) {
		if isUnsupported(err) {
			break
		}
		if err != nil {
			return nil, err
		}
		u.add(
			Class{Entries: true, Function: i.Key.Action.Function(), FromBytes: sizeClass(i.Bytes), FromAge: ageClass(now, i.LastUse)},
			Sum{Count: 1, Bytes: i.Bytes, StoredBytes: i.Bytes},
		)
	}
	return u, nil
}
