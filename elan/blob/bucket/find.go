package bucket

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/mettle-build/mettle/elan/digest"
)

// FindMissing implements blob.Finder: one request for each BatchSize of distinct
// digests, MaxRequests at once, and those whose answer was a passing failure
// again. Where one can't be answered, all fails.
func (s *Store) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	distinct := make([]digest.Digest, 0, len(ds))
	seen := make(map[digest.Digest]struct{}, len(ds))
	for _, d := range ds {
		if err := s.check(ctx, d); err != nil {
			return nil, fmt.Errorf("find blob %s: %w", d, err)
		}
		if _, again := seen[d]; !again && !d.IsEmpty() {
			seen[d] = struct{}{}
			distinct = append(distinct, d)
		}
	}
	there := make([]bool, len(distinct))
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(s.o.MaxRequests)
	for from := 0; from < len(distinct) && groupCtx.Err() == nil; from += s.driver.BatchSize {
		to := min(from+s.driver.BatchSize, len(distinct))
		group.Go(func() error { return s.find(groupCtx, distinct[from:to], there[from:to]) })
	}
	err := group.Wait()
	if ctx.Err() != nil {
		err = ctx.Err() // the loop may have ended early without an error
	}
	if err != nil {
		return nil, fmt.Errorf("find %d blobs: %w", len(distinct), err)
	}
	var missing []digest.Digest
	for i, d := range distinct {
		if !there[i] {
			missing = append(missing, d)
		}
	}
	return missing, nil
}

// find says of each of ds, at most BatchSize, whether it is there.
func (s *Store) find(ctx context.Context, ds []digest.Digest, there []bool) error {
	names := make([]string, len(ds))
	for i, d := range ds {
		names[i] = s.blobName(d)
	}
	stats, err := s.stat(ctx, names)
	if err != nil {
		return err
	}
	for i, d := range ds {
		there[i] = s.usable(stats[i], d)
	}
	return nil
}

// stat returns what the bucket knows of the names, at most BatchSize, with no
// Err in it.
func (s *Store) stat(ctx context.Context, names []string) ([]Stat, error) {
	stats := make([]Stat, len(names))
	open := make([]int, len(names)) // of names without an answer
	for i := range open {
		open[i] = i
	}
	err := s.try(ctx, "stat", func(ctx context.Context) error {
		ask := make([]string, len(open))
		for i, n := range open {
			ask[i] = names[n]
		}
		answers := s.driver.Stat(ctx, ask)
		var failed error // for good, or for now
		again := open[:0]
		for i, n := range open {
			stats[n] = answers[i]
			if err := answers[i].Err; err != nil {
				again = append(again, n)
				if failed == nil || !transient(err) {
					failed = err
				}
			}
		}
		open = again
		return failed
	})
	if err != nil {
		return nil, err
	}
	return stats, nil
}

// statOne is stat for one name.
func (s *Store) statOne(ctx context.Context, name string) (Stat, error) {
	stats, err := s.stat(ctx, []string{name})
	if err != nil {
		return Stat{}, err
	}
	return stats[0], nil
}
