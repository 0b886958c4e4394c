package compressed

import (
	"encoding/binary"
	"fmt"

	"github.com/mettle-build/mettle/elan/blob"
)

// headerBytes is the size of a container's header: a skippable frame of zstd
// (RFC 8878, section 3.1.2), so that a whole container of zstd is a file that
// the zstd tool decompresses.
//
//	0   50 2a 4d 18    a skippable frame
//	4   10 00 00 00    of 16 bytes
//	8   "elan"
//	12  1              version
//	13  0 or 1         the blob as it is, or as zstd
//	14  0 0
//	16  size           of the blob in bytes, 64 bits, little endian
const headerBytes = 24

type form byte

const (
	raw form = iota
	zstdForm
)

// prefix is what all containers begin with.
const prefix = "\x50\x2a\x4d\x18\x10\x00\x00\x00elan\x01"

// appendHeader appends the header of a blob of size bytes.
func appendHeader(b []byte, f form, size int64) []byte {
	b = append(append(b, prefix...), byte(f), 0, 0)
	return binary.LittleEndian.AppendUint64(b, uint64(size)) //nolint:gosec // not negative
}

// parseHeader reads the header of what has to be a blob of size bytes.
func parseHeader(b []byte, size int64) (form, error) {
	switch {
	case len(b) != headerBytes || string(b[:len(prefix)]) != prefix || b[14] != 0 || b[15] != 0:
		return 0, fmt.Errorf("%w: it is no container of version 1", blob.ErrCorrupt)
	case b[13] > byte(zstdForm):
		return 0, fmt.Errorf("%w: its container is of an unknown form %d", blob.ErrCorrupt, b[13])
	case binary.LittleEndian.Uint64(b[16:]) != uint64(size): //nolint:gosec // not negative
		return 0, fmt.Errorf("%w: its container is of a blob of %d bytes", blob.ErrCorrupt, binary.LittleEndian.Uint64(b[16:]))
	}
	return form(b[13]), nil
}
