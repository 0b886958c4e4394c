package pack

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
)

// A record is, little-endian and aligned to 8 bytes:
//
//	0   4  magic of the store's own: liveMagic, or its complement where the
//	       record was replaced or deleted
//	4   4  CRC-32C, from a start of the store's own, of all that follows
//	8   8  time of writing, Unix nanoseconds; of two mutable records of one key
//	       the later one holds
//	16  4  bytes of the value
//	20  2  bytes of the key
//	22  2  flags
//	24     key, value, zeros up to the next multiple of 8
const (
	headerBytes = 24
	recordAlign = 8
	flagMutable = 1

	// MaxKeyBytes and MaxRecordBytes bound what a record may have: an index slot
	// has 15 bits for its length in units of 8 bytes.
	MaxKeyBytes    = 1 << 10
	MaxRecordBytes = (1<<lenBits - 1) * recordAlign
)

//nolint:gochecknoglobals // an immutable table
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// secret is what nobody outside the store knows. Bytes that a client sent can
// so not pass for a record when a damaged segment is searched for records, and
// nobody can choose keys that crowd one place of the index.
type secret struct {
	k         [4]uint64 // of hash; odd
	liveMagic uint32
	crcStart  uint32
}

const (
	secretFile  = "secret"
	secretBytes = 40
)

// loadSecret reads the secret of the packs in dir, or makes one for new packs:
// openat, write, fsync, close, renameat.
func loadSecret(dir string) (*secret, error) {
	path := filepath.Join(dir, secretFile)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if raw, err = makeSecret(dir); err == nil {
			err = writeDurably(path, raw)
		}
	}
	if err != nil {
		return nil, err
	}
	if len(raw) != secretBytes {
		return nil, fmt.Errorf("%s has %d bytes, want %d: its packs can't be read; remove %s to begin anew", path, len(raw), secretBytes, dir)
	}
	s := &secret{liveMagic: binary.LittleEndian.Uint32(raw[32:]), crcStart: binary.LittleEndian.Uint32(raw[36:])}
	for i := range s.k {
		s.k[i] = binary.LittleEndian.Uint64(raw[8*i:]) | 1
	}
	return s, nil
}

func makeSecret(dir string) ([]byte, error) {
	// What was written with another secret would be lost without a word.
	old, err := filepath.Glob(filepath.Join(dir, "*"+segmentSuffix))
	if err == nil && len(old) > 0 {
		err = fmt.Errorf("%s is missing: the %d packs there can't be read; remove %s to begin anew", secretFile, len(old), dir)
	}
	raw := make([]byte, secretBytes)
	if err == nil {
		_, err = rand.Read(raw)
	}
	return raw, err
}

// hashed is what the index knows of a key: 96 bits that no two keys share.
type hashed struct{ a, b uint64 }

// hash mixes the key with the secret, by the folded multiplication of wyhash.
func (s *secret) hash(key []byte) hashed {
	a, b := s.k[0]^uint64(len(key)), s.k[1]
	for len(key) >= 8 {
		w := binary.LittleEndian.Uint64(key)
		a, b = fold(a^w, s.k[2]), fold(b^bits.RotateLeft64(w, 32), s.k[3])
		key = key[8:]
	}
	var w uint64
	for i, c := range key {
		w |= uint64(c) << (8 * i)
	}
	a, b = fold(a^w, s.k[2]), fold(b^bits.RotateLeft64(w, 32), s.k[3])
	return hashed{a: fold(a^b, s.k[1]), b: fold(b, s.k[0]) ^ a}
}

func fold(x, y uint64) uint64 {
	hi, lo := bits.Mul64(x, y)
	return hi ^ lo
}

// check is of the secret what an index file may show, to tell that it belongs
// to these packs.
func (s *secret) check() uint64 { return s.hash([]byte("index")).b }

// Record is a value under a key.
type Record struct {
	Key, Value []byte
	// Mutable: the value may be another one later. It replaces an older one of
	// the key; where a record is not mutable, the first one stays.
	Mutable bool
}

// RecordBytes is what a record takes in a segment.
func RecordBytes(keyBytes, valueBytes int) int64 {
	return (headerBytes + int64(keyBytes) + int64(valueBytes) + recordAlign - 1) &^ (recordAlign - 1)
}

// fits says whether r can be a record at all.
func (r *Record) fits() error {
	if len(r.Key) == 0 || len(r.Key) > MaxKeyBytes || RecordBytes(len(r.Key), len(r.Value)) > MaxRecordBytes {
		return fmt.Errorf("a record of a key of %d bytes and a value of %d: at most %d and together %d", len(r.Key), len(r.Value), MaxKeyBytes, MaxRecordBytes)
	}
	return nil
}

// appendRecord appends r as it stands in a segment.
func (s *secret) appendRecord(b []byte, r *Record, writtenNanos int64) []byte {
	start := len(b)
	n := int(RecordBytes(len(r.Key), len(r.Value)))
	b = slices.Grow(b, n)
	b = binary.LittleEndian.AppendUint32(b, s.liveMagic)
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint64(b, uint64(writtenNanos)) //nolint:gosec // read back as it was
	b = binary.LittleEndian.AppendUint32(b, uint32(len(r.Value))) //nolint:gosec // fits looked at it
	b = binary.LittleEndian.AppendUint16(b, uint16(len(r.Key)))   //nolint:gosec // as above
	b = binary.LittleEndian.AppendUint16(b, flagsOf(r))           //
	b = append(b, r.Key...)                                       //
	b = append(b, r.Value...)                                     //
	sum := crc32.Update(s.crcStart, castagnoli, b[start+8:])      //
	binary.LittleEndian.PutUint32(b[start+4:], sum)               //
	for len(b) < start+n {
		b = append(b, 0)
	}
	return b
}

func flagsOf(r *Record) uint16 {
	if r.Mutable {
		return flagMutable
	}
	return 0
}

// parsed is a record as it was found. Its slices are those of the bytes parsed.
type parsed struct {
	Record
	written int64 // Unix nanoseconds
	dead    bool  // replaced or deleted
	bytes   int64 // in the segment
}

// header reads what stands before the key, and tells whether it can be the
// beginning of a record at all. The key and the value come later.
func (s *secret) header(b []byte) (p parsed, keyBytes int, ok bool) {
	if len(b) < headerBytes {
		return p, 0, false
	}
	magic := binary.LittleEndian.Uint32(b)
	if magic != s.liveMagic && magic != ^s.liveMagic {
		return p, 0, false
	}
	value, flags := binary.LittleEndian.Uint32(b[16:]), binary.LittleEndian.Uint16(b[22:])
	keyBytes = int(binary.LittleEndian.Uint16(b[20:]))
	if keyBytes == 0 || keyBytes > MaxKeyBytes || value > MaxRecordBytes || flags > flagMutable {
		return p, 0, false
	}
	p = parsed{
		Record:  Record{Mutable: flags == flagMutable},
		written: int64(binary.LittleEndian.Uint64(b[8:])), //nolint:gosec // written as it was
		dead:    magic != s.liveMagic,
		bytes:   RecordBytes(keyBytes, int(value)),
	}
	return p, keyBytes, p.bytes <= MaxRecordBytes
}

// parse reads the record at the beginning of b, and reports whether there is a
// whole one.
func (s *secret) parse(b []byte) (parsed, bool) {
	p, keyBytes, ok := s.header(b)
	if !ok || int64(len(b)) < p.bytes {
		return p, false
	}
	end := headerBytes + keyBytes + int(binary.LittleEndian.Uint32(b[16:]))
	if crc32.Update(s.crcStart, castagnoli, b[8:end]) != binary.LittleEndian.Uint32(b[4:]) {
		return p, false
	}
	p.Key, p.Value = b[headerBytes:headerBytes+keyBytes:headerBytes+keyBytes], b[headerBytes+keyBytes:end:end]
	return p, true
}

// deadMagic is what is written over the magic of a record that was replaced.
func (s *secret) deadMagic() []byte {
	return binary.LittleEndian.AppendUint32(nil, ^s.liveMagic)
}
