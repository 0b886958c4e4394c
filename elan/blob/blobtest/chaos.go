package blobtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// ChaosOptions tell Chaos of the store.
type ChaosOptions struct {
	// Store is a store with a bound that is far below what is written within its
	// lifetime: 8 MiB. A quarter of that is what the clients use.
	Store blob.Store
	// Lifetime is that of the store: a second or so.
	Lifetime time.Duration
	// Restart ends the store, and opens it again over what it kept. Nobody calls
	// it meanwhile. nil: the store is not restarted.
	Restart func(s blob.Store) blob.Store
}

const (
	// ChaosEnv says for how long Chaos runs at least.
	ChaosEnv = "METTLE_TEST_CHAOS"
	// chaosFor is for how long without that.
	chaosFor = 4 * time.Second
	// chaosAtMost is how much longer it may take until something was evicted, on
	// a machine that is busy with other things.
	chaosAtMost  = time.Minute
	chaosClients = 6
	chaosWriters = 2
	// chaosHot is how many blobs and entries the clients use, all of them the same.
	chaosHot = 128
	// chaosBytes is the size of the largest, so that they all fit in the store.
	chaosBytes = 32 << 10
)

// Chaos proves the lifetime contract of a store: while writers fill it without
// end, clients put, find and read blobs and entries, hold references to them,
// and look whether they are there at any time within the lifetime. What is
// missing then fails the test; that writes are refused does not.
func Chaos(t *testing.T, o ChaosOptions) {
	t.Helper()
	length := chaosFor
	if s := os.Getenv(ChaosEnv); s != "" {
		var err error
		if length, err = time.ParseDuration(s); err != nil {
			t.Fatalf("%s: %v", ChaosEnv, err)
		}
	}
	c := &chaos{t: t, o: o, store: o.Store, end: make(chan struct{})}
	var all sync.WaitGroup
	for i := range chaosClients {
		all.Go(func() { (&client{c: c, r: rand.New(rand.NewPCG(1, uint64(i))), held: map[int]*reference{}}).run() }) //nolint:gosec // chaos need not be secure
	}
	for i := range chaosWriters {
		all.Go(func() { c.fill(uint64(i+1) << 40) })
	}
	if o.Restart != nil {
		all.Go(c.restart)
	}
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		ran := time.Since(begun)
		enough := c.evicted.Load() > 0 && c.inTime.Load() > 0
		if ran > length && enough || ran > length+chaosAtMost || c.broken.Load() > 0 {
			break
		}
	}
	close(c.end)
	all.Wait()
	t.Logf("%d blobs and entries written, %d writes refused, %d found missing after their lifetime; %d references looked for within it, %d after it; %d restarts",
		c.written.Load(), c.refused.Load(), c.evicted.Load(), c.inTime.Load(), c.late.Load(), c.restarts.Load())
	if c.evicted.Load() == 0 || c.inTime.Load() == 0 {
		t.Error("nothing was evicted, or nothing was looked for: this proves nothing")
	}
}

// chaos is what the clients share.
type chaos struct {
	t     *testing.T
	o     ChaosOptions
	mu    sync.RWMutex // held for reading by calls, for writing by restarts
	store blob.Store
	end   chan struct{}

	written, refused, evicted, inTime, late, restarts, broken atomic.Int64
}

func (c *chaos) ended() bool {
	select {
	case <-c.end:
		return true
	default:
		return false
	}
}

// call calls f with the store, and returns when that was begun, and f's error.
func (c *chaos) call(f func(s blob.Store) error) (begun time.Time, err error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	begun = time.Now()
	return begun, f(c.store)
}

func (c *chaos) restart() {
	for !c.ended() {
		time.Sleep(c.o.Lifetime + c.o.Lifetime/3) // so that it is not in step with the evictions
		c.mu.Lock()
		c.store = c.o.Restart(c.store)
		c.mu.Unlock()
		c.restarts.Add(1)
	}
}

// fill writes blobs that nobody asks for, but to see that they go.
func (c *chaos) fill(seed uint64) {
	r := rand.New(rand.NewPCG(2, seed)) //nolint:gosec // chaos need not be secure
	type old struct {
		d       digest.Digest
		written time.Time
	}
	var olds []old
	random := Random(seed, chaosBytes)
	for !c.ended() {
		seed++
		binary.BigEndian.PutUint64(random, seed)
		data := random[:8+r.IntN(chaosBytes-8)]
		d := digest.Of(digest.SHA256, data)
		begun, err := c.call(func(s blob.Store) error { return blob.ReceiveBytes(c.t.Context(), s, d, data) })
		c.count(err)
		switch {
		case err != nil:
			time.Sleep(time.Millisecond)
		case len(olds) < 100:
			olds = append(olds, old{d, begun})
		}
		// Looking for it would let it live on: only when it should be gone.
		if len(olds) > 0 && time.Since(olds[0].written) > 2*c.o.Lifetime {
			_, _ = c.call(func(s blob.Store) error {
				missing, err := s.FindMissing(c.t.Context(), []digest.Digest{olds[0].d})
				c.evicted.Add(int64(len(missing)))
				return err
			})
			olds = olds[1:]
		}
	}
}

// count counts a write, and reports whether it succeeded.
func (c *chaos) count(err error) bool {
	switch {
	case err == nil:
		c.written.Add(1)
	case errors.Is(err, blob.ErrFull):
		c.refused.Add(1)
	case !errors.Is(err, blob.ErrUnavailable): // "it was evicted while it was written again"
		c.fail("write: %v", err)
	}
	return err == nil
}

func (c *chaos) fail(format string, args ...any) {
	if c.broken.Add(1) <= 10 {
		c.t.Errorf(format, args...)
	}
}

// reference is what a client knows to be in the store.
type reference struct {
	used time.Time // the lifetime began then, or later
	due  time.Time // when to look for it
}

// client uses the hot blobs and entries, of which those with an odd number are
// entries, if the store keeps any.
type client struct {
	c    *chaos
	r    *rand.Rand
	held map[int]*reference
}

func (k *client) run() {
	for !k.c.ended() {
		if n := k.r.IntN(chaosHot); k.held[n] == nil {
			k.acquire(n)
		}
		for n, ref := range k.held {
			if !time.Now().Before(ref.due) {
				k.look(n, ref)
			}
		}
		time.Sleep(time.Millisecond)
	}
}

// hot is the n-th of the blobs and the values, and the digest of either.
func hot(n int) (digest.Digest, []byte) {
	data := Random(uint64(n), 1+n*chaosBytes/chaosHot) //nolint:gosec // not negative
	return digest.Of(digest.SHA256, data), data
}

func (k *client) isEntry(s blob.Store, n int) bool {
	_, ok := s.(blob.Entries)
	return ok && n%2 == 1
}

// acquire makes sure that n is there, as clients do: it is found, or written.
func (k *client) acquire(n int) {
	d, data := hot(n)
	begun, err := k.ask(n)
	if errors.Is(err, blob.ErrNotFound) {
		begun, err = k.c.call(func(s blob.Store) error {
			if k.isEntry(s, n) {
				return s.(blob.Entries).PutEntry(k.c.t.Context(), blob.EntryKey{Action: d}, data)
			}
			return blob.ReceiveBytes(k.c.t.Context(), s, d, data)
		})
		if !k.c.count(err) {
			return
		}
	}
	if err != nil {
		k.c.fail("ask for %d: %v", n, err)
		return
	}
	k.held[n] = &reference{}
	k.hold(n, begun)
}

// hold keeps a reference of which the lifetime began anew at used, and looks for
// it before its end, as often as not shortly before.
func (k *client) hold(n int, used time.Time) {
	share := k.r.Float64() * 0.95
	if k.r.IntN(2) == 0 {
		share = 0.85 + k.r.Float64()*0.1
	}
	*k.held[n] = reference{used: used, due: used.Add(time.Duration(share * float64(k.c.o.Lifetime)))}
}

// look asks for what was promised to be there.
func (k *client) look(n int, ref *reference) {
	begun, err := k.ask(n)
	// Only what was answered within the lifetime breaks the promise.
	age := time.Since(ref.used)
	inTime := age <= k.c.o.Lifetime
	if inTime {
		k.c.inTime.Add(1)
	} else {
		k.c.late.Add(1)
	}
	switch {
	case errors.Is(err, blob.ErrNotFound) && inTime:
		k.c.fail("%d is missing %v after its last use, within its lifetime of %v", n, age, k.c.o.Lifetime)
	case err != nil && !errors.Is(err, blob.ErrNotFound):
		k.c.fail("look for %d: %v", n, err)
	case err == nil && k.r.IntN(2) == 0:
		k.hold(n, begun)
		return
	}
	delete(k.held, n) // to be found, or written, by anybody
}

// ask finds out, in one of the ways that there are, whether n is there. If so,
// its lifetime begins anew.
func (k *client) ask(n int) (begun time.Time, err error) {
	ctx := k.c.t.Context()
	d, data := hot(n)
	return k.c.call(func(s blob.Store) error {
		switch {
		case k.isEntry(s, n):
			got, err := s.(blob.Entries).Entry(ctx, blob.EntryKey{Action: d})
			if err == nil && !bytes.Equal(got, data) {
				err = fmt.Errorf("entry %d has another value, of %d bytes", n, len(got))
			}
			return err
		case k.r.IntN(2) == 0:
			missing, err := s.FindMissing(ctx, []digest.Digest{d})
			if len(missing) > 0 {
				err = errors.Join(err, blob.ErrNotFound)
			}
			return err
		}
		got, err := blob.ReadAll(ctx, s, d, d.Size())
		if err == nil && !bytes.Equal(got, data) {
			err = fmt.Errorf("blob %d has other bytes", n)
		}
		return err
	})
}
