package asset_test

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"errors"
	"io/fs"
	"net/http"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob"
)

// tarOf makes a tar of headers, whose files have their names as contents unless
// PAXRecords says so otherwise.
func tarOf(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		data := h.Name
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg {
			if h.Uname != "" {
				data = h.Uname
				h.Uname = ""
			}
			h.Size = int64(len(data))
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte(data)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zipOf(t testing.TB, files ...zip.FileHeader) []byte {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, h := range files {
		data := h.Comment
		h.Comment = ""
		h.Method = zip.Deflate
		f, err := w.CreateHeader(&h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write([]byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zipped(name string, mode fs.FileMode, data string) zip.FileHeader {
	h := zip.FileHeader{Name: name, Comment: data}
	h.SetMode(mode)
	return h
}

func TestFetchDirectory_archives(t *testing.T) {
	large := strings.Repeat("0123456789abcdef", 100_000)
	plain := tarOf(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755},
		tar.Header{Typeflag: tar.TypeDir, Name: "pkg-1.0/empty/", Mode: 0o755},
		tar.Header{Name: "./pkg-1.0/a"},
		tar.Header{Name: "pkg-1.0/x.sh", Mode: 0o755},
		tar.Header{Name: "pkg-1.0/large", Uname: large},
		tar.Header{Typeflag: tar.TypeLink, Name: "pkg-1.0/hard", Linkname: "pkg-1.0/x.sh"},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "pkg-1.0/soft", Linkname: "../../../etc/passwd"},
		tar.Header{Name: "pkg-1.0/a", Uname: "the later one"},
	)
	inner := []string{"a=the later one", "empty/", "hard*=pkg-1.0/x.sh", "large=" + of(large).String(), "soft->../../../etc/passwd", "x.sh*=pkg-1.0/x.sh"}
	all := []string{"pkg-1.0/"}
	for _, l := range inner {
		all = append(all, "pkg-1.0/"+l)
	}
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	z := zipOf(t,
		zipped("pkg/", fs.ModeDir|0o755, ""),
		zipped("pkg/a", 0o644, "text"),
		zipped("pkg/run", 0o755, "code"),
		zipped("pkg/link", fs.ModeSymlink|0o777, "a"))
	for _, tc := range []struct {
		name  string
		data  []byte
		pairs []string
		want  []string
	}{
		{"tar", plain, nil, all},
		{"tar.gz", gzipped(t, plain), nil, all},
		{"tar.zst", enc.EncodeAll(plain, nil), nil, all},
		{"with a checksum", gzipped(t, plain), []string{"checksum.sri", sri(string(gzipped(t, plain)))}, all},
		{"a directory of it", gzipped(t, plain), []string{"directory", "pkg-1.0"}, inner},
		{"an empty directory of it", gzipped(t, plain), []string{"directory", "pkg-1.0/empty"}, []string{""}},
		{"zip", z, []string{"resource_type", "application/zip"}, []string{"pkg/", "pkg/a=text", "pkg/link->a", "pkg/run*=code"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := newSite(t, serving(string(tc.data)))
			s := newStore(t)
			a := newService(t, s, asset.Options{})
			wantDirectory(t, a, s, request(o.URL+"/pkg", tc.pairs...), tc.want...)
			wantDirectory(t, a, s, request(o.URL+"/pkg", tc.pairs...), tc.want...)
			if n := len(o.requests()); n != 1 {
				t.Errorf("%d requests, want one", n)
			}
		})
	}
}

func TestFetchDirectory_badArchives(t *testing.T) {
	bomb := gzipped(t, tarOf(t, tar.Header{Name: "zeros", Uname: strings.Repeat("\x00", 3<<20)}))
	deep := strings.Repeat("d/", 300) + "f"
	for _, tc := range []struct {
		name   string
		data   []byte
		pairs  []string
		reason asset.Reason
		words  string
	}{
		{"upwards", tarOf(t, tar.Header{Name: "a/../../etc/passwd"}), nil, asset.Aborted, "leads out"},
		{"absolute", tarOf(t, tar.Header{Name: "/etc/passwd"}), nil, asset.Aborted, "relative"},
		{"through a symlink", tarOf(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "/etc"}, tar.Header{Name: "a/passwd"}), nil, asset.Aborted, "a file and a directory"},
		{"a file over a directory", tarOf(t, tar.Header{Name: "a/b"}, tar.Header{Name: "a"}), nil, asset.Aborted, "a file and a directory"},
		{"a link to nowhere", tarOf(t, tar.Header{Typeflag: tar.TypeLink, Name: "a", Linkname: "/etc/passwd"}), nil, asset.Aborted, "no file before it"},
		{"a device", tarOf(t, tar.Header{Typeflag: tar.TypeBlock, Name: "sda"}), nil, asset.Aborted, "neither"},
		{"a FIFO", tarOf(t, tar.Header{Typeflag: tar.TypeFifo, Name: "p"}), nil, asset.Aborted, "neither"},
		{"a bomb", bomb, nil, asset.TooLarge, "bytes"},
		{"deep", tarOf(t, tar.Header{Name: deep}), nil, asset.Aborted, "deep"},
		{"truncated", gzipped(t, tarOf(t, tar.Header{Name: "a"}))[:60], nil, asset.Aborted, "malformed"},
		{"a truncated zip", zipOf(t, zipped("a", 0o644, "x"))[:40], nil, asset.Aborted, "malformed"},
		{"upwards in a zip", zipOf(t, zipped("../a", 0o644, "x")), nil, asset.Aborted, "leads out"},
		{"xz", []byte("\xfd7zXZ\x00 and so on"), nil, asset.Aborted, "xz"},
		{"no archive", []byte("hello"), nil, asset.Aborted, "no archive"},
		{"nothing", nil, nil, asset.Aborted, "no archive"},
		{"no such directory", tarOf(t, tar.Header{Name: "a"}), []string{"directory", "b"}, asset.NotFound, "b"},
		{"another checksum", tarOf(t, tar.Header{Name: "a"}), []string{"checksum.sri", sri("x")}, asset.Aborted, "checksum"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := newSite(t, serving(string(tc.data)))
			a := newService(t, nil, asset.Options{MaxBytes: 1 << 20})
			_, err := a.FetchDirectory(t.Context(), request(o.URL+"/pkg", tc.pairs...))
			wantReason(t, err, tc.reason, tc.words)
		})
	}
}

// TestFetchDirectory_storeFails: what is the store's fault is not the origin's.
func TestFetchDirectory_storeFails(t *testing.T) {
	o := newSite(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(tarOf(t, tar.Header{Name: "a"})) })
	s, opts := newForgetful(t)
	s.err = blob.ErrUnavailable
	a := newService(t, nil, opts)
	_, err := a.FetchDirectory(t.Context(), request(o.URL))
	if _, ok := errors.AsType[*asset.FetchError](err); ok || !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("%v, want ErrUnavailable", err)
	}
}

// FuzzUnpack: whatever comes, it becomes a directory or an error of the origin.
func FuzzUnpack(f *testing.F) {
	f.Add(tarOf(f, tar.Header{Name: "a/b"}, tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "a"}))
	f.Add(gzipped(f, tarOf(f, tar.Header{Name: "../x"})))
	f.Add(zipOf(f, zipped("a", 0o755, "x"), zipped("l", fs.ModeSymlink|0o777, "a")))
	s := newStore(f)
	a := newService(f, s, asset.Options{MaxBytes: 1 << 16})
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := a.Unpack(t.Context(), data)
		if err != nil {
			if _, ok := errors.AsType[*asset.FetchError](err); !ok {
				t.Errorf("%v, want a FetchError", err)
			}
			return
		}
		listing(t, s, d) // which checks each Directory
	})
}
