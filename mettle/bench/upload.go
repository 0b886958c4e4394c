package bench

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	bspb "google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
)

// content is a blob and its digest.
type content struct {
	digest digest.Digest
	data   []byte
}

// message is m as a blob.
func (c *client) message(m proto.Message) (content, error) {
	d, data, err := digest.OfMessage(c.fn, m)
	return content{d, data}, err
}

// upload puts blobs into the server: in as few batches as its limit allows, and
// by ByteStream what is over the limit or where it has no batches.
func (c *client) upload(ctx context.Context, blobs ...content) error {
	limit := c.maxBatch.Load()
	var batch []content
	var size int64
	for _, b := range blobs {
		cost := int64(len(b.data)) + blobOverhead
		if cost > limit {
			if err := c.writeBytes(ctx, b.digest, b.data); err != nil {
				return err
			}
			continue
		}
		if size+cost > limit {
			if err := c.uploadBatch(ctx, batch); err != nil {
				return err
			}
			batch, size = batch[:0], 0
		}
		batch, size = append(batch, b), size+cost
	}
	return c.uploadBatch(ctx, batch)
}

func (c *client) uploadBatch(ctx context.Context, blobs []content) error {
	if len(blobs) == 0 {
		return nil
	}
	req := &repb.BatchUpdateBlobsRequest{
		InstanceName: c.instance, DigestFunction: c.fn.Proto(),
		Requests: make([]*repb.BatchUpdateBlobsRequest_Request, len(blobs)),
	}
	for i, b := range blobs {
		req.Requests[i] = &repb.BatchUpdateBlobsRequest_Request{Digest: b.digest.Proto(), Data: b.data}
	}
	resp, err := c.cas.BatchUpdateBlobs(ctx, req)
	if status.Code(err) == codes.Unimplemented {
		c.maxBatch.Store(0)
		return c.upload(ctx, blobs...)
	}
	if err != nil {
		return fmt.Errorf("BatchUpdateBlobs: %w", err)
	}
	if len(resp.GetResponses()) != len(blobs) {
		return answerError("BatchUpdateBlobs: %d responses for %d blobs", len(resp.GetResponses()), len(blobs))
	}
	for _, r := range resp.GetResponses() {
		if err := status.ErrorProto(r.GetStatus()); err != nil {
			return fmt.Errorf("BatchUpdateBlobs of %s: %w", r.GetDigest().GetHash(), err)
		}
	}
	return nil
}

// writeBytes is a ByteStream write of one blob.
func (c *client) writeBytes(ctx context.Context, d digest.Digest, parts ...[]byte) error {
	got, err := c.write(ctx, "uploads/"+newUUID()+"/blobs/"+d.String(), d.Size(), parts)
	if err == nil && got != d.Size() {
		err = answerError("ByteStream.Write: committed %d bytes of %d", got, d.Size())
	}
	return err
}

// write is a ByteStream write of size bytes. It returns the size committed.
func (c *client) write(ctx context.Context, name string, size int64, parts [][]byte) (int64, error) {
	s, err := c.open(ctx, streamWrite)
	if err != nil {
		return 0, fmt.Errorf("ByteStream.Write: %w", err)
	}
	m := &bspb.WriteRequest{ResourceName: c.resource(name)}
	for m.WriteOffset == 0 || m.WriteOffset < size {
		data := nextPart(&parts)
		m.FinishWrite = m.WriteOffset+int64(len(data)) == size
		if err := s.SendMsg(writeMessage(m, data)); err != nil {
			break // the answer tells why; a server may also have the blob already
		}
		if m.FinishWrite {
			break
		}
		m.WriteOffset += int64(len(data))
		m.ResourceName = ""
	}
	resp := &bspb.WriteResponse{}
	if err := s.CloseSend(); err != nil {
		return 0, fmt.Errorf("ByteStream.Write: %w", err)
	}
	if err := s.RecvMsg(resp); err != nil {
		return 0, fmt.Errorf("ByteStream.Write: %w", err)
	}
	// The call is over when its status is here.
	if err := s.RecvMsg(resp); !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("ByteStream.Write: %w", err)
	}
	return resp.GetCommittedSize(), nil
}

// nextPart cuts the next message off parts.
func nextPart(parts *[][]byte) []byte {
	for len(*parts) > 0 {
		p := (*parts)[0]
		if len(p) > streamMessage {
			(*parts)[0] = p[streamMessage:]
			return p[:streamMessage]
		}
		*parts = (*parts)[1:]
		if len(p) > 0 {
			return p
		}
	}
	return nil
}

// readBytes is a ByteStream read of one blob, whose bytes are counted.
func (c *client) readBytes(ctx context.Context, d digest.Digest) error {
	n, err := c.read(ctx, "blobs/"+d.String())
	if err == nil && n != d.Size() {
		err = answerError("ByteStream.Read: %d bytes of %d", n, d.Size())
	}
	return err
}

// read is a ByteStream read. It returns how many bytes came.
func (c *client) read(ctx context.Context, name string) (int64, error) {
	s, err := c.open(ctx, streamRead)
	if err != nil {
		return 0, fmt.Errorf("ByteStream.Read: %w", err)
	}
	if err := s.SendMsg(&bspb.ReadRequest{ResourceName: c.resource(name)}); err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("ByteStream.Read: %w", err)
	}
	if err := s.CloseSend(); err != nil {
		return 0, fmt.Errorf("ByteStream.Read: %w", err)
	}
	var got dataCounter
	for {
		err := s.RecvMsg(&got)
		if errors.Is(err, io.EOF) {
			return got.n, nil
		}
		if err != nil {
			return 0, fmt.Errorf("ByteStream.Read: %w", err)
		}
	}
}

func (c *client) resource(rest string) string {
	if c.instance == "" {
		return rest
	}
	return c.instance + "/" + rest
}

// newUUID is a random UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, by its contract
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// series makes blobs of one size, each other than all before, that share all
// but their last bytes: so only those need hashing, and the load generator does
// not measure its own hashing of large blobs. It is safe for concurrent use.
type series struct {
	fn     digest.Function
	size   int64 // of a blob, in bytes
	shared []byte
	state  hash.Hash // of shared; never written to again
}

// tailSize is the part of a blob that its series does not share.
const tailSize = 16

// newSeries returns a series of blobs of size bytes, at least tailSize+8, that
// do not compress.
func (c *client) newSeries(size int) *series {
	s := &series{fn: c.fn, size: int64(size), shared: make([]byte, size-tailSize), state: c.fn.New(int64(size))}
	_, _ = rand.Read(s.shared) // never fails, by its contract
	s.state.Write(s.shared)
	return s
}

// blob is number n of the series: the shared bytes and then the tail.
func (s *series) blob(n uint64) (digest.Digest, []byte) {
	tail := make([]byte, tailSize)
	binary.BigEndian.PutUint64(tail, n)
	if cl, ok := s.state.(hash.Cloner); ok {
		if h, err := cl.Clone(); err == nil {
			h.Write(tail)
			return digest.FromHash(s.fn, h, s.size), tail
		}
	}
	h := s.fn.New(s.size)
	h.Write(s.shared)
	h.Write(tail)
	return digest.FromHash(s.fn, h, s.size), tail
}

// content is number n of the series in one piece.
func (s *series) content(n uint64) content {
	d, tail := s.blob(n)
	return content{d, append(append(make([]byte, 0, d.Size()), s.shared...), tail...)}
}
