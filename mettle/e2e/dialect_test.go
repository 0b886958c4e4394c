package e2e_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/mettle-build/mettle/elan/digest"
)

// A dialect is the way in which one client speaks, for those that can't be had here:
// the calls that its sources make, with the fields that they set, and the checks that
// they make of the answers. The tests name the sources.
type dialect struct {
	t        *testing.T
	conn     *grpc.ClientConn
	instance string
	fn       digest.Function
	// named: requests have a digest_function, and resource names have one where the
	// specification wants it.
	named bool
	// tool and version go along with each call; none: no RequestMetadata.
	tool, version string
	headers       []string // sent beside it
}

// ctx is the context of a call.
func (d *dialect) ctx() context.Context {
	if d.tool == "" {
		return d.t.Context()
	}
	data, err := proto.Marshal(&repb.RequestMetadata{
		ToolDetails: &repb.ToolDetails{ToolName: d.tool, ToolVersion: d.version}, ToolInvocationId: "invocation", CorrelatedInvocationsId: "session",
	})
	if err != nil {
		d.t.Fatal(err)
	}
	ctx := metadata.AppendToOutgoingContext(d.t.Context(), d.headers...)
	return metadata.AppendToOutgoingContext(ctx, "build.bazel.remote.execution.v2.requestmetadata-bin", string(data))
}

func (d *dialect) digest(data []byte) *repb.Digest { return digest.Of(d.fn, data).Proto() }

// function is what the field digest_function of a request has.
func (d *dialect) function() repb.DigestFunction_Value {
	if d.named {
		return d.fn.Proto()
	}
	return repb.DigestFunction_UNKNOWN
}

// blobs are what is uploaded for an action, in the order in which it was added.
type blobs struct {
	d    *dialect
	data [][]byte
}

func (b *blobs) add(data []byte) *repb.Digest {
	b.data = append(b.data, data)
	return b.d.digest(data)
}

func (b *blobs) addMessage(m proto.Message) *repb.Digest {
	b.d.t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		b.d.t.Fatal(err)
	}
	return b.add(data)
}

// missing are those of the blobs that the server has not.
func (d *dialect) missing(b *blobs) [][]byte {
	d.t.Helper()
	req := &repb.FindMissingBlobsRequest{InstanceName: d.instance, DigestFunction: d.function()}
	byHash := map[string][]byte{}
	for _, data := range b.data {
		m := d.digest(data)
		byHash[m.Hash] = data
		req.BlobDigests = append(req.BlobDigests, m)
	}
	resp, err := repb.NewContentAddressableStorageClient(d.conn).FindMissingBlobs(d.ctx(), req)
	if err != nil {
		d.t.Fatalf("FindMissingBlobs: %v", err)
	}
	var found [][]byte
	for _, m := range resp.MissingBlobDigests {
		data, ok := byHash[m.Hash]
		if !ok {
			d.t.Fatalf("FindMissingBlobs names %v, which nobody asked for", m)
		}
		found = append(found, data)
	}
	return found
}

// batch uploads blobs in one call, as they are or compressed.
func (d *dialect) batch(c repb.Compressor_Value, all ...[]byte) {
	d.t.Helper()
	req := &repb.BatchUpdateBlobsRequest{InstanceName: d.instance, DigestFunction: d.function()}
	for _, data := range all {
		r := &repb.BatchUpdateBlobsRequest_Request{Digest: d.digest(data), Data: data, Compressor: c}
		if c == repb.Compressor_ZSTD {
			r.Data = compress(d.t, data)
		}
		req.Requests = append(req.Requests, r)
	}
	resp, err := repb.NewContentAddressableStorageClient(d.conn).BatchUpdateBlobs(d.ctx(), req)
	if err != nil {
		d.t.Fatalf("BatchUpdateBlobs: %v", err)
	}
	if len(resp.Responses) != len(all) {
		d.t.Errorf("BatchUpdateBlobs answers %d of %d", len(resp.Responses), len(all))
	}
	for _, r := range resp.Responses {
		if r.Digest == nil || r.Status.GetCode() != 0 {
			d.t.Errorf("BatchUpdateBlobs: %v", r)
		}
	}
}

// A written is how a client writes blobs by ByteStream.
type written struct {
	chunk int
	zstd  bool
	// eachNamed: every message has the resource name, not the first alone.
	eachNamed bool
	// lastEmpty: the stream is finished by a message without data.
	lastEmpty bool
}

// write uploads a blob, and returns the committed size. The server may answer before
// the end, where it has the blob.
func (d *dialect) write(w written, data []byte) int64 {
	d.t.Helper()
	name, body := strings.Replace(d.resourceOf(d.digest(data)), "blobs/", "uploads/"+newUUID()+"/blobs/", 1), data
	if w.zstd {
		name, body = strings.Replace(name, "/blobs/", "/compressed-blobs/zstd/", 1), compress(d.t, data)
	}
	stream, err := bytestream.NewByteStreamClient(d.conn).Write(d.ctx())
	if err != nil {
		d.t.Fatalf("Write: %v", err)
	}
	for off, first := 0, true; ; first = false {
		n := min(w.chunk, len(body)-off)
		last := off+n == len(body) && (!w.lastEmpty || n == 0)
		m := &bytestream.WriteRequest{WriteOffset: int64(off), Data: body[off : off+n], FinishWrite: last}
		if first || w.eachNamed {
			m.ResourceName = name
		}
		err := stream.Send(m)
		if err != nil && !errors.Is(err, io.EOF) {
			d.t.Fatalf("Write %s: %v", name, err)
		}
		if off += n; last || err != nil {
			break
		}
	}
	resp, err := stream.CloseAndRecv()
	if err != nil {
		d.t.Fatalf("Write %s: %v", name, err)
	}
	return resp.CommittedSize
}

// resourceOf is the resource name of a blob.
func (d *dialect) resourceOf(m *repb.Digest) string {
	name := "blobs/"
	if d.named && d.fn == digest.BLAKE3 {
		name += "blake3/"
	}
	name += fmt.Sprintf("%s/%d", m.GetHash(), m.GetSizeBytes())
	if d.instance != "" {
		name = d.instance + "/" + name
	}
	return name
}

// read downloads a blob by ByteStream.
func (d *dialect) read(m *repb.Digest, compressed bool) []byte {
	d.t.Helper()
	name := d.resourceOf(m)
	if compressed {
		name = strings.Replace(name, "blobs/", "compressed-blobs/zstd/", 1)
	}
	stream, err := bytestream.NewByteStreamClient(d.conn).Read(d.ctx(), &bytestream.ReadRequest{ResourceName: name})
	if err != nil {
		d.t.Fatalf("Read %s: %v", name, err)
	}
	var got []byte
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			d.t.Fatalf("Read %s: %v", name, err)
		}
		got = append(got, resp.Data...)
	}
	if compressed {
		got = decompress(d.t, got)
	}
	if want := d.digest(got); !proto.Equal(want, m) {
		d.t.Errorf("Read %s: the bytes are %v", name, want)
	}
	return got
}

// result is what the ActionCache has; nil: nothing.
func (d *dialect) result(req *repb.GetActionResultRequest) *repb.ActionResult {
	d.t.Helper()
	req.InstanceName, req.DigestFunction = d.instance, d.function()
	res, err := repb.NewActionCacheClient(d.conn).GetActionResult(d.ctx(), req)
	if gstatus.Code(err) == codes.NotFound {
		return nil
	}
	if err != nil {
		d.t.Fatalf("GetActionResult: %v", err)
	}
	return res
}

// execute runs an action to its end.
func (d *dialect) execute(req *repb.ExecuteRequest) *repb.ExecuteResponse {
	d.t.Helper()
	req.InstanceName, req.DigestFunction = d.instance, d.function()
	stream, err := repb.NewExecutionClient(d.conn).Execute(d.ctx(), req)
	if err != nil {
		d.t.Fatalf("Execute: %v", err)
	}
	return (&begun{stream: stream}).end(d.t)
}

// capabilities are those of the server, after the check of the versions that Bazel,
// Please and the Go SDK make: that which the client speaks is between the lowest and
// the highest of the server.
func (d *dialect) capabilities(minor int32) *repb.ServerCapabilities {
	d.t.Helper()
	caps, err := repb.NewCapabilitiesClient(d.conn).GetCapabilities(d.ctx(), &repb.GetCapabilitiesRequest{InstanceName: d.instance})
	if err != nil {
		d.t.Fatalf("GetCapabilities: %v", err)
	}
	low, high := caps.LowApiVersion, caps.HighApiVersion
	if low.GetMajor() != 2 || low.GetMinor() > minor || high.GetMajor() != 2 || high.GetMinor() < minor {
		d.t.Errorf("the server speaks %v to %v, and the client 2.%d", low, high, minor)
	}
	return caps
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = 0x40|b[6]&0xf, 0x80|b[8]&0x3f // version 4
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func compress(t *testing.T, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(data, nil)
}

func decompress(t *testing.T, data []byte) []byte {
	t.Helper()
	r, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	plain, err := r.DecodeAll(data, nil)
	if err != nil {
		t.Fatal(err)
	}
	return plain
}

// large is an input that compresses, of more than a message, which is no other test's.
func large(name string) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < 5<<20; i++ {
		fmt.Fprintf(&b, "%s line %d\n", name, i)
	}
	return b.Bytes()
}

// TestDialects has clients that are not here speak to a server as their sources do, and to
// the API server of a fleet.
func TestDialects(t *testing.T) {
	platform := []string{"--slots=4", "--platform=label:action_default=1", "--platform=InputRootAbsolutePath=*"}
	for kind, serve := range map[string]func(t *testing.T) *server{
		"dual": func(t *testing.T) *server { return startDual(t, storeDir(t), platform...) },
		"fleet": func(t *testing.T) *server {
			f := newFleet(t)
			w := f.worker(0)
			w.args = append(w.args, platform...)
			for _, s := range []*server{f.broker, f.elan, f.api, w} {
				s.Start()
			}
			awaitReady(t, w)
			awaitReady(t, f.api)
			return f.api
		},
	} {
		t.Run(kind, func(t *testing.T) {
			conn := serve(t).client(t).conn
			for name, test := range map[string]func(t *testing.T, conn *grpc.ClientConn){
				"Bazel_5": bazel5, "Bazel_6": bazel6, "Bazel_7": bazel7, "Bazel_8": bazel8, "Bazel_9": bazel9,
				"Buck2": buck2, "Pants": pants, "Please": please, "reclient": reclient, "siso": siso, "recc": recc, "BuildStream_2": buildStream2,
			} {
				t.Run(name, func(t *testing.T) { test(t, conn) })
			}
		})
	}
}
