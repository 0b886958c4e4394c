package tiered_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/tiered"
)

// slowly yields the blob in pieces, a second each.
func slowly(piece int) func(io.Reader) io.Reader {
	return func(r io.Reader) io.Reader { return &slow{r: r, piece: piece} }
}

type slow struct {
	r     io.Reader
	piece int
}

func (s *slow) Read(p []byte) (int, error) {
	time.Sleep(time.Second)
	return s.r.Read(p[:min(len(p), s.piece)])
}

// Fifty ask for the same blob at once: it is fetched once. The first of them
// goes away, the second reads a byte and no more, and the others get all of it.
func TestFlight_shared(t *testing.T) {
	for name, size := range sizes() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v := &two{up: newSpy(t), low: newSpy(t)}
				s, err := tiered.New(t.Context(), tiered.Options{Tiers: []tiered.Tier{
					{Name: "up", Store: readable{v.up}}, {Name: "low", Store: bodied{v.low, slowly(size / 10)}},
				}})
				if err != nil {
					t.Fatal(err)
				}
				data := blobtest.Random(1, size)
				d := put(t, v.low, data)
				var wg sync.WaitGroup
				ctx, cancel := context.WithCancel(t.Context())
				wg.Go(func() {
					if _, err := blob.ReadAll(ctx, s, d, d.Size()); !errors.Is(err, context.Canceled) {
						t.Errorf("the first reader: %v, want Canceled", err)
					}
				})
				synctest.Wait()
				idle := make(chan struct{})
				wg.Go(func() {
					r, err := s.Open(t.Context(), d, 3)
					if err != nil {
						t.Error(err)
						return
					}
					_, err = r.Read(make([]byte, 1))
					<-idle
					rest, err2 := io.ReadAll(r)
					if err := errors.Join(err, err2, r.Close()); err != nil || !bytes.Equal(rest, data[4:]) {
						t.Errorf("the idle reader: %d bytes, error %v", len(rest), err)
					}
				})
				time.Sleep(2500 * time.Millisecond)
				cancel()
				var others sync.WaitGroup
				start := time.Now()
				for i := range 48 {
					others.Go(func() {
						time.Sleep(time.Duration(i) * 100 * time.Millisecond) // some come late
						wantRead(t, s, d, data)
					})
				}
				others.Wait()
				if took := time.Since(start); took > 20*time.Second {
					t.Errorf("the others took %v, for a fetch of some ten seconds", took)
				}
				if n := v.low.count(blobtest.OpOpen); n != 1 {
					t.Errorf("the authority was read %d times, want once", n)
				}
				close(idle)
				wg.Wait()
				if !has(t, v.up.Store, d) {
					t.Error("the blob did not come up")
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// Readers of a large blob get its beginning long before its end is there.
func TestFlight_streams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pieces = 100
		v := &two{up: newSpy(t), low: newSpy(t)}
		data := blobtest.Random(1, pieces<<18)
		s, err := tiered.New(t.Context(), tiered.Options{Tiers: []tiered.Tier{
			{Name: "up", Store: readable{v.up}}, {Name: "low", Store: bodied{v.low, slowly(1 << 18)}},
		}})
		if err != nil {
			t.Fatal(err)
		}
		d := put(t, v.low, data)
		for _, late := range []time.Duration{0, 50 * time.Second} {
			time.Sleep(late)
			start := time.Now()
			r, err := s.Open(t.Context(), d, 0)
			if err != nil {
				t.Fatal(err)
			}
			first := make([]byte, 1000)
			if _, err := io.ReadFull(r, first); err != nil || !bytes.Equal(first, data[:1000]) {
				t.Error(err)
			}
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("the first byte came after %v", took)
			}
			defer func() {
				rest, err := io.ReadAll(r)
				if err = errors.Join(err, r.Close()); err != nil || !bytes.Equal(rest, data[1000:]) {
					t.Errorf("%d bytes, error %v", len(rest), err)
				}
				_ = s.Close()
			}()
		}
		if n := v.low.count(blobtest.OpOpen); n != 1 {
			t.Errorf("the authority was read %d times, want once", n)
		}
	})
}

// When all readers have left, nothing is fetched for nobody.
func TestFlight_abandoned(t *testing.T) {
	for name, size := range sizes() {
		t.Run(name, func(t *testing.T) {
			v := newTwo(t, nil)
			data := blobtest.Random(1, size)
			d := put(t, v.low, data)
			ended := make(chan struct{}, 3) // one who comes late begins anew
			v.low.set(func(ctx context.Context, op blobtest.Op) error {
				if op != blobtest.OpOpen {
					return nil
				}
				<-ctx.Done()
				ended <- struct{}{}
				return ctx.Err()
			})
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					if _, err := blob.ReadAll(ctx, v.s, d, d.Size()); !errors.Is(err, context.Canceled) {
						t.Errorf("error %v, want Canceled", err)
					}
				})
			}
			await(t, func() bool { return v.low.count(blobtest.OpOpen) == 1 })
			cancel()
			wg.Wait()
			<-ended
			v.low.set(nil)
			wantRead(t, v.s, d, data)
		})
	}
}

// Where slow readers hold all memory, or all fills are under way, others read
// past them.
func TestFlight_bounded(t *testing.T) {
	for name, size := range sizes() {
		t.Run(name, func(t *testing.T) {
			v := newTwo(t, func(o *tiered.Options) {
				o.MaxFillBytes, o.MaxFills = int64(size)+10, 1
				o.Tiers[0].Store = newFile(t)
			})
			data, other := blobtest.Random(1, size), blobtest.Random(2, size)
			d, e := put(t, v.low, data), put(t, v.low, other)
			r, err := v.s.Open(t.Context(), d, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Read(make([]byte, 1)); err != nil {
				t.Error(err)
			}
			wantRead(t, v.s, e, other)
			wantRead(t, v.s, e, other)
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			opens := v.low.count(blobtest.OpOpen)
			await(t, func() bool { // what the first reader held is free
				wantRead(t, v.s, e, other)
				n := v.low.count(blobtest.OpOpen)
				was := opens
				opens = n
				return n == was
			})
		})
	}
}

// Close does not wait for a fetch that hangs.
func TestClose_inFlight(t *testing.T) {
	for name, size := range sizes() {
		t.Run(name, func(t *testing.T) {
			up, low := newSpy(t), newSpy(t)
			s, err := tiered.New(t.Context(), tiered.Options{Tiers: []tiered.Tier{{Name: "up", Store: up}, {Name: "low", Store: low}}})
			if err != nil {
				t.Fatal(err)
			}
			d := put(t, low, blobtest.Random(1, size))
			low.set(func(ctx context.Context, _ blobtest.Op) error { <-ctx.Done(); return ctx.Err() })
			done := make(chan struct{})
			go func() {
				defer close(done)
				wantErr(t, s, d, blob.ErrUnavailable)
			}()
			await(t, func() bool { return low.count(blobtest.OpOpen) == 1 })
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			<-done
		})
	}
}

func TestFlight_concurrent(t *testing.T) {
	v := newTwo(t, func(o *tiered.Options) {
		o.Tiers[0].MaxBlobBytes, o.Tiers[0].Trusted = tiered.WholeBytes, true
		o.Tiers = []tiered.Tier{o.Tiers[0], {Name: "disk", Store: newFile(t)}, o.Tiers[1]}
		o.MaxFillBytes = 3 << 20
	})
	var blobs [][]byte
	for i := range 12 {
		blobs = append(blobs, blobtest.Random(uint64(i), 1000+i*i*25_000))
		put(t, v.low, blobs[i])
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 25 {
				data := blobs[(i*7+g)%len(blobs)]
				d := put(t, discard{}, data)
				ctx, cancel := context.WithCancel(t.Context())
				off := int64((i * 331) % len(data))
				r, err := v.s.Open(ctx, d, off)
				if err != nil {
					t.Error(err)
					cancel()
					continue
				}
				if i%5 == g%5 { // goes away in the middle
					_, _ = io.CopyN(io.Discard, r, 500)
					cancel()
				} else if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data[off:]) {
					t.Errorf("%d bytes, error %v; want %d", len(got), err, len(data[off:]))
				}
				if i%9 == 0 {
					rm, _ := blob.As[blob.Remover](v.up)
					_ = rm.Remove(t.Context(), d)
				}
				_ = r.Close()
				cancel()
			}
		})
	}
	wg.Wait()
}
