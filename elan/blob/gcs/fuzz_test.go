package gcs

import (
	"testing"

	"github.com/mettle-build/mettle/elan/blob/bucket"
)

// FuzzReadStat: what a bucket says of an object is right, or worth another attempt.
func FuzzReadStat(f *testing.F) {
	f.Add([]byte(`{"size":"5","generation":"7","metageneration":"1","customTime":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte(`{"size":"-5","generation":"7"}`))
	f.Add([]byte(`{"size":5}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, body []byte) {
		st := bucket.Stat{Object: bucket.Object{Name: "n"}}
		if err := readStat(&st, body); err != nil {
			if st.Exists {
				t.Errorf("%q is an error, %v, and there", body, err)
			}
			return
		}
		if st.SizeBytes < 0 || !st.Exists || st.Version == "" {
			t.Errorf("%q is read as %+v", body, st)
		}
		_, _, _ = parseVersion(st.Version)
	})
}
