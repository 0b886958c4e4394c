package asset_test

import (
	"flag"
	"testing"

	"github.com/mettle-build/mettle/elan/asset"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
)

//nolint:gochecknoglobals // a flag
var record = flag.String("record", "", "record what today's code keeps as that of this release")

// TestRecord records a release, if it is told to.
func TestRecord(t *testing.T) {
	if *record == "" {
		t.Skip("-record names no release")
	}
	s := newStore(t)
	p := asset.Push{
		URIs: []string{"urn:uuid:1", "urn:other"}, Digest: blobtest.Put(t, s, of("").Function(), []byte("hello")),
		Qualifiers: qualifiers("resource_type", "text/plain", "checksum.sri", sri("hello")),
	}
	if err := newService(t, s, asset.Options{}).PushBlob(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	blobtest.RecordEntries(t, s, *record)
}

// TestRelease: what was pushed to a server of each release is found by each of its
// names.
func TestRelease(t *testing.T) {
	blobtest.EachRelease(t, func(t *testing.T, restore func(blob.Entries)) {
		s := newStore(t)
		restore(s)
		blobtest.Put(t, s, of("").Function(), []byte("hello"))
		a := newService(t, s, asset.Options{})
		for _, uri := range []string{"urn:uuid:1", "urn:other"} {
			wantBlob(t, a, s, request(uri, "resource_type", "text/plain", "checksum.sri", sri("hello")), "hello")
		}
		wantBlob(t, a, s, request("urn:third", "checksum.sri", sri("hello")), "hello")
	})
}
