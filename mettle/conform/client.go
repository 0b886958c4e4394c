package conform

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"

	"cloud.google.com/go/longrunning/autogen/longrunningpb"
	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
)

// clients are the services.
type clients struct {
	caps    repb.CapabilitiesClient
	cas     repb.ContentAddressableStorageClient
	actions repb.ActionCacheClient
	exec    repb.ExecutionClient
	streams bytestream.ByteStreamClient
	ops     longrunningpb.OperationsClient
}

func newClients(c grpc.ClientConnInterface) clients {
	return clients{
		repb.NewCapabilitiesClient(c), repb.NewContentAddressableStorageClient(c), repb.NewActionCacheClient(c),
		repb.NewExecutionClient(c), bytestream.NewByteStreamClient(c), longrunningpb.NewOperationsClient(c),
	}
}

// bytes are size bytes that no server has seen, and that don't compress.
func (t *T) bytes(size int) []byte {
	t.made++
	seed := sha256.Sum256(fmt.Appendf(nil, "%s %s %d", t.salt, t.name, t.made))
	data := make([]byte, size+8)
	rng := rand.NewChaCha8(seed)
	for i := 0; i < size; i += 8 {
		binary.LittleEndian.PutUint64(data[i:], rng.Uint64())
	}
	return data[:size]
}

// digest is that of data, by the case's function.
func (t *T) digest(data []byte) *repb.Digest { return digest.Of(t.fn, data).Proto() }

// fresh is the digest of a blob that the server does not have.
func (t *T) fresh() *repb.Digest { return t.digest(t.bytes(100)) }

// function is what requests say of the case's function: nothing where servers are to
// find it out by the length of the hash.
func (t *T) function() repb.DigestFunction_Value {
	if t.fn.Named() {
		return t.fn.Proto()
	}
	return repb.DigestFunction_UNKNOWN
}

// named is a part of a resource name, with a slash, where the function is one that
// names say.
func (t *T) named() string {
	if t.fn.Named() {
		return t.fn.String() + "/"
	}
	return ""
}

// prefix is that of resource names.
func (t *T) prefix() string {
	if t.o.Instance == "" {
		return ""
	}
	return t.o.Instance + "/"
}

func (t *T) readName(d *repb.Digest) string {
	return fmt.Sprintf("%sblobs/%s%s/%d", t.prefix(), t.named(), d.Hash, d.SizeBytes)
}

func (t *T) writeName(d *repb.Digest) string {
	return fmt.Sprintf("%suploads/%s/blobs/%s%s/%d", t.prefix(), t.uuid(), t.named(), d.Hash, d.SizeBytes)
}

func (t *T) zstdReadName(d *repb.Digest) string {
	return fmt.Sprintf("%scompressed-blobs/zstd/%s%s/%d", t.prefix(), t.named(), d.Hash, d.SizeBytes)
}

func (t *T) zstdWriteName(d *repb.Digest) string {
	return fmt.Sprintf("%suploads/%s/compressed-blobs/zstd/%s%s/%d", t.prefix(), t.uuid(), t.named(), d.Hash, d.SizeBytes)
}

// uuid is one of version 4.
func (t *T) uuid() string {
	b := t.bytes(16)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// read reads a resource.
func (t *T) read(ctx context.Context, name string, offset, limit int64) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := t.calls.streams.Read(ctx, &bytestream.ReadRequest{ResourceName: name, ReadOffset: offset, ReadLimit: limit})
	if err != nil {
		return nil, err
	}
	var data []byte
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return data, nil
		}
		if err != nil {
			return data, err
		}
		data = append(data, r.Data...)
	}
}

// part is a message of a Write.
type part struct {
	offset int64
	data   []byte
	finish bool
}

// parts are data in messages of at most n bytes, the last of which finishes.
func parts(data []byte, n int) []part {
	var ps []part
	for offset := 0; ; offset += n {
		end := min(offset+n, len(data))
		ps = append(ps, part{offset: int64(offset), data: data[offset:end], finish: end == len(data)})
		if end == len(data) {
			return ps
		}
	}
}

// write writes a resource.
func (t *T) write(ctx context.Context, name string, ps ...part) (*bytestream.WriteResponse, error) {
	s, err := t.calls.streams.Write(ctx)
	if err != nil {
		return nil, err
	}
	for i, p := range ps {
		m := &bytestream.WriteRequest{WriteOffset: p.offset, Data: p.data, FinishWrite: p.finish}
		if i == 0 {
			m.ResourceName = name
		}
		if err := s.Send(m); err != nil {
			if errors.Is(err, io.EOF) {
				break // the response says why
			}
			return nil, err
		}
	}
	return s.CloseAndRecv()
}

// put stores a blob in the way that works at all servers.
func (t *T) put(ctx context.Context, data []byte) *repb.Digest {
	d := t.digest(data)
	if _, err := t.write(ctx, t.writeName(d), parts(data, 64<<10)...); err != nil {
		t.fatalf("a blob of %d bytes can't be stored: %v", len(data), err)
	}
	return d
}

// putMessage stores a message.
func (t *T) putMessage(ctx context.Context, m proto.Message) *repb.Digest {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.fatalf("marshal: %v", err)
	}
	return t.put(ctx, data)
}

// missing asks which of ds are missing.
func (t *T) missing(ctx context.Context, ds ...*repb.Digest) []*repb.Digest {
	r, err := t.calls.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{InstanceName: t.o.Instance, BlobDigests: ds, DigestFunction: t.function()})
	if err != nil {
		t.fatalf("FindMissingBlobs: %v", err)
	}
	return r.MissingBlobDigests
}

// isMissing reports whether d is.
func (t *T) isMissing(ctx context.Context, d *repb.Digest) bool { return len(t.missing(ctx, d)) > 0 }

// want wants a call to end with one of the codes.
func (t *T) want(what string, err error, want ...codes.Code) {
	if got := status.Code(err); !slices.Contains(want, got) {
		names := make([]string, len(want))
		for i, c := range want {
			names[i] = c.String()
		}
		t.errorf("%s: got %v, want %s", what, said(err), strings.Join(names, " or "))
	}
}

// ok wants a call to succeed, and ends the case where it does not.
func (t *T) ok(what string, err error) {
	if err != nil {
		t.fatalf("%s: %v", what, said(err))
	}
}

func said(err error) string {
	if err == nil {
		return "OK"
	}
	s := status.Convert(err)
	return fmt.Sprintf("%s (%s)", s.Code(), s.Message())
}

// same wants bytes to be equal.
func (t *T) same(what string, got, want []byte) {
	if bytes.Equal(got, want) {
		return
	}
	i := 0
	for i < min(len(got), len(want)) && got[i] == want[i] {
		i++
	}
	t.errorf("%s: %d bytes that differ at %d from the %d that were stored", what, len(got), i, len(want))
}

// has reports whether ds has d.
func has(ds []*repb.Digest, d *repb.Digest) bool {
	return slices.ContainsFunc(ds, func(o *repb.Digest) bool { return proto.Equal(o, d) })
}

// The needs.

func needsCache(s *server) string {
	if s.caps.GetCacheCapabilities() == nil {
		return "the server announces no cache"
	}
	return ""
}

func needsZstd(s *server) string {
	if !slices.Contains(s.caps.GetCacheCapabilities().GetSupportedCompressors(), repb.Compressor_ZSTD) {
		return "the server announces no zstd"
	}
	return ""
}

func needsBatchZstd(s *server) string {
	if !slices.Contains(s.caps.GetCacheCapabilities().GetSupportedBatchUpdateCompressors(), repb.Compressor_ZSTD) {
		return "the server announces no zstd for batches"
	}
	return ""
}

func needsUpdate(s *server) string {
	if !s.caps.GetCacheCapabilities().GetActionCacheUpdateCapabilities().GetUpdateEnabled() {
		return "the server announces that results are not taken from clients"
	}
	return ""
}

func needsExecution(s *server) string {
	switch {
	case s.o.NoExecution:
		return "it is left out"
	case !s.caps.GetExecutionCapabilities().GetExecEnabled():
		return "the server announces no execution"
	}
	return ""
}

func needsChunks(s *server) string {
	c := s.caps.GetCacheCapabilities()
	if !c.GetSplitBlobSupport() || !c.GetSpliceBlobSupport() {
		return "the server announces no chunks"
	}
	return ""
}

// needsVersion is of an API version 2.minor.
func needsVersion(minor int32) need {
	return func(s *server) string {
		if v := s.caps.GetHighApiVersion(); v.GetMajor() < 2 || v.GetMajor() == 2 && v.GetMinor() < minor {
			return fmt.Sprintf("the server announces API %d.%d, this is of 2.%d", v.GetMajor(), v.GetMinor(), minor)
		}
		return ""
	}
}

// messages are those of a stream, up to its end or its error.
func messages[M any](recv func() (M, error)) iter.Seq2[M, error] {
	return func(yield func(M, error) bool) {
		for {
			m, err := recv()
			if errors.Is(err, io.EOF) || !yield(m, err) || err != nil {
				return
			}
		}
	}
}
