package chunk

import (
	"fmt"
	"math/bits"
)

// The range of FastCDC's average that the API allows, and what it recommends.
const (
	MinFastCDCAverage     = 1 << 10
	MaxFastCDCAverage     = 8 << 20
	DefaultFastCDCAverage = 512 << 10
)

// normalization is by how many bits the mask before the average differs from
// that of the average, and that after it. The API asks for 2.
const normalization = 2

// masks are those of the paper's reference code, by the logarithm of the size
// that they make likely: the more bits, the rarer a cut.
//
//nolint:gochecknoglobals // an immutable table
var masks = [...]uint64{
	8:  0x0000001800035300,
	9:  0x0000019000353000,
	10: 0x0000590003530000,
	11: 0x0000d90003530000,
	12: 0x0000d90103530000,
	13: 0x0000d90303530000,
	14: 0x0000d90313530000,
	15: 0x0000d90f03530000,
	16: 0x0000d90303537000,
	17: 0x0000d90703537000,
	18: 0x0000d90707537000,
	19: 0x0000d91707537000,
	20: 0x0000d91747537000,
	21: 0x0000d91767537000,
	22: 0x0000d93767537000,
	23: 0x0000d93777537000,
	24: 0x0000d93777577000,
	25: 0x0000db3777577000,
}

// FastCDC is FastCDC as in the paper of 2020 by Wen Xia and others, at the second
// level of normalization: chunks of a quarter to four times the average.
type FastCDC struct {
	average    int
	seed       uint32
	rare, easy uint64 // the masks before the average, and from there on
	// gear is the table with the seed in it, even the same shifted by one bit.
	gear, even [256]uint64
}

// NewFastCDC makes a FastCDC of an average size in bytes, a power of two from
// 1 KiB to 8 MiB, and a seed, 0 unless somebody is not to tell content by the
// sizes of its chunks.
func NewFastCDC(averageBytes int, seed uint32) (*FastCDC, error) {
	if averageBytes < MinFastCDCAverage || averageBytes > MaxFastCDCAverage || averageBytes&(averageBytes-1) != 0 {
		return nil, fmt.Errorf("average chunk size of %d bytes: want a power of two from %d to %d", averageBytes, MinFastCDCAverage, MaxFastCDCAverage)
	}
	log := bits.TrailingZeros(uint(averageBytes))
	f := &FastCDC{average: averageBytes, seed: seed, rare: masks[log+normalization], easy: masks[log-normalization]}
	for b, g := range gear {
		f.gear[b] = g ^ uint64(seed)
		f.even[b] = f.gear[b] << 1
	}
	return f, nil
}

// AverageBytes is what NewFastCDC was given.
func (f *FastCDC) AverageBytes() int { return f.average }

// Seed is what NewFastCDC was given.
func (f *FastCDC) Seed() uint32 { return f.seed }

// MinBytes implements Function.
func (f *FastCDC) MinBytes() int { return f.average / 4 }

// MaxBytes implements Function.
func (f *FastCDC) MaxBytes() int { return f.average * 4 }

func (f *FastCDC) cutter() cutter { return f } // nothing is kept from chunk to chunk

func (f *FastCDC) lookahead() int { return f.MaxBytes() }

// cut begins to hash at the minimum, takes the rare mask up to the average and
// the easy one from there to the maximum. The chunk ends before the byte whose
// hash has no bit in common with the mask.
func (f *FastCDC) cut(data []byte) int {
	if len(data) <= f.MinBytes() {
		return len(data)
	}
	var hash uint64
	from := f.MinBytes()
	end := len(data) &^ 1 // all these sizes are even: an odd last byte is not looked at
	middle := min(f.average, end)
	n, hash := f.scan(data[from:middle], hash, f.rare)
	if n < middle-from {
		return from + n
	}
	n, _ = f.scan(data[middle:end], hash, f.easy)
	if n < end-middle {
		return middle + n
	}
	return len(data)
}

// scan returns the index of the first byte of data, which has an even number of
// them, at which the hash has no bit in common with mask, or len(data); and the
// hash at the end. Two bytes at a time, as in section 3.7 of the paper: the hash
// at the first of them is compared when it is shifted already, and the next
// hash does not wait for it.
func (f *FastCDC) scan(data []byte, hash, mask uint64) (int, uint64) {
	even, odd := &f.even, &f.gear
	shifted := mask << 1
	for i := 0; i+1 < len(data); i += 2 {
		e, o := even[data[i]], odd[data[i+1]]
		hash <<= 2
		if (hash+e)&shifted == 0 {
			return i, hash + e
		}
		hash += e + o
		if hash&mask == 0 {
			return i + 1, hash
		}
	}
	return len(data), hash
}
