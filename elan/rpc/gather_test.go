package rpc_test

import (
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/experimental"

	"github.com/mettle-build/mettle/elan/rpc"
	"github.com/mettle-build/mettle/elan/wire"
)

// countingPool counts the buffers that are in use.
type countingPool struct {
	wire.Pool
	out atomic.Int64
}

func (p *countingPool) Get(n int) *[]byte {
	p.out.Add(1)
	return p.Pool.Get(n)
}

func (p *countingPool) Put(b *[]byte) {
	p.out.Add(-1)
	p.Pool.Put(b)
}

// TestWrite_bounds_what_it_holds: a byte of a message keeps the whole buffer in
// which it came, of up to 16 KiB, so that bytes alone bound nothing.
func TestWrite_bounds_what_it_holds(t *testing.T) {
	pool := &countingPool{}
	s := start(t, rpc.Options{}, grpc.ForceServerCodecV2(wire.NewCodec(pool)), experimental.BufferPool(pool))
	data := pattern(3000)
	d := of(data)
	name := uploadName(d) + "/" + strings.Repeat("x", 2000) // repeated, as clients may
	stream, err := s.streams.Write(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range data[1:] {
		if err := stream.Send(&bytestream.WriteRequest{ResourceName: name, WriteOffset: int64(i), Data: data[i : i+1]}); err != nil {
			t.Fatal(err)
		}
	}
	for received := int64(0); received < d.Size()-1; runtime.Gosched() {
		q, err := s.streams.QueryWriteStatus(t.Context(), &bytestream.QueryWriteStatusRequest{ResourceName: name})
		if err != nil {
			t.Fatal(err)
		}
		received = q.CommittedSize
	}
	if n := pool.out.Load(); n > 500 {
		t.Errorf("%d buffers are held for %d bytes", n, d.Size()-1)
	}
	last := &bytestream.WriteRequest{WriteOffset: d.Size() - 1, Data: data[d.Size()-1:], FinishWrite: true}
	if err := stream.Send(last); err != nil {
		t.Fatal(err)
	}
	if resp, err := stream.CloseAndRecv(); err != nil || resp.CommittedSize != d.Size() {
		t.Errorf("%v, %v", resp, err)
	}
}
