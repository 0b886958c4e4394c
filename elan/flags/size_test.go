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

func TestBytes(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1<<20 - 1: "1.0 MiB", 5 << 30: "5.0 GiB", 1<<63 - 1: "8.0 EiB",
	} {
		if got := flags.Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %q, want %q", n, got, want)
		}
	}
}
