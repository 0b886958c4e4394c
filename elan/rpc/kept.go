package rpc

import (
	"errors"
	"fmt"
	"io"

	"google.golang.org/genproto/googleapis/bytestream"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/status"
	"github.com/mettle-build/mettle/elan/wire"
)

// sendKept streams a blob that the store keeps as zstd, as it is there. It
// reports whether it did, or tried: otherwise nothing was sent.
func (s *byteStreamServer) sendKept(stream bytestream.ByteStream_ReadServer, store blob.Store, d digest.Digest) (bool, error) {
	keeper, ok := blob.As[blob.CompressedOpener](store)
	if !ok {
		return false, nil
	}
	r, err := keeper.OpenCompressed(stream.Context(), d)
	if err != nil {
		return false, nil // Open tells what is the matter, if anything is
	}
	defer r.Close() //nolint:errcheck // opened for reading
	s.o.reads.count(nil)
	chunk := s.beginRead(d.Size())
	defer s.readers.Add(-1)
	for {
		msg := wire.NewReadResponse(s.o.pool, int(chunk))
		n, err := io.ReadFull(r, msg.Room())
		end := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !end {
			msg.Free()
			return true, status.FromRead(fmt.Errorf("read blob %s: %w", d, err))
		}
		if n == 0 {
			msg.Free()
			return true, nil
		}
		msg.SetLen(n)
		if err := stream.SendMsg(msg); err != nil || end {
			return true, err //nolint:wrapcheck // a status already
		}
	}
}
