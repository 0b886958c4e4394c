package resource_test

import (
	"errors"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/digest"
	"github.com/mettle-build/mettle/elan/resource"
)

const uuid = "f2a4c0a8-5b1f-4c4e-9f5d-0a4b7e1c2d3e"

// blob is a digest of function fn, and the part of a name that is its.
func blob(fn digest.Function) (d digest.Digest, s string) {
	d = digest.Of(fn, []byte("hello"))
	return d, d.String()
}

func TestParse_good(t *testing.T) {
	sha, shaName := blob(digest.SHA256)
	sha512, sha512Name := blob(digest.SHA512)
	b3, b3Name := blob(digest.BLAKE3)
	empty := digest.Empty(digest.SHA256)
	for _, tc := range []struct {
		name  string
		in    string
		write bool
		want  resource.Name
		form  string // what String gives; empty: in
	}{
		{name: "read", in: "blobs/" + shaName, want: resource.Name{Digest: sha}},
		{name: "read instance", in: "main/blobs/" + shaName, want: resource.Name{Instance: "main", Digest: sha}},
		{name: "read long instance", in: "a/b/c/blobs/" + shaName, want: resource.Name{Instance: "a/b/c", Digest: sha}},
		{name: "read instance like a hash", in: sha.Hash() + "/5/blobs/" + shaName, want: resource.Name{Instance: sha.Hash() + "/5", Digest: sha}},
		{name: "read leading slash", in: "/blobs/" + shaName, want: resource.Name{Digest: sha}, form: "blobs/" + shaName},
		{name: "read sha512", in: "blobs/" + sha512Name, want: resource.Name{Digest: sha512}},
		{name: "read blake3", in: "i/blobs/" + b3Name, want: resource.Name{Instance: "i", Digest: b3}},
		{name: "read needless function", in: "blobs/sha256/" + shaName, want: resource.Name{Digest: sha}, form: "blobs/" + shaName},
		{name: "read zstd", in: "i/compressed-blobs/zstd/" + shaName, want: resource.Name{Instance: "i", Digest: sha, Compressor: repb.Compressor_ZSTD}},
		{name: "read zstd blake3", in: "compressed-blobs/zstd/" + b3Name, want: resource.Name{Digest: b3, Compressor: repb.Compressor_ZSTD}},
		{name: "read empty blob", in: "blobs/" + empty.String(), want: resource.Name{Digest: empty}},
		{name: "write", in: "uploads/" + uuid + "/blobs/" + shaName, write: true, want: resource.Name{UUID: uuid, Digest: sha}},
		{name: "write instance", in: "a/b/uploads/" + uuid + "/blobs/" + shaName, write: true, want: resource.Name{Instance: "a/b", UUID: uuid, Digest: sha}},
		{
			name: "write metadata", in: "uploads/" + uuid + "/blobs/" + shaName + "/bin/blobs/x", write: true,
			want: resource.Name{UUID: uuid, Digest: sha, Metadata: "bin/blobs/x"},
		},
		{name: "write keyword as uuid", in: "uploads/blobs/blobs/" + shaName, write: true, want: resource.Name{UUID: "blobs", Digest: sha}},
		{
			name: "write brotli blake3 metadata", in: "uploads/u/compressed-blobs/brotli/" + b3Name + "/m", write: true,
			want: resource.Name{UUID: "u", Digest: b3, Metadata: "m", Compressor: repb.Compressor_BROTLI},
		},
		{name: "write deflate", in: "uploads/u/compressed-blobs/deflate/" + shaName, write: true, want: resource.Name{UUID: "u", Digest: sha, Compressor: repb.Compressor_DEFLATE}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := parse(tc.in, tc.write)
			if err != nil {
				t.Fatalf("parse %q: %v", tc.in, err)
			}
			if got != tc.want {
				t.Errorf("parse %q: %+v, want %+v", tc.in, got, tc.want)
			}
			if tc.form == "" {
				tc.form = tc.in
			}
			if s := got.String(); s != tc.form {
				t.Errorf("String: %q, want %q", s, tc.form)
			}
		})
	}
}

func parse(s string, write bool) (resource.Name, error) {
	if write {
		return resource.ParseWrite(s)
	}
	return resource.ParseRead(s)
}

func TestParse_bad(t *testing.T) {
	sha, name := blob(digest.SHA256)
	for _, tc := range []struct {
		name  string
		in    string
		write bool
		want  string // part of the error
	}{
		{name: "empty", in: "", want: "want {instance/}blobs/"},
		{name: "empty write", in: "", write: true, want: "want {instance/}uploads/"},
		{name: "no blobs", in: name, want: "want {instance/}blobs/"},
		{name: "keyword in instance", in: "a/operations/blobs/" + name, want: "want {instance/}blobs/"},
		{name: "write name to read", in: "uploads/" + uuid + "/blobs/" + name, want: "want {instance/}blobs/"},
		{name: "read name to write", in: "blobs/" + name, write: true, want: "want {instance/}uploads/"},
		{name: "ends at blobs", in: "blobs", want: "ends before the hash"},
		{name: "ends at compressed-blobs", in: "compressed-blobs", want: "compressed-blobs"},
		{name: "ends at compressor", in: "compressed-blobs/zstd", want: "ends before the hash"},
		{name: "ends at hash", in: "blobs/" + sha.Hash(), want: "ends before the size"},
		{name: "ends at function", in: "blobs/blake3", want: "a digest function or a hash"},
		{name: "ends at uploads", in: "uploads", write: true, want: "want {instance/}uploads/"},
		{name: "ends at uuid", in: "uploads/" + uuid, write: true, want: "no UUID"},
		{name: "empty uuid", in: "uploads//blobs/" + name, write: true, want: "no UUID"},
		{name: "no blobs after uuid", in: "uploads/" + uuid + "/" + name, write: true, want: "where blobs or compressed-blobs is due"},
		{name: "short hash", in: "blobs/abc/5", want: "a digest function or a hash"},
		{name: "upper-case hash", in: "blobs/" + strings.ToUpper(name), want: "lower-case"},
		{name: "unknown function", in: "blobs/md5/" + name, want: `"md5"`},
		{name: "hash of another function", in: "blobs/sha1/" + name, want: "40"},
		{name: "negative size", in: "blobs/" + sha.Hash() + "/-5", want: "size"},
		{name: "signed size", in: "blobs/" + sha.Hash() + "/+5", want: "size"},
		{name: "empty size", in: "blobs/" + sha.Hash() + "/", want: "size"},
		{name: "size with zero in front", in: "blobs/" + sha.Hash() + "/05", want: "size"},
		{name: "size over int64", in: "blobs/" + sha.Hash() + "/9223372036854775808", want: "size"},
		{name: "size 0 of another hash", in: "blobs/" + sha.Hash() + "/0", want: "empty blob"},
		{name: "metadata in read", in: "blobs/" + name + "/x", want: "goes on after the size"},
		{name: "identity as compressor", in: "compressed-blobs/identity/" + name, want: "unknown compressor"},
		{name: "unknown compressor", in: "compressed-blobs/lz4/" + name, want: `"lz4"`},
		{name: "too long", in: strings.Repeat("a/", resource.MaxLen) + "blobs/" + name, want: "at most 4096"},
		{name: "too long write", in: "uploads/u/blobs/" + name + "/" + strings.Repeat("a", resource.MaxLen), write: true, want: "at most 4096"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := parse(tc.in, tc.write)
			if !errors.Is(err, resource.ErrInvalid) {
				t.Fatalf("parse %q: %+v, %v, want an error that wraps ErrInvalid", tc.in, got, err)
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("parse %q: %q, want it to say %q", tc.in, err, tc.want)
			}
		})
	}
}

func TestParse_allocates_nothing(t *testing.T) {
	_, name := blob(digest.BLAKE3)
	in := "some/instance/uploads/" + uuid + "/compressed-blobs/zstd/" + name + "/meta"
	if n := testing.AllocsPerRun(100, func() { _, _ = resource.ParseWrite(in) }); n != 0 {
		t.Errorf("ParseWrite made %v allocations, want none", n)
	}
	n, err := resource.ParseWrite(in)
	if err != nil {
		t.Fatal(err)
	}
	if got := testing.AllocsPerRun(100, func() { _ = n.String() }); got > 2 {
		t.Errorf("String made %v allocations, want at most 2", got)
	}
}

// FuzzParse holds that nothing panics, and that formatting and parsing again
// changes nothing.
func FuzzParse(f *testing.F) {
	for _, fn := range digest.Functions() {
		_, name := blob(fn)
		f.Add("blobs/" + name)
		f.Add("a/b/compressed-blobs/zstd/" + name)
		f.Add("uploads/" + uuid + "/blobs/" + name + "/meta/data")
		f.Add("//uploads/u/compressed-blobs/deflate/" + fn.String() + "/" + name)
	}
	f.Add("blobs/blake3")
	f.Add("uploads//blobs")
	f.Fuzz(func(t *testing.T, in string) {
		for _, write := range []bool{false, true} {
			n, err := parse(in, write)
			if err != nil {
				if !errors.Is(err, resource.ErrInvalid) {
					t.Errorf("parse %q: %v, want an error that wraps ErrInvalid", in, err)
				}
				continue
			}
			if (n.UUID != "") != write {
				t.Errorf("parse %q, write %v: UUID %q", in, write, n.UUID)
			}
			again, err := parse(n.String(), write)
			if err != nil || again != n {
				t.Errorf("parse %q gives %+v, and its String %q gives %+v, %v", in, n, n.String(), again, err)
			}
		}
	})
}

func BenchmarkParseWrite(b *testing.B) {
	_, name := blob(digest.SHA256)
	in := "main/uploads/" + uuid + "/blobs/" + name
	b.ReportAllocs()
	for b.Loop() {
		if _, err := resource.ParseWrite(in); err != nil {
			b.Fatal(err)
		}
	}
}

// FuzzCheckInstance: a name that is allowed comes back from the resource names that
// it stands in.
func FuzzCheckInstance(f *testing.F) {
	for _, s := range []string{"", "main", "a/b", "blobs", "a/uploads/b", "a//b", "/", "actions/failed", "a\x00", "compressed-blobs2"} {
		f.Add(s)
	}
	d, _ := blob(digest.SHA256)
	f.Fuzz(func(t *testing.T, s string) {
		if err := resource.CheckInstance(s); err != nil {
			if !errors.Is(err, resource.ErrInvalid) || len(err.Error()) > 6*resource.MaxInstanceLen {
				t.Errorf("%q: %v", s, err)
			}
			return
		}
		for _, id := range []string{"", "u"} {
			n, err := parse(resource.Name{Instance: s, UUID: id, Digest: d}.String(), id != "")
			if err != nil || n.Instance != s || n.Digest != d {
				t.Errorf("instance %q with UUID %q: %+v, %v", s, id, n, err)
			}
		}
	})
}

func TestParseLogStream(t *testing.T) {
	long := strings.Repeat("x", resource.MaxLogStreamPart)
	for _, tc := range []struct {
		name string
		want resource.LogStreamName
		ok   bool
	}{
		{name: "logstreams/a-B-9", want: resource.LogStreamName{ID: "a-B-9"}, ok: true},
		{name: "logstreams/a/t", want: resource.LogStreamName{ID: "a", Token: "t"}, ok: true},
		{name: "i/j/logstreams/a", want: resource.LogStreamName{Parent: "i/j", ID: "a"}, ok: true},
		{name: "logstreams/logstreams/a", want: resource.LogStreamName{Parent: "logstreams", ID: "a"}, ok: true},
		{name: "i/logstreams/" + long + "/" + long, want: resource.LogStreamName{Parent: "i", ID: long, Token: long}, ok: true},
		{name: "logstreams/x" + long},
		{name: "logstreams/a/x" + long},
		{name: ""},
		{name: "logstreams"},
		{name: "logstreams/"},
		{name: "logstreams/a/"},
		{name: "logstreams/a/b/c"},
		{name: "/logstreams/a"},
		{name: "xlogstreams/a"},
		{name: "logstreams/ä"},
		{name: "logstreams/a b"},
		{name: "blobs/logstreams/a"},
		{name: "uploads/u/blobs/0123/4/logstreams/a"},
		{name: strings.Repeat("i/", resource.MaxLen) + "logstreams/a"},
	} {
		got, ok := resource.ParseLogStream(tc.name)
		if ok != tc.ok || got != tc.want {
			t.Errorf("%.100q: %#v, %v, want %#v, %v", tc.name, got, ok, tc.want, tc.ok)
		}
		if ok && got.String() != tc.name {
			t.Errorf("%q is formatted as %q", tc.name, got.String())
		}
	}
}

// No name is both that of a log stream and that of a blob.
func FuzzParseLogStream(f *testing.F) {
	for _, s := range []string{"i/logstreams/a/b", "logstreams/a", "blobs/0123/4", "uploads/u/blobs/0123/4/logstreams/a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, ok := resource.ParseLogStream(s)
		if !ok {
			if n != (resource.LogStreamName{}) {
				t.Errorf("%q is none, and is %#v", s, n)
			}
			return
		}
		if n.String() != s {
			t.Errorf("%q is formatted as %q", s, n.String())
		}
		if _, err := resource.ParseRead(s); err == nil {
			t.Errorf("%q is a blob, too", s)
		}
		if _, err := resource.ParseWrite(s); err == nil {
			t.Errorf("%q is an upload, too", s)
		}
	})
}

// BenchmarkParseLogStream is what every call for a blob pays.
func BenchmarkParseLogStream(b *testing.B) {
	name := "some/instance/blobs/" + strings.Repeat("0123456789abcdef", 4) + "/12345"
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := resource.ParseLogStream(name); ok {
			b.Fatal("it is one")
		}
	}
}
