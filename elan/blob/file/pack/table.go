package pack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A table is a file of the index, mapped into memory: a header of 64 bytes, and
// slots of three words, found by linear probing from the place that the hash
// names. In the machine's own byte order:
//
//	header  magic, check of the secret, slots, shard; CRC-32C of these;
//	        slots that point to a record, and slots that did
//	slot    the first 64 bits of the hash
//	        32 bits more of it, and the last use in Unix seconds
//	        location
//
// The location is written last and in one word, so that a slot is there whole
// or not at all whenever the process dies. What it points to is looked at when
// it is read: no slot, however damaged, can bring forth a wrong byte.
const (
	tableMagic   = uint64(0x31786469656b6370) // "pckeidx1"
	tableHeader  = 64
	headerWords  = tableHeader / 8
	slotWords    = 3
	slotBytes    = slotWords * 8
	minTableSize = 4096
	minSlots     = (minTableSize - tableHeader) / slotBytes

	// A table grows, at maxLoad of its slots, so that few more than half are
	// taken then: searches stay short (some seven slots at the worst), and one
	// slot of every ten is written twice at most.
	maxLoadNum, maxLoadDen = 7, 10
)

type table struct {
	mem   []byte
	words []uint64 // the same, all of it
	slots uint64
}

// openTable maps the file at path. One that is not what a table should be is an
// error that wraps errBadTable.
func openTable(path string, shard int, check uint64) (*table, error) {
	fd, err := openFile(path, unix.O_RDWR)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // the mapping stays
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	bad := func(why string) (*table, error) { return nil, fmt.Errorf("%w: %s: %s", errBadTable, path, why) }
	if st.Size < minTableSize || (st.Size-tableHeader)%slotBytes != 0 || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return bad(fmt.Sprintf("%d bytes, mode %o", st.Size, st.Mode))
	}
	var head [tableHeader]byte
	if err := preadFull(fd, head[:], 0); err != nil {
		return nil, err
	}
	slots := uint64(st.Size-tableHeader) / slotBytes //nolint:gosec // not negative
	if want := tableHead(slots, shard, check); string(head[:len(want)]) != string(want) {
		return bad("its header is not right")
	}
	t, err := mapTable(fd, slots)
	if err == nil && t.live()+t.gone() >= slots {
		err = errors.Join(fmt.Errorf("%w: %s: its counts are not right", errBadTable, path), t.unmap())
	}
	return t, err
}

var errBadTable = errors.New("the index is damaged")

func mapTable(fd int, slots uint64) (*table, error) {
	mem, err := unix.Mmap(fd, 0, int(tableBytes(slots)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the index: %w", err)
	}
	return &table{mem: mem, words: wordsOf(mem), slots: slots}, nil
}

// wordsOf views b, which a mapping or the allocator aligned, as words.
func wordsOf(b []byte) []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8) //nolint:gosec // aligned
}

func tableBytes(slots uint64) int64 { return tableHeader + int64(slots)*slotBytes } //nolint:gosec // far below 2^63

// tableHead is the part of the header that does not change.
func tableHead(slots uint64, shard int, check uint64) []byte {
	b := binary.NativeEndian.AppendUint64(nil, tableMagic)
	b = binary.NativeEndian.AppendUint64(b, check)
	b = binary.NativeEndian.AppendUint64(b, slots)
	b = binary.NativeEndian.AppendUint64(b, uint64(shard)) //nolint:gosec // small
	return binary.NativeEndian.AppendUint64(b, uint64(crc32.Checksum(b, castagnoli)))
}

// newTable makes the file of a table with that many slots, filled with the
// records of old, which may be nil, and maps it: openat, pwrite64, mmap,
// renameat. All of it is written, so that no page of the mapping can be without
// room on the disk when it is touched.
func newTable(path string, shard int, check, slots uint64, old *table) (*table, error) {
	mem := make([]byte, tableBytes(slots))
	copy(mem, tableHead(slots, shard, check))
	t := &table{mem: mem, words: wordsOf(mem), slots: slots}
	for i := range old.length() {
		if !old.location(i).isRecord() {
			continue
		}
		w := old.slot(i)
		j, ok := t.free(w[0])
		if !ok {
			return nil, fmt.Errorf("%w: %d slots are too few", errBadTable, slots)
		}
		copy(t.slot(j), w)
		t.addLive(1)
	}
	tmp := path + newSuffix
	fd, err := openFile(tmp, unix.O_CREAT|unix.O_TRUNC|unix.O_RDWR)
	if err != nil {
		return nil, err
	}
	err = pwriteFull(fd, mem, 0)
	if err == nil {
		t, err = mapTable(fd, slots)
	}
	err = errors.Join(err, unix.Close(fd))
	if err == nil {
		err = unix.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return nil, err
	}
	return t, nil
}

func (t *table) unmap() error { return unix.Munmap(t.mem) }

// length is the number of slots, 0 of a nil table.
func (t *table) length() uint64 {
	if t == nil {
		return 0
	}
	return t.slots
}

// records counts the slots that point to a record.
func (t *table) records() (n uint64) {
	for i := range t.length() {
		if t.location(i).isRecord() {
			n++
		}
	}
	return n
}

func (t *table) bytes() int64 { return int64(len(t.mem)) }

// live and gone count slots, in the header, so that nobody needs to count them
// at a start. A process killed between a slot and its count leaves them off by
// one, which does not matter to when a table grows.
func (t *table) live() uint64    { return t.words[5] }
func (t *table) gone() uint64    { return t.words[6] }
func (t *table) addLive(n int64) { addTo(&t.words[5], n) }
func (t *table) addGone(n int64) { addTo(&t.words[6], n) }

func addTo(count *uint64, n int64) {
	if n > 0 || *count > 0 {
		*count += uint64(n) //nolint:gosec // -1 wraps back
	}
}

// full tells that the table should grow, and quiteFull that it must.
func (t *table) full() bool      { return (t.live()+t.gone()+1)*maxLoadDen > t.slots*maxLoadNum }
func (t *table) quiteFull() bool { return (t.live()+t.gone()+1)*100 > t.slots*95 }

// place is where the search for a hash that begins with a begins.
func (t *table) place(a uint64) uint64 {
	// The upper bits chose the shard.
	hi, _ := bits.Mul64(a<<shardBits, t.slots)
	return hi
}

func (t *table) slot(i uint64) []uint64 {
	at := headerWords + i*slotWords
	return t.words[at : at+slotWords : at+slotWords]
}

func (t *table) location(i uint64) location {
	return location(atomic.LoadUint64(&t.words[headerWords+i*slotWords+2]))
}

// use is the last use in slot i, in Unix seconds.
func (t *table) use(i uint64) uint32 {
	return uint32(atomic.LoadUint64(&t.words[headerWords+i*slotWords+1])) //nolint:gosec // its lower half
}

func (t *table) setUse(i uint64, use uint32) {
	w := &t.words[headerWords+i*slotWords+1]
	atomic.StoreUint64(w, atomic.LoadUint64(w)&^uint64(0xffffffff)|uint64(use))
}

// find returns the slot of h.
func (t *table) find(h hashed) (uint64, bool) {
	i := t.place(h.a)
	for range t.slots { // a damaged table may have no free slot
		switch s := t.slot(i); {
		case location(atomic.LoadUint64(&s[2])) == noRecord:
			return 0, false
		case s[0] == h.a && atomic.LoadUint64(&s[1])>>32 == h.b>>32 && location(atomic.LoadUint64(&s[2])).isRecord():
			return i, true
		}
		if i++; i == t.slots {
			i = 0
		}
	}
	return 0, false
}

// free returns the first slot that a hash beginning with a may take.
func (t *table) free(a uint64) (uint64, bool) {
	i := t.place(a)
	for range t.slots {
		if !t.location(i).isRecord() {
			return i, true
		}
		if i++; i == t.slots {
			i = 0
		}
	}
	return 0, false
}

// insert writes h into a free slot, the location last, and reports whether
// there was one.
func (t *table) insert(h hashed, l location, use uint32) bool {
	i, ok := t.free(h.a)
	if !ok {
		return false
	}
	s := t.slot(i)
	if location(s[2]) == goneRecord {
		t.addGone(-1)
	}
	atomic.StoreUint64(&s[0], h.a)
	atomic.StoreUint64(&s[1], h.b>>32<<32|uint64(use))
	atomic.StoreUint64(&s[2], uint64(l))
	t.addLive(1)
	return true
}

func (t *table) setLocation(i uint64, l location) { atomic.StoreUint64(&t.slot(i)[2], uint64(l)) }

// drop makes slot i one that was used.
func (t *table) drop(i uint64) {
	t.setLocation(i, goneRecord)
	t.addLive(-1)
	t.addGone(1)
}
