package rpc

import (
	"fmt"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/wire"
)

// digests reads the Digest messages of one request. Where the request does not
// name a digest function, the length of a hash tells it; it is looked up anew
// only when that changes, since requests have thousands of them.
type digests struct {
	named  repb.DigestFunction_Value
	fn     digest.Function
	hexLen int
}

// read checks d. The errors wrap digest.ErrInvalid.
func (r *digests) read(d wire.Digest) (digest.Digest, error) {
	if n := len(d.Hash); r.fn == 0 || n != r.hexLen {
		fn, err := digest.FunctionFromProto(r.named, n)
		if err != nil {
			return digest.Digest{}, err //nolint:wrapcheck // it says what is wrong
		}
		r.fn, r.hexLen = fn, n
	}
	return digest.New(r.fn, d.Hash, d.SizeBytes) //nolint:wrapcheck // it says what is wrong
}

// readDigest is read for a request with one digest.
func readDigest(named repb.DigestFunction_Value, d *repb.Digest) (digest.Digest, error) {
	if d == nil {
		return digest.Digest{}, fmt.Errorf("%w: the digest is absent", digest.ErrInvalid)
	}
	r := digests{named: named}
	return r.read(wire.Digest{Hash: d.Hash, SizeBytes: d.SizeBytes})
}
