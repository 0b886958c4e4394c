package known

import (
	"context"
	"fmt"

	"github.com/mettle-build/mettle/elan/digest"
)

// FindMissing implements blob.Finder. The store is asked once, about what is not
// known. Where another call is asking about a blob already, this one waits for
// it, and believes that the blob is there, but not that it is missing: it may
// have come between the two questions.
func (s *Store) FindMissing(ctx context.Context, ds []digest.Digest) ([]digest.Digest, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("find blobs: %w", err)
	}
	var unknown []digest.Digest
	for _, d := range ds {
		if d.IsZero() {
			return nil, fmt.Errorf("find blobs: %w: a digest is absent", digest.ErrInvalid)
		}
		if !s.has(d) {
			unknown = append(unknown, d)
		}
	}
	s.byMemory.Add(float64(len(ds) - len(unknown)))
	if len(unknown) == 0 {
		return nil, nil
	}
	missing := make(map[digest.Digest]struct{})
	if err := s.find(ctx, unknown, missing); err != nil {
		return nil, err
	}
	var found []digest.Digest
	for _, d := range unknown {
		if _, ok := missing[d]; ok {
			found = append(found, d)
			delete(missing, d) // each once
		}
	}
	return found, nil
}

// find adds those of ds, which may be in it twice, to missing that are not there.
func (s *Store) find(ctx context.Context, ds []digest.Digest, missing map[digest.Digest]struct{}) error {
	ours, theirs, others := s.divide(ds)
	if err := s.ask(ctx, ours, missing); err != nil {
		return err
	}
	// Our own question is answered before we wait for anyone, so that no two
	// calls wait for each other.
	for _, c := range others {
		select {
		case <-c.done:
		case <-ctx.Done():
			return fmt.Errorf("find blobs: %w", ctx.Err())
		}
	}
	again := theirs[:0]
	for _, d := range theirs {
		if !s.has(d) {
			again = append(again, d)
		}
	}
	s.byMemory.Add(float64(len(theirs) - len(again)))
	return s.query(ctx, again, missing)
}

// divide parts ds, without those that are in it again, into what this call is to
// ask and what others are asking, and returns these others.
func (s *Store) divide(ds []digest.Digest) (ours *question, theirs []digest.Digest, others []*call) {
	ours = &question{call: call{done: make(chan struct{})}}
	s.mu.Lock()
	defer s.mu.Unlock()
	waited := make(map[*call]struct{})
	again := make(map[digest.Digest]struct{})
	for _, d := range ds {
		c, ok := s.asked[d]
		if !ok {
			s.asked[d] = &ours.call
			ours.ds = append(ours.ds, d)
			continue
		}
		if _, ok := again[d]; ok || c == &ours.call {
			continue
		}
		again[d] = struct{}{}
		theirs = append(theirs, d)
		if _, ok := waited[c]; !ok {
			waited[c] = struct{}{}
			others = append(others, c)
		}
	}
	return ours, theirs, others
}

// question is a call with what it asks about.
type question struct {
	call
	ds []digest.Digest
}

// ask is query for what others may wait for.
func (s *Store) ask(ctx context.Context, q *question, missing map[digest.Digest]struct{}) error {
	defer func() {
		s.mu.Lock()
		for _, d := range q.ds {
			delete(s.asked, d)
		}
		s.mu.Unlock()
		close(q.done)
	}()
	return s.query(ctx, q.ds, missing)
}

// query asks the store, and remembers what is there.
func (s *Store) query(ctx context.Context, ds []digest.Digest, missing map[digest.Digest]struct{}) error {
	if len(ds) == 0 {
		return nil
	}
	at := s.there.Now()
	s.byStore.Add(float64(len(ds)))
	absent, err := s.Store.FindMissing(ctx, ds)
	if err != nil {
		return err //nolint:wrapcheck // the store's own
	}
	for _, d := range absent {
		missing[d] = struct{}{}
	}
	for _, d := range ds {
		if _, ok := missing[d]; !ok {
			s.learn(d, at)
		}
	}
	return nil
}
