package chunked

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// Lists are entries under the digest of their blob, in instances of names that
// checkKey refuses to everybody else:
//
//   - keptInstance: the blob is kept as these chunks. Splice has seen that they
//     are the blob.
//   - splitInstance and the number of a function: Split has cut the blob like
//     this. It says nothing of whether the blob is there.
//
// The blob's space follows, in which its chunks are too.
const (
	reserved      = "\x00chunks/"
	keptInstance  = reserved + "kept/"
	splitInstance = reserved + "split/"
)

func keptKey(d digest.Digest) blob.EntryKey {
	return blob.EntryKey{Instance: keptInstance + d.Space().String(), Action: d.Plain()}
}

func splitKey(d digest.Digest, fn blob.ChunkFunction) blob.EntryKey {
	return blob.EntryKey{Instance: splitInstance + string('0'+rune(fn)) + "/" + d.Space().String(), Action: d.Plain()}
}

// keptBlob is the reverse of keptKey.
func keptBlob(k blob.EntryKey) (digest.Digest, bool) {
	tag, ok := strings.CutPrefix(k.Instance, keptInstance)
	if !ok {
		return digest.Digest{}, false
	}
	space, err := digest.ParseSpace(tag)
	return k.Action.In(space), err == nil
}

// listVersion begins a list. What follows is a byte for the function, the number
// of chunks as a varint, and for each its size as a varint and its raw hash. The
// digest function and the space are the blob's. The stores see to it that an entry is whole.
const listVersion = 1

// encode is l as the value of an entry.
func encode(l blob.ChunkList) ([]byte, error) {
	b := []byte{listVersion, byte(l.Function)}
	b = binary.AppendUvarint(b, uint64(len(l.Chunks)))
	for _, c := range l.Chunks {
		b = binary.AppendUvarint(b, uint64(c.Size())) //nolint:gosec // never negative
		var err error
		if b, err = hex.AppendDecode(b, []byte(c.Hash())); err != nil {
			return nil, fmt.Errorf("hash of chunk %s: %w", c, err)
		}
	}
	return b, nil
}

var errList = errors.New("malformed list of chunks")

// decode reads what encode wrote for d. It allocates no more than a few times what
// b has, and returns no list whose sizes do not add up to d's.
func decode(d digest.Digest, b []byte) (blob.ChunkList, error) {
	var l blob.ChunkList
	hexLen := d.Function().HexLen()
	if len(b) < 3 || b[0] != listVersion || b[1] > byte(blob.ChunkRepMaxCDC) {
		return l, errList
	}
	l.Function = blob.ChunkFunction(b[1])
	n, used := binary.Uvarint(b[2:])
	if used <= 0 {
		return l, errList
	}
	b = b[2+used:]
	if n > uint64(len(b)/(hexLen/2+1)) {
		return l, errList
	}
	// One string for all hashes.
	sizes, raw := make([]int64, 0, n), make([]byte, 0, int(n)*hexLen/2) //nolint:gosec // n is below len(b)
	for range n {
		size, used := binary.Uvarint(b)
		if used <= 0 || len(b) < used+hexLen/2 || size > uint64(d.Size()) { //nolint:gosec // not negative
			return l, errList
		}
		sizes = append(sizes, int64(size)) //nolint:gosec // at most d.Size()
		raw = append(raw, b[used:used+hexLen/2]...)
		b = b[used+hexLen/2:]
	}
	if len(b) > 0 {
		return l, errList
	}
	hashes := hex.EncodeToString(raw)
	l.Chunks = make([]digest.Digest, len(sizes))
	left := d.Size()
	for i, size := range sizes {
		c, err := digest.New(d.Function(), hashes[i*hexLen:(i+1)*hexLen], size)
		if left -= size; err != nil || size == 0 || left < 0 {
			return l, errList
		}
		l.Chunks[i] = c.In(d.Space())
	}
	if left != 0 {
		return l, errList
	}
	return l, nil
}

// kept returns the chunks that d is kept in, whether they are there or not.
// Where it is not, the error wraps blob.ErrNotFound.
func (s *Store) kept(ctx context.Context, d digest.Digest) (blob.ChunkList, error) {
	if !s.mayBeKept(d) {
		return blob.ChunkList{}, blob.ErrNotFound
	}
	return s.load(ctx, d, keptKey(d))
}

// load reads a list of d. One that makes no sense reads as absent: it is of a version
// to come, or damaged, and in either case the blob can be put again.
func (s *Store) load(ctx context.Context, d digest.Digest, k blob.EntryKey) (blob.ChunkList, error) {
	value, err := s.entries.Entry(ctx, k)
	if err != nil {
		return blob.ChunkList{}, fmt.Errorf("chunks of %s: %w", d, err)
	}
	l, err := decode(d, value)
	if err != nil {
		s.log.ErrorContext(ctx, "list of chunks makes no sense, and is taken as absent", "digest", d.String(), "error", err)
		return blob.ChunkList{}, fmt.Errorf("chunks of %s: %w: %w", d, blob.ErrNotFound, err)
	}
	return l, nil
}

func (s *Store) save(ctx context.Context, k blob.EntryKey, l blob.ChunkList) error {
	value, err := encode(l)
	if err == nil {
		err = s.entries.PutEntry(ctx, k, value)
	}
	if err != nil {
		return fmt.Errorf("keep chunks of %s: %w", k.Action, err)
	}
	return nil
}

const (
	// findParallel is how many lists are read at once: what hides the latency of
	// a bucket, and no more than a disk bears.
	findParallel = 8
	// findChunks is after how many chunks the store is asked, to bound memory.
	findChunks = 1 << 16
)

// keptOf returns those of ds that are kept in chunks all of which are there.
func (s *Store) keptOf(ctx context.Context, ds []digest.Digest) (map[digest.Digest]bool, error) {
	there := map[digest.Digest]bool{}
	var lists []blob.ChunkList // of owners
	var owners []digest.Digest
	n := 0
	flush := func() error {
		whole, err := s.complete(ctx, lists)
		for i, ok := range whole {
			if ok {
				there[owners[i]] = true
			}
		}
		lists, owners, n = nil, nil, 0
		return err
	}
	batch := make([]digest.Digest, 0, findParallel)
	load := func() error {
		loaded, err := s.loadAll(ctx, batch)
		for i, l := range loaded {
			if len(l.Chunks) > 0 {
				lists, owners = append(lists, l), append(owners, batch[i])
				n += len(l.Chunks)
			}
		}
		batch = batch[:0]
		if err == nil && n >= findChunks {
			err = flush()
		}
		return err
	}
	for _, d := range ds {
		if !s.mayBeKept(d) {
			continue
		}
		if batch = append(batch, d); len(batch) == findParallel {
			if err := load(); err != nil {
				return nil, err
			}
		}
	}
	if err := load(); err != nil {
		return nil, err
	}
	return there, flush()
}

// loadAll reads the lists of blobs, all at once. That of a blob that is not kept
// in chunks is empty.
func (s *Store) loadAll(ctx context.Context, ds []digest.Digest) ([]blob.ChunkList, error) {
	lists, errs := make([]blob.ChunkList, len(ds)), make([]error, len(ds))
	var wg sync.WaitGroup
	for i, d := range ds {
		wg.Go(func() {
			if lists[i], errs[i] = s.kept(ctx, d); errors.Is(errs[i], blob.ErrNotFound) {
				lists[i], errs[i] = blob.ChunkList{}, nil
			}
		})
	}
	wg.Wait()
	return lists, errors.Join(errs...)
}

// complete tells of which lists all chunks are there. It asks once.
func (s *Store) complete(ctx context.Context, lists []blob.ChunkList) ([]bool, error) {
	if len(lists) == 0 {
		return nil, nil
	}
	n := 0
	for _, l := range lists {
		n += len(l.Chunks)
	}
	all := make([]digest.Digest, 0, n)
	for _, l := range lists {
		all = append(all, l.Chunks...)
	}
	missing, err := s.Store.FindMissing(ctx, all)
	if err != nil {
		return nil, fmt.Errorf("find chunks: %w", err)
	}
	gone := make(map[digest.Digest]bool, len(missing))
	for _, d := range missing {
		gone[d] = true
	}
	whole := make([]bool, len(lists))
	for i, l := range lists {
		whole[i] = !containsAny(l.Chunks, gone)
	}
	return whole, nil
}

func containsAny(ds []digest.Digest, set map[digest.Digest]bool) bool {
	if len(set) == 0 {
		return false
	}
	for _, d := range ds {
		if set[d] {
			return true
		}
	}
	return false
}
