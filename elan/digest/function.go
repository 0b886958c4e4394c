package digest

import (
	"crypto/sha1" //nolint:gosec // REAPI clients may choose SHA1; it names blobs here and secures nothing.
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"hash"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/zeebo/blake3"
)

// Function is a digest function of the REAPI. The zero Function is not valid.
// A new function is one constant and one row of the table below.
type Function uint8

// The digest functions that this server computes.
const (
	SHA256 Function = iota + 1
	SHA1
	SHA384
	SHA512
	BLAKE3
	SHA256TREE
	GITSHA1
)

// function is what the rest of this package knows of one Function.
type function struct {
	name  string                    // as it stands in resource names, lower case
	proto repb.DigestFunction_Value // as it stands in messages
	// new takes the size of the blob in bytes, which some hash before its bytes.
	new   func(sizeBytes int64) hash.Hash
	bytes int // length of the raw hash
	// named says that resource names carry the function's name, because its
	// hash length alone does not tell it (remote_execution.proto, on resource names).
	named bool
}

//nolint:gochecknoglobals // an immutable table, indexed by Function
var functions = [...]function{
	SHA256:     {name: "sha256", proto: repb.DigestFunction_SHA256, new: of(sha256.New), bytes: sha256.Size},
	SHA1:       {name: "sha1", proto: repb.DigestFunction_SHA1, new: of(sha1.New), bytes: sha1.Size},
	SHA384:     {name: "sha384", proto: repb.DigestFunction_SHA384, new: of(sha512.New384), bytes: sha512.Size384},
	SHA512:     {name: "sha512", proto: repb.DigestFunction_SHA512, new: of(sha512.New), bytes: sha512.Size},
	BLAKE3:     {name: "blake3", proto: repb.DigestFunction_BLAKE3, new: of(blake3.New), bytes: 32, named: true},
	SHA256TREE: {name: "sha256tree", proto: repb.DigestFunction_SHA256TREE, new: of(newTree), bytes: sha256.Size, named: true},
	GITSHA1:    {name: "gitsha1", proto: repb.DigestFunction_GITSHA1, new: newGitSHA1, bytes: sha1.Size, named: true},
}

// of is for functions to which the size means nothing.
func of[H hash.Hash](newHash func() H) func(int64) hash.Hash {
	return func(int64) hash.Hash { return newHash() }
}

// Functions lists every supported Function, the preferred one first.
func Functions() []Function {
	return []Function{SHA256, BLAKE3, SHA1, SHA384, SHA512, SHA256TREE, GITSHA1}
}

func (f Function) row() function {
	if int(f) >= len(functions) {
		return function{}
	}
	return functions[f]
}

// Valid reports whether f is a supported function.
func (f Function) Valid() bool { return f.row().new != nil }

// String is the lower-case name of f, as it stands in ByteStream resource names.
func (f Function) String() string {
	if !f.Valid() {
		return fmt.Sprintf("Function(%d)", uint8(f))
	}
	return f.row().name
}

// Proto is f as the REAPI's messages carry it; UNKNOWN where f is not valid.
func (f Function) Proto() repb.DigestFunction_Value { return f.row().proto }

// New returns a new hash of function f for a blob of sizeBytes bytes: GITSHA1
// hashes the size before the bytes, and of another number of bytes gives the hash
// of no blob. The others pay no heed to it. It panics where f is not valid.
func (f Function) New(sizeBytes int64) hash.Hash { return f.row().new(sizeBytes) }

// HexLen is the length of a hash of function f in hexadecimal digits.
func (f Function) HexLen() int { return int(hexLens[f]) }

// hexLens is asked for every digest that is read or written.
//
//nolint:gochecknoglobals // an immutable table
var hexLens = func() (t [256]uint8) {
	for f, row := range functions {
		t[f] = uint8(2 * row.bytes) //nolint:gosec // at most 128
	}
	return t
}()

// Named reports whether resource names must carry f's name, because the length
// of the hash does not tell the function.
func (f Function) Named() bool { return f.row().named }

// FunctionNamed finds the function whose String is name.
func FunctionNamed(name string) (Function, bool) {
	for _, f := range Functions() {
		if functions[f].name == name {
			return f, true
		}
	}
	return 0, false
}

// FunctionOfLen infers the function from the length of a hash in hexadecimal
// digits, as the REAPI asks where a client names none: SHA256 for 64 digits and
// SHA1 for 40, never BLAKE3, SHA256TREE or GITSHA1, which must be named.
func FunctionOfLen(hexLen int) (Function, bool) {
	for _, f := range Functions() {
		if functions[f].bytes*2 == hexLen && !functions[f].named {
			return f, true
		}
	}
	return 0, false
}

// FunctionFromProto is the Function of a request whose digest_function field is
// v and one of whose digests has a hash of hexLen digits. Where v is UNKNOWN,
// the length tells the function. The error wraps ErrInvalid.
func FunctionFromProto(v repb.DigestFunction_Value, hexLen int) (Function, error) {
	if v == repb.DigestFunction_UNKNOWN {
		if f, ok := FunctionOfLen(hexLen); ok {
			return f, nil
		}
		return 0, fmt.Errorf("%w: no digest_function given, and a hash of %d hexadecimal digits belongs to none of %v", ErrInvalid, hexLen, Functions())
	}
	for _, f := range Functions() {
		if functions[f].proto == v {
			return f, nil
		}
	}
	return 0, fmt.Errorf("%w: digest function %v is not supported, use one of %v", ErrInvalid, v, Functions())
}
