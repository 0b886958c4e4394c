// Package digest holds the value that names a blob everywhere in Mettle and
// Elan: the hash, the size and the digest function together, checked once when
// it is made, comparable, and usable as a map key.
//
// It computes and verifies digests; it stores nothing, knows no gRPC, and
// imports nothing else of this project.
package digest

import (
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"strconv"
	"strings"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"google.golang.org/protobuf/proto"
)

var (
	// ErrInvalid is wrapped by the errors about malformed digests: the fault is
	// in the bytes that somebody sent.
	ErrInvalid = errors.New("invalid digest")
	// ErrMismatch is wrapped by the errors about bytes that are not those that
	// their digest names.
	ErrMismatch = errors.New("content does not match its digest")
)

// Digest names a blob, in a Space. The zero Digest names none. It is immutable,
// comparable, and safe for concurrent use.
type Digest struct {
	hash string // lower-case hexadecimal, of fn.HexLen() digits, and the Space's tag
	size int64  // bytes
	fn   Function
}

// New makes a Digest of a lower-case hexadecimal hash and a size in bytes. The
// errors wrap ErrInvalid and say what is wrong.
func New(fn Function, hash string, sizeBytes int64) (Digest, error) {
	if !fn.Valid() {
		return Digest{}, fmt.Errorf("%w: unknown digest function %v", ErrInvalid, fn)
	}
	if len(hash) != fn.HexLen() {
		return Digest{}, fmt.Errorf("%w: a %v hash has %d hexadecimal digits, %.200q has %d", ErrInvalid, fn, fn.HexLen(), hash, len(hash))
	}
	for i := range len(hash) {
		if c := hash[i]; !isHexDigit[c] {
			return Digest{}, fmt.Errorf("%w: hash %q has %q at position %d, want lower-case hexadecimal digits", ErrInvalid, hash, c, i)
		}
	}
	if sizeBytes < 0 {
		return Digest{}, fmt.Errorf("%w: size %d of %s is negative", ErrInvalid, sizeBytes, hash)
	}
	if sizeBytes == 0 && hash != Empty(fn).hash {
		return Digest{}, fmt.Errorf("%w: size 0 with hash %s, but the empty blob's %v hash is %s", ErrInvalid, hash, fn, Empty(fn).hash)
	}
	return Digest{hash: hash, size: sizeBytes, fn: fn}, nil
}

// isHexDigit tells the lower-case hexadecimal digits, without the branches that a
// processor can't foretell in hashes: requests have thousands of digests.
//
//nolint:gochecknoglobals // an immutable table
var isHexDigit = func() (t [256]bool) {
	for _, c := range "0123456789abcdef" {
		t[c] = true
	}
	return t
}()

// FromProto checks a Digest message. Function fn is that of the request, see
// FunctionFromProto. The errors wrap ErrInvalid.
func FromProto(fn Function, d *repb.Digest) (Digest, error) {
	if d == nil {
		return Digest{}, fmt.Errorf("%w: the digest is absent", ErrInvalid)
	}
	return New(fn, d.Hash, d.SizeBytes)
}

// Parse reads the form that String writes: [function/]hash/size, and @space where
// there is one. The errors wrap ErrInvalid.
func Parse(s string) (Digest, error) {
	name, tag, in := strings.Cut(s, "@")
	d, err := parsePlain(name)
	if err != nil || !in {
		return d, err
	}
	space, err := ParseSpace(tag)
	if err != nil || space.IsZero() || d.IsEmpty() {
		return Digest{}, fmt.Errorf("%w: %.300q, want a space after @, and a blob that is not empty before it", ErrInvalid, s)
	}
	return d.In(space), nil
}

func parsePlain(s string) (Digest, error) {
	bad := func() (Digest, error) {
		return Digest{}, fmt.Errorf("%w: %.200q, want hash/size or function/hash/size", ErrInvalid, s)
	}
	parts := make([]string, 0, 3)
	start := 0
	for i := 0; i <= len(s); i++ {
		if i == len(s) || s[i] == '/' {
			parts = append(parts, s[start:i])
			start = i + 1
			if len(parts) > 3 {
				return bad()
			}
		}
	}
	var fn Function
	var ok bool
	switch len(parts) {
	case 2:
		fn, ok = FunctionOfLen(len(parts[0]))
	case 3:
		fn, ok = FunctionNamed(parts[0])
		parts = parts[1:]
	}
	if !ok {
		return bad()
	}
	size, err := ParseSize(parts[1])
	if err != nil {
		return Digest{}, err
	}
	return New(fn, parts[0], size)
}

// ParseSize reads a size in bytes as it stands in resource names: decimal
// digits only, no sign, no leading zero. The errors wrap ErrInvalid.
func ParseSize(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || s[0] == '+' || s[0] == '-' || (len(s) > 1 && s[0] == '0') {
		return 0, fmt.Errorf("%w: size %.50q is not a decimal number of bytes", ErrInvalid, s)
	}
	return n, nil
}

// Of computes the Digest of data.
func Of(fn Function, data []byte) Digest {
	h := fn.New(int64(len(data)))
	h.Write(data)
	return FromHash(fn, h, int64(len(data)))
}

// OfMessage marshals m deterministically and computes the Digest of the bytes.
func OfMessage(fn Function, m proto.Message) (Digest, []byte, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return Digest{}, nil, fmt.Errorf("marshal %s: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	return Of(fn, data), data, nil
}

// FromHash is the Digest of sizeBytes bytes that were written to h, a hash that
// fn.New made for as many. It does not change the state of h.
func FromHash(fn Function, h hash.Hash, sizeBytes int64) Digest {
	var raw [64]byte
	return Digest{hash: hex.EncodeToString(h.Sum(raw[:0])), size: sizeBytes, fn: fn}
}

//nolint:gochecknoglobals // an immutable table, indexed by Function
var empties = func() (e [len(functions)]Digest) {
	for _, f := range Functions() {
		e[f] = FromHash(f, f.New(0), 0)
	}
	return e
}()

// Empty is the Digest of no bytes.
func Empty(fn Function) Digest { return empties[fn] }

// Hash is the lower-case hexadecimal hash.
func (d Digest) Hash() string { return d.hash[:d.fn.HexLen()] }

// Size is the size in bytes.
func (d Digest) Size() int64 { return d.size }

// Function is the digest function.
func (d Digest) Function() Function { return d.fn }

// IsZero reports whether d is the zero Digest, which names no blob.
func (d Digest) IsZero() bool { return d.fn == 0 }

// IsEmpty reports whether d names the empty blob, which every server has
// (remote_execution.proto, Digest).
func (d Digest) IsEmpty() bool { return d.size == 0 && d.fn != 0 }

// Proto is d as a message. The caller owns it.
func (d Digest) Proto() *repb.Digest {
	return &repb.Digest{Hash: d.Hash(), SizeBytes: d.size}
}

// String is the part of a resource name that names the blob: hash/size, with
// the function in front where the length of the hash does not tell it. With
// "blobs/" before it, it is the subject of a MISSING violation. In a Space other
// than the zero one, "@" and the Space follow, for logs and for those who look
// after a store.
func (d Digest) String() string {
	s := d.Hash() + "/" + strconv.FormatInt(d.size, 10)
	if d.fn.Named() {
		s = d.fn.String() + "/" + s
	}
	if sp := d.Space(); !sp.IsZero() {
		s += "@" + sp.String()
	}
	return s
}

// A Verifier passes through what it reads, and replaces the io.EOF at the end
// by an error that wraps ErrMismatch where the bytes were not those of its
// Digest. It never reads more than one byte past the Digest's size. It is not
// safe for concurrent use.
type Verifier struct {
	r    io.Reader
	want Digest
	h    hash.Hash
	n    int64
	err  error
}

// NewVerifier returns a Verifier of the bytes of r against d. The caller keeps
// r, and closes it if that is needed.
func NewVerifier(r io.Reader, d Digest) *Verifier {
	return &Verifier{r: r, want: d, h: d.fn.New(d.size)}
}

// Read implements io.Reader.
func (v *Verifier) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	// One byte more than is due tells a blob that is too long.
	if room := v.want.size - v.n; int64(len(p)) > room {
		p = p[:room+1]
	}
	n, err := v.r.Read(p)
	v.h.Write(p[:n])
	v.n += int64(n)
	switch {
	case v.n > v.want.size:
		n, err = 0, fmt.Errorf("%w: more than the %d bytes of %s", ErrMismatch, v.want.size, v.want)
	case errors.Is(err, io.EOF):
		if e := v.verify(); e != nil {
			n, err = 0, e
		}
	}
	v.err = err
	return n, err
}

func (v *Verifier) verify() error {
	if v.n != v.want.size {
		return fmt.Errorf("%w: %d bytes, %s has %d", ErrMismatch, v.n, v.want, v.want.size)
	}
	if got := FromHash(v.want.fn, v.h, v.n); got != v.want.Plain() {
		return fmt.Errorf("%w: the bytes have digest %s, want %s", ErrMismatch, got, v.want)
	}
	return nil
}
