package tiered_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/blob/tiered"
	"github.com/mettle-build/mettle/elan/digest"
)

// Reading an upper copy keeps the authority's alive, by one question at most in
// each window.
func TestTouches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const lifetime, window = 2 * time.Hour, 30 * time.Minute
		low := newSpy(t)
		low.Store = newMem(t, mem.Options{MaxBytes: 2000, MinLifetime: lifetime + window})
		s, err := tiered.New(t.Context(), tiered.Options{
			Tiers:      []tiered.Tier{{Name: "up", Store: newSpy(t)}, {Name: "low", Store: low}},
			TouchEvery: window,
		})
		if err != nil {
			t.Fatal(err)
		}
		d := put(t, s, []byte("kept alive"))
		pressed := byte(0)
		for range 100 {
			time.Sleep(7 * time.Minute)
			wantRead(t, s, d, []byte("kept alive"))
			for range 9 { // evicts what may go
				pressed++
				_ = blob.ReceiveBytes(t.Context(), low.Store, digest.Of(digest.SHA256, []byte{pressed}), []byte{pressed})
			}
			if _, err := low.Stat(t.Context(), d); err != nil { // which is no use
				t.Fatalf("the authority lost what was in use: %v", err)
			}
		}
		time.Sleep(time.Second)
		// 700 minutes, in which one of five reads is passed on.
		if n := len(low.told()); n < 15 || n > 24 {
			t.Errorf("the authority was asked %d times in 700 minutes", n)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// What the last reader used is passed on before Close returns.
func TestTouches_atClose(t *testing.T) {
	up, low := newSpy(t), newSpy(t)
	s, err := tiered.New(t.Context(), tiered.Options{Tiers: []tiered.Tier{{Name: "up", Store: up}, {Name: "low", Store: low}}})
	if err != nil {
		t.Fatal(err)
	}
	d := put(t, up, []byte("x"))
	put(t, low, []byte("x"))
	wantRead(t, s, d, []byte("x"))
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if told := low.told(); len(told) != 1 || told[0] != d {
		t.Errorf("the authority was told of %v, want %v", told, d)
	}
}

// A reader may count on what it read, though the authority lost it.
func TestTouches_restore(t *testing.T) {
	for name, size := range sizes() {
		t.Run(name, func(t *testing.T) {
			v := newTwo(t, nil)
			data := blobtest.Random(1, size)
			d := put(t, v.up, data)
			v.low.fail(blob.ErrUnavailable, blobtest.OpFind)
			wantRead(t, v.s, d, data)
			await(t, func() bool { return v.low.count(blobtest.OpFind) == 1 })
			v.low.fail(nil)
			await(t, func() bool { // the failure is forgotten, and the next use passed on
				wantRead(t, v.s, d, data)
				return has(t, v.low.Store, d)
			})
		})
	}
}
