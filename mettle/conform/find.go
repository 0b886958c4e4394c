package conform

import (
	"context"
	"slices"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/grpc/codes"

	"github.com/mettle-build/mettle/elan/digest"
)

const (
	missingClause = "A list of the blobs requested *not* present in the storage."
	emptyClause   = "Servers MUST behave as though empty blobs are always available, even if they have not been uploaded."
	sizeClause    = "The size is considered to be an integral part of the digest and cannot be separated. That is, even if the `hash` field is correctly specified but `size_bytes` is not, the server MUST reject the request."
	hashClause    = "The hash, represented as a lowercase hexadecimal string, padded with leading zeroes up to the hash function length."
	inferClause   = "In that case the server SHOULD infer the digest function using the length of the blob digest hashes and the digest functions announced in the server's capabilities."
)

func findCases() []Case {
	cas := []need{needsCache}
	return []Case{
		{Name: "find_missing/absent", Clause: missingClause, Needs: cas, run: func(ctx context.Context, t *T) {
			if d := t.fresh(); !t.isMissing(ctx, d) {
				t.errorf("a blob that was never stored is not said to be missing")
			}
		}},
		{Name: "find_missing/present", Clause: missingClause, Needs: cas, run: func(ctx context.Context, t *T) {
			if d := t.put(ctx, t.bytes(1000)); t.isMissing(ctx, d) {
				t.errorf("a blob that was stored is said to be missing")
			}
		}},
		{Name: "find_missing/mixed", Clause: missingClause, Needs: cas, run: func(ctx context.Context, t *T) {
			var there, absent []*repb.Digest
			for range 10 {
				there = append(there, t.put(ctx, t.bytes(10)))
				absent = append(absent, t.fresh())
			}
			got := t.missing(ctx, append(append([]*repb.Digest{}, there...), absent...)...)
			for _, d := range there {
				if has(got, d) {
					t.errorf("%v is there and said to be missing", d)
				}
			}
			for _, d := range absent {
				if !has(got, d) {
					t.errorf("%v is not there and not said to be missing", d)
				}
			}
		}},
		{Name: "find_missing/nothing", Clause: missingClause, Needs: cas, run: func(ctx context.Context, t *T) {
			if got := t.missing(ctx); len(got) > 0 {
				t.errorf("asked for nothing, it answers %v", got)
			}
		}},
		{Name: "find_missing/many", Clause: "There are no method-specific errors.", Needs: cas, run: func(ctx context.Context, t *T) {
			ds := make([]*repb.Digest, 5000)
			for i := range ds {
				ds[i] = t.fresh()
			}
			if got := t.missing(ctx, ds...); len(got) != len(ds) {
				t.errorf("%d of 5000 blobs that were never stored are said to be missing", len(got))
			}
		}},
		{Name: "find_missing/empty_blob", Clause: emptyClause, Needs: cas, run: func(ctx context.Context, t *T) {
			if t.isMissing(ctx, t.digest(nil)) {
				t.errorf("the empty blob is said to be missing")
			}
		}},
		{Name: "find_missing/another_size", Clause: sizeClause, Needs: cas, run: func(ctx context.Context, t *T) {
			d := t.put(ctx, t.bytes(100))
			d.SizeBytes++
			r, err := t.calls.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{InstanceName: t.o.Instance, BlobDigests: []*repb.Digest{d}, DigestFunction: t.function()})
			if err == nil && !has(r.MissingBlobDigests, d) {
				t.errorf("the hash of a blob with another size is taken for the blob")
			}
		}},
		{Name: "find_missing/malformed_hash", Clause: hashClause, Needs: cas, run: func(ctx context.Context, t *T) {
			for _, hash := range []string{"", "xyz", "ABCDEF"} {
				_, err := t.calls.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{
					InstanceName: t.o.Instance, BlobDigests: []*repb.Digest{{Hash: hash, SizeBytes: 1}}, DigestFunction: t.function(),
				})
				t.want("FindMissingBlobs of hash "+hash, err, codes.InvalidArgument)
			}
		}},
		{Name: "find_missing/negative_size", Clause: "The size of the blob, in bytes.", Needs: cas, run: func(ctx context.Context, t *T) {
			d := t.fresh()
			d.SizeBytes = -1
			_, err := t.calls.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{InstanceName: t.o.Instance, BlobDigests: []*repb.Digest{d}, DigestFunction: t.function()})
			t.want("FindMissingBlobs of -1 bytes", err, codes.InvalidArgument)
		}},
		{Name: "find_missing/twice", Clause: missingClause, Needs: cas, run: func(ctx context.Context, t *T) {
			d := t.fresh()
			if got := t.missing(ctx, d, d); !has(got, d) {
				t.errorf("a blob that was asked for twice is not said to be missing")
			}
		}},
	}
}

// functionCases are the same for each digest function that a server may announce.
func functionCases() []Case {
	var cases []Case
	for _, fn := range digest.Functions() {
		announced := func(s *server) string {
			if slices.Contains(s.fns, fn) {
				return ""
			}
			return "the server does not announce " + fn.String()
		}
		of := func(run func(context.Context, *T)) func(context.Context, *T) {
			return func(ctx context.Context, t *T) {
				t.fn = fn
				run(ctx, t)
			}
		}
		needs := []need{needsCache, announced}
		cases = append(cases,
			Case{Name: "digest_function/stream_" + fn.String(), Clause: "`digest_function` is a lowercase string form of a `DigestFunction.Value` enum, indicating which digest function was used to compute `hash`.", Needs: needs, run: of(func(ctx context.Context, t *T) {
				for _, n := range []int{1, 1024, 1025, 100_000} {
					data := t.bytes(n)
					got, err := t.read(ctx, t.readName(t.put(ctx, data)), 0, 0)
					t.ok("Read", err)
					t.same("Read", got, data)
				}
			})},
			Case{Name: "digest_function/batch_" + fn.String(), Clause: "The digest function that was used to compute the digests of the blobs being uploaded.", Needs: needs, run: of(func(ctx context.Context, t *T) {
				data := t.bytes(2000)
				d := t.digest(data)
				t.batchPut(ctx, fn.Proto(), data)
				r, err := t.calls.cas.BatchReadBlobs(ctx, &repb.BatchReadBlobsRequest{InstanceName: t.o.Instance, Digests: []*repb.Digest{d}, DigestFunction: fn.Proto()})
				t.ok("BatchReadBlobs", err)
				t.same("BatchReadBlobs", r.GetResponses()[0].GetData(), data)
			})},
			Case{Name: "digest_function/empty_" + fn.String(), Clause: emptyClause, Needs: needs, run: of(func(ctx context.Context, t *T) {
				d := digest.Empty(fn).Proto()
				r, err := t.calls.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{InstanceName: t.o.Instance, BlobDigests: []*repb.Digest{d}, DigestFunction: fn.Proto()})
				t.ok("FindMissingBlobs", err)
				if len(r.MissingBlobDigests) > 0 {
					t.errorf("the empty blob is said to be missing")
				}
			})},
			Case{Name: "digest_function/wrong_content_" + fn.String(), Clause: "If the client completes the upload but the [Digest][build.bazel.remote.execution.v2.Digest] does not match, an `INVALID_ARGUMENT` error will be returned.", Needs: needs, run: of(func(ctx context.Context, t *T) {
				d := t.fresh()
				_, err := t.write(ctx, t.writeName(d), part{data: t.bytes(int(d.SizeBytes)), finish: true})
				t.want("Write of other bytes", err, codes.InvalidArgument)
			})},
		)
		if !fn.Named() {
			cases = append(cases, Case{Name: "digest_function/inferred_" + fn.String(), Clause: inferClause, Level: Should, Needs: needs, run: of(func(ctx context.Context, t *T) {
				data := t.bytes(500)
				t.batchPut(ctx, repb.DigestFunction_UNKNOWN, data)
				r, err := t.calls.cas.FindMissingBlobs(ctx, &repb.FindMissingBlobsRequest{InstanceName: t.o.Instance, BlobDigests: []*repb.Digest{t.digest(data)}})
				t.ok("FindMissingBlobs without digest_function", err)
				if len(r.MissingBlobDigests) > 0 {
					t.errorf("what was stored without digest_function is not found without it")
				}
			})})
		}
	}
	return cases
}
