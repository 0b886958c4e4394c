package flags

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes that reads and prints as people write it: 500MB
// (powers of 1000), 4GiB (powers of 1024), or plain bytes. It is a flag's type.
type Size int64

// units in the order in which they are tried: a suffix comes before its own.
//
//nolint:gochecknoglobals // an immutable table
var units = []struct {
	suffix string
	bytes  int64
}{
	{"KiB", 1 << 10},
	{"MiB", 1 << 20},
	{"GiB", 1 << 30},
	{"TiB", 1 << 40},
	{"kB", 1e3},
	{"KB", 1e3},
	{"MB", 1e6},
	{"GB", 1e9},
	{"TB", 1e12},
	{"B", 1},
	{"", 1},
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(text []byte) error {
	for _, u := range units {
		number, ok := strings.CutSuffix(string(text), u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		if err != nil || math.IsNaN(n) || n < 0 || n*float64(u.bytes) > math.MaxInt64/2 {
			break
		}
		*s = Size(n * float64(u.bytes))
		return nil
	}
	return fmt.Errorf("size %q: want a number of bytes such as 500MB, 4GiB or 1048576", text)
}

// String is s in the largest binary unit that divides it.
func (s Size) String() string {
	for _, u := range []int{3, 2, 1, 0} {
		if b := Size(units[u].bytes); s >= b && s%b == 0 {
			return strconv.FormatInt(int64(s/b), 10) + units[u].suffix
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// Bytes is a number of bytes for people, as in 1.5 GiB.
func Bytes(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	units := []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	f := float64(n) / (1 << 10)
	for len(units) > 1 && f >= 1023.95 { // what would be printed as 1024.0
		f /= 1 << 10
		units = units[1:]
	}
	return fmt.Sprintf("%.1f %s", f, units[0])
}
