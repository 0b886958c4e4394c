package buckettest

import (
	"context"
	"errors"
	"strconv"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/bucket"
	"github.com/mettle-build/mettle/elan/digest"
)

// Costs measures the requests that each call makes, and fails the test where
// they are not the ones of the README: want is by the name of the call, and then
// by operation.
func Costs(t *testing.T, o Options, want map[string]map[string]int) {
	t.Helper()
	e, s := setUp(t, o, o.fast())
	small, large := random(smallSize), random(o.large())
	d, ld := digest.Of(digest.SHA256, small), digest.Of(digest.SHA256, large)
	k := blob.EntryKey{Action: d}
	var absent []digest.Digest
	for i := range 1000 {
		absent = append(absent, digest.Of(digest.SHA256, []byte(strconv.Itoa(i))))
	}
	find := func(ctx context.Context, s *bucket.Store, ds ...digest.Digest) error {
		_, err := s.FindMissing(ctx, ds)
		return err
	}
	for _, c := range []struct {
		name string
		call func(ctx context.Context) error
	}{
		{"find 1000", func(ctx context.Context) error { return find(ctx, s, absent...) }},
		{"put", func(ctx context.Context) error { return blob.ReceiveBytes(ctx, s, d, small) }},
		{"put again", func(ctx context.Context) error { return blob.ReceiveBytes(ctx, s, d, small) }},
		{"put 3 chunks", func(ctx context.Context) error { return blob.ReceiveBytes(ctx, s, ld, large) }},
		{"put 3 chunks again", func(ctx context.Context) error { return blob.ReceiveBytes(ctx, s, ld, large) }},
		{"read", func(ctx context.Context) error {
			_, err := blob.ReadAll(ctx, s, ld, ld.Size())
			return err
		}},
		{"put entry", func(ctx context.Context) error { return s.PutEntry(ctx, k, small) }},
		{"get entry", func(ctx context.Context) error {
			_, err := s.Entry(ctx, k)
			return err
		}},
		{"delete entry", func(ctx context.Context) error { return s.DeleteEntry(ctx, k) }},
		{"find 2 of last week", func(ctx context.Context) error {
			for _, d := range []digest.Digest{d, ld} {
				e.Age(t, d, 10*24*time.Hour)
			}
			s, err := e.New(t, o.fast())
			if err != nil {
				return err
			}
			// Close writes the uses.
			return errors.Join(find(ctx, s, d, ld), s.Close())
		}},
		{"read of last week", func(ctx context.Context) error {
			e.Age(t, d, 10*24*time.Hour)
			s, err := e.New(t, o.fast())
			if err != nil {
				return err
			}
			_, err = blob.ReadAll(ctx, s, d, d.Size())
			return errors.Join(err, s.Close())
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			e.Reset()
			if err := c.call(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantCounts(t, e, want[c.name])
		})
	}
}
