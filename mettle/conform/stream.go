package conform

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"google.golang.org/genproto/googleapis/bytestream"
	"google.golang.org/grpc/codes"
)

const (
	readForm     = "For uncompressed data, the `ReadRequest.resource_name` is of the following form: `{instance_name}/blobs/{digest_function/}{hash}/{size}`"
	writeForm    = "`{instance_name}/uploads/{uuid}/blobs/{digest_function/}{hash}/{size}{/optional_metadata}`"
	mismatch     = "If the client completes the upload but the [Digest][build.bazel.remote.execution.v2.Digest] does not match, an `INVALID_ARGUMENT` error will be returned."
	alreadyThere = "the request will terminate immediately without error, and with a response whose `committed_size` is the value `-1` if this is a compressed upload, or with the full size of the uploaded file if this is an uncompressed upload (regardless of how much data was transmitted by the client)."
)

//nolint:revive // a table
func readCases() []Case {
	cas := []need{needsCache}
	const size = 300_000
	return []Case{
		{Name: "read/whole", Clause: readForm, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(size)
			got, err := t.read(ctx, t.readName(t.put(ctx, data)), 0, 0)
			t.ok("Read", err)
			t.same("Read", got, data)
		}},
		{Name: "read/offset", Clause: readForm, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(size)
			name := t.readName(t.put(ctx, data))
			for _, offset := range []int64{1, 4096, 65_537, size - 1} {
				got, err := t.read(ctx, name, offset, 0)
				t.ok(fmt.Sprintf("Read from %d", offset), err)
				t.same(fmt.Sprintf("Read from %d", offset), got, data[offset:])
			}
		}},
		{Name: "read/limit", Clause: readForm, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(size)
			name := t.readName(t.put(ctx, data))
			for _, r := range [][2]int64{{0, 1}, {0, size}, {10, 100_000}, {size - 5, 100}} {
				got, err := t.read(ctx, name, r[0], r[1])
				t.ok(fmt.Sprintf("Read of %d from %d", r[1], r[0]), err)
				t.same(fmt.Sprintf("Read of %d from %d", r[1], r[0]), got, data[r[0]:min(r[0]+r[1], size)])
			}
		}},
		{Name: "read/at_the_end", Clause: readForm, Needs: cas, run: func(ctx context.Context, t *T) {
			got, err := t.read(ctx, t.readName(t.put(ctx, t.bytes(100))), 100, 0)
			if err == nil && len(got) > 0 {
				t.errorf("%d bytes behind the end", len(got))
			}
			t.want("Read from the end", err, codes.OK, codes.OutOfRange)
		}},
		{Name: "read/behind_the_end", Clause: readForm, Needs: cas, run: func(ctx context.Context, t *T) {
			_, err := t.read(ctx, t.readName(t.put(ctx, t.bytes(100))), 101, 0)
			t.want("Read from behind the end", err, codes.OutOfRange)
		}},
		{Name: "read/negative_offset", Clause: readForm, Needs: cas, run: func(ctx context.Context, t *T) {
			_, err := t.read(ctx, t.readName(t.put(ctx, t.bytes(100))), -1, 0)
			t.want("Read from -1", err, codes.OutOfRange, codes.InvalidArgument)
		}},
		{Name: "read/negative_limit", Clause: readForm, Needs: cas, run: func(ctx context.Context, t *T) {
			_, err := t.read(ctx, t.readName(t.put(ctx, t.bytes(100))), 0, -1)
			t.want("Read of -1 bytes", err, codes.InvalidArgument)
		}},
		{Name: "read/absent", Clause: readForm, Needs: cas, run: func(ctx context.Context, t *T) {
			_, err := t.read(ctx, t.readName(t.fresh()), 0, 0)
			t.want("Read of what is not there", err, codes.NotFound)
		}},
		{Name: "read/empty_blob", Clause: emptyClause, Needs: cas, run: func(ctx context.Context, t *T) {
			got, err := t.read(ctx, t.readName(t.digest(nil)), 0, 0)
			t.ok("Read of the empty blob", err)
			t.same("Read of the empty blob", got, nil)
		}},
		{Name: "read/another_size", Clause: sizeClause, Needs: cas, run: func(ctx context.Context, t *T) {
			d := t.put(ctx, t.bytes(100))
			d.SizeBytes = 99
			got, err := t.read(ctx, t.readName(d), 0, 0)
			if err == nil {
				t.errorf("a blob of 100 bytes was read under a digest of 99: %d bytes", len(got))
			}
		}},
		{Name: "read/malformed_names", Clause: readForm, Needs: cas, run: func(ctx context.Context, t *T) {
			d := t.fresh()
			for _, name := range []string{"", "blobs", "blobs/" + d.Hash, "blobs/xyz/1", fmt.Sprintf("blobs/%s/x", d.Hash), fmt.Sprintf("blobs/%s/-1", d.Hash), fmt.Sprintf("blobs/%s/1/2", d.Hash)} {
				_, err := t.read(ctx, name, 0, 0)
				t.want(fmt.Sprintf("Read of %q", name), err, codes.InvalidArgument, codes.NotFound)
			}
		}},
		{Name: "read/upper_case_hash", Clause: hashClause, Needs: cas, run: func(ctx context.Context, t *T) {
			d := t.put(ctx, t.bytes(100))
			up := t.prefix() + "blobs/" + t.named() + strings.ToUpper(d.Hash) + "/100"
			_, err := t.read(ctx, up, 0, 0)
			t.want("Read of a hash in capital letters", err, codes.InvalidArgument, codes.NotFound)
		}},
		{Name: "read/large", Clause: "For large downloads, the client must use the [Read method][google.bytestream.ByteStream.Read] of the ByteStream API.", Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(20 << 20)
			got, err := t.read(ctx, t.readName(t.put(ctx, data)), 0, 0)
			t.ok("Read", err)
			t.same("Read", got, data)
		}},
		{Name: "read/many_at_once", Clause: readForm, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(size)
			name := t.readName(t.put(ctx, data))
			var wg sync.WaitGroup
			errs := make(chan error, 64)
			for range cap(errs) {
				wg.Go(func() {
					got, err := t.read(ctx, name, 0, 0)
					if err == nil && len(got) != size {
						err = fmt.Errorf("%d bytes", len(got))
					}
					errs <- err
				})
			}
			wg.Wait()
			for range cap(errs) {
				t.ok("one of 64 reads", <-errs)
			}
		}},
		{Name: "read/broken_off", Clause: readForm, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(5 << 20)
			name := t.readName(t.put(ctx, data))
			for range 20 {
				broken, cancel := context.WithCancel(ctx)
				s, err := t.calls.streams.Read(broken, &bytestream.ReadRequest{ResourceName: name})
				t.ok("Read", err)
				_, err = s.Recv()
				t.ok("Read", err)
				cancel()
			}
			got, err := t.read(ctx, name, 0, 0)
			t.ok("Read after 20 that were broken off", err)
			t.same("Read after 20 that were broken off", got, data)
		}},
	}
}

func writeCases() []Case {
	return append(writeFormCases(), writeTroubleCases()...)
}

//nolint:revive // a table
func writeFormCases() []Case {
	cas := []need{needsCache}
	committed := func(what string, size int) Case {
		return Case{Name: "write/" + what, Clause: writeForm, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(size)
			n := map[string]int{"one_message": max(1, size), "small_messages": 16 << 10, "odd_messages": 7777}[what]
			r, err := t.write(ctx, t.writeName(t.digest(data)), parts(data, n)...)
			t.ok("Write", err)
			if r.CommittedSize != int64(size) {
				t.errorf("committed_size is %d, want %d", r.CommittedSize, size)
			}
			got, err := t.read(ctx, t.readName(t.digest(data)), 0, 0)
			t.ok("Read", err)
			t.same("Read", got, data)
		}}
	}
	return []Case{
		committed("one_message", 50_000),
		committed("small_messages", 200_000),
		committed("odd_messages", 100_000),
		{Name: "write/finish_in_a_message_of_its_own", Clause: writeForm, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(1000)
			r, err := t.write(ctx, t.writeName(t.digest(data)), part{data: data}, part{offset: 1000, finish: true})
			t.ok("Write", err)
			if r.CommittedSize != 1000 {
				t.errorf("committed_size is %d, want 1000", r.CommittedSize)
			}
		}},
		{Name: "write/metadata", Clause: "`optional_metadata` is implementation specific data, which clients MAY omit. Servers MAY ignore this metadata.", Needs: cas, run: func(ctx context.Context, t *T) {
			for _, more := range []string{"/file.txt", "/a/b/c"} {
				data := t.bytes(100)
				_, err := t.write(ctx, t.writeName(t.digest(data))+more, part{data: data, finish: true})
				t.ok("Write of a name with "+more, err)
			}
		}},
		{Name: "write/same_uuid", Clause: "Clients MAY reuse the same `uuid` for uploading different blobs.", Needs: cas, run: func(ctx context.Context, t *T) {
			uuid := t.uuid()
			for range 3 {
				data := t.bytes(100)
				d := t.digest(data)
				_, err := t.write(ctx, fmt.Sprintf("%suploads/%s/blobs/%s%s/%d", t.prefix(), uuid, t.named(), d.Hash, d.SizeBytes), part{data: data, finish: true})
				t.ok("Write", err)
			}
		}},
		{Name: "write/empty_blob", Clause: emptyClause, Needs: cas, run: func(ctx context.Context, t *T) {
			r, err := t.write(ctx, t.writeName(t.digest(nil)), part{finish: true})
			t.ok("Write of the empty blob", err)
			if r.CommittedSize != 0 {
				t.errorf("committed_size is %d, want 0", r.CommittedSize)
			}
		}},
		{Name: "write/again", Clause: alreadyThere, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(200_000)
			t.put(ctx, data)
			r, err := t.write(ctx, t.writeName(t.digest(data)), parts(data, 16<<10)...)
			t.ok("Write of what is there", err)
			if r.CommittedSize != 200_000 {
				t.errorf("committed_size is %d, want the full size, 200000", r.CommittedSize)
			}
		}},
		{Name: "write/again_first_message_only", Clause: alreadyThere, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(200_000)
			t.put(ctx, data)
			s, err := t.calls.streams.Write(ctx)
			t.ok("Write", err)
			if err := s.Send(&bytestream.WriteRequest{ResourceName: t.writeName(t.digest(data)), Data: data[:1000]}); err != nil && !errors.Is(err, io.EOF) {
				t.fatalf("Send: %v", err)
			}
			r := &bytestream.WriteResponse{}
			if err := s.RecvMsg(r); err != nil { // without the rest, and without an end
				t.fatalf("the answer to the first message: %v", err)
			}
			if r.CommittedSize != 200_000 {
				t.errorf("committed_size is %d, want the full size, 200000", r.CommittedSize)
			}
		}},
		{Name: "write/at_once", Clause: "Uploads of the same data MAY occur concurrently in any form, compressed or uncompressed.", Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(300_000)
			d := t.digest(data)
			names := make([]string, 16)
			for i := range names {
				names[i] = t.writeName(d)
			}
			errs := make(chan error, len(names))
			for _, name := range names {
				go func() {
					r, err := t.write(ctx, name, parts(data, 16<<10)...)
					if err == nil && r.CommittedSize != 300_000 {
						err = fmt.Errorf("committed_size is %d", r.CommittedSize)
					}
					errs <- err
				}()
			}
			for range names {
				t.ok("one of 16 writes of the same blob", <-errs)
			}
		}},
		{Name: "write/large", Clause: "For large uploads, the client must use the [Write method][google.bytestream.ByteStream.Write] of the ByteStream API.", Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(20 << 20)
			if limit := t.caps.CacheCapabilities.MaxCasBlobSizeBytes; limit > 0 && limit < int64(len(data)) {
				t.skipf("the server takes no blob above %d bytes", limit)
			}
			r, err := t.write(ctx, t.writeName(t.digest(data)), parts(data, 1<<20)...)
			t.ok("Write", err)
			if r.CommittedSize != int64(len(data)) {
				t.errorf("committed_size is %d, want %d", r.CommittedSize, len(data))
			}
		}},
	}
}

//nolint:revive // a table
func writeTroubleCases() []Case {
	cas := []need{needsCache}
	refused := func(name, clause string, send func(t *T) (string, []part), want ...codes.Code) Case {
		return Case{Name: "write/" + name, Clause: clause, Needs: cas, run: func(ctx context.Context, t *T) {
			resource, ps := send(t)
			_, err := t.write(ctx, resource, ps...)
			t.want("Write", err, want...)
		}}
	}
	return []Case{
		{Name: "write/wrong_content", Clause: mismatch, Needs: cas, run: func(ctx context.Context, t *T) {
			d := t.digest(t.bytes(5000))
			_, err := t.write(ctx, t.writeName(d), parts(t.bytes(5000), 1000)...)
			t.want("Write of other bytes", err, codes.InvalidArgument)
			if !t.isMissing(ctx, d) {
				t.errorf("the digest of other bytes is there afterwards")
			}
		}},
		refused("too_short", mismatch, func(t *T) (string, []part) {
			data := t.bytes(5000)
			return t.writeName(t.digest(data)), parts(data[:4000], 1000)
		}, codes.InvalidArgument),
		refused("too_long", mismatch, func(t *T) (string, []part) {
			data := t.bytes(5000)
			return t.writeName(t.digest(data)), parts(append(data, 'x'), 1000)
		}, codes.InvalidArgument, codes.OutOfRange),
		refused("gap", writeForm, func(t *T) (string, []part) {
			data := t.bytes(2000)
			return t.writeName(t.digest(data)), []part{{data: data[:1000]}, {offset: 1500, data: data[1500:], finish: true}}
		}, codes.InvalidArgument, codes.OutOfRange),
		refused("begins_in_the_middle", writeForm, func(t *T) (string, []part) {
			data := t.bytes(2000)
			return t.writeName(t.digest(data)), []part{{offset: 1000, data: data[1000:], finish: true}}
		}, codes.InvalidArgument, codes.OutOfRange, codes.Aborted, codes.FailedPrecondition),
		refused("no_name", writeForm, func(t *T) (string, []part) { return "", []part{{data: t.bytes(10), finish: true}} }, codes.InvalidArgument),
		refused("malformed_name", writeForm, func(t *T) (string, []part) {
			return "uploads/1/blobs/xyz/3", []part{{data: t.bytes(3), finish: true}}
		}, codes.InvalidArgument),
		refused("name_for_reading", writeForm, func(t *T) (string, []part) {
			data := t.bytes(10)
			return t.readName(t.digest(data)), []part{{data: data, finish: true}}
		}, codes.InvalidArgument),
		refused("another_size", sizeClause, func(t *T) (string, []part) {
			data := t.bytes(10)
			d := t.digest(data)
			d.SizeBytes = 11
			return t.writeName(d), []part{{data: data, finish: true}}
		}, codes.InvalidArgument),
		{Name: "write/broken_off_is_not_there", Clause: "servers MUST NOT trust digests provided by the client.", Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(100_000)
			d := t.digest(data)
			broken, cancel := context.WithCancel(ctx)
			s, err := t.calls.streams.Write(broken)
			t.ok("Write", err)
			if err := s.Send(&bytestream.WriteRequest{ResourceName: t.writeName(d), Data: data[:50_000]}); err != nil {
				t.fatalf("Send: %v", err)
			}
			cancel()
			if !t.isMissing(ctx, d) {
				t.errorf("a blob half of which was sent is there")
			}
		}},
		{Name: "write/without_an_end", Clause: mismatch, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(1000)
			d := t.digest(data)
			_, _ = t.write(ctx, t.writeName(d), part{data: data[:500]})
			if !t.isMissing(ctx, d) {
				t.errorf("a blob half of which was sent, and that was not finished, is there")
			}
		}},
		{Name: "query_write_status/complete", Clause: alreadyThere, Level: Should, Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(1000)
			t.put(ctx, data)
			r, err := t.calls.streams.QueryWriteStatus(ctx, &bytestream.QueryWriteStatusRequest{ResourceName: t.writeName(t.digest(data))})
			t.ok("QueryWriteStatus of what is there", err)
			if !r.Complete || r.CommittedSize != 1000 {
				t.errorf("complete is %v, committed_size %d; want true and 1000", r.Complete, r.CommittedSize)
			}
		}},
		{Name: "query_write_status/unknown", Clause: writeForm, Level: Should, Needs: cas, run: func(ctx context.Context, t *T) {
			r, err := t.calls.streams.QueryWriteStatus(ctx, &bytestream.QueryWriteStatusRequest{ResourceName: t.writeName(t.fresh())})
			t.want("QueryWriteStatus of what nobody has begun", err, codes.OK, codes.NotFound)
			if r.GetComplete() || r.GetCommittedSize() != 0 {
				t.errorf("complete is %v, committed_size %d", r.GetComplete(), r.GetCommittedSize())
			}
		}},
	}
}

func instanceCases() []Case {
	cas := []need{needsCache}
	return []Case{
		{Name: "instance/round_trip", Clause: "`instance_name` is an identifier used to distinguish between the various instances on the server.", Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(100)
			d := t.put(ctx, data)
			if t.isMissing(ctx, d) {
				t.errorf("what was stored in an instance is missing there")
			}
			got, err := t.read(ctx, t.readName(d), 0, 0)
			t.ok("Read", err)
			t.same("Read", got, data)
		}},
		{Name: "instance/keywords", Clause: "To simplify parsing, a path segment cannot equal any of the following keywords: `blobs`, `uploads`, `actions`, `actionResults`, `operations`, `capabilities` or `compressed-blobs`.", Needs: cas, run: func(ctx context.Context, t *T) {
			data := t.bytes(10)
			d := t.digest(data)
			_, err := t.write(ctx, "uploads/uploads/"+t.uuid()+"/blobs/"+t.named()+d.Hash+"/10", part{data: data, finish: true})
			if err == nil && !t.isMissing(ctx, d) && t.o.Instance != "uploads" {
				t.errorf("an instance called uploads is taken, and its blob is to be had in instance %q", t.o.Instance)
			}
		}},
	}
}
