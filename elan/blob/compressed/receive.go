package compressed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/compress"
	"github.com/mettle-build/mettle/elan/digest"
)

// ReceiveCompressed implements blob.CompressedReceiver. What comes as one frame
// of at most maxAsCame bytes, and saves enough, is decompressed to be verified and
// kept as it came. All else is kept as Create does.
func (s *Store) ReceiveCompressed(ctx context.Context, d digest.Digest, r io.Reader) error {
	if err := s.receive(ctx, d, r); err != nil {
		return fmt.Errorf("receive blob %s: %w", d, err)
	}
	return nil
}

func (s *Store) receive(ctx context.Context, d digest.Digest, r io.Reader) error {
	limit := min(compress.MaxInput(d.Size()), maxAsCame)
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return err //nolint:wrapcheck // the caller does
	}
	if int64(len(data)) > limit {
		return s.recompress(ctx, d, io.MultiReader(bytes.NewReader(data), r))
	}
	if d.Size() < s.minBytes || !s.pays(d.Size(), int64(len(data))) || !isOneFrame(data) {
		return s.recompress(ctx, d, bytes.NewReader(data))
	}
	if err := s.verify(d, data); err != nil {
		return err
	}
	return s.keep(ctx, d, data)
}

// recompress receives a blob as if it had come as it is.
func (s *Store) recompress(ctx context.Context, d digest.Digest, r io.Reader) error {
	dec, err := s.codec.NewReader(r, d.Size())
	if err != nil {
		return err //nolint:wrapcheck // it says what it is of
	}
	defer dec.Close()                   //nolint:errcheck // it never fails
	return blob.Receive(ctx, s, d, dec) //nolint:wrapcheck // it says what was received
}

// verify decompresses data, and compares it with d.
func (s *Store) verify(d digest.Digest, data []byte) error {
	if d.Size() <= compress.SmallBytes {
		b, err := s.codec.Decode(data, d.Size())
		if err != nil {
			return err //nolint:wrapcheck // it says what it is of
		}
		if got := digest.Of(d.Function(), b); got != d.Plain() {
			return fmt.Errorf("%w: the bytes have digest %s", blob.ErrCorrupt, got)
		}
		return nil
	}
	dec, err := s.codec.NewReader(bytes.NewReader(data), d.Size())
	if err != nil {
		return err //nolint:wrapcheck // it says what it is of
	}
	defer dec.Close() //nolint:errcheck // it never fails
	_, err = io.Copy(io.Discard, digest.NewVerifier(dec, d))
	return err //nolint:wrapcheck // the caller does
}

// keep puts the frame data, which is the blob d, into a container.
func (s *Store) keep(ctx context.Context, d digest.Digest, data []byte) error {
	w, err := s.Store.Create(ctx, d)
	if err != nil {
		return err //nolint:wrapcheck // the store's own
	}
	defer w.Close() //nolint:errcheck // after Commit there is nothing to lose, before it nothing to keep
	_, err = w.Write(appendHeader(nil, zstdForm, d.Size()))
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Commit()
	}
	if err == nil {
		s.metrics.wrote("zstd_as_came", d.Size(), headerBytes+int64(len(data)))
	}
	return err //nolint:wrapcheck // the store's own
}

var errNoFrame = errors.New("not one frame of zstd")

// isOneFrame reports whether data has the outline of exactly one frame of zstd,
// with nothing before or behind it (RFC 8878, section 3.1.1): what some decoders
// take that stop at the first frame's end, or know no skippable ones. What is in
// the blocks, decompressing tells.
func isOneFrame(data []byte) bool {
	n, checksum, err := frameHeader(data)
	for last := false; err == nil && !last; {
		if len(data)-n < 3 {
			return false
		}
		block := int(data[n]) | int(data[n+1])<<8 | int(data[n+2])<<16
		last = block&1 == 1
		n += 3
		switch size := block >> 3; block >> 1 & 3 {
		case 0, 2: // raw, compressed
			n += size
		case 1: // one byte again and again
			n++
		default:
			return false
		}
		if n > len(data) {
			return false
		}
	}
	if checksum {
		n += 4
	}
	return err == nil && n == len(data)
}

// frameHeader returns the size of the header that data begins with, and whether
// there is a checksum behind the last block.
func frameHeader(data []byte) (n int, checksum bool, err error) {
	if len(data) < 6 || string(data[:4]) != "\x28\xb5\x2f\xfd" {
		return 0, false, errNoFrame
	}
	descriptor := data[4]
	single := descriptor>>5&1 == 1
	content := [...]int{0, 2, 4, 8}[descriptor>>6]
	if single && content == 0 {
		content = 1
	}
	n = 5 + content + [...]int{0, 1, 2, 4}[descriptor&3]
	if !single {
		n++ // the window
	}
	if descriptor&3 != 0 || n > len(data) {
		return 0, false, errNoFrame // nobody has the dictionary
	}
	return n, descriptor>>2&1 == 1, nil
}
