package flags_test

import (
	"math"
	"testing"

	"github.com/mettle-build/mettle/elan/flags"
)

// FuzzSize: a size is no negative number, whatever is written, and what it prints as
// is read as the same.
func FuzzSize(f *testing.F) {
	for _, s := range []string{"500MB", "4GiB", "1048576", " 1.5 TiB", "-1", "1e30", "NaN", "0x1p10B", "+Inf", "1_000"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var s, again flags.Size
		if err := s.UnmarshalText([]byte(text)); err != nil {
			return
		}
		if s < 0 || s > math.MaxInt64/2 {
			t.Errorf("%q is read as %d", text, int64(s))
		}
		if err := again.UnmarshalText([]byte(s.String())); err != nil {
			t.Errorf("%q prints as %s: %v", text, s, err)
		} else if diff := again - s; diff < -s>>50 || diff > s>>50 { // it comes by a float
			t.Errorf("%q is %d, which prints as %s, which is %d", text, int64(s), s, int64(again))
		}
		if flags.Bytes(int64(s)) == "" {
			t.Errorf("%d for people is nothing", int64(s))
		}
	})
}
