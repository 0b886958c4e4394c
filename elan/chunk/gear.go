package chunk

import (
	"crypto/md5" //nolint:gosec // the table is made of it; it secures nothing
	"encoding/binary"
)

// gear is the table of the rolling hash, the same for both functions:
//
//	hash = hash<<1 + gear[b]
//
// so that a hash covers the last 64 bytes. An element is the first half of the
// MD5 of 64 bytes that are all b. The comment in remote_execution.proto speaks of
// one such byte; its test vectors, and all implementations, mean 64.
//
//nolint:gochecknoglobals // an immutable table
var gear = func() (table [256]uint64) {
	var seed [64]byte
	for b := range table {
		for i := range seed {
			seed[i] = byte(b)
		}
		sum := md5.Sum(seed[:]) //nolint:gosec // as above
		table[b] = binary.BigEndian.Uint64(sum[:])
	}
	return table
}()
