package action_test

import (
	"flag"
	"testing"
	"time"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/elan/action"
	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/blob/blobtest"
	"github.com/mettle-build/mettle/elan/blob/mem"
	"github.com/mettle-build/mettle/elan/digest"
)

//nolint:gochecknoglobals // a flag
var record = flag.String("record", "", "record what today's code keeps as that of this release")

// newReleased is an ActionCache and the failures beside it, of any age.
func newReleased(t *testing.T) (*action.Cache, *action.Failures, *mem.Store) {
	t.Helper()
	f, s := newFailures(t, action.FailuresOptions{MaxAge: 100 * 365 * 24 * time.Hour})
	c, err := action.New(action.Options{Entries: s, Store: s})
	if err != nil {
		t.Fatal(err)
	}
	return c, f, s
}

// TestRecord records a release, if it is told to.
func TestRecord(t *testing.T) {
	if *record == "" {
		t.Skip("-record names no release")
	}
	c, f, s := newReleased(t)
	for _, instance := range []string{"", "an/instance"} {
		if err := c.Put(t.Context(), keyOf(instance, 1), &repb.ActionResult{StdoutRaw: []byte("kept")}); err != nil {
			t.Fatal(err)
		}
		if err := f.Put(t.Context(), keyOf(instance, 2), failed(3)); err != nil {
			t.Fatal(err)
		}
	}
	blobtest.RecordEntries(t, s, *record)
}

// TestRelease: results and failures that each release has kept are there.
func TestRelease(t *testing.T) {
	blobtest.EachRelease(t, func(t *testing.T, restore func(blob.Entries)) {
		c, f, s := newReleased(t)
		restore(s)
		blobtest.Put(t, s, digest.SHA256, []byte("kept")) // what is printed is a blob, too
		for _, instance := range []string{"", "an/instance"} {
			if r, err := c.Get(t.Context(), keyOf(instance, 1)); err != nil || r.GetStdoutDigest().GetSizeBytes() != 4 {
				t.Errorf("%q: the result is %v, %v", instance, r, err)
			}
			if r, err := f.Get(t.Context(), keyOf(instance, 2)); err != nil || r.ExitCode != 3 {
				t.Errorf("%q: the failure is %v, %v", instance, r, err)
			}
		}
		if list, err := f.List(t.Context()); err != nil || len(list) != 2 {
			t.Errorf("listed are %v, %v, want two failures", list, err)
		}
	})
}
