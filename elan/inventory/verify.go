package inventory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// DefaultBytesPerSecond is the rate of Verify where nobody says: a tenth of what
// one core hashes, so that builds hardly feel it, and 4 TiB a day.
const DefaultBytesPerSecond = 50 << 20

// progressEvery is how often Verify tells how far it is.
const progressEvery = time.Second

// VerifyOptions are those of Verify.
type VerifyOptions struct {
	// Digests are the blobs to verify. None: all that are listed.
	Digests []digest.Digest
	// BytesPerSecond bounds the rate, over more than one blob. 0:
	// DefaultBytesPerSecond.
	BytesPerSecond int64
}

// Progress is how far a Verify is.
type Progress struct {
	// Blobs and Bytes are what was verified so far, with what had findings.
	Blobs, Bytes int64
	// Finding is what is wrong with the last of them; nil if nothing is.
	Finding *Finding
}

// Finding is something wrong with one blob.
type Finding struct {
	Digest digest.Digest
	// Err wraps blob.ErrCorrupt, blob.ErrNotFound, or says why the blob can't
	// be read.
	Err error
}

// Verify implements Surveyor. A store that is a blob.Checker is asked to check
// itself, and sets aside what is corrupt; of another the blobs are read, which
// starts their lifetimes anew. That a listed blob is gone when its turn comes is
// no finding.
func (l *Local) Verify(ctx context.Context, o VerifyOptions) iter.Seq2[Progress, error] {
	return func(yield func(Progress, error) bool) {
		v := &verification{rate: o.BytesPerSecond, check: l.read, start: time.Now()}
		if v.rate <= 0 {
			v.rate = DefaultBytesPerSecond
		}
		if c, ok := blob.As[blob.Checker](l.store); ok {
			v.check = c.Check
		}
		v.told = v.start
		more := func(p Progress) error {
			if !yield(p, nil) {
				return errEnough
			}
			return nil
		}
		var err error
		if len(o.Digests) > 0 {
			err = v.each(ctx, o.Digests, more)
		} else {
			err = v.all(ctx, l.Blobs(ctx, Filter{}), more)
		}
		if !errors.Is(err, errEnough) {
			yield(v.done, err)
		}
	}
}

// errEnough says that nobody wants to hear more.
var errEnough = errors.New("enough")

// read compares the bytes of d with it.
func (l *Local) read(ctx context.Context, d digest.Digest) error {
	r, err := l.store.Open(ctx, d, 0)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // opened for reading
	if _, err := io.Copy(io.Discard, digest.NewVerifier(r, d)); err != nil {
		return fmt.Errorf("read blob %s: %w", d, err)
	}
	return nil
}

// verification is a Verify that is going on.
type verification struct {
	check func(context.Context, digest.Digest) error
	rate  int64 // bytes a second
	start time.Time
	told  time.Time
	done  Progress // without a finding
}

// each verifies ds.
func (v *verification) each(ctx context.Context, ds []digest.Digest, more func(Progress) error) error {
	for _, d := range ds {
		if err := v.one(ctx, d, more); err != nil {
			return err
		}
	}
	return nil
}

// all verifies what is listed.
func (v *verification) all(ctx context.Context, list iter.Seq2[blob.Info, error], more func(Progress) error) error {
	for i, err := range list {
		if err != nil {
			return err
		}
		if err := v.one(ctx, i.Digest, func(p Progress) error {
			if p.Finding != nil && errors.Is(p.Finding.Err, blob.ErrNotFound) {
				return nil // evicted since it was listed
			}
			return more(p)
		}); err != nil {
			return err
		}
	}
	return nil
}

// one verifies d, at the rate. The error is that of more, or one that concerns
// more than d.
func (v *verification) one(ctx context.Context, d digest.Digest, more func(Progress) error) error {
	if err := v.pace(ctx); err != nil {
		return err
	}
	err := v.check(ctx, d)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, blob.ErrUnavailable) {
		return err
	}
	v.done.Blobs++
	v.done.Bytes += d.Size()
	if err != nil {
		p := v.done
		p.Finding = &Finding{Digest: d, Err: err}
		return more(p)
	}
	if time.Since(v.told) < progressEvery {
		return nil
	}
	v.told = time.Now()
	return more(v.done)
}

// pace waits until what was read so far is within the rate.
func (v *verification) pace(ctx context.Context) error {
	// In floating point: the product of bytes and nanoseconds overflows.
	due := v.start.Add(time.Duration(float64(v.done.Bytes) / float64(v.rate) * float64(time.Second)))
	wait := time.Until(due)
	if wait <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func isUnsupported(err error) bool { return errors.Is(err, ErrUnsupported) }
