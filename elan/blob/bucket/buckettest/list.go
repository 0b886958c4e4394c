package buckettest

import (
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/mettle-build/mettle/elan/blob"
	"github.com/mettle-build/mettle/elan/digest"
)

// testList: what does not fit into one answer is listed all the same, a passing
// failure is not seen, and a lasting one ends the list with an error. Of a
// removal whose answer was lost the second attempt finds nothing, as it should.
func testList(t *testing.T, o Options) {
	e, s := setUp(t, o, o.fast())
	const n = 1001 // one more than buckets list at once
	for i := range n {
		k := blob.EntryKey{Instance: "a/b", Action: digest.Of(digest.SHA256, fmt.Append(nil, i))}
		if err := s.PutEntry(t.Context(), k, []byte("v")); err != nil {
			t.Fatal(err)
		}
	}
	count := func() (entries int, last error) {
		for info, err := range s.EntryInfos(t.Context()) {
			if last = err; err == nil && info.Key.Instance == "a/b" && info.Bytes == 1 {
				entries++
			}
		}
		return entries, last
	}
	e.Reset()
	e.Inject("list", 2, Status(http.StatusServiceUnavailable))
	if got, err := count(); got != n || err != nil {
		t.Errorf("%d entries, error %v; want %d", got, err, n)
	}
	wantCounts(t, e, map[string]int{"list": 4})
	e.Inject("list", -1, Status(http.StatusForbidden))
	if got, err := count(); got != 0 || !errors.Is(err, blob.ErrUnavailable) {
		t.Errorf("%d entries, error %v; want ErrUnavailable", got, err)
	}
	e.Reset()

	d := put(t, s, random(smallSize))
	for info, err := range s.Blobs(t.Context()) {
		if err != nil || info.Digest != d || time.Since(info.LastUse).Abs() > time.Minute {
			t.Errorf("listed %+v, error %v; want %s, used now", info, err, d)
		}
	}
	e.Reset()
	e.Inject("delete", 1, LoseAnswer) // the second attempt finds nothing
	if err := s.Remove(t.Context(), d); err != nil {
		t.Errorf("remove: %v", err)
	}
	wantMissing(t, s, d)
	wantCounts(t, e, map[string]int{"stat": 2, "delete": 2})
}
