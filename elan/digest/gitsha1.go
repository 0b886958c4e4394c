package digest

import (
	"crypto/sha1" //nolint:gosec // it is what Git names blobs by
	"hash"
	"strconv"
)

// gitSHA1 is a hash.Hash of GITSHA1: SHA-1 of "blob ", the size in decimal
// digits, a zero byte, and the blob. That is how Git names it.
type gitSHA1 struct {
	hash.Hash
	header []byte
}

func newGitSHA1(sizeBytes int64) hash.Hash {
	header := strconv.AppendInt(append(make([]byte, 0, 32), "blob "...), sizeBytes, 10)
	g := &gitSHA1{Hash: sha1.New(), header: append(header, 0)} //nolint:gosec // as above
	g.Write(g.header)
	return g
}

// Reset makes g ready for another blob of the same size.
func (g *gitSHA1) Reset() {
	g.Hash.Reset()
	g.Write(g.header)
}

// Clone implements hash.Cloner.
func (g *gitSHA1) Clone() (hash.Cloner, error) {
	h, err := g.Hash.(hash.Cloner).Clone()
	if err != nil {
		return nil, err //nolint:wrapcheck // the standard library's, which has none
	}
	return &gitSHA1{Hash: h, header: g.header}, nil
}
