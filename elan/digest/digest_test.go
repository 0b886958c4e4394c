package digest_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/mettle-build/mettle/elan/digest"
)

// Hashes of "abc", from the functions' own specifications.
const (
	abcSHA256  = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	abcSHA1    = "a9993e364706816aba3e25717850c26c9cd0d89d"
	abcSHA384  = "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7"
	abcSHA512  = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f"
	abcGITSHA1 = "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f"
	abcBLAKE3  = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
)

func TestOf(t *testing.T) {
	for fn, want := range map[digest.Function]string{
		digest.SHA256: abcSHA256 + "/3",
		digest.SHA1:   abcSHA1 + "/3",
		digest.SHA384: abcSHA384 + "/3",
		digest.SHA512: abcSHA512 + "/3",
		digest.BLAKE3: "blake3/" + abcBLAKE3 + "/3",
		// Of up to 1024 bytes it is the SHA-256, and the name tells them apart.
		digest.SHA256TREE: "sha256tree/" + abcSHA256 + "/3",
		digest.GITSHA1:    "gitsha1/" + abcGITSHA1 + "/3",
	} {
		d := digest.Of(fn, []byte("abc"))
		if d.String() != want || d.Function() != fn || d.Size() != 3 || len(d.Hash()) != fn.HexLen() || d.IsEmpty() || d.IsZero() {
			t.Errorf("%v of abc: %s, want %s", fn, d, want)
		}
		if again, err := digest.Parse(d.String()); err != nil || again != d {
			t.Errorf("parse %s: %s, %v", d, again, err)
		}
		if again, err := digest.FromProto(fn, d.Proto()); err != nil || again != d {
			t.Errorf("from the message of %s: %s, %v", d, again, err)
		}
		if e := digest.Empty(fn); e != digest.Of(fn, nil) || !e.IsEmpty() || e.IsZero() {
			t.Errorf("Empty(%v) is %s", fn, e)
		}
	}
	if d := (digest.Digest{}); !d.IsZero() || d.IsEmpty() {
		t.Errorf("the zero Digest: zero %v, empty %v", d.IsZero(), d.IsEmpty())
	}
}

func TestNew_refuses(t *testing.T) {
	empty := digest.Empty(digest.SHA256).Hash()
	for _, c := range []struct {
		name string
		fn   digest.Function
		hash string
		size int64
	}{
		{"no_function", 0, abcSHA256, 3},
		{"unknown_function", 200, abcSHA256, 3},
		{"no_hash", digest.SHA256, "", 3},
		{"short", digest.SHA256, abcSHA256[1:], 3},
		{"long", digest.SHA256, abcSHA256 + "0", 3},
		{"of_another_function", digest.SHA256, abcSHA1, 3},
		{"upper_case", digest.SHA256, strings.ToUpper(abcSHA256), 3},
		{"not_hexadecimal", digest.SHA256, "g" + abcSHA256[1:], 3},
		{"slash", digest.SHA256, "../" + abcSHA256[3:], 3},
		{"zero_byte", digest.SHA256, "\x00" + abcSHA256[1:], 3},
		{"negative_size", digest.SHA256, abcSHA256, -1},
		{"empty_size_of_other_bytes", digest.SHA256, abcSHA256, 0},
		{"negative_size_of_the_empty", digest.SHA256, empty, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d, err := digest.New(c.fn, c.hash, c.size); !errors.Is(err, digest.ErrInvalid) || !d.IsZero() {
				t.Errorf("%s, %v; want the zero Digest, ErrInvalid", d, err)
			}
		})
	}
	if _, err := digest.FromProto(digest.SHA256, nil); !errors.Is(err, digest.ErrInvalid) {
		t.Errorf("FromProto(nil): %v, want ErrInvalid", err)
	}
}

func TestParse_refuses(t *testing.T) {
	for _, s := range []string{
		"", "/", "//", "///", abcSHA256, abcSHA256 + "/", "/3", abcSHA256 + "/x", abcSHA256 + "/+3", abcSHA256 + "/03", abcSHA256 + "/-3",
		abcSHA256 + "/ 3", abcSHA256 + "/3/", abcSHA256 + "/9223372036854775808", "md5/" + abcSHA256 + "/3", "SHA256/" + abcSHA256 + "/3",
		"sha1/" + abcSHA256 + "/3", "a/sha256/" + abcSHA256 + "/3", strings.Repeat("/", 1000),
	} {
		if d, err := digest.Parse(s); !errors.Is(err, digest.ErrInvalid) {
			t.Errorf("parse %.100q: %s, %v; want ErrInvalid", s, d, err)
		}
	}
	// The function may always be named.
	if d, err := digest.Parse("sha256/" + abcSHA256 + "/3"); err != nil || d != digest.Of(digest.SHA256, []byte("abc")) {
		t.Errorf("%s, %v", d, err)
	}
}

func TestFunctionFromProto(t *testing.T) {
	for _, c := range []struct {
		name   string
		value  repb.DigestFunction_Value
		hexLen int
		want   digest.Function
		err    error
	}{
		{"named", repb.DigestFunction_BLAKE3, 64, digest.BLAKE3, nil},
		{"by_64_digits", repb.DigestFunction_UNKNOWN, 64, digest.SHA256, nil},
		{"by_40_digits", repb.DigestFunction_UNKNOWN, 40, digest.SHA1, nil},
		{"by_96_digits", repb.DigestFunction_UNKNOWN, 96, digest.SHA384, nil},
		{"by_128_digits", repb.DigestFunction_UNKNOWN, 128, digest.SHA512, nil},
		{"by_no_digits", repb.DigestFunction_UNKNOWN, 0, 0, digest.ErrInvalid},
		{"by_32_digits", repb.DigestFunction_UNKNOWN, 32, 0, digest.ErrInvalid},
		{"unsupported", repb.DigestFunction_MD5, 32, 0, digest.ErrInvalid},
		{"unheard_of", 12345, 64, 0, digest.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := digest.FunctionFromProto(c.value, c.hexLen)
			if got != c.want || !errors.Is(err, c.err) {
				t.Errorf("%v, %v; want %v, %v", got, err, c.want, c.err)
			}
		})
	}
	for _, fn := range digest.Functions() {
		if got, err := digest.FunctionFromProto(fn.Proto(), fn.HexLen()); err != nil || got != fn {
			t.Errorf("%v through its message: %v, %v", fn, got, err)
		}
		if got, ok := digest.FunctionNamed(fn.String()); !ok || got != fn {
			t.Errorf("%v through its name: %v, %v", fn, got, ok)
		}
	}
}

func TestOfMessage(t *testing.T) {
	m := &repb.Command{Arguments: []string{"cc", "-c", "a.c"}}
	d, data, err := digest.OfMessage(digest.SHA256, m)
	if err != nil || d != digest.Of(digest.SHA256, data) {
		t.Fatalf("%s, %v", d, err)
	}
	if diff := cmp.Diff(&repb.Digest{Hash: d.Hash(), SizeBytes: int64(len(data))}, d.Proto(), protocmp.Transform()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if _, _, err := digest.OfMessage(digest.SHA256, &repb.Command{Arguments: []string{"\xff"}}); err == nil {
		t.Error("a message that can't be marshalled: no error")
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{abcSHA256 + "/3", "blake3/" + abcBLAKE3 + "/3", abcSHA1 + "/9223372036854775807", "", "a/b/c", abcSHA512 + "/00", abcSHA256 + "/3@" + digest.SpaceOf("a").String(), "gitsha1/" + abcGITSHA1 + "/3@"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := digest.Parse(s)
		if err != nil {
			if !errors.Is(err, digest.ErrInvalid) || !d.IsZero() || len(err.Error()) > 2000 {
				t.Errorf("parse %q: %v, %v", s, d, err)
			}
			return
		}
		if again, err := digest.Parse(d.String()); err != nil || again != d {
			t.Errorf("parse %q gives %s, which gives %s, %v", s, d, again, err)
		}
		if d.String() != s && d.Function().String()+"/"+d.String() != s {
			t.Errorf("%q and %q are the same digest", s, d)
		}
	})
}

func FuzzNew(f *testing.F) {
	f.Add(byte(1), abcSHA256, int64(3))
	f.Add(byte(5), abcBLAKE3, int64(-1))
	f.Add(byte(9), "", int64(0))
	f.Fuzz(func(t *testing.T, fn byte, hash string, size int64) {
		d, err := digest.New(digest.Function(fn), hash, size)
		if err != nil {
			if !errors.Is(err, digest.ErrInvalid) || !d.IsZero() {
				t.Errorf("%v, %v", d, err)
			}
			return
		}
		if d.Hash() != hash || d.Size() != size || strings.ContainsAny(hash, "/.\x00 ") || (d.Size() == 0) != d.IsEmpty() {
			t.Errorf("%q, %d: %s", hash, size, d)
		}
	})
}

func BenchmarkOf(b *testing.B) {
	for _, fn := range digest.Functions() {
		b.Run(fn.String()+"/1KiB", func(b *testing.B) {
			data := make([]byte, 1<<10)
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				digest.Of(fn, data)
			}
		})
	}
}

// A FindMissingBlobs brings thousands of digests to check, all different, so
// that a processor can foretell nothing of them.
func BenchmarkFromProto(b *testing.B) {
	ds := make([]*repb.Digest, 1000)
	for i := range ds {
		ds[i] = digest.Of(digest.SHA256, fmt.Append(nil, i)).Proto()
	}
	b.ReportAllocs()
	for b.Loop() {
		for _, d := range ds {
			if _, err := digest.FromProto(digest.SHA256, d); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(ds)), "ns/digest")
}
