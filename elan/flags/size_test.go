package flags_test

import (
	"testing"

	"github.com/mettle-build/mettle/elan/flags"
)

func TestSize(t *testing.T) {
	for in, want := range map[string]struct {
		bytes int64
		out   string
	}{
		"0":       {0, "0"},
		"17":      {17, "17"},
		"17B":     {17, "17"},
		"500MB":   {500_000_000, "500000000"},
		"4GiB":    {4 << 30, "4GiB"},
		"1.5KiB":  {1536, "1536"},
		"2 TiB":   {2 << 40, "2TiB"},
		"1048576": {1 << 20, "1MiB"},
	} {
		t.Run(in, func(t *testing.T) {
			var s flags.Size
			if err := s.UnmarshalText([]byte(in)); err != nil || int64(s) != want.bytes || s.String() != want.out {
				t.Errorf("Size(%q) = %d (%s), %v; want %d (%s)", in, s, s, err, want.bytes, want.out)
			}
		})
	}
	for _, in := range []string{"", "GB", "-1", "four", "1e40", "5 bytes"} {
		var s flags.Size
		if err := s.UnmarshalText([]byte(in)); err == nil {
			t.Errorf("Size(%q) = %d, want an error", in, s)
		}
	}
}
