package bench

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestSample_addStat(t *testing.T) {
	page := float64(os.Getpagesize())
	for _, tc := range []struct {
		name, stat string
		want       sample
		err        string
	}{
		{
			"a name of brackets and spaces",
			"42 (a) b) R (c) S 1 42 42 0 -1 4194304 100 200 0 0 150 50 30 20 20 0 8 0 12345 1000000 77 18446744073709551615",
			sample{cpu: 2 * time.Second, children: 500 * time.Millisecond, rssBytes: 77 * page},
			"",
		},
		{"too short", "42 (true) S 1 2 3", sample{}, "too few fields"},
		{"empty", "", sample{}, "too few fields"},
		{"no number", "42 (true) S" + strings.Repeat(" x", 30), sample{}, "stat field 14"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got sample
			err := got.addStat(tc.stat)
			if (err == nil) != (tc.err == "") || (err != nil && !strings.Contains(err.Error(), tc.err)) {
				t.Fatalf("error %v, want %q", err, tc.err)
			}
			if got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestProbe_processOfNobody(t *testing.T) {
	if _, err := (probe{pids: []int{-1}}).sample(t.Context()); err == nil || !strings.Contains(err.Error(), "process -1") {
		t.Errorf("error %v, want one that names the process", err)
	}
}
