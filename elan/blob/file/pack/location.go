package pack

// location says where a record is, in one word, so that it is published and
// replaced by one store: segment, offset and length, the latter two in units of
// 8 bytes. As a record never begins at 0, no location is one of the two marks.
type location uint64

const (
	noRecord   location = 0 // the slot was never used: a search ends here
	goneRecord location = 1 // the slot was used: a search goes on

	lenBits = 15 // 256 KiB
	offBits = 23 // 64 MiB
	segBits = 64 - lenBits - offBits

	// MaxSegmentBytes is the size of the largest segment.
	MaxSegmentBytes = recordAlign << offBits
	maxSegmentID    = 1<<segBits - 1
)

func locate(segment uint32, off, n int64) location {
	return location(segment)<<(offBits+lenBits) | location(off/recordAlign)<<lenBits | location(n/recordAlign) //nolint:gosec // within the bits, by Put and New
}

func (l location) segment() uint32 { return uint32(l >> (offBits + lenBits)) } //nolint:gosec // 26 bits
func (l location) offset() int64   { return int64(l>>lenBits&(1<<offBits-1)) * recordAlign }
func (l location) bytes() int64    { return int64(l&(1<<lenBits-1)) * recordAlign } //nolint:gosec // 15 bits
func (l location) isRecord() bool  { return l > goneRecord }
