package relay_test

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/client"
	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/relay"
)

// Benchmark is the same calls by sixteen clients, to an elan and through a relay.
// All is in this process, so that the difference of the CPU times is the relay's.
func Benchmark(b *testing.B) {
	register := elan(b)
	backend := started(b, register)
	s := relayTo(b, relay.Options{}, backend)
	small, large := blobtest.Random(1, 1<<10), blobtest.Random(2, 16<<20)
	var ds []digest.Digest
	for i := range 1000 {
		ds = append(ds, digest.Of(digest.SHA256, fmt.Append(nil, i)))
	}
	for _, via := range []struct {
		name string
		conn *grpc.ClientConn
	}{{"direct", connect(b, []string{backend.addr})}, {"relay", s.conn}} {
		c, err := client.New(client.Options{Conn: via.conn})
		if err != nil {
			b.Fatal(err)
		}
		read := func(data []byte) func() error {
			d := blobtest.Put(b, c, digest.SHA256, data)
			return func() error {
				r, err := c.Open(b.Context(), d, 0)
				if err != nil {
					return err
				}
				defer r.Close()
				_, err = r.(io.WriterTo).WriteTo(io.Discard)
				return err
			}
		}
		write := func(data []byte) func() error {
			var mu sync.Mutex
			n := 0
			return func() error {
				mu.Lock()
				n++
				mine := append(fmt.Append(nil, via.name, n, "/"), data...)
				mu.Unlock()
				return blob.Receive(b.Context(), c, digest.Of(digest.SHA256, mine), bytes.NewReader(mine))
			}
		}
		for _, call := range []struct {
			name    string
			clients int
			do      func() error
		}{
			{"find_1000", 16, func() error { _, err := c.FindMissing(b.Context(), ds); return err }},
			{"read_1KiB", 16, read(small)},
			{"write_1KiB", 16, write(small)},
			{"read_16MiB", 1, read(large)},
		} {
			b.Run(call.name+"/"+via.name, func(b *testing.B) {
				b.SetParallelism(max(call.clients/2, 1))
				before := cpu(b)
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if err := call.do(); err != nil {
							b.Error(err)
						}
					}
				})
				b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N), "cpu-µs/op")
			})
		}
	}
}

// cpu is what this process has used.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
