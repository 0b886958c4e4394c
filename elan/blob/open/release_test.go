package open_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fsouza/fake-gcs-server/fakestorage"
	"github.com/google/go-cmp/cmp"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/open"
	"github.com/mettle-build/mettle/elan/digest"
)

//nolint:gochecknoglobals // a flag
var record = flag.String("record", "", "record the objects that today's stores make as those of this release")

// releaseDir has the objects of each release, by store. They never change.
const releaseDir = "testdata/releases"

// An object is one in a bucket, with what else tells of it.
type object struct {
	Name        string
	ContentType string `json:",omitempty"`
	// Timed: it has a custom time, by which the bucket's rule removes it.
	Timed bool `json:",omitempty"`
	Data  []byte
}

// A fakeBucket is a bucket named b of some kind, and how to get to it.
type fakeBucket struct {
	url string
	put func(t *testing.T, o object)
	all func(t *testing.T) []object
}

// fakeBuckets makes one of each kind, by the schemes of their URLs.
func fakeBuckets(t *testing.T) map[string]fakeBucket {
	t.Helper()
	google, err := fakestorage.NewServerWithOptions(fakestorage.Options{NoListener: true})
	must(t, err)
	google.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: "b"})
	googleHTTP := httptest.NewServer(google.HTTPHandler())
	t.Cleanup(googleHTTP.Close)
	t.Setenv("STORAGE_EMULATOR_HOST", googleHTTP.URL)

	amazon := s3mem.New()
	must(t, amazon.CreateBucket("b"))
	amazonHTTP := httptest.NewServer(gofakes3.New(amazon).Server())
	t.Cleanup(amazonHTTP.Close)
	t.Setenv("AWS_ACCESS_KEY_ID", "id")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	return map[string]fakeBucket{
		"gs": {
			url: "gs://b/pre",
			put: func(_ *testing.T, o object) {
				f := fakestorage.Object{ObjectAttrs: fakestorage.ObjectAttrs{BucketName: "b", Name: o.Name, ContentType: o.ContentType}, Content: o.Data}
				if o.Timed {
					f.CustomTime = time.Now()
				}
				google.CreateObject(f)
			},
			all: func(t *testing.T) (all []object) {
				t.Helper()
				list, err := google.ListObjectsWithOptionsPaginated("b", fakestorage.ListOptions{})
				must(t, err)
				for _, a := range list.Objects {
					o, err := google.GetObject("b", a.Name)
					must(t, err)
					all = append(all, object{a.Name, o.ContentType, !o.CustomTime.IsZero(), o.Content})
				}
				return all
			},
		},
		"s3": {
			url: "s3://b/pre?region=here&path_style=true&endpoint=" + amazonHTTP.URL,
			put: func(t *testing.T, o object) {
				t.Helper()
				_, err := amazon.PutObject("b", o.Name, map[string]string{"Content-Type": o.ContentType, "Last-Modified": time.Now().UTC().Format(http.TimeFormat)},
					bytes.NewReader(o.Data), int64(len(o.Data)), nil)
				must(t, err)
			},
			all: func(t *testing.T) (all []object) {
				t.Helper()
				list, err := amazon.ListBucket("b", nil, gofakes3.ListBucketPage{})
				must(t, err)
				for _, c := range list.Contents {
					o, err := amazon.GetObject("b", c.Key, nil)
					must(t, err)
					data, err := io.ReadAll(o.Contents)
					must(t, errors.Join(err, o.Contents.Close()))
					all = append(all, object{Name: c.Key, ContentType: o.Metadata["Content-Type"], Data: data})
				}
				return all
			},
		},
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// forms are the ways to keep blobs in a bucket, as options of a URL.
func forms() []string { return []string{"", "compress=zstd"} }

// in is the URL of a bucket with an option.
func (b fakeBucket) in(form string) string {
	separator := map[bool]string{true: "&", false: "?"}[strings.Contains(b.url, "?")]
	return strings.TrimRight(b.url+separator+form, "?&")
}

// releaseBlobs are the blobs that are put, of each function and some in a space.
func releaseBlobs() map[digest.Digest][]byte {
	all := map[digest.Digest][]byte{}
	for _, data := range [][]byte{[]byte("short"), bytes.Repeat([]byte("what a release has kept, "), 60)} {
		for _, fn := range digest.Functions() {
			all[digest.Of(fn, data)] = data
		}
		all[digest.Of(digest.SHA256, data).In(digest.SpaceOf("instance"))] = data
	}
	return all
}

// releaseEntries are the entries, of instances whose names are told in each way.
func releaseEntries() map[blob.EntryKey][]byte {
	all := map[blob.EntryKey][]byte{}
	for i, instance := range []string{"", "plain", "with/slashes", strings.Repeat("long/", 60)} {
		d := digest.Of(digest.SHA256, []byte("action"))
		all[blob.EntryKey{Instance: instance, Action: d}] = fmt.Appendf(nil, "\x0a\x04value of %d", i)
	}
	return all
}

// TestRecord records a release, if it is told to.
func TestRecord(t *testing.T) {
	if *record == "" {
		t.Skip("-record names no release")
	}
	path := filepath.Join(releaseDir, *record+".json")
	if _, err := os.Stat(path); err == nil {
		t.Fatalf("%s was recorded: what a release made does not change; record the next one", *record)
	}
	all := map[string][]object{}
	for scheme, b := range fakeBuckets(t) {
		for _, form := range forms() {
			fillBucket(t, openAll(t, open.Options{}, b.in(form)))
		}
		all[scheme] = b.all(t)
		slices.SortFunc(all[scheme], func(a, b object) int { return strings.Compare(a.Name, b.Name) })
	}
	text, err := json.MarshalIndent(all, "", " ")
	must(t, err)
	must(t, os.MkdirAll(releaseDir, 0o755))                //nolint:gosec // part of the source
	must(t, os.WriteFile(path, append(text, '\n'), 0o644)) //nolint:gosec // part of the source
}

func fillBucket(t *testing.T, s open.Storage) {
	t.Helper()
	for d, data := range releaseBlobs() {
		must(t, blob.ReceiveBytes(t.Context(), s, d, data))
	}
	for k, value := range releaseEntries() {
		must(t, s.PutEntry(t.Context(), k, value))
	}
}

// TestRelease: buckets that programs of each release have filled have all that they
// had, and today's programs make the same objects, which those of a release find.
func TestRelease(t *testing.T) {
	paths, err := filepath.Glob(releaseDir + "/*.json")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no release is recorded: %v", err)
	}
	for _, path := range paths {
		var all map[string][]object
		text, err := os.ReadFile(path)
		must(t, err)
		must(t, json.Unmarshal(text, &all))
		t.Run(strings.TrimSuffix(filepath.Base(path), ".json"), func(t *testing.T) {
			for scheme, b := range fakeBuckets(t) {
				for _, o := range all[scheme] {
					b.put(t, o)
				}
				for _, form := range forms() {
					checkBucket(t, scheme+" "+form, openAll(t, open.Options{}, b.in(form)))
				}
			}
			for scheme, b := range fakeBuckets(t) { // empty ones
				for _, form := range forms() {
					fillBucket(t, openAll(t, open.Options{}, b.in(form)))
				}
				made := b.all(t)
				slices.SortFunc(made, func(a, b object) int { return strings.Compare(a.Name, b.Name) })
				if diff := cmp.Diff(alike(all[scheme]), alike(made)); diff != "" {
					t.Errorf("%s: the objects (-of the release, +of today):\n%s", scheme, diff)
				}
			}
		})
	}
}

// alike is what does not depend on who has compressed: of a container the header.
func alike(os []object) []object {
	os = slices.Clone(os)
	for i, o := range os {
		if strings.Contains(o.Name, "/zstd/") {
			os[i].Data = o.Data[:24]
		}
	}
	return os
}

func checkBucket(t *testing.T, what string, s open.Storage) {
	t.Helper()
	var ds []digest.Digest
	for d, want := range releaseBlobs() {
		ds = append(ds, d)
		if got, err := blob.ReadAll(t.Context(), s, d, 1<<20); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %s: %d bytes, %v; want %d", what, d, len(got), err, len(want))
		}
	}
	if missing, err := s.FindMissing(t.Context(), ds); err != nil || len(missing) > 0 {
		t.Errorf("%s: missing %v, %v", what, missing, err)
	}
	for k, want := range releaseEntries() {
		if got, err := s.Entry(t.Context(), k); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: entry of %.20q: %q, %v; want %q", what, k.Instance, got, err, want)
		}
	}
}
