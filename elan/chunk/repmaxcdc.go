package chunk

import (
	"fmt"
	"slices"
)

// The least minimum of RepMaxCDC that the API allows, and what it recommends.
const (
	MinRepMaxCDCMinimum     = window
	DefaultRepMaxCDCMinimum = 256 << 10
	DefaultRepMaxCDCHorizon = 8 * DefaultRepMaxCDCMinimum
)

// maxRepMaxCDC bounds both parameters, so that a Reader's memory is bounded.
const maxRepMaxCDC = 64 << 20

// window is how many bytes a hash covers.
const window = 64

// RepMaxCDC cuts where the hash is largest within a horizon, again and again
// until no chunk could be cut any more: all have from the minimum to less than
// twice of it, but for an input that is shorter.
type RepMaxCDC struct {
	minimum, horizon int
}

// NewRepMaxCDC makes a RepMaxCDC. The minimum is at least 64 bytes; the horizon,
// in bytes, is how far it looks for better cuts.
func NewRepMaxCDC(minimumBytes, horizonBytes int) (*RepMaxCDC, error) {
	if minimumBytes < MinRepMaxCDCMinimum || minimumBytes > maxRepMaxCDC || horizonBytes < 0 || horizonBytes > maxRepMaxCDC {
		return nil, fmt.Errorf("chunks of at least %d bytes with a horizon of %d: want %d to %d and 0 to %d",
			minimumBytes, horizonBytes, MinRepMaxCDCMinimum, maxRepMaxCDC, maxRepMaxCDC)
	}
	return &RepMaxCDC{minimum: minimumBytes, horizon: horizonBytes}, nil
}

// MinBytes implements Function.
func (f *RepMaxCDC) MinBytes() int { return f.minimum }

// MaxBytes implements Function.
func (f *RepMaxCDC) MaxBytes() int { return 2*f.minimum - 1 }

// HorizonBytes is what NewRepMaxCDC was given.
func (f *RepMaxCDC) HorizonBytes() int { return f.horizon }

func (f *RepMaxCDC) cutter() cutter { return &repMaxCutter{f: f} }

// repMaxCutter finds each chunk as follows. Of the places where the chunk may
// end, minimum to minimum+horizon bytes from its beginning and no less than the
// minimum from the end of the input, the best is the first with the largest hash.
// If the chunk would have twice the minimum or more, it is cut before: the best
// place among those at least the minimum before is looked for, and so on.
//
// To look at each byte once, the cutter keeps the records: the places whose hash
// is above that of all places before, from the first where the chunk may end. The
// best place of any beginning of the horizon is the last record in it. When
// minimum bytes after a record no other has come, that record is a cut whatever
// follows, and so are the cuts before it that the rule gives; the hashing goes on
// there as for a new input. Otherwise records are less than the minimum apart.
type repMaxCutter struct {
	f *RepMaxCDC
	// known are the lengths of the next chunks, found together with an earlier one.
	known []int
	// What follows counts from the beginning of the chunk after those known.
	records []record
	hashed  int    // the place up to which has been hashed; 0: nothing has
	hash    uint64 // the hash there
}

// record is a place where a chunk may end, and the hash of the bytes before it.
type record struct {
	at   int
	hash uint64
}

func (c *repMaxCutter) lookahead() int { return 2*c.f.minimum + c.f.horizon }

func (c *repMaxCutter) cut(data []byte) int {
	if len(c.known) == 0 {
		c.find(data)
	}
	n := c.known[0]
	c.known = c.known[1:]
	return n
}

// find makes at least one chunk known.
func (c *repMaxCutter) find(data []byte) {
	c.known = c.known[:0]
	if len(data) < 2*c.f.minimum {
		c.known = append(c.known, len(data))
		c.restart()
		return
	}
	last := len(data) - c.f.minimum // the last place that counts
	c.start(data)
	for {
		best := c.records[len(c.records)-1]
		sure := best.at + c.f.minimum // if there is no record before it, best is a cut
		if c.scan(data, min(last, sure-1)); c.records[len(c.records)-1] != best {
			continue
		}
		if sure > last {
			break
		}
		c.commit()
		c.hash = c.hash<<1 + gear[data[sure-1]]
		c.hashed = c.f.minimum
		c.records = append(c.records[:0], record{at: c.hashed, hash: c.hash})
		return
	}
	c.commitFirst(data)
}

func (c *repMaxCutter) restart() {
	c.records, c.hashed, c.hash = c.records[:0], 0, 0
}

// start hashes up to the first place, unless that has been done.
func (c *repMaxCutter) start(data []byte) {
	if c.hashed == 0 {
		c.hash = hashBefore(data, c.f.minimum)
		c.hashed = c.f.minimum
		c.records = append(c.records[:0], record{at: c.hashed, hash: c.hash})
	}
}

// hashBefore is the hash at a place, of which at least window bytes precede.
func hashBefore(data []byte, at int) (hash uint64) {
	for _, b := range data[at-window : at] {
		hash = hash<<1 + gear[b]
	}
	return hash
}

// scan hashes up to and with the place to, and keeps the first record that it
// finds, where it stops, since what is sure depends on it. Two bytes at a time, so
// that a hash waits only for that two bytes before.
func (c *repMaxCutter) scan(data []byte, to int) {
	if to <= c.hashed {
		return
	}
	data = data[c.hashed:to]
	hash, best := c.hash, c.records[len(c.records)-1].hash
	i := 0
	for ; i+1 < len(data); i += 2 {
		a, b := gear[data[i]], gear[data[i+1]]
		if first := hash<<1 + a; first > best {
			c.add(i+1, first)
			return
		}
		if hash = hash<<2 + (a<<1 + b); hash > best {
			c.add(i+2, hash)
			return
		}
	}
	if i < len(data) {
		if hash = hash<<1 + gear[data[i]]; hash > best {
			c.add(i+1, hash)
			return
		}
	}
	c.hashed, c.hash = to, hash
}

// add keeps a record n bytes after what had been hashed.
func (c *repMaxCutter) add(n int, hash uint64) {
	c.hashed += n
	c.hash = hash
	c.records = append(c.records, record{at: c.hashed, hash: hash})
}

// commit makes known all chunks up to the last record.
func (c *repMaxCutter) commit() {
	end := c.records[len(c.records)-1].at
	for i := len(c.records) - 2; i >= 0; i-- {
		if at := c.records[i].at; end-at >= c.f.minimum {
			c.known = append(c.known, end-at)
			end = at
		}
	}
	c.known = append(c.known, end)
	slices.Reverse(c.known)
}

// commitFirst makes known the first chunk alone: what comes after the horizon
// may change the others.
func (c *repMaxCutter) commitFirst(data []byte) {
	end := c.records[len(c.records)-1].at
	for i := len(c.records) - 2; i >= 0; i-- {
		if at := c.records[i].at; end-at >= c.f.minimum {
			end = at
		}
	}
	c.known = append(c.known, end)
	first := end + c.f.minimum // of the next chunk
	if c.hashed < first {
		c.restart()
		return
	}
	kept := slices.IndexFunc(c.records, func(r record) bool { return r.at >= first })
	if kept < 0 {
		kept = len(c.records)
	}
	later := c.records[kept:]
	// Places that were no records, since the chunk that ends here had better
	// ones, can be some of the next, up to the first that is one in any case.
	to := c.hashed
	if len(later) > 0 {
		to = later[0].at - 1
	}
	c.records = append(c.between(data, first, to), later...)
	for i := range c.records {
		c.records[i].at -= end
	}
	c.hashed -= end
}

// between returns the records of the places first to last, both included, of a
// chunk whose first place is first. There are none where last is before first.
func (c *repMaxCutter) between(data []byte, first, last int) []record {
	if last < first {
		return nil
	}
	best := record{at: first, hash: hashBefore(data, first)}
	records := []record{best}
	hash := best.hash
	for i, b := range data[first:last] {
		if hash = hash<<1 + gear[b]; hash > best.hash {
			best = record{at: first + i + 1, hash: hash}
			records = append(records, best)
		}
	}
	return records
}
